/**
 * What our client does in a page of any browser behind something that holds event streams: declared
 * by poll.browser.test.ts for Chromium, and by poll.firefox.test.ts.
 *
 * @module
 */
import { connect, log, show } from "./browsers.ts";
import { assertEquals, assertLess, test } from "./harness.ts";
import { holder, type Holding } from "./holder.ts";
import { site, type TestPage } from "./page.ts";
import type { Browser } from "./webdriver.ts";

declare const globalThis: TestPage & typeof window;

const timeout = 60_000;

const modes: Record<string, Holding> = {
  "all of a stream until its end": { bytes: Infinity },
  "4 KiB at a time": { bytes: 4096 },
  "streams of GETs, and lets those of POSTs pass": { bytes: Infinity, method: "GET" },
};

export function pollTests(name: string, open: Browser, skip: string | undefined): void {
  for (const [what, holding] of Object.entries(modes)) {
    test(`${name} behind something that holds ${what} opens, and both ways work`, async (t) => {
      // What is cut below, by whatever state its connection was in.
      t.expect(/net::ERR_(INCOMPLETE_CHUNKED_ENCODING|EMPTY_RESPONSE|CONNECTION_)/);
      const received: string[] = [];
      const { port, peers, closes } = await site(t, {
        message: (_, message) => void received.push(message.text()),
      });
      const front = t.use(await holder(port, holding));
      const tab = await open(t);
      await show(tab, front.url);
      const began = performance.now();
      await connect(tab);
      assertLess(performance.now() - began, 15_000); // 5 s where the machine is not busy
      const peer = peers.all[0]!;
      const expected = Array.from({ length: 50 }, (_, n) => `${n}`);
      for (const text of expected) {
        peer.send(text);
        await tab.run((text) => globalThis.socket.send(text), text);
        if (text === "20" || text === "40") front.cutAll();
      }
      await tab.wait((last) => globalThis.log.includes(last), "49");
      await tab.wait(() => globalThis.socket.bufferedAmount === 0);
      assertEquals(received, expected);
      const messages = (await log(tab)).filter((each) => /^\d/.test(`${each}`));
      assertEquals(messages, expected);
      assertEquals(await tab.run(() => globalThis.socket.transport), "poll");
      assertEquals(peers.all.length, 1, "nobody else was let in");
      await tab.run(() => globalThis.socket.close(4000, "bye"));
      await tab.wait(() => globalThis.socket.readyState === 3);
      assertEquals((await closes.next()).code, 4000);
    }, { timeout, skip });
  }
}
