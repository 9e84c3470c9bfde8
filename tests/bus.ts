/**
 * Backplanes for tests of several instances: one in memory that counts, limits,
 * loses, repeats and reorders; a real Redis; and the proxy that sends every
 * request to the next instance.
 *
 * @module
 */
import { type ChildProcess, spawn } from "node:child_process";
import { chownSync } from "node:fs";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import process from "node:process";
import { decodeEnvelope, encodeEnvelope } from "crossws/sync";
import type { ClusterAdapter } from "../cluster.ts";
import type { RedisClient, RedisSubscriber } from "../drivers.ts";
import type { SyncMessage } from "../server.ts";
import { command, freePort, sleep, type TestContext, type TestServer, within } from "./harness.ts";

export interface BusOptions {
  /** Refuses a payload of more bytes, as PostgreSQL does. */
  limit?: number;
  /** Addresses one instance. */
  send?: boolean;
  /** How often a payload is delivered, and after how many ms each time. Default: once, at once. */
  fault?: (message: SyncMessage) => number[];
  /** What a publisher waits for besides. Default: nothing. */
  settled?: () => Promise<void>;
}

/** crossws's encoding, without a network. */
export class MemoryBus {
  /** Payloads published, those delivered to other instances, and the bytes of each. */
  readonly counts = { published: 0, delivered: 0, bytes: 0, deliveredBytes: 0 };
  /** Every payload, as it travelled. */
  readonly payloads: string[] = [];
  readonly #options: BusOptions;
  readonly #deliver: Map<string, (message: SyncMessage) => void> = new Map();
  readonly #timers: Set<ReturnType<typeof setTimeout>> = new Set();

  constructor(t: TestContext, options: BusOptions = {}) {
    this.#options = options;
    t.defer(() => {
      this.#deliver.clear(); // what is said from now on begins no timer
      this.#timers.forEach(clearTimeout);
    });
  }

  reset(): void {
    Object.assign(this.counts, { published: 0, delivered: 0, bytes: 0, deliveredBytes: 0 });
    this.payloads.length = 0;
  }

  /** How many drivers are subscribed. */
  get subscribed(): number {
    return this.#deliver.size;
  }

  /** As from an instance that nobody knows. */
  inject(message: SyncMessage): void {
    this.#publish("stranger", message);
  }

  readonly adapter: ClusterAdapter = ({ id }) => ({
    subscribe: (deliver) => void this.#deliver.set(id, deliver),
    publish: (message) => {
      this.#publish(id, message);
      return this.#options.settled?.();
    },
    ...this.#options.send && {
      send: (to: string, message: SyncMessage) => this.#publish(id, message, to),
    },
    close: () => void this.#deliver.delete(id),
  });

  #publish(id: string, message: SyncMessage, to?: string): void {
    const payload = encodeEnvelope(id, message);
    const counts = isPresence(message) ? { ...this.counts } : this.counts;
    const size = new TextEncoder().encode(payload).length;
    if (size >= (this.#options.limit ?? Infinity)) throw new Error(`payload too long: ${size}`);
    counts.published++;
    counts.bytes += size;
    this.payloads.push(payload);
    const delays = this.#options.fault?.(message) ?? [0];
    for (const name of this.#deliver.keys()) {
      if (name === id || to !== undefined && name !== to) continue;
      counts.delivered++;
      counts.deliveredBytes += size;
      for (const delay of delays) {
        const timer = setTimeout(() => {
          this.#timers.delete(timer);
          this.#deliver.get(name)?.(decodeEnvelope(payload)!.msg);
        }, delay);
        this.#timers.add(timer);
      }
    }
  }
}

/** A Redis in memory, with a client for each instance, whose hearing alone can be lost. */
export function memoryRedis(count: number): MemoryRedis[] {
  const all: MemoryRedis[] = [];
  for (let n = 0; n < count; n++) all.push(new MemoryRedis(all));
  return all;
}

export class MemoryRedis implements RedisClient, RedisSubscriber {
  readonly status = "end"; // it is never waited for
  isDeaf = false;
  isDown = false;
  /** How many messages it has published. */
  said = 0;
  readonly #all: MemoryRedis[];
  readonly #channels: Set<string> = new Set();
  #take: (channel: string, payload: string) => void = () => {};

  constructor(all: MemoryRedis[]) {
    this.#all = all;
  }

  duplicate(): this {
    return this;
  }

  on(event: string, listener: (channel: string, payload: string) => void): void {
    if (event === "smessage") this.#take = listener;
  }

  async ssubscribe(channel: string): Promise<void> {
    await undefined;
    this.#channels.add(channel);
  }

  async sunsubscribe(channel: string): Promise<void> {
    await undefined;
    this.#channels.delete(channel);
  }

  async spublish(channel: string, payload: string): Promise<void> {
    this.said++;
    await undefined;
    if (this.isDown) throw new Error("it is down");
    for (const one of this.#all) {
      if (one.#channels.has(channel) && !one.isDeaf) one.#take(channel, payload);
    }
  }

  disconnect(): void {}
}

/** What a message says, where bytes are text. */
export function textOf({ data }: Pick<SyncMessage, "data">): string {
  return typeof data === "string" ? data : new TextDecoder("latin1").decode(data);
}

/** As anybody can say it: that the instance which a request was sent to does not know its session. */
export function unknown(message: SyncMessage): SyncMessage | undefined {
  const [, id, topic] = /"kind":"request","id":"(\w+)","from":"(\w+)"/.exec(textOf(message)) ?? [];
  if (!id || !topic) return;
  const head = `{"kind":"unknown","id":"${id}"}`;
  const said = new Uint8Array(25 + 36 + head.length);
  said[0] = said[24] = 1;
  said[60] = head.length;
  said.set(new TextEncoder().encode(head), 61);
  return { namespace: "\0duplex", topic, data: said };
}

/** What every instance says of itself now and then is not counted. */
function isPresence({ topic, data }: SyncMessage): boolean {
  return topic === "*" && typeof data !== "string" &&
    /"kind":"(present|bye)"/.test(new TextDecoder("latin1").decode(data.subarray(0, 200)));
}

/** A Redis of the test's own, that keeps nothing. */
export class RedisServer implements AsyncDisposable {
  readonly port: number;
  #child: ChildProcess | undefined;

  static async start(t: TestContext): Promise<RedisServer> {
    const server = t.use(new RedisServer(await freePort()));
    await server.start();
    return server;
  }

  private constructor(port: number) {
    this.port = port;
  }

  /** How the fixtures are told of it. */
  get env(): Record<string, string> {
    return { REDIS_PORT: `${this.port}` };
  }

  async start(): Promise<void> {
    const args = `--port ${this.port} --bind 127.0.0.1 --appendonly no --save`.split(" ");
    const child = this.#child = spawn(command("redis-server")!, [...args, ""]);
    child.stderr!.resume();
    await within(
      new Promise<void>((resolve, reject) => {
        child.on("error", reject);
        child.stdout!.on("data", (text) => /Ready to accept/.test(String(text)) && resolve());
      }),
      10_000,
      "starting Redis",
    );
  }

  signal(name: "SIGSTOP" | "SIGCONT"): void {
    process.kill(this.#child!.pid!, name); // Deno's child.kill works but once
  }

  async kill(): Promise<void> {
    const child = this.#child;
    this.#child = undefined;
    if (!child) return;
    const exited = new Promise((resolve) => child.on("exit", resolve));
    process.kill(child.pid!, "SIGKILL");
    await exited;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.kill();
  }
}

/** A NATS of the test's own. */
export class NatsServer implements AsyncDisposable {
  readonly port: number;
  #child: ChildProcess | undefined;

  static async start(t: TestContext): Promise<NatsServer> {
    const server = t.use(new NatsServer(await freePort()));
    await server.start();
    return server;
  }

  private constructor(port: number) {
    this.port = port;
  }

  async start(): Promise<void> {
    const child = this.#child = spawn(command("nats-server")!, [
      ...["-a", "127.0.0.1", "-p", `${this.port}`],
    ]);
    child.stdout!.resume();
    await within(
      new Promise<void>((resolve, reject) => {
        child.on("error", reject);
        child.stderr!.on("data", (text) => /Server is ready/.test(String(text)) && resolve());
      }),
      10_000,
      "starting NATS",
    );
  }

  async kill(): Promise<void> {
    const child = this.#child;
    this.#child = undefined;
    if (!child) return;
    const exited = new Promise((resolve) => child.on("exit", resolve));
    process.kill(child.pid!, "SIGKILL");
    await exited;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.kill();
  }
}

/** A PostgreSQL of the test's own, in a temporary folder. */
export class PostgresServer implements AsyncDisposable {
  readonly port: number;
  readonly #folder: string;
  #child: ChildProcess | undefined;

  static async start(t: TestContext): Promise<PostgresServer> {
    const folder = await mkdtemp(join(tmpdir(), "duplex-postgres-"));
    const server = t.use(new PostgresServer(await freePort(), folder));
    await server.#initialize();
    await server.start();
    return server;
  }

  private constructor(port: number, folder: string) {
    this.port = port;
    this.#folder = folder;
  }

  /** How the fixtures are told of it. */
  get env(): Record<string, string> {
    return { DATABASE_URL: `postgres://test@127.0.0.1:${this.port}/postgres` };
  }

  async #initialize(): Promise<void> {
    const data = join(this.#folder, "data");
    const initdb = this.#spawn("initdb", `-D ${data} -U test -A trust -E UTF8 --no-locale -N`);
    await within(
      new Promise<void>((resolve, reject) => {
        initdb.on("error", reject);
        initdb.on("exit", (code) => code ? reject(new Error(`initdb: ${code}`)) : resolve());
        initdb.stdout!.resume();
        initdb.stderr!.resume();
      }),
      30_000,
      "initdb",
    );
  }

  async start(): Promise<void> {
    const data = join(this.#folder, "data");
    const options = `-D ${data} -p ${this.port} -h 127.0.0.1 -k ${this.#folder} -F`;
    const child = this.#child = this.#spawn("postgres", options);
    child.stdout!.resume();
    await within(
      new Promise<void>((resolve, reject) => {
        child.on("error", reject);
        child.stderr!.on("data", (text) => /ready to accept/.test(String(text)) && resolve());
      }),
      20_000,
      "starting PostgreSQL",
    );
  }

  /** PostgreSQL refuses to run as root: then it runs as nobody. */
  #spawn(name: string, options: string): ChildProcess {
    const args = options.split(" ");
    const file = join(dirname(command("postgres")!), name);
    if (process.getuid!() !== 0) return spawn(file, args);
    chownSync(this.#folder, 65534, 65534);
    const user = ["--reuid=65534", "--regid=65534", "--clear-groups"];
    return spawn("setpriv", [...user, file, ...args]);
  }

  async kill(): Promise<void> {
    const child = this.#child;
    this.#child = undefined;
    if (!child) return;
    const exited = new Promise((resolve) => child.on("exit", resolve));
    process.kill(child.pid!, "SIGQUIT"); // at once, and its processes with it
    await exited;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.kill();
    await rm(this.#folder, { recursive: true, force: true });
  }
}

export interface RoundRobin extends TestServer {
  /** The ports behind it; one that answers nothing is passed over, as a health check would. */
  readonly ports: number[];
  /** Where each request went: method and index of the port. */
  readonly log: string[];
  /** Chooses for the next requests, by the method; undefined: the next in turn. */
  choose: ((request: Request) => number | undefined) | undefined;
  /** How long a request waits before it goes on, and each piece of its answer; in ms. Default: 0. */
  latency: number;
}

/** A proxy that knows nothing of sessions: every request goes to the next instance. */
export async function roundRobin(t: TestContext, ports: number[]): Promise<RoundRobin> {
  let turn = 0;
  const log: string[] = [];
  let rr: RoundRobin | undefined;
  const server = await t.serve(async (request, info) => {
    info?.timeout?.(request, 0); // Bun
    const at = rr?.choose?.(request) ?? turn++ % ports.length;
    log.push(`${request.method} ${at}`);
    const { pathname, search } = new URL(request.url);
    const headers = new Headers(request.headers);
    for (const name of ["host", "connection", "accept-encoding"]) headers.delete(name);
    const latency = rr?.latency ?? 0;
    if (latency) await sleep(latency, t.signal);
    try {
      const response = await fetch(`http://127.0.0.1:${ports[at]}${pathname}${search}`, {
        method: request.method,
        headers,
        redirect: "manual",
        signal: t.signal, // an answer that comes after the test would stay unread
        ...request.body && { body: request.body, duplex: "half" },
      } as RequestInit);
      const { body, status, headers: answered } = response;
      if (latency && !body) await sleep(latency, t.signal);
      const cut = body && untilCut(body);
      const late = latency && cut ? cut.pipeThrough(delayed(latency)) : cut;
      return new Response(late, { status, headers: answered });
    } catch {
      return new Response("Bad gateway", { status: 502 });
    }
  });
  return rr = Object.assign(server, { ports, log, choose: undefined, latency: 0 });
}

/** Passes each piece on after a time, however many are under way. */
function delayed(latency: number): TransformStream<Uint8Array, Uint8Array> {
  let line = Promise.resolve();
  return new TransformStream({
    transform(piece, controller) {
      const due = performance.now() + latency;
      line = line.then(() => sleep(Math.max(0, due - performance.now()))).then(() => {
        try {
          controller.enqueue(piece);
        } catch {
          // nobody reads any more
        }
      });
    },
    flush: () => line,
  });
}

/** Ends where what it passes on breaks off: runtimes print the error of a body that they send. */
function untilCut(body: ReadableStream<Uint8Array>): ReadableStream<Uint8Array> {
  const reader = body.getReader();
  return new ReadableStream({
    async pull(controller) {
      const { done, value } = await reader.read().catch(() => ({ done: true, value: undefined }));
      if (done) controller.close();
      else controller.enqueue(value!);
    },
    cancel: (reason) => reader.cancel(reason),
  }, { highWaterMark: 0 });
}
