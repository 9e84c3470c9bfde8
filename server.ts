/**
 * The server of duplex-sse: everything a WebSocket does, over plain HTTP.
 *
 * The server speaks to a client by Server-Sent Events and hears from it by
 * POST requests, or by one POST that carries both directions. Each side numbers
 * what it sends and keeps it until the other side has acknowledged it, so that a
 * session outlives its connections: nothing is lost and nothing arrives twice.
 *
 * One file, no import: paste it into an edge function as it is (leave out its line
 * `export default` where the function has one of its own). It needs only `Request`,
 * `Response`, `ReadableStream` and timers. PROTOCOL.md specifies the wire; the
 * lines quoted in comments here are from there.
 *
 * @example Echo, on Deno and on Bun
 * ```ts ignore
 * import { sseAdapter } from "jsr:@duplex/sse/server";
 *
 * const ws = sseAdapter({
 *   bidir: true,
 *   hooks: {
 *     open: (peer) => void peer.send(`Welcome ${peer}`),
 *     message: (peer, message) => void peer.send(message.text()),
 *   },
 * });
 *
 * Deno.serve(ws.fetch); // or Bun.serve({ fetch: ws.fetch })
 * ```
 *
 * @module
 */

// --- The wire's vocabulary. The same lines stand in client.ts; a test compares them. ---

const VERSION = "1";
const UPLINK_TYPE = "application/websocket-events";
const STREAM_TYPE = "text/event-stream";
const TOKEN_HEADER = "x-crossws-id";
const VERSION_HEADER = "x-duplex-version";
const PROTOCOL_HEADER = "x-duplex-protocol";
const ATTEMPT_HEADER = "x-duplex-attempt";
const RECEIVED_HEADER = "x-duplex-received";
const OPENING_HEADER = "x-duplex-opening";
const POLL_HEADER = "x-duplex-poll";
const TOKEN_EVENT = "crossws-id";
const OPEN_EVENT = "duplex-open";
const JSON_EVENT = "duplex-json";
const BINARY_EVENT = "duplex-binary";
const ACK_EVENT = "duplex-ack";
const PING_EVENT = "duplex-ping";
const CLOSE_EVENT = "duplex-close";

// --- The server's own constants ---

/** The WebSocket header that hooks read and answer; a browser's fetch may not set it. */
const WEBSOCKET_PROTOCOL = "sec-websocket-protocol";
/** Where h3 and crossws leave the hooks that a request carries. */
const REQUEST_HOOKS: symbol = Symbol.for("crossws.hooks");
/** How `console.log` asks Node, Deno and Bun alike. */
const INSPECT: symbol = Symbol.for("nodejs.util.inspect.custom");

const TOKEN_GRAMMAR = /^[0-9a-f]{16}\.[0-9a-f]{32}$/;
const OPENING_GRAMMAR = /^[0-9a-f]{32}$/;
const EVENT_ID_GRAMMAR = /^([0-9a-f]{32})\.(0|[1-9]\d{0,15})$/;
const NUMBER_GRAMMAR = /^(0|[1-9]\d{0,15})$/;
const FRAME_GRAMMAR = /^(TEXT|BINARY|CLOSE|PING|PONG|ACK|SEQ)(?: ([0-9A-Fa-f]{1,8}))?\r\n$/;

/** The longest that a timer can wait, in ms. */
const MAX_DELAY = 2 ** 31 - 1;
/** The options that are numbers: default, least, most. Clients reckon with the first three. */
const NUMBERS = {
  heartbeatInterval: [15_000, 1, MAX_DELAY],
  resumeTimeout: [30_000, 0, MAX_DELAY],
  window: [256 * 1024, 1, MAX_DELAY],
  idleTimeout: [60, 0, Infinity],
  maxMessageSize: [1024 * 1024, 1, Infinity],
  maxBufferedAmount: [16 * 1024 * 1024, 0, Infinity],
  maxPeers: [100_000, 1, Infinity],
} as const;
/** Bun cuts a connection that is quiet for 10 s, unless told otherwise through `fetch`'s second argument. */
const UNATTENDED_HEARTBEAT_INTERVAL = 5_000;
/** How long a client has to answer a close where `resumeTimeout` is 0. */
const CLOSE_TIMEOUT = 5_000;
/** What a plain session keeps for a native EventSource that reconnects. */
const PLAIN_HISTORY = 64 * 1024;
/** The most that one chunk gathers, a single larger message aside. */
const MAX_CHUNK = 256 * 1024;
/** What a message that waits costs beside its bytes, roughly: small ones must not hold a hundred times the limit. */
const MESSAGE_COST = 200;
/** So many sessions flushed at once are a crowd: publications rest after it. */
const CROWD = 64;
/** The longest rest in ms, beyond the time that the event loop was busy. */
const MAX_REST = 20;
/** By then a rest is over, in ms, even if the runtime has stopped its timers. */
const STALLED = 1_000;
/** The most that a session holds back during a rest, in bytes: more would make its chunks no better. */
const MAX_HELD = 16 * 1024;
/** A session's bodies that are read at once: its messages, and control frames beside them. */
const MAX_BODIES = 2;
/** The longest header of a frame, and the largest payload of one that is no message. */
const MAX_HEADER = 20;
const MAX_CONTROL = 125;
/** Pings that may wait for a connection; beyond, the oldest is dropped. */
const MAX_PENDING_PINGS = 16;
/** Room for one read of a body, in bytes: while little comes, and once that was too little. */
const SMALL_READ = 2 * 1024;
const LARGE_READ = 64 * 1024;

/** The end of a session whose client was lost. */
const LOST = { code: 1006, reason: "" };

const OPEN = 1;
const CLOSING = 2;
const CLOSED = 3;

const encoder: TextEncoder = new TextEncoder();
const decoder: TextDecoder = new TextDecoder("utf-8", { ignoreBOM: true });
const strictDecoder: TextDecoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
const HEARTBEAT: Bytes = encoder.encode(":\n\n");
const TEXT_HEADER: Bytes = encoder.encode("TEXT ");
const EMPTY: Bytes = new Uint8Array();

type Bytes = Uint8Array<ArrayBuffer>;

// --- Types ---

/** A value, or a promise of it. */
export type MaybePromise<T> = T | Promise<T>;

/** What an `upgrade` hook may leave with a peer. */
// deno-lint-ignore no-explicit-any
export type PeerContext = Record<string, any>;

/** Anything that the `Headers` constructor takes. */
export type HeadersLike = NonNullable<ConstructorParameters<typeof Headers>[0]>;

/** A request as hooks see it: `context` is there when a framework put it there. */
export type UpgradeRequest = Request & { readonly context?: PeerContext };

/** What an `upgrade` hook may return to let a peer in. */
export interface UpgradeResult<Context = PeerContext> {
  /** Headers of the response that opens the session. */
  headers?: HeadersLike | undefined;
  /** The subprotocol chosen among those that the client offered. */
  protocol?: string | undefined;
  /** Where the peer lives: topics and `peer.peers` are per namespace. Default: the URL's path. */
  namespace?: string | undefined;
  /** Becomes `peer.context`. */
  context?: Context | undefined;
  /** Taken for crossws's sake, and ignored. */
  handled?: boolean | undefined;
  /** Taken for crossws's sake, and ignored: HTTP has its own compression. */
  perMessageDeflate?: unknown;
}

/** Why a session ended: a WebSocket close code and its reason. */
export interface CloseDetails {
  /** A WebSocket close code; 1005 when none was given, 1006 when the client was lost. */
  code?: number;
  /** At most 123 bytes of UTF-8. */
  reason?: string;
}

/**
 * What a server does at each step of a session. All are optional. A hook that
 * throws or rejects is reported to `error`, and its peer closed with 1011.
 */
export interface Hooks<Context = PeerContext> {
  /**
   * Asked before a session opens, and again for every request of it, so that
   * credentials are checked each time; there only a refusal counts. Return or
   * throw a `Response` (or `{ response }`) to refuse.
   */
  upgrade(
    request: UpgradeRequest,
  ): MaybePromise<UpgradeResult<Context> | Response | { response: Response } | void>;
  /** A session has begun: once a session, not once a connection. */
  open(peer: Peer<Context>): MaybePromise<void>;
  /**
   * A message has come, in order, exactly once. The next is not kept waiting: what this hook does
   * after an `await` may overlap with it.
   */
  message(peer: Peer<Context>, message: Message<Context>): MaybePromise<void>;
  /** A session has ended: once, with its code and reason. */
  close(peer: Peer<Context>, details: CloseDetails): MaybePromise<void>;
  /** A hook of this peer failed. */
  error(peer: Peer<Context>, error: Error): MaybePromise<void>;
  /** What was held back by a slow client has all been given to its connection. */
  drain(peer: Peer<Context>): MaybePromise<void>;
  /** The client's PING came: its keep-alive on a streaming uplink. */
  ping(peer: Peer<Context>, data: Uint8Array): MaybePromise<void>;
  /** The client answered a ping. */
  pong(peer: Peer<Context>, data: Uint8Array): MaybePromise<void>;
}

/** Options of {@link Peer.waitForDrain}. */
export interface WaitForDrainOptions {
  /** Resolve at this many buffered bytes or fewer. Default: 0. */
  threshold?: number | undefined;
  /** Taken for crossws's sake, and ignored: the event wakes the waiter, no polling. */
  pollInterval?: number | undefined;
  /** Rejects with the signal's reason when it aborts. */
  signal?: AbortSignal | undefined;
}

/** The WebSocket's face of a peer. */
export interface PeerWebSocket {
  /** 0 CONNECTING, 1 OPEN, 2 CLOSING, 3 CLOSED. */
  readonly readyState?: number;
  /** The chosen subprotocol, else what was offered, else "". */
  readonly protocol?: string;
  /** Always "". */
  readonly extensions?: string;
  /** The URL of the opening request, as `ws:` or `wss:`. */
  readonly url?: string;
  /** As {@link Peer.bufferedAmount}. */
  readonly bufferedAmount?: number;
  /** What `message.data` gives for binary messages: "arraybuffer", "blob", "uint8array", "text", … */
  binaryType?: string;
  /** As {@link Peer.send}. */
  // deno-lint-ignore no-explicit-any
  send?(data: any): void;
  /** As {@link Peer.close}. */
  close?(code?: number, reason?: string): void;
}

/**
 * One client's session, for as long as it lasts across dropped connections.
 *
 * @example
 * ```ts
 * import { defineHooks } from "@duplex/sse/server";
 *
 * const hooks = defineHooks({
 *   open(peer) {
 *     peer.subscribe("news");
 *     peer.send({ you: peer.id });
 *   },
 * });
 * ```
 */
export interface Peer<Context = PeerContext> {
  /** Public name of this peer: safe to show to others. It gives no power over the session. */
  readonly id: string;
  /** What `upgrade` returned. */
  readonly context: Context;
  /** The namespace; by default the path of the URL. */
  readonly namespace: string;
  /** The request that opened the session. */
  readonly request: Request;
  /** The client's IP address, where the runtime tells it. */
  readonly remoteAddress: string | undefined;
  /** The WebSocket's face of this peer. */
  readonly websocket: PeerWebSocket;
  /** All open peers of the namespace. */
  readonly peers: Set<Peer<Context>>;
  /** The topics that this peer is subscribed to: a copy, of which changes are no subscriptions. */
  readonly topics: Set<string>;
  /** Encoded bytes not yet given to the connection. */
  readonly bufferedAmount: number;
  /** Resolves when `bufferedAmount` is down to `threshold`, or the peer closed. */
  waitForDrain(options?: WaitForDrainOptions): Promise<void>;
  /**
   * Sends a message. Strings go as text, bytes as binary, plain objects as JSON; an array is taken
   * for bytes, as in crossws.
   * Returns the bytes queued, -1 when they must wait, 0 when the peer is closed.
   * A peer already past `maxBufferedAmount` is closed with 1013.
   */
  send(data: unknown, options?: { compress?: boolean }): number | void | undefined;
  /** Receives what is published to the topic, in this peer's namespace. */
  subscribe(topic: string): void;
  /** Ends a subscription. */
  unsubscribe(topic: string): void;
  /**
   * Sends to all other subscribers of the topic in this peer's namespace. Right after a
   * publication to 64 peers or more it waits while the runtime is writing that, and at most
   * 20 ms longer, so that what is published meanwhile shares chunks.
   */
  publish(topic: string, data: unknown, options?: { compress?: boolean }): void;
  /**
   * Closes after all that was sent before.
   *
   * @throws {RangeError} if the code is not one that may be sent (1000 to 1014
   * without 1004 to 1006, or 3000 to 4999), or the reason is over 123 bytes.
   */
  close(code?: number, reason?: string): void;
  /** Drops the session at once, with no word to the client, which sees 1006. */
  terminate(): void;
  /** Asks the client for a sign of life; at most 125 bytes. Answered by the `pong` hook. */
  ping(data?: unknown): number | void | undefined;
  /** The id. */
  toString(): string;
}

/** One message of a client. */
export interface Message<Context = PeerContext> {
  /** A random UUID, drawn when first asked for. */
  readonly id: string;
  /** Who sent it. */
  readonly peer?: Peer<Context>;
  /** Always undefined here: there is no DOM event behind it. */
  readonly event?: MessageEvent;
  /** A string for text, a `Uint8Array` for binary. */
  readonly rawData: unknown;
  /** By `peer.websocket.binaryType`; `rawData` when that is not set. */
  readonly data: unknown;
  /** The message as text. */
  text(): string;
  /** The message parsed as JSON. Throws a SyntaxError when it is none. */
  json<T = unknown>(): T;
  /** The message as bytes. */
  uint8Array(): Uint8Array;
  /** The message as a buffer that holds it and nothing else. */
  arrayBuffer(): ArrayBuffer | SharedArrayBuffer;
  /** The message as a Blob. */
  blob(): Blob;
  /** The same as {@link Message.text}. */
  toString(): string;
}

/** A publication on its way between instances: crossws's type. */
export interface SyncMessage {
  /** "" means all namespaces. */
  namespace: string;
  /** The topic published to. */
  topic: string;
  /** The message itself. */
  data: string | Uint8Array;
}

/** A connection to a backplane: crossws's type, so that its drivers plug in. */
export interface SyncDriver {
  /** Calls `deliver` for what other instances publish, never for its own. */
  subscribe(deliver: (message: SyncMessage) => void): MaybePromise<void>;
  /** Relays to the other instances. */
  publish(message: SyncMessage): MaybePromise<void>;
  /** Ends the connection. */
  close?(): MaybePromise<void>;
}

/** What a {@link RoutingDriver} gets of the server that it belongs to. */
export interface RoutingHost {
  /** The option of the same name. */
  readonly maxMessageSize: number;
  /** Whether the token is that of a session here, or of one that closed lately. */
  has(token: string): boolean;
  /** Serves a request that another instance has received, and admitted to a namespace. */
  fetch(request: Request, namespace: string): Promise<Response>;
  /** Tells `onError`. */
  report(error: unknown, stage: "subscribe" | "publish" | "delivery"): void;
}

/** A backplane that also takes requests to the instance that has their session: see `cluster`. */
export interface RoutingDriver extends SyncDriver {
  /** Called once, before anything else. */
  attach(host: RoutingHost): void;
  /** A session has begun here. */
  own(token: string): void;
  /** Answers as the instance does that has the session. Never throws. */
  route(request: Request, token: string, namespace: string): Promise<Response>;
}

/** Makes a {@link SyncDriver} for the instance with this id. */
export type SyncAdapter = (context: { id: string }) => SyncDriver;

/** Who may use the server from another origin. */
export type Cors =
  | boolean
  | "manual"
  | string[]
  | ((origin: string, request: Request) => boolean);

/** Options of {@link sseAdapter}. Times without another unit are milliseconds, sizes are bytes. */
export interface SSEOptions<Context = PeerContext> {
  /** Takes messages from clients. Default: false, as in crossws. */
  bidir?: boolean | undefined;
  /** What to do at each step of a session. */
  hooks?: Partial<Hooks<Context>> | undefined;
  /** Hooks by request, called after `hooks`. */
  // deno-lint-ignore no-explicit-any
  resolve?(request: UpgradeRequest): MaybePromise<Partial<Hooks<any>> | undefined | void>;
  /** The namespace of a request. Default: the path of its URL. */
  getNamespace?(request: Request): string;
  /** Chooses a subprotocol when no `upgrade` hook did. */
  handleProtocols?(
    offered: Set<string>,
    request: Request,
  ): MaybePromise<string | false | null | undefined>;
  /** Seconds of silence after which a client is asked (at half of it), then dropped. 0: never. Default: 60. */
  idleTimeout?: number | undefined;
  /** The longest that a stream is quiet, in ms. Default: 15000; 5000 when `fetch` got no second argument. */
  heartbeatInterval?: number | undefined;
  /** How long a session waits for its client to come back, in ms. 0: not at all. Default: 30000. */
  resumeTimeout?: number | undefined;
  /** The largest message taken, in bytes. Beyond: 413, close code 1009. Default: 1 MiB. */
  maxMessageSize?: number | undefined;
  /** A peer with more bytes than this held back is closed with 1013 at the next send. Default: 16 MiB. */
  maxBufferedAmount?: number | undefined;
  /** Bytes that may be under way unacknowledged, each way. Default: 256 KiB. */
  window?: number | undefined;
  /** Sessions at once; beyond: 503. Default: 100,000. */
  maxPeers?: number | undefined;
  /**
   * Other origins: `true` for any (without credentials), a list, or a function.
   * "manual" leaves it to your own middleware. Default: false, cross-site requests get 403.
   */
  cors?: Cors | undefined;
  /** Relays publications to other instances; with `cluster(driver)`, any of them takes any request. */
  sync?: SyncAdapter | undefined;
  /** Told when `sync` fails. Default: `console.error`. */
  onError?(error: unknown, context: { stage: "subscribe" | "publish" | "delivery" }): void;
  /** Taken for crossws's sake, and ignored. */
  perMessageDeflate?: unknown;
  /** Taken for crossws's sake, and ignored. */
  compress?: unknown;
}

/** What {@link sseAdapter} returns. Every member may be passed around on its own. */
export interface SSEAdapter<Context = PeerContext> {
  /**
   * Answers every request of this protocol, never throws. The second argument is
   * the runtime's own: Deno's `info`, Bun's `server`, Hono's bindings on Node; of anything else
   * what looks like `remoteAddr.hostname` is used.
   */
  fetch: (request: Request, info?: unknown) => Promise<Response>;
  /**
   * Whether a request is for {@link SSEAdapter.fetch}, for servers that have other routes. By its
   * headers alone: whatever accepts an event stream or names a session and, with `cors`, the
   * preflights of such requests.
   */
  handles: (request: Request) => boolean;
  /** Open peers by namespace. */
  readonly peers: Map<string, Set<Peer<Context>>>;
  /** Sends to every subscriber of the topic, in one namespace or in all, as {@link Peer.publish} does. */
  publish: (
    topic: string,
    data: unknown,
    options?: { compress?: boolean; namespace?: string },
  ) => void;
  /**
   * Shuts down: newcomers get 503, every peer is closed after what was sent to it
   * (default code: 1001); resolves when all have gone. Who is away is waited for as long as
   * `resumeTimeout`, or until `signal` aborts: then the rest is terminated.
   *
   * @throws {RangeError} if the code may not be sent, or the reason is over 123 bytes.
   */
  close: (code?: number, reason?: string, options?: { signal?: AbortSignal }) => Promise<void>;
  /** The backplane, when `sync` was given. */
  readonly sync?: SyncDriver | undefined;
  /** The same as `close()`. */
  [Symbol.asyncDispose](): Promise<void>;
}

// --- Public surface ---

/**
 * Makes a server. Hand its `fetch` to a runtime, or call it from your own router.
 *
 * @throws {RangeError} if a number among the options is NaN or too low, or if `heartbeatInterval`,
 * `resumeTimeout` or `window`, by which clients reckon, is over 2147483647.
 *
 * @example Beside other routes
 * ```ts
 * import { sseAdapter } from "@duplex/sse/server";
 *
 * const ws = sseAdapter({
 *   bidir: true,
 *   hooks: {
 *     upgrade: () => ({ context: { since: Date.now() } }),
 *     open: (peer) => peer.subscribe("chat"),
 *     message: (peer, message) => peer.publish("chat", message.text()),
 *   },
 * });
 *
 * const handler = (request: Request, info?: unknown) =>
 *   ws.handles(request) ? ws.fetch(request, info) : new Response("Hello");
 * ```
 */
export function sseAdapter<Context extends PeerContext = PeerContext>(
  options: SSEOptions<Context> = {},
): SSEAdapter<Context> {
  const hub = new Hub(options as SSEOptions);
  return {
    fetch: (request, info) => hub.fetch(request, info),
    handles: (request) => hub.handles(request),
    publish: (topic, data, options) => hub.publish(topic, data, options?.namespace),
    close: (code, reason, options) => hub.close(code, reason, options),
    peers: hub.peers as unknown as Map<string, Set<Peer<Context>>>,
    sync: hub.sync,
    [Symbol.asyncDispose]: () => hub.close(),
  };
}

export default sseAdapter;

/**
 * Returns the hooks it is given, typed: for hooks that live in a file of their own.
 *
 * @example
 * ```ts
 * import { defineHooks } from "@duplex/sse/server";
 *
 * export const echo = defineHooks({
 *   message(peer, message) {
 *     peer.send(message.text());
 *   },
 * });
 * ```
 */
export function defineHooks<Context extends PeerContext = PeerContext>(
  hooks: Partial<Hooks<Context>>,
): Partial<Hooks<Context>> {
  return hooks;
}

// --- The hub: all sessions of one adapter ---

/** Answers requests, finds the session they are for, and keeps the one timer. */
class Hub implements Host, Peers {
  readonly options: SSEOptions;
  readonly bidir: boolean;
  readonly heartbeatInterval: number;
  readonly resumeTimeout: number;
  readonly idleTimeout: number;
  readonly maxMessageSize: number;
  readonly maxBufferedAmount: number;
  readonly window: number;
  readonly maxPeers: number;
  /** The most that a session holds back during a rest: nowhere near `maxBufferedAmount`. */
  readonly mostHeld: number;
  /** How long a client has to answer a close, and to take the last bytes. */
  readonly closeTimeout: number;
  readonly sync: SyncDriver | undefined;
  readonly peers: Map<string, Set<Peer>> = new Map();
  readonly sessions: Map<string, FullSession | PlainSession> = new Map();
  /** Ended sessions whose last bytes are still to be taken. */
  readonly lingering: Set<Session> = new Set();
  readonly flusher: Flusher = new Flusher();

  /** Subscribers by namespace and topic, so that publishing never looks at anyone else. */
  readonly #topics: Map<string, Map<string, Set<Session>>> = new Map();
  /** What is left of closed sessions, by token; of plain ones, by the key of their event ids. */
  readonly #tombstones: Map<string, Tombstone> = new Map();
  /** Full sessions by the id of their opening, until their client shows that it has the token. */
  readonly #openings: Map<string, FullSession> = new Map();
  /** Plain sessions by the key of their event ids. */
  readonly #keys: Map<string, PlainSession> = new Map();
  #sweepTimer: ReturnType<typeof setTimeout> | undefined;
  /** When that timer is due; Infinity while nothing has a deadline. */
  #nextSweep = Infinity;
  /** The first half of every token. */
  #instance: string | undefined;
  #router: RoutingDriver | undefined;
  /** Routed requests: another instance has asked `upgrade`, and this is the namespace. */
  readonly #admitted: WeakMap<Request, string> = new WeakMap();
  /** While hooks open or close a session: the close hooks that are to follow. */
  #calls: (() => void)[] | undefined;
  #closing = false;
  #whenEmpty: (() => void)[] = [];

  constructor(options: SSEOptions) {
    this.options = options;
    this.bidir = options.bidir ?? false;
    this.heartbeatInterval = numberOf(options, "heartbeatInterval");
    this.resumeTimeout = numberOf(options, "resumeTimeout");
    this.closeTimeout = this.resumeTimeout || CLOSE_TIMEOUT;
    this.idleTimeout = numberOf(options, "idleTimeout") * 1000;
    this.maxMessageSize = numberOf(options, "maxMessageSize");
    this.maxBufferedAmount = numberOf(options, "maxBufferedAmount");
    this.mostHeld = Math.min(MAX_HELD, this.maxBufferedAmount / 2);
    this.window = numberOf(options, "window");
    this.maxPeers = numberOf(options, "maxPeers");
    this.sync = options.sync && this.#connectSync(options.sync);
  }

  // --- Requests ---

  handles(request: Request): boolean {
    return request.headers.has(TOKEN_HEADER) ||
      /(^|,)\s*text\/event-stream\s*(;|,|$)/i.test(request.headers.get("accept") ?? "") ||
      // Each request of ours has a header that has to be asked for; other preflights are the app's.
      isPreflight(request, this.options.cors) &&
        /x-(duplex|crossws)-/i.test(request.headers.get("access-control-request-headers") ?? "");
  }

  async fetch(request: Request, info?: unknown): Promise<Response> {
    const { cors } = this.options;
    let permission: Headers | undefined;
    let response: Response;
    try {
      // "Deadlines are also checked on every request": some runtimes stop timers between requests.
      if (clock() >= this.#nextSweep) this.#sweep();
      permission = checkOrigin(request, cors);
      response = isPreflight(request, cors)
        ? preflight(request)
        : await this.#route(request, info as Runtime);
    } catch (error) {
      response = error instanceof Response ? error : refuse(request, error);
    }
    if (!permission || !response.status) return response; // Response.error() has none, and takes no headers
    try {
      addHeaders(response.headers, permission);
      return response;
    } catch { // a hook's Response may have immutable headers
      const headers = new Headers(response.headers);
      addHeaders(headers, permission);
      return new Response(response.body, { status: response.status, headers });
    }
  }

  /** Decides what a request is: opening, resumption or uplink, of a plain or of a full session. */
  async #route(request: Request, runtime: Runtime): Promise<Response> {
    liftIdleCut(request, runtime);
    if (request.method !== "GET" && request.method !== "POST") {
      throw new Refusal(405, "Use GET or POST", { headers: { allow: "GET, POST" } });
    }
    const wire = readWire(request);
    if (this.#router && wire.token && !wire.token.startsWith(`${this.#instance}.`)) {
      return await this.#forward(this.#router, request, wire.token);
    }
    if (request.method === "GET") {
      if (!acceptsStream(request)) throw new Refusal(406, "This answers with text/event-stream");
      if (wire.token) return await this.#resume(request, wire);
      return await this.#resumePlain(request, wire) ?? await this.#open(request, wire, runtime);
    }
    const duplex = request.headers.get("accept") === STREAM_TYPE;
    if (wire.token) {
      if (!wire.isUplink) return await this.#receivePlain(request, wire.token);
      return duplex ? await this.#resume(request, wire) : await this.#receive(request, wire);
    }
    // "Only with x-duplex-version: 1, Accept: text/event-stream and a body. Any other POST without a
    // token is 400, so that no cross-site form reaches a hook."
    const empty = !request.body || request.headers.get("content-length") === "0";
    if (wire.full && wire.isUplink && duplex && !empty) {
      return await this.#open(request, wire, runtime);
    }
    throw new Refusal(400, `Missing ${TOKEN_HEADER}`);
  }

  async #open(request: Request, wire: Wire, runtime: Runtime): Promise<Response> {
    if (!this.#openings.has(wire.opening)) this.#checkRoom();
    const admission = await this.#admit(request);
    const begun = this.#openings.get(wire.opening);
    if (begun?.namespace === admission.namespace) {
      return this.#openAgain(begun, request, wire, admission);
    }
    this.#checkRoom(); // again: others came while the hook was thinking
    const token = `${this.#instance ??= randomHex(8)}.${randomHex(16)}`;
    const opening = { token, request, admission, runtime };
    const session = wire.full ? new FullSession(this, opening) : new PlainSession(this, opening);
    if (session instanceof FullSession && wire.opening) {
      session.opening = wire.opening;
      this.#openings.set(wire.opening, session);
    }
    session.peer = new ServerPeer(session, this);
    this.sessions.set(token, session);
    this.#router?.own(token);
    if (session instanceof PlainSession) this.#keys.set(session.key, session);
    getOrMake(this.peers, session.namespace, () => new Set()).add(session.peer);
    this.#startTimer();
    const stream = session.attach(wire.attempt ?? 0, 0, wire.isPoll ? "preface" : "for good");
    // Before the hook, so that one that ends the session ends its body, too; a read comes after it.
    if (session instanceof FullSession && request.method === "POST") {
      session.readDuplex(request.body!);
    }
    this.inTurn(() => session.callHooks("open"));
    return new Response(stream, { headers: this.#headersOf(session, admission) });
  }

  /**
   * "An opening with an x-duplex-opening that the server has seen, from a client that has not
   * shown yet that it has the token, opens no second session: it replaces the connection of the
   * first."
   */
  #openAgain(
    session: FullSession,
    request: Request,
    wire: Wire,
    admission: Admission,
  ): Response {
    if (!session.canResumeFrom(0)) throw new Refusal(409, "This session has begun");
    const stream = session.attach(0, 0, wire.isPoll ? "preface" : "for good");
    if (request.method === "POST") session.readDuplex(request.body!);
    return new Response(stream, { headers: this.#headersOf(session, admission) });
  }

  /**
   * "A request like the opening one, with the token, Last-Event-ID (the number of the last
   * message received, which also acknowledges it) and x-duplex-attempt, which grows with every try."
   */
  async #resume(request: Request, wire: Wire): Promise<Response> {
    if (!wire.full || wire.attempt === undefined || wire.lastEventId === undefined) {
      throw new Refusal(
        400,
        `A resume needs ${VERSION_HEADER}, ${ATTEMPT_HEADER} and Last-Event-ID`,
      );
    }
    const session = await this.#readmit(request, wire.token!);
    if (session instanceof Tombstone) return this.#unearth(request, wire, session);
    if (!session) throw new Refusal(404, "No such session");
    if (!(session instanceof FullSession)) {
      throw new Refusal(400, "A plain session resumes by Last-Event-ID alone");
    }
    // "The highest attempt wins and ends the older stream; a lower one gets 409 and changes nothing."
    if (wire.attempt < session.attempt) throw new Refusal(409, "A newer connection has taken over");
    if (!session.canResumeFrom(wire.lastEventId)) {
      throw new Refusal(409, "Last-Event-ID is not of this session");
    }
    session.heard();
    this.#openings.delete(session.opening);
    const stream = session.attach(
      wire.attempt,
      wire.lastEventId,
      wire.isPoll ? "news" : "for good",
    );
    if (request.method === "POST" && request.body) session.readDuplex(request.body);
    return new Response(stream, { headers: this.#headersOf(session) });
  }

  /** A session that has closed meanwhile says so once more, for whoever missed it. */
  #unearth(request: Request, wire: Wire, tombstone: Tombstone): Response {
    request.body?.cancel().catch(() => {}); // a streaming one would not end before this answer
    const preface = this.preface({
      protocol: "",
      uplink: tombstone.uplink,
      attempt: wire.attempt!,
      heartbeatInterval: this.heartbeatInterval,
    }, wire.lastEventId! + 1);
    const body = concat([encoder.encode(preface), encodeClose(CLOSE_EVENT, tombstone.ending)]);
    return new Response(body, { headers: streamHeaders(true, wire.token!) });
  }

  /**
   * A native EventSource repeats the id of the last event it had. "A session closed
   * meanwhile answers 204, which stops an EventSource; an unknown or expired id opens a new session."
   */
  async #resumePlain(request: Request, wire: Wire): Promise<Response | undefined> {
    const id = request.headers.get("last-event-id") ?? "";
    const [, key, received] = EVENT_ID_GRAMMAR.exec(id) ?? [];
    if (wire.full || !key) return;
    const session = this.#keys.get(key);
    const resumable = () => session?.canResumeFrom(Number(received));
    // One that cannot be resumed is left alone: `upgrade` is asked for the session that opens.
    const found = resumable() && await this.#readmit(request, session!.token);
    const ends = this.#tombstones.has(key) || session?.readyState === CLOSING;
    if (ends) return new Response(null, { status: 204 });
    if (!session || found !== session || !resumable()) return;
    const stream = session.attach(session.attempt, Number(received), "for good");
    return new Response(stream, { headers: this.#headersOf(session) });
  }

  /** The uplink of a full session: numbered frames. */
  async #receive(request: Request, wire: Wire): Promise<Response> {
    const receiver = await this.#readmit(request, wire.token!);
    if (!receiver) throw new Refusal(404, "No such session");
    if (receiver instanceof PlainSession) {
      throw new Refusal(400, "A plain session takes plain messages");
    }
    receiver.heard();
    if (receiver instanceof FullSession) this.#openings.delete(receiver.opening);
    const error = request.body &&
      await readUplink(request.body, receiver, this.maxMessageSize);
    const refusal = error instanceof Refusal ? error : undefined; // else the connection's end
    // "Failed requests never end a session": what is malformed in the bytes may be a proxy's doing.
    if (refusal?.closeCode && refusal.closeCode !== 1002) {
      receiver.close(refusal.closeCode, refusal.message);
    }
    const response = refusal?.response() ?? new Response(null, { status: 204 });
    response.headers.set(RECEIVED_HEADER, String(receiver.uplink.received));
    return response;
  }

  /** The uplink of a plain session: messages as they are. */
  async #receivePlain(request: Request, token: string): Promise<Response> {
    if (!this.bidir) {
      throw new Refusal(405, "This server only sends", { headers: { allow: "GET" } });
    }
    const session = await this.#readmit(request, token);
    if (!session || session instanceof Tombstone) throw new Refusal(404, "No such session");
    if (session instanceof FullSession) throw new Refusal(400, `This session takes ${UPLINK_TYPE}`);
    await session.read(request);
    return new Response(null, { status: 204 });
  }

  /** Another instance has the session: `upgrade` is asked here, all the rest is done there. */
  async #forward(router: RoutingDriver, request: Request, token: string): Promise<Response> {
    const { namespace } = await this.#admit(request);
    return await router.route(request, token, namespace);
  }

  // --- Admission ---

  #checkRoom(): void {
    if (this.#closing) throw new Refusal(503, "Shutting down", { headers: { "retry-after": "1" } });
    if (this.sessions.size >= this.maxPeers) {
      throw new Refusal(503, "Full", { headers: { "retry-after": "5" } });
    }
  }

  /** The adapter's hooks, then those that `resolve` finds, then those that the request carries. */
  async #hooksOf(request: UpgradeRequest): Promise<Partial<Hooks>[]> {
    type Carrier = Record<symbol, Partial<Hooks> | undefined>;
    const carried = (request as unknown as Carrier)[REQUEST_HOOKS] ??
      (request.context as Carrier | undefined)?.[REQUEST_HOOKS];
    const resolved = await this.options.resolve?.(request);
    return [...new Set([this.options.hooks, resolved, carried])].filter((hooks) => !!hooks);
  }

  /**
   * Runs `upgrade`. A later hook's answer stands over an earlier one's; any refusal is final,
   * and its `Response` thrown.
   */
  async #admit(request: UpgradeRequest): Promise<Admission> {
    offerProtocols(request);
    const admission: Admission = {
      hooks: await this.#hooksOf(request),
      namespace: this.options.getNamespace?.(request) ?? new URL(request.url).pathname,
      context: request.context ?? {},
      headers: new Headers(),
    };
    for (const hooks of admission.hooks) {
      try {
        const result = await hooks.upgrade?.(request);
        // An arrow function may give anything, as `(request) => seen.push(request.url)` does.
        if (!result || typeof result !== "object") continue;
        if (result instanceof Response || "response" in result) throw result;
        if (result.namespace) admission.namespace = result.namespace;
        if (result.context) Object.assign(admission.context, result.context);
        if (result.headers) addHeaders(admission.headers, new Headers(result.headers));
        if (result.protocol) admission.headers.set(WEBSOCKET_PROTOCOL, result.protocol);
      } catch (error) {
        const { response } = Object(error);
        throw response instanceof Response ? response : error;
      }
    }
    // For the backplane "" is all namespaces, and those that begin so are its own.
    if (/^(\0|$)/.test(admission.namespace)) throw malformed("the namespace");
    // What it has taken cannot be read again, and must not pass for a message that came.
    if (request.bodyUsed || request.body?.locked) {
      throw new TypeError("The body was read before us");
    }
    if (!admission.headers.has(WEBSOCKET_PROTOCOL)) {
      const protocol = await this.#chooseProtocol(request);
      if (protocol) admission.headers.set(WEBSOCKET_PROTOCOL, protocol);
    }
    return admission;
  }

  async #chooseProtocol(request: Request): Promise<string> {
    const offered = new Set(listed(request.headers.get(WEBSOCKET_PROTOCOL)));
    if (!offered.size) return "";
    return await this.options.handleProtocols?.(offered, request) || "";
  }

  /**
   * Asks `upgrade` about a request of an existing session; gives that session, or what is left
   * of it. "Only a refusal counts; another namespace is 404."
   */
  async #readmit(
    request: Request,
    token: string,
  ): Promise<FullSession | PlainSession | Tombstone | undefined> {
    const find = () => this.sessions.get(token) ?? this.#tombstones.get(token);
    if (!find()) return;
    const namespace = this.#admitted.get(request) ?? (await this.#admit(request)).namespace;
    const found = find(); // again: it may have closed while the hook was thinking
    return found?.namespace === namespace ? found : undefined;
  }

  // --- Responses ---

  #headersOf(session: Session, admission?: Admission): Headers {
    const { full, token } = session;
    const headers = streamHeaders(full, full || this.bidir ? token : undefined);
    if (!admission) return headers;
    for (const ours of ["content-type", TOKEN_HEADER, VERSION_HEADER]) {
      admission.headers.delete(ours);
    }
    addHeaders(headers, admission.headers);
    return headers;
  }

  /** The first events of a full session's stream. */
  preface(
    session: Pick<Session, "protocol" | "uplink" | "attempt" | "heartbeatInterval">,
    next: number,
  ): string {
    const { protocol, uplink: { received, handled }, attempt, heartbeatInterval } = session;
    const { idleTimeout, resumeTimeout, maxMessageSize, window } = this;
    const terms = JSON.stringify({
      protocol,
      received,
      handled,
      next,
      attempt,
      heartbeatInterval,
      idleTimeout,
      resumeTimeout,
      maxMessageSize,
      window,
    });
    return `event: ${OPEN_EVENT}\ndata: ${terms}\n\n`;
  }

  // --- Publishing ---

  subscribe(session: Session, topic: string): void {
    const topics = getOrMake(this.#topics, session.namespace, () => new Map());
    getOrMake(topics, topic, () => new Set()).add(session);
  }

  unsubscribe(session: Session, topic: string): void {
    const topics = this.#topics.get(session.namespace);
    const subscribers = topics?.get(topic);
    if (!subscribers?.delete(session) || subscribers.size) return;
    topics!.delete(topic);
    if (!topics!.size) this.#topics.delete(session.namespace);
  }

  publish(topic: string, data: unknown, namespace = ""): void {
    const message = { namespace, topic, data: toData(data) };
    this.#deliver(message);
    this.#relay(message);
  }

  publishFrom(session: Session, topic: string, data: unknown): void {
    const message = { namespace: session.namespace, topic, data: toData(data) };
    this.#fanOut(message.namespace, topic, new Frame(message.data), session);
    this.#relay(message);
  }

  #deliver({ namespace, topic, data }: SyncMessage): void {
    const frame = new Frame(toData(data));
    if (namespace) return this.#fanOut(namespace, topic, frame);
    for (const name of this.#topics.keys()) this.#fanOut(name, topic, frame);
  }

  #fanOut(namespace: string, topic: string, frame: Frame, except?: Session): void {
    const subscribers = this.#topics.get(namespace)?.get(topic);
    if (!subscribers) return;
    const hold = this.flusher.resting;
    for (const session of subscribers) if (session !== except) session.send(frame, hold);
  }

  #connectSync(connect: SyncAdapter): SyncDriver {
    const id = crypto.randomUUID();
    this.#instance = id.replaceAll("-", "").slice(0, 16);
    const driver = connect({ id });
    if ("route" in driver) {
      this.#router = driver as RoutingDriver;
      this.#router.attach({
        maxMessageSize: this.maxMessageSize,
        has: (token) => this.sessions.has(token) || this.#tombstones.has(token),
        fetch: (request, namespace) => {
          this.#admitted.set(request, namespace);
          return this.fetch(request);
        },
        report: (error, stage) => this.#report(error, stage),
      });
    }
    this.#trySync(
      "subscribe",
      () => driver.subscribe((message) => this.#trySync("delivery", () => this.#deliver(message))),
    );
    return driver;
  }

  #relay(message: SyncMessage): void {
    if (this.sync) this.#trySync("publish", () => this.sync!.publish(message));
  }

  /** Does one thing with the backplane, whose failures are reported and never thrown. */
  #trySync(stage: "subscribe" | "publish" | "delivery", action: () => MaybePromise<void>): void {
    try {
      Promise.resolve(action()).catch((error) => this.#report(error, stage));
    } catch (error) {
      this.#report(error, stage);
    }
  }

  #report(error: unknown, stage: "subscribe" | "publish" | "delivery"): void {
    const { onError } = this.options;
    if (!onError) return console.error(`[duplex-sse] sync ${stage} failed:`, error);
    try {
      onError.call(this.options, error, { stage });
    } catch (failure) { // anybody on the backplane can bring a report about
      console.error("[duplex-sse] onError failed:", failure);
    }
  }

  // --- Time ---

  /** Fine enough for the shortest of the deadlines; one timer for all sessions. */
  get #period(): number {
    const { resumeTimeout, idleTimeout } = this;
    const shortest = Math.min(
      this.heartbeatOf(undefined) / 2,
      resumeTimeout / 4 || Infinity,
      idleTimeout / 4 || Infinity,
    );
    return Math.max(5, shortest);
  }

  /** 5 s where the runtime's idle cut could not be lifted, for want of `fetch`'s second argument. */
  heartbeatOf(runtime: Runtime): number {
    return runtime !== undefined || this.options.heartbeatInterval !== undefined
      ? this.heartbeatInterval
      : UNATTENDED_HEARTBEAT_INTERVAL;
  }

  #startTimer(): void {
    if (this.#nextSweep < Infinity) return;
    this.#nextSweep = clock() + this.#period;
    this.#sweepTimer = setTimeout(() => this.#sweep(), this.#period);
    // Where timers can do so, this one does not keep a process alive.
    (this.#sweepTimer as { unref?(): void }).unref?.();
  }

  #sweep(): void {
    clearTimeout(this.#sweepTimer);
    this.#nextSweep = Infinity;
    const now = clock();
    for (const session of this.sessions.values()) session.tick(now);
    for (const session of this.lingering) if (now >= session.deadline) session.release();
    for (const [name, tombstone] of this.#tombstones) {
      if (now < tombstone.expires) break; // they were laid in the order of their expiry
      this.#tombstones.delete(name);
      tombstone.uplink.release();
    }
    if (this.sessions.size || this.lingering.size || this.#tombstones.size) this.#startTimer();
  }

  // --- Ends ---

  /** Forgets a session that has ended; its tombstone tells those who missed the end. */
  bury(session: Session, ending: Ending | undefined): void {
    this.sessions.delete(session.token);
    if (session instanceof FullSession) this.#openings.delete(session.opening);
    const peers = this.peers.get(session.namespace);
    peers?.delete(session.peer);
    if (!peers?.size) this.peers.delete(session.namespace);
    const key = session instanceof PlainSession ? session.key : "";
    this.#keys.delete(key);
    if (ending && this.resumeTimeout > 0) {
      this.#tombstones.set(
        key || session.token,
        new Tombstone(session, ending, this.resumeTimeout),
      );
      this.#startTimer();
    }
    if (!this.sessions.size) this.#whenEmpty.splice(0).forEach((resolve) => resolve());
  }

  /**
   * Calls close hooks after the hooks that open a session and those that close another, never
   * within them: what these send may end the next session, and so on through thousands.
   */
  inTurn(call: () => void): void {
    if (this.#calls) return void this.#calls.push(call);
    this.#calls = [call];
    try {
      for (const next of this.#calls) next(); // it grows meanwhile
    } finally { // hooks that cannot even be looked up must not silence everybody's
      this.#calls = undefined;
    }
  }

  linger(session: Session): void {
    this.lingering.add(session);
    this.#startTimer();
  }

  release(session: Session): void {
    this.lingering.delete(session);
  }

  async close(
    code = 1001,
    reason = "",
    { signal }: { signal?: AbortSignal } = {},
  ): Promise<void> {
    checkClose(code, reason);
    this.#closing = true;
    for (const session of this.sessions.values()) session.close(code, reason);
    const hurry = () => {
      for (const session of this.sessions.values()) session.terminate();
    };
    if (signal?.aborted) hurry();
    signal?.addEventListener("abort", hurry);
    if (this.sessions.size) await new Promise<void>((resolve) => this.#whenEmpty.push(resolve));
    signal?.removeEventListener("abort", hurry);
    for (const session of this.lingering) session.flush();
    await new Promise((resolve) => setTimeout(resolve)); // the runtime takes what is left
    for (const session of this.lingering) session.release();
    this.#tombstones.clear();
    this.flusher.stop();
    clearTimeout(this.#sweepTimer);
    this.#nextSweep = Infinity;
    await this.sync?.close?.();
  }
}

// --- What hooks are given ---

/** What a peer needs of the hub. */
interface Peers {
  readonly peers: Map<string, Set<Peer>>;
  subscribe(session: Session, topic: string): void;
  unsubscribe(session: Session, topic: string): void;
  publishFrom(session: Session, topic: string, data: unknown): void;
}

class ServerPeer implements Peer {
  // Private fields stay out of what console.log shows: the token is never in there.
  readonly #session: Session;
  readonly #hub: Peers;
  #id: string | undefined;
  #websocket: PeerWebSocket | undefined;

  constructor(session: Session, hub: Peers) {
    this.#session = session;
    this.#hub = hub;
  }

  get id(): string {
    return this.#id ??= crypto.randomUUID();
  }

  get context(): PeerContext {
    return this.#session.context;
  }

  get namespace(): string {
    return this.#session.namespace;
  }

  get request(): Request {
    return this.#session.request;
  }

  get remoteAddress(): string | undefined {
    return this.#session.remoteAddress;
  }

  get peers(): Set<Peer> {
    return this.#hub.peers.get(this.namespace) ?? new Set();
  }

  get topics(): Set<string> {
    return new Set(this.#session.topics); // one that is changed would hide a subscription from its end
  }

  get bufferedAmount(): number {
    return this.#session.bufferedAmount;
  }

  get websocket(): PeerWebSocket {
    const session = this.#session;
    return this.#websocket ??= {
      binaryType: undefined as unknown as string,
      get readyState() {
        return session.readyState;
      },
      get bufferedAmount() {
        return session.bufferedAmount;
      },
      protocol: session.protocol || (this.request.headers.get(WEBSOCKET_PROTOCOL) ?? ""),
      extensions: "",
      url: this.request.url.replace(/^http/, "ws"),
      send: (data) => void this.send(data),
      close: (code, reason) => this.close(code, reason),
    };
  }

  waitForDrain(options: WaitForDrainOptions = {}): Promise<void> {
    return this.#session.waitForDrain(options.threshold ?? 0, options.signal);
  }

  send(data: unknown): number {
    return this.#session.send(new Frame(toData(data)));
  }

  subscribe(topic: string): void {
    if (this.#session.readyState !== OPEN) return;
    this.#session.topics.add(topic);
    this.#hub.subscribe(this.#session, topic);
  }

  unsubscribe(topic: string): void {
    this.#session.topics.delete(topic);
    this.#hub.unsubscribe(this.#session, topic);
  }

  publish(topic: string, data: unknown): void {
    this.#hub.publishFrom(this.#session, topic, data);
  }

  close(code = 1005, reason = ""): void {
    checkClose(code, reason);
    this.#session.close(code, reason);
  }

  terminate(): void {
    this.#session.terminate();
  }

  ping(data?: unknown): void {
    const value = toData(data);
    const bytes = typeof value === "string" ? encoder.encode(value) : value;
    if (bytes.length > MAX_CONTROL) throw new RangeError("A ping carries at most 125 bytes");
    this.#session.ping(bytes);
  }

  toString(): string {
    return this.id;
  }

  get [Symbol.toStringTag](): string {
    return "Peer";
  }

  [INSPECT as never](): unknown {
    const { id, namespace, remoteAddress, topics } = this;
    const { readyState } = this.#session;
    return { peer: { id, namespace, remoteAddress, readyState, topics: [...topics] } };
  }
}

// --- A session ---

/** What a session begins with. */
interface Opening {
  token: string;
  request: Request;
  admission: Admission;
  runtime: Runtime;
}

/** What admission to a session has settled. */
interface Admission {
  hooks: Partial<Hooks>[];
  namespace: string;
  context: PeerContext;
  /** Those of the response, the subprotocol's among them. */
  headers: Headers;
}

/** What a session needs of the hub. */
interface Host {
  readonly bidir: boolean;
  readonly window: number;
  readonly idleTimeout: number;
  readonly resumeTimeout: number;
  readonly closeTimeout: number;
  readonly maxMessageSize: number;
  readonly maxBufferedAmount: number;
  readonly mostHeld: number;
  readonly flusher: Flusher;
  heartbeatOf(runtime: Runtime): number;
  preface(session: Session, next: number): string;
  unsubscribe(session: Session, topic: string): void;
  /** Its end is to be told to those who missed it. */
  bury(session: Session, ending: Ending | undefined): void;
  /** Its last bytes are still to be taken; `release` when they are. */
  linger(session: Session): void;
  release(session: Session): void;
  inTurn(call: () => void): void;
}

/** A client's state, which outlives its connections: what both levels have in common. */
abstract class Session {
  abstract readonly full: boolean;
  readonly token: string;
  readonly namespace: string;
  readonly protocol: string;
  readonly heartbeatInterval: number;
  readonly request: Request;
  readonly context: PeerContext;
  readonly remoteAddress: string | undefined;
  peer!: Peer;
  readonly topics: Set<string> = new Set();
  readonly uplink: Uplink = new Uplink();
  readyState = OPEN;
  attempt = 0;
  /** When a session that is closing, or without a connection, ends for good. */
  deadline = Infinity;

  protected readonly hub: Host;
  protected readonly outbox: Outbox = new Outbox();
  protected connection: Connection | undefined;
  /** How it ends, once that is known; undefined for one whose client was lost. */
  protected ending: Ending | undefined;
  /** Uplink: encoded bytes of messages whose hooks have not settled. */
  protected unhandledBytes = 0;
  /** Something is due that is no message. */
  protected controlDue = false;
  readonly #hooks: Partial<Hooks>[];
  /** The hub flushes this session at the end of the current job, or at that of its rest. */
  #flush: "none" | "due" | "held" = "none";
  /** Something had to wait, and `drain` is yet to be called. */
  #clogged = false;
  #waiters: Set<Waiter> | undefined;
  #lastWrite = 0;

  constructor(hub: Host, { token, request, admission, runtime }: Opening) {
    this.hub = hub;
    this.#hooks = admission.hooks;
    this.token = token;
    this.namespace = admission.namespace;
    this.protocol = admission.headers.get(WEBSOCKET_PROTOCOL) ?? "";
    this.heartbeatInterval = hub.heartbeatOf(runtime);
    this.request = keepReadable(request);
    this.context = admission.context;
    this.remoteAddress = remoteAddressOf(request, runtime);
  }

  get bufferedAmount(): number {
    return this.outbox.waiting;
  }

  // --- What the levels differ in ---

  /** What a stream begins with, when it goes on after this message. */
  protected abstract preface(received: number): string;
  protected abstract encode(frame: Frame): Bytes;
  protected abstract encodeEnding(ending: Ending): Bytes;
  /** Gathers the messages that may go now. */
  protected abstract gather(parts: Bytes[]): void;
  /** The hooks have settled for a message of so many encoded bytes. */
  protected abstract handled(size: number): void;

  // --- Connections ---

  /** Begins the next event stream, after message `received`; the one before it ends. */
  attach(attempt: number, received: number, lasts: Lasting): ReadableStream<Bytes> {
    this.connection?.end();
    this.attempt = attempt;
    this.outbox.rewind(received);
    if (this.readyState === OPEN) this.deadline = Infinity;
    this.#lastWrite = clock();
    this.connection = new Connection(this, encoder.encode(this.preface(received)), lasts);
    return this.connection.stream;
  }

  canResumeFrom(received: number): boolean {
    return this.outbox.has(received);
  }

  /** The connection is gone: the "session expires after the resume timeout". */
  lose(connection: Connection): void {
    if (connection !== this.connection) return; // a newer one has taken over
    this.connection = undefined;
    if (this.readyState === CLOSED) return this.release();
    this.deadline = Math.min(this.deadline, clock() + this.hub.resumeTimeout);
    if (this.hub.resumeTimeout === 0) this.finish(LOST);
  }

  /** Ends the connection as if the network had: the client will resume. */
  protected drop(): void {
    const connection = this.connection;
    connection?.end();
    if (connection) this.lose(connection);
  }

  protected disconnect(): void {
    this.connection?.end();
    this.connection = undefined;
  }

  /** Lets go of the connection and of all bodies: nothing more comes, either way. */
  release(): void {
    this.disconnect();
    this.hub.release(this);
    this.uplink.release();
  }

  // --- Sending ---

  /** The message goes at the end of the current job; with `hold`, at that of a rest. */
  send(frame: Frame, hold = false): number {
    if (this.readyState !== OPEN) return 0;
    // "A send on a peer that already has more than maxBufferedAmount held back closes it with 1013."
    if (this.outbox.cost > this.hub.maxBufferedAmount) {
      this.#beginClose(1013, "Too much buffered");
      this.finish();
      return 0;
    }
    const bytes = this.encode(frame);
    this.outbox.push(bytes);
    if (!hold || !this.#hold()) this.schedule();
    return this.#clogged ? -1 : bytes.length;
  }

  ping(_data: Bytes): void {}

  /** Whether the flush is left to the end of the rest: not if one is due anyway, or much is held. */
  #hold(): boolean {
    if (this.#flush === "due" || this.bufferedAmount > this.hub.mostHeld) return false;
    if (this.#flush === "none" && this.hub.flusher.hold(this)) this.#flush = "held";
    return this.#flush === "held";
  }

  schedule(): void {
    if (this.#flush === "due") return;
    this.#flush = "due";
    this.hub.flusher.schedule(this);
  }

  /**
   * Gives the connection everything that is due as one chunk, when it has asked for
   * bytes. While it has not, all waits: the busier the runtime, the larger the chunks.
   */
  flush(): void {
    this.#flush = "none";
    const connection = this.connection;
    if (!connection?.asked) {
      this.#clogged ||= this.bufferedAmount > 0;
      return;
    }
    if (this.outbox.due || this.controlDue || this.ending || connection.preface) {
      this.#flushAll(connection);
    }
    if (this.#clogged || this.bufferedAmount > 0 || this.#waiters) this.#afterFlush();
  }

  #flushAll(connection: Connection): void {
    const parts: Bytes[] = [];
    if (connection.preface) parts.push(connection.preface);
    connection.preface = undefined;
    const known = parts.length;
    this.gather(parts);
    const last = this.ending && !this.outbox.due;
    if (last) parts.push(this.encodeEnding(this.ending!));
    const isOver = connection.lasts === "preface" ||
      connection.lasts === "news" && parts.length > known;
    if (parts.length) this.#write(connection, this.hub.flusher.join(parts));
    if (last) this.#afterClose();
    else if (isOver) this.#endTurn(connection);
  }

  /** A poll has its answer: the client is away until the next. */
  #endTurn(connection: Connection): void {
    connection.end();
    this.connection = undefined;
    // "Between polls the session is away …: it keeps its numbers, and the resume timeout runs."
    this.deadline = Math.min(this.deadline, clock() + this.hub.closeTimeout);
  }

  #write(connection: Connection, chunk: Bytes): void {
    this.#lastWrite = clock();
    connection.write(chunk);
  }

  #afterFlush(): void {
    if (this.bufferedAmount > 0) this.#clogged = true;
    this.wake();
    if (this.bufferedAmount > 0 || !this.#clogged || this.readyState !== OPEN) return;
    this.#clogged = false;
    this.callHooks("drain");
  }

  waitForDrain(threshold: number, signal?: AbortSignal): Promise<void> {
    if (signal?.aborted) return Promise.reject(signal.reason);
    if (this.bufferedAmount <= threshold || this.readyState >= CLOSING) return Promise.resolve();
    return new Promise((resolve, reject) => {
      const abort = () => {
        this.#waiters?.delete(waiter);
        reject(signal!.reason);
      };
      const waiter: Waiter = {
        threshold,
        resolve: () => {
          signal?.removeEventListener("abort", abort);
          resolve();
        },
      };
      (this.#waiters ??= new Set()).add(waiter);
      if (this.#flush === "held") this.schedule();
      signal?.addEventListener("abort", abort, { once: true });
    });
  }

  protected wake(): void {
    if (!this.#waiters) return;
    for (const waiter of this.#waiters) {
      if (this.bufferedAmount > waiter.threshold && this.readyState < CLOSING) continue;
      this.#waiters.delete(waiter);
      waiter.resolve();
    }
    if (!this.#waiters.size) this.#waiters = undefined;
  }

  // --- Receiving ---

  /** Any byte from the client shows that it lives. */
  heard(): void {}

  /** Gives a message to the hooks, and a promise until they have settled. */
  protected deliver(data: string | Bytes, size: number): Promise<void> | undefined {
    this.uplink.received++;
    const pending = this.callHooks("message", new ServerMessage(this.peer, data));
    if (!pending) return void this.handled(size);
    this.unhandledBytes += size;
    this.handled(0);
    return pending.then(() => {
      this.unhandledBytes -= size;
      this.handled(size);
    });
  }

  // --- Hooks ---

  /** Calls a hook wherever it is set. Gives a promise, which never rejects, where that takes time. */
  callHooks(
    name: "open" | "message" | "close" | "drain" | "ping" | "pong",
    argument?: Message | CloseDetails | Uint8Array,
  ): Promise<void> | undefined {
    let pending: Promise<void> | undefined;
    for (const hooks of this.#hooks) {
      const hook = hooks[name] as Hook | undefined;
      if (!hook) continue;
      pending = pending
        ? pending.then(() => this.#callHook(hooks, hook, argument)) // in turn, as in crossws
        : this.#callHook(hooks, hook, argument);
    }
    return pending;
  }

  /** Its failure goes to `error` and ends this session alone. */
  #callHook(hooks: Partial<Hooks>, hook: Hook, argument: unknown): Promise<void> | undefined {
    try {
      const result = hook.call(hooks, this.peer, argument);
      if (!isThenable(result)) return;
      return Promise.resolve(result).then(() => {}, (error) => this.#fail(error));
    } catch (error) {
      this.#fail(error);
    }
  }

  #fail(cause: unknown): void {
    const error = cause instanceof Error ? cause : new Error("A hook failed", { cause });
    const listeners = this.#hooks.filter((hooks) => hooks.error);
    if (!listeners.length) console.error("[duplex-sse] a hook failed:", error);
    for (const hooks of listeners) {
      const telling = async () => await hooks.error!(this.peer, error); // also a throw rejects
      telling().catch((error) => console.error("[duplex-sse] the error hook failed:", error));
    }
    this.close(1011, "A hook failed");
  }

  // --- Ends ---

  /** "When the server closes, duplex-close comes after all that was sent before." */
  close(code: number, reason: string): void {
    if (this.readyState !== OPEN) return;
    this.#beginClose(code, reason);
    this.deadline = clock() + this.hub.closeTimeout;
  }

  #beginClose(code: number, reason: string): void {
    this.startClosing({ code, reason, sent: this.outbox.last });
  }

  protected startClosing(ending: Ending): void {
    this.readyState = CLOSING;
    this.ending = ending;
    this.wake();
    this.schedule();
  }

  /** `duplex-close` is out: a full client will answer it, a plain one cannot. */
  #afterClose(): void {
    if (this.readyState === CLOSED) return this.release();
    this.disconnect();
    if (!this.full) this.finish();
  }

  /** Ends at once, without a word: the client will be told 404. */
  terminate(): void {
    if (this.readyState === CLOSED) return;
    this.finish(LOST);
    this.release();
  }

  /** The end of every session, clean or not; here alone `close` is called. */
  protected finish({ code, reason }: Required<CloseDetails> = this.ending!): void {
    if (this.readyState === CLOSED) return;
    this.readyState = CLOSED;
    for (const topic of this.topics) this.hub.unsubscribe(this, topic);
    this.outbox.clear();
    this.wake();
    this.hub.bury(this, code === LOST.code ? undefined : this.ending);
    if (this.connection && this.ending) { // its last bytes are still to be taken
      this.deadline = clock() + this.hub.closeTimeout;
      this.hub.linger(this);
    } else this.release();
    this.hub.inTurn(() => {
      this.callHooks("close", { code, reason });
      this.topics.clear();
    });
  }

  // --- Time ---

  /** One look at the clock, from the hub's timer. */
  tick(now: number): void {
    if (now >= this.deadline) return this.terminate();
    if (this.connection && now - this.#lastWrite >= this.heartbeatInterval / 2 - 1) this.beat();
  }

  protected beat(): void {
    const { connection } = this;
    if (!connection?.asked) return;
    this.#write(connection, HEARTBEAT);
    if (connection.lasts !== "for good") this.#endTurn(connection);
  }
}

/** A session of the full level: PROTOCOL.md, sections 2 to 9. */
class FullSession extends Session implements Receiver {
  readonly full = true;
  /** The id that its client gave the opening, or "". */
  opening = "";
  #ackDue = false;
  #pings: string[] = [];
  #lastHeard: number = clock();
  /** The client was asked for a sign of life, and has not been heard since. */
  #pinged = false;

  // --- Down ---

  override attach(attempt: number, received: number, lasts: Lasting): ReadableStream<Bytes> {
    this.outbox.acknowledge(received);
    this.#pinged = false;
    this.#ackDue = false; // its first event says it
    return super.attach(attempt, received, lasts);
  }

  protected preface(received: number): string {
    return this.hub.preface(this, received + 1);
  }

  protected encode(frame: Frame): Bytes {
    return frame.full;
  }

  protected encodeEnding({ code, reason, sent }: Ending): Bytes {
    return encodeClose(CLOSE_EVENT, { code, reason, sent });
  }

  protected gather(parts: Bytes[]): void {
    // "A pending duplex-ack precedes the messages of the same chunk."
    if (this.#ackDue) {
      const { received, handled } = this.uplink;
      parts.push(encoder.encode(`event: ${ACK_EVENT}\ndata: ${received} ${handled}\n\n`));
    }
    this.#ackDue = false;
    for (const data of this.#pings) {
      parts.push(encoder.encode(`event: ${PING_EVENT}\ndata: ${this.outbox.given} ${data}\n\n`));
    }
    if (this.controlDue) this.#pings.length = 0;
    this.controlDue = false;
    // "A sender below its window may begin one message of any size; at it, only control frames and CLOSE."
    const { window } = this.hub;
    for (let size = 0; this.outbox.due && size < MAX_CHUNK && this.outbox.inFlight < window;) {
      const bytes = this.outbox.take();
      parts.push(bytes);
      size += bytes.length;
    }
  }

  override ping(data: Bytes): void {
    if (this.readyState !== OPEN) return;
    if (this.#pings.push(toBase64(data)) > MAX_PENDING_PINGS) this.#pings.shift();
    this.controlDue = true;
    this.schedule();
  }

  // --- Up ---

  override heard(): void {
    this.#lastHeard = clock();
    this.#pinged = false;
  }

  /** Reads the uplink half of a request whose response is the event stream. */
  async readDuplex(body: ReadableStream<Uint8Array>): Promise<void> {
    const error = await readUplink(body, this, this.hub.maxMessageSize);
    if (!error) return;
    // The connection has ended. Deno tells the stream of that only when it is written to.
    if (!(error instanceof Refusal)) return this.beat();
    // No status can be told any more. A gap leaves the session to a resume, the rest is final.
    if (error.closeCode) this.close(error.closeCode, error.message);
    else this.drop();
  }

  receive(type: string, payload: Bytes, size: number): void {
    if (type === "CLOSE") return this.#receiveClose(payload);
    if (this.readyState !== OPEN) { // closing: counted, so that the client can finish
      this.uplink.received++;
      return this.handled(size);
    }
    if (!this.hub.bidir) throw new Refusal(403, "This server only sends", { closeCode: 1003 });
    // "A client that begins a message while the window is full is closed with 1008."
    if (this.unhandledBytes >= this.hub.window) {
      throw new Refusal(413, "Window overrun", { closeCode: 1008 });
    }
    this.deliver(type === "TEXT" ? decodeText(payload) : payload.slice(), size);
  }

  /** "The server acknowledges at once what it received …, and apart from that the bytes it has handled." */
  protected handled(size: number): void {
    this.uplink.handled += size;
    this.#ackDue = this.controlDue = true;
    this.schedule();
  }

  control(type: string, payload: Bytes): void {
    if (type === "PONG") {
      if (this.readyState === OPEN) this.callHooks("pong", payload.slice());
    } else if (type === "PING") {
      this.handled(0); // shows the client that this body is being read
      if (this.readyState === OPEN) this.callHooks("ping", payload.slice());
    } else {
      const count = parseNumber(decoder.decode(payload), "ACK");
      if (count > this.outbox.written) {
        throw new Refusal(400, "ACK of what was not sent", { closeCode: 1002 });
      }
      // The client has more than this connection has been given: a repeated resume took its place.
      if (count > this.outbox.given) this.drop();
      this.outbox.acknowledge(count);
      this.schedule();
    }
  }

  /** The client's CLOSE: the end of this session, or its answer to ours. */
  #receiveClose(payload: Bytes): void {
    if (payload.length === 1) throw new Refusal(400, "CLOSE of one byte", { closeCode: 1002 });
    const code = payload.length ? payload[0]! << 8 | payload[1]! : 1005;
    const reason = decodeText(payload.subarray(2));
    if (payload.length && !isCloseCode(code)) {
      throw new Refusal(400, "Invalid close code", { closeCode: 1002 });
    }
    this.uplink.received++;
    this.handled(0);
    // The client takes no more messages, so none that it has not got is missing.
    if (this.readyState === OPEN) this.startClosing({ code, reason, sent: this.outbox.written });
    this.finish({ code, reason });
  }

  override tick(now: number): void {
    const { idleTimeout } = this.hub;
    const silence = now - this.#lastHeard;
    if (this.connection && idleTimeout && now < this.deadline) {
      if (silence >= idleTimeout) return this.drop();
      // "A client not heard from for half of idleTimeout is asked by duplex-ping."
      if (silence >= idleTimeout / 2 && !this.#pinged) {
        this.#pinged = true;
        this.ping(EMPTY);
      }
    }
    super.tick(now);
  }
}

/** A session of the plain level, crossws's wire: PROTOCOL.md, section 10. */
class PlainSession extends Session {
  readonly full = false;
  /** The secret in its event ids, which can resume but not send. */
  readonly key: string = randomHex(16);

  protected preface(received: number): string {
    return `retry: 1000\nid: ${this.key}.${received}\n` +
      (this.hub.bidir ? `event: ${TOKEN_EVENT}\ndata: ${this.token}\n\n` : "\n");
  }

  protected encode(frame: Frame): Bytes {
    return frame.plain;
  }

  protected encodeEnding({ code, reason }: Ending): Bytes {
    return encodeClose("close", { code, reason });
  }

  protected gather(parts: Bytes[]): void {
    for (let size = 0; this.outbox.due && size < MAX_CHUNK;) {
      parts.push(encoder.encode(`id: ${this.key}.${this.outbox.given + 1}\n`));
      const bytes = this.outbox.take();
      parts.push(bytes);
      size += bytes.length;
    }
    this.outbox.keep(PLAIN_HISTORY);
  }

  override send(frame: Frame, hold?: boolean): number {
    const sent = super.send(frame, hold);
    if (!this.connection) this.#keepHistory();
    return sent;
  }

  override lose(connection: Connection): void {
    const current = connection === this.connection;
    super.lose(connection);
    if (!current || this.readyState === CLOSED) return;
    this.#keepHistory();
    if (this.readyState === CLOSING) this.finish();
  }

  override close(code: number, reason: string): void {
    super.close(code, reason);
    if (this.readyState === CLOSING && !this.connection) this.finish();
  }

  /** Without a connection, its messages go to the history alone. */
  #keepHistory(): void {
    this.outbox.skip();
    this.outbox.keep(PLAIN_HISTORY);
    this.wake();
  }

  /** "A body with a length is one message …, a streamed body one text message per chunk." */
  async read(request: Request): Promise<void> {
    const { maxMessageSize } = this.hub;
    try {
      const { body, headers } = request;
      const length = headers.get("content-length");
      if (body && length === null) return await this.#readChunks(body);
      checkSize(Number(length), maxMessageSize);
      const payload: Bytes = new Uint8Array(await request.arrayBuffer());
      checkSize(payload.length, maxMessageSize);
      await this.#receive(plainMessage(payload, mediaType(headers)));
    } catch (error) {
      if (!(error instanceof Refusal)) return; // the connection's end
      this.close(error.closeCode!, error.message);
      throw error;
    }
  }

  async #readChunks(body: ReadableStream<Uint8Array>): Promise<void> {
    const text = new TextDecoder("utf-8", { ignoreBOM: true });
    await readBody(body.getReader() as Reader, this, (chunk) => {
      checkSize(chunk.length, this.hub.maxMessageSize);
      const message = text.decode(chunk, { stream: true });
      return message ? this.#receive(message) : undefined;
    });
  }

  /** A streamed body is "paused while hooks are behind": until what this gives has settled. */
  #receive(data: string | Bytes): Promise<void> | undefined {
    if (this.readyState !== OPEN) return;
    const pending = this.deliver(data, data.length);
    if (this.unhandledBytes > this.hub.window) return pending;
  }

  /** The answer to its request is all that a plain client is told. */
  protected handled(): void {}
}

class ServerMessage implements Message {
  readonly peer: Peer;
  readonly rawData: string | Bytes;
  #id: string | undefined;

  constructor(peer: Peer, rawData: string | Bytes) {
    this.peer = peer;
    this.rawData = rawData;
  }

  get id(): string {
    return this.#id ??= crypto.randomUUID();
  }

  get data(): unknown {
    switch (this.peer.websocket.binaryType) {
      case "arraybuffer":
        return this.arrayBuffer();
      case "blob":
        return this.blob();
      case "uint8array":
        return this.uint8Array();
      case "text":
        return this.text();
      case "nodebuffer": {
        const { Buffer } = globalThis as { Buffer?: { from(bytes: Uint8Array): Uint8Array } };
        return Buffer?.from(this.uint8Array()) ?? this.uint8Array();
      }
      default:
        return this.rawData;
    }
  }

  text(): string {
    return typeof this.rawData === "string" ? this.rawData : decoder.decode(this.rawData);
  }

  json<T = unknown>(): T {
    return JSON.parse(this.text());
  }

  uint8Array(): Bytes {
    return typeof this.rawData === "string" ? encoder.encode(this.rawData) : this.rawData;
  }

  arrayBuffer(): ArrayBuffer {
    return this.uint8Array().buffer; // always of the message's own length
  }

  blob(): Blob {
    return new Blob([this.uint8Array()]);
  }

  toString(): string {
    return this.text();
  }

  [INSPECT as never](): unknown {
    return { message: { peer: this.peer.id, data: this.rawData } };
  }
}

/** Any hook of a peer, as it is called. */
type Hook = (this: Partial<Hooks>, peer: Peer, argument: unknown) => unknown;

/** Somebody who waits for `bufferedAmount` to fall. */
interface Waiter {
  threshold: number;
  resolve: () => void;
}

/**
 * "A closed session leaves a tombstone for the resume timeout: it replays duplex-close to a
 * resumption and answers a repeated CLOSE with 204."
 */
class Tombstone implements Receiver {
  readonly namespace: string;
  readonly ending: Ending;
  readonly expires: number;
  readonly uplink: Uplink;

  constructor(session: Session, ending: Ending, resumeTimeout: number) {
    this.namespace = session.namespace;
    this.ending = ending;
    this.expires = clock() + resumeTimeout;
    this.uplink = session.uplink;
  }

  heard(): void {}

  close(): void {}

  receive(): void {
    this.uplink.received++;
  }

  control(): void {}
}

// --- When sessions flush ---

/** What is flushed. */
interface Flushable {
  schedule(): void;
  flush(): void;
}

/** Flushes sessions together, so that what is sent in one job goes as one chunk to each. */
class Flusher {
  /** Sessions to flush at the end of the current job. */
  #dirty: Flushable[] = [];
  /** During a rest: the sessions that have been published to. */
  #held: Flushable[] | undefined;
  /** When the rest is over, whatever its timer does. */
  #holdUntil = 0;
  #restTimer: ReturnType<typeof setTimeout> | undefined;
  /** What was joined last during this flush. */
  #lastParts: Bytes[] = [];
  #lastChunk: Bytes = EMPTY;

  /** Publications are to be held. */
  get resting(): boolean {
    return !!this.#held && clock() < this.#holdUntil;
  }

  /** Flushes the session once the current job has done all its sends. */
  schedule(session: Flushable): void {
    if (this.#dirty.push(session) > 1) return;
    queueMicrotask(() => {
      const dirty = this.#dirty;
      this.#dirty = [];
      if (dirty.length >= CROWD && !this.#held) this.#rest();
      for (const session of dirty) session.flush();
      this.#lastParts = [];
      this.#lastChunk = EMPTY;
    });
  }

  /**
   * The chunks of a crowd keep the runtime busy for much longer than it took to make them, and
   * what is published meanwhile would queue up behind them, chunk after chunk. So it is held
   * for as long as the event loop is busy, and once more as long, and goes as one chunk.
   */
  #rest(): void {
    const held: Flushable[] = this.#held = [];
    const started = clock();
    this.#holdUntil = started + STALLED;
    const end = () => {
      this.#held = undefined;
      for (const session of held) session.schedule();
    };
    this.#restTimer = setTimeout(() => { // fires when the event loop is free again
      this.#restTimer = setTimeout(end, Math.min(clock() - started, MAX_REST));
    });
  }

  /** Flushes the session at the end of the rest, if there is one. */
  hold(session: Flushable): boolean {
    return !!this.#held?.push(session);
  }

  /** One chunk of many frames; subscribers that are sent the same frames share the chunk, too. */
  join(parts: Bytes[]): Bytes {
    if (parts.length === 1) return parts[0]!;
    const last = this.#lastParts;
    if (parts.length === last.length && parts.every((part, i) => part === last[i])) {
      return this.#lastChunk;
    }
    this.#lastParts = parts;
    return this.#lastChunk = concat(parts);
  }

  stop(): void {
    clearTimeout(this.#restTimer);
  }
}

// --- The downlink: one event stream ---

/** Who fills a connection. */
interface Source {
  flush(): void;
  lose(connection: Connection): void;
}

/** How long a connection lasts: until its preface, or anything else, is out. The latter two are polls. */
type Lasting = "for good" | "preface" | "news";

/** One event stream of a session. It is given bytes when the runtime asks for them, never before. */
class Connection {
  readonly stream: ReadableStream<Bytes>;
  /** The runtime has asked for bytes and had none since. */
  asked = false;
  /** The first bytes, until they are out. */
  preface: Bytes | undefined;
  readonly lasts: Lasting;
  #controller!: ReadableStreamDefaultController<Bytes>;

  constructor(source: Source, preface: Bytes, lasts: Lasting) {
    this.preface = preface;
    this.lasts = lasts;
    this.stream = new ReadableStream<Bytes>({
      start: (controller) => {
        this.#controller = controller;
      },
      pull: () => {
        this.asked = true;
        source.flush();
      },
      cancel: () => source.lose(this),
    }, { highWaterMark: 0 });
  }

  write(chunk: Bytes): void {
    this.asked = false; // before enqueue, which may ask again
    this.#controller.enqueue(chunk);
  }

  end(): void {
    this.asked = false;
    try {
      this.#controller.close();
    } catch {
      // cancelled by the runtime already
    }
  }
}

/** What a session sends, by number, from the first message that is not acknowledged. */
class Outbox {
  /** The number of the first message kept. */
  base = 1;
  /** The number of the last message that the current connection has been given, and that any has. */
  given = 0;
  written = 0;
  /** Encoded bytes: of all that is kept, of what no connection has been given yet, and of what the current one was given and has not acknowledged. */
  bytes = 0;
  waiting = 0;
  inFlight = 0;
  #frames: Bytes[] = [];
  #head = 0;

  /** The number of the last message ever pushed. */
  get last(): number {
    return this.base + this.#frames.length - this.#head - 1;
  }

  /** How many messages the current connection is yet to be given. */
  get due(): number {
    return this.last - this.given;
  }

  /** What those take that wait. */
  get cost(): number {
    return this.waiting + MESSAGE_COST * (this.last - this.written);
  }

  push(bytes: Bytes): void {
    this.#frames.push(bytes);
    this.bytes += bytes.length;
    this.waiting += bytes.length;
  }

  /** The next message, as given to the connection from now on. */
  take(): Bytes {
    const bytes = this.#frames[this.#head + ++this.given - this.base]!;
    this.inFlight += bytes.length;
    if (this.given > this.written) {
      this.written = this.given;
      this.waiting -= bytes.length;
    }
    return bytes;
  }

  /** Whether all that comes after this number is still kept. */
  has(received: number): boolean {
    return this.base - 1 <= received && received <= this.written;
  }

  /** A new connection goes on after this message. */
  rewind(received: number): void {
    this.given = received;
    this.inFlight = 0;
  }

  /** Takes all that waits for given. */
  skip(): void {
    this.written = this.last;
    this.waiting = 0;
  }

  /** Lets go of the oldest of what was given, beyond so many bytes. */
  keep(bytes: number): void {
    while (this.bytes > bytes && this.base <= this.written) this.acknowledge(this.base);
  }

  clear(): void {
    this.skip();
    this.acknowledge(this.last);
    this.given = this.last;
  }

  /** Lets go of everything up to this number. */
  acknowledge(number: number): void {
    const before = this.bytes;
    const keep = Math.min(number, this.last);
    while (this.base <= keep) {
      this.bytes -= this.#frames[this.#head]!.length;
      this.#frames[this.#head++] = EMPTY; // frees what was there
      this.base++;
    }
    const { length } = this.#frames;
    if (this.#head === length || this.#head > 1024 && this.#head * 2 > length) {
      this.#frames = this.#frames.slice(this.#head);
      this.#head = 0;
    }
    this.inFlight -= before - this.bytes;
  }
}

/** How a session ends. */
interface Ending {
  code: number;
  reason: string;
  /** How many messages the server had sent, for the client to see whether it has them all. */
  sent: number;
}

/** A message as it goes out, encoded once for each wire level that anybody needs. */
class Frame {
  readonly #data: string | Bytes;
  #full: Bytes | undefined;
  #plain: Bytes | undefined;

  constructor(data: string | Bytes) {
    this.#data = data;
  }

  get full(): Bytes {
    return this.#full ??= encodeFull(this.#data);
  }

  get plain(): Bytes {
    return this.#plain ??= encodePlain(this.#data);
  }
}

function encodeFull(data: string | Bytes): Bytes {
  if (typeof data !== "string") {
    return encoder.encode(`event: ${BINARY_EVENT}\ndata: ${toBase64(data)}\n\n`);
  }
  if (data.includes("\r")) {
    const wellFormed = decoder.decode(encoder.encode(data)); // as everywhere, lone surrogates become U+FFFD
    return encoder.encode(`event: ${JSON_EVENT}\ndata: ${JSON.stringify(wellFormed)}\n\n`);
  }
  return encoder.encode(dataLines(data) + "\n");
}

/** crossws's own wire: "CR and CRLF become line breaks; binary becomes a data: URL." */
function encodePlain(data: string | Bytes): Bytes {
  const text = typeof data === "string"
    ? data.replace(/\r\n?/g, "\n")
    : `data:application/octet-stream;base64,${toBase64(data)}`;
  return encoder.encode(`event: message\n${dataLines(text)}\n`);
}

/** "One data: line for each line." */
function dataLines(text: string): string {
  return text.includes("\n") ? `data: ${text.replaceAll("\n", "\ndata: ")}\n` : `data: ${text}\n`;
}

function encodeClose(event: string, ending: object): Bytes {
  return encoder.encode(`event: ${event}\ndata: ${JSON.stringify(ending)}\n\n`);
}

// --- The uplink: WebSocket-over-HTTP frames ---

/**
 * Of a request's body; by shape, since the runtimes' types of readers differ. What a
 * read gives may be overwritten by the next.
 */
interface Reader {
  read(): Promise<{ done: true } | { done: false; value: Uint8Array }>;
  cancel(): Promise<void>;
}

/** Who takes the messages of an uplink body: a session, or what is left of one. */
interface Receiver {
  readonly uplink: Uplink;
  /** A body has brought bytes. */
  heard(): void;
  /** Takes message `received + 1`; `size` is that of its encoded frame. The payload is lent for the call. */
  receive(type: string, payload: Bytes, size: number): void;
  /** Takes a frame that has no number; its payload is lent, too. */
  control(type: string, payload: Bytes): void;
}

/** What a session has been sent. Its tombstone goes on with it, as bodies do that end later. */
class Uplink {
  /** The number of the last message taken. */
  received = 0;
  /** Encoded bytes of the messages whose hooks have settled. */
  handled = 0;
  /** Request bodies that are being read. */
  #bodies: Reader[] | undefined;

  /** "At most two bodies of a session are read at once; a third ends the oldest." */
  begin(reader: Reader): void {
    const bodies = this.#bodies ??= [];
    if (bodies.push(reader) > MAX_BODIES) bodies.shift()!.cancel().catch(() => {});
  }

  end(reader: Reader): void {
    const at = this.#bodies!.indexOf(reader);
    if (at >= 0) this.#bodies!.splice(at, 1);
  }

  release(): void {
    for (const reader of this.#bodies?.splice(0) ?? []) reader.cancel().catch(() => {});
  }
}

/** Reads a body's frames and hands on those that are new. Gives what ended it early, if anything did. */
async function readUplink(
  body: ReadableStream<Uint8Array>,
  receiver: Receiver,
  maxMessageSize: number,
): Promise<unknown> {
  const { uplink } = receiver;
  let number = 0; // nothing has told it yet
  const parser = new UplinkParser(maxMessageSize, (type, payload, size) => {
    // "The number of the next message in this body, forward only": the client need not repeat
    // what was acknowledged meanwhile.
    if (type === "SEQ") {
      const next = parseNumber(decoder.decode(payload), "SEQ");
      if (next < (number || 1)) throw malformed("SEQ goes back");
      number = next;
      return;
    }
    if (type !== "TEXT" && type !== "BINARY" && type !== "CLOSE") {
      return receiver.control(type, payload);
    }
    if (!number) throw malformed("a message before SEQ");
    // "Overlap is normal: the server skips what it has, decided at the moment a frame is complete.
    // A gap means damage."
    if (number > uplink.received + 1) throw new Refusal(409, "Messages are missing");
    if (number++ === uplink.received + 1) receiver.receive(type, payload, size);
  });
  return await readBody(readerOf(body), receiver, (chunk) => parser.push(chunk))
    .catch((error: unknown) => error);
}

/** Reads a body to its end. A promise pauses it; an error ends it, and is thrown. */
async function readBody(
  reader: Reader,
  receiver: Pick<Receiver, "uplink" | "heard">,
  take: (chunk: Bytes) => Promise<void> | void,
): Promise<void> {
  const { uplink } = receiver;
  uplink.begin(reader);
  try {
    for (let chunk = await reader.read(); !chunk.done; chunk = await reader.read()) {
      receiver.heard();
      const pending = take(chunk.value as Bytes);
      if (pending) await pending;
    }
  } catch (error) {
    reader.cancel().catch(() => {}); // nobody will read the rest
    throw error;
  } finally {
    uplink.end(reader);
  }
}

/**
 * Reads into a buffer of ours where the runtime can: with its own, Deno holds 64 KiB
 * for as long as a read is pending, which is all the time that a session is open.
 */
function readerOf(body: ReadableStream<Uint8Array>): Reader {
  let reader: ReadableStreamBYOBReader;
  try {
    reader = body.getReader({ mode: "byob" });
  } catch {
    return body.getReader() as Reader; // no byte stream, as on Bun
  }
  let buffer = new ArrayBuffer(SMALL_READ);
  return {
    async read() {
      const size = buffer.byteLength;
      const chunk = await reader.read(new Uint8Array(buffer));
      if (chunk.done) return { done: true };
      const { buffer: used, length } = chunk.value;
      const next = length === size ? LARGE_READ : length <= SMALL_READ ? SMALL_READ : size;
      buffer = next === size ? used : new ArrayBuffer(next);
      return chunk;
    },
    cancel: () => reader.cancel(),
  };
}

/** An incremental parser: frames may be split anywhere. Between chunks it holds one frame at most. */
class UplinkParser {
  readonly #max: number;
  readonly #onFrame: (type: string, payload: Bytes, size: number) => void;
  /** The beginning of a frame: one copy that grows, since to keep chunks of a byte would cost a hundred times as much. */
  #buffer: Bytes = EMPTY;
  #filled = 0;
  /** How long that frame will be, once its header tells. */
  #expected = 0;

  constructor(max: number, onFrame: (type: string, payload: Bytes, size: number) => void) {
    this.#max = max;
    this.#onFrame = onFrame;
  }

  push(chunk: Bytes): void {
    const bytes = this.#filled ? this.#append(chunk) : chunk;
    if (bytes.length < this.#expected) return;
    this.#expected = 0;
    let at = 0;
    while (at < bytes.length) {
      const end = this.#readText(bytes, at) || this.#readFrame(bytes, at);
      if (!end) break;
      at = end;
    }
    const rest = bytes.length - at;
    if (rest === this.#filled) return; // nothing is left, or nothing was complete
    this.#buffer = bytes.slice(at);
    this.#filled = rest;
  }

  /** Gives the beginning of the frame with the chunk behind it. */
  #append(chunk: Bytes): Bytes {
    const filled = this.#filled + chunk.length;
    if (filled > this.#buffer.length) {
      // Room for what comes, not for what the header announces.
      const size = Math.max(filled, Math.min(this.#expected, 2 * this.#buffer.length));
      const grown = new Uint8Array(size);
      grown.set(this.#buffer.subarray(0, this.#filled));
      this.#buffer = grown;
    }
    this.#buffer.set(chunk, this.#filled);
    this.#filled = filled;
    return this.#buffer.subarray(0, filled);
  }

  /**
   * Most frames are a TEXT that is there as a whole: read without a detour over strings.
   * Gives where it ends; 0 for what is anything else, or wrong, and left to `#readFrame`.
   */
  #readText(bytes: Bytes, at: number): number {
    if (!standsAt(bytes, at, TEXT_HEADER)) return 0;
    const digits = at + TEXT_HEADER.length;
    let start = digits;
    let length = 0;
    for (let digit; start < digits + 8 && (digit = hexDigit(bytes[start])) >= 0; start++) {
      length = length * 16 + digit;
    }
    if (start === digits || length > this.#max) return 0;
    if (bytes[start++] !== 13 || bytes[start++] !== 10) return 0;
    const end = start + length + 2;
    if (bytes[end - 2] !== 13 || bytes[end - 1] !== 10) return 0;
    this.#onFrame("TEXT", bytes.subarray(start, end - 2), end - at);
    return end;
  }

  /** Gives where the frame ends; 0 while it is not there as a whole. */
  #readFrame(bytes: Bytes, at: number): number {
    const start = bytes.indexOf(10, at) + 1;
    if ((start || bytes.length) - at > MAX_HEADER) throw malformed("a frame header is too long");
    if (!start) return 0;
    let header = "";
    for (let i = at; i < start; i++) header += String.fromCharCode(bytes[i]!);
    const match = FRAME_GRAMMAR.exec(header);
    if (!match) throw malformed("unknown frame");
    const [, type = "", digits] = match;
    const length = digits ? parseInt(digits, 16) : 0;
    if (type === "TEXT" || type === "BINARY") checkSize(length, this.#max);
    else if (length > MAX_CONTROL) throw malformed("a control frame is too long");
    const end = digits ? start + length + 2 : start; // without a length, the header is all
    if (end > bytes.length) {
      this.#expected = end - at;
      return 0;
    }
    if (digits && (bytes[end - 2] !== 13 || bytes[end - 1] !== 10)) {
      throw malformed("a frame's length is wrong");
    }
    this.#onFrame(type, bytes.subarray(start, start + length), end - at);
    return end;
  }
}

/** Whether these bytes stand there. */
function standsAt(chunk: Bytes, at: number, bytes: Bytes): boolean {
  for (let i = 0; i < bytes.length; i++) if (chunk[at + i] !== bytes[i]) return false;
  return true;
}

/** The value of a hexadecimal digit; -1 for what is none. */
function hexDigit(byte = 0): number {
  if (byte >= 48 && byte <= 57) return byte - 48;
  const letter = byte | 32; // in lower case
  return letter >= 97 && letter <= 102 ? letter - 87 : -1;
}

// --- Requests and refusals ---

/** Anything that ends a request early: a status, a message, and where it matters a close code. */
class Refusal extends Error {
  readonly status: number;
  readonly headers: Record<string, string>;
  readonly closeCode: number | undefined;

  constructor(
    status: number,
    message: string,
    { closeCode, headers = {} }: { closeCode?: number; headers?: Record<string, string> } = {},
  ) {
    super(message);
    this.status = status;
    this.headers = headers;
    this.closeCode = closeCode;
  }

  response(): Response {
    return new Response(`${this.message}\n`, {
      status: this.status,
      headers: {
        "content-type": "text/plain; charset=utf-8",
        "cache-control": "no-store",
        ...this.headers,
      },
    });
  }
}

function refuse(request: Request, error: unknown): Response {
  request.body?.cancel().catch(() => {}); // nobody will read it; a locked one has its reader
  if (error instanceof Refusal) return error.response();
  console.error("[duplex-sse] a hook failed:", error);
  return new Refusal(500, "A hook failed").response();
}

function checkSize(size: number, maxMessageSize: number): void {
  if (size > maxMessageSize) throw new Refusal(413, "Message too large", { closeCode: 1009 });
}

function malformed(what: string): Refusal {
  return new Refusal(400, `Malformed: ${what}`, { closeCode: 1002 });
}

function decodeText(bytes: Bytes): string {
  try {
    return strictDecoder.decode(bytes);
  } catch {
    throw new Refusal(400, "Not UTF-8", { closeCode: 1007 });
  }
}

/** What {@link readWire} gives. */
type Wire = ReturnType<typeof readWire>;

/** The protocol's own headers. "A header that appears twice …, or that does not fit its grammar, is malformed." */
function readWire({ headers }: Request) {
  const token = headers.get(TOKEN_HEADER);
  if (token !== null && !TOKEN_GRAMMAR.test(token)) throw malformed(TOKEN_HEADER);
  const version = headers.get(VERSION_HEADER);
  if (version !== null && !/^[1-9]\d{0,2}$/.test(version)) throw malformed(VERSION_HEADER);
  const full = version === VERSION;
  return {
    token,
    /** The full level is asked for. */
    full,
    /** The body is of uplink frames. */
    // "The body of a request with x-duplex-version is frames, whatever its content type."
    isUplink: full || mediaType(headers) === UPLINK_TYPE,
    attempt: optionalNumber(headers, ATTEMPT_HEADER),
    opening: full && !token ? readOpening(headers) : "",
    isPoll: full && headers.get(POLL_HEADER) === "1",
    /** Only a full session's is a number. */
    lastEventId: full && token ? optionalNumber(headers, "last-event-id") : undefined,
  };
}

function readOpening(headers: Headers): string {
  const id = headers.get(OPENING_HEADER) ?? "";
  if (id && !OPENING_GRAMMAR.test(id)) throw malformed(OPENING_HEADER);
  return id;
}

function mediaType(headers: Headers): string {
  return (headers.get("content-type") ?? "").split(";")[0]!.trim().toLowerCase();
}

function optionalNumber(headers: Headers, name: string): number | undefined {
  const value = headers.get(name);
  return value === null ? undefined : parseNumber(value, name);
}

function parseNumber(value: string, name: string): number {
  const number = Number(value);
  if (!NUMBER_GRAMMAR.test(value) || !Number.isSafeInteger(number)) throw malformed(name);
  return number;
}

/** The runtime's second argument of `fetch`; it may be anything, so it is recognised by its shape. */
type Runtime =
  | {
    /** Deno */
    remoteAddr?: { hostname?: string };
    /** Bun */
    requestIP?(request: Request): { address?: string } | null;
    timeout?(request: Request, seconds: number): void;
    /** Hono's node server */
    incoming?: { socket?: { remoteAddress?: string } };
  }
  | null
  | undefined;

function liftIdleCut(request: Request, runtime: Runtime): void {
  if (typeof runtime?.timeout === "function") runtime.timeout(request, 0);
}

function remoteAddressOf(request: Request, runtime: Runtime): string | undefined {
  if (typeof runtime?.requestIP === "function") return runtime.requestIP(request)?.address;
  return runtime?.remoteAddr?.hostname ?? runtime?.incoming?.socket?.remoteAddress ??
    (request as { ip?: string }).ip; // srvx's
}

/** Hooks read the offer where they do with crossws; "a browser may not set Sec-*", so ours names it otherwise. */
function offerProtocols(request: Request): void {
  const offered = request.headers.get(PROTOCOL_HEADER);
  if (offered === null || request.headers.has(WEBSOCKET_PROTOCOL)) return;
  const headers = new Headers(request.headers);
  headers.set(WEBSOCKET_PROTOCOL, offered);
  replaceHeaders(request, headers);
}

/** Hooks read a peer's request as long as it lives: Deno's is gone with its stream of HTTP/2. */
function keepReadable(request: Request): Request {
  void request.url; // kept from the first reading on
  return replaceHeaders(request, new Headers(request.headers));
}

function replaceHeaders(request: Request, headers: Headers): Request {
  return Object.defineProperty(request, "headers", {
    value: headers,
    configurable: true,
    enumerable: true,
  });
}

function acceptsStream(request: Request): boolean {
  const accept = request.headers.get("accept");
  return accept === null || listed(accept).some((entry) => {
    const [type, ...parameters] = entry.toLowerCase().split(";").map((part) => part.trim());
    return [STREAM_TYPE, "text/*", "*/*"].includes(type!) &&
      !parameters.some((p) => /^q=0(\.0*)?$/.test(p));
  });
}

function listed(header: string | null): string[] {
  return (header ?? "").split(",").map((part) => part.trim()).filter((part) => part);
}

/** What the response tells the browser; throws where the origin may not use this server. */
function checkOrigin(request: Request, cors: Cors = false): Headers | undefined {
  if (cors === "manual") return;
  const site = request.headers.get("sec-fetch-site");
  const sameOrigin = site === "same-origin" || site === "none";
  // "Without the cors option a request whose Sec-Fetch-Site is neither same-origin nor none is 403
  // before any hook."
  if (!cors) {
    if (site && !sameOrigin) throw new Refusal(403, "Cross-origin requests need the cors option");
    return;
  }
  const origin = request.headers.get("origin");
  const headers = new Headers({ vary: "origin" });
  if (origin && isAllowed(origin, request, cors)) {
    headers.set("access-control-allow-origin", cors === true ? "*" : origin);
    // To a page of "*" no browser gives an answer that was asked for with credentials.
    if (cors !== true) headers.set("access-control-allow-credentials", "true");
    headers.set(
      "access-control-expose-headers",
      [TOKEN_HEADER, VERSION_HEADER, RECEIVED_HEADER, "retry-after"].join(", "),
    );
    return headers;
  }
  const foreign = site ? !sameOrigin : origin && origin !== new URL(request.url).origin;
  if (foreign) throw new Refusal(403, "This origin is not allowed");
  return headers;
}

function isAllowed(origin: string, request: Request, cors: Exclude<Cors, "manual">): boolean {
  if (typeof cors === "boolean") return cors;
  return typeof cors === "function" ? cors(origin, request) : cors.includes(origin);
}

function isPreflight(request: Request, cors: Cors = false): boolean {
  return request.method === "OPTIONS" && !!cors && cors !== "manual" &&
    request.headers.has("access-control-request-method");
}

function preflight(request: Request): Response {
  const headers = new Headers({
    "access-control-allow-methods": "GET, POST",
    "access-control-max-age": "600",
  });
  const asked = request.headers.get("access-control-request-headers");
  if (asked) headers.set("access-control-allow-headers", asked);
  return new Response(null, { status: 204, headers });
}

function streamHeaders(full: boolean, token?: string): Headers {
  return new Headers({
    "content-type": STREAM_TYPE,
    "cache-control": "private, no-store, no-transform",
    "x-accel-buffering": "no",
    ...full && { [VERSION_HEADER]: VERSION },
    ...token && { [TOKEN_HEADER]: token },
  });
}

/** What comes later replaces what was there, but for headers of which every value counts. */
function addHeaders(target: Headers, source: Headers): void {
  source.forEach((value, name) => {
    if (name === "set-cookie" || name === "vary") target.append(name, value);
    else target.set(name, value);
  });
}

// --- Small things ---

/** What crossws makes of a value: text, or bytes. */
function toData(value: unknown): string | Bytes {
  if (typeof value === "string") return value;
  if (value === undefined || value === null) return "";
  if (typeof value === "function" || typeof value === "symbol") return "{}";
  if (typeof value !== "object") return String(value);
  if (ArrayBuffer.isView(value)) {
    return new Uint8Array(value.buffer as ArrayBuffer, value.byteOffset, value.byteLength);
  }
  if (
    value instanceof ArrayBuffer ||
    Object.prototype.toString.call(value) === "[object SharedArrayBuffer]"
  ) {
    return new Uint8Array(value as ArrayBuffer);
  }
  if (value instanceof Blob) {
    throw new TypeError("Read the Blob first: send(await blob.arrayBuffer())");
  }
  if (Array.isArray(value)) return Uint8Array.from(value);
  return JSON.stringify(value);
}

/** "Without a type", as Bun's fetch sends a string, it is binary "if it is not UTF-8". */
function plainMessage(payload: Bytes, type: string): string | Bytes {
  if (type === "application/octet-stream") return payload;
  try {
    return (type ? decoder : strictDecoder).decode(payload);
  } catch {
    return payload;
  }
}

function toBase64(bytes: Bytes): string {
  const native = bytes as { toBase64?(): string };
  if (native.toBase64) return native.toBase64();
  let binary = "";
  for (let at = 0; at < bytes.length; at += 0x8000) {
    binary += String.fromCharCode(...bytes.subarray(at, at + 0x8000));
  }
  return btoa(binary);
}

function concat(parts: Bytes[]): Bytes {
  let length = 0;
  for (const part of parts) length += part.length;
  const whole = new Uint8Array(length);
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

function randomHex(bytes: number): string {
  const random = crypto.getRandomValues(new Uint8Array(bytes));
  return Array.from(random, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Whether a close code may stand on the wire. */
function isCloseCode(code: number): boolean {
  return Number.isInteger(code) &&
    (code >= 3000 && code <= 4999 ||
      code >= 1000 && code <= 1014 && !(code >= 1004 && code <= 1006));
}

function checkClose(code: number, reason: string): void {
  if (code !== 1005 && !isCloseCode(code)) {
    throw new RangeError(`${code} is not a close code that may be sent`);
  }
  if (encoder.encode(reason).length > 123) {
    throw new RangeError("A close reason is at most 123 bytes");
  }
}

/** Milliseconds by a clock that nobody sets: time that is set must neither end sessions nor keep them. */
function clock(): number {
  return performance.now();
}

function numberOf(options: SSEOptions, name: keyof typeof NUMBERS): number {
  const [fallback, least, most] = NUMBERS[name];
  const value = options[name] ?? fallback;
  if (typeof value === "number" && value >= least && value <= most) return value;
  throw new RangeError(`${name} must be a number from ${least} to ${most}`);
}

/** A promise, or anything else that has a `then`, as the queries of some databases. */
function isThenable(value: unknown): value is PromiseLike<unknown> {
  return typeof (value as PromiseLike<unknown> | undefined)?.then === "function";
}

function getOrMake<K, V>(map: Map<K, V>, key: K, make: () => V): V {
  let value = map.get(key);
  if (value === undefined) map.set(key, value = make());
  return value;
}
