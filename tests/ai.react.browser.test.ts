/** The recipe of docs/ai.md, in Chromium. */
import { reactTests } from "./ai.react.ts";
import { startChromium } from "./chromium.ts";
import { needs } from "./harness.ts";
import type { Tab } from "./webdriver.ts";

const chromium = await startChromium();

reactTests("Chromium", async (t) => {
  const page = await (await chromium.windows(t)).newPage();
  const call = (body: unknown, args: unknown[]) => `(${body})(...${JSON.stringify(args)})`;
  const tab: Tab = {
    goto: async (url) => void await page.goto(url),
    run: (body, ...args) => page.evaluate(call(body, args)),
    wait: async (body, ...args) => void await page.waitForFunction(call(body, args)),
  };
  return tab;
}, needs("chromium"));
