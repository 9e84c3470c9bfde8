/**
 * Others' code at either end: crossws's client and its adapter, EventSource as
 * Deno has it and as npm has it, and curl.
 */
import { spawn as start } from "node:child_process";
import crosswsAdapter from "crossws/adapters/sse";
import { WebSocketSSE as CrosswsClient } from "crossws/websocket/sse";
import { EventSource as NpmEventSource } from "eventsource";
import type { Message, Peer, SSEOptions } from "../mod.ts";
import { chaos } from "./chaos.ts";
import {
  assert,
  assertEquals,
  assertMatch,
  assertNotEquals,
  command,
  deferred,
  needs,
  runtime,
  test,
  type TestContext,
  until,
  within,
} from "./harness.ts";
import { connect, listen, Queue } from "./pair.ts";
import { EventReader } from "./wire.ts";

// What crossws's client takes for granted; Bun has none.
(globalThis as { EventSource?: unknown }).EventSource ??= NpmEventSource;

const echo = {
  hooks: {
    open: (peer: Peer) => void peer.send(`Welcome ${peer}`),
    message: (peer: Peer, message: Message) => void peer.send(`echo ${message}`),
  },
} satisfies SSEOptions;

// ---------------------------------------------------------------- crossws's client, our server

for (const stream of [true, false]) {
  test(`crossws's client is welcomed, sends and hears its echoes: stream ${stream}`, async (t) => {
    const closes = new Queue<unknown>();
    const { url } = await listen(t, {
      resumeTimeout: 0,
      hooks: { ...echo.hooks, close: (_, details) => closes.push(details) },
    });
    const messages = new Queue<string>();
    const opened = deferred();
    const client = new CrosswsClient(url, { stream, bidir: true });
    t.defer(() => client.close());
    client.addEventListener("open", () => opened.resolve());
    client.addEventListener("message", (event) => messages.push((event as MessageEvent).data));
    await within(opened.promise, 5_000, "open");
    assertMatch(await messages.next(), /^Welcome [0-9a-f-]{36}$/);
    for (const text of ["one", "two with ümläuts 🎈", "{}"]) {
      await client.send(text);
      assertEquals(await messages.next(), `echo ${text}`);
    }
    client.close();
    assertEquals(await closes.next(), { code: 1006, reason: "" }); // it says no goodbye
  });
}

test("crossws's client queues what is sent before it knows its id", async (t) => {
  const { url } = await listen(t, echo);
  const messages = new Queue<string>();
  const client = new CrosswsClient(url, { stream: false });
  t.defer(() => client.close());
  client.addEventListener("open", () => void client.send("early"));
  client.addEventListener("message", (event) => messages.push((event as MessageEvent).data));
  await messages.next();
  assertEquals(await messages.next(), "echo early");
});

test("crossws's client shares topics with ours, and binary reaches it as a data URL", async (t) => {
  const { url, ws } = await listen(t, {
    hooks: {
      open(peer) {
        peer.subscribe("chat");
        peer.send("hello");
      },
      message: (peer, message) => peer.publish("chat", message.data),
    },
  });
  const theirs = new Queue<string>();
  const client = new CrosswsClient(url, { stream: false });
  t.defer(() => client.close());
  client.addEventListener("message", (event) => theirs.push((event as MessageEvent).data));
  const ours = connect(t, url);
  await theirs.next();
  await ours.messages.next();
  ours.socket.send("from ours");
  assertEquals(await theirs.next(), "from ours");
  await client.send("from theirs");
  assertEquals(await ours.messages.next(), "from theirs");
  ws.publish("chat", new Uint8Array([1, 2, 3]));
  assertEquals(await theirs.next(), "data:application/octet-stream;base64,AQID");
  ws.publish("chat", "a\nb");
  assertEquals(await theirs.next(), "a\nb");
});

test(
  "crossws's client hears a close of the server, and its EventSource does not come back",
  async (t) => {
    const peers = new Queue<Peer>();
    let opens = 0;
    const { url } = await listen(t, {
      hooks: {
        open(peer) {
          opens++;
          peers.push(peer);
        },
      },
    });
    const closed = deferred();
    const stopped = deferred();
    const client = new CrosswsClient(url, { stream: false });
    t.defer(() => client.close());
    client.addEventListener("close", () => closed.resolve());
    let errors = 0; // one for the stream's end, one for the 204
    client.addEventListener("error", () => ++errors === 2 && stopped.resolve());
    (await peers.next()).close(4000, "bye");
    await within(closed.promise, 5_000, "close");
    await within(stopped.promise, 15_000, "the second error");
    assertEquals(opens, 1);
  },
  { timeout: 25_000 },
);

// ---------------------------------------------------------------- our client, crossws's adapter

/** Serves crossws's adapter, and counts what its hooks are told. */
async function listenCrossws(t: TestContext, bidir: boolean) {
  const calls: string[] = [];
  const heard: string[] = [];
  const adapter = crosswsAdapter({
    bidir,
    hooks: {
      open(peer) {
        calls.push("open");
        peer.send("Welcome");
      },
      message(peer, message) {
        heard.push(message.text());
        peer.send(`echo ${message.text()}`);
      },
      close: () => void calls.push("close"),
    },
  });
  const { url } = await t.serve((request) => adapter.fetch(request));
  return { url, adapter, calls, heard };
}

for (const transport of ["auto", "duplex", "stream", "post"] as const) {
  test(`our client talks with crossws's adapter in plain mode: ${transport}`, async (t) => {
    const { url, calls } = await listenCrossws(t, true);
    const { socket, messages, opened, closed, events } = connect(t, url, { transport });
    await opened;
    assertEquals(await messages.next(), "Welcome");
    for (const text of ["one", "two ü 🎈", "three"]) socket.send(text);
    assertEquals(await messages.take(3), ["echo one", "echo two ü 🎈", "echo three"]);
    await until(() => socket.bufferedAmount === 0); // once the POST is answered
    assertEquals(socket.transport, "post");
    assertEquals(calls, ["open"]);
    socket.close();
    assertEquals((await closed).code, 1006);
    assertEquals(events, ["open", "close"]);
  });
}

test("empty messages go by requests of their own on the plain level, too", async (t) => {
  const bodies = new Queue<string>();
  const { url } = await t.serve(async (request) => {
    if (request.method === "POST") {
      bodies.push(await request.text());
      return new Response(null, { status: 204 });
    }
    const stream = new ReadableStream({
      start: (controller) => controller.enqueue(new TextEncoder().encode(":\n\n")),
    });
    const headers = { "content-type": "text/event-stream", "x-crossws-id": "plain" };
    return new Response(stream, { headers });
  });
  const { socket, opened } = connect(t, url, { transport: "post" });
  await opened;
  const sent = ["", "one", "", "", "two"];
  for (const text of sent) socket.send(text);
  assertEquals(await bodies.take(5), sent);
  await until(() => socket.bufferedAmount === 0);
  assertEquals(bodies.left, 0);
});

test("what was sent before close goes out before it, on the plain level, too", async (t) => {
  const { url, heard } = await listenCrossws(t, true);
  const { socket, opened, closed, events } = connect(t, url, { transport: "post" });
  await opened;
  for (const text of ["one", "two", "three"]) socket.send(text);
  socket.close();
  assertEquals(socket.readyState, 2);
  assertEquals((await closed).code, 1006);
  assertEquals(heard, ["one", "two", "three"]);
  assertEquals(events, ["open", "close"]);
});

test("our client is closed while crossws's adapter answers: the answer does no harm", async (t) => {
  const { url } = await listenCrossws(t, true);
  const { socket, opened, closed, events } = connect(t, url, {
    transport: "post",
    fetch: async (input, init) => {
      const response = await fetch(input, init);
      if (init?.method === "POST") socket.close();
      return response;
    },
  });
  await opened;
  socket.send("last");
  assertEquals((await closed).code, 1006);
  assertEquals(events, ["open", "close"]);
});

test("our client receives from crossws's adapter without bidir", async (t) => {
  const { url, calls } = await listenCrossws(t, false);
  const { socket, messages, closed } = connect(t, url, { bidir: false });
  assertEquals(await messages.next(), "Welcome");
  assertEquals(calls, ["open"]);
  socket.close();
  assertEquals((await closed).code, 1006);
});

// ---------------------------------------------------------------- EventSource

type EventSourceClass = new (url: string) => EventTarget & { readyState: number; close(): void };
const eventSources: Record<string, EventSourceClass> = {
  "npm's EventSource": NpmEventSource as unknown as EventSourceClass,
  ...runtime === "deno" && { "Deno's EventSource": EventSource as EventSourceClass },
};

interface Listening {
  source: InstanceType<EventSourceClass>;
  token: Promise<string>;
  messages: Queue<string>;
  opens: Queue<void>;
  errors: Queue<number>;
}

function listenTo(t: TestContext, Source: EventSourceClass, url: string): Listening {
  const source = new Source(url);
  t.defer(() => source.close());
  const messages = new Queue<string>();
  const opens = new Queue<void>();
  const errors = new Queue<number>();
  const token = deferred<string>();
  source.addEventListener("crossws-id", (event) => token.resolve((event as MessageEvent).data));
  source.addEventListener("message", (event) => messages.push((event as MessageEvent).data));
  source.addEventListener("open", () => opens.push());
  source.addEventListener("error", () => errors.push(source.readyState));
  return { source, messages, opens, errors, token: token.promise };
}

async function post(url: string, token: string, body: string): Promise<number> {
  const response = await fetch(url, { method: "POST", headers: { "x-crossws-id": token }, body });
  await response.body?.cancel();
  return response.status;
}

for (const [name, Source] of Object.entries(eventSources)) {
  test(`${name} receives, and a plain POST sends for it`, async (t) => {
    const { url } = await listen(t, echo);
    const { messages, token } = listenTo(t, Source, url);
    assertMatch(await messages.next(), /^Welcome /);
    assertEquals(await post(url, await token, "hello"), 204);
    assertEquals(await messages.next(), "echo hello");
  });

  test(`${name} receives from a server that only sends, and is told no token`, async (t) => {
    const { url } = await listen(t, { bidir: false, hooks: echo.hooks });
    let told = false;
    const { messages, source, token } = listenTo(t, Source, url);
    token.then(() => told = true);
    assertMatch(await messages.next(), /^Welcome /);
    assertEquals([told, source.readyState], [false, 1]);
  });

  test(
    `${name} resumes by its event id alone when its connection was cut: nothing lost, nothing twice`,
    async (t) => {
      const peers = new Queue<Peer>();
      const closes: unknown[] = [];
      const { port } = await listen(t, {
        hooks: { open: (peer) => peers.push(peer), close: (...args) => void closes.push(args) },
      });
      const proxy = t.use(await chaos(port));
      const { messages, opens } = listenTo(t, Source, proxy.url);
      await opens.next();
      const peer = await peers.next();
      const expected: string[] = [];
      const send = (count: number) => {
        for (let i = 0; i < count; i++) {
          expected.push(`message ${expected.length + 1}`);
          peer.send(expected.at(-1));
        }
      };
      send(3);
      await messages.take(3);
      send(2); // perhaps under way when the cut comes
      proxy.cutAll("rst");
      send(3); // to a connection that is gone, whether the server knows it or not
      await opens.next({ timeout: 15_000 });
      send(2);
      await messages.take(7);
      assertEquals(messages.all, expected);
      assertEquals(peers.left, 0); // no other session
      assertEquals(closes, []);
    },
    { timeout: 25_000 },
  );

  test(`${name} resumes when it was cut before any message, too`, async (t) => {
    const peers = new Queue<Peer>();
    const { port } = await listen(t, { hooks: { open: (peer) => peers.push(peer) } });
    const proxy = t.use(await chaos(port));
    const { messages, opens, token } = listenTo(t, Source, proxy.url);
    await opens.next();
    await token;
    const peer = await peers.next();
    proxy.cutAll("rst");
    peer.send("first");
    await opens.next({ timeout: 15_000 });
    assertEquals(await messages.next(), "first");
    assertEquals(peers.left, 0);
  }, { timeout: 25_000 });

  test(`${name} stops when its session was closed while it was away`, async (t) => {
    const peers = new Queue<Peer>();
    const statuses: number[] = [];
    const { port } = await listen(
      t,
      { hooks: { open: (peer) => peers.push(peer) } },
      async (request, next) => {
        const response = await next(request);
        statuses.push(response.status);
        return response;
      },
    );
    const proxy = t.use(await chaos(port));
    const { source, errors, token } = listenTo(t, Source, proxy.url);
    await token;
    const peer = await peers.next();
    proxy.cutAll("rst");
    peer.close(1000);
    assertEquals(await errors.next(), 0); // CONNECTING: it tries again
    assertEquals(await errors.next({ timeout: 15_000 }), 2); // CLOSED, for good
    assertEquals(source.readyState, 2);
    assertEquals(statuses, [200, 204]);
    assertEquals(peers.left, 0);
  }, { timeout: 25_000 });
}

test("an event id that is unknown, expired or of another path opens a new session", async (t) => {
  const peers = new Queue<Peer>();
  const closes = new Queue<unknown>();
  const { url } = await listen(t, {
    resumeTimeout: 50,
    hooks: { open: (peer) => peers.push(peer), close: (_, details) => closes.push(details) },
  });
  const open = async (id: string | undefined, path = "/") => {
    const response = await fetch(url + path, {
      headers: { accept: "text/event-stream", ...id && { "last-event-id": id } },
    });
    assertEquals(response.status, 200);
    const events = new EventReader(response.body!);
    t.defer(() => events.cancel());
    await events.find("crossws-id");
    return events;
  };
  for (const id of ["x", "1", `${"0".repeat(32)}.0`]) {
    await open(id);
    await peers.next();
  }
  const { id: first } = await open(undefined);
  const peer = await peers.next();
  await open(first, "/other");
  assertNotEquals((await peers.next()).id, peer.id);
  const events = await open(first); // the same session: no peer is opened
  assertEquals(peers.left, 0);
  await events.cancel();
  assertEquals(await closes.next(), { code: 1006, reason: "" }); // expired
  await open(first);
  assertNotEquals((await peers.next()).id, peer.id);
});

test("an event id can resume but not send", async (t) => {
  t.expect(/for a session of another instance/);
  const messages: string[] = [];
  const { url } = await listen(t, { hooks: { message: (_, m) => void messages.push(m.text()) } });
  const response = await fetch(url, { headers: { accept: "text/event-stream" } });
  const events = new EventReader(response.body!);
  t.defer(() => events.cancel());
  await events.find("crossws-id");
  const { id } = events;
  const key = id.split(".")[0]!;
  for (const token of [key, id, `${"0".repeat(16)}.${key}`]) {
    const status = await post(url, token, "x");
    assert(status === 400 || status === 404);
  }
  assertEquals(messages, []);
});

// ---------------------------------------------------------------- curl

/** A curl of which the lines are read as they come. */
function curl(t: TestContext, ...args: string[]) {
  const child = start(command("curl")!, ["-sSN", "--max-time", "20", ...args], {
    stdio: ["ignore", "pipe", "pipe"],
  });
  const lines = new Queue<string>();
  let partial = "";
  child.stdout.setEncoding("utf8");
  child.stdout.on("data", (text: string) => {
    const whole = (partial + text).split("\n");
    partial = whole.pop()!;
    for (const line of whole) lines.push(line);
  });
  const exited = new Promise<number | null>((resolve) => child.on("close", resolve));
  t.defer(async () => {
    child.kill("SIGKILL");
    await exited;
  });
  return {
    lines,
    exited,
    /** Skips to the line that begins so, and returns its rest. */
    async find(start: string) {
      for (;;) {
        const line = await lines.next();
        if (line.startsWith(start)) return line.slice(start.length);
      }
    },
  };
}

const noCurl = needs("curl");

test("curl receives and sends on the plain level", async (t) => {
  const { url } = await listen(t, echo);
  const down = curl(t, "-H", "accept: text/event-stream", url);
  await down.find("event: crossws-id");
  const token = await down.find("data: ");
  assertMatch(await down.find("data: "), /^Welcome /);
  const up = curl(t, "-i", "-H", `x-crossws-id: ${token}`, "-d", "hello from curl", url);
  assertMatch(await up.lines.next(), /^HTTP\/1.1 204/);
  assertEquals(await up.exited, 0);
  assertEquals(await down.find("data: "), "echo hello from curl");
}, { skip: noCurl });

test("curl speaks the full level by hand: frames up, events down, and a clean close", async (t) => {
  const closes = new Queue<unknown>();
  const { url } = await listen(t, {
    hooks: {
      message: (peer, message) => void peer.send(message.data),
      close: (_, details) => closes.push(details),
    },
  });
  const full = ["-H", "x-duplex-version: 1"];
  const down = curl(t, "-i", ...full, "-H", "accept: text/event-stream", url);
  const head = new Map<string, string>();
  for (let line; (line = (await down.lines.next()).trim());) {
    const [name, value] = line.split(": ");
    head.set(name!.toLowerCase(), value ?? "");
  }
  assertEquals(head.get("x-duplex-version"), "1");
  const token = head.get("x-crossws-id");
  await down.find("event: duplex-open");
  assertEquals(JSON.parse(await down.find("data: ")).next, 1);
  const send = async (seq: number, frames: string) => {
    const up = curl(
      t,
      ...["-i", ...full, "-H", "content-type: application/websocket-events"],
      ...["-H", `x-crossws-id: ${token}`, "--data-binary", `SEQ 1\r\n${seq}\r\n${frames}`],
      url,
    );
    assertMatch(await up.lines.next(), /^HTTP\/1.1 204/);
    return (await up.find("x-duplex-received: ")).trim();
  };
  assertEquals(await send(1, "TEXT 5\r\nhello\r\n"), "1");
  assertEquals(await down.find("data: hello"), "");
  // Overlap is skipped: the first has been seen.
  assertEquals(await send(1, "TEXT 5\r\nhello\r\nBINARY 3\r\nabc\r\nACK 1\r\n1\r\n"), "2");
  await down.find("event: duplex-binary");
  assertEquals(await down.find("data: "), "YWJj");
  // A code whose two bytes an argument can carry: 0x0c01.
  assertEquals(await send(3, "CLOSE 5\r\n\x0c\x01bye\r\n"), "3");
  assertEquals(await closes.next(), { code: 3073, reason: "bye" });
  await down.find("event: duplex-close");
  assertEquals(JSON.parse(await down.find("data: ")), { code: 3073, reason: "bye", sent: 2 });
  assertEquals(await down.exited, 0);
}, { skip: noCurl });
