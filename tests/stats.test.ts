/**
 * `ws.stats()`: each thing that it counts is brought about, once, and nothing else is counted.
 */
import { cluster } from "../cluster.ts";
import type { Message, Peer, Stats } from "../server.ts";
import { MemoryBus, roundRobin } from "./bus.ts";
import { chaos, pickSeed } from "./chaos.ts";
import { assertEquals, assertGreater, sleep, test, until } from "./harness.ts";
import { connect, listen } from "./pair.ts";

const NOTHING: Stats = {
  sessions: { connected: 0, away: 0, closing: 0, moving: 0 },
  peers: 0,
  bufferedAmount: 0,
  opened: 0,
  closed: {},
  drops: 0,
  resumptions: 0,
  refusals: {},
  movedIn: 0,
  movedOut: 0,
  cluster: undefined,
};

test("stats follow a session through its phases, and its end", async (t) => {
  const { ws, port } = await listen(t, { hooks: {} });
  assertEquals(ws.stats(), NOTHING);
  const network = t.use(await chaos(port, { seed: pickSeed() }));
  const { socket, opened, closed } = connect(t, network.url, { transport: "post" });
  await opened;
  const connected = { connected: 1, away: 0, closing: 0, moving: 0 };
  assertEquals(ws.stats(), { ...NOTHING, sessions: connected, peers: 1, opened: 1 });
  const resumed = until(() => ws.stats().resumptions === 1);
  network.cutAll("rst");
  await until(() => ws.stats().drops === 1 || ws.stats().resumptions === 1);
  await resumed;
  assertEquals(ws.stats().sessions, connected);
  socket.close(4321);
  await closed;
  await until(() => ws.stats().peers === 0);
  const { closed: codes, sessions, opened: all } = ws.stats();
  assertEquals([codes, sessions, all], [{ 4321: 1 }, NOTHING.sessions, 1]);
});

test("a client that polls is neither dropped nor resumed between its turns", async (t) => {
  const hooks = { message: (peer: Peer, message: Message) => void peer.send(message.rawData) };
  const { ws, url } = await listen(t, { hooks });
  const { socket, opened, messages } = connect(t, url, { transport: "poll" });
  await opened;
  for (const text of ["one", "two", "three"]) {
    socket.send(text);
    assertEquals(await messages.next(), text);
  }
  const { opened: all, drops, resumptions } = ws.stats();
  assertEquals([all, drops, resumptions], [1, 0, 0]);
});

test("stats tell who is away, who closes, what waits and who was lost", async (t) => {
  const { ws, url } = await listen(t, { hooks: {}, idleTimeout: 0 });
  const headers = { accept: "text/event-stream", "x-duplex-version": "1" };
  const gone = new AbortController();
  const away = await fetch(url, { headers, signal: gone.signal });
  const token = away.headers.get("x-crossws-id")!;
  gone.abort();
  await until(() => {
    for (const peers of ws.peers.values()) for (const peer of peers) peer.ping(); // Deno looks then
    return ws.stats().sessions.away === 1;
  });
  assertEquals([ws.stats().drops, ws.stats().peers], [1, 1]);
  const [peer] = [...ws.peers.values()].flatMap((peers) => [...peers]);
  peer!.send("a".repeat(1000));
  assertGreater(ws.stats().bufferedAmount, 1000);
  peer!.close(4000);
  assertEquals(ws.stats().sessions, { connected: 0, away: 0, closing: 1, moving: 0 });
  assertEquals(ws.stats().peers, 0);
  peer!.terminate();
  assertEquals(ws.stats().sessions, NOTHING.sessions);
  assertEquals(ws.stats().closed, { 1006: 1 });
  assertEquals(ws.stats().bufferedAmount, 0);
  const stranger = await fetch(url, {
    method: "POST",
    headers: { ...headers, "x-crossws-id": token, "x-duplex-attempt": "1", "last-event-id": "0" },
    body: "PING\r\n",
  });
  await stranger.body?.cancel();
  assertEquals(ws.stats().refusals, { 404: 1 });
});

test("stats count refusals by status, those of hooks among them", async (t) => {
  const { ws, url } = await listen(t, {
    hooks: { upgrade: () => new Response("No", { status: 418 }) },
  });
  const statuses = [
    await fetch(url, { method: "PUT" }),
    await fetch(url, { method: "POST", body: "x" }),
    await fetch(url, { headers: { accept: "text/event-stream" } }),
    await fetch(url, { headers: { accept: "text/event-stream" } }),
  ].map(async (response) => (await response.text(), response.status));
  assertEquals(await Promise.all(statuses), [405, 400, 418, 418]);
  const { refusals, opened } = ws.stats();
  assertEquals([refusals, opened], [{ 400: 1, 405: 1, 418: 2 }, 0]);
});

test("stats are the caller's own, and need no `this`", async (t) => {
  const { ws: { stats } } = await listen(t, { hooks: {} });
  const taken = stats() as { closed: Record<number, number> };
  taken.closed[1000] = 7;
  assertEquals(stats(), NOTHING);
});

for (const moves of [true, false]) {
  test(`stats of a cluster tell ${moves ? "moves" : "relays"}, and who is there`, async (t) => {
    const bus = new MemoryBus(t);
    t.defer(() => sleep(200)); // last of all, what is being signed
    const hooks = { message: () => {}, ...moves && { revive: () => {} } };
    const start = () => listen(t, { sync: cluster(bus.adapter), hooks });
    const [one, other] = [await start(), await start()];
    await sleep(50, t.signal); // subscriptions tell nobody when they stand
    const proxy = await roundRobin(t, [one.port, other.port]);
    proxy.choose = () => 0;
    const network = t.use(await chaos(proxy.port, { seed: pickSeed() }));
    const { opened, socket } = connect(t, network.url, { transport: "post" });
    await opened;
    assertEquals(one.ws.stats().peers, 1);
    proxy.choose = () => 1;
    network.cutAll("rst");
    await until(() =>
      other.ws.stats()[moves ? "movedIn" : "resumptions"] + one.ws.stats().resumptions
    );
    socket.send("over the other");
    await until(() => socket.bufferedAmount === 0);
    const [left, right] = [one.ws.stats(), other.ws.stats()];
    assertEquals([left.movedOut, right.movedIn], moves ? [1, 1] : [0, 0]);
    assertEquals([left.peers, right.peers], moves ? [0, 1] : [1, 0]);
    assertEquals([left.cluster!.served, right.cluster!.relayed], moves ? [0, 0] : [1, 1]);
    assertEquals([left.opened, right.opened, left.closed, right.closed], [1, 0, {}, {}]);
    assertEquals([left.refusals, right.refusals], [{}, {}]);
    const [observer, holder] = moves ? [one, other] : [other, one];
    await until(() => observer.ws.stats().cluster!.instances === 1);
    await until(() => holder.ws.stats().cluster!.pending === 0);
    assertEquals(holder.ws.stats().cluster!.pendingBytes, 0);
  });
}
