/** Many tabs over HTTP/1.1, in Firefox. */
import { needs } from "./harness.ts";
import { tabsTests } from "./tabs.ts";
import { startFirefox } from "./webdriver.ts";

tabsTests("Firefox", await startFirefox(), needs("firefox"));
