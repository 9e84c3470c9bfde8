/**
 * What our client does in a page of any browser: declared by browser.test.ts for Chromium,
 * by firefox.test.ts and by webkit.test.ts.
 *
 * @module
 */
import type { Transport, WebSocketSSEOptions } from "../client.ts";
import { chaos } from "./chaos.ts";
import {
  assert,
  assertEquals,
  AssertionError,
  assertRejects,
  assertStringIncludes,
  needs,
  run,
  runtime,
  test,
  type TestContext,
  until,
  within,
} from "./harness.ts";
import { site, type TestPage } from "./page.ts";
import { Queue } from "./pair.ts";
import { proxy } from "./proxies.ts";
import type { Browser, Tab } from "./webdriver.ts";

declare const globalThis: TestPage & typeof window;

const timeout = 90_000;
const MiB = 1024 * 1024;

/** Deno speaks HTTP/2 over TLS by itself, Bun when it is told to. */
const protocols = [
  { protocol: "HTTP/1.1", tls: false, http2: false, spoken: "http/1.1" },
  ...runtime === "bun"
    ? [{ protocol: "HTTP/1.1 over TLS", tls: true, http2: false, spoken: "http/1.1" }]
    : [],
  { protocol: "HTTP/2", tls: true, http2: true, spoken: "h2" },
];

export interface BrowserOptions {
  skip: string | undefined;
  /** It sends streams, over HTTP/2. */
  streams?: boolean;
  /** Over HTTP/2 its EventSource does not notice that the connection is lost, and waits for ever. */
  deaf?: boolean;
}

export function browserTests(browser: string, open: Browser, options: BrowserOptions): void {
  const { skip, streams = false, deaf = false } = options;

  test(`${browser}: a test fails by what its page complains of`, async () => {
    const complaining = async (t: TestContext) => {
      const tab = await open(t);
      await show(tab, (await site(t)).url);
      await tab.run(() => {
        console.warn("a warning");
        console.error("an error");
        Promise.reject(new Error("a rejection"));
        setTimeout(() => {
          throw new Error("thrown");
        });
      });
      await tab.run(() => new Promise((resolve) => setTimeout(resolve, 100)));
    };
    const { message } = await assertRejects(() => run("inner", complaining, timeout), Error);
    for (const each of ["a warning", "an error", "a rejection", "thrown"]) {
      assertStringIncludes(message, each);
    }
  }, { timeout, skip });

  for (const { protocol, tls, http2, spoken } of protocols) {
    const transport: Transport = streams && spoken === "h2" ? "stream" : "post";
    const check = (name: string, body: (t: TestContext) => Promise<void>) =>
      test(`${browser} over ${protocol}: ${name}`, body, { timeout, skip });

    /** A window that shows the page of a site. */
    const visit = async (t: TestContext, url: string): Promise<Tab> => {
      const tab = await open(t);
      await show(tab, url);
      return tab;
    };

    check(`messages of every kind, 1 MiB among them, by ${transport}`, async (t) => {
      const { url, requests } = await site(t, {
        tls,
        http2,
        handleProtocols: (offered) => offered.has("two") ? "two" : "",
      });
      const tab = await visit(t, url);
      await connect(tab, { protocols: ["one", "two"] });
      const result = await tab.run(async (size) => {
        const { socket } = globalThis;
        const echoes: unknown[] = [];
        const frame = document.body.appendChild(document.createElement("iframe"));
        const realm = frame.contentWindow as unknown as typeof globalThis;
        const sent = [
          "text",
          "",
          "\uFEFFé\r\n\0🙂",
          new Uint8Array([0, 255, 10]),
          new Uint8Array(),
          new Blob(["blob"]),
          new realm.Blob(["of a frame"]),
          new realm.File(["of a frame"], "file"),
          new realm.Uint8Array([1, 2]).buffer,
          "x".repeat(size),
          new Uint8Array(size).map((_, index) => index * 31 + (index >> 8)),
        ];
        const all = new Promise<void>((resolve) => {
          socket.onmessage = ({ data }) => echoes.push(data) === sent.length && resolve();
        });
        for (const each of sent) socket.send(each);
        await all;
        const text = async (data: unknown) =>
          typeof data === "string"
            ? data
            : `bytes ${new Uint8Array(await new Blob([data as Blob]).arrayBuffer())}`;
        const wrong: number[] = [];
        for (const [index, each] of sent.entries()) {
          if (await text(each) !== await text(echoes[index])) wrong.push(index);
        }
        const { protocol, transport, bufferedAmount, stats } = socket;
        const [page] = performance.getEntriesByType("navigation");
        return {
          wrong,
          protocol,
          transport,
          bufferedAmount,
          resumes: stats.resumes,
          resent: stats.resent,
          spoken: (page as PerformanceNavigationTiming).nextHopProtocol,
        };
      }, MiB);
      assertEquals(result, {
        wrong: [],
        protocol: "two",
        transport,
        bufferedAmount: 0,
        resumes: 0,
        resent: 0,
        spoken,
      });
      const posts = requests.filter((each) => each.startsWith("POST"));
      assert(posts.length > 0);
      // A stream that was tried all the same would have come as text, or not at all.
      if (transport === "post") assertEquals(posts.filter((each) => each !== "POST"), []);
      else assert(posts.includes("POST streamed"));
    });

    check("codes and reasons of a close go both ways", async (t) => {
      const { url, closes } = await site(t, {
        tls,
        http2,
        message: (peer) => peer.close(4002, "go"),
      });
      const tab = await visit(t, url);
      await connect(tab);
      await tab.run(() => globalThis.socket.close(4001, "bye"));
      assertEquals(await closed(tab), { code: 4001, reason: "bye", wasClean: true });
      const { code, reason } = await closes.next();
      assertEquals([code, reason], [4001, "bye"]);

      await connect(tab);
      await tab.run(() => globalThis.socket.close());
      assertEquals(await closed(tab), { code: 1005, reason: "", wasClean: true });
      assertEquals((await closes.next()).code, 1005);

      await connect(tab);
      await tab.run(() => globalThis.socket.send("close me"));
      assertEquals(await closed(tab), { code: 4002, reason: "go", wasClean: true });
      assertEquals((await closes.next()).code, 4002);
    });

    check("a page that is left ends its session at once, by 1001", async (t) => {
      const { url, closes } = await site(t, { tls, http2 });
      const tab = await visit(t, url);
      await connect(tab);
      await tab.run(() => globalThis.socket.send("keep me"));
      await tab.goto(`${url}/other`);
      assertEquals((await closes.next({ timeout: 20_000 })).code, 1001);
    });

    const cutAndSilent = async (t: TestContext): Promise<void> => {
      t.expect("Failed to load resource: net::");
      const numbers = new Queue<number>();
      const { url, port, peers } = await site(t, {
        tls,
        http2,
        heartbeatInterval: 500,
        message: (_, message) => numbers.push(Number(message.text())),
      });
      const network = t.use(await chaos(port));
      const tab = await visit(t, url.replace(`${port}`, `${network.port}`));
      await connect(tab);
      const peer = await peers.next();
      let n = 0;
      /** Sends some in both directions. */
      const some = async () => {
        for (const end = n + 10; n < end;) {
          peer.send(String(++n));
          await tab.run((n) => globalThis.socket.send(String(n)), n);
        }
      };
      const resumed = (times: number) =>
        tab.wait((times) => globalThis.socket.stats.resumes >= times, times);
      await some();
      network.cutAll("rst");
      await some();
      await resumed(1);
      await some();
      network.stallAll();
      await some();
      await tab.wait(() => globalThis.log.filter((each) => each === "drop").length === 2);
      await some();
      network.resumeAll();
      await resumed(2);
      await some();
      const expected = Array.from({ length: n }, (_, index) => index + 1);
      await until(() => numbers.all.length >= n, { timeout: 30_000 });
      assertEquals(numbers.all, expected);
      await tab.wait((n) => globalThis.log.includes(String(n)), n);
      const messages = (await log(tab)).filter((each) => /^\d/.test(String(each)));
      assertEquals(messages.map(Number), expected);
      // A network that fails says nothing against the transport.
      assertEquals(await tab.run(() => globalThis.socket.transport), transport);
    };
    check(
      "cut and silent networks lose nothing and repeat nothing",
      (t) => despiteDriver(t, cutAndSilent),
    );

    const lost = !deaf || spoken !== "h2";
    const eventSource = async (t: TestContext): Promise<void> => {
      t.expect("Failed to load resource: net::");
      const { url, port, peers } = await site(t, lost ? { tls, http2 } : {});
      const network = lost ? t.use(await chaos(port)) : undefined;
      // haproxy resets a quiet stream, and keeps the connection.
      const front = network
        ? url.replace(`${port}`, `${network.port}`)
        : (await proxy(t, "haproxy", port, { configuration: "documented", idle: 1 })).secure;
      const tab = await visit(t, front);
      await tab.run(() => {
        const log: unknown[] = globalThis.log = [];
        const source = new EventSource("/ws");
        source.onmessage = ({ data }) => log.push(data);
        source.onerror = () => log.push("error");
      });
      const peer = await peers.next({ timeout: 20_000 });
      peer.send("one");
      await tab.wait(() => globalThis.log.includes("one"));
      network?.cutAll("rst");
      peer.send("two\nlines");
      await tab.wait(() => globalThis.log.includes("error"));
      peer.send("three");
      await tab.wait(() => globalThis.log.includes("three"));
      const messages = (await log(tab)).filter((each) => each !== "error");
      assertEquals(messages, ["one", "two\nlines", "three"]);
      assertEquals(peers.all.length, 1, "it is the same session");
    };
    test(
      `${browser} over ${protocol}: a native EventSource receives, and resumes after a ${
        lost ? "cut" : "reset of its stream"
      }`,
      (t) => despiteDriver(t, eventSource),
      { timeout, skip: lost ? skip : skip ?? needs("haproxy") },
    );
  }
}

/** Once in a while WebKit leaves its driver without an answer, which is no loss of ours: once more. */
async function despiteDriver(
  t: TestContext,
  test: (t: TestContext) => Promise<void>,
): Promise<void> {
  await within(test(t), 30_000).catch((error) => {
    if (error instanceof AssertionError) throw error;
    return test(t);
  });
}

/** Shows the page of a site. */
export async function show(tab: Tab, url: string): Promise<void> {
  await tab.goto(`${url}/`);
  await tab.wait(() => !!globalThis.connect);
}

/** Opens a socket in the page. */
export async function connect(
  tab: Tab,
  options: WebSocketSSEOptions = {},
  url = "/ws",
): Promise<void> {
  await tab.run((url, options) => void globalThis.connect(url, options), url, options);
  await tab.wait(() => globalThis.log.length > 0);
  assertEquals(await log(tab), ["open"]);
}

export function log(tab: Tab): Promise<unknown[]> {
  return tab.run(() => globalThis.log);
}

/** Waits for the end of the page's socket, which is the last of its log. */
export async function closed(tab: Tab): Promise<unknown> {
  await tab.wait(() =>
    globalThis.socket.readyState === 3 && typeof globalThis.log.at(-1) === "object"
  );
  return (await log(tab)).at(-1);
}
