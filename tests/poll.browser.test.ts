/** Chromium behind something that holds event streams opens by polling. */
import { startChromium } from "./chromium.ts";
import { needs } from "./harness.ts";
import { pollTests } from "./polling.ts";

const chromium = await startChromium();

pollTests("Chromium", async (t) => {
  const page = await (await chromium.windows(t)).newPage();
  const call = (body: unknown, args: unknown[]) => `(${body})(...${JSON.stringify(args)})`;
  return {
    goto: async (url) => void await page.goto(url),
    run: (body, ...args) => page.evaluate(call(body, args)),
    wait: async (body, ...args) => void await page.waitForFunction(call(body, args)),
  };
}, needs("chromium"));
