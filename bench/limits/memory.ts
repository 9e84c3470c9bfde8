/**
 * What an open session is made of on Bun, beside a bare stream: objects of each kind, and bytes
 * of live heap. `bun bench/limits/memory.ts`
 */
import process from "node:process";
import { sseAdapter } from "../../server.ts";

interface Stats {
  heapSize: number;
  objectTypeCounts: Record<string, number>;
}
const jsc = "bun:jsc"; // a name that Deno, which checks this file, does not know
const { heapStats } = await import(jsc) as { heapStats(): Stats };
const { Bun } = globalThis as unknown as { Bun: { gc(force: boolean): void } };
const COUNT = 1000;
const ws = sseAdapter({ bidir: true });
const ours = () => {
  const headers = { accept: "text/event-stream", "x-duplex-version": "1" };
  return ws.fetch(new Request("http://localhost/", { headers }), {});
};
const kept: unknown[] = [];
const raw = () => {
  let controller!: ReadableStreamDefaultController;
  const stream = new ReadableStream({ start: (given) => void (controller = given) });
  controller.enqueue(new Uint8Array(100));
  kept.push(controller);
  return new Response(stream);
};
for (const open of [raw, ours]) {
  await open(); // what is made once
  Bun.gc(true);
  const before = heapStats();
  for (let i = 0; i < COUNT; i++) {
    const reader = (await open()).body!.getReader();
    await reader.read();
    kept.push(reader.read(), reader);
  }
  Bun.gc(true);
  const { heapSize, objectTypeCounts } = heapStats();
  console.log(open.name, Math.round((heapSize - before.heapSize) / COUNT), "bytes a session");
  for (const [name, count] of Object.entries(objectTypeCounts)) {
    const each = (count - (before.objectTypeCounts[name] ?? 0)) / COUNT;
    if (each >= 0.5) console.log(`  ${each.toFixed(0)} ${name}`);
  }
}
process.exit();
