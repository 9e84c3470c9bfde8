/**
 * A server under test, as a process of its own: `server.ts <implementation>
 * [heartbeat interval]`. It serves at once, and does what it is told to on its
 * standard input. With DUPLEX_TLS, a key and its certificate in JSON, it serves https.
 *
 * @module
 */
import { readFile } from "node:fs/promises";
import process from "node:process";
import { setImmediate } from "node:timers";
import { implement, type Name } from "./implementations.ts";
import { wallClock } from "./clock.ts";
import { answer } from "./rpc.ts";
import { BATCH, SIZE, stamped, text } from "./message.ts";

interface Bun {
  // deno-lint-ignore no-explicit-any
  serve(options: any): { port: number };
  gc(force: boolean): void;
}
const { Bun, gc } = globalThis as { Bun?: Bun; gc?: () => void };

let received = 0;
let nextReply = BATCH;
const [name, heartbeat] = process.argv.slice(2) as [Name, string?];
const implementation = implement(name, onMessage, Number(heartbeat) || undefined);
const tls: { key: string; cert: string } | undefined =
  JSON.parse(process.env.DUPLEX_TLS ?? "null") ??
    undefined;
/** What the root is to browsers. */
let page = "";
const port = serve();

/** An echo, or one of many: every 500th is answered, so that the client can pace itself. */
function onMessage(message: string, reply: (text: string) => void): void {
  if (message.startsWith("echo")) return reply(message);
  received += message.length / SIZE; // crossws may give several as one
  while (received >= nextReply) {
    nextReply += BATCH;
    reply(text(0));
  }
}

function serve(): number {
  const { websocket } = implementation;
  const fetch = (request: Request, info: unknown) =>
    request.url.endsWith("/page") ? show() : implementation.fetch(request, info);
  const hostname = "127.0.0.1";
  if (Bun) {
    const secure = tls && { tls, http2: true };
    return Bun.serve({ port: 0, hostname, idleTimeout: 0, fetch, websocket, ...secure }).port;
  }
  const server = Deno.serve(
    { port: 0, hostname, onListen: () => {}, ...tls },
    fetch as (request: Request, info: unknown) => Response,
  );
  return server.addr.port;
}

/** Alone in its process, which gives it a fine clock. */
function show(): Response {
  const headers = {
    "content-type": "text/html",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-embedder-policy": "require-corp",
  };
  return new Response(page, { headers });
}

/** Beyond the lateness of any timer, in ms. */
const LATE = 5;

const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));
const nextTask = () => new Promise<void>((resolve) => setImmediate(resolve));
/** Milliseconds of processor time, of all threads. */
const cpu = () => {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1000;
};

answer({
  port: () => port,
  show: ({ html }) => void (page = html),
  count: () => implementation.count(),
  cpu,
  received: () => ({ received, now: performance.now() }),

  /** Bursts of messages, the next one in the next macrotask. */
  async fanOut({ bursts, burst }) {
    const started = Date.now();
    for (let i = 0; i < bursts; i++) {
      for (let j = 0; j < burst; j++) implementation.publish("0", text(i + j));
      await nextTask();
    }
    return started;
  },

  /**
   * Messages at a rate that does not wait for anything, each in a task of its own; what they cost.
   * Each tells when it was published, or should have been where the server was too busy for it.
   */
  async offer({ messages, every }) {
    const before = cpu();
    const now = wallClock();
    const begun = now();
    for (let i = 0; i < messages; i++) {
      const due = begun + i * every;
      if (now() < due) await pause(due - now());
      else await nextTask();
      const time = now();
      implementation.publish("0", stamped(time - due > LATE ? due : time));
    }
    return cpu() - before;
  },

  /** Bursts at a pace at which each can be written before the next; what they cost. */
  async paced({ bursts, burst, topics, every }) {
    const before = cpu();
    for (let i = 0, topic = 0; i < bursts; i++) {
      for (let j = 0; j < burst; j++, topic = (topic + 1) % topics) {
        implementation.publish(`${topic}`, text(i + j));
      }
      await pause(every);
    }
    return cpu() - before;
  },

  /** Numbered messages every few ms, until told to stop; then how many. */
  startNumbers({ every }) {
    numbers = { sent: 0, timer: setInterval(() => publishNumber(), every) };
  },
  stopNumbers() {
    clearInterval(numbers.timer);
    return numbers.sent;
  },

  /** Nanoseconds of one publish that nobody hears, among this many sessions without a network. */
  async unheard({ peers, publishes }) {
    for (let i = implementation.count(); i < peers; i++) {
      const headers = { accept: "text/event-stream", "x-duplex-version": "1" };
      await implementation.fetch(new Request("http://localhost/", { headers }), {});
    }
    const started = performance.now();
    for (let i = 0; i < publishes; i++) implementation.publish("nobody", text(i));
    return (performance.now() - started) * 1e6 / publishes;
  },

  /** Resident MB after a thorough collection. */
  async memory() {
    for (let i = 0; i < 4; i++) {
      if (Bun) Bun.gc(true);
      else gc!();
      await pause(50);
    }
    const status = await readFile("/proc/self/status", "utf8");
    return Number(/VmRSS:\s+(\d+)/.exec(status)![1]) / 1024;
  },
});

let numbers: { sent: number; timer: ReturnType<typeof setInterval> };

function publishNumber(): void {
  implementation.publish("0", `#${++numbers.sent}#`);
}
