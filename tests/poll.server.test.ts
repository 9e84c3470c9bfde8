/** The server's half of polling, by requests made by hand. */
import type { Peer, SSEOptions } from "../server.ts";
import { assert, assertEquals, assertGreater, test, type TestContext, until } from "./harness.ts";
import { listen, Queue } from "./pair.ts";
import { frame, from } from "./wire.ts";
import { concat } from "./split.ts";

interface Site {
  readonly url: string;
  readonly peers: Queue<Peer>;
  readonly calls: string[];
}

async function site(t: TestContext, options: SSEOptions = {}): Promise<Site> {
  const peers = new Queue<Peer>();
  const calls: string[] = [];
  const { url } = await listen(t, {
    ...options,
    hooks: {
      open(peer) {
        calls.push("open");
        peers.push(peer);
      },
      message: (_, message) => void calls.push(message.text()),
      close: (_, { code }) => void calls.push(`close ${code}`),
      ...options.hooks,
    },
  });
  return { url, peers, calls };
}

interface Answer {
  readonly status: number;
  readonly token: string;
  readonly marked: boolean;
  /** As they came: `event data`, or the data of messages. */
  readonly events: string[];
  readonly text: string;
}

/** One poll, read to its end. */
async function poll(
  url: string,
  headers: Record<string, string> = {},
  body: Uint8Array<ArrayBuffer> = frame("PING"),
): Promise<Answer> {
  const response = await fetch(url, {
    method: "POST",
    headers: {
      accept: "text/event-stream",
      "x-duplex-version": "1",
      "x-duplex-poll": "1",
      ...headers,
    },
    body,
  });
  const text = await response.text();
  const events = text.split("\n\n").filter((block) => /^data/m.test(block)).map((block) => {
    const type = /^event: (.*)$/m.exec(block)?.[1];
    const data = block.split("\n").filter((line) => line.startsWith("data: "))
      .map((line) => line.slice(6)).join("\n");
    return type ? `${type} ${data}` : data;
  });
  return {
    status: response.status,
    token: response.headers.get("x-crossws-id") ?? "",
    marked: response.headers.get("x-duplex-version") === "1",
    events,
    text,
  };
}

const next = (token: string, attempt: number, received: number) => ({
  "x-crossws-id": token,
  "x-duplex-attempt": `${attempt}`,
  "last-event-id": `${received}`,
});

const ack = (received: number) => frame("ACK", `${received}`);

/** `received` and `next` of the terms that begin an answer. */
function terms({ events }: Answer): [received: number, next: number] {
  const [name, json] = [events[0]!.slice(0, 11), events[0]!.slice(12)];
  assertEquals(name, "duplex-open");
  const { received, next } = JSON.parse(json);
  return [received, next];
}

test("An opening by a poll is answered, and its answer has ended, with what is there", async (t) => {
  const { url } = await site(t, {
    hooks: { open: (peer) => void peer.send("welcome") },
  });
  const opened = await poll(url);
  assertEquals([opened.status, opened.marked], [200, true]);
  assertEquals(terms(opened), [0, 1]);
  assertEquals(opened.events.slice(-1), ["welcome"]);
});

test("A poll waits until there is something to say, and goes on where the last one ended", async (t) => {
  const { url, peers, calls } = await site(t);
  const { token } = await poll(url);
  const peer = await peers.next();
  const waiting = poll(url, next(token, 1, 0), ack(0));
  await until(() => peer.websocket.readyState === 1);
  peer.send("one");
  peer.send("two");
  const first = await waiting;
  assertEquals(terms(first), [0, 1]);
  assertEquals(first.events.slice(1), ["one", "two"]);
  peer.send("three"); // while nobody waits
  const second = await poll(url, next(token, 2, 2), ack(2));
  assertEquals([terms(second), second.events.slice(1)], [[0, 3], ["three"]]);
  assertEquals(calls, ["open"]);
});

test("A poll that was lost is answered again by the next", async (t) => {
  const { url, peers } = await site(t);
  const { token } = await poll(url);
  (await peers.next()).send("one");
  for (const attempt of [1, 2, 3]) {
    const answer = await poll(url, next(token, attempt, 0), ack(0));
    assertEquals([terms(answer), answer.events.slice(1)], [[0, 1], ["one"]]);
  }
});

test("A PING in a poll asks for an answer at once; its messages are numbered as any", async (t) => {
  const { url, calls } = await site(t);
  const { token } = await poll(url);
  const body = concat([from(1, frame("TEXT", "up")), frame("PING")]) as Uint8Array<ArrayBuffer>;
  for (const attempt of [1, 2]) {
    const { events } = await poll(url, next(token, attempt, 0), body);
    assert(events.length > 0);
  }
  await until(() => calls.includes("up"));
  const answer = await poll(url, next(token, 3, 0), frame("PING"));
  assertEquals(terms(answer), [1, 1]);
  assertEquals(calls, ["open", "up"]);
});

test("What was handled while nobody waited ends the next poll: something may hold its first event", async (t) => {
  const { url, calls } = await site(t, { heartbeatInterval: 60_000 });
  const { token } = await poll(url);
  const sent = await fetch(url, {
    method: "POST",
    headers: { "x-duplex-version": "1", "x-crossws-id": token },
    body: from(1, frame("TEXT", "up")),
  });
  assertEquals(sent.headers.get("x-duplex-received"), "1");
  await until(() => calls.includes("up"));
  const answer = await poll(url, next(token, 1, 0), ack(0));
  assertEquals([terms(answer), answer.events.slice(1)], [[1, 1], ["duplex-ack 1 12"]]);
});

test("A poll ends at the heartbeat", async (t) => {
  const { url } = await site(t, { heartbeatInterval: 200 });
  const { token } = await poll(url);
  const { events, text } = await poll(url, next(token, 1, 0), ack(0));
  assertEquals(events.length, 1);
  assert(text.endsWith(":\n\n") || text.endsWith(":\n"), text);
});

for (const resumeTimeout of [300, 0]) {
  test(`A session whose polls stop ends, with a resumeTimeout of ${resumeTimeout}`, async (t) => {
    const { url, calls, peers } = await site(t, { resumeTimeout, heartbeatInterval: 100 });
    const { token } = await poll(url);
    for (const attempt of [1, 2, 3]) await poll(url, next(token, attempt, 0), ack(0));
    assertEquals([calls, peers.all.length], [["open"], 1]);
    const since = performance.now();
    await until(() => calls.length > 1, { timeout: 9_000 });
    assertEquals(calls, ["open", "close 1006"]);
    assertGreater(performance.now() - since, 200);
    assertEquals((await poll(url, next(token, 4, 0))).status, 404);
  }, { timeout: 15_000 });
}

test("A close ends the poll that waits, or the next one", async (t) => {
  const { url, peers } = await site(t);
  const opened = [await poll(url), await poll(url)];
  const waiting = poll(url, next(opened[0]!.token, 1, 0), ack(0));
  await until(() => peers.all.length === 2);
  for (const peer of peers.all) {
    peer.send("last");
    peer.close(4000, "go");
  }
  const expected = ["last", 'duplex-close {"code":4000,"reason":"go","sent":1}'];
  assertEquals((await waiting).events.slice(1), expected);
  const late = await poll(url, next(opened[1]!.token, 1, 0), ack(0));
  assertEquals(late.events.slice(1), expected);
});

test("An opening that is repeated opens no second session", async (t) => {
  const { url, calls } = await site(t, {
    hooks: { upgrade: () => ({ headers: { "set-cookie": "user=ada" } }) },
  });
  const opening = { "x-duplex-opening": "0123456789abcdef0123456789abcdef" };
  const held = await fetch(url, {
    headers: { accept: "text/event-stream", "x-duplex-version": "1", ...opening },
  });
  const again = await poll(url, opening);
  assertEquals(again.token, held.headers.get("x-crossws-id"));
  assertEquals(terms(again), [0, 1]);
  assert((await held.text()).includes("duplex-open"), "the first one's stream has ended");
  assertEquals(calls, ["open"]);
  // Once its client has shown that it has the token, nobody wants that any more.
  await poll(url, next(again.token, 1, 0), frame("PING"));
  assertEquals((await poll(url, opening)).status, 409);
  assertEquals(calls, ["open"]);
  for (const id of ["x", opening["x-duplex-opening"] + "0"]) {
    assertEquals((await poll(url, { "x-duplex-opening": id })).status, 400);
  }
});
