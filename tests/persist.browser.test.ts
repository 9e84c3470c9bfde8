/** Sessions that outlive their page, in Chromium. */
import type { Page } from "playwright-core";
import { startChromium } from "./chromium.ts";
import { needs } from "./harness.ts";
import { persistTests } from "./persist.ts";
import type { Tab } from "./webdriver.ts";

const chromium = await startChromium();
const pages = new WeakMap<Tab, Page>();
const call = (body: unknown, args: unknown[]) => `(${body})(...${JSON.stringify(args)})`;

function tabOf(page: Page): Tab {
  const tab: Tab = {
    goto: async (url) => void await page.goto(url),
    run: (body, ...args) => page.evaluate(call(body, args)),
    wait: async (body, ...args) => void await page.waitForFunction(call(body, args)),
  };
  pages.set(tab, page);
  return tab;
}

persistTests("Chromium", {
  skip: needs("chromium", "openssl"),
  open: async (t) => tabOf(await (await chromium.windows(t)).newPage()),
  async openTwo(t) {
    const context = await chromium.windows(t);
    return [tabOf(await context.newPage()), tabOf(await context.newPage())];
  },
  back: async (tab) => void await pages.get(tab)!.goBack({ waitUntil: "commit" }),
});
