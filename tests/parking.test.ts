/**
 * Sessions that wait in a store while no instance has them: parked by an instance that ends, or
 * that may be frozen, and taken by the one that their client comes to. The store may fail at each
 * step, and anybody may read and write there.
 */
import { cluster } from "../cluster.ts";
import { parking, type ParkingOptions, type Quay } from "../parking.ts";
import type { Peer, SSEOptions } from "../server.ts";
import { MemoryBus, type RoundRobin, roundRobin } from "./bus.ts";
import {
  assert,
  assertEquals,
  assertGreater,
  assertLess,
  assertLessOrEqual,
  assertMatch,
  assertThrows,
  deferred,
  sleep,
  test,
  type TestContext,
  until,
} from "./harness.ts";
import { listen, type Pair } from "./pair.ts";
import { MemoryStore } from "./store.ts";
import { ack, type WireClient, wireClient } from "./wire.ts";

interface Fleet {
  readonly bus: MemoryBus;
  readonly store: MemoryStore;
  readonly instances: Pair<Record<string, unknown>>[];
  readonly told: string[];
  readonly errors: string[];
  readonly proxy: RoundRobin;
  /** Instances to which the backplane brings nothing. */
  readonly deaf: Set<number>;
  start(): Promise<void>;
}

/** Instances that count a session's messages in its context, and echo them. */
async function start(
  t: TestContext,
  { count = 2, resumeTimeout = 30_000, patience = 5_000, server = {}, work, without, ...options }:
    & ParkingOptions
    & {
      count?: number;
      resumeTimeout?: number;
      patience?: number;
      server?: SSEOptions<Record<string, unknown>>;
      /** What message hooks wait for. */
      work?: () => Promise<void>;
      /** The instance that has no store. */
      without?: number;
    } = {},
): Promise<Fleet> {
  t.defer(() => sleep(50)); // last of all, what is being sealed
  const store = new MemoryStore();
  const deaf = new Set<number>();
  const ids: string[] = [];
  const bus = new MemoryBus(t);
  const told: string[] = [];
  const errors: string[] = [];
  const instances: Pair<Record<string, unknown>>[] = [];
  const launch = async () => {
    const at = instances.length;
    const pair: Pair<Record<string, unknown>> = await listen(t, {
      resumeTimeout,
      heartbeatInterval: 1_000,
      ...server,
      sync: cluster((context) => {
        ids.push(context.id);
        const driver = bus.adapter(context);
        return {
          ...driver,
          subscribe: (deliver) =>
            driver.subscribe((message) => deaf.has(at) ? undefined : deliver(message)),
        };
      }, {
        timeout: patience,
        ...at !== without && { parking: parking(store, options) },
      }),
      onError: (error) => void errors.push((error as Error).message),
      hooks: {
        open(peer) {
          told.push(`open ${at}`);
          peer.context.count = 0;
          peer.subscribe("all");
        },
        message(peer, message) {
          const count = peer.context.count as number + 1;
          peer.context.count = count;
          peer.send(`${message.text()} ${count} at ${at}`);
          return work?.();
        },
        close: (_, { code }) => void told.push(`close ${at} ${code}`),
        suspend: () => void told.push(`suspend ${at}`),
        revive: () => void told.push(`revive ${at}`),
      },
    });
    instances.push(pair);
    await sleep(50, t.signal); // subscriptions tell nobody when they stand
  };
  for (let at = 0; at < count; at++) await launch();
  const proxy = await roundRobin(t, instances.map(({ port }) => port));
  proxy.choose = () => 0;
  return {
    ...{ bus, store, instances, told, errors, proxy, deaf },
    async start() {
      await launch();
      proxy.ports.push(instances.at(-1)!.port);
    },
  };
}

function peersOf({ ws }: Pair<Record<string, unknown>>): Peer<Record<string, unknown>>[] {
  return [...ws.peers.values()].flatMap((peers) => [...peers]);
}

/** The client is away, and its instance knows that. */
async function leave(instance: Pair<Record<string, unknown>>, client: WireClient): Promise<void> {
  await client.drop();
  await until(() => {
    for (const peer of peersOf(instance)) peer.ping(); // Deno looks then
    return !instance.ws.stats().sessions.connected;
  });
}

/** Waits until the instances know each other, and shuts one down. */
async function close({ instances }: Fleet, at: number): Promise<void> {
  const others = instances.filter((_, n) => n !== at);
  await until(() => others.every(({ ws }) => ws.stats().cluster!.instances > 0));
  await instances[at]!.ws.close(1012);
  await until(() => others.every(({ ws }) => ws.stats().cluster!.instances < others.length));
}

const counts = ({ ws }: Pair<Record<string, unknown>>) => {
  const { sessions, movedIn, movedOut, cluster } = ws.stats();
  return { ...sessions, movedIn, movedOut, parked: cluster!.parked };
};

test("a session whose client is away at a shutdown is taken up by another instance", async (t) => {
  const fleet = await start(t);
  const { instances, told, proxy, errors, store } = fleet;
  const [a, b] = instances as [Pair<never>, Pair<never>];
  const client = await wireClient(t, `${proxy.url}/room`);
  assertEquals(await client.send("one"), 204);
  assertEquals(await client.message(), "one 1 at 0");
  await leave(a, client);
  a.ws.publish("all", "meanwhile");
  const begun = performance.now();
  await close(fleet, 0);
  assertLess(performance.now() - begun, 4_000, "nobody is waited for");
  assertEquals(counts(a), {
    ...{ connected: 0, away: 0, closing: 0, moving: 0, movedIn: 0, movedOut: 1, parked: 0 },
  });
  assertEquals(store.values.size, 2);
  proxy.choose = () => 1;
  assertEquals(await client.send("early"), 503, "until the client has come back");
  client.seq = 2;
  const back = t.use(await client.resume(1, 1));
  assertEquals(await back.message(), "meanwhile");
  assertEquals(await back.send("two"), 204);
  assertEquals(await back.message(), "two 2 at 1");
  assertEquals(told, ["open 0", "suspend 0", "revive 1"]);
  assertEquals([counts(b).connected, counts(b).movedIn, store.values.size], [1, 1, 0]);
  assertEquals(errors, []);
});

test("a client that does not go at a shutdown is parked, too, and comes back later", async (t) => {
  const { instances, told, proxy, start: launch } = await start(t, { count: 1 });
  const client = await wireClient(t, `${proxy.url}/room`);
  await client.send("one");
  const begun = performance.now();
  await instances[0]!.ws.close(1012); // nobody else is there
  assertLess(performance.now() - begun, 3_000, "who is alone waits for nobody");
  assertEquals(await client.message(), "one 1 at 0");
  assertEquals(await client.next(), undefined, "the stream has ended, without a close");
  await launch();
  proxy.choose = () => 1;
  const back = t.use(await client.resume(1, 1));
  await back.send("two");
  assertEquals(await back.message(), "two 2 at 1");
  assertEquals(told, ["open 0", "suspend 0", "revive 1"]);
});

test("where instances may freeze, a session is parked as its client leaves, and who thaws does nothing to it", async (t) => {
  const work: Promise<void>[] = [];
  const waitUntil = (parking: Promise<void>) => void work.push(parking);
  const fleet = await start(t, { count: 3, whenAway: true, waitUntil });
  const { instances: [a, b], told, proxy, errors, deaf, store } = fleet;
  const client = await wireClient(t, `${proxy.url}/room`);
  await client.send("one");
  await client.message();
  await leave(a!, client);
  assertEquals(work.length, 1);
  await Promise.all(work);
  assertEquals([counts(a!).parked, counts(a!).moving, store.values.size], [1, 0, 2]);
  deaf.add(0); // it is frozen
  proxy.choose = () => 1;
  const back = t.use(await client.resume(1, 1));
  await back.send("two");
  assertEquals(await back.message(), "two 2 at 1");
  deaf.delete(0); // it thaws, and has not been told
  assertEquals(counts(a!).parked, 1);
  // What comes there finds the session where it is.
  proxy.choose = () => 0;
  assertEquals(await back.send("three"), 204);
  assertEquals(await back.message(), "three 3 at 1");
  const home = t.use(await client.resume(2, 3));
  await home.send("four");
  assertEquals(await home.message(), "four 4 at 0");
  assertEquals(counts(a!).parked, 0);
  assertEquals(told, ["open 0", "suspend 0", "revive 1", "suspend 1", "revive 0"]);
  assertEquals([peersOf(b!).length, errors], [0, []]);
});

for (const how of ["once they have settled", "unless it comes back"] as const) {
  test(`a session whose hooks are at work as its client leaves is parked ${how}`, async (t) => {
    const parked: Promise<void>[] = [];
    const hook = deferred<void>();
    const { instances: [a], told, proxy, errors, deaf } = await start(t, {
      ...{ whenAway: true, waitUntil: (work) => void parked.push(work) },
      work: () => hook.promise,
    });
    const client = await wireClient(t, `${proxy.url}/room`);
    await client.send("one");
    await client.message();
    await leave(a!, client);
    await sleep(50, t.signal);
    assertEquals([counts(a!).away, parked.length], [1, 1]);
    if (how === "unless it comes back") {
      t.use(await client.resume(1, 1));
      await Promise.all(parked);
      hook.resolve();
      await sleep(50, t.signal);
      assertEquals([counts(a!).connected, told], [1, ["open 0"]]);
    } else {
      hook.resolve();
      await Promise.all(parked);
      assertEquals(counts(a!).parked, 1);
      deaf.add(0); // it is frozen
      proxy.choose = () => 1;
      const back = t.use(await client.resume(1, 1));
      await back.send("two");
      assertEquals(await back.message(), "two 2 at 1");
      assertEquals(told, ["open 0", "suspend 0", "revive 1"]);
    }
    assertEquals(errors, []);
  });
}

test("hooks that are at work at a shutdown are waited for, and their session is parked", async (t) => {
  const hook = deferred<void>();
  const { instances, told, proxy, start: launch } = await start(t, {
    count: 1,
    work: () => hook.promise,
  });
  const client = await wireClient(t, `${proxy.url}/room`);
  await client.send("one");
  await client.message();
  await leave(instances[0]!, client);
  const closed = instances[0]!.ws.close(1012);
  await sleep(500, t.signal); // it has found out that it is alone
  assertEquals(told, ["open 0"]);
  hook.resolve();
  await closed;
  await launch();
  proxy.choose = () => 1;
  const back = t.use(await client.resume(1, 1));
  await back.send("two");
  assertEquals(await back.message(), "two 2 at 1");
  assertEquals(told, ["open 0", "suspend 0", "revive 1"]);
});

test("a client that comes back to the instance that has parked its session finds it there", async (t) => {
  const { instances: [a], told, proxy, store } = await start(t, { whenAway: true });
  const client = await wireClient(t, `${proxy.url}/room`);
  await leave(a!, client);
  await until(() => counts(a!).parked === 1);
  a!.ws.publish("all", "meanwhile");
  const back = t.use(await client.resume(1, 0));
  assertEquals(await back.message(), "meanwhile");
  assert(back.token !== client.token && back.token.slice(-32) === client.token.slice(-32));
  assertEquals(told, ["open 0", "suspend 0", "revive 0"]);
  assertEquals([counts(a!).parked, store.values.size], [0, 1], "a pointer to nothing");
});

test("an instance that is asked for a session that it has parked takes it back, and gives it away", async (t) => {
  const { instances: [a], told, proxy } = await start(t, { whenAway: true });
  const client = await wireClient(t, `${proxy.url}/room`);
  await leave(a!, client);
  await until(() => counts(a!).parked === 1);
  a!.ws.publish("all", "meanwhile");
  proxy.choose = () => 1;
  const back = t.use(await client.resume(1, 0));
  assertEquals(await back.message(), "meanwhile", "nothing is lost while it is there");
  assertEquals(told.filter((call) => !/^(suspend|revive) 0/.test(call)), ["open 0", "revive 1"]);
});

test("a client that never comes back is told to the hooks of the instance that parked its session", async (t) => {
  const { instances: [a], told } = await start(t, { whenAway: true, resumeTimeout: 400, count: 1 });
  const client = await wireClient(t, a!.url);
  await leave(a!, client);
  await until(() => told.includes("close 0 1006"));
  assertEquals(told, ["open 0", "suspend 0", "close 0 1006"]);
});

for (const step of ["the session", "the pointer"]) {
  for (const how of ["fails", "is executed, and its answer lost", "never answers"]) {
    test(`a session goes on where it is when ${step} is put and that ${how}`, async (t) => {
      const fleet = await start(t, { whenAway: true, timeout: 200 });
      const { instances: [a], told, proxy, errors, store } = fleet;
      let puts = 0;
      store.fault = (kind, _key, go) => {
        if (kind === "take" || ++puts !== (step === "the session" ? 1 : 2)) return go();
        if (how === "never answers") return new Promise(() => {});
        if (how !== "fails") go();
        throw new Error("the store failed");
      };
      const client = await wireClient(t, `${proxy.url}/room`);
      await leave(a!, client);
      await until(() => told.includes("revive 0"));
      proxy.choose = () => 1;
      const back = t.use(await client.resume(1, 0));
      await back.send("one");
      assertEquals(await back.message(), "one 1 at 1");
      assertEquals(told, ["open 0", "suspend 0", "revive 0", "suspend 0", "revive 1"]);
      assertGreater(errors.length, 0);
      assertEquals(counts(a!).parked, 0);
    });
  }
}

test("a store that is away costs nobody a session that would do without it", async (t) => {
  const { instances: [a], told, proxy, store, errors } = await start(t, {
    ...{ whenAway: true, timeout: 200 },
  });
  store.fault = () => {
    throw new Error("the store is away");
  };
  const client = await wireClient(t, `${proxy.url}/room`);
  await leave(a!, client);
  proxy.choose = () => 1;
  const back = t.use(await client.resume(1, 0));
  await back.send("one");
  assertEquals(await back.message(), "one 1 at 1");
  await a!.ws.close(1012);
  const calls = ["open 0", "suspend 0", "revive 0", "suspend 0", "revive 1"];
  assertEquals(told, calls);
  assertEquals([...new Set(errors)], ["the store is away"]);
});

test("while the store does not say whether it has a session, its client is not told that it is over", async (t) => {
  const fleet = await start(t);
  const { instances: [a], proxy, store, errors } = fleet;
  const client = await wireClient(t, `${proxy.url}/room`);
  await leave(a!, client);
  await close(fleet, 0);
  const { fault } = store;
  store.fault = () => {
    throw new Error("the store is away");
  };
  proxy.choose = () => 1;
  const status = () => client.resume(1, 0).then(() => 200, ({ status }) => status as number);
  assertEquals(await status(), 503);
  store.fault = fault;
  t.use(await client.resume(2, 0));
  assertGreater(errors.length, 0);
  store.values.clear();
});

test("who reads the store learns names, sizes and times, and who writes there forges nothing", async (t) => {
  const fleet = await start(t);
  const { instances: [a], proxy, store, errors, told } = fleet;
  const client = await wireClient(t, `${proxy.url}/room`);
  const [peer] = peersOf(a!);
  peer!.context.password = "hunter2";
  await leave(a!, client);
  peer!.send("a secret");
  await close(fleet, 0);
  for (const [key, bytes, ttl] of store.history) {
    assertMatch(key, /^[0-9a-f]{32}$/);
    assertEquals(ttl, 60_000);
    const text = new TextDecoder("latin1").decode(bytes);
    for (const word of ["hunter2", "secret", "password", "room", client.token.slice(17)]) {
      assert(!text.includes(word) && !key.includes(word), word);
    }
  }
  const honest = new Map(store.values);
  const [[own], [pointer]] = [...honest] as [[string, unknown], [string, unknown]];
  const forgeries: (() => void)[] = [
    () =>
      store.values.set(own, store.values.get(own)!.map((byte, i) => i === 40 ? byte ^ 1 : byte)),
    () => store.values.set(own, honest.get(pointer)!),
    () => store.values.set(pointer, honest.get(own)!),
    () => store.values.set(pointer, new Uint8Array(100)),
    () => store.values.set(pointer, new Uint8Array()),
  ];
  proxy.choose = () => 1;
  for (const [attempt, forge] of forgeries.entries()) {
    for (const [key, bytes] of honest) store.values.set(key, bytes);
    forge();
    const refused = await client.resume(attempt + 1, 0).then(() => 200, ({ status }) => status);
    assert([404, 503].includes(refused as number), `${refused}`);
    assertGreater(errors.splice(0).length, forge === forgeries[2] ? -1 : 0);
  }
  for (const [key, bytes] of honest) store.values.set(key, bytes);
  const back = t.use(await client.resume(9, 0));
  assertEquals(await back.message(), "a secret");
  assertEquals(told, ["open 0", "suspend 0", "revive 1"]);
});

test("an old state is taken by nobody, though it is put back where it was", async (t) => {
  const fleet = await start(t, { count: 3, whenAway: true, patience: 800 });
  const { instances: [a, b], proxy, store, told, deaf } = fleet;
  const first = await wireClient(t, `${proxy.url}/room`);
  await leave(a!, first);
  await until(() => store.values.size === 2);
  const old = new Map(store.values);
  proxy.choose = () => 1;
  deaf.add(0);
  const second = t.use(await first.resume(1, 0));
  await second.send("one");
  assertEquals(await second.message(), "one 1 at 1");
  for (const [key, bytes] of old) store.values.set(key, bytes);
  deaf.add(1); // the instance that has it says nothing
  proxy.choose = () => 2;
  const refused = await second.resume(2, 1).then(() => 200, ({ status }) => status);
  assertEquals(refused, 503);
  assertEquals(told, ["open 0", "suspend 0", "revive 1"]);
  assertEquals(peersOf(b!).length, 1);
  // And so at the instance that it is parked at again.
  deaf.clear();
  await leave(b!, second);
  await until(() => counts(b!).parked === 1);
  deaf.add(1);
  const third = t.use(await second.resume(3, 1));
  await third.send("two");
  assertEquals(await third.message(), "two 2 at 2");
}, { timeout: 20_000 });

test("an old state is taken by nobody, though it is put in the place of the newer", async (t) => {
  const fleet = await start(t, { whenAway: true, patience: 800 });
  const { instances: [a], proxy, store, told, deaf, errors } = fleet;
  const first = await wireClient(t, `${proxy.url}/room`);
  await leave(a!, first);
  await until(() => store.values.size === 2);
  const [[, state], [, pointer]] = [...store.values] as [
    [string, Uint8Array],
    [string, Uint8Array],
  ];
  const [[id]] = [...store.values] as [[string, unknown]];
  const second = t.use(await first.resume(1, 0)); // where it was
  await second.send("one");
  assertEquals(await second.message(), "one 1 at 0");
  store.values.clear();
  await leave(a!, second);
  await until(() => store.values.size === 3);
  const [, ...pointers] = store.values.keys();
  for (const key of pointers) store.values.set(key, pointer);
  store.values.set(id, state);
  deaf.add(0);
  proxy.choose = () => 1;
  const refused = await second.resume(2, 1).then(() => 200, ({ status }) => status);
  assertEquals(refused, 503);
  assertEquals(
    new Set(errors.map((error) => error.slice(0, 14))),
    new Set(["What is parked", "No answer from"]),
  );
  assertEquals(told, ["open 0", "suspend 0", "revive 0", "suspend 0"]);
  proxy.choose = () => 0; // which is no worse off
  const third = t.use(await second.resume(3, 1));
  await third.send("two");
  assertEquals(await third.message(), "two 2 at 0");
});

for (const late of ["an older try", "the same try, repeated by a proxy,"] as const) {
  test(`${late} that an instance reads late takes no session from its client`, async (t) => {
    const fleet = await start(t, { count: 3, whenAway: true, patience: 800 });
    const { instances: [a, b, c], proxy, deaf, told } = fleet;
    const first = await wireClient(t, `${proxy.url}/room`);
    await leave(a!, first);
    await until(() => counts(a!).parked === 1);
    deaf.add(0); // it is frozen
    proxy.choose = () => 1;
    const second = t.use(await first.resume(2, 0));
    await second.send("one");
    assertEquals(await second.message(), "one 1 at 1");
    await leave(b!, second);
    await until(() => counts(b!).parked === 1);
    deaf.add(1); // this one, too
    proxy.choose = () => 2; // where the client had been, and had no answer
    const again = late === "an older try" ? 1 : 2;
    const stale = await first.resume(again, 0).catch(({ status }) => status as number);
    assertEquals(typeof stale === "number" ? stale : 200, again === 1 ? 409 : 200);
    if (typeof stale !== "number") await leave(c!, stale);
    await until(() => counts(c!).parked === 1);
    deaf.clear();
    const back = t.use(await second.resume(3, 1));
    await back.send("two");
    assertEquals(await back.message(), "two 2 at 2");
    assertEquals(told.filter((call) => /open|close/.test(call)), ["open 0"]);
  });
}

test("a session that an uplink has brought back is parked again, as its client is still away", async (t) => {
  const { instances: [a, b], proxy, deaf, told } = await start(t, { count: 3, whenAway: true });
  const first = await wireClient(t, `${proxy.url}/room`);
  await leave(a!, first);
  await until(() => counts(a!).parked === 1);
  deaf.add(0);
  proxy.choose = () => 1;
  const second = t.use(await first.resume(1, 0));
  await leave(b!, second);
  await until(() => counts(b!).parked === 1);
  assertEquals(await first.send("one"), 204, "the client may not have heard of its new token");
  await until(() => counts(b!).parked === 1);
  deaf.add(1); // it is frozen
  proxy.choose = () => 2;
  const third = t.use(await second.resume(2, 0));
  assertEquals(await third.message(), "one 1 at 1");
  assertEquals(told.filter((call) => /open|close/.test(call)), ["open 0"]);
});

test("a try that a proxy repeats again and again leaves its client the token that it came with", async (t) => {
  const { instances: [a], proxy, deaf } = await start(t, { whenAway: true });
  const client = await wireClient(t, `${proxy.url}/room`);
  let last = client;
  for (let times = 0; times < 5; times++) {
    const next = await client.resume(1, 0);
    await last.drop();
    last = next;
  }
  await leave(a!, last);
  await until(() => counts(a!).parked === 1);
  deaf.add(0); // it is frozen
  proxy.choose = () => 1;
  const back = t.use(await client.resume(2, 0)); // it has heard none of the answers
  await back.send("one");
  assertEquals(await back.message(), "one 1 at 1");
});

test("an instance without the store is given a session that another has parked", async (t) => {
  const { instances: [a], proxy } = await start(t, { whenAway: true, without: 1 });
  const client = await wireClient(t, `${proxy.url}/room`);
  const first = t.use(await client.resume(1, 0));
  const second = await first.resume(2, 0);
  await client.drop();
  await leave(a!, second);
  await until(() => counts(a!).parked === 1);
  proxy.choose = () => 1;
  const back = t.use(await first.resume(3, 0));
  await back.send("one");
  assertEquals(await back.message(), "one 1 at 1");
});

test("a session whose client polls is not parked between two polls, though it has just come", async (t) => {
  const { instances: [a, b], proxy, told, store } = await start(t, { whenAway: true });
  const client = await wireClient(t, `${proxy.url}/room`);
  await leave(a!, client);
  await until(() => counts(a!).parked === 1);
  a!.ws.publish("all", "news 0");
  proxy.choose = () => 1;
  let { token } = client;
  for (let n = 0; n < 4; n++) {
    const headers = {
      accept: "text/event-stream",
      "x-duplex-version": "1",
      "x-duplex-poll": "1",
      "x-crossws-id": token,
      "x-duplex-attempt": `${n + 1}`,
      "last-event-id": `${n}`,
    };
    const response = await fetch(client.url, { headers });
    token = response.headers.get("x-crossws-id")!;
    assertMatch(await response.text(), new RegExp(`news ${n}`));
    b!.ws.publish("all", `news ${n + 1}`); // the next poll is over at once
  }
  assertEquals(told, ["open 0", "suspend 0", "revive 0", "suspend 0", "revive 1"]);
  assertEquals(store.history.length, 2);
});

test("a refusal of the session's instance reaches its client, though it has parked the session", async (t) => {
  const { instances: [a], proxy, told } = await start(t, { whenAway: true, patience: 800 });
  const client = await wireClient(t, `${proxy.url}/room`);
  await leave(a!, client);
  await until(() => counts(a!).parked === 1);
  proxy.choose = () => 1;
  const refused = await client.resume(1, 5).then(() => 200, ({ status }) => status);
  assertEquals(refused, 409, "it has had no five messages");
  await until(() => counts(a!).parked === 1);
  t.use(await client.resume(2, 0));
  assertEquals(told.filter((call) => /open|close/.test(call)), ["open 0"]);
});

test("of many that ask for a parked session at once one gets it", async (t) => {
  const fleet = await start(t, { count: 4 });
  const { instances, proxy, told, errors } = fleet;
  const client = await wireClient(t, `${proxy.url}/room`);
  await leave(instances[0]!, client);
  await close(fleet, 0);
  let turn = 0;
  proxy.choose = () => 1 + turn++ % 3;
  const attempts = Array.from(
    { length: 9 },
    (_, n) =>
      client.resume(n + 1, 0).then((back) => (t.use(back), 200), ({ status }) => status as number),
  );
  const statuses = await Promise.all(attempts);
  assert(statuses.every((status) => [200, 409, 503].includes(status)), `${statuses}`);
  const back = t.use(await client.resume(20, 0));
  await back.send("one");
  assertMatch(await back.message(), /^one 1 at/);
  assertEquals(instances.slice(1).flatMap(peersOf).length, 1);
  assertEquals(told.filter((call) => /open|close/.test(call)), ["open 0"]);
  assertEquals(errors, []);
});

test("a take that is never answered keeps nobody for ever from the session", async (t) => {
  const fleet = await start(t, { timeout: 200 });
  const { instances: [a], proxy, store, told, errors } = fleet;
  const client = await wireClient(t, `${proxy.url}/room`);
  await leave(a!, client);
  await close(fleet, 0);
  let takes = 0;
  store.fault = (step, _key, go) => step === "take" && !takes++ ? new Promise(() => {}) : go();
  proxy.choose = () => 1;
  const refused = await client.resume(1, 0).then(() => 200, ({ status }) => status as number);
  assertEquals([refused, takes], [503, 1]);
  assertEquals(errors, ["The store of parked sessions does not answer"]);
  t.use(await client.resume(2, 0));
  assertEquals(told, ["open 0", "suspend 0", "revive 1"]);
});

test("nobody is told that a session is over while the store may still bring it", async (t) => {
  const fleet = await start(t, { timeout: 200 });
  const { instances: [a], proxy, store, told } = fleet;
  const client = await wireClient(t, `${proxy.url}/room`);
  await leave(a!, client);
  await close(fleet, 0);
  let takes = 0;
  const late = deferred();
  store.fault = async (step, _key, go) => {
    if (step === "take" && ++takes === 2) await late.promise; // the session itself, not its pointer
    return go();
  };
  proxy.choose = () => 1;
  const statusOf = (attempt: number) =>
    client.resume(attempt, 0).then((back) => (t.use(back), 200), ({ status }) => status as number);
  assertEquals([await statusOf(1), await statusOf(2)], [503, 503]);
  late.resolve();
  for (let attempt = 3; await statusOf(attempt) !== 200 && attempt < 9;) attempt++;
  assertEquals(told, ["open 0", "suspend 0", "revive 1"]);
});

test("who asks again while a session is on its way out of the store waits no longer than for that", async (t) => {
  const fleet = await start(t);
  const { instances, proxy, told, store } = fleet;
  const client = await wireClient(t, `${proxy.url}/room`);
  await leave(instances[0]!, client);
  await close(fleet, 0);
  proxy.choose = () => 1;
  store.fault = async (step, _key, go) => {
    if (step === "take") await sleep(50); // all come meanwhile
    return go();
  };
  const begun = performance.now();
  const attempts = Array.from(
    { length: 6 },
    (_, n) =>
      client.resume(n + 1, 0).then((back) => (t.use(back), 200), ({ status }) => status as number),
  );
  const statuses = await Promise.all(attempts);
  assertLess(performance.now() - begun, 3_000);
  assertGreater(statuses.filter((status) => status === 200).length, 0);
  assertEquals(told, ["open 0", "suspend 0", "revive 1"]);
});

test("who resumes in another namespace gets nothing out of the store, and leaves it there", async (t) => {
  const fleet = await start(t);
  const { instances: [a], proxy, told } = fleet;
  const client = await wireClient(t, `${proxy.url}/room`);
  await leave(a!, client);
  await close(fleet, 0);
  proxy.choose = () => 1;
  const headers = {
    ...{ accept: "text/event-stream", "x-duplex-version": "1", "x-crossws-id": client.token },
    ...{ "x-duplex-attempt": "1", "last-event-id": "0" },
  };
  const refused = await fetch(`${proxy.url}/other`, { headers });
  await refused.text();
  assertEquals(refused.status, 404);
  t.use(await client.resume(2, 0));
  assertEquals(told, ["open 0", "suspend 0", "revive 1"]);
});

test("a session that is too large stays, and that is told", async (t) => {
  const { instances: [a], proxy, errors, told, store } = await start(t, {
    ...{ whenAway: true, maxSize: 2_000 },
  });
  const client = await wireClient(t, `${proxy.url}/room`);
  peersOf(a!)[0]!.context.much = "x".repeat(3_000);
  await leave(a!, client);
  await until(() => errors.length === 1);
  assertMatch(errors[0]!, /too large to be parked/);
  assertEquals([store.values.size, told], [0, ["open 0", "suspend 0", "revive 0"]]);
  t.use(await client.resume(1, 0));
});

test("parking's options are checked", () => {
  const store = new MemoryStore();
  for (const bad of [{ maxSize: 0 }, { timeout: NaN }]) {
    assertThrows(() => parking(store, bad), RangeError);
  }
});

test("an instance that is alone closes its sessions at once where there is no store", async (t) => {
  const bus = new MemoryBus(t);
  t.defer(() => sleep(200));
  const { ws, url } = await listen(t, { sync: cluster(bus.adapter), hooks: { revive() {} } });
  await sleep(50, t.signal);
  const client = await wireClient(t, url);
  const begun = performance.now();
  const closing = ws.close(1012, "", { signal: AbortSignal.timeout(8_000) });
  assertEquals(await client.closed(), 1012);
  assertLess(performance.now() - begun, 3_000);
  await client.close(1012);
  await closing;
});

test("a waitUntil that throws is told, and leaves no session behind", async (t) => {
  const waitUntil = () => {
    throw new TypeError("Illegal invocation");
  };
  const fleet = await start(t, { whenAway: true, resumeTimeout: 400, count: 1, waitUntil });
  const { instances: [a], told, errors } = fleet;
  const client = await wireClient(t, a!.url);
  await leave(a!, client);
  await until(() => told.includes("close 0 1006"));
  assertEquals(told, ["open 0", "suspend 0", "close 0 1006"]);
  assertEquals(errors, ["Illegal invocation"]);
  assertEquals(counts(a!).connected, 0);
});

test("a store that does not answer a take holds no session for ever", async (t) => {
  const fleet = await start(t, {
    ...{ whenAway: true, resumeTimeout: 300, timeout: 200, count: 1, patience: 500 },
  });
  const { instances: [a], told, store, errors } = fleet;
  let hangs = true;
  store.fault = (step, _key, go) => step === "take" && hangs ? new Promise(() => {}) : go();
  const client = await wireClient(t, a!.url);
  await leave(a!, client);
  await until(() => errors.length > 0);
  assertEquals(told, ["open 0", "suspend 0"], "nobody knows where it is");
  hangs = false;
  await until(() => told.includes("close 0 1006"));
  assertEquals([counts(a!).parked, counts(a!).moving], [0, 0]);
  assertEquals([...new Set(errors)], ["The store of parked sessions does not answer"]);
});

test("what a store gives late is taken, though it was asked again meanwhile", async (t) => {
  const fleet = await start(t, { whenAway: true, timeout: 200, count: 1, patience: 500 });
  const { instances: [a], told, store, proxy } = fleet;
  const client = await wireClient(t, `${proxy.url}/room`);
  await leave(a!, client);
  await until(() => counts(a!).parked === 1);
  let takes = 0;
  store.fault = async (step, _key, go) => {
    const value = go();
    if (step === "take" && !takes++) await until(() => takes > 1);
    if (step === "take" && takes === 2) await sleep(50);
    return value;
  };
  const status = (attempt: number) =>
    client.resume(attempt, 0).then((back) => (t.use(back), 200), ({ status }) => status as number);
  for (let attempt = 1; await status(attempt) !== 200 && attempt < 9;) attempt++;
  assertEquals(told, ["open 0", "suspend 0", "revive 0"]);
  assertGreater(takes, 0);
});

test("a session that is being taken back as its instance ends is parked again", async (t) => {
  const fleet = await start(t, { whenAway: true, count: 1 });
  const { instances: [a], told, proxy, store } = fleet;
  const client = await wireClient(t, `${proxy.url}/room`);
  assertEquals(await client.send("one"), 204);
  await leave(a!, client);
  await until(() => counts(a!).parked === 1);
  store.fault = async (step, _key, go) => {
    const value = go();
    if (step === "take") await sleep(800);
    return value;
  };
  const early = client.resume(1, 0).then((back) => t.use(back), () => {});
  await until(() => store.values.size === 1); // it is on its way back
  await a!.ws.close(1012);
  store.fault = (_step, _key, go) => go();
  await early;
  await fleet.start();
  proxy.choose = () => 1;
  const back = t.use(await client.resume(2, 0));
  assertEquals(await back.message(), "one 1 at 0");
  assert(!told.some((call) => call.startsWith("close")), `${told}`);
  assertEquals(told.at(-1), "revive 1");
});

test("what an instance has taken out of the store as it ends is there again once it has closed", async (t) => {
  const fleet = await start(t, { whenAway: true, timeout: 1_000 });
  const { instances: [a, b], store, proxy, errors } = fleet;
  const client = await wireClient(t, `${proxy.url}/room`);
  assertEquals(await client.send("one"), 204);
  await leave(a!, client);
  await until(() => counts(a!).parked === 1);
  await close(fleet, 0);
  const kept = store.values.size;
  store.fault = async (step, _key, go) => {
    const value = step === "take" ? go() : undefined;
    await sleep(step === "take" ? 1_500 : 100, t.signal);
    return step === "take" ? value : go();
  };
  proxy.choose = () => 1;
  const early = client.resume(1, 0).then((back) => t.use(back), () => {});
  await until(() => store.values.size < kept - 1); // the session is on its way out
  const { fault } = store;
  let fails = true;
  store.fault = (step, key, go) => {
    if (step === "take" || !fails) return fault(step, key, go);
    fails = false;
    throw new Error("the store failed once");
  };
  await b!.ws.close(1012);
  const after = store.values.size;
  store.fault = (_step, _key, go) => go();
  await early;
  assertEquals(after, kept);
  const expected = ["The store of parked sessions does not answer", "the store failed once"];
  assertEquals(errors, expected);
  await fleet.start();
  proxy.choose = () => 2;
  const back = t.use(await client.resume(2, 0));
  assertEquals(await back.message(), "one 1 at 0");
});

for (const step of ["return the pointer", "put the session", "put a pointer"] as const) {
  for (const how of ["fails", "is executed, and its answer lost", "never answers"]) {
    test(`what an instance has taken for nobody is not lost when to ${step} ${how}`, async (t) => {
      const fleet = await start(t, { count: 3, patience: 500, timeout: 1_000 });
      const { instances: [a], told, proxy, store } = fleet;
      const client = await wireClient(t, `${proxy.url}/room`);
      await client.send("one");
      await client.message();
      await leave(a!, client);
      await close(fleet, 0);
      const gate = deferred();
      const done = { take: 0, put: 0 };
      const bad = { "return the pointer": 1, "put the session": 1, "put a pointer": 2 }[step];
      store.fault = async (kind, _key, go) => {
        const n = ++done[kind];
        if (kind === "take" && n === 2) {
          await gate.promise;
          if (step === "return the pointer") throw new Error("the store is away");
        }
        // A pointer for so long that others have looked for it meanwhile.
        const isBad = n === bad || step === "put a pointer" && n > bad && n < bad + 3;
        if (kind !== "put" || !isBad) return go();
        if (how === "never answers") return new Promise(() => {});
        if (how !== "fails") go();
        throw new Error("the store failed");
      };
      proxy.choose = () => 1;
      const statusOf = (attempt: number) =>
        client.resume(attempt, 1).then((back) => (back.drop(), 200), ({ status }) => status);
      assertEquals(await statusOf(1), 503, "it takes too long, and is given up");
      gate.resolve();
      await until(() => done.put > 1 || store.values.size > 1, { timeout: 10_000 });
      // By then nobody waits for it there any more.
      if (step === "put a pointer" && how === "never answers") await sleep(1_200, t.signal);
      proxy.choose = () => 2;
      for (let attempt = 2;; attempt++) {
        const back = await client.resume(attempt, 1).catch(({ status }) => status as number);
        if (typeof back === "number") {
          assertEquals(back, 503);
          continue;
        }
        t.use(back);
        await back.send("two");
        assertEquals(await back.message(), "two 2 at 2");
        break;
      }
      assertEquals(told, ["open 0", "suspend 0", "revive 2"]);
    }, { timeout: 20_000 });
  }
}

test(
  "what cannot be put back is taken by who asks for it again, and not told to be over meanwhile",
  async (t) => {
    const fleet = await start(t, { count: 3, patience: 500 });
    const { instances: [a], told, proxy, store } = fleet;
    const client = await wireClient(t, `${proxy.url}/room`);
    await leave(a!, client);
    await close(fleet, 0);
    const gate = deferred();
    let puts = 0;
    store.fault = async (step, _key, go) => {
      if (step === "take") await gate.promise;
      else if (++puts) throw new Error("the store is full");
      return go();
    };
    proxy.choose = () => 1;
    const statusOf = (attempt: number) =>
      client.resume(attempt, 0).then(
        (back) => (t.use(back), 200),
        ({ status }) => status as number,
      );
    assertEquals(await statusOf(1), 503);
    gate.resolve();
    await until(() => puts > 2);
    proxy.choose = () => 2;
    assertEquals(await statusOf(2), 503);
    proxy.choose = () => 1;
    for (let attempt = 3, status = 503; status !== 200; attempt++) {
      assertEquals(status, 503);
      status = await statusOf(attempt);
    }
    assertEquals(told, ["open 0", "suspend 0", "revive 1"]);
  },
  { timeout: 20_000 },
);

for (const limit of ["", "maxBufferedAmount", "maxTotalBufferedAmount"]) {
  const what = limit ? `more than ${limit} is` : "10,500 small publications are";
  test(`a session that is away while ${what} to come misses none in silence`, async (t) => {
    const server = limit ? { [limit]: 100_000 } : {};
    const { instances: [a], proxy } = await start(t, { whenAway: true, count: 1, server });
    const client = await wireClient(t, `${proxy.url}/room`);
    await leave(a!, client);
    await until(() => counts(a!).parked === 1);
    const held = () => a!.ws.stats().bufferedAmount;
    a!.ws.publish("all", "1");
    assertGreater(held(), 0, "what is kept for it is held back");
    const many = limit ? 1_000 : 10_500;
    for (let n = 2; n <= many; n++) {
      a!.ws.publish("all", `${n}${limit && "x".repeat(1_000)}`);
      if (limit) assertLess(held(), 110_000);
    }
    const back = t.use(await client.resume(1, 0));
    if (limit) {
      assertEquals(await back.closed(), 1013);
      return assertEquals(held(), 0);
    }
    for (let n = 1; n <= many; n++) {
      assertEquals(await back.message(), `${n}`);
      if (n % 1000 === 0) assertEquals(await back.frames(ack(n)), [204, 0]);
    }
  });
}

test("who comes and goes has no more sessions parked than there may be peers", async (t) => {
  const fleet = await start(t, { whenAway: true, server: { maxPeers: 3 } });
  const { instances: [a], told, proxy, store } = fleet;
  const clients: WireClient[] = [];
  for (let n = 1; n <= 6; n++) {
    const client = await wireClient(t, `${proxy.url}/room`);
    clients.push(client);
    await client.send("one");
    await client.message();
    await leave(a!, client);
    const parked = Math.min(n, 3);
    await until(() => counts(a!).parked === parked);
    assertEquals(a!.ws.stats().sessions, { connected: 0, away: 0, closing: 0, moving: 0 });
  }
  assertEquals(store.values.size, 12);
  for (const client of clients) { // none is lost by that
    const back = t.use(await client.resume(1, 1));
    await back.send("two");
    assertEquals(await back.message(), "two 2 at 0");
    await back.close();
  }
  const closes = () => told.filter((call) => call.startsWith("close")); // in tasks of their own
  await until(() => closes().length === 6);
  assertEquals(closes(), Array(6).fill("close 0 1000"));
  assertEquals(told.filter((call) => !/^(open|suspend|revive|close) 0/.test(call)), []);
});

test("an opening that was confirmed is 409, also once the session has come back", async (t) => {
  const { instances: [a], proxy, store, told } = await start(t, { whenAway: true, count: 1 });
  const opening = { "x-duplex-opening": "0123456789abcdef".repeat(2) };
  const client = await wireClient(t, `${proxy.url}/room`, opening);
  await client.send("one");
  await client.message();
  store.fault = () => {
    throw new Error("the store is away");
  };
  await leave(a!, client);
  await until(() => told.includes("revive 0"));
  const again = await wireClient(t, `${proxy.url}/room`, opening).catch(({ status }) => status);
  assertEquals([again, told.filter((call) => call.startsWith("open"))], [409, ["open 0"]]);
});

test("an instance that is full lets a parked session wait where it is", async (t) => {
  const fleet = await start(t, { server: { maxPeers: 1 } });
  const { instances: [a, b], told, proxy } = fleet;
  const client = await wireClient(t, `${proxy.url}/room`);
  const other = await wireClient(t, `${b!.url}/room`);
  await leave(a!, client);
  await close(fleet, 0);
  proxy.choose = () => 1;
  const refused = await client.resume(1, 0).then(() => 200, ({ status }) => status as number);
  assertEquals(refused, 503);
  assertEquals(await other.close(), 204);
  await until(() => peersOf(b!).length === 0);
  t.use(await client.resume(2, 0));
  assertEquals(told.at(-1), "revive 1");
});

test("a store that is away is told of a few times a second, whoever asks for how many sessions", async (t) => {
  const { instances: [a], store, errors } = await start(t, { count: 1, patience: 500 });
  store.fault = () => {
    throw new Error("the store is away");
  };
  const begun = performance.now();
  const statuses = await Promise.all(Array.from({ length: 60 }, async (_, n) => {
    const token = `${"ab".repeat(8)}.${`${n}`.padStart(32, "0")}`; // of an instance that never was
    const headers = {
      ...{ accept: "text/event-stream", "x-duplex-version": "1", "x-crossws-id": token },
      ...{ "x-duplex-attempt": "1", "last-event-id": "0" },
    };
    const { status, body } = await fetch(`${a!.url}/room`, { headers });
    await body?.cancel();
    return status;
  }));
  assert(statuses.every((status) => status === 503), `${statuses}`);
  const seconds = 1 + Math.ceil((performance.now() - begun) / 1_000);
  const told = errors.filter((error) => error === "the store is away").length;
  assertGreater(told, 0);
  assertLessOrEqual(told, 10 * seconds);
  assertEquals(peersOf(a!), []);
});

/** An instance of 100 sessions of 1 MB, and what it has given back, with a store that takes its time. */
function crowd(put: (key: string) => Promise<void>, changes: Partial<Quay> = {}) {
  const state = new Uint8Array(1_000_000);
  const told = { packed: 0, restored: 0, released: 0, errors: [] as string[], ahead: 0, taken: 0 };
  const packed = {
    ...{
      id: "",
      namespace: "/",
      marks: [] as string[],
      attempt: 0,
      context: {},
      protocol: "",
      topics: [],
      frames: [],
    },
    ...{ heartbeatInterval: 1, received: 0, handled: 0, firstUnacked: 1, nextUngiven: 1 },
  };
  const quay: Quay = {
    instance: "a".repeat(16),
    host: {
      resumeTimeout: 30_000,
      pack: () => (told.packed++, packed),
      restore: () => void told.restored++,
      release: () => void told.released++,
      report: (error) => void told.errors.push((error as Error).message),
    },
    ...{ now: () => Date.now() + told.ahead, wake() {}, counts: () => ({}), asks: () => false },
    ...{ take: () => Promise.resolve(++told.taken > 0), confirm() {}, encodePacked: () => state },
    digest: () => Promise.resolve(new Uint8Array(32)),
    seal: () => Promise.resolve(new Uint8Array(1)),
    unseal: () => Promise.resolve(new Uint8Array(1)),
    ...changes,
  };
  const store = new MemoryStore();
  store.fault = async (step, key, go) => {
    if (step === "put") await put(key);
    return go();
  };
  const parked = parking(store, { timeout: 2_000 })(quay);
  const tokens = Array.from({ length: 100 }, (_, n) => `${"a".repeat(24)}.${n}`);
  return { told, parked, tokens, packed };
}

for (
  const [who, attempt, mark, stays] of [
    ["a later connection with another token", 2, "another", false],
    ["an uplink with another token", undefined, "another", true],
    ["an older connection with another token", 0, "another", true],
    ["a later connection with its token", 2, "a".repeat(24), true],
  ] as const
) {
  test(`a parked session is ${stays ? "taken back" : "known to have left"} for ${who}`, async () => {
    const { parked, packed, told, tokens: [token] } = crowd(() => Promise.resolve(), {
      seal: (_token, bytes) => Promise.resolve(bytes),
      unseal: (_token, bytes) => Promise.resolve(bytes),
    });
    Object.assign(packed, { attempt: 1, marks: ["a".repeat(24)] });
    await parked.park(token!, false);
    assertEquals(await parked.want(token!, attempt, mark), stays);
    assertEquals([told.restored, told.released], stays ? [1, 0] : [0, 1]);
  });
}

test("a client that comes while the store is asked by an older token of its session has it asked by its own", async () => {
  const [older, newer] = ["a", "b"].map((digit) => `${digit.repeat(24)}.0`);
  const { parked, packed } = crowd(() => Promise.resolve(), {
    seal: (_token, bytes) => Promise.resolve(bytes),
    unseal: (_token, bytes) => Promise.resolve(bytes),
    asks: () => true,
    digest: async (text) =>
      new Uint8Array(await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text))),
  });
  packed.marks = ["b".repeat(24)];
  await parked.park(newer!, true);
  const asking = { session: "s", namespace: "/" };
  const looks = [older!, newer!, older!, newer!].map((token) => parked.look(asking, token));
  // Whoever comes with the same one meanwhile has the same answer.
  assertEquals(await Promise.all(looks), [false, true, false, true]);
});

test("who knows that a session was taken, and hears later by whom, knows where it is", async () => {
  const names: string[] = [];
  const { parked, tokens: [token] } = crowd((name) => {
    names.push(name);
    return Promise.resolve();
  });
  await parked.park(token!, false);
  assertEquals(await parked.want(token!, 1, "another"), false);
  assertEquals(parked.whereabouts(token!), "");
  parked.taken(token!, names[0]!, "there");
  assertEquals(parked.whereabouts(token!), "there", "else nobody is asked but all, who have 1 s");
  parked.taken(token!, "of an older parking", "elsewhere");
  assertEquals(parked.whereabouts(token!), "there");
});

test("of sessions that are more than may be on their way at once, all are parked, in turn", async (t) => {
  let most = 0;
  let underWay = 0;
  const { told, parked, tokens } = crowd(async () => {
    most = Math.max(most, ++underWay);
    await sleep(5, t.signal);
    underWay--;
  });
  await Promise.all(tokens.map((token) => parked.park(token, true)));
  assertEquals([told.packed, told.restored, told.released, told.errors], [100, 0, 100, []]);
  assertLessOrEqual(most, 68); // 64 MiB, and one
});

test("who waits for a store that stands still is not kept for ever", async () => {
  const { told, parked, tokens } = crowd(() => new Promise(() => {}));
  const parking = Promise.all(tokens.map((token) => parked.park(token, true)));
  await sleep(0);
  for (let n = 0; n < 6; n++) parked.tick(500);
  await parking;
  assertEquals([told.packed, told.restored], [68, 68]);
  assertEquals([...new Set(told.errors)], ["The store of parked sessions does not answer"]);
});

test("a put that never settles keeps others from the store for 30 s, and not for ever", async () => {
  let isDead = true;
  const { told, parked, tokens } = crowd(async () => {
    if (isDead) await new Promise(() => {});
  });
  const first = Promise.all(tokens.slice(0, 68).map((token) => parked.park(token, true)));
  await sleep(0);
  for (let n = 0; n < 6; n++) parked.tick(500);
  await first; // given up, and still on their way as far as anybody knows
  isDead = false;
  const late = parked.park(tokens[90]!, true);
  for (let n = 0; n < 6; n++) parked.tick(500);
  await late;
  assertEquals([told.packed, told.restored, told.released], [68, 68, 0], "there is no room");
  told.errors.length = 0;
  told.ahead = 27_000; // of the first second all reports were used up
  for (let n = 0; n < 60 && parked.remembers; n++) parked.tick(500);
  assertEquals([...new Set(told.errors)], ["The store of parked sessions does not answer"]);
  await Promise.all(tokens.slice(91, 95).map((token) => parked.park(token, true)));
  assertEquals([told.packed, told.restored, told.released], [72, 68, 4]);
});

test("a session whose put never settles is parked again after 30 s, and a late one does not come between", async () => {
  const puts: string[] = [];
  let hangs = true;
  let settle = () => {};
  const { told, parked, tokens: [token] } = crowd(async (key) => {
    puts.push(key);
    if (hangs) await new Promise<void>((resolve) => settle = resolve);
  });
  const first = parked.park(token!, true);
  await sleep(0);
  for (let n = 0; n < 6; n++) parked.tick(500);
  await first;
  hangs = false;
  await parked.park(token!, true);
  assertEquals([told.packed, told.restored, told.released], [1, 1, 0], "not before");
  for (let n = 0; n < 60; n++) parked.tick(500);
  await parked.park(token!, true);
  assertEquals([told.packed, told.restored, told.released], [2, 1, 1]);
  settle();
  await sleep(0);
  assertEquals([puts.length, new Set(puts).size], [2, 2], "each under a name of its own");
});

for (const late of [1, 4, 5]) {
  for (const by of ["older", "newer"] as const) {
    test(`late pointers, ${late} of them, lead to where those lead that they replace, by the ${by} token`, async () => {
      const settle: (() => void)[] = [];
      const keys = new Map<string, number>();
      const marks = ["a", "b"].map((digit) => digit.repeat(24));
      const [older, newer] = marks.map((mark) => `${mark}.0`);
      const { told, parked, packed } = crowd(async (key) => {
        const isPointer = keys.set(key, (keys.get(key) ?? 0) + 1).get(key)! > 1;
        if (settle.length < late && isPointer) {
          await new Promise<void>((resolve) => settle.push(resolve));
        }
      }, {
        ...{ seal: (_token, bytes) => Promise.resolve(bytes), asks: () => true },
        ...{ unseal: (_token, bytes) => Promise.resolve(bytes) },
        digest: async (text) => {
          const key = await sha256(text);
          const name = Array.from(
            key.subarray(0, 16),
            (byte) => byte.toString(16).padStart(2, "0"),
          );
          keys.set(name.join(""), 1);
          return key;
        },
      });
      packed.marks = marks;
      for (let n = 1; n <= late; n++) {
        const parking = parked.park(older!, false);
        await until(() => settle.length === n);
        for (let tick = 0; tick < 70; tick++) parked.tick(500);
        await parking;
        await until(() => told.restored === n); // the store has said that nobody has taken it
      }
      told.ahead = 70_000; // they have run out
      await parked.park(older!, true);
      const ends = () => [told.packed, told.restored, told.released];
      assertEquals(ends(), late < 5 ? [late + 1, late, 1] : [late + 1, late + 1, 0]);
      for (const go of settle.toReversed()) { // and the other pointers follow
        go();
        await sleep(0);
      }
      if (late === 5) { // nobody would follow so many
        await parked.park(older!, true);
        assertEquals(ends(), [late + 2, late + 1, 1]);
      }
      const token = by === "older" ? older! : newer!;
      assertEquals(await parked.look({ session: "s", namespace: "/" }, token), true);
      assertEquals(told.taken, 1);
    });
  }
}

async function sha256(text: string): Promise<Uint8Array<ArrayBuffer>> {
  return new Uint8Array(await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text)));
}

test("a session that another clock has aged is not taken, and that is told", async () => {
  const { told, parked, packed, tokens: [token] } = crowd(() => Promise.resolve(), {
    seal: (_token, bytes) => Promise.resolve(bytes),
    unseal: (_token, bytes) => Promise.resolve(bytes),
  });
  packed.marks = ["a".repeat(24)];
  await parked.park(token!, true);
  told.ahead = 90_000; // as by the clock of whoever looks for it
  assertEquals(await parked.look({ session: "s", namespace: "/" }, token!), false);
  assertEquals(told.errors, ["A parked session is too old, or clocks differ: 30 s"]);
});
