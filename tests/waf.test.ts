/**
 * A web application firewall in between: ModSecurity with the OWASP Core Rule Set, as Debian ships
 * them and with what docs/proxies.md says. No test tells what an attack is; some messages look like
 * one.
 */
import { chaos } from "./chaos.ts";
import { assert, assertEquals, needs, test, type TestContext } from "./harness.ts";
import { connect, listen, Queue } from "./pair.ts";
import { proxy, type ProxyOptions } from "./proxies.ts";

const skip = needs("apache", "modsecurity", "owasp-crs", "openssl");
const timeout = 60_000;

/** The type of an uplink, and the one that such lists know. */
const OURS = "application/websocket-events";
const KNOWN = "multipart/related";

const random = (length: number) => crypto.getRandomValues(new Uint8Array(length));

/** Ten kinds of messages that no rule objects to. */
const kinds: ((n: number) => string | Uint8Array)[] = [
  (n) => "hello ".repeat(n),
  (n) => JSON.stringify({ type: "move", id: n, to: [{ x: 1.5, y: -2 }], text: "<b>hi</b>" }),
  (n) => `${n}: it's 5% off & "free"; don't -- drop table? café 🙂 %41%zz`,
  (n) => `<script>alert(${n})</script>`,
  (n) => `${n}' OR '1'='1' UNION SELECT password FROM users--`,
  () => "",
  (n) => random(n * 37),
  (n) => new Uint8Array(n * 10),
  (n) => new Uint8Array(512).map((_, index) => index + n),
  () => random(60_000),
];

/** What some rule takes for an attack, though it is only talked about. */
const suspicious = [
  "please get /home",
  "GET /index.html HTTP/1.1",
  "java.lang.Runtime.getRuntime().exec(x)",
  "_CONF[path]=http://example.com/",
];

function frame(data: string | Uint8Array): Uint8Array<ArrayBuffer> {
  const payload = typeof data === "string" ? new TextEncoder().encode(data) : data;
  const head = `${typeof data === "string" ? "TEXT" : "BINARY"} ${payload.length.toString(16)}\r\n`;
  const bytes = new Uint8Array(head.length + payload.length + 2);
  bytes.set(new TextEncoder().encode(head));
  bytes.set(payload, head.length);
  bytes.set([13, 10], head.length + payload.length);
  return bytes;
}

/** In front of a server that takes anything: the status of each of these bodies. */
async function statuses(
  t: TestContext,
  type: string,
  bodies: Uint8Array<ArrayBuffer>[],
  options: ProxyOptions = {},
): Promise<number[]> {
  const { port: server } = await t.serve(async (request) => {
    await request.arrayBuffer();
    return new Response(null, { status: 204 });
  });
  const { port } = await proxy(t, "modsecurity", server, options);
  const found: number[] = [];
  for (const body of bodies) {
    const response = await fetch(`http://127.0.0.1:${port}/chat`, {
      method: "POST",
      headers: {
        "content-type": type,
        "x-crossws-id": "0123456789abcdef.0123456789abcdef0123456789abcdef",
        "x-duplex-version": "1",
      },
      body,
    });
    await response.body?.cancel();
    found.push(response.status);
  }
  return found;
}

const harmless = () => Array.from({ length: 200 }, (_, n) => frame(kinds[n % 10]!(n)));
const all = (status: number, count = 200) => Array<number>(count).fill(status);

test("OWASP CRS, as shipped: our content type is refused, whatever it carries", async (t) => {
  assertEquals(await statuses(t, OURS, harmless()), all(403));
}, { timeout, skip });

test(`OWASP CRS, as shipped: ${KNOWN} lets 200 of 200 messages pass`, async (t) => {
  assertEquals(await statuses(t, KNOWN, harmless()), all(204));
}, { timeout, skip });

test("OWASP CRS, as shipped: some texts are refused, and bodies over 128 KiB", async (t) => {
  const texts = suspicious.map(frame);
  assertEquals(await statuses(t, KNOWN, texts), all(403, texts.length));
  const sizes = [130_000, 132_000, 1_000_000].map((size) => frame(new Uint8Array(size)));
  assertEquals(await statuses(t, KNOWN, sizes), [204, 413, 413]);
}, { timeout, skip });

test("OWASP CRS, told of our content type, lets 200 of 200 messages pass", async (t) => {
  assertEquals(await statuses(t, OURS, harmless(), { rules: "modsecurity type" }), all(204));
}, { timeout, skip });

test("OWASP CRS, told to leave bodies at our path alone, lets all pass", async (t) => {
  const bodies = [
    ...harmless(),
    ...suspicious.map(frame),
    ...[130_000, 132_000, 1_000_000].map((size) => frame(new Uint8Array(size))),
  ];
  assertEquals(
    await statuses(t, OURS, bodies, { rules: "modsecurity path" }),
    all(204, bodies.length),
  );
}, { timeout, skip });

interface Site {
  readonly url: string;
  readonly received: Queue<string>;
  /** The content types of the requests that have a body, in order. */
  types(): string[];
}

/** A server of ours behind the firewall, and a recorder before it. */
async function site(t: TestContext, options: ProxyOptions = {}): Promise<Site> {
  const received = new Queue<string>();
  const { port: server } = await listen(t, {
    hooks: {
      message(peer, message) {
        received.push(message.text());
        peer.send(message.rawData);
      },
    },
  });
  const { port } = await proxy(t, "modsecurity", server, options);
  const recorder = t.use(await chaos(port, { record: () => true }));
  return {
    url: `${recorder.url}/chat`,
    received,
    types: () =>
      recorder.recordings.map(({ head }) => /^content-type: *([^;\r]+)/im.exec(head)?.[1] ?? "")
        .filter(Boolean),
  };
}

const same = (one: unknown, other: unknown) =>
  typeof one === "string"
    ? one === other
    : `${new Uint8Array(one as Uint8Array)}` === `${new Uint8Array(other as ArrayBuffer)}`;

for (const transport of ["auto", "post", "poll"] as const) {
  test(`OWASP CRS, as shipped: 200 of 200 messages both ways, from "${transport}"`, async (t) => {
    const { url, types } = await site(t);
    const first = connect(t, url, { transport });
    await first.opened;
    for (let n = 0; n < 200; n++) {
      const data = kinds[n % 10]!(n);
      first.socket.send(data as string);
      const echo = await first.messages.next({ timeout: 20_000 });
      assert(same(data, echo), `message ${n}`);
    }
    assertEquals(first.events, ["open"]);
    // The next socket begins with it.
    const before = types().length;
    const second = connect(t, url, { transport: "post" });
    await second.opened;
    second.socket.send("again");
    assertEquals(await second.messages.next(), "again");
    assertEquals([...new Set(types().slice(before))], [KNOWN]);
  }, { timeout, skip });
}

test("OWASP CRS, as shipped: what is queued goes in bodies that it takes", async (t) => {
  const { url } = await site(t);
  const { socket, messages, events, opened } = connect(t, url, { transport: "post" });
  await opened;
  const sent = Array.from({ length: 40 }, (_, n) => `${n} `.padEnd(20_000, "x"));
  for (const text of sent) socket.send(text);
  assertEquals(await messages.take(40, { timeout: 20_000 }), sent);
  assertEquals(events, ["open"]);
}, { timeout, skip });

test(
  "OWASP CRS, as shipped: a single message that it takes for too large ends in 1009",
  async (t) => {
    const { url } = await site(t);
    const { socket, opened, closed } = connect(t, url, { transport: "post" });
    await opened;
    socket.send("x".repeat(200_000));
    assertEquals((await closed).code, 1009);
  },
  { timeout, skip },
);

test(
  "OWASP CRS, told to leave our path alone: all of it, in large bodies, by our type",
  async (t) => {
    const { url, types } = await site(t, { rules: "modsecurity path" });
    const { socket, messages, events, opened } = connect(t, url, { transport: "post" });
    await opened;
    const sent = [...suspicious, ...suspicious.map((text) => text.padEnd(300_000, "x"))];
    for (const text of sent) socket.send(text);
    assertEquals(await messages.take(sent.length, { timeout: 20_000 }), sent);
    assertEquals([events, [...new Set(types())]], [["open"], [OURS]]);
  },
  { timeout, skip },
);
