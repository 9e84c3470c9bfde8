/** The page of examples/ai as people use it, in Chromium: two tabs, a phone, the keyboard. */
import type { Page } from "playwright-core";
import { picture, startChromium } from "./chromium.ts";
import {
  assert,
  assertEquals,
  assertGreater,
  assertLess,
  assertStringIncludes,
  needs,
  test,
  type TestContext,
  until,
} from "./harness.ts";

const browser = await startChromium();
const options = { timeout: 90_000, skip: needs("chromium", "deno") };

async function start(t: TestContext): Promise<string> {
  const child = await t.spawn("deno", "examples/ai/main.ts", { env: { PORT: "0" } });
  return (await child.line({ timeout: 20_000 })).replace("Chat on ", "");
}

/** All that the page's messages say. */
const said = (page: Page): Promise<string> =>
  page.locator("#log").evaluate((log) =>
    [...log.querySelectorAll("article p, article .tool")].map((part) => part.textContent).join("\n")
  );

const idle = (page: Page) => page.locator("#log[aria-busy=false]").waitFor({ timeout: 30_000 });
const busy = (page: Page) => page.locator("#log[aria-busy=true]").waitFor({ timeout: 10_000 });

async function enter(page: Page, text: string): Promise<void> {
  await page.getByLabel("Your message").fill(text);
  await page.keyboard.press("Enter");
}

test("the demo leads to it", async (t) => {
  const child = await t.spawn("deno", "examples/deno.ts", { env: { PORT: "0" } });
  const page = await (await browser.windows(t)).newPage();
  await page.goto((await child.line({ timeout: 20_000 })).replace("Chat on ", ""));
  await page.getByRole("link", { name: "ask a model" }).click();
  await page.getByRole("button", { name: "Tell me a story" }).waitFor();
  await page.getByText("connected", { exact: true }).waitFor();
}, options);

test("two tabs follow one answer; a reload does too; a stop in one stops it in both", async (t) => {
  const url = await start(t);
  const context = await browser.windows(t);
  const ada = await context.newPage();
  await ada.goto(url);
  await ada.getByText("connected", { exact: true }).waitFor();
  const grace = await context.newPage();
  await grace.goto(ada.url());
  await grace.getByText("connected", { exact: true }).waitFor();

  await ada.getByRole("button", { name: "Tell me a story" }).click();
  await until(async () => (await said(ada)).length > 100);
  await until(async () => (await said(grace)).length > 100);
  await ada.reload();
  await until(async () => (await said(ada)).length > 250, { timeout: 20_000 });
  await picture(ada, "ai-chat");
  await idle(ada);
  await idle(grace);
  const whole = await said(ada);
  assertEquals(await said(grace), whole);
  assertEquals(whole.match(/Once upon a time/g)?.length, 1);
  assert(whole.endsWith("not to the wire it comes by."), whole);

  await enter(ada, "Another story, please");
  await busy(grace);
  await until(async () => (await said(grace)).length > whole.length + 100);
  await grace.keyboard.press("Escape");
  await idle(ada);
  await idle(grace);
  const stopped = await said(ada);
  await ada.waitForTimeout(500);
  assertEquals(await said(ada), stopped, "nothing more comes");
  assertLess(stopped.length, 2 * whole.length);
}, options);

test("a tool asks first, is allowed or denied, and an answer is made anew", async (t) => {
  const url = await start(t);
  const context = await browser.windows(t);
  const [page, other] = [await context.newPage(), await context.newPage()];
  await page.goto(url);
  await page.getByRole("button", { name: "Send a postcard to Ada" }).click();
  await page.getByRole("button", { name: "Allow" }).waitFor();
  await other.goto(page.url());
  await other.getByRole("button", { name: "Allow" }).click();
  for (const tab of [page, other]) {
    await until(async () => (await said(tab)).includes("on its way."), { timeout: 10_000 });
    assertStringIncludes(await said(tab), "Sent to Ada");
  }

  await enter(page, "Another postcard");
  await page.getByRole("button", { name: "Deny" }).click();
  await until(async () => (await said(page)).includes("I have sent nothing."), { timeout: 10_000 });
  await enter(page, "Hello");
  await until(async () => (await said(page)).endsWith("You said: Hello"), { timeout: 10_000 });
  await idle(page);
  await page.getByRole("button", { name: "Regenerate" }).click();
  await busy(page);
  await idle(page);
  assertEquals((await said(page)).match(/You said: Hello/g)?.length, 1);
}, options);

test("what is said before it is connected waits in the box, and goes then", async (t) => {
  const url = await start(t);
  const page = await (await browser.windows(t)).newPage();
  let connect = () => {};
  await page.route("**/chat?follow=*", async (route) => {
    await new Promise<void>((resolve) => connect = resolve);
    await route.continue();
  }, { times: 1 });
  const asked = page.waitForRequest("**/chat?follow=*");
  await page.goto(url);
  await asked;
  await page.getByRole("button", { name: "Send a postcard to Ada" }).click();
  assertEquals(await page.inputValue("#text"), "Send a postcard to Ada");
  connect();
  await page.getByRole("button", { name: "Allow" }).waitFor({ timeout: 10_000 });
  assertEquals(await page.inputValue("#text"), "");
}, options);

test("who is at a button by keyboard stays there, whatever comes meanwhile", async (t) => {
  const url = await start(t);
  const page = await (await browser.windows(t)).newPage();
  let answer = () => {};
  await page.route("**/messages?*", async (route) => {
    await new Promise<void>((resolve) => answer = resolve);
    await route.continue();
  });
  const asked = page.waitForRequest("**/messages?*");
  await page.goto(url);
  await asked;
  const story = page.getByRole("button", { name: "Tell me a story" });
  await story.focus();
  const shown = await story.elementHandle();
  answer();
  await page.waitForFunction((button) => !button!.isConnected, shown); // it is another one now
  const at = await page.evaluate(() => document.activeElement?.textContent);
  assertEquals(at, "Tell me a story");
}, options);

for (const colorScheme of ["light", "dark"] as const) {
  test(
    `on a phone nothing is cut off, and the keyboard reaches all of it (${colorScheme})`,
    async (t) => {
      const url = await start(t);
      const context = await browser.windows(t, {
        viewport: { width: 360, height: 640 },
        colorScheme,
        hasTouch: true,
      });
      const page = await context.newPage();
      await page.goto(url);
      await page.getByText("connected", { exact: true }).waitFor();
      assertEquals(await page.evaluate(() => document.activeElement?.id), "text");
      const reached: string[] = [];
      for (let n = 0; n < 6; n++) {
        await page.keyboard.press("Shift+Tab");
        reached.push(await page.evaluate(() => document.activeElement?.textContent?.trim() ?? ""));
      }
      assert(reached.includes("Tell me a story") && reached.includes("New chat"), `${reached}`);
      await enter(page, `Is this cut off? ${"long".repeat(40)}`);
      await idle(page);
      await enter(page, "Tell me a story");
      await until(async () => (await said(page)).length > 500, { timeout: 20_000 });
      const { width, scroll, bottom, height, ratio } = await page.evaluate(() => {
        const { clientWidth, scrollWidth, clientHeight } = document.documentElement;
        const lightness = (color: string) => {
          const [r, g, b] = color.match(/\d+/g)!.map((value) => {
            const part = Number(value) / 255;
            return part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
          });
          return 0.2126 * r! + 0.7152 * g! + 0.0722 * b!;
        };
        const { color, backgroundColor } = getComputedStyle(document.documentElement);
        const [a, b] = [lightness(color), lightness(backgroundColor)];
        return {
          width: clientWidth,
          scroll: scrollWidth,
          height: clientHeight,
          bottom: document.querySelector("#stop")!.getBoundingClientRect().bottom,
          ratio: (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05),
        };
      });
      assertEquals(scroll, width, "nothing to scroll sideways");
      assertLess(bottom, height + 1, "the button that stops is there");
      assertGreater(ratio, 7, "contrast");
      await picture(page, `ai-chat-phone-${colorScheme}`);
      await page.keyboard.press("Escape");
      await idle(page);
    },
    options,
  );
}
