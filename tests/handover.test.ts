/**
 * Sessions that go to the instance that has their stream: resumed elsewhere, asked to go by a
 * shutdown or by the age of a connection, over a backplane that may lose and repeat.
 */
import { cluster, type ClusterAdapter } from "../cluster.ts";
import { redis } from "../drivers.ts";
import type { Peer, SSEOptions, SyncMessage, SyncPlace } from "../server.ts";
import { MemoryBus, memoryRedis, type RoundRobin, roundRobin, textOf, unknown } from "./bus.ts";
import { chaos, type ChaosProxy, pickSeed } from "./chaos.ts";
import {
  assert,
  assertEquals,
  assertGreater,
  assertLess,
  assertLessOrEqual,
  assertMatch,
  note,
  sleep,
  test,
  type TestContext,
  until,
  within,
} from "./harness.ts";
import { connect, listen, type Pair } from "./pair.ts";
import { mulberry32 } from "./random.ts";
import { drivers } from "./topical.ts";
import { type WireClient, wireClient } from "./wire.ts";

interface Fleet {
  readonly instances: Pair<Record<string, unknown>>[];
  /** What the hooks of all instances have been told, in order, by session. */
  readonly told: string[];
  readonly proxy: RoundRobin;
  readonly errors: string[];
}

/** Instances whose sessions move: they count messages in `context`, and echo them. */
async function start(
  t: TestContext,
  adapter: ClusterAdapter,
  { count = 2, timeout, ...options }: { count?: number; timeout?: number } & SSEOptions = {},
): Promise<Fleet> {
  // Last of all: what is on its way, being signed or sealed, or waits for what was lost.
  t.defer(() => sleep(timeout ? timeout + 500 : 200));
  const told: string[] = [];
  const errors: string[] = [];
  const instances: Pair<Record<string, unknown>>[] = [];
  for (let at = 0; at < count; at++) {
    instances.push(
      await listen(t, {
        sync: cluster(adapter, timeout ? { timeout } : {}),
        onError: (error) => void errors.push(String(error)),
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
          },
          close: (_, { code }) => void told.push(`close ${at} ${code}`),
          suspend: () => void told.push(`suspend ${at}`),
          revive: () => void told.push(`revive ${at}`),
        },
        ...options,
      }),
    );
  }
  await sleep(50, t.signal); // subscriptions tell nobody when they stand
  const proxy = await roundRobin(t, instances.map(({ port }) => port));
  proxy.choose = () => 0;
  return { told, errors, instances, proxy };
}

function peersOf({ ws }: Pair<Record<string, unknown>>): Peer<Record<string, unknown>>[] {
  return [...ws.peers.values()].flatMap((peers) => [...peers]);
}

/** Waits until the instance has heard of another that has sessions. */
async function hearsOfAnother({ ws }: Pair<Record<string, unknown>>): Promise<void> {
  await until(() => ws.stats().cluster!.instances > 0);
}

/** A network in front of the balancer, that can be cut. */
async function network(t: TestContext, { proxy }: Fleet): Promise<ChaosProxy> {
  return t.use(await chaos(proxy.port, { seed: pickSeed() }));
}

test("a session goes to the instance that gets its resumption, and is relayed no more", async (t) => {
  const bus = new MemoryBus(t);
  const fleet = await start(t, bus.adapter);
  const { instances, told, proxy, errors } = fleet;
  const front = await network(t, fleet);
  const { socket, messages, opened, closed, events } = connect(t, front.url);
  await opened;
  socket.send("a");
  assertEquals(await messages.next(), "a 1 at 0");
  const [{ id }] = peersOf(instances[0]!) as [Peer];
  bus.reset();
  proxy.choose = () => 1;
  front.cutAll("rst");
  await until(() => told.includes("revive 1"));
  socket.send("b");
  assertEquals(await messages.next(), "b 2 at 1");
  assertLessOrEqual(bus.counts.published, 3 + 2, "adopt, state, adopted; and presence");
  assertEquals(peersOf(instances[1]!).map((peer) => peer.id), [id]);
  assertEquals(peersOf(instances[0]!).length, 0);
  bus.reset();
  for (let n = 3; n < 20; n++) {
    socket.send("c");
    assertEquals(await messages.next(), `c ${n} at 1`);
  }
  assertLessOrEqual(bus.counts.published, 2, "nothing but presence");
  instances[0]!.ws.publish("all", "from 0");
  assertEquals(await messages.next(), "from 0");
  socket.close(3001, "bye");
  assertEquals((await closed).code, 3001);
  await until(() => told.length === 4);
  assertEquals(told, ["open 0", "suspend 0", "revive 1", "close 1 3001"]);
  assertEquals(events, ["open", "drop", "resume", "close"]);
  assertEquals(errors, []);
});

test("a session is revived once, by a hook that publishes", async (t) => {
  const revived: string[] = [];
  const hooks = {
    open: (peer: Peer) => peer.subscribe("all"),
    revive(peer: Peer) {
      revived.push(peer.id);
      if (revived.length < 10) instances[1]!.ws.publish("all", `${revived.length} came here`);
    },
  };
  const fleet = await start(t, new MemoryBus(t).adapter, { hooks });
  const { instances, proxy, errors } = fleet;
  const front = await network(t, fleet);
  const { messages, opened } = connect(t, front.url);
  await opened;
  const [{ id }] = peersOf(instances[0]!) as [Peer];
  proxy.choose = () => 1;
  front.cutAll();
  assertEquals(await messages.next(), "1 came here");
  instances[0]!.ws.publish("all", "the end");
  assertEquals(await messages.next(), "the end");
  assertEquals([revived, peersOf(instances[1]!).length, errors], [[id], 1, []]);
});

test("what an instance publishes before it has had any session reaches one that is on its way there", async (t) => {
  const bus = new MemoryBus(t);
  const fleet: Fleet = await start(t, (context) => {
    const driver = bus.adapter(context);
    return {
      ...driver,
      subscribe: (deliver) =>
        driver.subscribe((message) => {
          const text = textOf(message);
          // The session is given away by now, and not yet taken.
          if (text.includes('"status":"here"')) fleet.instances[1]!.ws.publish("all", "meanwhile");
          deliver(message);
        }),
    };
  });
  const front = await network(t, fleet);
  const { messages, opened } = connect(t, front.url);
  await opened;
  fleet.proxy.choose = () => 1;
  front.cutAll("rst");
  await until(() => fleet.told.includes("revive 1"));
  fleet.instances[0]!.ws.publish("all", "afterwards");
  assertEquals(await messages.take(2), ["meanwhile", "afterwards"]);
});

test("the topics of a session that moves, or is taken back, are heard all the time", async (t) => {
  let isLost = true;
  const isState = (message: SyncMessage) => textOf(message).includes('"status":"here"');
  const bus = new MemoryBus(t, { fault: (message) => isLost && isState(message) ? [] : [0] });
  const calls: string[][] = [];
  const adapter: ClusterAdapter = (context) => {
    const mine: string[] = [];
    calls.push(mine);
    const note = (verb: string) => ({ topic }: SyncPlace) => {
      if (topic === "all") mine.push(verb);
    };
    return { ...bus.adapter(context), join: note("join"), leave: note("leave") };
  };
  const fleet = await start(t, adapter, { timeout: 1_000 });
  const front = await network(t, fleet);
  const { opened } = connect(t, front.url);
  await opened;
  fleet.proxy.choose = () => 1;
  front.cutAll("rst");
  await until(() => fleet.told.includes("revive 0"));
  assertEquals(calls, [["join"], []]);
  isLost = false;
  await until(() => {
    front.cutAll("rst");
    return fleet.told.includes("revive 1");
  }, { interval: 200 });
  await until(() => calls[0]!.length > 1);
  assertEquals(calls, [["join", "leave"], ["join", "join", "leave"]]);
});

test("a session goes to an instance that began after all that it has been published", async (t) => {
  const bus = new MemoryBus(t);
  const fleet = await start(t, bus.adapter, { count: 1 });
  const front = await network(t, fleet);
  const { messages, opened } = connect(t, front.url);
  await opened;
  for (const text of ["one", "two"]) fleet.instances[0]!.ws.publish("all", text);
  assertEquals(await messages.take(2), ["one", "two"]);
  const { instances: [later], told } = await start(t, bus.adapter, { count: 1 });
  fleet.proxy.ports.push(later!.port);
  fleet.proxy.choose = () => 1;
  front.cutAll("rst");
  await until(() => told.includes("revive 0"));
  for (const { ws } of [...fleet.instances, later!]) ws.publish("all", "three");
  assertEquals(await messages.take(2), ["three", "three"]);
});

test("nobody waits for publications of an instance that has said farewell", async (t) => {
  const bus = new MemoryBus(t);
  const ids: string[] = [];
  const fleet = await start(t, (context) => {
    ids.push(context.id);
    return bus.adapter(context);
  });
  const { instances: [first, second], proxy, errors } = fleet;
  const peer = await wireClient(t, `${proxy.url}/room`);
  const other = t.use(await wireClient(t, `${second!.url}/room`)); // whose instance is known, then
  await hearsOfAnother(first!);
  await other.close();
  second!.ws.publish("all", "one");
  assertEquals(await peer.message(), "one");
  await second!.ws.close(1012);
  await until(() => !first!.ws.stats().cluster!.instances);
  await sleep(250, t.signal);
  const { instances: [later], told } = await start(t, bus.adapter, { count: 1 });
  proxy.ports.push(later!.port);
  proxy.choose = () => 2;
  t.use(await peer.resume(1, 1));
  assertEquals(told, ["revive 0"]);
  const state = bus.payloads.map((payload) => atob(/"data":"([^"]*)"/.exec(payload)?.[1] ?? ""))
    .find((text) => text.includes('"kind":"state"'))!;
  assertEquals(/"quiet":\[[^\]]*/.exec(state)?.[0].includes(ids[1]!), true);
  assertEquals(errors, []);
});

test("what travels is sealed, and says nothing of the token", async (t) => {
  const bus = new MemoryBus(t);
  const fleet = await start(t, bus.adapter);
  const front = await network(t, fleet);
  const { socket, messages, opened } = connect(t, front.url);
  await opened;
  socket.send("secret");
  await messages.next();
  const [peer] = peersOf(fleet.instances[0]!);
  peer!.context.password = "hunter2";
  fleet.proxy.choose = () => 1;
  front.cutAll("rst");
  await until(() => fleet.told.includes("revive 1"));
  assertEquals(peersOf(fleet.instances[1]!)[0]!.context.password, "hunter2");
  const texts = bus.payloads.map((payload) => {
    const data = /"data":"([^"]*)"/.exec(payload)?.[1] ?? "";
    return payload + Array.from(atob(data)).join("");
  });
  for (const word of ["hunter2", "secret", "password"]) {
    assert(texts.every((text) => !text.includes(word)), word);
  }
});

test("a refusal at the new instance leaves the session where it is", async (t) => {
  const bus = new MemoryBus(t);
  let refuse = false;
  const hooks = {
    upgrade: () => refuse ? new Response("No", { status: 401 }) : undefined,
    revive: () => {},
  };
  const { instances } = await start(t, bus.adapter, { hooks });
  const opened = await fetch(instances[0]!.url, {
    headers: { accept: "text/event-stream", "x-duplex-version": "1" },
  });
  t.defer(() => opened.body!.cancel().catch(() => {}));
  const token = opened.headers.get("x-crossws-id")!;
  const resume = (at: number, attempt: number) =>
    fetch(instances[at]!.url, {
      headers: {
        accept: "text/event-stream",
        "x-duplex-version": "1",
        "x-crossws-id": token,
        "x-duplex-attempt": `${attempt}`,
        "last-event-id": "0",
      },
    });
  refuse = true;
  const refused = await resume(1, 1);
  await refused.text();
  assertEquals(refused.status, 401);
  refuse = false;
  assertEquals(peersOf(instances[0]!).length, 1);
  const back = await resume(0, 2);
  assertEquals(back.status, 200);
  await back.body!.cancel();
});

/** Counts what each instance is given by its driver, in the order in which they are made. */
function counted(adapter: ClusterAdapter, given: number[]): ClusterAdapter {
  return (context) => {
    const driver = adapter(context);
    const at = given.push(0) - 1;
    const { subscribe } = driver;
    driver.subscribe = (deliver) =>
      subscribe.call(driver, (message) => {
        given[at]!++;
        deliver(message);
      });
    return driver;
  };
}

for (const { name, skip, connect: backplane } of drivers) {
  test(
    `over ${name} a session that moves has each publication once, and who has no part in it hears none`,
    async (t) => {
      const given: number[] = [];
      const fleet = await start(t, counted(await backplane(t), given), { count: 4 });
      const { instances, told, proxy } = fleet;
      const front = await network(t, fleet);
      const { messages, opened } = connect(t, front.url);
      await opened;
      const publishers = [0, 1, 2];
      const publish = (text: string) => {
        for (const at of publishers) instances[at]!.ws.publish("all", `${at} ${text}`);
      };
      let n = 0;
      const publishing = setInterval(() => publish(`${n++}`), 2);
      t.defer(() => clearInterval(publishing));
      for (let move = 1; move <= 10; move++) {
        await sleep(20, t.signal);
        proxy.choose = () => move % 2;
        front.cutAll("rst");
        await until(() => told.filter((call) => call.startsWith("revive")).length === move);
      }
      clearInterval(publishing);
      publish("end");
      const heard: string[][] = publishers.map(() => []);
      while (heard.some((texts) => texts.at(-1) !== "end")) {
        const [at, text] = `${await messages.next()}`.split(" ");
        heard[Number(at)]!.push(text!);
      }
      for (const [at, texts] of heard.entries()) {
        const first = Number(texts[0]);
        const all = Array.from({ length: n - first }, (_, i) => `${first + i}`);
        assertEquals(texts, [...all, "end"], `of instance ${at}`);
      }
      assertGreater(given[0]! + given[1]!, n);
      assertLess(given[3]!, 10);
      assertEquals(fleet.errors, []);
    },
    { skip, timeout: 30_000 },
  );
}

test("a context that is no JSON stays where it is, and is relayed", async (t) => {
  const bus = new MemoryBus(t);
  const fleet = await start(t, bus.adapter);
  const front = await network(t, fleet);
  const { socket, messages, opened } = connect(t, front.url);
  await opened;
  socket.send("a");
  await messages.next();
  const [peer] = peersOf(fleet.instances[0]!);
  peer!.context.self = peer!.context;
  fleet.proxy.choose = () => 1;
  front.cutAll("rst");
  socket.send("b");
  assertEquals(await messages.next(), "b 2 at 0");
  assertEquals(fleet.errors.length, 1);
});

/** Sends numbered messages until told to stop, and checks that each is echoed once and in order. */
function talk(t: TestContext, url: string) {
  const connected = connect(t, url);
  const { socket, events } = connected;
  let sent = 0;
  let stopped = false;
  const sending = (async () => {
    await connected.opened;
    while (!stopped) {
      connected.socket.send(`${sent++}`);
      await sleep(5);
    }
  })();
  return {
    socket,
    events,
    opened: connected.opened,
    async stop(): Promise<void> {
      stopped = true;
      await sending;
      const echoes = await connected.messages.take(sent, { timeout: 10_000 });
      assertEquals(
        echoes.map((echo) => `${echo}`.split(" at ")[0]),
        Array.from({ length: sent }, (_, n) => `${n} ${n + 1}`),
      );
    },
  };
}

const faults = (seed: number) => {
  const random = mulberry32(seed);
  return () => {
    const draw = random();
    if (draw < 0.1) return [];
    return draw < 0.2 ? [0, random() * 20] : [random() * 10];
  };
};

for (
  const [name, lossy] of [["a sound backplane", false], ["one that loses 10 %", true]] as const
) {
  test(`through 20 moves over ${name} nothing is lost, repeated or had by two`, async (t) => {
    const seed = pickSeed();
    note(`DUPLEX_SEED=${seed}`);
    const random = mulberry32(seed);
    const bus = new MemoryBus(t, lossy ? { fault: faults(seed) } : {});
    const fleet = await start(t, bus.adapter, { count: 3, ...lossy && { timeout: 1_000 } });
    const front = await network(t, fleet);
    const { socket, events, stop } = talk(t, front.url);
    const most = mostOwners(t, fleet);
    await until(() => socket.readyState === 1);
    for (let move = 0; move < 20; move++) {
      const at = Math.floor(random() * 3);
      fleet.proxy.choose = () => at;
      front.cutAll("rst");
      // Where messages are lost, it takes a tick of the clock to know where a session is.
      await sleep((40 + random() * 60) * (lossy ? 3 : 1));
    }
    await stop();
    assertEquals(most(), 1);
    assertEquals(fleet.told.filter((call) => /open|close/.test(call)), ["open 0"]);
    assertGreater(fleet.told.filter((call) => /revive/.test(call)).length, lossy ? 0 : 2);
    assertEquals(events.includes("error"), false);
  }, { timeout: 40_000 });
}

/** How many instances had the session at once, at most, from now on. */
function mostOwners(
  t: TestContext,
  { instances }: Awaited<ReturnType<typeof start>>,
): () => number {
  let most = 0;
  const counting = setInterval(() => {
    const owners = instances.filter((instance) => peersOf(instance).length > 0);
    most = Math.max(most, owners.length);
  }, 1);
  t.defer(() => clearInterval(counting));
  return () => most;
}

/** What is said of sessions comes as often, after so many ms each time; publications come once. */
function repeating(
  t: TestContext,
  adapter: ClusterAdapter,
  delays: () => number[],
): ClusterAdapter {
  const timers = new Set<ReturnType<typeof setTimeout>>();
  t.defer(() => timers.forEach(clearTimeout));
  return (context) => {
    const driver = adapter(context);
    const subscribe = driver.subscribe.bind(driver);
    driver.subscribe = (deliver) =>
      subscribe((message) => {
        if (textOf(message).includes('"kind":"publication"')) return deliver(message);
        for (const delay of delays()) {
          if (delay) timers.add(setTimeout(() => deliver(message), delay));
          else deliver(message);
        }
      });
    return driver;
  };
}

const overTopics = (): ClusterAdapter => {
  const wires = memoryRedis(3);
  let made = 0;
  return (context) => redis({ client: wires[made++]!, channel: "x" })(context);
};

for (
  const [how, delays] of [
    ["twice", () => [0, 0]],
    ["in any order, and again", () => [Math.random() * 20, Math.random() * 20, 1_000]],
  ] as const
) {
  for (
    const [over, adapterOf] of [
      ["all", (t: TestContext) => new MemoryBus(t).adapter],
      ["topics", overTopics],
    ] as const
  ) {
    test(
      `what is said of moves comes ${how}, over ${over}, and no message does`,
      async (t) => {
        const fleet = await start(t, repeating(t, adapterOf(t), delays), { count: 3 });
        const front = await network(t, fleet);
        const { socket, messages, events, opened } = connect(t, front.url);
        await opened;
        const most = mostOwners(t, fleet);
        let sent = 0;
        for (let step = 0; step < 200; step++) { // 20 moves
          socket.send(`${sent}`);
          fleet.instances[sent % 3]!.ws.publish("all", `p${sent % 3} ${sent++}`);
          await sleep(10, t.signal);
          if (step % 10) continue;
          const at = Math.floor(Math.random() * 3);
          fleet.proxy.choose = () => at;
          front.cutAll("rst");
        }
        const all = (await messages.take(2 * sent, { timeout: 10_000 })).map(String);
        await sleep(200, t.signal);
        assertEquals(messages.left, 0);
        assertEquals(
          all.filter((text) => !text.startsWith("p")).map((text) => text.split(" at ")[0]),
          Array.from({ length: sent }, (_, n) => `${n} ${n + 1}`),
        );
        for (const from of [0, 1, 2]) {
          const got = all.filter((text) => text.startsWith(`p${from}`));
          const each = Array.from({ length: sent }, (_, n) => `p${from} ${n}`);
          assertEquals(got, each.filter((_, n) => n % 3 === from));
        }
        assertEquals(most(), 1);
        assertEquals(fleet.told.filter((call) => /open|close/.test(call)), ["open 0"]);
        assertGreater(fleet.told.filter((call) => /revive/.test(call)).length, 2);
        assertEquals(events.includes("error"), false);
      },
      { timeout: 60_000 },
    );
  }
}

test("a session that has left and come back does not leave for a question that comes again", async (t) => {
  let asked = 0;
  const bus = new MemoryBus(t, {
    fault: (message) => textOf(message).includes('"kind":"adopt"') && !asked++ ? [0, 500] : [0],
  });
  const { told, proxy, instances: [first] } = await start(t, bus.adapter);
  const client = await wireClient(t, `${proxy.url}/room`);
  proxy.choose = () => 1;
  t.use(await client.resume(1, 0));
  proxy.choose = () => 0;
  const back = t.use(await client.resume(2, 0));
  const moves = ["open 0", "suspend 0", "revive 1", "suspend 1", "revive 0"];
  assertEquals([told, asked], [moves, 2]);
  await sleep(600, t.signal);
  await back.send("a");
  assertEquals(await back.message(), "a 1 at 0");
  assertEquals([told, peersOf(first!).length], [moves, 1]);
});

test("a request that comes together with a question for its session is not told that there is none", async (t) => {
  const { verify } = crypto.subtle;
  t.defer(() => crypto.subtle.verify = verify);
  const held = new Map<string, () => void>();
  let holds = true;
  crypto.subtle.verify = async (...args: Parameters<typeof verify>) => {
    const isRight = await verify.apply(crypto.subtle, args);
    const said = textOf({ data: args[3] as Uint8Array<ArrayBuffer> });
    const [, kind] = /"kind":"(request|adopt)"/.exec(said) ?? [];
    if (kind && holds) await new Promise<void>((resolve) => held.set(kind, resolve));
    return isRight;
  };
  const { proxy } = await start(t, new MemoryBus(t).adapter, { count: 3 });
  for (let turns = 0; turns < 16; turns++) { // microtasks of one after the other
    proxy.choose = () => 0;
    const client = await wireClient(t, `${proxy.url}/room`);
    proxy.choose = ({ method }) => method === "GET" ? 2 : 1;
    holds = true;
    const posted = client.send("a");
    const resumed = client.resume(1, 0);
    resumed.catch(() => {}); // where the request fails
    await until(() => held.size === 2);
    holds = false;
    held.get("request")!();
    for (let turn = 0; turn < turns; turn++) await undefined;
    held.get("adopt")!();
    held.clear();
    let status = await posted;
    const back = t.use(await resumed);
    while (status === 503) status = await client.send("a"); // it has just left
    assertEquals([turns, status], [turns, 204]);
    assertMatch(await back.message(), /^a 1 at [02]$/);
    await Promise.all([client.drop(), back.drop()]);
  }
});

test("an instance that ends answers who waits for a session that does not come", async (t) => {
  let asked = 0;
  const bus = new MemoryBus(t, {
    fault: (message) => {
      const text = textOf(message);
      if (text.includes('"kind":"adopt"')) asked++;
      return asked ? [] : [0];
    },
  });
  const { instances: [first, second], proxy } = await start(t, bus.adapter);
  const peer = await wireClient(t, `${proxy.url}/room`);
  await hearsOfAnother(second!);
  assertEquals(first!.ws.stats().sessions.connected, 1);
  proxy.choose = () => 1;
  // One is asked for, and the other waits for that.
  const refusals = [1, 2].map((attempt) =>
    peer.resume(attempt, 0).then(() => 200, ({ status }) => status)
  );
  await until(() => asked > 0);
  await second!.ws.close(1012, "", { signal: AbortSignal.abort() });
  assertEquals(await within(Promise.all(refusals), 1_000, "answers"), [503, 503]);
}, { timeout: 15_000 });

/** Two instances whose sessions move, the second of which can be made deaf: it does not know it at once. */
const DEAFENED: Record<string, (t: TestContext) => { adapter: ClusterAdapter; deafen(): void }> = {
  "a driver that tells what it hears": () => {
    const wires = memoryRedis(2);
    let made = 0;
    return {
      adapter: (context) => redis({ client: wires[made++]!, channel: "x" })(context),
      deafen: () => void (wires[1]!.isDeaf = true),
    };
  },
  "a driver that tells nothing": (t) => {
    const bus = new MemoryBus(t);
    let made = 0;
    let isDeaf = false;
    return {
      adapter: (context) => {
        const at = made++;
        const driver = bus.adapter(context);
        const hears = () => at === 0 || !isDeaf;
        const subscribe: typeof driver.subscribe = (deliver) =>
          driver.subscribe((message) => hears() ? deliver(message) : undefined);
        return { ...driver, subscribe };
      },
      deafen: () => void (isDeaf = true),
    };
  },
};

for (const [over, make] of Object.entries(DEAFENED)) {
  test(`a session that was sent to who is deaf comes back, over ${over}`, async (t) => {
    const { adapter, deafen } = make(t);
    const { told, proxy } = await start(t, adapter, { timeout: 400 });
    const client = await wireClient(t, `${proxy.url}/room`);
    await client.send("a");
    assertEquals(await client.message(), "a 1 at 0");
    deafen();
    proxy.choose = () => 1;
    const failed = await client.resume(1, 1).then(() => 200, ({ status }) => status);
    assertEquals([failed, ...told.slice(0, 2)], [503, "open 0", "suspend 0"]);
    proxy.choose = () => 0;
    let attempt = 1;
    const resumed = () => client.resume(++attempt, 1).catch(() => undefined);
    const back = t.use((await until(resumed, { timeout: 10_000, interval: 100 }))!);
    await back.send("b");
    assertEquals(await back.message(), "b 2 at 0");
    assertEquals(told, ["open 0", "suspend 0", "revive 0"]);
  }, { timeout: 30_000 });
}

test("who was said not to know a session, and says that it has it, is asked again", async (t) => {
  let asked = 0;
  const bus: MemoryBus = new MemoryBus(t, {
    fault(message) {
      const said = unknown(message);
      if (!said || asked++) return [0];
      queueMicrotask(() => bus.inject(said));
      return []; // it has not come yet
    },
  });
  const { instances: [first, second], errors } = await start(t, bus.adapter);
  const client = await wireClient(t, `${first!.url}/room`);
  const response = await fetch(`${second!.url}/room`, {
    method: "POST",
    headers: { "x-crossws-id": client.token, "content-type": "application/websocket-events" },
    body: "SEQ 1\r\n1\r\nTEXT 2\r\nhi\r\n",
  });
  await response.body?.cancel();
  assertEquals(response.status, 204);
  assertEquals(await client.message(), "hi 1 at 0");
  assertEquals([asked, errors], [2, []]);
});

test("a session that got lost on its way comes back, and goes on", async (t) => {
  const lost = { state: 0, have: 0, taken: 0 };
  const bus = new MemoryBus(t, {
    fault: (message) => {
      const text = textOf(message);
      if (/"kind":"state"/.test(text) && lost.state++ === 0) return [];
      // Nor is heard that nobody waits for it any longer, nor is the other instance asked before that.
      if (/"kind":"taken"/.test(text) && lost.taken++ === 0) return [];
      return /"kind":"have"/.test(text) && lost.have++ < 5 ? [] : [0];
    },
  });
  const fleet = await start(t, bus.adapter, { timeout: 200 });
  const front = await network(t, fleet);
  const { socket, messages, opened } = connect(t, front.url, { transport: "post" });
  await opened;
  socket.send("a");
  await messages.next();
  let resumptions = 0; // only the first of them at the other instance
  fleet.proxy.choose = ({ method }) => method === "GET" && resumptions++ === 0 ? 1 : 0;
  front.cutAll("rst");
  socket.send("b");
  assertEquals(await messages.next({ timeout: 8_000 }), "b 2 at 0");
  assertEquals(fleet.told.slice(0, 3), ["open 0", "suspend 0", "revive 0"]);
  assertGreater(lost.have, 5);
}, { timeout: 15_000 });

for (const step of ["encrypt", "decrypt"] as const) {
  test(`a session whose state takes long to ${step} is not asked for before it`, async (t) => {
    const { [step]: soon } = crypto.subtle;
    t.defer(() => crypto.subtle[step] = soon);
    const fleet = await start(t, new MemoryBus(t).adapter, { timeout: 1_000 });
    const front = await network(t, fleet);
    const { socket, messages, opened } = connect(t, front.url, { transport: "post" });
    await opened;
    crypto.subtle[step] = async (...args: Parameters<typeof soon>) => {
      await sleep(700); // longer than a tick
      return await soon.apply(crypto.subtle, args);
    };
    fleet.proxy.choose = () => 1;
    front.cutAll("rst");
    await until(() => fleet.told.includes("suspend 0")); // else it may be there before the resumption
    socket.send("a");
    assertEquals(await messages.next(), "a 1 at 1");
    assertEquals(fleet.told, ["open 0", "suspend 0", "revive 1"]);
    assertEquals(fleet.errors, []);
  });
}

test("a session is found though the instance that knows where it has gone is frozen", async (t) => {
  const ids: string[] = [];
  let frozen = "";
  const bus = new MemoryBus(t, { fault: ({ topic }) => topic === frozen ? [] : [0] });
  const fleet = await start(t, (context) => {
    ids.push(context.id);
    return bus.adapter(context);
  }, { count: 4 });
  const front = await network(t, fleet);
  const { socket, messages, opened, events } = connect(t, front.url, { transport: "post" });
  await opened;
  for (const at of [1, 2]) { // where each knows the next
    fleet.proxy.choose = () => at;
    front.cutAll("rst");
    await until(() => fleet.told.includes(`revive ${at}`));
  }
  frozen = ids[1]!;
  socket.send("a");
  fleet.proxy.choose = () => 3; // which asks 0, which says 1
  assertEquals(await messages.next(), "a 1 at 2");
  fleet.proxy.choose = ({ method }) => method === "GET" ? 0 : 3;
  front.cutAll("rst");
  await until(() => fleet.told.includes("revive 0"));
  socket.send("b");
  assertEquals(await messages.next(), "b 2 at 0");
  socket.close();
  await until(() => fleet.told.includes("close 0 1005"));
  assertEquals(events.filter((type) => type === "error"), []);
}, { timeout: 30_000 });

test("a session moves though whoever is said to have it is frozen, and gave it away", async (t) => {
  const ids: string[] = [];
  let frozen = "";
  const bus = new MemoryBus(t, { fault: ({ topic }) => topic === frozen ? [] : [0] });
  const { instances, proxy, told } = await start(t, (context) => {
    ids.push(context.id);
    return bus.adapter(context);
  }, { count: 4 });
  const peer = await wireClient(t, `${proxy.url}/room`);
  for (const at of [1, 2]) { // where each knows the next
    proxy.choose = () => at;
    t.use(await peer.resume(at, 0));
    await until(() => instances[at - 1]!.ws.stats().movedOut === 1);
  }
  frozen = ids[1]!;
  proxy.choose = () => 3; // which asks 0, which says 1
  t.use(await peer.resume(3, 0));
  assertEquals(told.slice(-2), ["suspend 2", "revive 3"]);
}, { timeout: 30_000 });

test("a session that has been everywhere is asked for where its token says", async (t) => {
  const bus = new MemoryBus(t, { send: true });
  const count = 8;
  const { instances, proxy, errors } = await start(t, bus.adapter, { count });
  let peer = await wireClient(t, `${proxy.url}/room`);
  let old = peer;
  for (let at = 1; at < count; at++) {
    proxy.choose = () => at;
    peer = t.use(await peer.resume(at, 0));
    if (at === 1) old = peer;
  }
  await until(() => instances.at(-2)!.ws.stats().movedOut === 1);
  bus.reset();
  for (let at = 0; at < count; at++) { // each knows where the session went from there
    proxy.choose = () => at;
    assertEquals(await peer.send("a"), 204);
  }
  assertEquals(bus.counts.published, 2 * (count - 1), "a request and its answer each");
  // An adoption as well goes to who has the session.
  bus.reset();
  proxy.choose = () => 0;
  t.use(await peer.resume(count, 0));
  await until(() => instances.at(-1)!.ws.stats().movedOut === 1);
  assertEquals(bus.counts.published, 3, "adopt, state, adopted");
  // Nor is it lost where its client has not heard of its ways since: each instance knows the next.
  for (let at = 1; at < count; at++) {
    proxy.choose = () => at;
    assertEquals(await old.send("b"), 204, `at ${at}`);
  }
  proxy.choose = () => 3;
  t.use(await old.resume(count + 1, 0));
  assertEquals(errors, []);
}, { timeout: 30_000 });

test("a session that has just come, and has no name yet, is not asked for again", async (t) => {
  const { digest } = crypto.subtle;
  t.defer(() => crypto.subtle.digest = digest);
  let isSlow = false;
  let asked = 0;
  const bus = new MemoryBus(t, {
    fault: (message) => {
      const text = textOf(message);
      if (text.includes('"kind":"adopt"')) asked++;
      const isState = text.includes('"kind":"state"');
      isSlow ||= isState;
      return [isState ? 300 : 0]; // both ask by then
    },
  });
  crypto.subtle.digest = async (...args: Parameters<typeof digest>) => {
    if (isSlow) await sleep(50);
    return await digest.apply(crypto.subtle, args);
  };
  const { proxy, told, errors } = await start(t, bus.adapter);
  const peer = await wireClient(t, `${proxy.url}/room`);
  proxy.choose = () => 1;
  const first = peer.resume(1, 0).then((back) => void t.use(back), () => {}); // 409, if it is late
  t.use(await peer.resume(2, 0));
  await first;
  assertEquals([asked, told, errors], [1, ["open 0", "suspend 0", "revive 1"], []]);
});

/** A bus that loses the first so many messages of a kind. */
function losing(t: TestContext, kind: string, most: number): { bus: MemoryBus; lost: string[] } {
  const lost: string[] = [];
  const bus = new MemoryBus(t, {
    fault: (message) => {
      const text = textOf(message);
      if (!text.includes(`"kind":"${kind}"`) || lost.length === most) return [0];
      lost.push(text);
      return [];
    },
  });
  return { bus, lost };
}

test("a request that waits for an instance that has gone is served where its session has come", async (t) => {
  const { bus, lost } = losing(t, "request", 1);
  const { proxy, told, errors } = await start(t, bus.adapter);
  const peer = await wireClient(t, `${proxy.url}/room`);
  proxy.choose = () => 1;
  const status = peer.send("a");
  await until(() => lost.length === 1);
  const moved = t.use(await peer.resume(1, 0));
  assertEquals(await moved.message(), "a 1 at 1");
  assertEquals(await status, 204);
  assertEquals([told, errors], [["open 0", "suspend 0", "revive 1"], []]);
});

test("a request waits where its session is about to be in service", async (t) => {
  const bus = new MemoryBus(t);
  const late: (() => void)[] = [];
  let started = 0;
  const fleet = await start(t, (context) => {
    const driver = bus.adapter(context);
    if (started++ !== 1) return driver;
    // Publications come late to the second one: it waits for them before it takes a session.
    const subscribe: typeof driver.subscribe = (deliver) =>
      driver.subscribe((message) => {
        const text = textOf(message);
        if (!text.includes('"kind":"publication"')) deliver(message);
        else late.push(() => deliver(message));
        if (message.topic !== context.id || !text.includes('"kind":"request"')) return;
        setTimeout(() => late.forEach((go) => go()), 20);
      });
    return { ...driver, subscribe };
  }, { count: 3 });
  const { instances, proxy, told, errors } = fleet;
  const peer = await wireClient(t, `${proxy.url}/room`);
  instances[0]!.ws.publish("all", "one");
  assertEquals(await peer.message(), "one");
  proxy.choose = () => 1;
  const resuming = peer.resume(1, 1);
  await until(() => told.includes("suspend 0"));
  proxy.choose = () => 2; // which asks the first, and then all
  assertEquals(await peer.send("a"), 204);
  const moved = t.use(await resuming);
  assertEquals(await moved.message(), "a 1 at 1");
  assertEquals([told, errors], [["open 0", "suspend 0", "revive 1"], []]);
});

test("all are asked for a session as often as it takes", async (t) => {
  const { bus, lost } = losing(t, "where", 2);
  let isFrozen = false;
  const ids: string[] = [];
  const fleet = await start(t, (context) => {
    ids.push(context.id);
    const driver = bus.adapter(context);
    const publish: typeof driver.publish = (message, place) => {
      if (!isFrozen || message.topic !== ids[0]) return driver.publish(message, place);
    };
    return { ...driver, publish };
  }, { count: 3 });
  const { proxy, errors } = fleet;
  const peer = await wireClient(t, `${proxy.url}/room`);
  proxy.choose = () => 1;
  const moved = t.use(await peer.resume(1, 0));
  isFrozen = true; // so is the instance that knows where the session has gone
  proxy.choose = () => 2;
  assertEquals(await peer.send("a"), 204);
  assertEquals(await moved.message(), "a 1 at 1");
  assertEquals([lost.length, errors], [2, []]);
});

test("where answers take long, all are asked later, until one is quick again", async (t) => {
  let delay = 300;
  let isDown = false;
  let frozen = "";
  const ids: string[] = [];
  const asked: SyncMessage[] = [];
  const bus = new MemoryBus(t, {
    fault(message) {
      if (textOf(message).includes('"kind":"where"')) asked.push(message);
      return message.topic === frozen ? [] : [delay];
    },
    settled: () => isDown ? Promise.reject(new Error("it is down")) : Promise.resolve(),
  });
  const { proxy, errors } = await start(t, (context) => {
    ids.push(context.id);
    return bus.adapter(context);
  }, { count: 3 });
  const peer = await wireClient(t, `${proxy.url}/room`);
  proxy.choose = () => 2;
  for (const text of "abcd") assertEquals(await peer.send(text), 204);
  const before = asked.length;
  assertGreater(before, 0);
  assertEquals(await peer.send("e"), 204);
  assertEquals(asked.length, before, "they would be slower only");
  isDown = true;
  assertEquals(await peer.send("lost"), 503); // at once, and that is no answer
  isDown = false;
  await until(async () => await peer.send("f") === 204); // "lost" may have come nevertheless
  assertEquals(asked.length, before, "nor is what could not be asked an answer");
  delay = 0;
  assertEquals(await peer.send("g"), 204);
  proxy.choose = () => 1;
  const moved = t.use(await peer.resume(1, 7));
  frozen = ids[0]!;
  proxy.choose = () => 2;
  const sent = peer.send("h");
  await until(() => asked.length > before, { timeout: 1_200 }); // 300 ms, and not 1,800
  assertEquals(await sent, 204);
  assertEquals(await moved.message(), "h 8 at 1");
  assertEquals(errors, ["Error: it is down"]);
});

for (
  const [what, provoke] of [
    ["A timeout", (client: WireClient) => client.send("nobody answers")],
    ["That nobody knows a session", ({ url, token }: WireClient) => stranger(url, token)],
  ] as const
) {
  test(`who has not answered does not tell how long answers take: ${what}`, async (t) => {
    let frozen = "";
    const ids: string[] = [];
    const asked: SyncMessage[] = [];
    const bus = new MemoryBus(t, {
      fault(message) {
        if (textOf(message).includes('"kind":"where"')) asked.push(message);
        return message.topic === frozen ? [] : [0];
      },
    });
    const { proxy } = await start(t, (context) => {
      ids.push(context.id);
      return bus.adapter(context);
    }, { timeout: 1_600 });
    const client = await wireClient(t, `${proxy.url}/room`);
    proxy.choose = () => 1;
    const freeze = () => frozen = ids[0]!;
    if (what === "A timeout") freeze();
    const statuses = await Promise.all([1, 2, 3, 4].map(() => provoke(client)));
    assertEquals(new Set(statuses), new Set([what === "A timeout" ? 503 : 404]));
    freeze();
    asked.length = 0;
    assertEquals(await client.send("a"), 503);
    assertEquals(asked.length, 2, "after 300 ms and 900 ms, not after 800 ms alone");
  }, { timeout: 15_000 });
}

/** An uplink of a session that the instance of this token has never had. */
async function stranger(url: string, token: string): Promise<number> {
  const made = `${token.slice(0, token.indexOf("."))}.${crypto.randomUUID().replaceAll("-", "")}`;
  const response = await fetch(url, {
    method: "POST",
    headers: { "x-crossws-id": made, "content-type": "application/websocket-events" },
    body: "SEQ 1\r\n1\r\nTEXT 2\r\nhi\r\n",
  });
  await response.body?.cancel();
  return response.status;
}

test("an instance that ends brings back the answers that others are about to give", async (t) => {
  let isSlow = false;
  const bus = new MemoryBus(t, { fault: () => [isSlow ? 100 : 0] });
  const { instances, proxy, errors } = await start(t, bus.adapter);
  const peer = await wireClient(t, `${proxy.url}/room`);
  proxy.choose = () => 1;
  isSlow = true;
  const status = peer.send("a");
  await until(() => instances[1]!.ws.stats().cluster!.relayed === 1);
  await instances[1]!.ws.close(1012);
  assertEquals(await status, 204);
  const late = await peer.post("TEXT 1\r\nb\r\n");
  assertEquals([late.status, late.headers.get("retry-after")], [503, null]);
  await late.text();
  assertEquals(errors, []);
});

test("a session is found though the instance that it left has gone since", async (t) => {
  const fleet = await start(t, new MemoryBus(t).adapter, { count: 3 });
  const { instances, proxy, told } = fleet;
  const peer = await wireClient(t, `${proxy.url}/room`);
  const { token, id } = peer; // which name the first instance
  await hearsOfAnother(instances[2]!);
  proxy.choose = () => 1;
  const moved = t.use(await peer.resume(1, 0));
  assertEquals(told, ["open 0", "suspend 0", "revive 1"]);
  assert(moved.token !== token);
  await instances[0]!.ws.close(1012);
  // What the client had sent before it heard of its new token comes to an instance that knows nothing.
  proxy.choose = () => 2;
  assertEquals(await peer.send("a"), 204);
  assertEquals(await moved.message(), "a 1 at 1");
  // And so it may come back, where its new token has been lost.
  assertEquals(peer.id, id);
  t.use(await peer.resume(2, 0));
  assertEquals(told.slice(3), ["suspend 1", "revive 2"]);
});

for (const frozen of ["does not answer", "has died"] as const) {
  test(
    `nobody is told that a session is over while an instance that may have it ${frozen}`,
    async (t) => {
      let held: (() => void)[] | undefined;
      const ids: string[] = [];
      const bus = new MemoryBus(t);
      const fleet = await start(t, (context) => {
        const driver = bus.adapter(context);
        const isSecond = ids.push(context.id) === 2;
        return {
          ...driver,
          publish: (message) => isSecond && held ? undefined : driver.publish(message),
          subscribe: (deliver) =>
            driver.subscribe((message) => {
              if (isSecond && held) held.push(() => deliver(message));
              else deliver(message);
            }),
        };
      }, { count: 3 });
      const { instances, proxy, told } = fleet;
      const first = await wireClient(t, `${proxy.url}/room`);
      await hearsOfAnother(instances[2]!);
      proxy.choose = () => 1;
      t.use(await first.resume(1, 0)); // and that its client does not hear
      instances[1]!.ws.publish("all", "");
      await until(() => instances[2]!.ws.stats().cluster!.instances === 2);
      await instances[0]!.ws.close(1012);
      held = [];
      proxy.choose = () => 2;
      let attempt = 1;
      const status = () =>
        first.resume(++attempt, 0).then((client) => {
          t.use(client);
          return 200;
        }, ({ status }) => status as number);
      assertEquals([await first.send("a"), await status()], [503, 503]);
      if (frozen === "has died") {
        await until(async () => await status() === 404, { timeout: 30_000, interval: 500 });
        assertEquals(instances[2]!.ws.stats().cluster!.instances, 0);
      }
      const late = held;
      held = undefined;
      for (const deliver of late) deliver();
      if (frozen === "does not answer") {
        await until(async () => await status() === 200);
        assert(told.includes("revive 2"));
      }
    },
    { timeout: 60_000 },
  );
}

test("however many sessions are looked for, all are asked for a sign twice a second at most", async (t) => {
  let signs = 0;
  const bus = new MemoryBus(t);
  const { instances, proxy } = await start(t, (context) => {
    const driver = bus.adapter(context);
    return {
      ...driver,
      publish(message) {
        if (textOf(message).includes('"kind":"hello"')) signs++;
        return driver.publish(message);
      },
    };
  }, { count: 3, resumeTimeout: 0 });
  const { token } = await wireClient(t, `${proxy.url}/room`);
  await hearsOfAnother(instances[1]!);
  for (const peer of peersOf(instances[0]!)) peer.terminate();
  await instances[0]!.ws.close(1012);
  signs = 0;
  const statuses = await Promise.all(Array.from({ length: 40 }, async (_, n) => {
    await sleep(20 * n, t.signal);
    const { status, body } = await fetch(`${instances[1]!.url}/room`, {
      method: "POST",
      headers: {
        "x-crossws-id": `${token.slice(0, -4)}${1000 + n}`,
        "content-type": "application/websocket-events",
      },
    });
    await body?.cancel();
    return status;
  }));
  assertEquals(new Set(statuses), new Set([404]));
  assertGreater(signs, 0);
  assertLessOrEqual(signs, 4, "for 1.8 s");
});

test("a session that no instance has is not waited for, where its own has gone", async (t) => {
  const fleet = await start(t, new MemoryBus(t).adapter, { count: 2, resumeTimeout: 0 });
  const { instances, proxy, errors } = fleet;
  const peer = await wireClient(t, `${proxy.url}/room`);
  await hearsOfAnother(instances[1]!);
  for (const peer of peersOf(instances[0]!)) peer.terminate();
  await instances[0]!.ws.close(1012);
  await until(() => !instances[1]!.ws.stats().cluster!.instances);
  proxy.choose = () => 1;
  assertEquals(await peer.send("a"), 404);
  assertEquals(await peer.resume(1, 0).catch(({ status }) => status), 404);
  assertEquals(errors, []);
});

test("at a shutdown sessions go to other instances, and no client sees a close", async (t) => {
  const bus = new MemoryBus(t);
  const fleet = await start(t, bus.adapter);
  const talks = Array.from({ length: 10 }, () => talk(t, fleet.proxy.url));
  await Promise.all(talks.map(({ opened }) => opened));
  fleet.proxy.choose = () => 1;
  await fleet.instances[0]!.ws.close(1012);
  assertEquals(peersOf(fleet.instances[1]!).length, 10);
  await Promise.all(talks.map(({ stop }) => stop()));
  for (const { events } of talks) assertEquals(events.filter((type) => type !== "open"), []);
  const calls = fleet.told.map((call) => call.split(" ")[0]!);
  for (const name of ["open", "suspend", "revive"]) {
    assertEquals(calls.filter((call) => call === name).length, 10, name);
  }
  assertEquals(calls.includes("close"), false);
}, { timeout: 30_000 });

test("an instance that ends while a session is on its way to it sends that on, too", async (t) => {
  let isSlow = false;
  const bus = new MemoryBus(t, { fault: () => [isSlow ? 100 : 0] });
  const { instances, told, proxy } = await start(t, bus.adapter, { count: 3 });
  const { socket, messages, opened, events } = connect(t, proxy.url);
  await opened;
  socket.send("a");
  assertEquals(await messages.next(), "a 1 at 0");
  isSlow = true;
  proxy.choose = () => 1;
  const first = instances[0]!.ws.close(1012);
  await until(() => proxy.log.at(-1)!.endsWith(" 1"));
  await sleep(20, t.signal); // it asks for the session
  proxy.choose = () => 2;
  await Promise.all([first, instances[1]!.ws.close(1012)]);
  socket.send("b");
  assertEquals(await messages.next(), "b 2 at 2");
  assertEquals(told, ["open 0", "suspend 0", "revive 1", "suspend 1", "revive 2"]);
  assertEquals(events, ["open"]);
});

/** Instances that hear what they have joined; `join` may refuse a topic. */
function joining(bus: MemoryBus, join: (place: SyncPlace) => void): ClusterAdapter {
  return (context) => ({ ...bus.adapter(context), join, leave() {} });
}

test("onError hears of topics that cannot be joined for a move, and the session stays", async (t) => {
  let isDown = false;
  const adapter = joining(new MemoryBus(t), ({ topic }) => {
    if (isDown && topic === "all") throw new Error("the topic cannot be joined");
  });
  const { told, errors, proxy } = await start(t, adapter);
  const client = await wireClient(t, `${proxy.url}/room`);
  isDown = true;
  proxy.choose = () => 1;
  await client.drop();
  t.use(await client.resume(1, 0));
  assertEquals(told, ["open 0", "suspend 0", "revive 0"]);
  assertEquals(errors, ["Error: the topic cannot be joined"]);
});

test("who ends in a hurry while the rest of a session is to come tells its hooks of the end", async (t) => {
  const said: string[] = [];
  const fault = (message: SyncMessage) => {
    const text = textOf(message);
    const kind = /"kind":"(\w+)"/.exec(text)?.[1] ?? "";
    said.push(kind);
    return kind === "rest" ? [] : [0];
  };
  const adapter = joining(new MemoryBus(t, { fault }), () => {});
  const { told, instances, proxy } = await start(t, adapter);
  const client = await wireClient(t, `${proxy.url}/room`);
  proxy.choose = () => 1;
  await client.drop();
  const resumed = client.resume(1, 0).then((back) => void t.use(back), () => {});
  await until(() => said.includes("rest"));
  await instances[1]!.ws.close(1012, "", { signal: AbortSignal.abort() });
  await resumed;
  await until(() => told.some((one) => one.startsWith("close")));
  assertEquals(told.map((one) => one.slice(0, 8)), ["open 0", "suspend ", "revive 1", "close 1 "]);
});

test("a connection of a certain age is renewed, and nobody notices", async (t) => {
  const bus = new MemoryBus(t);
  const fleet = await start(t, bus.adapter, { maxConnectionAge: 200 });
  let turn = 0;
  fleet.proxy.choose = () => turn++ % 2;
  const { events, socket, stop } = talk(t, fleet.proxy.url);
  await until(() => fleet.told.filter((call) => call.startsWith("revive")).length > 3);
  await stop();
  assertEquals(events, ["open"]);
  assertEquals(socket.readyState, 1);
}, { timeout: 20_000 });
