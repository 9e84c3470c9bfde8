/**
 * Turns of the tabs over HTTP/1.1, without a browser: the sockets of this process as those of pages,
 * which share Web Locks of ours. tests/tabs.ts has them in browsers, which have few connections.
 */
import {
  assert,
  assertEquals,
  assertGreater,
  assertLessOrEqual,
  assertMatch,
  sleep,
  test,
  type TestContext,
  until,
} from "./harness.ts";
import { connect, type Connected, listen, Queue } from "./pair.ts";
import { StreamCount } from "./streams.ts";
import type { Peer, SSEOptions } from "../server.ts";

type Granted = () => unknown;

interface Request {
  name: string;
  granted: Granted;
  resolve(value: unknown): void;
  reject(reason: unknown): void;
}

/** Web Locks, as far as the client uses them: exclusive, first come first served. */
class Locks {
  requests = 0;
  queries = 0;
  /** All reject, as in an opaque origin. */
  isForbidden = false;
  readonly #held = new Map<string, Request>();
  #pending: Request[] = [];

  request(
    name: string,
    { signal, steal }: { signal?: AbortSignal; steal?: boolean },
    granted: Granted,
  ): Promise<unknown> {
    this.requests++;
    if (this.isForbidden) return Promise.reject(new DOMException("Not here", "SecurityError"));
    return new Promise((resolve, reject) => {
      const request: Request = { name, granted, resolve, reject };
      if (steal) {
        this.#held.get(name)?.reject(new DOMException("Stolen", "AbortError"));
        this.#held.delete(name);
        this.#pending.unshift(request);
      } else this.#pending.push(request);
      signal?.addEventListener("abort", () => {
        if (!this.#pending.includes(request)) return;
        this.#pending = this.#pending.filter((other) => other !== request);
        reject(signal.reason);
      });
      setTimeout(() => this.#grant(name));
    });
  }

  query(): Promise<{ held: { name: string }[]; pending: { name: string }[] }> {
    this.queries++;
    if (this.isForbidden) return Promise.reject(new DOMException("Not here", "SecurityError"));
    const held = [...this.#held.values()];
    return new Promise((resolve) =>
      setTimeout(() => resolve({ held, pending: [...this.#pending] }))
    );
  }

  /** The numbers of those that are held. */
  get held(): number[] {
    return [...this.#held.keys()].map((name) => Number(name.split(" ").at(-1))).sort();
  }

  get pending(): number {
    return this.#pending.length;
  }

  async #grant(name: string): Promise<void> {
    const request = this.#held.has(name) || this.#pending.find((other) => other.name === name);
    if (!request || request === true) return;
    this.#pending = this.#pending.filter((other) => other !== request);
    this.#held.set(name, request);
    request.resolve(await request.granted());
    if (this.#held.get(name) !== request) return; // stolen
    this.#held.delete(name);
    this.#grant(name);
  }
}

/** Makes this process a page, of which all tests of a browser's API hold. */
function page(t: TestContext, isSeen: boolean): Locks {
  const locks = new Locks();
  t.expect("keeps us waiting"); // whose turn does not come within 2 s
  define(t, globalThis, "document", { hidden: !isSeen });
  define(t, navigator, "locks", locks);
  return locks;
}

function define(t: TestContext, object: object, name: string, value: unknown): void {
  const before = Object.getOwnPropertyDescriptor(object, name);
  Object.defineProperty(object, name, { value, configurable: true });
  t.defer(() => {
    if (before) Object.defineProperty(object, name, before);
    else delete (object as Record<string, unknown>)[name];
  });
}

interface Crowd {
  url: string;
  peers: Queue<Peer>;
  closes: Queue<unknown>;
  /** What the server was sent, by peer. */
  received: Map<string, string[]>;
  streams: StreamCount;
}

/** A server that counts event streams. */
async function crowd(t: TestContext, options: SSEOptions = {}): Promise<Crowd> {
  const peers = new Queue<Peer>();
  const closes = new Queue<unknown>();
  const received = new Map<string, string[]>();
  const streams = new StreamCount();
  const { url } = await listen(t, {
    ...options,
    hooks: {
      open(peer) {
        peers.push(peer);
        received.set(peer.id, []);
      },
      message: (peer, message) => void received.get(peer.id)!.push(message.text()),
      close: (_, details) => closes.push(details),
    },
  }, async (request, next) => streams.watch(request, await next(request)));
  return { url, peers, closes, received, streams };
}

const numbers = (count: number) => Array.from({ length: count }, (_, i) => `${i}`);

/** Each socket sends `count` messages and is sent as many, in so many ms; none is lost or repeated. */
async function converse(
  { peers, received, closes }: Crowd,
  sockets: Connected[],
  count: number,
  every: number,
): Promise<void> {
  for (let i = 0; i < count; i++) {
    for (const { socket } of sockets) socket.send(`${i}`);
    for (const peer of peers.all) peer.send(`${i}`);
    await sleep(every);
  }
  await until(
    () =>
      sockets.every(({ messages }) => messages.all.length >= count) &&
      [...received.values()].every((list) => list.length >= count),
    { timeout: 20_000 },
  );
  for (const { messages, events } of sockets) {
    assertEquals(messages.all, numbers(count));
    assertEquals(events, ["open"]);
  }
  for (const list of received.values()) assertEquals(list, numbers(count));
  assertEquals([peers.all.length, closes.all.length], [sockets.length, 0]);
}

test("a lone page asks for a slot once, holds the first, and frees it", async (t) => {
  const locks = page(t, true);
  const there = await crowd(t);
  const socket = connect(t, there.url);
  await socket.opened;
  await until(() => locks.queries === 2);
  assertEquals([locks.held, locks.pending], [[0], 0]);
  const { requests } = locks;
  await converse(there, [socket], 20, 20);
  assertEquals([locks.requests, locks.queries], [requests, 2], "nothing more");
  socket.socket.close();
  await socket.closed;
  await until(() => locks.held.length === 0);
});

test("five sockets of a page that is seen share nothing; a sixth takes turns with the last", async (t) => {
  const locks = page(t, true);
  const there = await crowd(t);
  const sockets = Array.from({ length: 5 }, () => connect(t, there.url));
  await Promise.all(sockets.map(({ opened }) => opened));
  assertEquals(locks.held, [0, 1, 2, 3, 4]);
  await converse(there, sockets, 30, 20);
  assertEquals(there.streams.gets, 5);
  assertEquals(sockets.map(({ socket }) => socket.isWaiting), Array(5).fill(false));

  const sixth = connect(t, there.url);
  await until(() => sixth.socket.isWaiting);
  await sixth.opened;
  await until(() => sockets.filter(({ socket }) => socket.isWaiting).length === 1);
  const waited = sockets.find(({ socket }) => socket.isWaiting)!;
  const said = there.peers.all.map((peer) => peer.send("to all"));
  assertEquals(said.length, 6);
  await until(() => waited.messages.all.at(-1) === "to all", { timeout: 10_000 });
  assertGreater(there.streams.gets, 6);
  for (const { messages, events } of [...sockets, sixth]) {
    assertEquals([messages.all.at(-1), events], ["to all", ["open"]]);
  }
});

test("twelve hidden tabs have five streams at most, and lose nothing in either direction", async (t) => {
  const locks = page(t, false);
  const there = await crowd(t);
  const sockets = Array.from({ length: 12 }, () => connect(t, there.url));
  await Promise.all(sockets.map(({ opened }) => opened));
  await converse(there, sockets, 40, 50);
  // The server may hear that one has ended after the next one has begun.
  assertLessOrEqual(there.streams.most, 8);
  assertLessOrEqual(locks.held.length, 4);
  assertEquals(locks.held.includes(0), false, "that is for a page that is seen");
  for (const { socket } of sockets) assertEquals(socket.stats.resumes, 0);
  for (const { socket } of sockets) socket.close();
  await Promise.all(sockets.map(({ closed }) => closed)); // those that wait, too
  await until(() => locks.held.length + locks.pending === 0);
});

test("connections that the server renews hand their slots on, while others wait", async (t) => {
  page(t, false);
  const there = await crowd(t, { maxConnectionAge: 400 });
  const sockets = Array.from({ length: 6 }, () => connect(t, there.url));
  await Promise.all(sockets.map(({ opened }) => opened));
  await converse(there, sockets, 30, 50);
});

test("a hidden tab gets a message that takes longer than its turn", async (t) => {
  page(t, false);
  const there = await crowd(t, { resumeTimeout: 60_000 });
  const PART = 20_000;
  /** A network that takes 3 s for what is long. */
  const slow = async (input: string, init?: RequestInit) => {
    const response = await fetch(input, init);
    if (init?.method !== "GET" || !response.body) return response;
    const throttle = new TransformStream<Uint8Array, Uint8Array>({
      async transform(chunk, controller) {
        for (let at = 0; at < chunk.length; at += PART) {
          await sleep(chunk.length > 1000 ? 100 : 0);
          controller.enqueue(chunk.slice(at, at + PART));
        }
      },
    });
    return new Response(response.body.pipeThrough(throttle), response);
  };
  const first = connect(t, there.url, { fetch: slow });
  await first.opened;
  const others = Array.from({ length: 8 }, () => connect(t, there.url));
  await Promise.all(others.map(({ opened }) => opened));
  there.peers.all[0]!.send("x".repeat(30 * PART));
  await until(() => first.messages.all.length === 1, { timeout: 30_000 });
  assertEquals((first.messages.all[0] as string).length, 30 * PART);
  for (const { events } of [first, ...others]) assertEquals(events, ["open"]);
}, { timeout: 45_000 });

test("who has waited for half of the resume timeout takes the last slot, whoever holds it", async (t) => {
  const locks = page(t, false);
  const there = await crowd(t, { resumeTimeout: 3000, heartbeatInterval: 1000 });
  const socket = connect(t, there.url);
  await socket.opened;
  // Tabs that are frozen: they hold what they are granted for ever, and hear no bell.
  const name = `duplex-sse ${there.url.replace("http", "ws")} `;
  let frozen = 0;
  for (const index of [1, 2, 3, 4]) {
    locks.request(name + index, {}, () => {
      frozen++;
      return new Promise(() => {});
    }).catch(() => frozen--);
  }
  const bell = new BroadcastChannel(name);
  t.defer(() => bell.close());
  bell.postMessage(0);
  await until(() => frozen === 4 && socket.socket.isWaiting);
  there.peers.all[0]!.send("after all");
  await until(() => socket.messages.all.length === 1);
  assertEquals([frozen, socket.socket.isWaiting], [3, false]);
  assertEquals(socket.events, ["open"]);
});

test("a socket whose turn does not come within 2 s says once what would help, and goes on after it", async (t) => {
  const locks = page(t, false);
  const said: string[] = [];
  const { warn } = console;
  console.warn = (text: string) => void said.push(text);
  t.defer(() => console.warn = warn);
  const there = await crowd(t);
  const ends = [1, 2, 3, 4].map((index) => {
    const { promise, resolve } = Promise.withResolvers<void>();
    locks.request(`duplex-sse ${there.url.replace("http", "ws")} ${index}`, {}, () => promise);
    return resolve;
  });
  const { socket, opened, events } = connect(t, there.url);
  await until(() => said.length > 0);
  assertMatch(said.join(), /keeps us waiting.*serve HTTP\/2/);
  assertEquals([socket.isWaiting, events, there.peers.all.length], [true, [], 0]);
  await sleep(2_200);
  ends.forEach((end) => end());
  await opened;
  assertEquals([socket.isWaiting, events, said.length], [false, ["open"], 1]);
});

test("what shares connections lets the streams wait for what goes up", async (t) => {
  page(t, true);
  const there = await crowd(t);
  const priorities: unknown[] = [];
  const { socket, opened } = connect(t, there.url, {
    fetch(input, init) {
      priorities.push([init!.method, init!.priority]);
      return fetch(input, init);
    },
  });
  await opened;
  socket.send("hello");
  await until(() => priorities.length === 2);
  assertEquals(priorities, [["GET", "low"], ["POST", undefined]]);
});

test("a request without an answer takes the place of the tab's own stream, and arrives once", async (t) => {
  page(t, true);
  const there = await crowd(t);
  let streams = 0;
  let posts = 0;
  const pool = Promise.withResolvers<void>();
  // Other event streams fill the pool: a request gets through when this one's stream ends.
  const full = async (input: string, init?: RequestInit) => {
    if (init!.method === "POST" && !posts++) await pool.promise;
    if (init!.method === "GET" && !streams++) {
      init!.signal!.addEventListener("abort", () => pool.resolve());
    }
    return fetch(input, init);
  };
  const { socket, opened, events, messages } = connect(t, there.url, { fetch: full });
  await opened;
  socket.send("gets through");
  await until(() => [...there.received.values()][0]!.length > 0);
  there.peers.all[0]!.send("and back");
  await until(() => messages.all.length === 1);
  assertEquals([...there.received.values()], [["gets through"]]);
  assertEquals([posts, streams, socket.stats.resent, events], [1, 2, 0, ["open"]]);
});

test("without Web Locks a tab that is hidden answers the bell, and one that is seen does not", async (t) => {
  const locks = page(t, false);
  define(t, navigator, "locks", undefined);
  const there = await crowd(t);
  const { opened, events } = connect(t, there.url);
  await opened;
  const bell = new BroadcastChannel(`duplex-sse ${there.url.replace("http", "ws")} `);
  t.defer(() => bell.close());
  await sleep(3500);
  assertEquals(there.streams.gets, 1, "nobody waits");
  bell.postMessage(0);
  await until(() => there.streams.gets === 2);
  (globalThis as { document?: { hidden: boolean } }).document!.hidden = false;
  bell.postMessage(0);
  await sleep(1500); // longer than a turn
  assertEquals([there.streams.gets, locks.requests, events], [2, 0, ["open"]]);
});

for (
  const [what, spoil] of [
    ["Web Locks", (_: TestContext, locks: Locks) => locks.isForbidden = true],
    ["channels", (t: TestContext) => {
      define(t, globalThis, "BroadcastChannel", function () {
        throw new DOMException("Not here", "SecurityError");
      });
    }],
  ] as const
) {
  test(`where ${what} are forbidden, as in a sandbox, it is as without`, async (t) => {
    spoil(t, page(t, true));
    const there = await crowd(t);
    const sockets = Array.from({ length: 6 }, () => connect(t, there.url));
    await Promise.all(sockets.map(({ opened }) => opened));
    assertEquals(sockets.map(({ socket }) => socket.isWaiting), Array(6).fill(false));
    await converse(there, sockets, 5, 10);
    assertEquals(there.streams.gets, 6);
  });
}

test("a session that cannot be resumed gives its slot back at once: nothing is shared", async (t) => {
  const locks = page(t, true);
  const there = await crowd(t, { resumeTimeout: 0 });
  const sockets = Array.from({ length: 7 }, () => connect(t, there.url));
  await Promise.all(sockets.map(({ opened }) => opened));
  await until(() => locks.held.length + locks.pending === 0);
  await converse(there, sockets, 5, 10);
  assertEquals(there.streams.gets, 7);
});

test("an event stream of crossws's server gives its slot back at once", async (t) => {
  const locks = page(t, true);
  const { url } = await t.serve(() =>
    new Response("event: crossws-id\ndata: token\n\ndata: hello\n\n", {
      headers: { "content-type": "text/event-stream", "x-crossws-id": "token" },
    })
  );
  const { opened, messages, socket } = connect(t, url);
  await opened;
  assertEquals([await messages.next(), socket.isWaiting], ["hello", false]);
  await until(() => locks.held.length + locks.pending === 0);
});

test("a socket that is closed while it waits for its first turn leaves nothing behind", async (t) => {
  const locks = page(t, true);
  const there = await crowd(t);
  const sockets = Array.from({ length: 5 }, () => connect(t, there.url));
  await Promise.all(sockets.map(({ opened }) => opened));
  const { socket, closed } = connect(t, there.url);
  await until(() => socket.isWaiting);
  socket.close();
  assertEquals((await closed).code, 1006);
  assert(!socket.isWaiting);
  await until(() => locks.pending === 0);
  assertEquals([locks.held, there.peers.all.length], [[0, 1, 2, 3, 4], 5]);
});

test("where HTTP/2 is spoken no lock is asked for and no channel opened", async (t) => {
  const locks = page(t, true);
  const there = await crowd(t);
  const url = there.url.replace("http:", "https:");
  define(t, performance, "getEntries", () => [
    { name: `${url}/page`, nextHopProtocol: "http/1.1" },
    { name: `${url}/socket`, nextHopProtocol: "h2" }, // since then
    { name: `${url}0/page`, nextHopProtocol: "http/1.1" }, // of another origin
    { name: "a measure" },
  ]);
  let channels = 0;
  const { BroadcastChannel } = globalThis;
  define(
    t,
    globalThis,
    "BroadcastChannel",
    class extends BroadcastChannel {
      constructor(name: string) {
        super(name);
        channels++;
      }
    },
  );
  const { opened, socket } = connect(t, url, {
    transport: "post",
    fetch: (input, init) => fetch(input.replace("https:", "http:"), init),
  });
  await opened;
  assertEquals([locks.requests, locks.queries, channels, socket.transport], [0, 0, 0, "post"]);
});
