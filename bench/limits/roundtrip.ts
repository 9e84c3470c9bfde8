/**
 * The floor of a round trip over one streaming request: the runtime's own `fetch` and server, with
 * nothing of ours in between. Run it with `deno run -A` or `bun`; the server is a second process.
 */
import { spawn } from "node:child_process";
import process from "node:process";

if (process.argv[2] === "serve") {
  const { Bun } = globalThis as { Bun?: { serve(options: object): { port: number } } };
  const echo = ({ body }: Request) => new Response(body!.pipeThrough(new TransformStream()));
  if (Bun) console.log(Bun.serve({ port: 0, fetch: echo }).port);
  else Deno.serve({ port: 0, onListen: ({ port }) => console.log(port) }, echo);
} else {
  const run = "Deno" in globalThis ? ["run", "-A"] : [];
  const server = spawn(process.execPath, [...run, import.meta.filename!, "serve"]);
  const port = await new Promise<string>((resolve) => server.stdout.once("data", resolve));
  const pipe = new TransformStream<Uint8Array, Uint8Array>();
  const up = pipe.writable.getWriter();
  const message = new Uint8Array(72);
  up.write(message);
  const init = { method: "POST", body: pipe.readable, duplex: "half" } as RequestInit;
  const down = (await fetch(`http://127.0.0.1:${`${port}`.trim()}`, init)).body!.getReader();
  await down.read();
  const times: number[] = [];
  for (let i = 0; i < 5000; i++) {
    const started = performance.now();
    up.write(message);
    await down.read();
    times.push(performance.now() - started);
  }
  times.splice(0, 500);
  times.sort((a, b) => a - b);
  console.log(`p50 ${times[2250]!.toFixed(4)} ms, p99 ${times[4455]!.toFixed(4)} ms`);
  server.kill();
  process.exit();
}
