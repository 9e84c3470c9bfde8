/** The chat page as two people see it, in two tabs of Chromium, served by Deno and by Bun. */
import type { Page } from "playwright-core";
import { picture, startChromium } from "./chromium.ts";
import {
  assertEquals,
  assertGreater,
  assertMatch,
  freePort,
  needs,
  test,
  type TestContext,
  until,
} from "./harness.ts";

const browser = await startChromium();
const timeout = 90_000;

/** Starts an example on a free port; the address of its page. */
async function start(t: TestContext, server: "deno" | "bun"): Promise<string> {
  return (await run(t, server, 0)).url;
}

async function run(t: TestContext, server: "deno" | "bun", port: number) {
  const child = await t.spawn(server, `examples/${server}.ts`, { env: { PORT: `${port}` } });
  return { child, url: (await child.line()).replace("Chat on ", "") };
}

/** What a part of the page says, one string an element. */
function texts(page: Page, selector: string): Promise<string[]> {
  return page.locator(selector).allTextContents();
}

/** Waits until a part of the page says exactly this. */
async function sees(page: Page, selector: string, expected: string[]): Promise<void> {
  let last: string[] = [];
  await until(async () => {
    last = await texts(page, selector);
    return JSON.stringify(last) === JSON.stringify(expected);
  }, { timeout: 20_000, interval: 50 }).catch(() => {});
  assertEquals(last, expected, `${selector} in the tab`);
}

async function enter(page: Page, url: string, name: string): Promise<void> {
  await page.goto(url);
  await sees(page, "#state", ["open"]);
  await page.fill("#name", name);
  await page.press("#name", "Enter");
  await page.waitForFunction(
    (name) => document.querySelector("#who [data-me]")?.textContent === name,
    name,
  );
}

async function say(page: Page, text: string): Promise<void> {
  await page.fill("#text", text);
  await page.press("#text", "Enter");
}

const messages = "#log [data-testid=message] p";

for (const server of ["deno", "bun"] as const) {
  test(`two tabs chat through ${server}`, async (t) => {
    const url = await start(t, server);
    const context = await browser.windows(t);
    const [ada, grace] = [await context.newPage(), await context.newPage()];
    await enter(ada, url, "Ada");
    await enter(grace, url, "Grace");
    for (const page of [ada, grace]) await sees(page, "#who li", ["Ada", "Grace"]);

    await say(ada, "Good morning!");
    for (const page of [ada, grace]) await sees(page, messages, ["Good morning!"]);
    await say(grace, "Hello, Ada. Can you read this?");
    const before = ["Good morning!", "Hello, Ada. Can you read this?"];
    for (const page of [ada, grace]) {
      await sees(page, messages, before);
      await sees(page, "#log [data-testid=message] b", ["Ada", "Grace"]);
      await sees(page, "#transport", ["post"]); // over HTTP/1.1 a browser cannot stream
      await page.waitForFunction(() => /\d ms$/.test(document.querySelector("#rtt")!.textContent!));
    }
    await picture(ada, `chat-${server}-open`);

    t.expect("Failed to load resource", "The network of a tab was cut");
    await ada.click("#cut");
    const cut = performance.now();
    await sees(ada, "#state", ["reconnecting"]);
    const lost = ["I am in a tunnel", "Nobody hears this yet", "Or is it kept?"];
    const meanwhile = ["Ada?", "Are you there?"];
    for (const text of lost) await say(ada, text);
    await sees(ada, "#outbox p", lost);
    for (const text of meanwhile) await say(grace, text);
    await picture(ada, `chat-${server}-cut`);
    await sees(ada, "#state", ["reconnected"]);
    assertGreater(performance.now() - cut, 4_900); // for 5 s it answered with 503
    await sees(ada, "#outbox p", []);
    await sees(
      grace,
      messages,
      await until(async () => {
        const all = await texts(ada, messages);
        return all.length >= before.length + lost.length + meanwhile.length && all;
      }, { timeout: 20_000 }),
    );
    // Each exactly once; who came first the server decides, but each one's are in order.
    const after = (await texts(ada, messages)).slice(before.length);
    assertEquals(after.filter((text) => !meanwhile.includes(text)), lost);
    assertEquals(after.filter((text) => !lost.includes(text)), meanwhile);
    await sees(ada, "#resumes", ["1"]);
    await sees(grace, "#resumes", ["0"]);
    assertMatch((await texts(ada, ".note")).join("\n"), /^Connection lost.*\nResumed after \d/);
    assertGreater(Number((await texts(ada, "#resent"))[0]), 0);
    // Both charts are drawn: a line and bars, shaded while the network was down.
    await ada.waitForFunction(() => {
      const drawn = (selector: string) => document.querySelector(selector)!.getAttribute("d");
      const [line, bars] = [drawn("#rtt-line")!, drawn("#rate-bars")!];
      return /^M.*[hL]/.test(line) && /v-(?!0h)/.test(bars) && /h1v20h-1z/.test(drawn(".down")!);
    });
    await picture(ada, `chat-${server}-reconnected`);

    await ada.click("#close");
    await sees(ada, "#closed p", ["Closed with code 1000: closed on this page"]);
    await sees(ada, "#state", ["closed"]);
    await sees(ada, "#who li", []);
    await sees(grace, "#who li", ["Grace"]);
    await picture(ada, `chat-${server}-closed`);

    await ada.click("#reconnect");
    for (const page of [ada, grace]) await sees(page, "#who li", ["Grace", "Ada"]);
    await ada.close();
    await sees(grace, "#who li", ["Grace"]);
  }, { timeout, skip: needs("chromium") });
}

test("the chat is usable by keyboard on a narrow, dark screen", async (t) => {
  const url = await start(t, "bun");
  const context = await browser.windows(t, {
    viewport: { width: 360, height: 640 },
    colorScheme: "dark",
  });
  const page = await context.newPage();
  await enter(page, url, "Someone with a long name");
  await page.locator("#text:focus").waitFor(); // leaving the name leads to the message
  await page.keyboard.type("Typed without a mouse, and long enough that it needs two lines");
  await page.keyboard.press("Enter");
  await sees(page, messages, ["Typed without a mouse, and long enough that it needs two lines"]);
  await picture(page, "chat-narrow-dark");
  const { scroll, width } = await page.evaluate(() => ({
    scroll: document.documentElement.scrollWidth,
    width: document.documentElement.clientWidth,
  }));
  assertEquals(scroll, width, "nothing sticks out to the right");
  const reached: string[] = [];
  while (reached.length < 4 && !reached.includes("close")) {
    await page.keyboard.press("Shift+Tab");
    reached.push(await page.evaluate(() => document.activeElement!.id));
  }
  assertEquals(reached, ["messages", "close"]);
  await page.keyboard.press("Enter");
  await sees(page, "#state", ["closed"]);
  await page.locator("#reconnect:focus").waitFor();
  await picture(page, "chat-narrow-dark-closed");
}, { timeout, skip: needs("chromium") });

test("a server that restarts is found again, and what was written meanwhile arrives", async (t) => {
  t.expect(/ERR_CONNECTION_REFUSED|ERR_INCOMPLETE_CHUNKED_ENCODING/); // while there is no server
  const port = await freePort();
  const first = await run(t, "bun", port);
  const context = await browser.windows(t);
  const [ada, grace] = [await context.newPage(), await context.newPage()];
  await enter(ada, first.url, "Ada");
  await ada.locator("#alone").waitFor(); // it tells how to invite somebody
  await enter(grace, first.url, "Grace");
  await ada.locator("#alone").waitFor({ state: "hidden" });
  await ada.fill("#text", "half a sen");
  first.child.kill("SIGTERM");
  await first.child.exited;
  for (const page of [ada, grace]) await sees(page, "#state", ["reconnecting"]);
  await say(grace, "Written while nobody listened");
  await sees(grace, "#outbox p", ["Written while nobody listened"]);
  await picture(grace, "chat-restarting");

  await run(t, "bun", port);
  for (const page of [ada, grace]) await sees(page, "#state", ["open"]);
  await sees(grace, messages, ["Written while nobody listened"]);
  await sees(grace, "#outbox p", []);
  // Who comes back later has missed it: the server keeps no history, and says so.
  await until(async () => /no memory of before/.test((await texts(ada, ".note")).join()));
  assertEquals(await ada.inputValue("#text"), "half a sen");
  await picture(grace, "chat-restarted");

  // One that is not there is given up where the person says so.
  await ada.click("#close");
  await sees(ada, "#closed p", ["Closed with code 1000: closed on this page"]);
  await sees(grace, "#who li", ["Grace"]);
}, { timeout, skip: needs("chromium") });

const SCREENS = {
  phone: [390, 844],
  "phone on its side": [844, 390],
  laptop: [1280, 720],
} as const;
for (const [screen, [width, height]] of Object.entries(SCREENS)) {
  for (const colorScheme of ["light", "dark"] as const) {
    test(`the chat fits a ${screen}, ${colorScheme}`, async (t) => {
      const url = await start(t, "bun");
      const context = await browser.windows(t, { viewport: { width, height }, colorScheme });
      const page = await context.newPage();
      await enter(page, url, "Ada");
      await picture(page, `chat-${width}-${colorScheme}-alone`);
      for (const text of ["Good morning!", "Is anybody there?"]) await say(page, text);
      await sees(page, messages, ["Good morning!", "Is anybody there?"]);
      await picture(page, `chat-${width}-${colorScheme}`);
      const outside = await page.evaluate(() => {
        const { scrollWidth, scrollHeight, clientWidth, clientHeight } = document.documentElement;
        const parts = [
          ...document.querySelectorAll("#cut, #close, #hint, #text, #send, #name, #rate"),
        ];
        const details = document.querySelector("#details")!;
        return {
          page: [scrollWidth - clientWidth, scrollHeight - clientHeight],
          details: [
            details.scrollWidth - details.clientWidth,
            details.scrollHeight - details.clientHeight,
          ],
          parts: parts.filter((part) => part.checkVisibility()).filter((part) => {
            const { top, left, right, bottom } = part.getBoundingClientRect();
            return top < 0 || left < 0 || right > innerWidth || bottom > innerHeight;
          }).map(({ id }) => id),
        };
      });
      assertEquals(outside, { page: [0, 0], details: [0, 0], parts: [] });
    }, { timeout, skip: needs("chromium") });
  }
}
