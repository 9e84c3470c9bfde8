/**
 * A duplex request takes 512 KiB up and is then replaced by another: by a resumption
 * that nobody is to notice, since the network did nothing wrong.
 */
import type { SSEOptions } from "../server.ts";
import {
  assert,
  assertEquals,
  assertGreater,
  assertLessOrEqual,
  test,
  type TestContext,
  until,
} from "./harness.ts";
import { type Around, connect, type Connected, listen } from "./pair.ts";
import { ScriptedServer } from "./scripted.ts";

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

for (const transport of ["duplex", "stream"] as const) {
  test(`answers to pings count in what a request may carry (${transport})`, async (t) => {
    const server = new ScriptedServer();
    const sizes: number[] = [];
    const { socket, events, opened } = connect(t, "http://scripted.test/", {
      transport,
      fetch: (url, init) => {
        if (init!.body instanceof ReadableStream) count(init!.body, sizes);
        return server.fetch(url, init);
      },
    });
    let stream = (await server.next()).stream();
    await opened;
    socket.send("hello"); // opens the uplink, where it is another request
    await until(() => sizes.length && sizes[0]! > 10);
    stream.write("event: duplex-ack\ndata: 1 15\n\n");
    const payload = "a".repeat(164);
    for (let i = 0; i < 5_000; i++) {
      stream.write(`event: duplex-ping\ndata: 0 ${payload}\n\n`);
      await soon();
      for (const asked of server.asked.splice(0)) {
        if (asked.headers.has("last-event-id")) stream = asked.stream({ received: 1 });
        else if (asked.body) asked.respond(204, { "x-duplex-received": "1" });
      }
    }
    assertLessOrEqual(Math.max(...sizes), 2 ** 19);
    assertGreater(Math.max(...sizes), 2 ** 18);
    assertEquals(events, ["open"]);
    t.defer(() => stream.end());
  });
}

/** Reads a body to its end, and counts. */
async function count(body: ReadableStream<Uint8Array>, sizes: number[]): Promise<void> {
  const i = sizes.push(0) - 1;
  try {
    for await (const chunk of body) sizes[i]! += chunk.length;
  } catch {
    // abandoned
  }
}

const soon = () => new Promise<void>((resolve) => setImmediate(resolve));
