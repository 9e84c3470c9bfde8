/** Chromium: a page that stops reading, while the browser itself goes on swallowing what comes. */
import type { Page } from "playwright-core";
import { startChromium } from "./chromium.ts";
import { assert, assertEquals, assertLess, needs, sleep, test, until } from "./harness.ts";
import { site, type TestPage } from "./page.ts";

const browser = await startChromium();
const skip = needs("chromium");
const timeout = 60_000;
const SIZE = 64 * 1024;
const WINDOW = 256 * 1024;
const BUFFER = 1024 * 1024;

interface HeldPage extends TestPage {
  /** Every read of the page's event streams waits for it. */
  allowed: Promise<void>;
  allow(): void;
}
declare const globalThis: HeldPage & typeof window;

/** A page whose socket reads only while it is allowed to. */
async function heldPage(page: Page, url: string): Promise<void> {
  await page.goto(`${url}/`);
  await page.waitForFunction(() => !!globalThis.connect);
  await page.evaluate(() => {
    const held = async (input: string, init?: RequestInit) => {
      const response = await fetch(input, init);
      if (response.status !== 200) return response; // no event stream
      const reader = response.body!.getReader();
      const body = new ReadableStream<Uint8Array>({
        async pull(controller) {
          const { done, value } = await reader.read();
          await globalThis.allowed;
          if (done) controller.close();
          else controller.enqueue(value);
        },
        cancel: (reason) => reader.cancel(reason),
      }, { highWaterMark: 0 });
      return new Response(body, { status: response.status, headers: response.headers });
    };
    const socket = globalThis.connect("/ws", { fetch: held });
    return new Promise((resolve) => socket.addEventListener("open", resolve)).then(() => true);
  });
  await page.evaluate(() => {
    globalThis.allowed = new Promise((resolve) => globalThis.allow = resolve);
  });
}

test(
  "a page that stops reading holds a sender that waits for drain, and then gets all",
  async (t) => {
    const { url, peers } = await site(t);
    const page = await (await browser.windows(t)).newPage();
    await heldPage(page, url);
    const peer = await peers.next();
    const count = 256; // 16 MiB: less than what Chromium would swallow
    let sent = 0;
    const sending = (async () => {
      for (; sent < count; sent++) {
        peer.send(`${sent} `.padEnd(SIZE, "x"));
        await peer.waitForDrain();
      }
    })();
    await until(() => peer.bufferedAmount > 0 && sent > 0);
    let before = -1;
    for (; before !== sent; await sleep(300, t.signal)) before = sent; // it stands still
    // What was acknowledged before the stop, a window and one message more.
    assertLess(sent * SIZE, 3 * WINDOW);
    assert(peer.bufferedAmount > 0);

    await page.evaluate(() => globalThis.allow());
    await sending;
    await page.waitForFunction((count) => globalThis.log.length > count, count);
    const got = await page.evaluate(() =>
      globalThis.log.slice(1).map((data) => parseInt(`${data}`))
    );
    assertEquals(got, Array.from({ length: count }, (_, n) => n));
    assertEquals(peer.bufferedAmount, 0);
  },
  { timeout, skip },
);

test(
  "a page that stops reading is closed with 1013 by a sender that does not wait, alone",
  async (t) => {
    const { url, peers, closes } = await site(t, { maxBufferedAmount: BUFFER });
    const context = await browser.windows(t);
    const [slow, quick] = [await context.newPage(), await context.newPage()];
    await heldPage(slow, url);
    await heldPage(quick, url);
    await quick.evaluate(() => globalThis.allow());
    const [stalled, reading] = [await peers.next(), await peers.next()];
    const text = "x".repeat(SIZE);
    let sent = 0;
    for (; stalled.websocket.readyState === 1 && sent < 1000; sent++) {
      stalled.send(text);
      reading.send(`${sent}`);
      await sleep(1, t.signal);
    }
    assertEquals((await closes.next()).code, 1013);
    assertLess(sent * SIZE, BUFFER + 4 * WINDOW);
    assertEquals(stalled.bufferedAmount, 0);

    await quick.waitForFunction((sent) => globalThis.log.length > sent, sent);
    const got = await quick.evaluate(() => globalThis.log.slice(1));
    assertEquals(got, Array.from({ length: sent }, (_, n) => `${n}`));
    await slow.evaluate(() => globalThis.allow());
    await slow.waitForFunction(() => globalThis.socket.readyState === 3);
    const end = await slow.evaluate(() => globalThis.log.at(-1));
    assertEquals(end, { code: 1013, reason: "Too much buffered", wasClean: false });
  },
  { timeout, skip },
);
