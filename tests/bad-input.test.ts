/**
 * What a server says to bytes, headers and hooks that are wrong: the status or
 * close code, that the server goes on serving others, and that no peer is left.
 */
import { assert, assertEquals, deferred, rawRequest, test, until, within } from "./harness.ts";
import {
  closePayload,
  frame,
  from,
  FULL,
  misuse,
  onOneConnection,
  post,
  quiet,
  type Scene,
  streamOf,
  UPLINK,
  WireClient,
} from "./wire.ts";
import { concat } from "./split.ts";
import type { Hooks, SSEOptions } from "../server.ts";

// ---------------------------------------------------------------- uplink frames

interface BadBody {
  name: string;
  body: string | Uint8Array;
  /** Of a POST. */
  status: number;
  /** How many of its messages are taken. Default: none. */
  received?: number;
  /** With which the session ends when the bytes come in a duplex request. */
  code: number | undefined;
  /** A POST ends the session with the same code, too. */
  fatal?: boolean;
  seq?: string | null;
  options?: SSEOptions;
}

const ONE = frame("TEXT", "one");
const invalid = new Uint8Array([0x61, 0xff, 0xfe]);

const BAD_BODIES: BadBody[] = [
  { name: "garbage", body: "GET / HTTP/1.1\r\n\r\n", status: 400, code: 1002 },
  { name: "binary garbage", body: new Uint8Array(64).fill(0xf7), status: 400, code: 1002 },
  {
    name: "garbage after a message",
    body: concat([ONE, ONE.subarray(1)]),
    status: 400,
    received: 1,
    code: 1002,
  },
  { name: "a header that never ends", body: "A".repeat(1000), status: 400, code: 1002 },
  { name: "an unknown frame name", body: "EVENT 3\r\none\r\n", status: 400, code: 1002 },
  { name: "a frame name in lower case", body: "text 3\r\none\r\n", status: 400, code: 1002 },
  { name: "a length that is no number", body: "TEXT x\r\none\r\n", status: 400, code: 1002 },
  { name: "a negative length", body: "TEXT -3\r\none\r\n", status: 400, code: 1002 },
  { name: "a length over 32 bits", body: "TEXT 100000003\r\none\r\n", status: 400, code: 1002 },
  { name: "a header that ends in a bare LF", body: "TEXT 3\none\r\n", status: 400, code: 1002 },
  { name: "a length that is too short", body: "TEXT 2\r\none\r\n", status: 400, code: 1002 },
  {
    name: "a length that is too long",
    body: concat([frame("TEXT", "one"), ONE]).with(5, 52),
    status: 400,
    code: 1002,
  },
  {
    name: "a truncated header",
    body: concat([ONE, frame("TEXT", "two").subarray(0, 4)]),
    status: 204,
    received: 1,
    code: undefined,
  },
  {
    name: "a truncated message",
    body: concat([ONE, frame("TEXT", "two").subarray(0, 10)]),
    status: 204,
    received: 1,
    code: undefined,
  },
  {
    name: "a message over maxMessageSize",
    body: frame("BINARY", new Uint8Array(1025)),
    status: 413,
    code: 1009,
    fatal: true,
    options: { maxMessageSize: 1024 },
  },
  {
    name: "a text over maxMessageSize, all in one chunk",
    body: frame("TEXT", "x".repeat(1025)),
    status: 413,
    code: 1009,
    fatal: true,
    options: { maxMessageSize: 1024 },
  },
  {
    name: "a message announced over maxMessageSize",
    body: "TEXT 7fffffff\r\n",
    status: 413,
    code: 1009,
    fatal: true,
  },
  {
    name: "text that is not UTF-8",
    body: frame("TEXT", invalid),
    status: 400,
    code: 1007,
    fatal: true,
  },
  {
    name: "a control frame over 125 bytes",
    body: frame("PING", "x".repeat(126)),
    status: 400,
    code: 1002,
  },
  {
    name: "a control frame announced over 125 bytes",
    body: "PONG ffffffff\r\n",
    status: 400,
    code: 1002,
  },
  { name: "a CLOSE of one byte", body: frame("CLOSE", "x"), status: 400, code: 1002 },
  {
    name: "a CLOSE over 125 bytes",
    body: frame("CLOSE", closePayload(1000, "x".repeat(124))),
    status: 400,
    code: 1002,
  },
  {
    name: "a CLOSE whose reason is not UTF-8",
    body: frame("CLOSE", closePayload(1000, invalid)),
    status: 400,
    code: 1007,
    fatal: true,
  },
  ...[0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65535].map((code) => ({
    name: `a CLOSE with code ${code}`,
    body: frame("CLOSE", closePayload(code)),
    status: 400,
    code: 1002,
  })),
  { name: "an ACK of the future", body: frame("ACK", "1"), status: 400, code: 1002 },
  { name: "an ACK that is no number", body: frame("ACK", "one"), status: 400, code: 1002 },
  { name: "an empty ACK", body: frame("ACK"), status: 400, code: 1002 },
  { name: "an ACK over 2^53", body: frame("ACK", "9007199254740992"), status: 400, code: 1002 },
  {
    name: "a SEQ that goes back",
    body: concat([ONE, frame("SEQ", "1"), ONE]),
    status: 400,
    received: 1,
    code: 1002,
  },
  { name: "a SEQ of 0", body: frame("SEQ", "0"), status: 400, code: 1002 },
  { name: "a SEQ that is no number", body: frame("SEQ", " 2"), status: 400, code: 1002 },
  { name: "a SEQ over 2^53", body: frame("SEQ", "9007199254740992"), status: 400, code: 1002 },
  // A gap ends the duplex request alone: the session is left to a resume, and here to expiry.
  {
    name: "a gap made by SEQ",
    body: concat([ONE, frame("SEQ", "3"), ONE]),
    status: 409,
    received: 1,
    code: 1006,
  },
  { name: "a gap", body: ONE, seq: "2", status: 409, code: 1006 },
  { name: "a message without a number", body: ONE, seq: null, status: 400, code: 1002 },
];

const numbered = (seq: string | null | undefined, body: string | Uint8Array) =>
  seq === null ? body : from(seq ?? "1", body);

for (const bad of BAD_BODIES) {
  const { name, body, status, received = 0, code, fatal, options = {} } = bad;

  test(`a POST of ${name} is answered ${status}${fatal ? ` and closes with ${code}` : ""}`, (t) =>
    misuse(t, async (scene) => {
      const peer = await scene.open();
      const response = await peer.post(numbered(bad.seq, body), UPLINK);
      await response.body?.cancel();
      assertEquals(response.status, status);
      assertEquals(response.headers.get("x-duplex-received"), `${received}`);
      assertEquals(scene.count("message"), received);
      peer.seq += received;
      if (fatal) {
        assertEquals(await peer.closed(), code);
        assertEquals(await peer.close(code), 204);
      } else { // "Failed requests never end a session."
        assertEquals(await peer.send("after"), 204);
        while (await peer.message() !== "after");
        assertEquals(await peer.close(), 204);
      }
      assertEquals(scene.count("error"), 0);
    }, options));

  test(`a duplex request with ${name} ${code ? `ends with ${code}` : "goes on"}`, (t) =>
    misuse(t, async (scene) => {
      const peer = await scene.duplex(streamOf([numbered(bad.seq, body)], { open: true }));
      if (code === undefined) { // the rest of the frame may still come
        if (received) assertEquals(await peer.message(), "one");
        return await peer.drop();
      }
      if (code === 1006) {
        while (await peer.next());
        return;
      }
      assertEquals(await peer.closed(), code);
      assertEquals(scene.count("message"), received);
      peer.seq += received;
      assertEquals(await peer.close(code), 204);
      await until(() => scene.count("close") > 0); // in a task of its own
      assertEquals(scene.calls.filter((call) => call.hook === "close").map((c) => c.detail), [
        code,
      ]);
    }, options));
}

test("an uplink POST of nothing is answered 204 and changes nothing", (t) =>
  misuse(t, async (scene) => {
    const peer = await scene.open();
    for (const body of [undefined, "", streamOf([])]) {
      const response = await peer.post(body);
      assertEquals(response.status, 204);
      assertEquals(response.headers.get("x-duplex-received"), "0");
    }
    assertEquals(scene.hooks(), ["open"]);
    await peer.close();
  }));

test("a body cut off in the middle of a frame is dropped, and the session goes on", (t) =>
  misuse(t, async (scene) => {
    const peer = await scene.open();
    const head = [
      "POST /room HTTP/1.1",
      "host: 127.0.0.1",
      `x-crossws-id: ${peer.token}`,
      "x-duplex-version: 1",
      "content-type: application/websocket-events",
      "transfer-encoding: chunked",
    ].join("\r\n");
    const arrived = deferred();
    const cut = new AbortController();
    const request = rawRequest(
      scene.port,
      head,
      (async function* () {
        yield concat([frame("SEQ", "1"), ONE, frame("TEXT", "two").subarray(0, 8)]);
        await arrived.promise;
        cut.abort();
        throw new Error("cut");
      })(),
    );
    request.catch(() => {});
    assertEquals(await peer.message(), "one");
    arrived.resolve();
    // The body never ends: the session goes on beside it.
    peer.seq = 2;
    assertEquals(await peer.send("two"), 204);
    assertEquals(await peer.message(), "two");
    assertEquals(await peer.close(), 204);
    await using _response = await request;
  }));

for (const [what, token] of [["too large", undefined], ["refused unread", "nobody"]]) {
  test(`behind a message of 8 MiB that is ${what} its connection takes another, or ends`, (t) =>
    misuse(t, async (scene) => {
      const peer = await scene.open();
      const body = from(1, frame("BINARY", new Uint8Array(8 * 1024 * 1024)));
      const [first, next] = await onOneConnection(scene.port, [
        { path: "/room", token: token ?? peer.token, length: body.length, body },
        { path: "/room", token: peer.token, length: 0 },
      ]);
      assertEquals(first, token ? "400" : "413");
      assert(["204", "ended"].includes(next!), next);
      if (token) assertEquals(await peer.close(), 204);
      else assertEquals(await peer.closed(), 1009);
    }));
}

test("a third body of a session ends the oldest", (t) =>
  misuse(t, async (scene) => {
    const peer = await scene.open();
    const send = (text: string, seq: number) =>
      peer.post(streamOf([from(seq, frame("TEXT", text))], { open: true }), UPLINK);
    const oldest = send("one", 1);
    assertEquals(await peer.message(), "one");
    const second = send("two", 2);
    assertEquals(await peer.message(), "two");
    const third = send("three", 3);
    assertEquals(await peer.message(), "three");
    const response = await oldest;
    assertEquals(response.status, 204);
    assert(Number(response.headers.get("x-duplex-received")) >= 2);
    peer.seq = 4;
    assertEquals(await peer.close(), 204); // ends the other two with the session
    for (const rest of [second, third]) assertEquals((await rest).status, 204);
  }));

test("of a session that has closed no more bodies are read at once, and none beyond its tombstone", (t) =>
  misuse(t, async (scene) => {
    const peer = await scene.open();
    assertEquals(await peer.close(), 204);
    const headers = { ...UPLINK, "x-crossws-id": peer.token };
    let answered = 0;
    const answers: Promise<number>[] = [];
    for (let i = 0; i < 5; i++) {
      const body = streamOf(["BINARY 10\r\n", "part"], { open: true });
      answers.push(
        scene.ws.fetch(post(scene.url, headers, body)).then(({ status }) => {
          answered++;
          return status;
        }),
      );
    }
    await until(() => answered >= 3);
    assertEquals(answered, 3);
    assertEquals(await Promise.all(answers), Array(5).fill(204)); // the tombstone ends
  }));

test("a client that overruns the window by more than one message is closed with 1008", (t) =>
  misuse(
    t,
    async (scene) => {
      const peer = await scene.open();
      const big = frame("BINARY", new Uint8Array(1000));
      const response = await peer.post(concat([big, big, big]));
      await response.body?.cancel();
      assertEquals(response.status, 413);
      assertEquals(response.headers.get("x-duplex-received"), "2");
      assertEquals(await peer.closed(), 1008);
      peer.seq = 3;
      assertEquals(await peer.close(1008), 204);
    },
    { window: 1500 },
    {
      message(peer, message) {
        if (peer.namespace !== "/bystander") return new Promise(() => {}); // never done
        peer.send(message.text());
      },
    },
  ));

test("a message to a server with bidir: false is answered 403 and closes with 1003", (t) =>
  misuse(t, async (scene) => {
    const peer = await scene.open();
    const response = await peer.post(ONE);
    await response.body?.cancel();
    assertEquals(response.status, 403);
    assertEquals(await peer.closed(), 1003);
    assertEquals(await peer.close(1003), 204);

    const plain = await scene.open({ full: false });
    assertEquals(plain.token, "");
    const token = within(plain.next("crossws-id"), 300).catch(() => undefined);
    assertEquals(await token ?? "none", "none"); // in six heartbeats
    const refused = await scene.ask(
      post(scene.url, { "x-crossws-id": `${"a".repeat(16)}.${"b".repeat(32)}` }, "one"),
    );
    assertEquals(refused.status, 405);
    assertEquals(refused.headers.get("allow"), "GET");
    await plain.drop();
    assertEquals(scene.count("message"), 0);
    for (const peers of scene.ws.peers.values()) for (const peer of peers) peer.terminate();
  }, { bidir: false, heartbeatInterval: 50 }));

// ---------------------------------------------------------------- plain messages

test("a plain message over maxMessageSize is answered 413 and closes with 1009", async (t) => {
  for (
    const body of [
      "x".repeat(1025),
      streamOf(["x".repeat(1025)]),
    ]
  ) {
    await misuse(t, async (scene) => {
      const peer = await scene.open({ full: false });
      const response = await peer.post(body);
      await response.body?.cancel();
      assertEquals(response.status, 413);
      assertEquals(await peer.closed(), 1009);
      await until(() => scene.count("close") > 0);
      assertEquals(scene.hooks(), ["open", "close"]);
    }, { maxMessageSize: 1024 });
  }
});

test("each level refuses the other's messages with 400, and goes on", (t) =>
  misuse(t, async (scene) => {
    const full = await scene.open();
    const plain = await scene.open({ full: false });
    const answers = [
      await scene.fetch(post(scene.url, { "x-crossws-id": full.token }, "one")),
      await plain.post(ONE, { ...UPLINK, "x-duplex-version": "1" }),
      await scene.fetch(
        new Request(scene.url, {
          headers: {
            ...FULL,
            "x-crossws-id": plain.token,
            "x-duplex-attempt": "1",
            "last-event-id": "0",
          },
        }),
      ),
    ];
    for (const answer of answers) {
      await answer.body?.cancel();
      assertEquals(answer.status, 400);
    }
    assertEquals(await full.send("full"), 204);
    assertEquals(await full.message(), "full");
    assertEquals(await plain.send("plain"), 204);
    assertEquals(await plain.message(), "plain");
    assertEquals(await full.close(), 204);
    await plain.drop();
  }));

test("a plain body cut off in the middle is no message and no error", async (t) => {
  const said = quiet(t);
  await misuse(t, async (scene) => {
    const peer = await scene.open({ full: false });
    const request = rawRequest(
      scene.port,
      `POST /room HTTP/1.1\r\nhost: 127.0.0.1\r\nx-crossws-id: ${peer.token}\r\ncontent-length: 100\r\n\r\nonly a part`,
    ).catch(() => undefined);
    // Sent and heard before the cut: a second message over another connection.
    assertEquals(await peer.send("whole"), 204);
    assertEquals(await peer.message(), "whole");
    // What a server whose runtime tells it of the cut reads.
    const cut = new ReadableStream<Uint8Array>({
      pull: (controller) => controller.error(new Error("the connection was lost")),
    });
    const headers = { "x-crossws-id": peer.token, "content-length": "100" };
    await scene.ws.fetch(post(scene.url, headers, cut));
    assertEquals(said, []);
    await peer.drop();
    void request;
  });
  assertEquals(said, []);
});

// ---------------------------------------------------------------- requests

const TOKEN = `${"0123456789abcdef"}.${"0123456789abcdef".repeat(2)}`;
const resume = (token: string, headers: Record<string, string> = {}) => ({
  ...FULL,
  "x-crossws-id": token,
  "x-duplex-attempt": "1",
  "last-event-id": "0",
  ...headers,
});

test("a token that is unknown, of another path or missing opens nothing and calls no hook", (t) =>
  misuse(t, async (scene) => {
    t.expect(/for a session of another instance/);
    const elsewhere = scene.url.replace("/room", "/elsewhere");
    const peer = await scene.open();
    const plain = await scene.open({ full: false });
    const { calls } = scene;
    const before = calls.filter((call) => call.hook !== "upgrade").length;
    const cases: [string, Request, number][] = [
      ["unknown, uplink", post(scene.url, { ...UPLINK, "x-crossws-id": TOKEN }, ONE), 404],
      ["unknown, plain message", post(scene.url, { "x-crossws-id": TOKEN }, "one"), 404],
      ["unknown, resume", new Request(scene.url, { headers: resume(TOKEN) }), 404],
      [
        "unknown, duplex resume",
        post(scene.url, { ...resume(TOKEN), ...UPLINK }, ONE),
        404,
      ],
      [
        "of another path, uplink",
        post(elsewhere, { ...UPLINK, "x-crossws-id": peer.token }, ONE),
        404,
      ],
      [
        "of another path, plain message",
        post(elsewhere, { "x-crossws-id": plain.token }, "one"),
        404,
      ],
      ["of another path, resume", new Request(elsewhere, { headers: resume(peer.token) }), 404],
      ["missing, uplink", post(scene.url, { ...UPLINK, "x-duplex-version": "1" }, ONE), 400],
      ["missing, text", post(scene.url, {}, "one"), 400],
      ["missing, no body", post(scene.url, {}), 400],
      [
        "missing, no body, all else as it should be",
        post(scene.url, { ...FULL, ...UPLINK }),
        400,
      ],
      [
        "missing, any Accept",
        post(scene.url, { ...FULL, ...UPLINK, accept: "*/*" }, ONE),
        400,
      ],
      [
        "missing, no version",
        post(scene.url, { accept: FULL.accept!, ...UPLINK }, ONE),
        400,
      ],
      ["missing, a form", post(scene.url, { "content-type": "text/plain" }, ONE), 400],
      [
        "a resume without its version",
        new Request(scene.url, {
          headers: { accept: FULL.accept!, "x-crossws-id": peer.token },
        }),
        400,
      ],
      [
        "a resume without an attempt",
        new Request(scene.url, {
          headers: { ...FULL, "x-crossws-id": peer.token, "last-event-id": "0" },
        }),
        400,
      ],
      [
        "a resume without a count",
        new Request(scene.url, {
          headers: { ...FULL, "x-crossws-id": peer.token, "x-duplex-attempt": "1" },
        }),
        400,
      ],
      [
        "a count of the future",
        new Request(scene.url, {
          headers: resume(peer.token, { "last-event-id": "1" }),
        }),
        409,
      ],
      [
        "a count of another session",
        new Request(scene.url, {
          headers: resume(peer.token, { "last-event-id": `${"a".repeat(32)}.0` }),
        }),
        400,
      ],
    ];
    for (const [name, request, status] of cases) {
      assertEquals((await scene.ask(request)).status, status, name);
    }
    assertEquals(calls.filter((call) => call.hook !== "upgrade").length, before);
    assertEquals(await peer.send("mine"), 204);
    assertEquals(await peer.message(), "mine");
    assertEquals(await peer.close(), 204);
    await plain.drop();
  }));

test("a lower attempt is answered 409 and leaves the newer stream alone", (t) =>
  misuse(t, async (scene) => {
    const peer = await scene.open();
    const headers = resume(peer.token, { "x-duplex-attempt": "5" });
    const newer = t.use(
      await WireClient.of(
        scene.fetch,
        scene.url,
        await scene.fetch(new Request(scene.url, { headers })),
      ),
    );
    for (const attempt of ["4", "0"]) {
      const stale = resume(peer.token, { "x-duplex-attempt": attempt });
      assertEquals((await scene.ask(new Request(scene.url, { headers: stale }))).status, 409);
    }
    assertEquals(await newer.send("here"), 204);
    assertEquals(await newer.message(), "here");
    assertEquals(await newer.close(), 204);
  }));

test("another method is answered 405 with Allow, and reaches no hook", (t) =>
  misuse(t, async (scene) => {
    for (const method of ["PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]) {
      const { status, headers } = await scene.ask(
        new Request(scene.url, { method, headers: FULL }),
      );
      assertEquals([method, status, headers.get("allow")], [method, 405, "GET, POST"]);
    }
    assertEquals(scene.calls, []);
  }));

test("an Accept that excludes event streams is answered 406, any other opens", (t) =>
  misuse(t, async (scene) => {
    const ask = async (accept: string | undefined): Promise<number> => {
      const lines = ["GET /room HTTP/1.1", "host: 127.0.0.1"];
      if (accept !== undefined) lines.push(`accept: ${accept}`);
      await using response = await rawRequest(scene.port, lines.join("\r\n"));
      return response.status;
    };
    for (
      const accept of [
        "application/json",
        "text/html, application/xhtml+xml",
        "text/event-stream;q=0",
        "text/event-streams",
        "image/*",
      ]
    ) assertEquals([accept, await ask(accept)], [accept, 406]);
    assertEquals(scene.calls, []);
    for (
      const accept of [
        undefined,
        "*/*",
        "text/*",
        "text/event-stream",
        "TEXT/Event-Stream; charset=utf-8",
        "text/html, */*;q=0.1",
      ]
    ) assertEquals([accept, await ask(accept)], [accept, 200]);
  }, { heartbeatInterval: 20 }));

test("a cross-site simple request reaches no hook, whatever it claims", (t) =>
  misuse(t, async (scene) => {
    // What a form or a no-cors fetch of another site can send: these types, these headers.
    const types = [
      "text/plain",
      "text/plain;charset=UTF-8",
      "application/x-www-form-urlencoded",
      "multipart/form-data; boundary=x",
    ];
    for (const type of types) {
      for (const accept of ["*/*", "text/event-stream", "text/html,*/*;q=0.8"]) {
        for (const site of [undefined, "cross-site"]) {
          const headers = {
            "content-type": type,
            accept,
            cookie: "session=1",
            ...site && { "sec-fetch-site": site },
          };
          const { status } = await scene.ask(post(scene.url, headers, ONE));
          assertEquals([type, accept, status], [type, accept, site ? 403 : 400]);
        }
      }
    }
    assertEquals(scene.calls, []);
  }));

test("merged or malformed headers of ours are answered 400, and reach no hook", (t) =>
  misuse(t, async (scene) => {
    const peer = await scene.open();
    const { token } = peer;
    const before = scene.calls.length;
    const numbers = [
      "",
      "a",
      "-1",
      "+1",
      "1.0",
      "1e3",
      "0x1",
      "01",
      "1 1",
      "1, 1",
      "9007199254740992",
      "99999999999999999999",
      "NaN",
    ];
    const bad: [name: string, values: string[]][] = [
      ["x-crossws-id", [
        "",
        "a",
        "a, a",
        `${token}, ${token}`,
        token.toUpperCase().replace(/^[^A-Z]*$/, "G"),
        token.slice(1),
        `${token}0`,
        `${token}.0`,
        token.replace(".", ""),
        "00000000-0000-4000-8000-000000000000",
      ]],
      ["x-duplex-version", ["", "0", "-1", "01", "1.0", "one", "1, 1", "1000"]],
      ["x-duplex-attempt", numbers],
      ["last-event-id", numbers],
    ];
    for (const [name, values] of bad) {
      for (const value of values) {
        const headers = new Headers(resume(token));
        headers.set(name, value);
        const { status } = await scene.ask(new Request(scene.url, { headers }));
        assertEquals([name, value, status], [name, value, 400]);
        const uplink = new Headers({ "x-crossws-id": token, "x-duplex-version": "1", ...UPLINK });
        if (name === "last-event-id") continue; // means nothing there
        uplink.set(name, value);
        const answer = await scene.ask(
          post(scene.url, Object.fromEntries(uplink), frame("PING")),
        );
        assertEquals([name, value, answer.status], [name, value, 400]);
      }
    }
    // As two lines of the request, which the runtime merges.
    for (const name of ["x-crossws-id", "x-duplex-version"]) {
      const headers: Record<string, string> = {
        host: "127.0.0.1",
        "x-crossws-id": token,
        "x-duplex-version": "1",
        "content-length": "0",
        ...UPLINK,
      };
      const lines = Object.entries({ ...headers }).map(([key, value]) => `${key}: ${value}`);
      lines.unshift("POST /room HTTP/1.1");
      lines.push(`${name}: ${headers[name]}`);
      await using response = await rawRequest(scene.port, lines.join("\r\n"));
      assertEquals([name, response.status], [name, 400]);
    }
    assertEquals(scene.calls.length, before);
    assertEquals(await peer.send("still mine"), 204);
    assertEquals(await peer.message(), "still mine");
    assertEquals(await peer.close(), 204);
  }));

test("numbers up to 2^53 - 1 are numbers", (t) =>
  misuse(t, async (scene) => {
    const peer = await scene.open();
    const largest = `${2 ** 53 - 1}`;
    const answer = await peer.post(from(largest, frame("TEXT", "one")), UPLINK);
    await answer.body?.cancel();
    assertEquals(answer.status, 409);
    const headers = resume(peer.token, { "x-duplex-attempt": largest });
    const response = await scene.fetch(new Request(scene.url, { headers }));
    const resumed = t.use(await WireClient.of(scene.fetch, scene.url, response));
    assertEquals(resumed.terms.attempt, Number(largest));
    assertEquals(await resumed.close(), 204);
  }));

test("an unknown version gets the plain level", (t) =>
  misuse(t, async (scene) => {
    const headers = { accept: FULL.accept!, "x-duplex-version": "2" };
    const response = await scene.fetch(new Request(scene.url, { headers }));
    const peer = t.use(await WireClient.of(scene.fetch, scene.url, response, false));
    assertEquals(response.headers.get("x-duplex-version"), null);
    assertEquals((await peer.next())!.type, "crossws-id");
    await peer.drop();
  }));

test("a subprotocol that cannot be a header is answered 500, and opens nothing", async (t) => {
  quiet(t);
  await misuse(t, async (scene) => {
    const headers = { ...FULL, "x-duplex-protocol": "chat" };
    assertEquals((await scene.ask(new Request(scene.url, { headers }))).status, 500);
    assertEquals(scene.hooks(), []);
  }, { handleProtocols: () => "a\r\nb" });
});

for (const [level, headers] of Object.entries({ full: UPLINK, plain: {} })) {
  test(`a body that was read before us is answered 400, and is no message (${level})`, async (t) => {
    const said = quiet(t);
    const upgrade = async (request: Request) => {
      if (!bystanding(request.url)) await request.text();
    };
    await misuse(
      t,
      async (scene) => {
        const full = level === "full";
        // With nobody to catch what reading throws, the whole process would end.
        const opening = post(scene.url, { ...FULL, ...UPLINK }, ONE);
        assertEquals((await scene.ask(opening)).status, 400);
        assertEquals(scene.hooks(), []);
        const peer = await scene.open({ full });
        const answer = await peer.post(full ? ONE : "one", headers);
        await answer.body?.cancel();
        assertEquals([answer.status, scene.count("message")], [400, 0]);
        assertEquals(said.length, 1); // once for all
        await peer.drop();
      },
      {},
      { upgrade },
    );
  });
}

// ---------------------------------------------------------------- hooks that fail

const WAYS: [way: string, fail: (error: unknown) => unknown][] = [
  ["throws", (error) => {
    throw error;
  }],
  ["rejects", (error) => Promise.reject(error)],
  ["rejects later", async (error) => {
    await Promise.resolve();
    throw error;
  }],
];
const oops = new Error("oops");
const bystanding = (url: string) => new URL(url).pathname === "/bystander";

for (const [way, fail] of WAYS) {
  for (const position of ["upgrade", "resolve", "getNamespace", "handleProtocols"] as const) {
    if (position === "getNamespace" && way !== "throws") continue; // it is synchronous

    test(`${position} that ${way} is answered 500, for an opening and for an uplink`, async (t) => {
      const said = quiet(t);
      let failing = true;
      const run = (request: Request) =>
        failing && !bystanding(request.url) ? fail(oops) as never : undefined;
      const options: SSEOptions = {
        ...position === "resolve" && { resolve: run },
        ...position === "getNamespace" && {
          getNamespace: (request: Request) => run(request) ?? new URL(request.url).pathname,
        },
        ...position === "handleProtocols" && {
          handleProtocols: (_: Set<string>, request: Request) => run(request),
        },
      };
      await misuse(
        t,
        async (scene) => {
          const headers = { "x-duplex-protocol": "a" };
          const opening = await scene.ask(
            new Request(scene.url, { headers: { ...FULL, ...headers } }),
          );
          assertEquals(opening.status, 500);
          assertEquals(opening.text, "A hook failed\n");
          const both = { ...FULL, ...UPLINK, ...headers };
          assertEquals((await scene.ask(post(scene.url, both, ONE))).status, 500);
          assertEquals(scene.hooks(), []);
          assert(said.every((line) => line.includes(oops)), "told on the console");
          assertEquals(said.length, 2);

          failing = false;
          const peer = await scene.open();
          failing = true;
          const answer = await peer.post(ONE, { ...UPLINK, ...headers });
          await answer.body?.cancel();
          assertEquals(answer.status, 500);
          assertEquals(scene.count("message"), 0);
          failing = false;
          assertEquals(await peer.send("again"), 204); // "Failed requests never end a session."
          assertEquals(await peer.message(), "again");
          assertEquals(await peer.close(), 204);
        },
        options,
        position === "upgrade" ? { upgrade: run } : {},
      );
    });
  }

  const refusals: [string, () => unknown][] = [
    ["a Response", () => new Response("no", { status: 418 })],
    ["{ response }", () => ({ response: new Response("no", { status: 418 }) })],
    [
      "an Error with a response",
      () => Object.assign(new Error("no"), { response: new Response("no", { status: 418 }) }),
    ],
  ];
  for (const [what, make] of refusals) {
    test(`upgrade that ${way} with ${what} answers with that response`, (t) =>
      misuse(
        t,
        async (scene) => {
          const { status, text } = await scene.ask(new Request(scene.url, { headers: FULL }));
          assertEquals([status, text], [418, "no"]);
          assertEquals(scene.hooks(), []);
        },
        {},
        {
          upgrade: (request) => bystanding(request.url) ? undefined : fail(make()) as never,
        },
      ));
  }

  /** How each of the other hooks is made to run, once the session is open. */
  const positions: Record<string, (peer: WireClient, scene: Scene) => Promise<unknown>> = {
    open: () => Promise.resolve(),
    message: (peer) => peer.post(ONE).then((response) => peer.seq++ && response),
    ping: (peer) => peer.post(frame("PING", "hi")),
    pong: (peer) => peer.post(frame("PONG", "hi")),
    drain: async (peer) => {
      // More than a window, so that the rest waits for an acknowledgement.
      while (await peer.message() !== "second");
      await peer.post(frame("ACK", "2"));
    },
  };
  for (const [position, trigger] of Object.entries(positions)) {
    for (const told of [true, false]) {
      const rest = told ? "is told to error" : "without an error hook is told to the console";
      test(`${position} that ${way} closes its peer alone with 1011, and ${rest}`, async (t) => {
        const said = quiet(t);
        const hook = (peer: { namespace: string }) =>
          peer.namespace === "/bystander" ? undefined : fail(oops) as never;
        const hooks: Partial<Hooks> = { [position]: hook };
        if (position === "message") {
          hooks.message = (peer, message) => {
            if (peer.namespace !== "/bystander") return fail(oops) as never;
            peer.send(message.text());
          };
        }
        if (position === "drain") {
          hooks.open = (peer) => {
            if (peer.namespace === "/bystander") return;
            for (const text of ["first", "second", "third"]) peer.send(text.padEnd(6));
            peer.send("x".repeat(1000));
          };
        }
        const errors: unknown[] = [];
        const closes: number[] = [];
        await misuse(
          t,
          async (scene) => {
            const peer = await scene.open();
            if (position === "drain") {
              assertEquals(await peer.message(), "first ");
              const answer = await peer.post(frame("ACK", "1"));
              await answer.body?.cancel();
              assertEquals(answer.status, 204);
              for (let count = 1; count < 4; count++) {
                await peer.message();
                const answer = await peer.post(frame("ACK", `${count + 1}`));
                await answer.body?.cancel();
              }
            } else {
              const answer = await trigger(peer, scene) as Response | undefined;
              await answer?.body?.cancel();
            }
            assertEquals(await peer.closed(), 1011);
            assertEquals(await peer.close(1011), 204);
            await until(() => closes.length > 0);
            assertEquals(closes, [1011]);
            if (told) {
              assertEquals(errors, [oops]);
              assertEquals(said, []);
            } else {
              assertEquals(said.length, 1);
              assert(said[0]!.includes(oops));
            }
            // This scene counts by its own hooks, which these replaced.
            scene.calls.length = 0;
          },
          position === "drain" ? { window: 1 } : {},
          {
            open: () => {},
            close: (peer, { code }) => {
              if (peer.namespace !== "/bystander") closes.push(code!);
            },
            error: told ? (_, error) => void errors.push(error) : undefined as never,
            ...hooks,
          },
        );
      });
    }
  }

  test(`close that ${way} is told to error, and the peer is gone`, async (t) => {
    const errors: unknown[] = [];
    const noted = deferred();
    await misuse(
      t,
      async (scene) => {
        const peer = await scene.open();
        assertEquals(await peer.close(4000), 204);
        await noted.promise;
        assertEquals(errors, [oops]);
        scene.calls.length = 0;
      },
      {},
      {
        close: (peer) => peer.namespace === "/bystander" ? undefined : fail(oops) as never,
        error: (_, error) => {
          errors.push(error);
          noted.resolve();
        },
      },
    );
  });

  test(`error that ${way} is told to the console, once`, async (t) => {
    const said = quiet(t);
    const second = new Error("in error");
    await misuse(
      t,
      async (scene) => {
        const peer = await scene.open();
        await (await peer.post(ONE)).body?.cancel();
        peer.seq++;
        assertEquals(await peer.closed(), 1011);
        assertEquals(await peer.close(1011), 204);
        assertEquals(said.length, 1);
        assert(said[0]!.includes(second));
      },
      {},
      {
        message: (peer, message) => {
          if (peer.namespace !== "/bystander") throw oops;
          peer.send(message.text());
        },
        error: () => fail(second) as never,
      },
    );
  });

  test(`a message hook that ${way} with what is no error closes with 1011 all the same`, async (t) => {
    for (const thrown of [undefined, null, "text", 0, Symbol("s"), Object.create(null)]) {
      const errors: unknown[] = [];
      await misuse(
        t,
        async (scene) => {
          const peer = await scene.open();
          await (await peer.post(ONE)).body?.cancel();
          peer.seq++;
          assertEquals(await peer.closed(), 1011);
          assertEquals(await peer.close(1011), 204);
          assert(errors.length === 1 && errors[0] instanceof Error);
          assertEquals((errors[0] as Error).cause, thrown);
        },
        {},
        {
          message: (peer, message) => {
            if (peer.namespace !== "/bystander") return fail(thrown) as never;
            peer.send(message.text());
          },
          error: (_, error) => void errors.push(error),
        },
      );
    }
  });
}

test("a failing hook fails its peer alone, not those that come with the same request", (t) =>
  misuse(
    t,
    async (scene) => {
      const peer = await scene.open();
      const response = await peer.post(concat([ONE, frame("TEXT", "two"), frame("TEXT", "three")]));
      assertEquals(response.status, 204);
      assertEquals(response.headers.get("x-duplex-received"), "3"); // so that the client can finish
      peer.seq = 4;
      assertEquals(await peer.closed(), 1011);
      assertEquals(await peer.close(1011), 204);
      assertEquals(scene.count("error"), 1);
    },
    {},
    {
      message: (peer, message) => {
        if (peer.namespace !== "/bystander") throw oops;
        peer.send(message.text());
      },
    },
  ));

test("a peer that open closes or terminates is gone, duplex request or not", (t) =>
  misuse(
    t,
    async (scene) => {
      for (
        const make of [() => scene.open(), () =>
          scene.duplex(streamOf([from(1, ONE)], { open: true }))]
      ) {
        const response = await make().catch((error) =>
          error
        );
        if (!(response instanceof Error)) { while (await response.next()); }
      }
      await until(() => scene.count("close") === 2);
      assertEquals(scene.count("message"), 0);
      scene.calls.length = 0;
    },
    {},
    { open: (peer) => peer.namespace === "/bystander" ? undefined : peer.terminate() },
  ));
