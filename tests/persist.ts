/**
 * Sessions that outlive their page: declared by persist.browser.test.ts for Chromium, and by
 * persist.firefox.test.ts.
 *
 * @module
 */
import type { WebSocketSSE } from "../client.ts";
import type { Peer } from "../server.ts";
import {
  assert,
  assertEquals,
  assertLess,
  sleep,
  test,
  type TestContext,
  until,
} from "./harness.ts";
import { type Site, site } from "./page.ts";
import { Queue } from "./pair.ts";
import type { Tab } from "./webdriver.ts";

const timeout = 90_000;

interface State {
  /** Numbers that came. */
  seen: number[];
  sent: number;
  /** What each socket that opened said of its session. */
  resumed: boolean[];
  events: unknown[];
}

declare const globalThis: {
  WebSocketSSE: typeof WebSocketSSE;
  socket: WebSocketSSE;
  state: State;
  /** Our keys in `sessionStorage`. */
  stored(): string[];
} & typeof window;

/** An application that keeps what it has made of its messages, as docs/pages.md tells it to. */
function program(): void {
  const saved = sessionStorage.getItem("app");
  const state: State = globalThis.state = saved
    ? JSON.parse(saved)
    : { seen: [], sent: 0, resumed: [], events: [] };
  // Before the socket is made: its own handler comes after.
  addEventListener("pagehide", () => sessionStorage.setItem("app", JSON.stringify(state)));
  globalThis.stored = () => Object.keys(sessionStorage).filter((key) => key.startsWith("duplex"));
  const persist = !location.search.includes("fresh");
  const socket = globalThis.socket = new globalThis.WebSocketSSE("/ws", { persist });
  socket.onopen = () => state.resumed.push(socket.resumed);
  socket.onmessage = ({ data }) => state.seen.push(Number(data));
  for (const type of ["drop", "resume", "error"]) {
    socket.addEventListener(type, () => state.events.push(type));
  }
  socket.addEventListener("close", ({ code }) => state.events.push(code));
  setInterval(() => {
    if (socket.readyState === 1) socket.send(`${++state.sent}`);
  }, 20);
}

interface Conversation extends Site {
  received: number[];
  sent(peer: Peer): number;
}

/** A site whose peers count to their clients, and write down what these count. */
async function conversation(t: TestContext, tls: boolean): Promise<Conversation> {
  const received: number[] = [];
  const counts = new Map<string, number>();
  const peers = new Queue<Peer>();
  const options = await site(t, {
    tls,
    http2: tls,
    program,
    message: (_, message) => void received.push(Number(message.text())),
    hooks: {
      open(peer) {
        peers.push(peer);
        const counting = setInterval(() => {
          const count = (counts.get(peer.id) ?? 0) + 1;
          if (peer.send(`${count}`)) counts.set(peer.id, count);
        }, 20);
        t.defer(() => clearInterval(counting));
      },
    },
  });
  return { ...options, peers, received, sent: (peer) => counts.get(peer.id) ?? 0 };
}

const numbers = (last: number) => Array.from({ length: last }, (_, n) => n + 1);
const isOpen = () => globalThis.socket?.readyState === 1;
const state = (tab: Tab) => tab.run(() => globalThis.state);

export interface PersistBrowser {
  skip: string | undefined;
  /** A window. */
  open(t: TestContext): Promise<Tab>;
  /** Two of one profile. */
  openTwo?(t: TestContext): Promise<[Tab, Tab]>;
  /** Back in the history, to a page that was kept. */
  back?(tab: Tab): Promise<void>;
}

export function persistTests(name: string, { skip, open, openTwo, back }: PersistBrowser): void {
  const check = (what: string, body: (t: TestContext) => Promise<void>, can = true) =>
    can && test(`${name}: ${what}`, body, { timeout, skip });

  for (const [tls, reloads] of [[false, 20], [true, 8]] as const) {
    check(
      `${reloads} reloads under traffic lose nothing and repeat nothing (${
        tls ? "TLS" : "HTTP/1.1"
      })`,
      async (t) => {
        const { url, peers, closes, received, sent } = await conversation(t, tls);
        const tab = await open(t);
        await tab.goto(`${url}/program`);
        await tab.wait(isOpen);
        for (let n = 0; n < reloads; n++) {
          if (n % 5) await tab.wait(isOpen); // now and then it has not opened yet
          await sleep(n % 2 ? 50 : 150);
          await tab.goto(`${url}/program`);
        }
        await tab.wait(isOpen);
        await sleep(200);
        assertEquals(await tab.run(() => globalThis.stored()), [], "empty while the page lives");
        await tab.run(() =>
          new Promise((resolve) => {
            globalThis.socket.onclose = resolve;
            globalThis.socket.close();
          })
        );
        const end = await state(tab);
        assertEquals((await closes.next()).code, 1005);
        assertEquals(
          [peers.all.length, closes.all.length],
          [1, 1],
          "one session, as its hooks see it",
        );
        assertEquals(end.seen, numbers(end.seen.length));
        assert(
          sent(peers.all[0]!) - end.seen.length < 10,
          "all but what was on its way at the end",
        );
        assertEquals(received, numbers(end.sent));
        assertEquals(end.resumed.shift(), false);
        assert(end.resumed.length > reloads / 2 && end.resumed.every(Boolean), `${end.resumed}`);
        assert(!end.events.includes("error"), `${end.events}`);
        assertEquals(end.events.filter((event) => typeof event === "number"), [1005]);
      },
    );
  }

  check("a tab that is left for good is missed in 5 s, by 1001", async (t) => {
    t.expect("Failed to load resource");
    const { url, peers, closes } = await conversation(t, false);
    const tab = await open(t);
    await tab.goto(`${url}/program`);
    await tab.wait(isOpen);
    const left = performance.now();
    await tab.goto(`${url}/other`); // Firefox, when busy, forgets what is stored on the way to another site
    assertEquals((await closes.next({ timeout: 15_000 })).code, 1001);
    assertLess(performance.now() - left, 10_000); // 4.5 s where the machine is not busy
    await tab.goto(`${url}/program`); // too late
    await tab.wait(isOpen);
    const { resumed, events } = await state(tab);
    assertEquals([resumed, events.includes("error")], [[false, false], false]);
    assertEquals(peers.all.length, 2);
  });

  check(
    "a session that the server has ended meanwhile begins anew, without an error",
    async (t) => {
      t.expect("Failed to load resource");
      const { url, peers } = await conversation(t, false);
      const tab = await open(t);
      await tab.goto(`${url}/program`);
      await tab.wait(isOpen);
      await tab.goto(`${url}/other`);
      (await peers.next()).terminate();
      await tab.goto(`${url}/program`);
      await tab.wait(isOpen);
      const { resumed, events } = await state(tab);
      assertEquals([resumed, events.includes("error")], [[false, false], false]);
    },
  );

  check("without persist nothing is stored, and the server hears 1001 at once", async (t) => {
    const { url, closes } = await conversation(t, false);
    const tab = await open(t);
    await tab.goto(`${url}/program?fresh`);
    await tab.wait(isOpen);
    await tab.goto(`${url}/program?fresh`);
    assertEquals((await closes.next()).code, 1001);
    await tab.wait(isOpen);
    assertEquals(await tab.run(() => globalThis.stored()), []);
    assertEquals((await state(tab)).resumed, [false, false]);
  });

  check("a tab that was duplicated begins anew, and the first is undisturbed", async (t) => {
    const { url, peers } = await conversation(t, false);
    const [first, second] = await openTwo!(t);
    await first.goto(`${url}/program`);
    await first.wait(isOpen);
    await first.goto(`${url}/other`);
    const copy = await first.run(() => ({ ...sessionStorage }));
    assertEquals(Object.keys(copy).length, 2);
    await second.goto(`${url}/other`);
    await second.run((copy) => void Object.assign(sessionStorage, copy), copy);
    await first.goto(`${url}/program`);
    await first.wait(isOpen);
    await second.goto(`${url}/program`);
    await second.wait(isOpen);
    assertEquals((await state(first)).resumed, [false, true]);
    assertEquals((await state(second)).resumed, [false, false]);
    await until(async () => (await state(first)).seen.length > 20);
    const { seen, events } = await state(first);
    assertEquals(seen, numbers(seen.length));
    assert(!events.includes("error"));
    assertEquals(peers.all.length, 2);
  }, !!openTwo);

  check("a page back from the back/forward cache goes on", async (t) => {
    const { url, peers, closes, received } = await conversation(t, false);
    const tab = await open(t);
    await tab.goto(`${url}/program`);
    await tab.wait(isOpen);
    await tab.run(() => void (globalThis.name = "kept"));
    await tab.goto(`${url}/other`);
    await back!(tab);
    await tab.wait(() => globalThis.state?.events.includes("resume"));
    await sleep(200);
    assertEquals(await tab.run(() => globalThis.stored()), []);
    await tab.run(() => globalThis.socket.close());
    assertEquals((await closes.next()).code, 1005);
    const { seen, sent, resumed, events } = await state(tab);
    assertEquals([seen, received], [numbers(seen.length), numbers(sent)]);
    assertEquals([resumed, peers.all.length], [[false], 1]);
    assertEquals(events.slice(0, 2), ["drop", "resume"]);
  }, !!back);

  check("a page that is left again before it has its session back keeps it", async (t) => {
    const { url, peers, closes, received } = await conversation(t, false);
    const tab = await open(t);
    await tab.goto(`${url}/program`);
    await tab.wait(isOpen);
    await tab.run(() => {
      for (const type of ["pagehide", "pageshow", "pagehide", "pageshow"]) {
        dispatchEvent(new PageTransitionEvent(type, { persisted: true }));
      }
    });
    await tab.wait(() => globalThis.state?.events.includes("resume"));
    await tab.run(() => globalThis.socket.close());
    assertEquals((await closes.next()).code, 1005);
    const { seen, sent, events } = await state(tab);
    assertEquals([seen, received], [numbers(seen.length), numbers(sent)]);
    assertEquals([events.slice(0, 2), peers.all.length], [["drop", "resume"], 1]);
  });

  check("a page back from the cache whose session another page has is told 1001", async (t) => {
    const { url } = await conversation(t, false);
    const tab = await open(t);
    await tab.goto(`${url}/program`);
    await tab.wait(isOpen);
    await tab.goto(`${url}/program?again`); // takes it over
    await tab.wait(isOpen);
    await tab.run(() =>
      new Promise((resolve) => {
        globalThis.socket.onclose = resolve;
        globalThis.socket.close();
      })
    );
    await back!(tab);
    await tab.wait(() => globalThis.state?.events.includes(1001));
    assert(!(await state(tab)).events.includes("error"));
  }, !!back);
}
