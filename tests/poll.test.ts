/**
 * The last resort: behind what holds event streams the client polls. Same session, same numbers,
 * exactly once, and the page is told of nothing.
 */
import type { WebSocketSSEOptions } from "../client.ts";
import { cluster } from "../cluster.ts";
import type { Message, Peer, SSEOptions } from "../server.ts";
import { MemoryBus, roundRobin } from "./bus.ts";
import {
  assert,
  assertEquals,
  assertLess,
  needs,
  sleep,
  test,
  type TestContext,
  until,
} from "./harness.ts";
import { type Holder, holder, type Holding } from "./holder.ts";
import { connect, type Connected, listen, Queue } from "./pair.ts";
import { proxy, type ProxyName } from "./proxies.ts";

const timeout = 60_000;

const modes: Record<string, Holding> = {
  "all of a stream until its end": { bytes: Infinity },
  "4 KiB at a time": { bytes: 4096 },
  "streams of GETs, and lets those of POSTs pass": { bytes: Infinity, method: "GET" },
  "a stream, and lets its head pass": { bytes: Infinity, head: false },
  "a stream, and does not notice that its client has gone": { bytes: Infinity, deaf: true },
};

interface Site {
  readonly front: Holder;
  readonly server: number;
  /** The hooks that were called, but `message`. */
  readonly calls: string[];
  readonly peers: Queue<Peer>;
  readonly received: Queue<string>;
}

async function site(
  t: TestContext,
  holding: Holding | undefined,
  { message, ...options }: SSEOptions & {
    message?: (peer: Peer, message: Message) => void;
  } = {},
): Promise<Site> {
  const calls: string[] = [];
  const peers = new Queue<Peer>();
  const received = new Queue<string>();
  const { port } = await listen(t, {
    ...options,
    hooks: {
      open(peer) {
        calls.push("open");
        peers.push(peer);
      },
      message(peer, each) {
        received.push(each.text());
        message?.(peer, each);
      },
      close: (_, { code }) => void calls.push(`close ${code}`),
    },
  });
  return { front: t.use(await holder(port, holding)), server: port, calls, peers, received };
}

async function open(
  t: TestContext,
  url: string,
  options: WebSocketSSEOptions = {},
): Promise<Connected> {
  const connected = connect(t, url, options);
  await connected.opened;
  return connected;
}

const polls = ({ front }: Site) =>
  front.requests.filter(({ headers }) => headers["x-duplex-poll"] !== undefined);

/** Both ways at once, some of it together and some by itself: each arrives once, in order. */
async function talk({ received, peers }: Site, { socket, messages }: Connected): Promise<void> {
  const peer = peers.all.at(-1)!;
  const [up, down] = [received.all.length, messages.all.length];
  const sent = Array.from({ length: 100 }, (_, n) => `${n}`);
  for (const [n, text] of sent.entries()) {
    socket.send(text);
    peer.send(text);
    if (n % 10 === 9) await until(() => received.all.length > up + n - 5, { timeout: 20_000 });
  }
  await until(() => received.all.length >= up + 100, { timeout: 20_000 });
  await until(() => messages.all.length >= down + 100, { timeout: 20_000 });
  assertEquals(received.all.slice(up), sent);
  assertEquals(messages.all.slice(down), sent);
}

for (const [what, holding] of Object.entries(modes)) {
  for (const transport of ["auto", "post"] as const) {
    test(`Behind something that holds ${what}, "${transport}" opens`, async (t) => {
      const place = await site(t, holding);
      const began = performance.now();
      const connected = await open(t, place.front.url, { transport });
      assertLess(performance.now() - began, 8_000); // 5 s where the machine is not busy
      await talk(place, connected);
      const { socket, events, closed } = connected;
      const passes = transport === "auto" && holding.method === "GET";
      assertEquals([socket.transport, events], [passes ? "duplex" : "poll", ["open"]]);
      // Nobody is left of an opening whose answer was held.
      assertEquals(place.calls, ["open"]);
      socket.close(1000, "bye");
      const { code, reason, wasClean } = await closed;
      assertEquals([code, reason, wasClean], [1000, "bye", true]);
      assertEquals(place.calls, ["open", "close 1000"]);
    }, { timeout });
  }
}

test("What was found of an origin is the first thing that the next socket tries", async (t) => {
  const place = await site(t, { bytes: Infinity });
  await open(t, place.front.url, { stream: false });
  const before = place.front.requests.length;
  const connected = await open(t, place.front.url);
  await talk(place, connected);
  assertEquals(connected.socket.transport, "poll");
  assertEquals(place.front.requests[before]!.headers["x-duplex-poll"], "1");
  assert(place.front.requests.slice(before).every(({ method }) => method === "POST"));
}, { timeout });

test("A stream that something begins to hold is resumed by polls", async (t) => {
  const place = await site(t, undefined);
  const connected = await open(t, place.front.url, { transport: "post" });
  await talk(place, connected);
  place.front.holding = { bytes: Infinity };
  place.front.cutAll();
  await talk(place, connected);
  const { socket, events } = connected;
  assertEquals([socket.transport, place.calls], ["poll", ["open"]]);
  assertEquals(events, ["open", "drop", "resume"]);
}, { timeout });

test("Polls that are cut lose nothing and repeat nothing", async (t) => {
  const place = await site(t, { bytes: Infinity });
  const connected = await open(t, place.front.url, { transport: "poll" });
  const cutting = setInterval(() => place.front.cutAll(), 40);
  t.defer(() => clearInterval(cutting));
  for (let n = 0; n < 5; n++) await talk(place, connected);
  clearInterval(cutting);
  const { socket, events } = connected;
  assertEquals([socket.transport, place.calls], ["poll", ["open"]]);
  assert(!events.includes("error"), `${events}`);
  assert(place.front.requests.every(({ method }) => method === "POST"), "a stream was tried");
}, { timeout });

test('"poll" asks for polls, where nothing is held, too', async (t) => {
  const { now } = performance;
  t.defer(() => performance.now = now);
  let passed = 0;
  performance.now = () => now.call(performance) + passed;
  const place = await site(t, undefined, { resumeTimeout: 2_000_000, idleTimeout: 0 });
  const connected = await open(t, place.front.url, { transport: "poll" });
  await talk(place, connected);
  passed += 1_000_000;
  await talk(place, connected);
  const { socket, events } = connected;
  assertEquals([socket.transport, events], ["poll", ["open"]]);
  assert(place.front.requests.every(({ method }) => method === "POST"));
}, { timeout });

test("After polls a stream is tried again, and found to work, nobody is told", async (t) => {
  const { now } = performance;
  t.defer(() => performance.now = now);
  let passed = 0;
  performance.now = () => now.call(performance) + passed;
  // The server's clock is the same.
  const place = await site(t, { bytes: Infinity }, {
    heartbeatInterval: 200,
    resumeTimeout: 300_000,
    idleTimeout: 0,
  });
  const connected = await open(t, place.front.url, { stream: false });
  const { socket, events } = connected;
  const streams = () => place.front.requests.filter(({ method }) => method === "GET").length;
  assertEquals([socket.transport, streams()], ["poll", 1]);
  passed += 30_000; // it is held still
  await until(() => streams() === 2);
  await talk(place, connected);
  assertEquals([socket.transport, events], ["poll", ["open"]]);
  place.front.holding = undefined;
  passed += 60_000;
  await until(() => streams() === 3);
  await until(() => socket.transport === "post");
  await talk(place, connected);
  assertEquals([events, place.calls], [["open"], ["open"]]);
  // The next socket does not begin with polls.
  assertEquals((await open(t, place.front.url, { stream: false })).socket.transport, "post");
}, { timeout });

test(
  "Polls take turns with heartbeats, and with pings of a server that hears nothing",
  async (t) => {
    const place = await site(t, { bytes: Infinity }, { heartbeatInterval: 200, idleTimeout: 0.5 });
    const connected = await open(t, place.front.url, { transport: "poll" });
    const before = polls(place).length;
    await until(() => polls(place).length > before + 10, { timeout: 20_000 });
    await talk(place, connected);
    assertEquals([connected.events, place.calls], [["open"], ["open"]]);
  },
  { timeout },
);

test("A close by the server ends polls, after what was sent before", async (t) => {
  const place = await site(t, { bytes: Infinity });
  const { messages, events, closed } = await open(t, place.front.url, { transport: "poll" });
  const peer = await place.peers.next();
  const sent = Array.from({ length: 100 }, (_, n) => `${n} `.padEnd(10_000, "x")); // four windows
  for (const text of sent) peer.send(text);
  peer.close(4001, "go");
  const { code, reason, wasClean } = await closed;
  assertEquals([code, reason, wasClean], [4001, "go", true]);
  assertEquals(messages.all, sent);
  assertEquals(events, ["open", "close"]);
  await until(() => place.calls.length === 2);
  assertEquals(place.calls, ["open", "close 4001"]);
}, { timeout });

test("Large messages and small, binary and text, pass by polls", async (t) => {
  const place = await site(t, { bytes: 4096 }, {
    message: (peer, message) => void peer.send(message.rawData),
  });
  const { socket, messages, events } = await open(t, place.front.url, { transport: "poll" });
  const large = crypto.getRandomValues(new Uint8Array(60_000));
  const sent = ["", "\uFEFFé\r\n\0🙂", "x".repeat(1024 * 1024), large, new Uint8Array(), "last"];
  for (const each of sent) socket.send(each as string);
  for (const each of sent) {
    const echo = await messages.next({ timeout: 20_000 });
    assertEquals(typeof echo === "string" ? echo : new Uint8Array(echo as ArrayBuffer), each);
  }
  assertEquals([socket.bufferedAmount, events], [0, ["open"]]);
}, { timeout });

test("A page that reads slowly is given no more than a window at a time", async (t) => {
  const place = await site(t, { bytes: Infinity }, { window: 1000, maxBufferedAmount: 10_000_000 });
  const { messages, events } = await open(t, place.front.url, { transport: "poll" });
  const peer = await place.peers.next();
  const sent = Array.from({ length: 200 }, (_, n) => `${n} `.padEnd(500, "x"));
  for (const text of sent) peer.send(text);
  assertEquals(await messages.take(200, { timeout: 20_000 }), sent);
  assert(polls(place).length > 60, `${polls(place).length} polls, of two messages or three`);
  assertEquals(events, ["open"]);
}, { timeout });

test("A session whose client polls no more ends, and its client learns of it", async (t) => {
  const place = await site(t, { bytes: Infinity }, { resumeTimeout: 500, heartbeatInterval: 200 });
  const { events, closed } = await open(t, place.front.url, { transport: "poll" });
  place.front[Symbol.asyncDispose](); // nothing gets through
  const { code, wasClean } = await closed;
  assertEquals([code, wasClean], [1006, false]);
  assertEquals(events, ["open", "drop", "error", "close"]);
  await until(() => place.calls.length === 2);
  assertEquals(place.calls, ["open", "close 1006"]);
}, { timeout });

const holding: { name: ProxyName; skip: string | undefined }[] = [
  // It ignores X-Accel-Buffering, and waits for 4 KiB.
  { name: "nginx", skip: needs("nginx", "openssl") },
  // It scans answers, and so reads them to their end.
  { name: "modsecurity", skip: needs("apache", "modsecurity", "owasp-crs", "openssl") },
];

for (const { name, skip } of holding) {
  test(`Behind ${name}, told to hold event streams, a socket opens by polling`, async (t) => {
    const place = await site(t, undefined);
    const { port } = await proxy(t, name, place.server, { configuration: "holding" });
    const connected = await open(t, `http://127.0.0.1:${port}/`);
    await talk(place, connected);
    assertEquals([connected.socket.transport, connected.events], ["poll", ["open"]]);
    connected.socket.close(1000);
    assertEquals((await connected.closed).code, 1000);
    await until(() => place.calls.length === 2);
    assertEquals(place.calls, ["open", "close 1000"]);
  }, { timeout, skip });
}

test("In a cluster, each poll may come to any instance", async (t) => {
  t.defer(() => sleep(50)); // last of all: what is being signed or verified
  const bus = new MemoryBus(t);
  const received: string[] = [];
  const calls: string[] = [];
  const peers = new Queue<Peer>();
  const ports: number[] = [];
  for (let n = 0; n < 3; n++) {
    const { port } = await listen(t, {
      sync: cluster(bus.adapter),
      hooks: {
        open: (peer) => (calls.push("open"), peers.push(peer)),
        message: (_, message) => void received.push(message.text()),
        close: (_, { code }) => void calls.push(`close ${code}`),
      },
    });
    ports.push(port);
  }
  await sleep(50, t.signal); // subscriptions tell nobody when they stand
  const balancer = await roundRobin(t, ports);
  const front = t.use(await holder(balancer.port, { bytes: Infinity }));
  const { socket, messages, events, closed } = await open(t, front.url, { transport: "poll" });
  const peer = await peers.next();
  const sent = Array.from({ length: 60 }, (_, n) => `${n}`);
  for (const text of sent) {
    socket.send(text);
    peer.send(text);
    if (text.endsWith("9")) await until(() => received.includes(text), { timeout: 20_000 });
  }
  assertEquals(await messages.take(60, { timeout: 20_000 }), sent);
  assertEquals([received, events, calls], [sent, ["open"], ["open"]]);
  const asked = new Set(balancer.log.map((each) => each.at(-1)));
  assertEquals(asked.size, 3);
  socket.close(1000);
  assertEquals((await closed).code, 1000);
  assertEquals(calls, ["open", "close 1000"]);
}, { timeout });
