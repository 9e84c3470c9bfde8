/** Many tabs over HTTP/1.1, in Chromium. */
import type { Page } from "playwright-core";
import type { WebSocketSSE } from "../client.ts";
import { startChromium } from "./chromium.ts";
import { assertEquals, needs, test, until } from "./harness.ts";
import { site } from "./page.ts";
import { program, type TabState, tabsTests } from "./tabs.ts";

const chromium = await startChromium();

tabsTests("Chromium", async (t) => {
  const page = await (await chromium.windows(t)).newPage();
  const call = (body: unknown, args: unknown[]) => `(${body})(...${JSON.stringify(args)})`;
  return {
    goto: async (url) => void await page.goto(url),
    run: (body, ...args) => page.evaluate(call(body, args)),
    wait: async (body, ...args) => void await page.waitForFunction(call(body, args)),
  };
}, needs("chromium"));

declare const globalThis: { socket: WebSocketSSE; state: TabState } & typeof window;

test(
  "Chromium: six tabs that are frozen hold two others up for no longer than they must",
  async (t) => {
    const received = new Map<string, number>();
    const { url, peers } = await site(t, {
      program,
      resumeTimeout: 8_000,
      heartbeatInterval: 2_000,
      message: (peer) => void received.set(peer.id, (received.get(peer.id) ?? 0) + 1),
    });
    const context = await chromium.windows(t);
    const pages: Page[] = [];
    for (let n = 1; n <= 8; n++) {
      const page = await context.newPage();
      await page.goto(`${url}/program?tab=${n}`);
      await until(() => peers.all.length === n, { timeout: 20_000 });
      pages.push(page);
    }
    for (const page of pages.slice(0, 6)) {
      const session = await context.newCDPSession(page);
      await session.send("Page.setWebLifecycleState", { state: "frozen" });
    }
    received.clear();
    const others = peers.all.slice(6);
    for (const peer of others) peer.send(`1 ${Date.now()}`);
    for (const page of pages.slice(6)) {
      await page.waitForFunction(() => globalThis.state.seen.length === 1);
    }
    await until(() => others.every(({ id }) => received.get(id)! >= 2), { timeout: 20_000 });
    for (const page of pages.slice(6)) {
      const { seen, events } = await page.evaluate(() => globalThis.state);
      assertEquals([seen, events], [[1], []]);
    }
  },
  { timeout: 90_000, skip: needs("chromium") },
);
