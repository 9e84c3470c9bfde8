/** The client in a page of WebKitGTK, over HTTP/1.1 and over TLS, which is HTTP/2 on Deno. */
import { browserTests } from "./browsers.ts";
import { chaos } from "./chaos.ts";
import { assertEquals, needs, test, until } from "./harness.ts";
import { site, type TestPage } from "./page.ts";
import { startWebKit } from "./webdriver.ts";

declare const globalThis: TestPage & typeof window;

const open = await startWebKit();
const skip = needs("webkit", "xvfb", "openssl");

browserTests("WebKit", open, {
  skip,
  // Seen with WebKitGTK 2.50 on libsoup 3.2. Our client notices, by the heartbeats that stay away.
  deaf: true,
});

test("WebKit over HTTP/2: a session outlives a dead connection", async (t) => {
  const { url, port, peers } = await site(t, { tls: true, http2: true, heartbeatInterval: 500 });
  const network = t.use(await chaos(port));
  const tab = await open(t);
  await tab.goto(`${url.replace(`${port}`, `${network.port}`)}/`);
  await tab.wait(() => !!globalThis.connect);
  await tab.run(() =>
    new Promise((resolve) => {
      globalThis.connect("/ws").addEventListener("open", () => resolve(true));
    })
  );
  network.stallAll({ newcomers: false });
  (await peers.next()).send("down");
  await tab.run(() => globalThis.socket.send("up"));
  const heard = () => tab.run(() => globalThis.log.map(String));
  await until(async () => (await heard()).includes("up"), { timeout: 40_000 });
  assertEquals(await heard(), ["open", "drop", "resume", "down", "up"]);
  assertEquals(peers.all.length, 1);
}, { timeout: 60_000, skip });
