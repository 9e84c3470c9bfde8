/**
 * The client against networks that lie, stall and forget: each case is the smallest input of a
 * fault that was found by use. The server is a script that says what the case wants, or the real one.
 */
import { readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { WebSocketSSE, type WebSocketSSEErrorEvent, type WebSocketSSEOptions } from "../client.ts";
import { chaos } from "./chaos.ts";
import {
  assert,
  assertEquals,
  assertGreater,
  assertGreaterOrEqual,
  assertLess,
  assertLessOrEqual,
  assertMatch,
  assertThrows,
  deferred,
  once,
  sleep,
  strip,
  test,
  type TestContext,
  until,
} from "./harness.ts";
import { connect as dial, handClock, listen, Queue } from "./pair.ts";
import { type Asked, ScriptedServer, type ScriptedStream } from "./scripted.ts";
import { ack, seq, text } from "./wire.ts";

/** Answers of something that stands in between, and bears no mark. */
const UNMARKED = { "x-duplex-version": "" };
/** A captive portal, a login wall, a router during a deploy, a proxy that asks to sign in. */
const FOREIGN = [200, 204, 302, 400, 401, 403, 404, 407, 410];

interface Scripted {
  readonly server: ScriptedServer;
  readonly socket: WebSocketSSE;
  readonly stream: ScriptedStream;
  /** Types of events, data of messages, what `close` tells. */
  readonly events: string[];
  readonly closed: Promise<void>;
}

/** A client whose session a script has opened. */
async function scripted(
  t: TestContext,
  terms: Parameters<Asked["stream"]>[0] = {},
  init: WebSocketSSEOptions = {},
): Promise<Scripted> {
  const server = new ScriptedServer();
  const socket = new WebSocketSSE("http://scripted.test/", {
    transport: "post",
    fetch: server.fetch,
    signal: t.signal,
    ...init,
  });
  const events: string[] = [];
  for (const type of ["open", "error", "drop", "resume"] as const) {
    socket.addEventListener(type, () => events.push(type));
  }
  socket.onmessage = ({ data }) => events.push(data);
  const closed = new Promise<void>((resolve) => {
    socket.onclose = ({ code, reason, wasClean }) => {
      events.push(`close ${code} "${reason}" ${wasClean ? "clean" : "unclean"}`);
      resolve();
    };
  });
  const opened = once(socket, "open");
  const stream = (await server.next()).stream(terms);
  t.defer(() => stream.end());
  await opened;
  return { server, socket, stream, events, closed };
}

/** The number of a body's next message, and its frames. */
const close = (code: number, reason = "") =>
  `CLOSE ${(reason.length + 2).toString(16)}\r\n` +
  new TextDecoder().decode(new Uint8Array([code >> 8, code & 255])) + `${reason}\r\n`;

// ---------------------------------------------------------------- who spoke

for (const status of FOREIGN) {
  test(`a resumption that something in between answers by ${status} is tried again`, async (t) => {
    const { server, stream, events } = await scripted(t);
    stream.end();
    for (let attempt = 1; attempt <= 2; attempt++) {
      const asked = await server.next();
      assertEquals(asked.headers.get("x-duplex-attempt"), `${attempt}`);
      asked.respond(status, UNMARKED);
    }
    const again = (await server.next()).stream();
    t.defer(() => again.end());
    again.write("data: still here\n\n");
    await until(() => events.includes("still here"));
    assertEquals(events, ["open", "drop", "resume", "still here"]);
  });

  test(`a message that something in between answers by ${status} is sent again`, async (t) => {
    const { server, socket, events } = await scripted(t);
    socket.send("hello");
    for (let times = 0; times < 2; times++) {
      const asked = await server.next();
      assert(asked.body.endsWith(seq(1) + text("hello")));
      asked.respond(status, UNMARKED);
    }
    (await server.next()).respond(204, { "x-duplex-received": "1" });
    await until(() => socket.bufferedAmount === 0);
    assertEquals(events, ["open"]);
  });
}

for (const status of [404, 409, 403]) {
  test(`a message that the server itself answers by ${status} is refused for good`, async (t) => {
    const { server, socket, events, closed } = await scripted(t);
    socket.send("hello");
    (await server.next()).respond(status);
    await closed;
    assertEquals(events, ["open", "error", 'close 1006 "" unclean']);
  });
}

for (
  const [what, status, headers] of [
    ["a captive portal's 200", 200, UNMARKED],
    ["a 204 without a mark", 204, UNMARKED],
    ["a 204 of nobody who says what was received", 204, { ...UNMARKED, "x-duplex-received": "" }],
  ] as const
) {
  test(`an ACK that is answered by ${what} goes again`, async (t) => {
    const { server, stream } = await scripted(t, { window: 100 });
    stream.write(`data: ${"x".repeat(60)}\n\n`);
    for (let times = 0; times < 3; times++) {
      const asked = await server.next();
      assertEquals(asked.body, ack(1));
      asked.respond(status, headers);
    }
    (await server.next()).respond(204, { "x-duplex-received": "0" });
    await sleep(300, t.signal); // longer than the pause before another
    assertEquals(server.asked, []);
  });
}

test("an ACK goes again with every PONG, since the last one may be lost", async (t) => {
  const { server, stream } = await scripted(t);
  stream.write("data: 1\n\n");
  for (const payload of ["QQ==", "Qg=="]) {
    stream.write(`event: duplex-ping\ndata: 1 ${payload}\n\n`);
    const asked = await server.next();
    assertEquals(asked.body, `PONG 1\r\n${atob(payload)}\r\n${ack(1)}`);
    asked.respond(204, { "x-duplex-received": "0" });
    await sleep(20, t.signal);
  }
});

test("a stranger's answers to streaming requests are no storm of requests", async (t) => {
  const server = new ScriptedServer();
  const socket = new WebSocketSSE("http://scripted.test/", {
    transport: "stream",
    fetch: server.fetch,
    signal: t.signal,
  });
  const stream = (await server.next()).stream();
  t.defer(() => stream.end());
  await once(socket, "open");
  let asked = 0;
  const end = performance.now() + 1_000;
  socket.send("hello");
  while (performance.now() < end) {
    const request = await Promise.race([server.next(), sleep(end - performance.now(), t.signal)]);
    if (!request) break;
    asked++;
    request.respond(200, UNMARKED);
    stream.write("event: duplex-ack\ndata: 0 0\n\n"); // which has the client look what there is to do
  }
  assert(asked > 1 && asked < 15, `${asked} requests in a second`);
});

// ---------------------------------------------------------------- firewalls, limits

for (const status of [403, 400, 413]) {
  test(`a batch that a firewall answers by ${status} goes again in halves`, async (t) => {
    const { server, socket, events } = await scripted(t);
    for (const message of ["one", "two", "six", "ten"]) socket.send(message);
    const sizes: number[] = [];
    const got: string[] = [];
    while (got.length < 4) {
      const asked = await server.next();
      const parts = [...asked.body.matchAll(/TEXT 3\r\n(\w+)\r\n/g)].map(([, message]) => message!);
      sizes.push(parts.length);
      if (parts.length > 1) asked.respond(status, UNMARKED);
      else {
        got.push(...parts);
        asked.respond(204, { "x-duplex-received": `${got.length}` });
      }
    }
    await until(() => socket.bufferedAmount === 0);
    assertEquals([got, events], [["one", "two", "six", "ten"], ["open"]]);
    assertEquals(sizes, [4, 2, 1, 1, 1, 1]); // without a pause, and what was learned stays
  });
}

test("a server that takes nothing of a whole request is warned of, and tried again", async (t) => {
  t.expect("scripted.test took nothing of a whole request");
  const warnings: string[] = [];
  const { warn } = console;
  console.warn = (text: string) => void warnings.push(text);
  t.defer(() => console.warn = warn);
  const { server, socket, events } = await scripted(t);
  socket.send("hello");
  for (let times = 0; times < 3; times++) {
    (await server.next()).respond(204, { "x-duplex-received": "0" });
  }
  (await server.next()).respond(204, { "x-duplex-received": "1" });
  await until(() => socket.bufferedAmount === 0);
  assertEquals(events, ["open"]);
  assertEquals(warnings.length, 1);
});

test("a message that is too large ends both sides with 1009, at once", async (t) => {
  for (const transport of ["duplex", "stream", "post"] as const) {
    const closes = new Queue<unknown>();
    const { url, ws } = await listen(t, {
      maxMessageSize: 1_000,
      hooks: { close: (_, { code }) => closes.push(code) },
    });
    const { socket, opened, closed } = dial(t, url, { transport });
    await opened;
    socket.send("x".repeat(2_000));
    assertEquals((await closed).code, 1009, transport);
    assertEquals(await closes.next(), 1009, transport);
    assertEquals(ws.peers.size, 0);
  }
});

test("a message that a proxy calls too large leaves no peer behind", async (t) => {
  const closes = new Queue<unknown>();
  const { url } = await listen(t, {
    hooks: { close: (_, { code }) => closes.push(code) },
  }, async (request, next) => {
    if (Number(request.headers.get("content-length")) < 1_000) return await next(request);
    await request.arrayBuffer();
    return new Response("Too large", { status: 413 });
  });
  const { socket, opened, closed } = dial(t, url, { transport: "post" });
  await opened;
  socket.send("x".repeat(2_000));
  assertEquals((await closed).code, 1009);
  assertEquals(await closes.next(), 1009);
});

// ---------------------------------------------------------------- what the server asks for

for (
  const [what, after] of [
    ["seconds", () => "1"],
    ["a date", () => new Date(Date.now() + 2_000).toUTCString()],
  ] as const
) {
  test(`Retry-After in ${what} is waited for, by resumptions and messages`, async (t) => {
    const { server, socket, stream } = await scripted(t);
    socket.send("hello");
    let asked = await server.next();
    let at = performance.now();
    asked.respond(503, { "retry-after": after() });
    asked = await server.next();
    assertGreater(performance.now() - at, 700);
    asked.respond(204, { "x-duplex-received": "1" });
    stream.end();
    asked = await server.next();
    at = performance.now();
    asked.respond(429, { "retry-after": after() });
    asked = await server.next();
    assertGreater(performance.now() - at, 700);
    const again = asked.stream({ received: 1 });
    t.defer(() => again.end());
    await once(socket, "resume");
  });
}

test("Retry-After beyond the resume timeout is no reason not to try again within it", async (t) => {
  const { server, socket, stream } = await scripted(t, { resumeTimeout: 2_000 });
  stream.end();
  (await server.next()).respond(503, { "retry-after": "3600" });
  const again = (await server.next()).stream({ resumeTimeout: 2_000 });
  t.defer(() => again.end());
  await once(socket, "resume");
});

for (const after of ["3600", "99999999", "Infinity"]) {
  test(`Retry-After: ${after} holds back no answer to a ping for longer than the resume timeout`, async (t) => {
    const { server, stream } = await scripted(t, {
      resumeTimeout: 1_000,
      heartbeatInterval: 30_000,
    });
    stream.write("event: duplex-ping\ndata: 0 \n\n");
    const begun = performance.now();
    const asked = await server.next();
    assertMatch(asked.body, /^PONG/);
    asked.respond(503, { "retry-after": after });
    const again = await server.next();
    assertGreater(performance.now() - begun, 500, "nor is it asked again at once");
    assertLess(performance.now() - begun, 4_000);
    again.respond(204, { "x-duplex-received": "0" });
  });
}

test("expired credentials are asked for once more, and once only", async (t) => {
  let tokens = 0;
  const { server, socket, events, closed } = await scripted(t, {}, {
    headers: () => ({ authorization: `Bearer ${++tokens}` }),
  });
  socket.send("one");
  (await server.next()).respond(401);
  const fresh = await server.next();
  assertEquals(fresh.headers.get("authorization"), "Bearer 3");
  fresh.respond(204, { "x-duplex-received": "1" });
  await until(() => socket.bufferedAmount === 0);
  socket.send("two");
  (await server.next()).respond(401);
  (await server.next()).respond(401);
  await closed;
  assertEquals(events, ["open", "error", 'close 1006 "" unclean']);
});

// ---------------------------------------------------------------- deadlines

test("a resumption that stalls after its headers is tried again", async (t) => {
  const { server, stream, events } = await scripted(t, { resumeTimeout: 30_000 });
  stream.end();
  const stalled = await server.next();
  const at = performance.now();
  stalled.stall();
  const again = (await server.next()).stream({ resumeTimeout: 30_000 });
  assertLess(performance.now() - at, 10_000);
  t.defer(() => again.end());
  await until(() => events.includes("resume"));
  assertEquals(events, ["open", "drop", "resume"]);
}, { timeout: 15_000 });

test("a resumption that is answered without a body is tried again", async (t) => {
  const { server, stream, events } = await scripted(t);
  stream.fail();
  (await server.next()).respond(200, { "content-type": "text/event-stream" });
  (await server.next()).stream();
  await until(() => events.includes("resume"));
  assertEquals(events, ["open", "drop", "resume"]);
});

/** The ticker of a stream, turned by hand: each time so many ms after the last. */
async function ticking(t: TestContext) {
  const clock = handClock(t);
  const { setInterval } = globalThis;
  t.defer(() => globalThis.setInterval = setInterval);
  const tasks: (() => void)[] = [];
  const set = (task: () => void, ms: number) => {
    if (ms === 15_000 / 4) tasks.push(task);
    return setInterval(() => {}, ms);
  };
  Object.assign(globalThis, { setInterval: set });
  const all = await scripted(t, { resumeTimeout: 30_000 });
  const tick = (ms: number) => {
    clock.time += ms;
    tasks.at(-1)!();
    return sleep(1);
  };
  return { ...all, tick };
}

for (
  const [what, ms, least, most] of [
    ["seven ticks", 3_750, 6, 7],
    ["two ticks that come late, as a browser lets those of hidden tabs", 60_000, 1, 2],
  ] as const
) {
  test(`a stream that is silent is left after ${what}`, async (t) => {
    const { server, stream, events, tick } = await ticking(t);
    for (let n = 0; n < least; n++) await tick(ms);
    assertEquals(events, ["open"]);
    stream.write(":\n\n"); // it was the page that slept
    await sleep(5);
    for (let n = 0; n < least; n++) await tick(ms);
    assertEquals(events, ["open"]);
    for (let n = least; n < most; n++) await tick(ms);
    await until(() => events.includes("drop"));
    (await server.next()).stream();
    await until(() => events.includes("resume"));
  });
}

test("who has slept through the resume timeout between two tries makes one more, in earnest", async (t) => {
  const { server, stream, events, clock } = { clock: handClock(t), ...await scripted(t) };
  stream.fail();
  for (let n = 0; n < 3; n++) (await server.next()).fail();
  await sleep(5); // the pause is longer
  clock.time += 7_200_000;
  const last = await server.next();
  await sleep(50);
  last.stream();
  await until(() => events.includes("resume"));
  assertEquals(events, ["open", "drop", "resume"]);
});

test("silence is noticed before the session may be over at the server", async (t) => {
  // By two heartbeats it would take 2 s, and the server would know of no such session any more.
  const { server, events } = await scripted(t, { heartbeatInterval: 1_000, resumeTimeout: 1_800 });
  const at = performance.now();
  const again = (await server.next()).stream({ heartbeatInterval: 1_000, resumeTimeout: 1_800 });
  t.defer(() => again.end());
  const took = performance.now() - at;
  assert(took > 1_000 && took < 1_800, `${took} ms`);
  await until(() => events.includes("resume"));
});

test("an event that comes slowly is no silence: the client says that it is there", async (t) => {
  const { server, stream, events } = await scripted(t, { idleTimeout: 400 });
  let done = false;
  (async () => {
    stream.write("data: ");
    while (!done) {
      stream.write("x");
      await sleep(20, t.signal);
    }
    stream.write("\n\n");
  })().catch(() => {});
  for (let times = 0; times < 3; times++) {
    const asked = await server.next();
    assertEquals(asked.body, ack(0));
    asked.respond(204, { "x-duplex-received": "0" });
  }
  done = true;
  await until(() => events.some((event) => /^x+$/.test(event)));
});

test("an uplink that alone is dead is a drop, and the page waits until it lives", async (t) => {
  let isDead = false;
  const alive = deferred();
  const got = new Queue<string>();
  const { url } = await listen(t, {
    hooks: { message: (_, message) => got.push(message.text()) },
  }, async (request, next) => {
    if (isDead && request.method === "POST") {
      await alive.promise;
      return new Response(null, { status: 503 });
    }
    return await next(request);
  });
  const { socket, events, opened } = dial(t, url, { transport: "post" });
  await opened;
  isDead = true;
  const at = performance.now();
  socket.send("hello");
  await until(() => events.includes("drop"), { timeout: 10_000 });
  assertGreater(performance.now() - at, 2_000);
  await sleep(500, t.signal); // its stream is back by now
  assertEquals(events, ["open", "drop"]);
  isDead = false;
  alive.resolve();
  assertEquals(await got.next({ timeout: 10_000 }), "hello");
  await until(() => events.includes("resume"));
  assertEquals(events, ["open", "drop", "resume"]);
}, { timeout: 30_000 });

test("an uplink that is refused for seconds is a drop", async (t) => {
  const { server, socket, events } = await scripted(t);
  socket.send("hello");
  let again: ScriptedStream | undefined;
  while (!again) {
    const asked = await server.next();
    if (asked.method === "GET") again = asked.stream();
    else asked.respond(502, UNMARKED);
  }
  t.defer(() => again.end());
  await until(() => events.includes("drop"));
  (await server.next()).respond(204, { "x-duplex-received": "1" });
  await until(() => events.includes("resume"));
  assertEquals(socket.stats.resumes, 1);
}, { timeout: 15_000 });

// ---------------------------------------------------------------- closes

test("close() while the connection is away takes no longer than the handshake", async (t) => {
  const { server, socket, stream, events, closed } = await scripted(t, { resumeTimeout: 30_000 });
  stream.end();
  (await server.next()).fail();
  await once(socket, "drop");
  const at = performance.now();
  socket.close();
  await Promise.race([
    closed,
    (async () => {
      for (;;) (await server.next()).fail();
    })(),
  ]);
  assertLess(performance.now() - at, 4_500);
  assertEquals(events, ["open", "drop", "error", 'close 1006 "" unclean']);
});

test("nor does close() whose connection is lost right after it", async (t) => {
  const { server, socket, stream, events, closed } = await scripted(t, { resumeTimeout: 30_000 });
  const at = performance.now();
  socket.close();
  (await server.next()).fail();
  stream.end();
  await Promise.race([
    closed,
    (async () => {
      for (;;) (await server.next()).fail();
    })(),
  ]);
  assertLess(performance.now() - at, 4_500);
  assertEquals(events, ["open", "error", 'close 1006 "" unclean']);
});

test("a CLOSE for which the page waits is tried at short intervals to the end", async (t) => {
  const { server, socket, stream, closed } = await scripted(t, { resumeTimeout: 30_000 });
  stream.end();
  (await server.next()).fail();
  await once(socket, "drop");
  socket.close();
  let tries = 0;
  await Promise.race([
    closed,
    (async () => {
      for (;;) {
        const asked = await server.next();
        if (asked.method === "POST") tries++;
        asked.fail();
      }
    })(),
  ]);
  assertGreaterOrEqual(tries, 9, "with pauses that grow to 2 s there are 7 at most");
});

for (
  const [what, said] of [
    ["nothing", ""],
    ["the same acknowledgement", "event: duplex-ack\ndata: 0 0\n\n"],
    ["a question", "event: duplex-ping\ndata: 0 \n\n"],
  ] as const
) {
  test(`polls that are answered at once, by ${what}, are no storm of requests`, async (t) => {
    const server = new ScriptedServer();
    const socket = new WebSocketSSE("http://scripted.test/", {
      transport: "poll",
      fetch: server.fetch,
      signal: t.signal,
    });
    const opened = once(socket, "open");
    const answer = async () => {
      const stream = (await server.next()).stream();
      stream.write(said);
      stream.end();
    };
    await answer();
    await opened;
    let polls = 0;
    const answering = (async () => {
      for (; polls < 1_000; polls++) await answer();
    })();
    await Promise.race([answering, sleep(1000, t.signal)]);
    assertGreater(polls, 2);
    assertLess(polls, 40);
  });
}

test("streams that end as soon as they have said something are no storm of requests", async (t) => {
  const { server, stream, socket } = await scripted(t);
  let streams = 0;
  const answer = (stream: ScriptedStream) => {
    stream.write("event: duplex-ack\ndata: 0 0\n\n");
    stream.end();
  };
  answer(stream);
  const answering = (async () => {
    for (;; streams++) answer((await server.next()).stream());
  })();
  await Promise.race([answering, sleep(1000, t.signal)]);
  assertGreater(streams, 2);
  assertLess(streams, 40, "without a pause it would be thousands");
  assertEquals(socket.readyState, WebSocketSSE.OPEN);
});

test("an opening that nothing answers asks once for a stream, once for a poll, and fails", async (t) => {
  const { setTimeout } = globalThis;
  t.defer(() => globalThis.setTimeout = setTimeout);
  // 3 and 30 s, at a hundredth.
  globalThis.setTimeout =
    ((task: () => void, ms = 0) =>
      setTimeout(task, ms === 3_000 || ms === 30_000 ? ms / 100 : ms)) as never;
  const server = new ScriptedServer();
  const socket = new WebSocketSSE("http://scripted.test/", {
    transport: "post",
    fetch: server.fetch,
    signal: t.signal,
  });
  const failed = deferred<WebSocketSSEErrorEvent>();
  socket.addEventListener("error", failed.resolve);
  const { message } = await failed.promise;
  assertEquals(message, "Not opened: a request was not answered in time");
  assertEquals(server.asked.map(({ method }) => method), ["GET", "POST"]);
});

for (const transport of ["duplex", "stream", "post"] as const) {
  test(`close() while CONNECTING leaves no peer behind (${transport})`, async (t) => {
    const closes = new Queue<unknown>();
    const asked = deferred();
    const { url, ws } = await listen(t, {
      resumeTimeout: 20_000,
      hooks: {
        upgrade: async () => {
          asked.resolve();
          await sleep(100);
        },
        close: (_, { code }) => closes.push(code),
      },
    });
    const socket = new WebSocketSSE(url, { transport });
    const closed = once<CloseEvent>(socket, "close");
    await asked.promise;
    socket.close();
    assertEquals((await closed).code, 1006);
    assertEquals(await closes.next(), 1001);
    assertEquals(ws.peers.size, 0);
  });
}

test("after the server's close nothing is sent but CLOSE, past what it would drop", async (t) => {
  const { server, socket, stream, events, closed } = await scripted(t, { window: 10 });
  for (const message of ["longer than the window", "waits", "waits, too"]) socket.send(message);
  const batch = await server.next();
  assertEquals(batch.body, seq(1) + text("longer than the window"));
  stream.write(`event: duplex-close\ndata: {"code":4001,"reason":"bye","sent":0}\n\n`);
  const answer = await server.next();
  assertEquals(answer.body, seq(4) + close(4001, "bye"));
  assert(batch.signal.aborted, "the batch would only be dropped");
  answer.respond(204, { "x-duplex-received": "4" });
  await closed;
  assertEquals(events, ["open", 'close 4001 "bye" clean']);
  assertEquals(server.asked, []);
});

test("the CLOSE that answers the server's outlives the socket", async (t) => {
  const { server, stream, events, closed } = await scripted(t, { resumeTimeout: 20_000 });
  stream.write(`event: duplex-close\ndata: {"code":1012,"reason":"","sent":0}\n\n`);
  const held = await server.next();
  assertEquals(held.body, seq(1) + close(1012));
  await closed; // in 3 s
  assertEquals(events, ["open", 'close 1012 "" clean']);
  assert(!held.signal.aborted);
  held.respond(502, UNMARKED);
  const again = await server.next();
  assertEquals(again.body, seq(1) + close(1012));
  again.respond(204, { "x-duplex-received": "1" });
  await sleep(300, t.signal);
  assertEquals(server.asked, []);
});

test("a close that the server has, and whose answer does not come, is asked for again", async (t) => {
  const { server, socket, events, closed } = await scripted(t);
  socket.close(3001, "mine");
  const asked = await server.next();
  assertEquals(asked.body, seq(1) + close(3001, "mine"));
  asked.respond(204, { "x-duplex-received": "1" });
  const again = await server.next(); // what is left of the session says it once more
  assertEquals([again.method, again.headers.get("x-duplex-attempt")], ["GET", "1"]);
  const stream = again.stream({ received: 1 });
  stream.write(`event: duplex-close\ndata: {"code":3001,"reason":"mine","sent":0}\n\n`);
  stream.end();
  await closed;
  assertEquals(events, ["open", 'close 3001 "mine" clean']);
});

test("a close that the server has stands, if nobody says anything after it", async (t) => {
  const { server, socket, events, closed } = await scripted(t);
  socket.close(3001, "mine");
  (await server.next()).respond(204, { "x-duplex-received": "1" });
  const at = performance.now();
  await Promise.race([
    closed,
    (async () => {
      for (;;) (await server.next()).fail();
    })(),
  ]);
  assertLessOrEqual(performance.now() - at, 10_500);
  assertEquals(events, ["open", 'close 3001 "mine" clean']);
}, { timeout: 15_000 });

for (
  const [what, data] of [
    ["a code beyond all", `{"code":99999,"reason":"","sent":0}`],
    ["1006, which nobody may say", `{"code":1006,"reason":"","sent":0}`],
    ["half a code", `{"code":1000.5,"reason":"","sent":0}`],
    ["a reason of a megabyte", `{"code":1000,"reason":"${"x".repeat(2 ** 20)}","sent":0}`],
    ["a reason of 124 bytes", `{"code":1000,"reason":"${"é".repeat(62)}","sent":0}`],
  ] as const
) {
  test(`a server that closes with ${what} does not reach the page`, async (t) => {
    const { server, stream, events, closed } = await scripted(t);
    stream.write(`event: duplex-close\ndata: ${data}\n\n`);
    const again = (await server.next()).stream();
    again.write(`event: duplex-close\ndata: ${data}\n\n`);
    await closed;
    assertEquals(events, ["open", "drop", "resume", "error", 'close 1006 "" unclean']);
  });
}

test("what goes on after the end ends with the signal of the options", async (t) => {
  const end = new AbortController();
  const { server, stream, closed } = await scripted(t, {}, { signal: end.signal });
  stream.write(`event: duplex-close\ndata: {"code":1012,"reason":"","sent":0}\n\n`);
  const held = await server.next();
  await closed;
  end.abort();
  assert(held.signal.aborted);
  await sleep(200, t.signal);
  assertEquals(server.asked, []);
});

// ---------------------------------------------------------------- a page that is left

test("four sockets with 30 kB each leave a page: no more than it may send, and every small one", async (t) => {
  const page = globalThis as { document?: unknown };
  page.document = {};
  t.defer(() => void delete page.document);
  const farewells: Uint8Array[] = [];
  for (const size of [30_000, 30_000, 30_000, 30_000, 0, 0]) {
    const server = new ScriptedServer();
    const socket = new WebSocketSSE("http://scripted.test/", {
      transport: "post",
      signal: t.signal,
      fetch: (url, init) => {
        if (!init!.keepalive) return server.fetch(url, init);
        farewells.push(init!.body as Uint8Array);
        return Promise.resolve(new Response(null, { status: 204 }));
      },
    });
    const stream = (await server.next()).stream();
    t.defer(() => stream.end());
    await once(socket, "open");
    if (size) socket.send("x".repeat(size));
  }
  await sleep(10, t.signal);
  globalThis.dispatchEvent(new Event("pagehide"));
  await until(() => farewells.length === 6);
  const all = farewells.map((body) => body.length);
  assertLessOrEqual(all.reduce((sum, length) => sum + length), 64 * 1024);
  const isClosed = farewells.map((body) => new TextDecoder().decode(body).includes("CLOSE"));
  assertEquals(isClosed, [true, true, false, false, true, true]);
});

// ---------------------------------------------------------------- every request

test("no request is answered from a cache, waits for another's answer, or tells the page's address", async (t) => {
  for (const transport of ["duplex", "stream", "post"] as const) {
    const inits: RequestInit[] = [];
    const { url } = await listen(t, { hooks: { message: (peer) => void peer.send("x") } });
    const { socket, messages, opened } = dial(t, url, {
      transport,
      fetch: (input, init) => {
        inits.push(init!);
        return fetch(input, init);
      },
    });
    await opened;
    socket.send("hello");
    await messages.next();
    assertGreaterOrEqual(inits.length, 1);
    for (const { cache, referrerPolicy } of inits) {
      assertEquals([cache, referrerPolicy], ["no-store", "no-referrer"]);
    }
  }
});

test("a network that is cut while credentials are fetched sends no request of nobody", async (t) => {
  const { url } = await listen(t, { heartbeatInterval: 200 });
  const network = t.use(await chaos(Number(new URL(url).port)));
  let asked = 0;
  const { events, opened } = dial(t, network.url, {
    transport: "post",
    headers: async () => {
      asked++;
      await sleep(20);
      return {};
    },
  });
  await opened;
  network.cutAll("rst");
  await until(() => events.includes("resume"));
  assertLessOrEqual(asked, 4);
});

// ---------------------------------------------------------------- phases

test("every step from one phase to another that the table does not have throws", async () => {
  await using stripped = await strip("client.ts");
  const code = await readFile(stripped.file, "utf8");
  const file = join(stripped.file, "..", "phases.mjs");
  await writeFile(file, `${code}\nexport { Session, STEPS };\n`);
  const { Session, STEPS } = await import(`file://${file}`) as {
    // deno-lint-ignore no-explicit-any
    Session: new () => any;
    STEPS: Record<string, string[]>;
  };
  const phases = Object.keys(STEPS);
  assertEquals(phases.length, 8);
  // A way to each phase, by the table alone.
  const ways: Record<string, string[]> = { opening: [] };
  for (const phase of phases) {
    for (const next of STEPS[phase]!) ways[next] ??= [...ways[phase]!, next];
  }
  let refused = 0;
  for (const from of phases) {
    for (const to of phases) {
      const session = new Session();
      for (const step of ways[from]!) session.enter(step);
      assertEquals(session.phase, from);
      if (STEPS[from]!.includes(to)) session.enter(to);
      else {
        assertThrows(() => session.enter(to), Error, to);
        refused++;
      }
      assertEquals(session.phase, STEPS[from]!.includes(to) ? to : from);
    }
  }
  assertGreater(refused, 40);
});
