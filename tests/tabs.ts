/**
 * Many tabs over HTTP/1.1, where a browser has 6 connections for all of them: declared by
 * tabs.browser.test.ts for Chromium, and by tabs.firefox.test.ts. The tabs are frames of one page,
 * which share connections, locks and channels as tabs do; whether one is seen is told to each.
 *
 * @module
 */
import process from "node:process";
import type { WebSocketSSE } from "../client.ts";
import type { Peer } from "../server.ts";
import {
  assert,
  assertEquals,
  assertLess,
  assertMatch,
  sleep,
  test,
  type TestContext,
  until,
} from "./harness.ts";
import { site } from "./page.ts";
import { Queue } from "./pair.ts";
import { StreamCount } from "./streams.ts";
import type { Browser, ShownTab, Tab, Tabs } from "./webdriver.ts";

const soak = !!process.env.DUPLEX_SOAK;
const SECONDS = soak ? 60 : 4;

export interface TabState {
  /** Numbers that came, and how long each took, in ms. */
  seen: number[];
  took: number[];
  sent: number;
  /** When the socket was open, in ms. */
  opened: number;
  events: unknown[];
  warnings: string[];
}

declare const globalThis: {
  WebSocketSSE: typeof WebSocketSSE;
  socket: WebSocketSSE;
  state: TabState;
  states(): TabState[];
  isOver: boolean;
} & typeof window;

/** A tab where its address has a number, else the page that has them all. */
export function program(): void {
  const query = new URLSearchParams(location.search);
  if (!query.has("tab")) {
    for (let n = 0; n < Number(query.get("tabs")); n++) {
      const frame = document.createElement("iframe");
      frame.src = `/program?tab=${n}&${query}`;
      document.body.append(frame);
    }
    const frames = () => [...document.querySelectorAll("iframe")];
    globalThis.states = () =>
      frames().map(({ contentWindow }) => (contentWindow as unknown as typeof globalThis).state);
    return;
  }
  const isHidden = query.get("tab") !== "0" || query.has("hidden");
  if (!query.has("real")) Object.defineProperty(document, "hidden", { value: isHidden });
  if (query.has("insecure")) Object.defineProperty(navigator, "locks", { value: undefined });
  const state: TabState = globalThis.state = {
    ...{ seen: [], took: [], sent: 0, opened: 0, events: [], warnings: [] },
  };
  console.warn = (text: string) => state.warnings.push(text);
  const began = performance.now();
  const socket = globalThis.socket = new globalThis.WebSocketSSE(`${query.get("at") ?? ""}/ws`);
  socket.onopen = () => state.opened = performance.now() - began;
  socket.onmessage = ({ data }) => {
    const [number, at] = data.split(" ").map(Number);
    state.seen.push(number);
    state.took.push(Date.now() - at);
  };
  for (const type of ["drop", "resume", "error", "close"]) {
    socket.addEventListener(type, () => state.events.push(type));
  }
  setInterval(() => {
    const { isOver } = parent as unknown as typeof globalThis;
    if (socket.readyState === 1 && !isOver) socket.send(`${++state.sent} ${Date.now()}`);
  }, 1000);
}

const sorted = (times: number[]) => times.toSorted((a, b) => a - b);
const share = (times: number[], part: number) =>
  sorted(times)[Math.floor(times.length * part)] ?? 0;
const numbers = (last: number) => Array.from({ length: last }, (_, n) => n + 1);

interface Run {
  peers: Peer[];
  states: TabState[];
  /** The most event streams at once. */
  streams: number;
  up: number[];
}

/** How a number of tabs is shown, and asked. */
interface Screen {
  show(t: TestContext, url: string, tabs: number): Promise<void>;
  states(): Promise<TabState[]>;
  /** Lets none of them send any more. */
  end(): Promise<void>;
}

/** Tabs that are frames of one page. */
function framesOf(open: Browser, query = ""): Screen {
  let tab: Tab;
  return {
    async show(t, url, tabs) {
      tab = await open(t);
      await tab.goto(`${url}/program?tabs=${tabs}${query}`);
    },
    states: () => tab.run(() => globalThis.states()),
    end: () => tab.run(() => void (globalThis.isOver = true)),
  };
}

/** Tabs as a browser has them, all of them behind one more: their timers become rare, too. */
function hiddenTabs(open: Tabs, tabs: ShownTab[]): Screen {
  const each = <R>(body: () => R) => Promise.all(tabs.map((tab) => tab.run(body)));
  return {
    async show(t, url, count) {
      const another = await open(t);
      for (let n = 0; n < count; n++) {
        tabs.push(await another());
        await tabs[n]!.goto(`${url}/program?tab=${n}&real`);
      }
      await another();
    },
    states: () => each(() => globalThis.state),
    end: async () => void await each(() => void (globalThis.isOver = true)),
  };
}

/** So many tabs, each of which sends and is sent a message a second. */
async function talk(
  t: TestContext,
  screen: Screen,
  tabs: number,
  seconds = SECONDS,
): Promise<Run> {
  const peers = new Queue<Peer>();
  const sent = new Map<string, number>();
  const received = new Map<string, number[]>();
  const up: number[] = [];
  const streams = new StreamCount();
  let stopped = false;
  const { url, closes } = await site(t, {
    program,
    message(peer, message) {
      const [number, at] = message.text().split(" ").map(Number) as [number, number];
      received.get(peer.id)!.push(number);
      up.push(Date.now() - at);
    },
    watch: (request, response) => streams.watch(request, response),
    hooks: {
      open(peer) {
        peers.push(peer);
        received.set(peer.id, []);
        const timer = setInterval(() => {
          const number = (sent.get(peer.id) ?? 0) + 1;
          if (!stopped && peer.send(`${number} ${Date.now()}`)) sent.set(peer.id, number);
        }, 1000);
        t.defer(() => clearInterval(timer));
      },
    },
  });
  await screen.show(t, url, tabs);
  await until(() => peers.all.length === tabs, { timeout: 60_000 });
  await sleep(seconds * 1000);
  stopped = true;
  await screen.end();
  const total = () => [...sent.values()].reduce((sum, count) => sum + count, 0);
  const states = await until(async () => {
    const states = await screen.states();
    const seen = states.reduce((sum, { seen }) => sum + seen.length, 0);
    const came = [...received.values()].reduce((sum, list) => sum + list.length, 0);
    return seen >= total() && came >= states.reduce((sum, { sent }) => sum + sent, 0) && states;
  }, { timeout: 60_000, interval: 250 });
  for (const { seen, events } of states) {
    assertEquals(seen, numbers(seen.length));
    assertEquals(events, []);
  }
  for (const list of received.values()) assertEquals(list, numbers(list.length));
  assertEquals([peers.all.length, closes.all.length], [tabs, 0]);
  return { peers: peers.all, states, streams: streams.most, up };
}

function report(name: string, { states, streams, up }: Run): void {
  const [seen, ...hidden] = states;
  const down = hidden.flatMap(({ took }) => took);
  const ms = (times: number[]) =>
    `${share(times, 0.5)} / ${share(times, 0.95)} / ${Math.max(...times)} ms`;
  console.log(
    `${name}: opened ${
      Math.round(Math.max(...states.map(({ opened }) => opened)))
    } ms, ${streams} streams, ` +
      `visible down ${ms(seen!.took)}, hidden down ${ms(down)}, up ${ms(up)}`,
  );
}

export function tabsTests(name: string, open: Browser, skip: string | undefined): void {
  const check = (what: string, body: (t: TestContext) => Promise<void>) =>
    test(`${name}: ${what}`, body, { timeout: (SECONDS + 120) * 1000, skip });

  check("12 tabs over HTTP/1.1 all open, send and receive, and lose nothing", async (t) => {
    const run = await talk(t, framesOf(open), 12);
    report(`${name}, 12 tabs`, run);
    assert(run.streams <= 6, `${run.streams} streams`); // one may not have heard yet that it ended
    // Generous: docs/pages.md has the figures.
    assertLess(Math.max(...run.states.map(({ opened }) => opened)), 15_000);
    assertLess(share(run.states[0]!.took, 0.9), 2_000);
    assertLess(Math.max(...run.states.flatMap(({ took }) => took)), 25_000);
    for (const { warnings } of run.states) {
      assert(warnings.length <= 1);
      if (warnings.length) assertMatch(warnings[0]!, /keeps us waiting.*serve HTTP\/2/);
    }
  });

  check("the places of tabs that are closed go to those that wait", async (t) => {
    const peers = new Queue<Peer>();
    const { url } = await site(t, {
      program,
      message() {},
      hooks: { open: (peer) => peers.push(peer) },
    });
    const tab = await open(t);
    await tab.goto(`${url}/program?tabs=8`);
    await until(() => peers.all.length === 8, { timeout: 30_000 });
    await tab.run(() => {
      for (const frame of [...document.querySelectorAll("iframe")].slice(0, 4)) frame.remove();
    });
    await tab.wait(() =>
      [...document.querySelectorAll("iframe")].every(({ contentWindow }) => {
        const { socket } = contentWindow as unknown as typeof globalThis;
        return socket.readyState === 1 && !socket.isWaiting;
      })
    );
    for (const peer of peers.all) peer.send(`1 ${Date.now()}`);
    await tab.wait(() => globalThis.states().every(({ seen }) => seen.length === 1));
    for (const { events } of await tab.run(() => globalThis.states())) assertEquals(events, []);
  });

  check(
    "messages get through where other streams fill the pool, and the page says why they wait",
    async (t) => {
      const peers = new Queue<Peer>();
      const received: number[] = [];
      const up: number[] = [];
      const { url } = await site(t, {
        program,
        message(_, message) {
          const [number, at] = message.text().split(" ").map(Number) as [number, number];
          received.push(number);
          up.push(Date.now() - at);
        },
        hooks: { open: (peer) => peers.push(peer) },
      });
      const tab = await open(t);
      await tab.goto(`${url}/program?tabs=1`);
      await until(() => peers.all.length === 1, { timeout: 30_000 });
      await tab.run(() => {
        for (let n = 0; n < 5; n++) new EventSource("/ws");
      });
      await until(() => peers.all.length === 6, { timeout: 30_000 });
      const before = received.length;
      await until(() => received.length >= before + 4, { timeout: 30_000 });
      assertEquals(received, numbers(received.length));
      console.log(`${name}, a full pool: up ${up.join(", ")} ms`);
      peers.all[0]!.send(`1 ${Date.now()}`);
      await tab.wait(() => globalThis.states()[0]!.seen.length === 1);
      const [{ events, warnings }] = await tab.run(() => globalThis.states()) as [TabState];
      assertEquals(events, []);
      assertEquals(warnings.length, 1);
      assertMatch(warnings[0]!, /keeps us waiting.*serve HTTP\/2/);
    },
  );

  for (const isElsewhere of [false, true]) {
    const what = isElsewhere ? " to another origin" : "";
    check(`8 tabs over HTTP/2${what} have a stream each, and no lock`, async (t) => {
      const http2 = { tls: true, http2: true, program };
      const { url, peers, requests } = await site(t, { ...http2, cors: true });
      const page = isElsewhere ? await site(t, http2) : undefined;
      const tab = await open(t);
      await tab.goto(`${page?.url ?? url}/program?tabs=8${page ? `&at=${url}` : ""}`);
      await until(() => peers.all.length === 8, { timeout: 30_000 });
      await tab.wait(() => globalThis.states().every(({ sent }) => sent >= 2));
      const locks = await tab.run(async () => {
        const { held, pending } = await navigator.locks.query();
        return held!.length + pending!.length;
      });
      assertEquals(locks, 0);
      assertEquals(requests.filter((each) => each.startsWith("GET")).length, 8);
      const states = await tab.run(() => globalThis.states());
      assertEquals(states.flatMap(({ events, warnings }) => [...events, ...warnings]), []);
    });
  }

  check("12 tabs without Web Locks, as pages of http: are, lose nothing either", async (t) => {
    const run = await talk(t, framesOf(open, "&insecure"), 12);
    report(`${name}, 12 tabs without locks`, run);
    assertLess(Math.max(...run.states.map(({ opened }) => opened)), 25_000);
  });

  if (!soak) return;
  for (const [tabs, query] of [[40, ""], [12, "&hidden"]] as const) {
    check(`${tabs} tabs${query && ", all of them hidden"}, for long`, async (t) => {
      const run = await talk(t, framesOf(open, query), tabs);
      report(`${name}, ${tabs} tabs ${query}`, run);
      assertLess(Math.max(...run.states.flatMap(({ took }) => took)), 40_000);
    });
  }
}

/** `DUPLEX_SOAK=1`: for longer than a browser lets the timers of hidden tabs run as they were set. */
export function hiddenTabsTest(name: string, open: Tabs, skip: string | undefined): void {
  const seconds = 6 * 60;
  test(
    `${name}: 12 tabs that are hidden for 6 minutes lose nothing, and show what comes when they are seen`,
    async (t) => {
      const tabs: ShownTab[] = [];
      const run = await talk(t, hiddenTabs(open, tabs), 12, seconds);
      report(`${name}, 12 tabs, hidden for 6 minutes`, run);
      assert(run.streams <= 6, `${run.streams} streams`);
      const took = run.states.flatMap(({ took }) => took);
      assert(took.length > 12 * (seconds - 30), `${took.length} messages`);
      assertLess(share(took, 0.95), 8_000);
      assertLess(Math.max(...took), 25_000);
      // Half a minute of messages, when the browser's last limit holds.
      const late = run.states.flatMap(({ took }) => took.slice(-30));
      console.log(`${name}, the last 30 s: ${share(late, 0.5)} / ${share(late, 0.95)} ms`);
      for (const [index, tab] of tabs.entries()) {
        if (index % 4) continue;
        await tab.show();
        const { seen } = await tab.run(() => globalThis.state);
        run.peers[index]!.send(`${seen.length + 1} ${Date.now()}`);
        await tab.wait((count) => globalThis.state.seen.length > count, seen.length);
        const state = await tab.run(() => globalThis.state);
        assertEquals(state.events, []);
        assertLess(state.took.at(-1)!, 2_000);
      }
    },
    { timeout: (seconds + 180) * 1000, skip },
  );
}
