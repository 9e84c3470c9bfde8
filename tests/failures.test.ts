/**
 * A failure says what has failed: the `error` event of a socket, its console in pages, what the
 * constructor refuses, and what `console.log` shows. Nothing secret is in any of them.
 */
import { type AddressInfo, createServer } from "node:net";
import { inspect } from "node:util";
import { WebSocketSSE, type WebSocketSSEErrorEvent, type WebSocketSSEOptions } from "../client.ts";
import {
  assert,
  assertEquals,
  assertInstanceOf,
  assertLess,
  assertMatch,
  assertStringIncludes,
  assertThrows,
  once,
  runtime,
  test,
  type TestContext,
  until,
  within,
} from "./harness.ts";
import { connect, listen } from "./pair.ts";
import { ScriptedServer } from "./scripted.ts";

const SECRETS = /s3cret|hunter2|t1cket/;

/** The options, URL and headers of who has much to lose. */
const QUERY = "/room?ticket=t1cket";
const headers = { authorization: "Bearer s3cret" };

/** The event with which a socket fails. It comes just before `close`, and bears no secret. */
async function failure(t: TestContext, socket: WebSocketSSE): Promise<WebSocketSSEErrorEvent> {
  const types: string[] = [];
  const closed = once<CloseEvent>(socket, "close", { timeout: 15_000 });
  let error: WebSocketSSEErrorEvent | undefined;
  socket.addEventListener("error", (event) => {
    types.push("error");
    error = event;
  });
  const { code, reason, wasClean } = await closed;
  assertEquals([types, code, reason, wasClean], [["error"], 1006, "", false]);
  t.signal.throwIfAborted();
  assertInstanceOf(error!, Event);
  assertInstanceOf(error.error, Error);
  assertEquals(error.error.message, error.message);
  assert(!SECRETS.test(`${error.message} ${inspect(error)}`), inspect(error));
  return error;
}

/** A socket to a server that answers so. */
async function answered(
  t: TestContext,
  answer: () => Response,
  init: WebSocketSSEOptions = {},
): Promise<WebSocketSSEErrorEvent> {
  const { url } = await t.serve(answer);
  const socket = new WebSocketSSE(url.replace("//", "//ada:hunter2@") + QUERY, {
    headers,
    signal: t.signal,
    ...init,
  });
  return await failure(t, socket);
}

const html = { headers: { "content-type": "text/html" } };
for (const transport of ["duplex", "stream", "post", "poll"] as const) {
  for (const status of [401, 403, 404, 410, 500, 503]) {
    test(`an opening that is answered ${status} says so (${transport})`, async (t) => {
      const error = await answered(t, () => new Response("no", { status }), { transport });
      assertEquals(error.message, `Not opened: the answer was ${status}`);
      assertEquals([error.status, error.error.cause], [status, undefined]);
    });
  }

  test(`so does one that is redirected (${transport})`, async (t) => {
    const elsewhere = { status: 302, headers: { location: "/login" } };
    const error = await answered(t, () => new Response(null, elsewhere), { transport });
    assertEquals([error.message, error.status], ["Not opened: the answer was 302", 302]);
  });

  test(`and one that is answered by a page (${transport})`, async (t) => {
    const error = await answered(t, () => new Response("<p>", html), { transport });
    assertEquals(error.message, "Not opened: the answer was no event stream");
    assertEquals(error.status, 200);
  });
}

test("in a browser a redirect has no status: it says what it was", async (t) => {
  const opaque = { status: 0, type: "opaqueredirect", ok: false, headers: new Headers() };
  const socket = new WebSocketSSE("http://scripted.test/", {
    fetch: () => Promise.resolve(opaque as Response),
    transport: "post",
  });
  const { message, status } = await failure(t, socket);
  assertEquals([message, status], ["Not opened: the answer was a redirect", undefined]);
});

for (const [what, scheme] of [["refused", "http"], ["no TLS", "https"]] as const) {
  test(`a connection that is ${what} says so, with what fetch has thrown as cause`, async (t) => {
    const server = await t.serve(() => new Response("no"));
    const { port } = server;
    if (what === "refused") await server[Symbol.asyncDispose]();
    const socket = new WebSocketSSE(`${scheme}://ada:hunter2@127.0.0.1:${port}${QUERY}`, {
      headers,
    });
    const { message, error, status } = await failure(t, socket);
    assertEquals([message, status], ["Not opened: a request failed", undefined]);
    assertInstanceOf(error.cause, Error);
    assert(error.cause.message.length > 5);
  });
}

test("a certificate that nobody has signed is the cause", async (t) => {
  const { port } = await t.serve(() => new Response("no"), { tls: true });
  // The tests' own trust in it is one of options of fetch, which a page has not.
  const socket = new WebSocketSSE(`https://127.0.0.1:${port}${QUERY}`, { headers });
  const { error } = await failure(t, socket);
  const { message, cause } = error.cause as Error;
  assertMatch(`${message} ${inspect(cause)}`, /certificate|self.signed|UnknownIssuer/i);
});

test("what the options' functions throw is the cause, as it is", async (t) => {
  const thrown = new Error("no key");
  for (
    const headers of [() => Promise.reject(thrown), () => {
      throw thrown;
    }]
  ) {
    const { message, error } = await failure(t, new WebSocketSSE("http://localhost/", { headers }));
    assertEquals(message, "Not opened: the option headers failed");
    assertEquals(error.cause === thrown, true);
  }
  const fetch = () => {
    throw thrown;
  };
  const { message, error } = await failure(t, new WebSocketSSE("http://localhost/", { fetch }));
  assertEquals([message, error.cause === thrown], ["Not opened: a request failed", true]);
});

test("who has a query does not find it in what fetch throws, but all else", async (t) => {
  const fetch = () => {
    const named = `error sending request for url (http://localhost${QUERY})`;
    const error = new TypeError(named, { cause: "of it" });
    throw Object.assign(error, { code: "ECONNREFUSED", path: `http://localhost${QUERY}` });
  };
  const socket = new WebSocketSSE(`http://localhost${QUERY}`, { fetch });
  const cause = (await failure(t, socket)).error.cause as Error & { code: string };
  assertEquals(cause.message, "error sending request for url (http://localhost/room?…)");
  assertEquals([cause.name, cause.code, cause.cause], ["TypeError", "ECONNREFUSED", "of it"]);
});

test("who has a query does not find it in the causes of what fetch throws, either", async (t) => {
  const cuts = createServer((socket) => socket.destroy());
  await new Promise<void>((resolve) => cuts.listen(0, "127.0.0.1", resolve));
  t.defer(() => new Promise((resolve) => cuts.close(resolve)));
  const { port } = cuts.address() as AddressInfo;
  const round = new Error(`of ${QUERY}`);
  round.cause = round;
  const fetch = () => Promise.reject(new TypeError("failed", { cause: round }));
  const failures = await Promise.all([
    new WebSocketSSE(`http://127.0.0.1:${port}${QUERY}`),
    new WebSocketSSE(`http://host.invalid${QUERY}`),
    new WebSocketSSE(`http://localhost${QUERY}`, { fetch }),
  ].map((socket) => failure(t, socket)));
  for (const { error } of failures) {
    assert(!SECRETS.test(inspect(error, { depth: 20, showHidden: true })));
    assert(error.cause instanceof Error);
  }
});

test("a socket that its page has ended says that", async (t) => {
  const { url } = await listen(t, {});
  const early = new WebSocketSSE(url);
  const failed = failure(t, early);
  early.close();
  assertEquals((await failed).message, "Not opened: closed before it was open");

  const reason = new Error("enough");
  const aborted = await failure(t, new WebSocketSSE(url, { signal: AbortSignal.abort(reason) }));
  assertEquals(aborted.message, "Not opened: aborted by its signal");
  assertEquals(aborted.error.cause === reason, true);

  const controller = new AbortController();
  const socket = new WebSocketSSE(url, { signal: controller.signal });
  await once(socket, "open");
  const later = failure(t, socket);
  controller.abort(reason);
  assertEquals((await later).message, "Lost: aborted by its signal");
  assertEquals((await later).error.cause === reason, true);
});

/** A socket that a script has opened, and how it goes on. */
async function opened(t: TestContext, terms: object = {}) {
  const server = new ScriptedServer();
  const init = { transport: "post", fetch: server.fetch, signal: t.signal } as const;
  const socket = new WebSocketSSE(`http://scripted.test${QUERY}`, { ...init, headers });
  const isOpen = once(socket, "open");
  const stream = (await server.next()).stream(terms);
  t.defer(() => stream.end());
  await isOpen;
  return { server, socket, stream };
}

test("a session that the server does not know any more says by which answer", async (t) => {
  const { server, socket, stream } = await opened(t);
  const failed = failure(t, socket);
  stream.end();
  (await server.next()).respond(404);
  const { message, status } = await failed;
  assertEquals([message, status], ["Lost: the answer was 404", 404]);
});

test("a connection that does not come back says what its last try met", async (t) => {
  const { server, socket, stream } = await opened(t, { resumeTimeout: 300 });
  const failed = failure(t, socket);
  stream.end();
  let isOver = false;
  failed.then(() => isOver = true);
  while (!isOver) {
    const asked = await Promise.race([server.next(), failed]);
    if ("respond" in asked) asked.respond(502);
  }
  assertEquals([(await failed).message, (await failed).status], ["Lost: the answer was 502", 502]);
});

test("one that cannot be resumed says that it ended", async (t) => {
  const { socket, stream } = await opened(t, { resumeTimeout: 0 });
  const failed = failure(t, socket);
  stream.end();
  assertEquals((await failed).message, "Lost: the connection ended");
});

test("a message that the server refuses says by which answer", async (t) => {
  const { server, socket } = await opened(t);
  const failed = failure(t, socket);
  socket.send("s3cret");
  (await server.next()).respond(403);
  const { message, status } = await failed;
  assertEquals([message, status], ["Lost: the answer was 403", 403]);
});

test("one that is answered by success, but not taken, says by which answer, too", async (t) => {
  const { server, socket } = await opened(t);
  const failed = failure(t, socket);
  socket.send("s3cret");
  (await server.next()).respond(200);
  const { message, status } = await failed;
  assertEquals([message, status], ["Lost: the answer was 200", 200]);
});

const event = (type: string, data: unknown) => `event: ${type}\ndata: ${JSON.stringify(data)}\n\n`;
const FULL = {
  "content-type": "text/event-stream",
  "x-crossws-id": `${"0".repeat(16)}.${"0".repeat(32)}`,
};
const terms = {
  ...{ protocol: "", heartbeatInterval: 15_000, idleTimeout: 60_000, resumeTimeout: 0 },
  ...{ window: 1, received: 0, handled: 0, next: 1, attempt: 0 },
};
const streams: Record<string, [body: string, headers: Record<string, string>, message: string]> = {
  "a subprotocol that was not offered": [
    event("duplex-open", { ...terms, protocol: "b" }),
    { ...FULL, "x-duplex-version": "1" },
    "Not opened: the server chose a subprotocol that was not offered",
  ],
  "an event stream of somebody else": [
    "data: x\n\n",
    { "content-type": "text/event-stream" },
    "Not opened: this event stream is no WebSocket's: it has no token to send with. To read it: bidir: false",
  ],
  "an end before the session": [
    ":\n",
    { ...FULL, "x-duplex-version": "1" },
    "Not opened: the connection ended",
  ],
};
for (const [what, [body, headers, message]] of Object.entries(streams)) {
  test(`${what} is named`, async (t) => {
    const error = await answered(t, () => new Response(body, { headers }), { transport: "post" });
    assertEquals(error.message, message);
  });
}

for (const transport of ["duplex", "stream", "post", "poll"] as const) {
  test(`a middleware that exposes no header fails the opening, and is told which (${transport})`, async (t) => {
    const { url, ws } = await listen(t, {
      cors: "manual",
      resumeTimeout: 100,
      heartbeatInterval: 300, // by which Deno notices that its client has gone
    });
    const socket = new WebSocketSSE(url, {
      transport,
      signal: t.signal,
      // As a browser gives an answer of another origin to its page.
      fetch: async (input, init) => {
        const { body, status, headers } = await fetch(input, init);
        const type = headers.get("content-type") ?? "";
        return new Response(body, { status, headers: { "content-type": type } });
      },
    });
    const began = performance.now();
    const { message } = await failure(t, socket);
    assertMatch(
      message,
      /^Not opened: the answer's headers are hidden .*x-crossws-id and x-duplex/,
    );
    assertLess(performance.now() - began, 8_000, "as soon as it can be told");
    await until(() => ws.peers.size === 0);
  });
}

test("damage is named", async (t) => {
  const { server, socket, stream } = await opened(t);
  const failed = failure(t, socket);
  stream.write("event: duplex-json\ndata: {\n\n");
  const again = (await server.next()).stream({ attempt: 1 });
  t.defer(() => again.end());
  again.write("event: duplex-json\ndata: {\n\n");
  assertEquals((await failed).message, "Lost: the event stream is damaged");
});

test("a Blob that cannot be read is named", async (t) => {
  const { socket } = await opened(t);
  const failed = failure(t, socket);
  const thrown = new Error("gone");
  const blob = new Blob(["x"]);
  blob.arrayBuffer = () => Promise.reject(thrown);
  socket.send(blob);
  const { message, error } = await failed;
  assertEquals([message, error.cause === thrown], ["Lost: a Blob cannot be read", true]);
});

test("a page's console is told once, where a WebSocket's would be; no other's is", async (t) => {
  const { url } = await t.serve(() => new Response("no", { status: 404 }));
  const warned: string[] = [];
  const { warn } = console;
  console.warn = (text) => void warned.push(text);
  t.defer(() => void (console.warn = warn));
  await failure(t, new WebSocketSSE(url + QUERY, { headers }));
  assertEquals(warned, []);
  const page = globalThis as { document?: unknown };
  page.document = {};
  t.defer(() => void delete page.document);
  const target = url.replace("//", "//ada:hunter2@") + QUERY;
  await failure(t, new WebSocketSSE(target, { headers }));
  assertEquals(warned, [`${new URL(url).host} Not opened: the answer was 404`]);
  const early = new WebSocketSSE(target);
  early.close(); // the page knows
  await failure(t, early);
  assertEquals(warned.length, 1);
});

// ---------------------------------------------------------------- the constructor

test("an option of a value that it cannot have is a TypeError that names those it can", () => {
  const wrong: [object, RegExp][] = [
    [{ transport: "websocket" }, /transport is auto, duplex, stream, post or poll$/],
    [{ transport: 1 }, /transport is auto, /],
    [{ transport: "or" }, /transport is auto, /],
    [{ credentials: true }, /credentials is omit, same-origin or include$/],
    [{ fetch: "fetch" }, /fetch is a function$/],
    [{ fetch: {} }, /fetch is a function$/],
  ];
  for (const [init, message] of wrong) {
    const thrown = assertThrows(() => new WebSocketSSE("http://localhost/", init), TypeError);
    assertMatch(thrown.message, message);
  }
});

test("an option of another name is warned of once, with those that there are", async (t) => {
  const { url } = await listen(t, {});
  t.expect('unknown option "bidirectional"', 'unknown option "constructor"');
  const warned: string[] = [];
  const { warn } = console;
  console.warn = (text) => void warned.push(text);
  t.defer(() => void (console.warn = warn));
  const init = { bidirectional: true, constructor: 1, headers: undefined, fetch: undefined };
  for (let i = 0; i < 2; i++) await connect(t, url, init as object).opened;
  assertEquals(warned.length, 2);
  assertStringIncludes(
    warned[0]!,
    'unknown option "bidirectional"; there are protocols, headers, ',
  );
  assertStringIncludes(warned[1]!, 'unknown option "constructor"');
});

// ---------------------------------------------------------------- console.log

test("a socket shows where it stands, and no secret", async (t) => {
  const server = await listen(t, { handleProtocols: () => "chat" });
  const url = `${server.url.replace("//", "//ada:hunter2@")}${QUERY}`;
  const { socket, opened } = connect(t, url, { protocols: ["chat"], headers, transport: "post" });
  const inspectors: ((value: unknown) => string)[] = [inspect];
  if (runtime === "deno") inspectors.push((value) => Deno.inspect(value));
  if (runtime === "bun") {
    inspectors.push((globalThis as unknown as { Bun: { inspect: typeof inspect } }).Bun.inspect);
  }
  const shows = (...parts: RegExp[]) => {
    for (const show of inspectors) {
      const shown = show(socket);
      for (const part of parts) assertMatch(shown, part);
      assert(!SECRETS.test(shown), shown);
    }
  };
  shows(/WebSocketSSE/, /readyState: 0/, /phase: "?'?opening/);
  await opened;
  shows(
    new RegExp(`url: ["']ws://127\\.0\\.0\\.1:${server.port}/room\\?…["']`),
    ...[/readyState: 1/, /phase: ["']open/, /protocol: ["']chat/, /transport: ["']post/],
    ...[/bufferedAmount: 0/, /isWaiting: false/],
  );
  await server[Symbol.asyncDispose]();
  await within(until(() => /dropped/.test(inspect(socket))), 10_000, "the drop");
  socket.send("hello");
  shows(/readyState: 1/, /phase: ["']dropped/, /bufferedAmount: 5/);
});
