/** `pause()` and `resume()`: the server waits for the page's consumer, and the session lives on. */
import { WebSocketSSE, type WebSocketSSEErrorEvent } from "../client.ts";
import type { Peer, SSEOptions } from "../server.ts";
import { chaos } from "./chaos.ts";
import {
  assert,
  assertEquals,
  assertGreater,
  assertLess,
  once,
  sleep,
  test,
  type TestContext,
  until,
} from "./harness.ts";
import { connect, listen, Queue } from "./pair.ts";
import { ScriptedServer } from "./scripted.ts";

const WINDOW = 16 * 1024;
const SIZE = 1000;
const COUNT = 400;

const numbers = (count: number) => Array.from({ length: count }, (_, n) => n);
const numberOf = (data: unknown) => Number(String(data).slice(0, 6));

/** A server whose peers send COUNT messages, and wait for their client each time. */
async function sender(t: TestContext, options: SSEOptions = {}) {
  const peers = new Queue<Peer>();
  const closes = new Queue<{ code?: number | undefined }>();
  const state = { sent: 0 };
  const server = await listen(t, {
    window: WINDOW,
    heartbeatInterval: 200,
    idleTimeout: 1,
    hooks: {
      open: async (peer) => {
        peers.push(peer);
        for (; state.sent < COUNT; state.sent++) {
          if (!peer.send(`${state.sent}`.padStart(6, "0").padEnd(SIZE, "x"))) return;
          await peer.waitForDrain();
        }
      },
      close: (_, details) => closes.push(details),
    },
    ...options,
  });
  return { ...server, peers, closes, state };
}

/** Waits until the sender gets no further. */
async function stalled(state: { sent: number }): Promise<number> {
  for (let before = -1; before !== state.sent || !before;) {
    before = state.sent;
    await sleep(150);
  }
  return state.sent;
}

for (const transport of ["duplex", "stream", "post", "poll"] as const) {
  test(`a paused page is sent no more than a window, stays connected, and goes on (${transport})`, async (t) => {
    const { url, state, ws } = await sender(t);
    const { socket, messages, events } = connect(t, url, { transport });
    socket.addEventListener("message", function pause({ data }) {
      if (numberOf(data) !== 9) return;
      socket.pause();
      assert(socket.isPaused);
    });
    const sent = await stalled(state);
    assertEquals(messages.all.length, 10, "what is paused dispatches nothing");
    assertLess(sent - 10, WINDOW / SIZE + 3);
    await sleep(2500); // more than the idle timeout
    // Its answers to pings acknowledge what it had dispatched by then.
    assertLess(state.sent - 10, WINDOW / SIZE + 3);
    assertEquals(messages.all.length, 10);
    assertEquals([events, ws.peers.get("/")!.size], [["open"], 1]);
    socket.resume();
    const all = await messages.take(COUNT, { timeout: 20_000 });
    assertEquals(all.map(numberOf), numbers(COUNT));
    assertEquals([events, socket.isPaused], [["open"], false]);
  });
}

test("a consumer that pauses at each message sees all of them, once and in order", async (t) => {
  const { url } = await sender(t);
  const { socket, messages, events } = connect(t, url);
  socket.addEventListener("message", () => {
    socket.pause();
    queueMicrotask(() => socket.resume());
  });
  assertEquals(
    (await messages.take(COUNT, { timeout: 20_000 })).map(numberOf),
    numbers(COUNT),
  );
  assertEquals(events, ["open"]);
});

test("connections that are cut during a pause cost no message and no memory", async (t) => {
  const { url, port, state } = await sender(t);
  const network = t.use(await chaos(port));
  const { socket, messages, events } = connect(t, url.replace(`${port}`, `${network.port}`), {
    transport: "post",
  });
  await messages.next();
  socket.pause();
  const { length } = messages.all;
  for (const times of [1, 2, 3]) {
    network.cutAll("rst");
    await until(() => socket.stats.resumes === times);
  }
  // What was cut comes again, and nothing on top of it.
  assertLess(await stalled(state) - length, WINDOW / SIZE + 3);
  assertEquals([messages.all.length, events], [length, ["open"]]);
  socket.resume();
  await messages.take(COUNT - 1, { timeout: 20_000 });
  assertEquals(messages.all.map(numberOf), numbers(COUNT));
  assertEquals(events, ["open", ...Array(3).fill(["drop", "resume"]).flat()]);
});

test("nothing is acknowledged that was not dispatched, in no request", async (t) => {
  const server = new ScriptedServer();
  const { socket, messages } = connect(t, "http://server/", {
    transport: "post",
    fetch: server.fetch,
  });
  const stream = (await server.next()).stream();
  await once(socket, "open");
  stream.write("data: one\n\n");
  await messages.next();
  socket.pause();
  stream.write("data: two\n\ndata: three\n\nevent: duplex-ping\ndata: 3\n\n");
  const pong = await server.next();
  assertEquals(pong.body, "PONG 0\r\n\r\nACK 1\r\n1\r\n");
  pong.respond(204, { "x-duplex-received": "0" });
  socket.send("hello");
  const post = await server.next();
  assertEquals(post.body, "SEQ 1\r\n1\r\nTEXT 5\r\nhello\r\n");
  post.respond(204, { "x-duplex-received": "1" });
  stream.fail();
  const resumption = await server.next();
  assertEquals(resumption.headers.get("last-event-id"), "1");
  resumption.stream({ received: 1 }).write("data: two\n\ndata: three\n\n");
  socket.resume();
  assertEquals(await messages.take(2), ["two", "three"]);
});

test("the server's close comes after the messages before it, when the page goes on", async (t) => {
  const closes = new Queue<number | undefined>();
  const { url } = await listen(t, {
    hooks: {
      message(peer) {
        for (const text of ["one", "two", "three"]) peer.send(text);
        peer.close(4000, "enough");
      },
      close: (_, { code }) => closes.push(code),
    },
  });
  const { socket, messages, events, closed } = connect(t, url);
  await once(socket, "open");
  socket.pause();
  socket.send("go");
  assertEquals(await closes.next(), 4000, "the server does not wait for the page");
  assertEquals([messages.all, events, socket.readyState], [[], ["open"], WebSocketSSE.OPEN]);
  socket.resume();
  const { code, reason, wasClean } = await closed;
  assertEquals([code, reason, wasClean], [4000, "enough", true]);
  assertEquals(messages.all, ["one", "two", "three"]);
});

test("close() of a paused page needs no resume()", async (t) => {
  const { url, closes } = await sender(t);
  const { socket, messages, closed } = connect(t, url);
  await messages.next();
  socket.pause();
  socket.close(4001);
  assertEquals((await closed).code, 4001);
  assertEquals((await closes.next()).code, 4001);
});

test("a page that pauses for ever costs what one does that stops reading: 1013", async (t) => {
  const { url, closes } = await sender(t, {
    maxBufferedAmount: 100_000,
    hooks: {
      open: (peer) => {
        const sending = setInterval(() => peer.send("x".repeat(SIZE)) || clearInterval(sending), 1);
        t.defer(() => clearInterval(sending));
      },
      close: (_, details) => closes.push(details),
    },
  });
  const { socket, messages, events } = connect(t, url);
  await messages.next();
  socket.pause();
  const before = messages.all.length;
  assertEquals((await closes.next({ timeout: 20_000 })).code, 1013);
  assertEquals([messages.all.length, events], [before, ["open"]]);
});

test("on the plain level a pause holds the network back", async (t) => {
  const state = { sent: 0, bytes: 0 };
  const MiB = 1024 * 1024;
  const { url } = await listen(t, {
    hooks: {
      async open(peer) {
        for (; state.sent < 64; state.sent++) {
          if (!peer.send(`${state.sent}`.padStart(6, "0").padEnd(MiB, "x"))) return;
          await peer.waitForDrain();
        }
      },
    },
  }, (request, next) => {
    const headers = new Headers(request.headers);
    headers.delete("x-duplex-version"); // as for crossws's own client
    return next(new Request(request.url, { headers }));
  });
  const { socket, messages, events } = connect(t, url, { transport: "post" });
  await messages.next();
  socket.pause();
  const sent = await stalled(state);
  assertLess(sent, 60, "it went on into buffers");
  const before = messages.all.length;
  socket.resume();
  await until(() => messages.all.length === 64, { timeout: 20_000 });
  assertGreater(64, before);
  assertEquals(messages.all.map(numberOf), numbers(64));
  assertEquals(events, ["open"]);
});

test(
  "a server that sends on while the page pauses ends the session, at 128 Mi characters",
  async (t) => {
    const server = new ScriptedServer();
    const { socket, messages, closed } = connect(t, "http://scripted.test/", {
      transport: "post",
      fetch: server.fetch,
    });
    const opened = once(socket, "open");
    const asked = await server.next();
    const stream = asked.stream({ heartbeatInterval: 60_000 });
    await opened;
    socket.pause();
    const event = `data: ${"x".repeat(1024 * 1024)}\n\n`;
    let sent = 0;
    for (; !asked.signal.aborted && sent < 300; sent++) {
      stream.write(event);
      await sleep(1);
    }
    assertLess(sent, 160);
    const failed = once<WebSocketSSEErrorEvent>(socket, "error");
    socket.resume();
    await messages.take(128);
    assertEquals((await failed).message, "Lost: the server sends on while the page pauses");
    assertEquals((await closed).code, 1006);
  },
  { timeout: 30_000 },
);

test("waitForDrain waits for the threshold, the signal or the end", async (t) => {
  const server = new ScriptedServer();
  const { socket, closed } = connect(t, "http://server/", {
    transport: "post",
    fetch: server.fetch,
  });
  await socket.waitForDrain(); // nothing is buffered
  const stream = (await server.next()).stream();
  await once(socket, "open");
  const order: string[] = [];
  const wait = (name: string, options?: { threshold?: number; signal?: AbortSignal }) =>
    socket.waitForDrain(options).then(
      () => order.push(`${name} at ${socket.bufferedAmount}`),
      (reason) => order.push(`${name}: ${reason}`),
    );
  socket.send("one");
  const first = await server.next();
  socket.send("three");
  const aborting = new AbortController();
  await wait("enough", { threshold: 8 });
  const aborted = wait("aborted", { signal: aborting.signal });
  const [five, none, end] = [
    wait("five", { threshold: 5 }),
    wait("none"),
    wait("end", { threshold: -1 }),
  ];
  aborting.abort("why");
  await aborted;
  await wait("late", { signal: aborting.signal });
  first.respond(204, { "x-duplex-received": "1" });
  await five;
  stream.write("event: duplex-ack\ndata: 2 18\n\n");
  await none;
  socket.pause();
  (await server.next()).fail();
  stream.fail();
  (await server.next()).respond(404);
  await end; // told while `close` is held back
  assertEquals(socket.readyState, WebSocketSSE.OPEN);
  await socket.waitForDrain({ threshold: -1 });
  socket.resume();
  assertEquals((await closed).code, 1006);
  assertEquals(order, [
    ...["enough at 8", "aborted: why", "late: why", "five at 5", "none at 0", "end at 0"],
  ]);
});

test("pause() does nothing before the socket is open, and after its end", async (t) => {
  const { url } = await listen(t, { hooks: { open: (peer) => void peer.send("hello") } });
  const { socket, messages, closed } = connect(t, url);
  socket.pause();
  assertEquals(socket.isPaused, false);
  assertEquals(await messages.next(), "hello");
  socket.close();
  await closed;
  socket.pause();
  assertEquals(socket.isPaused, false);
});
