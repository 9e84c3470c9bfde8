/**
 * Tabs that nobody looks at for minutes, over HTTP/1.1: the browsers let their timers run once a
 * minute then. On demand, by `DUPLEX_SOAK=1`: each takes longer than 6 minutes.
 */
import { startChromium } from "./chromium.ts";
import { needs } from "./harness.ts";
import { soak } from "./measured.ts";
import { hiddenTabsTest } from "./tabs.ts";
import { chromiumTabs, startFirefoxTabs } from "./webdriver.ts";

if (soak) {
  const chromium = await startChromium();
  hiddenTabsTest("Chromium", chromiumTabs(chromium.endpoint), needs("chromium"));
  hiddenTabsTest("Firefox", await startFirefoxTabs(), needs("firefox"));
}
