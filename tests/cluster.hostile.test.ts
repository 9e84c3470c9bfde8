/**
 * What an instance of a cluster must survive: a backplane that is down when it starts or stops,
 * drivers that fail in every way, and strangers on the channel who know the protocol.
 */
import { redis } from "crossws/sync";
import { Redis } from "ioredis";
import { Buffer } from "node:buffer";
import { createHash, createHmac, randomBytes } from "node:crypto";
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { pathToFileURL } from "node:url";
import { cluster, type ClusterAdapter, type ClusterOptions } from "../cluster.ts";
import { redis as sharded } from "../drivers.ts";
import type { RoutingDriver, SSEOptions, SyncAdapter, SyncMessage } from "../server.ts";
import { MemoryBus, memoryRedis, RedisServer } from "./bus.ts";
import {
  assert,
  assertEquals,
  assertLess,
  assertMatch,
  deferred,
  needs,
  root,
  sleep,
  test,
  type TestContext,
  until,
  within,
} from "./harness.ts";
import { connect, listen, type Pair, shutDown } from "./pair.ts";
import { frame, from, onOneConnection, post as wirePost, UPLINK, wireClient } from "./wire.ts";

interface Instance extends Pair<Record<string, unknown>> {
  readonly got: string[];
  readonly errors: string[];
}

/** An instance that echoes, and whose sessions subscribe to "all". */
async function start(
  t: TestContext,
  adapter: ClusterAdapter,
  options:
    & ClusterOptions
    & Pick<SSEOptions, "maxMessageSize" | "resumeTimeout">
    & { cluster?: typeof cluster } = {},
): Promise<Instance> {
  const got: string[] = [];
  const errors: string[] = [];
  const { maxMessageSize, resumeTimeout, cluster: made = cluster, ...rest } = options;
  const pair = await listen<Record<string, unknown>>(t, {
    sync: made(adapter, rest),
    onError: (error, { stage }) => void errors.push(`${stage}: ${(error as Error).message}`),
    hooks: {
      open: (peer) => peer.subscribe("all"),
      message(peer, message) {
        got.push(message.text().slice(0, 20));
        peer.send(message.text().slice(0, 20));
      },
    },
    ...maxMessageSize && { maxMessageSize },
    ...resumeTimeout && { resumeTimeout },
  });
  return Object.assign(pair, { got, errors });
}

/** The uplink of somebody's session, at any instance. */
async function post(
  { url }: { url: string },
  token: string,
  seq: number,
  body: string,
): Promise<number> {
  const response = await fetch(url, {
    method: "POST",
    headers: {
      "content-type": "application/websocket-events",
      "x-crossws-id": token,
      "x-duplex-version": "1",
    },
    body: `SEQ 1\r\n${seq}\r\n${body}`,
  });
  await response.body?.cancel();
  return response.status;
}

const STRANGER = `${"0".repeat(16)}.${"0".repeat(32)}`;

// ---------------------------------------------------------------- drivers that fail

test("Redis is down at the start: as soon as it is there, all is as it should be", async (t) => {
  const server = await RedisServer.start(t);
  await server.kill();
  const instances = await Promise.all([0, 1].map(() => {
    const client = quiet(
      new Redis(server.port, "127.0.0.1", { retryStrategy: () => 20, maxRetriesPerRequest: 3 }),
    );
    t.defer(() => client.disconnect());
    const adapter = redis({ client: client as never, channel: "duplex" });
    return start(t, adapter, { timeout: 500 });
  }));
  const tabs = instances.map(({ url }) => connect(t, url, { transport: "post" }));
  await Promise.all(tabs.map(({ opened }) => opened));
  for (const { errors } of instances) {
    await until(() => errors.filter((error) => error.startsWith("subscribe: ")).length > 1);
  }
  tabs[0]!.socket.send("local traffic goes on");
  await tabs[0]!.messages.next();
  const { token } = await wireClient(t, instances[0]!.url);
  assertEquals(await post(instances[1]!, token, 1, "TEXT 2\r\nhi\r\n"), 503);

  await server.start();
  let n = 0;
  await until(() => {
    instances[0]!.ws.publish("all", `${++n}`);
    return tabs[1]!.messages.left > 0;
  }, { timeout: 10_000, interval: 50 });
  instances[0]!.ws.publish("all", "last");
  await until(() => tabs[1]!.messages.all.at(-1) === "last");
  const { all } = tabs[1]!.messages;
  assertEquals(new Set(all).size, all.length, "each once, however often it had to subscribe");
  await until(async () => await post(instances[1]!, token, 1, "TEXT 2\r\nhi\r\n") === 204);
  assertEquals(instances.map(({ got }) => got.filter((text) => text === "hi")), [["hi"], []]);
}, { skip: needs("redis-server"), timeout: 30_000 });

/** ioredis prints errors that nobody listens to, also those of its duplicates. */
function quiet(client: Redis): Redis {
  client.on("error", () => {});
  const duplicate = client.duplicate.bind(client);
  client.duplicate = (...args) => quiet(duplicate(...args));
  return client;
}

for (
  const [how, fail] of [
    ["throws", () => {
      throw new Error("thrown");
    }],
    ["rejects", () => Promise.reject(new Error("rejected"))],
    ["never settles", () => new Promise<never>(() => {})],
    ["rejects with undefined", () => Promise.reject(undefined)],
  ] as [string, () => Promise<void>][]
) {
  test(`a driver that ${how}, whatever it is asked: sessions live, routing is 503, closing ends`, async (t) => {
    const adapter: ClusterAdapter = () => ({
      subscribe: fail,
      publish: fail,
      send: fail,
      close: fail,
    });
    const instance = await start(t, adapter, { timeout: 200 });
    const { opened, socket, messages } = connect(t, instance.url);
    await opened;
    socket.send("one");
    assertEquals(await messages.next(), "one");
    instance.ws.publish("all", "two");
    assertEquals(await messages.next(), "two");
    assertEquals(await within(post(instance, STRANGER, 1, "TEXT 2\r\nhi\r\n"), 2_000), 503);
    await within(shutDown(instance.ws), 3_000, "closing");
    assert(instance.errors.length > 0);
    if (how !== "never settles") {
      assert(instance.errors.some((error) => error.startsWith("subscribe: ")));
      assert(instance.errors.some((error) => error.startsWith("publish: ")));
    }
  });
}

test("an onError that throws harms nothing: neither the process nor the next attempt", async (t) => {
  const { error } = console;
  t.defer(() => console.error = error);
  const printed: string[] = [];
  console.error = (...args: unknown[]) => void printed.push(args.map(String).join(" "));
  let attempts = 0;
  let deliver!: (message: SyncMessage) => void;
  await listen(t, {
    sync: cluster(() => ({
      subscribe(given) {
        if (++attempts === 1) throw new Error("down");
        deliver = given;
      },
      publish: () => {},
    })),
    onError: () => {
      throw new Error("of the logger");
    },
  });
  await until(() => attempts === 2);
  deliver({ namespace: "\0duplex", topic: "*", data: "garbage" }); // would throw at the driver
  assertEquals(printed.length, 2);
  assert(printed.every((text) => /onError failed: Error: of the logger$/.test(text)));
});

test("a driver may take back the memory of what it has delivered", async (t) => {
  const bus = new MemoryBus(t, { limit: 8000 });
  const reusing: ClusterAdapter = (context) => {
    const driver = bus.adapter(context);
    return {
      ...driver,
      subscribe: (deliver) =>
        driver.subscribe((message) => {
          if (typeof message.data === "string") return deliver(message);
          const data = Buffer.from(message.data); // its slice() is no copy
          deliver({ ...message, data });
          data.fill(0);
        }),
    };
  };
  const [one, other] = await Promise.all(
    [0, 1].map(() => start(t, reusing, { maxPayload: 8000 })),
  ) as [Instance, Instance];
  const { opened, messages } = connect(t, other.url);
  await opened;
  const text = "0123456789".repeat(5_000);
  one.ws.publish("all", text);
  assertEquals(await messages.next(), text);
  const { token } = await wireClient(t, one.url);
  assertEquals(await post(other, token, 1, "TEXT 2\r\nhi\r\n"), 204);
  assertEquals([one.got, one.errors, other.errors], [["hi"], [], []]);
});

test("messages as large as the servers take are routed, too", async (t) => {
  const bus = new MemoryBus(t);
  const size = 17 * 1024 * 1024;
  const [one, other] = await Promise.all(
    [0, 1].map(() => start(t, bus.adapter, { maxMessageSize: size, timeout: 15_000 })),
  ) as [Instance, Instance];
  const { token } = await wireClient(t, one.url);
  const body = `TEXT ${size.toString(16)}\r\n${"x".repeat(size)}\r\n`;
  assertEquals(await post(other, token, 1, body), 204);
  assertEquals([one.got, one.errors, other.errors], [["x".repeat(20)], [], []]);
}, { timeout: 40_000 });

test("behind one that is too large a connection takes another request, or ends, at any instance", async (t) => {
  const bus = new MemoryBus(t);
  const [one, other] = await Promise.all([start(t, bus.adapter), start(t, bus.adapter)]);
  const { token } = await wireClient(t, one.url);
  const body = from(1, frame("BINARY", new Uint8Array(8 * 1024 * 1024)));
  const [first, next] = await onOneConnection(other.port, [
    { token, length: body.length, body },
    { token, length: 0 },
  ]);
  assertEquals(first, "413");
  assert(["204", "ended"].includes(next!), next);
});

test("a length that nobody can send sets no timer that no runtime has", async (t) => {
  const bus = new MemoryBus(t);
  const [one, other] = await Promise.all([start(t, bus.adapter), start(t, bus.adapter)]);
  const { token } = await wireClient(t, one.url);
  const { setTimeout } = globalThis;
  const delays: number[] = [];
  t.defer(() => Object.assign(globalThis, { setTimeout }));
  Object.assign(globalThis, {
    setTimeout(task: () => void, delay = 0, ...args: unknown[]) {
      delays.push(delay);
      return setTimeout(task, delay, ...args);
    },
  });
  const length = Number.MAX_SAFE_INTEGER;
  const headers = {
    ...UPLINK,
    "x-duplex-version": "1",
    "x-crossws-id": token,
    "content-length": `${length}`,
  };
  const { status } = await other.ws.fetch(wirePost(other.url, headers, frame("TEXT", "hi")));
  assertEquals(status, 413);
  assertEquals(delays.filter((delay) => delay >= 2 ** 31), []); // Node warns of it, and makes it 1 ms
});

/** An adapter of this bus whose subscriptions stand once the gate is open. */
function gated(bus: MemoryBus, gate: Promise<void>): ClusterAdapter {
  return (context) => {
    const driver = bus.adapter(context);
    const subscribe: typeof driver.subscribe = async (deliver) => {
      await gate;
      await driver.subscribe(deliver);
    };
    return { ...driver, subscribe };
  };
}

test("requests wait for the subscription: they are answered after it, or 503 in time", async (t) => {
  const gate = deferred();
  const bus = new MemoryBus(t);
  const late = gated(bus, gate.promise);
  const [owner, other] = await Promise.all([
    start(t, bus.adapter),
    start(t, late, { timeout: 1_000 }),
  ]) as [Instance, Instance];
  const { token } = await wireClient(t, owner.url);
  const text = "TEXT 2\r\nhi\r\n";
  const tooLate = await post(other, token, 1, text);
  assertEquals([tooLate, bus.counts.published, owner.got], [503, 0, []]);
  const waiting = post(other, token, 1, text);
  await new Promise((resolve) => setTimeout(resolve, 200));
  assertEquals([bus.counts.published, owner.got], [0, []], "an answer would not be heard");
  gate.resolve();
  assertEquals(await waiting, 204);
  assertEquals([bus.counts.published, owner.got], [2, ["hi"]], "what was too late is not asked");
});

test("bodies that wait for the subscription take bounded memory, and give it back", async (t) => {
  const gate = deferred();
  const bus = new MemoryBus(t);
  const timeout = 3_000;
  const owner = await start(t, bus.adapter);
  const other = await start(t, gated(bus, gate.promise), { timeout });
  const { token } = await wireClient(t, owner.url);
  const body = `TEXT ${(2 ** 20 - 20).toString(16)}\r\n${"x".repeat(2 ** 20 - 20)}\r\n`;
  const begin = performance.now();
  const times = await Promise.all(Array.from({ length: 40 }, async () => {
    assertEquals(await post(other, token, 1, body), 503);
    return performance.now() - begin;
  }));
  const waited = times.filter((time) => time > timeout - 100).length;
  assert(waited > 30 && waited <= 33, `${waited} waited, of 32 MiB`);
  const last = post(other, token, 1, body);
  await new Promise((resolve) => setTimeout(resolve, 200));
  gate.resolve();
  assertEquals(await last, 204);
}, { timeout: 20_000 });

test("an owner that is behind answers once it can, while somebody waits for it", async (t) => {
  const bus = new MemoryBus(t);
  let gate = deferred();
  const behind: ClusterAdapter = (context) => {
    const driver = bus.adapter(context);
    return { ...driver, publish: (message) => (driver.publish(message), gate.promise) };
  };
  const owner = await start(t, behind, { timeout: 1_000 });
  const other = await start(t, bus.adapter, { timeout: 1_000 });
  const { token } = await wireClient(t, owner.url);
  const fill = () => {
    for (let n = 0; n < 1_100; n++) owner.ws.publish("nobody's", "x"); // 1024 may be pending
  };
  fill();
  const waiting = post(other, token, 1, "TEXT 2\r\nhi\r\n");
  await until(() => owner.got.length === 1);
  await new Promise((resolve) => setTimeout(resolve, 100));
  gate.resolve();
  assertEquals(await waiting, 204);
  gate = deferred();
  fill();
  assertEquals(await post(other, token, 2, "TEXT 3\r\nyou\r\n"), 503);
  const { published } = bus.counts;
  await new Promise((resolve) => setTimeout(resolve, 1_200)); // whether to wait is looked at in ticks
  gate.resolve();
  await new Promise((resolve) => setTimeout(resolve, 100));
  assertEquals([bus.counts.published, owner.got], [published, ["hi", "you"]]);
});

// ---------------------------------------------------------------- strangers on the channel

/** A message as PROTOCOL.md specifies it, in one fragment. */
async function message(token: string, head: Record<string, unknown>, body = "") {
  const encoder = new TextEncoder();
  const text = encoder.encode(JSON.stringify(head));
  const signed = new Uint8Array([0, 0, text.length >> 8, text.length & 255, ...text]);
  const whole = new Uint8Array([...signed, ...encoder.encode(body)]);
  const secret = await crypto.subtle.digest(
    "SHA-256",
    encoder.encode(`duplex-sse key ${token.slice(17)}`),
  );
  const algorithm = { name: "HMAC", hash: "SHA-256" };
  const key = await crypto.subtle.importKey("raw", secret, algorithm, false, ["sign"]);
  const mac = new Uint8Array(await crypto.subtle.sign("HMAC", key, whole));
  const id = crypto.getRandomValues(new Uint8Array(16));
  return new Uint8Array([1, ...id, 0, 0, 0, 0, 0, 0, 0, 1, ...mac, ...whole]);
}

async function request(token: string, changes: Record<string, unknown> = {}) {
  const name = await crypto.subtle.digest(
    "SHA-256",
    new TextEncoder().encode(`duplex-sse name ${token.slice(17)}`),
  );
  const session = [...new Uint8Array(name).subarray(0, 16)]
    .map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return {
    kind: "request",
    id: crypto.randomUUID().replaceAll("-", ""),
    from: "f".repeat(16),
    session,
    time: Date.now(),
    method: "POST",
    headers: { "content-type": "application/websocket-events" },
    namespace: "/",
    ...changes,
  };
}

test("a request is served once, and not half a minute before or after its time", async (t) => {
  const bus = new MemoryBus(t);
  const one = await start(t, bus.adapter);
  const { token } = await wireClient(t, one.url);
  const inject = (data: Uint8Array) =>
    bus.inject({ namespace: "\0duplex", topic: token.slice(0, 16), data });
  const served = await message(token, await request(token), "SEQ 1\r\n1\r\nTEXT 2\r\nhi\r\n");
  inject(served);
  await until(() => bus.payloads.length === 2); // it, and its answer
  assertEquals([one.got, one.errors], [["hi"], []], "PROTOCOL.md is enough to be understood");
  inject(served);
  await until(() => one.errors.length === 1);
  assertMatch(one.errors[0]!, /^delivery: .*replayed$/);
  const next = "SEQ 1\r\n2\r\nTEXT 1\r\n!\r\n";
  for (const off of [-31_000, 31_000]) {
    const reported = one.errors.length;
    await new Promise((resolve) => setTimeout(resolve, 1_050)); // reports are rare
    const time = Date.now() + off;
    inject(await message(token, await request(token, { time }), next));
    await until(() => one.errors.length > reported);
    assertMatch(one.errors.at(-1)!, new RegExp(`replayed, or clocks differ: ${-off / 1000} s$`));
  }
  assertEquals(one.got, ["hi"]);
});

type Fields = Record<string, unknown>;
/** By field, what is not taken for it. */
type Wrong = Record<string, unknown[]>;

/** Of each kind of message a head that is well formed, and what each of its fields must not be. */
const ID = "a".repeat(32);
const INSTANCE = "b".repeat(16);
const [NO_ID, NO_INSTANCE, NO_TEXT, NO_NUMBER]: unknown[][] = [
  [undefined, null, 1, "", ID.slice(1), `${ID}a`, ID.toUpperCase(), [ID]],
  [undefined, null, 1, "", INSTANCE.slice(1), `${INSTANCE}b`, "*".repeat(16), [INSTANCE]],
  [undefined, null, 1, {}, ["text"]],
  [undefined, null, "1", {}],
];
const named = { id: ID, session: "c".repeat(32), from: INSTANCE };
const NAMED: Wrong = { id: NO_ID, session: NO_TEXT, from: NO_INSTANCE };
const moves = ["where", "adopt", "state", "adopted", "rest", "have", "taken"];
const HEADS: [head: Fields, wrong: Wrong][] = [
  [
    { kind: "publication", namespace: "/", topic: "all", binary: false, from: INSTANCE, n: 1 },
    {
      ...{ namespace: NO_TEXT, topic: NO_TEXT, from: NO_INSTANCE.slice(1) },
      n: [...NO_NUMBER, 1.5, 2 ** 53],
    },
  ],
  [
    { kind: "present", instance: INSTANCE, commitment: "d".repeat(64) },
    { instance: NO_INSTANCE, commitment: [...NO_TEXT, "d".repeat(63), "d".repeat(65)] },
  ],
  [{ kind: "bye", instance: INSTANCE, secret: "" }, { instance: NO_INSTANCE, secret: NO_TEXT }],
  [{ kind: "hello", from: INSTANCE }, { from: NO_INSTANCE }],
  [{ ...named, kind: "request", time: 0 }, { ...NAMED, time: NO_NUMBER }],
  ...moves.map((kind) => [{ ...named, kind }, NAMED] as [Fields, Wrong]),
  ...["answer", "moved", "alive", "credit", "cancel", "unknown"].map((kind) =>
    [{ kind, id: ID }, { id: NO_ID }] as [Fields, Wrong]
  ),
];

/** Gives an instance what comes, and returns what it has told of that. */
async function stranger(t: TestContext) {
  let deliver!: (message: SyncMessage) => void;
  const adapter = () => ({
    subscribe: (given: typeof deliver) => void (deliver = given),
    publish() {},
  });
  const { errors, url } = await start(t, adapter);
  const { now } = performance;
  let ahead = 0; // else there is one report a second
  t.defer(() => performance.now = now);
  performance.now = () => now.call(performance) + ahead;
  const topic = (await wireClient(t, url)).token.slice(0, 16);
  return async (data: SyncMessage["data"]) => {
    errors.length = 0;
    ahead += 1_001;
    deliver({ namespace: "\0duplex", topic, data });
    await sleep(0);
    return errors.join();
  };
}

const GARBAGE = "delivery: Garbage on the backplane";

test("a head of which one field is not what it must be is garbage, whatever its kind", async (t) => {
  const tell = await stranger(t);
  const told = async (head: unknown) => await tell(await message(STRANGER, head as Fields));
  for (const head of [null, 1, "text", [], {}, { kind: "else" }]) {
    assertEquals(await told(head), GARBAGE, JSON.stringify(head));
  }
  for (const [head, wrong] of HEADS) {
    assert(!/Garbage/.test(await told(head)), `well formed: ${JSON.stringify(head)}`);
    for (const [field, values] of Object.entries(wrong)) {
      for (const value of values) {
        const bad = { ...head, [field]: value };
        assertEquals(await told(bad), GARBAGE, JSON.stringify(bad));
      }
    }
  }
  assertEquals(
    await told({ kind: "else", id: ID }),
    "delivery: A message of an unknown kind on the backplane",
  );
});

test("what is no message at all is garbage: of any size, any index, any length of a head", async (t) => {
  const tell = await stranger(t);
  const good = await message(STRANGER, { kind: "hello", from: INSTANCE });
  const changed = (change: (view: DataView) => void) => {
    const bytes = good.slice();
    change(new DataView(bytes.buffer));
    return bytes;
  };
  const wrong: [string, string | Uint8Array][] = [
    ["text", "text".repeat(20)],
    ["nothing", new Uint8Array()],
    ["less than a fragment's header", good.slice(0, 24)],
    ["less than a message's header", good.slice(0, 25 + 35)],
    ["less than its head", good.slice(0, -1)],
    ["an index beyond", changed((view) => view.setUint32(17, 1))],
    ["of no fragments", changed((view) => view.setUint32(21, 0))],
    ["of more fragments than there may be", changed((view) => view.setUint32(21, 2 ** 32 - 1))],
    ["a head longer than all", changed((view) => view.setUint32(57, 2 ** 32 - 1))],
    ["a head that is said to be longer", changed((view) => view.setUint32(57, good.length - 60))],
    ["no head", changed((view) => view.setUint32(57, 0))],
    ["a head that is cut", changed((view) => view.setUint32(57, good.length - 61 - 1))],
  ];
  for (const [what, data] of wrong) assertEquals(await tell(data), GARBAGE, what);
  const next = changed((view) => view.setUint8(0, 2));
  assertEquals(await tell(next), "delivery: Version 2 on the backplane");
  const [head, elsewhere] = [HEADS[0]![0], { namespace: "\0other" }];
  const reserved = await tell(await message(STRANGER, { ...head, ...elsewhere }));
  assertEquals(reserved, "delivery: A publication to a reserved namespace");
});

test("a flood of questions for unknown sessions keeps no publication from going out", async (t) => {
  const gate = deferred();
  const bus = new MemoryBus(t, { settled: () => gate.promise });
  const instances = await Promise.all([0, 1, 2].map(() => start(t, bus.adapter))) as Instance[];
  const tabs = instances.map(({ url }) => connect(t, url));
  for (const { opened } of tabs) await opened;
  const { token } = await wireClient(t, instances[0]!.url);
  const flood = async (topic: string) => {
    for (let n = 0; n < 1_200; n++) {
      const data = await message(STRANGER, await request(STRANGER));
      bus.inject({ namespace: "\0duplex", topic, data });
    }
    await new Promise((resolve) => setTimeout(resolve, 50));
    const { published } = bus.counts;
    bus.reset();
    return published - 1_200;
  };
  assertEquals(await flood("*"), 0, "a question is for one, or a message would make one of each");
  assertLess(await flood(token.slice(0, 16)), 600);
  instances[0]!.ws.publish("all", "goes out");
  for (const { messages } of tabs) assertEquals(await messages.next(), "goes out");
  gate.resolve();
}, { timeout: 20_000 });

test("a farewell that a stranger says, who came before the instance itself, is taken back", async (t) => {
  const bus = new MemoryBus(t);
  const owner = await start(t, bus.adapter, { timeout: 500 });
  const other = await start(t, bus.adapter, { timeout: 500 });
  const { token } = await wireClient(t, owner.url);
  const instance = token.slice(0, 16);
  const secret = "a".repeat(32);
  const commitment = createHash("sha256").update(`duplex-sse presence ${secret}`).digest("hex");
  const say = async (head: Record<string, unknown>) =>
    bus.inject({ namespace: "\0duplex", topic: "*", data: await message(STRANGER, head) });
  await say({ kind: "present", instance, commitment });
  await say({ kind: "bye", instance, secret });
  let n = 0;
  await until(async () => await post(other, token, n + 1, "TEXT 2\r\nhi\r\n") === 204 && ++n === 2);
  await say({ kind: "bye", instance, secret });
  assertEquals(
    await post(other, token, n + 1, "TEXT 2\r\nhi\r\n"),
    204,
    "nor is it believed again",
  );
  assertEquals(owner.errors, []);
});

test("a stranger who speaks for an instance takes neither its numbers nor its publications away", async (t) => {
  const bus = new MemoryBus(t);
  const [one, other] = await Promise.all([0, 1].map(() => start(t, bus.adapter))) as Instance[];
  const { token } = await wireClient(t, one!.url);
  const from = token.slice(0, 16);
  const tab = connect(t, other!.url);
  await tab.opened;
  const say = async (changes: Record<string, unknown>) => {
    const head = { kind: "publication", namespace: "/", topic: "none", binary: false, ...changes };
    bus.inject({ namespace: "\0duplex", topic: from, data: await message(STRANGER, head) });
  };
  await say({ from: "f".repeat(16), n: 1 }); // then all are numbered
  await say({ from, n: Number.MAX_SAFE_INTEGER });
  await sleep(20, t.signal);
  one!.ws.publish("all", "goes");
  assertEquals(await tab.messages.next(), "goes");
  for (let n = 0; n < 1_001; n++) await say({ from: n.toString(16).padStart(16, "0"), n: 1 });
  await sleep(20, t.signal);
  one!.ws.publish("all", "on");
  assertEquals(await tab.messages.next(), "on");
  const said = bus.payloads.map((payload) => atob(JSON.parse(payload).msg.data));
  const own = said.filter((text) => text.includes(`"all"`));
  assertEquals(own.map((text) => /"n":(\d+)/.exec(text)?.[1]), ["1", "2"]);
  assertEquals([one!.errors, other!.errors], [[], []]);
});

const SOON = {
  "GONE = 12_000": "GONE = 2_400",
  "PRESENCE_PERIOD = 5_000": "PRESENCE_PERIOD = 1_000",
};

test("who has had no session for long is not gone for whoever opens one there", async (t) => {
  const bus = new MemoryBus(t);
  const cluster = await changed(t, SOON);
  const options = { timeout: 400, resumeTimeout: 200, cluster };
  const [one, other] = await Promise.all([0, 1].map(() => start(t, bus.adapter, options)));
  await wireClient(t, other!.url); // it has time go on
  const { token: first } = await wireClient(t, one!.url);
  await until(() => other!.ws.stats().cluster!.instances > 0);
  for (const peers of one!.ws.peers.values()) for (const peer of peers) peer.terminate();
  await until(() => !other!.ws.stats().cluster!.instances);
  assertEquals(await post(other!, first, 1, "TEXT 2\r\nhi\r\n"), 404);
  const { token } = await wireClient(t, one!.url);
  assertEquals(await post(other!, token, 1, "TEXT 2\r\nhi\r\n"), 204);
  await until(() => other!.ws.stats().cluster!.instances > 0, { timeout: 600 });
}, { timeout: 20_000 });

test("who hears of more instances than it remembers takes none of them for gone", async (t) => {
  const bus = new MemoryBus(t);
  const cluster = await changed(t, { ...SOON, "MAX_INSTANCES = 10_000": "MAX_INSTANCES = 10" });
  const [one, other] = await Promise.all(
    [0, 1].map(() => start(t, bus.adapter, { timeout: 200, cluster })),
  ) as Instance[];
  const { token } = await wireClient(t, one!.url);
  const wanted = await wireClient(t, other!.url); // it has time go on
  await until(() => other!.ws.stats().cluster!.instances > 0);
  await sleep(2_600, t.signal);
  for (let n = 1; n < 6; n++) {
    for (let k = 0; k < 20; k++) {
      const [instance, commitment] = [8, 32].map((size) => randomBytes(size).toString("hex"));
      const head = { kind: "present", instance, commitment };
      const topic = wanted.token.slice(0, 16);
      bus.inject({ namespace: "\0duplex", topic, data: await message(STRANGER, head) });
    }
    await sleep(10, t.signal);
    assertEquals(await post(other!, token, n, "TEXT 2\r\nhi\r\n"), 204);
  }
});

test("a flood of questions who is there is answered now and then, to all", async (t) => {
  const bus = new MemoryBus(t);
  const instances = await Promise.all([0, 1, 2].map(() => start(t, bus.adapter))) as Instance[];
  const signs = () =>
    bus.payloads.filter((one) => atob(JSON.parse(one).msg.data).includes("present"));
  for (let n = 0; n < 100; n++) {
    const data = await message(STRANGER, { kind: "hello", from: randomBytes(8).toString("hex") });
    bus.inject({ namespace: "\0duplex", topic: "*", data });
  }
  await until(() => instances.every(({ ws }) => ws.stats().cluster!.instances === 2));
  assertLess(signs().length, 10);
  bus.reset();
  await until(async () => { // nor is it silent from then on, though it has nothing to do
    bus.inject({
      ...{ namespace: "\0duplex", topic: "*" },
      data: await message(STRANGER, { kind: "hello", from: "f".repeat(16) }),
    });
    return signs().length > 2;
  }, { interval: 200 });
});

test("who is too busy to ask for a session does not say that it is over", async (t) => {
  let settled = Promise.resolve();
  const bus = new MemoryBus(t, { settled: () => settled });
  const one = await start(t, bus.adapter, { timeout: 200, cluster: await changed(t, SOON) });
  await wireClient(t, one.url); // it has time go on
  await until(async () => await post(one, STRANGER, 1, "TEXT 2\r\nhi\r\n") === 404);
  const gate = deferred();
  settled = gate.promise;
  for (let n = 0; n < 600; n++) one.ws.publish("none", "");
  assertEquals(await post(one, STRANGER, 1, "TEXT 2\r\nhi\r\n"), 503);
  gate.resolve();
  settled = Promise.resolve();
  await until(async () => await post(one, STRANGER, 1, "TEXT 2\r\nhi\r\n") === 404);
});

const DEAF = "subscribe: Nothing is heard from the backplane, though it takes what is published";

/** Two instances that take each other for gone soon, and the ends of Redis that they have. */
async function quickToLose(t: TestContext) {
  const wires = memoryRedis(2);
  const made = await changed(t, SOON);
  const [one, other] = await Promise.all(
    wires.map((client) =>
      start(t, sharded({ client, channel: "x" }), { timeout: 400, cluster: made })
    ),
  ) as [Instance, Instance];
  return { one, other, wires };
}

test("who is deaf takes nobody for gone, says so once, and hears again by itself", async (t) => {
  const { one, other, wires } = await quickToLose(t);
  const wire = wires[1]!;
  const { token } = await wireClient(t, one.url);
  for (let n = 1; n <= 2; n++) {
    assertEquals(await post(other, token, n, "TEXT 2\r\nhi\r\n"), 204);
    const isQuiet = () => wire.said === (wire.said = 0);
    await until(isQuiet, { interval: 500 }); // nothing more is said while all is well
    wire.isDeaf = true;
    const said = () => other.errors.filter((error) => error === DEAF).length;
    await until(async () => {
      assertEquals(await post(other, STRANGER, 1, "TEXT 2\r\nhi\r\n"), 503);
      return said() === n;
    });
    await sleep(2_600, t.signal); // all would be gone
    assertEquals(await post(other, token, n + 1, "TEXT 2\r\nhi\r\n"), 503);
    assertEquals(said(), n);
    if (n === 2) { // nor does it stay deaf where it could not even speak for a while
      wire.isDown = true;
      other.ws.publish("none", "");
      await until(() => other.errors.some((error) => error.startsWith("publish: it is down")));
      wire.isDown = false;
    }
    wire.isDeaf = false;
    await until(async () => await post(other, token, n + 1, "TEXT 2\r\nhi\r\n") === 204);
  }
  assertEquals(one.errors, []);
  assert(
    other.errors.every((error) =>
      /^(subscribe|publish: it is down|delivery: No answer)/.test(error)
    ),
  );
  // Who hears knows who is gone.
  await until(async () => await post(other, STRANGER, 1, "TEXT 2\r\nhi\r\n") === 404);
}, { timeout: 40_000 });

test(
  "who is deaf knows it though nobody asks, and nobody takes it for gone",
  async (t) => {
    const { one, other, wires } = await quickToLose(t);
    const wire = wires[0]!;
    const { token } = await wireClient(t, one.url);
    const ask = () => post(other, token, 1, "TEXT 2\r\nhi\r\n");
    wire.isDeaf = true;
    await until(() => one.errors.includes(DEAF));
    const gone = performance.now() + 4_000;
    while (performance.now() < gone) assertEquals(await ask(), 503);
    wire.isDeaf = false;
    await until(async () => await ask() === 204);
    assertEquals(one.errors.filter((error) => error === DEAF).length, 1);
  },
  { timeout: 40_000 },
);

test("who is deaf does not know that a session of who has left is nowhere", async (t) => {
  const wires = memoryRedis(2);
  const [one, other] = await Promise.all(
    wires.map((client) => start(t, sharded({ client, channel: "x" }))),
  ) as Instance[];
  const { token } = await wireClient(t, one!.url);
  const ask = () => post(other!, token, 1, "TEXT 2\r\nhi\r\n");
  assertEquals(await ask(), 204); // and now it would be told a farewell
  for (const peers of one!.ws.peers.values()) for (const peer of peers) peer.terminate();
  await one!.ws.close(1012);
  const isOver = async () => await ask() === 404;
  await until(isOver, { timeout: 15_000 }); // once the farewell has come
  wires[1]!.isDeaf = true;
  // The first answer has stayed for a while.
  await until(async () => await ask() === 503, { timeout: 15_000 });
  wires[1]!.isDeaf = false;
  await until(isOver, { timeout: 15_000 });
}, { timeout: 60_000 });

test("a farewell that its instance does not hear ends no session of it", async (t) => {
  const bus = new MemoryBus(t, { fault: ({ topic }) => topic === "*" && !isAsking ? [] : [0] });
  let isAsking = false;
  const ids: string[] = [];
  const [owner, other] = await Promise.all([0, 1].map(() =>
    start(t, (context) => {
      ids.push(context.id);
      return bus.adapter(context);
    }, { timeout: 500 })
  )) as Instance[];
  const { token } = await wireClient(t, owner!.url);
  const instance = token.slice(0, 16);
  const secret = "a".repeat(32);
  const commitment = createHash("sha256").update(`duplex-sse presence ${secret}`).digest("hex");
  const topic = ids.find((id) => id !== instance)!;
  for (const said of [{ kind: "present", commitment }, { kind: "bye", secret }]) {
    const data = await message(STRANGER, { ...said, instance });
    bus.inject({ namespace: "\0duplex", topic, data });
    const known = said.kind === "present" ? 1 : 0;
    await until(() => other!.ws.stats().cluster!.instances === known);
  }
  isAsking = true;
  assertEquals(await post(other!, token, 1, "TEXT 2\r\nhi\r\n"), 204);
});

test("a message that is all head costs no time", async (t) => {
  let deliver!: (message: SyncMessage) => void;
  const adapter = () => ({
    subscribe: (given: typeof deliver) => void (deliver = given),
    publish: () => {},
  });
  const { errors } = await start(t, adapter);
  const size = 16 * 1024 * 1024 - 36;
  const data = new Uint8Array(61 + size).fill("[".charCodeAt(0), 61);
  data[0] = data[24] = 1;
  new DataView(data.buffer).setUint32(57, size);
  const begin = performance.now();
  deliver({ namespace: "\0duplex", topic: "*", data });
  assertLess(performance.now() - begin, 500, "ms to parse what nobody vouches for");
  assertEquals(errors, ["delivery: Garbage on the backplane"]);
});

/** Instead of 100,000, which takes a busy machine longer than the minute for which they are remembered. */
const MOST = 2_000;

/** The module as it is, but for its limits. */
async function changed(t: TestContext, limits: Record<string, string>): Promise<typeof cluster> {
  let code = await readFile(join(root, "cluster.ts"), "utf8");
  for (const [limit, other] of Object.entries(limits)) {
    assertEquals(code.split(`\nconst ${limit};`).length, 2, limit);
    code = code.replace(`\nconst ${limit};`, `\nconst ${other};`);
  }
  const folder = await mkdtemp(join(tmpdir(), "duplex-cluster-"));
  t.defer(() => rm(folder, { recursive: true }));
  const file = join(folder, "cluster.ts");
  await writeFile(file, code.replace(/(?<=from ")\.(?=\/)/g, pathToFileURL(root).href));
  return (await import(pathToFileURL(file).href)).cluster;
}

/** An instance that is given as many of a session's requests as it remembers. */
async function flooded(t: TestContext) {
  const cluster = await changed(t, { "MAX_SEEN = 100_000": `MAX_SEEN = ${MOST}` });
  const errors: string[] = [];
  const got: string[] = [];
  const answers: number[] = [];
  let deliver!: (message: SyncMessage) => void;
  let spare = false;
  let spared = 0;
  const routed = cluster(() => ({
    subscribe: (given) => void (deliver = given),
    publish({ data }) {
      const status = /"kind":"answer".*"status":(\d+)/.exec(Buffer.from(data).toString("latin1"));
      if (status) answers.push(Number(status[1]));
    },
  }));
  const sync: SyncAdapter = (context) => {
    const router = routed(context) as RoutingDriver;
    const attach = router.attach.bind(router);
    // A request is remembered before it is served, which can be left out.
    const fetch: typeof host.fetch = async (request, namespace) => {
      if (!spare) return await host.fetch(request, namespace);
      spared++;
      throw new Error("spared");
    };
    let host: Parameters<typeof attach>[0];
    router.attach = (given) => attach({ ...host = given, fetch });
    return router;
  };
  const { url } = await listen(t, {
    sync,
    onError: (error) => void errors.push((error as Error).message),
    hooks: { message: (_, message) => void got.push(message.text()) },
  });
  const { token } = await wireClient(t, url);
  const { session } = await request(token);
  const key = createHash("sha256").update(`duplex-sse key ${token.slice(17)}`).digest();
  /** As {@link message}, but without waiting for anything. */
  const sign = (method: string, headers: Record<string, string>, body = "") => {
    const id = randomBytes(16).toString("hex");
    const time = Date.now();
    const head = { kind: "request", id, from: "f".repeat(16), session, time, method, headers };
    const text = Buffer.from(JSON.stringify({ ...head, namespace: "/" }));
    const signed = Buffer.concat([Buffer.alloc(4), text, Buffer.from(body)]);
    signed.writeUInt32BE(text.length);
    const mac = createHmac("sha256", key).update(signed).digest();
    const first = Buffer.from([1, ...randomBytes(16), 0, 0, 0, 0, 0, 0, 0, 1]);
    return new Uint8Array(Buffer.concat([first, mac, signed]));
  };
  const inject = (data: Uint8Array) =>
    deliver({ namespace: "\0duplex", topic: token.slice(0, 16), data });
  const flood = async (method: string, headers: Record<string, string>, count: number) => {
    spare = true;
    crypto.subtle.verify = () => Promise.resolve(true); // takes the longest by far
    for (let n = 0; n < count; n++) {
      inject(sign(method, headers));
      if (n % 1000 === 0) await new Promise((resolve) => setTimeout(resolve));
    }
    await until(() => spared === count, { timeout: 30_000 });
    await new Promise((resolve) => setTimeout(resolve, 1_050)); // reports are rare
    spare = false;
    Reflect.deleteProperty(crypto.subtle, "verify");
    errors.length = 0;
  };
  return { errors, got, answers, sign, inject, flood };
}

const UPLINK_HEADERS = { "content-type": "application/websocket-events" };

test("the oldest of too many uplinks is forgotten, and its messages are not", async (t) => {
  const { errors, got, answers, sign, inject, flood } = await flooded(t);
  const first = sign("POST", UPLINK_HEADERS, "SEQ 1\r\n1\r\nTEXT 2\r\nhi\r\n");
  const second = sign("POST", UPLINK_HEADERS, "SEQ 1\r\n2\r\nTEXT 3\r\nyou\r\n");
  inject(first);
  await until(() => answers.length === 1, { timeout: 30_000 });
  inject(second);
  await until(() => answers.length === 2, { timeout: 30_000 });
  await flood("POST", UPLINK_HEADERS, MOST - 1);
  inject(second);
  await until(() => errors.length === 1);
  assertMatch(errors[0]!, /replayed/);
  assertEquals(answers, [204, 204]);
  inject(first);
  await until(() => answers.length === 3, { timeout: 30_000 });
  assertEquals([answers[2], got], [204, ["hi", "you"]], "served again: its numbers are old");
  inject(sign("GET", {})); // others have their own room
  await until(() => answers.length === 4, { timeout: 30_000 });
  assertEquals(answers[3], 400);
}, { timeout: 60_000 });

test("of too many other requests the next are refused, until a minute is over", async (t) => {
  const { errors, got, answers, sign, inject, flood } = await flooded(t);
  const first = sign("GET", {});
  inject(first);
  await until(() => answers.length === 1, { timeout: 30_000 });
  await flood("GET", {}, MOST - 1);
  inject(sign("GET", {}));
  await until(() => errors.length === 1);
  assertMatch(errors[0]!, /^Too many requests to tell them from replayed ones/);
  inject(sign("POST", UPLINK_HEADERS, "SEQ 1\r\n1\r\nTEXT 2\r\nhi\r\n"));
  await until(() => answers.length === 2, { timeout: 30_000 });
  assertEquals([answers, got], [[400, 204], ["hi"]], "uplinks go on");
  const { now } = performance;
  t.defer(() => performance.now = now);
  performance.now = () => now.call(performance) + 61_000;
  await until(() => {
    if (answers.length < 3) inject(sign("GET", {}));
    return answers.length > 2;
  }, { interval: 100 });
}, { timeout: 60_000 });

test(
  "a flood of messages that stay incomplete costs bounded memory, and nobody's message",
  async (t) => {
    const bus = new MemoryBus(t, { limit: 8000 });
    const [one, other] = await Promise.all(
      [0, 1].map(() => start(t, bus.adapter, { maxPayload: 8000, timeout: 60_000 })),
    ) as [Instance, Instance];
    const { token } = await wireClient(t, one.url);
    const topic = token.slice(0, 16);
    const before = process.memoryUsage().rss;
    for (let n = 0; n < 3_000; n++) {
      const data = crypto.getRandomValues(new Uint8Array(100));
      new DataView(data.buffer).setUint32(17, n % 60_000);
      new DataView(data.buffer).setUint32(21, 60_000); // of so many fragments
      data[0] = 1;
      bus.inject({ namespace: "\0duplex", topic, data });
    }
    const large = `TEXT ${(50_000).toString(16)}\r\n${"x".repeat(50_000)}\r\n`;
    assertEquals(await post(other, token, 1, large), 204);
    assertEquals(one.got, ["x".repeat(20)]);
    const megabytes = (process.memoryUsage().rss - before) / 2 ** 20;
    assertLess(megabytes, 500, "480 kB each, if room were made for all that are announced");
  },
  { timeout: 30_000 },
);

test("a relayed stream that is superseded before its first byte just ends", async (t) => {
  const bus = new MemoryBus(t);
  const gate = deferred();
  let held = false;
  const slow: ClusterAdapter = (context) => {
    const driver = bus.adapter(context);
    return {
      ...driver,
      async publish(message: SyncMessage) {
        await driver.publish(message);
        if (held && new TextDecoder().decode(message.data as Uint8Array).includes('"answer"')) {
          await gate.promise;
        }
      },
    };
  };
  const [owner, two, three] = await Promise.all([0, 1, 2].map(() => start(t, slow))) as [
    Instance,
    Instance,
    Instance,
  ];
  const { token } = await wireClient(t, owner.url);
  const resume = ({ url }: Instance, attempt: number) =>
    fetch(url, {
      headers: {
        accept: "text/event-stream",
        "x-crossws-id": token,
        "x-duplex-version": "1",
        "x-duplex-attempt": `${attempt}`,
        "last-event-id": "0",
      },
    });
  held = true;
  const first = resume(two, 1);
  await until(() => bus.payloads.length === 2); // the request, and the head of the answer
  held = false;
  const second = await resume(three, 2);
  gate.resolve();
  await within(first.then((response) => response.text()), 2_000, "the end of the first");
  assertEquals(second.status, 200);
  await second.body!.cancel();
  assertEquals([owner.errors, two.errors, three.errors], [[], [], []]);
});
