/**
 * Whatever chats are told, and however many they are: others go on, nothing grows without a bound,
 * and a stop reaches its run.
 */
import type { ChatChunk } from "../ai.ts";
import { chaos, pickSeed } from "./chaos.ts";
import {
  aborted,
  chats,
  Gate,
  question,
  raw,
  type RawChat,
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
  until,
} from "./harness.ts";
import { listen } from "./pair.ts";
import { mulberry32 } from "./random.ts";

const now = () => Promise.resolve();

/** Whether the server still answers. */
async function answers(chat: RawChat, id: string): Promise<void> {
  chat.ask(id);
  for (;;) {
    const { type, requestId } = await chat.hear();
    if (requestId === id && type === "end") return;
  }
}

test("thousands of damaged frames do no more than be refused", async (t) => {
  const seed = pickSeed();
  note(`DUPLEX_SEED=${seed}`);
  const random = mulberry32(seed);
  const pick = <T>(list: T[]): T => list[Math.floor(random() * list.length)]!;
  const values: unknown[] = [
    ...[null, 0, -1, "", "x", "x".repeat(300), [], {}, [[]], { length: 3 }, true, "send", "resume"],
    ...["abort", "__proto__", { role: "user" }, [{ id: 1 }], [null], { toString: 1 }, "\ud800"],
  ];
  const asked: string[] = [];
  const url = await serve(t, {
    respond: ({ id }) => {
      asked.push(id);
      return words(1, now);
    },
  });
  const chat = await raw(t, url);
  const intact: Record<string, unknown> = {
    type: "send",
    requestId: "r",
    id: "c",
    trigger: "submit-message",
    messageId: undefined,
    messages: [question],
    headers: {},
    body: {},
  };
  for (let n = 0; n < 2_000; n++) {
    const frame = {
      ...intact,
      type: pick(["send", "resume", "abort", "dance"]),
      requestId: `${n}`,
    };
    for (let times = Math.ceil(random() * 2); times > 0; times--) {
      // Without a type or an id it would close the socket.
      const name = pick(["id", "trigger", "messageId", "messages", "headers", "body", "__proto__"]);
      Object.defineProperty(frame, name, {
        value: pick(values),
        configurable: true,
        enumerable: true,
      });
    }
    chat.say(frame);
  }
  await answers(chat, "last");
  assertEquals(asked.at(-1), "last");
  for (const id of asked) assertEquals(typeof id === "string" && id.length <= 256, true);
  const deep = await raw(t, url);
  for (const brackets of ["[", '{"a":']) deep.socket.send(brackets.repeat(100_000));
  assertEquals((await deep.closed).code, 1008);
});

test("of 10,000 chats the latest are kept, and none is refused", async (t) => {
  const url = await serve(t, {
    keepEnded: Infinity,
    maxRuns: 100,
    validate: () => ({ success: true }),
    respond: () => words(1, now),
  });
  const chat = await raw(t, url);
  let ended = 0;
  let refused = 0;
  chat.socket.addEventListener("message", ({ data }) => {
    if (data.includes('"end"')) ended++;
    if (data.includes('"error"')) refused++;
  });
  for (let n = 0; n < 10_000; n++) {
    chat.ask(`${n}`);
    if (n % 100 === 99) await until(() => ended === n + 1);
  }
  assertEquals([ended, refused], [10_000, 0]);
  const again = await raw(t, url);
  const kept = async (id: number) => {
    again.resume(`${id}`);
    return (await again.hear()).type;
  };
  assertEquals([await kept(0), await kept(9_899), await kept(9_900)], [
    "no-active",
    "no-active",
    "start",
  ]);
}, { timeout: 60_000 });

test("one peer has so many answers under way, and others have theirs", async (t) => {
  const gate = new Gate();
  const url = await serve(t, {
    maxRunsPerPeer: 2,
    respond: ({ id }) => words(1, id === "quick" ? now : gate.wait),
  });
  const greedy = await raw(t, url);
  for (const id of ["1", "2", "3"]) greedy.ask(id);
  await until(() => greedy.messages.all.some((data) => `${data}`.includes('"error"')));
  const refused = greedy.messages.all.map((data) => JSON.parse(`${data}`))
    .filter(({ type }) => type === "error");
  assertEquals(refused, [
    { type: "error", requestId: "3", errorText: "Too many answers are on their way." },
  ]);
  await answers(await raw(t, url), "quick");
});

test("a source that never waits leaves others their turn, and can be stopped", async (t) => {
  const stopped = deferred();
  async function* endless(signal: AbortSignal): AsyncGenerator<ChatChunk> {
    signal.addEventListener("abort", () => stopped.resolve());
    yield { type: "text-start", id: "1" } as ChatChunk;
    for (;;) yield { type: "text-delta", id: "1", delta: "more " } as ChatChunk;
  }
  const url = await serve(t, {
    maxLog: 100_000,
    respond: ({ id }, { signal }) => id === "c" ? endless(signal) : words(1, now),
  });
  const stop = new AbortController();
  const answer = await send(transport(t, url), "c", stop.signal);
  let seen = "";
  const reading = read(answer, (text) => seen = text);
  await until(() => seen.length > 200_000); // far more than is kept
  assertEquals(await read(await send(transport(t, url), "other")), text(1));
  stop.abort();
  await stopped.promise;
  assertEquals((await reading).replaceAll("more ", ""), "", "nothing is missing or repeated");
});

test("an answer that does not end when it is stopped makes room for the next one", async (t) => {
  const url = await serve(t, {
    respond: ({ messageId }) =>
      messageId ? words(1, now) : words(2, () => new Promise<void>(() => {})),
  });
  const chat = await raw(t, url);
  const other = await raw(t, url);
  chat.ask("c", "first");
  await chat.messages.take(2);
  other.resume("c", "watching");
  await other.messages.take(3);
  chat.say({ type: "abort", requestId: "first" });
  const next = { trigger: "regenerate-message", messageId: "a", messages: [question] };
  chat.say({ type: "send", requestId: "second", id: "c", headers: {}, body: {}, ...next });
  assertEquals(await other.hear(), { type: "end", requestId: "watching" });
  await until(() => chat.messages.all.at(-1) === '{"type":"end","requestId":"second"}');
});

test("a slow reader gets all of it, whole, when it can, and holds nobody up", async (t) => {
  const size = 3_000_000;
  const ended = deferred();
  const { port, url } = await listen(t, {
    maxBufferedAmount: 1_000_000,
    hooks: chats(t, {
      async *respond() {
        yield { type: "text-start", id: "1" } as ChatChunk;
        for (let at = 0; at < size; at += 10) {
          yield { type: "text-delta", id: "1", delta: `${at}`.padStart(9, "0") + " " } as ChatChunk;
          if (at % 10_000 === 0) await sleep(1);
        }
        ended.resolve();
      },
    }),
  });
  const expected = Array.from({ length: size / 10 }, (_, n) => `${n * 10}`.padStart(9, "0") + " ");
  const network = t.use(await chaos(port, { seed: pickSeed() }));
  let seen = "";
  const slow = read(await send(transport(t, network.url)), (text) => seen = text);
  await until(() => seen);
  network.stallAll({ newcomers: false });
  const quick = (await transport(t, url).reconnectToStream({ chatId: "c" }))!;
  assertEquals(await read(quick) === expected.join(""), true);
  await ended.promise;
  network.resumeAll();
  assertEquals(await slow === expected.join(""), true);
}, { timeout: 60_000 });

test("a stop that comes while its request is being checked is heard", async (t) => {
  const gate = new Gate();
  const began: string[] = [];
  const stopped: string[] = [];
  const url = await serve(t, {
    validate: async () => {
      await gate.wait();
      return { success: true };
    },
    respond: ({ id }, { signal }) => {
      began.push(id);
      signal.addEventListener("abort", () => stopped.push(id));
      return words(1, () => aborted(signal));
    },
  });
  const chat = await raw(t, url);
  chat.ask("stopped", "1");
  chat.say({ type: "abort", requestId: "1" });
  chat.ask("kept", "2");
  await until(() => {
    gate.open();
    return began.length > 0;
  });
  assertEquals(began, ["kept"]);
  const other = await raw(t, url);
  other.resume("kept", "3");
  other.say({ type: "abort", requestId: "3" });
  await until(() => {
    gate.open();
    return stopped.length > 0;
  });
  assertEquals(stopped, ["kept"]);
});

test("times without an end are no times without a length", async (t) => {
  const gate = new Gate();
  const url = await serve(t, {
    keepUnwatched: Infinity,
    keepEnded: Infinity,
    respond: () => words(1, gate.wait),
  });
  const first = transport(t, url);
  const answer = await send(first);
  first.close();
  await assertRejects(() => read(answer));
  await sleep(50); // a timer of Infinity would have fired
  gate.open();
  const again = (await transport(t, url).reconnectToStream({ chatId: "c" }))!;
  assertEquals(await read(again), text(1));
  await sleep(50);
  assertEquals(
    await read((await transport(t, url).reconnectToStream({ chatId: "c" }))!),
    text(1),
  );
});

test("of all that is kept, what has ended goes first", async (t) => {
  const url = await serve(t, {
    keepEnded: Infinity,
    maxTotalLog: 3_500,
    respond: () => words(500, now),
  });
  const chat = transport(t, url);
  for (const id of ["1", "2"]) assertEquals(await read(await send(chat, id)), text(500));
  assertEquals(await chat.reconnectToStream({ chatId: "1" }), null);
  assertEquals(await read((await chat.reconnectToStream({ chatId: "2" }))!), text(500));
});

test("users are told apart by their ids, and who cannot be told is refused", async (t) => {
  const failures: string[] = [];
  const { url } = await listen(t, {
    onError: (error) => void failures.push((error as Error).message),
    hooks: {
      upgrade: ({ url }) => ({
        context: { user: JSON.parse(new URL(url).searchParams.get("u")!) },
      }),
      ...chats(t, { keepEnded: Infinity, respond: () => words(1, now) }),
    },
  });
  const as = (user: unknown) =>
    transport(t, `${url}?u=${encodeURIComponent(JSON.stringify(user))}`);
  await read(await send(as({ id: 1, name: "Ada" })));
  assertEquals(await as({ id: 2, name: "Bob" }).reconnectToStream({ chatId: "c" }), null);
  assertEquals(await as(null).reconnectToStream({ chatId: "c" }), null);
  assertEquals(await read((await as("1").reconnectToStream({ chatId: "c" }))!), text(1));
  const { message } = await assertRejects(
    () => as({ name: "Eve" }).reconnectToStream({ chatId: "c" }),
    Error,
  );
  assertEquals(message.includes("1011"), true, message);
  assertEquals(failures.length, 1);
});

test("respond gets what was validated, and the failures of callbacks stay here", async (t) => {
  t.expect("onError failed");
  const url = await serve(t, {
    validate: ({ value }) => ({ success: true, data: { ...value as object, metadata: "checked" } }),
    respond: ({ metadata }) => {
      throw new Error(`${metadata}`);
    },
    onError: () => {
      throw new Error("onError");
    },
    errorText: (error) => {
      if ((error as Error).message === "checked") throw new Error("errorText");
      return "not checked";
    },
  });
  const chat = await raw(t, url);
  const printed = console.error;
  console.error = () => {};
  t.defer(() => console.error = printed);
  chat.ask("c");
  assertEquals(await chat.hear(), {
    type: "error",
    errorText: "The request failed.",
    requestId: "c",
  });
  assertGreater(chat.messages.all.length, 0);
});

test("text is gathered for as long as asked, but its first piece, and what is no text, does not wait", async (t) => {
  const gate = new Gate();
  const url = await serve(t, {
    gather: 60_000, // nothing of this test waits for its end
    async *respond() {
      yield { type: "text-start", id: "1" } as ChatChunk;
      for (const delta of ["first ", "second ", "third "]) {
        await gate.wait();
        yield { type: "text-delta", id: "1", delta } as ChatChunk;
      }
      await gate.wait();
      yield { type: "data-news", data: 1 } as ChatChunk;
      await gate.wait();
      yield { type: "text-delta", id: "1", delta: "last" } as ChatChunk;
    },
  });
  const chat = await raw(t, url);
  chat.ask("c");
  const chunk = async () => (await chat.hear()).chunk as ChatChunk & { delta?: string };
  const next = async () => {
    gate.open();
    await sleep(20); // the source's turn, and that of whatever it shows
  };
  assertEquals((await chunk()).type, "text-start");
  await next();
  assertEquals((await chunk()).delta, "first ");
  await next();
  await next();
  assertEquals(chat.messages.left, 0, "what follows is gathered");
  // Whoever comes is shown all that there is.
  const other = await raw(t, url);
  other.resume("c");
  assertEquals((await other.messages.take(3)).map((data) => JSON.parse(`${data}`).chunk?.delta), [
    undefined, // that it is there
    undefined, // that a text begins
    "first second third ",
  ]);
  await next();
  assertEquals((await chunk()).delta, "second third ");
  assertEquals((await chunk()).type, "data-news");
  await next();
  assertEquals((await chunk()).delta, "last", "after something else, text begins anew");
  assertEquals((await chat.hear()).type, "end");
});

test("gathered text is shown when its time is over", async (t) => {
  const url = await serve(t, { gather: 30, respond: () => words(200, () => sleep(1)) });
  const chat = await raw(t, url);
  chat.ask("c");
  await until(() => `${chat.messages.all.at(-1)}`.includes('"end"'));
  const deltas = chat.messages.all.flatMap((data) => JSON.parse(`${data}`).chunk?.delta ?? []);
  assertEquals(deltas.join(""), text(200));
  assertEquals(deltas[0], "0 ");
  assertGreater(deltas.length, 2, "some of it before it ended");
  assertGreater(100, deltas.length, "far fewer pieces than words");
  assertEquals(await read(await send(transport(t, url), "other")), text(200));
});
