/** The client in a page of Firefox, over HTTP/1.1 and over TLS, which is HTTP/2 on Deno. */
import { browserTests } from "./browsers.ts";
import { needs } from "./harness.ts";
import { startFirefox } from "./webdriver.ts";

browserTests("Firefox", await startFirefox(), { skip: needs("firefox", "openssl") });
