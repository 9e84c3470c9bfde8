/** Liveness: what is alive stays, what is dead is noticed, and one timer sees to it. */
import { Buffer } from "node:buffer";
import net from "node:net";
import { WebSocketSSE } from "../client.ts";
import { chaos } from "./chaos.ts";
import {
  assert,
  assertEquals,
  assertGreater,
  assertGreaterOrEqual,
  assertLess,
  assertLessOrEqual,
  deferred,
  once,
  runtime,
  sleep,
  test,
  until,
  within,
} from "./harness.ts";
import { adapter, connect, dial, listen, Queue, shutDown } from "./pair.ts";
import { FULL } from "./wire.ts";
import { measured, RawStream, soak } from "./measured.ts";
import { RequestSplitter } from "./split.ts";

const transports = ["duplex", "stream", "post"] as const;

// ---------------------------------------------------------------- proxies

interface Proxy extends AsyncDisposable {
  readonly url: string;
  /** Requests or connections that it ended. */
  ended: number;
  requests: number;
  /** The largest request so far: head, framing and body. */
  largest: number;
}

/** Passes bytes on; `up` and `down` see them, and may end the connection. */
async function proxy(
  port: number,
  watch: (state: Proxy, end: (last?: string) => void) => {
    up(data: Uint8Array): void;
    down(data: Uint8Array): void;
    closed?(): void;
  },
): Promise<Proxy> {
  const sockets = new Set<net.Socket>();
  const listener = net.createServer({ allowHalfOpen: true }, (client) => {
    const server = net.connect({ port, host: "127.0.0.1", allowHalfOpen: true });
    const seen = watch(state, (last) => {
      server.destroy();
      if (last) client.end(last);
      else client.destroy();
    });
    for (
      const [from, to, see] of [[client, server, seen.up], [server, client, seen.down]] as const
    ) {
      sockets.add(from);
      from.on("data", (data: Uint8Array) => {
        see(data);
        if (!to.destroyed && to.writable && !to.write(data)) from.pause();
      });
      to.on("drain", () => from.resume());
      from.on("end", () => to.end());
      from.on("error", () => {});
      from.on("close", () => {
        sockets.delete(from);
        seen.closed?.();
        to.destroy();
      });
    }
  });
  await new Promise<void>((resolve) => listener.listen(0, "127.0.0.1", resolve));
  const state: Proxy = {
    url: `http://127.0.0.1:${(listener.address() as net.AddressInfo).port}`,
    ended: 0,
    requests: 0,
    largest: 0,
    async [Symbol.asyncDispose]() {
      const closed = new Promise((resolve) => listener.close(resolve));
      for (const socket of sockets) socket.destroy();
      await closed;
    },
  };
  return state;
}

/** Ends connections on which a request is under way and no byte came either way for so long. */
function impatient(port: number, patience: number): Promise<Proxy> {
  return proxy(port, (state, end) => {
    let timer: ReturnType<typeof setTimeout> | undefined;
    const restart = () => {
      clearTimeout(timer);
      timer = setTimeout(() => {
        state.ended++;
        end();
      }, patience);
    };
    return {
      up: restart,
      down(data) {
        restart();
        // An answer that is complete: what follows is a connection kept for later.
        if (Buffer.from(data).toString("latin1").includes("HTTP/1.1 204")) clearTimeout(timer);
      },
      closed: () => clearTimeout(timer),
    };
  });
}

/** Answers 413 to any request beyond a limit, and cuts it. */
function capping(port: number, limit: number): Promise<Proxy> {
  return proxy(port, (state, end) => {
    let size = 0;
    const splitter = new RequestSplitter({
      head() {
        state.requests++;
        size = 0;
      },
      data(bytes) {
        state.largest = Math.max(state.largest, size += bytes.length);
        if (size <= limit || size - bytes.length > limit) return; // or it has been cut already
        state.ended++;
        end("HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
      },
      end() {},
    });
    return { up: (data) => splitter.push(data), down() {} };
  });
}

// ---------------------------------------------------------------- heartbeats

for (const transport of transports) {
  test(`heartbeats keep a quiet session alive through a proxy that cuts quiet connections (${transport})`, async (t) => {
    const ws = adapter(t, { heartbeatInterval: 100 });
    const server = await t.serve(ws.fetch);
    const cutter = t.use(await impatient(server.port, 700));
    const client = dial(t, cutter.url, transport);
    let drops = 0;
    client.addEventListener("drop", () => drops++);
    await once(client, "open");
    client.send("so that an uplink is open"); // of "stream", too
    await until(() => client.bufferedAmount === 0);
    await sleep(2500, t.signal);
    assertEquals([cutter.ended, drops, client.stats.resumes], [0, 0, 0]);
    assertEquals(client.readyState, WebSocketSSE.OPEN);
    assertEquals(client.transport, transport);
  });
}

for (const transport of ["duplex", "post"] as const) {
  test(`a quiet session carries bytes at least every heartbeatInterval (${transport})`, async (t) => {
    const interval = 300;
    const ws = adapter(t, { heartbeatInterval: interval });
    const server = await t.serve(ws.fetch);
    const gaps = { up: 0, down: 0 };
    const last = { up: Infinity, down: Infinity };
    const counts = { up: 0, down: 0 };
    const see = (leg: "up" | "down") => () => {
      const now = performance.now();
      gaps[leg] = Math.max(gaps[leg], now - last[leg]);
      last[leg] = now;
      counts[leg]++;
    };
    const glass = t.use(await proxy(server.port, () => ({ up: see("up"), down: see("down") })));
    const client = dial(t, glass.url, transport);
    await once(client, "open");
    // Messages at odd moments, after which a timer may forget that one is due.
    for (const pause of [450, 370, 430, 610, 1500]) {
      for (const peers of ws.peers.values()) for (const peer of peers) peer.send("x");
      if (transport === "duplex") client.send("y");
      await sleep(pause, t.signal);
    }
    // "post" has no uplink that could be kept alive.
    for (const leg of transport === "duplex" ? ["up", "down"] as const : ["down"] as const) {
      assertLessOrEqual(gaps[leg], interval + 150, leg); // 150 for a busy machine
      // And not more often than it must.
      assertLess(counts[leg], 60, leg);
    }
  });
}

const long = soak ? 300 : 12;
test(
  `a quiet session lives for ${long} s on Bun with default options, told of the server or not`,
  async (t) => {
    const setup = (unattended: boolean) =>
      measured(
        "bun",
        unattended
          ? (s) => {
            s.notes.unattended = true;
            return { bidir: true, hooks: { open: (peer) => void s.peers.push(peer) } };
          }
          : (s) => ({ bidir: true, hooks: { open: (peer) => void s.peers.push(peer) } }),
      );
    const servers = await Promise.all([false, true].map(setup));
    for (const server of servers) t.use(server);
    const clients = servers.flatMap(({ url }) =>
      transports.map((transport) => dial(t, url, transport))
    );
    const drops: string[] = [];
    await Promise.all(clients.map(async (client) => {
      client.addEventListener("drop", () => drops.push(`${client.url} ${client.transport}`));
      await once(client, "open");
      client.send("hello");
    }));
    // The widest gap that a bare reader sees where the runtime's idle cut was not lifted.
    const reader = t.use(await RawStream.open(servers[1]!.port));
    let widest = 0;
    let last = performance.now();
    const reading = (async () => {
      while (await reader.response.read()) {
        widest = Math.max(widest, performance.now() - last);
        last = performance.now();
      }
    })().catch(() => {});
    await sleep(5400, t.signal);
    // Shortly before a timer of half of 15 s, which would then let it be for another round.
    await servers[1]!.run((s) => s.peers.forEach((peer) => void peer.send("now")));
    await sleep(6600, t.signal);
    // Looked at here: the bare reader answers no ping, so after idleTimeout it is dropped.
    assertLess(Math.max(widest, performance.now() - last), 5500);
    await sleep((long - 12) * 1000, t.signal);
    assertEquals(drops, []);
    for (const client of clients) {
      assertEquals([client.readyState, client.stats.resumes], [WebSocketSSE.OPEN, 0]);
    }
    reader.response.destroy();
    await reading;
  },
  { timeout: (long + 15) * 1000 },
);

// ---------------------------------------------------------------- renewal

const CAP = 512 * 1024;
for (const transport of ["duplex", "stream", "post"] as const) {
  test(
    `an uplink gets through a proxy that caps requests at 512 KiB, and nobody notices (${transport})`,
    async (t) => {
      const got: string[] = [];
      const ws = adapter(t, {
        hooks: { message: (_peer, message) => void got.push(message.text().split(":")[0]!) },
      });
      const server = await t.serve(ws.fetch);
      const cap = t.use(await capping(server.port, CAP + 16 * 1024));
      const client = dial(t, cap.url, transport);
      await once(client, "open");
      const count = 200;
      const size = 20_000;
      for (let i = 0; i < count; i++) {
        client.send(`${i}:`.padEnd(size, "a"));
        if (i % 10 === 0) await sleep(1);
      }
      await until(() => client.bufferedAmount === 0, { timeout: 15_000 });
      assertEquals(got, Array.from({ length: count }, (_, i) => String(i)));
      // A longer one is tried once.
      assertLessOrEqual(cap.ended, transport === "post" ? 0 : 1, "requests cut by the proxy");
      assertGreaterOrEqual(cap.requests, Math.floor(count * size / CAP));
      assertLess(cap.requests, 150);
      assertEquals(client.stats.resumes, 0);
      if (transport !== "post") assert(client.transport !== "post", "it still streams");
    },
    { timeout: 20_000 },
  );
}

// ---------------------------------------------------------------- silence

for (const transport of transports) {
  test(`the client notices a half-open connection within two heartbeats and resumes (${transport})`, async (t) => {
    const interval = 200;
    let opens = 0;
    const got: string[] = [];
    const ws = adapter(t, {
      heartbeatInterval: interval,
      hooks: {
        open: () => void opens++,
        message: (_peer, message) => void got.push(message.text()),
      },
    });
    const server = await t.serve(ws.fetch);
    const network = t.use(await chaos(server.port));
    const client = dial(t, network.url, transport);
    await once(client, "open");
    client.send("before");
    await until(() => got.length === 1 && client.bufferedAmount === 0);
    const dropped = once(client, "drop");
    const resumed = once(client, "resume");
    network.stallAll({ newcomers: false });
    const start = performance.now();
    client.send("meanwhile");
    for (const peers of ws.peers.values()) for (const peer of peers) peer.send("down");
    const received = once<MessageEvent>(client, "message");
    await dropped;
    const noticed = performance.now() - start;
    await resumed;
    const back = performance.now() - start;
    assertLess(noticed, 2 * interval + interval / 2 + 250); // a tick, and a busy machine
    assertGreater(noticed, interval);
    assertLess(back - noticed, 1000);
    assertEquals((await received).data, "down");
    await until(() => got.length === 2, { timeout: 8000 });
    assertEquals([got, opens], [["before", "meanwhile"], 1]);
  });
}

test("a peer whose network has died is closed within idleTimeout and resumeTimeout", async (t) => {
  await Promise.all(transports.map(async (transport) => {
    const closed = deferred<{ code?: number; at: number }>();
    const ws = adapter(t, {
      heartbeatInterval: 100,
      idleTimeout: 0.6,
      resumeTimeout: 500,
      hooks: { close: (_peer, { code }) => closed.resolve({ code: code!, at: performance.now() }) },
    });
    const server = await t.serve(ws.fetch);
    const network = t.use(await chaos(server.port));
    const client = new WebSocketSSE(network.url, { transport });
    await once(client, "open");
    const gone = once<CloseEvent>(client, "close", { timeout: 6000 });
    await sleep(1000, t.signal); // it answers pings meanwhile
    assertEquals(ws.peers.size, 1);
    network.stallAll();
    const start = performance.now();
    const { code, at } = await within(closed.promise, 5000, "the close hook");
    assertEquals(code, 1006);
    assertLess(at - start, 600 + 500 + 600);
    assertGreater(at - start, 600);
    assertEquals(ws.peers.size, 0);
    const { code: seen } = await gone; // the client gives up as well
    assertEquals(seen, 1006);
  }));
}, { timeout: 15_000 });

test("a client that only receives answers pings by post, and stays", async (t) => {
  let pongs = 0;
  let posts = 0;
  const ws = adapter(t, {
    heartbeatInterval: 100,
    idleTimeout: 0.4,
    resumeTimeout: 200,
    hooks: { pong: () => void pongs++ },
  });
  const server = await t.serve((request, info) => {
    if (request.method === "POST") posts++;
    return ws.fetch(request, info);
  });
  const client = dial(t, server.url, "post");
  await once(client, "open");
  await sleep(2000, t.signal);
  assertEquals([client.readyState, client.stats.resumes], [WebSocketSSE.OPEN, 0]);
  assertGreater(pongs, 2);
  assertEquals(posts, pongs);
  assertLess(posts, 20, "a ping is not sent before half of idleTimeout");
});

test("a client that is closed by a server that never answers ends in bounded time", async (t) => {
  const ws = adapter(t, { heartbeatInterval: 100, resumeTimeout: 600 });
  const server = await t.serve(ws.fetch);
  const network = t.use(await chaos(server.port));
  const client = new WebSocketSSE(network.url, { transport: "post" });
  await once(client, "open");
  network.stallAll();
  const start = performance.now();
  const closed = once<CloseEvent>(client, "close");
  client.close();
  const { code, wasClean } = await closed;
  assertEquals([code, wasClean], [1006, false]);
  assertLess(performance.now() - start, 1500);
});

test("a client whose opening is answered by silence fails in bounded time", async (t) => {
  const { setTimeout } = globalThis;
  t.defer(() => globalThis.setTimeout = setTimeout);
  // The 30 s that a client gives an opening, at a hundredth.
  globalThis.setTimeout =
    ((task: () => void, delay = 0) => setTimeout(task, delay === 30_000 ? 300 : delay)) as never;
  const silent = new ReadableStream({
    start: (controller) => controller.enqueue(new Uint8Array([58])),
  });
  const server = await t.serve(() =>
    new Response(silent, {
      headers: { "content-type": "text/event-stream", "x-duplex-version": "1" },
    })
  );
  const client = new WebSocketSSE(server.url, { transport: "post" });
  const { code } = await once<CloseEvent>(client, "close");
  assertEquals(code, 1006);
});

// ---------------------------------------------------------------- timers

test("deadlines are met by requests where timers never fire", async (t) => {
  const server = t.use(
    await measured(runtime, (s) => {
      globalThis.setTimeout = (() => 1) as never;
      globalThis.setInterval = (() => 1) as never;
      return {
        bidir: true,
        idleTimeout: 0.3,
        resumeTimeout: 200,
        hooks: { close: (peer, details) => void s.closed.push({ id: peer.id, ...details }) },
      };
    }),
  );
  const result = await server.run(async (s) => {
    const headers = { accept: "text/event-stream", "x-duplex-version": "1" };
    const open = () => s.ws.fetch(new Request("http://x/", { headers }));
    const idle = await open();
    idle.body!.getReader().read();
    const gone = await open();
    await gone.body!.cancel();
    const counts: number[] = [];
    for (let i = 0; i < 3; i++) {
      await s.later(350);
      counts.push(s.closed.length);
      await s.ws.fetch(new Request("http://x/", { method: "PUT" })); // any request
      await new Promise((resolve) => setImmediate(resolve)); // hooks are called in a task of their own
      counts.push(s.closed.length);
    }
    return { counts, codes: s.closed.map(({ code }) => code), left: s.ws.peers.size };
  });
  // The one that is gone expires at the first request, the idle one is then
  // treated as dropped, and expires at the second.
  assertEquals(result.counts, [0, 1, 1, 2, 2, 2]);
  assertEquals([result.codes, result.left], [[1006, 1006], 0]);
});

for (
  const [what, options, word] of [
    ["heartbeats", { heartbeatInterval: 300 }, ":\n"],
    ["questions", { idleTimeout: 0.6 }, "event: duplex-ping"],
  ] as const
) {
  test(`the ${what} of many sessions go a few in each task: who talks does not wait for all`, async (t) => {
    const { setImmediate } = globalThis;
    let task = 0;
    globalThis.setImmediate = ((run: () => void) =>
      setImmediate(() => {
        task++;
        run();
      })) as never;
    t.defer(() => globalThis.setImmediate = setImmediate);
    const ws = adapter(t, options);
    const heard = deferred<void>();
    const inTask = new Map<number, number>();
    let all = 0;
    const listen = async ({ body }: Response) => {
      for await (const chunk of body!.pipeThrough(new TextDecoderStream())) {
        if (!chunk.startsWith(word) || chunk.includes("duplex-open")) continue;
        inTask.set(task, (inTask.get(task) ?? 0) + 1);
        if (++all === 500) heard.resolve();
      }
    };
    const open = () => ws.fetch(new Request("http://localhost/", { headers: FULL }));
    const listening: Promise<void>[] = [];
    for (let i = 0; i < 500; i++) listening.push(listen(await open()));
    await within(heard.promise, 5000, `500 ${what}`);
    assertLessOrEqual(Math.max(...inTask.values()), 100);
    await shutDown(ws);
    await Promise.all(listening);
  });
}

test("there is one timer per adapter, however many peers", async (t) => {
  const server = t.use(
    await measured(runtime, (s) => {
      const pending = s.notes.pending = new Set<unknown>();
      s.notes.started = 0;
      s.notes.intervals = 0;
      const { setTimeout, clearTimeout } = globalThis;
      globalThis.setTimeout = ((task: () => void, delay: number) => {
        const timer = setTimeout(() => {
          pending.delete(timer);
          task();
        }, delay);
        pending.add(timer);
        s.notes.started++;
        return timer;
      }) as never;
      globalThis.clearTimeout = ((timer: never) => {
        pending.delete(timer);
        clearTimeout(timer);
      }) as never;
      globalThis.setInterval = (() => s.notes.intervals++) as never;
      return { bidir: true, heartbeatInterval: 200, resumeTimeout: 1000 };
    }),
  );
  const result = await server.run(async (s) => {
    const pending = s.notes.pending as Set<unknown>;
    const headers = { accept: "text/event-stream", "x-duplex-version": "1" };
    let most = 0;
    let heartbeats = 0;
    const streams: ReadableStreamDefaultReader<Uint8Array>[] = [];
    for (let i = 0; i < 1000; i++) {
      const response = await s.ws.fetch(new Request("http://x/", { headers }));
      const reader = response.body!.getReader();
      streams.push(reader);
      (async () => {
        for (let chunk; !(chunk = await reader.read()).done;) {
          if (chunk.value.length === 2) heartbeats++;
        }
      })();
      most = Math.max(most, pending.size);
    }
    const before = s.notes.started;
    await s.later(1000);
    most = Math.max(most, pending.size);
    const started = s.notes.started - before;
    for (const peers of [...s.ws.peers.values()]) for (const peer of [...peers]) peer.terminate();
    await s.later(1500);
    return { most, started, heartbeats, left: pending.size, intervals: s.notes.intervals };
  });
  assertEquals([result.most, result.left, result.intervals], [1, 0, 0]);
  assertGreater(result.heartbeats, 1000, "while every one of them had heartbeats");
  assertLess(result.started, 20);
}, { timeout: 20_000 });

for (const [how, by] of Object.entries({ ahead: 3_600_000, back: -3_600_000 })) {
  test(`a system clock that is set ${how} ends no session, and keeps none`, async (t) => {
    const closes = new Queue<number>();
    const { port } = await listen(t, {
      heartbeatInterval: 200,
      idleTimeout: 1,
      resumeTimeout: 1_500,
      hooks: { close: (_, { code }) => closes.push(code!) },
    });
    const network = t.use(await chaos(port, { seed: 1 }));
    const { events, opened } = connect(t, `${network.url}/`, { transport: "post" });
    await opened;
    const { now } = Date;
    const set = () => Date.now = () => now() + by;
    t.defer(() => Date.now = now);
    network.refuse(300);
    network.cutAll("rst");
    await until(() => events.includes("drop"));
    set(); // while both count on its coming back
    await until(() => events.includes("resume"));
    Date.now = now;
    await sleep(300, t.signal);
    set(); // while nobody says anything
    await sleep(1_500, t.signal);
    assertEquals(events, ["open", "drop", "resume"]);
    network.refuse(60_000);
    network.cutAll("rst");
    assertEquals(await closes.next(), 1006);
  });
}

// ---------------------------------------------------------------- a page that is left

for (
  const [what, sizes, arrive, code] of [
    ["all of it where it fits, and its close", [10, 20_000, 30_000], 3, 1001],
    ["whole messages in order as far as they fit", [30_000, 30_000, 30_000, 10], 2, 1006],
    ["nothing where the first message is too large", [70_000, 10], 0, 1006],
  ] as const
) {
  test(`a page that is left sends, of what is unacknowledged, ${what}`, async (t) => {
    const page = globalThis as { document?: unknown };
    page.document = {};
    t.defer(() => void delete page.document);
    const sizesOf = new Queue<number>();
    const closes = new Queue<number>();
    const { url } = await listen(t, {
      heartbeatInterval: 200,
      resumeTimeout: 500,
      hooks: {
        message: (_, message) => sizesOf.push(message.text().length),
        close: (_, { code }) => closes.push(code!),
      },
    });
    const { socket, opened, closed } = connect(t, url, {
      fetch: (input, init) => {
        if (init?.method === "GET" || init?.keepalive) return fetch(input, init);
        return new Promise((_, reject) => { // a network that takes and takes
          init!.signal!.addEventListener("abort", () => reject(new Error("Aborted")));
        });
      },
    });
    await opened;
    for (const size of sizes) socket.send("x".repeat(size));
    globalThis.dispatchEvent(new Event("pagehide"));
    const { code: told, wasClean } = await closed;
    assertEquals([told, wasClean], [1001, false]);
    assertEquals(await closes.next(), code);
    assertEquals(sizesOf.all, sizes.slice(0, arrive));
  });
}
