/**
 * Several instances behind a proxy that knows nothing of sessions: publishing
 * between them, requests that come to the wrong one, and what a backplane may do
 * to what it carries. The instances run in this process; cluster.faults.test.ts
 * has processes of their own.
 */
import { broadcastChannel, pgsql, redis } from "crossws/sync";
import { Redis } from "ioredis";
import postgres from "postgres";
import { cluster, type ClusterAdapter, type ClusterOptions } from "../cluster.ts";

import type { Hooks, RoutingDriver, SSEOptions, SyncMessage } from "../server.ts";
import {
  MemoryBus,
  PostgresServer,
  RedisServer,
  type RoundRobin,
  roundRobin,
  unknown,
} from "./bus.ts";
import { chaos, type ChaosProxy, pickSeed } from "./chaos.ts";
import {
  assert,
  assertEquals,
  assertLess,
  assertLessOrEqual,
  assertMatch,
  assertThrows,
  type Deferred,
  deferred,
  needs,
  note,
  sleep,
  test,
  type TestContext,
  until,
} from "./harness.ts";
import { connect, listen, type Pair } from "./pair.ts";
import { mulberry32 } from "./random.ts";
import { drivers as topical } from "./topical.ts";
import { wireClient } from "./wire.ts";

const UPLINK = "application/websocket-events";

interface Driver {
  name: string;
  skip?: string | undefined;
  options?: ClusterOptions;
  connect(t: TestContext): ClusterAdapter | Promise<ClusterAdapter>;
}

let channels = 0;

const drivers: Driver[] = [
  { name: "crossws's redis driver", skip: needs("redis-server"), connect: redisDriver },
  {
    name: "crossws's pgsql driver",
    skip: needs("postgres"),
    options: { maxPayload: 8000 }, // NOTIFY takes no more
    connect: postgresDriver,
  },
  {
    name: "crossws's broadcastChannel driver",
    connect: () => broadcastChannel({ channel: `duplex-${channels++}` }),
  },
  {
    name: "a driver that refuses 8000 bytes",
    options: { maxPayload: 8000 },
    connect: (t) => new MemoryBus(t, { limit: 8000 }).adapter,
  },
  ...topical,
  {
    name: "a driver that addresses one instance",
    connect: (t) => new MemoryBus(t, { send: true }).adapter,
  },
];

async function redisDriver(t: TestContext): Promise<ClusterAdapter> {
  const server = await RedisServer.start(t);
  const client = new Redis(server.port, "127.0.0.1");
  t.defer(() => client.quit());
  return redis({ client: client as never, channel: "duplex" });
}

async function postgresDriver(t: TestContext): Promise<ClusterAdapter> {
  const { port } = await PostgresServer.start(t);
  const client = postgres({ host: "127.0.0.1", port, username: "test", database: "postgres" });
  t.defer(() => client.end());
  const payload = "x".repeat(8000);
  const refused = await client.notify("duplex", payload).then(() => "taken", String);
  assertMatch(refused, /payload string too long/);
  return pgsql({ client: client as never, channel: "duplex" });
}

interface Cluster {
  /** By instance, in order: what its hooks have been told. */
  readonly told: string[][];
  readonly instances: Pair<Record<string, unknown>>[];
  readonly errors: string[];
  readonly proxy: RoundRobin;
}

/** Instances whose hooks say that they were called. `?room` is the namespace. */
async function start(
  t: TestContext,
  adapter: ClusterAdapter,
  { count = 3, cluster: options, ...rest }: {
    count?: number;
    cluster?: ClusterOptions | undefined;
  } & SSEOptions = {},
): Promise<Cluster> {
  t.defer(() => sleep(50)); // last of all: what is being signed or verified
  const told: string[][] = [];
  const errors: string[] = [];
  const instances: Pair<Record<string, unknown>>[] = [];
  for (let i = 0; i < count; i++) {
    const calls: string[] = told[i] = [];
    const hooks: Partial<Hooks> = {
      upgrade(request) {
        const { pathname, searchParams } = new URL(request.url);
        if (searchParams.get("as") === "nobody") return new Response("No", { status: 401 });
        return { namespace: pathname };
      },
      open: (peer) => void (calls.push("open"), peer.subscribe("all")),
      message(peer, message) {
        calls.push(message.text().slice(0, 20));
        if (message.text().startsWith("publish ")) peer.publish("all", message.text().slice(8));
        else peer.send(message.rawData);
      },
      close: (_, { code }) => void calls.push(`close ${code}`),
    };
    instances.push(
      await listen(t, {
        hooks,
        sync: cluster(adapter, options),
        onError: (error, { stage }) => void errors.push(`${stage}: ${(error as Error).message}`),
        ...rest,
      }),
    );
  }
  await sleep(50, t.signal); // subscriptions tell nobody when they stand
  const proxy = await roundRobin(t, instances.map(({ port }) => port));
  return { told, errors, instances, proxy };
}

/** Sends every request of a kind to one instance. */
function direct(proxy: RoundRobin, get: number, post = get): void {
  proxy.choose = ({ method }) => method === "GET" ? get : post;
}

// ---------------------------------------------------------------- publishing

for (const { name, skip, options, connect: driver } of drivers) {
  test(`over ${name}, a publication reaches every subscriber of every instance once`, async (t) => {
    const { instances, errors } = await start(t, await driver(t), { cluster: options });
    const room = instances.map(({ url }) => connect(t, `${url}/room`));
    const other = connect(t, `${instances[1]!.url}/other`);
    for (const { opened } of [...room, other]) await opened;

    const large = "ä\u0000\n".repeat(100_000);
    const bytes = Uint8Array.from({ length: 100_000 }, (_, i) => i * 7);
    const { ws } = instances[0]!;
    room[0]!.socket.send("publish small");
    await room[1]!.messages.next();
    await room[2]!.messages.next();
    assertEquals(room[0]!.messages.left, 0, "the publisher has no echo");
    for (const data of ["one", large, bytes, new Uint8Array([0, 255, 254])]) {
      ws.publish("all", data, { namespace: "/room" });
      for (const { messages } of room) {
        const got = await messages.next();
        assertEquals(got instanceof ArrayBuffer ? new Uint8Array(got) : got, data);
      }
    }
    assertEquals(other.messages.all, [], "another namespace");
    ws.publish("all", "everywhere");
    for (const { messages } of [...room, other]) assertEquals(await messages.next(), "everywhere");
    await sleep(50, t.signal);
    for (const { messages } of [...room, other]) assertEquals(messages.left, 0);
    assertEquals(errors, []);
  }, { skip, timeout: 20_000 });

  test(`over ${name}, any instance takes any request of a session`, async (t) => {
    const { proxy, told, instances, errors } = await start(t, await driver(t), {
      cluster: options,
    });
    const network = t.use(await chaos(proxy.port, { seed: 1 }));
    for (const transport of ["post", "stream", "duplex"] as const) {
      direct(proxy, 0);
      const { socket, opened, messages, events } = connect(t, `${network.url}/${transport}`, {
        transport,
      });
      await opened;
      const begin = told[0]!.length;
      let n = 0;
      const talk = async () => {
        const sent = Array.from({ length: 20 }, () => `${transport} ${n++}`);
        for (const text of sent) socket.send(text);
        socket.send(new Uint8Array(100_000).fill(n));
        assertEquals(await messages.take(20), sent);
        assertEquals(new Uint8Array(await messages.next() as ArrayBuffer)[99_999], n);
      };
      await talk();
      for (const [get, post] of [[1, 2], [2, 1], [0, 1], [1, 0], [2, 2]] as const) {
        direct(proxy, get, post);
        const resumes = socket.stats.resumes;
        network.cutAll("rst");
        await talk();
        await until(() => socket.stats.resumes > resumes);
        const [set] = [...instances[0]!.ws.peers.values()];
        assertEquals(set?.size, 1);
      }
      assertEquals(told[0]!.length - begin, 6 * 21, "each message once");
      socket.close(4000, "done");
      await until(() => told[0]!.includes("close 4000"));
      assert(!events.includes("error"), events.join());
      told[0]!.length = 0;
    }
    assertEquals([told[1], told[2]], [[], []], "hooks run on the owner only");
    assertEquals(errors, []);
  }, { skip, timeout: 30_000 });
}

// ---------------------------------------------------------------- refusals

test("a foreign session's requests: 401 of the hook here, 404 and 409 of the owner alone", async (t) => {
  const bus = new MemoryBus(t);
  const { instances, told, errors } = await start(t, bus.adapter);
  const [owner, other] = instances as [Pair<never>, Pair<never>];
  const client = await wireClient(t, `${owner.url}/a`);
  const { token } = client;
  assertEquals(await client.frames("TEXT 2\r\nhi\r\n", 1), [204, 1]);
  const ask = async (init: RequestInit & { path?: string; headers?: Record<string, string> }) => {
    const { path = "/a", headers, ...rest } = init;
    const response = await fetch(`${other.url}${path}`, {
      ...rest,
      headers: { "x-crossws-id": token, "x-duplex-version": "1", ...headers },
    });
    await response.body?.cancel();
    return [response.status, response.headers.get("x-duplex-received")];
  };
  const uplink = (seq: number, body: string, path = "/a") =>
    ask({
      path,
      method: "POST",
      body: `SEQ 1\r\n${seq}\r\n${body}`,
      headers: { "content-type": UPLINK },
    });
  bus.reset();
  assertEquals(await uplink(2, "TEXT 3\r\nyou\r\n"), [204, "2"]);
  assertEquals(bus.counts.published, 2, "one message there, one back");
  assertEquals(await uplink(2, "TEXT 3\r\nyou\r\n"), [204, "2"], "a repetition");
  assertEquals(await uplink(4, "TEXT 1\r\n!\r\n"), [409, "2"], "a gap");
  assertEquals(await uplink(3, "NONSENSE\r\n"), [400, "2"]);
  bus.reset();
  assertEquals(await uplink(3, "TEXT 1\r\n!\r\n", "/a?as=nobody"), [401, null]);
  assertEquals(bus.counts.published, 0, "a refusal stays here");
  assertEquals(await uplink(3, "TEXT 1\r\n!\r\n", "/b"), [404, null], "another namespace");
  const resume = { accept: "text/event-stream", "x-duplex-attempt": "1", "last-event-id": "99" };
  assertEquals(await ask({ headers: resume }), [409, null], "what it never sent");
  assertEquals(await ask({ headers: { accept: "text/html" } }), [406, null]);
  const unknown = { "x-crossws-id": token.slice(0, 17) + "0".repeat(32) };
  assertEquals(await ask({ headers: { ...resume, ...unknown } }), [404, null]);
  assertEquals(told.map((calls) => calls.length), [3, 0, 0]);
  assertEquals(errors, []);
});

test("nobody answers: 503 in time, and onError knows", async (t) => {
  const { instances, errors } = await start(t, new MemoryBus(t).adapter, {
    cluster: { timeout: 300 },
  });
  const response = await fetch(`${instances[0]!.url}/a`, {
    headers: {
      accept: "text/event-stream",
      "x-crossws-id": `${"0".repeat(16)}.${"0".repeat(32)}`,
      "x-duplex-version": "1",
      "x-duplex-attempt": "1",
      "last-event-id": "0",
    },
  });
  assertEquals([response.status, response.headers.get("retry-after")], [503, "1"]);
  await response.body?.cancel();
  assertEquals(errors, ["delivery: No answer from instance 0000000000000000"]);
});

test("a streaming body at the wrong instance is 411, and plain messages are taken there", async (t) => {
  const { instances, told } = await start(t, new MemoryBus(t).adapter);
  const { token } = await wireClient(t, `${instances[0]!.url}/a`);
  const streaming = (headers: Record<string, string>) =>
    fetch(`${instances[1]!.url}/a`, {
      method: "POST",
      headers: {
        "x-crossws-id": token,
        "content-type": UPLINK,
        "x-duplex-version": "1",
        ...headers,
      },
      body: new ReadableStream({
        start: (controller) => controller.enqueue(new TextEncoder().encode("PING\r\n")),
      }),
      duplex: "half",
    } as RequestInit);
  const resume = { accept: "text/event-stream", "x-duplex-attempt": "1", "last-event-id": "0" };
  for (const headers of [{}, resume]) {
    const response = await streaming(headers);
    await response.body?.cancel();
    assertEquals(response.status, 411);
  }
  // crossws's own wire.
  const opening = await fetch(`${instances[0]!.url}/a`, {
    headers: { accept: "text/event-stream" },
  });
  t.defer(() => opening.body!.cancel());
  const plain = opening.headers.get("x-crossws-id")!;
  const sent = await fetch(`${instances[2]!.url}/a`, {
    method: "POST",
    headers: { "x-crossws-id": plain },
    body: "from afar",
  });
  await sent.body?.cancel();
  assertEquals(sent.status, 204);
  assertEquals(told, [["open", "open", "from afar"], [], []]);
});

test("the namespace of the backplane is refused to peers and to publishers", async (t) => {
  const bus = new MemoryBus(t);
  const { instances, errors } = await start(t, bus.adapter, {
    count: 1,
    hooks: { upgrade: ({ url }) => ({ namespace: new URL(url).searchParams.get("room") ?? "x" }) },
  });
  const response = await fetch(`${instances[0]!.url}/?room=%00duplex`, {
    headers: { accept: "text/event-stream" },
  });
  await response.body?.cancel();
  assertEquals(response.status, 400);
  instances[0]!.ws.publish("*", "gotcha", { namespace: "\0duplex" });
  await until(() => errors.length > 0);
  assertMatch(errors[0]!, /^publish: .*namespace/);
  assertEquals(bus.counts.published, 0);
});

test("the cluster's options are checked", () => {
  const { adapter } = { adapter: (() => ({})) as unknown as ClusterAdapter };
  assertThrows(() => cluster(adapter, { maxPayload: 1000 }), RangeError);
  assertThrows(() => cluster(adapter, { timeout: 0 }), RangeError);
  assertThrows(() => cluster(adapter, { timeout: NaN }), RangeError);
});

// ---------------------------------------------------------------- a bad backplane

test("garbage, other versions, forgeries and replays are ignored and reported", async (t) => {
  const bus = new MemoryBus(t);
  const { instances, errors, told } = await start(t, bus.adapter);
  const [owner, other] = instances as [Pair<never>, Pair<never>];
  const raw = await wireClient(t, `${owner.url}/a`);
  const resume = (attempt: number) =>
    fetch(`${other.url}/a`, {
      headers: {
        accept: "text/event-stream",
        "x-crossws-id": raw.token,
        "x-duplex-version": "1",
        "x-duplex-attempt": `${attempt}`,
        "last-event-id": "0",
      },
    });
  bus.reset();
  const response = await resume(1);
  t.defer(() => response.body!.cancel());
  await until(() => bus.payloads.length >= 3); // the request, its answer, the first events
  const messages = bus.payloads.map((payload) => JSON.parse(payload).msg);
  const instance = messages[0].topic as string;
  assertEquals(instance, raw.token.slice(0, 16));
  // "Tokens never travel in clear."
  const secret = raw.token.slice(17);
  for (const { data } of messages) assert(!atob(data).includes(secret));

  const fragment = (index: number) =>
    Uint8Array.from(atob(messages[index].data), (c) => c.charCodeAt(0));
  const inject = async (what: string, data: Uint8Array | string, expected: RegExp) => {
    const reported = errors.length;
    bus.inject({ namespace: "\0duplex", topic: instance, data });
    await until(() => errors.length > reported).catch(() => {
      throw new Error(`not reported: ${what}`);
    });
    assertMatch(errors.at(-1)!, expected);
    await sleep(1_050, t.signal); // reports are rare
  };
  await inject("text", "{}", /Garbage/);
  await inject("empty", new Uint8Array(), /Garbage/);
  await inject("noise", crypto.getRandomValues(new Uint8Array(500)).fill(1, 0, 1), /Garbage/);
  await inject("version", fragment(0).fill(9, 0, 1), /Version 9/);
  await inject("a replay", fragment(0), /replayed/);
  const forged = fragment(0);
  forged[forged.length - 3]! ^= 1; // the namespace's last character
  await inject("a forgery", forged, /forged/);
  const code = fragment(0);
  code[30]! ^= 1; // of the authentication code
  await inject("another code", code, /forged/);
  for (let n = 0; n < 1000; n++) {
    bus.inject({ namespace: "\0duplex", topic: "*", data: new Uint8Array(n % 60) });
  }
  await sleep(100, t.signal);
  assertLess(errors.length, 15, "a flood is reported once");

  // None of it has touched the session, and somebody's "unknown" does not outdo the owner.
  assertEquals([told[0], raw.token.length], [["open"], 49]);
  assertEquals(await raw.frames("TEXT 2\r\nhi\r\n", 1), [204, 1]);
  const next = await resume(2);
  assertEquals(next.status, 200);
  await next.body!.cancel();
}, { timeout: 30_000 });

test('a forged "unknown" loses against the owner\'s answer', async (t) => {
  const bus: MemoryBus = new MemoryBus(t, {
    fault(message) {
      const forged = unknown(message);
      if (!forged) return [50]; // the owner's answer takes its time
      queueMicrotask(() => bus.inject(forged));
      return [0];
    },
  });
  const { instances, told } = await start(t, bus.adapter);
  const { token } = await wireClient(t, `${instances[0]!.url}/a`);
  const response = await fetch(`${instances[1]!.url}/a`, {
    method: "POST",
    headers: { "x-crossws-id": token, "content-type": UPLINK },
    body: "SEQ 1\r\n1\r\nTEXT 2\r\nhi\r\n",
  });
  await response.body?.cancel();
  assertEquals([response.status, told[0]], [204, ["open", "hi"]]);
});

test("a backplane that loses, repeats and reorders costs time, and no message", async (t) => {
  const seed = pickSeed();
  note(`DUPLEX_SEED=${seed}`);
  const random = mulberry32(seed);
  const bus = new MemoryBus(t, {
    limit: 8000,
    fault: () => random() < 0.01 ? [] : random() < 0.1 ? [0, 20] : [random() * 10],
  });
  const { proxy, told, errors } = await start(t, bus.adapter, {
    cluster: { maxPayload: 8000, timeout: 300 },
  });
  direct(proxy, 0);
  const network = t.use(await chaos(proxy.port, { seed }));
  const { socket, opened, messages, events } = connect(t, network.url, { transport: "post" });
  await opened;
  direct(proxy, 1, 2);
  network.cutAll("rst");
  for (let n = 0; n < 500; n++) {
    socket.send(n % 50 ? `${n}` : `${n} ${"x".repeat(20_000)}`);
    if (n % 10 === 0) await sleep(5, t.signal);
  }
  const heard = await messages.take(500, { timeout: 20_000 });
  assertEquals(
    heard.map((text) => parseInt(String(text))),
    Array.from({ length: 500 }, (_, n) => n),
  );
  assertEquals(told[0]!.length, 501);
  assert(!events.includes("error"));
  assert(errors.every((error) => /replayed|No answer/.test(error)), errors.join());
}, { timeout: 40_000 });

// ---------------------------------------------------------------- the relayed stream

async function relayed(t: TestContext, options: SSEOptions & { bus?: MemoryBus } = {}) {
  const { bus = new MemoryBus(t), ...rest } = options;
  const { proxy, instances } = await start(t, bus.adapter, {
    cluster: { timeout: 500 },
    ...rest,
  });
  direct(proxy, 0);
  const network: ChaosProxy = t.use(await chaos(proxy.port, { seed: 1 }));
  const connected = connect(t, `${network.url}/`, { transport: "post" });
  await connected.opened;
  direct(proxy, 1, 2);
  network.cutAll("rst");
  await until(() => connected.events.includes("resume"));
  const [peer] = [...instances[0]!.ws.peers.get("/")!];
  return { bus, network, peer: peer!, proxy, instances, ...connected };
}

test("a relayed stream has the window and the limits of the session", async (t) => {
  const { peer, network, messages, closed } = await relayed(t, {
    maxBufferedAmount: 256 * 1024,
    window: 64 * 1024,
  });
  for (let n = 0; n < 200; n++) {
    peer.send(`${n} ${"x".repeat(10_000)}`);
    await peer.waitForDrain();
  }
  assertEquals((await messages.take(200)).map((text) => parseInt(String(text)))[199], 199);
  network.stallAll(); // the client takes nothing more
  for (let n = 0; n < 100 && peer.websocket.readyState === 1; n++) {
    peer.send("x".repeat(10_000));
    await sleep(2);
  }
  assertEquals(peer.websocket.readyState, 3, "closed with 1013");
  network.resumeAll();
  assertEquals((await closed).code, 1013);
});

test("a relaying instance that falls silent is left, and so is a client that goes", async (t) => {
  let silent = false;
  const bus = new MemoryBus(t, { fault: () => silent ? [] : [0] });
  const { messages, peer, events, socket, network } = await relayed(t, {
    bus,
    heartbeatInterval: 60_000,
  });
  peer.send("before");
  await messages.next();
  await sleep(1_500, t.signal); // quiet, and kept by both
  peer.send("quiet");
  assertEquals(await messages.next(), "quiet");
  assertEquals(events.join(), "open,drop,resume");
  silent = true;
  const drops = () => events.filter((type) => type === "drop").length;
  await until(() => drops() === 2, { timeout: 3_000 }); // nobody waits for a heartbeat
  peer.send("meanwhile");
  silent = false;
  assertEquals(await messages.next(), "meanwhile");
  assertEquals(socket.stats.resumes, 2);
  network.refuse(60_000);
  network.cutAll("rst"); // told to the owner as a cancel: the connection is gone, the session waits
  await until(() => peer.send("x".repeat(1000)) === -1, { timeout: 3_000 });
}, { timeout: 20_000 });

test("a relayed stream waits while the backplane is behind, and loses nothing", async (t) => {
  let gate: Deferred<void> | undefined;
  const bus = new MemoryBus(t, { settled: async () => await gate?.promise });
  const { messages, peer, events, instances } = await relayed(t, {
    bus,
    heartbeatInterval: 60_000,
    onError: () => {}, // publications are dropped
  });
  for (let round = 0; round < 2; round++) {
    gate = deferred();
    for (const { ws } of instances) {
      for (let n = 0; n < 1100; n++) ws.publish("nobody's", "x"); // 1024 may be pending
    }
    for (let n = 0; n < 20; n++) { // beyond the parts that may be under way, so credit waits, too
      peer.send(`${round} ${n}`);
      await sleep(5, t.signal);
    }
    gate.resolve();
    assertEquals(await messages.take(20), Array.from({ length: 20 }, (_, n) => `${round} ${n}`));
    await sleep(300, t.signal);
  }
  assertEquals(events.join(), "open,drop,resume");
}, { timeout: 20_000 });

test("a process that pauses does not take its own silence for another's", async (t) => {
  const { messages, peer, events } = await relayed(t, { heartbeatInterval: 60_000 });
  for (let n = 0; n < 3; n++) {
    await sleep(300 + 100 * n, t.signal); // before, at and after the instances speak to each other
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1_500);
    await sleep(600, t.signal);
  }
  peer.send("after");
  assertEquals(await messages.next(), "after");
  assertEquals(events.join(), "open,drop,resume");
}, { timeout: 20_000 });

test("a clock that is set back keeps no stream that has fallen silent", async (t) => {
  let silent = false;
  const bus = new MemoryBus(t, { fault: () => silent ? [] : [0] });
  const { messages, peer, events } = await relayed(t, { bus, heartbeatInterval: 60_000 });
  peer.send("before");
  await messages.next();
  const { now } = Date;
  t.defer(() => Date.now = now);
  Date.now = () => now() - 3_600_000;
  silent = true;
  await until(() => events.filter((type) => type === "drop").length === 2, { timeout: 3_000 });
});

test("a relayed stream is a message a part, and one back for every fourth", async (t) => {
  const bus = new MemoryBus(t);
  const { peer, messages } = await relayed(t, { bus });
  await sleep(50, t.signal);
  bus.reset();
  for (let n = 0; n < 40; n++) {
    peer.send(`${n}`);
    await messages.next();
  }
  await sleep(50, t.signal);
  const { published } = bus.counts;
  assert(published >= 50 && published <= 52, `${published}`); // 40 + 10, and a keep-alive
  bus.reset();
  for (let n = 0; n < 1000; n++) peer.send(`${n}`);
  await messages.take(1000);
  assertLess(bus.counts.published, 50, "what is sent together travels together");
});

// ---------------------------------------------------------------- what it costs

/** What PROTOCOL.md states: payloads and bytes that the instances get. */
test(
  "a routed batch is two messages, and idle instances get nothing where one can be addressed",
  async (t) => {
    const rows: string[] = [];
    for (const send of [false, true]) {
      for (const count of [1, 2, 4, 8]) {
        const bus = new MemoryBus(t, { send });
        const { instances } = await start(t, bus.adapter, { count });
        const { token, events } = await wireClient(t, `${instances[0]!.url}/a`);
        bus.reset();
        const body = "SEQ 1\r\n1\r\n" + `TEXT 64\r\n${"x".repeat(100)}\r\n`.repeat(10);
        const { status } = await fetch(`${instances.at(-1)!.url}/a`, {
          method: "POST",
          headers: { "x-crossws-id": token, "content-type": UPLINK },
          body,
        });
        assertEquals(status, 204);
        await sleep(30, t.signal);
        const uplink = { ...bus.counts };
        bus.reset();
        instances[0]!.ws.publish("all", "x".repeat(100));
        await sleep(30, t.signal);
        const publication = { ...bus.counts };
        const wrong = count > 1 ? 2 : 0;
        assertEquals(uplink.published, wrong);
        assertEquals(uplink.delivered, send ? wrong : wrong * (count - 1));
        assertEquals([publication.published, publication.delivered], [1, count - 1]);
        rows.push(
          [
            send ? "send" : "broadcast",
            count,
            ...Object.values(uplink),
            ...Object.values(publication),
          ]
            .join(" | "),
        );
        await events.cancel();
      }
    }
    if (globalThis.process?.env.DUPLEX_VERBOSE) console.log(rows.join("\n"));
  },
  { timeout: 30_000 },
);

test("who runs one instance pays nothing: no message for a session's whole life", async (t) => {
  const bus = new MemoryBus(t);
  const { proxy } = await start(t, bus.adapter, { count: 1 });
  const network = t.use(await chaos(proxy.port, { seed: 1 }));
  const { socket, opened, messages, closed } = connect(t, network.url);
  await opened;
  socket.send("one");
  await messages.next();
  network.cutAll("rst");
  socket.send("two");
  await messages.next();
  socket.close();
  await closed;
  assertEquals(bus.counts.published, 0);
});

test("a backplane that never settles is given up beyond a bound", async (t) => {
  const errors: string[] = [];
  let published = 0;
  const stuck: ClusterAdapter = () => ({
    subscribe: () => {},
    publish: (_message: SyncMessage) => {
      published++;
      return new Promise(() => {});
    },
  });
  const { ws, url } = await listen(t, {
    sync: cluster(stuck),
    onError: (error) => void errors.push(String(error)),
  });
  for (let n = 0; n < 5000; n++) ws.publish("all", "x");
  await until(() => errors.length > 0);
  assertLessOrEqual(published, 1024);
  assertEquals(errors.length, 1);
  const begin = performance.now();
  const response = await fetch(url, {
    headers: { accept: "text/event-stream", "x-crossws-id": `${"0".repeat(16)}.${"0".repeat(32)}` },
  });
  await response.body?.cancel();
  assertEquals(response.status, 503);
  assertLess(performance.now() - begin, 1000);
});

for (const when of ["is routed", "is answered where it was asked for"] as const) {
  test(`a request whose session leaves or comes as it ${when} is 503, and not 404`, async (t) => {
    let owned = false;
    let there: string | undefined;
    const fakes = {
      ...{ remembers: false, size: 0, taking: [], moving: () => undefined, tick() {}, hurry() {} },
      ...{ mayBring: () => false, isLanding: () => false, want: () => Promise.resolve(true) },
      ...{ whereabouts: () => there, look: () => Promise.resolve(false), away() {} },
    };
    const parks = (() => fakes) as unknown as ClusterOptions["parking"];
    const id = "a".repeat(16);
    const bus = new MemoryBus(t);
    const router = cluster(bus.adapter, { timeout: 2_000, parking: parks })({
      id,
    }) as RoutingDriver;
    t.defer(() => router.close());
    router.attach({
      ...{ maxMessageSize: 1_000, resumeTimeout: 1_000, size: 1, movable: true, takes: true },
      has: () => when === "is routed",
      owns: () => owned,
      ...{ pack: () => undefined, rest: () => [], restore() {}, release() {}, report() {} },
      fetch: () => Promise.resolve(new Response(null, { status: 404 })),
    });
    await router.subscribe(() => {});
    const named = when === "is routed" ? id : "b".repeat(16);
    const token = `${named}.${"0".repeat(32)}`;
    const headers = { "x-duplex-attempt": "1", "x-crossws-id": token };
    const routed = router.route(new Request("http://a/", { headers }), token, "/");
    if (when !== "is routed") {
      await until(() => router.stats().relayed === 1);
      owned = true; // it has come
      const adopted = router.adopt(token, { attempt: 1, received: 0, namespace: "/" }, () => {});
      there = ""; // and has left for the store
      await adopted;
    }
    assertEquals((await routed).status, 503);
  });
}
