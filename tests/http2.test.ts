/**
 * What only HTTP/2 lets a client do: streams that are reset, windows that are never opened, a
 * connection of many streams that ends. Deno's own server, and Node's in tests/hosts.test.ts.
 */
import {
  type ClientHttp2Session,
  type ClientHttp2Stream,
  createSecureServer,
  type ServerHttp2Session,
  type ServerHttp2Stream,
} from "node:http2";
import type { AddressInfo } from "node:net";
import type { WebSocketSSEOptions } from "../client.ts";
import { toNodeHandler } from "../node.ts";
import { chaos } from "./chaos.ts";
import {
  assertEquals,
  assertLessOrEqual,
  certificate,
  needs,
  once,
  runtime,
  sleep,
  speakHttp2,
  test,
  type TestContext,
  until,
} from "./harness.ts";
import { adapter, dial } from "./pair.ts";
import { connectHttp2, statusOf } from "./raw2.ts";
import { frame, from, FULL, misuse, type Scene } from "./wire.ts";
import { concat } from "./split.ts";
import type { SSEOptions } from "../server.ts";

type Fields = Record<string, string | string[]>;

const skip = needs("openssl");
if (!skip && runtime === "deno") speakHttp2();

const REFUSED = 7;
const CANCEL = 8;

/** Misuses a server by a connection of HTTP/2, beside a bystander on another. */
function abuse(
  name: string,
  body: (scene: Scene, session: ClientHttp2Session) => Promise<void>,
  options: SSEOptions = {},
): void {
  if (runtime === "bun") return; // its own fetch, by which the bystander asks, speaks HTTP/1.1
  test(name, (t) =>
    misuse(t, async (scene) => {
      const session = await connectHttp2(scene.port);
      const closed = new Promise((resolve) => session.once("close", resolve));
      try {
        await body(scene, session);
      } finally {
        session.destroy();
        await closed;
      }
    }, options), { skip, timeout: 20_000 });
}

function ask(
  session: ClientHttp2Session,
  fields: Fields = {},
  body?: Uint8Array | string,
): ClientHttp2Stream {
  const method = body === undefined ? "GET" : "POST";
  const stream = session.request({ ":path": "/room", ":method": method, ...FULL, ...fields }, {
    endStream: body === undefined,
  });
  stream.on("error", () => {});
  if (body) stream.write(body);
  return stream;
}

/** Opens a session: its stream, which is read, and its token. */
async function open(session: ClientHttp2Session, body?: Uint8Array | string) {
  const stream = ask(session, {}, body);
  const token = await new Promise<string>((resolve) =>
    stream.once("response", (headers) => resolve(`${headers["x-crossws-id"]}`))
  );
  stream.resume();
  return { stream, token };
}

const NOTHINGS: [name: string, fields: Fields, end: (stream: ClientHttp2Stream) => unknown][] = [
  ["an empty frame", {}, (stream) => stream.end()],
  ["a length of 0", { "content-length": "0" }, (stream) => stream.end()],
  ["an end that comes late", {}, (stream) => setTimeout(() => stream.end(), 20)],
];

abuse("an uplink of nothing is answered 204, however it says so", async (scene, session) => {
  const { stream, token } = await open(session);
  for (const [name, fields, end] of NOTHINGS) {
    const uplink = ask(session, { accept: "*/*", "x-crossws-id": token, ...fields }, "");
    end(uplink);
    assertEquals([name, await statusOf(uplink)], [name, "204"]);
    uplink.resume();
  }
  assertEquals(scene.hooks(), ["open"]);
  stream.close(CANCEL);
});

for (const cut of ["TE", "TEXT 3\r\ntw"]) {
  abuse(
    `a duplex stream that is reset behind ${JSON.stringify(cut)} is a lost connection`,
    async (scene, session) => {
      const whole = from(1, frame("TEXT", "one"));
      const { stream } = await open(session, concat([whole, new TextEncoder().encode(cut)]));
      await until(() => scene.count("message") === 1);
      stream.close(CANCEL);
      await until(() => scene.count("close") === 1);
      assertEquals(scene.hooks(), ["open", "message", "close"]);
      assertEquals(scene.calls.at(-1)!.detail, 1006);
    },
  );
}

abuse(
  "an uplink that is reset within a frame loses no more than that, and the next is taken",
  async (scene, session) => {
    const { stream, token } = await open(session);
    const fields = { accept: "*/*", "x-crossws-id": token };
    const whole = from(1, frame("TEXT", "one"));
    const half = concat([whole, frame("TEXT", "two").subarray(0, 8)]);
    const uplink = ask(session, fields, half);
    await until(() => scene.count("message") === 1);
    uplink.close(CANCEL);
    const again = ask(session, fields, from(2, frame("TEXT", "two")));
    again.end();
    assertEquals(await statusOf(again), "204");
    assertEquals(scene.count("message"), 2);
    stream.close(CANCEL);
  },
);

abuse(
  "60 streams that are opened and reset at once, again and again, leave nobody",
  async (scene, session) => {
    // Deno ends a connection for that at some time, and Node does not.
    for (let round = 0; round < 5 && !session.destroyed; round++) {
      const streams = Array.from({ length: 60 }, () => ask(session));
      const gone = streams.map((stream) => new Promise((resolve) => stream.once("close", resolve)));
      await sleep(round * 5);
      for (const stream of streams) stream.close(CANCEL);
      await Promise.all(gone);
    }
    await until(() => (scene.ws.peers.get("/room")?.size ?? 0) === 0);
  },
);

abuse("who leaves 1,000 streams with their connection leaves no peer", async (scene, session) => {
  const answers = Array.from({ length: 1000 }, () => statusOf(ask(session)));
  // A host has room for as many as it says, and the others wait.
  await until(() => (scene.ws.peers.get("/room")?.size ?? 0) >= 100);
  session.destroy();
  await Promise.all(answers);
  await until(() => (scene.ws.peers.get("/room")?.size ?? 0) === 0);
});

abuse(
  "a stream whose window is never opened holds maxBufferedAmount, and closes with 1013",
  async (scene, session) => {
    const { token, stream } = await open(session);
    stream.pause();
    const fields = { accept: "*/*", "x-crossws-id": token };
    const chunk = frame("BINARY", new Uint8Array(40_000));
    for (let i = 1; i < 30 && !scene.count("close"); i++) {
      const uplink = ask(session, fields, from(i, chunk)); // which comes back as an echo
      uplink.end();
      uplink.resume();
      await statusOf(uplink);
    }
    await until(() => scene.count("close") === 1);
    assertEquals(scene.calls.at(-1)!.detail, 1013);
  },
  { maxBufferedAmount: 256 * 1024, window: 64 * 1024 },
);

abuse(
  "headers of ours that come twice, or are no ASCII, are answered 400",
  async (scene, session) => {
    const { stream, token } = await open(session);
    const before = scene.calls.length;
    const uplink = { accept: "*/*", "x-crossws-id": token };
    const bad: Fields[] = [
      { ...uplink, "x-crossws-id": [token, token] },
      { ...uplink, "x-duplex-version": ["1", "1"] },
      { ...uplink, "x-crossws-id": `${token}\u00e9` },
      { ...uplink, "x-duplex-attempt": "1e3" },
      { ...uplink, "x-duplex-attempt": "x".repeat(8000) },
    ];
    for (const fields of bad) {
      const refused = ask(session, fields, frame("PING"));
      refused.end();
      refused.resume();
      assertEquals([fields, await statusOf(refused)], [fields, "400"]);
    }
    assertEquals(scene.calls.length, before);
    stream.close(CANCEL);
  },
);

abuse(
  "headers of 300 kB end their stream alone, or the connection, and no other",
  async (scene, session) => {
    const { stream } = await open(session);
    const status = await statusOf(ask(session, { "x-long": "x".repeat(300_000) }));
    assertEquals(["431", "ended"].includes(status), true, status);
    stream.close(CANCEL);
    assertEquals(scene.count("open"), 1);
  },
);

// ---------------------------------------------------------------- windows, trickles, resets

/** Sends a message by an uplink of its own. */
async function send(session: ClientHttp2Session, token: string, body: Uint8Array) {
  const uplink = ask(session, { accept: "*/*", "x-crossws-id": token }, body);
  uplink.end();
  uplink.resume();
  assertEquals(await statusOf(uplink), "204");
}

/** The text that a stream has brought. */
function textOf(stream: ClientHttp2Stream): () => string {
  let text = "";
  stream.on("data", (data) => text += data);
  return () => text;
}

abuse("a window of one byte, which is opened for each, gets all that is sent", async ({ port }) => {
  const session = await connectHttp2(port, { settings: { initialWindowSize: 1 } });
  const { stream, token } = await open(session);
  const got = textOf(stream);
  await send(session, token, from(1, frame("TEXT", "one byte at a time")));
  await until(() => got().endsWith("data: one byte at a time\n\n"));
  session.destroy();
});

/** Deno's own node:http2 tells the other end nothing of settings that are raised again. */
const raises = runtime === "node";

if (raises) {
  abuse(
    "a window that is lowered under way and opened again loses nothing",
    async (_scene, session) => {
      const { stream, token } = await open(session);
      const got = textOf(stream);
      const sent = Array.from({ length: 20 }, (_, n) => `${n}`.padEnd(10_000, "x"));
      for (const [n, message] of sent.entries()) {
        if (n === 5) session.settings({ initialWindowSize: 0 });
        await send(session, token, from(n + 1, frame("TEXT", message)));
      }
      session.settings({ initialWindowSize: 65_535 });
      await until(() => got().endsWith(`${sent.at(-1)}\n\n`));
      assertEquals(got().match(/(?<=^data: )\d+x+$/gm), sent);
      stream.close(CANCEL);
    },
  );
}

abuse("an uplink and a duplex request that trickle are taken whole", async (_scene, session) => {
  const { stream, token } = await open(session);
  const got = textOf(stream);
  const uplink = ask(session, { accept: "*/*", "x-crossws-id": token }, "");
  const duplex = ask(session, {}, "");
  const gotDuplex = textOf(duplex);
  for (const byte of from(1, concat([frame("TEXT", "one"), frame("TEXT", "two")]))) {
    for (const trickling of [uplink, duplex]) trickling.write(new Uint8Array([byte]));
    await sleep(5);
  }
  uplink.end();
  assertEquals(await statusOf(uplink), "204");
  for (const text of [got, gotDuplex]) {
    await until(() => /data: one\n\n[^]*data: two\n\n/.test(text()));
  }
  for (const each of [stream, duplex]) each.close(CANCEL);
});

abuse(
  "resumptions that are reset as soon as they are asked for end no session",
  async (scene, session) => {
    const { token } = await open(session);
    const resume = (attempt: number) =>
      ask(session, {
        "x-crossws-id": token,
        "x-duplex-attempt": `${attempt}`,
        "last-event-id": "0",
      });
    for (let attempt = 1; attempt <= 100; attempt++) {
      resume(attempt).close(CANCEL);
      if (attempt % 10 === 0) await sleep(5); // a host may end a connection of too many at once
    }
    const stream = resume(101);
    const got = textOf(stream);
    assertEquals(await statusOf(stream), "200");
    await send(session, token, from(1, frame("TEXT", "still here")));
    await until(() => got().includes("data: still here\n\n"));
    assertEquals(scene.count("close"), 0);
    stream.close(CANCEL);
  },
);

// ---------------------------------------------------------------- a server that ends what it has

const HOSTILE: Record<string, (stream: ServerHttp2Stream) => unknown> = {
  "says GOAWAY": (stream) => stream.session!.goaway(),
  "says GOAWAY, and leaves when all is said": (stream) => stream.session!.close(),
  "ends its connection": (stream) => stream.session!.destroy(),
  "resets the stream": (stream) => stream.close(CANCEL),
  "refuses the stream": (stream) => stream.close(REFUSED),
  ...raises && {
    "takes its window away": ({ session }: ServerHttp2Stream) => {
      session!.settings({ initialWindowSize: 0 });
      setTimeout(() => session!.destroyed || session!.settings({ initialWindowSize: 65_535 }), 50);
    },
  },
};

if (runtime !== "bun") {
  for (const [what, act] of Object.entries(HOSTILE)) {
    for (const transport of ["duplex", "post"] as const) {
      test(
        `a server that ${what}, at resumptions and under way, costs no message (${transport})`,
        async (t) => {
          // Deno's node:http2 has the body of a stream that is cut end as a whole one would.
          if (runtime === "deno") t.expect("The body did not arrive");
          const count = 100;
          const { url, fetch, closes } = await hostile(t, act);
          const client = dial(t, url, transport, { ...fetch && { fetch } });
          const got: string[] = [];
          client.addEventListener("message", ({ data }) => void got.push(data));
          await once(client, "open");
          for (let n = 0; n < count; n++) {
            client.send(`${n}`);
            await sleep(4);
          }
          await until(() => got.length >= count, { timeout: 15_000 });
          assertEquals(got, Array.from({ length: count }, (_, n) => `${n}`));
          assertEquals(closes, []);
        },
        { skip, timeout: 30_000 },
      );
    }
  }
}

/** A server that acts on each event stream: on three resumptions at once, on the others soon. */
async function hostile(t: TestContext, act: (stream: ServerHttp2Stream) => unknown) {
  const closes: unknown[] = [];
  const ws = adapter(t, {
    hooks: {
      message: (peer, message) => void peer.send(message.text()),
      close: (_, { code }) => void closes.push(code),
    },
  });
  const handle = toNodeHandler(ws);
  let resumptions = 0;
  const pair = await certificate();
  const server = createSecureServer(pair, (request, response) => {
    const { stream } = request;
    const isResumption = "x-duplex-attempt" in request.headers;
    if (isResumption && ++resumptions <= 3) act(stream);
    else if (request.headers.accept === "text/event-stream") {
      setTimeout(() => stream.destroyed || act(stream), 40);
    }
    handle(request, response);
  });
  const sessions = new Set<ServerHttp2Session>();
  server.on("session", (session) => {
    sessions.add(session);
    session.on("error", () => {}); // of a client that has gone
    session.on("close", () => sessions.delete(session));
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  t.defer(() => {
    for (const session of sessions) session.destroy();
    return new Promise<void>((resolve) => server.close(() => resolve()));
  });
  const { port } = server.address() as AddressInfo;
  const fetch = runtime === "deno" ? trusting(t, pair.cert) : undefined;
  return { url: `https://127.0.0.1:${port}/room`, fetch, closes };
}

// ---------------------------------------------------------------- a connection that is dead

/** A fetch of Deno that trusts the certificate, as one does that it is told of by --cert. */
function trusting(t: TestContext, cert: string): NonNullable<WebSocketSSEOptions["fetch"]> {
  const clients = new Map<unknown, Deno.HttpClient>();
  t.defer(() => clients.forEach((client) => client.close()));
  return (input, init) => {
    const { client: given } = init as { client?: Deno.HttpClient };
    if (!clients.has(given)) clients.set(given, Deno.createHttpClient({ caCerts: [cert] }));
    return fetch(input, Object.assign({ ...init }, { client: clients.get(given) }));
  };
}

// Node's fetch speaks HTTP/2 by itself from Node 26 on, and here by an Agent that is told to.
if (runtime !== "bun") {
  for (const transport of ["duplex", "stream", "post", "poll"] as const) {
    test(
      `the client leaves a connection that is dead for another (${transport})`,
      async (t) => {
        const opens: string[] = [];
        const got: string[] = [];
        const ws = adapter(t, {
          heartbeatInterval: 300,
          hooks: {
            open: (peer) => void opens.push(peer.id),
            message: (_, message) => void got.push(message.text()),
          },
        });
        const server = await t.serve(ws.fetch, { tls: true });
        const network = t.use(await chaos(server.port));
        const client = dial(t, network.url.replace("http:", "https:"), transport, {
          ...runtime === "deno" && { fetch: trusting(t, server.cert!) },
        });
        await once(client, "open");
        client.send("before");
        await until(() => got.length === 1 && client.bufferedAmount === 0);
        // All that goes up goes there, too; an Agent may have made two at the beginning.
        assertLessOrEqual(network.stats.connections, runtime === "deno" ? 1 : 2);
        network.stallAll({ newcomers: false });
        client.send("meanwhile");
        for (const peers of ws.peers.values()) for (const peer of peers) peer.send("down");
        assertEquals(
          (await once<MessageEvent>(client, "message", { timeout: 15_000 })).data,
          "down",
        );
        await until(() => got.length === 2, { timeout: 15_000 });
        assertEquals([got, opens.length], [["before", "meanwhile"], 1]);
      },
      { skip, timeout: 40_000 },
    );
  }
}
