/** `send`, `bufferedAmount`, and the messages that come of it. */
import { runInNewContext } from "node:vm";
import type { WebSocketSSE } from "../client.ts";
import { connect, contract, echo, messages, open, ours, serveSSE } from "./contract.ts";
import {
  assert,
  assertEquals,
  assertGreaterOrEqual,
  assertThrows,
  deferred,
  once,
  test,
} from "./harness.ts";

const encoder = new TextEncoder();

/** Every kind of view, with an offset and a rest of the buffer behind it. */
const views: [string, (buffer: ArrayBuffer) => ArrayBufferView<ArrayBuffer>][] = [
  ...[Int8Array, Uint8Array, Uint8ClampedArray, Int16Array, Uint16Array, Int32Array, Uint32Array]
    .map((Type) => view(Type)),
  ...[Float32Array, Float64Array].map((Type) => view(Type)),
  ...[BigInt64Array, BigUint64Array].map((Type) => view(Type)),
  ["DataView", (buffer) => new DataView(buffer, 3, 5)],
];

function view(
  Type: {
    new (buffer: ArrayBuffer, offset: number, length: number): ArrayBufferView<ArrayBuffer>;
    name: string;
    BYTES_PER_ELEMENT: number;
  },
): [string, (buffer: ArrayBuffer) => ArrayBufferView<ArrayBuffer>] {
  return [Type.name, (buffer) => new Type(buffer, Type.BYTES_PER_ELEMENT, 2)];
}

const counting = () => Uint8Array.from({ length: 64 }, (_, i) => i + 100).buffer;

contract("send while CONNECTING throws an InvalidStateError and counts nothing", (t, target) => {
  const socket = target.socket(t, "ws://127.0.0.1:1/");
  const error = assertThrows(() => socket.send("early"), DOMException);
  assertEquals(error.name, "InvalidStateError");
  assertEquals(socket.bufferedAmount, 0);
});

contract(
  "send without an argument throws a TypeError, else returns undefined",
  async (t, target) => {
    const socket = await open(t, target);
    assertThrows(() => (socket.send as () => void)(), TypeError);
    assertEquals(socket.send("x"), undefined);
  },
);

contract("texts come back whole and in order, whatever they contain", async (t, target) => {
  const socket = await open(t, target);
  const texts = [
    ...["", "\n", "\r", "a\r\nb\rc", "\n\n", "data: x", "\uFEFFbom", " space", "a\0b", "end\n"],
    ...["astral \u{1F600}\u{10FFFF}", "é".repeat(1000), "x".repeat(1024 * 1024)],
    ...["null", "undefined", "{}", "event: close", ":", "\u2028\u2029\u0085"],
  ];
  const received = messages(socket, texts.length);
  for (const text of texts) socket.send(text);
  assertEquals(await received, texts);
});

contract("lone surrogates arrive as U+FFFD", async (t, target) => {
  const socket = await open(t, target);
  const received = messages(socket, 3);
  socket.send("\uD800");
  socket.send("a\uDC00b\r");
  socket.send("\uD83D\uD83D\uDE00");
  assertEquals(await received, ["\uFFFD", "a\uFFFDb\r", "\uFFFD\u{1F600}"]);
});

contract("what is neither text nor bytes is sent as its string", async (t, target) => {
  const socket = await open(t, target);
  const values = [1, null, undefined, true, { toString: () => "object" }, [1, 2]];
  const received = messages(socket, values.length);
  for (const value of values) socket.send(value as string);
  assertEquals(await received, ["1", "null", "undefined", "true", "object", "1,2"]);
});

contract("every view is sent as the bytes that it shows", async (t, target) => {
  const socket = await open(t, target);
  socket.binaryType = "arraybuffer";
  const received = messages(socket, views.length);
  const expected = views.map(([, make]) => {
    const shown = make(counting());
    socket.send(shown);
    return new Uint8Array(shown.buffer, shown.byteOffset, shown.byteLength);
  });
  const got = (await received).map((data) => new Uint8Array(data as ArrayBuffer));
  views.forEach(([name], i) => assertEquals(got[i], expected[i], name));
});

contract("an ArrayBuffer is sent whole; an empty one is a message, too", async (t, target) => {
  const socket = await open(t, target);
  socket.binaryType = "arraybuffer";
  const large = crypto.getRandomValues(new Uint8Array(64 * 1024));
  const received = messages(socket, 3);
  socket.send(new ArrayBuffer(0));
  socket.send(large.buffer);
  socket.send(new Uint8Array([0, 255]).buffer);
  const got = (await received).map((data) => new Uint8Array(data as ArrayBuffer));
  assertEquals(got, [new Uint8Array(), large, new Uint8Array([0, 255])]);
});

for (const target of ours) {
  test(`${target.name}: 1 MiB of bytes arrives whole`, async (t) => {
    const url = await serveSSE(t, { hooks: echo, maxMessageSize: 2 ** 20 });
    const socket = target.socket(t, url);
    socket.binaryType = "arraybuffer";
    await once(socket, "open");
    const bytes = new Uint8Array(2 ** 20);
    for (let at = 0; at < bytes.length; at += 2 ** 16) {
      crypto.getRandomValues(bytes.subarray(at, at + 2 ** 16));
    }
    const received = messages(socket, 1);
    socket.send(bytes);
    const [data] = await received;
    const same = new Uint8Array(data as ArrayBuffer);
    assertEquals(same.length, bytes.length);
    assert(same.every((byte, i) => byte === bytes[i]));
  });
}

contract("bytes are copied by send: later changes do not show", async (t, target) => {
  const socket = await open(t, target);
  socket.binaryType = "arraybuffer";
  const received = messages(socket, 3);
  const bytes = new Uint8Array([1, 2, 3]);
  socket.send(bytes);
  bytes.fill(9);
  socket.send(bytes.buffer);
  bytes.fill(7);
  socket.send(new DataView(bytes.buffer, 1));
  bytes.fill(0);
  const got = (await received).map((data) => [...new Uint8Array(data as ArrayBuffer)]);
  assertEquals(got, [[1, 2, 3], [9, 9, 9], [7, 7]]);
});

contract("buffers that have gone elsewhere are no error, and empty", async (t, target) => {
  const connecting = target.socket(t, "ws://127.0.0.1:1/");
  const gone = () => {
    const bytes = new Uint8Array([1, 2, 3]);
    structuredClone(bytes.buffer, { transfer: [bytes.buffer] });
    return bytes;
  };
  for (const data of [gone(), gone().buffer]) {
    assertThrows(() => connecting.send(data), DOMException, "", "InvalidStateError");
  }
  const socket = await open(t, target);
  socket.binaryType = "arraybuffer";
  const received = messages(socket, 3);
  for (const data of [gone(), gone().buffer, "last"]) socket.send(data);
  const got = (await received).map((data) =>
    typeof data === "string" ? data : (data as ArrayBuffer).byteLength
  );
  assertEquals(got, [0, 0, "last"]);
});

contract("a Blob keeps its place between the messages around it", async (t, target) => {
  const socket = await open(t, target);
  socket.binaryType = "arraybuffer";
  const received = messages(socket, 6);
  const large = "b".repeat(100_000);
  socket.send("before");
  socket.send(new Blob([large]));
  socket.send("between");
  socket.send(new Blob(["sm", new Uint8Array([97])]));
  socket.send(new Blob([]));
  socket.send(new Uint8Array([1]));
  const got = (await received).map((data) =>
    typeof data === "string" ? data : new TextDecoder().decode(data as ArrayBuffer)
  );
  assertEquals(got, ["before", large, "between", "sma", "", "\u0001"]);
});

for (const target of ours) {
  test(`${target.name}: bytes of another realm, as frames and test runners have, are bytes`, async (t) => {
    const socket = await open(t, target, {
      message: (peer, message) => void peer.send(message.uint8Array()),
    });
    socket.binaryType = "arraybuffer";
    const echoes = messages(socket, 2);
    for (const bytes of ["new Uint8Array([1, 2])", "new Uint8Array([1, 2]).buffer"]) {
      socket.send(runInNewContext(bytes));
    }
    for (const echo of await echoes) {
      assertEquals([...new Uint8Array(echo as ArrayBuffer)], [1, 2]);
    }
  });
}

contract("a Blob sent before close arrives before it", async (t, target) => {
  const got = deferred<string>();
  const url = await target.serve(t, {
    message: (_, message) => got.resolve(message.text()),
  });
  const socket = target.socket(t, url);
  await once(socket, "open");
  socket.send(new Blob(["last words"]));
  socket.close();
  assertEquals(await got.promise, "last words");
});

// ---------------------------------------------------------------- messages

contract("binaryType decides for each message as it is dispatched", async (t, target) => {
  const socket = await open(t, target);
  const kinds: string[] = [];
  const done = deferred();
  socket.binaryType = "blob";
  socket.onmessage = ({ data }) => {
    kinds.push(data instanceof Blob ? `Blob ${data.size} "${data.type}"` : data.constructor.name);
    socket.binaryType = socket.binaryType === "blob" ? "arraybuffer" : "blob";
    if (kinds.length === 4) done.resolve();
  };
  for (let i = 0; i < 4; i++) socket.send(new Uint8Array([1, 2, 3]));
  await done.promise;
  assertEquals(kinds, ['Blob 3 ""', "ArrayBuffer", 'Blob 3 ""', "ArrayBuffer"]);
});

contract("an ArrayBuffer that arrives holds the message and nothing else", async (t, target) => {
  const socket = await open(t, target);
  socket.binaryType = "arraybuffer";
  const received = messages(socket, 2);
  socket.send(new Uint8Array([1]));
  socket.send(new Uint8Array([2, 3]));
  const lengths = (await received).map((data) => (data as ArrayBuffer).byteLength);
  assertEquals(lengths, [1, 2]);
});

contract("a message is a MessageEvent with the origin of the URL", async (t, target) => {
  const socket = await open(t, target);
  const message = once<MessageEvent>(socket, "message");
  socket.send("x");
  const event = await message;
  assert(event instanceof MessageEvent);
  assertEquals(event.origin, new URL(socket.url).origin);
  assertEquals([event.lastEventId, event.bubbles, event.cancelable], ["", false, false]);
  assertEquals([event.source, [...event.ports]], [null, []]);
}, { notNative: { deno: "Deno's origin is the whole URL" } });

test("the origin of a message is ws: as that of its URL, also when the URL was given as http:", async (t) => {
  const url = await serveSSE(t, { hooks: { open: (peer) => void peer.send("x") } });
  const { origin } = await once<MessageEvent>(connect(t, url), "message");
  assertEquals(origin, url.replace(/^http/, "ws"));
});

contract("promises settle between two messages, and before close", async (t, target) => {
  const log: string[] = [];
  const url = await target.serve(t, {
    open(peer) {
      for (let i = 0; i < 5; i++) peer.send(`${i}`);
      peer.close();
    },
  });
  const socket = target.socket(t, url);
  /** Longer than any chain of promises within an implementation. */
  const settle = async (name: string) => {
    for (let i = 0; i < 100; i++) await null;
    log.push(`${name} settled`);
  };
  for (const type of ["open", "message", "close"]) {
    socket.addEventListener(type, (event) => {
      const name = (event as MessageEvent).data ?? type;
      log.push(name);
      settle(name);
    });
  }
  await once(socket, "close");
  await new Promise((resolve) => setTimeout(resolve));
  const names = ["open", "0", "1", "2", "3", "4", "close"];
  assertEquals(log, names.flatMap((name) => [name, `${name} settled`]));
}, { notNative: { deno: "Deno dispatches several in one task" } });

test("promises settle between messages also when chunks are there already", async (t) => {
  const log: string[] = [];
  const socket = connect(t, "http://localhost/", {
    transport: "post",
    bidir: false,
    fetch: () =>
      Promise.resolve(
        new Response(
          new ReadableStream({
            start(controller) {
              for (const chunk of ["data: 1\n\ndata: 2\n\n", "data: 3\n\n", "data: 4\n\n"]) {
                controller.enqueue(encoder.encode(chunk));
              }
              controller.close();
            },
          }),
          { headers: { "content-type": "text/event-stream" } },
        ),
      ),
  });
  socket.onmessage = async ({ data }) => {
    log.push(data);
    for (let i = 0; i < 100; i++) await null;
    log.push(`${data} settled`);
  };
  await once(socket, "close");
  assertEquals(log, ["1", "2", "3", "4"].flatMap((data) => [data, `${data} settled`]));
});

// ---------------------------------------------------------------- bufferedAmount

contract("bufferedAmount rises at once, by the bytes of UTF-8", async (t, target) => {
  const socket = await open(t, target);
  let expected = 0;
  const sent: [string | ArrayBuffer | ArrayBufferView<ArrayBuffer> | Blob, number][] = [
    ["abc", 3],
    ["é€\u{1F600}", 9],
    ["\uD800", 3],
    ["", 0],
    [new ArrayBuffer(5), 5],
    [new Uint16Array(3).subarray(1), 4],
    [new Blob(["12345678"]), 8],
  ];
  for (const [data, size] of sent) {
    socket.send(data);
    assertEquals(socket.bufferedAmount, expected += size);
  }
}, { notNative: { bun: "Bun writes to its connection at once", deno: "Deno counts in UTF-16" } });

contract("bufferedAmount is down again before the echo is dispatched", async (t, target) => {
  const socket = await open(t, target);
  for (let i = 0; i < 10; i++) {
    const amount = new Promise((resolve) => {
      socket.onmessage = () => resolve(socket.bufferedAmount);
    });
    socket.send("x".repeat(10 ** (i % 6)));
    assertEquals(await amount, 0);
  }
});

contract("bufferedAmount never falls within a task", async (t, target) => {
  const socket = await open(t, target);
  const done = deferred();
  let falls = 0;
  let count = 0;
  socket.onmessage = async () => {
    if (++count === 200) done.resolve();
    let before = socket.bufferedAmount;
    for (let i = 0; i < 200; i++) {
      await null;
      if (socket.bufferedAmount < before) falls++;
      before = socket.bufferedAmount;
    }
  };
  for (let i = 0; i < 200; i++) {
    const before = socket.bufferedAmount;
    socket.send("some text");
    if (!target.native) assertEquals(socket.bufferedAmount, before + 9);
    if (i % 50 === 49) await new Promise((resolve) => setTimeout(resolve));
  }
  await done.promise;
  assertEquals(falls, 0);
});

test("bufferedAmount does not fall within the task of send, however quick the server", async (t) => {
  const { sseAdapter } = await import("../server.ts");
  const adapter = sseAdapter({ bidir: true, hooks: echo });
  t.defer(() => adapter.close());
  const socket = connect(t, "http://localhost/", {
    transport: "post",
    fetch: (url, init) => adapter.fetch(new Request(url, init)),
  });
  await once(socket, "open");
  let dispatched = false;
  socket.onmessage = () => dispatched = true;
  const echoed = once(socket, "message");
  socket.send("12345");
  for (let i = 0; i < 500; i++) {
    await null;
    assertEquals([socket.bufferedAmount, dispatched], [5, false]);
  }
  await echoed;
  assertEquals(socket.bufferedAmount, 0);
});

contract("once closing, send discards and bufferedAmount only rises", async (t, target) => {
  let received = 0;
  const url = await target.serve(t, { message: () => void received++ });
  const socket = target.socket(t, url);
  await once(socket, "open");
  socket.close();
  const before = socket.bufferedAmount;
  socket.send("12345");
  assertGreaterOrEqual(socket.bufferedAmount, before + 5);
  await once(socket, "close");
  const after = socket.bufferedAmount;
  assertEquals(after, before + 5);
  socket.send("é");
  socket.send(new Blob(["123"]));
  socket.send(new Uint8Array(4));
  assertEquals(socket.bufferedAmount, after + 9);
  await new Promise((resolve) => setTimeout(resolve));
  assertEquals([socket.bufferedAmount, received], [after + 9, 0]);
}, { notNative: { deno: "Deno's send throws" } });

// ---------------------------------------------------------------- bidir

for (const option of ["bidir", "bdir"] as const) {
  test(`${option}: false makes send throw an InvalidStateError, and receives`, async (t) => {
    const url = await serveSSE(t, {
      bidir: false,
      hooks: { open: (peer) => void peer.send("news") },
    });
    const socket = connect(t, url, { [option]: false });
    assertEquals((await once<MessageEvent>(socket, "message")).data, "news");
    const error = assertThrows(() => socket.send("x"), DOMException);
    assertEquals([error.name, socket.bufferedAmount], ["InvalidStateError", 0]);
  });
}

test("bidir stands over its old spelling bdir", async (t) => {
  const url = await serveSSE(t, { hooks: echo });
  const socket: WebSocketSSE = connect(t, url, { bidir: true, bdir: false });
  await once(socket, "open");
  const received = messages(socket, 1);
  socket.send("both");
  assertEquals(await received, ["both"]);
});
