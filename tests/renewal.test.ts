/**
 * A duplex request takes 512 KiB up and is then replaced by another, which takes twice as much:
 * by a resumption that nobody is to notice, since the network did nothing wrong.
 */
import type { SSEOptions } from "../server.ts";
import {
  assert,
  assertEquals,
  assertGreater,
  assertGreaterOrEqual,
  assertLess,
  assertLessOrEqual,
  deferred,
  sleep,
  test,
  type TestContext,
  until,
} from "./harness.ts";
import { type Around, connect, type Connected, listen } from "./pair.ts";
import { ScriptedServer } from "./scripted.ts";

const SIZE = 20_000;
const COUNT = 100;
/** Requests that carry so much: where each takes twice as much as the last, and where none does. */
const LEAST = 3;
const MOST = Math.floor(COUNT * SIZE / 2 ** 19) + 1;

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
  assertGreaterOrEqual(requests.length, LEAST);
  assertLessOrEqual(requests.length, MOST);
});

for (const transport of ["post", "duplex"] as const) {
  test(`what comes while a connection is being renewed is no more than it goes on after (${transport})`, async (t) => {
    const COUNT = 200;
    const renewal = Promise.withResolvers<void>();
    const answer = Promise.withResolvers<void>();
    const statuses: number[] = [];
    const options: SSEOptions = {
      window: 2_000,
      maxConnectionAge: 500,
      hooks: {
        async open(peer) {
          for (let i = 0; i < COUNT; i++) {
            if (i === COUNT / 2) await renewal.promise; // the next ones come meanwhile
            if (i === COUNT - 1) await answer.promise; // the last one comes by the next connection
            else await peer.waitForDrain({ threshold: 1 });
            peer.send(`${i}`.padEnd(100));
          }
        },
      },
    };
    const { url } = await listen(t, options, async (request, next) => {
      if (!isResume(request)) return next(request);
      renewal.resolve();
      await sleep(200); // for what is not to come: an acknowledgement of what comes meanwhile
      const response = await next(request);
      statuses.push(response.status);
      answer.resolve();
      return response;
    });
    const { events, messages, opened } = connect(t, url, { transport });
    await opened;
    const all = await messages.take(COUNT);
    assertEquals(all.map(Number), Array.from({ length: COUNT }, (_, i) => i));
    assertEquals([events, statuses], [["open"], [200]]);
  });
}

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
  assertGreaterOrEqual(requests.length, LEAST);
  assertLessOrEqual(requests.length, MOST);
});

test("a connection that cannot be resumed is not put at risk by a long body", async (t) => {
  const hooks: SSEOptions["hooks"] = { message: (peer) => void peer.send("got") };
  const { url } = await listen(t, { hooks, resumeTimeout: 0 });
  const sizes: number[] = [];
  for (let i = 0; i < 2; i++) { // the second one knows what got through for the first
    sizes.length = 0;
    const { socket, events, messages, opened } = connect(t, url, {
      transport: "duplex",
      fetch: (url, init) => fetch(url, counted(init!, sizes)),
    });
    await opened;
    for (let i = 0; i < COUNT; i++) socket.send("c".repeat(SIZE));
    await messages.take(COUNT);
    assertLessOrEqual(sizes[0]!, 2 ** 19);
    assertGreater(sizes[0]!, 2 ** 18);
    assertEquals(events, ["open"]);
  }
  assertGreater(Math.max(...sizes.slice(1)), 2 ** 19); // of the streams beside it
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

test("a message over 512 KiB that no stream brings soon enough goes by another request", async (t) => {
  const got: number[] = [];
  const over = deferred();
  t.defer(() => over.resolve());
  const { url } = await listen(t, {
    hooks: { message: (_, message) => void got.push(message.uint8Array().length) },
  }, async (request, next) => {
    if (request.method === "POST" && !request.headers.has("content-length")) await over.promise;
    return await next(request);
  });
  const { socket, opened, events } = connect(t, url, { transport: "stream" });
  await opened;
  socket.send(new Uint8Array(600_000)); // shorter streams would not help
  await until(() => socket.bufferedAmount === 0, { timeout: 15_000 });
  assertEquals([got, socket.transport, events], [[600_000], "post", ["open"]]);
});

for (const transport of ["duplex", "stream"] as const) {
  test(`answers to pings count in what a request may carry (${transport})`, async (t) => {
    const server = new ScriptedServer();
    const sizes: number[] = [];
    const { socket, events, opened } = connect(t, `http://${transport}.test/`, {
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
    assertLessOrEqual(sizes[0]!, 2 ** 19);
    assertLessOrEqual(Math.max(...sizes), 2 ** 20);
    assertGreater(Math.max(...sizes), 2 ** 18);
    assertEquals(events, ["open"]);
    t.defer(() => stream.end());
  });
}

const RENEW = "event: duplex-renew\ndata:\n\n";

for (const transport of ["post", "stream", "duplex"] as const) {
  test(`at duplex-renew the old stream goes on until the next is answered (${transport})`, async (t) => {
    const server = new ScriptedServer();
    const { events, messages, opened, socket } = connect(t, "http://scripted.test/", {
      transport,
      fetch: server.fetch,
    });
    const before = await server.next();
    const old = before.stream();
    await opened;
    old.write("data: 1\n\n");
    assertEquals(await messages.next(), "1");
    old.write(RENEW);
    const after = await server.next();
    assertEquals(after.headers.get("last-event-id"), "1");
    old.write("data: 2\n\ndata: 3\n\n");
    assertEquals(await messages.take(2), ["2", "3"], "it is read while the next is asked for");
    assertEquals(before.signal.aborted, false);
    const next = after.stream();
    await until(() => before.signal.aborted);
    // What the old one brought meanwhile comes once more; and a ping tells the server's count.
    next.write("data: 2\n\nevent: duplex-ping\ndata: 2 cGluZw==\n\ndata: 3\n\ndata: 4\n\n");
    assertEquals(await messages.take(1), ["4"]);
    t.defer(() => next.end());
    assertEquals([events, messages.left, socket.stats.resumes], [["open"], 0, 0]);
    next.write(RENEW); // and once more
    let again = await server.next();
    while (!again.headers.has("last-event-id")) again = await server.next(); // its answer to the ping
    assertEquals(again.headers.get("last-event-id"), "4");
  });
}

test("a page that is long at what came before a renewal takes no stream for held", async (t) => {
  const server = new ScriptedServer();
  const { socket, events, messages, opened } = connect(t, "http://scripted.test/", {
    transport: "post",
    fetch: server.fetch,
  });
  const stream = (await server.next()).stream();
  await opened;
  socket.addEventListener("message", () => {
    const end = performance.now() + 500;
    while (performance.now() < end);
  });
  const before = Array.from({ length: 8 }, (_, n) => `${n}`);
  const said = before.map((text) => `data: ${text}\n\n`).join("");
  stream.write(`event: duplex-renew\ndata:\n\n${said}`);
  const next = (await server.next()).stream();
  next.write(`${said}data: last\n\n`);
  assertEquals(await messages.take(9), [...before, "last"]);
  assertEquals([events, server.asked.length, socket.transport], [["open"], 0, "post"]);
}, { timeout: 20_000 });

test("a server's close that comes while a connection is renewed is taken", async (t) => {
  const server = new ScriptedServer();
  const { closed, opened, events } = connect(t, "http://scripted.test/", {
    transport: "post",
    fetch: server.fetch,
  });
  const old = (await server.next()).stream();
  await opened;
  old.write(RENEW);
  const renewal = await server.next();
  old.write('event: duplex-close\ndata: {"code":3001,"reason":"bye","sent":0}\n\n');
  const farewell = await server.next();
  farewell.respond(204, { "x-duplex-received": "1" });
  const { code, reason, wasClean } = await closed;
  assertEquals([code, reason, wasClean, events], [3001, "bye", true, ["open", "close"]]);
  await until(() => renewal.signal.aborted);
});

for (const status of [503, 411, 0]) {
  test(`a renewal that is refused by ${status || "the network"} is made again, by a resumption`, async (t) => {
    const server = new ScriptedServer();
    const { events, messages, opened, socket } = connect(t, "http://scripted.test/", {
      transport: "post",
      fetch: server.fetch,
    });
    const old = (await server.next()).stream();
    await opened;
    old.write(`data: 1\n\n${RENEW}`);
    const refused = await server.next();
    if (status) refused.respond(status);
    else refused.fail();
    const next = (await server.next()).stream();
    next.write("data: 2\n\n");
    assertEquals(await messages.take(2), ["1", "2"]);
    assertEquals([events, socket.stats.resumes], [["open"], 0]);
    t.defer(() => next.end());
  });
}

test("a renewal that is refused for good ends the socket", async (t) => {
  const server = new ScriptedServer();
  const { closed, opened } = connect(t, "http://scripted.test/", {
    transport: "post",
    fetch: server.fetch,
  });
  const old = (await server.next()).stream();
  await opened;
  old.write(RENEW);
  (await server.next()).respond(403);
  (await server.next()).respond(403);
  assertEquals((await closed).code, 1006);
});

for (
  const [what, said] of [
    ["nothing else", ""],
    ["a message besides", "data: news\n\n"],
  ] as const
) {
  test(`a server that has each stream renewed at once, and says ${what}, brings no storm of requests`, async (t) => {
    const server = new ScriptedServer();
    const { events, opened } = connect(t, "http://scripted.test/", {
      transport: "post",
      fetch: server.fetch,
    });
    let streams = 0;
    const answering = (async () => {
      for (; streams < 1_000; streams++) {
        const asked = await server.next();
        if (asked.method === "POST") asked.respond(204, { "x-duplex-received": "0" });
        else asked.stream().write(said + RENEW);
      }
    })();
    await opened;
    await Promise.race([answering, sleep(1_000, t.signal)]);
    assertGreater(streams, 2);
    assertLess(streams, 40, "without a pause it would be thousands");
    assertEquals(events, ["open"]);
  });
}

test("the first renewal is not kept waiting, nor is one because a body is full", async (t) => {
  const pauses: number[] = [];
  const { setTimeout } = globalThis;
  t.defer(() => globalThis.setTimeout = setTimeout);
  Object.assign(globalThis, {
    setTimeout(task: () => void, ms = 0) {
      if (!Number.isInteger(ms) && ms < 1_000) pauses.push(ms); // no other is drawn by lot
      return setTimeout(task, ms);
    },
  });
  const all = await talk(t);
  await exchange(all);
  assertGreaterOrEqual(all.requests.length, LEAST);
  assertEquals(pauses, []);
  const server = new ScriptedServer();
  const { opened } = connect(t, "http://scripted.test/", {
    transport: "post",
    fetch: server.fetch,
  });
  (await server.next()).stream().write(RENEW);
  await opened;
  (await server.next()).stream();
  assertEquals(pauses, []);
});

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

/** The same request, whose body notes its size. */
function counted(init: RequestInit, sizes: number[]): RequestInit {
  if (!(init.body instanceof ReadableStream)) return init;
  const index = sizes.push(0) - 1;
  const body = init.body.pipeThrough(
    new TransformStream<Uint8Array, Uint8Array>({
      transform(chunk, controller) {
        sizes[index]! += chunk.length;
        controller.enqueue(chunk);
      },
    }),
  );
  return { ...init, body };
}
