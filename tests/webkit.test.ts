/** The client in a page of WebKitGTK, over HTTP/1.1 and over TLS, which is HTTP/2 on Deno. */
import { browserTests } from "./browsers.ts";
import { needs } from "./harness.ts";
import { startWebKit } from "./webdriver.ts";

browserTests("WebKit", await startWebKit(), {
  skip: needs("webkit", "xvfb", "openssl"),
  // Seen with WebKitGTK 2.50 on libsoup 3.2. Our client notices, by the heartbeats that stay away.
  deaf: true,
});
