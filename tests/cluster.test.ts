/**
 * Several instances behind a proxy that knows nothing of sessions: publishing
 * between them, requests that come to the wrong one, and what a backplane may do
 * to what it carries. The instances run in this process; cluster.faults.test.ts
 * has processes of their own.
 */
import { broadcastChannel, redis } from "crossws/sync";
import { Redis } from "ioredis";
import { cluster, type ClusterAdapter, type ClusterOptions } from "../cluster.ts";
import type { Hooks, SSEOptions, SyncMessage } from "../server.ts";
import { MemoryBus, RedisServer, type RoundRobin, roundRobin } from "./bus.ts";
import { chaos, type ChaosProxy, mulberry32, pickSeed } from "./chaos.ts";
import {
  assert,
  assertEquals,
  assertGreater,
  assertLess,
  assertLessOrEqual,
  assertMatch,
  assertRejects,
  assertThrows,
  needs,
  note,
  sleep,
  test,
  type TestContext,
  until,
} from "./harness.ts";
import { connect, listen, openRaw, type Pair } from "./pair.ts";

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
    name: "crossws's broadcastChannel driver",
    connect: () => broadcastChannel({ channel: `duplex-${channels++}` }),
  },
  {
    name: "a driver that refuses 8000 bytes",
    options: { maxPayload: 8000 },
    connect: (t) => new MemoryBus(t, { limit: 8000 }).adapter,
  },
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
