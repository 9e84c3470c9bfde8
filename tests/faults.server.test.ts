/** Faults of the server that were found by use: what it answers, whom it lets in, what it says to whom. */
import { type Cors, type ErrorContext, type Peer, sseAdapter, type SSEOptions } from "../server.ts";
import { assert, assertEquals, assertMatch, assertThrows, sleep, test, until } from "./harness.ts";
import { adapter, listen } from "./pair.ts";
import { frame, from, FULL, post, quiet, streamOf, UPLINK } from "./wire.ts";

const HOME = "http://localhost/room";
const STREAM = { accept: "text/event-stream" };
const open = (headers: Record<string, string> = FULL) => new Request(HOME, { headers });
const tokenOf = (response: Response) => response.headers.get("x-crossws-id")!;

// ---------------------------------------------------------------- the mark, and caches

test("every answer is marked for who speaks version 1, and never cached", async (t) => {
  t.expect(/another instance/);
  const ws = adapter(t, {
    hooks: {
      upgrade(request) {
        if (request.url.endsWith("/mine")) throw new Response("no", { status: 402 });
        if (request.url.endsWith("/false")) return false;
        if (request.url.endsWith("/moved")) return Response.redirect("http://localhost/");
      },
    },
  });
  const opened = await ws.fetch(open());
  const token = tokenOf(opened);
  const up = { ...UPLINK, "x-crossws-id": token, "x-duplex-version": "1" };
  const version = { "x-duplex-version": "1" };
  const requests: [number, Request][] = [
    [204, post(HOME, up, from(1, frame("TEXT", "hi")))],
    [400, post(HOME, up, "nonsense\r\n")],
    [400, post(HOME, version, "hi")],
    [402, new Request(`${HOME}/mine`, { headers: FULL })],
    [403, new Request(`${HOME}/false`, { headers: FULL })],
    [302, new Request(`${HOME}/moved`, { headers: FULL })],
    [404, post(HOME, { ...up, "x-crossws-id": `${"0".repeat(16)}.${"0".repeat(32)}` }, "")],
    [405, new Request(HOME, { method: "PUT", headers: version })],
    [406, new Request(HOME, { headers: { accept: "text/html", ...version } })],
    [409, post(HOME, up, from(7, frame("TEXT", "hi")))],
    [415, post(HOME, { ...up, "content-encoding": "gzip" }, "hi")],
  ];
  for (const [status, request] of requests) {
    const response = await ws.fetch(request);
    assertEquals(response.status, status);
    assertEquals([status, response.headers.get("x-duplex-version")], [status, "1"]);
    assertMatch(response.headers.get("cache-control")!, /no-store/);
    await response.body?.cancel();
  }
  const unasked = await ws.fetch(new Request(HOME, { method: "PUT" }));
  assertEquals(unasked.headers.get("x-duplex-version"), null);
  const plain = await ws.fetch(open({ ...STREAM, "x-duplex-version": "2" }));
  assertEquals(plain.headers.get("x-duplex-version"), null, "it would grant the full level");
  for (const { body } of [opened, plain]) await body!.cancel();
});

test("the 204 that stops an EventSource may not be cached: newcomers would get it", async (t) => {
  const ws = adapter(t, { hooks: { open: (peer) => void peer.send("one") } });
  const response = await ws.fetch(open(STREAM));
  const reader = response.body!.getReader();
  const text = new TextDecoder().decode((await reader.read()).value);
  const id = /^id: (.*)$/m.exec(text)![1]!;
  for (const peer of ws.peers.get("/room")!) peer.close(1000);
  while (!(await reader.read()).done);
  const again = await ws.fetch(open({ ...STREAM, "last-event-id": id }));
  assertEquals([again.status, again.headers.get("cache-control")], [204, "no-store"]);
});

// ---------------------------------------------------------------- origins

const cors: [Cors, allowed: string[], refused: string[]][] = [
  [
    "https://example.com",
    ["https://example.com"],
    ["https://example.co", "https://example.com.evil", "http://example.com", "null"],
  ],
  ["https://Example.com/", ["https://example.com"], ["https://example.org"]],
  ["*", ["https://any.example", "null"], []],
  [/\.example\.com$/g, ["https://a.example.com", "https://b.example.com"], ["https://a.example"]],
  [["https://one.example", /two/], ["https://one.example", "https://two.example"], ["https://on"]],
  [(origin) => origin.endsWith("yes"), ["https://yes"], ["https://no"]],
  [(() => Promise.resolve(false)) as never, [], ["https://a.example"]],
];

for (const [option, allowed, refused] of cors) {
  test(`cors: ${String(option)} allows what it says and nothing else`, async (t) => {
    const ws = adapter(t, { cors: option });
    for (const origin of [...allowed, ...refused]) {
      const response = await ws.fetch(open({ ...FULL, origin, "sec-fetch-site": "cross-site" }));
      await response.body?.cancel();
      assertEquals([origin, response.status], [origin, allowed.includes(origin) ? 200 : 403]);
      const said = allowed.includes(origin) ? option === "*" ? "*" : origin : null;
      assertEquals(response.headers.get("access-control-allow-origin"), said);
      assertEquals(response.headers.get("timing-allow-origin"), said);
    }
  });
}

test("a value of cors that is no origin throws, and names what it may be", () => {
  for (
    const wrong of ["example.com", "https://example.com/path", "https://*.example.com?", 7, {}]
  ) {
    assertThrows(() => sseAdapter({ cors: wrong as never }), TypeError, "cors is");
  }
});

test("over plain http, where a browser tells no site, an Origin of another host is refused", async (t) => {
  const ws = adapter(t, {});
  const ask = async (headers: Record<string, string>) => {
    const response = await ws.fetch(open({ ...FULL, ...headers }));
    await response.body?.cancel();
    return response.status;
  };
  assertEquals(await ask({ origin: "http://evil.example" }), 403);
  assertEquals(await ask({ origin: "null" }), 403);
  assertEquals(await ask({ origin: "http://localhost" }), 200);
  assertEquals(
    await ask({ origin: "https://site.example", "x-forwarded-host": "site.example" }),
    200,
  );
  assertEquals(await ask({ origin: "https://site.example", "sec-fetch-site": "same-origin" }), 200);
});

test("a request to a host that is none is answered 400, and nobody is told", async (t) => {
  const told: unknown[] = [];
  const tell = (...what: unknown[]) => void told.push(what);
  const ws = adapter(t, { hooks: { upgrade: () => tell("upgrade") }, onError: tell });
  // So Deno and Bun pass on a Host of two words; and Bun what it has refused to upgrade.
  for (const url of ["http://a b/", "/", ""]) {
    for (const headers of [FULL, { ...FULL, origin: "http://a" }]) {
      const request = open(headers);
      Object.defineProperty(request, "url", { value: url });
      const { status } = await ws.fetch(request);
      assertEquals([url, status], [url, 400]);
    }
  }
  assertEquals(told, []);
});

test("a preflight that asks for last-event-id alone is one of ours", () => {
  const ws = sseAdapter({ cors: true });
  const asks = (names: string) =>
    ws.handles(
      new Request(HOME, {
        method: "OPTIONS",
        headers: {
          "access-control-request-method": "GET",
          "access-control-request-headers": names,
        },
      }),
    );
  assertEquals([asks("last-event-id"), asks("authorization")], [true, false]);
});

// ---------------------------------------------------------------- hooks

test("upgrade is given the session's peer, so that another's valid credentials do not act for it", async (t) => {
  const got: string[] = [];
  const ws = adapter(t, {
    hooks: {
      upgrade(request, peer) {
        const user = request.headers.get("authorization");
        if (peer && peer.context.user !== user) return false;
        return { context: { user } };
      },
      message: (_, message) => void got.push(message.text()),
    },
  });
  const opened = await ws.fetch(open({ ...FULL, authorization: "anna" }));
  const say = (authorization: string) =>
    ws.fetch(
      post(
        HOME,
        { ...UPLINK, "x-crossws-id": tokenOf(opened), authorization },
        from(1, frame("TEXT", authorization)),
      ),
    );
  assertEquals([(await say("bob")).status, (await say("anna")).status], [403, 204]);
  assertEquals(got, ["anna"]);
  await opened.body!.cancel();
});

test("close is called in a task of its own, after the hooks of the last message and their microtasks", async (t) => {
  const calls: string[] = [];
  const ws = adapter(t, {
    hooks: {
      async message() {
        calls.push("message");
        for (let i = 0; i < 50; i++) await undefined;
        calls.push("message is through");
      },
      close: () => void calls.push("close"),
    },
  });
  const opened = await ws.fetch(open());
  const headers = { ...UPLINK, "x-crossws-id": tokenOf(opened) };
  const body = from(1, new TextEncoder().encode("TEXT 2\r\nhi\r\nCLOSE\r\n"));
  assertEquals((await ws.fetch(post(HOME, headers, body))).status, 204);
  await until(() => calls.length === 3);
  assertEquals(calls, ["message", "message is through", "close"]);
  await opened.body!.cancel();
});

test("hooks run in the async context of their own session, whoever's timer or request ends it", async (t) => {
  const { process } = globalThis as unknown as {
    process: { getBuiltinModule(name: string): typeof import("node:async_hooks") };
  };
  const { AsyncLocalStorage } = process.getBuiltinModule("node:async_hooks");
  const user = new AsyncLocalStorage<string>();
  const seen: string[] = [];
  const note = (hook: string, peer: Peer) =>
    void seen.push(`${hook} of ${peer.context.user} as ${user.getStore()}`);
  const ws = adapter(t, {
    resumeTimeout: 40,
    hooks: {
      upgrade: (request) => ({ context: { user: request.headers.get("x-user") } }),
      open: (peer) => note("open", peer),
      message(peer) {
        note("message", peer);
        throw new Error("of the hook");
      },
      error: (peer) => note("error", peer),
      close: (peer) => note("close", peer),
    },
  });
  const enter = (name: string) => user.run(name, () => ws.fetch(open({ ...FULL, "x-user": name })));
  const [anna, bob] = [await enter("anna"), await enter("bob")];
  await bob.body!.cancel();
  await until(() => seen.some((line) => line.startsWith("close")));
  await user.run("anna, later", () =>
    ws.fetch(
      post(HOME, { ...UPLINK, "x-crossws-id": tokenOf(anna) }, from(1, frame("TEXT", "hi"))),
    ));
  assertEquals(seen, [
    "open of anna as anna",
    "open of bob as bob",
    "close of bob as bob",
    "message of anna as anna, later",
    "error of anna as anna",
  ]);
  await anna.body!.cancel();
});

test("on a machine that stands still no timer is set to a time that has passed", async (t) => {
  const { setTimeout } = globalThis;
  const { now } = performance;
  const delays: number[] = [];
  let stood = 0;
  t.defer(() => Object.assign(globalThis, { setTimeout }));
  t.defer(() => Object.assign(performance, { now }));
  Object.assign(globalThis, {
    setTimeout(task: () => void, delay = 0) {
      delays.push(delay);
      return setTimeout(task, delay);
    },
  });
  Object.assign(performance, { now: () => now.call(performance) + (stood += 10) });
  const ws = adapter(t, { heartbeatInterval: 1, resumeTimeout: 60_000 });
  const opened = await ws.fetch(open());
  await until(() => delays.length > 5);
  assertEquals(delays.filter((delay) => delay < 0), []); // Node warns of it, on the server's console
  await opened.body!.cancel();
});

test("of PINGs and PONGs no more than 16 hooks are pending", async (t) => {
  let called = 0;
  const ws = adapter(t, {
    hooks: {
      ping: () => {
        called++;
        return new Promise<void>(() => {});
      },
    },
  });
  const opened = await ws.fetch(open());
  const headers = { ...UPLINK, "x-crossws-id": tokenOf(opened) };
  const body = new TextEncoder().encode("PING\r\n".repeat(10_000));
  assertEquals((await ws.fetch(post(HOME, headers, body))).status, 204);
  assertEquals(called, 16);
  await opened.body!.cancel();
});

// ---------------------------------------------------------------- mistakes that speak

test("an unknown option or hook is told once, with the one that it may be", (t) => {
  const said = quiet(t);
  sseAdapter({ bidirectional: true, colour: 1, hooks: { mesage() {} } } as SSEOptions);
  assertEquals(said.map(([line]) => line), [
    '[duplex-sse] unknown option "bidirectional": is it "bidir"?',
    '[duplex-sse] unknown option "colour"',
    '[duplex-sse] unknown hook "mesage": is it "message"?',
  ]);
});

test("an option or a hook of the wrong type throws, and is named", () => {
  for (
    const [wrong, named] of [
      [{ bidir: "yes" }, '"bidir" is a boolean'],
      [{ resolve: {} }, '"resolve" is a function'],
      [{ hooks: { open: "hello" } }, '"open" is a function'],
    ] as const
  ) assertThrows(() => sseAdapter(wrong as never), TypeError, named);
});

test("an array that is no bytes cannot be sent in silence", async (t) => {
  let peer!: Peer;
  const ws = adapter(t, { hooks: { open: (opened) => void (peer = opened) } });
  const opened = await ws.fetch(open());
  assertThrows(() => peer.send(["a", "b"]), TypeError, "JSON.stringify");
  assertThrows(() => peer.send([256]), TypeError, "JSON.stringify");
  assert(Number(peer.send([1, 2, 255])) > 0, "bytes, as in crossws");
  await opened.body!.cancel();
});

test("fetch told Node's request answers it, and says which handler is wanted", async () => {
  const errors: unknown[] = [];
  const ws = sseAdapter({ onError: (_, { stage }) => void errors.push(stage) });
  const sent: unknown[] = [];
  const response = {
    writeHead(status: number) {
      sent.push(status);
      return { end: (text: string) => void sent.push(text) };
    },
  };
  const answer = await ws.fetch({ url: "/", headers: {} } as never, response);
  assertEquals([answer.status, sent[0], errors], [500, 500, ["request"]]);
  assertMatch(String(sent[1]), /toNodeHandler/);
  const failed = await ws.fetch("http://localhost" as never).catch((error) => error);
  assert(failed instanceof TypeError && /toNodeHandler/.test(failed.message));
});

test("a token of another instance is complained of once", async (t) => {
  const said = quiet(t);
  const ws = adapter(t, {});
  for (let i = 0; i < 3; i++) {
    const headers = { ...UPLINK, "x-crossws-id": `${"0".repeat(16)}.${"0".repeat(32)}` };
    assertEquals((await ws.fetch(post(HOME, headers, frame("PING")))).status, 404);
  }
  assertEquals(said.length, 1);
  assertMatch(String(said[0]![0]), /cluster\(driver\)/);
});

test("where a host keeps the bodies of lost clients, duplex is 411, which is told once", async (t) => {
  const told: [unknown, string][] = [];
  const ws = adapter(t, { onError: (error, { stage }) => void told.push([error, stage]) });
  const ends: (() => void)[] = [];
  const status = async () => {
    const body = new ReadableStream<Uint8Array>({
      start(controller) {
        controller.enqueue(frame("PING"));
        ends.push(() => controller.close());
      },
    });
    const headers = { ...FULL, ...UPLINK };
    const init = { method: "POST", headers, body, duplex: "half" } as RequestInit;
    const response = await ws.fetch(new Request(HOME, init));
    await response.body!.cancel(); // the client is lost, and the body goes on
    return response.status;
  };
  const opened = await Promise.all(Array.from({ length: 20 }, status));
  assertEquals(opened, Array(20).fill(200), "it may yet tell");
  await sleep(1_100);
  assertEquals([await status(), await status()], [411, 411]);
  assertMatch(String(told), /^Error: This host keeps the connection of a client .*,body$/);
  const other = await ws.fetch(open());
  assertEquals(other.status, 200);
  await other.body!.cancel();
  for (const end of ends.splice(0)) end();
  await until(async () => await status() === 200);
  for (const end of ends) end();
});

test("a body that was dropped beyond its bound is not taken for one that its host keeps", async (t) => {
  const ws = adapter(t, { onError() {} });
  const piece = new Uint8Array(8 * 1024 * 1024);
  const open = async (pieces: number) => {
    let left = pieces;
    let dropped = () => {};
    const all = new Promise<void>((resolve) => dropped = resolve);
    const body = new ReadableStream<Uint8Array>({
      start: (controller) => controller.enqueue(pieces ? piece : frame("PING")),
      pull(controller) {
        if (left-- > 0) return controller.enqueue(piece);
        dropped();
        return new Promise(() => {});
      },
    }, { highWaterMark: 1 });
    const init = { method: "POST", headers: { ...FULL, ...UPLINK }, body, duplex: "half" };
    const response = await ws.fetch(new Request(HOME, init as RequestInit));
    await all;
    await sleep(0);
    await response.body!.cancel();
    return response.status;
  };
  for (let i = 0; i < 20; i++) assertEquals(await open(5), 200);
  await sleep(1_100);
  assertEquals(await open(0), 200);
});

test("onError is told what failed, and where", async () => {
  const told: [unknown, ErrorContext][] = [];
  const oops = new Error("oops");
  const ws = sseAdapter({
    onError: (error, context) => void told.push([error, context]),
    hooks: {
      upgrade(request) {
        if (request.url.endsWith("/upgrade")) throw oops;
      },
      open(peer) {
        if (peer.namespace === "/open") throw oops;
      },
    },
  });
  assertEquals((await ws.fetch(new Request("http://x/upgrade", { headers: FULL }))).status, 500);
  const opened = await ws.fetch(new Request("http://x/open", { headers: FULL }));
  assertEquals(told.map(([error, { stage, hook }]) => [error, stage, hook]), [
    [oops, "hook", "upgrade"],
    [oops, "hook", "open"],
  ]);
  assertEquals([!!told[0]![1].request, told[1]![1].peer?.namespace], [true, "/open"]);
  await opened.body!.cancel();
  await ws.close(1000, "", { signal: AbortSignal.abort() });
});

// ---------------------------------------------------------------- bodies

test("a body that did not arrive is 400, and told once; one that failed by a limit likewise", async (t) => {
  const told: [string, string][] = [];
  const ws = adapter(t, {
    onError: (error, { stage }) => void told.push([stage, String(error)]),
  });
  const opened = await ws.fetch(open());
  const headers = { ...UPLINK, "x-crossws-id": tokenOf(opened) };
  const whole = from(1, frame("TEXT", "hi"));
  const lost = () => post(HOME, { ...headers, "content-length": `${whole.length}` }, streamOf([]));
  for (let i = 0; i < 2; i++) {
    const response = await ws.fetch(lost());
    assertEquals([response.status, response.headers.get("x-duplex-received")], [400, "0"]);
  }
  assertEquals(told.length, 1);
  assertMatch(told[0]![1], /body parser, or a limit/);
  const limited = new ReadableStream({
    pull: (controller) => controller.error(Object.assign(new Error("too long"), { status: 413 })),
  });
  assertEquals((await ws.fetch(post(HOME, headers, limited))).status, 413);
  const cut = new ReadableStream({ pull: (controller) => controller.error(new Error("reset")) });
  assertEquals((await ws.fetch(post(HOME, headers, cut))).status, 204, "the network's doing");
  await opened.body!.cancel();
});

test("no request's body is ever cancelled: some hosts' own streams do not survive that", async (t) => {
  t.expect(/another instance/);
  let cancelled = 0;
  const ws = adapter(t, {});
  const opened = await ws.fetch(open());
  const endless = (chunks: (string | Uint8Array)[]) =>
    streamOf(chunks, { open: true, cancelled: () => void cancelled++ });
  const headers = { ...UPLINK, "x-crossws-id": tokenOf(opened) };
  const unknown = { ...UPLINK, "x-crossws-id": `${"0".repeat(16)}.${"0".repeat(32)}` };
  await ws.fetch(post(HOME, {}, endless(["hi"])));
  await ws.fetch(post(HOME, unknown, endless(["hi"])));
  await ws.fetch(post(HOME, headers, endless(["nonsense\r\n"])));
  const first = ws.fetch(post(HOME, headers, endless([frame("PING")])));
  const others = [1, 2].map(() => ws.fetch(post(HOME, headers, endless([frame("PING")]))));
  assertEquals((await first).status, 204, "a third ends the oldest");
  assertEquals((await ws.fetch(post(HOME, headers, from(1, frame("CLOSE"))))).status, 204);
  assertEquals((await others[0]!).status, 204);
  await opened.body!.cancel();
  assertEquals(cancelled, 0);
});

test("a stream that throws at every touch harms nobody", async (t) => {
  quiet(t);
  const ws = adapter(t, {});
  const request = post(HOME, {}, "hi");
  Object.defineProperty(request, "body", {
    get() {
      throw new TypeError("ERR_INVALID_STATE");
    },
  });
  assert((await ws.fetch(request)).status >= 400);
});

// ---------------------------------------------------------------- the plain level's strangers

test("a polyfill's ?lastEventId= resumes, as the header does", async (t) => {
  const { ws, url } = await listen(t, { hooks: { open: (peer) => void peer.send("one") } });
  const response = await fetch(url, { headers: STREAM });
  const reader = response.body!.getReader();
  let text = "";
  while (!text.includes("data: one")) {
    text += new TextDecoder().decode((await reader.read()).value);
  }
  const id = [...text.matchAll(/^id: (.*)$/gm)].at(-1)![1]!;
  await reader.cancel();
  await until(() => [...ws.peers.get("/") ?? []][0]?.bufferedAmount === 0);
  ws.publish("none", "");
  const again = await fetch(`${url}?lastEventId=${id}`, { headers: STREAM });
  assertEquals(ws.peers.get("/")!.size, 1, "no second session");
  await again.body!.cancel();
});

test("no parser sees an event that is none: comments and ids make no empty ones", async (t) => {
  const ws = adapter(t, { bidir: false, heartbeatInterval: 20, hooks: {} });
  const response = await ws.fetch(open(STREAM));
  const reader = response.body!.getReader();
  let text = "";
  while ((text.match(/^:$/gm) ?? []).length < 2) {
    text += new TextDecoder().decode((await reader.read()).value);
  }
  assertEquals(text.includes("\n\n"), false, JSON.stringify(text));
  await reader.cancel();
});

for (
  const [what, headers, act, word] of [
    ["a close", {}, (peer) => peer.close(4000), "duplex-close"],
    ["the answer of a poll", { "x-duplex-poll": "1" }, (peer) => peer.send("news"), "data: news"],
  ] as [string, Record<string, string>, (peer: Peer) => void, string][]
) {
  test(`a connection whose loss is told while ${what} is written to it is lost once`, async (t) => {
    const peers: Peer[] = [];
    const ws = adapter(t, { hooks: { open: (peer) => void peers.push(peer) } });
    const opened = await ws.fetch(open());
    const token = { ...FULL, "x-crossws-id": tokenOf(opened), "last-event-id": "0" };
    const resume = async (attempt: number, more: Record<string, string> = {}) => {
      const request = open({ ...token, "x-duplex-attempt": `${attempt}`, ...more });
      return (await ws.fetch(request)).body!.getReader();
    };
    const second = await resume(1, headers);
    await second.read();
    const next = second.read();
    await sleep(10); // the runtime asks for bytes

    // As Deno does: the runtime tells of a write that fails from inside of `enqueue`.
    const { prototype } = ReadableStreamDefaultController;
    const { enqueue } = prototype;
    let isCut = false;
    prototype.enqueue = function (chunk) {
      enqueue.call(this, chunk);
      if (isCut) return;
      isCut = true;
      second.cancel();
    };
    t.defer(() => void (prototype.enqueue = enqueue));
    act(peers[0]!);
    await next;
    prototype.enqueue = enqueue;
    assert(isCut);

    const third = await resume(2);
    let text = "";
    while (!text.includes(word)) {
      const { done, value } = await third.read();
      assert(!done, text);
      text += new TextDecoder().decode(value);
    }
    assertEquals(peers.length, 1);
    await third.cancel();
  });
}
