/** `WebSocketStreamSSE` against servers that are hostile, broken or gone, and against who uses it so. */
import type { Transport } from "../client.ts";
import {
  WebSocketError,
  type WebSocketOpenInfo,
  WebSocketStreamSSE,
  type WebSocketStreamSSEOptions,
} from "../stream.ts";
import {
  assert,
  assertEquals,
  assertInstanceOf,
  assertLess,
  assertLessOrEqual,
  assertStrictEquals,
  sleep,
  test,
  type TestContext,
  until,
  within,
} from "./harness.ts";
import { failureOf, isPending, readAll } from "./outcome.ts";
import { type Asked, SCRIPTED_TOKEN, ScriptedServer, type ScriptedStream } from "./scripted.ts";
import { ack, seq, text } from "./wire.ts";

interface Opened extends WebSocketOpenInfo {
  server: ScriptedServer;
  wss: WebSocketStreamSSE;
  stream: ScriptedStream;
}

function make(
  t: TestContext,
  options: WebSocketStreamSSEOptions = {},
): { server: ScriptedServer; wss: WebSocketStreamSSE } {
  const server = new ScriptedServer();
  const wss = new WebSocketStreamSSE("http://scripted.test/", {
    transport: "post",
    fetch: server.fetch,
    ...options,
  });
  t.defer(async () => {
    wss.close();
    refuse(server);
    await within(wss.closed.catch(() => {}), 9_000, "the end of a stream");
  });
  return { server, wss };
}

/** From now on each request is refused for good. */
async function refuse(server: ScriptedServer): Promise<never> {
  for (;;) (await server.next()).respond(404);
}

/** A stream whose session a script has opened. */
async function scripted(
  t: TestContext,
  terms: Parameters<Asked["stream"]>[0] = {},
  options: WebSocketStreamSSEOptions = {},
): Promise<Opened> {
  const { server, wss } = make(t, options);
  const stream = (await server.next()).stream(terms);
  t.defer(() => stream.end());
  return { server, wss, stream, ...await within(wss.opened, 5_000, "opening") };
}

const CLOSE = (code: number, sent: number) =>
  `event: duplex-close\ndata: {"code":${code},"reason":"","sent":${sent}}\n\n`;

// ---------------------------------------------------------------- the server

test("a duplex-close without a duplex-open opens nothing, and both promises reject", async () => {
  const headers = {
    "content-type": "text/event-stream",
    "x-crossws-id": SCRIPTED_TOKEN,
    "x-duplex-version": "1",
  };
  const wss = new WebSocketStreamSSE("http://scripted.test/", {
    transport: "post",
    fetch: () => Promise.resolve(new Response(CLOSE(4000, 0), { headers })),
  });
  const error = await failureOf(wss.opened);
  assertInstanceOf(error, WebSocketError);
  assertStrictEquals(await failureOf(wss.closed), error);
});

test("a stream that ends right after it has opened is resumed, before anybody reads", async (t) => {
  const { server, stream, wss, readable } = await scripted(t);
  stream.end();
  const again = (await server.next()).stream();
  again.write("data: here\n\n");
  assertEquals((await readable.getReader().read()).value, "here");
  again.end();
  assertEquals(wss.socket.stats.resumes, 1);
});

test("an event that is cut in its middle is read once, and whole", async (t) => {
  const { server, stream, readable } = await scripted(t);
  stream.write("data: one\n\ndata: tw");
  stream.fail();
  const asked = await server.next();
  const again = asked.stream();
  // What was not dispatched comes again.
  if (asked.headers.get("last-event-id") === "0") again.write("data: one\n\n");
  again.write("data: two\n\n" + CLOSE(4000, 2));
  (await server.next()).respond(204, { "x-duplex-received": "1" });
  assertEquals(await readAll(readable.getReader()), { all: ["one", "two"], error: undefined });
});

test("what came before a second damage is read before its error", async (t) => {
  const { server, stream, wss, readable } = await scripted(t);
  stream.write("event: duplex-json\ndata: {\n\n");
  const again = (await server.next()).stream();
  again.write("data: 1\n\ndata: 2\n\ndata: 3\n\n");
  await until(() => wss.socket.stats.received === 1);
  again.write("event: duplex-binary\ndata: ?\n\n");
  const error = await failureOf(wss.closed) as WebSocketError;
  assertEquals(error.closeCode, 1006);
  assertEquals(await readAll(readable.getReader()), { all: ["1", "2", "3"], error });
});

for (const transport of ["post", "poll"] as Transport[]) {
  test(`messages that nobody has read by the server's close can be read, and then the end (${transport})`, async (t) => {
    const { stream, wss, readable, server } = await scripted(t, {}, { transport });
    stream.write(`data: 1\n\ndata: 2\n\ndata: 3\n\n${CLOSE(4001, 3)}`);
    stream.end();
    (await server.next()).respond(204, { "x-duplex-received": "1" });
    assertEquals(await within(wss.closed, 5_000), { closeCode: 4001, reason: "" });
    assertEquals(await readAll(readable.getReader()), {
      all: ["1", "2", "3"],
      error: undefined,
    });
  });
}

test("a server that sends on and on to who does not read hears no acknowledgement of it", async (t) => {
  const { stream, wss, readable, server } = await scripted(t, { window: 1_000 });
  for (let n = 0; n < 1000; n++) stream.write(`data: ${"x".repeat(1_000)}\n\n`);
  await sleep(100, t.signal);
  assertEquals(wss.socket.stats.received, 1);
  const acks = server.asked.map(({ body }) => body);
  assert(acks.every((body) => body === ack(1)), `${acks}`);
  assertLessOrEqual(acks.length, 1);
  await readable.cancel();
});

// ---------------------------------------------------------------- the end, at any step

type Step = (opened: Opened) => unknown;

const ENDS: Record<string, Step> = {
  "a connection that is gone for good": ({ stream }) => stream.fail(),
  "a clean close": ({ stream }) => stream.write(CLOSE(4000, 0)),
  "a close behind a message that was lost": ({ stream }) => stream.write(CLOSE(4000, 7)),
  "damage": ({ stream }) => stream.write("event: duplex-ack\ndata: x\n\n"),
};

const USES: Record<string, Step> = {
  "nobody looks": () => {},
  "a reader and a writer are held": ({ readable, writable }) => {
    readable.getReader();
    writable.getWriter();
  },
  "a reader that was let go": ({ readable, writable }) => {
    readable.getReader().releaseLock();
    writable.getWriter().releaseLock();
  },
  "it is read in two": ({ readable }) => {
    readable.tee();
  },
};

for (const [end, act] of Object.entries(ENDS)) {
  for (const [use, prepare] of Object.entries(USES)) {
    test(`${end}, while ${use}, is no complaint`, async (t) => {
      const opened = await scripted(t, { resumeTimeout: 100 });
      prepare(opened);
      act(opened);
      refuse(opened.server);
      await within(opened.wss.closed.catch(() => {}), 5_000, "the end");
      await sleep(20, t.signal);
    });
  }
}

// ---------------------------------------------------------------- who hangs

test("cancel() of a server that hangs resolves at once, and closed rejects in time", async (t) => {
  const { wss, readable, server } = await scripted(t, { resumeTimeout: 300 });
  const reader = readable.getReader();
  const reading = reader.read();
  await within(reader.cancel("enough"), 500, "cancel()");
  assertEquals(await reading, { done: true, value: undefined });
  const error = await failureOf(wss.closed) as WebSocketError;
  assertEquals([error.name, error.closeCode], ["WebSocketError", 1006]);
  assertLess(server.asked.length, 10);
});

test("8 MiB to a server that acknowledges nothing wait as one write, and end with the session", async (t) => {
  const { wss, writable, server } = await scripted(t, { resumeTimeout: 300 });
  const writer = writable.getWriter();
  const size = 8 * 2 ** 20;
  const writes = [1, 2, 3].map(() => writer.write(new Uint8Array(size)));
  assert(await isPending(writes[0]!));
  assertEquals(wss.socket.bufferedAmount, size, "the others were not taken");
  (await server.next()).respond(404);
  const failures = await Promise.all(writes.map(failureOf));
  const closed = await failureOf(wss.closed) as WebSocketError;
  assertEquals(closed.closeCode, 1006);
  for (const failure of failures) assertEquals((failure as Error).name, "InvalidStateError");
});

test("close() while a write waits lets it go before", async (t) => {
  const { wss, writable, server } = await scripted(t, { window: 5 }, { threshold: 0 });
  const writer = writable.getWriter();
  const first = writer.write("longer");
  const second = writer.write("second");
  const asked = await server.next();
  assertEquals(asked.body, seq(1) + text("longer"));
  wss.close({ closeCode: 4000 });
  asked.respond(204, { "x-duplex-received": "1" });
  await first;
  await failureOf(second); // it was not handed over
  const closing = await server.next();
  assert(closing.body.includes("CLOSE"), closing.body);
  closing.respond(204, { "x-duplex-received": "2", "x-duplex-close": "4000" });
  assertEquals(await within(wss.closed, 5_000), { closeCode: 4000, reason: "" });
});

test("two readers: the second is refused, and the first goes on", async (t) => {
  const { readable, writable, stream } = await scripted(t);
  const reader = readable.getReader();
  writable.getWriter();
  for (const take of [() => readable.getReader(), () => writable.getWriter()]) {
    let error: unknown;
    try {
      take();
    } catch (thrown) {
      error = thrown;
    }
    assertInstanceOf(error, TypeError);
  }
  stream.write("data: 1\n\n");
  assertEquals((await reader.read()).value, "1");
});

// ---------------------------------------------------------------- the signal

for (
  const [when, act] of [
    ["while a request is asked", (_: Asked) => undefined],
    ["once it has been granted", (asked: Asked) => asked.stall()],
    ["as the session opens", (asked: Asked) => void asked.stream()],
  ] as const
) {
  test(`a signal that aborts ${when} fails what has not opened`, async (t) => {
    const aborting = new AbortController();
    const { server, wss } = make(t, { signal: aborting.signal });
    const asked = await server.next();
    act(asked);
    const reason = new Error("no more");
    aborting.abort(reason);
    assertStrictEquals(await failureOf(wss.opened), reason);
    assertStrictEquals(await failureOf(wss.closed), reason);
    asked.fail();
  });
}
