/**
 * The drivers of drivers.ts, beyond what cluster.test.ts asks of every driver: an instance is given
 * only what concerns it, however many others there are, and goes on after its backplane was away.
 */
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { decodeEnvelope } from "crossws/sync";
import { cluster, type ClusterAdapter } from "../cluster.ts";
import { nats, type NatsClient, pgsql, type PostgresClient, redis } from "../drivers.ts";
import type { SSEAdapter, SyncMessage } from "../server.ts";
import {
  assert,
  assertEquals,
  assertGreater,
  assertLess,
  assertRejects,
  assertThrows,
  root,
  sleep,
  test,
  type TestContext,
  until,
} from "./harness.ts";
import { connect, listen, type Pair, shutDown } from "./pair.ts";
import { MemoryBus, memoryRedis } from "./bus.ts";
import { drivers } from "./topical.ts";
import { wireClient } from "./wire.ts";

/** What one instance was given by its driver. */
interface Given {
  messages: number;
  bytes: number;
}

interface Fleet {
  readonly instances: Pair<Record<string, unknown>>[];
  readonly given: Given[];
  readonly errors: string[];
}

/** `?topics=a,b` subscribes; "publish topic text" publishes, "join topic" and "leave topic" change that. */
async function start(t: TestContext, adapter: ClusterAdapter, count: number): Promise<Fleet> {
  t.defer(() => sleep(50)); // what is being signed or verified
  const given: Given[] = [];
  const errors: string[] = [];
  const instances: Pair<Record<string, unknown>>[] = [];
  for (let n = 0; n < count; n++) {
    const mine: Given = given[n] = { messages: 0, bytes: 0 };
    instances.push(
      await listen(t, {
        sync: cluster(counted(adapter, mine)),
        onError: (error, { stage }) => void errors.push(`${stage}: ${(error as Error).message}`),
        hooks: {
          open(peer) {
            const topics = new URL(peer.request.url).searchParams.get("topics");
            for (const topic of topics?.split(",") ?? []) peer.subscribe(topic);
          },
          message(peer, message) {
            const [verb, topic = "", text] = message.text().split(" ");
            if (verb === "publish") peer.publish(topic, text);
            else if (verb === "join") peer.subscribe(topic);
            else if (verb === "leave") peer.unsubscribe(topic);
            peer.send(verb);
          },
        },
      }),
    );
  }
  return { instances, given, errors };
}

/** Counts what a driver delivers, before anything looks at it. */
function counted(adapter: ClusterAdapter, given: Given): ClusterAdapter {
  return (context) => {
    const driver = adapter(context);
    const { join, leave, send } = driver;
    return {
      maxPayload: driver.maxPayload,
      subscribe: (deliver) =>
        driver.subscribe((message) => {
          given.messages++;
          given.bytes += message.data.length;
          deliver(message);
        }),
      publish: (message, place) => driver.publish(message, place),
      close: () => driver.close?.(),
      ...join && { join: (place) => join.call(driver, place) },
      ...leave && { leave: (place) => leave.call(driver, place) },
      ...send && { send: (id, message) => send.call(driver, id, message) },
    };
  };
}

/** Resolves when a publication to the topic reaches the subscriber: joining takes a while. */
async function heard(
  { ws }: { ws: SSEAdapter },
  { messages }: ReturnType<typeof connect>,
  topic: string,
  namespace?: string,
): Promise<void> {
  let hears = false;
  const hearing = (async () => {
    while (await messages.next({ timeout: 15_000 }) !== `are you there, ${topic}?`);
    hears = true;
  })();
  while (!hears) {
    ws.publish(topic, `are you there, ${topic}?`, namespace === undefined ? {} : { namespace });
    await Promise.race([hearing, sleep(50)]);
  }
  await sleep(100); // for those that were published meanwhile
  while (messages.left) await messages.next();
}

for (const { name, skip, start: run } of drivers) {
  test(
    `${name}: an instance hears the topics that somebody there subscribes to, no others`,
    async (t) => {
      const { adapter } = await run(t);
      const { instances: [a, b, c], given, errors } = await start(t, adapter, 3);
      const one = connect(t, `${b!.url}/room?topics=news,${"long".repeat(2000)},%00%C3%A4.*%3E`);
      await one.opened;
      await heard(a!, one, "news");
      const idle = given[2]!.messages;
      a!.ws.publish("news", "to all namespaces");
      assertEquals(await one.messages.next(), "to all namespaces");
      for (const topic of ["news", "long".repeat(2000), "\0ä.*>"]) {
        const [[namespace]] = [...b!.ws.peers] as [[string, unknown]];
        a!.ws.publish(topic, `to ${topic}`, { namespace });
        assertEquals(await one.messages.next(), `to ${topic}`);
        const large = `${topic} ä`.repeat(200_000 / topic.length);
        a!.ws.publish(topic, large, { namespace }); // in parts, where the backplane takes no more
        assertEquals(await one.messages.next(), large);
      }
      const before = given[1]!.messages;
      for (let n = 0; n < 50; n++) {
        a!.ws.publish("other", `${n}`);
        a!.ws.publish("news", `${n}`, { namespace: "another" });
      }
      one.socket.send("leave news");
      assertEquals(await one.messages.next(), "leave");
      await sleep(100, t.signal);
      assertEquals(given[1]!.messages, before, "another topic, and another namespace");
      a!.ws.publish("news", "too late");
      const [[namespace]] = [...b!.ws.peers] as [[string, unknown]];
      a!.ws.publish("\0ä.*>", "passed", { namespace });
      assertEquals(await one.messages.next(), "passed"); // and what came before it, too
      for (let n = 0; n < 5; n++) { // what is wanted last holds
        for (const verb of ["join", "leave"]) {
          one.socket.send(`${verb} news`);
          assertEquals(await one.messages.next(), verb);
        }
      }
      one.socket.send("join news");
      assertEquals(await one.messages.next(), "join");
      await heard(a!, one, "news");
      assertEquals(given[2]!.messages, idle, "nobody is there");
      assertGreater(given[1]!.messages, before);
      assertEquals(c!.ws.stats().sessions.connected, 0);
      assertEquals(errors, []);
    },
    { skip, timeout: 30_000 },
  );

  test(
    `${name}: a server that dies and comes back is found again, by who has joined what`,
    async (t) => {
      const { adapter, server } = await run(t);
      const { instances, errors } = await start(t, adapter, 2);
      const [a, b] = instances as [Pair<never>, Pair<never>];
      const one = connect(t, `${b.url}/room?topics=news`);
      await one.opened;
      await heard(a, one, "news");
      const client = await wireClient(t, `${b.url}/room`);
      await server.kill();
      const late = connect(t, `${b.url}/room?topics=late`); // joins while nobody answers
      await late.opened;
      one.socket.send("leave news");
      one.socket.send("join more");
      assertEquals(await one.messages.take(2), ["leave", "join"], "what is here goes on");
      await sleep(500, t.signal);
      await server.start();
      await heard(a, late, "late");
      await heard(a, one, "more");
      const route = async () => {
        const response = await fetch(`${a.url}/room`, {
          method: "POST",
          headers: { "x-crossws-id": client.token, "content-type": "application/websocket-events" },
          body: "SEQ 1\r\n1\r\nTEXT 2\r\nhi\r\n",
        });
        await response.body?.cancel();
        return response.status;
      };
      await until(async () => await route() === 204, { timeout: 15_000 });
      assert(errors.every((error) => /^(publish|subscribe): /.test(error)), errors.join("\n"));
    },
    { skip, timeout: 60_000 },
  );
}

// ---------------------------------------------------------------- flat

type Load = Record<"routed" | "published" | "idle", number>;

/** Messages that each instance is given of a routed request and of a quiet time, and all of a publication. */
async function load(
  t: TestContext,
  adapter: ClusterAdapter,
  count: number,
  quiet = 5_500, // an instance says every 5 s that it is there, if it does
): Promise<Load> {
  const { instances, given, errors } = await start(t, adapter, count);
  const clients = await Promise.all(instances.map(({ url }) => wireClient(t, `${url}/room`)));
  const room = [0, 1, 2].map((n) => connect(t, `${instances[n]!.url}/room?topics=news`));
  for (const one of room) await one.opened;
  for (const one of room.slice(1)) await heard(instances[0]!, one, "news");
  await heard(instances[1]!, room[0]!, "news");
  const measure = async (act: () => unknown) => {
    const before = given.reduce((sum, { messages }) => sum + messages, 0);
    await act();
    await sleep(300, t.signal);
    return (given.reduce((sum, { messages }) => sum + messages, 0) - before) / count;
  };
  // Each instance gets nine requests for the session of the next one.
  const routed = await measure(async () => {
    for (let seq = 1; seq <= 9; seq++) {
      await Promise.all(instances.map(async ({ url }, n) => {
        const response = await fetch(`${url}/room`, {
          method: "POST",
          headers: {
            "x-crossws-id": clients[(n + 1) % count]!.token,
            "content-type": "application/websocket-events",
          },
          body: `SEQ 1\r\n${seq}\r\nTEXT 2\r\nhi\r\n`,
        });
        assertEquals(response.status, 204);
      }));
    }
  });
  // Ten publications, to a room that is on three of them.
  const published = await measure(() => {
    for (let n = 0; n < 10; n++) instances[0]!.ws.publish("news", "x");
  });
  const idle = await measure(() => sleep(quiet, t.signal));
  assertEquals(errors, []);
  return { routed: routed / 9, published: published * count / 10, idle };
}

/** What an instance gets stays the same as others are added. */
function assertFlat(few: Load, many: Load): void {
  for (const kind of ["routed", "published", "idle"] as const) {
    assertLess(many[kind], few[kind] * 1.2 + 0.4, `${kind}: ${few[kind]}, then ${many[kind]}`);
  }
}

for (const { name, skip, start: run } of drivers) {
  test(`${name}: six instances are given no more each than three`, async (t) => {
    const { adapter } = await run(t);
    const quiet = name.includes("Redis") ? undefined : 500; // what is said does not depend on it
    const few = await load(t, adapter, 3, quiet);
    const many = await load(t, adapter, 6, quiet);
    assertFlat(few, many);
    assertEquals(few.routed, 2, "the request and its answer");
    assertEquals(many.idle, 0);
  }, { skip, timeout: 60_000 });
}

test("the same is found out of a driver that reaches all", async (t) => {
  const loads = [3, 6].map((count) => load(t, new MemoryBus(t).adapter, count));
  const [few, many] = await Promise.all(loads) as [Load, Load];
  for (const kind of ["routed", "published", "idle"] as const) {
    assertThrows(() => assertFlat(few, { ...few, [kind]: many[kind] }));
  }
}, { timeout: 60_000 });

// ---------------------------------------------------------------- small things

test("PostgreSQL: what is published in one turn goes in order, together, though it is the same", async () => {
  const statements: string[][][] = [];
  const client: PostgresClient = {
    listen: () => Promise.resolve({ unlisten: () => Promise.resolve() }),
    unsafe: async (_, [messages]) => {
      statements.push(JSON.parse(messages!));
      await sleep(5);
    },
  };
  const driver = pgsql({ client, channel: "x" })({ id: "a" });
  const message: SyncMessage = { namespace: "", topic: "t", data: "same" };
  const sending = Array.from(
    { length: 450 },
    (_, n) => driver.publish({ ...message, data: n < 2 ? "same" : `${n}` }),
  );
  await Promise.all(sending);
  assertEquals(statements.map(({ length }) => length), [200, 200, 50]);
  const said = statements.flat().map(([, payload]) => JSON.parse(payload!).msg.data);
  assertEquals(said, ["same", "same", ...Array.from({ length: 448 }, (_, n) => `${n + 2}`)]);
  assertThrows(() => pgsql({ client, channel: "x".repeat(51) }), RangeError);
});

/** A NATS whose server does not always answer. */
function lonelyNats() {
  const state = { isDown: false, subjects: [] as string[], made: 0 };
  const client: NatsClient = {
    publish() {},
    subscribe(subject) {
      state.subjects.push(subject);
      state.made++;
      return {
        unsubscribe: () => void state.subjects.splice(state.subjects.indexOf(subject), 1),
      };
    },
    flush: () => state.isDown ? Promise.reject(new Error("it is down")) : Promise.resolve(),
  };
  return { state, driver: nats({ client, channel: "x" })({ id: "a" }) };
}

/** A NATS where what is published is heard at once, and two drivers on it. */
function wiredNats(t: TestContext) {
  const callbacks = new Map<string, (payload: string) => void>();
  const payloads: string[] = [];
  const client: NatsClient = {
    publish(subject, payload) {
      payloads.push(payload);
      callbacks.get(subject)?.(payload);
    },
    subscribe(subject, { callback }) {
      callbacks.set(subject, (payload) => callback(null, { string: () => payload }));
      return { unsubscribe: () => void callbacks.delete(subject) };
    },
    flush: () => Promise.resolve(),
  };
  const [one, other] = ["a", "b"].map((id) => nats({ client, channel: "x" })({ id }));
  t.defer(() => Promise.all([one!.close(), other!.close()]));
  const got: SyncMessage[] = [];
  other!.subscribe((message) => void got.push(message));
  const say = (payload: string) => void [...callbacks.values()][0]!(payload);
  return { one: one!, other: other!, got, payloads, say };
}

for (const native of [true, false]) {
  const by = native ? "as the runtime does it" : "where the runtime cannot do it";
  test(`bytes of any length arrive as they were, ${by}`, async (t) => {
    if (!native) {
      const { prototype } = Uint8Array as { prototype: object };
      const own = Object.getOwnPropertyDescriptor(prototype, "toBase64");
      if (own) t.defer(() => void Object.defineProperty(prototype, "toBase64", own));
      Reflect.deleteProperty(prototype, "toBase64");
    }
    const { one, other, got, payloads } = wiredNats(t);
    const place = { namespace: "\0room", topic: "t" };
    await other.join(place);
    const lengths = [0, 1, 2, 3, 255, 256, 0x1fff, 0x2000, 0x2001, 0x4001, 100_000];
    for (const [n, length] of lengths.entries()) {
      const data = Uint8Array.from({ length }, (_, at) => at * 7 + (at >> 8));
      const whole = new Uint8Array([1, ...data, 1]);
      await one.publish({ ...place, data: whole.subarray(1, -1) });
      assertEquals(got[n], { ...place, data }, `${length} bytes`);
      assertEquals(decodeEnvelope(payloads[n]!), { id: "a", msg: { ...place, data } }, "crossws's");
    }
    await one.publish({ ...place, data: "text, and \0 \ud83d\ude00" });
    assertEquals(got.at(-1), { ...place, data: "text, and \0 \ud83d\ude00" });
  });
}

test("what is no message on a driver's channel is dropped, and what follows is heard", async (t) => {
  const { one, other, got, say } = wiredNats(t);
  const place = { namespace: "\0room", topic: "t" };
  await other.join(place);
  const msg = { ...place, binary: false, data: "" };
  const wrong = [
    ...["", "garbage", "null", "1", "[]", "{}", '"text"', "[".repeat(100_000)],
    ...[{ id: 1, msg }, { msg }, { id: "c" }, { id: "c", msg: null }, { id: "c", msg: "text" }].map(
      (one) => JSON.stringify(one),
    ),
    ...["namespace", "topic", "data"].flatMap((field) =>
      [undefined, null, 1, {}, ["x"]].map((value) =>
        JSON.stringify({ id: "c", msg: { ...msg, [field]: value } })
      )
    ),
    ...["*", "a", "\u00e4", "=aaa"].map((data) =>
      JSON.stringify({ id: "c", msg: { ...msg, binary: true, data } })
    ),
    JSON.stringify({ id: "b", msg }), // its own
  ];
  for (const payload of wrong) {
    say(payload);
    assertEquals(got, [], payload.slice(0, 100));
  }
  await one.publish({ ...place, data: "heard" });
  assertEquals(got, [{ ...place, data: "heard" }]);
});

test("NATS: what was left while the server was away, and is joined again, is heard", async (t) => {
  const { state, driver } = lonelyNats();
  t.defer(() => driver.close());
  const place = { namespace: "\0room", topic: "t" };
  await driver.join(place);
  assertEquals(state.subjects.length, 1);
  state.isDown = true;
  await assertRejects(() => driver.leave(place));
  state.isDown = false;
  await driver.join(place);
  assertEquals(state.subjects.length, 1);
});

test("what is left and joined again in one turn is heard all the time", async (t) => {
  const { state, driver } = lonelyNats();
  t.defer(() => driver.close());
  const place = { namespace: "\0room", topic: "t" };
  await driver.join(place);
  const [subject] = state.subjects;
  const leaving = driver.leave(place);
  await driver.join(place);
  await leaving;
  assertEquals([state.subjects, state.made], [[subject], 1]);
});

test("NATS: what could not be joined, and is wanted no more, is not heard for ever", async (t) => {
  const { state, driver } = lonelyNats();
  t.defer(() => driver.close());
  const place = { namespace: "\0room", topic: "t" };
  state.isDown = true;
  await assertRejects(() => driver.join(place));
  state.isDown = false;
  await driver.leave(place);
  assertEquals(state.subjects, []);
});

test("Redis and PostgreSQL tell how much they have heard, their own words too", async (t) => {
  const [client, deaf] = [...memoryRedis(1), ...memoryRedis(1)];
  deaf!.isDeaf = true;
  const takes: ((payload: string) => void)[] = [];
  const sql: PostgresClient = {
    listen(_, take) {
      takes.push(take);
      return Promise.resolve({ unlisten: () => Promise.resolve() });
    },
    unsafe: () => Promise.resolve(takes.forEach((take) => take("1 {}"))),
  };
  const { driver: third } = lonelyNats(); // its client may never give it its own
  const place = { namespace: "\0room", topic: "t" };
  const all = [
    redis({ client: client!, channel: "x" })({ id: "a" }),
    redis({ client: deaf!, channel: "x" })({ id: "b" }),
    pgsql({ client: sql, channel: "x" })({ id: "a" }),
    third,
  ];
  const heard: (number | undefined)[] = [];
  for (const driver of all) {
    t.defer(() => driver.close());
    driver.subscribe(() => assert(false, "it is its own"));
    await driver.join(place);
    await driver.publish({ ...place, data: "own" });
    heard.push(driver.heard);
  }
  assertEquals(heard, [1, 0, 1, undefined]);
});

test("PostgreSQL: what could be joined only later is heard once", async (t) => {
  const listeners: ((payload: string) => void)[] = [];
  let isDown = true;
  const client: PostgresClient = {
    listen(_channel, take) { // as of postgres, which listens by itself once it can
      listeners.push(take);
      if (isDown) return Promise.reject(new Error("it is down"));
      return Promise.resolve({ unlisten: () => Promise.resolve() });
    },
    unsafe: (_query, [messages]) => {
      const said: [string, string][] = JSON.parse(messages!);
      for (const [, payload] of said) for (const take of listeners) take(`1 ${payload}`);
      return Promise.resolve();
    },
  };
  const [driver, other] = ["a", "b"].map((id) => pgsql({ client, channel: "x" })({ id }));
  t.defer(() => driver!.close());
  const got: unknown[] = [];
  driver!.subscribe(({ data }) => void got.push(data));
  const place = { namespace: "\0room", topic: "t" };
  await assertRejects(() => driver!.join(place));
  await other!.publish({ ...place, data: "not yet" });
  isDown = false;
  await until(() => listeners.length > 1);
  await other!.publish({ ...place, data: "once" });
  assertEquals(got, ["not yet", "once"]);
  await driver!.leave(place);
  await other!.publish({ ...place, data: "no more" });
  assertEquals(got.length, 2);
});

test(
  "PostgreSQL: a statement that never ends is cancelled, told, and in nobody's way",
  async (t) => {
    const { setTimeout } = globalThis;
    t.defer(() => Object.assign(globalThis, { setTimeout }));
    Object.assign(globalThis, {
      setTimeout: (task: () => void, delay = 0) => setTimeout(task, delay === 10_000 ? 10 : delay),
    });
    const done: string[] = [];
    const client: PostgresClient = {
      listen: () => Promise.resolve({ unlisten: () => Promise.resolve() }),
      unsafe(_query, [messages]) { // as of postgres over a connection that was cut
        const text = JSON.parse(JSON.parse(messages!)[0][1]).msg.data;
        if (text !== "lost") return Promise.resolve(done.push(text));
        let reject!: (error: Error) => void;
        const query = new Promise<void>((_, fail) => reject = fail);
        return Object.assign(query, {
          cancel() {
            done.push("cancelled");
            reject(new Error("canceling statement due to user request"));
          },
        });
      },
    };
    const driver = pgsql({ client, channel: "x" })({ id: "a" });
    t.defer(() => driver.close());
    const say = (data: string) => driver.publish({ namespace: "", topic: "t", data });
    const lost = assertRejects(() => say("lost"), Error, "PostgreSQL does not answer");
    await sleep(0); // it is on its way
    await say("next");
    await lost;
    assertEquals(done, ["cancelled", "next"]);
  },
  { timeout: 9_000 },
);

// ---------------------------------------------------------------- docs/scale.md

interface Ends {
  disconnect(): void;
  close(): Promise<void>;
  end(options: object): Promise<void>;
}

/** Where each recipe finds its server, and how its client ends. */
const recipes = {
  Redis: {
    variable: "REDIS_URL",
    url: (port: number) => `redis://127.0.0.1:${port}`,
    end: (client: Ends) => client.disconnect(),
  },
  NATS: {
    variable: "NATS_URL",
    url: (port: number) => `127.0.0.1:${port}`,
    end: (client: Ends) => client.close(),
  },
  PostgreSQL: {
    variable: "DATABASE_URL",
    url: (port: number) => `postgres://test@127.0.0.1:${port}/postgres`,
    end: (client: Ends) => client.end({ timeout: 1 }),
  },
};

for (const { name, skip, start: run } of drivers) {
  test(`docs/scale.md's recipe for ${name}: two instances that hear each other`, async (t) => {
    const { server } = await run(t);
    const kind = Object.keys(recipes).find((kind) => name.endsWith(kind)) as keyof typeof recipes;
    const { variable, url, end } = recipes[kind];
    process.env[variable] = url(server.port);
    const page = await readFile(join(root, "docs/scale.md"), "utf8");
    const [, code] = /```ts\n([^]*?)```/.exec(page.slice(page.indexOf(`## ${kind}`)))!;
    const folder = await mkdtemp(join(tmpdir(), "duplex-scale-"));
    t.defer(() => rm(folder, { recursive: true }));
    const instances: SSEAdapter[] = [];
    for (const n of [0, 1]) {
      const file = join(folder, `${n}.ts`);
      const program = code!.replace(/"duplex-sse\/(\w+)"/g, `"file://${root}/$1.ts"`)
        .replace(
          /"(ioredis|postgres|@nats-io\/[\w-]+)"/,
          (_, it) => `"${import.meta.resolve(it)}"`,
        );
      await writeFile(file, `${program}\nexport { client };\n`);
      const { ws, client } = await import(`file://${file}`);
      t.defer(() => end(client));
      t.defer(() => shutDown(ws));
      instances.push(ws);
    }
    const sockets = await Promise.all(instances.map(async ({ fetch }) => {
      const server = await t.serve(fetch);
      const one = connect(t, `${server.url}/`);
      await one.opened;
      return one;
    }));
    for (const [from, to] of [[0, 1], [1, 0]] as const) {
      await heard({ ws: instances[from]! }, sockets[to]!, "news");
      while (sockets[from]!.messages.left) await sockets[from]!.messages.next();
      sockets[from]!.socket.send(`from ${from}`);
      assertEquals(await sockets[to]!.messages.next(), `from ${from}`);
    }
  }, { skip, timeout: 30_000 });
}
