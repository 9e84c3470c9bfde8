/**
 * A pending read of a request's body holds 64 KiB on Deno, unless the reader brings its own buffer.
 * `deno run -A --v8-flags=--expose-gc bench/limits/body.ts [byob]`
 */
import { connect } from "node:net";

const COUNT = 500;
const server = Deno.serve({ port: 0, onListen: () => {} }, ({ body }) => {
  const own = Deno.args[0] === "byob";
  if (own) body!.getReader({ mode: "byob" }).read(new Uint8Array(2048)).catch(() => {});
  else body!.getReader().read().catch(() => {});
  return new Response(new ReadableStream({ start: (c) => c.enqueue(new Uint8Array(1)) }));
});
const before = Deno.memoryUsage().rss;
const head = "POST / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n";
for (let i = 0; i < COUNT; i++) {
  const socket = connect(server.addr.port, "127.0.0.1", () => socket.write(head));
  await new Promise((resolve) => socket.once("data", resolve));
}
(globalThis as unknown as { gc(): void }).gc();
const each = (Deno.memoryUsage().rss - before) / COUNT / 1024;
console.log(`${each.toFixed(0)} KiB a request, client and server in one process`);
Deno.exit();
