/**
 * Three processes, Deno and Bun, behind a proxy that sends each request to the
 * next one, over a real Redis: under cuts, kill -9, an outage of Redis and a
 * rolling restart.
 */
import { WebSocket as PartySocket } from "partysocket";
import { WebSocketSSE } from "../client.ts";
import { RedisServer } from "./bus.ts";
import { chaos, pickSeed } from "./chaos.ts";
import type { Told } from "./fixtures/instance.ts";
import {
  assert,
  assertEquals,
  assertGreater,
  assertLess,
  assertMatch,
  needs,
  once,
  sleep,
  test,
  type TestContext,
  until,
} from "./harness.ts";
import { launch, launchAll } from "./fleet.ts";
import { connect } from "./pair.ts";
import { everyTurn, gather, numbers, Talker, talkers } from "./talker.ts";

const skip = needs("redis-server", "deno", "bun");

test(
  "three processes, every request at the next one: exactly once, in order, through cuts",
  async (t) => {
    const { instances, proxy } = await launchAll(t);
    const network = t.use(await chaos(proxy.port, { seed: pickSeed(), cutEvery: [100, 500] }));
    const all = await talkers(t, network.url, ["post", "post", "stream", "duplex"]);
    do await Promise.all(all.map((talker) => talker.talk(300, 10))); while (!everyTurn(proxy.log));
    await Promise.all(all.map((talker) => talker.heard()));
    network.calm();
    const got = await gather(instances);
    for (const { name, sent, received, failures, socket } of all) {
      assertEquals([failures, received], [[], sent], name);
      assertEquals(got[name], numbers(sent), name);
      assertGreater(socket.stats.resumes, 0, name);
    }
  },
  { skip, timeout: 60_000 },
);

test("a refusal of the receiving instance counts", async (t) => {
  const { instances, proxy } = await launchAll(t);
  let credentials = "good";
  const talker = new Talker(t, proxy.url, "a", {
    transport: "post",
    headers: () => ({ authorization: credentials }),
  });
  await once(talker.socket, "open");
  await talker.talk(10);
  await talker.heard();
  credentials = "revoked";
  proxy.choose = () => 2; // never the owner, which opened at 0
  talker.socket.send("10");
  await until(() => talker.closed);
  assertEquals(talker.closed!.code, 1006);
  assertEquals((await gather(instances)).a, numbers(10));
}, { skip, timeout: 30_000 });

test(
  "an instance is killed under load: its clients end with 1006, nobody else loses anything",
  async (t) => {
    const { instances, proxy } = await launchAll(t, { RESUME_TIMEOUT: "3000", TIMEOUT: "1000" });
    const talkers = numbers(6).map((name) => new Talker(t, proxy.url, name, { transport: "post" }));
    await Promise.all(talkers.map(({ socket }) => once(socket, "open")));
    const owners = await Promise.all(instances.map(async (instance) => await instance.tell()));
    const talking = Promise.all(talkers.map((talker) => talker.talk(500, 15)));
    await sleep(500, t.signal);
    const killed = performance.now();
    instances[1]!.child.kill("SIGKILL");
    await sleep(300, t.signal);
    proxy.ports.splice(1, 1); // the health check's part
    await talking;
    await Promise.all(talkers.map((talker) => talker.heard()));
    const got = await gather([instances[0]!, instances[2]!]);
    let lost = 0;
    for (const { name, closed, closedAt, failures, received } of talkers) {
      assertEquals(failures, [], name);
      if (owners[1]!.sessions[name]) {
        lost++;
        assertEquals(closed?.code, 1006, name);
        assertLess(closedAt - killed, 10_000, name);
      } else {
        assertEquals([closed, received], [undefined, 500], name);
        assertEquals(got[name], numbers(500), name);
      }
    }
    assertEquals(lost, 2);
  },
  { skip, timeout: 60_000 },
);

for (
  const [how, stop, go] of [
    [
      "falls silent",
      (redis: RedisServer) => redis.signal("SIGSTOP"),
      (redis: RedisServer) => redis.signal("SIGCONT"),
    ],
    ["dies", (redis: RedisServer) => redis.kill(), (redis: RedisServer) => redis.start()],
  ] as const
) {
  test(`Redis ${how} for 5 s: local traffic goes on, what is routed arrives once`, async (t) => {
    // crossws's driver leaves the errors of its subscriber to nobody.
    if (how === "dies") t.expect("[ioredis] Unhandled error event: Error: connect ECONNREFUSED");
    const { redis, instances, proxy } = await launchAll(t, { TIMEOUT: "1500" });
    const local = new Talker(t, `http://127.0.0.1:${instances[0]!.port}`, "local", {
      transport: "post",
    });
    const routed = numbers(3).map((name) => new Talker(t, proxy.url, name, { transport: "post" }));
    await Promise.all([local, ...routed].map(({ socket }) => once(socket, "open")));
    const before = await instances[0]!.tell();
    await stop(redis);
    const outage = sleep(5_000, t.signal);
    const asked = Promise.all(instances.map(({ port }) => askForStranger(port)));
    const talking = Promise.all(routed.map((talker) => talker.talk(500, 30)));
    for (let n = 0; n < 2000; n++) instances[0]!.child.send(`publish nobody hears ${n}`);
    const heard: number[] = [];
    for (let n = 0; n < 40; n++) {
      await local.talk(5);
      await until(() => local.received === local.sent || local.failures.length >= 1900);
      heard.push(local.received);
      await sleep(100, t.signal);
    }
    await outage;
    assertEquals(await asked, [503, 503, 503]);
    await go(redis);
    await talking;
    await Promise.all(routed.map((talker) =>
      until(() => talker.received === 500, {
        timeout: 25_000,
      })
    ));
    const got = await gather(instances);
    for (const { name } of routed) assertEquals(got[name], numbers(500), name);
    assertEquals(got.local, numbers(200));
    const told = await Promise.all(instances.map((instance) => instance.tell()));
    assert(told.every(({ errors }) => errors.length > 0), "onError was told");
    assertLess(told[0]!.errors.length, 200, "and not for every message");
    assertLess(told[0]!.memory - before.memory, 150, "nothing grows without bound");
  }, { skip, timeout: 60_000 });
}

/** Whatever comes where, each instance has something to tell then: others' requests come in turn. */
async function askForStranger(port: number): Promise<number> {
  const response = await fetch(`http://127.0.0.1:${port}`, {
    method: "POST",
    headers: {
      "content-type": "application/websocket-events",
      "x-crossws-id": `${"0".repeat(16)}.${"0".repeat(32)}`,
      "x-duplex-version": "1",
    },
    body: "SEQ 1\r\n1\r\nTEXT 2\r\nhi\r\n",
  });
  await response.body?.cancel();
  return response.status;
}

/**
 * A message is acknowledged when its echo has come; until then the application says it again.
 * (That `bufferedAmount` is 0 is no receipt: what reaches a server that is closing is taken and
 * not delivered, as with a WebSocket; PROTOCOL.md, section 9.)
 */
test("a rolling restart loses no message that was acknowledged", async (t) => {
  const { redis, instances, proxy } = await launchAll(t, { RESUME_TIMEOUT: "5000" });
  const finished: Told[] = [];
  const all = numbers(6).map((name) => new Persistent(t, proxy.url, name));
  const talking = Promise.all(all.map((talker) => talker.talk(400)));
  for (const i of [0, 1, 2]) {
    await sleep(400, t.signal);
    const successor = await launch(t, i === 1 ? "deno" : "bun", redis);
    const old = instances[i]!;
    proxy.ports.splice(proxy.ports.indexOf(old.port), 1, successor.port);
    instances[i] = successor;
    old.child.send("close 1012");
    finished.push(await old.child.json<Told>({ timeout: 15_000 }));
  }
  await talking;
  await until(() => all.every(({ waiting }) => !waiting.size), { timeout: 20_000 });
  const codes = finished.flatMap(({ sessions }) =>
    Object.values(sessions).flatMap((s) => s.closes)
  );
  assert(codes.length > 0 && codes.every((code) => code === 1012), codes.join());
  const told = [...finished, ...await Promise.all(instances.map((instance) => instance.tell()))];
  for (const { name, connections, acknowledged } of all) {
    const heard = new Set<string>();
    for (const [i, { sent, echoes, closed }] of connections.entries()) {
      const here = `${name}.${i}`;
      const seen = told.flatMap(({ sessions }) => sessions[here] ?? []);
      assert(seen.length <= 1, `${here} was at two instances`);
      const got = seen[0]?.got ?? [];
      assertEquals(got, sent.slice(0, got.length), `${here}: what was sent, in order, once`);
      // Hooks are given what was on its way to a peer that closes, and can answer no more.
      assertEquals(echoes, closed ? got.slice(0, echoes.length) : got, `${here}: the echoes`);
      got.forEach((text) => heard.add(text));
    }
    assertEquals(numbers(400).filter((n) => !heard.has(n)), [], name);
    assertEquals(acknowledged.size, 400, name);
    const ends = connections.map(({ closed }) => closed && [closed.code, closed.wasClean]);
    assert(ends.some((end) => `${end}` === "1012,true"), `${name}: ${JSON.stringify(ends)}`);
  }
  await Promise.all(all.map((talker) => talker.close()));
}, { skip, timeout: 90_000 });

/** partysocket with our class, which repeats after a reconnection what had no echo. */
class Persistent {
  readonly name: string;
  readonly waiting: Set<string> = new Set();
  readonly acknowledged: Set<string> = new Set();
  readonly connections: Connection[] = [];
  readonly #signal: AbortSignal;
  readonly #socket: PartySocket;

  constructor(t: TestContext, url: string, name: string) {
    this.name = name;
    this.#signal = t.signal;
    const { connections } = this;
    const socket = this.#socket = new PartySocket(
      () => `${url}/?c=${name}.${connections.length}`,
      [],
      { WebSocket: recorder(connections), minReconnectionDelay: 20, maxReconnectionDelay: 100 },
    );
    t.defer(() => socket.close());
    // What was sent while nothing was open it has queued by itself, and sends first.
    let unanswered: string[] = [];
    socket.addEventListener("open", () => unanswered.splice(0).forEach((n) => socket.send(n)));
    socket.addEventListener("close", () => {
      const { sent } = connections.at(-1)!;
      unanswered = [...new Set([...unanswered, ...sent])].filter((n) => this.waiting.has(n));
    });
    socket.addEventListener("message", ({ data }) => {
      this.waiting.delete(data);
      this.acknowledged.add(data);
    });
  }

  async talk(count: number): Promise<void> {
    for (let n = 0; n < count; n++) {
      this.waiting.add(`${n}`);
      this.#socket.send(`${n}`);
      await sleep(10, this.#signal);
    }
  }

  async close(): Promise<void> {
    this.#socket.close();
    await until(() => this.connections.at(-1)!.closed);
  }
}

interface Connection {
  readonly sent: string[];
  readonly echoes: string[];
  closed: CloseEvent | undefined;
}

/** Our class, with a record of each of its connections. */
function recorder(connections: Connection[]): typeof WebSocketSSE {
  return class extends WebSocketSSE {
    readonly #connection: Connection = { sent: [], echoes: [], closed: undefined };

    constructor(url: string | URL) {
      super(url, { transport: "post" });
      const connection = this.#connection;
      connections.push(connection);
      this.addEventListener("message", ({ data }) => connection.echoes.push(data));
      this.addEventListener("close", (event) => connection.closed = event);
    }

    override send(data: string): void {
      super.send(data);
      this.#connection.sent.push(data);
    }
  };
}

for (const runtime of ["deno", "bun"] as const) {
  test(`examples/cluster.ts on ${runtime}: each request at the next instance`, async (t) => {
    const redis = await RedisServer.start(t);
    const child = await t.spawn(runtime, "examples/cluster.ts", {
      env: { PORT: "0", REDIS_PORT: `${redis.port}` },
    });
    t.defer(async () => {
      child.kill("SIGTERM"); // and its instances with it
      await child.exited;
    });
    const [, url] = /^Chat on (http:\S+)\/,/.exec(await child.line({ timeout: 20_000 }))!;
    const page = await fetch(`${url}/`);
    assert((await page.text()).includes('from "/client.js"'));
    const tabs = [0, 1, 2].map(() => connect(t, `${url}/chat`, { transport: "post" }));
    for (const [i, { opened, messages }] of tabs.entries()) {
      await opened;
      assertMatch(String(await messages.next()), /^Your session is at instance [123]\.$/);
      if (i === 0) await sleep(200, t.signal); // subscriptions
    }
    for (let n = 0; n < 5; n++) {
      tabs[n % 3]!.socket.send(`hello ${n}`);
      for (const { messages } of tabs) {
        assertMatch(String(await messages.next()), new RegExp(`^hello ${n} \\(said at instance`));
      }
    }
  }, { skip, timeout: 30_000 });
}

for (const runtime of ["deno", "bun"] as const) {
  test(`examples/cluster.ts on ${runtime} says how to get Redis where there is none`, async (t) => {
    const env = { PORT: "0", PATH: "/nowhere" };
    t.expect("This needs Redis", "docker run", "exited by 1");
    const child = await t.spawn(runtime, "examples/cluster.ts", { env });
    assertEquals((await child.exited).code, 1);
    assertMatch(child.stderr(), /needs Redis: apt-get install redis-server, .*REDIS_PORT=6379/s);
  }, { timeout: 30_000 });
}
