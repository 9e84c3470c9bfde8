/**
 * The recipe of docs/ai.md as it stands there, with React, in a browser: declared by
 * ai.react.browser.test.ts for Chromium, and by ai.react.firefox.test.ts.
 *
 * @module
 */
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import type { UIMessage } from "ai";
import { esbuild } from "./bundle.ts";
import { chats, text, words } from "./chats.ts";
import { assert, assertEquals, root, sleep, test, type TestContext, until } from "./harness.ts";
import { listen } from "./pair.ts";
import type { Browser, Tab } from "./webdriver.ts";

const WORDS = 150;
const PACE = 25; // ms a word

declare const globalThis: typeof window;

/** The recipe, and the few lines that put it on a page. */
async function bundle(): Promise<string> {
  const docs = await readFile(join(root, "docs/ai.md"), "utf8");
  const [, recipe] = /^```tsx\n([\s\S]*?)^```$/m.exec(docs)!;
  const input = `${recipe}
    import { createRoot } from "react-dom/client";
    const initial = await (await fetch("/messages")).json();
    createRoot(document.querySelector("main")!).render(<Chat id="c" initial={initial} />);
  `;
  return await esbuild([
    ...["--bundle", "--loader=tsx", "--jsx=automatic", "--format=esm", "--minify"],
    `--alias:duplex-sse/client=${join(root, "client.ts")}`,
    '--define:process.env.NODE_ENV="production"',
  ], { input });
}

interface Site {
  readonly url: string;
  /** What the hooks were told. */
  readonly told: string[];
  readonly isStopped: () => boolean;
}

async function site(t: TestContext, script: string): Promise<Site> {
  const told: string[] = [];
  let messages: UIMessage[] = [];
  let isStopped = false;
  const { url } = await listen(t, {
    hooks: {
      ...chats(t, {
        keepEnded: 60_000,
        respond(request, { signal }) {
          told.push("respond");
          messages = request.messages as UIMessage[];
          signal.addEventListener("abort", () => isStopped = true);
          return words(WORDS, async () => {
            await sleep(PACE, signal);
            signal.throwIfAborted();
          });
        },
      }),
      open: () => void told.push("open"),
    },
  }, (request, next) => {
    const { pathname } = new URL(request.url);
    if (pathname === "/chat") return next(request);
    if (pathname === "/messages") return Response.json(messages);
    const type = pathname === "/script.js" ? "text/javascript" : "text/html";
    const html = `<!DOCTYPE html><title>useChat</title><link rel="icon" href="data:,">
      <main></main><script type="module" src="/script.js"></script>`;
    return new Response(type === "text/html" ? html : script, {
      headers: { "content-type": `${type}; charset=utf-8` },
    });
  });
  return { url, told, isStopped: () => isStopped };
}

/** The texts of the messages of a role. */
const shown = (tab: Tab, role: string): Promise<string[]> =>
  tab.run((role) => {
    return [...document.querySelectorAll(`.${role}`)].map(({ textContent }) => textContent ?? "");
  }, role).catch(() => []); // while it is loaded

async function ask(tab: Tab): Promise<void> {
  await tab.wait(() => !!document.querySelector("input"));
  await tab.run(() => {
    const input = document.querySelector("input")!;
    // React looks at the prototype's setter.
    const { set } = Object.getOwnPropertyDescriptor(
      globalThis.HTMLInputElement.prototype,
      "value",
    )!;
    set!.call(input, "Hello?");
    input.dispatchEvent(new Event("input", { bubbles: true }));
  });
  await tab.run(() => document.querySelector<HTMLButtonElement>("button:not([type])")!.click());
}

async function sees(tab: Tab, least: number): Promise<void> {
  await until(async () => ((await shown(tab, "assistant"))[0] ?? "").length >= least, {
    timeout: 20_000,
    interval: 20,
  });
}

export function reactTests(name: string, open: Browser, skip: string | undefined): void {
  test(`${name}: useChat goes on through four reloads in mid-answer, on one socket`, async (t) => {
    const { url, told } = await site(t, await bundle());
    const tab = await open(t);
    await tab.goto(url);
    await ask(tab);
    for (const least of [20, 100, 180, 260]) {
      await sees(tab, least);
      await tab.goto(url);
    }
    await sees(tab, text(WORDS).length);
    await tab.wait(() => !document.querySelector("button[type=button]")); // it is over
    assertEquals(await shown(tab, "user"), ["Hello?"]);
    assertEquals(await shown(tab, "assistant"), [text(WORDS)]);
    assertEquals(told, ["open", "respond"], "no other session, no other answer");
  }, { timeout: 90_000, skip });

  test(`${name}: useChat stops right after a reload, and asks again`, async (t) => {
    const { url, told, isStopped } = await site(t, await bundle());
    const tab = await open(t);
    await tab.goto(url);
    await ask(tab);
    await sees(tab, 20);
    await tab.goto(url);
    await tab.wait(() => !!document.querySelector("button[type=button]"));
    await tab.run(() => document.querySelector<HTMLButtonElement>("button[type=button]")!.click());
    await until(isStopped);
    const [left = ""] = await shown(tab, "assistant");
    assert(text(WORDS).startsWith(left) && left.length < text(WORDS).length, left);
    await ask(tab);
    await until(() => told.length === 3);
    assertEquals(told, ["open", "respond", "respond"]);
  }, { timeout: 60_000, skip });
}
