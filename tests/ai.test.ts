/**
 * Chats of the AI SDK over our socket: its own transport, its own validation, our hooks.
 */
import { chatHooks } from "../ai.ts";
import { MemoryBus } from "./bus.ts";
import { chaos, pickSeed } from "./chaos.ts";
import {
  aborted,
  chats,
  Gate,
  type Options,
  type Pieces,
  question,
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
  assertThrows,
  deferred,
  sleep,
  test,
  until,
} from "./harness.ts";
import { connect, listen } from "./pair.ts";

test("an answer comes to the SDK's transport, piece by piece", async (t) => {
  const url = await serve(t, {});
  assertEquals(await read(await send(transport(t, url))), text(3));
});

test("three chats on one socket do not disturb each other", async (t) => {
  const url = await serve(t, {
    respond: ({ id }) => words(Number(id), () => Promise.resolve()),
  });
  const chat = transport(t, url);
  const answers = await Promise.all(["10", "20", "2000"].map(async (id) => {
    return await read(await send(chat, id));
  }));
  assertEquals(answers, [text(10), text(20), text(2000)]);
});

test("stopping ends the run, and whoever else watches it", async (t) => {
  const gate = new Gate();
  let stopped = false;
  const url = await serve(t, {
    respond: (_, { signal }) => {
      signal.addEventListener("abort", () => {
        stopped = true;
      });
      return words(1000, () => Promise.race([gate.wait(), aborted(signal)]));
    },
  });
  const stop = new AbortController();
  const first = await send(transport(t, url), "c", stop.signal);
  const second = (await transport(t, url).reconnectToStream({ chatId: "c" }))!;
  const watching = read(second);
  gate.open();
  let seen = "";
  const reading = read(first, (text) => seen = text);
  await until(() => seen);
  stop.abort();
  await Promise.all([reading, watching]);
  assertEquals(stopped, true);
});

test("an answer is resumed from its beginning, by any number of sockets", async (t) => {
  const gate = new Gate();
  const url = await serve(t, { respond: () => words(4, gate.wait) });
  const seen = ["", "", ""];
  const watch = (at: number, pieces: Pieces) => read(pieces, (text) => seen[at] = text);
  const reading = [watch(0, await send(transport(t, url)))];
  for (let n = 1; n <= 2; n++) {
    gate.open();
    await until(() => seen[0] === text(n));
  }
  for (const at of [1, 2]) {
    reading.push(watch(at, (await transport(t, url).reconnectToStream({ chatId: "c" }))!));
  }
  for (let n = 3; n <= 4; n++) {
    await until(() => seen.every((one) => one === text(n - 1)));
    gate.open();
  }
  assertEquals(await Promise.all(reading), [text(4), text(4), text(4)]);
});

test("an answer that nobody watches goes on, and can be resumed when it has ended", async (t) => {
  const gate = new Gate();
  const url = await serve(t, { keepEnded: 1000, respond: () => words(2, gate.wait) });
  const first = transport(t, url);
  const answer = await send(first);
  first.close();
  await assertRejects(() => read(answer));
  gate.open();
  await sleep(0);
  gate.open();
  const again = transport(t, url);
  assertEquals(await read((await again.reconnectToStream({ chatId: "c" }))!), text(2));
  assertEquals(await again.reconnectToStream({ chatId: "unknown" }), null);
  await until(async () => await again.reconnectToStream({ chatId: "c" }) === null);
});

test("an answer that nobody watches for too long is stopped", async (t) => {
  const stopped = deferred();
  const url = await serve(t, {
    keepUnwatched: 20,
    respond: (_, { signal }) => {
      signal.addEventListener("abort", () => stopped.resolve());
      return words(1000, () => aborted(signal));
    },
  });
  const first = transport(t, url);
  const answer = await send(first);
  first.close();
  await assertRejects(() => read(answer));
  await stopped.promise;
});

test("300 tokens come once each though every connection is cut again and again", async (t) => {
  const { port } = new URL(await serve(t, { respond: () => words(300, () => sleep(5)) }));
  const proxy = t.use(await chaos(Number(port), { seed: pickSeed() }));
  const cutting = setInterval(() => proxy.cutAll(), 300);
  t.defer(() => clearInterval(cutting));
  assertEquals(await read(await send(transport(t, proxy.url))), text(300));
  assertGreater(proxy.stats.connections, 3);
}, { timeout: 30_000 });

test("of one chat there is one answer at a time; the next may follow", async (t) => {
  const gate = new Gate();
  const url = await serve(t, { respond: () => words(1, gate.wait) });
  const chat = transport(t, url);
  const answer = await send(chat);
  const busy = await assertRejects(async () => await read(await send(chat)), Error);
  assertEquals(busy.message, "An answer is already on its way in this chat.");
  gate.open();
  assertEquals(await read(answer), text(1));
  const next = await send(chat);
  gate.open();
  assertEquals(await read(next), text(1));
});

test("a failure says that it failed, and leaks nothing", async (t) => {
  const failures: [unknown, string][] = [];
  const url = await serve(t, {
    respond: () => {
      throw new Error("the key is sk-123");
    },
    onError: (error, { chat }) => void failures.push([error, chat!]),
  });
  const chat = transport(t, url);
  const error = await assertRejects(async () => await read(await send(chat)), Error);
  assertEquals(error.message, "The request failed.");
  assertEquals(`${failures}`, "Error: the key is sk-123,c");
  assertEquals(await chat.reconnectToStream({ chatId: "c" }), null, "what failed is not resumed");
});

test("a chat is its owner's: another's chat of the same id is another one", async (t) => {
  const gate = new Gate();
  const { url } = await listen(t, {
    hooks: {
      upgrade: ({ url }) => ({ context: { user: new URL(url).searchParams.get("user") } }),
      ...chats(t, { respond: () => words(1, gate.wait) }),
    },
  });
  const ada = transport(t, `${url}?user=ada`);
  const answer = await send(ada);
  assertEquals(await transport(t, `${url}?user=bob`).reconnectToStream({ chatId: "c" }), null);
  const hers = await transport(t, `${url}?user=ada`).reconnectToStream({ chatId: "c" });
  gate.open();
  assertEquals([await read(answer), await read(hers!)], [text(1), text(1)]);
});

test("what is no frame of a chat closes the socket with 1008; what is an unfit one is told", async (t) => {
  const url = await serve(t, {});
  for (const frame of ["garbage", "{}", "[]", "null", JSON.stringify({ type: "send" })]) {
    const { socket, opened, closed } = connect(t, url);
    await opened;
    socket.send(frame);
    assertEquals((await closed).code, 1008, frame);
  }
  const { socket, messages, opened } = connect(t, url);
  await opened;
  for (const type of ["send", "resume", "dance"]) {
    socket.send(JSON.stringify({ type, requestId: "r", id: 7 }));
    const errorText = "The request is not one of a chat.";
    const told = JSON.parse(`${await messages.next()}`);
    assertEquals(told, { type: "error", errorText, requestId: "r" });
  }
});

test("answers are kept up to a length and a number", async (t) => {
  const gate = new Gate();
  const url = await serve(t, {
    maxLog: 200,
    maxRuns: 1,
    respond: () => words(200, () => gate.wait()),
  });
  const chat = transport(t, url);
  let seen = "";
  const reading = read(await send(chat), (text) => seen = text);
  const full = await assertRejects(async () => await read(await send(chat, "other")), Error);
  assertEquals(full.message, "Too many answers are on their way.");
  for (let n = 1; n <= 100; n++) {
    gate.open();
    await until(() => seen === text(n));
  }
  const other = transport(t, url);
  const long = await assertRejects(() => other.reconnectToStream({ chatId: "c" }), Error);
  assertEquals(long.message, "The answer is too long to be resumed.");
  for (let n = 101; n <= 200; n++) {
    gate.open();
    await until(() => seen === text(n));
  }
  assertEquals(await reading, text(200), "who saw it from the beginning sees it to its end");
});

test("a tab that resumes on a socket of its own is shown the answer once", async (t) => {
  const gate = new Gate();
  const url = await serve(t, { respond: () => words(2, gate.wait) });
  const { socket, messages, opened } = connect(t, url);
  await opened;
  const body = { id: "c", headers: {}, body: {} };
  const request = { ...body, trigger: "submit-message", messages: [question] };
  socket.send(JSON.stringify({ type: "send", requestId: "1", ...request }));
  await messages.take(2);
  socket.send(JSON.stringify({ type: "resume", requestId: "2", ...body }));
  assertEquals(JSON.parse(`${await messages.next()}`), { type: "start", requestId: "2" });
  assertEquals(JSON.parse(`${await messages.next()}`), { type: "end", requestId: "1" });
  await messages.take(2);
  gate.open();
  assertEquals(JSON.parse(`${await messages.next()}`).requestId, "2");
  gate.open();
  assertEquals(JSON.parse(`${await messages.next()}`).requestId, "2");
});

test("with a backplane an answer of another instance is resumed and stopped", async (t) => {
  const bus = new MemoryBus(t);
  const gate = new Gate();
  const stopped = deferred();
  const options: Options = {
    respond: (_, { signal }) => {
      signal.addEventListener("abort", () => stopped.resolve());
      return words(4, () => Promise.race([gate.wait(), aborted(signal)]));
    },
  };
  const one = await serve(t, options, bus.adapter);
  const other = await serve(t, options, bus.adapter);
  let seen = "";
  const reading = read(await send(transport(t, one)));
  const stop = new AbortController();
  const away = transport(t, other);
  assertEquals(await away.reconnectToStream({ chatId: "unknown" }), null);
  const resumed = await away.reconnectToStream({ chatId: "c", abortSignal: stop.signal });
  const watching = read(resumed!, (text) => seen = text);
  for (let n = 1; n <= 2; n++) {
    gate.open();
    await until(() => seen === text(n));
  }
  stop.abort();
  await Promise.all([stopped.promise, watching, reading]);
});

const NUMBERS = {
  keepUnwatched: 0,
  keepEnded: 0,
  maxLog: 0,
  maxTotalLog: 0,
  maxRuns: 0,
  maxRunsPerPeer: 0,
  gather: 0,
} satisfies Options;

test("an option that is no number is refused at once", () => {
  for (const name of Object.keys(NUMBERS)) {
    for (const value of [NaN, -1]) {
      const options = { respond: () => words(1, () => Promise.resolve()), [name]: value };
      assertThrows(() => chatHooks(options), RangeError, name);
    }
  }
});
