/** Sessions that outlive their page, in Firefox. */
import { needs } from "./harness.ts";
import { persistTests } from "./persist.ts";
import { startFirefox } from "./webdriver.ts";

persistTests("Firefox", { skip: needs("firefox", "openssl"), open: await startFirefox() });
