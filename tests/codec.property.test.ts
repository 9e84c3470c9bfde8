/**
 * What holds for all messages, all ways to split them, and all bytes: tested by
 * fast-check through the public surface, in memory. A failure prints its seed.
 * DUPLEX_SOAK=1 (`deno task soak`) runs more than a million random bodies.
 */
import process from "node:process";
import fc from "fast-check";
import { WebSocketSSE, type WebSocketSSEOptions } from "../client.ts";
import { type Peer, sseAdapter } from "../server.ts";
import {
  assert,
  assertEquals,
  assertLess,
  deferred,
  needs,
  once,
  test,
  until,
  within,
} from "./harness.ts";
import { concat } from "./split.ts";
import {
  byteStreamOf,
  closePayload,
  frame,
  from,
  FULL,
  post,
  streamOf,
  UPLINK,
  WireClient,
} from "./wire.ts";

const soak = process.env.DUPLEX_SOAK === "1";
const timeout = soak ? 3_600_000 : 60_000;
const runs = (few: number, many: number) => ({ numRuns: soak ? many : few });

/** Bodies tried so far, of all properties. */
let bodies = 0;

const encoder = new TextEncoder();
const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
/** As it arrives: UTF-8 has no lone surrogates. */
const wellFormed = (text: string) => decoder.decode(encoder.encode(text));

// ---------------------------------------------------------------- arbitraries

/** Text that is likely to hold what an encoding stumbles over. */
const text = fc.oneof(
  fc.string({ unit: "binary", maxLength: 20 }), // any code point, and lone surrogates below
  fc.array(
    fc.constantFrom(
      ...["\r", "\n", "\r\n", "\n\r", "\0", "\uFEFF", "\uD800", "\uDC00", "😀", "\u2028", " ", ":"],
      ...["data: ", "event: message", "id: 1", "TEXT 3\r\n", '"', "\\", "a"],
    ),
    { maxLength: 8 },
  ).map((parts) => parts.join("")),
  fc.constantFrom("", " ", "\n", "\r", "\uFEFF", "\0", "a\r\nb\rc"),
);
const message = fc.oneof(
  { weight: 3, arbitrary: text },
  { weight: 1, arbitrary: fc.uint8Array({ maxLength: 40 }) },
);
/** Where to cut, as parts of the whole: the same for bytes of any length. */
const cuts = fc.oneof(
  { weight: 4, arbitrary: fc.array(fc.double({ min: 0, max: 1, noNaN: true }), { maxLength: 8 }) },
  { weight: 1, arbitrary: fc.constant("every byte" as const) },
);

function* split(
  bytes: Uint8Array,
  cuts: number[] | "every byte",
): Generator<Uint8Array> {
  const at = cuts === "every byte"
    ? Array.from(bytes, (_, index) => index)
    : cuts.map((cut) => Math.floor(cut * bytes.length)).sort((a, b) => a - b);
  let from = 0;
  for (const to of [...at, bytes.length]) {
    yield bytes.slice(from, to); // also empty ones
    from = to;
  }
}

type Sent = string | Uint8Array;

const encode = (data: Sent) => frame(typeof data === "string" ? "TEXT" : "BINARY", data);
/** As a hook or a listener has it, to be compared. */
const normal = (data: unknown): unknown =>
  typeof data === "string" ? wellFormed(data) : [...new Uint8Array(data as Uint8Array)];

/** Bytes that look like an uplink, and bytes that do not. */
const anyBody = fc.oneof(
  { weight: 1, arbitrary: fc.uint8Array({ maxLength: 60 }) },
  {
    weight: 3,
    arbitrary: fc.array(
      fc.oneof(
        fc.constantFrom<Sent>(
          ...["TEXT ", "BINARY ", "CLOSE ", "PING ", "PONG ", "ACK ", "SEQ ", "SEQ\r\n", "0", "1"],
          ...[
            "2",
            "3",
            "f",
            "40",
            "41",
            "ffffffff",
            "\r",
            "\n",
            "\r\n",
            "a",
            "abc",
            "\0",
            "TEXT\r\n",
          ],
          ...["TEXT 3\r\nabc\r\n", "TEXT 0\r\n\r\n", "ACK 1\r\n0\r\n", "SEQ 1\r\n1\r\n"],
          ...["SEQ 1\r\n2\r\n", "BINARY 1\r\n\0\r\n", "PING 0\r\n\r\n", "ACK 1\r\n9\r\n"],
          frame("CLOSE", closePayload(1000, "bye")),
          frame("CLOSE", closePayload(1005)),
          frame("TEXT", new Uint8Array([0xc0, 0x80])),
        ),
      ),
      { maxLength: 8 },
    ).map((parts) => concat(parts.map((part) => Uint8Array.from(Buffer.from(part as string))))),
  },
  {
    weight: 3, // a body that was right before something happened to it
    arbitrary: fc.tuple(
      fc.array(message, { minLength: 1, maxLength: 4 }),
      fc.array(
        fc.tuple(
          fc.double({ min: 0, max: 1, noNaN: true }),
          fc.constantFrom("change", "insert", "delete", "truncate", "double"),
          fc.integer({ min: 0, max: 255 }),
        ),
        { maxLength: 3 },
      ),
    ).map(([messages, damages]) => {
      let bytes = [...concat(messages.map(encode))];
      for (const [where, what, byte] of damages) {
        const at = Math.floor(where * bytes.length);
        if (what === "change") bytes[at] = byte;
        else if (what === "insert") bytes.splice(at, 0, byte);
        else if (what === "delete") bytes.splice(at, 1);
        else if (what === "truncate") bytes = bytes.slice(0, at);
        else bytes = [...bytes, ...bytes.slice(at)];
      }
      return Uint8Array.from(bytes);
    }),
  },
);

// ---------------------------------------------------------------- the uplink

const URL_ = "http://localhost/room";
const MAX = 64;

interface Outcome {
  taken: unknown[];
  status: number;
  received: number;
  closed: number | undefined;
}

/** A server whose hooks note what they are given, for one session at a time. */
class Taker {
  taken: unknown[] = [];
  errors: unknown[] = [];
  /** The session of now. Close hooks come in tasks of their own: one may be of the session before. */
  #peer: Peer | undefined;
  #ended = deferred<number | undefined>();
  readonly ws = sseAdapter({
    bidir: true,
    resumeTimeout: 0,
    maxMessageSize: MAX,
    hooks: {
      open: (peer) => {
        this.#peer = peer;
        this.#ended = deferred();
      },
      message: (_, message) => void this.taken.push(normal(message.rawData)),
      close: (peer, { code }) => {
        if (peer === this.#peer) this.#ended.resolve(code);
      },
      error: (_, error) => void this.errors.push(error),
    },
  });

  /** One body to a new session, by a POST of its own. */
  async post(body: ReadableStream, seq: number | undefined): Promise<Outcome> {
    return await this.#session(async (token) => {
      const response = await this.ws.fetch(post(URL_, {
        ...UPLINK,
        "x-crossws-id": token,
      }, seq === undefined ? body : from(seq, body)));
      return [response.status, Number(response.headers.get("x-duplex-received"))];
    });
  }

  async #session(use: (token: string) => Promise<[number, number]>): Promise<Outcome> {
    bodies++;
    this.taken = [];
    const opened = await this.ws.fetch(new Request(URL_, { headers: FULL }));
    const [status, received] = await within(
      use(opened.headers.get("x-crossws-id")!),
      5_000,
      "an answer",
    );
    const reader = opened.body!.getReader();
    let closed: number | undefined;
    const { readyState } = this.#peer!.websocket;
    if (readyState === WebSocket.CLOSED) {
      closed = await within(this.#ended.promise, 5_000, "the hook");
    } else if (readyState === WebSocket.CLOSING) { // its own close, which is to be answered
      const { value } = await within(reader.read(), 5_000, "the stream");
      const close = /event: duplex-close\ndata: (.*)/.exec(new TextDecoder().decode(value));
      closed = JSON.parse(close![1]!).code;
    }
    const { taken } = this;
    await reader.cancel();
    this.check(closed);
    return { taken, status, received, closed };
  }

  /** Nobody is left, but one who has been told a close and is waited for. */
  check(code: number | undefined): void {
    const left = [...this.ws.peers.values()].flatMap((peers) => [...peers]);
    for (const peer of left) peer.terminate();
    assertEquals(this.errors, []);
    assertEquals(this.ws.peers.size, 0);
    assert(left.length === 0 || code !== undefined, "a peer was left behind");
  }
}

test("any split of any messages of an uplink gives the same messages, once", async (t) => {
  const server = new Taker();
  t.defer(() => server.ws.close());
  const control = fc.constantFrom(
    ...["PING\r\n", "PING 2\r\nhi\r\n", "PONG 0\r\n\r\n", "ACK 1\r\n0\r\n"],
  );
  await fc.assert(
    fc.asyncProperty(
      fc.array(fc.tuple(message, fc.option(control)), { maxLength: 8 }),
      cuts,
      fc.constantFrom(streamOf, byteStreamOf),
      async (messages, cuts, streamOf) => {
        const body = concat(
          messages.flatMap(([data, control]) => [
            encoder.encode(control ?? ""),
            encode(typeof data === "string" ? wellFormed(data).slice(0, 20) : data),
          ]),
        );
        const outcome = await server.post(streamOf(split(body, cuts)), 1);
        assertEquals(outcome, {
          taken: messages.map(([data]) =>
            normal(typeof data === "string" ? wellFormed(data).slice(0, 20) : data)
          ),
          status: 204,
          received: messages.length,
          closed: undefined,
        });
      },
    ),
    runs(2_000, 100_000),
  );
}, { timeout });

test(
  "bodies that overlap, in any split, with SEQ or without, give each message once",
  async (t) => {
    const server = new Taker();
    t.defer(() => server.ws.close());
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.uint8Array({ maxLength: 5 }), { minLength: 1, maxLength: 8 }),
        fc.array(fc.tuple(fc.nat(8), fc.nat(8), fc.boolean(), cuts), { maxLength: 5 }),
        async (messages, parts) => {
          server.taken = [];
          const peer = await WireClient.open(server.ws.fetch, URL_);
          let received = 0;
          const send = async (
            first: number,
            to: number,
            named: boolean,
            cuts_: typeof parts[0][3],
          ) => {
            bodies++;
            const frames = messages.slice(first, to).map(encode);
            frames.unshift(frame("SEQ", `${first + 1}`));
            if (named) frames.unshift(frame("SEQ", "1"));
            const response = await peer.post(streamOf(split(concat(frames), cuts_)), UPLINK);
            assertEquals(response.status, 204);
            received = Math.max(received, to);
            assertEquals(response.headers.get("x-duplex-received"), `${received}`);
          };
          for (const [back, length, named, cuts] of parts) {
            const first = Math.max(0, received - back); // "overlap is normal"
            await send(first, Math.min(messages.length, first + length), named, cuts);
          }
          await send(received, messages.length, false, []);
          assertEquals(server.taken, messages.map(normal));
          await peer.drop();
        },
      ),
      runs(500, 20_000),
    );
  },
  { timeout },
);

/** The uplink's grammar once more, not incremental: what these bytes must lead to. */
function reference(bytes: Uint8Array, seq: number | undefined): Outcome & { ended: boolean } {
  const latin = Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
  const taken: unknown[] = [];
  let number = seq;
  let received = 0;
  const end = (status: number, closed?: number, ended = false) => ({
    taken,
    status,
    received,
    closed,
    ended,
  });
  for (let at = 0; at < bytes.length;) {
    const newline = latin.indexOf("\n", at);
    const header = latin.slice(at, newline < 0 ? undefined : newline + 1);
    if (header.length > 20) return end(400);
    if (newline < 0) break;
    const match = /^(TEXT|BINARY|CLOSE|PING|PONG|ACK|SEQ)(?: ([0-9a-f]{1,8}))?\r\n$/i.exec(header);
    if (!match || match[1] !== match[1]!.toUpperCase()) return end(400);
    const type = match[1]!;
    const length = parseInt(match[2] ?? "0", 16);
    const isMessage = type === "TEXT" || type === "BINARY";
    if (length > (isMessage ? MAX : 125)) return isMessage ? end(413, 1009) : end(400);
    at += header.length;
    const payload = bytes.slice(at, at + length);
    if (match[2] !== undefined) {
      if (latin.length < at + length + 2) break;
      if (latin.slice(at + length, at + length + 2) !== "\r\n") return end(400);
      at += length + 2;
    }
    const content = Array.from(payload, (byte) => String.fromCharCode(byte)).join("");
    if (type === "PING" || type === "PONG") continue;
    if (type === "ACK") {
      if (content !== "0") return end(400);
      continue;
    }
    if (type === "SEQ") {
      if (!/^(0|[1-9]\d{0,15})$/.test(content)) return end(400);
      if (!Number.isSafeInteger(Number(content)) || Number(content) < (number ?? 1)) {
        return end(400);
      }
      number = Number(content);
      continue;
    }
    if (number === undefined) return end(400);
    if (number > received + 1) return end(409);
    if (number++ <= received) continue;
    let said = "";
    try {
      const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
      if (type === "CLOSE" && length === 1) return end(400);
      if (type !== "BINARY") said = strict.decode(type === "CLOSE" ? payload.slice(2) : payload);
    } catch {
      return end(400, 1007);
    }
    if (type !== "CLOSE") {
      taken.push(type === "TEXT" ? said : [...payload]);
      received++;
      continue;
    }
    const code = length ? payload[0]! << 8 | payload[1]! : 1005;
    const valid = code >= 3000 && code < 5000 ||
      code >= 1000 && code <= 1014 && ![1004, 1005, 1006].includes(code);
    if (length && !valid) return end(400);
    received++;
    return end(204, code, true);
  }
  return end(204);
}

test(
  "any bytes of an uplink, in any split, do what its grammar says, and nothing else",
  async (t) => {
    const server = new Taker();
    t.defer(() => server.ws.close());
    await fc.assert(
      fc.asyncProperty(
        anyBody,
        cuts,
        fc.constantFrom(1, 1, 1, 2, undefined),
        fc.constantFrom(streamOf, byteStreamOf),
        async (body, cuts, seq, streamOf) => {
          const { ended, ...expected } = reference(body, seq);
          const outcome = await server.post(streamOf(split(body, cuts)), seq);
          if (ended) { // what comes after CLOSE is for nobody
            assertEquals(outcome.taken, expected.taken);
            assertEquals(outcome.closed, expected.closed);
          } else assertEquals(outcome, expected);
        },
      ),
      runs(8_000, 950_000),
    );
  },
  { timeout },
);

test(
  "any bytes of a duplex request give the same messages as by POST, or a close, and end",
  async (t) => {
    const server = new Taker();
    t.defer(() => server.ws.close());
    await fc.assert(
      fc.asyncProperty(anyBody, cuts, async (body, cuts) => {
        if (!body.length) return;
        bodies++;
        const { taken, status, closed, ended } = reference(body, 1);
        server.taken = [];
        const stream = streamOf(split(body, cuts), { open: true });
        if (status === 409) { // left to a resume, with no close, perhaps before the first byte
          const headers = { ...FULL, ...UPLINK };
          const response = await server.ws.fetch(post(URL_, headers, from(1, stream)));
          const events = await within(response.text(), 5_000, "the stream's end");
          assert(!events.includes("duplex-close"));
          assertEquals(server.taken, taken);
          return server.check(undefined);
        }
        const peer = await WireClient.duplex(server.ws.fetch, URL_, from(1, stream));
        const code = closed ?? (status === 400 ? 1002 : undefined);
        if (ended) { while (await peer.next()); }
        else if (code) assertEquals(await peer.closed(), code);
        else {
          // No end is due: the server has read everything when it has taken the last message.
          await within(
            (async () => {
              while (server.taken.length < taken.length) await new Promise((r) => setImmediate(r));
            })(),
            5_000,
            "the messages",
          );
        }
        assertEquals(server.taken, taken);
        await peer.drop();
        server.check(code);
      }),
      runs(2_000, 50_000),
    );
  },
  { timeout },
);

test("binary of any size is one line of base64 on its way down", async (t) => {
  const opened = deferred<Peer>();
  const window = 4 * 1024 * 1024; // nothing is acknowledged
  const ws = sseAdapter({ bidir: true, resumeTimeout: 0, window, hooks: { open: opened.resolve } });
  t.defer(() => ws.close());
  await using client = await WireClient.open(ws.fetch, URL_);
  const peer = await opened.promise;
  const part = 90 * 1024; // it is encoded in parts
  for (const around of [2, part, 2 * part]) {
    for (const size of [-2, -1, 0, 1, 2].map((more) => around + more)) {
      const data = Uint8Array.from({ length: size }, (_, at) => at * 7 + (at >> 8));
      peer.send(data);
      const event = (await client.next("duplex-binary"))!;
      assert(event.data === Buffer.from(data).toString("base64"), `${size} bytes`);
    }
  }
});

test("of a body without end, what is behind its first fault is dropped, and no more of it read than a bound", async (t) => {
  const server = new Taker();
  t.defer(() => server.ws.close());
  /** Some bytes at a time, as far as a fault may be; then in pieces as a network brings them. */
  function* forever(first: string, chunk: Sent) {
    yield first;
    const more = concat(
      Array(Math.ceil(65_536 / chunk.length)).fill(Uint8Array.from(
        typeof chunk === "string" ? encoder.encode(chunk) : chunk,
      )),
    );
    for (;;) {
      const next = read < 300 ? chunk : more;
      read += next.length;
      yield next;
    }
  }
  let read = 0;
  const endless: [string, Sent, number][] = [
    ["", "A", 400],
    ["", "AAAAAAAAAAAAAAAA", 400],
    ["TEXT ", "0", 400],
    ["TEXT ffffffff\r\n", "x", 413],
    ["TEXT 40\r\n", "x", 400], // as long as announced, but it does not end there
    ["CLOSE 7e\r\n", "x", 400],
    ["PING\r\n", "TEXT 1\r\nab", 400],
    ["", frame("TEXT", new Uint8Array([0xff])), 400],
  ];
  const most = 32 * 1024 * 1024;
  for (const [first, chunk, status] of endless) {
    read = 0;
    let cancelled = false;
    const body = streamOf(forever(first, chunk), { cancelled: () => cancelled = true });
    const outcome = await server.post(body, 1);
    assertEquals([first, outcome.status, outcome.taken], [first, status, []]);
    await until(() => read > most);
    const before = read;
    for (let turn = 0; turn < 50; turn++) await new Promise((resolve) => setImmediate(resolve));
    assertEquals([read, cancelled], [before, false]); // some hosts' streams do not survive a cancel
    assertLess(read, most + 4 * 65_536);
  }
});

test(
  "a large message in chunks of one byte costs no more than its size, a few times",
  async (t) => {
    const size = 4 * 1024 * 1024;
    const whole = deferred<number>();
    const ws = sseAdapter({
      bidir: true,
      resumeTimeout: 0,
      maxMessageSize: size,
      hooks: { message: (_, message) => whole.resolve(message.uint8Array().length) },
    });
    t.defer(() => ws.close());
    const peer = await WireClient.open(ws.fetch, URL_);
    const byte = new Uint8Array([120]);
    let most = 0;
    const before = process.memoryUsage().rss;
    const body = new ReadableStream({
      start: (controller) => controller.enqueue(encoder.encode(`BINARY ${size.toString(16)}\r\n`)),
      pull(controller) {
        for (let count = 0; count < 65_536 && left > 0; count++, left--) controller.enqueue(byte);
        most = Math.max(most, process.memoryUsage().rss - before);
        if (left > 0) return;
        controller.enqueue(encoder.encode("\r\n"));
        controller.close();
      },
    });
    let left = size;
    const response = await peer.post(body);
    assertEquals(response.status, 204);
    assertEquals(await whole.promise, size);
    assertLess(most, 350 * 1024 * 1024); // an array of chunks took 400 MiB and more
    await peer.drop();
  },
  { timeout: 60_000 },
);

// ---------------------------------------------------------------- both directions, both ends

/** Splits what a response brings, and what a request takes, anew. */
function resplit(
  stream: ReadableStream<Uint8Array>,
  cuts: number[] | "every byte",
): ReadableStream<Uint8Array> {
  return stream.pipeThrough(
    new TransformStream({
      transform(chunk, controller) {
        for (const part of split(chunk, cuts)) if (part.length) controller.enqueue(part);
      },
    }),
  );
}

test(
  "any messages both ways, in any split, arrive whole and in order at the other end",
  async () => {
    const transports = ["post", "stream", "duplex"] as const;
    await fc.assert(
      fc.asyncProperty(
        fc.array(message, { maxLength: 6 }),
        fc.array(message, { maxLength: 6 }),
        cuts,
        fc.constantFrom(...transports),
        async (down, up, cuts, transport) => {
          bodies++;
          const received: unknown[] = [];
          const all = deferred();
          const ws = sseAdapter({
            bidir: true,
            resumeTimeout: 1000,
            hooks: {
              open(peer) {
                for (const data of down) peer.send(data);
                if (!up.length) all.resolve();
              },
              message(_, message) {
                received.push(normal(message.rawData));
                if (received.length === up.length) all.resolve();
              },
            },
          });
          const socket = new WebSocketSSE("ws://localhost/room", {
            transport,
            fetch: async (url, init) => {
              const response = await ws.fetch(new Request(url, init));
              if (!response.body) return response;
              return new Response(resplit(response.body, cuts), response);
            },
          });
          socket.binaryType = "arraybuffer";
          const got: unknown[] = [];
          const complete = deferred();
          if (!down.length) complete.resolve();
          socket.onmessage = ({ data }) => {
            got.push(normal(data));
            if (got.length === down.length) complete.resolve();
          };
          await once(socket, "open");
          for (const data of up) socket.send(data as string);
          await within(Promise.all([all.promise, complete.promise]), 5_000, "the messages");
          assertEquals(got, down.map(normal));
          assertEquals(received, up.map(normal));
          const closed = once<CloseEvent>(socket, "close");
          socket.close(1000);
          assertEquals((await closed).wasClean, true);
          assertEquals(ws.peers.size, 0);
          await ws.close();
        },
      ),
      runs(400, 10_000),
    );
  },
  { timeout },
);

// ---------------------------------------------------------------- the client's parser

/** A socket whose server says what a test says, on the plain level. */
async function read(
  chunks: Iterable<Uint8Array> | ReadableStream,
  options: WebSocketSSEOptions = {},
): Promise<string[]> {
  bodies++;
  const body = chunks instanceof ReadableStream ? chunks : streamOf(chunks);
  const socket = new WebSocketSSE("http://localhost/", {
    bidir: false,
    transport: "post",
    ...options,
    fetch: () =>
      Promise.resolve(
        new Response(body, { headers: { "content-type": "text/event-stream" } }),
      ),
  });
  const messages: string[] = [];
  socket.onmessage = ({ data }) => void messages.push(data);
  await once(socket, "close");
  return messages;
}

/** The HTML standard's event streams once more, not incremental. */
function interpret(bytes: Uint8Array): string[] {
  const lines = new TextDecoder().decode(bytes).split(/\r\n|\r|\n/); // which drops a BOM
  lines.pop(); // not ended
  const messages: string[] = [];
  let type = "";
  let data: string[] = [];
  for (const line of lines) {
    const [, field = "", value = ""] = /^([^:]*)(?:: ?(.*))?$/su.exec(line) ?? [];
    if (line === "") {
      if (data.length && (type === "" || type === "message")) messages.push(data.join("\n"));
      type = "";
      data = [];
    } else if (field === "data") data.push(value);
    else if (field === "event") type = value;
  }
  return messages;
}

const PIECES = [
  ...["\r", "\n", "\r\n", "\r\r", "\n\n", "\r\n\r\n", "data: ", "data:", "data", "data:  ", "dat"],
  ...[
    "event: message",
    "event:message",
    "event: other",
    "event",
    "event:",
    "id: 1",
    "id",
    "retry: 9",
  ],
  ...[":", ": comment", ":\n\n", "unknown: x", "data : x", "Data: x", "x", "héllo", "😀", "\0"],
  ...["\uFEFF", "\uD800", " ", "data: a\n\n", "event: message\ndata: b\r\n\r\n"],
];
const lines = fc.array(
  fc.tuple(
    fc.constantFrom(
      "",
      "data",
      "data: a",
      "data:b",
      "event",
      "event: other",
      "event:message",
      "id",
    ),
    fc.constantFrom("\r", "\n", "\r\n"),
  ),
  { maxLength: 14 },
).map((lines) => lines.flat());
const soup = fc.oneof(fc.array(fc.constantFrom(...PIECES), { maxLength: 14 }), lines)
  .map((pieces) => encoder.encode(pieces.join("")));

test("any event stream, in any split, gives the messages that the HTML standard says", async () => {
  await fc.assert(
    fc.asyncProperty(soup, fc.boolean(), cuts, async (bytes, bom, cuts) => {
      const stream = bom ? concat([encoder.encode("\uFEFF"), bytes]) : bytes;
      assertEquals(await read(split(stream, cuts)), interpret(stream));
    }),
    runs(4_000, 50_000),
  );
}, { timeout });

test("any bytes as an event stream give messages and a close", async () => {
  const bytes = fc.oneof(
    fc.uint8Array({ maxLength: 80 }),
    fc.tuple(soup, fc.uint8Array({ maxLength: 3 }), soup).map((parts) => concat(parts)),
  );
  await fc.assert(
    fc.asyncProperty(bytes, cuts, async (bytes, cuts) => {
      assertEquals(await read(split(bytes, cuts)), interpret(bytes));
    }),
    runs(1_000, 20_000),
  );
}, { timeout });

const garbage = fc.oneof(
  fc.string({ maxLength: 10 }),
  fc.constantFrom(
    ...[
      "",
      "null",
      "0",
      "{}",
      "[]",
      '""',
      "1 1",
      "-1 0",
      "0 0",
      "NaN",
      "1e999 0",
      "9007199254740993 1",
    ],
    ...[
      "0 ====",
      "0 YQ==",
      "YQ==",
      "{",
      '{"code":1000,"reason":"","sent":0}',
      '{"code":"x"}',
      "1.5",
    ],
  ),
);
const terms = fc.record({
  version: fc.constant(1),
  protocol: fc.constantFrom<unknown>("", "", "", "offered by nobody", 1, null),
  heartbeatInterval: fc.constantFrom<unknown>(1000, 1000, 1000, 0, -1, null, "x"),
  idleTimeout: fc.constant(0),
  resumeTimeout: fc.constantFrom<unknown>(40, 40, 40, 0, -1, null, "x"),
  maxMessageSize: fc.constant(100),
  window: fc.constantFrom<unknown>(100, 100, 100, 0, -1, null),
  received: fc.constantFrom<unknown>(0, 0, 0, 1, -1, null, 1e300),
  next: fc.constantFrom<unknown>(1, 1, 1, 0, 2, null),
  attempt: fc.constantFrom<unknown>(0, 0, 0, 1, null),
}, { noNullPrototype: true });
const events = fc.array(
  fc.tuple(
    fc.constantFrom(
      ...["", "message", "duplex-json", "duplex-binary", "duplex-ack", "duplex-ping"],
      ...["duplex-close", "duplex-open", "crossws-id", "duplex-unknown"],
    ),
    garbage,
  ),
  { maxLength: 6 },
).map((events) => events.map(([type, data]) => `event: ${type}\ndata: ${data}\n\n`).join(""));

test(
  "whatever a server says on the full level, a socket closes once its server is gone",
  async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.tuple(terms, events, cuts), { minLength: 8, maxLength: 8 }),
        async (servers) => {
          // Some of them wait for a resumption: together, to take no longer than one.
          await Promise.all(servers.map(async ([terms, events, cuts]) => {
            bodies++;
            let streams = 0;
            let posts = 0;
            const socket = new WebSocketSSE("http://localhost/", {
              transport: "post",
              fetch: (_, init) => {
                if (init?.method === "POST") {
                  posts++;
                  return Promise.resolve(
                    new Response(null, { status: 204, headers: { "x-duplex-received": "0" } }),
                  );
                }
                if (streams++ > 3) return Promise.resolve(new Response("gone", { status: 404 }));
                const open = `event: duplex-open\ndata: ${
                  JSON.stringify({
                    ...terms,
                    attempt: terms.attempt === 0 ? streams - 1 : terms.attempt,
                  })
                }\n\n`;
                return Promise.resolve(
                  new Response(streamOf(split(encoder.encode(open + events), cuts)), {
                    headers: {
                      "content-type": "text/event-stream",
                      "x-duplex-version": "1",
                      "x-crossws-id": "t",
                    },
                  }),
                );
              },
            });
            const { code } = await once<CloseEvent>(socket, "close", { timeout: 15_000 });
            assert(Number.isInteger(code), `close code ${code}`);
            assertEquals(socket.readyState, 3);
            assertLess(posts, 200);
          }));
        },
      ),
      { ...runs(100, 2_500), endOnFailure: true },
    );
  },
  { timeout: soak ? timeout : 90_000 },
);

// ---------------------------------------------------------------- a second encoder

test("the events of @std/http's ServerSentEventStream arrive as they were given", async () => {
  const specifier = "@std/http";
  const { ServerSentEventStream } = await import(specifier);
  await fc.assert(
    fc.asyncProperty(
      fc.array(
        fc.record({
          comment: fc.string({ maxLength: 5 }).filter((text) => !/[\r\n]/.test(text)),
          data: text.map((text) => wellFormed(text) || "."),
          id: fc.nat(),
          retry: fc.nat(),
        }, { requiredKeys: ["data"] }),
        { maxLength: 6 },
      ),
      cuts,
      async (events, cuts) => {
        const encoded = ReadableStream.from(events).pipeThrough(new ServerSentEventStream());
        const whole = new Uint8Array(await new Response(encoded as ReadableStream).arrayBuffer());
        assertEquals(
          await read(split(whole, cuts)),
          // Every line break is one to it, and a line's first space is the one after the colon.
          events.map(({ data }) =>
            data.split(/\r\n|\r|\n/).map((line) => line.replace(/^ /, "")).join("\n")
          ),
        );
      },
    ),
    runs(200, 5_000),
  );
}, { timeout, skip: needs("jsr") });

// ---------------------------------------------------------------- the count

test("the long run has tried a million bodies", () => {
  if (soak) console.log(`${bodies} bodies`);
  assert(bodies >= (soak ? 1_000_000 : 15_000), `${bodies} bodies`);
});
