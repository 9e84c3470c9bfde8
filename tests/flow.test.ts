/** Flow control: a slow reader costs a bounded amount, itself alone, and loses nothing. */
import { type Transport, WebSocketSSE } from "../client.ts";
import { type Peer, type SSEAdapter, sseAdapter, type SSEOptions } from "../server.ts";
import {
  assert,
  assertEquals,
  assertGreater,
  assertLess,
  assertLessOrEqual,
  assertRejects,
  deferred,
  once,
  runtime,
  sleep,
  test,
  type TestContext,
  until,
  within,
} from "./harness.ts";
import { adapter, closeAll, dial, handClock, Queue, shutDown } from "./pair.ts";
import { post, streamOf, WireClient } from "./wire.ts";
import { MB, type Measured, measured, type MeasuredState, RawStream, soak } from "./measured.ts";

const HOME = "http://localhost/room";
const WINDOW = 256 * 1024;
const transports = ["duplex", "stream", "post"] as const;

/**
 * What the server's memory may rise by beyond `maxBufferedAmount` and `window`:
 * the runtime's own buffers for a connection, its heap's slack, pages not given back.
 */
const CONSTANT = 48 * MB;

// ---------------------------------------------------------------- down: a reader that stops

/** Runs in the child: sends, and takes a breath whenever asked to. */
async function sendWaiting(s: MeasuredState, count: number, size: number): Promise<void> {
  const peer = s.peers[0]!;
  const padding = "x".repeat(size);
  for (let i = 0; i < count; i++) {
    peer.send(`${i}:${padding}`);
    s.sent = i + 1;
    s.most = Math.max(s.most, peer.bufferedAmount);
    await peer.waitForDrain();
  }
}

const bare = (s: MeasuredState): SSEOptions => ({
  bidir: true,
  idleTimeout: 0,
  hooks: {
    open: (peer) => void s.peers.push(peer),
    close: (peer, details) => void s.closed.push({ id: peer.id, ...details }),
    drain: () => void s.drains++,
  },
});

/** Waits until the sender in the child gets no further; how far it came. */
async function stalled(server: Measured): Promise<number> {
  let before = -1;
  return await until(async () => {
    const sent = await server.run((s) => s.sent);
    const still = sent > 0 && sent === before;
    before = sent;
    return still && sent;
  }, { timeout: 20_000, interval: 250 });
}

for (const full of [true, false]) {
  const level = full ? "full" : "plain";
  const total = (soak ? 1024 : 64) * MB;
  test(
    `a sender that waits for drain sends ${total / MB} MB to a reader that had stopped (${level})`,
    async (t) => {
      const server = t.use(await measured(runtime, bare));
      const reader = t.use(await RawStream.open(server.port, { full }));
      const size = 64 * 1024;
      const count = total / size;
      const before = await server.run((s) => s.memory());
      const given = await server.run((s) => s.given);
      const sending = server.run(sendWaiting, count, size);
      const sent = await stalled(server);
      const frame = size + (full ? 20 : 40);
      const held = await server.run((s) => ({
        buffered: s.peers[0]!.bufferedAmount,
        given: s.given,
        drains: s.drains,
      }));
      // The sender is held after one message beyond what the connection took.
      assertGreater(held.buffered, 0);
      assertLessOrEqual(held.buffered, frame);
      assertLess(
        Math.abs(held.given - given + held.buffered - sent * (size + 12)),
        sent * 60 + 4096,
      );
      if (full) assertLessOrEqual(held.given - given, WINDOW + frame + 4096, "window");
      else assertLess(held.given - given, 24 * MB, "the kernel's buffers hold a plain reader");
      const stopped = await server.run((s) => s.memory());
      assertLess(stopped.rss - before.rss, WINDOW + 16 * MB + CONSTANT);

      for (let i = 0; i < count; i++) {
        const message = await reader.message();
        assertEquals(message.slice(0, message.indexOf(":")), String(i));
        assertEquals(message.length, String(i).length + 1 + size);
      }
      await sending;
      const end = await server.run((s) => ({
        buffered: s.peers[0]!.bufferedAmount,
        most: s.most,
        drains: s.drains,
        closed: s.closed,
      }));
      assertEquals([end.buffered, end.closed], [0, []]);
      assertLessOrEqual(end.most, frame);
      assertGreater(end.drains, held.drains);
      const after = await server.run((s) => s.memory());
      assertLess(after.rss - before.rss, WINDOW + 16 * MB + CONSTANT);
    },
    { timeout: soak ? 600_000 : 60_000 },
  );

  test(
    `a sender that does not wait is closed with 1013 past maxBufferedAmount, that peer alone (${level})`,
    async (t) => {
      const server = t.use(await measured(runtime, bare));
      const reader = t.use(await RawStream.open(server.port, { full }));
      const other = t.use(await RawStream.open(server.port, { full }));
      for (const size of [64 * 1024, 1024 * 1024, 1]) {
        await using _victim = await RawStream.open(server.port, { full });
        const before = await server.run((s) => s.memory());
        const result = await server.run(async (s, size) => {
          const peer = s.peers.at(-1)!;
          const text = "y".repeat(size);
          let bytes = 0;
          let most = 0;
          let peak = { rss: 0, heap: 0 };
          for (let i = 0; peer.websocket.readyState === 1; i++) {
            if (bytes > 256 * 1024 * 1024) throw new Error("never closed");
            most = Math.max(most, peer.bufferedAmount);
            // Measured when nearly full: collected, so that it is what is held.
            if (peak.rss === 0 && peer.bufferedAmount > 15 * 1024 * 1024) peak = await s.memory();
            peer.send(text);
            bytes += size;
            if (i % 1000 === 0 || size > 1000) await s.later(0);
          }
          await s.later(20); // the close hook is called in a task of its own
          return { most, peak, buffered: peer.bufferedAmount, closed: s.closed.splice(0) };
        }, size);
        const limit = 16 * MB;
        assertEquals(result.closed.map(({ code }) => code), [1013]);
        assertEquals(result.buffered, 0);
        assertLess(result.most, limit + 2 * size + 100);
        if (size > 1) assertGreater(result.most, limit - 2 * size);
        if (result.peak.rss) {
          const rise = (key: "rss" | "heap") => result.peak[key] - before[key];
          if (process.env.DUPLEX_FIGURES) console.log(level, size, rise("rss"), rise("heap"));
          assertLess(rise("heap"), limit + WINDOW + CONSTANT, `heap with messages of ${size}`);
          // Millions of small messages leave pages behind that nothing holds any more.
          if (size > 1) assertLess(rise("rss"), limit + WINDOW + CONSTANT, `rss, ${size}`);
        }
        const after = await server.run((s) => s.memory()); // though the victim is still there
        assertLess(after.heap - before.heap, 8 * MB, `freed after messages of ${size}`);
      }
      await server.run((s) => void s.peers.slice(0, 2).forEach((peer) => peer.send("still here")));
      assertEquals(await reader.message(), "still here");
      assertEquals(await other.message(), "still here");
    },
    { timeout: 60_000 },
  );
}

test(
  "99 subscribers of a topic lose nothing and are not slowed by one that stops reading",
  async (t) => {
    const server = t.use(
      await measured(runtime, (s) => ({
        bidir: true,
        idleTimeout: 0,
        maxBufferedAmount: 700 * 1024,
        hooks: {
          open(peer) {
            s.peers.push(peer);
            peer.subscribe("news");
          },
          close: (peer, details) => void s.closed.push({ id: peer.id, ...details }),
        },
      })),
    );
    const count = 400;
    const size = 2000;
    const clients: WebSocketSSE[] = [];
    t.defer(() => closeAll(clients));
    for (let i = 0; i < 99; i++) clients.push(new WebSocketSSE(server.url, { transport: "post" }));
    await Promise.all(clients.map((client) => once(client, "open", { timeout: 20_000 })));

    /** Publishes to all, and waits until all 99 have had everything. */
    async function round(name: string): Promise<number> {
      const all = clients.map((client) => {
        const done = deferred();
        let next = 0;
        client.onmessage = ({ data }) => {
          if (!data.startsWith(`${name}:${next}:`)) done.reject(new Error(data.slice(0, 20)));
          if (++next === count) done.resolve();
        };
        return done.promise;
      });
      const start = performance.now();
      const publishing = server.run(
        async (s, name, count, size) => {
          for (let i = 0; i < count; i++) {
            s.ws.publish("news", `${name}:${i}:${"z".repeat(size)}`);
            if (i % 20 < 19) continue;
            // At the pace of the 99: the test is about the one that takes nothing.
            await Promise.all(s.peers.slice(0, 99).map((peer) => peer.waitForDrain()));
          }
        },
        name,
        count,
        size,
      );
      await within(Promise.all([...all, publishing]), 40_000, `round ${name}`);
      return performance.now() - start;
    }

    await round("warm");
    const alone = Math.max(await round("a"), 100);
    const stuck = t.use(await RawStream.open(server.port));
    const beside = await round("b"); // 1 MB of frames: held back, and in the end too much
    assertEquals(await server.run((s) => s.closed.map(({ code }) => code)), []);
    assertGreater(await server.run((s) => s.peers.at(-1)!.bufferedAmount), WINDOW);
    const closing = await round("c");
    assertEquals(await server.run((s) => s.closed.map(({ code }) => code)), [1013]);
    assertEquals(stuck.received, 0);
    if (process.env.DUPLEX_FIGURES) console.log({ alone, beside, closing });
    assertLess(beside / alone, 4, "beside a stalled one");
    assertLess(closing / alone, 4, "while it is closed");
  },
  { timeout: 90_000 },
);

// ---------------------------------------------------------------- down: exactly, in one process

/** An adapter that ends with the test, its sessions and its timer too. */
/** A session without a network: what is read here is all that the server was asked for. */
async function open(options: SSEOptions = {}) {
  const opened = deferred<Peer>();
  const ws = sseAdapter({
    bidir: true,
    ...options,
    hooks: { open: (peer) => opened.resolve(peer), ...options.hooks },
  });
  const headers = { accept: "text/event-stream", "x-duplex-version": "1" };
  const response = await ws.fetch(new Request("http://x/", { headers }));
  const token = response.headers.get("x-crossws-id")!;
  const reader = response.body!.getReader();
  const peer = options.hooks?.open ? undefined as never : await opened.promise;
  return {
    ws,
    peer,
    reader,
    token,
    post: (body: string, more: Record<string, string> = {}) =>
      ws.fetch(
        new Request("http://x/", {
          method: "POST",
          headers: {
            "content-type": "application/websocket-events",
            "x-crossws-id": token,
            ...more,
          },
          body,
        }),
      ),
    async [Symbol.asyncDispose]() {
      await reader.cancel();
      await shutDown(ws);
    },
  };
}

test("a large message ends its chunk, since copying it again costs more than a chunk", async (t) => {
  const { peer, reader } = t.use(await open({}));
  await reader.read();
  const sizes = [1_000, 1_000, 40_000, 40_000, 1_000, 1_000];
  for (const size of sizes) peer.send("a".repeat(size - "data: \n\n".length));
  const chunks: number[] = [];
  while (peer.bufferedAmount > 0) chunks.push((await reader.read()).value!.length);
  assertEquals(chunks, [42_000, 40_000, 2_000]);
});

test("a body is read with a buffer that grows with large messages, stays over a few short reads, and shrinks", async (t) => {
  const ws = adapter(t, { hooks: {} });
  const sizes: number[] = []; // of the buffers that the reader brings
  const message = `TEXT ${(20_000).toString(16)}\r\n${"x".repeat(20_000)}\r\n`;
  const ping = "PING 0\r\n\r\n";
  const pieces = [
    "SEQ 1\r\n1\r\n",
    message.slice(0, 2_048),
    message.slice(2_048, 10_000),
    message.slice(10_000, 11_000),
    message.slice(11_000, 12_000),
    message.slice(12_000),
    ...[ping, ping, ping, ping],
  ];
  const body = new ReadableStream({
    type: "bytes",
    pull(controller) {
      const view = controller.byobRequest?.view as Uint8Array | null | undefined;
      const piece = pieces.shift();
      if (!view || piece === undefined) return controller.close();
      sizes.push(view.byteLength);
      controller.byobRequest!.respond(new TextEncoder().encodeInto(piece, view).written);
    },
  });
  const headers = {
    accept: "text/event-stream",
    "x-duplex-version": "1",
    "content-type": "application/websocket-events",
  };
  const init = { method: "POST", headers, body, duplex: "half" } as RequestInit;
  const response = await ws.fetch(new Request(HOME, init));
  assertEquals(response.status, 200);
  await until(() => !pieces.length);
  const [small, large] = [2_048, 65_536];
  assertEquals(sizes, [small, small, ...Array(7).fill(large), small]);
  await response.body!.cancel();
});

test("a runtime that takes no more has one chunk that nobody counts, whatever it took before", async (t) => {
  const { peer, reader } = t.use(await open({}));
  await reader.read();
  peer.send("one");
  await turn();
  assertEquals(peer.bufferedAmount, 0, "it has taken all so far");
  const size = peer.send("two");
  await turn();
  assertEquals(peer.bufferedAmount, size, "it did not take the last one at once");
  assertEquals((await reader.read()).value!.length, size);
  assertEquals((await reader.read()).value!.length, size);
  const taking = reader.read();
  const large = peer.send("x".repeat(100_000));
  assertEquals((await taking).value!.length, large);
  peer.send("x".repeat(100_000));
  await turn();
  assertEquals(peer.bufferedAmount, large, "it is asked for what follows a large one");
  assertEquals((await reader.read()).value!.length, large);
  await turn();
  assertEquals(peer.bufferedAmount, 0);
});

test("bufferedAmount counts to the byte what the connection has not been given", async (t) => {
  const drains: number[] = [];
  const session = t.use(
    await open({
      window: 3000,
      hooks: { drain: (peer) => void drains.push(peer.bufferedAmount) },
    }),
  );
  const { peer, reader, post } = session;
  await reader.read();
  const text = "a".repeat(1000 - "data: \n\n".length);
  assertEquals(peer.send(text), 1000);
  assertEquals(peer.bufferedAmount, 1000);
  for (let i = 1; i < 10; i++) peer.send(text);
  assertEquals(peer.bufferedAmount, 10_000);
  const { value } = await reader.read();
  assertEquals(value!.length, 3000, "a window");
  assertEquals(peer.bufferedAmount, 7000);
  assertEquals(peer.send(text), -1);
  const held = reader.read();
  await sleep(20);
  assertEquals(peer.bufferedAmount, 8000, "nothing moves without an acknowledgement");
  await post("ACK 1\r\n1\r\n");
  assertEquals((await held).value!.length, 1000);
  assertEquals(peer.bufferedAmount, 7000);
  assertEquals(drains, []);
  for (let acked = 4; acked <= 10; acked += 3) {
    const more = reader.read();
    await post(
      `ACK 1\r\n${acked.toString(16)}\r\n`.replace("a", "10").replace("ACK 1\r\n10", "ACK 2\r\n10"),
    );
    await more;
  }
  assertEquals(peer.bufferedAmount, 0);
  assertEquals(drains, [0]);
});

/** More than the server calls a crowd, all reading; `chunks` of each are as they came. */
async function crowd(t: TestContext, options: SSEOptions = {}) {
  const peers: Peer[] = [];
  const ws = sseAdapter({
    resumeTimeout: 0,
    ...options,
    hooks: {
      open(peer) {
        peer.subscribe("news");
        peers.push(peer);
      },
    },
  });
  t.defer(async () => {
    for (const peer of peers) peer.terminate();
    await ws.close();
  });
  const all: string[][] = [];
  for (let i = 0; i < 100; i++) {
    const headers = { accept: "text/event-stream", "x-duplex-version": "1" };
    const { body } = await ws.fetch(new Request("http://localhost/", { headers }));
    const chunks: string[] = [];
    body!.pipeThrough(new TextDecoderStream()).pipeTo(
      new WritableStream({ write: (chunk) => void chunks.push(chunk) }),
    );
    all.push(chunks);
  }
  await until(() => all.every((chunks) => chunks.length === 1)); // the preface
  for (const chunks of all) chunks.length = 0;
  return { ws, peers, all };
}

const turn = () => new Promise<void>((resolve) => setImmediate(resolve));

test("what is published to a crowd faster than it can be written shares chunks, and keeps its order", async (t) => {
  const { ws, peers, all } = await crowd(t);
  const count = 2000;
  for (let i = 0; i < count; i++) {
    ws.publish("news", `${i}`);
    if (i === 250) peers[7]!.send("for you alone");
    await turn();
  }
  const expected = Array.from({ length: count }, (_, i) => `data: ${i}\n\n`);
  await until(() => all.every((chunks) => chunks.join("").includes(expected.at(-1)!)));
  for (const [i, chunks] of all.entries()) {
    assertLess(chunks.length, count);
    const messages = i === 7 ? expected.toSpliced(251, 0, "data: for you alone\n\n") : expected;
    assertEquals(chunks.join(""), messages.join(""));
  }
});

test("what is published to a crowd that can be written to in between does not wait", async (t) => {
  const { ws, peers, all } = await crowd(t);
  for (let i = 0; i < 10; i++) {
    await sleep(50);
    ws.publish("news", `${i}`);
    ws.publish("news", "and more");
    await undefined; // the job ends, and with it all that it sends is flushed
    assertEquals(peers.filter((peer) => peer.bufferedAmount), []);
  }
  const expected = Array.from({ length: 10 }, (_, i) => `data: ${i}\n\ndata: and more\n\n`);
  await until(() => all.every((chunks) => chunks.length === 10));
  for (const chunks of all) assertEquals(chunks, expected);
});

test("a rest after a crowd holds nothing that is waited for, and nothing up to a limit", async (t) => {
  const maxBufferedAmount = 4096;
  const { ws, peers, all } = await crowd(t, { maxBufferedAmount });
  const [one, two] = peers as [Peer, Peer];
  for (let i = 0; i < 30; i++) {
    ws.publish("news", "x".repeat(1500));
    await one.waitForDrain();
    assertEquals(one.bufferedAmount, 0);
    assertLessOrEqual(two.bufferedAmount, maxBufferedAmount);
    await turn();
  }
  const complete = (chunks: string[]) => chunks.join("").length === 30 * 1508;
  await until(() => all.every(complete));
  assertEquals(peers.filter(({ websocket }) => websocket.readyState !== 1), []);
});

test("a sender at the window goes on with control events, and below it begins one message of any size", async (t) => {
  const session = t.use(await open({ window: 1000 }));
  const { peer, reader, post } = session;
  await reader.read();
  peer.send("b".repeat(900));
  peer.send("b".repeat(500_000));
  peer.send("c");
  const first = (await reader.read()).value!;
  assertEquals(first.length, 900 + 500_000 + 16);
  peer.ping("x");
  const text = new TextDecoder().decode((await reader.read()).value);
  assertEquals(text, "event: duplex-ping\ndata: 2 eA==\n\n");
  const rest = reader.read();
  await post("ACK 1\r\n2\r\n");
  assertEquals(new TextDecoder().decode((await rest).value), "data: c\n\n");
});

const ackOf = (number: number) => `ACK ${`${number}`.length}\r\n${number}\r\n`;

/** A server whose window is that of 10 messages at first, of 80 at most; and its peers. */
function narrow(t: TestContext) {
  const peers: Peer[] = [];
  const ws = adapter(t, {
    ...{ window: 10_000, maxWindow: 80_000 },
    hooks: { open: (peer) => void peers.push(peer) },
  });
  return { ws, peers };
}

/**
 * How many messages a client has unacknowledged, that acknowledges all every 20 ms, until there have
 * been `enough` for a while.
 */
async function unacknowledged(t: TestContext, rounds: number, enough: number): Promise<number[]> {
  const unacknowledged: number[] = [];
  const { ws, peers } = narrow(t);
  const client = t.use(await WireClient.open(ws.fetch, HOME));
  for (let i = 0; i < 6000; i++) peers[0]!.send("x".repeat(992)); // and 8 bytes around it
  let received = 0;
  const reading = (async () => {
    while (await client.next("message")) received++;
  })();
  for (let round = 0, acknowledged = 0; round < rounds; round++) {
    await sleep(20, t.signal);
    unacknowledged.push(received - acknowledged);
    if (unacknowledged.filter((count) => count >= enough).length > 10) break;
    acknowledged = received;
    assertEquals(await client.frames(ackOf(acknowledged)), [204, 0]);
  }
  await client.events.cancel();
  await reading;
  return unacknowledged;
}

test("a window grows while that carries more, up to maxWindow", async (t) => {
  // A machine that stands still hides what a size carries: then it is tried again, 8 rounds later.
  const counts = await unacknowledged(t, 150, 80);
  assertEquals(counts[0], 10);
  assertEquals(Math.max(...counts), 80);
});

test("a window does not grow for a client that is slow itself", async (t) => {
  // The clock goes by rounds: a machine that stands still would show a client that is slow at times.
  const clock = handClock(t);
  const { ws, peers } = narrow(t);
  const client = t.use(await WireClient.open(ws.fetch, HOME));
  const [peer] = peers;
  const total = 1_000;
  for (let i = 0; i < total; i++) peer!.send("x".repeat(992)); // and 8 bytes around it
  let received = 0;
  const reading = (async () => {
    while (await client.next("message")) received++;
  })();
  const unacknowledged: number[] = [];
  for (let acknowledged = 0; unacknowledged.length < 60;) {
    do await sleep(0); while (received * 1_000 < total * 1_000 - peer!.bufferedAmount);
    unacknowledged.push(received - acknowledged);
    clock.time += 20;
    acknowledged = Math.min(acknowledged + 5, received);
    assertEquals(await client.frames(ackOf(acknowledged)), [204, 0]);
  }
  await client.events.cancel();
  await reading;
  assertEquals(unacknowledged[0], 10);
  assertLessOrEqual(Math.max(...unacknowledged), 20, `${unacknowledged}`); // it is tried once
  assertGreater(unacknowledged.filter((n) => n <= 10).length, 30, `${unacknowledged}`);
});

test("a window doubles with each full round that is short, and not by a long one", async (t) => {
  const clock = handClock(t);
  const { ws, peers } = narrow(t);
  for (const [duration, rounds] of [[19, [10, 10, 20, 40, 80, 80]], [21, [10, 10, 10]]] as const) {
    const client = t.use(await WireClient.open(ws.fetch, HOME));
    for (let i = 0; i < 300; i++) peers.at(-1)!.send("x".repeat(992)); // and 8 bytes around it
    let received = 0;
    let next = client.message();
    for (const [round, size] of rounds.entries()) {
      for (let n = 0; n < size; n++, received++) {
        await next;
        next = client.message(); // which lets the server write what it may
      }
      await sleep(0);
      assertEquals(peers.at(-1)!.bufferedAmount, (300 - received) * 1_000, `round ${round}`);
      clock.time += duration;
      assertEquals(await client.frames(ackOf(received)), [204, 0]);
    }
    await next;
    await client.events.cancel();
  }
});

test("a window is what it was at first on the next connection", async (t) => {
  const peers: Peer[] = [];
  const ws = adapter(t, {
    ...{ window: 10_000, maxWindow: 80_000 },
    hooks: { open: (peer) => void peers.push(peer) },
  });
  const client = await WireClient.open(ws.fetch, HOME);
  for (let i = 1; i <= 300; i++) peers[0]!.send("x".repeat(992));
  let received = 0;
  while (received < 200) {
    for (let n = 0; n < 10; n++, received++) await client.message();
    await client.frames(ackOf(received));
  }
  const again = t.use(await client.resume(1, received));
  await client.events.cancel();
  let more = 0;
  const reading = (async () => {
    while (await again.next("message")) more++;
  })();
  await sleep(100, t.signal);
  assertEquals(more, 10);
  await again.events.cancel();
  await reading;
});

/** A client in the process of its server, and what it sends up, chunk by chunk. */
async function overheard(t: TestContext, ws: SSEAdapter, transport: Transport) {
  const chunks: string[] = [];
  const decoder = new TextDecoder();
  const ear = () =>
    new TransformStream<Uint8Array<ArrayBuffer>, Uint8Array<ArrayBuffer>>({
      transform(chunk, controller) {
        chunks.push(decoder.decode(chunk));
        controller.enqueue(chunk);
      },
    });
  const client = dial(t, HOME, transport, {
    fetch(url, init) {
      const body = init?.body && new Response(init.body).body!.pipeThrough(ear());
      return ws.fetch(new Request(url, { ...init, body, duplex: "half" } as RequestInit));
    },
  });
  await once(client, "open");
  return { client, chunks };
}

for (const transport of transports) {
  test(`a client that answers acknowledges with its answers, and never by itself (${transport})`, async (t) => {
    const peers: Peer[] = [];
    const answered = new Queue<string>();
    const ws = adapter(t, {
      window: 8_000,
      hooks: {
        open: (peer) => void peers.push(peer),
        message: (_, message) => answered.push(message.text()),
      },
    });
    const { client, chunks } = await overheard(t, ws, transport);
    client.addEventListener("message", ({ data }) => client.send(data));
    for (let i = 0; i < 100; i++) {
      peers[0]!.send(`${i} ${"x".repeat(100)}`);
      await answered.next();
    }
    assert(chunks.some((chunk) => chunk.includes("ACK")));
    assertEquals(chunks.filter((chunk) => chunk.includes("ACK") && !chunk.includes("TEXT")), []);
  });
}

for (const transport of ["duplex", "stream"] as const) {
  test(`what was not acknowledged for half a second goes with the next message (${transport})`, async (t) => {
    const peers: Peer[] = [];
    const answered = new Queue<string>();
    const ws = adapter(t, {
      hooks: {
        open: (peer) => void peers.push(peer),
        message: (_, message) => answered.push(message.text()),
      },
    });
    const clock = handClock(t);
    const { client, chunks } = await overheard(t, ws, transport);
    client.send("hello"); // the first has its number before it
    await answered.next();
    const echo = async () => {
      peers[0]!.send("x");
      await once(client, "message");
      clock.time += 400;
      client.send("y");
      await answered.next();
      return chunks.pop()!;
    };
    assertEquals(await echo(), "TEXT 1\r\ny\r\n");
    assertEquals(await echo(), "ACK 1\r\n2\r\nTEXT 1\r\ny\r\n");
    // And begins anew.
    assertEquals(await echo(), "TEXT 1\r\ny\r\n");
  });
}

for (const transport of ["duplex", "stream"] as const) {
  test(`a client that only receives acknowledges in place of its keep-alive, at no other time (${transport})`, async (t) => {
    const opened = deferred<Peer>();
    const answered = new Queue<string>();
    const ws = adapter(t, {
      heartbeatInterval: 400,
      hooks: { open: opened.resolve, message: (_, message) => answered.push(message.text()) },
    });
    const { client, chunks } = await overheard(t, ws, transport);
    client.send("hello"); // so that there is a body
    await answered.next();
    const peer = await opened.promise;
    for (let i = 1; i <= 2; i++) {
      await until(() => chunks.at(-1) === "PING 0\r\n\r\n");
      peer.send("x");
      await once(client, "message");
      const before = chunks.length;
      await until(() => chunks.length >= before + 2);
      assertEquals(chunks.slice(before, before + 2), [
        `ACK 1\r\n${i}\r\n`,
        "PING 0\r\n\r\n",
      ]);
    }
  });
}

test("a client may be ahead by what the hooks handle in 2 s, and is told so", async (t) => {
  const ws = adapter(t, { window: 1000, maxWindow: 10_000, hooks: { message() {} } });
  const client = t.use(await WireClient.open(ws.fetch, HOME));
  const granted = async () => Number((await client.events.find("duplex-ack")).split(" ")[2] ?? 0);
  const text = `TEXT 1f0\r\n${"x".repeat(496)}\r\n`; // 508 bytes
  let most = 0;
  for (let number = 1; number <= 20; number++) {
    assertEquals(await client.frames(text, number), [204, number]);
    most = Math.max(most, await granted());
    await sleep(25, t.signal);
  }
  assertGreater(most, 1000);
  assertLessOrEqual(most, 10_000);
});

test("the clock is not looked at for every message: that would cost a quarter of their rate", async (t) => {
  const ws = adapter(t, { hooks: { message() {} } });
  const client = t.use(await WireClient.open(ws.fetch, HOME));
  const now = performance.now;
  let looks = 0;
  t.defer(() => performance.now = now);
  performance.now = () => now.call(performance) + 0 * looks++;
  assertEquals(await client.frames("TEXT 3\r\nabc\r\n".repeat(5000), 1), [204, 5000]);
  assertLess(looks, 500);
});

test("who is granted a larger window is not closed within it, and is beyond it", async (t) => {
  let isSlow = false;
  const settle = deferred<void>();
  const ws = adapter(t, {
    ...{ window: 1000, maxWindow: 3000 },
    hooks: { message: () => isSlow ? settle.promise : undefined },
  });
  const client = t.use(await WireClient.open(ws.fetch, HOME));
  const text = `TEXT 1f0\r\n${"x".repeat(496)}\r\n`; // 508 bytes
  let number = 1;
  for (let granted = 0; granted < 3000; number += 2) {
    await client.frames(text.repeat(2), number);
    granted = Number((await client.events.find("duplex-ack")).split(" ")[2] ?? 0);
  }
  isSlow = true;
  for (let ahead = 0; ahead < 3000; ahead += 508) {
    assertEquals((await client.frames(text, number++))[0], 204);
  }
  assertEquals((await client.frames(text, number))[0], 413);
  assertEquals(await client.closed(), 1008);
  settle.resolve();
});

test("waitForDrain resolves at its threshold, and not before", async (t) => {
  const session = t.use(await open({ window: 1000 }));
  const { peer, reader, post } = session;
  await reader.read();
  const frame = "d".repeat(1000 - 8);
  for (let i = 0; i < 6; i++) peer.send(frame);
  const order: string[] = [];
  const wait = (name: string, threshold?: number) =>
    peer.waitForDrain(threshold === undefined ? {} : { threshold })
      .then(() => order.push(`${name} at ${peer.bufferedAmount}`));
  const all = [wait("four", 4500), wait("two", 2000), wait("empty")];
  for (let i = 1; i <= 6; i++) {
    await reader.read();
    await Promise.resolve();
    if (i < 6) await post(`ACK 1\r\n${i}\r\n`);
  }
  await within(Promise.all(all), 1000);
  assertEquals(order, ["four at 4000", "two at 2000", "empty at 0"]);
  await within(peer.waitForDrain(), 100, "nothing to wait for");
});

test("waitForDrain rejects with its signal's reason", async (t) => {
  const session = t.use(await open());
  const { peer } = session;
  for (let i = 0; i < 100; i++) peer.send("e".repeat(10_000));
  const early = new Error("before");
  assertEquals(
    await assertRejects(() => peer.waitForDrain({ signal: AbortSignal.abort(early) })),
    early,
  );
  const abort = new AbortController();
  const waiting = peer.waitForDrain({ signal: abort.signal });
  const late = new Error("meanwhile");
  abort.abort(late);
  assertEquals(await assertRejects(() => waiting), late);
});

for (
  const [how, end] of Object.entries({
    close: (peer: Peer) => peer.close(4000),
    terminate: (peer: Peer) => peer.terminate(),
    "too much": (peer: Peer) => {
      while (peer.websocket.readyState === 1) peer.send("f".repeat(100_000));
    },
  })
) {
  test(`waitForDrain resolves when the peer ends (${how})`, async (t) => {
    const session = t.use(await open({ maxBufferedAmount: 1_000_000 }));
    const { peer } = session;
    for (let i = 0; i < 9; i++) peer.send("g".repeat(100_000));
    const waiting = peer.waitForDrain();
    end(peer);
    await within(waiting, 1000);
    await within(peer.waitForDrain(), 1000, "and afterwards");
    assertEquals(peer.send("more"), 0);
  });
}

// ---------------------------------------------------------------- the client acknowledges

for (const transport of transports) {
  test(`a window smaller than the first chunk does not hold the server back (${transport})`, async (t) => {
    const count = 300;
    const ws = adapter(t, {
      bidir: true,
      window: 2000,
      idleTimeout: 0,
      hooks: {
        open(peer) {
          for (let i = 0; i < count; i++) peer.send(`${i}:${"h".repeat(500)}`);
        },
      },
    });
    const server = await t.serve(ws.fetch);
    const client = dial(t, server.url, transport);
    let next = 0;
    const done = deferred();
    client.onmessage = ({ data }) => {
      if (!data.startsWith(`${next++}:`)) done.reject(new Error(data));
      if (next === count) done.resolve();
    };
    // Far below what its timers would need: 150 windows.
    await within(done.promise, 8000, "all messages");
  });
}

for (const transport of ["stream", "post"] as const) {
  test(`acknowledgements that are refused for a while are said again (${transport})`, async (t) => {
    const count = 400;
    const ws = adapter(t, {
      bidir: true,
      idleTimeout: 0,
      window: 20_000,
      hooks: {
        async open(peer) {
          for (let i = 0; i < count; i++) peer.send(`${i}:${"i".repeat(1000)}`);
          await peer.waitForDrain();
          peer.send("end");
        },
      },
    });
    let refused = 0;
    const server = await t.serve(async (request, info) => {
      if (request.method !== "POST" || refused >= 4) return await ws.fetch(request, info);
      refused++;
      await request.body?.cancel();
      return new Response("busy", { status: 503 });
    });
    const client = dial(t, server.url, transport);
    const done = deferred();
    let messages = 0;
    client.onmessage = ({ data }) => {
      messages++;
      if (data === "end") done.resolve();
    };
    await within(done.promise, 10_000, "the end");
    assertEquals(messages, count + 1);
    assertEquals(client.stats.resumes, 0);
    assertEquals(refused, 4);
  }, { timeout: 15_000 });
}

test("acknowledgements that are refused for good end a session that the server would hold", async (t) => {
  let revoked = false;
  const ws = adapter(t, {
    bidir: true,
    window: 20_000,
    hooks: {
      upgrade() {
        if (revoked) throw new Response("Revoked", { status: 403 });
      },
      open(peer) {
        revoked = true;
        for (let i = 0; i < 400; i++) peer.send("i".repeat(1000));
      },
    },
  });
  const server = await t.serve((request, info) => ws.fetch(request, info));
  const client = dial(t, server.url, "post");
  assertEquals((await once<CloseEvent>(client, "close")).code, 1006);
  assertLess(client.stats.received, 100); // no more than the window's
});

// ---------------------------------------------------------------- up: a server that is slow

/** A client that is closed with the test. */
for (const transport of transports) {
  test(`a slow message hook holds the client at the window (${transport})`, async (t) => {
    let unhandled = 0;
    let most = 0;
    let received = 0;
    let gate = deferred();
    const ws = adapter(t, {
      bidir: true,
      hooks: {
        async message(_peer, message) {
          assertEquals(message.text().split(":")[0], String(received));
          received++;
          unhandled += message.text().length;
          most = Math.max(most, unhandled);
          await gate.promise;
          unhandled -= message.text().length;
        },
      },
    });
    const server = await t.serve(ws.fetch);
    const client = dial(t, server.url, transport);
    t.defer(() => gate.resolve());
    await once(client, "open");
    const size = 16_000;
    const count = 300;
    let total = 0;
    for (let i = 0; i < count; i++) {
      const text = `${i}:`.padEnd(size, "j");
      total += text.length;
      client.send(text);
    }
    assertEquals(client.bufferedAmount, total);
    const least = Math.floor(WINDOW / size);
    await until(() => received > least && client.bufferedAmount === total - received * size);
    await sleep(300); // long enough for a client that does not hold itself back
    assertEquals(client.readyState, WebSocketSSE.OPEN);
    assertLessOrEqual(most, WINDOW + size);
    assertEquals(client.bufferedAmount, total - received * size);
    assertLess(received, count / 4);

    const held = gate;
    gate = deferred();
    held.resolve(); // one window is handled, the next one waits at the new gate
    await until(() => received > 2 * least);
    await sleep(100);
    assertLessOrEqual(most, WINDOW + size);
    gate.resolve();
    await until(() => received === count && client.bufferedAmount === 0, { timeout: 10_000 });
    assertEquals(unhandled, 0);
    assertLessOrEqual(most, WINDOW + size);
  }, { timeout: 20_000 });

  test(`a hook that never settles costs only its own message's bytes (${transport})`, async (t) => {
    let received = 0;
    const ws = adapter(t, {
      bidir: true,
      window: 50_000,
      maxWindow: 50_000, // else it grows where the first messages take long
      hooks: {
        message(_peer, message) {
          received++;
          if (message.text().startsWith("never")) return new Promise<void>(() => {});
        },
      },
    });
    const server = await t.serve(ws.fetch);
    const client = dial(t, server.url, transport);
    await once(client, "open");
    client.send("never".padEnd(10_000));
    for (let i = 0; i < 200; i++) client.send("fine".padEnd(10_000));
    await until(() => received === 201 && client.bufferedAmount === 0);
    // Five of them fill the window: what comes then is not sent.
    for (let i = 0; i < 4; i++) client.send("never".padEnd(10_000));
    client.send("held");
    await until(() => received === 205);
    await sleep(100);
    assertEquals([received, client.bufferedAmount], [205, 4]);
    assertEquals(client.readyState, WebSocketSSE.OPEN);
    for (const peers of ws.peers.values()) for (const peer of peers) peer.terminate();
    await once(client, "close");
  }, { timeout: 15_000 });
}

for (const transport of ["stream", "post"] as const) {
  test(
    `messages wait while the server refuses them, and none is lost (${transport})`,
    async (t) => {
      const got: string[] = [];
      const ws = adapter(t, {
        bidir: true,
        hooks: { message: (_peer, message) => void got.push(message.text().split(":")[0]!) },
      });
      let refusing = true;
      let refused = 0;
      const server = await t.serve(async (request, info) => {
        if (request.method !== "POST" || !refusing) return await ws.fetch(request, info);
        refused++;
        await request.body?.cancel();
        return new Response("busy", { status: 503, headers: { "retry-after": "0" } });
      });
      const client = dial(t, server.url, transport);
      await once(client, "open");
      const size = 10_000;
      const count = 300;
      for (let i = 0; i < count; i++) client.send(`${i}:`.padEnd(size, "k"));
      await until(() => refused >= 3);
      assertEquals(client.bufferedAmount, size * count);
      assertEquals(got, []);
      refusing = false;
      await until(() => client.bufferedAmount === 0, { timeout: 10_000 });
      assertEquals(got, Array.from({ length: count }, (_, i) => String(i)));
      assertEquals(client.readyState, WebSocketSSE.OPEN);
    },
    { timeout: 20_000 },
  );
}

test("a client that overruns the window is closed with 1008", async (t) => {
  const sizes: number[] = [];
  const closed = deferred<number | undefined>();
  const session = t.use(
    await open({
      window: 10_000,
      hooks: {
        message(_peer, message) {
          sizes.push(message.text().length);
          return new Promise<void>(() => {});
        },
        close: (_peer, { code }) => closed.resolve(code),
      },
    }),
  );
  const frame = `TEXT 7d0\r\n${"l".repeat(2000)}\r\n`;
  // Five are just over the window, as any client may be; the sixth is too much.
  const response = await session.post("SEQ 1\r\n1\r\n" + frame.repeat(4));
  assertEquals(response.status, 204);
  assertEquals((await session.post("SEQ 1\r\n5\r\n" + frame)).status, 204);
  assertEquals((await session.post("SEQ 1\r\n6\r\n" + frame)).status, 413);
  assertEquals(sizes, [2000, 2000, 2000, 2000, 2000]);
  let text = "";
  while (!text.includes("duplex-close")) {
    text += new TextDecoder().decode((await session.reader.read()).value);
  }
  assert(text.includes(`"code":1008`), text);
  session.peer.terminate();
  await within(closed.promise, 1000, "the close hook");
});

for (const full of [true, false]) {
  test(`who is closed with 1013 reads that and none of what was dropped (${full ? "full" : "plain"})`, async (t) => {
    const peers: Peer[] = [];
    const ws = adapter(t, {
      maxBufferedAmount: 1000,
      hooks: { open: (peer) => void peers.push(peer) },
    });
    const headers = { accept: "text/event-stream", ...full && { "x-duplex-version": "1" } };
    const response = await ws.fetch(new Request("http://localhost/", { headers }));
    for (let i = 0; peers[0]!.send("dropped".repeat(10)); i++) assertLess(i, 100);
    const text = await response.text();
    assert(!text.includes("dropped"), text);
    assert(text.includes(`"code":1013`), text);
    assert(text.endsWith("}\n\n"), text);
  });
}

test("a shutdown waits until who was closed with 1013 while away has heard of it", async (t) => {
  const peers: Peer[] = [];
  const ws = adapter(t, {
    maxBufferedAmount: 1000,
    hooks: { open: (peer) => void peers.push(peer) },
  });
  const headers = { accept: "text/event-stream", "x-duplex-version": "1" };
  const response = await ws.fetch(new Request("http://localhost/", { headers }));
  await response.body!.cancel();
  for (let i = 0; peers[0]!.send("dropped".repeat(10)); i++) assertLess(i, 100);
  assertEquals(ws.peers.size, 0, "its session is over");
  let down = false;
  const closing = ws.close(1012).then(() => down = true);
  await sleep(20);
  assert(!down);
  const resumed = await ws.fetch(
    new Request("http://localhost/", {
      headers: {
        ...headers,
        "x-crossws-id": response.headers.get("x-crossws-id")!,
        "x-duplex-attempt": "1",
        "last-event-id": "0",
      },
    }),
  );
  const end = (await resumed.text()).split("duplex-close\n")[1];
  assertEquals(end, `data: {"code":1013,"reason":"Too much buffered","sent":4}\n\n`);
  await within(closing, 1000, "the shutdown");
});

test("what comes in one body with the message that ends a session by 1013 counts, so that CLOSE follows it", async (t) => {
  const ws = adapter(t, {
    bidir: true,
    maxBufferedAmount: 10,
    hooks: { message: (peer) => void peer.send("x".repeat(20)) },
  });
  const url = "http://localhost/";
  const headers = { accept: "text/event-stream", "x-duplex-version": "1" };
  const response = await ws.fetch(new Request(url, { headers })); // and nobody reads
  const post = (seq: number, body: string) =>
    ws.fetch(
      new Request(url, {
        method: "POST",
        headers: {
          "content-type": "application/websocket-events",
          "x-crossws-id": response.headers.get("x-crossws-id")!,
        },
        body: `SEQ 1\r\n${seq}\r\n${body}`,
      }),
    );
  const { status, headers: answer } = await post(1, "TEXT 2\r\nhi\r\n".repeat(5));
  assertEquals([status, answer.get("x-duplex-received")], [204, "5"]);
  assertEquals((await post(6, "CLOSE\r\n")).status, 204);
  assert((await response.text()).includes(`"code":1013`));
});

test("a plain body is paused while hooks are behind by a window, and goes on once they are not", async (t) => {
  const held = deferred();
  const taken: string[] = [];
  const ws = adapter(t, {
    bidir: true,
    window: 8,
    hooks: {
      message(_, message) {
        taken.push(message.text());
        return held.promise;
      },
    },
  });
  const peer = t.use(await WireClient.open(ws.fetch, "http://localhost/", { full: false }));
  const chunks = ["one", "two", "three", "four", "five"];
  const request = post(peer.url, { "x-crossws-id": peer.token }, streamOf(chunks));
  const answer = ws.fetch(request);
  await until(() => taken.length === 3); // 11 bytes: the one that crosses the line is begun
  await sleep(20);
  assertEquals(taken.length, 3);
  held.resolve();
  assertEquals((await answer).status, 204);
  assertEquals(taken, chunks);
});

test(
  "a message hook that waits for drain still hears the acknowledgement behind its message",
  async (t) => {
    const ws = adapter(t, {
      bidir: true,
      window: 20_000,
      idleTimeout: 0,
      hooks: {
        async message(peer, message) {
          for (let i = 0; i < 100; i++) {
            peer.send(message.text());
            await peer.waitForDrain();
          }
          peer.send("done");
        },
      },
    });
    const server = await t.serve(ws.fetch);
    for (const transport of transports) {
      const client = dial(t, server.url, transport);
      await once(client, "open");
      let messages = 0;
      const done = deferred();
      client.onmessage = ({ data }) => {
        messages++;
        if (data === "done") done.resolve();
      };
      client.send("m".repeat(15_000));
      await within(done.promise, 8000, transport);
      assertEquals(messages, 101);
    }
  },
  { timeout: 30_000 },
);
