/**
 * Every failure comes to `onError`, with what is known of it, and then to no console: what is
 * written there unexpectedly fails these tests.
 */
import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { join } from "node:path";
import { type ChatErrorContext, chatHooks } from "../ai.ts";
import { cluster } from "../cluster.ts";
import { type NodeErrorContext, toNodeHandler } from "../node.ts";
import type { ErrorContext, Peer, SSEOptions, SyncDriver, SyncMessage } from "../server.ts";
import {
  assert,
  assertEquals,
  assertMatch,
  assertRejects,
  root,
  test,
  type TestContext,
  until,
} from "./harness.ts";
import { adapter, connect, listen } from "./pair.ts";

const HOME = "http://localhost/room";
const FULL = { accept: "text/event-stream", "x-duplex-version": "1" };
const UPLINK = { "content-type": "application/websocket-events", "x-duplex-version": "1" };
const OTHERS = `${"0".repeat(16)}.${"0".repeat(32)}`;

/** Options that keep what `onError` is told: the message, and the context with names for objects. */
function listening() {
  const told: [string, Record<string, unknown>][] = [];
  const onError = (error: unknown, { peer, request, ...context }: ErrorContext) => {
    const known = {
      ...context,
      ...peer && { peer: peer.namespace },
      ...request && { request: request.method },
    };
    told.push([(error as Error).message, known]);
  };
  return { told, onError };
}

const open = (ws: { fetch(request: Request): Promise<Response> }, path = "") =>
  ws.fetch(new Request(HOME + path, { headers: FULL }));

const oops = () => {
  throw new Error("oops");
};

test("a hook's failure names the hook, the peer and the request", async (t) => {
  const { told, onError } = listening();
  let refuses = false;
  const ws = adapter(t, {
    onError,
    hooks: { upgrade: () => refuses ? oops() : undefined, open: oops },
  });
  const opened = await open(ws);
  refuses = true;
  const headers = { ...UPLINK, "x-crossws-id": opened.headers.get("x-crossws-id")! };
  const refused = await ws.fetch(new Request(HOME, { method: "POST", headers, body: "PING\r\n" }));
  assertEquals(refused.status, 500);
  assertEquals((await open(ws)).status, 500);
  assertEquals(told, [
    ["oops", { stage: "hook", hook: "open", peer: "/room" }],
    ["oops", { stage: "hook", hook: "upgrade", peer: "/room", request: "POST" }],
    ["oops", { stage: "hook", hook: "upgrade", request: "GET" }],
  ]);
  await opened.body!.cancel();
});

test("an error hook that fails, and a context that cannot move, are told of", async (t) => {
  const { told, onError } = listening();
  const ws = adapter(t, { onError, hooks: { open: oops, error: oops } });
  const opened = await open(ws);
  await until(() => told.length === 1);
  assertEquals(told, [["oops", { stage: "hook", hook: "error", peer: "/room" }]]);
  await opened.body!.cancel();
});

test("a body that did not arrive names its session; what is set up wrongly, the request", async (t) => {
  const { told, onError } = listening();
  const ws = adapter(t, { onError, bidirectional: true } as SSEOptions);
  const opened = await open(ws);
  const post = (token: string, more: object = {}) =>
    ws.fetch(
      new Request(HOME, {
        method: "POST",
        headers: { ...UPLINK, "x-crossws-id": token, ...more },
        body: new ReadableStream({ start: (controller) => controller.close() }),
        duplex: "half",
      } as RequestInit),
    );
  for (let n = 0; n < 2; n++) {
    const lost = await post(opened.headers.get("x-crossws-id")!, { "content-length": "9" });
    assertEquals(lost.status, 400);
    assertEquals((await post(OTHERS)).status, 404);
  }
  assertEquals(told.map(([, context]) => context), [
    { stage: "setup" },
    { stage: "body", peer: "/room", request: "POST" },
    { stage: "setup", request: "POST" },
  ]);
  assertEquals(told[0]![0], 'unknown option "bidirectional": is it "bidir"?');
  assertMatch(told[2]![0], /^a request came for a session of another instance/);
  await opened.body!.cancel();
});

/** A driver that fails as it is told to. */
class Failing implements SyncDriver {
  deliver!: (message: SyncMessage) => void;
  readonly #fails: Set<string>;

  constructor(...fails: string[]) {
    this.#fails = new Set(fails);
  }

  subscribe(deliver: (message: SyncMessage) => void): void {
    this.deliver = deliver;
    if (this.#fails.has("subscribe")) oops();
  }

  async publish(): Promise<void> {
    if (this.#fails.has("publish")) await Promise.reject(new Error("oops"));
  }
}

for (const clusters of [false, true]) {
  const wrap = (driver: SyncDriver) => clusters ? cluster(() => driver) : () => driver;
  const on = clusters ? "cluster's" : "driver's";

  test(`a publication that did not leave, and a ${on} subscription, are told of`, async (t) => {
    const { told, onError } = listening();
    const ws = adapter(t, { onError, sync: wrap(new Failing("subscribe", "publish")) });
    ws.publish("news", "x", { namespace: "/room" });
    await until(() => told.length === 2);
    assertEquals(told.toSorted(([, a], [, b]) => `${a.stage}`.localeCompare(`${b.stage}`)), [
      ["oops", { stage: "publish", namespace: "/room", topic: "news" }],
      ["oops", { stage: "subscribe" }],
    ]);
    await ws.close();
  });
}

test("what came over a cluster and cannot be used is told of; so is an instance that is silent", async (t) => {
  const { told, onError } = listening();
  const driver = new Failing();
  const ws = adapter(t, { onError, sync: cluster(() => driver, { timeout: 50 }) });
  driver.deliver({ namespace: "\0duplex", topic: "*", data: "garbage" });
  driver.deliver(undefined as never);
  await until(() => told.length === 1);
  assertEquals(told[0]![1], { stage: "delivery" });
  await new Promise((resolve) => setTimeout(resolve, 1_100)); // at most one a second is told
  const headers = { ...UPLINK, "x-crossws-id": OTHERS };
  const response = await ws.fetch(new Request(HOME, { method: "POST", headers, body: "PING\r\n" }));
  assertEquals(response.status, 503);
  await until(() => told.length === 2);
  assertMatch(told[1]![0], /^No answer from instance 0{16}/);
  assertEquals(told[1]![1], { stage: "delivery", instance: "0".repeat(16), namespace: "/room" });
});

test("Node's handler tells of an answer that cannot be made, and of one that breaks", async (t) => {
  const told: [string, string, string | undefined][] = [];
  const broken = (request: Request): Response => {
    if (request.url.endsWith("/request")) oops();
    let pulls = 0;
    const body = new ReadableStream({
      pull(controller) {
        if (pulls++ === 0) controller.enqueue(new Uint8Array(9));
        else setTimeout(() => controller.error(new Error("of the body")), 20); // once that has left
      },
    });
    return new Response(body, { headers: { "content-type": "text/event-stream" } });
  };
  const handler = toNodeHandler({ fetch: async (request) => await broken(request) }, {
    onError: (error, { stage, request }: NodeErrorContext) =>
      void told.push([(error as Error).message, stage, request && new URL(request.url).pathname]),
  });
  const server = createServer(handler);
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  t.defer(() => new Promise((resolve) => server.close(resolve)));
  const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
  const failed = await fetch(`${url}/request`);
  assertEquals([failed.status, await failed.text()], [500, ""]);
  await assertRejects(async () => await (await fetch(`${url}/response`)).text());
  assertEquals(told, [
    ["oops", "request", "/request"],
    ["of the body", "response", "/response"],
  ]);
});

/** A socket that has said these frames. */
async function saying(t: TestContext, url: string, frames: object[]): Promise<void> {
  const { socket, opened } = connect(t, url, { transport: "post" });
  await opened;
  for (const frame of frames) socket.send(JSON.stringify(frame));
}

test("chats tell of each stage, with the chat and who asked", async (t) => {
  const told: [string, unknown[]][] = [];
  const chats = chatHooks({
    respond: oops,
    validate: ({ value }) => (value as { id: string }).id === "b" ? oops() : { success: true },
    errorText: oops,
    sync: () => new Failing("subscribe", "publish"),
    onError: (error, { stage, chat, peer }: ChatErrorContext) =>
      void told.push([(error as Error).message, [stage, chat, (peer as Peer)?.namespace]]),
  });
  t.defer(() => chats.settled());
  const { url } = await listen(t, { hooks: chats });
  const request = { type: "send", trigger: "submit-message", messages: [], headers: {}, body: {} };
  await saying(t, `${url}/room`, [
    { ...request, id: "a", requestId: "1" },
    { ...request, id: "b", requestId: "2" },
  ]);
  const known = () => [...new Set(told.map(([, context]) => JSON.stringify(context)))].toSorted();
  await until(() => known().length === 4);
  assertEquals(known(), [
    '["errorText","a","/room"]',
    '["respond","a","/room"]',
    '["sync",null,null]',
    '["validate","b","/room"]',
  ]);
  assert(told.every(([message]) => message === "oops"));
});

for (const file of ["server.ts", "cluster.ts", "handover.ts", "parking.ts", "ai.ts", "node.ts"]) {
  test(`${file} writes to the console in a function alone that asks for onError`, async () => {
    assertEquals(astray(await readFile(join(root, file), "utf8")), []);
  });
}

/** Where a function or a method begins. */
const STARTS =
  /^(?=(?:export )?(?:async )?function \w| {2}(?:async )?#?(?!if|for|while|switch)\w+(?:<.*>)?\(.*[{(]$)/m;

/** The lines that write to a console in a function that knows of no `onError`, nor does who calls it. */
function astray(source: string): string[] {
  const code = source.replace(/^\s*(\/\/|\*|\/\*\*).*$/gm, "").replace(/\s\/\/ .*$/gm, "");
  const functions = code.split(STARTS);
  return functions.flatMap((text) => {
    const lines = text.match(/^.*\bconsole\b.*$/gm) ?? [];
    const name = /#?\w+(?=(?:<.*>)?\()/.exec(text)?.[0] ?? "";
    const callers = functions.filter((other) => other !== text && other.includes(`${name}(`));
    const asks = (text: string) => /\bonError\b/.test(text);
    return asks(text) || callers.length > 0 && callers.every(asks) ? [] : lines;
  }).map((line) => line.trim());
}

test("a word to the console that passes onError by is noticed", () => {
  const asks = "function tell() {\n  if (onError) return onError();\n  print();\n}\n";
  const prints = "function print() {\n  console.warn(1);\n}\n";
  assertEquals(astray(asks + prints), []);
  assertEquals(astray(prints), ["console.warn(1);"]);
  assertEquals(astray(`${asks}${prints}function other() {\n  print();\n}\n`), ["console.warn(1);"]);
  assertEquals(astray(`class A {\n  #b(): void {\n    console.error(2);\n  }\n}\n`), [
    "console.error(2);",
  ]);
});
