/**
 * Rules of PROTOCOL.md to the letter, in raw requests: what docs/conformance.md lists and no other
 * suite holds. A second implementer reads the text, not our code.
 */
import { WebSocketSSE } from "../client.ts";
import { type CloseDetails, type Peer, sseAdapter, type SSEOptions } from "../server.ts";
import {
  assert,
  assertEquals,
  deferred,
  once,
  rawRequest,
  test,
  type TestContext,
  type TestServer,
  within,
} from "./harness.ts";
import { type Asked, preface, ScriptedServer } from "./scripted.ts";
import { ack, seq, text, type WireClient, wireClient } from "./wire.ts";

interface Scene {
  server: TestServer;
  client: WireClient;
  messages: (string | Uint8Array)[];
  peer: Promise<Peer>;
  closed: Promise<CloseDetails>;
}

/** A server that keeps what it is sent, and a client of it that does nothing by itself. */
async function scene(t: TestContext, options: SSEOptions = {}): Promise<Scene> {
  const messages: (string | Uint8Array)[] = [];
  const peer = deferred<Peer>();
  const closed = deferred<CloseDetails>();
  const ws = sseAdapter({
    bidir: true,
    ...options,
    hooks: {
      open: peer.resolve,
      message: (_, { rawData }) => void messages.push(rawData as string | Uint8Array),
      close: (_, details) => closed.resolve(details),
      ...options.hooks,
    },
  });
  const server = t.use(await t.serve((request, info) => ws.fetch(request, info)));
  t.defer(() => ws.close(1001, "", { signal: AbortSignal.abort() }));
  const client = await wireClient(t, `${server.url}/chat`);
  return { server, client, messages, peer: peer.promise, closed: closed.promise };
}

for (
  const [what, frames, status, received] of [
    ["LF alone behind a header", "TEXT 5\nhello\r\n", 400, 0],
    ["LF alone behind a payload", "TEXT 5\r\nhello\nPING\n", 400, 0],
    ["a name in lower case", "text 5\r\nhello\r\n", 400, 0],
    ["a length of nine digits", "TEXT 000000005\r\nhello\r\n", 400, 0],
    ["no digits after the space", "TEXT \r\n", 400, 0],
    ["two spaces", "TEXT  5\r\nhello\r\n", 400, 0],
    ["a length with zeros in front, and in upper case", "TEXT 0000000B\r\nhello world\r\n", 204, 1],
    ["messages without a payload or a length", "TEXT\r\nBINARY\r\nTEXT 0\r\n\r\n", 204, 3],
    [
      "control frames in front of the messages' number",
      `ACK 1\r\n0\r\nPING\r\n${text("x")}`,
      204,
      1,
    ],
    ["a frame that nobody knows", `PUSH 1\r\nx\r\n`, 400, 0],
    ["what is malformed behind a message", `${text("x")}TEXT 1\r\ntoo long\r\n`, 400, 1],
    ["a number that skips forward over nothing", `${text("x")}${seq(2)}${text("y")}`, 204, 2],
  ] as const
) {
  test(`frames: ${what}: ${status}, and ${received} messages are received`, async (t) => {
    const { client, messages } = await scene(t);
    assertEquals(await client.frames(seq(1) + frames), [status, received]);
    assertEquals(messages.length, received);
    assertEquals(await client.frames("PING\r\n"), [204, received], "the session goes on");
    await client.drop();
  });
}

test("maxMessageSize measures the payload of uplink messages, and nothing that comes down", async (t) => {
  const { client, messages, peer } = await scene(t, { maxMessageSize: 16 });
  assertEquals(await client.frames(seq(1) + text("ä".repeat(8))), [204, 1]);
  (await peer).send("x".repeat(1000));
  assertEquals((await client.message()).length, 1000);
  assertEquals(await client.frames(seq(2) + text("x".repeat(17))), [413, 1]);
  assertEquals(messages, ["ä".repeat(8)]);
  assertEquals(await client.closed(), 1009);
});

test("CLOSE and control frames are taken at a full window, and do not count in it", async (t) => {
  const { client, closed } = await scene(t, {
    window: 32,
    hooks: { message: () => new Promise(() => {}) },
  });
  assertEquals(await client.frames(seq(1) + text("x".repeat(32))), [204, 1]);
  assertEquals(await client.frames(ack(0) + "PING 1\r\nx\r\n".repeat(20)), [204, 1]);
  assertEquals(await client.frames(`${seq(2)}CLOSE\r\n`), [204, 2]);
  assertEquals(await client.closed(), 1005);
  assertEquals(await closed, { code: 1005, reason: "" });
});

test("a stream begins with an empty comment and duplex-open, whatever it goes on with", async (t) => {
  const { client } = await scene(t);
  const headers = { accept: "text/event-stream", "x-duplex-version": "1" };
  const resuming = { "x-crossws-id": client.token, "x-duplex-attempt": "1", "last-event-id": "0" };
  const openings: Record<string, string>[] = [{}, { "x-duplex-poll": "1" }, resuming];
  for (const more of openings) {
    const { body } = await fetch(client.url, { headers: { ...headers, ...more } });
    const reader = body!.pipeThrough(new TextDecoderStream()).getReader();
    const { value } = await reader.read();
    assert(value?.startsWith(":\nevent: duplex-open\ndata: {"), value);
    await reader.cancel();
  }
});

test("terms without a limit are null", async (t) => {
  const { client } = await scene(t, { maxMessageSize: Infinity, idleTimeout: Infinity });
  const terms = client.terms;
  assertEquals([terms.maxMessageSize, terms.idleTimeout], [null, null]);
  assertEquals(Object.keys(terms).sort(), [
    ...["attempt", "handled", "heartbeatInterval", "idleTimeout", "maxMessageSize", "next"],
    ...["protocol", "received", "resumeTimeout", "window"],
  ]);
});

test("bytes come as base64 of the standard alphabet with padding, none as an empty data line", async (t) => {
  const { client, peer } = await scene(t);
  for (const bytes of [[], [255], [251, 239], [250, 236, 62]]) {
    (await peer).send(Uint8Array.from(bytes));
  }
  const data = [];
  for (let n = 0; n < 4; n++) data.push(await client.events.find("duplex-binary"));
  assertEquals(data, ["", "/w==", "++8=", "+uw+"]);
});

test("a POST with a token is a resumption only where it accepts event streams alone", async (t) => {
  const { server, client, messages } = await scene(t);
  const post = async (accept: string, type: string, frames: string) => {
    const head = [
      ...["POST /chat HTTP/1.1", "host: localhost", `accept: ${accept}`, `content-type: ${type}`],
      ...["x-duplex-version: 1", `x-crossws-id: ${client.token}`, "connection: close"],
      ...["x-duplex-attempt: 1", "last-event-id: 0", `content-length: ${frames.length}`],
    ].join("\r\n");
    return t.use(await rawRequest(server.port, `${head}\r\n\r\n${frames}`));
  };
  const type = "application/websocket-events";
  const uplink = await post("text/event-stream, */*", type, seq(1) + text("one"));
  assertEquals([uplink.status, uplink.headers.get("x-duplex-received")], [204, "1"]);
  // "The body of a request with x-duplex-version is frames, whatever its content type."
  const other = await post("*/*", "multipart/related", seq(2) + text("two"));
  assertEquals([other.status, other.headers.get("x-duplex-received")], [204, "2"]);
  const resumed = await post("text/event-stream", type, seq(3) + text("three"));
  assertEquals(resumed.headers.get("content-type"), "text/event-stream");
  await client.events.ended();
  assertEquals(await client.frames(seq(4) + text("four")), [204, 4]);
  assertEquals(messages, ["one", "two", "three", "four"]);
});

test("a tombstone replays the close whatever the client has, and takes CLOSE again", async (t) => {
  const { client } = await scene(t);
  assertEquals(await client.frames(`${seq(1)}CLOSE\r\n`), [204, 1]);
  await client.events.ended();
  await using again = await client.resume(3, 7);
  const { next, received, attempt } = again.terms;
  assertEquals([next, received, attempt], [8, 1, 3]);
  assertEquals(await again.events.ended(), [
    { type: "duplex-close", data: JSON.stringify({ code: 1005, reason: "", sent: 0 }) },
  ]);
  assertEquals(await client.frames(`${seq(1)}CLOSE\r\n`), [204, 1]);
});

/** A client of ours, and the server that the test is. */
async function scripted(
  t: TestContext,
): Promise<{ socket: WebSocketSSE; opening: Asked; server: ScriptedServer }> {
  const server = new ScriptedServer();
  const abort = new AbortController();
  t.defer(() => abort.abort());
  const { fetch } = server;
  const socket = new WebSocketSSE("http://x/", { transport: "post", fetch, signal: abort.signal });
  return { socket, opening: await server.next(), server };
}

test("a client ignores events, fields and terms that it does not know, and counts none of them", async (t) => {
  const { socket, opening, server } = await scripted(t);
  const stream = opening.stream({ colour: "green" } as never);
  await once(socket, "open");
  const message = once<MessageEvent>(socket, "message");
  stream.write("event: duplex-later\ndata: {}\n\nevent: other\ndata: x\n\nid: 7\nretry: 1\n\n:\n");
  stream.write(
    'colour: green\nevent: duplex-json\ndata: "a\\r"\n\nevent: duplex-ping\ndata: 1 eA==\n\n',
  );
  const { body } = await server.next();
  assertEquals([(await message).data, socket.stats.received], ["a\r", 1]);
  assert(body.includes("PONG 1\r\nx\r\n"), body);
});

test("a client takes the token that the latest answer names", async (t) => {
  const { socket, opening, server } = await scripted(t);
  const first = opening.stream();
  await once(socket, "open");
  first.end();
  const resumption = await server.next();
  const token = `${"12".repeat(8)}.${"34".repeat(16)}`;
  resumption.stream({}, token);
  await within(once(socket, "resume"), 5_000);
  socket.send("x");
  assertEquals((await server.next()).headers.get("x-crossws-id"), token);
});

for (
  const [what, cut] of [
    ["nothing", ""],
    ["half a name", "dat"],
    ["half a line", "data: hal"],
    ["a line", "data: a\n"],
    ["a type", "event: duplex-json\n"],
    ["half of some bytes", "event: duplex-binary\ndata: Y"],
  ] as const
) {
  test(`a repeated answer ends the stream, and is in no message (behind ${what})`, async (t) => {
    const { socket, opening, server } = await scripted(t);
    const first = opening.stream();
    await once(socket, "open");
    const messages: unknown[] = [];
    socket.onmessage = ({ data }) => messages.push(data);
    first.write(`data: 1\n\n${cut}${preface({ next: 1, attempt: 0 })}data: 1\n\n`);
    const resumption = await server.next();
    assertEquals(resumption.headers.get("last-event-id"), "1");
    const second = resumption.stream();
    second.write("data: 2\n\n");
    while (messages.length < 2) await once(socket, "message");
    // It is no damage, of which there may be one.
    second.write(cut + preface({ next: 2, attempt: 1 }));
    const third = (await server.next()).stream();
    third.write("data: 3\n\n");
    while (messages.length < 3) await once(socket, "message");
    assertEquals([messages, socket.readyState], [["1", "2", "3"], 1]);
  });
}

test("a client takes damage for one resumption in the life of a session, however long it is", async (t) => {
  const { socket, opening, server } = await scripted(t);
  opening.stream().write("event: duplex-ping\ndata: 5 \n\n");
  const second = (await server.next()).stream();
  const closed = once<CloseEvent>(socket, "close");
  for (let n = 0; n < 100; n++) second.write(`data: ${n}\n\n`);
  await once(socket, "message");
  second.end();
  while (!socket.stats.received) await once(socket, "message");
  const third = (await server.next()).stream();
  third.write("event: duplex-ping\ndata: 5 \n\n");
  assertEquals((await closed).code, 1006);
});
