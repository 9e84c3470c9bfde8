/** Chromium: many sockets of one page, and what stands between it and our server. */
import type { Page } from "playwright-core";
import type { WebSocketSSEOptions } from "../client.ts";
import { chaos } from "./chaos.ts";
import { startChromium } from "./chromium.ts";
import { assert, assertEquals, assertLess, assertMatch, needs, test, until } from "./harness.ts";
import { site, type TestPage } from "./page.ts";
import { type Configuration, proxy, type ProxyName } from "./proxies.ts";

const browser = await startChromium();
const skip = needs("chromium", "openssl");
const timeout = 60_000;

declare const globalThis: TestPage & typeof window;

async function goto(page: Page, url: string): Promise<Page> {
  await page.goto(`${url}/`);
  await page.waitForFunction(() => !!globalThis.connect);
  return page;
}

/** Opens so many sockets in the page. */
function connect(page: Page, count: number, options: WebSocketSSEOptions = {}): Promise<unknown> {
  return page.evaluate(
    ([count, options]) => {
      const opened = Array.from({ length: count }, () => {
        const socket = globalThis.connect("/ws", options);
        return new Promise((resolve) => socket.addEventListener("open", resolve, { once: true }));
      });
      return Promise.all(opened).then(() => true);
    },
    [count, options] as const,
  );
}

test("Chromium over HTTP/2: 20 sockets of one page send and receive at once", async (t) => {
  const { url, peers } = await site(t, { tls: true, http2: true });
  const page = await goto(await (await browser.windows(t)).newPage(), url);
  await connect(page, 20);
  const answers = await page.evaluate(() =>
    Promise.all(globalThis.sockets.map((socket, index) => {
      socket.send(`socket ${index}`);
      return new Promise((resolve) => {
        socket.addEventListener("message", ({ data }) => resolve(data), { once: true });
      });
    }))
  );
  assertEquals(answers, Array.from({ length: 20 }, (_, index) => `socket ${index}`));
  assertEquals(peers.all.length, 20);
  assertEquals(await page.evaluate(() => globalThis.warnings), []);
  assertEquals(
    await page.evaluate(() => [...new Set(globalThis.sockets.map(({ transport }) => transport))]),
    ["stream"],
  );
}, { timeout, skip });

test(
  "Chromium over HTTP/2: a session outlives a dead connection, which Chromium is slow to leave",
  async (t) => {
    const { url, port, peers } = await site(t, {
      ...{ tls: true, http2: true },
      ...{ heartbeatInterval: 500, resumeTimeout: 5_000 },
    });
    const network = t.use(await chaos(port));
    const behind = url.replace(`${port}`, `${network.port}`);
    const page = await goto(await (await browser.windows(t)).newPage(), behind);
    await connect(page, 1);
    network.stallAll({ newcomers: false });
    (await peers.next()).send("down");
    await page.evaluate(() => globalThis.socket.send("up"));
    const heard = () => page.evaluate(() => globalThis.log.map(String));
    await until(async () => (await heard()).includes("up"), { timeout: 40_000 });
    assertEquals(await heard(), ["open", "drop", "resume", "down", "up"]);
    assertEquals(peers.all.length, 1);
  },
  { timeout, skip },
);

test(
  "Chromium over HTTP/1.1: where nothing can be shared the seventh socket says why it waits, and opens when it can",
  async (t) => {
    t.expect("keeps us waiting");
    const { url } = await site(t, { resumeTimeout: 0 }); // a stream cannot be given up for a while
    const context = await browser.windows(t);
    const first = await goto(await context.newPage(), url);
    const second = await goto(await context.newPage(), url); // all tabs have six together
    await connect(first, 6);
    await second.evaluate(() => void globalThis.connect("/ws"));
    await second.waitForFunction(() => globalThis.warnings.length > 0);
    const { warnings, readyState } = await second.evaluate(() => ({
      warnings: globalThis.warnings,
      readyState: globalThis.socket.readyState,
    }));
    assertMatch(warnings.join(), /^127\.0\.0\.1:\d+ keeps us waiting\. .*6 connections.*HTTP\/2/);
    assertEquals(readyState, 0);
    await first.close();
    await second.waitForFunction(() => globalThis.socket.readyState === 1);
    await second.evaluate(() => globalThis.socket.send("hello"));
    await second.waitForFunction(() => globalThis.log.includes("hello"));
    assertEquals(await second.evaluate(() => globalThis.warnings.length), 1);
  },
  { timeout, skip },
);

test(
  "Chromium over HTTP/1.1: five sockets share nothing, a sixth says that it waits, and takes turns",
  async (t) => {
    t.expect("keeps us waiting");
    const { url, peers } = await site(t);
    const page = await goto(await (await browser.windows(t)).newPage(), url);
    await connect(page, 5);
    const held = async () => (await page.evaluate(() => navigator.locks.query())).held!.length;
    assertEquals(await held(), 5);
    const streams = () => page.evaluate(() => globalThis.sockets.map(({ isWaiting }) => isWaiting));
    assertEquals(await streams(), Array(5).fill(false));
    await page.evaluate(() => {
      const waited: boolean[] = [];
      Object.assign(globalThis, { waited });
      setInterval(() => waited.push(globalThis.sockets.some(({ isWaiting }) => isWaiting)), 50);
      globalThis.connect("/ws");
    });
    await until(() => peers.all.length === 6, { timeout: 20_000 });
    const answers = await page.evaluate(() =>
      Promise.all(globalThis.sockets.map((socket, index) => {
        const answer = new Promise((resolve) => {
          socket.addEventListener("message", ({ data }) => resolve(data), { once: true });
        });
        if (socket.readyState === 1) socket.send(`socket ${index}`);
        else socket.addEventListener("open", () => socket.send(`socket ${index}`));
        return answer;
      }))
    );
    assertEquals(answers, Array.from({ length: 6 }, (_, index) => `socket ${index}`));
    const { warnings, waited } = await page.evaluate(() => ({
      warnings: globalThis.warnings,
      waited: (globalThis as unknown as { waited: boolean[] }).waited.includes(true),
    }));
    assert(waited);
    for (const warning of warnings) {
      assertMatch(warning, /keeps us waiting.*serve HTTP\/2/);
    }
    assertEquals(await page.evaluate(() => globalThis.log), ["open", "socket 5"], "no drop");
  },
  { timeout, skip },
);

test(
  "Chromium over HTTP/2: no lock is taken, no channel is opened, a session has one GET",
  async (t) => {
    const { url, requests } = await site(t, { tls: true, http2: true });
    const page = await (await browser.windows(t)).newPage();
    await page.addInitScript(() => {
      Object.assign(globalThis, { channels: 0 });
      const { BroadcastChannel } = globalThis;
      globalThis.BroadcastChannel = class extends BroadcastChannel {
        constructor(name: string) {
          super(name);
          (globalThis as unknown as { channels: number }).channels++;
        }
      };
    });
    await goto(page, url);
    await connect(page, 8);
    const { held, pending } = await page.evaluate(() => navigator.locks.query());
    assertEquals([held, pending], [[], []]);
    assertEquals(
      await page.evaluate(() => (globalThis as unknown as { channels: number }).channels),
      0,
    );
    assertEquals(requests.filter((each) => each.startsWith("GET")).length, 8);
  },
  { timeout, skip },
);

const cases: { name: ProxyName; configuration: Configuration; transport: "stream" | "post" }[] = [
  { name: "nginx", configuration: "shipped", transport: "post" },
  { name: "nginx", configuration: "documented", transport: "stream" },
  { name: "haproxy", configuration: "shipped", transport: "stream" },
  { name: "haproxy", configuration: "documented", transport: "stream" },
  { name: "caddy", configuration: "documented", transport: "stream" },
];

const COUNT = 80;

for (const { name, configuration, transport } of cases) {
  test(
    `Chromium over HTTP/2 by ${name}, as ${configuration}: 5 MB up, and back, by ${transport}`,
    async (t) => {
      const received: string[] = [];
      const { port, requests } = await site(t, {
        message: (peer, message) => {
          const text = message.text();
          received.push(text.slice(0, text.indexOf(" ")));
          peer.send(text);
        },
      });
      const { secure } = await proxy(t, name, port, { configuration });
      const page = await (await browser.windows(t)).newPage();
      let took = Infinity;
      for (let n = 0; n < 5 && took >= 3_000; n++) {
        await goto(page, secure); // a page just loaded remembers nothing
        received.length = 0;
        await connect(page, 1);
        took = await page.evaluate(async () => {
          const began = performance.now();
          const { socket } = globalThis;
          const answered = new Promise((resolve) =>
            socket.addEventListener("message", resolve, { once: true })
          );
          socket.send("first ");
          await answered;
          return performance.now() - began;
        });
      }
      assertLess(took, 3_000);
      const echoes = await page.evaluate(async (count) => {
        const { socket } = globalThis;
        const echoes: string[] = [];
        const all = new Promise<void>((resolve) => {
          socket.onmessage = ({ data }) => {
            echoes.push(`${data.slice(0, data.indexOf(" "))} ${data.length}`);
            if (echoes.length === count) resolve();
          };
        });
        for (let n = 0; n < count; n++) socket.send(`${n} `.padEnd(65536, "x"));
        await all;
        return echoes;
      }, COUNT);
      const numbers = Array.from({ length: COUNT }, (_, n) => `${n}`);
      assertEquals(received, ["first", ...numbers]);
      assertEquals(echoes, numbers.map((n) => `${n} 65536`));
      assertEquals(await page.evaluate(() => globalThis.socket.transport), transport);
      if (transport === "stream") return;
      // The next socket of the page begins with what has worked.
      const before = requests.length;
      await connect(page, 1);
      assertEquals(await page.evaluate(() => globalThis.socket.transport), transport);
      await page.evaluate(() => globalThis.socket.send("again "));
      await page.waitForFunction(() => globalThis.log.includes("again "));
      const posts = requests.slice(before).filter((each) => each.startsWith("POST"));
      assert(posts.length > 0);
      assert(posts.every((each) => each === "POST"), "one of them streamed"); // ACKs may go beside
    },
    { timeout, skip: needs(name, "chromium", "openssl") },
  );
}
