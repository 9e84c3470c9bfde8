/**
 * TanStack AI's own client over our socket, by the recipe of docs/ai.md as it stands there.
 */
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { EventType, type StreamChunk } from "@tanstack/ai/client";
import { ChatClient, type ConnectionAdapter, type UIMessage } from "@tanstack/ai-client";
import { esbuild } from "./bundle.ts";
import { chaos } from "./chaos.ts";
import { aborted, chats, Gate, type Options, text } from "./chats.ts";
import {
  assert,
  assertEquals,
  deferred,
  root,
  sleep,
  test,
  type TestContext,
  until,
} from "./harness.ts";
import { listen } from "./pair.ts";

declare const globalThis: typeof window & {
  saved(chat: string): Promise<UIMessage[]>;
  page: { url: string; signal: AbortSignal };
};

/** An answer of so many words, as TanStack AI's `chat()` streams it. */
async function* answer(count: number, next: () => Promise<unknown>): AsyncGenerator<StreamChunk> {
  const ids = { threadId: "c", runId: "of the model" };
  yield { type: EventType.RUN_STARTED, ...ids };
  yield { type: EventType.TEXT_MESSAGE_START, messageId: "a", role: "assistant" };
  for (let n = 0; n < count; n++) {
    await next();
    yield { type: EventType.TEXT_MESSAGE_CONTENT, messageId: "a", delta: `${n} ` };
  }
  yield { type: EventType.TEXT_MESSAGE_END, messageId: "a" };
  yield { type: EventType.RUN_FINISHED, ...ids };
}

/** Serves chats that need no schema of the AI SDK. */
async function serve(t: TestContext, options: Options): Promise<{ url: string; port: number }> {
  return await listen(t, { hooks: chats(t, { validate: undefined, ...options }) });
}

/** The recipe, once for each page. */
async function recipe(t: TestContext): Promise<(url: string) => Promise<ConnectionAdapter>> {
  const docs = await readFile(join(root, "docs/ai.md"), "utf8");
  const text = [...docs.matchAll(/^```ts\n([\s\S]*?)^```$/gm)].map(([, text]) => text!)
    .find((text) => text.includes("@tanstack/ai-client"));
  assert(text);
  const input = text.replace(
    'new WebSocketSSE("/chat")',
    "new WebSocketSSE(globalThis.page.url, { signal: globalThis.page.signal })",
  );
  assert(input !== text);
  const bundled = await esbuild([
    ...["--bundle", "--loader=ts", "--format=esm"],
    `--alias:duplex-sse/client=${join(root, "client.ts")}`,
  ], { input });
  const folder = await mkdtemp(join(root, "node_modules", ".duplex-tanstack-"));
  t.defer(() => rm(folder, { recursive: true }));
  let pages = 0;
  return async (url) => {
    const file = join(folder, `${++pages}.mjs`);
    await writeFile(file, bundled);
    globalThis.page = { url, signal: t.signal };
    return (await import(pathToFileURL(file).href)).connection;
  };
}

/** A page with the chat "c", once it shows what is saved. */
async function page(
  t: TestContext,
  connection: ConnectionAdapter,
  saved: UIMessage[] = [],
): Promise<ChatClient> {
  globalThis.saved = () => Promise.resolve(structuredClone(saved));
  const statuses: string[] = [];
  const client = new ChatClient({
    connection,
    persistence: true,
    threadId: "c",
    onStatusChange: (status) => void statuses.push(status),
  });
  client.attach();
  t.defer(() => client.dispose());
  await until(() => statuses.includes("streaming")); // it has asked for what is under way
  return client;
}

/** As soon as nothing is under way. */
async function ready(client: ChatClient): Promise<ChatClient> {
  await until(() => client.getStatus() === "ready");
  return client;
}

/** The text of all answers that a page shows. */
function shown(client: ChatClient): string {
  return client.getMessages().filter(({ role }) => role === "assistant")
    .flatMap(({ parts }) => parts)
    .map((part) => part.type === "text" ? part.content : `<${part.type}>`).join("");
}

test("TanStack AI's client is answered through cuts, each token once", async (t) => {
  let begun = 0;
  const { port } = await serve(t, {
    respond: ({ messages }) => {
      begun++;
      assertEquals(messages.map(({ role }) => role), ["user"]);
      return answer(200, () => sleep(5));
    },
  });
  const network = t.use(await chaos(port, { seed: 1 }));
  const open = await recipe(t);
  const client = await ready(await page(t, await open(network.url)));
  const cutting = setInterval(() => network.cutAll(), 300);
  t.defer(() => clearInterval(cutting));
  await client.sendMessage("Hello?");
  clearInterval(cutting);
  assertEquals([shown(client), client.getStatus(), begun], [text(200), "ready", 1]);
}, { timeout: 30_000 });

test("TanStack AI's client shows after a reload what is under way, and stops it", async (t) => {
  const gate = new Gate();
  const stopped = deferred();
  const { url } = await serve(t, {
    respond: (_, { signal }) => {
      signal.addEventListener("abort", () => stopped.resolve());
      return answer(100, () => Promise.race([gate.wait(), aborted(signal)]));
    },
  });
  const open = await recipe(t);
  const first = await ready(await page(t, await open(url)));
  const asking = first.sendMessage("Hello?");
  await until(() => first.getStatus() === "streaming");
  for (let n = 1; n <= 3; n++) {
    gate.open();
    await until(() => shown(first) === text(n));
  }
  const second = await page(t, await open(url), first.getMessages().slice(0, 1));
  await until(() => shown(second) === text(3));
  gate.open();
  await until(() => shown(second) === text(4));
  assertEquals(second.getMessages().map(({ role }) => role), ["user", "assistant"]);
  second.stop();
  await stopped.promise;
  await asking;
  assertEquals(shown(first), text(4));
}, { timeout: 30_000 });

test("TanStack AI's client is told of a failure, and no more of it", async (t) => {
  const { url } = await serve(t, {
    respond: () => {
      throw new Error("the key is sk-123");
    },
    onError: () => {},
  });
  const open = await recipe(t);
  const client = await ready(await page(t, await open(url)));
  await client.sendMessage("Hello?");
  assertEquals([client.getStatus(), client.getError()?.message], ["error", "The request failed."]);
});

test("TanStack AI's client stops no answer by waiting no longer for its first chunk", async (t) => {
  const begun = deferred<AbortSignal>();
  const { url } = await serve(t, {
    respond(_, { signal }) {
      begun.resolve(signal);
      return new ReadableStream(); // it thinks
    },
  });
  const open = await recipe(t);
  const first = await ready(await page(t, await open(url)));
  const asking = first.sendMessage("Hello?");
  const signal = await begun.promise;
  const { joinRun } = await open(url);
  const wait = new AbortController();
  const waiting = Array.fromAsync(joinRun!("c", wait.signal));
  await sleep(100); // it is shown the answer, of which there is nothing yet
  wait.abort();
  assertEquals(await waiting, []);
  await sleep(50);
  assertEquals(signal.aborted, false);
  first.stop();
  await until(() => signal.aborted);
  await asking;
});
