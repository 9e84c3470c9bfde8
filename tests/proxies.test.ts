/**
 * Our client and server with real proxies between them: as Debian ships them, and as docs/proxies.md
 * says. Bounds in milliseconds are generous, and tried again: a busy machine is no failure.
 *
 * DUPLEX_SOAK=1 waits for the real idle cuts of 50 and 60 s; else they are a few seconds.
 */
import process from "node:process";
import type { Transport, WebSocketSSEOptions } from "../client.ts";
import type { Message, Peer } from "../server.ts";
import { chaos } from "./chaos.ts";
import {
  assert,
  assertEquals,
  assertLess,
  freePort,
  needs,
  note,
  sleep,
  test,
  type TestContext,
  until,
} from "./harness.ts";
import { connect, type Connected, listen, Queue } from "./pair.ts";
import { type Configuration, proxy, type ProxyName, type ProxyOptions } from "./proxies.ts";

const SOAK = !!process.env.DUPLEX_SOAK;
const timeout = 60_000;
const transports = ["duplex", "stream", "post"] as const;

interface Case {
  name: ProxyName;
  configuration: Configuration;
  /** What does not get through over HTTP/1.1. */
  held: Transport[];
  /** Whether it cuts quiet connections. */
  cuts: boolean;
  /** Milliseconds that it adds by itself. */
  lag: number;
  /** It holds the first 16 KiB of a body only: many messages get through. */
  fills?: boolean;
}

const cases: Case[] = [
  { name: "nginx", configuration: "shipped", held: ["duplex", "stream"], cuts: true, lag: 0 },
  { name: "nginx", configuration: "documented", held: [], cuts: true, lag: 0 },
  // It lets TCP wait for an acknowledgement, which the other side delays: 208 ms were seen.
  { name: "haproxy", configuration: "shipped", held: [], cuts: true, lag: 220 },
  { name: "haproxy", configuration: "documented", held: [], cuts: true, lag: 0 },
  // Its documented configuration is `encode` and nothing else.
  { name: "caddy", configuration: "documented", held: ["duplex"], cuts: false, lag: 0 },
  {
    name: "apache",
    configuration: "shipped",
    held: ["duplex", "stream"],
    cuts: true,
    lag: 0,
    fills: true,
  },
];

interface Site {
  peers: Queue<Peer>;
  port: number;
  /** Directly, without the proxy. */
  server: number;
}

async function site(
  t: TestContext,
  name: ProxyName,
  { message, heartbeatInterval, ...options }: ProxyOptions & {
    message?: (peer: Peer, message: Message) => void;
    heartbeatInterval?: number;
  } = {},
): Promise<Site> {
  const peers = new Queue<Peer>();
  const { port: server } = await listen(t, {
    ...heartbeatInterval && { heartbeatInterval },
    hooks: {
      open: (peer) => peers.push(peer),
      message: message ?? ((peer, message) => void peer.send(message.text())),
    },
  });
  const { port } = await proxy(t, name, server, options);
  return { peers, port, server };
}

/** Opens a socket to a port; what is held there is left before that. */
async function open(
  t: TestContext,
  port: number,
  options: WebSocketSSEOptions = {},
): Promise<Connected> {
  const connected = connect(t, `http://127.0.0.1:${port}/`, options);
  await connected.opened;
  return connected;
}

for (const { name, configuration, held, lag, fills } of cases) {
  const about = `${name}, as ${configuration}`;
  const skip = needs(name, "openssl");
  const expected = (transport: Transport) => held.includes(transport) ? "post" : transport;

  for (const transport of transports) {
    test(
      `${about}, over ${transport}: events arrive one by one, within ${100 + lag} ms`,
      async (t) => {
        const { peers, port } = await site(t, name, { configuration });
        const { messages } = await open(t, port, { transport });
        const [peer] = peers.all as [Peer];
        assertEquals(peers.all.length, 1, "a request that was given up has left nobody");
        /** Each is sent when the one before has arrived: in a lump it would wait for ever. */
        const slowest = async () => {
          let slowest = 0;
          for (let n = 0; n < 5; n++) {
            const sent = performance.now();
            peer.send(`${n}`);
            assertEquals(await messages.next(), `${n}`);
            slowest = Math.max(slowest, performance.now() - sent);
          }
          return slowest;
        };
        let seen = Infinity;
        for (let n = 0; n < 20 && seen > 100 + lag; n++) seen = Math.min(seen, await slowest());
        assertLess(seen, 100 + lag);
      },
      { timeout, skip },
    );

    test(
      `${about}, over ${transport}: 5 MB sent up by default options arrive once and in order`,
      async (t) => {
        const wrong: string[] = [];
        let received = 0;
        const { port } = await site(t, name, {
          configuration,
          message: (peer, message) => {
            const text = message.text();
            const n = Number.parseInt(text);
            if (n !== received || text.length !== size(n)) wrong.push(`${received}: ${n}`);
            if (++received === COUNT) peer.send("all");
          },
        });
        const COUNT = 70;
        /** One of them is as large as passes the usual cap. */
        const size = (n: number) => n === 35 ? 1_000_000 : 64 * 1024;
        const { socket, messages, events } = await open(t, port, { transport });
        for (let n = 0; n < COUNT; n++) socket.send(`${n} `.padEnd(size(n), "x"));
        assertEquals(await messages.next({ timeout: 40_000 }), "all");
        assertEquals([wrong, received], [[], COUNT]);
        if (!fills || transport !== "stream") {
          assertEquals(socket.transport, expected(transport));
        }
        assertEquals(events, ["open"]);
      },
      { timeout, skip },
    );
  }

  test(`${about}: auto remembers for the origin what does not get through`, async (t) => {
    const { port } = await site(t, name, { configuration });
    const recorder = t.use(await chaos(port, { record: () => true }));
    const first = await open(t, recorder.port);
    first.socket.send("one");
    assertEquals(await first.messages.next(), "one");
    assertEquals(first.socket.transport, expected("duplex"));
    const before = recorder.recordings.length;
    const second = await open(t, recorder.port);
    assertEquals(second.socket.transport, expected("duplex"));
    second.socket.send("two");
    assertEquals(await second.messages.next(), "two");
    const heads = recorder.recordings.slice(before).map(({ head }) => head);
    const streamed = heads.filter((head) => /^transfer-encoding: chunked/im.test(head));
    const opening = held.includes("duplex") ? "GET" : "POST";
    assert(heads[0]!.startsWith(`${opening} `), heads[0]);
    assertEquals(streamed.length, held.includes("duplex") ? 0 : 1);
  }, { timeout, skip });
}

const cutting = cases.filter(({ cuts }) => cuts);

/** Waits, and returns the longest time for which this process was given no turn meanwhile, in ms. */
async function longestStall(ms: number, signal: AbortSignal): Promise<number> {
  let longest = 0;
  let last = performance.now();
  const timer = setInterval(() => {
    const now = performance.now();
    longest = Math.max(longest, now - last);
    last = now;
  }, 50);
  await sleep(ms, signal).finally(() => clearInterval(timer));
  return longest;
}

test("idle cuts of nginx, haproxy and Apache are survived by heartbeats", async (t) => {
  await Promise.all(cutting.map(async ({ name, configuration, held }) => {
    // The proportions of the defaults: 15 s to 50 s.
    const { port, peers } = await site(t, name, {
      configuration,
      ...!SOAK && { idle: 3, heartbeatInterval: 900 },
    });
    const about = (transport: Transport) => `${name}, ${configuration}, ${transport}`;
    const enter = async (transport: Transport) => {
      const connected = await open(t, port, { transport });
      connected.socket.send("before");
      assertEquals(await connected.messages.next(), "before");
      return { transport, connected, peer: peers.all.at(-1)! };
    };
    let all: Awaited<ReturnType<typeof enter>>[];
    // A machine that gives us no turn for a second says nothing of heartbeats: then once more.
    for (let tries = 0, stall = Infinity; stall > 1_000 && tries < 4; tries++) {
      all = [];
      for (const transport of transports) all.push(await enter(transport));
      stall = await longestStall(SOAK ? 130_000 : 7_000, t.signal);
      note(`${name}: no turn for ${Math.round(stall)} ms`);
    }
    for (const { transport, connected, peer } of all!) {
      const { socket, messages, events } = connected;
      assertEquals(events, ["open"], about(transport));
      socket.send("after");
      assertEquals(await messages.next(), "after", about(transport));
      peer.send("down");
      assertEquals(await messages.next(), "down", about(transport));
      const used = held.includes(transport) ? "post" : transport;
      assertEquals([socket.transport, events], [used, ["open"]], about(transport));
    }
  }));
}, { timeout: SOAK ? 600_000 : timeout, skip: needs("nginx", "haproxy", "apache", "openssl") });

test("quiet streams that nginx, haproxy and Apache cut are resumed", async (t) => {
  await Promise.all(cutting.map(async ({ name, configuration }) => {
    const { port, peers } = await site(t, name, { configuration, idle: 1 }); // 15 s of quiet
    await Promise.all(transports.map(async (transport) => {
      const { socket, messages, events } = await open(t, port, { transport });
      await until(() => events.filter((event) => event === "drop").length > 1, { timeout: 20_000 });
      socket.send(transport);
      assertEquals(await messages.next({ timeout: 20_000 }), transport);
      socket.close(1000);
      await until(() => events.includes("close"), { timeout: 20_000 });
      assert(!events.includes("error"));
    }));
    assertEquals(peers.all.length, 3, "no session was opened again");
  }));
}, { timeout, skip: needs("nginx", "haproxy", "apache", "openssl") });

for (const transport of ["auto", "stream"] as const) {
  test(
    `nginx, as shipped: an uplink that it holds falls from ${transport} to post in under 3 s`,
    async (t) => {
      const { port } = await site(t, "nginx");
      let took = Infinity;
      for (let n = 0; n < 5 && took >= 3_000; n++) {
        const fresh = t.use(await chaos(port)); // nothing is remembered of its port
        const began = performance.now();
        const { socket, messages, events } = await open(t, fresh.port, { transport });
        const sent = ["one", "two", "three"];
        sent.forEach((text) => socket.send(text));
        assertEquals(await messages.take(3), sent);
        took = performance.now() - began;
        socket.send("four");
        assertEquals(await messages.next(), "four");
        assertEquals([socket.transport, messages.left, events], ["post", 0, ["open"]]);
      }
      note(`${took} ms`);
      assertLess(took, 3_000);
    },
    { timeout, skip: needs("nginx", "openssl") },
  );
}

test(
  "nginx, as documented, asks an instance that has been replaced, as soon as it is there",
  async (t) => {
    const ports = [await freePort(), await freePort()] as const;
    const start = (port: number) => t.serve(() => new Response(`${port}`), { port });
    const [first, second] = [await start(ports[0]), await start(ports[1])];
    const { url } = await proxy(t, "nginx", ports[0], {
      configuration: "documented",
      other: ports[1],
    });
    const answers = async () => {
      const answers = [];
      for (let n = 0; n < 4; n++) answers.push(await (await fetch(url)).text());
      return answers;
    };
    assertEquals(new Set(await answers()), new Set(ports.map(String)));
    await first.close();
    assertEquals(await answers(), Array(4).fill(`${ports[1]}`));
    await start(ports[0]);
    await second.close();
    assertEquals(await answers(), Array(4).fill(`${ports[0]}`));
  },
  { timeout, skip: needs("nginx", "openssl") },
);

test("nginx, as shipped: a single message over its cap of 1 MiB closes with 1009", async (t) => {
  const { port, peers } = await site(t, "nginx");
  const { socket, closed } = await open(t, port, { transport: "post" });
  await peers.next();
  socket.send("x".repeat(1024 * 1024));
  const { code, wasClean } = await closed;
  assertEquals([code, wasClean], [1009, false]);
}, { timeout, skip: needs("nginx", "openssl") });
