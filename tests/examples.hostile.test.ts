/** The demo among strangers: sockets that never read, handshakes and addresses that are none. */
import { type AddressInfo, connect as dial, createServer, type Socket } from "node:net";
import { aiChat } from "../examples/ai/chat.ts";
import { Network } from "../examples/network.ts";
import { raw } from "./chats.ts";
import {
  assertEquals,
  assertStringIncludes,
  type Child,
  deferred,
  once,
  rawRequest,
  type Runtime,
  test,
  type TestContext,
  testOnce,
  until,
} from "./harness.ts";

const HANDSHAKE = "upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\n" +
  "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n";

/** Starts an example. */
async function start(t: TestContext, runtime: Runtime, file: string) {
  const child: Child = await t.spawn(runtime, `examples/${file}`, {
    asItIs: true,
    ...runtime === "node-24" && { flags: ["--no-warnings"] },
    env: { HOST: "127.0.0.1", PORT: "0" },
  });
  const url = /http:\S+\//.exec(await child.line({ timeout: 20_000 }))![0];
  return { child, url, port: Number(new URL(url).port) };
}

/** A text message of a client, masked by zeros. */
function frame(message: object): Uint8Array {
  const text = new TextEncoder().encode(JSON.stringify(message));
  const { length } = text;
  const size = length < 126 ? [128 + length] : [254, length >> 8, length & 255];
  return new Uint8Array([129, ...size, 0, 0, 0, 0, ...text]);
}

/** A connection that never reads; it resolves when the other end has cut it. */
function deaf(t: TestContext, port: number): { socket: Socket; cut: Promise<void> } {
  const socket = dial(port, "127.0.0.1");
  t.defer(() => void socket.destroy());
  socket.pause().on("error", () => {});
  const { promise: cut, resolve } = deferred();
  socket.on("close", () => resolve());
  return { socket, cut };
}

/** Writes the same again and again. */
function flood(socket: Socket, bytes: Uint8Array): void {
  while (!socket.destroyed && socket.write(bytes));
  if (!socket.destroyed) socket.once("drain", () => flood(socket, bytes));
}

for (const runtime of ["deno", "bun"] as const) {
  testOnce(`the demo on ${runtime} cuts native sockets that talk and never read`, async (t) => {
    const { child, port, url } = await start(t, runtime, `${runtime}.ts`);
    const join = frame({ type: "join", name: "Deaf" });
    const say = frame({ type: "say", id: "1", text: "x".repeat(500) });
    const many = new Uint8Array(100 * say.length);
    for (let n = 0; n < 100; n++) many.set(say, n * say.length);
    const sockets = Array.from({ length: 20 }, () => deaf(t, port));
    for (const { socket } of sockets) {
      socket.write(`GET /native HTTP/1.1\r\nhost: x\r\n${HANDSHAKE}\r\n`);
      socket.write(join);
      flood(socket, many);
    }
    await Promise.all(sockets.map(({ cut }) => cut));

    const reader = new WebSocket(`${url.replace("http", "ws")}native`);
    t.defer(() => reader.close());
    const heard: { type: string; names: string[]; text: string }[] = [];
    reader.addEventListener("message", ({ data }) => heard.push(JSON.parse(data)));
    await once(reader, "open");
    reader.send(JSON.stringify({ type: "join", name: "Ada" }));
    reader.send(JSON.stringify({ type: "say", text: "Hello" }));
    await until(() => heard.some(({ text }) => text === "Hello"));
    assertEquals(heard.find(({ type }) => type === "who")!.names, ["Ada"]);
    reader.send("x".repeat(20_000));
    assertEquals((await once<CloseEvent>(reader, "close")).code, 1009);
    assertEquals(child.stderr(), "");
  }, { timeout: 60_000 });
}

for (
  const [runtime, file] of [
    ["deno", "deno.ts"],
    ["bun", "bun.ts"],
    ["node-24", "node.ts"],
    ["deno", "ai/main.ts"],
    ["bun", "ai/main.ts"],
    ["node-24", "ai/main.ts"],
  ] as const
) {
  testOnce(`examples/${file} on ${runtime} refuses what is no request, and goes on`, async (t) => {
    const { child, port } = await start(t, runtime, file);
    const isNative = file === "deno.ts" || file === "bun.ts";
    const ask = async (head: string) => t.use(await rawRequest(port, head));
    for (const host of ["a b", "[::", "x:99999"]) {
      for (const path of ["/", "/ai/", "/native"]) {
        assertEquals((await ask(`GET ${path} HTTP/1.1\r\nhost: ${host}`)).status, 400);
      }
    }
    const foreign = `host: here\r\norigin: https://elsewhere.example\r\n${HANDSHAKE}`;
    assertEquals((await ask(`GET /native HTTP/1.1\r\n${foreign}`)).status, 404);
    for (const header of /bun/.test(file) ? ["key", "version"] : ["key"]) { // Deno takes any version
      const handshake = HANDSHAKE.replace(new RegExp(`sec-websocket-${header}.*\\r\\n`), "");
      const { status } = await ask(`GET /native HTTP/1.1\r\nhost: x\r\n${handshake}`);
      assertEquals(status, !isNative ? 404 : header === "version" ? 426 : 400);
    }
    const page = await ask("GET /ai/ HTTP/1.1\r\nhost: x");
    assertStringIncludes(await page.text(), "<title>AI chat");
    assertEquals(child.stderr(), "");
  }, { timeout: 30_000 });
}

/** A server that says what it can, for as long as somebody takes it, which it tells. */
async function talker(t: TestContext): Promise<{ port: number; left: Promise<void> }> {
  const { promise: left, resolve } = deferred();
  const server = createServer((socket) => {
    socket.on("error", () => {}).on("close", () => resolve()).resume();
    flood(socket, new Uint8Array(65_536));
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  t.defer(() => new Promise((resolve) => server.close(resolve)));
  return { port: (server.address() as AddressInfo).port, left };
}

test("the demo's network drops who neither says nor reads anything", async (t) => {
  const target = await talker(t);
  const network = new Network({ quiet: 200 });
  t.defer(() => network.close());
  const port = await network.listen({ hostname: "127.0.0.1", port: 0 });
  network.relayTo(target.port);
  deaf(t, port).socket.write("GET / HTTP/1.1\r\n\r\n");
  await target.left;
});

test("the demo's network takes so many connections, and another one when one has left", async (t) => {
  const target = await talker(t);
  const network = new Network({ maxConnections: 2 });
  t.defer(() => network.close());
  const port = await network.listen({ hostname: "127.0.0.1", port: 0 });
  network.relayTo(target.port);
  const enter = async () => {
    const socket = dial(port, "127.0.0.1").on("error", () => {});
    t.defer(() => void socket.destroy());
    const isIn = await new Promise<boolean>((resolve) => {
      socket.once("data", () => resolve(true)).once("close", () => resolve(false));
    });
    return { socket, isIn };
  };
  const people = [await enter(), await enter()];
  assertEquals([people[0]!.isIn, people[1]!.isIn, (await enter()).isIn], [true, true, false]);
  people[0]!.socket.destroy();
  await until(async () => (await enter()).isIn);
});

test("the chat with a model keeps the latest 200 chats, none of which is too large", async (t) => {
  async function* model() {
    yield { type: "start" };
    yield { type: "finish" };
  }
  const { fetch: answer, close } = aiChat((source) => source, model);
  const { url } = await t.serve(answer);
  t.defer(close);
  const kept = async (chat: string) =>
    (await (await fetch(`${url}/ai/messages?chat=${chat}`)).json()).length;
  const chat = await raw(t, `${url}/ai/chat`);
  for (let n = 0; n <= 200; n++) {
    chat.ask(`${n}`);
    await until(() =>
      chat.messages.all.some((data) =>
        `${data}`.includes(`"requestId":"${n}"`) && `${data}`.includes('"end"')
      )
    );
  }
  assertEquals([await kept("0"), await kept("1"), await kept("200")], [0, 2, 2]);
  chat.say({ type: "send", text: "x".repeat(300_000) });
  assertEquals((await chat.closed).code, 1009);
});
