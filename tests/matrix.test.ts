/**
 * Runtimes and transports against each other: every client on every server,
 * and servers and proxies on which the better transports do not work.
 */
import process from "node:process";
import type { Peer } from "../mod.ts";
import {
  assert,
  assertEquals,
  assertRejects,
  deferred,
  needs,
  rawRequest,
  type RawResponse,
  type Runtime,
  runtime,
  sleep,
  test,
  type TestContext,
} from "./harness.ts";
import { type Around, connect, listen, Queue } from "./pair.ts";

const transports = ["auto", "duplex", "stream", "post"] as const;

// ---------------------------------------------------------------- every client, here

interface Report {
  runtime: string;
  welcome: string;
  protocol: string;
  wrong: string[];
  used: string;
  resent: number;
  closes: { code: number; reason: string; wasClean: boolean }[];
  events: string[][];
}

for (const client of ["deno", "bun", "node"] as Runtime[]) {
  for (const transport of transports) {
    test(
      `a client on ${client} and a server on ${runtime} speak by ${transport}: text, binary, empty, 1 MiB, subprotocol and close codes`,
      async (t) => {
        const closes = new Queue<unknown>();
        const openedBy: string[] = [];
        const { url } = await listen(t, {
          handleProtocols: () => "b",
          hooks: {
            open(peer) {
              openedBy.push(peer.request.method);
              peer.send(`Welcome ${peer.remoteAddress}`);
            },
            message(peer, message) {
              if (message.rawData === "close me") peer.close(4002, "enough");
              else peer.send(message.rawData);
            },
            close: (_, details) => closes.push(details),
          },
        });
        const child = await t.spawn(client, "tests/fixtures/matrix-client.ts", {
          args: [url, transport],
        });
        const report = await child.json<Report>({ timeout: 20_000 });
        const best = transport === "auto" ? "duplex" : transport;
        assertEquals(report, {
          runtime: client,
          welcome: "Welcome 127.0.0.1",
          protocol: "b",
          wrong: [],
          used: best,
          resent: 0,
          closes: [
            { code: 4001, reason: "bye", wasClean: true },
            { code: 4002, reason: "enough", wasClean: true },
          ],
          events: [["open", "close"], ["open", "close"]],
        });
        // By one request that carries both directions, or by one for the stream.
        assertEquals(new Set(openedBy), new Set([best === "duplex" ? "POST" : "GET"]));
        assertEquals(await closes.take(2), [
          { code: 4001, reason: "bye" },
          { code: 4002, reason: "enough" },
        ]);
        assertEquals((await child.exited).code, 0); // nothing keeps it alive
      },
      { timeout: 30_000, skip: needs(client) },
    );
  }
}

// ---------------------------------------------------------------- a server that stops reading

test(
  "deno@2.9.5 stops reading a duplex body after its first message: it is left for the next transport, nothing lost or repeated",
  async (t) => {
    const server = await t.spawn("deno-2.9.5", "tests/fixtures/matrix-server.ts");
    const { port } = await server.json<{ port: number }>({ timeout: 20_000 });
    const url = `http://127.0.0.1:${port}/`;
    const { socket, messages, opened, closed, events } = connect(t, url);
    await opened;
    assertEquals(socket.transport, "duplex");
    const expected = Array.from({ length: 20 }, (_, i) => `message ${i + 1}`);
    socket.send(expected[0]!);
    assertEquals(await messages.next(), "echo message 1");
    for (const text of expected.slice(1, 19)) socket.send(text);
    const echoes = expected.map((text) => `echo ${text}`);
    assertEquals(await messages.take(18, { timeout: 15_000 }), echoes.slice(1, 19));
    assert(socket.transport !== "duplex");
    socket.send(expected[19]!);
    assertEquals(await messages.next(), echoes[19]);
    for (const text of expected) assertEquals(await server.json(), text);
    const { transport } = socket;
    socket.close(1000);
    assertEquals((await closed).wasClean, true);
    assertEquals(events.filter((event) => event === "open").length, 1);

    // The next socket to that origin does not try it again.
    const next = connect(t, url);
    assertEquals(next.socket.transport, transport);
    await next.opened;
    next.socket.send("again");
    assertEquals(await next.messages.next(), "echo again");
    assertEquals(await server.json(), "again");
  },
  { timeout: 40_000, skip: needs("deno-2.9.5") },
);

// ---------------------------------------------------------------- a proxy that swallows streams

/** The part of nginx that matters: a request goes on to the server once its body has ended. */
function swallowing(seen: Queue<string>): Around {
  return async (request, next) => {
    const { method, headers, url } = request;
    const streams = !!request.body && !headers.has("content-length");
    seen.push(streams ? `${method} stream` : method);
    if (!streams) return next(request);
    const body = await request.arrayBuffer().catch(() => undefined);
    if (!body) return new Response(null, { status: 499 });
    return next(new Request(url, { method, headers, body }));
  };
}

for (const transport of ["auto", "duplex", "stream"] as const) {
  test(
    `${transport} falls to what works where streaming bodies are swallowed, with nothing lost or repeated`,
    async (t) => {
      const requests = new Queue<string>();
      const received: string[] = [];
      let opens = 0;
      const { url } = await listen(t, {
        hooks: {
          open: () => void opens++,
          message(peer, message) {
            received.push(message.text());
            peer.send(`echo ${message}`);
          },
        },
      }, swallowing(requests));
      const { socket, messages, opened, closed, events } = connect(t, url, { transport });
      await opened;
      const expected = Array.from({ length: 50 }, (_, i) => `message ${i}`);
      for (const text of expected) socket.send(text);
      assertEquals(
        await messages.take(50, { timeout: 10_000 }),
        expected.map((text) => `echo ${text}`),
      );
      assertEquals(socket.transport, "post");
      socket.send("one more");
      assertEquals(await messages.next(), "echo one more");
      assertEquals(received, [...expected, "one more"]);
      socket.close(4000);
      assertEquals([(await closed).code, events], [4000, ["open", "close"]]);
      assertEquals(opens, 1);
      assertEquals(
        requests.all.filter((request) => request.endsWith("stream")).length,
        1, // one that is held tells enough
      );
      if (transport !== "auto") return;

      // "The next socket to that origin does not wait again."
      const before = requests.all.length;
      const second = connect(t, url);
      await second.opened;
      second.socket.send("at once");
      assertEquals(await second.messages.next(), "echo at once");
      assertEquals(requests.all.slice(before), ["GET", "POST"]);
    },
    { timeout: 30_000 },
  );
}

// ---------------------------------------------------------------- post

test("post: one POST is in flight, and all that queued meanwhile goes in the next", async (t) => {
  // By the clone: Deno tells of it once.
  t.expect("Deno.serve: request.signal aborts on successful responses");
  const posts = new Queue<string>();
  const gates = [deferred(), deferred(), deferred()];
  const received = new Queue<string>();
  const { url } = await listen(t, {
    hooks: { message: (_, message) => received.push(message.text()) },
  }, async (request, next) => {
    if (request.method === "POST") {
      posts.push(await request.clone().text());
      await gates[posts.all.length - 1]!.promise;
    }
    return next(request);
  });
  const { socket, opened } = connect(t, url, { transport: "post" });
  await opened;
  socket.send("first");
  const first = await posts.next();
  const expected = Array.from({ length: 100 }, (_, i) => `${i}`);
  for (const text of expected.slice(0, 60)) socket.send(text);
  await sleep(20); // another task: they were not merely batched within one
  for (const text of expected.slice(60)) socket.send(text);
  assertEquals([received.all, posts.left], [[], 0]);
  gates[0]!.resolve();
  assertEquals(await received.next(), "first");
  const second = await posts.next();
  gates[1]!.resolve();
  assertEquals(await received.take(100), expected);
  assertEquals([first, second].map((body) => /SEQ 1\r\n(\d+)/.exec(body)![1]), ["1", "2"]);
  assertEquals(posts.all.length, 2);
  assertEquals(socket.stats.resent, 0);
  gates[2]!.resolve(); // the close
});

// ---------------------------------------------------------------- quiet streams on Bun

const QUIET = 12_000;

/** A bare connection to the server: no HTTP client with limits of its own. */
async function openQuiet(t: TestContext, port: number) {
  const stream = t.use(
    await rawRequest(
      port,
      "GET / HTTP/1.1\r\nhost: localhost\r\naccept: text/event-stream\r\nx-duplex-version: 1\r\n",
    ),
  );
  assertEquals(stream.status, 200);
  return stream;
}

/** Sends 114 messages of 1,000 bytes in one body, that takes two seconds more than a quiet stream may. */
async function trickle(t: TestContext, port: number, stream: RawResponse) {
  const pieces = Array.from({ length: 114 }, () => `TEXT 3e8\r\n${"x".repeat(1000)}\r\n`);
  pieces.unshift("SEQ 1\r\n1\r\n");
  async function* body() {
    for (const piece of pieces) {
      yield piece;
      await sleep((QUIET + 2_000) / pieces.length, t.signal);
    }
  }
  const head = `POST / HTTP/1.1\r\nhost: localhost\r\nx-duplex-version: 1\r\n` +
    `x-crossws-id: ${stream.headers.get("x-crossws-id")}\r\n` +
    `content-length: ${pieces.join("").length}\r\n`;
  return t.use(await rawRequest(port, head, body()));
}

async function hears(stream: Awaited<ReturnType<typeof openQuiet>>, text: string): Promise<void> {
  let all = "";
  for (;;) {
    const piece = await stream.read();
    if (!piece) throw new Error(`The stream ended without "${text}": ${all}`);
    all += new TextDecoder().decode(piece);
    if (all.includes(text)) return;
  }
}

if (runtime === "bun") {
  test(
    "a stream that is quiet for 12 s survives on Bun, which cuts after 10 s what was not told otherwise",
    async (t) => {
      const peers = new Queue<Peer>();
      // Without heartbeats, so that nothing but `server.timeout` can be what saves the stream.
      const quiet = {
        heartbeatInterval: 600_000,
        idleTimeout: 0,
        hooks: { open: (peer: Peer) => peers.push(peer) },
      };
      const { port } = await listen(t, quiet);
      const lifted = await openQuiet(t, port);
      const one = await peers.next();
      // The control: the adapter is not given Bun's server, and so cannot lift the limit.
      const { ws } = await listen(t, quiet);
      const control = await openQuiet(t, (await t.serve((request) => ws.fetch(request))).port);
      await peers.next();
      // Not given it, but with our own default: heartbeats every 5 s.
      const { ws: beating } = await listen(t, { hooks: quiet.hooks });
      const saved = await openQuiet(t, (await t.serve((request) => beating.fetch(request))).port);
      const three = await peers.next();

      const cut = assertRejects(() => hears(control, "still here"));
      // A body with a length is cut, too, that comes by less than 16 KiB a second.
      const slow = trickle(t, port, lifted);
      await sleep(QUIET, t.signal);
      await cut;
      one.send("still here");
      three.send("still here");
      await hears(lifted, "still here");
      await hears(saved, "still here");
      assertEquals((await slow).headers.get("x-duplex-received"), "114");
    },
    { timeout: 30_000 },
  );
}

if (process.env.DUPLEX_SOAK) {
  test(
    "a session that is quiet for 60 s survives with no option set, on one connection",
    async (t) => {
      const peers = new Queue<Peer>();
      const requests: string[] = [];
      const { url } = await listen(t, {
        hooks: { open: (peer) => peers.push(peer) },
      }, (r, next) => {
        requests.push(r.method);
        return next(r);
      });
      const clients = transports.slice(1).map((transport) => connect(t, url, { transport }));
      for (const { opened } of clients) await opened;
      await sleep(61_000, t.signal);
      for (const peer of await peers.take(3)) peer.send("still here");
      for (const { messages, events } of clients) {
        assertEquals(await messages.next(), "still here");
        assertEquals(events, ["open"]);
      }
      assertEquals(requests.filter((method) => method === "GET").length, 2); // stream's and post's
    },
    { timeout: 80_000 },
  );
}
