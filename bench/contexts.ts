/**
 * Sessions that are opened and closed without a network, by turns in their own async context and
 * without: what remains is the server's own work, of which the contexts are a part.
 *
 * @module
 */
import { AsyncLocalStorage } from "node:async_hooks";
import { sseAdapter } from "../server.ts";
import { spread } from "./measure.ts";
import { answer } from "./rpc.ts";

const URL_ = "http://127.0.0.1/ws";
const FULL = { "x-duplex-version": "1" };
const encoder = new TextEncoder();
/** CLOSE 1000, by a message's number. */
const CLOSE = new Uint8Array([
  ...encoder.encode("SEQ 1\r\n1\r\nCLOSE 2\r\n"),
  ...[0x03, 0xe8, 0x0d, 0x0a],
]);
/** Short, so that most are not interrupted. */
const SESSIONS = 10;

const ways = ["own context", "none"] as const;
const { snapshot } = AsyncLocalStorage;
const ws = sseAdapter({ hooks: { open() {}, message() {}, close() {} } });

async function session(): Promise<void> {
  const opened = await ws.fetch(
    new Request(URL_, { headers: { ...FULL, accept: "text/event-stream" } }),
  );
  const headers = {
    ...FULL,
    "content-type": "application/websocket-events",
    "x-crossws-id": opened.headers.get("x-crossws-id")!,
  };
  const closed = await ws.fetch(new Request(URL_, { method: "POST", headers, body: CLOSE }));
  if (closed.status !== 204) throw new Error(await closed.text());
  await opened.body!.cancel();
}

/** In µs a session. */
async function block(way: typeof ways[number]): Promise<number> {
  // Where a runtime has none, the server does without.
  AsyncLocalStorage.snapshot = way === "none" ? undefined as never : snapshot;
  const started = performance.now();
  for (let count = 0; count < SESSIONS; count++) await session();
  return (performance.now() - started) / SESSIONS * 1000;
}

answer({
  async run({ rounds, ms }) {
    const samples: Record<string, number[]> = {};
    for (let round = -1; round < rounds; round++) {
      const blocks: Record<string, number[]> = {};
      const end = performance.now() + ms;
      while (performance.now() < end) {
        for (const way of [...ways, ...ways.toReversed()]) {
          (blocks[way] ??= []).push(await block(way));
        }
      }
      if (round < 0) continue; // the first warms up
      for (const way of ways) (samples[way] ??= []).push(spread(blocks[way]!).median);
    }
    return samples;
  },
});
