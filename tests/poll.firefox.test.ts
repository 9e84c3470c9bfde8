/** Firefox behind something that holds event streams opens by polling. */
import { needs } from "./harness.ts";
import { pollTests } from "./polling.ts";
import { startFirefox } from "./webdriver.ts";

pollTests("Firefox", await startFirefox(), needs("firefox"));
