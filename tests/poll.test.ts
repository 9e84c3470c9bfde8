/**
 * The last resort: behind what holds event streams the client polls. Same session, same numbers,
 * exactly once, and the page is told of nothing.
 */
import type { WebSocketSSEOptions } from "../client.ts";
import type { Message, Peer, SSEOptions } from "../server.ts";
import { assert, assertEquals, assertLess, test, type TestContext, until } from "./harness.ts";
import { type Holder, holder, type Holding } from "./holder.ts";
import { connect, type Connected, listen, Queue } from "./pair.ts";

const timeout = 60_000;

const modes: Record<string, Holding> = {
  "all of a stream until its end": { bytes: Infinity },
  "4 KiB at a time": { bytes: 4096 },
  "streams of GETs, and lets those of POSTs pass": { bytes: Infinity, method: "GET" },
  "a stream, and lets its head pass": { bytes: Infinity, head: false },
  "a stream, and does not notice that its client has gone": { bytes: Infinity, deaf: true },
};

interface Site {
  readonly front: Holder;
  readonly server: number;
  /** The hooks that were called, but `message`. */
  readonly calls: string[];
  readonly peers: Queue<Peer>;
  readonly received: Queue<string>;
}

async function site(
  t: TestContext,
  holding: Holding | undefined,
  { message, ...options }: SSEOptions & {
    message?: (peer: Peer, message: Message) => void;
  } = {},
): Promise<Site> {
  const calls: string[] = [];
  const peers = new Queue<Peer>();
  const received = new Queue<string>();
  const { port } = await listen(t, {
    ...options,
    hooks: {
      open(peer) {
        calls.push("open");
        peers.push(peer);
      },
      message(peer, each) {
        received.push(each.text());
        message?.(peer, each);
      },
      close: (_, { code }) => void calls.push(`close ${code}`),
    },
  });
  return { front: t.use(await holder(port, holding)), server: port, calls, peers, received };
}

async function open(
  t: TestContext,
  url: string,
  options: WebSocketSSEOptions = {},
): Promise<Connected> {
  const connected = connect(t, url, options);
  await connected.opened;
  return connected;
}

const polls = ({ front }: Site) =>
  front.requests.filter(({ headers }) => headers["x-duplex-poll"] !== undefined);

/** Both ways at once, some of it together and some by itself: each arrives once, in order. */
async function talk({ received, peers }: Site, { socket, messages }: Connected): Promise<void> {
  const peer = peers.all.at(-1)!;
  const [up, down] = [received.all.length, messages.all.length];
  const sent = Array.from({ length: 100 }, (_, n) => `${n}`);
  for (const [n, text] of sent.entries()) {
    socket.send(text);
    peer.send(text);
    if (n % 10 === 9) await until(() => received.all.length > up + n - 5, { timeout: 20_000 });
  }
  await until(() => received.all.length >= up + 100, { timeout: 20_000 });
  await until(() => messages.all.length >= down + 100, { timeout: 20_000 });
  assertEquals(received.all.slice(up), sent);
  assertEquals(messages.all.slice(down), sent);
}

for (const [what, holding] of Object.entries(modes)) {
  for (const transport of ["auto", "post"] as const) {
    test(`Behind something that holds ${what}, "${transport}" opens`, async (t) => {
      const place = await site(t, holding);
      const began = performance.now();
      const connected = await open(t, place.front.url, { transport });
      assertLess(performance.now() - began, 8_000); // 5 s where the machine is not busy
      await talk(place, connected);
      const { socket, events, closed } = connected;
      const passes = transport === "auto" && holding.method === "GET";
      assertEquals([socket.transport, events], [passes ? "duplex" : "poll", ["open"]]);
      // Nobody is left of an opening whose answer was held.
      assertEquals(place.calls, ["open"]);
      socket.close(1000, "bye");
      const { code, reason, wasClean } = await closed;
      assertEquals([code, reason, wasClean], [1000, "bye", true]);
      assertEquals(place.calls, ["open", "close 1000"]);
    }, { timeout });
  }
}

test("What was found of an origin is the first thing that the next socket tries", async (t) => {
  const place = await site(t, { bytes: Infinity });
  await open(t, place.front.url, { stream: false });
  const before = place.front.requests.length;
  const connected = await open(t, place.front.url);
  await talk(place, connected);
  assertEquals(connected.socket.transport, "poll");
  assertEquals(place.front.requests[before]!.headers["x-duplex-poll"], "1");
  assert(place.front.requests.slice(before).every(({ method }) => method === "POST"));
}, { timeout });

test("A stream that something begins to hold is resumed by polls", async (t) => {
  const place = await site(t, undefined);
  const connected = await open(t, place.front.url, { transport: "post" });
  await talk(place, connected);
  place.front.holding = { bytes: Infinity };
  place.front.cutAll();
  await talk(place, connected);
  const { socket, events } = connected;
  assertEquals([socket.transport, place.calls], ["poll", ["open"]]);
  assertEquals(events, ["open", "drop", "resume"]);
}, { timeout });

test("Polls that are cut lose nothing and repeat nothing", async (t) => {
  const place = await site(t, { bytes: Infinity });
  const connected = await open(t, place.front.url, { transport: "poll" });
  const cutting = setInterval(() => place.front.cutAll(), 40);
  t.defer(() => clearInterval(cutting));
  for (let n = 0; n < 5; n++) await talk(place, connected);
  clearInterval(cutting);
  const { socket, events } = connected;
  assertEquals([socket.transport, place.calls], ["poll", ["open"]]);
  assert(!events.includes("error"), `${events}`);
  assertEquals(polls(place).length > 0, true);
}, { timeout });

test('"poll" asks for polls, where nothing is held, too', async (t) => {
  const place = await site(t, undefined);
  const connected = await open(t, place.front.url, { transport: "poll" });
  await talk(place, connected);
  const { socket, events } = connected;
  assertEquals([socket.transport, events], ["poll", ["open"]]);
  assert(place.front.requests.every(({ method }) => method === "POST"));
}, { timeout });
