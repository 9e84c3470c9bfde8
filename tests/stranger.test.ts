/**
 * PROTOCOL.md can be implemented by a stranger: a client and a server in Python, written from that
 * text with the standard library alone, talk with ours through cuts.
 */
import { spawn } from "node:child_process";
import { join } from "node:path";
import { text } from "node:stream/consumers";
import { WebSocketSSE } from "../client.ts";
import { type CloseDetails, sseAdapter, type SSEOptions } from "../server.ts";
import { chaos, type ChaosOptions, type ChaosProxy } from "./chaos.ts";
import {
  assertEquals,
  assertGreater,
  assertLess,
  command,
  deferred,
  needs,
  note,
  once,
  root,
  sleep,
  test,
  type TestContext,
  within,
} from "./harness.ts";

const COUNT = 2_000;
const PIECES = [
  ...["plain", "two\nlines\n", "\r", "\r\nCR and tab\t", "ä€\u{1F600}", " data: x", "\uFEFF:", ""],
];

/** The message of this number, as tests/fixtures/duplex_client.py has it, too. */
function message(index: number): string | Uint8Array<ArrayBuffer> {
  const size = index % 250 === 249 ? 40_000 : index * index * 31 % 700;
  if (index % 3 === 2) return Uint8Array.from({ length: size }, (_, at) => index + at * at);
  return index % 50 === 49 ? "" : `${index}:${PIECES[index % 8]!.repeat(size >> 3)}`;
}

/** What the client is told to do. */
interface Orders {
  send?: number;
  receive?: number;
  /** Seconds after every twentieth message. */
  pause?: number;
  /** Bytes that it sends in messages of 1 KiB. */
  flood?: number;
  close?: [code: number, reason: string];
}

/** What the client has seen. */
interface Seen {
  received: number;
  /** The first messages that were not those expected. */
  wrong: unknown[];
  /** Messages that came beyond those expected. */
  more: number;
  resumes: number;
  resent: number;
  code: number;
  reason: string;
  clean: boolean;
  /** From its own close, or its last message, to the end. */
  seconds: number;
}

async function stranger(t: TestContext, url: string, orders: Orders): Promise<Seen> {
  const args = [join(root, "tests/fixtures/duplex_client.py"), url, JSON.stringify(orders)];
  const child = spawn(command("python3")!, args, { stdio: ["ignore", "pipe", "pipe"] });
  t.defer(() => child.kill("SIGKILL"));
  const [out, problems, code] = await Promise.all([
    text(child.stdout),
    text(child.stderr),
    new Promise((resolve) => child.on("close", resolve)),
  ]);
  assertEquals(code, 0, problems);
  return JSON.parse(out);
}

/** A server of one session, behind a proxy that cuts. */
async function serve(
  t: TestContext,
  options: SSEOptions,
  cuts?: ChaosOptions,
): Promise<{ url: string; proxy: ChaosProxy; closed: Promise<CloseDetails> }> {
  const { promise: closed, resolve } = deferred<CloseDetails>();
  const ws = sseAdapter({
    bidir: true,
    ...options,
    hooks: {
      ...options.hooks,
      close: (_, details) => resolve(details),
    },
  });
  const server = t.use(await t.serve((request, info) => ws.fetch(request, info)));
  t.defer(() => ws.close(1001, "", { signal: AbortSignal.abort() }));
  const proxy = t.use(await chaos(server.port, cuts));
  return { url: `${proxy.url}/chat?room=1`, proxy, closed };
}

test(
  `a client in Python and this server tell each other ${COUNT} messages through cuts, exactly once`,
  async (t) => {
    const wrong: unknown[] = [];
    let received = 0;
    let opened = 0;
    const { url, proxy, closed } = await serve(t, {
      heartbeatInterval: 200,
      resumeTimeout: 20_000,
      hooks: {
        async open(peer) {
          opened++;
          for (let index = 0; index < COUNT; index++) {
            peer.send(message(index));
            if (index % 20 === 19) await sleep(15, t.signal);
          }
        },
        message(_, { rawData }) {
          if (!same(rawData, message(received))) wrong.push([received, rawData]);
          received++;
        },
      },
    }, { delay: [1, 5] });
    const cutting = cutAgain(t, proxy, () => received === COUNT); // the opening, too
    const seen = await stranger(t, url, {
      ...{ send: COUNT, receive: COUNT, pause: 0.015 },
      close: [4001, "enough: ä€\u{1F600}"],
    });
    await cutting;
    assertEquals([seen.wrong, seen.received, seen.more], [[], COUNT, 0]);
    assertEquals([wrong, received, opened], [[], COUNT, 1]);
    assertEquals([seen.code, seen.reason, seen.clean], [4001, "enough: ä€\u{1F600}", true]);
    assertEquals(await within(closed, 5_000), { code: 4001, reason: seen.reason });
    assertGreater(seen.resumes, 4);
    assertGreater(seen.resent, 0);
  },
  { timeout: 60_000, skip: needs("python3") },
);

for (const [code, reason] of [[1000, "bye"], [4999, "ä".repeat(61)], [1005, ""]] as const) {
  test(
    `a client in Python and this server agree on a close by ${code}, from either side`,
    async (t) => {
      const hooks: SSEOptions["hooks"] = {
        open: (peer) => void [0, 1, 2].forEach((index) => peer.send(message(index))),
        message(peer, { rawData }) {
          if (rawData !== message(1)) return;
          if (peer.request.url.endsWith("server")) {
            peer.close(code === 1005 ? undefined : code, reason);
          }
        },
      };
      for (const side of ["client", "server"]) {
        const { url, closed } = await serve(t, { hooks });
        const orders: Orders = { send: 2, receive: 3 };
        if (side === "client") {
          orders.close = [code, reason];
        }
        const seen = await stranger(t, `${url}&by=${side}`, orders);
        assertEquals(
          [seen.code, seen.reason, seen.clean, seen.wrong],
          [code, reason, true, []],
          side,
        );
        assertEquals(await within(closed, 5_000), { code, reason }, side);
      }
    },
    { skip: needs("python3") },
  );
}

test(
  "a client in Python and this server agree on the end with more than a window queued",
  async (t) => {
    let received = 0;
    const { url, closed } = await serve(t, {
      window: 16 * 1024,
      hooks: {
        message(peer) {
          received++;
          if (received === 10) peer.close(1012, "restart");
          return new Promise(() => {});
        },
      },
    });
    const seen = await stranger(t, url, { flood: 512 * 1024 });
    assertEquals([seen.code, seen.reason, seen.clean], [1012, "restart", true]);
    assertLess(seen.seconds, 3);
    assertEquals(await within(closed, 1_000), { code: 1012, reason: "restart" });
  },
  { skip: needs("python3") },
);

/** Starts the server in Python, behind a proxy that cuts. */
async function foreign(t: TestContext): Promise<ChaosProxy> {
  const args = [join(root, "tests/fixtures/duplex_server.py")];
  const child = spawn(command("python3")!, args, { stdio: ["ignore", "pipe", "inherit"] });
  const exited = new Promise((resolve) => child.on("close", resolve));
  t.defer(() => {
    child.kill("SIGKILL");
    return exited;
  });
  const line = await new Promise<string>((resolve) =>
    child.stdout.once("data", (data) => resolve(`${data}`))
  );
  return t.use(await chaos(JSON.parse(line).port, { delay: [1, 5] }));
}

for (const transport of ["duplex", "stream", "post"] as const) {
  test(
    `our client gets ${COUNT} echoes of a server in Python through cuts, exactly once, by ${transport}`,
    async (t) => {
      const proxy = await foreign(t);
      // Its farewell may outlive it, if the first is cut.
      const { signal } = t;
      const socket = new WebSocketSSE(`${proxy.url}/chat?room=1`, { transport, signal });
      socket.binaryType = "arraybuffer";
      const closed = new Promise<CloseEvent>((resolve) => socket.onclose = resolve);
      const events: string[] = [];
      for (const type of ["open", "error"]) socket.addEventListener(type, () => events.push(type));
      await once(socket, "message"); // "Welcome"
      const transports = new Set([socket.transport]);
      let received = 0;
      const wrong: unknown[] = [];
      socket.onmessage = ({ data }) => {
        const got = typeof data === "string" ? data : new Uint8Array(data);
        if (!same(got, message(received))) wrong.push([received, got]);
        transports.add(socket.transport);
        if (++received === COUNT) socket.send("close 4001 enough: ä€\u{1F600}");
      };
      const cutting = cutAgain(t, proxy, () => received === COUNT);
      for (let index = 0; index < COUNT; index++) {
        socket.send(message(index));
        if (index % 20 === 19) await sleep(15, t.signal);
      }
      const { code, reason, wasClean } = await closed;
      await cutting;
      assertEquals([wrong, received, events], [[], COUNT, ["open"]]);
      assertEquals([code, reason, wasClean], [4001, "enough: ä€\u{1F600}", true]);
      assertGreater(socket.stats.resumes, 4);
      assertGreater(socket.stats.resent, 0);
      note(`${[...transports]}`);
    },
    { timeout: 60_000, skip: needs("python3") },
  );
}

/** Cuts in each way that a connection is lost: by a reset, by an end in order, in silence. */
async function cutAgain(t: TestContext, proxy: ChaosProxy, isOver: () => boolean): Promise<void> {
  for (let n = 1; !isOver() && !t.signal.aborted; n++) {
    await sleep(20 + n * 37 % 60, t.signal);
    if (n % 16 === 0) proxy.stallAll({ newcomers: false });
    else proxy.cutAll(n % 3 ? "rst" : "fin");
  }
}

function same(a: unknown, b: string | Uint8Array): boolean {
  if (typeof a === "string" || typeof b === "string") return a === b;
  const bytes = a as Uint8Array;
  return bytes.length === b.length && b.every((byte, at) => byte === bytes[at]);
}
