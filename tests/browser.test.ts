/** The client in a page of Chromium, over HTTP/1.1 and HTTP/2, and what only Chromium is asked. */
import type { Page } from "playwright-core";
import type { WebSocketSSEOptions } from "../client.ts";
import { browserTests, closed, connect, log, show } from "./browsers.ts";
import { startChromium } from "./chromium.ts";
import { assert, assertEquals, needs, test, type TestContext } from "./harness.ts";
import { site, type TestPage } from "./page.ts";
import type { Tab } from "./webdriver.ts";

const browser = await startChromium();
const skip = needs("chromium", "openssl");
const timeout = 60_000;

declare const globalThis: TestPage & typeof window;

/** A window, as Playwright and as the tests of all browsers drive it. */
async function open(t: TestContext): Promise<{ page: Page; tab: Tab }> {
  const page = await (await browser.windows(t)).newPage();
  const call = (body: unknown, args: unknown[]) => `(${body})(...${JSON.stringify(args)})`;
  const tab: Tab = {
    goto: async (url) => void await page.goto(url),
    run: (body, ...args) => page.evaluate(call(body, args)),
    wait: async (body, ...args) => void await page.waitForFunction(call(body, args)),
  };
  return { page, tab };
}

/** A window that shows the page of a site. */
async function visit(t: TestContext, url: string): Promise<{ page: Page; tab: Tab }> {
  const { page, tab } = await open(t);
  await show(tab, url);
  return { page, tab };
}

browserTests("Chromium", async (t) => (await open(t)).tab, { skip, streams: true });

for (const tls of [false, true]) {
  test(
    `Chromium over HTTP/${tls ? 2 : "1.1"}: a tab that is closed ends its session at once, by 1001`,
    async (t) => {
      const { url, closes } = await site(t, { tls, http2: tls });
      const { page, tab } = await visit(t, url);
      await connect(tab);
      await page.close();
      assertEquals((await closes.next({ timeout: 10_000 })).code, 1001);
    },
    { timeout, skip },
  );
}

test("Chromium over HTTP/1.1: a stream that it refuses to send becomes a post", async (t) => {
  t.expect("Failed to load resource: net::ERR_ALPN_NEGOTIATION_FAILED");
  const { url } = await site(t);
  const { tab } = await visit(t, url);
  await connect(tab, { transport: "stream" });
  await tab.run(() => ["one", "two"].forEach((text) => globalThis.socket.send(text)));
  await tab.wait(() => globalThis.log.length === 3);
  assertEquals(await log(tab), ["open", "one", "two"]);
  assertEquals(await tab.run(() => globalThis.socket.transport), "post");
}, { timeout, skip });

test(
  "Chromium: a page back from the back/forward cache finds its socket closed",
  async (t) => {
    const { url, closes } = await site(t);
    const { page, tab } = await visit(t, url);
    await connect(tab);
    await page.goto(`${url}/other`);
    assertEquals((await closes.next()).code, 1001);
    await page.goBack({ waitUntil: "commit" }); // it is not loaded again
    await tab.wait(() => globalThis.persisted !== undefined);
    assert(await tab.run(() => globalThis.persisted), "the page was not kept");
    assertEquals(await closed(tab), { code: 1001, reason: "", wasClean: false });
    assertEquals(await log(tab), ["open", { code: 1001, reason: "", wasClean: false }]);
    await connect(tab); // and it can connect again
    await tab.run(() => globalThis.socket.send("again"));
    await tab.wait(() => globalThis.log.includes("again"));
  },
  { timeout, skip },
);

const REFUSED = "has been blocked by CORS policy";

test("Chromium: another origin is refused while cors is off", async (t) => {
  t.expect(REFUSED, "Failed to load resource", "Not opened: a request failed");
  let hooks = 0;
  const api = await site(t, { hooks: { upgrade: () => void hooks++ } });
  const { tab } = await visit(t, (await site(t)).url);
  await tab.run((url) => void globalThis.connect(url), `${api.url}/ws`);
  assertEquals(await closed(tab), { code: 1006, reason: "", wasClean: false });
  assertEquals(await log(tab), ["error", { code: 1006, reason: "", wasClean: false }]);
  assertEquals([hooks, api.peers.all.length], [0, 0]);
  // The browser knows more than it tells its pages, and writes that to the same place.
  const { host } = new URL(api.url);
  assertEquals(await tab.run(() => globalThis.warnings), [`${host} Not opened: a request failed`]);
}, { timeout, skip });

test("Chromium: another origin on the allow-list, with credentials", async (t) => {
  t.expect(REFUSED, "Failed to load resource", "Not opened: a request failed");
  const { page, tab } = await visit(t, (await site(t)).url);
  const { origin } = new URL(page.url());
  let cookie: string | null = null;
  const api = await site(t, {
    cors: [origin],
    hooks: { upgrade: (request) => void (cookie = request.headers.get("cookie")) },
  });
  const echo = async (options: WebSocketSSEOptions) => {
    await connect(tab, { headers: { "x-app": "1" }, ...options }, `${api.url}/ws`);
    await tab.run(() => globalThis.socket.send("hello"));
    await tab.wait(() => globalThis.log.includes("hello"));
    return cookie;
  };
  assertEquals(await echo({}), null, "no cookie goes along uninvited");
  assertEquals(await echo({ credentials: "include" }), "user=ada");
  await page.close();
  // Also from another origin the server is told that the page has gone.
  for (const _ of [1, 2]) assertEquals((await api.closes.next({ timeout: 10_000 })).code, 1001);

  const { tab: strange } = await visit(t, (await site(t)).url);
  await strange.run((url) => void globalThis.connect(url), `${api.url}/ws`);
  assertEquals(await closed(strange), { code: 1006, reason: "", wasClean: false });
  assertEquals(api.peers.all.length, 2);
}, { timeout, skip });

test(
  "Chromium over HTTP/2: a worker of a bundled script streams once its origin is known to it",
  async (t) => {
    const { url } = await site(t, { tls: true, http2: true });
    const { tab } = await visit(t, url);
    const transports = await tab.run(async () => {
      const client = await (await fetch("/client.js")).text();
      const program = async () => {
        const transports: string[] = [];
        const { WebSocketSSE } = await import(globalThis.name);
        for (let n = 0; n < 2; n++) {
          const socket = new WebSocketSSE(`${globalThis.origin}/ws`);
          await new Promise((resolve) => socket.onopen = resolve);
          socket.send("hello");
          await new Promise((resolve) => socket.onmessage = resolve);
          transports.push(socket.transport);
          const closed = new Promise((resolve) => socket.onclose = resolve);
          socket.close();
          await closed;
        }
        postMessage(transports);
      };
      const blob = (text: string) =>
        URL.createObjectURL(new Blob([text], { type: "text/javascript" }));
      const name = blob(client);
      const worker = new Worker(blob(`(${program})()`), { type: "module", name });
      return await new Promise<string[]>((resolve) =>
        worker.onmessage = ({ data }) => resolve(data)
      );
    });
    assertEquals(transports, ["post", "stream"]);
  },
  { timeout, skip },
);
