/**
 * Nothing is waited for without an end: at the end of an instance or of a client, whatever another
 * instance, a backplane, a store, a body or a hook is still to say, and says never.
 */
import { cluster } from "../cluster.ts";
import { pgsql, type PostgresClient, redis, type RedisClient } from "../drivers.ts";
import { type MoveHead, Moves } from "../handover.ts";
import { parking, type ParkingStore, type Quay } from "../parking.ts";
import { chatHooks } from "../ai.ts";
import { type SSEAdapter, sseAdapter, type SyncMessage } from "../server.ts";
import { MemoryBus, textOf } from "./bus.ts";
import { idle } from "./handover.model.ts";
import {
  assertEquals,
  assertLess,
  binary,
  deferred,
  runtime,
  sleep,
  test,
  until,
  within,
} from "./harness.ts";
import { adapter } from "./pair.ts";
import { MemoryStore } from "./store.ts";
import { FULL, UPLINK, WireClient } from "./wire.ts";

const never = () => new Promise<never>(() => {});
const soon = () => AbortSignal.abort();

/** An instance's client by hand, without a network. */
const clientOf = (ws: SSEAdapter) => WireClient.open((request) => ws.fetch(request), "http://x/");

/** How long something takes, in ms. */
async function time(doing: Promise<unknown>): Promise<number> {
  const begun = performance.now();
  await within(doing, 9_000, "an end");
  return performance.now() - begun;
}

/** What the process of tests/fixtures/ends.ts says until it ends by itself. */
const ends = {
  alone: ["1006", "ended"],
  cluster: ["1006", "ended"],
  client: ["ended"],
  host: ["ended"],
  deaf: ["ended"],
  chat: ["ended"],
};

for (const name of [runtime as "deno" | "bun", "node-20"] as const) {
  for (const [what, lines] of Object.entries(ends)) {
    if (name === "node-20" && runtime === "bun") continue; // once will do
    const skip = binary(name) ? undefined : `${name} is not installed`;
    test(
      `a process that only waits for an end (${what}) sees it, and ends (${name})`,
      async (t) => {
        const begun = performance.now();
        const child = await t.spawn(name, "tests/fixtures/ends.ts", { args: [what] });
        const said: string[] = [];
        for await (const line of child.lines()) said.push(line);
        assertEquals(said, lines);
        assertEquals((await child.exited).code, 0);
        assertLess(performance.now() - begun, 8_000);
      },
      { skip, timeout: 20_000 },
    );
  }
}

test("a backplane that does not close keeps no server from its end", async (t) => {
  const errors: string[] = [];
  const make = () =>
    sseAdapter({
      sync: () => ({ subscribe() {}, publish() {}, close: never }),
      onError: (error) => void errors.push((error as Error).message),
    });
  const patient = make().close();
  assertLess(await time(make().close(1001, "", { signal: soon() })), 2_000);
  const late = new AbortController();
  const closing = make().close(1001, "", { signal: late.signal });
  await sleep(50, t.signal);
  late.abort();
  assertLess(await time(closing), 2_000);
  assertEquals(errors, [], "who is in a hurry knows");
  await patient;
  assertEquals(errors, ["The backplane does not close"]);
}, { timeout: 15_000 });

test("nor does one that fails to", async () => {
  const errors: string[] = [];
  const ws = sseAdapter({
    sync: () => ({ subscribe() {}, publish() {}, close: () => Promise.reject(new Error("gone")) }),
    onError: (error) => void errors.push((error as Error).message),
  });
  await ws.close();
  assertEquals(errors, ["gone"]);
});

for (
  const [step, calls] of [
    ["put", ["suspend", "revive", "close 1006"]],
    ["pointer", ["suspend"]], // it may be found there
  ] as const
) {
  test(`a store that takes a ${step} for ever keeps no instance that is in a hurry`, async (t) => {
    const told: string[] = [];
    const store = new MemoryStore();
    let puts = 0;
    store.fault = (_step, _key, go) => step === "put" || puts++ ? never() : go();
    const ws = adapter(t, {
      sync: cluster(new MemoryBus(t).adapter, { parking: parking(store) }),
      onError() {},
      hooks: {
        suspend: () => void told.push("suspend"),
        revive: () => void told.push("revive"),
        close: (_, { code }) => void told.push(`close ${code}`),
      },
    });
    await clientOf(ws);
    assertLess(await time(ws.close(1001, "", { signal: soon() })), 1_500);
    assertEquals(told, [...calls]);
  });
}

test("a store that takes little time parks the sessions of who is in a hurry", async (t) => {
  const store = new MemoryStore();
  store.fault = async (_step, _key, go) => (await sleep(20, t.signal), go());
  const ws = adapter(t, {
    sync: cluster(new MemoryBus(t).adapter, { parking: parking(store) }),
    hooks: { revive() {} },
  });
  await clientOf(ws);
  await ws.close(1001, "", { signal: soon() });
  assertEquals(store.values.size, 2);
});

/** What parking needs of an instance with one session, which is away. */
function quayOf(pack: Quay["host"]["pack"]): Quay {
  return {
    instance: "a".repeat(16),
    host: { resumeTimeout: 30_000, pack, restore() {}, release() {}, report() {} },
    ...{ now: () => Date.now(), wake() {}, counts: () => ({}), asks: () => true },
    ...{ take: () => Promise.resolve(true), confirm() {} },
    encodePacked: () => new Uint8Array(1),
    digest: () => Promise.resolve(new Uint8Array(32)),
    seal: (_token, bytes) => Promise.resolve(bytes),
    unseal: (_token, bytes) => Promise.resolve(bytes),
  };
}

const PACKED = {
  ...{ id: "", namespace: "/", marks: [], context: {}, protocol: "", topics: [], frames: [] },
  ...{ attempt: 0, heartbeatInterval: 1, received: 0, handled: 0, firstUnacked: 1, nextUngiven: 1 },
};

for (let turns = 0; turns < 8; turns++) {
  test(`hooks that settle ${turns} turns after they were found at work have their session parked`, async () => {
    const token = `${"a".repeat(24)}.b`;
    const store = new MemoryStore();
    let packs = 0;
    const settle = async () => {
      for (let turn = 0; turn < turns; turn++) await undefined;
      parked.stir(token);
    };
    const parked = parking(store, { whenAway: true })(quayOf(() => {
      if (packs++) return PACKED;
      settle();
      return "busy";
    }));
    parked.away(token);
    await until(() => packs === 2 && parked.size === 1);
  });
}

test("what a store gives to an instance that ends goes back there", async () => {
  const store = new MemoryStore();
  const token = `${"a".repeat(24)}.b`;
  const quay = quayOf(() => ({ ...PACKED, marks: ["a".repeat(24)] }));
  await parking(store)(quay).park(token, true);
  const before = new Set(store.values.keys());
  const asked = parking(store)({ ...quay, take: () => Promise.resolve(false) });
  await asked.look({ session: "s", namespace: "/" }, token);
  const after = [...store.values.keys()];
  assertEquals(after.length, 2);
  assertEquals(after.filter((key) => before.has(key)).length, 1, "under another name");
});

test("who has waited for a store at the end of its instance leaves no timer", async () => {
  const store: ParkingStore = { put: never, take: never };
  const parked = parking(store)(quayOf(() => PACKED));
  const looking = parked.look({ session: "s", namespace: "/" }, `${"a".repeat(24)}.b`);
  const pending = parked.park(`${"a".repeat(24)}.c`, true);
  await sleep(0);
  parked.hurry();
  assertEquals(await within(looking, 500, "the look"), false);
  await within(pending, 500, "the parking");
});

test(
  "an instance that ends takes no session that comes too late, and its giver has it again",
  async (t) => {
    const told: string[] = [];
    const held = deferred();
    const bus = new MemoryBus(t);
    let deliver!: () => void;
    let isDelivered = false;
    const [a, b] = [0, 1].map((at) => {
      const { adapter: connect } = bus;
      return adapter(t, {
        ...{ resumeTimeout: 1_000, heartbeatInterval: 200 },
        sync: cluster((context) => {
          const driver = connect(context);
          return {
            ...driver,
            subscribe: (take) =>
              driver.subscribe((message) => {
                if (at === 1 && isOf(message, "have") && !isDelivered) return;
                if (at !== 1 || !isOf(message, "state")) return take(message);
                deliver = () => take(message);
                held.resolve();
              }),
          };
        }),
        hooks: {
          open: () => void told.push(`open ${at}`),
          revive: () => void told.push(`revive ${at}`),
          close: (_, { code }) => void told.push(`close ${at} ${code}`),
        },
      });
    }) as [SSEAdapter, SSEAdapter];
    const other = await clientOf(b); // it does not answer the close, which lasts as long as that
    const { token } = await clientOf(a);
    const resumption = (attempt: number) =>
      new Request("http://x/", {
        headers: {
          ...{ ...FULL, "x-crossws-id": token },
          ...{ "x-duplex-attempt": `${attempt}`, "last-event-id": "0" },
        },
      });
    const asking = b.fetch(resumption(1));
    await held.promise;
    const closing = b.close(1012);
    await until(() =>
      !b.peers.size || [...b.peers.values()].every((peers) => everyIsClosing(peers))
    );
    deliver();
    isDelivered = true;
    await (await within(asking, 5_000, "the answer")).body!.cancel(); // relayed, or 503
    await until(() => told.includes("revive 0"));
    const back = await a.fetch(resumption(2));
    assertEquals(back.status, 200);
    await back.body!.cancel();
    await within(closing, 5_000, "the end");
    await other.events.cancel();
    assertEquals(told.filter((call) => call.endsWith(" 1") && call !== "open 1"), []);
  },
  { timeout: 15_000 },
);

test("an instance that ends refuses a body for another's session that does not come to its end", async (t) => {
  const bus = new MemoryBus(t);
  const [a, b] = [0, 1].map(() => adapter(t, { sync: cluster(bus.adapter) })) as SSEAdapter[];
  const { token, events } = await clientOf(a!);
  t.defer(() => events.cancel());
  const reading = deferred();
  const body = new ReadableStream({ pull: () => (reading.resolve(), never()) }, {
    highWaterMark: 0,
  });
  const headers = { ...UPLINK, ...FULL, accept: "*/*", "x-crossws-id": token };
  const sending = b!.fetch(
    new Request("http://x/", {
      ...{ method: "POST", headers: { ...headers, "content-length": "10" } },
      ...{ body, duplex: "half" } as RequestInit,
    }),
  );
  await reading.promise;
  await b!.close();
  assertEquals((await within(sending, 500, "the answer")).status, 503);
});

test("a body that is under way as its session is given away is answered that it moves", async (t) => {
  const bus = new MemoryBus(t);
  const [a, b] = [0, 1].map(() =>
    adapter(t, { sync: cluster(bus.adapter), hooks: { revive() {} } })
  ) as SSEAdapter[];
  const { token } = await clientOf(a!);
  const reading = deferred();
  const body = new ReadableStream({ pull: () => (reading.resolve(), never()) }, {
    highWaterMark: 0,
  });
  const own = { ...UPLINK, ...FULL, accept: "*/*", "x-crossws-id": token, "content-length": "10" };
  const init = { method: "POST", headers: own, body, duplex: "half" } as RequestInit;
  const sending = a!.fetch(new Request("http://x/", init));
  await reading.promise;
  const headers = { ...FULL, "x-crossws-id": token, "x-duplex-attempt": "1", "last-event-id": "0" };
  const streams = await b!.fetch(new Request("http://x/", { headers }));
  t.defer(() => streams.body!.cancel());
  const answer = await within(sending, 500, "the answer");
  assertEquals([answer.status, answer.headers.get("x-duplex-received")], [503, "0"]);
});

test("an instance that ends does not wait for a backplane that takes no more", async (t) => {
  let isStuck = false;
  const bus = new MemoryBus(t, { settled: () => isStuck ? never() : Promise.resolve() });
  const [a, b] = [0, 1].map(() => {
    return adapter(t, { sync: cluster(bus.adapter), onError() {} });
  }) as SSEAdapter[];
  const { token } = await clientOf(a!);
  const headers = { ...FULL, "x-crossws-id": token, "x-duplex-attempt": "1", "last-event-id": "0" };
  const streams = await b!.fetch(new Request("http://x/", { headers }));
  t.defer(() => streams.body!.cancel());
  await until(() => a!.stats().cluster!.served === 1);
  isStuck = true;
  while (a!.stats().cluster!.pending < 1_024) a!.publish("all", "x");
  for (const peer of [...a!.peers.values()].flatMap((peers) => [...peers])) peer.send("x");
  await sleep(50, t.signal);
  assertLess(await time(a!.close(1001, "", { signal: soon() })), 2_500);
});

/** Of ioredis, when no server is there: nothing is answered, and no end is told. */
test("a Redis that is away is waited for no longer, and its connection ends", async () => {
  let isEnded = false;
  const subscriber = {
    ...{ ssubscribe: never, sunsubscribe: never, on() {}, status: "reconnecting" },
    disconnect: () => void (isEnded = true),
  };
  const client: RedisClient = { ...subscriber, spublish: never, duplicate: () => subscriber };
  const driver = redis({ client, channel: "x" })({ id: "a" });
  driver.join({ namespace: "/", topic: "t" });
  await within(driver.close(), 4_000, "closing");
  assertEquals(isEnded, true);
});

test("an instance that ends tells whom it has asked for a session that it takes none", async () => {
  const sent: [string, MoveHead][] = [];
  const say = (to: string, head: MoveHead) => void sent.push([to, head]);
  const moves = new Moves<string>("here", 5_000, 30_000, idle(say));
  const asking = moves.adopt("session", "there", { attempt: 1, received: 0, namespace: "/" });
  const [[, { id }]] = sent as [[string, MoveHead]];
  moves.close();
  await within(asking, 500, "the adoption");
  const taken = { kind: "taken", id, session: "session", from: "here", yes: false };
  assertEquals(sent.slice(1), [["there", taken as MoveHead]]);
});

test("a channel that is being joined as its driver closes is left", async () => {
  const joining = deferred();
  const told: string[] = [];
  const client: PostgresClient = {
    async listen() {
      await joining.promise;
      return { unlisten: () => Promise.resolve(told.push("left")) };
    },
    unsafe: never,
  };
  const driver = pgsql({ client, channel: "x" })({ id: "a" });
  const join = driver.join({ namespace: "\0x", topic: "t" });
  const closing = driver.close();
  joining.resolve();
  await join;
  await within(closing, 4_000, "closing");
  assertEquals(told, ["left"]);
});

test("a subscription that stands after its instance has ended joins nothing", async (t) => {
  const subscribing = deferred();
  const joined: string[] = [];
  const ws = adapter(t, {
    sync: cluster(() => ({
      ...{ subscribe: () => subscribing.promise, publish() {}, leave() {}, close() {} },
      join: ({ topic }) => void joined.push(topic),
    })),
  });
  await ws.close(1001, "", { signal: soon() });
  subscribing.resolve();
  await sleep(0);
  assertEquals(joined, []);
});

test("chats are settled though nobody takes what they say", async () => {
  const silent = () => ({ subscribe() {}, publish: never, close: never });
  const make = () => chatHooks({ sync: silent, respond: () => new ReadableStream() });
  const late = new AbortController();
  const settling = make().settled({ signal: late.signal }).catch(() => "aborted");
  late.abort();
  assertEquals(await within(settling, 500, "settling"), "aborted");
});

const everyIsClosing = (peers: Iterable<{ websocket: { readonly readyState?: number } }>) =>
  [...peers].every(({ websocket }) => websocket.readyState === 2);

function isOf(message: SyncMessage, kind: string): boolean {
  return textOf(message).includes(`"kind":"${kind}"`);
}
