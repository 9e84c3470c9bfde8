/**
 * Chats on several instances: an answer is shown, resumed and stopped wherever its viewers are, and
 * whatever the backplane loses; a session that moves takes along what it is shown.
 */
import { cluster } from "../cluster.ts";
import type { Message, Peer, SyncMessage } from "../server.ts";
import { type BusOptions, MemoryBus, roundRobin } from "./bus.ts";
import { chaos, pickSeed } from "./chaos.ts";
import {
  aborted,
  chats,
  Gate,
  type Options,
  question,
  raw,
  read,
  send,
  serve,
  text,
  transport,
  words,
} from "./chats.ts";
import {
  assertEquals,
  assertGreater,
  assertRejects,
  deferred,
  note,
  sleep,
  test,
  type TestContext,
  until,
} from "./harness.ts";
import { listen, shutDown } from "./pair.ts";
import { mulberry32 } from "./random.ts";

const isChat = ({ namespace }: SyncMessage) => namespace === "\0duplex-chat";

/** A bus that loses some of what chats say, repeats some, and delays the rest as it likes. */
function lossy(t: TestContext, loss: number): MemoryBus {
  const seed = pickSeed();
  note(`DUPLEX_SEED=${seed}`);
  const random = mulberry32(seed);
  const fault: BusOptions["fault"] = (message) => {
    if (!isChat(message)) return [0];
    const draw = random();
    if (draw < loss) return [];
    return draw < 2 * loss ? [0, 5] : [0];
  };
  return new MemoryBus(t, { fault });
}

test("an answer comes whole though the backplane loses and repeats words of it", async (t) => {
  const bus = lossy(t, 0.1);
  const options: Options = { keepEnded: 60_000, respond: () => words(300, () => sleep(5)) };
  const one = await serve(t, options, bus.adapter);
  const other = await serve(t, options, bus.adapter);
  const reading = read(await send(transport(t, one)));
  const resumed = await until(() => transport(t, other).reconnectToStream({ chatId: "c" }));
  assertEquals([await read(resumed), await reading], [text(300), text(300)]);
}, { timeout: 30_000 });

test("a long answer comes to a slow viewer elsewhere, no faster than it takes it", async (t) => {
  const bus = new MemoryBus(t);
  const piece = "x".repeat(1_000);
  const options: Options = {
    respond: () => words(0, () => Promise.resolve()),
  };
  let held = 0;
  const ended = deferred();
  options.respond = async function* () {
    for (let n = 0; n < 4_000; n++) {
      yield { type: "data-x", data: piece } as { type: string };
      if (n % 100 === 0) await sleep(0);
    }
    ended.resolve();
  };
  const one = await serve(t, { ...options, maxLog: 10_000_000 }, bus.adapter);
  const other = await listen(t, {
    maxBufferedAmount: 1_000_000,
    hooks: chats(t, { ...options, sync: bus.adapter }),
  });
  const network = t.use(await chaos(other.port, { seed: pickSeed() }));
  const slow = await raw(t, network.url);
  const quick = read(await send(transport(t, one)));
  slow.resume("c");
  await until(() => slow.messages.all.length > 0);
  network.stallAll({ newcomers: false });
  await ended.promise;
  await quick;
  await sleep(100);
  for (const peers of other.ws.peers.values()) {
    for (const peer of peers) held += peer.bufferedAmount;
  }
  network.resumeAll();
  await until(() => `${slow.messages.all.at(-1)}`.includes('"end"'), { timeout: 20_000 });
  assertEquals(slow.messages.all.filter((data) => `${data}`.includes(piece)).length, 4_000);
  assertGreater(1_000_000, held);
}, { timeout: 60_000 });

test("an instance that is gone ends the answers that it was showing elsewhere", async (t) => {
  let dead = false;
  const bus = new MemoryBus(t, { fault: () => dead ? [] : [0] });
  const gate = new Gate();
  const options: Options = { respond: () => words(2, gate.wait) };
  const one = await serve(t, options, bus.adapter);
  const other = await serve(t, options, bus.adapter);
  await send(transport(t, one));
  const watching = read((await transport(t, other).reconnectToStream({ chatId: "c" }))!);
  dead = true;
  const { message } = await assertRejects(() => watching, Error);
  assertEquals(message, "The request failed.");
}, { timeout: 30_000 });

test("a stop that the backplane lost is said again", async (t) => {
  let deaf = false;
  let lost = 0;
  const bus = new MemoryBus(t, {
    fault: ({ data }) => deaf && `${data}`.includes('"kind":"stop"') && lost++ === 0 ? [] : [0],
  });
  const stopped = deferred();
  const options: Options = {
    respond: (_, { signal }) => {
      signal.addEventListener("abort", () => stopped.resolve());
      return words(1, () => aborted(signal));
    },
  };
  const one = await serve(t, options, bus.adapter);
  const other = await serve(t, options, bus.adapter);
  const reading = read(await send(transport(t, one)));
  const stop = new AbortController();
  const away = transport(t, other);
  await away.reconnectToStream({ chatId: "c", abortSignal: stop.signal });
  deaf = true;
  stop.abort();
  await Promise.all([stopped.promise, reading]);
  assertEquals(lost > 0, true);
}, { timeout: 20_000 });

test("of one chat there is one answer at a time, on all instances together", async (t) => {
  const bus = new MemoryBus(t);
  const gates = [new Gate(), new Gate()];
  const signals: AbortSignal[] = [];
  const urls = await Promise.all(gates.map((gate) =>
    serve(t, {
      keepEnded: 60_000,
      respond: (_, { signal }) => {
        signals.push(signal);
        return words(1, gate.wait);
      },
    }, bus.adapter)
  ));
  const answers = await Promise.all(urls.map((url) => send(transport(t, url))));
  const results = Promise.allSettled(answers.map((answer) => read(answer)));
  await until(() => signals.filter(({ aborted }) => aborted).length === 1);
  for (const gate of gates) gate.open();
  const [won, lost] = (await results).toSorted((a, b) => a.status < b.status ? -1 : 1);
  assertEquals(won, { status: "fulfilled", value: text(1) });
  assertEquals(
    `${(lost as PromiseRejectedResult).reason}`,
    "Error: An answer is already on its way in this chat.",
  );

  // One that has ended is forgotten when another begins, wherever.
  const loser = 1 -
    (await results).findIndex(({ status }) => status === "fulfilled");
  const next = read(await send(transport(t, urls[loser]!)));
  await until(() => bus.payloads.filter((each) => each.includes("begin")).length === 3);
  gates[loser]!.open();
  assertEquals(await next, text(1));
  for (const url of urls) {
    assertEquals(
      await read((await transport(t, url).reconnectToStream({ chatId: "c" }))!),
      text(1),
    );
  }
});

test("whatever else is said on the backplane means nothing", async (t) => {
  const bus = new MemoryBus(t);
  const failures: string[] = [];
  const url = await serve(t, {
    respond: () => words(1, () => Promise.resolve()),
    onError: (error) => void failures.push(`${error}`),
  }, bus.adapter);
  for (
    const data of [
      "garbage",
      "{}",
      "null",
      '{"kind":"find"}',
      '{"kind":"show","viewer":"x"}',
      new Uint8Array(3),
    ]
  ) {
    bus.inject({ namespace: "/", topic: "chat *", data });
    bus.inject({ namespace: "\0duplex-chat", topic: "elsewhere", data });
    bus.inject({ namespace: "\0duplex-chat", topic: "chat *", data });
  }
  assertEquals(await read(await send(transport(t, url))), text(1));
  assertEquals(failures.length, 2, `${failures}`); // garbage, and null
});

test(
  "a deploy is not seen by who is shown an answer: its session moves, and the answer goes on",
  async (t) => {
    const bus = new MemoryBus(t);
    t.defer(() => sleep(200)); // what is being signed or sealed
    const instances = await Promise.all([0, 1].map(async () => {
      const hooks = chats(t, { respond: () => words(100, () => sleep(10)), sync: bus.adapter });
      const { ws, port } = await listen(t, { hooks, sync: cluster(bus.adapter) });
      return { hooks, ws, port };
    }));
    const proxy = await roundRobin(t, instances.map(({ port }) => port));
    proxy.choose = () => 0;
    const events: string[] = [];
    let seen = "";
    const chat = await raw(t, proxy.url);
    chat.socket.addEventListener("close", () => events.push("close"));
    chat.socket.addEventListener("drop", () => events.push("drop"));
    const reading = read(await send(transport(t, proxy.url), "other"), (text) => seen = text);
    chat.ask("c");
    await until(() => seen.length > 20);

    proxy.choose = () => 1;
    await instances[0]!.ws.close(1012);
    assertEquals([...instances[0]!.ws.peers.values()].flatMap((peers) => [...peers]), []);
    await instances[0]!.hooks.settled();
    assertEquals(bus.subscribed, 2, "those of the other instance: nothing keeps the process alive");
    assertEquals(await reading, text(100));
    await until(() => `${chat.messages.all.at(-1)}`.includes('"end"'));
    const frames = chat.messages.all.map((data) => JSON.parse(`${data}`)).slice(0, -1);
    assertEquals(frames.map(({ sequence }) => sequence), frames.map((_, n) => n));
    const whole = frames.map(({ chunk }) => chunk.delta ?? "").join("");
    assertEquals(whole, text(100));
    assertEquals(events, [], "neither closed nor dropped");

    // What is asked now is answered by the other instance.
    assertEquals(await read(await send(transport(t, proxy.url), "next")), text(100));
    await shutDown(instances[1]!.ws);
  },
  { timeout: 30_000 },
);

for (const first of ["its own", "another"]) {
  test(`an instance waits for a viewer that is on its way from ${first} to a third`, async (t) => {
    const bus = new MemoryBus(t);
    const gate = new Gate();
    const options: Options = { respond: () => words(2, gate.wait), sync: bus.adapter };
    const [one, other, third] = [chats(t, options), chats(t, options), chats(t, options)];
    const said: string[] = [];
    // The same session, wherever it is.
    const peer = {
      ...{ id: "p", namespace: "/", context: {}, websocket: { readyState: 1 }, bufferedAmount: 0 },
      send: (text: string) => said.push(text),
    } as unknown as Peer;
    const say = ({ message }: typeof one, frame: object) => {
      const text = JSON.stringify({ id: "c", headers: {}, body: {}, ...frame });
      message!(peer, { text: () => text } as Message);
    };
    const asking = { trigger: "submit-message", messages: [question] };
    say(one, { type: "send", requestId: "1", ...asking });
    await until(() => said.length === 2);
    const at = first === "another" ? other : one;
    if (at === other) {
      one.suspend!(peer);
      other.revive!(peer);
    }
    gate.open();
    await until(() => said.length === 3);
    at.suspend!(peer);
    gate.open();
    const settled = one.settled().then(() => "settled");
    assertEquals(await Promise.race([settled, sleep(100)]), undefined);
    assertEquals(said.length, 3);
    third.revive!(peer);
    await settled;
    const frames = said.map((text) => JSON.parse(text));
    assertEquals(frames.map(({ chunk }) => chunk?.delta ?? "").join(""), text(2));
    assertEquals(frames.map(({ sequence }) => sequence), [0, 1, 2, 3, 4, 5, undefined]);
    assertEquals(frames.at(-1), { type: "end", requestId: "1" });
  });
}

test("who waits for answers to settle no longer ends them", async (t) => {
  const stopped = deferred();
  const hooks = chats(t, {
    keepEnded: 60_000,
    respond: (_, { signal }) => {
      signal.addEventListener("abort", () => stopped.resolve());
      return words(1, () => aborted(signal));
    },
  });
  const { url } = await listen(t, { hooks });
  const reading = read(await send(transport(t, url)));
  const late = new AbortController();
  await until(async () => await transport(t, url).reconnectToStream({ chatId: "c" }));
  const settling = hooks.settled({ signal: late.signal });
  late.abort(new Error("late"));
  const { message } = await assertRejects(() => settling, Error);
  assertEquals(message, "late");
  await stopped.promise;
  assertEquals(await reading, "");
  assertEquals(await transport(t, url).reconnectToStream({ chatId: "c" }), null);
});
