/**
 * Who may do what: the token is secret and the id is not, credentials count at
 * every request, other origins are let in only when asked for, and what is
 * refused costs nothing.
 */
import vm from "node:vm";
import v8 from "node:v8";
import { inspect } from "node:util";
import crossws from "crossws/adapters/sse";
import { type Cors, type Message, type Peer, sseAdapter, type SSEOptions } from "../server.ts";
import { assert, assertEquals, assertLess, assertMatch, runtime, test, until } from "./harness.ts";
import { frame, from, FULL, post, quiet, Scene, streamOf, UPLINK, WireClient } from "./wire.ts";

const resume = (token: string, attempt = 1, received = 0) => ({
  ...FULL,
  "x-crossws-id": token,
  "x-duplex-attempt": `${attempt}`,
  "last-event-id": `${received}`,
});

// ---------------------------------------------------------------- the token

interface Inspectors {
  Deno?: { inspect(value: unknown, options?: unknown): string };
  Bun?: { inspect(value: unknown, options?: unknown): string };
}

/** Everything that a program might log of a value. */
function shown(value: unknown): string {
  const { Deno, Bun } = globalThis as Inspectors;
  const texts = [inspect(value, { depth: 8, showHidden: true })];
  if (Deno) texts.push(Deno.inspect(value, { depth: 8, showHidden: true, getters: true }));
  if (Bun) texts.push(Bun.inspect(value, { depth: 8 }));
  try {
    texts.push(JSON.stringify(value) ?? "", String(value));
  } catch {
    // a cycle, or what has no string: nothing to be shown
  }
  return texts.join("\n");
}

for (const full of [true, false]) {
  const level = full ? "full" : "plain";

  test(`the token of a ${level} session is not its id and shows nowhere but in its own stream`, async (t) => {
    const said = quiet(t);
    const values: unknown[] = [];
    const scene = await Scene.make(t, {}, {
      open(peer) {
        values.push(peer, peer.websocket, peer.peers, peer.topics, peer.request, peer.context);
        console.log(peer, peer.websocket, peer.peers);
      },
      message(peer, message) {
        values.push(message, message.peer, message.data);
        console.log(message);
        peer.send(`${peer} ${peer.id} ${message.id} ${JSON.stringify({ peer, message })}`);
        throw new Error("of the hook");
      },
      error(peer, error) {
        values.push(error, error.stack, peer);
        console.error(error, peer);
      },
      close: (peer, details) => void values.push(peer, details),
    });
    const peer = await scene.open({ full });
    if (!full) {
      assertEquals(await peer.next("crossws-id"), { type: "crossws-id", data: peer.token });
    }
    const { token } = peer;
    const [instance, secret] = token.split(".") as [string, string];
    assertMatch(token, /^[0-9a-f]{16}\.[0-9a-f]{32}$/); // 128 random bits and more
    // What is refused does not repeat it either.
    for (
      const request of [
        post(scene.url, { "x-crossws-id": `${token}0` }, "one"),
        post(`${scene.url}/other`, { "x-crossws-id": token }, "one"),
        new Request(scene.url, { headers: resume(token, 1, 99) }),
        new Request(scene.url, { method: "PUT", headers: resume(token) }),
      ]
    ) {
      const { status, headers, text } = await scene.ask(request);
      assert(status >= 400);
      values.push(text, [...headers]);
    }

    assertEquals(await peer.send("hello"), 204);
    const text = await peer.message();
    assertEquals(await peer.closed(), 1011);
    if (full) await peer.close(1011);

    await until(() => scene.ws.peers.size === 0);
    const [first] = values as [Peer];
    assertEquals(JSON.stringify(first), "{}");
    assert(!first.id.includes(secret) && !token.includes(first.id));
    for (const value of [...values, ...said.flat(), scene.ws, text]) {
      const output = shown(value);
      assert(!output.includes(secret), `the token is in ${output}`);
      assert(!output.includes(instance), `a part of the token is in ${output}`);
    }
    const message = values.find((value) => shown(value).includes("hello")) as Message;
    assert(message, "the messages were inspected");
  });
}

test("tokens and ids are never the same twice", async (t) => {
  const scene = await Scene.make(t);
  const seen = new Set<string>();
  for (let count = 0; count < 20; count++) {
    const peer = await scene.open();
    seen.add(peer.token);
    seen.add(peer.token.split(".")[1]!);
    await peer.close();
  }
  for (const { hook, detail } of scene.calls) if (hook === "open") seen.add((detail as Peer).id);
  assertEquals(seen.size, 60);
});

// ---------------------------------------------------------------- the public id

test("knowing a peer's public id gives no power: POSTing with it is answered 400 and reaches no hook", async (t) => {
  for (const full of [true, false]) {
    const scene = await Scene.make(t);
    const victim = await scene.open({ full });
    const { id } = scene.calls.find(({ hook }) => hook === "open")!.detail as Peer;
    const { token } = victim;
    const before = scene.calls.length;
    const attempts = [
      id,
      id.replaceAll("-", ""),
      `${token.slice(0, 17)}${id.replaceAll("-", "")}`, // with an instance that is no secret
      `${id}.${id}`,
    ];
    for (const guess of attempts) {
      for (
        const request of [
          post(scene.url, { "x-crossws-id": guess }, "as the victim"),
          post(scene.url, { "x-crossws-id": guess }, streamOf(["as the victim"])),
          post(scene.url, { ...UPLINK, "x-crossws-id": guess }, from(1, frame("TEXT", "x"))),
          post(scene.url, { ...resume(guess), ...UPLINK }, frame("TEXT", "x")),
          new Request(scene.url, { headers: resume(guess) }),
        ]
      ) {
        const { status } = await scene.ask(request);
        assertEquals([guess, status], [guess, guess.length === 49 ? 404 : 400]);
      }
    }
    // An event stream "resumed" by the id is a new session, of somebody else.
    const stranger = t.use(
      await WireClient.open(scene.fetch, scene.url, {
        full: false,
        headers: { "last-event-id": `${id.replaceAll("-", "")}.0` },
      }),
    );
    assert(stranger.token !== token);
    assertEquals(scene.calls.slice(before).map((call) => call.hook), ["upgrade", "open"]);
    assertEquals(await victim.send("still me"), 204);
    assertEquals(await victim.message(), "still me");
  }
});

test("the same attack works against crossws, so this test can tell", async (t) => {
  const received: [string, string][] = [];
  let id = "";
  const adapter = crossws({
    bidir: true,
    hooks: {
      open: (peer) => void (id = peer.id),
      message: (peer, message) => void received.push([peer.id, message.text()]),
    },
  });
  const server = await t.serve((request) => adapter.fetch(request as never));
  const abort = new AbortController();
  const response = await fetch(server.url, {
    headers: { accept: "text/event-stream" },
    signal: abort.signal,
  });
  t.defer(() => abort.abort());
  const reader = response.body!.getReader();
  await reader.read();
  const attack = await fetch(post(server.url, { "x-crossws-id": id }, "as the victim"));
  await attack.body?.cancel();
  assertEquals(attack.status, 200);
  assertEquals(received, [[id, "as the victim"]]);
  await reader.cancel();
});

test("the resume key of a plain session can resume but not send", async (t) => {
  const scene = await Scene.make(t, { resumeTimeout: 5000 });
  const peer = await scene.open({ full: false });
  assertEquals(await peer.send("one"), 204);
  assertEquals(await peer.message(), "one");
  const [key, number] = peer.id.split(".") as [string, string];
  assertMatch(key, /^[0-9a-f]{32}$/);
  assert(!peer.token.includes(key));
  assertEquals(number, "1");

  for (const guess of [key, peer.id, `${peer.token.slice(0, 17)}${key}`]) {
    const { status } = await scene.ask(post(scene.url, { "x-crossws-id": guess }, "two"));
    assertEquals(status, guess.length === 49 ? 404 : 400);
  }
  assertEquals(scene.count("message"), 1);

  const headers = { accept: "text/event-stream", "last-event-id": peer.id };
  const response = await scene.fetch(new Request(scene.url, { headers }));
  const resumed = t.use(await WireClient.of(scene.fetch, scene.url, response, false));
  assertEquals(resumed.token, peer.token);
  assertEquals(await resumed.send("two"), 204);
  assertEquals(await resumed.message(), "two");
  assertEquals(scene.count("open"), 1);
});

// ---------------------------------------------------------------- credentials

for (const how of ["returns", "throws"] as const) {
  test(`an uplink or resume whose credentials upgrade refuses (it ${how}) calls no other hook`, async (t) => {
    let valid = "first";
    const no = () => new Response("expired\n", { status: 401, headers: { "x-why": "rotated" } });
    const scene = await Scene.make(t, {}, {
      upgrade(request) {
        if (request.headers.get("authorization") === valid) return;
        if (how === "throws") throw no();
        return no();
      },
    });
    const old = { authorization: "first" };
    const full = await scene.open({ headers: old });
    const plain = await scene.open({ full: false, headers: old });
    const before = scene.calls.length;
    valid = "second";
    // While the streams that are open go on: only requests are checked.
    const uplink = { ...UPLINK, "x-crossws-id": full.token, ...old };
    const requests: [string, () => Request][] = [
      ["uplink", () => post(scene.url, uplink, from(1, frame("TEXT", "no")))],
      ["streaming uplink", () => post(scene.url, uplink, streamOf([from(1, frame("TEXT", "no"))]))],
      ["control", () => post(scene.url, uplink, frame("PING"))],
      ["resume", () => new Request(scene.url, { headers: { ...resume(full.token), ...old } })],
      ["duplex resume", () =>
        post(
          scene.url,
          { ...resume(full.token), ...uplink, accept: "text/event-stream" },
          frame("TEXT", "no"),
        )],
      ["plain message", () => post(scene.url, { "x-crossws-id": plain.token, ...old }, "no")],
      ["plain resume", () =>
        new Request(scene.url, {
          headers: { accept: "text/event-stream", "last-event-id": plain.id, ...old },
        })],
      ["no credentials", () => post(scene.url, { "x-crossws-id": plain.token }, "no")],
      ["opening", () => new Request(scene.url, { headers: { ...FULL, ...old } })],
    ];
    for (const [name, request] of requests) {
      const { status, headers, text } = await scene.ask(request());
      assertEquals([name, status, headers.get("x-why"), text], [name, 401, "rotated", "expired\n"]);
    }
    assertEquals(scene.calls.length, before);

    // The session is untouched: with fresh credentials it goes on, the first message being 1.
    const fresh = { authorization: "second" };
    const answer = await scene.ask(
      post(scene.url, { ...uplink, ...fresh }, from(1, frame("TEXT", "yes"))),
    );
    assertEquals([answer.status, answer.headers.get("x-duplex-received")], [204, "1"]);
    assertEquals(await full.message(), "yes");
    const said = await scene.ask(
      post(
        scene.url,
        { "x-crossws-id": plain.token, "content-type": "text/plain", ...fresh },
        "yes",
      ),
    );
    assertEquals(said.status, 204);
    assertEquals(await plain.message(), "yes");
    assertEquals(scene.count("message"), 2);
  });
}

test("on an existing session only a refusal counts: headers and context are discarded", async (t) => {
  let turn = 0;
  const scene = await Scene.make(t, {}, {
    upgrade: () => ({ headers: { "x-turn": `${++turn}` }, context: { turn } }),
    message: (peer) => void peer.send(`${peer.context.turn}`),
  });
  const peer = await scene.open();
  assertEquals(peer.response.headers.get("x-turn"), "1");
  const answer = await peer.post(frame("TEXT", "which?"));
  assertEquals([answer.status, answer.headers.get("x-turn")], [204, null]);
  assertEquals(await peer.message(), "1");
  const response = await scene.fetch(new Request(scene.url, { headers: resume(peer.token, 1, 1) }));
  assertEquals(response.headers.get("x-turn"), null);
  const resumed = t.use(await WireClient.of(scene.fetch, scene.url, response));
  resumed.seq = 2;
  assertEquals(await resumed.send("which?"), 204);
  assertEquals(await resumed.message(), "1");
  assertEquals(turn, 4);
});

// ---------------------------------------------------------------- other origins

const HOME = "https://home.test";
const OTHER = "https://other.test";
type Headers_ = Record<string, string>;

/** A request that reaches the adapter as a browser would send it: no network could carry these. */
function browser(headers: Headers_, init: { method?: string; url?: string } = {}): Request {
  const { method = "GET", url = `${HOME}/room` } = init;
  const all = new Headers({ accept: "text/event-stream", ...headers });
  const request = new Request(url, { method });
  // Runtimes let a server see these headers, but a program's Request may not set them all.
  Object.defineProperty(request, "headers", { value: all });
  return request;
}

async function answer(options: SSEOptions, request: Request) {
  const calls: string[] = [];
  const hooks = {
    upgrade: () => void calls.push("upgrade"),
    open: () => void calls.push("open"),
  };
  const ws = sseAdapter({ bidir: true, resumeTimeout: 0, ...options, hooks });
  const response = await ws.fetch(request);
  const { status, headers } = response;
  await response.body?.cancel();
  await ws.close();
  return { status, headers, calls };
}

const site = (value: string) => ({ "sec-fetch-site": value });
const EXPOSED = "x-crossws-id, x-duplex-version, x-duplex-received, x-duplex-close, retry-after";

test("without cors, a request of another site or origin is answered 403 before any hook", async () => {
  for (const value of ["cross-site", "same-site", "anything"]) {
    for (const method of ["GET", "POST", "OPTIONS"]) {
      const request = browser({ ...site(value), origin: OTHER }, { method });
      const { status, headers, calls } = await answer({}, request);
      assertEquals([value, method, status, calls], [value, method, 403, []]);
      assertEquals(headers.get("access-control-allow-origin"), null);
    }
  }
  for (const headers of [site("same-origin"), site("none"), {}]) {
    const { status, calls } = await answer({}, browser(headers));
    assertEquals([status, calls], [200, ["upgrade", "open"]]);
  }
});

const CASES: [name: string, cors: Cors, origin: string, allowed: string | undefined][] = [
  ["true", true, OTHER, "*"],
  ["true", true, HOME, "*"],
  ["a list that names it", [OTHER], OTHER, OTHER],
  ["a list that does not name it", ["https://third.test"], OTHER, undefined],
  ["an empty list", [], OTHER, undefined],
  ["a list, and another port", [OTHER], `${OTHER}:8443`, undefined],
  ["a list, and another scheme", [OTHER], "http://other.test", undefined],
  ["a list, and a longer name", [OTHER], `${OTHER}.evil.test`, undefined],
  ["a list, and null", [OTHER], "null", undefined],
  ["a function that allows it", (origin) => origin === OTHER, OTHER, OTHER],
  ["a function that does not", () => false, OTHER, undefined],
];

for (const [name, cors, origin, allowed] of CASES) {
  test(`with cors ${name}, ${origin} ${allowed ? "is let in" : "is answered 403 before any hook"}`, async () => {
    const cross = origin === HOME ? site("same-origin") : site("cross-site");
    for (const headers of [{ origin, ...cross }, { origin }]) { // older browsers do not tell the site
      const { status, headers: said, calls } = await answer({ cors }, browser(headers));
      const credentials = said.get("access-control-allow-credentials");
      if (!allowed) {
        assertEquals([status, calls], [403, []]);
        assertEquals(said.get("access-control-allow-origin"), null);
        continue;
      }
      assertEquals([status, calls], [200, ["upgrade", "open"]]);
      assertEquals(said.get("access-control-allow-origin"), allowed);
      assertEquals(credentials, allowed === "*" ? null : "true", "only with an explicit origin");
      assertEquals(said.get("access-control-expose-headers"), EXPOSED);
      assertMatch(said.get("vary")!, /\borigin\b/i);
    }

    const asked = "authorization, x-duplex-attempt";
    const preflight = browser({
      origin,
      ...cross,
      "access-control-request-method": "POST",
      "access-control-request-headers": asked,
    }, { method: "OPTIONS" });
    assert(sseAdapter({ cors }).handles(preflight));
    const { status, headers, calls } = await answer({ cors }, preflight);
    assertEquals(calls, [], "a preflight reaches no hook");
    assertEquals(headers.get("access-control-allow-origin"), allowed ?? null);
    assertEquals(status, allowed ? 204 : 403);
    if (!allowed) return;
    assertEquals(headers.get("access-control-allow-methods"), "GET, POST");
    assertEquals(headers.get("access-control-allow-headers"), asked);
    assertEquals(headers.get("access-control-max-age"), "600");
    assertMatch(headers.get("vary")!, /\borigin\b/i);
  });
}

test("a function of cors that throws is answered 500 before any hook", async (t) => {
  quiet(t);
  const cors = () => {
    throw new Error("oops");
  };
  const { status, calls } = await answer({ cors }, browser({ origin: OTHER }));
  assertEquals([status, calls], [500, []]);
});

test("with cors, the same origin is served though it is not listed, and Vary says so", async () => {
  const { status, headers } = await answer({ cors: [OTHER] }, browser(site("same-origin")));
  assertEquals(status, 200);
  assertEquals(headers.get("access-control-allow-origin"), null);
  assertMatch(headers.get("vary")!, /\borigin\b/i);
  const own = await answer({ cors: [OTHER] }, browser({ origin: HOME }));
  assertEquals(own.status, 200);
});

test("with cors manual, everything is left to the middleware around it", async () => {
  const ask = (headers: Headers_, method?: string) =>
    answer({ cors: "manual" }, browser(headers, method ? { method } : {}));
  const { status, headers } = await ask({ origin: OTHER, ...site("cross-site") });
  assertEquals(status, 200);
  for (const name of headers.keys()) assert(!name.startsWith("access-control-"), name);
  const preflight = { origin: OTHER, "access-control-request-method": "GET" };
  assertEquals((await ask(preflight, "OPTIONS")).status, 405);
  assertEquals(
    sseAdapter({ cors: "manual" }).handles(browser({ ...preflight, accept: "*/*" }, {
      method: "OPTIONS",
    })),
    false,
  );
});

test("an allowed origin may read refusals, also a hook's own Response with its headers", async () => {
  for (
    const make of [
      () => new Response("no", { status: 401 }),
      () => Response.redirect(`${HOME}/login`), // its headers cannot be changed
      () =>
        new Response("no", {
          status: 403,
          headers: { "access-control-allow-origin": "*", vary: "cookie" },
        }),
    ]
  ) {
    const expected = make().status;
    const ws = sseAdapter({ cors: [OTHER], hooks: { upgrade: make } });
    const response = await ws.fetch(browser({ origin: OTHER, ...site("cross-site") }));
    assertEquals(response.status, expected);
    assertEquals(response.headers.get("access-control-allow-origin"), OTHER);
    assertMatch(response.headers.get("vary")!, /\borigin\b/i);
    await response.body?.cancel();
    await ws.close();
  }
  const { status, headers } = await answer(
    { cors: true },
    browser({ origin: OTHER }, { method: "PUT" }),
  );
  assertEquals([status, headers.get("access-control-allow-origin")], [405, "*"]);
});

// ---------------------------------------------------------------- responses and limits

test("a stream says that nothing may keep, change or hold it, and begins with bytes at once", async (t) => {
  for (const full of [true, false]) {
    const scene = await Scene.make(t);
    const response = await scene.fetch(
      new Request(scene.url, { headers: full ? FULL : { accept: "text/event-stream" } }),
    );
    const { headers } = response;
    assertEquals(headers.get("content-type"), "text/event-stream");
    assertEquals(headers.get("cache-control"), "private, no-store, no-transform");
    assertEquals(headers.get("x-accel-buffering"), "no");
    assertEquals(headers.get("x-duplex-version"), full ? "1" : null);
    const reader = response.body!.getReader();
    assert((await reader.read()).value!.length > 0);
    await reader.cancel();
  }
});

test("a refusal is not to be kept by anybody either", async (t) => {
  const scene = await Scene.make(t);
  const { status, headers } = await scene.ask(post(scene.url, {}, "x"));
  assertEquals([status, headers.get("cache-control")], [400, "no-store"]);
});

test("at maxPeers a newcomer is answered 503 with Retry-After before any hook, and those inside go on", async (t) => {
  const scene = await Scene.make(t, { maxPeers: 2, resumeTimeout: 5000 });
  const first = await scene.open();
  const second = await scene.open({ full: false });
  const before = scene.calls.length;
  for (
    const request of [
      new Request(scene.url, { headers: FULL }),
      new Request(scene.url, { headers: { accept: "text/event-stream" } }),
      post(scene.url, { ...FULL, ...UPLINK }, frame("TEXT", "x")),
    ]
  ) {
    const { status, headers } = await scene.ask(request);
    assertEquals(status, 503);
    assertMatch(headers.get("retry-after")!, /^[1-9]\d*$/);
  }
  assertEquals(scene.calls.length, before);
  assertEquals(await first.send("inside"), 204);
  assertEquals(await first.message(), "inside");
  // Those inside may still resume, and one that leaves makes room.
  const response = await scene.fetch(
    new Request(scene.url, { headers: resume(first.token, 1, 1) }),
  );
  const resumed = t.use(await WireClient.of(scene.fetch, scene.url, response));
  assertEquals(await resumed.close(), 204);
  await (await scene.open()).close();
  await second.drop();
});

test("newcomers that wait for a slow upgrade together do not pass maxPeers", async (t) => {
  const gate = Promise.withResolvers<void>();
  const scene = await Scene.make(t, { maxPeers: 3 }, { upgrade: () => gate.promise });
  const asked = Array.from(
    { length: 10 },
    () => scene.fetch(new Request(scene.url, { headers: FULL })),
  );
  gate.resolve();
  const responses = await Promise.all(asked);
  const statuses = responses.map((response) => response.status).sort();
  assertEquals(statuses, [200, 200, 200, 503, 503, 503, 503, 503, 503, 503]);
  assertEquals([...scene.ws.peers.values()][0]!.size, 3);
  for (const response of responses) await response.body?.cancel();
});

/** A forced collection: without it, nothing could be said of what is kept. */
async function collect(): Promise<void> {
  const { Bun } = globalThis as { Bun?: { gc(force: boolean): void } };
  await new Promise((resolve) => setTimeout(resolve)); // a WeakRef holds until its task ends
  if (Bun) return Bun.gc(true);
  v8.setFlagsFromString("--expose-gc");
  vm.runInNewContext("gc")();
}

test("nothing is kept of refused requests: no peer, no timer, no memory", async (t) => {
  t.expect(/for a session of another instance/);
  const refs: WeakRef<Request>[] = [];
  let refuse = true;
  const ws = sseAdapter({
    bidir: true,
    maxPeers: 1,
    resumeTimeout: 0,
    hooks: { upgrade: () => refuse ? new Response("no", { status: 401 }) : undefined },
  });
  t.defer(() => ws.close());
  await collect(); // and the harness has started its own timer meanwhile
  const original = globalThis.setTimeout;
  let timers = 0;
  globalThis.setTimeout = ((...args: Parameters<typeof setTimeout>) => {
    timers++;
    return original(...args);
  }) as typeof setTimeout;
  t.defer(() => globalThis.setTimeout = original);
  const url = `${HOME}/room`;
  const token = `${"a".repeat(16)}.${"b".repeat(32)}`;
  const kinds: [() => Request, number][] = [
    [() => new Request(url, { headers: FULL }), 401],
    [() => new Request(url, { headers: { accept: "text/event-stream" } }), 401],
    [() => post(url, { ...FULL, ...UPLINK }, frame("TEXT", "x")), 401],
    [() => new Request(url, { headers: resume(token) }), 404],
    [() => post(url, { ...UPLINK, "x-crossws-id": token }, frame("TEXT", "x")), 404],
    [() => post(url, { "x-crossws-id": "a, a" }, "x"), 400],
    [() => post(url, {}, "x".repeat(1000)), 400],
    [() => new Request(url, { method: "PUT" }), 405],
    [() => new Request(url, { headers: { accept: "text/html" } }), 406],
    [() => new Request(url, { headers: { "sec-fetch-site": "cross-site" } }), 403],
  ];
  // In a function of its own, so that no local holds the last of them.
  const ask = async (make: () => Request): Promise<number> => {
    const request = make();
    if (refs.length < 1000) refs.push(new WeakRef(request));
    const response = await ws.fetch(request);
    await response.body?.cancel();
    return response.status;
  };
  for (let count = 0; count < 2000; count++) {
    const [make, status] = kinds[count % kinds.length]!;
    const actual = await ask(make);
    // Some runtimes do not let a program set this one header.
    if (status !== 403) assertEquals(actual, status);
  }
  assertEquals([timers, ws.peers.size], [0, 0]);
  globalThis.setTimeout = original;
  await collect();
  await collect();
  const kept = refs.filter((ref) => ref.deref()).length;
  // Bun's collector is conservative: it may see a few in dead stack slots.
  assert(kept <= (runtime === "bun" ? 50 : 5), `${kept} of ${refs.length} requests are kept`);
  refuse = false; // and the one place is free
  const response = await ws.fetch(new Request(url, { headers: FULL }));
  assertEquals(response.status, 200);
  await response.body!.cancel();
});

test("a namespace is not empty, since to the other instances that would be all of them", async (t) => {
  const relayed: string[] = [];
  const ws = sseAdapter({
    getNamespace: (request) => new URL(request.url).searchParams.get("room") ?? "",
    sync: () => ({ subscribe() {}, publish: ({ namespace }) => void relayed.push(namespace) }),
    hooks: { open: (peer) => peer.publish("chat", "for my room") },
  });
  t.defer(() => ws.close());
  for (const [query, status] of [["?room=a", 200], ["", 400], ["?room=", 400]] as const) {
    const url = `http://localhost/${query}`;
    const response = await ws.fetch(new Request(url, { headers: FULL }));
    await response.body!.cancel();
    assertEquals(response.status, status);
  }
  assertEquals(relayed, ["a"]);
  for (const peer of ws.peers.get("a")!) peer.terminate();
});

// ---------------------------------------------------------------- while a hook is thinking

for (const [how, status] of Object.entries({ terminate: 404, close: 200 })) {
  test(`a session that ends by ${how} while upgrade is asked again is not resumed`, async (t) => {
    const peers: Peer[] = [];
    const ws = sseAdapter({
      hooks: {
        open: (peer) => void peers.push(peer),
        async upgrade(request) {
          if (!request.headers.has("last-event-id")) return;
          if (how === "terminate") return peers[0]!.terminate();
          const headers = { ...UPLINK, "x-crossws-id": token };
          await ws.fetch(post(url, headers, from(1, frame("CLOSE"))));
        },
      },
    });
    t.defer(() => ws.close());
    const url = "http://localhost/room";
    const { token } = t.use(await WireClient.open(ws.fetch, url));
    const response = await ws.fetch(new Request(url, { headers: resume(token) }));
    assertEquals(response.status, status);
    // What is left of a session that was closed says so once more, and no more.
    assertEquals((await response.text()).includes("duplex-close"), status === 200);
    assertEquals(ws.peers.size, 0);
  });
}

for (const when of ["while its last bytes wait", "while upgrade is asked again"]) {
  test(`an EventSource whose session closes ${when} is answered 204`, async (t) => {
    const peers: Peer[] = [];
    const waits = when.startsWith("while its");
    const ws = sseAdapter({
      hooks: {
        open: (peer) => void peers.push(peer),
        upgrade(request) {
          if (request.headers.has("last-event-id") && !waits) peers[0]!.close(4000);
        },
      },
    });
    t.defer(() => ws.close());
    const url = "http://localhost/room";
    const { body } = await ws.fetch(new Request(url, { headers: { accept: FULL.accept! } }));
    const reader = body!.getReader();
    const [, id] = /^id: (.*)$/m.exec(new TextDecoder().decode((await reader.read()).value))!;
    if (waits) peers[0]!.close(4000); // and nobody reads
    else await reader.cancel();
    const headers = { accept: FULL.accept!, "last-event-id": id! };
    assertEquals((await ws.fetch(new Request(url, { headers }))).status, 204);
    assertEquals(peers.length, 1);
    await reader.cancel();
  });
}

test("upgrade is asked once for an EventSource that has missed too much, and gets a new session", async (t) => {
  const peers: Peer[] = [];
  const asked: string[] = [];
  const ws = sseAdapter({
    hooks: { open: (peer) => void peers.push(peer), upgrade: ({ url }) => void asked.push(url) },
  });
  t.defer(() => ws.close());
  const url = "http://localhost/room";
  const one = t.use(await WireClient.open(ws.fetch, url, { full: false }));
  peers[0]!.send("one");
  await one.message();
  await one.drop();
  for (let i = 0; i < 10; i++) peers[0]!.send("x".repeat(20_000));
  asked.length = 0;
  t.use(
    await WireClient.open(ws.fetch, url, { full: false, headers: { "last-event-id": one.id } }),
  );
  assertEquals([asked.length, peers.length], [1, 2]);
  for (const peer of peers) peer.terminate();
});

test("an event id of another namespace opens a session of its own", async (t) => {
  const ws = sseAdapter({ hooks: { open: (peer) => void peer.send(peer.namespace) } });
  t.defer(() => ws.close());
  const one = t.use(await WireClient.open(ws.fetch, "http://localhost/one", { full: false }));
  assertEquals(await one.message(), "/one");
  const headers = { "last-event-id": one.id };
  const two = t.use(
    await WireClient.open(ws.fetch, "http://localhost/two", { full: false, headers }),
  );
  assertEquals(await two.message(), "/two");
  assert(two.id.split(".")[0] !== one.id.split(".")[0], "it has a secret of its own");
  assertEquals([...ws.peers.keys()], ["/one", "/two"]);
});

test("of a request that is refused nothing is read, and nothing cancelled: its host does what is right", async (t) => {
  quiet(t);
  const ws = sseAdapter({ bidir: true });
  let cancelled = false;
  let asked = 0;
  const chunks = (function* () {
    while (++asked < 1000) yield "x".repeat(64 * 1024);
  })();
  const body = streamOf(chunks, { cancelled: () => cancelled = true });
  const headers = { ...UPLINK, "x-crossws-id": `${"0".repeat(16)}.${"0".repeat(32)}` };
  const response = await ws.fetch(post("http://localhost/", headers, body));
  assertEquals(response.status, 404);
  await new Promise((resolve) => setTimeout(resolve, 20));
  assertEquals([body.locked, cancelled], [false, false]);
  assertLess(asked, 2); // what the stream itself asks for
});

test("what a hook's answer varies by stands beside the origin, by which ours does", async () => {
  const hooks = { upgrade: () => ({ headers: { vary: "cookie" } }) };
  const ws = sseAdapter({ cors: true, resumeTimeout: 0, hooks });
  const headers = { ...FULL, origin: "https://elsewhere.example" };
  const response = await ws.fetch(new Request("http://localhost/", { headers }));
  await response.body!.cancel();
  assertEquals(response.headers.get("vary"), "cookie, origin");
  await ws.close();
});
