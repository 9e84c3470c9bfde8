/**
 * A duplex request takes 512 KiB up and is then replaced by another: by a resumption
 * that nobody is to notice, since the network did nothing wrong.
 */
import type { SSEOptions } from "../server.ts";
import { assert, assertEquals, assertLessOrEqual, test, type TestContext } from "./harness.ts";
import { type Around, connect, type Connected, listen } from "./pair.ts";

const SIZE = 20_000;
const COUNT = 100;
/** Requests that carry so much, and those that could not take the message that came next. */
const LEAST = Math.floor(COUNT * SIZE / 2 ** 19) + 1;

interface Talk extends Connected {
  /** The method of each request. */
  requests: string[];
}

/** A client of an echo, which has opened by duplex. */
async function talk(
  t: TestContext,
  options: Partial<SSEOptions> = {},
  around: Around = (request, next) => next(request),
): Promise<Talk> {
  const requests: string[] = [];
  const hooks: SSEOptions["hooks"] = {
    message: (peer, message) => void peer.send(message.text().slice(0, 20)),
  };
  const { url } = await listen(t, { hooks, ...options }, (request, next) => {
    requests.push(request.method);
    return around(request, next);
  });
  const connected = connect(t, url, { transport: "duplex" });
  await connected.opened;
  return Object.assign(connected, { requests });
}

/** Sends, and sees that all comes back in order. */
async function exchange({ socket, messages }: Talk): Promise<void> {
  const sent = Array.from({ length: COUNT }, (_, i) => `${i}:`.padEnd(SIZE, "a"));
  for (const message of sent) socket.send(message);
  assertEquals(await messages.take(COUNT), sent.map((message) => message.slice(0, 20)));
}

const isResume = (request: Request) => request.headers.has("last-event-id");

test("a duplex request is renewed without a word, and nothing is sent twice", async (t) => {
  const all = await talk(t);
  await exchange(all);
  const { socket, events, requests } = all;
  assertEquals([events, socket.transport, socket.readyState], [["open"], "duplex", 1]);
  assertEquals([socket.stats.resumes, socket.stats.resent], [0, 0]);
  assert(requests.every((request) => request === "POST"), "each is one duplex request");
  assertEquals(requests.length, LEAST);
});

test("a renewal that fails is a drop like any other", async (t) => {
  let refusals = 0;
  const all = await talk(t, {}, (request, next) => {
    if (isResume(request) && refusals++ < 2) return new Response("Busy", { status: 503 });
    return next(request);
  });
  await exchange(all);
  const { socket, events } = all;
  assertEquals([events, socket.transport], [["open", "drop", "resume"], "duplex"]);
  assertEquals([socket.stats.resumes, socket.stats.resent], [1, 0]);
});

test("where a renewal may not stream, the client posts, and nobody notices", async (t) => {
  const all = await talk(t, {}, (request, next) => {
    if (isResume(request) && request.method === "POST") {
      return new Response("Not here", { status: 411 });
    }
    return next(request);
  });
  await exchange(all);
  const { socket, events } = all;
  assertEquals([events, socket.transport], [["open"], "post"]);
});

test("a session that cannot be resumed is not renewed: its uplink goes on by streams", async (t) => {
  const all = await talk(t, { resumeTimeout: 0 });
  await exchange(all);
  const { socket, events, requests } = all;
  assertEquals([events, socket.readyState], [["open"], 1]);
  assertEquals([socket.stats.resumes, socket.stats.resent], [0, 0]);
  assertEquals(requests.length, LEAST);
});

test("a message over 512 KiB goes alone, in a request that is renewed once for it", async (t) => {
  const all = await talk(t);
  const { socket, events, messages, requests } = all;
  for (let i = 0; i < 3; i++) socket.send(`${i}:`.padEnd(600_000, "b"));
  const echoed = await messages.take(3) as string[];
  assertEquals(echoed.map((text) => text.slice(0, 3)), ["0:b", "1:b", "2:b"]);
  assertEquals(events, ["open"]);
  assertLessOrEqual(requests.length, 3);
});
