/**
 * The floor of a round trip over one streaming request: the runtime's own `fetch` and server, with
 * nothing of ours, against its own WebSocket. `deno run -A` or `bun` this file.
 */
const { Bun } = globalThis as { Bun?: { serve(o: object): { port: number } } };
const body = (request: Request) => new Response(request.body!.pipeThrough(new TransformStream()));
const port = Bun
  ? Bun.serve({ port: 0, fetch: body }).port
  : Deno.serve({ port: 0, onListen: () => {} }, body).addr.port;

let up!: ReadableStreamDefaultController<Uint8Array<ArrayBuffer>>;
const stream = new ReadableStream<Uint8Array<ArrayBuffer>>({ start: (given) => void (up = given) });
const message = new Uint8Array(72);
up.enqueue(message);
const init = { method: "POST", body: stream, duplex: "half" };
const down = (await fetch(`http://127.0.0.1:${port}`, init)).body!.getReader();
await down.read();
const times: number[] = [];
for (let i = 0; i < 5000; i++) {
  const started = performance.now();
  up.enqueue(message);
  await down.read();
  times.push(performance.now() - started);
}
times.splice(0, 500);
times.sort((a, b) => a - b);
console.log(`p50 ${times[2250]!.toFixed(4)} ms, p99 ${times[4455]!.toFixed(4)} ms, in one process`);
(globalThis as { process?: { exit(): void } }).process?.exit();
