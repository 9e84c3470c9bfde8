/** examples/ai on Deno, Bun and Node: without a key, and with a provider of the AI SDK. */
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import type { UIMessage } from "ai";
import { modelOf } from "../examples/ai/model.ts";
import { raw, read, send, transport } from "./chats.ts";
import {
  assertEquals,
  assertMatch,
  assertRejects,
  assertStringIncludes,
  needs,
  root,
  type Runtime,
  test,
  type TestContext,
  until,
} from "./harness.ts";

const runtimes: Runtime[] = ["deno", "bun", "node-24"];

async function start(t: TestContext, runtime: Runtime, env = {}): Promise<string> {
  const child = await t.spawn(runtime, "examples/ai/main.ts", {
    flags: { deno: ["run", "-A"], "node-24": ["--no-warnings"] }[runtime as string] ?? [],
    asItIs: true,
    env: { PORT: "0", ...env },
  });
  return (await child.line({ timeout: 20_000 })).replace("Chat on ", "");
}

/** The messages that the server has kept. */
async function kept(url: string, chat: string): Promise<UIMessage[]> {
  return await (await fetch(`${url}messages?chat=${chat}`)).json();
}

for (const runtime of runtimes) {
  const skip = needs(runtime.replace("-24", ""));
  const options = { timeout: 40_000, skip };

  test(`the AI chat on ${runtime} serves its page, and answers without a key`, async (t) => {
    const url = await start(t, runtime);
    for (
      const [path, type, part] of [
        ["", "text/html", 'import { WebSocketSSE } from "./client.js"'],
        ["client.js", "text/javascript", "class WebSocketSSE"],
        ["message.js", "text/javascript", "function apply"],
      ] as const
    ) {
      const response = await fetch(`${url}${path}`);
      assertEquals(response.headers.get("content-type"), `${type}; charset=utf-8`);
      assertStringIncludes(await response.text(), part);
    }
    const missing = await fetch(`${url}missing`);
    assertEquals([missing.status, await missing.text()], [404, "Not found\n"]);
    const home = await fetch(new URL("/", url));
    assertEquals([home.url, home.status], [url, 200]);
    await home.body?.cancel();

    const chat = transport(t, `${url}chat`);
    assertEquals(await read(await send(chat, "c")), "You said: Hello?");
    const messages = await until(async () => {
      const messages = await kept(url, "c");
      return messages.length === 2 && messages;
    });
    assertEquals(messages[1]!.parts, [{ type: "text", text: "You said: Hello?" }]);
  }, options);

  test(
    `the AI chat on ${runtime} asks before it uses a tool, and does what it is told`,
    async (t) => {
      const file = pathToFileURL(join(root, "tests/fixtures/provider.ts")).href;
      for (const env of [{}, { AI_PROVIDER: file, AI_MODEL: "parrot-1" }]) {
        const url = await start(t, runtime, env);
        const chat = await raw(t, `${url}chat?follow=c`);
        const other = await raw(t, `${url}chat?follow=c`);
        const say = async (requestId: string, messages: unknown[], messageId?: string) => {
          const trigger = "submit-message";
          const rest = { id: "c", headers: {}, body: {}, trigger, messageId, messages };
          chat.say({ type: "send", requestId, ...rest });
          assertEquals(await other.hear(), { type: "turn" });
          await until(() => `${chat.messages.all.at(-1)}`.includes('"end"'), { timeout: 15_000 });
          return await until(async () => {
            const now = await kept(url, "c");
            return now.at(-1)?.role === "assistant" && now;
          });
        };
        const question = {
          id: "1",
          role: "user",
          parts: [{ type: "text", text: "A postcard, please" }],
        };
        const asked = await say("1", [question]);
        // deno-lint-ignore no-explicit-any
        const tool = asked[1]!.parts.find(({ type }) => type === "tool-postcard") as any;
        assertEquals([tool.state, tool.input.to], ["approval-requested", "Ada"]);

        tool.state = "approval-responded";
        tool.approval.approved = true;
        chat.messages.all.pop();
        const done = await say("2", asked, asked[1]!.id);
        assertEquals(
          done.map(({ id }) => id),
          asked.map(({ id }) => id),
          "the same message goes on",
        );
        const parts = done[1]!.parts as {
          type: string;
          state?: string;
          output?: string;
          text?: string;
        }[];
        const used = parts.find(({ type }) => type === "tool-postcard")!;
        assertEquals([used.state, used.output], ["output-available", "Sent to Ada"]);
        assertMatch(parts.at(-1)!.text!, /on its way|Sent to Ada/);
      }
    },
    options,
  );
}

test("a provider is its package's export of its name, or the one that is given", async () => {
  const file = pathToFileURL(join(root, "tests/fixtures/provider.ts")).href;
  for (const provider of [file, `${file}#parrots`]) {
    assertEquals(typeof await modelOf(provider, "parrot-1"), "function");
  }
  const { message } = await assertRejects(() => modelOf(`${file}#parrot`, "parrot-1"), Error);
  assertEquals(message, `${file} exports no function "parrot"`);
});
