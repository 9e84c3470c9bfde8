/**
 * Sessions across dropped connections, one case at a time: the server by raw
 * requests, the client before a scripted server, and both through a proxy that
 * drops connections when it is told to.
 */
import { EventSource } from "eventsource";
import { WebSocketSSE } from "../client.ts";
import { type CloseDetails, type Peer, sseAdapter, type SSEOptions } from "../server.ts";
import { chaos, type ChaosProxy } from "./chaos.ts";
import {
  assert,
  assertEquals,
  assertLess,
  assertMatch,
  assertRejects,
  deferred,
  once,
  sleep,
  test,
  type TestContext,
  until,
} from "./harness.ts";
import { handClock } from "./pair.ts";
import { ScriptedServer } from "./scripted.ts";
import { ack, CLOSE_3127, NotOpened, seq, text, wireClient } from "./wire.ts";

const TRANSPORTS = ["duplex", "stream", "post"] as const;

/** A server that keeps account of what its hooks were told. */
async function host(t: TestContext, options: SSEOptions = {}) {
  const log: string[] = [];
  const opened = deferred<Peer>();
  const closed = deferred<CloseDetails>();
  const { hooks, ...rest } = options;
  const ws = sseAdapter({
    bidir: true,
    heartbeatInterval: 200,
    resumeTimeout: 10_000,
    ...rest,
    hooks: {
      ...hooks,
      open(peer) {
        log.push("open");
        opened.resolve(peer);
        return hooks?.open?.(peer);
      },
      message(peer, message) {
        log.push(message.text());
        return hooks?.message?.(peer, message);
      },
      close(peer, details) {
        log.push(`close ${details.code}`);
        closed.resolve(details);
        return hooks?.close?.(peer, details);
      },
    },
  });
  t.defer(() => {
    for (const peers of ws.peers.values()) for (const peer of peers) peer.terminate();
    return ws.close();
  });
  const server = await t.serve(ws.fetch);
  return {
    ws,
    log,
    url: server.url,
    port: server.port,
    opened: opened.promise,
    closed: closed.promise,
  };
}

/** An open session of raw requests. */
async function rawSession(t: TestContext, options: SSEOptions = {}) {
  const server = await host(t, options);
  const client = await wireClient(t, server.url);
  const peer = await server.opened;
  const resume = async (attempt: number, lastEventId: number) =>
    t.use(await client.resume(attempt, lastEventId));
  const refused = async (attempt: number, lastEventId: number) =>
    (await assertRejects(() => client.resume(attempt, lastEventId), NotOpened)).status;
  return { ...server, client, peer, resume, refused };
}

/** A client before a server, through a proxy. */
async function connected(
  t: TestContext,
  transport: typeof TRANSPORTS[number],
  options: SSEOptions = {},
) {
  const server = await host(t, options);
  const proxy = t.use(await chaos(server.port));
  const client = connect(t, proxy.url, transport);
  await once(client.socket, "open");
  return { ...server, ...client, proxy, peer: await server.opened };
}

function connect(
  t: TestContext,
  url: string,
  transport: typeof TRANSPORTS[number],
  fetch = globalThis.fetch,
) {
  const socket = new WebSocketSSE(url, { transport, fetch, signal: t.signal });
  const events: string[] = [];
  for (const type of ["open", "error", "drop", "resume"] as const) {
    socket.addEventListener(type, () => events.push(type));
  }
  socket.onmessage = ({ data }) => events.push(data);
  const closed = new Promise<void>((resolve) => {
    socket.addEventListener("close", ({ code, wasClean }) => {
      events.push(`close ${code} ${wasClean ? "clean" : "unclean"}`);
      resolve();
    });
  });
  return { socket, events, closed };
}

const told = (events: string[]) => events.filter((event) => event !== "drop" && event !== "resume");
const numbers = (from: number, to: number) =>
  Array.from({ length: to - from + 1 }, (_, i) => `${from + i}`);

// ---------------------------------------------------------------- the server, by raw requests

test("a drop before the first message loses nothing of what is sent meanwhile", async (t) => {
  const { peer, client, resume } = await rawSession(t);
  await client.drop();
  peer.send("1");
  peer.send("2");
  const again = await resume(1, 0);
  assertEquals(again.terms.next, 1);
  assertEquals(await again.events.messages(2), ["1", "2"]);
});

test("what was sent and not acknowledged comes again, what was acknowledged does not", async (t) => {
  const { peer, client, resume, refused } = await rawSession(t);
  for (const n of numbers(1, 10)) peer.send(n);
  await client.events.messages(10);
  assertEquals(await client.frames(ack(4)), [204, 0]);
  await client.drop();
  assertEquals(await refused(1, 3), 409); // 4 is gone: it was acknowledged
  const again = await resume(2, 6); // which acknowledges up to 6
  assertEquals(again.terms.next, 7);
  assertEquals(await again.events.messages(4), numbers(7, 10));
  assertEquals(await refused(3, 5), 409);
});

test("the highest attempt wins, an equal one replaces, a lower one gets 409 and changes nothing", async (t) => {
  const { peer, client, resume, log, refused } = await rawSession(t);
  peer.send("1");
  await client.events.messages(1);
  const fifth = await resume(5, 1); // while the old connection lives
  assertEquals(await client.events.ended(), []);
  assertEquals(fifth.terms.attempt, 5);
  assertEquals(await refused(4, 1), 409); // late
  peer.send("2");
  assertEquals(await fifth.events.messages(1), ["2"]);
  const twice = await resume(5, 1);
  await fifth.events.ended();
  assertEquals(await twice.events.messages(1), ["2"]);
  const sixth = await resume(6, 2);
  await twice.events.ended();
  assertEquals(await refused(5, 2), 409);
  peer.send("3");
  assertEquals(await sixth.events.messages(1), ["3"]);
  assertEquals(log, ["open"]);
});

test("what a client has acknowledged by its older stream comes once more, and is let go of", async (t) => {
  const { ws, peer, client, resume, refused } = await rawSession(t, { window: 2_000 });
  const large = "a".repeat(900);
  for (const n of numbers(1, 2)) peer.send(n + large);
  assertEquals((await client.events.messages(2)).length, 2);
  const renewed = resume(1, 0); // asked for before the messages came
  await until(() => ws.stats().resumptions === 1);
  assertEquals(await client.frames(ack(2)), [204, 0]);
  const { events } = await renewed;
  for (const n of numbers(3, 4)) peer.send(n + large);
  const messages = await events.messages(4);
  assertEquals(messages.map((text) => text[0]), numbers(1, 4), "nothing waits for another ACK");
  assertEquals(await refused(2, 1), 409); // 2 is gone
});

test("a resume that is repeated after its client has acknowledged more harms nobody", async (t) => {
  const { ws, peer, client, resume, log } = await rawSession(t);
  peer.send("0");
  const first = await resume(1, 0);
  for (const n of numbers(1, 3)) peer.send(n);
  assertEquals(await first.events.messages(4), numbers(0, 3));
  // Nobody reads it, so that it is given nothing, while the client's acknowledgement comes.
  const repeated = await ws.fetch(
    new Request(peer.request.url, {
      headers: {
        accept: "text/event-stream",
        "x-crossws-id": client.token,
        "x-duplex-version": "1",
        "x-duplex-attempt": "1",
        "last-event-id": "0",
      },
    }),
  );
  assertEquals(await client.frames(ack(4)), [204, 0]);
  peer.send("4");
  const again = await resume(2, 4);
  // The preface, which says that it was taken, and no message.
  assertMatch(await repeated.text(), /^:\nevent: duplex-open\ndata: .*\n\n$/);
  assertEquals(await again.events.messages(1), ["4"]);
  assertEquals(await client.frames(text("alive"), 1), [204, 1]);
  assertEquals(log, ["open", "alive"]);
});

test("an acknowledgement of what was never sent is refused, and harms nobody", async (t) => {
  const { peer, client } = await rawSession(t);
  peer.send("1");
  await client.events.messages(1);
  assertEquals(await client.frames(ack(2)), [400, 0]);
  peer.send("2");
  assertEquals(await client.events.messages(1), ["2"]);
});

test("a Last-Event-ID of the future or of another session gets 409, and harms nobody", async (t) => {
  const { peer, client, refused, url } = await rawSession(t);
  const other = await wireClient(t, url);
  peer.send("1");
  await client.events.messages(1);
  assertEquals(await refused(1, 2), 409);
  assertEquals((await assertRejects(() => other.resume(1, 1), NotOpened)).status, 409);
  peer.send("2");
  assertEquals(await client.events.messages(1), ["2"]);
  assertEquals(await client.frames(text("up"), 1), [204, 1]);
});

test("a repeated uplink request changes nothing, an overlapping one adds its end", async (t) => {
  const { client, log } = await rawSession(t);
  const frames = text("a") + text("b");
  assertEquals(await client.frames(frames, 1), [204, 2]);
  assertEquals(await client.frames(frames, 1), [204, 2]);
  assertEquals(await client.frames(text("b") + text("c"), 2), [204, 3]);
  assertEquals(await client.frames(frames, 1), [204, 3]);
  assertEquals(log, ["open", "a", "b", "c"]);
});

test("a gap in the uplink gets 409 and reaches no hook", async (t) => {
  const { client, log } = await rawSession(t);
  assertEquals(await client.frames(text("b"), 2), [409, 0]);
  assertEquals(await client.frames(text("a"), 1), [204, 1]);
  assertEquals(await client.frames(text("b") + "SEQ 1\r\n4\r\n" + text("d"), 2), [409, 2]);
  assertEquals(await client.frames(text("b") + "SEQ 1\r\n3\r\n" + text("c"), 2), [204, 3]);
  assertEquals(log, ["open", "a", "b", "c"]);
});

test("half a message at the end of a body does not count", async (t) => {
  const { client, log } = await rawSession(t);
  assertEquals(await client.frames(text("a") + "TEXT 5\r\nhal", 1), [204, 1]);
  assertEquals(await client.frames(text("whole"), 2), [204, 2]);
  assertEquals(log, ["open", "a", "whole"]);
});

test("the server's close comes after what was sent, again and again until it is answered", async (t) => {
  const { peer, client, resume, log } = await rawSession(t);
  peer.send("1");
  peer.close(4000, "done");
  for (const connection of [client, await resume(1, 0), await resume(2, 0)]) {
    const events = await connection.events.ended();
    const [message, close] = events.slice(-2);
    assertEquals([message!.data, close!.type], ["1", "duplex-close"]);
    assertEquals(JSON.parse(close!.data), { code: 4000, reason: "done", sent: 1 });
  }
  assertEquals(log, ["open"]);
  assertEquals(await client.frames(CLOSE_3127, 1), [204, 1]);
  await until(() => log.length > 1);
  assertEquals(log, ["open", "close 4000"], "the server's word decides");
});

test("a tombstone replays the close, answers a repeated CLOSE with 2xx, and expires", async (t) => {
  const { client, resume, log, refused } = await rawSession(t, { resumeTimeout: 1_000 });
  await client.drop();
  const frames = text("last") + CLOSE_3127;
  assertEquals(await client.frames(frames, 1), [204, 2]);
  for (const attempt of [1, 2]) {
    assertEquals(await client.frames(frames, 1), [204, 2]);
    const again = await resume(attempt, 0);
    assertEquals(again.terms.received, 2);
    assertEquals(await again.closed(), 3127);
    assertEquals(await again.events.ended(), []);
  }
  assertEquals(log, ["open", "last", "close 3127"]);
  await until(async () => (await client.frames(frames, 1))[0] === 404);
  assertEquals(await refused(3, 0), 404);
});

test("a session that expires closes once with 1006, and nothing of it is left", async (t) => {
  const { ws, peer, client, log, closed, refused } = await rawSession(t, {
    resumeTimeout: 300,
  });
  peer.subscribe("news");
  peer.send("x".repeat(300_000)); // more than the window, so that the next one waits
  peer.send("unread");
  await client.events.messages(1);
  assert(peer.bufferedAmount > 0);
  const drained = peer.waitForDrain();
  await client.drop();
  assertEquals(await closed, { code: 1006, reason: "" });
  assertEquals([ws.peers.size, peer.topics.size, peer.peers.size, peer.bufferedAmount], [
    0,
    0,
    0,
    0,
  ]);
  await drained;
  assertEquals(await refused(1, 0), 404);
  assertEquals((await client.frames(text("late"), 1))[0], 404);
  ws.publish("news", "to nobody");
  assertEquals(log, ["open", "close 1006"]);
});

test("with resumeTimeout 0 a drop is the end of the session", async (t) => {
  const { ws, client, log, closed, refused } = await rawSession(t, { resumeTimeout: 0 });
  await client.drop();
  assertEquals(await closed, { code: 1006, reason: "" });
  assertEquals(ws.peers.size, 0);
  assertEquals(await refused(1, 0), 404);
  assertEquals(log, ["open", "close 1006"]);
});

// ---------------------------------------------------------------- the client, before a script

/** A client whose session a script has opened. */
async function scriptedClient(t: TestContext, terms = {}) {
  const server = new ScriptedServer();
  const client = connect(t, "http://scripted.test/", "post", server.fetch as typeof fetch);
  const stream = (await server.next()).stream(terms);
  t.defer(() => stream.end());
  await once(client.socket, "open");
  return { ...client, server, stream };
}

test("the client resumes through statuses that pass and through network errors", async (t) => {
  const { server, stream, events, socket } = await scriptedClient(t);
  stream.write("data: 1\n\ndata: hal");
  stream.fail();
  let attempt = 0;
  for (const status of [408, 425, 429, 500, 503, 0]) {
    const asked = await server.next();
    assertEquals(asked.headers.get("last-event-id"), "1"); // half an event does not count
    assertEquals(asked.headers.get("x-duplex-attempt"), `${++attempt}`);
    if (status) asked.respond(status);
    else asked.fail();
  }
  const again = (await server.next()).stream();
  t.defer(() => again.end());
  again.write("data: half\n\n");
  await once(socket, "message");
  assertEquals(events, ["open", "1", "drop", "resume", "half"]);
});

for (const status of [204, 400, 401, 403, 404, 409, 410]) {
  test(`a resume answered by ${status} is final: error, then close 1006`, async (t) => {
    const { server, stream, events, closed } = await scriptedClient(t);
    stream.end();
    (await server.next()).respond(status);
    await closed;
    assertEquals(events, ["open", "drop", "error", "close 1006 unclean"]);
    assertEquals(server.asked, []);
  });
}

test("an uplink request is repeated through statuses that pass, with the same number and bytes", async (t) => {
  const { server, socket } = await scriptedClient(t, { resumeTimeout: 20_000 });
  socket.send("hello");
  for (const status of [408, 425, 429, 500, 503, 0]) {
    const asked = await server.next();
    assert(asked.body.endsWith(seq(1) + text("hello"))); // an acknowledgement may go before
    if (status) asked.respond(status);
    else asked.fail();
  }
  assertEquals(socket.bufferedAmount, 5);
  (await server.next()).respond(204, { "x-duplex-received": "1" });
  await until(() => socket.bufferedAmount === 0);
  assertEquals(socket.stats.resent, 6);
});

test("an uplink request answered by another status is final", async (t) => {
  const { server, socket, events, closed } = await scriptedClient(t);
  socket.send("hello");
  (await server.next()).respond(409);
  await closed;
  assertEquals(events, ["open", "error", "close 1006 unclean"]);
});

test("an uplink stream that is answered when all is confirmed ends, and another follows", async (t) => {
  const server = new ScriptedServer();
  const bodies: ReadableStreamDefaultReader<Uint8Array>[] = [];
  const reading = (url: string, init?: RequestInit) => {
    if (init!.body) bodies.push((init!.body as ReadableStream<Uint8Array>).getReader());
    return server.fetch(url, init);
  };
  const { socket, events } = connect(t, "http://scripted.test/", "stream", reading as typeof fetch);
  const stream = (await server.next()).stream();
  t.defer(() => stream.end());
  await once(socket, "open");
  for (const message of ["1", "2"]) {
    socket.send(message);
    const asked = await server.next();
    const body = bodies.shift()!;
    assertEquals((await body.read()).value, new TextEncoder().encode(seq(message) + text(message)));
    stream.write(`event: duplex-ack\ndata: ${message} 0\n\n`);
    await until(() => socket.bufferedAmount === 0);
    asked.respond(204, { "x-duplex-received": message });
    assert((await body.read()).done); // else the request would never be over
  }
  assertEquals([socket.transport, events], ["stream", ["open"]]);
});

for (const what of ["headers", "fetch"] as const) {
  test(`${what} that never settle hold a resume no longer than resumeTimeout`, async (t) => {
    const server = new ScriptedServer();
    const never = () => new Promise<never>(() => {});
    let hangs = false;
    const socket = new WebSocketSSE("http://scripted.test/", {
      transport: "post",
      signal: t.signal,
      headers: () => hangs && what === "headers" ? never() : {},
      fetch: (url, init) => hangs ? never() : server.fetch(url, init),
    });
    const stream = (await server.next()).stream({ resumeTimeout: 500 });
    await once(socket, "open");
    hangs = true;
    stream.end();
    assertEquals((await once<CloseEvent>(socket, "close")).code, 1006);
  });
}

const DAMAGE: Record<string, { wrong: (state: { count: number }) => string }> = {
  "a ping with a number that does not fit": {
    wrong: ({ count }) => `event: duplex-ping\ndata: ${count + 1} \n\n`,
  },
  ...Object.fromEntries(["1e0", " 1", "0x1", "+1", "01", "1.0"].map((number) => [
    `a ping with ${JSON.stringify(number)} for 1`,
    { wrong: ({ count }) => `event: duplex-ping\ndata: ${number.replace("1", `${count}`)} \n\n` },
  ])),
  ...Object.fromEntries(
    ["", "-1 0", "0x0 0", "0 1e3", "0 ", "0 00", "0 -1", "0 9007199254740992", "0 0 1e9", "0 0 -5"]
      .map((counts) => [
        `an acknowledgement of ${JSON.stringify(counts)}`,
        { wrong: () => `event: duplex-ack\ndata: ${counts}\n\n` },
      ]),
  ),
  "an acknowledgement of what was not sent": { wrong: () => "event: duplex-ack\ndata: 7 0\n\n" },
  "an event that cannot be parsed": { wrong: () => "event: duplex-json\ndata: {oops\n\n" },
};

for (const [what, { wrong }] of Object.entries(DAMAGE)) {
  test(`${what} makes the client resume once, then close with 1006`, async (t) => {
    const { server, stream, events, closed } = await scriptedClient(t);
    stream.write(`data: 1\n\n${wrong({ count: 1 })}data: not counted\n\n`);
    const asked = await server.next();
    assertEquals(asked.headers.get("last-event-id"), "1");
    const again = asked.stream();
    again.write(`data: 2\n\n${wrong({ count: 2 })}`);
    await closed;
    assertEquals(events, [
      "open",
      "1",
      "drop",
      "resume",
      "2",
      "error",
      "close 1006 unclean",
    ]);
    assertEquals(server.asked, []);
  });
}

test("terms that are no numbers are damage: the client resumes once, then closes with 1006", async (t) => {
  const wrong: Record<string, unknown[]> = {
    received: ["0", 0.5, 2 ** 53, null],
    handled: ["0", 0.5, 2 ** 53, null],
    heartbeatInterval: ["1e3", "1000", [1000]],
    resumeTimeout: ["0x10", " 5", true],
    window: ["1e3", null, [100]],
    idleTimeout: ["60000", -1, true],
  };
  const values = Object.entries(wrong).flatMap(([name, all]) =>
    all.map((one) => ({ [name]: one }))
  );
  await Promise.all(values.map(async (terms) => {
    const { server, socket, stream, events, closed } = await scriptedClient(t);
    stream.end();
    for (let tries = 0; tries < 2; tries++) {
      (await server.next()).stream(terms as { received: number }).write("data: not taken\n\n");
    }
    // Terms that are taken would be told as a resumption.
    const taken = new Promise((resolve) => socket.addEventListener("resume", resolve));
    await Promise.race([closed, taken]);
    assertEquals(events, ["open", "drop", "error", "close 1006 unclean"], JSON.stringify(terms));
  }));
});

test("an answer whose x-duplex-received is no number confirms nothing, and is final as one without", async (t) => {
  for (const received of ["1e0", "0x1", "+1", "01", "1.0", "-1"]) {
    const { server, socket, events, closed } = await scriptedClient(t);
    socket.send("x");
    const asked = await server.next();
    assertEquals(asked.body, seq(1) + text("x"));
    asked.respond(204, { "x-duplex-received": received });
    await closed;
    assertEquals([events, socket.bufferedAmount], [["open", "error", "close 1006 unclean"], 1]);
  }
});

test("an acknowledgement of what still waits for the window is damage, and loses nothing", async (t) => {
  const { server, socket, events } = await scriptedClient(t, { window: 10 });
  socket.send("longer than the window");
  socket.send("not sent yet");
  const asked = await server.next();
  assertEquals(asked.body, seq(1) + text("longer than the window"));
  asked.respond(204, { "x-duplex-received": "2" });
  const again = (await server.next()).stream({ received: 1, window: 10 });
  t.defer(() => again.end());
  again.write("event: duplex-ack\ndata: 1 100\n\n");
  const second = await server.next();
  assertEquals(second.body, seq(2) + text("not sent yet"));
  second.respond(204, { "x-duplex-received": "2" });
  await until(() => socket.bufferedAmount === 0);
  assertEquals(events, ["open", "drop", "resume"]);
});

test("an acknowledgement that went with a batch that was too large goes again", async (t) => {
  const { server, socket, stream } = await scriptedClient(t);
  stream.write("data: 1\n\n");
  await once(socket, "message");
  socket.send("one");
  socket.send("two");
  const asked = await server.next();
  assertEquals(asked.body, ack(1) + seq(1) + text("one") + text("two"));
  asked.respond(413);
  const again = await server.next();
  assertEquals(again.body, ack(1) + seq(1) + text("one"));
  again.respond(204, { "x-duplex-received": "1" });
  (await server.next()).respond(204, { "x-duplex-received": "2" });
  await until(() => socket.bufferedAmount === 0);
});

test("a page that is slow with its messages is no silence of the network", async (t) => {
  const { server, socket, stream, events } = await scriptedClient(t, { heartbeatInterval: 40 });
  let got = 0;
  socket.onmessage = () => {
    for (const end = performance.now() + 10; performance.now() < end;);
    got++;
  };
  const beats = setInterval(() => stream.write(":\n\n"), 10);
  t.defer(() => clearInterval(beats));
  stream.write("data: x\n\n".repeat(40));
  await until(() => got === 40);
  await sleep(50);
  assertEquals([events.filter((event) => event !== "x"), server.asked], [["open"], []]);
});

test("a stream that is never read is left for post", async (t) => {
  const { setInterval } = globalThis;
  t.defer(() => globalThis.setInterval = setInterval);
  globalThis.setInterval = ((task: () => void, ms: number) => setInterval(task, ms / 20)) as never;
  const server = new ScriptedServer();
  const { socket } = connect(
    t,
    "http://scripted.test/",
    "stream",
    ((url, init) => {
      if (!(init!.body instanceof ReadableStream)) return server.fetch(String(url), init);
      return new Promise((_, reject) => {
        init!.signal!.addEventListener("abort", () => reject(new Error("Aborted")));
      });
    }) as typeof fetch,
  );
  const stream = (await server.next()).stream();
  t.defer(() => stream.end());
  const beats = setInterval(() => stream.write(":\n\n"), 20);
  t.defer(() => clearInterval(beats));
  await once(socket, "open");
  socket.send("hello");
  const asked = await server.next();
  assertEquals([asked.body, socket.transport], [ack(0) + seq(1) + text("hello"), "post"]);
  asked.respond(204, { "x-duplex-received": "1" });
  await until(() => socket.bufferedAmount === 0);
});

for (const name of ["next", "attempt"] as const) {
  test(`a resumed stream with another \`${name}\` is resumed once more, then closed with 1006`, async (t) => {
    const { server, stream, events, closed } = await scriptedClient(t);
    stream.write("data: 1\n\n");
    stream.end();
    (await server.next()).stream({ [name]: 7 });
    const third = await server.next();
    assertEquals(third.headers.get("last-event-id"), "1");
    third.stream({ [name]: 7 });
    await closed;
    assertEquals(events, ["open", "1", "drop", "error", "close 1006 unclean"]);
    assertEquals(server.asked, []);
  });
}

test("a close waits as long as the server goes on handling what was sent before it", async (t) => {
  const { server, socket, stream, closed } = await scriptedClient(t, {
    resumeTimeout: 300,
    window: 10,
  });
  const first = "longer than the window, and handled bit by bit";
  socket.send(first);
  socket.send("second");
  socket.close();
  const asked = await server.next();
  assertEquals(asked.body, seq(1) + text(first));
  asked.respond(204, { "x-duplex-received": "1" });
  for (let handled = 1; handled <= 6; handled++) {
    await sleep(100);
    stream.write(`event: duplex-ack\ndata: 1 ${handled}\n\n`);
  }
  stream.write("event: duplex-ack\ndata: 1 100\n\n");
  const rest = await server.next();
  assertEquals(rest.body, seq(2) + text("second") + "CLOSE 0\r\n\r\n");
  rest.respond(204, { "x-duplex-received": "3" });
  stream.write(`event: duplex-close\ndata: {"code":1005,"reason":"","sent":0}\n\n`);
  await closed;
});

test("an acknowledgement that was lost is said again", async (t) => {
  const { server, stream } = await scriptedClient(t, { window: 1000 });
  stream.write(`data: ${"x".repeat(600)}\n\n`);
  for (const status of [0, 503]) {
    const asked = await server.next();
    assertEquals(asked.body, ack(1));
    if (status) asked.respond(status);
    else asked.fail();
  }
  const asked = await server.next();
  assertEquals(asked.body, ack(1));
  asked.respond(204);
});

test("messages that come in one chunk with the session's opening are acknowledged", async (t) => {
  const server = new ScriptedServer();
  connect(t, "http://scripted.test/", "post", server.fetch as typeof fetch);
  const stream = (await server.next()).stream({ window: 1000 });
  t.defer(() => stream.end());
  // Before the client has read anything: the runtime hands it over in one or in two pieces.
  const resumed = async () => {
    const asked = await server.next();
    assertEquals(asked.body, ack(1));
    asked.respond(204);
  };
  stream.write(`data: ${"x".repeat(1000)}\n\n`);
  await resumed();
});

test("a server that opens and ends at once is not asked without pause", async (t) => {
  const { server, stream } = await scriptedClient(t);
  stream.end();
  const until = performance.now() + 1_000;
  let asked = 0;
  while (performance.now() < until) {
    const request = await Promise.race([server.next(), sleep(until - performance.now(), t.signal)]);
    if (!request) break;
    asked++;
    request.stream().end();
  }
  assert(asked > 2 && asked < 12, `${asked} requests in a second`);
});

test("the client gives up when resumeTimeout is over", async (t) => {
  const { server, stream, events, closed } = await scriptedClient(t, { resumeTimeout: 500 });
  const began = performance.now();
  stream.end();
  const refusing = (async () => {
    for (;;) (await server.next()).fail();
  })();
  await Promise.race([closed, refusing]);
  const took = performance.now() - began;
  assertEquals(events, ["open", "drop", "error", "close 1006 unclean"]);
  assert(took > 400 && took < 2_000, `${took} ms`);
});

for (const [spent, comes] of [[9_000, true], [13_000, false]] as const) {
  const what = comes ? "goes on for idleTimeout longer" : "gives up after that, too";
  test(`where nothing answers at all the client ${what}`, async (t) => {
    const terms = { resumeTimeout: 1_500, idleTimeout: 10_000 };
    const { server, stream, socket, events, closed } = await scriptedClient(t, terms);
    const clock = handClock(t);
    stream.end();
    await server.next();
    clock.time += 1_600; // and none comes until the client gives that one up
    const second = await server.next();
    clock.time += spent - 1_600;
    second.fail(); // at last the network says what it knows
    if (comes) {
      const third = (await server.next()).stream(terms);
      await once(socket, "resume");
      third.end();
      // From now on the network says what it knows: then the time is the shorter one again.
      const refusing = (async () => {
        for (;; clock.time += 600) (await server.next()).fail();
      })();
      await Promise.race([closed, refusing]);
    }
    await closed;
    const before = comes ? ["open", "drop", "resume"] : ["open"];
    assertEquals(events, [...before, "drop", "error", "close 1006 unclean"]);
  });
}

test("what goes up is tried for as long", async (t) => {
  const terms = { resumeTimeout: 1_500, idleTimeout: 10_000 };
  const { server, stream, socket, events } = await scriptedClient(t, terms);
  const clock = handClock(t);
  socket.send("up");
  await server.next();
  clock.time += 1_600; // and no answer comes
  stream.end();
  let asked = await server.next();
  for (; asked.method === "GET"; asked = await server.next()) {
    const again = asked.stream(terms);
    t.defer(() => again.end());
  }
  asked.respond(204, { "x-duplex-received": "1" });
  await until(() => socket.bufferedAmount === 0);
  assertEquals(events.filter((event) => event !== "resume"), ["open", "drop"]);
});

test("with resumeTimeout 0 the client does not come back", async (t) => {
  const { server, stream, events, closed } = await scriptedClient(t, { resumeTimeout: 0 });
  stream.end();
  await closed;
  assertEquals(events, ["open", "drop", "error", "close 1006 unclean"]);
  assertEquals(server.asked, []);
});

// ---------------------------------------------------------------- both, through a proxy

/** Silence first, so that what is sent in it is under way when the connections are cut. */
async function dropWith(proxy: ChaosProxy, action: () => void): Promise<void> {
  proxy.stallAll();
  action();
  await sleep(30); // time to write into the silence
  proxy.cutAll("rst");
  proxy.resumeAll();
}

for (const transport of TRANSPORTS) {
  test(`over ${transport}, a drop before the first message is not noticed`, async (t) => {
    const { proxy, socket, peer, events, log } = await connected(t, transport);
    await dropWith(proxy, () => {
      socket.send("up");
      peer.send("down");
    });
    await until(() => log.includes("up") && events.includes("down"));
    assertEquals(told(events), ["open", "down"]);
    assertEquals(log, ["open", "up"]);
  });

  test(`over ${transport}, a second drop during the resume loses nothing`, async (t) => {
    const { proxy, socket, peer, events, log } = await connected(t, transport);
    await dropWith(proxy, () => {
      socket.send("1");
      peer.send("1");
    });
    for (const n of ["2", "3"]) {
      await until(() => proxy.open > 0, { interval: 1 });
      proxy.cutAll("rst");
      socket.send(n);
      peer.send(n);
    }
    await until(() => log.includes("3") && events.includes("3"));
    assertEquals(told(events), ["open", "1", "2", "3"]);
    assertEquals(log, ["open", "1", "2", "3"]);
  });

  test(`over ${transport}, the client's close follows its messages across a drop`, async (t) => {
    const { proxy, socket, events, log, closed } = await connected(t, transport);
    await dropWith(proxy, () => {
      for (const n of numbers(1, 5)) socket.send(n);
      socket.close(4000, "bye");
    });
    await closed;
    assertEquals(log, ["open", ...numbers(1, 5), "close 4000"]);
    assertEquals(told(events), ["open", "close 4000 clean"]);
    assertEquals(socket.bufferedAmount, 0);
  });

  test(`over ${transport}, the server's close follows its messages across a drop`, async (t) => {
    const { proxy, peer, events, log, closed } = await connected(t, transport);
    await dropWith(proxy, () => {
      for (const n of numbers(1, 5)) peer.send(n);
      peer.close(4001, "bye");
    });
    await closed;
    assertEquals(told(events), ["open", ...numbers(1, 5), "close 4001 clean"]);
    await until(() => log.length === 2);
    assertEquals(log, ["open", "close 4001"]);
  });

  test(`over ${transport}, a hook that waits for drain gets the acknowledgement behind its message`, async (t) => {
    const { socket, events, log } = await connected(t, transport, {
      window: 4096,
      heartbeatInterval: 5_000,
      hooks: {
        async message(peer, message) {
          for (let n = 0; n < 50; n++) {
            peer.send("x".repeat(2000));
            await peer.waitForDrain();
          }
          peer.send(`end of ${message.text()}`);
        },
      },
    });
    socket.send("1");
    socket.send("2");
    await until(() => events.includes("end of 1") && events.includes("end of 2"), {
      timeout: 8_000,
    });
    assertEquals(log, ["open", "1", "2"]);
    assertEquals(events.length, 1 + 2 * 51);
  });

  test(`over ${transport}, an outage shorter than resumeTimeout is survived`, async (t) => {
    const { proxy, socket, peer, events, log } = await connected(t, transport);
    proxy.refuse(1_500);
    proxy.cutAll();
    socket.send("up");
    peer.send("down");
    await until(() => log.includes("up") && events.includes("down"), { timeout: 8_000 });
    assert(proxy.stats.refusals > 1);
    assertEquals(events, ["open", "drop", "resume", "down"]);
    assertEquals(log, ["open", "up"]);
  });

  test(`over ${transport}, an outage beyond resumeTimeout closes both sides with 1006 in bounded time`, async (t) => {
    const { proxy, socket, ws, events, log, closed } = await connected(t, transport, {
      resumeTimeout: 500,
    });
    const began = performance.now();
    proxy.refuse(20_000);
    proxy.cutAll();
    socket.send("lost");
    await closed;
    await until(() => log.length > 1);
    assertLess(performance.now() - began, 3_000);
    assertEquals(events, ["open", "drop", "error", "close 1006 unclean"]);
    assertEquals(log, ["open", "close 1006"]);
    assertEquals(ws.peers.size, 0);
  });

  test(`over ${transport}, a connection that falls silent is resumed`, async (t) => {
    const { proxy, socket, peer, events, log } = await connected(t, transport);
    proxy.stallAll({ newcomers: false });
    socket.send("up");
    peer.send("down");
    await until(() => log.includes("up") && events.includes("down"), { timeout: 8_000 });
    assertEquals(told(events), ["open", "down"]);
    assertEquals(log, ["open", "up"]);
  });
}

test("a session that the server has terminated is closed with 1006 at once", async (t) => {
  const { peer, events, closed, log } = await connected(t, "duplex");
  peer.terminate();
  await closed;
  // The answer to a request of its own may tell it before the stream's end does.
  const told = events.filter((event) => event !== "drop");
  assertEquals(told, ["open", "error", "close 1006 unclean"]);
  assertEquals(log, ["open", "close 1006"]);
});

test("a native EventSource resumes by its id alone", async (t) => {
  const server = await host(t, { bidir: false });
  const proxy = t.use(await chaos(server.port));
  const source = new EventSource(proxy.url);
  t.defer(() => source.close());
  const seen: string[] = [];
  source.onmessage = ({ data }) => void seen.push(data);
  const peer = await server.opened;
  await once(source as unknown as EventTarget, "open").catch(() => {});
  peer.send("1");
  await until(() => seen.length === 1);
  proxy.cutAll("rst");
  peer.send("2");
  await until(() => seen.length === 2, { timeout: 8_000 });
  peer.send("3");
  await until(() => seen.length === 3);
  assertEquals(seen, ["1", "2", "3"]);
  assertEquals(server.log, ["open"]);
}, { timeout: 15_000 });
