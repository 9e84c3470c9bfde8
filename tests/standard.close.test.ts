/** `close`, the close event, and everything that fails. */
import type { WebSocketSSE } from "../client.ts";
import { type Peer, sseAdapter } from "../server.ts";
import { connect, contract, messages, open, ours, record, serveSSE } from "./contract.ts";
import {
  assert,
  assertEquals,
  assertThrows,
  deferred,
  once,
  runtime,
  sleep,
  test,
  until,
} from "./harness.ts";
import { ScriptedServer } from "./scripted.ts";

/** What a close event tells. */
const told = ({ code, reason, wasClean }: CloseEvent) => ({ code, reason, wasClean });

const failed = { code: 1006, reason: "", wasClean: false };

// ---------------------------------------------------------------- arguments

contract("close takes 1000 and 3000 to 4999, after clamping", async (t, target) => {
  for (
    const code of [999, 1001.5, 2999, 5000, 4999.5, 0, -1, 65536 + 1000, NaN, Infinity, null, "x"]
  ) {
    const socket = target.socket(t, "ws://127.0.0.1:1/");
    const error = assertThrows(() => socket.close(code as number), DOMException, "", `${code}`);
    assertEquals([error.name, socket.readyState], ["InvalidAccessError", 0], `${code}`);
  }
  for (const code of [1000, 999.6, 1000.5, 2999.5, 3000, 4999, 4999.4, "3000", undefined]) {
    const socket = target.socket(t, "ws://127.0.0.1:1/");
    socket.close(code as number);
    assertEquals(socket.readyState, 2, `${code}`);
    await once(socket, "close");
  }
}, { notNative: { bun: "Bun takes 1001" } });

test("close takes none of the codes from 1001 to 2999", (t) => {
  const socket = connect(t, "ws://127.0.0.1:1/");
  for (const code of [1001, 1002, 1003, 1004, 1005, 1006, 1007, 1008, 1009, 1011, 1015, 2000]) {
    assertEquals(assertThrows(() => socket.close(code), DOMException).name, "InvalidAccessError");
  }
});

contract("a reason may have 123 bytes of UTF-8; beyond is a SyntaxError", async (t, target) => {
  const socket = await open(t, target);
  for (const reason of ["x".repeat(124), "é".repeat(62), "\uD800".repeat(42)]) {
    let name = "none";
    try {
      socket.close(1000, reason);
    } catch (error) {
      name = (error as Error).name;
    }
    assertEquals([name, socket.readyState], ["SyntaxError", 1]);
  }
  socket.close(1000, "é".repeat(61) + "x");
  assertEquals(socket.readyState, 2);
  await once(socket, "close");
});

test("the SyntaxError of close is a DOMException", (t) => {
  const socket = connect(t, "ws://127.0.0.1:1/");
  assertThrows(() => socket.close(3000, "x".repeat(124)), DOMException);
  assertThrows(() => socket.close(undefined, "x".repeat(124)), DOMException);
});

// ---------------------------------------------------------------- the handshake

contract("close goes to CLOSING at once, then the event comes once, clean", async (t, target) => {
  const socket = await open(t, target);
  const events = record(socket);
  socket.close(3001, "done \u{1F44B}");
  assertEquals([socket.readyState, events], [2, []]);
  const event = await once<CloseEvent>(socket, "close");
  assert(event instanceof CloseEvent);
  assertEquals(told(event), { code: 3001, reason: "done \u{1F44B}", wasClean: true });
  assertEquals(socket.readyState, 3);
  socket.close();
  socket.close(4000, "again");
  assertEquals(socket.readyState, 3);
  await new Promise((resolve) => setTimeout(resolve));
  assertEquals(events, ["close"]);
});

contract("close is a second time without effect while CLOSING", async (t, target) => {
  const socket = await open(t, target);
  const events = record(socket);
  const closed = once<CloseEvent>(socket, "close");
  socket.close(3001);
  socket.close(3002);
  assertEquals((await closed).code, 3001);
  assertEquals(events, ["close"]);
});

contract("close without a code is 1005 on both sides", async (t, target) => {
  const details = deferred<unknown>();
  const url = await target.serve(t, { close: (_, { code }) => details.resolve(code) });
  const socket = target.socket(t, url);
  await once(socket, "open");
  socket.close();
  const event = await once<CloseEvent>(socket, "close");
  assertEquals(told(event), { code: 1005, reason: "", wasClean: true });
  if (!target.native) assertEquals(await details.promise, 1005);
});

contract("a reason without a code goes with 1000", async (t, target) => {
  const socket = await open(t, target);
  socket.close(undefined, "why");
  const event = await once<CloseEvent>(socket, "close");
  assertEquals(told(event), { code: 1000, reason: "why", wasClean: true });
}, { notNative: { deno: "Deno sends the reason as the code" } });

contract("lone surrogates in the reason become U+FFFD", async (t, target) => {
  const socket = await open(t, target);
  socket.close(3000, "a\uD800");
  assertEquals((await once<CloseEvent>(socket, "close")).reason, "a\uFFFD");
});

contract("the server's hook learns code and reason", async (t, target) => {
  const details = deferred<unknown>();
  const url = await target.serve(t, {
    close: (_, { code, reason }) => details.resolve({ code, reason }),
  });
  const socket = target.socket(t, url);
  await once(socket, "open");
  socket.close(4321, "why not");
  assertEquals(await details.promise, { code: 4321, reason: "why not" });
}, { notNative: { deno: "crossws's adapter for Deno tells neither" } });

contract("all that was sent before close arrives before it", async (t, target) => {
  const log: string[] = [];
  const closed = deferred();
  const url = await target.serve(t, {
    message: (_, message) => void log.push(message.text()),
    close: () => closed.resolve(),
  });
  const socket = target.socket(t, url);
  await once(socket, "open");
  const expected = Array.from({ length: 100 }, (_, i) => `${i}`);
  for (const text of expected) socket.send(text);
  socket.close();
  await closed.promise;
  assertEquals(log, expected);
});

contract("a server's close comes after its messages, with code and reason", async (t, target) => {
  const url = await target.serve(t, {
    open(peer) {
      peer.send("1");
      peer.send("2");
      peer.close(4001, "bye");
    },
  });
  const socket = target.socket(t, url);
  const events = record(socket);
  const event = await once<CloseEvent>(socket, "close");
  assertEquals(told(event), { code: 4001, reason: "bye", wasClean: true });
  assertEquals(events, ["open", "message", "message", "close"]);
});

contract(
  "messages that come while CLOSING are not dispatched by WebSocketSSE",
  async (t, target) => {
    const url = await target.serve(t, {
      message(peer) {
        peer.send("answer");
      },
    });
    const socket = target.socket(t, url);
    await once(socket, "open");
    const events = record(socket);
    socket.send("question");
    socket.close();
    await once(socket, "close");
    if (!target.native) assertEquals(events, ["close"]);
  },
);

for (const target of ours) {
  test(`${target.name}: of two closes that cross, the server's code stands`, async (t) => {
    let peer: Peer | undefined;
    const codes: unknown[] = [];
    const closing = deferred();
    const url = await serveSSE(t, {
      hooks: {
        open: (opened) => void (peer = opened),
        close(_, { code }) {
          codes.push(code);
          closing.resolve();
        },
      },
    });
    const socket = target.socket(t, url);
    const events = record(socket);
    await once(socket, "open");
    peer!.close(4001, "server");
    socket.close(4002, "client");
    const event = await once<CloseEvent>(socket, "close");
    assertEquals(told(event), { code: 4001, reason: "server", wasClean: true });
    assertEquals(events, ["open", "close"]);
    await closing.promise;
    assertEquals(codes.length, 1);
  });
}

// ---------------------------------------------------------------- while connecting

contract("close while CONNECTING gives error, then close 1006, later", async (t, target) => {
  const socket = target.socket(t, await target.serve(t));
  const events = record(socket);
  const states: number[] = [];
  socket.onerror = () => states.push(socket.readyState);
  const closed = once<CloseEvent>(socket, "close");
  socket.close(3000, "never mind");
  assertEquals([socket.readyState, events], [2, []]);
  assertEquals(told(await closed), failed);
  assertEquals([events, states], [["error", "close"], [3]]);
}, { notNative: { deno: "Deno says 0" } });

test("close while CONNECTING asks for nothing more, whatever the first transport comes to", async (t) => {
  const methods: string[] = [];
  const socket: WebSocketSSE = connect(t, "ws://127.0.0.1:1/", {
    transport: "duplex",
    fetch: async (_, init) => {
      methods.push(init!.method!);
      await sleep(0); // until there is a socket
      socket.close();
      return new Response("no", { status: 404 });
    },
  });
  assertEquals(told(await once<CloseEvent>(socket, "close")), failed);
  await sleep(0); // a fallback would be a matter of microtasks
  assertEquals(methods, ["POST"]);
});

test("close in the handler of what came with the server's close changes nothing", async (t) => {
  const server = new ScriptedServer();
  const socket = connect(t, "http://scripted.test/", { transport: "post", fetch: server.fetch });
  const stream = (await server.next()).stream();
  await once(socket, "open");
  socket.onmessage = () => socket.close(3000, "page");
  const closed = once<CloseEvent>(socket, "close");
  stream.write(
    `data: 1\n\nevent: duplex-close\ndata: {"code":4001,"reason":"server","sent":1}\n\n`,
  );
  const answer = await server.next();
  await once(socket, "message");
  answer.respond(204, { "x-duplex-received": "1" });
  assertEquals(told(await closed), { code: 4001, reason: "server", wasClean: true });
  assertEquals(server.asked, []);
});

test("close after the end sets no timer, which would keep the process alive", async (t) => {
  const server = new ScriptedServer();
  const end = new AbortController();
  const socket = connect(t, "http://scripted.test/", {
    transport: "post",
    fetch: server.fetch,
    signal: end.signal,
  });
  (await server.next()).stream();
  await once(socket, "open");
  const { setTimeout } = globalThis;
  const closed = once<CloseEvent>(socket, "close");
  let timers = 0;
  end.abort(); // the events are still to come
  globalThis.setTimeout = ((...args: Parameters<typeof setTimeout>) => {
    timers++;
    return setTimeout(...args);
  }) as typeof setTimeout;
  try {
    socket.close();
  } finally {
    globalThis.setTimeout = setTimeout;
  }
  assertEquals([timers, socket.readyState], [0, 2]);
  assertEquals(told(await closed), failed);
});

test("a signal that aborts fails the socket: error, then close 1006", async (t) => {
  const url = await serveSSE(t);
  const controller = new AbortController();
  const early = connect(t, url, { signal: controller.signal });
  await once(early, "open");
  const events = record(early);
  const closed = once<CloseEvent>(early, "close");
  controller.abort();
  assertEquals(events, []);
  assertEquals(told(await closed), failed);
  assertEquals(events, ["error", "close"]);

  const late = connect(t, url, { signal: controller.signal });
  const lateEvents = record(late);
  assertEquals(late.readyState, 0);
  assertEquals(told(await once<CloseEvent>(late, "close")), failed);
  assertEquals(lateEvents, ["error", "close"]);
});

// ---------------------------------------------------------------- failures

const stream = { headers: { "content-type": "text/event-stream" } };
const full = { headers: { ...stream.headers, "x-crossws-id": TOKEN(), "x-duplex-version": "1" } };

function TOKEN(): string {
  return `${"0".repeat(16)}.${"0".repeat(32)}`;
}

/** The beginning of a stream of ours, so far as it goes. */
const opening = (terms: object) =>
  `event: duplex-open\ndata: ${
    JSON.stringify({
      protocol: "",
      heartbeatInterval: 15_000,
      idleTimeout: 60_000,
      resumeTimeout: 0,
      window: 1,
      received: 0,
      handled: 0,
      next: 1,
      attempt: 0,
      ...terms,
    })
  }\n\n`;

/** Answers that no socket can live with. */
const refusals: [string, () => Response][] = [
  ["404", () => new Response("no", { status: 404 })],
  ["401", () => new Response("no", { status: 401 })],
  ["403", () => new Response("no", { status: 403 })],
  ["500", () => new Response("no", { status: 500 })],
  ["204", () => new Response(null, { status: 204 })],
  ["a page of HTML", () => new Response("<p>", { headers: { "content-type": "text/html" } })],
  ["no content type", () => new Response(new Uint8Array([1]))],
  [
    "a content type that only begins like ours",
    () => new Response("\n", { headers: { "content-type": "text/event-stream-x" } }),
  ],
  ["a 404 that looks like ours", () => new Response(opening({}), { ...full, status: 404 })],
  ["an event stream that is not ours", () => new Response("data: x\n\n", stream)],
  ["an event stream that says nothing", () => new Response(":\n\n", stream)],
  ["an end before duplex-open", () => new Response(":\n\n", full)],
  ["an end within duplex-open", () => new Response(opening({}).slice(0, -2), full)],
  ["a message before duplex-open", () => new Response("data: x\n\n" + opening({}), full)],
  ["garbage in duplex-open", () => new Response("event: duplex-open\ndata: {\n\n", full)],
  ["numbers that do not fit", () => new Response(opening({ next: 2 }), full)],
  ["no subprotocol in duplex-open", () => new Response(opening({ protocol: null }), full)],
  ["a heartbeat of no time", () => new Response(opening({ heartbeatInterval: 0 }), full)],
  [
    "a heartbeat that no timer waits for",
    () => new Response(opening({ heartbeatInterval: 1e12 }), full),
  ],
  ["a patience that no timer has", () => new Response(opening({ resumeTimeout: 1e12 }), full)],
  ["a subprotocol that was not offered", () => new Response(opening({ protocol: "b" }), full)],
];

for (const [what, answer] of refusals) {
  for (const target of ours) {
    test(`${target.name}: ${what} gives error, then close 1006, asynchronously`, async (t) => {
      let closes = 0;
      const taken = { headers: { ...full.headers, "x-duplex-received": "1" } };
      const { url } = await t.serve((request) => {
        // The CLOSE of a session that the client does not want: it would go again for a while.
        if (!request.headers.has("x-crossws-id")) return answer();
        closes++;
        return new Response(null, { status: 204, ...taken });
      });
      const socket = target.socket(t, url, what.includes("subprotocol") ? ["a"] : undefined);
      const events = record(socket);
      const states: number[] = [];
      socket.onerror = () => states.push(socket.readyState);
      assertEquals([socket.readyState, events], [0, []]);
      assertEquals(told(await once<CloseEvent>(socket, "close")), failed);
      assertEquals([events, states], [["error", "close"], [3]]);
      if (!what.includes("subprotocol that")) return;
      await until(() => closes > 0);
      await sleep(100, t.signal); // its answer
      assertEquals(closes, 1);
    });
  }
}

contract("a status that is no success fails in the same way", async (t, target) => {
  const url = await target.serve(t, {
    upgrade: () => new Response("no", { status: 403 }),
  });
  const socket = target.socket(t, url);
  const events = record(socket);
  assertEquals((await once<CloseEvent>(socket, "close")).wasClean, false);
  assertEquals(events, ["error", "close"]);
});

contract(
  "a refused connection gives error, then close, never in the same task",
  async (t, target) => {
    const server = await t.serve(() => new Response());
    await server.close();
    const socket = target.socket(t, server.url);
    const events = record(socket);
    for (let i = 0; i < 100; i++) await null;
    assertEquals([socket.readyState, events], [0, []]);
    const event = await once<CloseEvent>(socket, "close");
    assertEquals([event.wasClean, event.reason], [false, ""]);
    if (!target.native) assertEquals([event.code, `${event}`], [1006, "[object CloseEvent]"]);
    assertEquals(events, ["error", "close"]);
  },
);

for (const status of [301, 302, 303, 307, 308]) {
  for (const target of ours) {
    test(`${target.name}: a redirect by ${status} is not followed`, async (t) => {
      const adapter = sseAdapter({ bidir: true });
      t.defer(() => adapter.close());
      const { url } = await t.serve((request) =>
        new URL(request.url).pathname === "/elsewhere"
          ? adapter.fetch(request)
          : new Response(null, { status, headers: { location: "/elsewhere" } })
      );
      const socket = target.socket(t, url);
      const events = record(socket);
      assertEquals(told(await once<CloseEvent>(socket, "close")), failed);
      assertEquals([events, adapter.peers.size], [["error", "close"], 0]);
    });
  }
}

for (const target of ours) {
  test(`${target.name}: a peer that is terminated gives error, then close 1006`, async (t) => {
    const url = await serveSSE(t, {
      hooks: { message: (peer) => peer.terminate() },
    });
    const socket = target.socket(t, url);
    await once(socket, "open");
    const events = record(socket);
    socket.send("x");
    assertEquals(told(await once<CloseEvent>(socket, "close")), failed);
    assertEquals(events, ["error", "close"]);
  });
}

for (const transport of ["post", "stream", "duplex"] as const) {
  test(`after a message that is too large the next sockets of the process open, and hear (${transport})`, async (t) => {
    const url = await serveSSE(t, {
      maxMessageSize: 1_000,
      hooks: { message: (peer, message) => void peer.send(message.text()) },
    });
    // Its answer comes before the body is through: what is left may be no part of the next request.
    // Of 4 MB, more is left than is read and dropped; Deno's sanitizer takes that for a leak until
    // it is collected.
    for (const size of [2_000, runtime === "deno" ? 900_000 : 4_000_000]) {
      const socket = connect(t, url, { transport });
      await once(socket, "open");
      socket.send("x".repeat(size));
      assertEquals((await once<CloseEvent>(socket, "close")).code, 1009, `${size}`);
      for (let n = 0; n < 2; n++) {
        const next = connect(t, url, { transport });
        const heard = messages(next, 1);
        await once(next, "open");
        next.send(`after ${size}`);
        assertEquals(await heard, [`after ${size}`]);
        next.close();
        assert((await once<CloseEvent>(next, "close")).wasClean);
      }
    }
  });
}

// ---------------------------------------------------------------- plain servers

test("without sending, any event stream is one: each event a message, its end 1006", async (t) => {
  const { url } = await t.serve(() =>
    new Response("event: other\ndata: no\n\ndata: 1\n\nevent: message\ndata: 2\n\n", stream)
  );
  const socket = connect(t, url, { bidir: false });
  const received = messages(socket, 2);
  const events = record(socket);
  assertEquals(told(await once<CloseEvent>(socket, "close")), failed);
  assertEquals(await received, ["1", "2"]);
  assertEquals(events, ["open", "message", "message", "error", "close"]);
});

test("a plain stream whose header cannot be read opens with its crossws-id event", async (t) => {
  const posted = deferred<[string | null, string]>();
  const { url } = await t.serve(async (request) => {
    if (request.method === "GET") {
      const first = new TextEncoder().encode("event: crossws-id\ndata: secret\n\n");
      return new Response(
        new ReadableStream({
          start: (controller) => controller.enqueue(first),
        }),
        stream,
      );
    }
    posted.resolve([request.headers.get("x-crossws-id"), await request.text()]);
    return new Response(null, { status: 204 });
  });
  const socket: WebSocketSSE = connect(t, url, { transport: "post" });
  await once(socket, "open");
  socket.send("hello");
  assertEquals(await posted.promise, ["secret", "hello"]);
});

test("on crossws's wire our own events are as any that nobody knows", async (t) => {
  const posted: string[] = [];
  const { url } = await t.serve(async (request) => {
    if (request.method === "GET") {
      const events = ["duplex-open", "duplex-ping", "duplex-ack", "duplex-binary", "duplex-close"]
        .map((name) => `event: ${name}\ndata: 0 0\n\n`).join("");
      const all = new TextEncoder().encode(
        `event: crossws-id\ndata: secret\n\n${events}data: still here\n\n`,
      );
      return new Response(
        new ReadableStream({ start: (controller) => controller.enqueue(all) }),
        stream,
      );
    }
    posted.push(await request.text());
    return new Response(null, { status: 204 });
  });
  const socket: WebSocketSSE = connect(t, url, { transport: "post" });
  await once(socket, "open");
  assertEquals(await messages(socket, 1), ["still here"]);
  socket.send("one");
  socket.send("two");
  await until(() => posted.length === 2 && socket.bufferedAmount === 0);
  assertEquals([posted, socket.readyState], [["one", "two"], 1]);
});
