/** The interface of `WebSocket`: its IDL and its constructor. */
import process from "node:process";
import { WebSocketSSE, WebsocketSSE } from "../client.ts";
import * as client from "../client.ts";
import * as entry from "../mod.ts";
import { connect, contract, ours, serveSSE } from "./contract.ts";
import {
  assert,
  assertEquals,
  assertStrictEquals,
  assertThrows,
  deferred,
  once,
  test,
} from "./harness.ts";

/** Nobody listens there. */
const NOWHERE = "ws://127.0.0.1:1/";

const constants = { CONNECTING: 0, OPEN: 1, CLOSING: 2, CLOSED: 3 };
const handlers = ["onopen", "onmessage", "onerror", "onclose"] as const;

/** The class that a target constructs. */
const classOf = (socket: object) => socket.constructor as typeof WebSocket;

// ---------------------------------------------------------------- IDL

contract("the prototype has the members of the standard, all enumerable", (t, target) => {
  const prototype = classOf(target.socket(t, NOWHERE)).prototype;
  const keys = Object.keys(prototype);
  for (
    const name of [
      ...Object.keys(constants),
      ...handlers,
      ..."url readyState bufferedAmount extensions protocol binaryType send close".split(" "),
    ]
  ) assert(keys.includes(name), name);
});

test("WebSocketSSE adds no enumerable member to those of the standard", () => {
  assertEquals(
    Object.keys(WebSocketSSE.prototype).sort(),
    [
      ...Object.keys(constants),
      ...handlers,
      ..."url readyState bufferedAmount extensions protocol binaryType send close".split(" "),
    ].sort(),
  );
  assertEquals(Object.keys(WebSocketSSE), Object.keys(constants));
});

contract("attributes are accessors of the prototype, and instances own none", (t, target) => {
  const socket = target.socket(t, NOWHERE);
  const prototype = classOf(socket).prototype;
  for (const name of ["url", "readyState", "bufferedAmount", "extensions", "protocol"]) {
    const descriptor = Object.getOwnPropertyDescriptor(prototype, name)!;
    assertEquals([typeof descriptor.get, descriptor.set], ["function", undefined], name);
    assertEquals([descriptor.enumerable, descriptor.configurable], [true, true], name);
    assert(!Object.hasOwn(socket, name), name);
  }
  for (const name of ["binaryType", ...handlers]) {
    const descriptor = Object.getOwnPropertyDescriptor(prototype, name)!;
    assertEquals([typeof descriptor.get, typeof descriptor.set], ["function", "function"], name);
    assertEquals([descriptor.enumerable, descriptor.configurable], [true, true], name);
    assert(!Object.hasOwn(socket, name), name);
  }
});

contract("read-only attributes refuse assignment", (t, target) => {
  const socket = target.socket(t, NOWHERE) as unknown as Record<string, unknown>;
  for (const name of ["url", "readyState", "bufferedAmount", "extensions", "protocol"]) {
    const before = socket[name];
    assertThrows(() => socket[name] = "changed", TypeError);
    assertStrictEquals(socket[name], before);
  }
});

contract("attributes throw a TypeError on what is no WebSocket", (t, target) => {
  const prototype = classOf(target.socket(t, NOWHERE)).prototype;
  assertThrows(() => prototype.url, TypeError);
  assertThrows(() => prototype.send.call({} as WebSocket, "x"), TypeError);
});

test("every accessor and method refuses a foreign this, whatever else it is given", (t) => {
  const { prototype } = WebSocketSSE;
  const strangers = [{}, null, undefined, prototype, Object.create(prototype), new EventTarget()];
  const members = Object.entries(Object.getOwnPropertyDescriptors(prototype));
  for (const stranger of strangers) {
    for (const [name, { get, set, value }] of members) {
      if (get) assertThrows(() => get.call(stranger), TypeError, undefined, `get ${name}`);
      // Nor where it would ignore what it is given.
      if (set) {
        assertThrows(() => set.call(stranger, undefined), TypeError, undefined, `set ${name}`);
      }
      if (typeof value !== "function" || name === "constructor") continue;
      // 7 is no code to close with, which would be another error.
      assertThrows(() => value.call(stranger, 7, "x"), TypeError, undefined, name);
    }
  }
  const socket = connect(t, NOWHERE);
  for (const [, { get, set }] of members) {
    const value = get?.call(socket);
    set?.call(socket, value);
    assertEquals(get?.call(socket), value);
  }
});

test("accessors have the names of the standard", () => {
  const { prototype } = WebSocketSSE;
  for (const name of [...handlers, "binaryType", "url", "extensions", "protocol", "readyState"]) {
    const { get, set } = Object.getOwnPropertyDescriptor(prototype, name)!;
    assertEquals([get!.name, get!.length], [`get ${name}`, 0]);
    if (set) assertEquals([set.name, set.length], [`set ${name}`, 1]);
  }
});

test("a setter that ignores its value changes nothing", (t) => {
  const socket = connect(t, NOWHERE);
  socket.binaryType = "arraybuffer";
  for (const value of ["", "Blob", "notBlobOrArrayBuffer", 1, null]) {
    socket.binaryType = value as "blob";
    assertEquals(socket.binaryType, "arraybuffer");
  }
});

contract("the constants are on the class, on the prototype and on instances", (t, target) => {
  const socket = target.socket(t, NOWHERE);
  for (const [name, value] of Object.entries(constants)) {
    for (const place of [classOf(socket), classOf(socket).prototype]) {
      const descriptor = Object.getOwnPropertyDescriptor(place, name)!;
      assertEquals([descriptor.value, descriptor.writable], [value, false], name);
      assertEquals(descriptor.configurable, false, name);
    }
    assertEquals((socket as unknown as Record<string, number>)[name], value);
  }
}, { notNative: { deno: "Deno's constants are accessors" } });

test("the constants are enumerable on the class and on the prototype", () => {
  for (const name of Object.keys(constants)) {
    for (const place of [WebSocketSSE, WebSocketSSE.prototype]) {
      assert(Object.getOwnPropertyDescriptor(place, name)!.enumerable, name);
    }
  }
});

contract("it introduces itself as [object WebSocket]", (t, target) => {
  assertEquals(Object.prototype.toString.call(target.socket(t, NOWHERE)), "[object WebSocket]");
});

test("the class tag is neither enumerable nor writable", () => {
  const tag = Object.getOwnPropertyDescriptor(WebSocketSSE.prototype, Symbol.toStringTag);
  assertEquals(tag, {
    value: "WebSocket",
    writable: false,
    enumerable: false,
    configurable: true,
  });
});

contract("functions have the lengths of the standard", (t, target) => {
  const type = classOf(target.socket(t, NOWHERE));
  assertEquals([type.length, type.prototype.send.length, type.prototype.close.length], [1, 1, 0]);
}, { notNative: { deno: "Deno's constructor has length 2" } });

contract("it is an EventTarget and cannot be called without new", (t, target) => {
  const socket = target.socket(t, NOWHERE);
  assert(socket instanceof EventTarget);
  assertThrows(() => (classOf(socket) as unknown as () => void)(), TypeError);
  assertThrows(() => Reflect.construct(classOf(socket), []), TypeError);
});

contract("a fresh socket is CONNECTING and has the standard's defaults", (t, target) => {
  const socket = target.socket(t, NOWHERE);
  assertEquals(socket.readyState, 0);
  assertEquals([socket.bufferedAmount, socket.extensions, socket.protocol], [0, "", ""]);
  assertEquals(handlers.map((name) => socket[name]), [null, null, null, null]);
});

contract("binaryType is blob at first, and ignores values that it does not know", (t, target) => {
  const socket = target.socket(t, NOWHERE);
  assertEquals(socket.binaryType, "blob");
  socket.binaryType = "arraybuffer";
  for (const value of ["", "Blob", "text", "ArrayBuffer", null, 1]) {
    socket.binaryType = value as "blob";
    assertEquals(socket.binaryType, "arraybuffer", String(value));
  }
  socket.binaryType = "blob";
  assertEquals(socket.binaryType, "blob");
}, { notNative: { bun: "Bun's default is nodebuffer" } });

// ---------------------------------------------------------------- handlers

contract("a handler attribute gives what was set: any object, else null", (t, target) => {
  const socket = target.socket(t, NOWHERE) as unknown as Record<string, unknown>;
  const object = {};
  const listener = () => {};
  for (const name of handlers) {
    for (const value of [listener, object, null, listener, 1, object, "text", undefined]) {
      socket[name] = value;
      assertStrictEquals(
        socket[name],
        typeof value === "object" || value === listener ? value : null,
      );
    }
  }
});

contract("a handler that is an object which cannot be called is passed over", async (t, target) => {
  const socket = target.socket(t, NOWHERE) as unknown as WebSocket & { onclose: unknown };
  socket.onclose = { handleEvent: () => process.exit(1) } as never;
  await once(socket, "close");
});

contract("a handler is called in the place where it was first set", (t, target) => {
  const socket = target.socket(t, NOWHERE);
  const calls: string[] = [];
  socket.addEventListener("open", () => calls.push("first"));
  socket.onopen = () => calls.push("replaced");
  socket.addEventListener("open", () => calls.push("last"));
  socket.onopen = () => calls.push("handler");
  socket.dispatchEvent(new Event("open"));
  assertEquals(calls, ["first", "handler", "last"]);
});

contract("a handler that was set to null and again goes to the end", (t, target) => {
  const socket = target.socket(t, NOWHERE);
  const calls: string[] = [];
  socket.onopen = () => calls.push("handler");
  socket.addEventListener("open", () => calls.push("listener"));
  socket.onopen = null;
  socket.dispatchEvent(new Event("open"));
  assertEquals(calls, ["listener"]);
  socket.onopen = () => calls.push("again");
  socket.dispatchEvent(new Event("open"));
  assertEquals(calls, ["listener", "listener", "again"]);
}, { notNative: { deno: "Deno keeps the first place of a handler that was null" } });

contract("a handler is called with the socket as this and the event", async (t, target) => {
  const socket = target.socket(t, NOWHERE);
  const called = deferred<[unknown, string]>();
  socket.onclose = function (this: unknown, event: CloseEvent) {
    called.resolve([this, event.type]);
  };
  assertEquals(await called.promise, [socket, "close"]);
});

contract("a handler set while its event is dispatched is called only next time", (t, target) => {
  const socket = target.socket(t, NOWHERE);
  const calls: string[] = [];
  socket.onopen = () => {
    calls.push("first");
    socket.onopen = () => calls.push("second");
  };
  socket.dispatchEvent(new Event("open"));
  socket.dispatchEvent(new Event("open"));
  assertEquals(calls, ["first", "second"]);
});

// ---------------------------------------------------------------- constructor

const noURL: [string, string][] = [
  ["", "empty"],
  ["nope", "relative, with nothing to be relative to"],
  ["ftp://example.com/", "of another scheme"],
  ["about:blank", "of a scheme without host"],
  ["ws://example.com/#fragment", "with a fragment"],
  ["ws://example.com/#", "with an empty fragment"],
  ["https://example.com/#", "https with an empty fragment"],
  ["ws://example.com:99999/", "with a port that is none"],
  ["ws://exa mple.com/", "with a space in its host"],
];
for (const [url, what] of noURL) {
  contract(`a URL ${what} is a SyntaxError`, (t, target) => {
    assertEquals(nameOf(() => target.socket(t, url)), "SyntaxError");
  });
}

const noProtocols: [string | string[], string][] = [
  ["", "the empty string"],
  ["a b", "with a space"],
  ["a,b", "with a comma"],
  ["a;b", "with a semicolon"],
  ["a/b", "with a slash"],
  ["a(b", "with a bracket"],
  ['"a"', "in quotes"],
  ["a\n", "with a line break"],
  ["é", "beyond ASCII"],
  [["a", ""], "one of which is empty"],
  [["a", "b", "a"], "one of which comes twice"],
  [["chat", "Chat"], "that differ only in case"],
];
for (const [protocols, what] of noProtocols) {
  contract(`subprotocols ${what} are a SyntaxError`, (t, target) => {
    assertEquals(nameOf(() => target.socket(t, NOWHERE, protocols)), "SyntaxError");
  });
}

test("SyntaxErrors of the constructor are DOMExceptions", () => {
  assertThrows(() => new WebSocketSSE("nope"), DOMException);
  assertThrows(() => new WebSocketSSE(NOWHERE, "a b"), DOMException);
  assertThrows(() => new WebSocketSSE(NOWHERE, { protocols: ["a", "a"] }), DOMException);
});

contract("every character of a token may stand in a subprotocol", (t, target) => {
  target.socket(t, NOWHERE, "!#$%&'*+-.^_`|~0189azAZ");
});

contract("a list of subprotocols is anything that can be iterated", (t, target) => {
  const list = new Set(["a", "b c"]) as unknown as string[];
  assertEquals(nameOf(() => classOf(target.socket(t, NOWHERE)).length), "none");
  const type = classOf(target.socket(t, NOWHERE));
  assertEquals(nameOf(() => new type(NOWHERE, list)), "SyntaxError");
});

/** The name of what a function throws. */
function nameOf(body: () => unknown): string {
  try {
    body();
  } catch (error) {
    return (error as Error).name;
  }
  return "none";
}

contract("url is serialised: escaped, its host in lower case, a path always there", (t, target) => {
  for (
    const [given, expected] of [
      ["ws://LOCALHOST:1", "ws://localhost:1/"],
      ["ws://localhost:1/a b/../ü?q=ö x", "ws://localhost:1/%C3%BC?q=%C3%B6%20x"],
      ["wss://localhost:443/", "wss://localhost/"],
      ["  ws://localhost:1/\n", "ws://localhost:1/"],
    ] as const
  ) assertEquals(target.socket(t, given).url, expected);
  assertEquals(target.socket(t, new URL("ws://localhost:1/x")).url, "ws://localhost:1/x");
});

contract("url has the scheme of a WebSocket: http becomes ws, https wss", (t, target) => {
  for (
    const [given, expected] of [
      ["http://127.0.0.1:1/x?y", "ws://127.0.0.1:1/x?y"],
      ["https://127.0.0.1:1/x?y", "wss://127.0.0.1:1/x?y"],
      ["HTTP://127.0.0.1:80/", "ws://127.0.0.1/"],
      ["https://127.0.0.1:443/", "wss://127.0.0.1/"],
    ] as const
  ) assertEquals(target.socket(t, given).url, expected);
});

for (const target of ours) {
  test(`${target.name}: http: and ws: reach the same server`, async (t) => {
    const url = await target.serve(t);
    for (const scheme of ["http", "ws"]) {
      const socket = target.socket(t, url.replace("http", scheme));
      await once(socket, "open");
    }
  });
}

test("a relative URL is relative to the page, where there is one", async (t) => {
  const url = await serveSSE(t);
  const global = globalThis as { location?: unknown };
  const before = Object.getOwnPropertyDescriptor(globalThis, "location");
  Object.defineProperty(globalThis, "location", {
    value: new URL("/dir/page", url),
    configurable: true,
  });
  t.defer(() => {
    if (before) Object.defineProperty(globalThis, "location", before);
    else delete global.location;
  });
  const socket = connect(t, "room?x=1");
  assertEquals(socket.url, `${url.replace("http", "ws")}/dir/room?x=1`);
  await once(socket, "open");
});

test("a page of https: may use no http: nor ws:, but to its own machine", (t) => {
  const global = globalThis as { location?: unknown };
  const before = Object.getOwnPropertyDescriptor(globalThis, "location");
  const locate = (href: string) =>
    Object.defineProperty(globalThis, "location", { value: new URL(href), configurable: true });
  t.defer(() => {
    if (before) Object.defineProperty(globalThis, "location", before);
    else delete global.location;
  });
  locate("https://example.test/page");
  for (const url of ["ws://example.test/", "http://example.test/", "ws://localhost.test/"]) {
    const error = assertThrows(() => connect(t, url), DOMException) as DOMException;
    assertEquals([error.name, error.code], ["SecurityError", 18], url);
  }
  // What is wrong by itself is told first.
  assertEquals((assertThrows(() => connect(t, "ws://[")) as Error).name, "SyntaxError");
  const twice = { protocols: ["a", "a"] };
  const error = assertThrows(() => connect(t, "ws://example.test/", twice)) as Error;
  assertEquals(error.name, "SyntaxError");
  for (
    const url of [
      "wss://127.0.0.1:1/",
      "https://127.0.0.1:1/",
      "ws://localhost:1/",
      "http://chat.localhost:1/",
      "ws://127.9.9.9:1/",
      "ws://[::1]:1/",
    ]
  ) connect(t, url);
  locate("http://example.test/page");
  connect(t, "ws://127.0.0.1:1/");
});

test("in a page, a relative URL is relative to what the document says", async (t) => {
  const url = await serveSSE(t);
  const page = globalThis as { document?: unknown };
  page.document = { baseURI: `${url}/based/` };
  t.defer(() => void delete page.document);
  const expected = `${url.replace("http", "ws")}/based/room`;
  assertEquals(connect(t, "room", { stream: false }).url, expected);
});

contract("a symbol is no URL, subprotocol or reason", (t, target) => {
  const symbol = Symbol("x") as unknown as string;
  assertThrows(() => target.socket(t, symbol), TypeError);
  assertThrows(() => target.socket(t, NOWHERE, [symbol]), TypeError);
  const socket = target.socket(t, NOWHERE);
  assertThrows(() => socket.close(1000, symbol), TypeError);
  assertEquals(socket.readyState, 0);
}, { notNative: { bun: "Bun takes the reason" } });

test("credentials of the URL become Authorization, and leave the URL that is requested", async (t) => {
  const seen: unknown[] = [];
  const url = await serveSSE(t, {
    hooks: {
      upgrade(request) {
        // Its host is the server's to say: Next.js says localhost, whatever it is asked by.
        const { username, password, pathname } = new URL(request.url);
        seen.push(username, password, pathname, request.headers.get("authorization"));
      },
    },
  });
  const given = url.replace("//", "//us%C3%A9r:p%3A%zz@") + "/x";
  const requested: string[] = [];
  const socket = connect(t, given, {
    fetch(input, init) {
      requested.push(input);
      return fetch(input, init);
    },
  });
  await once(socket, "open");
  assertEquals(socket.url, given.replace(/^http/, "ws"));
  assertEquals(requested[0], `${url}/x`);
  const expected = btoa("us\u00C3\u00A9r:p:%zz");
  assertEquals(seen.slice(0, 4), ["", "", "/x", `Basic ${expected}`]);
});

test("an Authorization among the options stands over that of the URL", async (t) => {
  const seen: (string | null)[] = [];
  const url = await serveSSE(t, {
    hooks: { upgrade: (request) => void seen.push(request.headers.get("authorization")) },
  });
  const headers = { authorization: "Bearer x" };
  await once(connect(t, url.replace("//", "//user:pass@"), { headers }), "open");
  assertEquals(seen[0], "Bearer x");
});

test("WebsocketSSE is another name of WebSocketSSE, in both modules", () => {
  assertStrictEquals(WebsocketSSE, WebSocketSSE);
  assertStrictEquals(entry.WebsocketSSE, WebSocketSSE);
  assertStrictEquals(entry.WebSocketSSE, WebSocketSSE);
  assertStrictEquals(client.default, WebSocketSSE);
});
