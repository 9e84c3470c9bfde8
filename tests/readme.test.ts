/** README.md's programs do what is said of them; docs.test.ts runs the first, and checks all types. */
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { WebSocketSSE } from "../client.ts";
import { type Peer, type SSEAdapter, sseAdapter, type SSEOptions } from "../server.ts";
import { MemoryBus } from "./bus.ts";
import {
  assert,
  assertEquals,
  once,
  root,
  test,
  type TestContext,
  until,
  within,
} from "./harness.ts";

/** What a snippet declares without having it: given as globals. */
type Declared = Record<string, unknown>;

/** Runs the snippet in which this text stands; gives what it exports, and what `extra` adds. */
async function run<T>(
  t: TestContext,
  text: string,
  { declared = {}, url, extra = "" }: { declared?: Declared; url?: string; extra?: string } = {},
): Promise<T> {
  const readme = await readFile(join(root, "README.md"), "utf8");
  const found = [...readme.matchAll(/^```ts\n([^]*?)^```$/gm)].map((match) => match[1]!)
    .filter((snippet) => snippet.includes(text));
  assertEquals(found.length, 1, `snippets with ${text}`);
  const program = found[0]!
    .replace(/"jsr:@duplex\/sse(\/\w+)?"/g, (_, entry = "/mod") => `"file://${root}${entry}.ts"`)
    .replace('"partysocket"', `"${import.meta.resolve("partysocket")}"`)
    .replace('"wss://example.com/chat"', `"${url}"`)
    .replaceAll("process.", "fakeProcess.");
  Object.assign(globalThis, declared);
  t.defer(() => Object.keys(declared).forEach((name) => Reflect.deleteProperty(globalThis, name)));
  const folder = await mkdtemp(join(tmpdir(), "duplex-readme-"));
  t.defer(() => rm(folder, { recursive: true }));
  const file = join(folder, "snippet.ts");
  await writeFile(file, `${program}\n${extra}`);
  return await import(`file://${file}`);
}

/** A client of a handler, without a network. */
function connect(
  t: TestContext,
  handler: (request: Request) => Response | Promise<Response>,
  url: string,
): { socket: WebSocketSSE; messages: unknown[]; closed: Promise<CloseEvent> } {
  const abort = new AbortController();
  t.defer(() => abort.abort());
  const socket = new WebSocketSSE(url, {
    transport: "post",
    signal: abort.signal,
    fetch: async (url, init) => await handler(new Request(url, init)),
  });
  const messages: unknown[] = [];
  socket.onmessage = ({ data }) => messages.push(data);
  return { socket, messages, closed: once<CloseEvent>(socket, "close", { timeout: 10_000 }) };
}

async function listen(
  t: TestContext,
  options: SSEOptions,
): Promise<{ ws: SSEAdapter; url: string }> {
  const ws = sseAdapter({ bidir: true, ...options });
  const server = t.use(await t.serve((request, info) => ws.fetch(request, info)));
  t.defer(() => ws.close(1001, "", { signal: AbortSignal.abort() }));
  return { ws, url: `${server.url}/chat` };
}

test("README.md's server lets users in by name, and tells each of the others", async (t) => {
  type Program = { default: { fetch(request: Request): Promise<Response> }; ws: SSEAdapter };
  const extra = "export { ws };";
  const { default: program, ws } = await run<Program>(t, "Who are you?", { extra });
  const fetch = (request: Request) => program.fetch(request);
  assertEquals(await (await fetch(new Request("http://x/"))).text(), "Hello");
  const stranger = connect(t, fetch, "http://x/chat");
  assertEquals((await stranger.closed).code, 1006);
  const ann = connect(t, fetch, "http://x/chat?user=ann");
  await once(ann.socket, "open");
  const bob = connect(t, fetch, "http://x/chat?user=bob");
  await once(bob.socket, "open");
  bob.socket.send("hi");
  await until(() => ann.messages.length === 2);
  bob.socket.close(4000, "bye");
  await until(() => ann.messages.length === 3);
  assertEquals(ann.messages, ["bob is here", "hi", "bob left: 4000 bye"]);
  assertEquals(bob.messages, []);
  ann.socket.close();
  await ann.closed;
  await ws.close();
});

test("README.md's way to revoke ends the sessions of one user, and upgrade keeps them out", async (t) => {
  const { revoke } = await run<{ revoke(ws: SSEAdapter, user: string): void }>(
    t,
    "function revoke",
  );
  const barred = new Set<string>();
  const { ws, url } = await listen(t, {
    hooks: {
      upgrade(request) {
        const user = new URL(request.url).searchParams.get("user")!;
        return barred.has(user) ? new Response(null, { status: 403 }) : { context: { user } };
      },
    },
  });
  const [ann, second, bob] = ["ann", "ann", "bob"].map((user) =>
    connect(t, (request) => fetch(request), `${url}?user=${user}`)
  );
  await Promise.all([ann, second, bob].map(({ socket }) => once(socket, "open")));
  barred.add("ann");
  revoke(ws, "ann");
  for (const { closed } of [ann, second]) {
    const { code, reason } = await closed;
    assertEquals([code, reason], [4401, "Signed out"]);
  }
  assertEquals(
    (await connect(t, (request) => fetch(request), `${url}?user=ann`).closed).code,
    1006,
  );
  assertEquals(bob.socket.readyState, WebSocketSSE.OPEN);
  bob.socket.close();
  await bob.closed;
});

test("README.md's sender waits for its receiver, and stops when that has closed", async (t) => {
  const { sendAll } = await run<
    { sendAll(peer: Peer, chunks: AsyncIterable<Uint8Array>): Promise<void> }
  >(t, "function sendAll");
  let most = 0;
  let sent = 0;
  const sending = Promise.withResolvers<void>();
  const { ws, url } = await listen(t, {
    hooks: {
      open(peer) {
        const chunks = async function* () {
          for (; sent < 400; sent++) {
            yield new Uint8Array(16 * 1024);
            most = Math.max(most, peer.bufferedAmount);
          }
        };
        sendAll(peer, chunks()).then(sending.resolve, sending.reject);
      },
    },
  });
  const { socket, messages, closed } = connect(t, (request) => fetch(request), url);
  await until(() => messages.length >= 100);
  socket.close();
  await closed;
  await within(sending.promise, 5_000);
  assert(sent >= 100 && sent <= 400, `${sent}`);
  assert(most < 128 * 1024, `${most}`); // the threshold, and one message
  assertEquals([...ws.peers.values()].length, 0);
});

for (
  const [what, text] of [["client", "nothing was lost"], [
    "class for partysocket",
    "Authorized",
  ]] as const
) {
  test(`README.md's ${what} brings its headers and subprotocols`, async (t) => {
    const seen: (string | null)[] = [];
    const opened = Promise.withResolvers<Peer>();
    const { url } = await listen(t, {
      handleProtocols: (offered) => [...offered][0],
      hooks: {
        upgrade: ({ headers }) => void seen.push(headers.get("authorization")),
        open: opened.resolve,
      },
    });
    let tokens = 0;
    const declared = { freshToken: () => Promise.resolve(`token-${++tokens}`) };
    const extra = text === "Authorized" ? "" : "export { socket };";
    const { socket } = await run<{ socket: WebSocket }>(t, text, { declared, url, extra });
    const peer = await within(opened.promise, 5_000);
    assertEquals(peer.websocket.protocol, text === "Authorized" ? "" : "chat.v2");
    await until(() => socket.readyState === 1); // later than at the server
    // Theirs does not wait for the socket below it.
    const below = (socket as { _ws?: WebSocket })._ws ?? socket;
    const closed = Promise.all([once(socket, "close"), once(below, "close")]);
    socket.close();
    await closed;
    assertEquals(seen[0], "Bearer token-1");
    assertEquals(seen.at(-1), `Bearer token-${tokens}`); // asked for each request
  });
}

test("README.md's loop takes messages at its own pace, and the server waits for it", async (t) => {
  type Loop = (url: string) => Promise<void>;
  const taken: number[] = [];
  const declared = {
    async answer(question: string) {
      taken.push(Number(question));
      if (taken.length % 50 === 0) await new Promise((resolve) => setTimeout(resolve, 100));
      most = Math.max(most, sent - taken.length);
      return `answer to ${Number(question)}`;
    },
  };
  const { work } = await run<{ work: Loop }>(t, "function work", { declared });
  const answers: string[] = [];
  let sent = 0;
  let most = 0;
  const { url } = await listen(t, {
    window: 16 * 1024,
    maxWindow: 16 * 1024,
    hooks: {
      async open(peer) {
        for (; sent < 200; sent++) {
          if (!peer.send(`${sent}`.padEnd(1024))) return;
          await peer.waitForDrain();
        }
      },
      message(peer, message) {
        answers.push(message.text());
        if (answers.length === 200) peer.close(4000);
      },
    },
  });
  await within(work(url), 8_000);
  const numbers = Array.from({ length: 200 }, (_, n) => n);
  assertEquals([taken, answers], [numbers, numbers.map((n) => `answer to ${n}`)]);
  assert(most < 40, `the server was ${most} messages ahead`);
});

test("README.md's cluster takes requests at any instance", async (t) => {
  const declared = { driver: new MemoryBus(t).adapter };
  const instances: SSEAdapter[] = [];
  for (let n = 0; n < 2; n++) {
    instances.push((await run<{ ws: SSEAdapter }>(t, "sync: cluster(driver) }", { declared })).ws);
  }
  let asked = 0;
  const { socket, closed } = connect(
    t,
    (request) => instances[asked++ % 2]!.fetch(request, undefined),
    "http://x/chat",
  );
  await once(socket, "open");
  for (let n = 0; n < 4; n++) {
    socket.send(`${n}`);
    await until(() => socket.bufferedAmount === 0);
  }
  assert(asked > 3, `${asked}`);
  socket.close(1000);
  assertEquals((await closed).code, 1000);
  for (const ws of instances) await ws.close();
});

test("README.md's sessions go on at another instance when theirs ends", async (t) => {
  const driver = new MemoryBus(t).adapter;
  const terminate: (() => Promise<void>)[] = [];
  const exited = Promise.withResolvers<void>();
  const fakeProcess = {
    once: (_: string, handler: () => Promise<void>) => terminate.push(handler),
    exit: exited.resolve,
  };
  const instances: SSEAdapter[] = [];
  for (let n = 0; n < 2; n++) {
    const declared = { driver, fakeProcess };
    instances.push((await run<{ ws: SSEAdapter }>(t, "suspend: (peer)", { declared })).ws);
  }
  const [one, other] = instances as [SSEAdapter, SSEAdapter];
  let serving = one;
  const { socket, closed } = connect(t, (request) => serving.fetch(request, null), "http://x/chat");
  const events: string[] = [];
  for (const type of ["drop", "close"]) socket.addEventListener(type, () => events.push(type));
  await once(socket, "open");
  socket.send("before");
  await until(() => socket.bufferedAmount === 0);
  serving = other;
  await within(Promise.all([terminate[0]!(), exited.promise]), 8_000);
  socket.send("after");
  assertEquals((await once<MessageEvent>(socket, "message")).data, "tick");
  const [peer] = [...other.peers.values()].flatMap((peers) => [...peers]);
  assertEquals([peer!.context.count, events], [2, []]);
  socket.close(1000);
  assertEquals((await closed).code, 1000);
  await other.close();
}, { timeout: 20_000 });
