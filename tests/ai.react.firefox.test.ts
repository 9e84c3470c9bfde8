/** The recipe of docs/ai.md, in Firefox. */
import { reactTests } from "./ai.react.ts";
import { needs } from "./harness.ts";
import { startFirefox } from "./webdriver.ts";

reactTests("Firefox", await startFirefox(), needs("firefox"));
