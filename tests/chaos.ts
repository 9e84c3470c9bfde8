/**
 * A proxy that does to connections what bad networks do: it cuts them at any
 * byte, delays them, lets them fall silent without closing, refuses new ones,
 * and repeats requests that it recorded. It works on TCP, below HTTP.
 *
 * @module
 */
import net from "node:net";
import process from "node:process";
import { note } from "./harness.ts";
import { mulberry32 } from "./random.ts";
import { rawRequest, type RawResponse } from "./raw.ts";
import { concat, RequestSplitter } from "./split.ts";

/** From and to, in milliseconds: each time a value between is drawn. */
export type Range = [least: number, most: number];

export interface ChaosOptions {
  /** Default: the environment's DUPLEX_SEED, else a random one. */
  seed?: number;
  /** How long a connection lives before it is cut; never by default. */
  cutEvery?: Range;
  /** How long each piece is held back; order is kept. */
  delay?: number | Range;
  /** How probable it is (0 to 1) that a cut is a silence instead. */
  stall?: number;
  /** Now and then, for a while, new connections are refused. */
  refuse?: { every: Range; for: Range };
  /** Which requests to record, judged by their heads. */
  record?: (head: string) => boolean;
}

/** A request as it passed the proxy, byte for byte. */
export interface Recording {
  readonly head: string;
  /** Everything seen of it until now, its head included. */
  bytes(): Uint8Array;
  /** False while it goes on, and if it was cut. */
  readonly complete: boolean;
}

export interface ChaosStats {
  connections: number;
  cuts: number;
  stalls: number;
  refusals: number;
  /** Bytes forwarded to the server and to the client. */
  up: number;
  down: number;
}

export interface ChaosProxy extends AsyncDisposable {
  /** Without a slash at its end, as `http://127.0.0.1:8000`. */
  readonly url: string;
  readonly port: number;
  readonly seed: number;
  readonly stats: ChaosStats;
  readonly recordings: Recording[];
  /** Connections open now, silent ones included. */
  readonly open: number;
  /** Cuts every connection at once, by RST or else as drawn. */
  cutAll(how?: "rst" | "fin"): void;
  /**
   * Nothing passes any more and nothing closes, as on a dead network. New
   * connections fall silent too, unless `newcomers` is false.
   */
  stallAll(options?: { newcomers?: boolean }): void;
  /** Ends every silence; nothing was lost by it. */
  resumeAll(): void;
  /** Resets every new connection for a while. */
  refuse(milliseconds: number): void;
  /** Ends automatic cuts, silences and refusals; connections live on. */
  calm(): void;
  /** Sends a recorded request again, straight to the server. */
  replay(recording: Recording): Promise<RawResponse>;
  close(): Promise<void>;
}

/** The environment's DUPLEX_SEED, to repeat a failure, else a random seed. */
export function pickSeed(): number {
  const given = process.env.DUPLEX_SEED;
  return given ? Number(given) : Math.floor(Math.random() * 2 ** 32);
}

/** Starts a proxy in front of a port. Its seed is printed if the test fails. */
export async function chaos(
  targetPort: number,
  options: ChaosOptions = {},
): Promise<ChaosProxy> {
  const proxy = new TcpProxy(targetPort, options);
  note(`DUPLEX_SEED=${proxy.seed}`);
  await proxy.listen();
  return proxy;
}

/** What is held back in each direction before the sender feels it. */
const HELD = 64 * 1024;
/** The last part of a life: the cut comes with a byte, or after this (ms). */
const CUT_GRACE = 20;

class TcpProxy implements ChaosProxy {
  readonly seed: number;
  readonly stats: ChaosStats = {
    connections: 0,
    cuts: 0,
    stalls: 0,
    refusals: 0,
    up: 0,
    down: 0,
  };
  readonly recordings: Recording[] = [];
  readonly options: ChaosOptions;
  readonly random: () => number;
  readonly links = new Set<Link>();
  port = 0;
  wild = true;
  #target: number;
  #server: net.Server;
  #refusedUntil = 0;
  #stallNewcomers = false;
  #timers = new Set<ReturnType<typeof setTimeout>>();
  #closing: Promise<void> | undefined;

  constructor(target: number, options: ChaosOptions) {
    this.#target = target;
    this.options = options;
    this.seed = options.seed ?? pickSeed();
    this.random = mulberry32(this.seed);
    // A half-closed connection stays open the other way, as without a proxy.
    this.#server = net.createServer(
      { allowHalfOpen: true, noDelay: true },
      (socket) => this.#accept(socket),
    );
  }

  get url(): string {
    return `http://127.0.0.1:${this.port}`;
  }

  get open(): number {
    return this.links.size;
  }

  async listen(): Promise<void> {
    await new Promise<void>((resolve, reject) => {
      this.#server.once("error", reject);
      this.#server.listen(0, "127.0.0.1", resolve);
    });
    this.port = (this.#server.address() as net.AddressInfo).port;
    this.#scheduleRefusal();
  }

  cutAll(how?: "rst" | "fin"): void {
    for (const link of this.links) link.cut(how);
  }

  stallAll({ newcomers = true } = {}): void {
    this.#stallNewcomers = newcomers;
    for (const link of this.links) link.stall();
  }

  resumeAll(): void {
    this.#stallNewcomers = false;
    for (const link of this.links) link.resume();
  }

  refuse(milliseconds: number): void {
    const until = performance.now() + milliseconds;
    this.#refusedUntil = Math.max(this.#refusedUntil, until);
  }

  calm(): void {
    this.wild = false;
    this.#refusedUntil = 0;
    for (const link of this.links) link.spare();
    this.resumeAll();
  }

  replay(recording: Recording): Promise<RawResponse> {
    return rawRequest(this.#target, recording.bytes());
  }

  close(): Promise<void> {
    return this.#closing ??= this.#close();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  /** A timer that `close` ends. */
  after(milliseconds: number, action: () => void): void {
    const timer = setTimeout(() => {
      this.#timers.delete(timer);
      action();
    }, milliseconds);
    this.#timers.add(timer);
  }

  between([least, most]: Range): number {
    return least + this.random() * (most - least);
  }

  async #close(): Promise<void> {
    for (const timer of this.#timers) clearTimeout(timer);
    this.#timers.clear();
    const closed = new Promise((resolve) => this.#server.close(resolve));
    await Promise.all([...this.links].map((link) => link.end()));
    await closed;
  }

  #accept(client: net.Socket): void {
    if (performance.now() < this.#refusedUntil || this.#closing) {
      this.stats.refusals++;
      client.on("error", () => {});
      client.resetAndDestroy();
      return;
    }
    this.stats.connections++;
    const link = new Link(this, client, this.#target);
    this.links.add(link);
    link.closed.then(() => this.links.delete(link));
    if (this.#stallNewcomers) link.stall();
  }

  #scheduleRefusal(): void {
    const { refuse } = this.options;
    if (!refuse) return;
    this.after(this.between(refuse.every), () => {
      if (!this.wild) return;
      this.refuse(this.between(refuse.for));
      this.#scheduleRefusal();
    });
  }
}

/** One client's connection and its connection to the server. */
class Link {
  readonly closed: Promise<unknown>;
  #proxy: TcpProxy;
  #client: net.Socket;
  #server: net.Socket;
  #directions: Direction[];

  constructor(proxy: TcpProxy, client: net.Socket, target: number) {
    this.#proxy = proxy;
    this.#client = client;
    this.#server = net.connect({
      port: target,
      host: "127.0.0.1",
      allowHalfOpen: true,
      noDelay: true, // what is measured through it is not the wait of Nagle's algorithm
    });
    const { stats } = proxy;
    const record = recorder(proxy);
    this.#directions = [
      new Direction(this, proxy, client, this.#server, (data) => {
        stats.up += data.length;
        record?.(data);
      }),
      new Direction(this, proxy, this.#server, client, (data) => {
        stats.down += data.length;
      }),
    ];
    const sockets = [client, this.#server];
    this.closed = Promise.all(
      sockets.map((socket) => new Promise((done) => socket.on("close", done))),
    );
    if (proxy.options.cutEvery) {
      proxy.after(proxy.between(proxy.options.cutEvery), () => this.#doom());
    }
  }

  get stalled(): boolean {
    return this.#directions[0]!.stalled;
  }

  stall(): void {
    if (!this.stalled) this.#proxy.stats.stalls++;
    for (const direction of this.#directions) direction.stall();
  }

  resume(): void {
    for (const direction of this.#directions) direction.resume();
  }

  /** Takes back a cut that is due. */
  spare(): void {
    for (const direction of this.#directions) direction.cutAt(Infinity);
  }

  /** Ends both connections: by RST, or by FIN after a piece. */
  cut(
    how: "rst" | "fin" = this.#proxy.random() < 0.5 ? "rst" : "fin",
  ): void {
    if (this.#directions[0]!.stopped) return;
    this.#proxy.stats.cuts++;
    for (const direction of this.#directions) direction.stop();
    for (const socket of [this.#client, this.#server]) {
      if (how === "rst") socket.resetAndDestroy();
      // With a callback, so that the FIN is sent before the socket is gone.
      else socket.end(() => socket.destroy());
    }
    // A peer that has stopped reading would hold the FIN back for ever.
    if (how === "fin") this.#proxy.after(200, () => this.#destroy());
  }

  async end(): Promise<void> {
    for (const direction of this.#directions) direction.stop();
    this.#destroy();
    await this.closed;
  }

  /** One side is gone: so must be the other, unless the network is silent. */
  broken(): void {
    if (!this.stalled) this.end();
  }

  #destroy(): void {
    this.#client.destroy();
    this.#server.destroy();
  }

  /** The end of its life: silence, or a cut at some byte of a direction. */
  #doom(): void {
    const { random, options, wild } = this.#proxy;
    if (!wild || this.stalled) return;
    if (random() < (options.stall ?? 0)) return this.stall();
    const direction = this.#directions[random() < 0.5 ? 0 : 1]!;
    // Low numbers are the likelier: most requests and answers are short.
    direction.cutAt(Math.floor(4096 ** random()));
    this.#proxy.after(CUT_GRACE, () => {
      if (!direction.stopped && this.#proxy.wild) this.cut();
    });
  }
}

/** What flows one way over a link. */
class Direction {
  stalled = false;
  stopped = false;
  #link: Link;
  #proxy: TcpProxy;
  #from: net.Socket;
  #to: net.Socket;
  #see: (data: Uint8Array) => void;
  /** What the delay or a silence holds back; null is the end. */
  #held: (Uint8Array | null)[] = [];
  #heldBytes = 0;
  #ended = false;
  #broken = false;
  #cutAt = Infinity;
  #due = 0;

  constructor(
    link: Link,
    proxy: TcpProxy,
    from: net.Socket,
    to: net.Socket,
    see: (data: Uint8Array) => void,
  ) {
    this.#link = link;
    this.#proxy = proxy;
    this.#from = from;
    this.#to = to;
    this.#see = see;
    from.on("data", (data: Uint8Array) => this.#receive(data));
    from.on("end", () => this.#receive(null));
    from.on("error", () => {}); // "close" follows
    from.on("close", () => this.#ended || this.#break());
    to.on("drain", () => this.#flow());
  }

  stall(): void {
    this.stalled = true;
    this.#flow();
  }

  resume(): void {
    if (!this.stalled) return;
    this.stalled = false;
    if (this.#broken) return this.#link.broken();
    while (this.#held.length > 0 && !this.stopped) this.#forward();
    this.#flow();
  }

  /** Lets so many bytes more through, and cuts the link there. */
  cutAt(bytes: number): void {
    this.#cutAt = bytes;
  }

  stop(): void {
    this.stopped = true;
    this.#held.length = 0;
  }

  #receive(data: Uint8Array | null): void {
    this.#ended ||= data === null;
    if (this.stopped) return;
    this.#held.push(data);
    this.#heldBytes += data?.length ?? 0;
    const { delay } = this.#proxy.options;
    if (this.stalled) return;
    if (delay === undefined) return this.#forward();
    const now = performance.now();
    const wait = typeof delay === "number" ? delay : this.#proxy.between(delay);
    // Never before the piece in front of it.
    this.#due = Math.max(this.#due, now + wait);
    this.#proxy.after(this.#due - now, () => {
      if (!this.stalled && !this.stopped && this.#held.length > 0) {
        this.#forward();
      }
    });
    this.#flow();
  }

  #forward(): void {
    const data = this.#held.shift();
    if (!data) {
      this.#to.end();
      return;
    }
    this.#heldBytes -= data.length;
    const piece = data.subarray(0, this.#cutAt);
    this.#see(piece);
    this.#to.write(piece);
    this.#cutAt -= piece.length;
    if (this.#cutAt <= 0) this.#link.cut();
    else this.#flow();
  }

  /** Reads on only as far as the other end takes it. */
  #flow(): void {
    const full = this.#heldBytes > HELD || this.#to.writableNeedDrain;
    if (this.stalled || full) this.#from.pause();
    else if (!this.stopped) this.#from.resume();
  }

  #break(): void {
    this.#broken = true;
    this.#link.broken();
  }
}

/** Recordings are for tests: enough for any request that they repeat. */
const MOST_RECORDINGS = 1000;
const MOST_BYTES = 1024 * 1024;

/** Cuts what a client sends into requests and keeps the chosen ones. */
function recorder(proxy: TcpProxy): ((data: Uint8Array) => void) | undefined {
  const { record } = proxy.options;
  if (!record) return;
  let current: Tape | undefined;
  const splitter = new RequestSplitter({
    head(text) {
      const wanted = record(text) && proxy.recordings.length < MOST_RECORDINGS;
      current = wanted ? new Tape(text) : undefined;
      if (current) proxy.recordings.push(current);
    },
    data: (bytes) => current?.add(bytes),
    end() {
      if (current) current.complete = true;
    },
  });
  return (data) => splitter.push(data);
}

class Tape implements Recording {
  readonly head: string;
  complete = false;
  #parts: Uint8Array[] = [];
  #length = 0;

  constructor(head: string) {
    this.head = head;
  }

  add(bytes: Uint8Array): void {
    if (this.#length + bytes.length > MOST_BYTES) return;
    this.#length += bytes.length;
    this.#parts.push(bytes.slice());
  }

  bytes(): Uint8Array {
    return concat(this.#parts);
  }
}
