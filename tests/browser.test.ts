/** The client in a page of Chromium, over HTTP/1.1 and over TLS, which is HTTP/2 on Deno. */
import type { Page } from "playwright-core";
import type { WebSocketSSE, WebSocketSSEOptions } from "../client.ts";
import type { Message, Peer, SSEOptions } from "../server.ts";
import { chaos } from "./chaos.ts";
import { clientScript, startChromium } from "./chromium.ts";
import { assert, assertEquals, needs, runtime, test, type TestContext, until } from "./harness.ts";
import { listen, Queue } from "./pair.ts";

const browser = await startChromium();
const skip = needs("chromium", "openssl");
const timeout = 60_000;
const MiB = 1024 * 1024;

/** What the test page has, next to its client. */
interface TestPage {
  socket: WebSocketSSE;
  /** Names of events, data of messages, `{ code, reason, wasClean }` of close. */
  log: unknown[];
  connect(url: string, options?: WebSocketSSEOptions): WebSocketSSE;
  persisted?: boolean;
}
declare const globalThis: TestPage & typeof window;

const html = `<!DOCTYPE html><title>client</title><link rel="icon" href="data:,">
<script type="module">
import { WebSocketSSE } from "/client.js";
globalThis.connect = (url, options) => {
  const log = globalThis.log = [];
  const socket = globalThis.socket = new WebSocketSSE(url, options);
  socket.binaryType = "arraybuffer";
  for (const type of ["open", "drop", "resume", "error"]) {
    socket.addEventListener(type, () => log.push(type));
  }
  socket.addEventListener("message", ({ data }) => log.push(data));
  socket.addEventListener("close", ({ code, reason, wasClean }) => log.push({ code, reason, wasClean }));
  return socket;
};
addEventListener("pageshow", (event) => globalThis.persisted = event.persisted);
</script>`;

const protocols = [
  { protocol: "HTTP/1.1", tls: false, transport: "post" },
  runtime === "deno"
    ? { protocol: "HTTP/2", tls: true, transport: "stream" }
    : { protocol: "HTTP/1.1 over TLS", tls: true, transport: "post" },
];

interface Site {
  url: string;
  port: number;
  peers: Queue<Peer>;
  closes: Queue<{ code?: number | undefined; reason?: string | undefined }>;
  /** Method and path of each request that was not for a page. */
  requests: string[];
}

/** A server with a page, our client and a socket at /ws that answers by `message`, or echoes. */
async function site(
  t: TestContext,
  { tls = false, message, ...options }: SSEOptions & {
    tls?: boolean;
    message?: (peer: Peer, message: Message) => void;
  } = {},
): Promise<Site> {
  const script = await clientScript();
  const peers = new Queue<Peer>();
  const closes: Site["closes"] = new Queue();
  const requests: string[] = [];
  const server = await listen(t, {
    ...options,
    hooks: {
      open: (peer) => peers.push(peer),
      message: message ?? ((peer, message) => void peer.send(message.data as string)),
      close: (_, details) => closes.push(details),
      ...options.hooks,
    },
  }, (request, next) => {
    const { pathname } = new URL(request.url);
    const type = pathname === "/client.js" ? "text/javascript" : "text/html";
    if (pathname !== "/ws") {
      return new Response(pathname === "/client.js" ? script : html, {
        headers: { "content-type": `${type}; charset=utf-8`, "set-cookie": "user=ada; Path=/" },
      });
    }
    requests.push(request.method);
    return next(request);
  }, { tls });
  return { url: server.url, port: server.port, peers, closes, requests };
}

/** A window that shows the page of a site. */
async function visit(t: TestContext, url: string): Promise<Page> {
  const page = await (await browser.windows(t)).newPage();
  await page.goto(url);
  return page;
}

/** Opens a socket in the page. */
async function open(page: Page, url = "/ws", options: WebSocketSSEOptions = {}): Promise<void> {
  await page.evaluate(
    ([url, options]) => void globalThis.connect(url, options),
    [url, options] as const,
  );
  await page.waitForFunction(() => globalThis.log.length > 0);
  assertEquals(await log(page), ["open"]);
}

function log(page: Page): Promise<unknown[]> {
  return page.evaluate(() => globalThis.log);
}

/** Waits for the end of the page's socket, which is the last of its log. */
async function closed(page: Page): Promise<unknown> {
  await page.waitForFunction(() => globalThis.socket.readyState === 3 && globalThis.log.length > 0);
  return (await log(page)).at(-1);
}

for (const { protocol, tls, transport } of protocols) {
  const check = (name: string, body: (t: TestContext) => Promise<void>) =>
    test(`Chromium over ${protocol}: ${name}`, body, { timeout, skip });

  check(`messages of every kind, by ${transport}`, async (t) => {
    const { url } = await site(t, {
      tls,
      handleProtocols: (offered) => offered.has("two") ? "two" : "",
    });
    const page = await visit(t, url);
    await open(page, "/ws", { protocols: ["one", "two"] });
    const result = await page.evaluate(async (size) => {
      const { socket } = globalThis;
      const echoes: unknown[] = [];
      const sent = [
        "text",
        "",
        "\uFEFFé\r\n\0🙂",
        new Uint8Array([0, 255, 10]),
        new Uint8Array(),
        new Blob(["blob"]),
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
      return {
        wrong,
        protocol,
        transport,
        bufferedAmount,
        resumes: stats.resumes,
        resent: stats.resent,
      };
    }, MiB);
    assertEquals(result, {
      wrong: [],
      protocol: "two",
      transport: transport as "post",
      bufferedAmount: 0,
      resumes: 0,
      resent: 0,
    });
  });

  check("codes and reasons of a close go both ways", async (t) => {
    const { url, closes } = await site(t, { tls, message: (peer) => peer.close(4002, "go") });
    const page = await visit(t, url);
    await open(page);
    await page.evaluate(() => globalThis.socket.close(4001, "bye"));
    assertEquals(await closed(page), { code: 4001, reason: "bye", wasClean: true });
    const { code, reason } = await closes.next();
    assertEquals([code, reason], [4001, "bye"]);

    await open(page);
    await page.evaluate(() => globalThis.socket.close());
    assertEquals(await closed(page), { code: 1005, reason: "", wasClean: true });
    assertEquals((await closes.next()).code, 1005);

    await open(page);
    await page.evaluate(() => globalThis.socket.send("close me"));
    assertEquals(await closed(page), { code: 4002, reason: "go", wasClean: true });
    assertEquals((await closes.next()).code, 4002);
  });

  check("a tab that is left or closed ends its session at once, by 1001", async (t) => {
    const { url, closes } = await site(t, { tls });
    const page = await visit(t, url);
    await open(page);
    await page.evaluate(() => globalThis.socket.send("keep me"));
    await page.goto(`${url}/other`);
    assertEquals((await closes.next({ timeout: 10_000 })).code, 1001);
    await open(page);
    await page.close();
    assertEquals((await closes.next({ timeout: 10_000 })).code, 1001);
  });

  check("cut and silent networks lose nothing and repeat nothing", async (t) => {
    const numbers = new Queue<number>();
    const { url, port, peers } = await site(t, {
      tls,
      heartbeatInterval: 500,
      message: (_, message) => numbers.push(Number(message.text())),
    });
    const proxy = t.use(await chaos(port));
    const page = await visit(t, url.replace(`${port}`, `${proxy.port}`));
    await open(page);
    const peer = await peers.next();
    let n = 0;
    /** Sends some, one every few milliseconds, in both directions. */
    const some = async () => {
      for (const end = n + 20; n < end;) {
        peer.send(String(++n));
        await page.evaluate((n) => globalThis.socket.send(String(n)), n);
      }
    };
    const resumed = (times: number) =>
      page.waitForFunction((times) => globalThis.socket.stats.resumes >= times, times);
    await some();
    proxy.cutAll("rst");
    await some();
    await resumed(1);
    await some();
    proxy.stallAll();
    await some();
    await page.waitForFunction(() => globalThis.log.filter((each) => each === "drop").length === 2);
    await some();
    proxy.resumeAll();
    await resumed(2);
    await some();
    const expected = Array.from({ length: n }, (_, index) => index + 1);
    await until(() => numbers.all.length >= n, { timeout: 30_000 });
    assertEquals(numbers.all, expected);
    await page.waitForFunction(
      (n) => globalThis.log.includes(String(n)),
      n,
    );
    const messages = (await log(page)).filter((each) => /^\d/.test(String(each)));
    assertEquals(messages.map(Number), expected);
    // A network that fails says nothing against the transport.
    assertEquals(await page.evaluate(() => globalThis.socket.transport), transport as "post");
  });

  check("a native EventSource receives, and resumes after a cut", async (t) => {
    const { url, port, peers } = await site(t, { tls });
    const proxy = t.use(await chaos(port));
    const page = await visit(t, url.replace(`${port}`, `${proxy.port}`));
    await page.evaluate(() => {
      const log: unknown[] = globalThis.log = [];
      const source = new EventSource("/ws");
      source.onmessage = ({ data }) => log.push(data);
      source.onerror = () => log.push("error");
    });
    const peer = await peers.next();
    peer.send("one");
    await page.waitForFunction(() => globalThis.log.includes("one"));
    proxy.cutAll("rst");
    peer.send("two\nlines");
    await page.waitForFunction(() => globalThis.log.includes("error"));
    peer.send("three");
    await page.waitForFunction(() => globalThis.log.includes("three"));
    const messages = (await log(page)).filter((each) => each !== "error");
    assertEquals(messages, ["one", "two\nlines", "three"]);
    assertEquals(peers.all.length, 1, "it is the same session");
  });
}

test("Chromium over HTTP/1.1: a stream that it refuses to send becomes a post", async (t) => {
  const { url } = await site(t);
  const page = await visit(t, url);
  await open(page, "/ws", { transport: "stream" });
  await page.evaluate(() => ["one", "two"].forEach((text) => globalThis.socket.send(text)));
  await page.waitForFunction(() => globalThis.log.length === 3);
  assertEquals(await log(page), ["open", "one", "two"]);
  assertEquals(await page.evaluate(() => globalThis.socket.transport), "post");
}, { timeout, skip });

test(
  "Chromium: a page back from the back/forward cache finds its socket closed",
  async (t) => {
    const { url, closes } = await site(t);
    const page = await visit(t, url);
    await open(page);
    await page.goto(`${url}/other`);
    assertEquals((await closes.next()).code, 1001);
    await page.goBack({ waitUntil: "commit" }); // it is not loaded again
    await page.waitForFunction(() => globalThis.persisted !== undefined);
    assert(await page.evaluate(() => globalThis.persisted), "the page was not kept");
    assertEquals(await closed(page), { code: 1001, reason: "", wasClean: false });
    assertEquals(await log(page), ["open", { code: 1001, reason: "", wasClean: false }]);
    await open(page); // and it can connect again
    await page.evaluate(() => globalThis.socket.send("again"));
    await page.waitForFunction(() => globalThis.log.includes("again"));
  },
  { timeout, skip },
);

test("Chromium: another origin is refused while cors is off", async (t) => {
  let hooks = 0;
  const api = await site(t, { hooks: { upgrade: () => void hooks++ } });
  const page = await visit(t, (await site(t)).url);
  await page.evaluate((url) => void globalThis.connect(url), `${api.url}/ws`);
  assertEquals(await closed(page), { code: 1006, reason: "", wasClean: false });
  assertEquals(await log(page), ["error", { code: 1006, reason: "", wasClean: false }]);
  assertEquals([hooks, api.peers.all.length], [0, 0]);
}, { timeout, skip });

test("Chromium: another origin on the allow-list, with credentials", async (t) => {
  const page = await visit(t, (await site(t)).url);
  const { origin } = new URL(page.url());
  let cookie: string | null = null;
  const api = await site(t, {
    cors: [origin],
    hooks: { upgrade: (request) => void (cookie = request.headers.get("cookie")) },
  });
  const echo = async (options: WebSocketSSEOptions) => {
    await open(page, `${api.url}/ws`, { headers: { "x-app": "1" }, ...options });
    await page.evaluate(() => globalThis.socket.send("hello"));
    await page.waitForFunction(() => globalThis.log.includes("hello"));
    return cookie;
  };
  assertEquals(await echo({}), null, "no cookie goes along uninvited");
  assertEquals(await echo({ credentials: "include" }), "user=ada");
  await page.close();
  // Also from another origin the server is told that the page has gone.
  for (const _ of [1, 2]) assertEquals((await api.closes.next({ timeout: 10_000 })).code, 1001);

  const strange = await visit(t, (await site(t)).url);
  await strange.evaluate((url) => void globalThis.connect(url), `${api.url}/ws`);
  assertEquals(await closed(strange), { code: 1006, reason: "", wasClean: false });
  assertEquals(api.peers.all.length, 2);
}, { timeout, skip });
