/**
 * Who means ill to a chat, or to whoever serves it: others' chats stay theirs, secrets stay here, and
 * nothing that is asked costs the server far more than the asking.
 */
import { type ChatChunk, chatHooks } from "../ai.ts";
import type { Message, Peer } from "../server.ts";
import { MemoryBus } from "./bus.ts";
import { chaos } from "./chaos.ts";
import {
  aborted,
  chats,
  Gate,
  type Options,
  raw,
  type RawChat,
  read,
  send,
  serve,
  text,
  transport,
  words,
} from "./chats.ts";
import { assert, assertEquals, deferred, sleep, test, type TestContext, until } from "./harness.ts";
import { listen } from "./pair.ts";

const now = () => Promise.resolve();
const SECRET = "sk-123";

/** Chats of users, whose names are in the URL. */
async function users(t: TestContext, options: Options): Promise<(user: string) => string> {
  const { url } = await listen(t, {
    hooks: {
      upgrade: ({ url }) => ({ context: { user: new URL(url).searchParams.get("user") } }),
      ...chats(t, options),
    },
  });
  return (user) => `${url}?user=${user}`;
}

/** The types of the frames that are answers to a request. */
function heard({ messages }: RawChat, requestId: string): string[] {
  return messages.all.map((data) => JSON.parse(`${data}`))
    .filter((frame) => frame.requestId === requestId).map(({ type }) => type);
}

test("another user neither sees, stops, nor disturbs a chat whose ids are known", async (t) => {
  const gate = new Gate();
  let stops = 0;
  const as = await users(t, {
    respond: (_, { signal, peer }) => {
      signal.addEventListener("abort", () => stops++);
      return words(2, peer.context.user === "ada" ? gate.wait : now);
    },
  });
  const ada = await raw(t, as("ada"));
  ada.ask("c", "r");
  await ada.messages.take(2);
  const eve = await raw(t, as("eve"));
  eve.say({ type: "abort", requestId: "r" });
  eve.resume("c", "r");
  assertEquals((await eve.hear()).type, "no-active");
  eve.ask("c", "r"); // a chat of her own
  await until(() => heard(eve, "r").includes("end"));
  eve.say({ type: "abort", requestId: "r" });
  for (let n = 0; n < 2; n++) {
    gate.open();
    await sleep(20);
  }
  await until(() => heard(ada, "r").includes("end"));
  assertEquals(heard(ada, "r").filter((type) => type !== "chunk"), ["end"]);
  assertEquals(stops, 2, "both came to their ends: whoever asks for a signal is told so, too");
});

test("ids and frames without measure are refused, and the chat goes on", async (t) => {
  const url = await serve(t, { respond: () => words(1, now) });
  const chat = await raw(t, url);
  const long = "x".repeat(1_000_000);
  chat.ask(long, "1");
  chat.resume(long, "2");
  for (const requestId of ["1", "2"]) {
    const errorText = "The request is not one of a chat.";
    assertEquals(await chat.hear(), { type: "error", errorText, requestId });
  }
  chat.ask("c", "3");
  await until(() => heard(chat, "3").includes("end"));
  const other = await raw(t, url);
  other.ask("c", long);
  assertEquals((await other.closed).code, 1008);
});

test("a secret that anything throws is told here, and to no client", async (t) => {
  const told: string[] = [];
  const url = await serve(t, {
    validate: ({ value }) => {
      if ((value as { id: string }).id === "validate") throw new Error(SECRET);
      return { success: true, data: value };
    },
    async respond({ id }): Promise<AsyncIterable<ChatChunk> | ReadableStream<ChatChunk>> {
      await sleep(0);
      if (id === "respond") throw new Error("failed", { cause: SECRET });
      if (id === "no stream") return SECRET as never;
      if (id === "stream") {
        return new ReadableStream({
          start: (controller) => controller.error({ status: 401, key: SECRET }),
        });
      }
      return (async function* () {
        yield { type: "text-start", id: "1" } as ChatChunk;
        if (id === "bigint") yield { type: "data-x", data: 1n } as never;
        if (id === "cycle") {
          const cycle: Record<string, unknown> = { type: "data-x", key: SECRET };
          yield Object.assign(cycle, { cycle }) as never;
        }
        if (id === "nothing") yield undefined as never;
        throw SECRET;
      })();
    },
    errorText: (error) => error as string, // a string is as it was meant; nothing else goes out
    onError: (_, { stage, chat }) => void told.push(`${stage} ${chat}`),
  });
  const chat = await raw(t, url);
  const ids = ["validate", "respond", "no stream", "stream", "bigint", "cycle", "nothing"];
  for (const id of ids) {
    chat.ask(id);
    await until(() => heard(chat, id).includes("error"));
    if (id === "validate") continue; // of a resume that it throws at, no more is told
    chat.resume(id, `${id} again`);
    await until(() => heard(chat, `${id} again`).length > 0);
    assertEquals(heard(chat, `${id} again`), ["no-active"]);
  }
  assertEquals(told, ids.map((id) => `${id === "validate" ? id : "respond"} ${id}`));
  const said = chat.messages.all.join("\n");
  assert(!said.includes(SECRET) && !said.includes("stack") && !said.includes("401"), said);
});

test("two tabs that ask at once get one answer, which both can show", async (t) => {
  const gate = new Gate();
  let begun = 0;
  const url = await serve(t, {
    validate: async ({ value }) => {
      await sleep(10);
      return { success: true, data: value };
    },
    respond: () => {
      begun++;
      return words(2, gate.wait);
    },
  });
  const tabs = [await raw(t, url), await raw(t, url)];
  for (const tab of tabs) tab.ask("c", "ask");
  await until(() => tabs.some((tab) => heard(tab, "ask").includes("error")));
  const refused = tabs.find((tab) => heard(tab, "ask").includes("error"))!;
  assertEquals(heard(refused, "ask"), ["error"]);
  refused.resume("c", "follow");
  await until(() => heard(refused, "follow").includes("chunk"));
  for (let n = 0; n < 2; n++) {
    gate.open();
    await sleep(20);
  }
  const [asked] = tabs.filter((tab) => tab !== refused);
  await until(() => heard(asked!, "ask").includes("end"));
  await until(() => heard(refused, "follow").includes("end"));
  assertEquals(begun, 1);
});

test("an answer that never ends, and hears no stop, is let go when nobody watches", async (t) => {
  const asked = deferred();
  const hooks = chats(t, {
    keepUnwatched: 20,
    respond: () => {
      asked.resolve();
      return words(1, () => new Promise<void>(() => {}));
    },
  });
  const { url } = await listen(t, { hooks });
  const chat = await raw(t, url);
  chat.ask("c");
  await asked.promise;
  chat.socket.close();
  await hooks.settled();
  const next = await raw(t, url);
  await until(async () => {
    next.resume("c", "again");
    return (await next.hear()).type === "no-active";
  });
}, { timeout: 20_000 });

test("10,000 chunks that come while nobody listens are all there afterwards", async (t) => {
  const gate = new Gate();
  let kept = 0;
  const url = await serve(t, {
    keepEnded: 60_000,
    respond: async function* ({ id }) {
      await gate.wait();
      for (let n = 0; n < 10_000; n++) {
        yield { type: "data-n", data: id === "small" ? n : `${n}`.padStart(1_000) } as ChatChunk;
      }
      kept++;
    },
  });
  for (const id of ["small", "large"]) {
    const first = await raw(t, url);
    first.ask(id);
    first.socket.close();
    await first.closed;
    gate.open();
    await until(() => kept === (id === "small" ? 1 : 2));
  }
  const again = await raw(t, url);
  again.resume("small");
  await until(() => heard(again, "small").includes("end"));
  const numbers = again.messages.all.flatMap((data) => JSON.parse(`${data}`).chunk?.data ?? []);
  assertEquals(numbers, Array.from({ length: 10_000 }, (_, n) => n));
  again.resume("large"); // 10 MB, of which no more than `maxLog` is kept
  await until(() => heard(again, "large").includes("error"));
  assertEquals(heard(again, "large"), ["error"]);
});

test("an abort in the middle of a replay ends it, and the answer", async (t) => {
  const stopped = deferred();
  const url = await listen(t, {
    maxBufferedAmount: 1_000_000,
    hooks: chats(t, {
      async *respond(_, { signal }) {
        for (let n = 0; n < 3_000; n++) {
          yield { type: "data-n", data: `${n}`.padStart(1_000) } as ChatChunk;
        }
        await aborted(signal).catch(() => stopped.resolve());
      },
    }),
  });
  const first = await raw(t, url.url);
  first.ask("c");
  await until(() => first.messages.all.length === 3_000);
  const network = t.use(await chaos(url.port, { seed: 1 }));
  const slow = await raw(t, network.url);
  slow.resume("c", "replay");
  await until(() => heard(slow, "replay").length > 1);
  network.stallAll({ newcomers: false });
  slow.say({ type: "abort", requestId: "replay" });
  network.resumeAll();
  await stopped.promise;
  await until(() => heard(first, "c").includes("end"));
  slow.ask("other", "next");
  await until(() => heard(slow, "next").includes("end") || heard(slow, "next").length === 3_000);
  const replayed = heard(slow, "replay").length;
  await sleep(50);
  assertEquals(heard(slow, "replay").length, replayed, "nothing of it comes any more");
});

test("a source that goes on changing its chunks changes nothing that it has said", async (t) => {
  const gate = new Gate();
  const url = await serve(t, {
    keepEnded: 60_000,
    async *respond() {
      const chunk = { type: "text-delta", id: "1", delta: "" };
      for (const delta of ["a", "b", "c"]) {
        yield Object.assign(chunk, { delta }) as ChatChunk;
        await gate.wait();
      }
      const data = { n: 1 };
      yield { type: "data-n", data } as ChatChunk;
      data.n = 2;
      yield { type: "data-n", data } as ChatChunk;
    },
  });
  const chat = await raw(t, url);
  chat.ask("c");
  for (let n = 0; n < 3; n++) {
    await until(() => heard(chat, "c").length === n + 1);
    gate.open();
  }
  await until(() => heard(chat, "c").includes("end"));
  const again = await raw(t, url);
  again.resume("c");
  await until(() => heard(again, "c").includes("end"));
  for (const { messages } of [chat, again]) {
    const chunks = messages.all.flatMap((data) => JSON.parse(`${data}`).chunk ?? []);
    assertEquals(chunks.map(({ delta }) => delta ?? "").join(""), "abc");
    assertEquals(chunks.flatMap(({ data }) => data?.n ?? []), [1, 2]);
  }
});

test("a peer that looks for chats without end makes other instances look for few", async (t) => {
  const bus = new MemoryBus(t);
  const url = await serve(t, { maxRunsPerPeer: 3 }, bus.adapter);
  const chat = await raw(t, url);
  for (let n = 0; n < 100; n++) chat.resume(`${n}`);
  await until(() => chat.messages.all.length === 100);
  const types = chat.messages.all.map((data) => JSON.parse(`${data}`).type);
  const count = (type: string) => types.filter((each) => each === type).length;
  assertEquals([count("error"), count("no-active")], [97, 3]);
  const finds = () => bus.payloads.filter((each) => each.includes("find")).length;
  assertEquals(finds(), 3);
  chat.resume("next"); // it may look again
  await until(() => finds() === 4);
});

test("a stop looks for its run by its name, not through all of them", async () => {
  // Far below the server, where the runs that are touched can be counted.
  const { values } = Map.prototype;
  let walks = 0;
  const asked = deferred();
  const stopped = deferred();
  const hooks = chatHooks({
    respond: (_, { signal }) => {
      signal.addEventListener("abort", () => stopped.resolve());
      asked.resolve();
      return new ReadableStream<ChatChunk>();
    },
  });
  const peer = {
    ...{ id: "p", namespace: "/", context: {}, websocket: { readyState: 1 }, bufferedAmount: 0 },
    send: () => 1,
  } as unknown as Peer;
  const submit = { trigger: "submit-message" };
  const say = (frame: object) =>
    void hooks.message!(peer, { text: () => JSON.stringify(frame) } as Message);
  say({ type: "send", requestId: "r", id: "c", headers: {}, body: {}, messages: [], ...submit });
  await asked.promise;
  Map.prototype.values = function (this: Map<unknown, unknown>) {
    walks++;
    return values.call(this);
  } as typeof values;
  try {
    for (const requestId of ["r", "x"]) say({ type: "abort", requestId });
  } finally {
    Map.prototype.values = values;
  }
  assertEquals(walks, 0);
  await stopped.promise;
  await hooks.settled({ signal: AbortSignal.abort() }).catch(() => {});
});

test("whoever waits for a chat to settle waits for those who came to it late", async (t) => {
  const long = "x".repeat(1_000_000);
  const hooks = chats(t, {
    keepEnded: 60_000,
    async *respond() {
      for (let n = 0; n < 3; n++) yield { type: "data-x", data: long } as ChatChunk;
    },
  });
  const { url, port } = await listen(t, { maxBufferedAmount: 2_000_000, hooks });
  const network = t.use(await chaos(port, { seed: 1 }));
  const slow = await raw(t, network.url);
  assertEquals(await read(await send(transport(t, url))), "");
  network.stallAll({ newcomers: false });
  slow.resume("c");
  network.resumeAll();
  await until(() => heard(slow, "c").length > 0);
  network.stallAll({ newcomers: false });
  await sleep(50);
  const settled = hooks.settled();
  assertEquals(await Promise.race([settled.then(() => "settled"), sleep(50)]), undefined);
  network.resumeAll();
  await settled;
  await until(() => heard(slow, "c").includes("end"));
  assertEquals(heard(slow, "c").length, 5, text(0));
});

test(
  "a viewer of a failed answer that leaves before its end is waited for no longer",
  async (t) => {
    const failing = deferred();
    const hooks = chats(t, {
      onError: () => {},
      async *respond() {
        for (let n = 0; n < 3; n++) {
          yield { type: "data-x", data: "x".repeat(1_000_000) } as ChatChunk;
        }
        await failing.promise;
        throw new Error("failed");
      },
    });
    const { port } = await listen(t, {
      maxBufferedAmount: 2_000_000,
      resumeTimeout: 300,
      hooks,
    });
    const network = t.use(await chaos(port, { seed: 1 }));
    const slow = await raw(t, network.url);
    slow.ask("c");
    await until(() => heard(slow, "c").length > 0);
    network.stallAll();
    await sleep(50);
    failing.resolve();
    await sleep(20);
    network.cutAll("rst");
    network.refuse(60_000);
    slow.socket.close();
    await hooks.settled();
  },
  { timeout: 40_000 },
);
