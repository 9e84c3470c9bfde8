/**
 * What all sessions hold back together, and by how much their windows have grown: both are as at first
 * when all are gone, however they have ended. The growth is told nobody, so it is found out: new
 * sessions grow exactly as far as they could before.
 */
import { cluster } from "../cluster.ts";
import { parking } from "../parking.ts";
import type { Peer, SSEAdapter, SSEOptions } from "../server.ts";
import { MemoryBus } from "./bus.ts";
import {
  assertEquals,
  assertGreater,
  deferred,
  sleep,
  test,
  type TestContext,
  until,
} from "./harness.ts";
import { adapter, shutDown } from "./pair.ts";
import { MemoryStore } from "./store.ts";
import { ack, CLOSE_3127, WireClient } from "./wire.ts";

const HOME = "http://localhost/room";
const TEXT = `TEXT 1f0\r\n${"x".repeat(496)}\r\n`; // 508 bytes
const WINDOW = 1000;
const MAX_WINDOW = 3000;
/** So many sessions can grow at once, and no more. */
const COUNT = 4;
const ROOM = 2 * COUNT * (MAX_WINDOW - WINDOW);
/** And so much may be held back beside that. */
const SLACK = 1000;

interface Guest {
  client: WireClient;
  peer: Peer;
  /** Of its next message. */
  number: number;
}

/** A server where it is known which peer is which client's. */
class House {
  readonly ws: SSEAdapter;
  readonly #newest: Peer[] = [];

  constructor(t: TestContext, options: SSEOptions = {}) {
    this.ws = adapter(t, {
      ...{ window: WINDOW, maxWindow: MAX_WINDOW, maxTotalBufferedAmount: ROOM + SLACK },
      ...options,
      hooks: {
        open: (peer) => void this.#newest.push(peer),
        message: (_, message) =>
          message.text() === "fail" ? Promise.reject(new Error("as told")) : undefined,
        error() {},
        ...options.hooks,
      },
    });
  }

  async open(): Promise<Guest> {
    const client = await WireClient.open(this.ws.fetch, HOME);
    return { client, peer: this.#newest.at(-1)!, number: 1 };
  }

  /** Sends until it may have more under way, or for so long; returns how much that is. */
  async grow(guest: Guest, patience = 5_000): Promise<number> {
    const end = performance.now() + patience;
    let granted = 0;
    while (granted < MAX_WINDOW && performance.now() < end) {
      assertEquals((await guest.client.frames(TEXT.repeat(2), guest.number))[0], 204);
      guest.number += 2;
      const told = (await guest.client.events.find("duplex-ack")).split(" ")[2];
      granted = Number(told ?? 0);
      await sleep(10);
    }
    return granted;
  }

  /** As many as there is room for grow, and not one more. */
  async check(): Promise<void> {
    const { sessions, peers, bufferedAmount } = this.ws.stats();
    assertEquals([sessions.connected, sessions.away, sessions.moving, peers], [0, 0, 0, 0]);
    assertEquals(bufferedAmount, 0);
    const guests: Guest[] = [];
    for (let n = 0; n < COUNT; n++) {
      guests.push(await this.open());
      assertEquals(await this.grow(guests[n]!), MAX_WINDOW, `${n}`);
    }
    const last = await this.open();
    assertEquals(await this.grow(last, 500), 0, "there was no more room than at first");
    for (const { peer } of [...guests, last]) peer.terminate();
    assertEquals(this.ws.stats().bufferedAmount, 0);
  }
}

/** Each way that a session can end, with something granted and something held back. */
const ENDS: Record<string, (guest: Guest) => unknown> = {
  "the client's close": async ({ client, number }) => {
    assertEquals((await client.frames(CLOSE_3127, number))[0], 204);
  },
  "the server's close, and its answer": async ({ client, peer, number }) => {
    peer.close(1000);
    assertEquals((await client.frames(CLOSE_3127, number))[0], 204);
  },
  "the server's close, without an answer": ({ client, peer }) => {
    peer.close(1000);
    return client.drop();
  },
  "its termination": ({ peer }) => peer.terminate(),
  "its expiry": ({ client }) => client.drop(),
  "a hook that fails": async ({ client, number }) => {
    await client.frames("TEXT 4\r\nfail\r\n", number);
    await client.drop();
  },
  "a message that is too large": async ({ client, number }) => {
    await client.frames("TEXT ffffff\r\n", number);
    await client.drop();
  },
  "its page being left": async ({ client }) => {
    await client.frames("LEAVE 1\r\n0\r\n");
  },
  "an overflow": ({ peer }) => {
    peer.send("x".repeat(20_000));
    peer.send("one too many");
  },
};

for (const [how, end] of Object.entries(ENDS)) {
  test(`after ${how}, all that a session was lent and held back is there for others`, async (t) => {
    const house = new House(t, { resumeTimeout: 200, maxBufferedAmount: 10_000 });
    for (let n = 0; n < 2; n++) {
      const guest = await house.open();
      assertEquals(await house.grow(guest), MAX_WINDOW);
      for (let i = 0; i < 8; i++) guest.peer.send("x".repeat(500)); // beyond the window
      await guest.client.frames(ack(0));
      await end(guest);
      await until(() => house.ws.stats().peers === 0 && !house.ws.stats().sessions.closing);
      await guest.client.drop();
    }
    await house.check();
  });
}

test("windows down that have grown are as at first once their sessions are gone", async (t) => {
  const house = new House(t, { resumeTimeout: 200 });
  for (let n = 0; n < 2; n++) {
    const guest = await house.open();
    let received = 0;
    const reading = (async () => {
      while (await guest.client.next("message")) received++;
    })();
    let sent = 0;
    let most = 0;
    for (let acknowledged = 0; most < 5 && sent < 2000;) {
      for (; sent < received + 6; sent++) guest.peer.send("x".repeat(492)); // 500 bytes each
      await sleep(25, t.signal);
      most = Math.max(most, received - acknowledged);
      acknowledged = received;
      await guest.client.frames(ack(acknowledged));
    }
    assertGreater(most, 2, "a window holds two at first");
    if (n) guest.peer.terminate();
    await guest.client.drop();
    await reading;
    await until(() => house.ws.stats().peers === 0);
  }
  await house.check();
});

test("what one instance has granted a client it may have under way at the next, which has no room", async (t) => {
  t.defer(() => sleep(50));
  const bus = new MemoryBus(t);
  const settle = deferred<void>();
  const a = new House(t, { sync: cluster(bus.adapter), hooks: { revive() {} } });
  const b = new House(t, {
    ...{ sync: cluster(bus.adapter), maxTotalBufferedAmount: 2 * (MAX_WINDOW - WINDOW) - 1 },
    hooks: { revive() {}, message: () => settle.promise },
  });
  await sleep(50, t.signal);
  const guest = await a.open();
  assertEquals(await a.grow(guest), MAX_WINDOW);
  const { token } = guest.client;
  const answer = await b.ws.fetch(
    new Request(HOME, {
      headers: {
        ...{ accept: "text/event-stream", "x-duplex-version": "1", "x-crossws-id": token },
        ...{ "x-duplex-attempt": "1", "last-event-id": "0" },
      },
    }),
  );
  const back = t.use(await WireClient.of(b.ws.fetch, HOME, answer));
  for (let ahead = 0; ahead < MAX_WINDOW; ahead += 508) {
    assertEquals((await back.frames(TEXT, guest.number++))[0], 204, `${ahead}`);
  }
  assertEquals((await back.frames(TEXT, guest.number))[0], 413, "and no more than that");
  settle.resolve();
  await guest.client.drop();
});

test("a window that is no whole number is lent and given back as it is", async (t) => {
  const window = 1000.5;
  const house = new House(t, { window, maxTotalBufferedAmount: 2 * COUNT * (MAX_WINDOW - window) });
  for (let n = 0; n < 3; n++) {
    const guest = await house.open();
    assertEquals(await house.grow(guest), MAX_WINDOW);
    guest.peer.terminate();
    await guest.client.drop();
  }
  await house.check();
});

for (const how of ["moves to another instance", "is parked, and left", "is parked, and expires"]) {
  test(`after a session ${how}, all that it was lent and held back is there for others`, async (t) => {
    t.defer(() => sleep(50));
    const store = new MemoryStore();
    const bus = new MemoryBus(t);
    const sync = () =>
      cluster(bus.adapter, { parking: parking(store, { whenAway: !how.startsWith("moves") }) });
    const options = {
      resumeTimeout: how.endsWith("expires") ? 300 : 10_000,
      hooks: { revive() {} },
    };
    const a = new House(t, { sync: sync(), ...options });
    const b = new House(t, { sync: sync(), ...options });
    await sleep(50, t.signal);
    for (let n = 0; n < 2; n++) {
      const guest = await a.open();
      assertEquals(await a.grow(guest), MAX_WINDOW);
      for (let i = 0; i < 8; i++) guest.peer.send("x".repeat(500));
      if (!how.startsWith("moves")) {
        await guest.client.drop();
        await until(() => how.endsWith("expires") || a.ws.stats().cluster!.parked === 1);
      }
      if (!how.endsWith("expires")) {
        const headers = {
          ...{ accept: "text/event-stream", "x-duplex-version": "1" },
          ...{ "x-crossws-id": guest.client.token, "x-duplex-attempt": "1", "last-event-id": "0" },
        };
        const answer = await b.ws.fetch(new Request(HOME, { headers }));
        assertEquals(answer.status, 200);
        for (const peers of b.ws.peers.values()) for (const peer of peers) peer.terminate();
        await answer.body!.cancel();
      }
      await until(() =>
        !a.ws.stats().peers && !a.ws.stats().cluster!.parked && !a.ws.stats().sessions.moving
      );
      await guest.client.drop();
    }
    await a.check();
    await b.check();
  });
}

test("after a shutdown nothing is lent or held back", async (t) => {
  const house = new House(t, { resumeTimeout: 200 });
  const guest = await house.open();
  await house.grow(guest);
  for (let i = 0; i < 8; i++) guest.peer.send("x".repeat(500));
  await shutDown(house.ws);
  assertEquals(house.ws.stats().bufferedAmount, 0);
});
