/**
 * Deno's fetch turns TCP_NODELAY off (strace shows it): while the end of one chunk of an upload is
 * not acknowledged, the kernel keeps the next one back, and on a connection that has been answered
 * before, the other side's kernel may acknowledge only after 40 ms. Uploads of two chunks, until the
 * server has both. `deno run -A bench/limits/nagle.ts`
 */
const FIRST = 75_000;
const SECOND = 33_000;
let whenReceived = () => {};
const server = Deno.serve({ port: 0, onListen: () => {} }, async (request) => {
  let missing = FIRST + SECOND;
  for await (const { length } of request.body!) if (!(missing -= length)) whenReceived();
  return new Response();
});
const times: number[] = [];
for (let i = 0; i < 100; i++) {
  const { readable, writable } = new TransformStream<Uint8Array<ArrayBuffer>>();
  const init = { method: "POST", body: readable };
  const answer = fetch(`http://127.0.0.1:${server.addr.port}`, init);
  const up = writable.getWriter();
  const started = performance.now();
  const received = new Promise<void>((resolve) => whenReceived = resolve);
  up.write(new Uint8Array(FIRST));
  await new Promise((resolve) => setTimeout(resolve, 1));
  up.write(new Uint8Array(SECOND));
  await received;
  times.push(performance.now() - started);
  up.close();
  await (await answer).text();
}
const stalls = times.filter((time) => time > 35).length;
console.log(`${stalls} of 100 took more than 35 ms; median ${times.sort((a, b) => a - b)[50]} ms`);
Deno.exit();
