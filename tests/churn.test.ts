/** Churn: sessions come and go in every way, and leave nothing behind. */
import { WebSocketSSE } from "../client.ts";
import type { SSEOptions } from "../server.ts";
import {
  assertEquals,
  assertGreater,
  assertLess,
  once,
  runtime,
  sleep,
  test,
  until,
  within,
} from "./harness.ts";
import { MB, type Measured, measured, type MeasuredState, RawStream, soak } from "./measured.ts";

/** An adapter whose sessions join two topics in one of ten namespaces. */
function busy(s: MeasuredState): SSEOptions {
  s.notes.opened = 0;
  s.notes.codes = {};
  return {
    bidir: true,
    resumeTimeout: 150,
    maxBufferedAmount: 10_000,
    heartbeatInterval: 100,
    hooks: {
      async upgrade(request) {
        const url = new URL(request.url);
        if (url.searchParams.has("slow")) await s.later(20);
        if (url.searchParams.has("refuse")) return new Response(null, { status: 401 });
        return { namespace: url.pathname };
      },
      open(peer) {
        s.notes.opened++;
        s.peers.push(peer);
        peer.subscribe("everyone");
        peer.subscribe(`own ${peer.id}`);
      },
      close(_peer, { code }) {
        s.notes.codes[code!] = (s.notes.codes[code!] ?? 0) + 1;
      },
      message(peer, message) {
        if (message.text() === "throw") throw new Error("as told");
        peer.send(message.text());
      },
      error() {},
    },
  };
}

/** Runs in the child: so many sessions, ended in every way, many at once. */
async function round(s: MeasuredState, count: number): Promise<void> {
  const base = "http://x";
  const type = "application/websocket-events";
  const get = { accept: "text/event-stream", "x-duplex-version": "1" };
  const none = () => {};
  const post = (token: string, body: string, url: string, seq = "1") =>
    s.ws.fetch(
      new Request(url, {
        method: "POST",
        headers: { "content-type": type, "x-crossws-id": token },
        body: `SEQ 1\r\n${seq}\r\n${body}`,
      }),
    );
  async function one(i: number): Promise<void> {
    const way = i % 12;
    const url = `${base}/room${i % 10}?${i}${way === 0 ? "&refuse" : ""}`;
    if (way === 1) { // a request that carries both directions
      const response = await s.ws.fetch(
        new Request(url, {
          method: "POST",
          headers: { ...get, "content-type": type },
          body: new Uint8Array(
            [..."SEQ 1\r\n1\r\nTEXT 2\r\nhi\r\nCLOSE 2\r\n\x03\xe8\r\n"].map((c) =>
              c.charCodeAt(0)
            ),
          ),
        }),
      );
      await response.body!.pipeTo(new WritableStream()).catch(none);
      return;
    }
    const plain = way === 2 || way === 3;
    const response = await s.ws.fetch(
      new Request(url, { headers: plain ? { accept: get.accept } : get }),
    );
    if (way === 0) return void await response.body?.cancel();
    const token = response.headers.get("x-crossws-id")!;
    const reader = response.body!.getReader();
    await reader.read();
    const peer = s.peers.find((peer) => peer.request.url === url)!;
    const rest = async () => {
      while (!(await reader.read()).done);
    };
    switch (way) {
      case 2: // a plain client goes
        return void await reader.cancel();
      case 3: // the server closes a plain client
        peer.close(4001);
        return await rest();
      case 4: // clean, from the client
        await post(token, "CLOSE 0\r\n\r\n", url);
        return await rest();
      case 5: // clean, from the server
        peer.close(4000, "bye");
        await rest();
        return void await post(token, "CLOSE 0\r\n\r\n", url);
      case 6: // from the server, and never answered
        peer.close(4000, "bye");
        return await rest();
      case 7: // gone, and expires
        return void await reader.cancel();
      case 8:
        peer.terminate();
        return await rest();
      case 9: // 1013
        while (peer.websocket.readyState === 1) peer.send("x".repeat(4000));
        return void await reader.cancel();
      case 10: // 1011
        await post(token, "TEXT 5\r\nthrow\r\n", url);
        return void await reader.cancel();
      case 11: // resumed, and left with messages that nobody takes
        await reader.cancel();
        peer.send("kept");
        await s.ws.fetch(
          new Request(url, {
            headers: {
              ...get,
              "x-crossws-id": token,
              "x-duplex-attempt": "1",
              "last-event-id": "0",
            },
          }),
        ).then((response) => response.body!.cancel());
    }
  }
  for (let at = 0; at < count; at += 200) {
    await Promise.all(Array.from({ length: Math.min(200, count - at) }, (_, i) => one(at + i)));
    s.peers.length = 0;
  }
}

/** Waits until the adapter is empty. */
async function empty(server: Measured): Promise<void> {
  await until(() => server.run((s) => s.ws.peers.size === 0), { timeout: 5000, interval: 50 });
}

const sessions = soak ? 10_000 : 2000;
test(
  `${sessions} sessions that end in every way leave no peer, topic, timer or memory behind`,
  async (t) => {
    const server = t.use(
      await measured(runtime, busy),
    );
    const heaps: number[] = [];
    for (let i = 0; i < 5; i++) {
      await server.run(round, sessions);
      await empty(server);
      await server.run((s) => s.later(400)); // beyond what a tombstone lives
      heaps.push((await server.run((s) => s.memory())).heap);
    }
    const end = await server.run((s) => ({
      opened: s.notes.opened,
      codes: s.notes.codes,
      namespaces: [...s.ws.peers.keys()],
    }));
    if (process.env.DUPLEX_FIGURES) {
      console.log(
        heaps.map((heap) => (heap / MB).toFixed(2)),
        end.codes,
      );
    }
    // `open` and `close` once each: what was refused has neither.
    const closes = Object.values(end.codes as Record<string, number>).reduce((a, b) => a + b);
    assertEquals(closes, end.opened);
    assertEquals(end.opened, 5 * (sessions - Math.ceil(sessions / 12)));
    for (const code of [1000, 1005, 1006, 1013, 4001]) assertGreater(end.codes[code] ?? 0, 0);
    assertEquals(end.namespaces, []);
    // The first round warms up; after it, less than 100 bytes a session may stay.
    assertLess(heaps[4]! - heaps[1]!, 3 * sessions * 100 + 0.3 * MB, `${heaps}`);
  },
  { timeout: soak ? 120_000 : 40_000 },
);

test("publishing costs nothing once the subscribers are gone", async (t) => {
  const server = t.use(await measured(runtime, busy));
  const cost = () =>
    server.run((s) => {
      const start = performance.now();
      for (let i = 0; i < 20_000; i++) s.ws.publish("everyone", "x");
      return performance.now() - start;
    });
  await cost();
  const before = Math.min(await cost(), await cost());
  await server.run(round, 1000);
  await empty(server);
  await cost();
  assertLess(Math.min(await cost(), await cost()), 3 * before + 5);
}, { timeout: 20_000 });

test("no timer is left when the last session and its tombstone are gone", async (t) => {
  const server = t.use(
    await measured(runtime, (s) => {
      s.notes.running = 0;
      const { setTimeout, clearTimeout } = globalThis;
      const alive = new Set<unknown>();
      s.notes.alive = alive;
      globalThis.setTimeout = ((task: () => void, delay: number) => {
        const timer = setTimeout(() => {
          alive.delete(timer);
          task();
        }, delay);
        alive.add(timer);
        return timer;
      }) as never;
      globalThis.clearTimeout = ((timer: never) => {
        alive.delete(timer);
        clearTimeout(timer);
      }) as never;
      return {
        bidir: true,
        resumeTimeout: 100,
        hooks: { open: (peer) => void s.peers.push(peer) },
      };
    }),
  );
  const counts = await server.run(async (s) => {
    const alive = s.notes.alive as Set<unknown>;
    const counts = [alive.size];
    const headers = { accept: "text/event-stream", "x-duplex-version": "1" };
    const response = await s.ws.fetch(new Request("http://x/", { headers }));
    counts.push(alive.size);
    s.peers[0]!.close(4000);
    await response.body!.pipeTo(new WritableStream());
    await s.later(500);
    counts.push(alive.size);
    // The same for an adapter that is closed while it has sessions.
    const again = await s.ws.fetch(new Request("http://x/", { headers }));
    counts.push(alive.size);
    const draining = again.body!.pipeTo(new WritableStream());
    await s.ws.close();
    await draining;
    counts.push(alive.size);
    return counts;
  });
  assertEquals(counts, [0, 1, 0, 1, 0]);
});

test("a request that is gone before its session opens leaves no peer behind", async (t) => {
  const server = t.use(await measured(runtime, busy));
  for (const full of [true, false]) {
    const headers: Record<string, string> = { accept: "text/event-stream" };
    if (full) headers["x-duplex-version"] = "1";
    await Promise.all(Array.from({ length: 20 }, async (_, i) => {
      const abort = new AbortController();
      setTimeout(() => abort.abort(), 5 + i); // around the 20 ms that the hook takes
      await fetch(`${server.url}/late?slow`, { headers, signal: abort.signal })
        .then((response) => response.body?.cancel(), () => {});
    }));
    await sleep(100);
    await empty(server);
  }
}, { timeout: 15_000 });

// ---------------------------------------------------------------- over sockets

const plain = (s: MeasuredState): SSEOptions => ({
  bidir: true,
  resumeTimeout: 400,
  heartbeatInterval: 200,
  hooks: {
    open(peer) {
      s.peers.push(peer);
      peer.subscribe("all");
    },
    message: (peer, message) => void peer.send(message.text()),
    close: (peer, details) => void s.closed.push({ id: peer.id, ...details }),
  },
});

test("1,000 connections at once are all served, and all are gone afterwards", async (t) => {
  const server = t.use(
    await measured(runtime, (s) => ({
      bidir: true,
      hooks: {
        open: (peer) => peer.subscribe("all"),
        message: (peer, message) => void peer.send(message.text()),
        close: (peer, details) => void s.closed.push({ id: peer.id, ...details }),
      },
    })),
  );
  const start = performance.now();
  // Over bare sockets: Bun's fetch holds back what is beyond 256 at once.
  const readers = await Promise.all(
    Array.from({ length: 1000 }, () => RawStream.open(server.port)),
  );
  for (const reader of readers) t.use(reader);
  assertEquals(await server.run((s) => s.ws.peers.get("/")!.size), 1000);
  const echoes = await Promise.all(readers.map(async (reader, i) => {
    const text = `hello ${i}`;
    const frame = `TEXT ${text.length.toString(16)}\r\n${text}\r\n`;
    await reader.post(`SEQ 1\r\n1\r\n${frame}`);
    return await reader.message() === text;
  }));
  await server.run((s) => s.ws.publish("all", "all"));
  const published = await Promise.all(readers.map((reader) => reader.message()));
  const closes = await Promise.all(readers.map(async (reader) => {
    await reader.post("SEQ 1\r\n2\r\nCLOSE 0\r\n\r\n");
    for (;;) {
      const { type } = await reader.next();
      if (type === "end" || type === "duplex-close") return type;
    }
  }));
  if (process.env.DUPLEX_FIGURES) console.log("1,000 clients", performance.now() - start);
  assertEquals(echoes.filter(Boolean).length, 1000);
  assertEquals(published.filter((data) => data === "all").length, 1000);
  assertEquals(closes.filter((type) => type === "duplex-close").length, 1000);
  const seen = await server.run((s) => [s.closed.length, s.ws.peers.size]);
  assertEquals(seen, [1000, 0]);
}, { timeout: 60_000 });

test("a client that is killed is closed with 1006 after resumeTimeout", async (t) => {
  const server = t.use(await measured(runtime, plain));
  const victim = await t.spawn(runtime, "tests/fixtures/client.ts", { args: [server.url] });
  assertEquals(await victim.line(), "open");
  assertEquals(await server.run((s) => s.ws.peers.size), 1);
  const start = performance.now();
  victim.kill("SIGKILL");
  await victim.exited;
  await until(() => server.run((s) => s.closed.length), { interval: 20 });
  assertEquals(await server.run((s) => [s.closed[0]!.code, s.ws.peers.size]), [1006, 0]);
  assertGreater(performance.now() - start, 300);
  assertLess(performance.now() - start, 3000);
});

test(
  "closing the adapter lets queued messages out, tells every client, and resolves",
  async (t) => {
    const server = t.use(
      await measured(runtime, (s) => ({
        bidir: true,
        resumeTimeout: 10_000,
        hooks: {
          open: (peer) => void s.peers.push(peer),
          close: (peer, details) => void s.closed.push({ id: peer.id, ...details }),
        },
      })),
    );
    const clients = (["duplex", "stream", "post"] as const).map((transport) =>
      new WebSocketSSE(server.url, { transport })
    );
    const results = await Promise.all(clients.map(async (client) => {
      let bytes = 0;
      let next = 0;
      client.onmessage = ({ data }) => {
        if (data.startsWith(`${next}:`)) next++;
        bytes += data.length;
      };
      await once(client, "open");
      return { client, get: () => ({ bytes, next }) };
    }));
    const size = 50_000;
    const closing = server.run(async (s, size) => {
      for (let i = 0; i < 100; i++) {
        for (const peer of s.peers) peer.send(`${i}:`.padEnd(size, "x"));
      }
      const start = performance.now();
      await s.ws.close(1012, "restart");
      return performance.now() - start;
    }, size);
    const ends = await Promise.all(
      results.map(({ client }) => once<CloseEvent>(client, "close", { timeout: 20_000 })),
    );
    for (const { code, reason, wasClean } of ends) {
      assertEquals([code, reason, wasClean], [1012, "restart", true]);
    }
    for (const { get } of results) assertEquals(get(), { bytes: 100 * size, next: 100 });
    assertLess(await within(closing, 10_000, "close()"), 9000);
    assertEquals(await server.run((s) => s.closed.map(({ code }) => code)), [1012, 1012, 1012]);
  },
  { timeout: 40_000 },
);

test("while the adapter closes, newcomers get 503 and sessions may still resume", async (t) => {
  const server = t.use(await measured(runtime, plain));
  const staying = t.use(await RawStream.open(server.port));
  await server.run((s) => {
    for (let i = 0; i < 100; i++) s.peers[0]!.send(`${i}:${"x".repeat(10_000)}`);
    s.notes.closing = s.ws.close(1012).then(() => s.notes.closed = true);
  });
  const accept = "text/event-stream";
  const refused = await fetch(server.url, { headers: { accept, "x-duplex-version": "1" } });
  assertEquals(refused.status, 503);
  assertGreater(Number(refused.headers.get("retry-after")), 0);
  await refused.body?.cancel();
  for (let i = 0; i < 3; i++) await staying.message();
  staying.response.destroy(); // its network drops meanwhile
  const again = await fetch(server.url, {
    headers: {
      accept,
      "x-duplex-version": "1",
      "x-crossws-id": staying.token,
      "x-duplex-attempt": "1",
      "last-event-id": "3",
    },
  });
  assertEquals(again.status, 200);
  assertEquals(await server.run((s) => !!s.notes.closed), false);
  const resumed = t.use(new RawStream(server.port, reading(again), true, 256 * 1024));
  resumed.token = staying.token;
  resumed.received = 3;
  for (let i = 3; i < 100; i++) {
    const message = await resumed.message();
    assertEquals(message.slice(0, message.indexOf(":")), String(i));
  }
  assertEquals(await resumed.next(), {
    type: "duplex-close",
    data: `{"code":1012,"reason":"","sent":100}`,
  });
  assertEquals(await resumed.post("SEQ 1\r\n1\r\nCLOSE 0\r\n\r\n"), 204);
  await within(server.run((s) => s.notes.closing), 2000, "close()");
});

/** A fetched response for `RawStream`. */
function reading(response: Response): RawStream["response"] {
  const reader = response.body!.getReader();
  return {
    status: response.status,
    headers: response.headers,
    read: async () => (await reader.read()).value ?? null,
    [Symbol.asyncDispose]: () => reader.cancel(),
  } as unknown as RawStream["response"];
}

test("closing the adapter resolves within resumeTimeout though a client has stopped reading", async (t) => {
  const server = t.use(await measured(runtime, plain));
  const reader = t.use(await RawStream.open(server.port));
  const took = await server.run(async (s) => {
    for (let i = 0; i < 100; i++) s.peers[0]!.send("x".repeat(10_000));
    const start = performance.now();
    await s.ws.close(1012);
    return performance.now() - start;
  });
  assertGreater(took, 300);
  assertLess(took, 2000);
  assertEquals(await server.run((s) => s.closed.map(({ code }) => code)), [1006]);
  assertEquals(reader.received, 0);
});
