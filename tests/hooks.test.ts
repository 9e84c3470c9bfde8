/**
 * The server's surface as hooks see it: everything that crossws 0.4.17 gives
 * them, and what it leaves undone.
 */
import { runInNewContext } from "node:vm";
import { inspect } from "node:util";
import { broadcastChannel } from "crossws/sync";
import { type Hooks, type Message, type Peer, sseAdapter } from "../mod.ts";
import {
  assert,
  assertEquals,
  assertGreater,
  assertMatch,
  assertRejects,
  assertStrictEquals,
  assertThrows,
  deferred,
  runtime,
  test,
  until,
  within,
} from "./harness.ts";
import { connect, listen, Queue, shutDown } from "./pair.ts";
import {
  byteStreamOf,
  frame,
  from,
  FULL,
  post,
  streamOf as ordinaryStreamOf,
  UPLINK,
  WireClient,
  wireClient,
} from "./wire.ts";

const UUID = /^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/;
const CARRIED = Symbol.for("crossws.hooks");
const bytes = (...values: number[]) => new Uint8Array(values);

// ---------------------------------------------------------------- the order of hooks

test("hooks come in order: upgrade with the request, open and message with the peer, close with code and reason", async (t) => {
  const calls: unknown[][] = [];
  const closed = deferred();
  const { url } = await listen(t, {
    hooks: {
      upgrade: (...args) => void calls.push(["upgrade", ...args]),
      open: (...args) => void calls.push(["open", ...args]),
      message: (...args) => void calls.push(["message", ...args]),
      close: (...args) => {
        calls.push(["close", ...args]);
        closed.resolve();
      },
    },
  });
  const { socket, opened } = connect(t, `${url}/room?x=1`);
  await opened;
  socket.send("one");
  socket.send(bytes(2));
  socket.close(4001, "bye");
  await closed.promise;
  assertEquals(calls.map(([name]) => name), ["upgrade", "open", "message", "message", "close"]);
  const [upgrade, open, first, second, close] = calls as [
    [string, Request],
    [string, Peer],
    [string, Peer, Message],
    [string, Peer, Message],
    [string, Peer, { code: number; reason: string }],
  ];
  assertEquals(upgrade[1].url, `${url}/room?x=1`);
  for (const call of [first, second, close]) assertStrictEquals(call[1], open[1]);
  assertStrictEquals(open[1].request, upgrade[1]);
  assertEquals(first[2].text(), "one");
  assertEquals(second[2].rawData, bytes(2));
  assertEquals(close[2], { code: 4001, reason: "bye" });
});

test("a message that comes while open is still busy is not held back, as in crossws", async (t) => {
  const calls = new Queue<string>();
  const gate = deferred();
  const { url } = await listen(t, {
    hooks: {
      async open() {
        await gate.promise;
        calls.push("opened");
      },
      message() {
        calls.push("message");
      },
    },
  });
  const { socket, opened } = connect(t, url);
  await opened;
  socket.send("x");
  assertEquals(await calls.next(), "message");
  gate.resolve();
  assertEquals(await calls.next(), "opened");
});

// ---------------------------------------------------------------- upgrade

test("upgrade's headers reach the response, two cookies included, and cannot replace the wire's own", async (t) => {
  const { url } = await listen(t, {
    hooks: {
      upgrade: () => ({
        headers: [
          ["x-app", "yes"],
          ["set-cookie", "a=1"],
          ["set-cookie", "b=2"],
          ["content-type", "text/html"],
          ["x-crossws-id", "forged"],
        ],
      }),
    },
  });
  const accept = { accept: "text/event-stream" };
  for (const headers of [accept, { ...accept, "x-duplex-version": "1" }] as HeadersInit[]) {
    const response = await fetch(url, { headers });
    assertEquals(response.status, 200);
    assertEquals(response.headers.get("x-app"), "yes");
    assertEquals(response.headers.getSetCookie(), ["a=1", "b=2"]);
    assertEquals(response.headers.get("content-type"), "text/event-stream");
    assertMatch(response.headers.get("x-crossws-id")!, /^[0-9a-f]{16}\.[0-9a-f]{32}$/);
    await response.body!.cancel();
  }
});

test("upgrade's context becomes the peer's, in every hook, and may be changed there", async (t) => {
  const seen = new Queue<unknown>();
  const { url } = await listen<{ user: string; count: number }>(t, {
    hooks: {
      upgrade: () => ({ context: { user: "ann", count: 0 } }),
      open: (peer) => seen.push(peer.context.user),
      message: (peer) => seen.push(++peer.context.count),
      close: (peer) => seen.push({ ...peer.context }),
    },
  });
  const { socket, opened } = connect(t, url);
  await opened;
  socket.send("");
  socket.send("");
  socket.close();
  assertEquals(await seen.take(4), ["ann", 1, 2, { user: "ann", count: 2 }]);
});

test("without a context from upgrade, each peer has an empty one of its own", async (t) => {
  const contexts = new Queue<unknown>();
  const { url } = await listen(t, { hooks: { open: (peer) => contexts.push(peer.context) } });
  connect(t, url);
  connect(t, url);
  const [one, other] = await contexts.take(2);
  assertEquals(one, {});
  assertEquals(other, {});
  assert(one !== other);
});

test("an async upgrade is awaited before the session opens", async (t) => {
  const gate = deferred();
  const asked = deferred();
  const { url } = await listen(t, {
    hooks: {
      async upgrade() {
        asked.resolve();
        await gate.promise;
        return { namespace: "late" };
      },
      open: (peer) => void peer.send(peer.namespace),
    },
  });
  const { socket, messages } = connect(t, url);
  await asked.promise;
  assertEquals(socket.readyState, 0);
  gate.resolve();
  assertEquals(await messages.next(), "late");
});

const refusals: Record<string, () => unknown> = {
  "returns a Response": () => new Response("no", { status: 401 }),
  "throws a Response": () => {
    throw new Response("no", { status: 401 });
  },
  "throws { response }": () => {
    throw { response: new Response("no", { status: 401 }) };
  },
  "throws an Error with a response": () => {
    throw Object.assign(new Error("no"), { response: new Response("no", { status: 401 }) });
  },
  "returns { response }": () => ({ response: new Response("no", { status: 401 }) }),
  "rejects with a Response": () => Promise.reject(new Response("no", { status: 401 })),
};

for (const [what, upgrade] of Object.entries(refusals)) {
  test(`an upgrade that ${what} refuses: its answer is the client's, and no other hook runs`, async (t) => {
    const others: string[] = [];
    const { url, ws } = await listen(t, {
      hooks: {
        upgrade: upgrade as Hooks["upgrade"],
        open: () => void others.push("open"),
        close: () => void others.push("close"),
        error: () => void others.push("error"),
      },
    });
    const response = await fetch(url, { headers: { accept: "text/event-stream" } });
    assertEquals([response.status, await response.text()], [401, "no"]);
    const { closed, events } = connect(t, url);
    assertEquals((await closed).code, 1006);
    assertEquals(events, ["error", "close"]);
    assertEquals(others, []);
    assertEquals(ws.peers.size, 0);
  });
}

test("upgrade is asked again for every uplink, and a refusal reaches no other hook", async (t) => {
  const messages: string[] = [];
  const { url } = await listen(t, {
    hooks: {
      upgrade(request) {
        if (request.headers.get("x-test") === "thief") return new Response(null, { status: 403 });
      },
      message: (_, message) => void messages.push(message.text()),
    },
  });
  const { token } = await wireClient(t, url);
  const post = (who: string) =>
    fetch(url, {
      method: "POST",
      headers: {
        "content-type": "application/websocket-events",
        "x-crossws-id": token,
        "x-duplex-version": "1",
        "x-test": who,
      },
      body: `SEQ 1\r\n1\r\nTEXT ${who.length.toString(16)}\r\n${who}\r\n`,
    });
  const refused = await post("thief");
  assertEquals([refused.status, await refused.text()], [403, ""]);
  assertEquals((await post("owner")).status, 204);
  assertEquals(messages, ["owner"]);
});

test("an upgrade hook's answer { handled: true } is ignored, as there is no socket to hand over", async (t) => {
  const { url } = await listen(t, { hooks: { upgrade: () => ({ handled: true }) } });
  await connect(t, url).opened;
});

// ---------------------------------------------------------------- namespaces

test("an upgrade hook that answers with what says nothing lets the peer in, as in crossws", async (t) => {
  for (const answer of [true, 1, "yes", null]) {
    const { url } = await listen(t, { hooks: { upgrade: () => answer as never } });
    await connect(t, url).opened;
  }
});

test("an upgrade hook that answers false refuses with 403", async (t) => {
  const { url, ws } = await listen(t, { hooks: { upgrade: () => false } });
  const response = await fetch(url, { headers: FULL });
  assertEquals([response.status, await response.text()], [403, "Refused\n"]);
  assertEquals(ws.peers.size, 0);
});

test("the namespace is the URL's path, or getNamespace's, or upgrade's: the last wins", async (t) => {
  const seen = new Queue<string>();
  const plain = await listen(t, { hooks: { open: (peer) => seen.push(peer.namespace) } });
  connect(t, `${plain.url}/a/b?c`);
  assertEquals(await seen.next(), "/a/b");

  const named = await listen(t, {
    getNamespace: (request) => `ns:${new URL(request.url).searchParams.get("ns")}`,
    hooks: {
      upgrade: (request) => request.url.endsWith("2") ? { namespace: "from upgrade" } : undefined,
      open: (peer) => seen.push(peer.namespace),
    },
  });
  connect(t, `${named.url}/?ns=1`);
  assertEquals(await seen.next(), "ns:1");
  connect(t, `${named.url}/?ns=2`);
  assertEquals(await seen.next(), "from upgrade");
  assertEquals([...named.ws.peers.keys()].sort(), ["from upgrade", "ns:1"]);
});

// ---------------------------------------------------------------- subprotocols

test("upgrade and peer.request show the offered subprotocols as sec-websocket-protocol", async (t) => {
  const seen = new Queue<string | null>();
  const { url } = await listen(t, {
    hooks: {
      upgrade: (request) => seen.push(request.headers.get("sec-websocket-protocol")),
      open: (peer) => seen.push(peer.request.headers.get("sec-websocket-protocol")),
    },
  });
  connect(t, url, { protocols: ["a", "b"] });
  assertEquals(await seen.take(2), ["a, b", "a, b"]);
});

type Choice = Pick<Parameters<typeof sseAdapter>[0] & object, "hooks" | "handleProtocols">;
const choices: Record<string, [Choice, string]> = {
  "upgrade's protocol": [{ hooks: { upgrade: () => ({ protocol: "b" }) } }, "b"],
  "upgrade's header": [
    { hooks: { upgrade: () => ({ headers: { "sec-websocket-protocol": "b" } }) } },
    "b",
  ],
  "upgrade's protocol before its header": [
    {
      hooks: {
        upgrade: () => ({ protocol: "b", headers: { "Sec-WebSocket-Protocol": "a" } }),
      },
    },
    "b",
  ],
  "handleProtocols": [{ handleProtocols: (offered) => [...offered].at(-1) }, "b"],
  "an async handleProtocols": [
    { handleProtocols: (offered) => Promise.resolve([...offered][1]) },
    "b",
  ],
  "upgrade before handleProtocols": [
    { hooks: { upgrade: () => ({ protocol: "a" }) }, handleProtocols: () => "b" },
    "a",
  ],
  "nobody": [{}, ""],
  "a handleProtocols that declines": [{ handleProtocols: () => false }, ""],
};

for (const [who, [choice, expected]] of Object.entries(choices)) {
  test(`the subprotocol may be chosen by ${who}`, async (t) => {
    const peers = new Queue<Peer>();
    const { url } = await listen(t, {
      ...choice,
      hooks: { ...choice.hooks, open: (peer) => peers.push(peer) },
    });
    const { socket, opened } = connect(t, url, { protocols: ["a", "b"] });
    await opened;
    assertEquals(socket.protocol, expected);
    // As in crossws: where none was chosen, what was offered.
    assertEquals((await peers.next()).websocket.protocol, expected || "a, b");
  });
}

test("handleProtocols is given the set of what was offered and the request, and is not asked when nothing was", async (t) => {
  const asked: [Set<string>, string][] = [];
  const { url } = await listen(t, {
    handleProtocols(offered, request) {
      asked.push([offered, request.url]);
      return null;
    },
  });
  await connect(t, `${url}/none`).opened;
  await connect(t, `${url}/some`, { protocols: ["x", "y"] }).opened;
  assertEquals(asked, [[new Set(["x", "y"]), `${url}/some`]]);
});

// ---------------------------------------------------------------- resolve, and hooks carried by a request

for (const how of ["sync", "async"]) {
  test(`${how} resolve: called once a session, the adapter's hooks run before the resolved ones`, async (t) => {
    const calls: string[] = [];
    const closed = deferred();
    let resolved = 0;
    const hooks = (name: string): Partial<Hooks> => ({
      upgrade: () => void calls.push(`${name} upgrade`),
      open: () => void calls.push(`${name} open`),
      message: (_, message) => void calls.push(`${name} ${message}`),
      close: () => {
        calls.push(`${name} close`);
        if (name === "resolved") closed.resolve();
      },
    });
    const { url } = await listen(t, {
      hooks: hooks("global"),
      resolve(request) {
        resolved++;
        assertEquals(new URL(request.url).pathname, "/path");
        return how === "sync" ? hooks("resolved") : Promise.resolve(hooks("resolved"));
      },
    });
    const { socket, opened } = connect(t, `${url}/path`);
    await opened;
    assertEquals(socket.transport, "duplex"); // so that no uplink request is readmitted
    socket.send("m1");
    socket.send("m2");
    socket.close();
    await closed.promise;
    assertEquals(
      calls,
      ["upgrade", "open", "m1", "m2", "close"].flatMap((
        name,
      ) => [`global ${name}`, `resolved ${name}`]),
    );
    assertEquals(resolved, 1);
  });
}

test("an async hook of the adapter has settled before the resolved one begins, as in crossws", async (t) => {
  const calls = new Queue<string>();
  const gate = deferred();
  const { url } = await listen(t, {
    hooks: {
      async open() {
        calls.push("global begins");
        await gate.promise;
        calls.push("global ends");
      },
    },
    resolve: () => ({ open: () => calls.push("resolved") }),
  });
  await connect(t, url).opened;
  assertEquals(await calls.next(), "global begins");
  gate.resolve();
  assertEquals(await calls.take(2), ["global ends", "resolved"]);
});

test("what the resolved upgrade returns stands over what the adapter's returned", async (t) => {
  const peers = new Queue<Peer>();
  const { url } = await listen(t, {
    hooks: {
      upgrade: () => ({
        namespace: "global",
        protocol: "a",
        headers: { "x-who": "global" },
        context: { who: "global" },
      }),
      open: (peer) => peers.push(peer),
    },
    resolve: () => ({
      upgrade: () => ({
        namespace: "resolved",
        protocol: "b",
        headers: { "x-who": "resolved" },
        context: { who: "resolved" },
      }),
    }),
  });
  const { response } = await wireClient(t, url, { "x-duplex-protocol": "a, b" });
  const peer = await peers.next();
  assertEquals(response.headers.get("x-who"), "resolved");
  assertEquals(response.headers.get("sec-websocket-protocol"), "b");
  assertEquals(peer.namespace, "resolved");
  assertEquals(peer.context, { who: "resolved" });
});

test("a resolve that finds nothing leaves the adapter's hooks, and a refusal by either is final", async (t) => {
  const { url } = await listen(t, {
    hooks: {
      upgrade: (request) =>
        request.url.endsWith("1") ? new Response(null, { status: 401 }) : undefined,
      open: (peer) => void peer.send("global"),
    },
    resolve: (request) => {
      if (request.url.endsWith("0")) return;
      return {
        upgrade: (request) =>
          request.url.endsWith("2") ? new Response(null, { status: 402 }) : undefined,
      };
    },
  });
  assertEquals(await connect(t, `${url}/0`).messages.next(), "global");
  const status = async (path: string) => {
    const response = await fetch(url + path, { headers: { accept: "text/event-stream" } });
    await response.body?.cancel();
    return response.status;
  };
  assertEquals(await status("/1"), 401);
  assertEquals(await status("/2"), 402);
});

for (const where of ["the request", "the request's context"]) {
  test(`hooks that ${where} carries are called, as h3 leaves them there`, async (t) => {
    const hooks: Partial<Hooks> = {
      upgrade: () => ({ context: { carried: true } }),
      open: (peer) => void peer.send(`carried: ${peer.context.carried}`),
      message: (peer, message) => void peer.send(`echo ${message}`),
    };
    const { url } = await listen(t, {}, (request, next) => {
      if (where === "the request") Object.assign(request, { [CARRIED]: hooks });
      else Object.assign(request, { context: { [CARRIED]: hooks } });
      return next(request);
    });
    const { socket, messages } = connect(t, url);
    assertEquals(await messages.next(), "carried: true");
    socket.send("x");
    assertEquals(await messages.next(), "echo x");
  });
}

test("hooks that resolve finds on the request, as h3's plugin does, are called once and not twice", async (t) => {
  const hooks: Partial<Hooks> = { open: (peer) => void peer.send("open") };
  const { url } = await listen(
    t,
    { resolve: (request) => (request as never)[CARRIED] },
    (request, next) => next(Object.assign(request, { [CARRIED]: hooks })),
  );
  const { socket, messages, closed } = connect(t, url);
  assertEquals(await messages.next(), "open");
  socket.close();
  await closed;
  assertEquals(messages.all.length, 1);
});

test("a request's context, where a framework put one, is the peer's", async (t) => {
  const context: Record<string, unknown> = { fromFramework: 1 };
  const peers = new Queue<Peer>();
  const { url } = await listen(t, {
    hooks: {
      upgrade: () => ({ context: { fromUpgrade: 2 } }),
      open: (peer) => peers.push(peer as Peer),
    },
  }, (request, next) => next(Object.assign(request, { context })));
  connect(t, url);
  const peer = await peers.next();
  assertStrictEquals(peer.context, context);
  assertEquals(peer.context, { fromFramework: 1, fromUpgrade: 2 });
});

// ---------------------------------------------------------------- errors

for (const [what, fail] of Object.entries({ throws: true, rejects: false })) {
  test(`a message hook that ${what} is told to error, and its peer alone is closed with 1011`, async (t) => {
    const errors = new Queue<[Peer, Error]>();
    const closes = new Queue<unknown>();
    const { url } = await listen(t, {
      hooks: {
        message(peer, message) {
          if (message.text() !== "bad") return void peer.send("fine");
          const error = new Error("bad message");
          if (fail) throw error;
          return Promise.reject(error);
        },
        error: (peer, error) => errors.push([peer, error]),
        close: (_, details) => closes.push(details),
      },
    });
    const bad = connect(t, url);
    const good = connect(t, url);
    await Promise.all([bad.opened, good.opened]);
    bad.socket.send("bad");
    const { code, wasClean } = await bad.closed;
    assertEquals([code, wasClean], [1011, true]);
    const [peer, error] = await errors.next();
    assertEquals(error.message, "bad message");
    assertEquals(peer.toString(), peer.id);
    assertEquals((await closes.next() as { code: number }).code, 1011);
    good.socket.send("good");
    assertEquals(await good.messages.next(), "fine");
  });
}

test("a hook may return what only has a then, as the queries of some databases", async (t) => {
  const query = (settle: (resolve: () => void, reject: (error: Error) => void) => void) =>
    ({
      then: (resolve: () => void, reject: (error: Error) => void) => settle(resolve, reject),
    }) as unknown as Promise<void>;
  const errors = new Queue<Error>();
  const { url } = await listen(t, {
    hooks: {
      open: () => query((resolve) => resolve()),
      message(peer, message) {
        if (message.text() === "bad") return query((_, reject) => reject(new Error("bad query")));
        peer.send("fine");
        return query((resolve) => resolve());
      },
      error: (_, error) => errors.push(error),
    },
  });
  const { socket, messages, opened, closed } = connect(t, url);
  await opened;
  socket.send("good");
  assertEquals(await messages.next(), "fine");
  socket.send("bad");
  assertEquals((await closed).code, 1011);
  assertEquals((await errors.next()).message, "bad query");
});

// ---------------------------------------------------------------- Peer

test("a peer knows its id, request, address, namespace and the other peers of the namespace", async (t) => {
  const peers = new Queue<Peer>();
  const { url } = await listen(t, { hooks: { open: (peer) => peers.push(peer) } });
  await connect(t, `${url}/room`, { headers: { "x-test": "yes" } }).opened;
  await connect(t, `${url}/room`).opened;
  await connect(t, `${url}/other`).opened;
  const [one, two, other] = await peers.take(3) as [Peer, Peer, Peer];
  assertMatch(one.id, UUID);
  assertEquals(new Set([one.id, two.id, other.id]).size, 3);
  assertEquals(one.request.url, `${url}/room`);
  assertEquals(one.request.headers.get("x-test"), "yes");
  assertEquals(one.remoteAddress, "127.0.0.1");
  assertEquals(one.namespace, "/room");
  assertEquals(one.peers, new Set([one, two]));
  assertEquals(other.peers, new Set([other]));
  assertEquals(one.topics, new Set());
});

test("a peer's address is known to plain clients' sessions too, and unknown without the runtime's argument", async (t) => {
  const addresses = new Queue<string | undefined>();
  const { url, ws } = await listen(t, {
    hooks: { open: (peer) => addresses.push(peer.remoteAddress) },
  });
  const accept = { accept: "text/event-stream" };
  const response = await fetch(url, { headers: accept });
  assertEquals(await addresses.next(), "127.0.0.1");
  await response.body!.cancel();
  const direct = await ws.fetch(new Request("http://localhost/", { headers: accept }));
  assertEquals(await addresses.next(), undefined);
  await direct.body!.cancel();
});

test("the id is public and gives no power: it is never the token", async (t) => {
  const peers = new Queue<Peer>();
  const messages: string[] = [];
  const { url } = await listen(t, {
    hooks: {
      open: (peer) => peers.push(peer),
      message: (_, message) => void messages.push(message.text()),
    },
  });
  const { token } = await wireClient(t, url);
  const { id } = await peers.next();
  assert(!token.includes(id) && !token.includes(id.replaceAll("-", "")));
  const response = await fetch(url, { method: "POST", headers: { "x-crossws-id": id }, body: "x" });
  assertEquals(response.status, 400);
  await response.body!.cancel();
  assertEquals(messages, []);
});

test("a peer becomes its id as a string, and shows itself readably, without the token", async (t) => {
  const peers = new Queue<Peer>();
  const received = new Queue<Message>();
  const { url } = await listen(t, {
    hooks: { open: (peer) => peers.push(peer), message: (_, message) => received.push(message) },
  });
  const client = await wireClient(t, `${url}/room`);
  const { token } = client;
  const peer = await peers.next();
  peer.subscribe("news");
  assertEquals(`${peer}`, peer.id);
  assertEquals(peer + "", peer.id);
  assertEquals(String(peer), peer.id);
  await client.frames("TEXT 5\r\nhello\r\n", 1);
  const message = await received.next();
  const inspectors: ((value: unknown) => string)[] = [inspect];
  if (runtime === "deno") inspectors.push((value) => Deno.inspect(value));
  else inspectors.push((globalThis as unknown as { Bun: { inspect: typeof inspect } }).Bun.inspect);
  for (const show of inspectors) {
    for (const part of [peer.id, "/room", "127.0.0.1", "news"]) {
      assert(show(peer).includes(part), show(peer));
    }
    assert(show(message).includes("hello") && show(message).includes(peer.id), show(message));
    for (const shown of [show(peer), show(message), show({ nested: [peer] })]) {
      assert(!shown.includes(token), "the token is a secret");
    }
  }
});

test("peer.websocket shows the state, protocol, URL and binary type, and can send and close", async (t) => {
  const peers = new Queue<Peer>();
  const { url } = await listen(t, {
    handleProtocols: () => "chat",
    hooks: { open: (peer) => peers.push(peer) },
  });
  const { messages, closed } = connect(t, `${url}/x?y=1`, { protocols: ["chat"] });
  const { websocket } = await peers.next();
  assertEquals(websocket.readyState, 1);
  assertEquals(websocket.protocol, "chat");
  assertEquals(websocket.extensions, "");
  assertEquals(websocket.url, `${url.replace("http", "ws")}/x?y=1`);
  assertEquals(websocket.bufferedAmount, 0);
  assertEquals(websocket.binaryType, undefined);
  assertEquals(websocket.send!("from the socket"), undefined);
  assertEquals(await messages.next(), "from the socket");
  websocket.close!(4000, "done");
  assertEquals(websocket.readyState, 2);
  const { code, reason } = await closed;
  assertEquals([code, reason], [4000, "done"]);
  await until(() => websocket.readyState === 3);
});

class Point {
  x = 1;
}

const sendable: [string, unknown, string | number[]][] = [
  ["a string", "text", "text"],
  ["the empty string", "", ""],
  ["undefined", undefined, ""],
  ["null", null, ""],
  ["a number", 1.5, "1.5"],
  ["a boolean", false, "false"],
  ["a bigint", 12n, "12"],
  ["a function", () => 1, "{}"],
  ["a symbol", Symbol("s"), "{}"],
  ["a plain object", { a: [1] }, '{"a":[1]}'],
  ["an object without prototype", Object.assign(Object.create(null), { b: 2 }), '{"b":2}'],
  ["an instance", new Point(), '{"x":1}'],
  ["a Uint8Array", bytes(1, 2), [1, 2]],
  ["an empty Uint8Array", bytes(), []],
  ["an ArrayBuffer", bytes(3, 4).buffer, [3, 4]],
  ["an ArrayBuffer of another realm", runInNewContext("new Uint8Array([5, 6]).buffer"), [5, 6]],
  ["a SharedArrayBuffer", new SharedArrayBuffer(2), [0, 0]],
  ["a view with an offset", bytes(1, 2, 3, 4).subarray(1, 3), [2, 3]],
  ["a DataView", new DataView(bytes(1, 2, 3).buffer, 2), [3]],
  ["a Uint16Array", new Uint16Array([0x0201]), [1, 2]],
  ["an array of bytes", [7, 8], [7, 8]],
];

test("send takes what crossws takes: strings, bytes, objects as JSON, and what else has a text", async (t) => {
  const peers = new Queue<Peer>();
  const { url } = await listen(t, { hooks: { open: (peer) => peers.push(peer) } });
  const { messages } = connect(t, url);
  const peer = await peers.next();
  for (const [name, value, expected] of sendable) {
    const result = peer.send(value, { compress: true });
    assert(typeof result === "number" && result > 0, `send of ${name} returned ${result}`);
    const data = await messages.next();
    assertEquals(
      typeof data === "string" ? data : [...new Uint8Array(data as ArrayBuffer)],
      expected,
      name,
    );
  }
});

test("send of a Blob throws and says what to do, since a Blob cannot be read at once", async (t) => {
  const peers = new Queue<Peer>();
  const { url } = await listen(t, { hooks: { open: (peer) => peers.push(peer) } });
  connect(t, url);
  const peer = await peers.next();
  for (const blob of [new Blob(["x"]), new File(["x"], "x")]) {
    assertThrows(() => peer.send(blob), TypeError, "arrayBuffer");
  }
});

test("bytes may be changed after they were sent or published", async (t) => {
  const peers = new Queue<Peer>();
  const { url, ws } = await listen(t, { hooks: { open: (peer) => peers.push(peer) } });
  const { messages } = connect(t, url);
  const peer = await peers.next();
  peer.subscribe("x");
  const data = bytes(1);
  peer.send(data);
  ws.publish("x", data);
  data[0] = 9;
  for (const message of await messages.take(2)) {
    assertEquals([...new Uint8Array(message as ArrayBuffer)], [1]);
  }
});

test("send returns the bytes queued, -1 once they must wait, and 0 when the peer is closed", async (t) => {
  const peers = new Queue<Peer>();
  const { url } = await listen(t, { window: 100, hooks: { open: (peer) => peers.push(peer) } });
  const client = await wireClient(t, url);
  const peer = await peers.next();
  assertEquals(peer.send("a".repeat(200)), "data: \n\n".length + 200);
  await client.message(); // the window is full now
  peer.send("b");
  await until(() => peer.send("c") === -1);
  assertGreater(peer.bufferedAmount, 0);
  assertEquals(peer.websocket.bufferedAmount, peer.bufferedAmount);
  await client.frames("ACK 1\r\n1\r\n");
  await peer.waitForDrain();
  assertEquals(peer.bufferedAmount, 0);
  peer.close();
  assertEquals(peer.send("d"), 0);
});

test("waitForDrain resolves at once when nothing waits, at its threshold, and when the peer closes", async (t) => {
  const peers = new Queue<Peer>();
  const drains: number[] = [];
  const { url } = await listen(t, {
    window: 1000,
    hooks: {
      open: (peer) => peers.push(peer),
      drain: (peer) => void drains.push(peer.bufferedAmount),
    },
  });
  const client = await wireClient(t, url);
  const peer = await peers.next();
  await peer.waitForDrain();
  for (let i = 0; i < 4; i++) peer.send("x".repeat(992)); // 1000 bytes each, encoded
  await client.message();
  assertEquals(peer.bufferedAmount, 3000);
  const order: string[] = [];
  const half = peer.waitForDrain({ threshold: 2000 }).then(() => order.push("threshold"));
  const all = peer.waitForDrain({ pollInterval: 1 }).then(() => order.push("all"));
  await client.frames("ACK 1\r\n1\r\n");
  await half;
  assertEquals(order, ["threshold"]);
  assertEquals(peer.bufferedAmount, 2000);
  assertEquals(drains, []);
  await client.frames("ACK 1\r\n2\r\n");
  await client.frames("ACK 1\r\n3\r\n");
  await all;
  await until(() => drains.length > 0);
  assertEquals(drains, [0]);
  peer.send("y".repeat(992));
  peer.send("z");
  await until(() => peer.bufferedAmount > 0);
  const closing = peer.waitForDrain();
  peer.terminate();
  await closing;
});

test("waitForDrain rejects with its signal's reason, before and during the wait", async (t) => {
  const peers = new Queue<Peer>();
  const { url } = await listen(t, { window: 10, hooks: { open: (peer) => peers.push(peer) } });
  const client = await wireClient(t, url);
  const peer = await peers.next();
  peer.send("x".repeat(100));
  peer.send("y");
  await client.message();
  const abort = new AbortController();
  const waiting = assertRejects(
    () => peer.waitForDrain({ signal: abort.signal }),
    RangeError,
    "enough",
  );
  abort.abort(new RangeError("enough"));
  await waiting;
  await assertRejects(() => peer.waitForDrain({ signal: abort.signal }), RangeError, "enough");
});

test("subscribe, unsubscribe and publish: everyone else in the namespace who listens, and nobody else", async (t) => {
  const peers = new Map<string, Peer>();
  const { url, ws } = await listen(t, {
    hooks: {
      open(peer) {
        peers.set(new URL(peer.request.url).search, peer);
        peer.send("hello");
      },
    },
  });
  const clients = ["a?1", "a?2", "a?3", "b?4"].map((path) => connect(t, `${url}/${path}`));
  for (const { messages } of clients) await messages.next();
  const [one, two, three, four] = ["?1", "?2", "?3", "?4"].map((search) => peers.get(search)!) as [
    Peer,
    Peer,
    Peer,
    Peer,
  ];
  for (const peer of [one, two, four]) peer.subscribe("chat");
  one.subscribe("chat"); // twice is once
  assertEquals(one.topics, new Set(["chat"]));
  one.publish("chat", "from one");
  three.publish("chat", { from: "three" });
  one.publish("nobody's", "unheard");
  two.unsubscribe("chat");
  assertEquals(two.topics, new Set());
  four.publish("chat", "only me in b");
  one.publish("chat", "now nobody");
  for (const peer of [one, two, three, four]) peer.send("end");
  const heard = [];
  for (const { messages } of clients) {
    const got = [];
    for (let data; (data = await messages.next()) !== "end";) got.push(data);
    heard.push(got);
  }
  assertEquals(heard, [['{"from":"three"}'], ["from one", '{"from":"three"}'], [], []]);
  assertEquals(ws.peers.get("/a"), new Set([one, two, three]));
});

test("who changes the set of topics ends no subscription behind the server's back", async (t) => {
  const peers: Peer[] = [];
  const ws = sseAdapter({
    hooks: {
      open(peer) {
        peers.push(peer);
        peer.subscribe("news");
      },
    },
  });
  t.defer(() => ws.close());
  t.use(await WireClient.open(ws.fetch, "http://localhost/"));
  const [peer] = peers as [Peer];
  peer.topics.clear();
  assertEquals([...peer.topics], ["news"]);
  ws.publish("news", "still subscribed");
  assertGreater(peer.bufferedAmount, 0);
  peer.unsubscribe("news");
  assertEquals(peer.topics, new Set());
  peer.terminate();
});

test("adapter.publish reaches one namespace, or all of them", async (t) => {
  const { url, ws } = await listen(t, {
    hooks: {
      open(peer) {
        peer.subscribe("news");
        peer.send("hello");
      },
    },
  });
  const clients = ["a", "b"].map((path) => connect(t, `${url}/${path}`));
  for (const { messages } of clients) await messages.next();
  const { publish } = ws; // needs no `this`
  publish("news", "for a", { namespace: "/a" });
  publish("news", bytes(1), { namespace: "/b", compress: true });
  publish("news", "for all");
  publish("other", "for nobody");
  publish("news", "for nobody", { namespace: "/c" });
  publish("news", "end");
  assertEquals(await clients[0]!.messages.take(3), ["for a", "for all", "end"]);
  const [binary, ...rest] = await clients[1]!.messages.take(3);
  assertEquals(new Uint8Array(binary as ArrayBuffer), bytes(1));
  assertEquals(rest, ["for all", "end"]);
});

test("adapter.peers holds the open peers by namespace, and forgets them and empty namespaces", async (t) => {
  const closed = new Queue<void>();
  const { url, ws } = await listen(t, { hooks: { close: () => closed.push() } });
  assertEquals(ws.peers.size, 0);
  const one = connect(t, `${url}/a`);
  const two = connect(t, `${url}/a`);
  await Promise.all([one.opened, two.opened]);
  assertEquals([...ws.peers.keys()], ["/a"]);
  assertEquals(ws.peers.get("/a")!.size, 2);
  one.socket.close();
  await closed.next();
  assertEquals(ws.peers.get("/a")!.size, 1);
  two.socket.close();
  await closed.next();
  assertEquals(ws.peers.size, 0);
});

test("a close hook can still publish to those who stay", async (t) => {
  const { url } = await listen(t, {
    hooks: {
      open(peer) {
        peer.subscribe("chat");
        peer.send("hello");
      },
      close(peer) {
        peer.publish("chat", `${peer} has left`);
        peer.unsubscribe("chat");
      },
    },
  });
  const leaver = connect(t, url);
  const stayer = connect(t, url);
  await leaver.messages.next();
  await stayer.messages.next();
  leaver.socket.close();
  assertMatch(await stayer.messages.next() as string, /^[0-9a-f-]{36} has left$/);
});

test("close hooks that publish are called once each, also where that ends thousands of peers", async (t) => {
  let opened = 0;
  let closed = 0;
  let deepest = 0;
  let depth = 0;
  const errors: unknown[] = [];
  const ws = sseAdapter({
    maxBufferedAmount: 10,
    resumeTimeout: 1_000, // so long a shutdown waits for them, to tell them why
    hooks: {
      open(peer) {
        opened++;
        peer.subscribe("chat");
      },
      close(peer) {
        closed++;
        deepest = Math.max(deepest, ++depth);
        peer.publish("chat", `${peer} has left`);
        depth--;
      },
      error: (_, error) => void errors.push(error),
    },
  });
  t.defer(() => ws.close());
  const headers = { accept: "text/event-stream", "x-duplex-version": "1" };
  for (let i = 0; i < 4000; i++) {
    await ws.fetch(new Request("http://localhost/", { headers })); // and nobody reads
  }
  ws.publish("chat", "more than is let wait");
  ws.publish("chat", "one too many");
  await until(() => closed === 4000);
  assertEquals([opened, closed, deepest, errors, ws.peers.size], [4000, 4000, 1, [], 0]);
});

// ---------------------------------------------------------------- the end of a peer

const endings: [string, (peer: Peer, socket: WebSocketLike) => void, number, string][] = [
  ["the client with code and reason", (_, socket) => socket.close(4001, "bye"), 4001, "bye"],
  ["the client without a code", (_, socket) => socket.close(), 1005, ""],
  ["the client with 1000", (_, socket) => socket.close(1000), 1000, ""],
  ["the server with code and reason", (peer) => peer.close(4002, "no"), 4002, "no"],
  ["the server without a code", (peer) => peer.close(), 1005, ""],
  ["the server going away", (peer) => peer.close(1001, "restart"), 1001, "restart"],
];
type WebSocketLike = Pick<WebSocket, "close">;

for (const [who, close, code, reason] of endings) {
  test(`a close by ${who} shows code and reason on both sides, once`, async (t) => {
    const peers = new Queue<Peer>();
    const closes = new Queue<unknown>();
    const { url } = await listen(t, {
      hooks: { open: (peer) => peers.push(peer), close: (_, details) => closes.push(details) },
    });
    const { socket, opened, closed } = connect(t, url);
    await opened;
    const peer = await peers.next();
    close(peer, socket);
    const event = await closed;
    assertEquals([event.code, event.reason, event.wasClean], [code, reason, true]);
    assertEquals(await closes.next(), { code, reason });
    peer.close(4999);
    peer.terminate();
    assertEquals(closes.left, 0);
  });
}

test("terminate says nothing to the client, which sees 1006, and nor does anything come after it", async (t) => {
  const peers = new Queue<Peer>();
  const closes = new Queue<unknown>();
  const { url, ws } = await listen(t, {
    hooks: { open: (peer) => peers.push(peer), close: (_, details) => closes.push(details) },
  });
  const { opened, closed, events } = connect(t, url);
  await opened;
  const peer = await peers.next();
  peer.terminate();
  assertEquals(peer.websocket.readyState, 3);
  assertEquals(await closes.next(), { code: 1006, reason: "" });
  const { code, wasClean } = await closed;
  assertEquals([code, wasClean], [1006, false]);
  assertEquals(events.slice(-2), ["error", "close"]);
  assertEquals(ws.peers.size, 0);
  assertEquals(closes.left, 0);
});

test("terminate in the open hook closes after every open hook, also the one that resolve found", async () => {
  const calls: string[] = [];
  const named = (name: string): Partial<Hooks> => ({
    open(peer) {
      calls.push(`${name} open`);
      peer.terminate();
    },
    close: () => void calls.push(`${name} close`),
  });
  const ws = sseAdapter({ hooks: named("first"), resolve: () => named("second") });
  const response = await ws.fetch(new Request("http://localhost/", { headers: FULL }));
  await response.body!.cancel();
  await ws.close(); // which waits for them
  assertEquals(calls, ["first open", "second open", "first close", "second close"]);
});

test("hooks that throw when they are looked up silence no other session's close hook", async (t) => {
  const closes: (number | undefined)[] = [];
  const broken = {
    get open(): Hooks["open"] {
      throw new Error("no such hook");
    },
  };
  const logged = console.error;
  t.defer(() => console.error = logged);
  console.error = () => {};
  const ws = sseAdapter({
    hooks: { close: (_, { code }) => void closes.push(code) },
    resolve: (request) => request.url.endsWith("/broken") ? broken : {},
  });
  const ask = (path: string) => ws.fetch(new Request(`http://localhost${path}`, { headers: FULL }));
  assertEquals((await ask("/broken")).status, 500);
  const { body } = await ask("/fine");
  for (const peer of ws.peers.get("/fine")!) peer.terminate();
  await body!.cancel();
  await until(() => closes.length > 0);
  assertEquals(closes, [1006]);
  for (const peer of ws.peers.get("/broken") ?? []) peer.terminate();
  await ws.close();
});

test("terminate in the open hook lets go of the request's body, too", async (t) => {
  const calls: string[] = [];
  const ws = sseAdapter({
    bidir: true,
    hooks: {
      open(peer) {
        calls.push("open");
        peer.terminate();
      },
      message: () => void calls.push("message"),
      close: () => void calls.push("close"),
    },
  });
  t.defer(() => ws.close());
  const cancelled = deferred();
  const body = ordinaryStreamOf([from(1, frame("TEXT", "one"))], {
    open: true,
    cancelled: cancelled.resolve,
  });
  cancelled.promise.then(() => calls.push("cancelled")); // which some hosts' streams do not survive
  const headers = { ...FULL, ...UPLINK };
  const response = await ws.fetch(post("http://localhost/", headers, body));
  // Also what was terminated at once begins as every stream does, and then is at its end.
  const answer = await response.text();
  assertEquals([response.status, /^:\nevent: duplex-open\ndata: .*\n\n$/.test(answer)], [
    200,
    true,
  ]);
  await until(() => calls.length > 1);
  assertEquals(calls, ["open", "close"]);
});

test("a client that vanishes closes with 1006 once resumeTimeout is over", async (t) => {
  const closes = new Queue<unknown>();
  const { url } = await listen(t, {
    resumeTimeout: 50,
    hooks: { close: (_, details) => closes.push(details) },
  });
  const client = await wireClient(t, url);
  await client.drop();
  assertEquals(await closes.next(), { code: 1006, reason: "" });
});

test("peer.close throws a RangeError for a code or reason that may not be sent", async (t) => {
  const peers = new Queue<Peer>();
  const { url } = await listen(t, { hooks: { open: (peer) => peers.push(peer) } });
  connect(t, url);
  const peer = await peers.next();
  for (const code of [0, 999, 1004, 1006, 1015, 2000, 5000, 1000.5]) {
    assertThrows(() => peer.close(code), RangeError);
  }
  assertThrows(() => peer.close(1000, "x".repeat(124)), RangeError);
  assertEquals(peer.websocket.readyState, 1);
});

// ---------------------------------------------------------------- ping and pong

test("peer.ping is answered by the client and comes back in the pong hook, with its data", async (t) => {
  const peers = new Queue<Peer>();
  const pongs = new Queue<[Peer, Uint8Array]>();
  const { url } = await listen(t, {
    hooks: { open: (peer) => peers.push(peer), pong: (peer, data) => pongs.push([peer, data]) },
  });
  for (const transport of ["duplex", "post"] as const) {
    await connect(t, url, { transport }).opened;
    const peer = await peers.next();
    peer.ping("now");
    peer.ping(bytes(0, 255));
    peer.ping();
    const answers = await pongs.take(3);
    for (const [from] of answers) assertStrictEquals(from, peer);
    assertEquals(
      answers.map(([, data]) => [...data]),
      [[...new TextEncoder().encode("now")], [0, 255], []],
    );
    assertThrows(() => peer.ping("x".repeat(126)), RangeError);
  }
});

test("a client's PING comes in the ping hook", async (t) => {
  const pings = new Queue<[Peer, Uint8Array]>();
  const { url } = await listen(t, { hooks: { ping: (peer, data) => pings.push([peer, data]) } });
  const client = await wireClient(t, url);
  assertEquals(await client.frames("PING 3\r\nabc\r\nPING\r\n"), [204, 0]);
  const [first, second] = await pings.take(2);
  assertEquals(first![1], new TextEncoder().encode("abc"));
  assertEquals(second![1].length, 0);
});

test("what hooks were given stays as it was while the body is read on, into the same buffer or a larger one", async () => {
  const sizes = [0, 5, 125, 1, 3000, 7, 70_000, 2, 200_000, 9, 2048, 3];
  type Frame = [type: string, payload: string | Uint8Array];
  const sent = sizes.flatMap((size, i): Frame[] => {
    const payload = new Uint8Array(size).fill(i + 1);
    return [
      ["BINARY", payload],
      ["TEXT", "t".repeat(size)],
      ["PING", payload.slice(0, 125)],
      ["PONG", payload.slice(0, 100)],
    ];
  });
  const given: Frame[] = [];
  await using ws = sseAdapter({
    bidir: true,
    resumeTimeout: 0,
    hooks: {
      message: (_, { rawData }) =>
        void given.push(
          typeof rawData === "string" ? ["TEXT", rawData] : ["BINARY", rawData as Uint8Array],
        ),
      ping: (_, data) => void given.push(["PING", data]),
      pong: (_, data) => void given.push(["PONG", data]),
    },
  });
  for (const streamOf of [byteStreamOf, ordinaryStreamOf]) {
    given.length = 0;
    const peer = await WireClient.open(ws.fetch, "http://localhost/");
    const frames = sent.map(([type, payload]) => frame(type, payload));
    const response = await peer.post(streamOf([frame("SEQ", "1"), ...frames]), UPLINK);
    assertEquals(response.status, 204);
    assertEquals(given, sent);
    await peer.drop();
  }
});

// ---------------------------------------------------------------- Message

test("a text message has its text, JSON, bytes, buffer of exact length, Blob and id", async (t) => {
  const received = new Queue<Message>();
  const { url } = await listen(t, { hooks: { message: (_, message) => received.push(message) } });
  const { socket, opened } = connect(t, url);
  await opened;
  const text = '{"a":"é🎈"}';
  socket.send(text);
  const message = await received.next();
  const encoded = new TextEncoder().encode(text);
  assertEquals(message.text(), text);
  assertEquals(message.rawData, text);
  assertEquals(message.data, text);
  assertEquals(message.json(), { a: "é🎈" });
  assertEquals([...message.uint8Array()], [...encoded]);
  assertEquals(message.arrayBuffer().byteLength, encoded.length);
  assertEquals(await message.blob().text(), text);
  assertEquals(`${message}`, text);
  assertEquals(message + "!", text + "!");
  assertEquals(message.toString(), text);
  assertMatch(message.id, UUID);
  assertEquals(message.id, message.id);
  assertEquals(message.event, undefined);
  assertMatch(message.peer!.id, UUID);
  socket.send("no json");
  const second = await received.next();
  assertThrows(() => second.json(), SyntaxError);
  assert(second.id !== message.id);
});

test("a binary message has its bytes, buffer of exact length, text and Blob", async (t) => {
  const received = new Queue<Message>();
  const { url } = await listen(t, { hooks: { message: (_, message) => received.push(message) } });
  const { socket, opened } = connect(t, url);
  await opened;
  socket.send(bytes(9, 104, 105, 9).subarray(1, 3));
  socket.send(bytes());
  const message = await received.next();
  assertEquals(message.rawData, bytes(104, 105));
  assertEquals(message.data, bytes(104, 105));
  assertEquals(message.uint8Array(), bytes(104, 105));
  assertEquals(message.arrayBuffer().byteLength, 2);
  assertEquals(message.text(), "hi");
  assertEquals(await message.blob().text(), "hi");
  const empty = await received.next();
  assertEquals([empty.arrayBuffer().byteLength, empty.text()], [0, ""]);
});

test("the messages of plain clients have buffers of exact length, too", async (t) => {
  const received = new Queue<Message>();
  const { url } = await listen(t, { hooks: { message: (_, message) => received.push(message) } });
  const response = await fetch(url, { headers: { accept: "text/event-stream" } });
  t.defer(() => response.body!.cancel());
  const post = (body: string | Uint8Array, headers: Record<string, string> = {}) =>
    fetch(url, {
      method: "POST",
      headers: { "x-crossws-id": response.headers.get("x-crossws-id")!, ...headers },
      body: body as never,
    });
  const octets = { "content-type": "Application/Octet-Stream; x=1" }; // a type has no case
  assertEquals((await post("text")).status, 204); // for which Bun tells no type
  assertEquals((await post(bytes(1, 2, 3), octets)).status, 204);
  assertEquals((await post(bytes(0xff))).status, 204); // no type, and no UTF-8
  const [text, binary, untold] = await received.take(3) as [Message, Message, Message];
  assertEquals([text.rawData, text.arrayBuffer().byteLength], ["text", 4]);
  assertEquals([binary.rawData, binary.arrayBuffer().byteLength], [bytes(1, 2, 3), 3]);
  assertEquals([untold.rawData, untold.arrayBuffer().byteLength], [bytes(0xff), 1]);
});

test("message.data follows the peer's binaryType", async (t) => {
  const received = new Queue<Message>();
  const { url } = await listen(t, { hooks: { message: (_, message) => received.push(message) } });
  const { socket, opened } = connect(t, url);
  await opened;
  socket.send(bytes(65));
  const message = await received.next();
  const dataAs = (binaryType: string) => {
    message.peer!.websocket.binaryType = binaryType;
    return message.data;
  };
  assertEquals(dataAs("arraybuffer"), bytes(65).buffer);
  assertEquals(dataAs("uint8array"), bytes(65));
  assertEquals(dataAs("text"), "A");
  assertEquals(await (dataAs("blob") as Blob).text(), "A");
  assertEquals([...dataAs("nodebuffer") as Uint8Array], [65]);
  assertEquals(dataAs("unknown"), message.rawData);
});

// ---------------------------------------------------------------- the adapter

test("handles tells the adapter's requests from others, as crossws's documentation spells out", () => {
  const ws = sseAdapter();
  const { handles } = ws;
  const on = (headers: Record<string, string>, method = "GET") =>
    handles(new Request("http://localhost/", { headers, method }));
  assert(on({ accept: "text/event-stream" }));
  assert(on({ accept: "text/html, text/event-stream;q=0.5" }));
  assert(on({ "x-crossws-id": "any" }, "POST"));
  assert(on({ accept: "text/event-stream" }, "POST"));
  assert(!on({}));
  assert(!on({ accept: "*/*" }));
  assert(!on({ accept: "text/html" }, "POST"));
  assert(!on({ accept: "text/event-streams" }));
  const open = sseAdapter({ cors: true });
  const preflight = (asked: string) => {
    const headers = {
      "access-control-request-method": "POST",
      "access-control-request-headers": asked,
      origin: "https://a.example",
    };
    return new Request("http://localhost/", { headers, method: "OPTIONS" });
  };
  for (const ours of ["authorization,x-duplex-version", "content-type, X-Crossws-Id"]) {
    assert(open.handles(preflight(ours)));
    assert(!handles(preflight(ours)));
  }
  assert(!open.handles(preflight("authorization")), "the application's own");
});

const finite = { heartbeatInterval: 1, resumeTimeout: 0, window: 1 };
const unlimited = { idleTimeout: 0, maxMessageSize: 1, maxBufferedAmount: 0, maxPeers: 1 };

for (const [name, least] of Object.entries({ ...finite, ...unlimited })) {
  test(`${name} is a number of at least ${least}, or a RangeError tells its name`, () => {
    const make = (value: unknown) => sseAdapter({ [name]: value });
    for (const value of [least, 1000, undefined]) make(value);
    for (const value of [least - 1, -Infinity, NaN, "1000", true]) {
      assertThrows(() => make(value), RangeError, name);
    }
    // With these a client reckons, which fails a session whose terms are not numbers.
    if (name in finite) assertThrows(() => make(Infinity), RangeError, name);
    else make(Infinity);
  });
}

test("fetch is an own property that needs no `this` and ignores what it does not know", async (t) => {
  const ws = sseAdapter();
  t.defer(() => shutDown(ws));
  assert(Object.hasOwn(ws, "fetch"));
  const { fetch } = ws;
  for (const info of [undefined, null, 1, "x", {}, { waitUntil() {} }]) {
    const request = new Request("http://localhost/", { headers: { accept: "text/event-stream" } });
    const response = await fetch(request, info);
    assertEquals(response.status, 200);
    await response.body!.cancel();
  }
});

test("Deno.serve(ws.fetch) and Bun.serve({ fetch: ws.fetch }) work as they are written", async (t) => {
  const ws = sseAdapter({
    bidir: true,
    hooks: {
      open: (peer) => void peer.send(`Welcome ${peer.remoteAddress}`),
      message: (peer, message) => void peer.send(`echo ${message}`),
    },
  });
  let port: number;
  if (runtime === "deno") {
    const server = Deno.serve({ port: 0, hostname: "127.0.0.1", onListen() {} }, ws.fetch);
    port = server.addr.port;
    t.defer(() => server.shutdown());
  } else {
    const { Bun } = globalThis as unknown as {
      Bun: { serve(options: unknown): { port: number; stop(all: boolean): Promise<void> } };
    };
    const server = Bun.serve({ port: 0, hostname: "127.0.0.1", fetch: ws.fetch });
    port = server.port;
    t.defer(() => server.stop(true));
  }
  t.defer(() => shutDown(ws));
  const { socket, messages, closed } = connect(t, `ws://127.0.0.1:${port}/`);
  assertEquals(await messages.next(), "Welcome 127.0.0.1");
  socket.send("x");
  assertEquals(await messages.next(), "echo x");
  socket.close();
  await closed;
});

test("close closes every peer with its code, lets out what was sent, and turns newcomers away", async (t) => {
  const { url, ws } = await listen(t, { hooks: { open: (peer) => void peer.send("hello") } });
  const { messages, closed } = connect(t, url);
  await messages.next();
  for (const peers of ws.peers.values()) for (const peer of peers) peer.send("last words");
  const closing = ws.close(1012, "restart");
  assertEquals(await messages.next(), "last words");
  const { code, reason, wasClean } = await closed;
  assertEquals([code, reason, wasClean], [1012, "restart", true]);
  await closing;
  const response = await fetch(url, { headers: { accept: "text/event-stream" } });
  assertEquals([response.status, response.headers.get("retry-after")], [503, "1"]);
  await response.body?.cancel();
});

for (const when of ["aborts", "has aborted"]) {
  test(`close waits for who is away until its signal ${when}`, async (t) => {
    const closes: (number | undefined)[] = [];
    const hooks = { close: (_: Peer, { code }: { code?: number }) => void closes.push(code) };
    const ws = sseAdapter({ bidir: true, resumeTimeout: 60_000, hooks });
    const away = await WireClient.open(ws.fetch, "http://localhost/");
    await away.drop();
    const there = t.use(await WireClient.open(ws.fetch, "http://localhost/"));
    const end = new AbortController();
    if (when === "has aborted") end.abort();
    const closing = within(ws.close(1012, "restart", { signal: end.signal }), 1000, "the end");
    assertEquals(await there.closed(), 1012, "who reads is told in any case");
    if (when === "aborts") {
      await there.close(1012);
      await until(() => closes.length > 0);
      assertEquals(closes, [1012], "one is still waited for");
      end.abort();
    }
    await closing;
    assertEquals([closes, ws.peers.size], [when === "aborts" ? [1012, 1006] : [1006, 1006], 0]);
  });
}

for (const transport of ["post", "duplex"] as const) {
  test(`a reason is told by both ends with its lone surrogates replaced (${transport})`, async (t) => {
    const told: (string | undefined)[] = [];
    const { url } = await listen(t, {
      hooks: {
        message: (peer) => peer.close(4000, "\ud800?"),
        close: (_, { reason }) => void told.push(reason),
      },
    });
    const { socket, opened, closed } = connect(t, url, { transport });
    await opened;
    socket.send("close");
    const { code, reason, wasClean } = await closed;
    assertEquals([code, reason, wasClean], [4000, "\ufffd?", true]);
    await until(() => told.length > 0);
    assertEquals(told, [reason]);
  });
}

// ---------------------------------------------------------------- more than one adapter

test("crossws's broadcastChannel driver relays publications between two adapters, each at most once", async (t) => {
  const options = {
    sync: broadcastChannel({ channel: `test-${crypto.randomUUID()}` }),
    hooks: {
      open(peer: Peer) {
        peer.subscribe("news");
        peer.send("hello");
      },
      message: (peer: Peer, message: Message) => peer.publish("news", message.data),
    },
  };
  const [one, two] = [await listen(t, options), await listen(t, options)];
  const a = connect(t, `${one.url}/x`);
  const b = connect(t, `${two.url}/x`);
  const c = connect(t, `${two.url}/y`);
  for (const { messages } of [a, b, c]) await messages.next();
  one.ws.publish("news", "to x", { namespace: "/x" });
  one.ws.publish("news", { to: "all" });
  assertEquals(await a.messages.take(2), ["to x", '{"to":"all"}']);
  assertEquals(await b.messages.take(2), ["to x", '{"to":"all"}']);
  assertEquals(await c.messages.take(1), ['{"to":"all"}']);
  a.socket.send("from a");
  assertEquals(await b.messages.next(), "from a");
  b.socket.send(bytes(1, 2));
  assertEquals(new Uint8Array(await a.messages.next() as ArrayBuffer), bytes(1, 2));
  two.ws.publish("news", "end");
  for (const { messages } of [a, b, c]) assertEquals(await messages.next(), "end");
});

test("a sync driver that fails is told to onError, and what is local goes on", async (t) => {
  const stages: string[] = [];
  const { url, ws } = await listen(t, {
    sync: () => ({
      subscribe: () => Promise.reject(new Error("down")),
      publish() {
        throw new Error("down");
      },
    }),
    onError: (error, { stage }) => void stages.push(`${stage}: ${(error as Error).message}`),
    hooks: {
      open(peer) {
        peer.subscribe("news");
        peer.send("hello");
      },
    },
  });
  const { messages } = connect(t, url);
  await messages.next();
  ws.publish("news", "local");
  assertEquals(await messages.next(), "local");
  assertEquals(stages, ["subscribe: down", "publish: down"]);
});
