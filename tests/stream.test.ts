/** `WebSocketStreamSSE`: the WebSocketStream interface, with backpressure both ways. */
import { type Transport, WebSocketSSE, type WebSocketSSEOptions } from "../client.ts";
import type { CloseDetails, Hooks, Peer, SSEOptions } from "../server.ts";
import {
  type IncomingMessage,
  type OutgoingMessage,
  type WebSocketCloseOptions,
  WebSocketError,
  type WebSocketOpenInfo,
  WebSocketStreamSSE,
  type WebSocketStreamSSEOptions,
} from "../stream.ts";
import { chaos } from "./chaos.ts";
import {
  assert,
  assertEquals,
  assertGreater,
  assertInstanceOf,
  assertLess,
  assertLessOrEqual,
  assertRejects,
  assertStrictEquals,
  assertThrows,
  deferred,
  sleep,
  test,
  type TestContext,
  until,
  within,
} from "./harness.ts";
import { failureOf, isPending, readAll } from "./outcome.ts";
import { listen, Queue } from "./pair.ts";
import { ScriptedServer } from "./scripted.ts";

const TRANSPORTS: Transport[] = ["duplex", "stream", "post", "poll"];
const WINDOW = 16 * 1024;
const SIZE = 1_000;
const COUNT = 200;

const numbers = (count: number) => Array.from({ length: count }, (_, n) => n);
const numbered = (n: number) => `${n}`.padStart(6, "0").padEnd(SIZE, "x");
const numberOf = (message: unknown) => Number(String(message).slice(0, 6));

/** A stream that is closed when the test ends. */
function stream(
  t: TestContext,
  url: string,
  options: WebSocketStreamSSEOptions = {},
): WebSocketStreamSSE {
  const made = new WebSocketStreamSSE(url, options);
  t.defer(async () => {
    made.close();
    await within(made.closed.catch(() => {}), 10_000, "the end of a stream");
  });
  return made;
}

interface Opened extends WebSocketOpenInfo {
  wss: WebSocketStreamSSE;
  reader: ReadableStreamDefaultReader<IncomingMessage>;
  writer: WritableStreamDefaultWriter<OutgoingMessage>;
}

/** One that is open, with a reader and a writer. */
async function open(
  t: TestContext,
  url: string,
  options: WebSocketStreamSSEOptions = {},
): Promise<Opened> {
  const wss = stream(t, url, options);
  const info = await wss.opened;
  const reader = info.readable.getReader();
  const writer = info.writable.getWriter();
  for (const { closed } of [reader, writer]) closed.catch(() => {}); // some runtimes complain
  return { ...info, wss, reader, writer };
}

interface Told {
  url: string;
  peers: Queue<Peer>;
  /** What the server's `close` hook is told. */
  closes: Queue<CloseDetails>;
}

async function serve(
  t: TestContext,
  hooks: Partial<Hooks> = {},
  options: SSEOptions = {},
): Promise<Told> {
  const peers = new Queue<Peer>();
  const closes = new Queue<CloseDetails>();
  const { url } = await listen(t, {
    ...options,
    hooks: {
      ...hooks,
      open(peer) {
        peers.push(peer);
        return hooks.open?.(peer);
      },
      close: (_, details) => closes.push(details),
    },
  });
  return { url, peers, closes };
}

const echo = {
  message: (peer: Peer, { rawData }: { rawData: unknown }) => void peer.send(rawData),
};

/** Waits until a count gets no further. */
async function stalled(count: () => number): Promise<number> {
  for (let before = -1; before !== count() || !before;) {
    before = count();
    await sleep(150);
  }
  return count();
}

// ---------------------------------------------------------------- opening

test("it opens, and text and bytes pass both ways", async (t) => {
  const { url } = await serve(t, echo);
  const { wss, reader, writer, readable, writable, extensions, protocol } = await open(t, url);
  assertEquals(wss.url, `${url.replace("http", "ws")}/`);
  assertInstanceOf(readable, ReadableStream);
  assertInstanceOf(writable, WritableStream);
  assertEquals([extensions, protocol], ["", ""]);
  assertStrictEquals(wss.opened, wss.opened);
  const bytes = new Uint8Array([0, 1, 2, 255]);
  const messages: [OutgoingMessage, IncomingMessage][] = [
    ["hello", "hello"],
    ["", ""],
    ["h\u00fc \u{1f50c} \ud800", "h\u00fc \u{1f50c} \ufffd"],
    [bytes, bytes],
    [bytes.subarray(1, 3), new Uint8Array([1, 2])],
    [bytes.buffer, bytes],
    [new DataView(bytes.buffer, 2), new Uint8Array([2, 255])],
    [new ArrayBuffer(0), new Uint8Array()],
  ];
  for (const [sent, got] of messages) {
    writer.write(sent);
    assertEquals(await reader.read(), { done: false, value: got });
  }
});

test("it offers subprotocols, and tells which was chosen", async (t) => {
  const { url } = await serve(t, {}, { handleProtocols: (offered) => [...offered][1] });
  const { protocol } = await open(t, url, { protocols: ["one", "two"] });
  assertEquals(protocol, "two");
});

test("our own options go to the socket beneath, which may be of a class of one's own", async (t) => {
  const seen: (string | null)[] = [];
  const { url } = await serve(t, {
    upgrade: ({ headers }) =>
      void seen.push(headers.get("authorization"), headers.get("x-of-class")),
  });
  class Mine extends WebSocketSSE {
    constructor(url: string | URL, options: WebSocketSSEOptions) {
      const headers = { ...options.headers as Record<string, string>, "x-of-class": "yes" };
      super(url, { ...options, headers });
    }
  }
  const { wss } = await open(t, url, {
    headers: { authorization: "Bearer x" },
    transport: "post",
    WebSocket: Mine,
  });
  assertInstanceOf(wss.socket, Mine);
  assertEquals([seen[0], seen[1], wss.socket.transport], ["Bearer x", "yes", "post"]);
});

test("what cannot be meant is refused, as by the standard", () => {
  const make = (...args: unknown[]) => () => Reflect.construct(WebSocketStreamSSE, args);
  const url = "http://localhost/";
  assertThrows(make(), TypeError);
  for (
    const options of [
      true,
      5,
      "chat",
      { protocols: "chat" },
      { protocols: 5 },
      { protocols: null },
      { signal: {} },
      { signal: null },
      { threshold: -1 },
      { threshold: "much" },
    ]
  ) assertThrows(make(url, options), TypeError);
  for (const args of [["invalid:"], [`${url}#a`], [url, { protocols: ["a", "A"] }]]) {
    assertEquals((assertThrows(make(...args), DOMException) as DOMException).name, "SyntaxError");
  }
});

test("an opening that is refused rejects both promises, and none needs to be looked at", async (t) => {
  const { url } = await serve(t, { upgrade: () => new Response(null, { status: 403 }) });
  new WebSocketStreamSSE(url); // nobody looks
  const wss = stream(t, url);
  const error = await failureOf(wss.opened);
  assertInstanceOf(error, WebSocketError);
  assertEquals([error.name, error.closeCode, error.reason], ["WebSocketError", null, ""]);
  assertStrictEquals(await failureOf(wss.closed), error);
});

test("close() before it is open rejects both promises", async (t) => {
  const { url } = await serve(t);
  const wss = stream(t, url);
  wss.close({ closeCode: 4000 });
  const error = await failureOf(wss.opened);
  assertInstanceOf(error, WebSocketError);
  assertStrictEquals(await failureOf(wss.closed), error);
});

test("a signal that has aborted makes no request", async (t) => {
  const server = new ScriptedServer();
  const reason = new Error("too late");
  const signal = AbortSignal.abort(reason);
  const wss = stream(t, "http://server/", { signal, fetch: server.fetch });
  assertStrictEquals(await failureOf(wss.opened), reason);
  assertStrictEquals(await failureOf(wss.closed), reason);
  await sleep(50);
  assertEquals([wss.url, server.asked.length], ["ws://server/", 0]);
});

test("a signal that aborts ends the opening, and its reason is told", async (t) => {
  const server = new ScriptedServer();
  const aborting = new AbortController();
  const options = { signal: aborting.signal, fetch: server.fetch };
  new WebSocketStreamSSE("http://server/", options); // nobody looks
  const wss = stream(t, "http://server/", options);
  const requests = [await server.next(), await server.next()];
  aborting.abort();
  for (const promise of [wss.opened, wss.closed]) {
    assertEquals((await failureOf(promise) as DOMException).name, "AbortError");
  }
  for (const request of requests) request.fail(); // else it is given time, for a session that may be made
});

test("a signal that aborts later does nothing", async (t) => {
  const { url } = await serve(t, echo);
  const aborting = new AbortController();
  const { reader, writer } = await open(t, url, { signal: aborting.signal });
  aborting.abort();
  await writer.write("still here");
  assertEquals((await reader.read()).value, "still here");
});

// ---------------------------------------------------------------- closing

const CLOSES: [
  name: string,
  info: WebSocketCloseOptions | undefined,
  code: number,
  reason: string,
][] = [
  ["nothing", undefined, 1005, ""],
  ["no code and no reason", { reason: "" }, 1005, ""],
  ["a code", { closeCode: 1000 }, 1000, ""],
  ["a code and a reason", { closeCode: 3456, reason: "pizza \u{1f355}" }, 3456, "pizza \u{1f355}"],
  ["a reason alone", { reason: "because" }, 1000, "because"],
];

/** The four ways to close, with the same information. */
const WAYS: Record<string, (opened: Opened, info: WebSocketCloseOptions | undefined) => unknown> = {
  "close()": ({ wss }, info) => wss.close(info),
  "cancel() of the readable": ({ reader }, info) =>
    reader.cancel(info && new WebSocketError("", info)),
  "abort() of the writable": ({ writer }, info) =>
    writer.abort(info && new WebSocketError("", info)),
};

for (const [way, close] of Object.entries(WAYS)) {
  test(`${way} closes with code and reason, and both ends are told the same`, async (t) => {
    const { url, closes } = await serve(t, echo);
    for (const [name, info, code, reason] of CLOSES) {
      const opened = await open(t, url);
      await close(opened, info);
      assertEquals(await opened.wss.closed, { closeCode: code, reason }, name);
      const told = await closes.next();
      assertEquals([told.code ?? 1005, told.reason ?? ""], [code, reason], name);
      await opened.reader.closed; // as it is after any clean end
    }
  });
}

test("close() of the writable sends what was written, and resolves when the handshake is complete", async (t) => {
  const got: string[] = [];
  const { url, closes } = await serve(t, {
    message: (_, message) => void got.push(message.text()),
  });
  const { wss, writer } = await open(t, url);
  for (const n of numbers(20)) writer.write(`${n}`);
  await writer.close();
  assertEquals(got, numbers(20).map(String));
  assertEquals((await closes.next()).code ?? 1005, 1005);
  assertEquals(await wss.closed, { closeCode: 1005, reason: "" });
  await Promise.all([writer.closed, writer.ready]);
});

test("what aborts or cancels with anything else than a WebSocketError closes without a code", async (t) => {
  const { url } = await serve(t);
  const foreign = new DOMException("no", "DataCloneError");
  Object.assign(foreign, { closeCode: 4000 });
  for (const reason of [{ closeCode: 4000, reason: "obsolete" }, "4000", foreign]) {
    for (const method of ["cancel", "abort"] as const) {
      const { wss, reader, writer } = await open(t, url);
      await (method === "cancel" ? reader.cancel(reason) : writer.abort(reason));
      assertEquals(await wss.closed, { closeCode: 1005, reason: "" });
    }
  }
});

test("a browser's own WebSocketError counts as ours", async (t) => {
  const { url } = await serve(t);
  const { wss, reader } = await open(t, url);
  const theirs = new DOMException("", "WebSocketError");
  Object.assign(theirs, { closeCode: 4321, reason: "native" });
  await reader.cancel(theirs);
  assertEquals(await wss.closed, { closeCode: 4321, reason: "native" });
});

test("the error of a session that was lost ends another, though no close may say its code", async (t) => {
  const { url, peers } = await serve(t);
  const lost = await open(t, url);
  (await peers.next()).terminate();
  const error = await failureOf(lost.wss.closed) as WebSocketError;
  assertEquals(error.closeCode, 1006);
  for (const method of ["cancel", "abort"] as const) {
    const { wss, reader, writer } = await open(t, url);
    await (method === "cancel" ? reader.cancel(error) : writer.abort(error));
    assertEquals(await wss.closed, { closeCode: 1005, reason: "" });
  }
});

test("of two sessions that are piped, the loss of one ends the other", async (t) => {
  const { url, peers } = await serve(t);
  const [from, to] = [stream(t, url), stream(t, url)];
  const [{ readable }, { writable }] = await Promise.all([from.opened, to.opened]);
  const piping = readable.pipeTo(writable);
  const all = [await peers.next(), await peers.next()];
  all[0]!.terminate();
  all[1]!.send("");
  const error = await failureOf(piping) as WebSocketError;
  await Promise.all([from, to].map((one) => within(one.closed.catch(() => {}), 8_000)));
  assert(error instanceof DOMException);
});

test("a close that may not be is refused, and closes nothing", async (t) => {
  const { url } = await serve(t, echo);
  const { wss, reader, writer } = await open(t, url);
  const close = (info: unknown) => () => wss.close(info as WebSocketCloseOptions);
  for (const info of [true, 1000, "bye"]) assertThrows(close(info), TypeError);
  for (const closeCode of [null, "x", 0, 999, 1001, 2999, 5000]) {
    const error = assertThrows(close({ closeCode }), DOMException) as DOMException;
    assertEquals(error.name, "InvalidAccessError");
  }
  const long = assertThrows(close({ reason: "\u{1f50c}".repeat(31) }), DOMException);
  assertEquals((long as DOMException).name, "SyntaxError");
  await writer.write("open");
  assertEquals((await reader.read()).value, "open");
});

test("WebSocketError checks its arguments, and is a DOMException", () => {
  const plain = new WebSocketError();
  assertInstanceOf(plain, DOMException);
  assertEquals(
    [plain.name, plain.code, plain.message, plain.closeCode, plain.reason],
    ["WebSocketError", 0, "", null, ""],
  );
  const full = new WebSocketError("told", { closeCode: 3333, reason: "\ud800" });
  assertEquals([full.message, full.closeCode, full.reason], ["told", 3333, "\ufffd"]);
  assertEquals(new WebSocketError("", { reason: "why" }).closeCode, 1000);
  for (
    const [closeCode, reason, name] of [
      ...[999, 1001, 2999, 5000].map((code) => [code, "", "InvalidAccessError"] as const),
      [1000, "x".repeat(124), "SyntaxError"] as const,
    ]
  ) {
    const make = () => new WebSocketError("", { closeCode, reason });
    assertEquals((assertThrows(make, DOMException) as DOMException).name, name);
  }
});

for (const transport of TRANSPORTS) {
  test(`the server's close ends both streams, and what it answers is clean (${transport})`, async (t) => {
    const { url } = await serve(t, {
      message(peer, message) {
        for (const n of numbers(3)) peer.send(`${n}`);
        peer.close(4000, message.text());
      },
    });
    const { wss, reader, writer } = await open(t, url, { transport });
    await writer.write("enough"); // whose acknowledgement comes with the close at the latest
    assertEquals(await wss.closed, { closeCode: 4000, reason: "enough" });
    assertEquals(await readAll(reader), { all: ["0", "1", "2"], error: undefined });
    const error = await failureOf(writer.ready) as DOMException;
    assertEquals(error.name, "InvalidStateError");
    assertStrictEquals(await failureOf(writer.write("late")), error);
  });
}

test("a session that is lost fails both streams with the error that closed has", async (t) => {
  const { url, peers } = await serve(t);
  const { wss, reader, writer } = await open(t, url);
  (await peers.next()).terminate();
  const error = await failureOf(wss.closed);
  assertInstanceOf(error, WebSocketError);
  assertEquals([error.closeCode, error.reason], [1006, ""]);
  assertStrictEquals(await failureOf(reader.read()), error);
  assertStrictEquals(await failureOf(writer.ready), error);
});

test("an end of any kind that nobody looks at is no complaint", async (t) => {
  const { url, peers, closes } = await serve(t);
  for (const end of ["terminate", "close"] as const) {
    const wss = stream(t, url);
    const { readable, writable } = await wss.opened;
    (await peers.next())[end]();
    await closes.next();
    await until(() => wss.socket.readyState === WebSocketSSE.CLOSED);
    assertEquals([readable.locked, writable.locked], [false, false]);
  }
});

// ---------------------------------------------------------------- reading

/** A server whose peers send COUNT messages, and wait for their client each time. */
async function sender(t: TestContext, end: (peer: Peer) => unknown = () => {}) {
  const state = { sent: 0, waits: 0 };
  const served = await serve(t, {
    async open(peer) {
      for (; state.sent < COUNT; state.sent++) {
        if (!peer.send(numbered(state.sent))) return;
        state.waits++;
        await peer.waitForDrain();
        state.waits--;
      }
      end(peer);
    },
  }, { window: WINDOW });
  return { ...served, state };
}

for (const transport of TRANSPORTS) {
  test(`the server's waitForDrain waits for who reads (${transport})`, async (t) => {
    const { url, state, peers } = await sender(t, (peer) => peer.close(4000));
    const { wss, reader } = await open(t, url, { transport });
    const peer = await peers.next();
    const ahead = await stalled(() => state.sent);
    assertLess(ahead, WINDOW / SIZE + 3);
    assertEquals([state.waits, wss.socket.stats.received], [1, 1], "one message waits to be read");
    assertGreater(peer.bufferedAmount, 0);
    for (const n of numbers(10)) assertEquals(numberOf((await reader.read()).value), n);
    // Of what was read the server hears at half a window at the latest.
    assertLess(await stalled(() => state.sent), ahead + 12);
    const { all, error } = await readAll(reader);
    assertEquals([all.map(numberOf), error], [numbers(COUNT).slice(10), undefined]);
    assertEquals(await wss.closed, { closeCode: 4000, reason: "" });
    assertEquals(wss.socket.stats.resumes, 0);
  }, { timeout: 20_000 });
}

test("a loop that is left closes the session", async (t) => {
  const { url, closes, state } = await sender(t);
  const wss = stream(t, url);
  const { readable } = await wss.opened;
  const taken: number[] = [];
  for await (const message of readable) {
    taken.push(numberOf(message));
    if (taken.length === 5) break;
  }
  assertEquals(taken, numbers(5));
  assertEquals(await wss.closed, { closeCode: 1005, reason: "" });
  assertEquals((await closes.next()).code ?? 1005, 1005);
  assertLess(state.sent, COUNT);
});

test("a clean end is told though nobody reads, and all can be read after it", async (t) => {
  const { url } = await serve(t, {
    open(peer) {
      for (const n of numbers(5)) peer.send(`${n}`);
      peer.close(4000, "done");
    },
  });
  const { wss, reader } = await open(t, url);
  assertEquals(await within(wss.closed, 5_000), { closeCode: 4000, reason: "done" });
  assertEquals(await readAll(reader), { all: numbers(5).map(String), error: undefined });
});

test("an end that is not clean is told though nobody reads, and the error comes after all else", async (t) => {
  const { url, peers } = await serve(t, {
    open: (peer) => numbers(5).forEach((n) => void peer.send(`${n}`)),
  });
  const { wss, reader } = await open(t, url);
  const peer = await peers.next();
  await until(() => peer.bufferedAmount < 5 && wss.socket.stats.received === 1);
  await sleep(100); // what is on its way has arrived
  peer.terminate();
  const error = await failureOf(wss.closed);
  assertEquals((error as WebSocketError).closeCode, 1006);
  const read = await readAll(reader);
  // What was not dispatched is forgotten when a connection is lost: it would come again.
  assertGreater(read.all.length, 0);
  assertEquals(read.all, numbers(read.all.length).map(String));
  assertStrictEquals(read.error, error);
});

test("a message that comes while the readable is being cancelled hurts nobody", async (t) => {
  const { url } = await sender(t);
  const { wss, reader } = await open(t, url);
  const reading = reader.read();
  const cancelled = reader.cancel();
  await cancelled;
  assertEquals((await reading).done, true);
  assertEquals((await wss.closed).closeCode, 1005);
});

// ---------------------------------------------------------------- writing

for (const transport of TRANSPORTS) {
  test(`a write waits for a server that stands still (${transport})`, async (t) => {
    const hold = deferred();
    const got: number[] = [];
    const { url } = await serve(t, {
      async message(_, message) {
        got.push(numberOf(message.text()));
        await hold.promise;
      },
    }, { window: WINDOW });
    const threshold = 8 * 1024;
    const { wss, writer } = await open(t, url, { transport, threshold });
    let written = 0;
    const writing = (async () => {
      for (; written < COUNT; written++) await writer.write(numbered(written));
    })();
    const reached = await stalled(() => written);
    assertLessOrEqual(reached, (WINDOW + threshold) / SIZE + 2);
    assertGreater(reached, WINDOW / SIZE - 1);
    assertGreater(wss.socket.bufferedAmount, threshold);
    assertLessOrEqual(wss.socket.bufferedAmount, threshold + SIZE);
    assertEquals(writer.desiredSize, 0);
    hold.resolve();
    await within(writing, 10_000, "the rest");
    await until(() => got.length === COUNT);
    assertEquals(got, numbers(COUNT));
  }, { timeout: 20_000 });
}

test("by default a quarter of a MiB may be on its way", async (t) => {
  const hold = deferred();
  const { url } = await serve(t, { message: () => hold.promise }, { window: WINDOW });
  const { wss, writer } = await open(t, url);
  const size = 64 * 1024;
  for (let n = 0; n < 5; n++) await within(writer.write(new Uint8Array(size)), 5_000, "a write");
  const sixth = writer.write(new Uint8Array(size));
  assert(await isPending(sixth));
  assertEquals(wss.socket.bufferedAmount, 5 * size); // the first has been received
  hold.resolve();
  await sixth;
});

test("with a threshold of 0 what was written has been received", async (t) => {
  const got: string[] = [];
  const { url } = await serve(t, { message: (_, message) => void got.push(message.text()) });
  const { wss, writer } = await open(t, url, { threshold: 0 });
  for (const n of numbers(20)) {
    await writer.write(`${n}`);
    assertEquals([wss.socket.bufferedAmount, got.length], [0, n + 1]);
  }
});

test("who does not read can write all the same, and the other way round", async (t) => {
  const { url } = await serve(t, echo, { window: WINDOW });
  const { wss, reader, writer } = await open(t, url, { threshold: 0 });
  const count = 100; // the echo is more than a window
  for (const n of numbers(count)) await within(writer.write(numbered(n)), 5_000, "a write");
  assertEquals(wss.socket.stats.received, 1);
  for (const n of numbers(count)) assertEquals(numberOf((await reader.read()).value), n);
});

test("what a write cannot take fails it, as Web IDL has it", async (t) => {
  const { url } = await serve(t, echo);
  const memory = new WebAssembly.Memory({ initial: 1, maximum: 2, shared: true });
  const resizable = Reflect.construct(ArrayBuffer, [8, { maxByteLength: 16 }]);
  for (
    const chunk of [
      Symbol(),
      { toString: () => ({}) },
      resizable,
      new Uint8Array(resizable),
      memory.buffer,
      new Uint8Array(memory.buffer),
    ]
  ) {
    const { writer } = await open(t, url);
    await assertRejects(() => writer.write(chunk as string), TypeError);
  }
  const { reader, writer } = await open(t, url);
  const strings: [unknown, string][] = [[5, "5"], [null, "null"], [new Blob(), "[object Blob]"]];
  for (const [chunk, text] of strings) {
    writer.write(chunk as string);
    assertEquals((await reader.read()).value, text);
  }
});

test("a write that has not gone by the server's close is rejected, and that close is not clean", async (t) => {
  const go = deferred();
  const { url } = await serve(t, {
    message: (peer) => go.promise.then(() => peer.close(4567, "full")),
  }, { window: WINDOW });
  const { wss, writer } = await open(t, url, { threshold: 0 });
  const first = writer.write("x".repeat(2 * WINDOW)); // received, and not handled
  const second = writer.write("y".repeat(100));
  await first;
  assert(await isPending(second));
  go.resolve();
  const error = await failureOf(wss.closed);
  assertInstanceOf(error, WebSocketError);
  assertEquals([error.closeCode, error.reason], [4567, "full"]);
  const rejection = await failureOf(second) as DOMException;
  assertEquals(rejection.name, "InvalidStateError");
  assertStrictEquals(await failureOf(writer.write("late")), rejection);
});

test("a write that waits hears of the end, though nobody reads", async (t) => {
  const { url, peers } = await serve(t, {
    open: (peer) => numbers(3).forEach((n) => void peer.send(`${n}`)),
    message: () => new Promise(() => {}),
  }, { window: WINDOW, resumeTimeout: 1_000 });
  const { wss, writer } = await open(t, url, { threshold: 0 });
  await writer.write("x".repeat(2 * WINDOW));
  const waiting = writer.write("y");
  assert(await isPending(waiting));
  (await peers.next()).terminate();
  const error = await failureOf(wss.closed);
  assertEquals((error as WebSocketError).closeCode, 1006);
  assertEquals((await failureOf(waiting) as DOMException).name, "InvalidStateError");
});

test("abort() needs not wait for a write that waits; what was handed over arrives", async (t) => {
  const hold = deferred();
  const got: number[] = [];
  const { url, closes } = await serve(t, {
    async message(_, message) {
      got.push(message.text().length);
      await hold.promise;
    },
  }, { window: WINDOW });
  const { wss, writer } = await open(t, url, { threshold: 0 });
  await writer.write("x".repeat(2 * WINDOW));
  const waiting = writer.write("y".repeat(10));
  assert(await isPending(waiting));
  const reason = new WebSocketError("enough", { closeCode: 4001 });
  await within(writer.abort(reason), 1_000, "abort");
  assertStrictEquals(await failureOf(waiting), reason);
  hold.resolve();
  assertEquals(await wss.closed, { closeCode: 4001, reason: "" });
  assertEquals([got, (await closes.next()).code], [[2 * WINDOW, 10], 4001]);
});

test("a write after close() is rejected", async (t) => {
  const { url } = await serve(t);
  const { wss, writer } = await open(t, url);
  wss.close();
  assertEquals((await failureOf(writer.write("late")) as DOMException).name, "InvalidStateError");
  assertEquals((await wss.closed).closeCode, 1005);
});

test("with bidir: false a write is rejected, and the messages come", async (t) => {
  const { url } = await serve(t, { open: (peer) => void peer.send("news") });
  const { reader, writer } = await open(t, url, { bidir: false });
  assertEquals((await failureOf(writer.write("x")) as DOMException).name, "InvalidStateError");
  assertEquals((await reader.read()).value, "news");
});

test("a file that is piped through arrives whole, and ends the session", async (t) => {
  const got: Uint8Array[] = [];
  const { url, closes } = await serve(t, {
    message: (_, message) => void got.push(message.uint8Array().slice()),
  });
  const bytes = crypto.getRandomValues(new Uint8Array(60_000));
  const file = new Blob(Array(10).fill(bytes));
  const wss = stream(t, url);
  await file.stream().pipeTo((await wss.opened).writable);
  assertEquals((await closes.next()).code ?? 1005, 1005);
  assertEquals(
    new Uint8Array(await new Blob(got as BlobPart[]).arrayBuffer()),
    new Uint8Array(await file.arrayBuffer()),
  );
});

// ---------------------------------------------------------------- cuts

for (const transport of TRANSPORTS) {
  test(`connections that are cut lose nothing, in either direction (${transport})`, async (t) => {
    const got: number[] = [];
    const peers = new Queue<Peer>();
    const { port } = await listen(t, {
      window: WINDOW,
      hooks: {
        async open(peer) {
          peers.push(peer);
          for (const n of numbers(COUNT)) {
            if (!peer.send(numbered(n))) return;
            await peer.waitForDrain();
          }
        },
        message: (_, message) => void got.push(numberOf(message.text())),
      },
    });
    const network = t.use(await chaos(port));
    const { reader, writer } = await open(t, network.url, { transport, threshold: 4 * SIZE });
    const writing = (async () => {
      for (const n of numbers(COUNT)) await writer.write(numbered(n));
    })();
    const taken: number[] = [];
    while (taken.length < COUNT) {
      taken.push(numberOf((await within(reader.read(), 10_000, "a message")).value));
      if (taken.length % 60 === 30) {
        const { connections } = network.stats;
        network.cutAll("rst");
        await until(() => network.stats.connections > connections);
      }
    }
    await within(writing, 10_000, "the writer");
    await until(() => got.length === COUNT);
    assertEquals([taken, got], [numbers(COUNT), numbers(COUNT)]);
    assertEquals(peers.all.length, 1);
  }, { timeout: 30_000 });
}
