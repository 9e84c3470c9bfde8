/**
 * Parking with the stores of docs/scale.md, as they stand there: each keeps what a store is to keep,
 * and over real Redis and PostgreSQL sessions go by them from one process to another, Deno and Bun
 * mixed: at a shutdown, while their clients are away, and from an instance that is frozen.
 */
import { join } from "node:path";
import process from "node:process";
import type { SSEAdapter } from "../server.ts";
import { MemoryBus, PostgresServer, RedisServer } from "./bus.ts";
import { type Instance, launchFleet } from "./fleet.ts";
import {
  assertEquals,
  assertGreater,
  needs,
  sleep,
  type TestContext,
  testOnce,
  until,
} from "./harness.ts";
import { shutDown } from "./pair.ts";
import { project, recipeOf } from "./project.ts";
import { MemoryStore } from "./store.ts";
import { numbers } from "./talker.ts";
import { type WireClient, wireClient } from "./wire.ts";

/** Writes the recipe where it can be imported. */
async function recipe(t: TestContext, name: string): Promise<string> {
  const folder = await project(t, { [name]: await recipeOf("docs/scale.md", name) });
  return join(folder, name);
}

interface Kind {
  readonly file: string;
  readonly skip: string | undefined;
  /** Starts what is behind it, and returns what its recipe wants to know. */
  start(t: TestContext): Promise<Record<string, string>>;
  readonly runtimes: readonly ("deno" | "bun")[];
  readonly flags?: string[];
}

const kinds: Record<string, Kind> = {
  Redis: {
    file: "redis-store.ts",
    skip: needs("redis-server", "deno", "bun"),
    start: async (t) => ({ REDIS_URL: `redis://127.0.0.1:${(await RedisServer.start(t)).port}` }),
    runtimes: ["deno", "bun"],
  },
  PostgreSQL: {
    file: "postgres-store.ts",
    skip: needs("postgres", "deno", "bun"),
    start: async (t) => (await PostgresServer.start(t)).env,
    runtimes: ["deno", "bun"],
  },
  "Deno KV": {
    file: "kv-store.ts",
    skip: needs("deno"),
    start: async (t) => ({ KV_PATH: join(await project(t, {}), "kv") }),
    runtimes: ["deno"],
    flags: ["run", "-A", "--no-check", "--unstable-kv"],
  },
  "a Durable Object": {
    file: "object-store.ts",
    skip: needs("deno", "bun", "node-24"),
    async start(t) {
      const worker = await recipe(t, "parked.js");
      const args = [worker, '{"PARKED":"Parked"}'];
      const child = await t.spawn("node-24", "tests/fixtures/workerd.ts", { args });
      return { PARKED_URL: (await child.line({ timeout: 20_000 })).replace(/\/$/, "") };
    },
    runtimes: ["deno", "bun"],
  },
};

for (const [name, { file, skip, start, runtimes, flags }] of Object.entries(kinds)) {
  testOnce(`docs/scale.md's store of ${name} gives what it is given, once`, async (t) => {
    const env = { STORE: await recipe(t, file), ...await start(t) };
    for (const runtime of runtimes) {
      const child = await t.spawn(runtime, "tests/fixtures/store.ts", {
        env,
        ...flags && { flags },
      });
      const { isExpired, ...found } = await child.json<Record<string, unknown>>({
        timeout: 20_000,
      });
      assertEquals(found, { takers: 1, isWhole: true, isLast: true, isNone: true });
      if (name !== "Deno KV") assertEquals(isExpired, true); // which takes its time
      await child.exited;
    }
  }, { skip, timeout: 60_000 });
}

testOnce("docs/scale.md's server parks what its clients have left, and takes it up", async (t) => {
  const { serve } = await import(await recipe(t, "parked-server.ts"));
  const store = new MemoryStore();
  t.defer(() => sleep(200)); // what is being sealed
  const bus = new MemoryBus(t);
  let ws: SSEAdapter = serve(bus.adapter, store);
  const front = await t.serve((request, info) => ws.fetch(request, info));
  const client = await wireClient(t, front.url);
  await client.send("before");
  await ws.close(1012);
  assertEquals(store.values.size, 2);
  ws = serve(bus.adapter, store);
  t.defer(() => shutDown(ws));
  const back = t.use(await client.resume(1, 0));
  assertEquals(await back.message(), "before");
  await back.send("after");
  assertEquals(await back.message(), "after");
});

/** Three instances over Redis, that park where they are told. */
async function fleet(t: TestContext, { file, start }: Kind, whenAway: boolean) {
  const redis = await RedisServer.start(t);
  const env = {
    ...await start(t),
    ...{ STORE: await recipe(t, file), MOVES: "1", HEARTBEAT: "200" },
    ...whenAway && { WHEN_AWAY: "1" },
  };
  return await launchFleet(t, redis, env);
}

/** What all know of the sessions: each is somewhere once. */
async function gathered(instances: Instance[]) {
  const told = await Promise.all(instances.map((one) => one.tell()));
  const sessions = told.flatMap(({ sessions }) => Object.entries(sessions));
  const seen = Object.fromEntries(
    sessions.map(([name, { opens, closes, got }]) => [name, { opens, closes, got }]),
  );
  assertEquals(Object.keys(seen).length, sessions.length, "nobody is at two");
  assertEquals(told.flatMap(({ errors }) => errors), []);
  return { seen, told };
}

const away = async (instance: Instance) => (await instance.tell()).stats.sessions.connected === 0;

for (const [name, kind] of Object.entries(kinds).slice(0, 2)) {
  testOnce(`sessions whose clients are away survive a shutdown in ${name}`, async (t) => {
    const { instances, proxy } = await fleet(t, kind, false);
    proxy.choose = () => 1;
    const clients: WireClient[] = [];
    for (const one of numbers(6)) clients.push(await wireClient(t, `${proxy.url}/?c=${one}`));
    for (const client of clients) {
      assertEquals(await client.send("before"), 204);
      assertEquals(await client.message(), "before");
      assertEquals(await client.send("unread"), 204);
    }
    for (const client of clients) await client.drop();
    await until(() => away(instances[1]!));
    instances[1]!.child.send("close 1012");
    const last = await instances[1]!.child.json<{ sessions: object }>({ timeout: 20_000 });
    assertEquals(last.sessions, {}, "all are parked");
    await instances[1]!.child.exited;
    const left = [instances[0]!, instances[2]!];
    let turn = 0;
    proxy.choose = () => turn++ % 2 * 2;
    await Promise.all(clients.map(async (client) => {
      const back = t.use(await client.resume(1, 1));
      assertEquals(await back.message(), "unread");
      assertEquals(await back.send("after"), 204);
      assertEquals(await back.message(), "after");
    }));
    const { seen } = await gathered(left);
    const got = ["before", "unread", "after"];
    const wanted = numbers(6).map((one) => [one, { opens: 1, closes: [], got }]);
    assertEquals(seen, Object.fromEntries(wanted));
  }, { skip: kind.skip, timeout: 60_000 });

  testOnce(
    `sessions of an instance that is frozen are taken out of ${name}, and it finds that when it thaws`,
    async (t) => {
      const { instances, proxy } = await fleet(t, kind, true);
      const frozen = instances[0]!;
      proxy.choose = () => 0;
      const clients: WireClient[] = [];
      for (const one of numbers(6)) clients.push(await wireClient(t, `${proxy.url}/?c=${one}`));
      for (const client of clients) {
        await client.send("before");
        await client.message();
      }
      for (const client of clients) await client.drop();
      await until(async () => (await frozen.tell()).stats.cluster!.parked === 6);
      process.kill(frozen.child.pid, "SIGSTOP");
      t.defer(() => process.kill(frozen.child.pid, "SIGCONT"));
      let turn = 0;
      proxy.choose = () => 1 + turn++ % 2;
      const begun = performance.now();
      const back = await Promise.all(clients.map(async (client) => {
        const back = t.use(await client.resume(1, 1));
        await back.send("meanwhile");
        assertEquals(await back.message(), "meanwhile");
        return back;
      }));
      assertGreater(5_000, performance.now() - begun, "nobody waited for who is frozen");
      process.kill(frozen.child.pid, "SIGCONT");
      // What comes there at once finds the sessions where they are; and so do their clients.
      proxy.choose = () => 0;
      for (const client of back) {
        assertEquals(await client.send("through the thawed"), 204);
        assertEquals(await client.message(), "through the thawed");
      }
      await Promise.all(back.map(async (client) => {
        const home = t.use(await client.resume(2, 3));
        await home.send("home");
        assertEquals(await home.message(), "home");
      }));
      const { seen, told } = await gathered(instances);
      const got = ["before", "meanwhile", "through the thawed", "home"];
      const wanted = numbers(6).map((one) => [one, { opens: 1, closes: [], got }]);
      assertEquals(seen, Object.fromEntries(wanted));
      assertEquals(told.map(({ stats }) => stats.peers), [6, 0, 0]);
      assertEquals(told.map(({ stats }) => stats.cluster!.parked), [0, 0, 0]);
    },
    { skip: kind.skip, timeout: 60_000 },
  );
}
