/** Faults of sessions that were found by use: how they close, what they hold, who makes room for whom. */
import type { Peer } from "../server.ts";
import { assert, assertEquals, assertGreater, assertLess, test, until } from "./harness.ts";
import { adapter, Queue } from "./pair.ts";
import { closePayload, frame, from, FULL, post, streamOf, UPLINK, WireClient } from "./wire.ts";

const HOME = "http://localhost/room";
const STREAM = { accept: "text/event-stream" };
const plain = () => new Request(HOME, { headers: STREAM });

// ---------------------------------------------------------------- both ends agree on the end

test("the server's close stands over a client's that comes later, for the hook too", async (t) => {
  const closes = new Queue<unknown>();
  const peers: Peer[] = [];
  const ws = adapter(t, {
    hooks: {
      open: (peer) => void peers.push(peer),
      close: (_, details) => closes.push(details),
    },
  });
  const client = t.use(await WireClient.open(ws.fetch, HOME));
  peers[0]!.close(1012, "restart");
  assertEquals(
    await client.post(frame("CLOSE", closePayload(4001, "mine"))).then((r) => r.status),
    204,
  );
  assertEquals(await client.closed(), 1012);
  assertEquals(await closes.next(), { code: 1012, reason: "restart" });
});

test("a closing server takes CLOSE past the gap: what was not sent need not go", async (t) => {
  const closes = new Queue<unknown>();
  const peers: Peer[] = [];
  const ws = adapter(t, {
    hooks: {
      open: (peer) => void peers.push(peer),
      close: (_, details) => closes.push(details),
    },
  });
  const client = t.use(await WireClient.open(ws.fetch, HOME));
  assertEquals(await client.frames("CLOSE\r\n", 5), [409, 0], "not before it closes");
  peers[0]!.close(1012);
  assertEquals(await client.closed(), 1012);
  assertEquals(await client.frames("CLOSE\r\n", 5), [204, 5]);
  assertEquals(await closes.next(), { code: 1012, reason: "" });
});

test("at a shutdown what is acknowledged has been given to a hook; after peer.close it is not", async (t) => {
  for (const [how, expected] of [["ws", ["late"]], ["peer", []]] as const) {
    const got: string[] = [];
    const peers: Peer[] = [];
    const ws = adapter(t, {
      hooks: {
        open: (peer) => void peers.push(peer),
        message: (_, message) => void got.push(message.text()),
      },
    });
    const client = t.use(await WireClient.open(ws.fetch, HOME));
    const closing = how === "ws" ? ws.close(1012) : peers[0]!.close(1012);
    assertEquals(await client.send("late"), 204);
    assertEquals(await client.close(1012), 204);
    assertEquals(await client.closed(), 1012);
    await closing;
    assertEquals([how, got], [how, expected]);
  }
});

for (const how of ["peer.close", "ws.close"] as const) {
  test(`a slow client that goes on reading gets all that was sent before ${how}()`, async (t) => {
    const closes = new Queue<{ code?: number }>();
    const peers: Peer[] = [];
    const ws = adapter(t, {
      resumeTimeout: 300,
      window: 1000,
      hooks: {
        open: (peer) => void peers.push(peer),
        close: (_, details) => closes.push(details),
      },
    });
    const client = t.use(await WireClient.open(ws.fetch, HOME));
    for (let i = 0; i < 12; i++) peers[0]!.send("x".repeat(900));
    const closing = how === "ws.close" ? ws.close(1012) : peers[0]!.close(1012);
    for (let count = 1; count <= 12; count++) { // 1.2 s in all
      assertEquals((await client.message()).length, 900);
      await new Promise((resolve) => setTimeout(resolve, 100));
      assertEquals((await client.frames(`ACK ${`${count}`.length}\r\n${count}\r\n`))[0], 204);
    }
    assertEquals(await client.closed(), 1012);
    assertEquals(await client.close(1012), 204);
    assertEquals((await closes.next()).code, 1012);
    await closing;
  });
}

test("a client that reads nothing is given up after the close's time", async (t) => {
  const closes = new Queue<{ code?: number }>();
  const peers: Peer[] = [];
  const ws = adapter(t, {
    resumeTimeout: 200,
    hooks: {
      open: (peer) => void peers.push(peer),
      close: (_, details) => closes.push(details),
    },
  });
  await ws.fetch(new Request(HOME, { headers: FULL }));
  peers[0]!.close(1000);
  assertEquals((await closes.next()).code, 1006);
});

for (const resumeTimeout of [0, 1000]) {
  test(`a CLOSE whose answer was lost is answered again (resumeTimeout ${resumeTimeout})`, async (t) => {
    const ws = adapter(t, { resumeTimeout });
    const client = t.use(await WireClient.open(ws.fetch, HOME));
    const body = frame("CLOSE", closePayload(3001, "bye"));
    assertEquals(await client.post(body).then((r) => r.status), 204);
    const headers = { ...UPLINK, "x-crossws-id": client.token };
    const again = await ws.fetch(post(HOME, headers, from(1, body)));
    assertEquals([again.status, again.headers.get("x-duplex-close")], [204, "3001 bye"]);
  });
}

test("a shutdown waits until who has closed, and reads slowly, has heard the end", async (t) => {
  const ws = adapter(t, {});
  const opened = await ws.fetch(new Request(HOME, { headers: FULL }));
  const headers = { ...UPLINK, "x-crossws-id": opened.headers.get("x-crossws-id")! };
  const answer = await ws.fetch(post(HOME, headers, from(1, frame("CLOSE"))));
  assertEquals(answer.status, 204);
  let isDown = false;
  const down = ws.close(1012).then(() => isDown = true);
  await new Promise((resolve) => setTimeout(resolve, 50));
  assert(!isDown);
  assert(
    (await opened.text()).endsWith(`duplex-close\ndata: {"code":1005,"reason":"","sent":0}\n\n`),
  );
  await down;
});

test("nor longer than a close may take, and not at all once its signal aborts", async (t) => {
  for (const signal of [undefined, AbortSignal.timeout(100)]) {
    const ws = adapter(t, { resumeTimeout: signal ? 30_000 : 300 });
    const opened = await ws.fetch(new Request(HOME, { headers: FULL }));
    const headers = { ...UPLINK, "x-crossws-id": opened.headers.get("x-crossws-id")! };
    await ws.fetch(post(HOME, headers, from(1, frame("CLOSE"))));
    const at = performance.now();
    await ws.close(1012, "", signal && { signal });
    assertLess(performance.now() - at, 5_000);
  }
});

test("a close has its deadline without resumption, however rare heartbeats are", async (t) => {
  const closes = new Queue<{ code?: number }>();
  const peers: Peer[] = [];
  const now = performance.now.bind(performance);
  let ahead = 0;
  performance.now = () => now() + ahead;
  t.defer(() => performance.now = now);
  const ws = adapter(t, {
    resumeTimeout: 0,
    heartbeatInterval: 60_000,
    hooks: {
      open: (peer) => void peers.push(peer),
      close: (_, details) => closes.push(details),
    },
  });
  await ws.fetch(new Request(HOME, { headers: FULL }));
  peers[0]!.close(1000);
  ahead = 6_500; // 5 s, and a look at the clock
  await ws.fetch(new Request(HOME, { method: "PUT" }));
  assertEquals((await closes.next()).code, 1006);
});

// ---------------------------------------------------------------- bounds

test("a plain session has at most 16 bodies at once, and none outlives it", async (t) => {
  const peers: Peer[] = [];
  const ws = adapter(t, { hooks: { open: (peer) => void peers.push(peer) } });
  const opened = await ws.fetch(plain());
  const headers = {
    "x-crossws-id": opened.headers.get("x-crossws-id")!,
    "content-length": "100",
    "content-type": "text/plain",
  };
  let answered = 0;
  const answers = Array.from(
    { length: 40 },
    () => ws.fetch(post(HOME, headers, streamOf(["part"], { open: true }))).then(() => answered++),
  );
  await until(() => answered === 24);
  await new Promise((resolve) => setTimeout(resolve, 20));
  assertEquals(answered, 24, "16 are read");
  peers[0]!.terminate();
  await Promise.all(answers);
  await opened.body!.cancel();
});

test("who left the plain level is gone after 5 s, not after the resume timeout", async (t) => {
  const closes = new Queue<{ code?: number }>();
  const now = performance.now.bind(performance);
  let ahead = 0;
  performance.now = () => now() + ahead;
  t.defer(() => performance.now = now);
  const ws = adapter(t, {
    resumeTimeout: 60_000,
    hooks: { close: (_, details) => closes.push(details) },
  });
  await (await ws.fetch(plain())).body!.cancel();
  ahead = 4_900;
  await ws.fetch(new Request(HOME, { method: "PUT" }));
  assertEquals(ws.peers.size, 1);
  ahead = 5_100 + 5_000; // a sweep later
  await ws.fetch(new Request(HOME, { method: "PUT" }));
  assertEquals(ws.peers.size, 0);
  assertEquals((await closes.next()).code, 1006);
});

test("maxPeers cannot be filled by who is away, and who was never heard from goes first", async (t) => {
  const ws = adapter(t, { maxPeers: 3 });
  const heard = await WireClient.open(ws.fetch, HOME);
  assertEquals(await heard.send("hello"), 204);
  await heard.drop(); // away the longest
  const stranger = await WireClient.open(ws.fetch, HOME);
  await stranger.drop();
  const there = t.use(await WireClient.open(ws.fetch, HOME));
  const first = t.use(await WireClient.open(ws.fetch, HOME)); // for the stranger
  await t.use(await heard.resume(1, 0)).drop();
  const second = t.use(await WireClient.open(ws.fetch, HOME)); // for the other
  const refused = await ws.fetch(plain());
  assertEquals([refused.status, refused.headers.get("retry-after")], [503, "5"]);
  for (const client of [there, first, second]) assertEquals(await client.send("here"), 204);
});

test("tombstones are capped, and keep no long path", async (t) => {
  t.expect(/another instance/);
  const ws = adapter(t, { maxPeers: 50 });
  const url = (i: number) => `${HOME}/${i}/${"p".repeat(1000)}`;
  const tokens: string[] = [];
  for (let i = 0; i < 60; i++) {
    const client = await WireClient.open(ws.fetch, url(i));
    tokens.push(client.token);
    assertEquals(await client.close(), 204);
    await client.drop();
  }
  const repeat = async (i: number, at = i) => {
    const headers = { ...UPLINK, "x-crossws-id": tokens[i]! };
    return (await ws.fetch(post(url(at), headers, from(1, frame("CLOSE"))))).status;
  };
  assertEquals([await repeat(0), await repeat(9), await repeat(10), await repeat(59)], [
    404,
    404,
    204,
    204,
  ]);
  assertEquals(await repeat(59, 58), 404, "another path is another namespace");
});

test("small publications are shared by all who do not read, not copied for each", async (t) => {
  const ws = adapter(t, { hooks: { open: (peer) => peer.subscribe("all") } });
  for (let i = 0; i < 200; i++) await ws.fetch(new Request(HOME, { headers: FULL }));
  const { process } = globalThis as unknown as {
    process: { memoryUsage(): { rss: number } };
  };
  const before = process.memoryUsage().rss;
  for (let i = 0; i < 20_000; i++) ws.publish("all", `${i}`.padEnd(100));
  const grown = process.memoryUsage().rss - before;
  assertEquals(ws.peers.get("/room")!.size, 200);
  assertLess(grown, 250e6, "200 copies would be 460 MB");
});

test("all together hold back no more than maxTotalBufferedAmount; who takes nothing goes first", async (t) => {
  const closes = new Queue<number | undefined>();
  const peers: Peer[] = [];
  const ws = adapter(t, {
    maxTotalBufferedAmount: 100_000,
    hooks: {
      open: (peer) => void peers.push(peer),
      close: (_, { code }) => closes.push(code),
    },
  });
  const reading = t.use(await WireClient.open(ws.fetch, HOME));
  for (let i = 0; i < 8; i++) await ws.fetch(new Request(HOME, { headers: FULL }));
  let sent = 0;
  for (let i = 0; i < 40; i++) {
    for (const peer of peers) sent += Number(peer.send("x".repeat(1000))) ? 1 : 0;
    assertEquals((await reading.message()).length, 1000);
    const held = peers.reduce((sum, peer) => sum + peer.bufferedAmount, 0);
    assertLess(held, 102_000 + 1000);
  }
  assertEquals(await closes.next(), 1013);
  assertEquals(peers[0]!.websocket.readyState, 1, "who reads stays");
  assert(sent > 40);
});

test("a peer that closes, and does not take what comes before, gives way to others", async (t) => {
  const closes = new Queue<number | undefined>();
  const peers: Peer[] = [];
  const ws = adapter(t, {
    maxTotalBufferedAmount: 100_000,
    hooks: {
      open: (peer) => void peers.push(peer),
      close: (_, { code }) => closes.push(code),
    },
  });
  const away = await WireClient.open(ws.fetch, HOME);
  const reading = t.use(await WireClient.open(ws.fetch, HOME));
  for (let i = 0; i < 3; i++) await ws.fetch(new Request(HOME, { headers: FULL })); // never read
  await away.events.cancel();
  await until(() => ws.stats().sessions.away === 1);
  const [first, other, ...rest] = peers as [Peer, Peer, ...Peer[]];
  for (const peer of [first, ...rest]) {
    peer.send("x".repeat(26_000));
    peer.close(4000, "after it");
    assertEquals(peer.websocket.readyState, 2);
  }
  for (let i = 0; i < 20; i++) {
    assertGreater(Number(other.send("y".repeat(2000))), 0);
    assertEquals((await reading.message()).length, 2000);
  }
  assertEquals(await closes.next(), 1013);
});
