/** Subprotocols, the options beyond the standard, and handlers that throw. */
import type { WebSocketSSE } from "../client.ts";
import type { SSEOptions } from "../server.ts";
import { connect, contract, echo, messages, ours, record, serveSSE } from "./contract.ts";
import {
  assertEquals,
  assertNotEquals,
  type Handler,
  needs,
  nodes,
  once,
  type Runtime,
  sleep,
  test,
} from "./harness.ts";

// ---------------------------------------------------------------- subprotocols

contract("protocol is what upgrade's header chose, and empty until open", async (t, target) => {
  const offered: (string | null)[] = [];
  const url = await target.serve(t, {
    upgrade(request) {
      offered.push(request.headers.get("sec-websocket-protocol"));
      return { headers: { "sec-websocket-protocol": "chat.v2" } };
    },
  });
  const socket = target.socket(t, url, ["chat.v1", "chat.v2"]);
  assertEquals(socket.protocol, "");
  await once(socket, "open");
  assertEquals(socket.protocol, "chat.v2");
  assertEquals(offered[0]!.split(/, ?/), ["chat.v1", "chat.v2"]);
});

contract("a single subprotocol may be given as a string", async (t, target) => {
  const url = await target.serve(t, {
    upgrade: () => ({ headers: { "sec-websocket-protocol": "only" } }),
  });
  const socket = target.socket(t, url, "only");
  await once(socket, "open");
  assertEquals(socket.protocol, "only");
});

contract("a chosen subprotocol that was not offered fails the socket", async (t, target) => {
  const url = await target.serve(t, {
    upgrade: () => ({ headers: { "sec-websocket-protocol": "other" } }),
  });
  const socket = target.socket(t, url, ["offered"]);
  const events = record(socket);
  const event = await once<CloseEvent>(socket, "close");
  assertEquals([event.wasClean, socket.protocol], [false, ""]);
  assertEquals(events, ["error", "close"]);
});

// As Deno does. (The standard has a browser fail it.)
contract("subprotocols of which none is chosen leave protocol empty", async (t, target) => {
  const socket = target.socket(t, await target.serve(t), ["offered"]);
  await once(socket, "open");
  assertEquals(socket.protocol, "");
}, { notNative: { bun: "Bun's server chooses the first" } });

/** Three ways to choose. */
const choices: [string, SSEOptions][] = [
  ["upgrade's protocol", { hooks: { upgrade: () => ({ protocol: "b" }) } }],
  ["handleProtocols", { handleProtocols: (offered) => [...offered][1] }],
  ["an async handleProtocols", { handleProtocols: (offered) => Promise.resolve([...offered][1]) }],
];
for (const target of ours) {
  for (const [what, options] of choices) {
    test(`${target.name}: ${what} chooses the subprotocol`, async (t) => {
      const seen: unknown[] = [];
      const url = await serveSSE(t, {
        ...options,
        hooks: { ...options.hooks, open: (peer) => void seen.push(peer.websocket.protocol) },
      });
      const socket = target.socket(t, url, ["a", "b"]);
      await once(socket, "open");
      assertEquals([socket.protocol, seen], ["b", ["b"]]);
    });
  }
}

test("peer.request shows what was offered, where crossws's hooks look", async (t) => {
  const seen: unknown[] = [];
  const url = await serveSSE(t, {
    handleProtocols: () => "b",
    hooks: {
      open: (peer) => void seen.push(peer.request.headers.get("sec-websocket-protocol")),
    },
  });
  await once(connect(t, url, { protocols: ["a", "b"] }), "open");
  assertEquals(seen, ["a, b"]);
});

// ---------------------------------------------------------------- options

for (const target of ours) {
  const { transport } = target;
  test(`${target.name}: headers go with every request`, async (t) => {
    const { url, seen } = await inspected(t, (request) => request.headers.get("x-key"));
    const socket = connect(t, url, { transport: transport!, headers: { "x-key": "k" } });
    await echoTwice(socket);
    assertEquals(new Set(seen), new Set(["k"]));
  });

  test(`${target.name}: headers by a function are asked for anew each time`, async (t) => {
    const { url, seen } = await inspected(t, (request) => request.headers.get("x-key"));
    let calls = 0;
    const socket = connect(t, url, {
      transport: transport!,
      headers: async () => {
        await null;
        return new Headers({ "x-key": `${++calls}` });
      },
    });
    await echoTwice(socket);
    assertEquals(seen, seen.map((_, i) => `${i + 1}`));
    assertEquals(calls, seen.length);
    if (transport !== "duplex") assertNotEquals(calls, 1);
  });

  test(`${target.name}: credentials and every request go through the fetch given`, async (t) => {
    const url = await serveSSE(t, { hooks: echo });
    const seen: [string, unknown, unknown][] = [];
    const socket = connect(t, url.replace("http", "ws"), {
      transport: transport!,
      credentials: "include",
      fetch: (input, init) => {
        seen.push([input, init!.credentials, init!.redirect]);
        return fetch(input, init);
      },
    });
    await echoTwice(socket);
    assertEquals(new Set(seen.map((entry) => entry.join())), new Set([`${url}/,include,manual`]));
  });
}

test("headers by a function that fails fails the socket", async (t) => {
  const url = await serveSSE(t);
  for (
    const headers of [
      () => Promise.reject(new Error("no key")),
      () => {
        throw new Error("no key");
      },
    ]
  ) {
    const socket = connect(t, url, { headers });
    const events = record(socket);
    assertEquals((await once<CloseEvent>(socket, "close")).code, 1006);
    assertEquals(events, ["error", "close"]);
  }
});

test("a fetch that throws at once fails the socket, later", async (t) => {
  const socket = connect(t, "http://localhost/", {
    fetch: () => {
      throw new TypeError("no network");
    },
  });
  const events = record(socket);
  assertEquals([socket.readyState, events], [0, []]);
  assertEquals((await once<CloseEvent>(socket, "close")).code, 1006);
  assertEquals(events, ["error", "close"]);
});

for (const transport of ["stream", "post"] as const) {
  test(`a fetch that answers a message with no Response fails the socket (${transport})`, async (t) => {
    const url = await serveSSE(t);
    const socket = connect(t, url, {
      transport,
      fetch: (input, init) =>
        init!.body ? Promise.resolve({ ok: true, status: 204 } as Response) : fetch(input, init),
    });
    await once(socket, "open");
    const events = record(socket);
    socket.send("hello");
    assertEquals((await once<CloseEvent>(socket, "close")).code, 1006);
    assertEquals(events, ["error", "close"]);
  });
}

test("credentials are left to fetch when none are given", async (t) => {
  const url = await serveSSE(t);
  const seen: boolean[] = [];
  const socket = connect(t, url, {
    fetch: (input, init) => {
      seen.push("credentials" in init!);
      return fetch(input, init);
    },
  });
  await once(socket, "open");
  assertEquals(seen[0], false);
});

test("stream: false sends by requests of their own only", async (t) => {
  const { url, seen } = await inspected(t, (request) => request.method);
  const socket = connect(t, url, { stream: false });
  await echoTwice(socket);
  assertEquals(socket.transport, "post");
  assertEquals(seen, ["GET", "POST", "POST"]);
});

test("auto carries both directions by one request between runtimes", async (t) => {
  const { url, seen } = await inspected(t, (request) => request.method);
  const socket = connect(t, url);
  await echoTwice(socket);
  assertEquals([socket.transport, seen], ["duplex", ["POST"]]);
});

test("listeners are told by name, options and object as by EventTarget", async (t) => {
  const socket = connect(t, await serveSSE(t, { hooks: echo }));
  const calls: string[] = [];
  const removed = () => calls.push("removed");
  socket.addEventListener("open", removed);
  socket.removeEventListener("open", removed);
  socket.addEventListener("open", function () {
    calls.push(String(this === socket));
  }, { once: true });
  socket.addEventListener("open", { handleEvent: (event) => calls.push(event.type) });
  await once(socket, "open");
  socket.dispatchEvent(new Event("open"));
  assertEquals(calls, ["true", "open", "open"]);
});

/** A server of ours that notes something of each request. */
async function inspected<T>(
  t: Parameters<typeof serveSSE>[0],
  look: (request: Request) => T,
): Promise<{ url: string; seen: T[] }> {
  const seen: T[] = [];
  const { sseAdapter } = await import("../server.ts");
  const adapter = sseAdapter({ bidir: true, hooks: echo });
  const handler: Handler = (request, info) => {
    seen.push(look(request));
    return adapter.fetch(request, info);
  };
  const { url } = await t.serve(handler);
  t.defer(() => adapter.close());
  return { url, seen };
}

async function echoTwice(socket: WebSocketSSE): Promise<void> {
  await once(socket, "open");
  for (const text of ["one", "two"]) {
    const received = messages(socket, 1);
    socket.send(text);
    assertEquals(await received, [text]);
  }
}

test("headers that take long are no transport that is held", async (t) => {
  const url = await serveSSE(t, { hooks: echo });
  let first = true;
  const socket = connect(t, url, {
    headers: async () => {
      if (first) await sleep(2_200, t.signal); // a request has 2 s to be answered
      first = false;
      return {};
    },
  });
  await echoTwice(socket);
  assertEquals(socket.transport, "duplex");
});

test("what was learned of an origin is tried again after ten minutes", async (t) => {
  const url = await serveSSE(t, { hooks: echo });
  const begin = async (): Promise<[first: string, transport: string]> => {
    const methods: string[] = [];
    const socket = connect(t, url, {
      fetch(input, init) {
        methods.push(init!.method!);
        if (init!.body instanceof ReadableStream) {
          return Promise.reject(new Error("no streams here"));
        }
        return fetch(input, init);
      },
    });
    await echoTwice(socket);
    return [methods[0]!, socket.transport];
  };
  assertEquals(await begin(), ["POST", "post"]);
  assertEquals(await begin(), ["GET", "post"]);
  const now = performance.now.bind(performance);
  performance.now = () => now() + 601_000;
  t.defer(() => performance.now = now);
  assertEquals(await begin(), ["POST", "post"]);
});

// ---------------------------------------------------------------- handlers that throw

for (const runtime of ["deno", "bun", ...nodes] satisfies Runtime[]) {
  test(`handlers that throw do not break a socket on ${runtime}`, async (t) => {
    const url = await serveSSE(t, { hooks: echo });
    const child = await t.spawn(runtime, "tests/fixtures/throwing.ts", { args: [url] });
    const log: string[] = [];
    for await (const line of child.lines()) log.push(line);
    const events = ["open", "message", "message", "close"];
    const reported = log.filter((line) => line.startsWith("reported"));
    assertEquals(log.filter((line) => !reported.includes(line)), events, child.stderr());
    assertEquals(reported, events.map((name) => `reported: ${name}`), child.stderr());
  }, { skip: needs(runtime) });
}
