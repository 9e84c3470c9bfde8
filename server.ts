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
const CLOSE_HEADER = "x-duplex-close";
const TOKEN_EVENT = "crossws-id";
const OPEN_EVENT = "duplex-open";
const JSON_EVENT = "duplex-json";
const BINARY_EVENT = "duplex-binary";
const ACK_EVENT = "duplex-ack";
const PING_EVENT = "duplex-ping";
const CLOSE_EVENT = "duplex-close";
const RENEW_EVENT = "duplex-renew";

// --- The server's own constants ---

// Numbers stand first: up to whatever is no literal, esbuild puts them in place of their names.

const OPEN = 1;
const CLOSING = 2;
const CLOSED = 3;

/** The longest that a timer can wait, in ms. */
const MAX_DELAY = 2 ** 31 - 1;
/** Bun cuts a connection that is quiet for 10 s, unless told otherwise through `fetch`'s second argument. */
const UNATTENDED_HEARTBEAT_INTERVAL = 5_000;
/** That in s, and the most that it may be; and how slow a body may come, in bytes a second: clients wait so long. */
const IDLE_CUT = 10;
const MAX_IDLE_CUT = 255;
const SLOW_BODY = 8 * 1024;
/** How long a client has to answer a close, or to hear of it, where `resumeTimeout` is 0. */
const CLOSE_TIMEOUT = 5_000;
/** How long a session waits for the page that takes it over from one that was left. */
const LEAVE_PATIENCE = 4_500;
/** How long a plain session waits for its client, which cannot say that it leaves. */
const PLAIN_PATIENCE = 5_000;
/** What a plain session keeps for a native EventSource that reconnects. */
const PLAIN_HISTORY = 64 * 1024;
/** A window that is twice as large has to carry so much more, or it is halved again. */
const GAIN = 1.1;
/** What it carries is measured for so many ms at least: a path of no length has rounds of no meaning. */
const ROUND_SPAN = 100;
/** But rounds of less than this show that a path carries more, and that little of it waits on its way. */
const START_SPAN = 20;
/** After so many full rounds that is tried anew. */
const TRIAL_EVERY = 8;
/** A client may be ahead of its hooks by what they handle in this time, in ms, measured this often. */
const CREDIT_TIME = 2_000;
const CREDIT_SPAN = 200;
/** The most that one chunk gathers, a single larger message aside. */
const MAX_CHUNK = 256 * 1024;
/** A message of this size ends its chunk: to copy it again would cost more than a chunk of its own. */
const LARGE_MESSAGE = 32 * 1024;
/** Of a binary message, so much is encoded at a time: whole groups of three bytes. */
const BASE64_PART = 90 * 1024;
/** What a message that waits costs beside its bytes, roughly: small ones must not hold a hundred times the limit. */
const MESSAGE_COST = 200;
/** And what each further session costs that waits for it. */
const SLOT_COST = 16;
/** So many quiet sessions are spoken to in one task. */
const TURN = 100;
/** So many sessions flushed at once are a crowd: how long that keeps the runtime busy is measured. */
const CROWD = 64;
/**
 * The load of crowds at which publications begin to rest, and that at which they rest for as long
 * again as the runtime was busy. What overlaps counts twice: who writes without a pause has 2.
 */
const SATURATION = 1.5;
const OVERLOAD = 2;
/** The most that is measured: a backlog is soon forgotten. */
const MAX_LOAD = 4;
/** So far back it is measured, in ms, or so many flushes, if that is longer. */
const LOAD_SPAN = 25;
const LOAD_FLUSHES = 5;
/** The longest rest in ms, beyond the time that the event loop was busy. */
const MAX_REST = 20;
/** By then a rest is over, in ms, even if the runtime has stopped its timers. */
const STALLED = 1_000;
/** The most that a session holds back during a rest, in bytes: more would make its chunks no better. */
const MAX_HELD = 16 * 1024;
/** A session's bodies that are read at once: its messages, and control frames beside them. */
const MAX_BODIES = 2;
/** And a plain one's, each of which is a message. */
const MAX_PLAIN_BODIES = 16;
/**
 * Of a body that nobody wants any more, so much is read: a request's rest, for the next on its
 * connection. Once we have begun to read, some hosts leave what remains in its way.
 */
const MAX_DROPPED = 32 * 1024 * 1024;
/** So many bodies of clients that have gone may stay, and for so long, in ms. */
const MAX_STRANDED = 16;
const STRANDED_PATIENCE = 1_000;
/** The longest header of a frame, and the largest payload of one that is no message. */
const MAX_HEADER = 20;
const MAX_CONTROL = 125;
/** Pings that may wait for a connection, beyond which the oldest is dropped; and hooks of PING and PONG at once. */
const MAX_PENDING_PINGS = 16;
/** Of tokens that a client may come with. */
const MAX_MARKS = 4;
/** Room for one read of a body, in bytes: while little comes, and once that was too little. */
const SMALL_READ = 2 * 1024;
const LARGE_READ = 64 * 1024;
/** In a row, after which the large one is given up: short reads stand between those of large messages. */
const MAX_SMALL_READS = 2;
/** How long sessions have to go to other instances before a shutdown, and how they are spread, in ms. */
const HANDOVER_TIMEOUT = 5_000;
const HANDOVER_LOOK = 20;
const HANDOVER_ROUND = 250;
const HANDOVER_PATIENCE = 2_000;
/** How long a backplane has to close, in ms; and it, or a store of sessions, once the shutdown is aborted. */
const BACKPLANE_TIMEOUT = 5_000;
const HURRY = 500;
/** A session more, and at most: whoever gets them is to get no more than 20 a second of a few. */
const HANDOVER_SPREAD = 50;
const MAX_HANDOVER_SPREAD = 1_500;

/** The WebSocket header that hooks read and answer; a browser's fetch may not set it. */
const WEBSOCKET_PROTOCOL = "sec-websocket-protocol";
/** Where h3 and crossws leave the hooks that a request carries. */
const REQUEST_HOOKS: symbol = Symbol.for("crossws.hooks");
/** The options that are no numbers, and the hooks, by type; "" is checked elsewhere, or means nothing. */
const OPTION_TYPES = {
  bidir: "boolean",
  hooks: "object",
  resolve: "function",
  getNamespace: "function",
  handleProtocols: "function",
  cors: "",
  sync: "function",
  onError: "function",
  perMessageDeflate: "",
  compress: "",
};
const HOOK_TYPES = {
  upgrade: "function",
  open: "function",
  message: "function",
  close: "function",
  error: "function",
  drain: "function",
  suspend: "function",
  revive: "function",
  ping: "function",
  pong: "function",
};
/** How `console.log` asks Node, Deno and Bun alike. */
const INSPECT: symbol = Symbol.for("nodejs.util.inspect.custom");

const TOKEN_GRAMMAR = /^[0-9a-f]{16,24}\.[0-9a-f]{32}$/;
const OPENING_GRAMMAR = /^[0-9a-f]{32}$/;
const EVENT_ID_GRAMMAR = /^([0-9a-f]{32})\.(0|[1-9]\d{0,15})$/;
const NUMBER_GRAMMAR = /^(0|[1-9]\d{0,15})$/;
const FRAME_GRAMMAR = /^(TEXT|BINARY|CLOSE|PING|PONG|ACK|SEQ|LEAVE)(?: ([0-9A-Fa-f]{1,8}))?\r\n$/;

/** The options that are numbers: default, least, most. Clients reckon with the first three. */
const NUMBERS = {
  heartbeatInterval: [15_000, 1, MAX_DELAY],
  resumeTimeout: [30_000, 0, MAX_DELAY],
  window: [256 * 1024, 1, MAX_DELAY],
  maxWindow: [4 * 1024 * 1024, 1, MAX_DELAY],
  idleTimeout: [60, 0, Infinity],
  maxMessageSize: [1024 * 1024, 1, Infinity],
  maxBufferedAmount: [16 * 1024 * 1024, 0, Infinity],
  maxTotalBufferedAmount: [256 * 1024 * 1024, 0, Infinity],
  maxConnectionAge: [Infinity, 1, Infinity],
  maxPeers: [100_000, 1, Infinity],
} as const;

/** What a page of another origin may read of an answer. */
const EXPOSED_HEADERS = [
  TOKEN_HEADER,
  VERSION_HEADER,
  RECEIVED_HEADER,
  CLOSE_HEADER,
  "retry-after",
].join(", ");

/** The end of a session whose client was lost. */
const LOST: Ending = { code: 1006, reason: "", sent: 0 };
/** And of one whose page was left. */
const LEFT: Ending = { code: 1001, reason: "", sent: 0 };

const encoder: TextEncoder = new TextEncoder();
const decoder: TextDecoder = new TextDecoder("utf-8", { ignoreBOM: true });
const strictDecoder: TextDecoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
const HEARTBEAT: Bytes = encoder.encode(":\n");
const RENEWAL: Bytes = encoder.encode(`event: ${RENEW_EVENT}\ndata:\n\n`);
const TEXT_HEADER: Bytes = encoder.encode("TEXT ");
const EMPTY: Bytes = new Uint8Array();

type Bytes = Uint8Array<ArrayBuffer>;
/** Of a chunk: bytes, or what is ASCII, since an `ArrayBuffer` for each takes Deno longer than all else. */
type Part = Bytes | string;

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
   * Asked before a session opens, and again for every later request of it, with its peer: so
   * credentials are checked each time, and can be compared with whom the session is of. There
   * only a refusal counts. Return or throw a `Response` (or `{ response }`) to refuse, or return
   * `false` for 403. An open stream is asked about once: close its peer to end it.
   *
   * @example A session belongs to who opened it
   * ```ts ignore
   * async upgrade(request, peer) {
   *   const user = await userOf(request);
   *   if (!user || peer && peer.context.user !== user.id) return false;
   *   return { context: { user: user.id } };
   * }
   * ```
   */
  upgrade(
    request: UpgradeRequest,
    peer?: Peer<Context>,
  ): MaybePromise<UpgradeResult<Context> | Response | { response: Response } | false | void>;
  /** A session has begun: once a session, not once a connection. */
  open(peer: Peer<Context>): MaybePromise<void>;
  /**
   * A message has come, in order, exactly once. The next is not kept waiting: what this hook does
   * after an `await` may overlap with it.
   */
  message(peer: Peer<Context>, message: Message<Context>): MaybePromise<void>;
  /** A session has ended: once, in a task of its own, with the code and reason that the client sees, too. */
  close(peer: Peer<Context>, details: CloseDetails): MaybePromise<void>;
  /**
   * The session is about to go to another instance, where `revive` is called: stop timers, and leave
   * in `peer.context` what that needs, as JSON. Called only where `revive` is set, and with no
   * message hook at work. What is sent from then on is not taken: `send` returns 0.
   */
  suspend(peer: Peer<Context>): void;
  /** The session has come from another instance, or back to this one. Without this hook none moves. */
  revive(peer: Peer<Context>): MaybePromise<void>;
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
   * Sends a message. Strings go as text, bytes as binary, objects as JSON; an array of bytes goes
   * as binary, as in crossws. Any other array is a TypeError, and so is a Blob: read it first.
   * Returns the bytes queued, -1 when they must wait, 0 when the peer is closed.
   * A peer already past `maxBufferedAmount` is closed with 1013.
   */
  send(data: unknown, options?: { compress?: boolean }): number | void | undefined;
  /** Receives what is published to the topic, in this peer's namespace. */
  subscribe(topic: string): void;
  /** Ends a subscription. */
  unsubscribe(topic: string): void;
  /**
   * Sends to all other subscribers of the topic in this peer's namespace, as `send` does. Where
   * more is published to 64 peers or more than the runtime can write one by one, a publication
   * waits while the last is being written, and at most 20 ms longer, so that what comes meanwhile
   * shares chunks.
   */
  publish(topic: string, data: unknown, options?: { compress?: boolean }): void;
  /**
   * Closes after all that was sent before. Without a code, the client sees 1005.
   *
   * @throws {RangeError} if the code is not one that may be sent (1000 to 1014
   * without 1004 to 1006, or 3000 to 4999), or the reason is over 123 bytes.
   */
  close(code?: number, reason?: string): void;
  /** Drops the session at once, with no word to the client, which sees 1006. */
  terminate(): void;
  /**
   * Asks the client for a sign of life. Answered by the `pong` hook.
   * @throws {RangeError} for more than 125 bytes.
   */
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

/** What is published to. */
export type SyncPlace = Pick<SyncMessage, "namespace" | "topic">;

/** A connection to a backplane: crossws's type, so that its drivers plug in. */
export interface SyncDriver {
  /** Calls `deliver` for what other instances publish, never for its own. */
  subscribe(deliver: (message: SyncMessage) => void): MaybePromise<void>;
  /** Relays to the other instances; with `join`, to those that have joined the place, by default the message's own. */
  publish(message: SyncMessage, place?: SyncPlace): MaybePromise<void>;
  /**
   * Somebody here subscribes to the topic: from now on its publications are delivered here, and
   * those to all namespaces. Without it, all are. Resolves when the backplane knows.
   */
  join?(place: SyncPlace): MaybePromise<void>;
  /** As often as it was joined: then nobody here subscribes to it any more. */
  leave?(place: SyncPlace): MaybePromise<void>;
  /** Ends the connection. */
  close?(): MaybePromise<void>;
}

/** What a {@link RoutingDriver} gets of the server that it belongs to. */
export interface RoutingHost {
  /** The option of the same name. */
  readonly maxMessageSize: number;
  /** The option of the same name, in ms. */
  readonly resumeTimeout: number;
  /** How many sessions are here, and what is left of others. */
  readonly size: number;
  /** Sessions may go and come, since a `revive` hook is known: publications are counted. */
  readonly movable: boolean;
  /** Sessions that were asked for may come: not to where all are closed. */
  readonly takes: boolean;
  /** Whether the token is that of a session here, or of one that closed lately. */
  has(token: string): boolean;
  /** Whether the token is that of a session in service here. */
  owns(token: string): boolean;
  /**
   * Takes a session out of service and returns it; undefined: it cannot move now; "busy": not before
   * its hooks have settled. Without a claim only while its client is away, or this instance ends.
   */
  pack(token: string, claim?: Claim): Packed | "busy" | undefined;
  /** The encoded messages that have been published to a packed session since. */
  rest(token: string): Uint8Array[];
  /** Puts a packed session back in service. */
  restore(token: string): void;
  /** Forgets a packed session: another instance has it, or it is lost. */
  release(token: string, end: "moved" | "lost"): void;
  /** Serves a request that another instance has received, and admitted to a namespace. */
  fetch(request: Request, namespace: string): Promise<Response>;
  /** Tells `onError`. */
  report(error: unknown, context: ErrorContext): void;
}

/** A backplane that also takes requests to the instance that has their session: see `cluster`. */
export interface RoutingDriver extends SyncDriver {
  /** Called once, before anything else. */
  attach(host: RoutingHost): void;
  /** A session has begun here. */
  own(token: string): void;
  /** Resolves when it is known where the session is, if it is on its way. Who resumes tells its attempt, and wants it. */
  settled(token: string, attempt: number | undefined): Promise<void>;
  /** Where sessions wait that no instance has, if there is such a place. */
  readonly parking?: SessionParking | undefined;
  /** Whether no other instance is there. */
  isAlone(): Promise<boolean>;
  /** The next token of a session here: its second half stays, wherever it goes. */
  tokenHere(token: string): string;
  /** Asks for a session, which is given to `take` with the publications that it has missed. */
  adopt(
    token: string,
    claim: Claim,
    take: (packed: Packed, missed: SyncMessage[]) => void,
  ): Promise<void>;
  /** Answers as the instance does that has the session. Never throws. */
  route(request: Request, token: string, namespace: string): Promise<Response>;
  /** What it knows of the other instances, and does for them. */
  stats(): ClusterStats;
  /** Ends within a time of its own, and soon once the signal is aborted. */
  close(signal?: AbortSignal): Promise<void>;
}

/** A store for sessions that no instance has: see `parking`. */
export interface SessionParking {
  /** How many of this instance are there. */
  readonly size: number;
  /** The session has lost its connection. */
  away(token: string): void;
  /** Its hooks have settled, or its client is away no more: `isBack`. */
  stir(token: string, isBack?: boolean): void;
  /** Parks a session, since this instance ends. Resolves when that is done, or has failed. */
  park(token: string, leaves: boolean): Promise<void>;
  /** The store is waited for no longer: what nobody can have taken is in service again. */
  hurry(): void;
  /** Has the store alone know of one that is there, to make room here. False: of none. */
  letGo(): boolean;
}

/** Where the client of a session stands, as its resumption says. */
export interface Claim {
  /** Counts its connections. */
  readonly attempt: number;
  /** The number of the last message that it has. */
  readonly received: number;
  /** The one that `upgrade` has given it. */
  readonly namespace: string;
}

/** A session on its way between instances: JSON, but for `frames`. Nothing of its requests goes along. */
export interface Packed {
  /** The peer's. */
  id: string;
  /** The session's. */
  namespace: string;
  /** First halves of the tokens that its client may come with. */
  marks: string[];
  /** The latest of its connections. */
  attempt: number;
  /** As `upgrade` and the hooks left it. */
  context: PeerContext;
  /** The subprotocol chosen, or "". */
  protocol: string;
  /** What the peer is subscribed to. */
  topics: string[];
  /** In ms. */
  heartbeatInterval: number;
  /** The number of the last message up. */
  received: number;
  /** Encoded bytes of messages up whose hooks have settled. */
  handled: number;
  /** What its client may have under way beyond a window. */
  credit?: number | undefined;
  /** The number of the first of `frames`. */
  firstUnacked: number;
  /** The number of the first message that no connection was given. */
  nextUngiven: number;
  /** Encoded messages that the client has not acknowledged. */
  frames: Uint8Array[];
}

/** Makes a {@link SyncDriver} for the instance with this id. */
export type SyncAdapter = (context: { id: string }) => SyncDriver;

/**
 * Who may use the server from another origin: anybody (`true`, `"*"`), an origin like
 * `"https://example.com"`, a pattern, whom a function returns `true` for, or a list of these.
 */
export type Cors =
  | boolean
  | string
  | RegExp
  | ((origin: string, request: Request) => boolean)
  | (string | RegExp | ((origin: string, request: Request) => boolean))[];

/** Where an error came from that {@link SSEOptions.onError} is told of. */
export interface ErrorContext {
  /**
   * A hook or another function of the options; a request that could not be served; a body that
   * did not arrive; how the server is set up, which is told once; or the backplane: its
   * subscription, a publication, a delivery.
   */
  stage: "hook" | "request" | "body" | "setup" | "subscribe" | "publish" | "delivery";
  /** The hook's name. */
  hook?: string;
  /** The peer that it was about. */
  // deno-lint-ignore no-explicit-any
  peer?: Peer<any>;
  /** The request that it was about. */
  request?: Request;
  /** The topic of the publication that did not leave, or could not be delivered. */
  topic?: string;
  /** The topic's namespace; "" is all. */
  namespace?: string;
  /** The other instance, as it is called on the backplane. */
  instance?: string;
}

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
  /**
   * What all peers together may have held back, in bytes; a message to many counts once. Beyond,
   * peers are closed with 1013, those first that have taken nothing for longest. Default: 256 MiB.
   */
  maxTotalBufferedAmount?: number | undefined;
  /**
   * The age of a connection, in ms, at 80 to 100 % of which its client is asked to connect anew:
   * for platforms that cut streams, or to spread sessions. Default: never.
   */
  maxConnectionAge?: number | undefined;
  /** Bytes that may be under way unacknowledged, each way, at first. Default: 256 KiB. */
  window?: number | undefined;
  /** What it grows to where that carries more; not below `window`. Default: 4 MiB. */
  maxWindow?: number | undefined;
  /**
   * Sessions at once. Beyond, whoever is away makes room, those first that never sent anything;
   * where all are connected, newcomers get 503. Default: 100,000.
   */
  maxPeers?: number | undefined;
  /**
   * Other origins: `true` or "*" for any (without credentials), one or a list, a RegExp or a
   * function. "manual" leaves it to your own middleware. Default: false, cross-site requests get 403.
   */
  cors?: Cors | undefined;
  /** Relays publications to other instances; with `cluster(driver)`, any of them takes any request. */
  sync?: SyncAdapter | undefined;
  /** Told of what nobody else is: see {@link ErrorContext}. Default: `console.error`. */
  onError?(error: unknown, context: ErrorContext): void;
  /** Taken for crossws's sake, and ignored. */
  perMessageDeflate?: unknown;
  /** Taken for crossws's sake, and ignored. */
  compress?: unknown;
}

/** What {@link SSEAdapter.stats} returns: an instance now, and since its start. */
export interface Stats {
  /** Sessions of this instance, now. */
  readonly sessions: {
    /** With a connection. */
    readonly connected: number;
    /** Without one: their clients may come back. */
    readonly away: number;
    /** Closing: their clients are to take the last messages, and to answer. */
    readonly closing: number;
    /** On their way to another instance, which has not confirmed yet that it has them. */
    readonly moving: number;
  };
  /** Open peers: those of sessions that are connected or away. */
  readonly peers: number;
  /** What all peers have held back, in bytes, as `maxTotalBufferedAmount` counts it. */
  readonly bufferedAmount: number;
  /** How many sessions have opened here since the start. */
  readonly opened: number;
  /** How many have ended here, by close code; 1006: their client was lost, or was terminated. */
  readonly closed: { readonly [code: number]: number };
  /** How often an open session has lost its connection. */
  readonly drops: number;
  /** How often a client has connected anew, after a drop or before one; polls are not counted. */
  readonly resumptions: number;
  /** Requests that were refused, by status from 400 on; answers of your own hooks among them. */
  readonly refusals: { readonly [status: number]: number };
  /** How many sessions have come from other instances. */
  readonly movedIn: number;
  /** How many have gone to other instances. */
  readonly movedOut: number;
  /** The backplane; undefined without `cluster`. */
  readonly cluster: ClusterStats | undefined;
}

/** What an instance knows of its cluster. */
export interface ClusterStats {
  /** Other instances that have said lately that they have sessions. */
  readonly instances: number;
  /** Requests and streams here, now, that go to sessions of other instances. */
  readonly relayed: number;
  /** Streams of this instance's sessions, now, whose clients are connected to other instances. */
  readonly served: number;
  /** Sessions of this instance in the parking store, now, as far as it knows. */
  readonly parked: number;
  /** Publishes that the driver has not settled, now. */
  readonly pending: number;
  /** Their bytes. */
  readonly pendingBytes: number;
}

/** What {@link sseAdapter} returns. Every member may be passed around on its own. */
export interface SSEAdapter<Context = PeerContext> {
  /**
   * Answers every request of this protocol; rejects only for what is no `Request`. The second argument is
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
   * What this instance has to do, and has had: for a metrics endpoint. It reads counters that are
   * kept anyway, however many sessions there are.
   */
  stats: () => Stats;
  /**
   * Shuts down: newcomers get 503, every peer is closed after what was sent to it
   * (default code: 1001); resolves when all have gone. Who is away is waited for as long as
   * `resumeTimeout`, or until `signal` aborts: then the rest is terminated. A backplane that does not
   * close is waited for 5 s, which is reported; once the signal has aborted, 0.5 s, as a store is.
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
 * @throws {TypeError} if another option is of the wrong type, or `cors` has what is no origin.
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
  const given = options as SSEOptions;
  const reports = new Reports(given);
  const settings = settingsOf(given, reports);
  const flusher = new Flusher();
  const topics = new Topics(given, flusher, reports);
  const registry = new Registry(settings, topics, flusher, reports);
  const requests = new Requests(given, settings, registry, topics, reports);
  return {
    fetch: (request, info) => requests.fetch(request, info),
    handles: (request) => requests.handles(request),
    publish: (topic, data, options) => topics.publish(topic, data, options?.namespace),
    close: (code, reason, options) => registry.close(code, reason, options),
    stats: () => registry.stats(),
    peers: registry.peers as unknown as Map<string, Set<Peer<Context>>>,
    sync: topics.backplane?.driver,
    [Symbol.asyncDispose]: () => registry.close(),
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

// --- Requests: what each of them asks for ---

/** A request on its way through the server. */
interface Asked {
  request: Request;
  wire: Wire;
  runtime: Runtime;
  /** Routed requests: another instance has asked `upgrade`, and this is the namespace. */
  admitted: string | undefined;
}

/** Answers every request: it is an opening, a resumption or an uplink, of a plain or of a full session. */
class Requests {
  readonly #settings: Settings;
  readonly #admissions: Admissions;
  readonly #origins: Origins;
  readonly #registry: Registry;
  readonly #topics: Topics;
  readonly #reports: Reports;

  constructor(
    options: SSEOptions,
    settings: Settings,
    registry: Registry,
    topics: Topics,
    reports: Reports,
  ) {
    this.#settings = settings;
    this.#admissions = new Admissions(options);
    this.#origins = new Origins(options.cors);
    this.#registry = registry;
    this.#topics = topics;
    this.#reports = reports;
    registry.movable = isMovable([options.hooks ?? {}]);
    topics.backplane?.connect({
      maxMessageSize: settings.maxMessageSize,
      resumeTimeout: settings.resumeTimeout,
      get size() {
        return registry.size;
      },
      get movable() {
        return registry.movable;
      },
      get takes() {
        return registry.takes;
      },
      has: (token) => !!registry.find(token),
      owns: (token) => registry.owns(token),
      pack: (token, claim) => registry.pack(token, claim),
      rest: (token) => registry.limbo.get(secretOf(token))?.rest ?? [],
      restore: (token) => registry.restore(token),
      release: (token, end) => registry.release(token, end),
      fetch: (request, namespace) => this.fetch(request, undefined, namespace),
      report: (error, context) => reports.report(error, context),
    }, (message) => topics.deliver(message));
  }

  handles(request: Request): boolean {
    return request.headers.has(TOKEN_HEADER) ||
      /(^|,)\s*text\/event-stream\s*(;|,|$)/i.test(request.headers.get("accept") ?? "") ||
      // Each request of ours has a header that has to be asked for; other preflights are the app's.
      this.#origins.isPreflight(request) &&
        /x-(duplex|crossws)-|\blast-event-id\b/i.test(
          request.headers.get("access-control-request-headers") ?? "",
        );
  }

  async fetch(request: Request, info?: unknown, admitted?: string): Promise<Response> {
    if (typeof request?.headers?.get !== "function") return this.#explain(info);
    let permission: Headers | undefined;
    let response: Response;
    try {
      // "Deadlines are also checked on every request": some runtimes stop timers between requests.
      this.#registry.sweepIfDue();
      // Of a Host that is none. Hooks take a request's URL for one.
      if (!URL.canParse(request.url)) throw malformed("the URL");
      permission = this.#origins.check(request);
      response = this.#origins.isPreflight(request)
        ? preflight(request)
        : await this.#route(request, info as Runtime, admitted);
    } catch (error) {
      response = error instanceof Response ? error : this.#refuse(error, request);
    }
    const { status } = response;
    // What another instance has brought here is counted there.
    if (status >= 400 && admitted === undefined) count(this.#registry.tally.refusals, status);
    return seal(request, response, permission);
  }

  async #route(request: Request, runtime: Runtime, admitted?: string): Promise<Response> {
    const { method, headers } = request;
    if (method !== "GET" && method !== "POST") {
      throw new Refusal(405, "Use GET or POST", { headers: { allow: "GET, POST" } });
    }
    const wire = readWire(request);
    const asked: Asked = { request, wire, runtime, admitted };
    const duplex = method === "POST" && headers.get("accept") === STREAM_TYPE;
    // "Where a host keeps the connections of clients that are lost, duplex is 411."
    if (duplex && !wire.isPoll && this.#registry.stranded.areKept) {
      throw keepsClients(this.#registry.stranded.tell());
    }
    // Only what streams may be quiet for long: a body with a length is to come, however slowly.
    const streams = method === "GET" || duplex;
    liftIdleCut(request, runtime, streams ? null : headers.get("content-length"));
    const router = this.#topics.backplane?.router;
    // What another instance has brought here goes no further.
    if (router && wire.token && admitted === undefined && !this.#registry.find(wire.token)) {
      return await this.#reach(router, asked, wire.token);
    }
    if (method === "GET") {
      if (!acceptsStream(request)) throw new Refusal(406, "This answers with text/event-stream");
      if (wire.token) return await this.#resume(asked);
      return await this.#resumePlain(asked) ?? await this.#open(asked);
    }
    if (!/^(identity)?$/i.test(headers.get("content-encoding") ?? "")) {
      throw new Refusal(415, "Bodies are taken as they are", {
        headers: { "accept-encoding": "identity" },
      });
    }
    if (wire.token) {
      if (!wire.isUplink) return await this.#receivePlain(asked);
      return duplex ? await this.#resume(asked) : await this.#receive(asked);
    }
    // "Only with x-duplex-version: 1, Accept: text/event-stream and a body. Any other POST
    // without a token is 400, so that no cross-site form reaches a hook."
    const empty = !request.body || headers.get("content-length") === "0";
    if (wire.full && duplex && !empty) return await this.#open(asked);
    throw new Refusal(400, `Missing ${TOKEN_HEADER}`);
  }

  /**
   * The session is elsewhere: `upgrade` is asked here, and the request goes there. But a session
   * belongs where its stream is, so that a resumption brings it here, if it can move.
   */
  async #reach(router: RoutingDriver, asked: Asked, token: string): Promise<Response> {
    const { request, wire: { attempt, lastEventId }, runtime } = asked;
    const admission = await this.#admissions.admit(request);
    const { namespace } = admission;
    const resumes = attempt !== undefined && lastEventId !== undefined;
    await router.settled(token, resumes ? attempt : undefined);
    const movable = isMovable(admission.hooks);
    if (movable) this.#registry.movable = true; // what is published meanwhile must not be lost
    if (resumes && movable && this.#registry.adopts(token)) {
      const claim = { attempt, received: lastEventId, namespace };
      await this.#registry.arrival(router.adopt(token, claim, (packed, missed) => {
        this.#adopt(asked, admission, packed, missed);
      }));
    }
    const found = this.#registry.find(token);
    const mayWait = !!router.parking && resumes && movable && this.#registry.places.areTaken;
    if (!found) return unlessFull(mayWait, await router.route(request, token, namespace));
    if (resumes) this.#rename(found, asked.wire);
    return await this.#route(request, runtime, namespace);
  }

  /** A session of another instance goes on here. Its resumption follows. */
  #adopt(
    { request, wire, runtime }: Asked,
    admission: Admission,
    packed: Packed,
    missed: SyncMessage[],
  ): void {
    const context = { ...admission.context, ...packed.context };
    const { id, protocol, heartbeatInterval } = packed;
    const session = new FullSession(this.#registry, {
      token: wire.token!, // it is told its own when it is named, below
      name: "",
      request,
      admission: { ...admission, context, protocol },
      heartbeatInterval,
      remoteAddress: remoteAddressOf(request, runtime),
      makePeer: (session) => new ServerPeer(session, this.#registry.peers, this.#topics, id),
    });
    session.unpack(packed);
    this.#registry.add(session);
    for (const topic of packed.topics) this.#topics.subscribe(session, topic);
    for (const { topic, data } of missed) {
      if (session.topics.has(topic)) session.send(new Frame(toData(data)));
    }
    session.callHooks("revive");
    this.#registry.arrived(session);
  }

  async #open({ request, wire, runtime }: Asked): Promise<Response> {
    if (!this.#registry.findOpening(wire.opening)) this.#registry.checkRoom();
    const admission = await this.#admissions.admit(request);
    const begun = this.#registry.findOpening(wire.opening);
    if (begun?.namespace === admission.namespace) return this.#openAgain(begun, request, wire);
    this.#registry.makeRoom(); // now, since others came while the hook was thinking
    const opening: Opening = {
      token: this.#registry.newToken(),
      name: wire.opening,
      request,
      admission,
      heartbeatInterval: runtime === undefined
        ? this.#settings.unattendedHeartbeat
        : this.#settings.heartbeatInterval,
      remoteAddress: remoteAddressOf(request, runtime),
      makePeer: (session) => new ServerPeer(session, this.#registry.peers, this.#topics),
    };
    const session = wire.full
      ? new FullSession(this.#registry, opening)
      : new PlainSession(this.#registry, opening);
    this.#registry.add(session);
    this.#registry.tally.opened++;
    const stream = session.attach(wire.attempt ?? 0, 0, wire.isPoll ? "flushed" : "lost");
    // Before the hook, so that one that ends the session ends its body, too; a read comes after it.
    if (session instanceof FullSession && request.method === "POST") session.readDuplex(request);
    session.callHooks("open");
    const headers = this.#headersOf(session);
    for (const ours of ["content-type", TOKEN_HEADER, VERSION_HEADER]) {
      admission.headers.delete(ours);
    }
    addHeaders(headers, admission.headers);
    return new Response(stream, { headers });
  }

  /**
   * "An opening with an x-duplex-opening that the server has seen, from a client that has not
   * shown yet that it has the token, opens no second session: it replaces the connection of the
   * first. From one that has, it is 409."
   */
  #openAgain(session: FullSession, request: Request, wire: Wire): Response {
    if (session.isKnown || !session.canResumeFrom(0)) {
      throw new Refusal(409, "This session has begun");
    }
    const stream = session.attach(0, 0, wire.isPoll ? "flushed" : "lost");
    if (request.method === "POST") session.readDuplex(request);
    return new Response(stream, { headers: this.#headersOf(session) });
  }

  /**
   * "A request like the opening one, with the token, Last-Event-ID (the number of the last
   * message received, which also acknowledges it) and x-duplex-attempt, which grows with every try."
   */
  async #resume(asked: Asked): Promise<Response> {
    const { request, wire } = asked;
    if (!wire.full || wire.attempt === undefined || wire.lastEventId === undefined) {
      throw new Refusal(
        400,
        `A resume needs ${VERSION_HEADER}, ${ATTEMPT_HEADER} and Last-Event-ID`,
      );
    }
    const session = await this.#readmit(asked, wire.token!);
    if (session instanceof Tombstone) return this.#unearth(asked, session);
    if (session && this.#registry.sendsAway(session)) throw new Refusal(503, "Shutting down");
    if (!session) throw this.#unknown(request, wire.token!);
    if (!(session instanceof FullSession)) {
      throw new Refusal(400, "A plain session resumes by Last-Event-ID alone");
    }
    // "The highest attempt wins and ends the older stream; a lower one gets 409 and changes nothing."
    if (wire.attempt < session.attempt) throw new Refusal(409, "A newer connection has taken over");
    if (!session.canResumeFrom(wire.lastEventId)) {
      throw new Refusal(409, "Last-Event-ID is not of this session");
    }
    session.heard();
    session.isKnown = true;
    if (asked.admitted === undefined) this.#rename(session, wire);
    if (!wire.isPoll) this.#registry.tally.resumptions++;
    const stream = session.attach(wire.attempt, wire.lastEventId, wire.isPoll ? "news" : "lost");
    if (request.method === "POST" && request.body) session.readDuplex(request);
    return new Response(stream, { headers: this.#headersOf(session) });
  }

  /** A session that has closed meanwhile says so once more, for whoever missed it. */
  #unearth({ wire }: Asked, tombstone: Tombstone): Response {
    const { uplink, ending } = tombstone;
    this.#registry.told(ending);
    const terms = encodeOpen(this.#settings, {
      protocol: "",
      uplink,
      next: wire.lastEventId! + 1,
      attempt: wire.attempt!,
      heartbeatInterval: this.#settings.heartbeatInterval,
    });
    const body = concat([encoder.encode(terms), encodeClose(CLOSE_EVENT, ending)]);
    return new Response(body, { headers: streamHeaders(true, wire.token!) });
  }

  /**
   * A native EventSource repeats the id of the last event it had. "A session closed
   * meanwhile answers 204, which stops an EventSource; an unknown or expired id opens a new session."
   */
  async #resumePlain(asked: Asked): Promise<Response | undefined> {
    const { request, wire } = asked;
    const id = request.headers.get("last-event-id") ??
      new URL(request.url).searchParams.get("lastEventId") ?? ""; // where polyfills put it
    const [, key, received] = EVENT_ID_GRAMMAR.exec(id) ?? [];
    if (wire.full || !key) return;
    const session = this.#registry.findPlain(key);
    const resumable = () => session?.canResumeFrom(Number(received));
    // One that cannot be resumed is left alone: `upgrade` is asked for the session that opens.
    const found = resumable() && await this.#readmit(asked, session!.token);
    if (this.#registry.find(key) || session?.readyState === CLOSING) {
      return new Response(null, { status: 204 });
    }
    if (!session || found !== session || !resumable()) return;
    this.#registry.tally.resumptions++;
    const stream = session.attach(session.attempt, Number(received));
    return new Response(stream, { headers: this.#headersOf(session) });
  }

  /** The uplink of a full session: numbered frames. */
  async #receive(asked: Asked): Promise<Response> {
    const { request, wire } = asked;
    const receiver = await this.#readmit(asked, wire.token!);
    if (!receiver) throw this.#unknown(request, wire.token!);
    if (receiver instanceof PlainSession) {
      throw new Refusal(400, "A plain session takes plain messages");
    }
    receiver.heard();
    if (receiver instanceof FullSession) receiver.isKnown = true;
    const { maxMessageSize } = this.#settings;
    let refusal = await new Promise<unknown>((resolve) =>
      readUplink(request, receiver, maxMessageSize, resolve)
    );
    const { over } = receiver;
    // It was packed meanwhile, and its bodies let go of.
    if (!over && !this.#registry.find(wire.token!)) refusal = sessionMoves();
    if (over && isLoss(over)) throw this.#unknown(request, wire.token!);
    let response = new Response(null, { status: 204 });
    if (refusal instanceof Refusal) { // else the connection's end
      // "Failed requests never end a session": what is malformed in the bytes may be a proxy's doing.
      if (refusal.closeCode && refusal.closeCode !== 1002) {
        receiver.close(refusal.closeCode, refusal.message);
      }
      response = this.#refuse(refusal, request, receiver);
    }
    response.headers.set(RECEIVED_HEADER, String(receiver.uplink.received));
    // "The answer to an uplink says the same once the session is over".
    if (over) response.headers.set(CLOSE_HEADER, `${over.code} ${encodeURIComponent(over.reason)}`);
    return response;
  }

  /** The uplink of a plain session: messages as they are. */
  async #receivePlain(asked: Asked): Promise<Response> {
    if (!this.#settings.bidir) {
      throw new Refusal(405, "This server only sends", { headers: { allow: "GET" } });
    }
    const session = await this.#readmit(asked, asked.wire.token!);
    if (!session || session instanceof Tombstone) {
      throw this.#unknown(asked.request, asked.wire.token!);
    }
    if (session instanceof FullSession) throw new Refusal(400, `This session takes ${UPLINK_TYPE}`);
    await session.read(asked.request);
    return new Response(null, { status: 204 });
  }

  /**
   * Asks `upgrade` about a request of an existing session; returns that session, or what is left
   * of it. "Only a refusal counts; another namespace is 404."
   */
  async #readmit({ request, admitted }: Asked, token: string): Promise<Found | undefined> {
    const known = this.#registry.find(token);
    if (!known) return;
    const peer = known instanceof Tombstone ? undefined : known.peer;
    const namespace = admitted ?? (await this.#admissions.admit(request, peer)).namespace;
    const found = this.#registry.find(token); // again: it may have closed while the hook was thinking
    if (!found && known instanceof FullSession && !known.over) {
      throw sessionMoves(); // or it may have gone
    }
    return found?.namespace === (found instanceof Tombstone ? digest(namespace) : namespace)
      ? found
      : undefined;
  }

  /** Its client has come with this token, and is told the next one. */
  #rename(session: Found, { token, attempt }: Wire): void {
    const next = this.#topics.backplane?.router?.tokenHere(token!);
    if (!next || !(session instanceof FullSession) || attempt! < session.attempt) return;
    // A try that was repeated, as proxies do, has two answers: the client may have either, or none.
    const own = markOf(token!);
    const given = attempt === session.attempt ? session.marks.filter((mark) => mark !== own) : [];
    session.marks = [own, ...given.slice(2 - MAX_MARKS), markOf(next)];
  }

  #headersOf(session: Session): Headers {
    const full = session instanceof FullSession;
    if (full) return streamHeaders(true, `${session.marks.at(-1)}.${secretOf(session.token)}`);
    return streamHeaders(false, this.#settings.bidir ? session.token : undefined);
  }

  // --- Refusals ---

  #unknown(request: Request, token: string): Refusal {
    if (!this.#registry.issued(token)) {
      this.#reports.warnOnce(
        "a request came for a session of another instance, or of before a restart. Where there " +
          "are several instances, use `sync: cluster(driver)`; else see that there is one adapter alone",
        request,
      );
    }
    return new Refusal(404, "No such session");
  }

  #refuse(error: unknown, request: Request, receiver?: Receiver): Response {
    const refusal = error instanceof Refusal
      ? error
      : new Refusal(500, "Internal error", { cause: error, context: { stage: "request" } });
    if (!refusal.context) return refusal.response();
    const peer = receiver instanceof FullSession && { peer: receiver.peer };
    const context = { ...refusal.context, request, ...peer };
    if (context.stage === "body") this.#reports.once(refusal.cause ?? refusal, context);
    else this.#reports.report(refusal.cause, context);
    return refusal.response();
  }

  /** Whoever passed no `Request` is told so, by the answer too where it is Node's to give. */
  #explain(info: unknown): Promise<Response> {
    const message = "fetch takes a Request. For Node's own (request, response), as Express and " +
      'Fastify have them, use toNodeHandler(ws) of "@duplex/sse/node"';
    const error = new TypeError(message);
    const response = info as
      | { writeHead?(status: number): { end?(text: string): void } }
      | undefined;
    if (typeof response?.writeHead !== "function") return Promise.reject(error);
    this.#reports.report(error, { stage: "request" });
    try {
      response.writeHead(500).end?.(`${message}\n`);
    } catch {
      // it is answered already
    }
    return Promise.resolve(new Response(`${message}\n`, { status: 500 }));
  }
}

/** Passes on an answer with what every one of ours has. */
function seal(request: Request, response: Response, permission?: Headers): Response {
  if (!response.status) return response; // Response.error() has none, and takes no headers
  const headers = permission ?? new Headers();
  if (!/\bno-store\b/.test(response.headers.get("cache-control") ?? "")) {
    headers.set("cache-control", "no-store");
  }
  // "Every answer that the server itself gives to a request that carries x-duplex-version
  // carries x-duplex-version: 1 …. With a 200 and an event stream it grants the full level."
  const isStream = response.status === 200 &&
    response.headers.get("content-type")?.startsWith(STREAM_TYPE);
  if (request.headers.has(VERSION_HEADER) && !isStream) headers.set(VERSION_HEADER, VERSION);
  try {
    addHeaders(response.headers, headers);
    return response;
  } catch { // a hook's Response may have immutable headers
    const copy = new Headers(response.headers);
    addHeaders(copy, headers);
    return new Response(response.body, { status: response.status, headers: copy });
  }
}

function acceptsStream(request: Request): boolean {
  const accept = request.headers.get("accept");
  return accept === null || listed(accept).some((entry) => {
    const [type, ...parameters] = entry.toLowerCase().split(";").map((part) => part.trim());
    return [STREAM_TYPE, "text/*", "*/*"].includes(type!) &&
      !parameters.some((p) => /^q=0(\.0*)?$/.test(p));
  });
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

// --- Admission: who may open a session, and from where ---

/** Asks the hooks who may come in. */
class Admissions {
  readonly #options: SSEOptions;

  constructor(options: SSEOptions) {
    this.#options = options;
  }

  /**
   * Runs `upgrade`. A later hook's answer stands over an earlier one's; any refusal is final,
   * and its `Response` thrown.
   */
  async admit(request: UpgradeRequest, peer?: Peer): Promise<Admission> {
    offerProtocols(request);
    const admission: Admission = {
      hooks: await ask("resolve", () => this.#hooksOf(request)),
      namespace: await ask("getNamespace", () => this.#options.getNamespace?.(request)) ??
        new URL(request.url).pathname,
      context: request.context ?? {},
      protocol: "",
      headers: new Headers(),
    };
    for (const hooks of admission.hooks) {
      merge(admission, await ask("upgrade", () => hooks.upgrade?.(request, peer), peer));
    }
    // For the backplane "" is all namespaces, and those that begin so are its own.
    if (/^(\0|$)/.test(admission.namespace)) throw malformed("the namespace");
    checkUnread(request);
    admission.protocol ||= admission.headers.get(WEBSOCKET_PROTOCOL) ??
      await ask("handleProtocols", () => this.#chooseProtocol(request));
    if (admission.protocol) {
      await ask("upgrade", () => admission.headers.set(WEBSOCKET_PROTOCOL, admission.protocol));
    }
    return admission;
  }

  /** The adapter's hooks, then those that `resolve` finds, then those that the request carries. */
  async #hooksOf(request: UpgradeRequest): Promise<Partial<Hooks>[]> {
    type Carrier = Record<symbol, Partial<Hooks> | undefined>;
    const carried = (request as unknown as Carrier)[REQUEST_HOOKS] ??
      (request.context as Carrier | undefined)?.[REQUEST_HOOKS];
    const resolved = await this.#options.resolve?.(request);
    return [...new Set([this.#options.hooks, resolved, carried])].filter((hooks) => !!hooks);
  }

  async #chooseProtocol(request: Request): Promise<string> {
    const offered = new Set(listed(request.headers.get(WEBSOCKET_PROTOCOL)));
    if (!offered.size) return "";
    return await this.#options.handleProtocols?.(offered, request) || "";
  }
}

/** Asks a function of the options. What it throws refuses, with its `Response` or with 500. */
async function ask<T>(hook: string, call: () => MaybePromise<T>, peer?: Peer): Promise<T> {
  try {
    return await call();
  } catch (cause) {
    const { response } = Object(cause);
    if (cause instanceof Response) throw cause;
    if (response instanceof Response) throw response;
    throw new Refusal(500, "A hook failed", {
      cause,
      context: { stage: "hook", hook, ...peer && { peer } },
    });
  }
}

/** Takes what an `upgrade` hook has returned. */
function merge(admission: Admission, result: unknown): void {
  // Differs from crossws, which lets in: nobody who returns it means that.
  if (result === false) throw new Refusal(403, "Refused");
  // An arrow function may give anything, as `(request) => seen.push(request.url)` does.
  if (!result || typeof result !== "object") return;
  if (result instanceof Response) throw result;
  if ("response" in result) {
    if (result.response instanceof Response) throw result.response;
    throw new Refusal(500, "A hook failed", {
      cause: result,
      context: { stage: "hook", hook: "upgrade" },
    });
  }
  const { namespace, context, headers, protocol } = result as UpgradeResult;
  if (namespace) admission.namespace = namespace;
  if (context) Object.assign(admission.context, context);
  if (headers) addHeaders(admission.headers, new Headers(headers));
  if (protocol) admission.protocol = protocol;
}

/** Hooks read the offer where they do with crossws; "a browser may not set Sec-*", so ours names it otherwise. */
function offerProtocols(request: Request): void {
  const offered = request.headers.get(PROTOCOL_HEADER);
  if (offered === null || request.headers.has(WEBSOCKET_PROTOCOL)) return;
  const headers = new Headers(request.headers);
  headers.set(WEBSOCKET_PROTOCOL, offered);
  replaceHeaders(request, headers);
}

/** Which other origins may use the server: the option `cors`, understood once. */
class Origins {
  readonly #cors: "none" | "manual" | "any" | "some";
  readonly #allows: (origin: string, request: Request) => boolean;

  constructor(cors: Cors = false) {
    this.#cors = cors === false
      ? "none"
      : cors === true || cors === "*"
      ? "any"
      : cors === "manual"
      ? cors
      : "some";
    this.#allows = this.#cors === "some" ? originTest(cors) : () => this.#cors === "any";
  }

  /** Returns what the answer tells the browser; throws where the origin may not use this server. */
  check(request: Request): Headers | undefined {
    if (this.#cors === "manual") return;
    const origin = request.headers.get("origin");
    const site = request.headers.get("sec-fetch-site");
    // "A request whose Sec-Fetch-Site is neither same-origin nor none, or which has none and an
    // Origin of another host, is 403 before any hook."
    const foreign = site
      ? site !== "same-origin" && site !== "none"
      : origin !== null && !isOwnHost(origin, request);
    if (this.#cors === "none") {
      if (foreign) throw new Refusal(403, "Cross-origin requests need the cors option");
      return;
    }
    const headers = new Headers({ vary: "origin" });
    if (origin !== null && this.#allows(origin, request)) {
      const allowed = this.#cors === "any" ? "*" : origin;
      headers.set("access-control-allow-origin", allowed);
      headers.set("timing-allow-origin", allowed);
      // To a page of "*" no browser gives an answer that was asked for with credentials.
      if (this.#cors !== "any") headers.set("access-control-allow-credentials", "true");
      headers.set("access-control-expose-headers", EXPOSED_HEADERS);
    } else if (foreign) throw new Refusal(403, "This origin is not allowed");
    return headers;
  }

  isPreflight(request: Request): boolean {
    return request.method === "OPTIONS" && this.#cors !== "none" && this.#cors !== "manual" &&
      request.headers.has("access-control-request-method");
  }
}

/** Over plain http a browser says no more of a page than this; a proxy may have put another Host. */
function isOwnHost(origin: string, { url, headers }: Request): boolean {
  const host = /^\w+:\/\/(.*)$/.exec(origin)?.[1]?.toLowerCase();
  return [new URL(url).host, headers.get("host"), headers.get("x-forwarded-host")]
    .some((own) => !!own && own.toLowerCase() === host);
}

/** Exact, or an error at once: an origin that is compared in part lets strangers in. */
function originTest(cors: unknown): (origin: string, request: Request) => boolean {
  if (typeof cors === "function") return (origin, request) => cors(origin, request) === true;
  if (cors instanceof RegExp) {
    const pattern = new RegExp(cors.source, cors.flags.replace(/[gy]/g, "")); // these remember
    return (origin) => pattern.test(origin);
  }
  if (Array.isArray(cors)) {
    const tests = cors.map((one) => one === "*" ? () => true : originTest(one));
    return (origin, request) => tests.some((test) => test(origin, request));
  }
  const allowed = typeof cors === "string" && originOf(cors);
  if (allowed) return (origin) => origin.toLowerCase() === allowed;
  throw new TypeError(
    `cors is true, "*", "manual", an origin like "https://example.com", a RegExp, a function or a list of these, not ${
      typeof cors === "string" ? `"${cors}"` : typeof cors
    }`,
  );
}

/** The origin that a string is, whatever its case and slash at the end; else undefined. */
function originOf(text: string): string | undefined {
  if (text === "null") return text; // of files and sandboxes
  if (/[*?#]/.test(text)) return; // a pattern is a RegExp's business
  try {
    const { protocol, host, pathname, search, hash, username } = new URL(text);
    if (host && !search && !hash && !username && pathname.length < 2) return `${protocol}//${host}`;
  } catch {
    // none
  }
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

// --- Registry: all sessions of one adapter, and the one timer ---

/** A session, or what is left of one. */
type Found = FullSession | PlainSession | Tombstone;

/** Knows every session until nothing is left of it. */
class Registry implements Host {
  readonly settings: Settings;
  readonly flusher: Flusher;
  readonly ledger: Ledger = { total: 0, lent: 0 };
  readonly stranded: Stranded = new Stranded();
  readonly tally: Tally = newTally();
  readonly peers: Map<string, Set<Peer>> = new Map();
  readonly #topics: Topics;
  readonly #reports: Reports;
  readonly #sessions: Map<string, FullSession | PlainSession> = new Map();
  /** Plain sessions by the key of their event ids. */
  readonly #keys: Map<string, PlainSession> = new Map();
  /** Full sessions by the name of their opening. */
  readonly #openings: Map<string, FullSession> = new Map();
  /** What is left of closed sessions, by token; of plain ones, by the key of their event ids. */
  readonly #tombstones: Map<string, Tombstone> = new Map();
  /** Ends that their clients have yet to hear of. */
  readonly #untold: Set<Ending> = new Set();
  readonly places: Places;
  readonly #closing: Set<Session> = new Set();
  /** Ended sessions whose last bytes are still to be taken. */
  readonly #lingering: Set<Session> = new Set();
  #sweepTimer: ReturnType<typeof setTimeout> | undefined;
  /** When that timer is due; Infinity while nothing has a deadline. */
  #nextSweep = Infinity;
  /** The first half of every token. */
  #instance: string | undefined;
  readonly #calls: Calls = new Calls((error) =>
    this.report(error, { stage: "hook", hook: "close" })
  );
  #state: "open" | "handing over" | "closing" = "open";
  #whenEmpty: (() => void)[] = [];
  /** Closes a session, once all are closed. */
  #farewell: ((session: Session) => void) | undefined;
  /** Sessions that other instances were asked for. */
  readonly #arrivals: Set<Promise<void>> = new Set();
  /** Packed sessions, until another instance has them: out of service here. */
  readonly limbo: Map<string, Limbo> = new Map();
  /** Sessions may go and come: publications are counted from now on. */
  movable = false;

  constructor(settings: Settings, topics: Topics, flusher: Flusher, reports: Reports) {
    this.settings = settings;
    this.flusher = flusher;
    this.#topics = topics;
    this.#reports = reports;
    this.#instance = topics.backplane?.instance;
    const taken = () => this.#sessions.size + this.limbo.size;
    this.places = new Places(settings.maxPeers, taken, () => this.#parking);
  }

  // --- Who is there ---

  newToken(): string {
    return `${this.#instance ??= randomHex(8)}.${randomHex(16)}`;
  }

  get size(): number {
    return this.#sessions.size + this.limbo.size + this.#tombstones.size;
  }

  stats(): Stats {
    const away = this.places.away;
    const closing = this.#closing.size;
    const peers = this.#sessions.size - closing;
    const { closed, refusals, ...counts } = this.tally;
    const cluster = this.#topics.backplane?.router?.stats();
    const moving = this.limbo.size - (cluster?.parked ?? 0);
    return {
      sessions: { connected: peers - away, away, closing, moving },
      peers,
      bufferedAmount: this.ledger.total,
      ...counts,
      closed: { ...closed },
      refusals: { ...refusals },
      cluster,
    };
  }

  /** Whether the token is of this instance, whatever has become of its session. */
  issued(token: string): boolean {
    return token.startsWith(`${this.#instance}`);
  }

  add(session: FullSession | PlainSession): void {
    this.#sessions.set(secretOf(session.token), session);
    this.movable ||= session.isMovable;
    this.#topics.backplane?.router?.own(session.token);
    if (session instanceof PlainSession) this.#keys.set(session.key, session);
    else if (session.opening) this.#openings.set(session.opening, session);
    getOrMake(this.peers, session.namespace, () => new Set()).add(session.peer);
    this.moved(session, "away"); // until it is given a connection
    this.#startTimer();
  }

  /** By token; the tombstone of a plain session by the key of its event ids. */
  find(token: string): Found | undefined {
    const secret = secretOf(token);
    return this.#sessions.get(secret) ?? this.#tombstones.get(secret);
  }

  owns(token: string): boolean {
    return this.#sessions.has(secretOf(token));
  }

  findOpening(name: string): FullSession | undefined {
    return this.#openings.get(name);
  }

  findPlain(key: string): PlainSession | undefined {
    return this.#keys.get(key);
  }

  /** Throws where nobody can come in. */
  checkRoom(): void {
    if (this.#state !== "open") {
      throw new Refusal(503, "Shutting down", { headers: { "retry-after": "1" } });
    }
    this.places.check();
  }

  /** The same, and sees to it: "who is away makes room, who was never heard from first." */
  makeRoom(): void {
    this.checkRoom();
    this.places.free();
  }

  get #parking(): SessionParking | undefined {
    return this.#topics.backplane?.router?.parking;
  }

  // --- What sessions tell ---

  moved(session: Session, phase: Phase): void {
    this.places.moved(session, phase);
    if (phase !== "away") this.#parking?.stir(session.token, true);
    if (phase.startsWith("closing")) this.#closing.add(session);
    else this.#closing.delete(session);
    if (phase === "lingering") {
      this.#lingering.add(session);
      this.#startTimer();
    } else if (phase === "gone" && this.#lingering.delete(session)) this.#tellIfEmpty();
  }

  dropped(session: Session): void {
    this.tally.drops++;
    this.#parking?.away(session.token);
  }

  settled({ token }: Session): void {
    this.#parking?.stir(token);
  }

  /** Forgets a session that has ended; its tombstone tells those who missed the end. */
  bury(session: Session, ending: Ending | undefined): void {
    this.#leave(session);
    count(this.tally.closed, ending?.code ?? LOST.code);
    const key = session instanceof PlainSession ? session.key : "";
    this.#keys.delete(key);
    const { closeTimeout, maxPeers } = this.settings;
    if (ending) {
      for (const [oldest, tombstone] of this.#tombstones) {
        if (this.#tombstones.size < maxPeers) break;
        this.#remove(oldest, tombstone);
      }
      const tombstone = new Tombstone(session, ending, closeTimeout, () => this.told(ending));
      this.#tombstones.set(key || secretOf(session.token), tombstone);
      if (ending.isSudden) this.#untold.add(ending);
      this.#startTimer();
    }
    this.#tellIfEmpty();
  }

  /** The session is out of service. */
  #leave(session: Session): void {
    this.#sessions.delete(secretOf(session.token));
    const { opening = "" } = session instanceof FullSession ? session : {};
    if (this.#openings.get(opening) === session) this.#openings.delete(opening);
    const peers = this.peers.get(session.namespace);
    peers?.delete(session.peer);
    if (!peers?.size) this.peers.delete(session.namespace);
    this.#topics.leave(session);
  }

  told(ending: Ending): void {
    if (this.#untold.delete(ending)) this.#tellIfEmpty();
  }

  /** Nobody is waited for. */
  get #isEmpty(): boolean {
    return !this.#sessions.size && !this.#untold.size && !this.#lingering.size;
  }

  #tellIfEmpty(): void {
    if (this.#isEmpty) this.#whenEmpty.splice(0).forEach((resolve) => resolve());
  }

  // --- Sessions that move ---

  /** Whether a session of another instance may come here: not where sessions are sent away. */
  adopts(token: string): boolean {
    return this.#state === "open" && !this.find(token) &&
      (!this.places.areTaken || this.places.letGo());
  }

  get takes(): boolean {
    return this.#state !== "closing";
  }

  /** A session has come; it may have been on its way for too long to stay. */
  arrived(session: Session): void {
    this.tally.movedIn++;
    this.#farewell?.(session);
  }

  /** Waits for a session that is asked for; an instance that ends does so, too, to send it on. */
  async arrival(adopting: Promise<void>): Promise<void> {
    this.#arrivals.add(adopting);
    await adopting.finally(() => this.#arrivals.delete(adopting));
  }

  /** Whether the session is to go on at another instance, since this one will end. */
  sendsAway(session: Session): boolean {
    return this.#state === "handing over" && session.isMovable && session.readyState === OPEN;
  }

  pack(token: string, claim?: Claim): Packed | "busy" | undefined {
    const secret = secretOf(token);
    const session = this.#sessions.get(secret);
    if (!(session instanceof FullSession)) return;
    if (!claim && this.#state === "open" && !this.places.isAway(session)) return;
    const packed = session.isBusy ? "busy" : session.pack(claim);
    if (!packed || packed === "busy") return packed;
    this.limbo.set(secret, new Limbo(session, packed, this.#topics));
    this.#leave(session); // last: its topics are to be heard all the time
    return packed;
  }

  restore(token: string): void {
    const { session, topics = [] } = this.limbo.get(secretOf(token)) ?? {};
    if (!session) return;
    session.restore();
    this.add(session);
    // Before its limbo ends: its topics are to be heard all the time.
    for (const topic of session.isSwamped ? [] : topics) this.#topics.subscribe(session, topic);
    this.#endLimbo(token);
    if (session.isSwamped) return session.overflow();
    session.callHooks("revive");
  }

  release(token: string, end: "moved" | "lost"): void {
    const session = this.#endLimbo(token)?.session;
    if (session && end === "moved") this.tally.movedOut++;
    if (end === "moved") session?.forget();
    else session?.terminate();
    this.#tellIfEmpty();
  }

  #endLimbo(token: string): Limbo | undefined {
    const limbo = this.limbo.get(secretOf(token));
    this.limbo.delete(secretOf(token));
    if (limbo) this.#topics.leave(limbo);
    return limbo;
  }

  /** Sends the sessions that can move to other instances, not all at once, and waits for that. */
  async #handOver(backplane: Backplane, signal?: AbortSignal): Promise<void> {
    this.#state = "handing over";
    const asked = new Map<FullSession, Renewal>();
    const begun = clock();
    const end = begun + Math.min(this.settings.resumeTimeout, HANDOVER_TIMEOUT);
    let nextRound = begun;
    const parking = this.#parking;
    const remain = () =>
      this.limbo.size > (parking?.size ?? 0) ||
      [...asked.keys()].some((one) =>
        one.readyState === OPEN && !(parking && this.places.isAway(one))
      );
    const look = () => new Promise((resolve) => setTimeout(resolve, HANDOVER_LOOK));
    const isOver = () => clock() >= end || signal?.aborted;
    while (this.#arrivals.size && !isOver()) await look();
    // Nobody is asked to go where nobody else is: they would come back here.
    const isAlone = isOver() || await backplane.router!.isAlone();
    while (!isAlone && !isOver()) {
      if (clock() >= nextRound) { // others may still have come, and some may not have heard it
        askToGo(this.#sessions.values(), asked);
        nextRound = clock() + HANDOVER_ROUND;
      }
      if (!remain()) break;
      await look();
    }
    for (const { timer } of asked.values()) clearTimeout(timer);
    const packed = () => [...this.limbo.values()].map(({ session }) => session);
    // Hooks at work are waited for, since no session of theirs can be packed before.
    const isBusy = () =>
      [...this.#sessions.values()].some((one) => one instanceof FullSession && one.isBusy);
    while (parking && !isOver() && isBusy()) await look();
    const left = [...this.#sessions.values(), ...packed()];
    const parked = Promise.all(left.map(({ token }) => parking?.park(token, true)));
    if (!await inTime(parked, MAX_DELAY, signal)) parking?.hurry();
    // Whoever was sent these has them, or nobody will.
    for (const { token } of packed()) this.release(token, "moved");
  }

  /** Where too much waits in all: closes those who have taken nothing for longest, until a quarter is free. */
  relieve(): void {
    if (this.ledger.total <= this.settings.maxTotalBufferedAmount) return;
    const packed = [...this.limbo.values()].map(({ session }) => session);
    const enough = 0.75 * this.settings.maxTotalBufferedAmount;
    overflowSome([...this.#sessions.values(), ...packed], () => this.ledger.total <= enough);
  }

  later(call: () => void): void {
    this.#calls.push(call);
  }

  report(error: unknown, context: ErrorContext): void {
    this.#reports.report(error, context);
  }

  // --- Time ---

  /** Fine enough for the shortest of the deadlines; one timer for all sessions. */
  get #period(): number {
    const { closeTimeout, idleTimeout, unattendedHeartbeat, maxConnectionAge } = this.settings;
    const shortest = Math.min(
      unattendedHeartbeat / 2,
      maxConnectionAge / 20,
      closeTimeout / 4,
      idleTimeout / 4 || Infinity,
    );
    return Math.max(5, shortest);
  }

  #startTimer(): void {
    if (this.#nextSweep === Infinity) this.sweepAt(clock() + this.#period);
  }

  sweepAt(time: number): void {
    if (time >= this.#nextSweep) return;
    clearTimeout(this.#sweepTimer);
    this.#nextSweep = time;
    // A machine that stood still since is past it already, which Node warns of.
    this.#sweepTimer = setTimeout(() => this.#sweep(), Math.max(time - clock(), 0));
    // Where timers can do so, this one does not keep a process alive.
    (this.#sweepTimer as { unref?(): void }).unref?.();
  }

  /** For runtimes that stop timers between requests. */
  sweepIfDue(): void {
    const now = clock();
    if (now >= this.#nextSweep) this.#sweep();
    this.#calls.callIfDue(now);
  }

  #sweep(): void {
    clearTimeout(this.#sweepTimer);
    this.#nextSweep = Infinity;
    const now = clock();
    for (const session of this.#sessions.values()) session.tick(now);
    speakInTurn(this.#sessions.values(), now);
    for (const session of this.#lingering) if (now >= session.deadline) session.release();
    for (const [name, tombstone] of this.#tombstones) {
      if (now < tombstone.expires) break; // they were laid in the order of their expiry
      this.#remove(name, tombstone);
    }
    if (this.#sessions.size || this.#lingering.size || this.#tombstones.size) this.#startTimer();
  }

  #remove(name: string, tombstone: Tombstone): void {
    this.#tombstones.delete(name);
    tombstone.uplink.release();
    this.told(tombstone.ending); // or never will be
  }

  // --- The end ---

  async close(
    code = 1001,
    reason = "",
    { signal }: { signal?: AbortSignal } = {},
  ): Promise<void> {
    checkClose(code, reason);
    // Where timers can do so, ours keep no process alive: it would end before its sessions have.
    const awake = setInterval(() => {}, STALLED);
    try {
      await this.#close((session) => session.close(code, reason, true), signal);
    } finally {
      clearInterval(awake);
    }
  }

  async #close(farewell: (session: Session) => void, signal?: AbortSignal): Promise<void> {
    const { backplane } = this.#topics;
    if (backplane?.router && this.#state === "open") await this.#handOver(backplane, signal);
    this.#state = "closing";
    this.#farewell = farewell;
    for (const session of this.#sessions.values()) farewell(session);
    const hurry = () => {
      for (const session of this.#sessions.values()) session.terminate();
      for (const session of this.#lingering) session.release();
      for (const ending of this.#untold) this.told(ending);
    };
    if (signal?.aborted) {
      await new Promise<void>(nextTask); // the word itself goes out, to whoever reads
      hurry();
    }
    signal?.addEventListener("abort", hurry);
    // Who was closed without being asked comes back for the last word, too; and who reads slowly has
    // it still to come.
    if (!this.#isEmpty) await new Promise<void>((resolve) => this.#whenEmpty.push(resolve));
    signal?.removeEventListener("abort", hurry);
    await new Promise((resolve) => setTimeout(resolve)); // the runtime takes what is left
    this.#calls.callAll();
    for (const [name, tombstone] of this.#tombstones) this.#remove(name, tombstone);
    this.flusher.stop();
    clearTimeout(this.#sweepTimer);
    this.#nextSweep = Infinity;
    await backplane?.close(signal);
    hurry(); // a session may have come with that
  }
}

/** Says to sessions what quiet ones are due to hear, a few in each task: who talks would wait for all. */
function speakInTurn(sessions: Iterator<Session>, now: number): void {
  for (let i = 0; i < TURN; i++) {
    const { done, value } = sessions.next();
    if (done) return;
    value.speak(now);
  }
  nextTask(() => speakInTurn(sessions, now));
}

/** Closes those who have taken nothing for longest, until that is enough. */
function overflowSome(sessions: Session[], isEnough: () => boolean): void {
  const waiting = sessions.filter((session) => session.bufferedAmount > 0)
    .sort((one, other) => one.lastWrite - other.lastWrite);
  for (const session of waiting) {
    if (isEnough()) return;
    session.overflow();
  }
}

/** Close hooks, called in a task of their own: after the hooks of the last message and whatever they wait for. */
class Calls {
  readonly #report: (error: unknown) => void;
  #calls: (() => void)[] = [];
  /** By then they are called, even if the runtime has stopped its timers. */
  #due = Infinity;

  constructor(report: (error: unknown) => void) {
    this.#report = report;
  }

  push(call: () => void): void {
    if (this.#calls.push(call) > 1) return;
    this.#due = clock() + STALLED;
    nextTask(() => this.callAll());
  }

  callIfDue(now: number): void {
    if (now >= this.#due) this.callAll();
  }

  callAll(): void {
    for (const call of this.#calls) { // it grows meanwhile: what these do may end others
      try {
        call();
      } catch (error) { // hooks that cannot even be looked up must not silence everybody's
        this.#report(error);
      }
    }
    this.#calls = [];
    this.#due = Infinity;
  }
}

/** A session's client is asked to connect anew, and when it may be asked again. */
interface Renewal {
  readonly timer: ReturnType<typeof setTimeout>;
  readonly nextAt: number;
}

/** Asks the clients of sessions that can move to connect anew, if they were not asked lately. */
function askToGo(
  sessions: Iterable<Session>,
  asked: Map<FullSession, Renewal>,
): void {
  const now = clock();
  const going = [...sessions].filter((one) => one instanceof FullSession)
    .filter((one) => one.isMovable && now >= (asked.get(one)?.nextAt ?? now));
  const spread = Math.min(MAX_HANDOVER_SPREAD, going.length * HANDOVER_SPREAD);
  for (const [i, session] of going.entries()) {
    const after = (i + Math.random()) / going.length * spread;
    const timer = setTimeout(() => session.renew(), after);
    asked.set(session, { timer, nextAt: now + after + HANDOVER_PATIENCE });
  }
}

/** A session that is packed, and stands in for it where that is subscribed. */
class Limbo implements Subscriber {
  readonly session: FullSession;
  readonly namespace: string;
  readonly topics: Set<string> = new Set();
  /** How many messages went with it. */
  readonly #packed: number;

  constructor(session: FullSession, packed: Packed, topics: Topics) {
    this.session = session;
    this.namespace = session.namespace;
    this.#packed = packed.frames.length;
    for (const topic of packed.topics) topics.subscribe(this, topic);
  }

  send(frame: Frame): number {
    return this.session.keep(frame);
  }

  /** What has been published to it since. */
  get rest(): Bytes[] {
    return this.session.frames.slice(this.#packed);
  }
}

/** As many as there may be peers, and who makes room. */
class Places {
  readonly #max: number;
  readonly #taken: () => number;
  readonly #parking: () => SessionParking | undefined;
  /** Sessions without a connection, the longest away first: those never heard from, and others. */
  readonly #strangers: Set<Session> = new Set();
  readonly #others: Set<Session> = new Set();

  /** `taken`: packed sessions, too. Who comes and goes would else have any number of them. */
  constructor(max: number, taken: () => number, parking: () => SessionParking | undefined) {
    this.#max = max;
    this.#taken = taken;
    this.#parking = parking;
  }

  get away(): number {
    return this.#strangers.size + this.#others.size;
  }

  isAway(session: Session): boolean {
    return this.#strangers.has(session) || this.#others.has(session);
  }

  moved(session: Session, phase: Phase): void {
    this.#strangers.delete(session);
    this.#others.delete(session);
    if (phase === "away") (session.wasHeard ? this.#others : this.#strangers).add(session);
  }

  get areTaken(): boolean {
    return this.#taken() >= this.#max;
  }

  /** Throws where nobody can make room. */
  check(): void {
    if (this.areTaken && !this.away && !this.#parking()?.size) throw noRoom();
  }

  /** Who is parked loses nothing by it. */
  free(): void {
    if (!this.areTaken) return;
    const [stranger] = this.#strangers;
    if (!stranger && this.letGo()) return;
    const [first = stranger] = this.#others;
    if (!first) throw noRoom();
    (stranger ?? first).terminate();
  }

  letGo(): boolean {
    return !!this.#parking()?.letGo();
  }
}

function noRoom(): Refusal {
  return new Refusal(503, "Full", { headers: { "retry-after": "5" } });
}

/** Where there is no room for a session that may be in the store, it is not gone. */
function unlessFull(mayWait: boolean, response: Response): Response {
  if (mayWait && response.status === 404) throw noRoom();
  return response;
}

// --- Topics: publishing, here and on other instances ---

/** Whoever can be published to. */
interface Subscriber {
  readonly namespace: string;
  readonly topics: Set<string>;
  send(frame: Frame, hold?: boolean): number;
}

/** Subscribers by namespace and topic, so that publishing never looks at anyone else. */
class Topics {
  readonly backplane: Backplane | undefined;
  readonly #flusher: Flusher;
  readonly #topics: Map<string, Map<string, Set<Subscriber>>> = new Map();

  constructor({ sync }: SSEOptions, flusher: Flusher, reports: Reports) {
    this.#flusher = flusher;
    this.backplane = sync && new Backplane(sync, reports);
  }

  subscribe(subscriber: Subscriber, topic: string): void {
    subscriber.topics.add(topic);
    const { namespace } = subscriber;
    const topics = getOrMake(this.#topics, namespace, () => new Map());
    const subscribers = getOrMake(topics, topic, () => new Set());
    if (!subscribers.size) this.backplane?.join({ namespace, topic });
    subscribers.add(subscriber);
  }

  unsubscribe(subscriber: Subscriber, topic: string): void {
    const topics = this.#topics.get(subscriber.namespace);
    const subscribers = topics?.get(topic);
    if (!subscribers?.delete(subscriber) || subscribers.size) return;
    this.backplane?.leave({ namespace: subscriber.namespace, topic });
    topics!.delete(topic);
    if (!topics!.size) this.#topics.delete(subscriber.namespace);
  }

  /** Ends all subscriptions; `topics` goes on to tell the close hook which they were. */
  leave(subscriber: Subscriber): void {
    for (const topic of subscriber.topics) this.unsubscribe(subscriber, topic);
  }

  publish(topic: string, data: unknown, namespace = ""): void {
    const message = { namespace, topic, data: toData(data) };
    this.deliver(message);
    this.backplane?.relay(message);
  }

  publishFrom(subscriber: Subscriber, topic: string, data: unknown): void {
    const message = { namespace: subscriber.namespace, topic, data: toData(data) };
    this.#fanOut(message.namespace, topic, new Frame(message.data), subscriber);
    this.backplane?.relay(message);
  }

  /** Publishes here what this or another instance has published. */
  deliver({ namespace, topic, data }: SyncMessage): void {
    const frame = new Frame(toData(data));
    if (namespace) return this.#fanOut(namespace, topic, frame);
    for (const name of this.#topics.keys()) this.#fanOut(name, topic, frame);
  }

  #fanOut(namespace: string, topic: string, frame: Frame, except?: Subscriber): void {
    const subscribers = this.#topics.get(namespace)?.get(topic);
    if (!subscribers) return;
    const hold = this.#flusher.publishes(subscribers.size);
    for (const one of subscribers) if (one !== except) one.send(frame, hold);
  }
}

/** The connection to other instances: one of crossws's drivers, or `cluster`. */
class Backplane {
  readonly instance: string;
  readonly driver: SyncDriver;
  readonly router: RoutingDriver | undefined;
  readonly #reports: Reports;

  constructor(connect: SyncAdapter, reports: Reports) {
    const id = crypto.randomUUID();
    this.instance = id.replaceAll("-", "").slice(0, 16);
    this.#reports = reports;
    this.driver = connect({ id });
    if ("route" in this.driver) this.router = this.driver as RoutingDriver;
  }

  connect(host: RoutingHost, deliver: (message: SyncMessage) => void): void {
    this.router?.attach(host);
    const take = (message: SyncMessage) =>
      this.#try({ stage: "delivery", ...placeOf(message) }, () => deliver(message));
    this.#try({ stage: "subscribe" }, () => this.driver.subscribe(take));
  }

  relay(message: SyncMessage): void {
    this.#try({ stage: "publish", ...placeOf(message) }, () => this.driver.publish(message));
  }

  join(place: SyncPlace): void {
    if (this.driver.join) {
      this.#try({ stage: "subscribe", ...place }, () => this.driver.join!(place));
    }
  }

  leave(place: SyncPlace): void {
    if (this.driver.leave) {
      this.#try({ stage: "subscribe", ...place }, () => this.driver.leave!(place));
    }
  }

  /** Who stops while the backplane is down must be able to. */
  async close(signal?: AbortSignal): Promise<void> {
    if (this.router) return await this.router.close(signal);
    try {
      const closing = this.driver.close?.();
      if (await inTime(closing, BACKPLANE_TIMEOUT, signal) || signal?.aborted) return;
      throw new Error("The backplane does not close");
    } catch (error) {
      this.#reports.report(error, { stage: "subscribe" });
    }
  }

  /** Does one thing with the backplane, whose failures are reported and never thrown. */
  #try(context: ErrorContext, action: () => MaybePromise<void>): void {
    try {
      Promise.resolve(action()).catch((error) => this.#reports.report(error, context));
    } catch (error) {
      this.#reports.report(error, context);
    }
  }
}

/** Where a publication goes. */
function placeOf(message: SyncMessage): Pick<ErrorContext, "namespace" | "topic"> {
  const { namespace, topic } = Object(message) as SyncMessage; // a driver may deliver anything
  return { namespace, topic };
}

// --- Peers, as hooks are given them ---

/** What a peer can do with topics. */
interface PeerTopics {
  subscribe(session: Session, topic: string): void;
  unsubscribe(session: Session, topic: string): void;
  publishFrom(session: Session, topic: string, data: unknown): void;
}

class ServerPeer implements Peer {
  // Private fields stay out of what console.log shows: the token is never in there.
  readonly #session: Session;
  readonly #peers: Map<string, Set<Peer>>;
  readonly #topics: PeerTopics;
  #id: string | undefined;
  #websocket: PeerWebSocket | undefined;

  /** `id`: of a peer that has one, from another instance. */
  constructor(session: Session, peers: Map<string, Set<Peer>>, topics: PeerTopics, id?: string) {
    this.#session = session;
    this.#peers = peers;
    this.#topics = topics;
    this.#id = id;
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
    return this.#peers.get(this.namespace) ?? new Set();
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
    this.#topics.subscribe(this.#session, topic);
  }

  unsubscribe(topic: string): void {
    this.#session.topics.delete(topic);
    this.#topics.unsubscribe(this.#session, topic);
  }

  publish(topic: string, data: unknown): void {
    this.#topics.publishFrom(this.#session, topic, data);
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

// --- Sessions: a client's state, which outlives its connections ---

/** Where a session is in its life. */
type Phase =
  | "carried"
  | "away"
  | "limbo"
  | "closing carried"
  | "closing away"
  | "lingering"
  | "gone";

/**
 * Every way from phase to phase; any other throws, always, since a lookup at each of these
 * rare steps costs nothing that could be measured.
 */
const TRANSITIONS: Readonly<Record<Phase, readonly Phase[]>> = {
  "carried": ["carried", "away", "limbo", "closing carried", "gone"],
  "away": ["carried", "limbo", "closing away", "gone"],
  "limbo": ["away", "gone"],
  "closing carried": ["closing carried", "closing away", "lingering", "gone"],
  "closing away": ["closing carried", "gone"],
  "lingering": ["gone"],
  "gone": [],
};

/** What hooks see of it. */
const READY_STATES: Readonly<Record<Phase, number>> = {
  "carried": OPEN,
  "away": OPEN,
  "limbo": CLOSED,
  "closing carried": CLOSING,
  "closing away": CLOSING,
  "lingering": CLOSED,
  "gone": CLOSED,
};

/** What admission to a session has settled. */
interface Admission {
  hooks: Partial<Hooks>[];
  namespace: string;
  context: PeerContext;
  /** The subprotocol chosen, or "". */
  protocol: string;
  /** Those of the response. */
  headers: Headers;
}

/** What a session begins with. */
interface Opening {
  token: string;
  /** Which the client gave it, or "". */
  name: string;
  request: Request;
  admission: Admission;
  heartbeatInterval: number;
  remoteAddress: string | undefined;
  makePeer(session: Session): Peer;
}

/** What a session needs of whoever keeps it. */
interface Host {
  readonly settings: Settings;
  readonly flusher: Flusher;
  readonly ledger: Ledger;
  readonly stranded: Stranded;
  readonly tally: Tally;
  /** It is in another phase. */
  moved(session: Session, phase: Phase): void;
  /** It loses its connection. */
  dropped(session: Session): void;
  /** Its hooks are at work no more, while its client is away. */
  settled(session: Session): void;
  /** It has ended, which is to be told to those who missed it. */
  bury(session: Session, ending: Ending | undefined): void;
  /** Sees to it that no more waits in all than `maxTotalBufferedAmount`. */
  relieve(): void;
  /** Calls in a task of its own. */
  later(call: () => void): void;
  /** Looks at the clock at this time, if not before. */
  sweepAt(time: number): void;
  report(error: unknown, context: ErrorContext): void;
}

/** What both levels have in common. */
abstract class Session {
  readonly token: string;
  readonly namespace: string;
  readonly protocol: string;
  readonly heartbeatInterval: number;
  readonly request: Request;
  readonly context: PeerContext;
  readonly remoteAddress: string | undefined;
  readonly peer: Peer;
  readonly topics: Set<string> = new Set();
  readonly uplink: Uplink = new Uplink();
  attempt = 0;
  /** When a session that is closing, or without a connection, ends for good. */
  deadline = Infinity;
  /** When a connection was last given anything. */
  lastWrite: number = clock();

  protected readonly host: Host;
  protected readonly outbox: Outbox;
  /** The last connection was a poll. */
  protected isPolled = false;
  protected connection: Connection | undefined;
  /** How it ends, once that is known. */
  protected ending: Ending | undefined;
  /** Uplink: encoded bytes of messages whose hooks have not settled. */
  protected unhandledBytes = 0;
  /** Something is due that is no message. */
  protected controlDue = false;
  protected readonly hooks: Partial<Hooks>[];
  readonly #inContext: Snapshot;
  #phase: Phase = "away";
  /** The host flushes this session at the end of the current job, or at that of its rest. */
  #flush: "none" | "due" | "held" = "none";
  /** Something had to wait, and `drain` is yet to be called. */
  #clogged = false;
  #waiters: Waiters | undefined;

  constructor(host: Host, opening: Opening) {
    const { token, request, admission, heartbeatInterval, remoteAddress } = opening;
    this.host = host;
    this.outbox = new Outbox(host.ledger, host.settings);
    this.hooks = admission.hooks;
    this.#inContext = snapshot();
    this.token = token;
    this.namespace = admission.namespace;
    this.protocol = admission.protocol;
    this.heartbeatInterval = heartbeatInterval;
    this.request = keepReadable(request);
    this.context = admission.context;
    this.remoteAddress = remoteAddress;
    this.peer = opening.makePeer(this);
  }

  get bufferedAmount(): number {
    return this.outbox.waiting;
  }

  get readyState(): number {
    return READY_STATES[this.#phase];
  }

  protected get isOpen(): boolean {
    return this.#phase === "carried" || this.#phase === "away";
  }

  /** It is packed, for another instance. */
  protected get isPacked(): boolean {
    return this.#phase === "limbo";
  }

  /** It is over: only its last bytes may still be on their way. */
  protected get isOver(): boolean {
    return this.#phase === "lingering" || this.#phase === "gone";
  }

  protected become(phase: Phase): void {
    if (!TRANSITIONS[this.#phase].includes(phase)) {
      throw new Error(`A session that is ${this.#phase} cannot become ${phase}`);
    }
    this.#phase = phase;
    this.host.moved(this, phase);
  }

  // --- The levels' own ---

  /** The client has sent anything but its opening request. */
  abstract get wasHeard(): boolean;
  /** It can go to another instance. */
  abstract get isMovable(): boolean;
  /** What becomes of a client that does not come back. */
  protected get loss(): Ending {
    return LOST;
  }

  /** How long it waits for its client to come back. */
  protected abstract get patience(): number;
  /** What a stream begins with, when it goes on after this message. */
  protected abstract preface(received: number): string;
  protected abstract encode(frame: Frame): Encoded;
  protected abstract encodeEnding(ending: Ending): Bytes;
  /** The next message, where it may go by itself and as it is. */
  protected abstract takeAlone(): Bytes | undefined;
  /** Gathers what may go now. */
  protected abstract gather(parts: Part[]): void;
  /** The hooks have settled for a message of so many encoded bytes. */
  protected abstract handled(size: number): void;
  /** The close is out. */
  protected abstract afterClose(): void;

  // --- Connections ---

  /** Begins the next event stream, after message `received`; the one before it ends. */
  attach(attempt: number, received: number, until: Until = "lost"): ReadableStream<Bytes> {
    this.connection?.end();
    this.attempt = attempt;
    this.outbox.rewind(received);
    this.become(this.isOpen ? "carried" : "closing carried");
    if (this.isOpen) this.deadline = Infinity;
    this.lastWrite = clock();
    this.isPolled = until !== "lost";
    this.connection = new Connection(this, encoder.encode(this.preface(received)), until);
    return this.connection.stream;
  }

  canResumeFrom(received: number): boolean {
    return this.outbox.keepsAfter(received);
  }

  /** The connection is gone: the "session expires after the resume timeout". */
  lose(connection: Connection): void {
    if (connection !== this.connection) return; // a newer one has taken over
    this.connection = undefined;
    if (this.isOver) return this.release();
    if (this.isPacked) return;
    this.become(this.isOpen ? "away" : "closing away");
    this.deadline = Math.min(this.deadline, clock() + this.patience);
    if (this.isOpen) this.host.dropped(this);
    if (!this.patience) this.terminate();
  }

  /** Ends the connection as if the network had: the client will resume. */
  protected drop(): void {
    const { connection } = this;
    connection?.end();
    if (connection) this.lose(connection);
  }

  /** Lets go of the connection and of all bodies: nothing more comes, either way. */
  release(): void {
    this.connection?.end();
    this.connection = undefined;
    this.uplink.release();
    if (this.#phase !== "gone") this.become("gone");
  }

  // --- Sending ---

  /** The message goes at the end of the current job; with `hold`, at that of a rest. */
  send(frame: Frame, hold = false): number {
    if (!this.isOpen) return 0;
    this.host.relieve();
    // "A send on a peer that already has more than maxBufferedAmount held back closes it with 1013."
    if (this.outbox.cost > this.host.settings.maxBufferedAmount) this.overflow();
    if (!this.isOpen) return 0;
    const encoded = this.encode(frame);
    this.outbox.push(encoded);
    if (!hold || !this.#hold()) this.schedule();
    return this.#clogged ? -1 : encoded.bytes.length;
  }

  /** What is held back is too much: it is dropped, and the client is told so. */
  overflow(): void {
    const { last } = this.outbox;
    const ending = { code: 1013, reason: "Too much buffered", sent: last, isSudden: true };
    // A close that was due after it, of which nobody has heard, has no more to come after.
    if (this.isOpen) this.startClosing(ending);
    else this.ending = ending;
    this.finish();
  }

  ping(_data: Bytes): void {}

  /** Whether the flush is left to the end of the rest: not if one is due anyway, or much is held. */
  #hold(): boolean {
    if (this.#flush === "due" || this.bufferedAmount > this.host.settings.mostHeld) return false;
    if (this.#flush === "none" && this.host.flusher.hold(this)) this.#flush = "held";
    return this.#flush === "held";
  }

  schedule(): void {
    if (this.#flush === "due") return;
    this.#flush = "due";
    this.host.flusher.schedule(this);
  }

  /**
   * Gives the connection everything that is due as one chunk, while the runtime takes what it is
   * given. While it does not, all waits: the busier the runtime, the larger the chunks.
   */
  flush(now: number): void {
    this.#flush = "none";
    const { connection, outbox } = this;
    if (!connection?.asked || this.isPacked) {
      this.#clogged ||= this.bufferedAmount > 0;
      return;
    }
    // Mostly one message is due and nothing else, or nothing at all: neither needs an array.
    const onlyMessages = !this.controlDue && !this.ending && !connection.preface &&
      connection.until === "lost";
    const alone = onlyMessages && outbox.due === 1 ? this.takeAlone() : undefined;
    if (alone) this.#write(connection, alone, now);
    else if (!onlyMessages || outbox.due) this.#flushAll(connection, now);
    if (this.#clogged || this.bufferedAmount > 0 || this.#waiters) this.#afterFlush();
  }

  #flushAll(connection: Connection, now: number): void {
    const parts: Part[] = connection.preface ? [connection.preface] : [];
    const news = parts.length;
    connection.preface = undefined;
    this.gather(parts);
    const last = this.ending && !this.outbox.due;
    if (last) parts.push(this.encodeEnding(this.ending!));
    if (parts.length) this.#write(connection, this.host.flusher.join(parts), now);
    if (last) this.#closeIsOut();
    else if (connection.until === "flushed" || connection.until === "news" && parts.length > news) {
      this.#endTurn(connection);
    }
  }

  /** A poll has its answer. "Between polls the session is away, as after a lost connection." */
  #endTurn(connection: Connection): void {
    if (connection !== this.connection) return; // the runtime has told its loss in the write
    connection.end();
    this.connection = undefined;
    this.become(this.isOpen ? "away" : "closing away");
    this.deadline = Math.min(this.deadline, clock() + this.host.settings.closeTimeout);
  }

  #write(connection: Connection, chunk: Bytes, now: number): void {
    this.lastWrite = now;
    connection.write(chunk);
  }

  #afterFlush(): void {
    if (this.bufferedAmount > 0) this.#clogged = true;
    this.wake();
    if (this.bufferedAmount > 0 || !this.#clogged || !this.isOpen) return;
    this.#clogged = false;
    this.callHooks("drain");
  }

  waitForDrain(threshold: number, signal?: AbortSignal): Promise<void> {
    if (signal?.aborted) return Promise.reject(signal.reason);
    if (this.bufferedAmount <= threshold || !this.isOpen) return Promise.resolve();
    if (this.#flush === "held") this.schedule();
    return (this.#waiters ??= new Waiters()).wait(threshold, signal);
  }

  protected wake(): void {
    this.#waiters?.tell(this.isOpen ? this.bufferedAmount : -Infinity);
    if (this.#waiters?.isEmpty) this.#waiters = undefined;
  }

  // --- Receiving ---

  /** Any byte from the client shows that it lives. */
  abstract heard(): void;

  /** Gives a message to the hooks, and returns a promise until they have settled. */
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

  /**
   * Calls a hook wherever it is set. Returns a promise, which never rejects, where that takes time.
   * `message` is called in the async context of the request that brought it, all others in that of
   * the opening: a timer's, or another client's, would show them somebody else's. `open` comes in the
   * job that took the context, and need not enter it.
   */
  callHooks(
    name: HookName,
    argument?: Message | CloseDetails | Uint8Array,
  ): Promise<void> | undefined {
    if (name === "message" || name === "open") return this.#callHooks(name, argument);
    return this.#inContext(() => this.#callHooks(name, argument));
  }

  #callHooks(name: HookName, argument: unknown): Promise<void> | undefined {
    let pending: Promise<void> | undefined;
    for (const hooks of this.hooks) {
      const hook = hooks[name] as Hook | undefined;
      if (!hook) continue;
      pending = pending
        ? pending.then(() => this.#callHook(hooks, name, hook, argument)) // in turn, as in crossws
        : this.#callHook(hooks, name, hook, argument);
    }
    return pending;
  }

  /** Its failure goes to `error` and ends this session alone. */
  #callHook(
    hooks: Partial<Hooks>,
    name: HookName,
    hook: Hook,
    argument: unknown,
  ): Promise<void> | undefined {
    try {
      const result = hook.call(hooks, this.peer, argument);
      if (!isThenable(result)) return;
      return Promise.resolve(result).then(() => {}, (error) => this.#fail(name, error));
    } catch (error) {
      this.#fail(name, error);
    }
  }

  #fail(hook: HookName, cause: unknown): void {
    const error = cause instanceof Error ? cause : new Error("A hook failed", { cause });
    const { peer } = this;
    const listeners = this.hooks.filter((hooks) => hooks.error);
    if (!listeners.length) this.host.report(error, { stage: "hook", hook, peer });
    for (const hooks of listeners) {
      const telling = async () => await hooks.error!(peer, error); // also a throw rejects
      this.#inContext(telling).catch((error) =>
        this.host.report(error, { stage: "hook", hook: "error", peer })
      );
    }
    this.close(1011, "A hook failed");
  }

  // --- Ends ---

  /** "When the server closes, duplex-close comes after all that was sent before." */
  close(code: number, reason: string, delivers = false): void {
    if (!this.isOpen) return;
    // As WebSocket's, a reason is a USVString.
    this.startClosing({ code, reason: reason.toWellFormed(), sent: this.outbox.last, delivers });
    this.deadline = clock() + this.host.settings.closeTimeout;
  }

  /** "Whichever comes first at the server, its own close or the client's CLOSE, fixes code and reason." */
  protected startClosing(ending: Ending): void {
    this.become(this.connection ? "closing carried" : "closing away");
    this.ending = ending;
    this.wake();
    this.schedule();
  }

  #closeIsOut(): void {
    if (this.isOver) return this.release();
    if (!this.connection) return; // the runtime has told its loss while it was written to
    this.connection.end();
    this.connection = undefined;
    this.become("closing away");
    this.afterClose();
  }

  /** Ends at once, without a word: the client will be told 404. */
  terminate(): void {
    if (!this.isOver) {
      this.ending = this.loss;
      this.finish();
    }
    this.release();
  }

  /** The end of every session, clean or not; here alone `close` is called. */
  protected finish(): void {
    if (this.isOver) return;
    const { code, reason } = this.ending!;
    const lost = isLoss(this.ending!);
    // Whoever is connected is still to be told.
    this.become(this.connection && !lost ? "lingering" : "gone");
    this.outbox.clear();
    this.wake();
    this.host.bury(this, lost ? undefined : this.ending);
    if (this.#phase === "lingering") this.deadline = clock() + this.host.settings.closeTimeout;
    else this.release();
    this.host.later(() => {
      this.callHooks("close", { code, reason });
      this.topics.clear();
    });
  }

  // --- Time ---

  /** One look at the clock, from the host's timer: what is over. */
  tick(now: number): void {
    if (now >= this.deadline) this.terminate();
  }

  /** What a quiet client is due to hear. */
  speak(now: number): void {
    // A poll is over with it, so it comes as late as may be.
    const after = this.heartbeatInterval / (this.connection?.until === "news" ? 1 : 2);
    if (this.connection && now - this.lastWrite >= after - 1) this.beat();
  }

  protected beat(): void {
    const { connection } = this;
    if (!connection?.asked) return;
    this.#write(connection, HEARTBEAT, clock());
    if (connection.until !== "lost") this.#endTurn(connection);
  }
}

/** A session of the full level: PROTOCOL.md, sections 2 to 9. */
class FullSession extends Session implements Receiver {
  /** The name that its client gave the opening, or "". */
  readonly opening: string;
  /** Its client has shown that it has the token. */
  isKnown = false;
  /** Of the token that its client has come with, and of the next, which it may not have heard of. */
  marks: string[];
  #wasHeard = false;
  #ackDue = false;
  #renewDue = false;
  /** What hooks have left in its context is no JSON. */
  #isUnpackable = false;
  /** It is packed, and more was to be held back for it than may be. */
  isSwamped = false;
  /** When the connection is old. */
  #renewAt = Infinity;
  readonly #pings: string[] = [];
  #lastHeard: number = clock();
  /** The client was asked for a sign of life, and has not been heard since. */
  #pinged = false;
  /** Hooks of PING and PONG that have not settled. */
  #pendingControls = 0;
  /** Its page was left, and no other has come for it. */
  #isLeft = false;

  constructor(host: Host, opening: Opening) {
    super(host, opening);
    this.opening = opening.name;
    this.marks = [markOf(opening.token)];
  }

  get wasHeard(): boolean {
    return this.#wasHeard;
  }

  protected get patience(): number {
    return this.host.settings.resumeTimeout;
  }

  protected override get loss(): Ending {
    return this.#isLeft ? LEFT : LOST;
  }

  get takesGaps(): boolean {
    return !this.isOpen;
  }

  get over(): Ending | undefined {
    return this.isOver ? this.ending : undefined;
  }

  get isMovable(): boolean {
    return isMovable(this.hooks) && !this.#isUnpackable;
  }

  /** It could go, but for its hooks, which are at work. */
  get isBusy(): boolean {
    return this.isMovable && this.isOpen && !!(this.unhandledBytes || this.#pendingControls);
  }

  // --- To another instance, and from one ---

  /** The session as it stands, which is out of service from now on. Not while hooks are at work. */
  pack(claim?: Claim): Packed | undefined {
    if (!this.isMovable || !this.isOpen) return;
    if (claim ? !this.#meets(claim) : this.#isLeft) return;
    this.callHooks("suspend");
    if (!this.isOpen) return; // it failed, or has closed the peer
    const { id } = this.peer;
    const context = this.#packContext();
    if (!context) return;
    const { namespace, protocol, heartbeatInterval, uplink, outbox } = this;
    const { frames, firstUnacked, nextUngiven } = outbox.pack();
    const packed: Packed = {
      ...{ id, namespace, marks: this.marks, attempt: this.attempt },
      ...{ context, protocol, topics: [...this.topics], heartbeatInterval },
      ...{ received: uplink.received, handled: uplink.handled, credit: uplink.credit?.size },
      ...{ firstUnacked, nextUngiven, frames },
    };
    // The connection stays, though nothing more goes over it: a platform freezes who has none.
    this.uplink.release();
    this.become("limbo");
    this.wake();
    return packed;
  }

  #meets({ attempt, received, namespace }: Claim): boolean {
    return attempt >= this.attempt && this.canResumeFrom(received) && namespace === this.namespace;
  }

  /** What is no JSON stays, and says so once. */
  #packContext(): PeerContext | undefined {
    try {
      return JSON.parse(JSON.stringify(this.context));
    } catch (error) {
      this.#isUnpackable = true;
      this.host.report(error, { stage: "hook", hook: "suspend", peer: this.peer });
      this.callHooks("revive");
    }
  }

  /** Begins as the session that was packed elsewhere. */
  unpack({ marks, attempt, received, handled, credit, ...outbox }: Packed): void {
    this.#wasHeard = true;
    this.marks = marks;
    this.attempt = attempt;
    this.uplink.received = received;
    this.uplink.handled = handled;
    if (credit) this.#credit.goOn(credit, handled);
    this.outbox.unpack({ ...outbox, frames: outbox.frames as Bytes[] });
    this.deadline = clock() + this.patience;
  }

  /** All that its client has not acknowledged. */
  get frames(): Bytes[] {
    return this.outbox.pack().frames;
  }

  /** What is published to it meanwhile is held back as ever, for the case that it comes back. */
  keep(frame: Frame): number {
    this.host.relieve();
    if (this.outbox.cost > this.host.settings.maxBufferedAmount) this.overflow();
    if (!this.isSwamped) this.outbox.push(this.encode(frame));
    return 0;
  }

  override overflow(): void {
    if (!this.isPacked) return super.overflow();
    // Who has taken it has all that it was packed with. Else it ends when that is known.
    this.isSwamped = true;
    this.outbox.clear();
  }

  /** Nobody has taken it: it waits for its client, as after a lost connection. */
  restore(): void {
    this.connection?.end();
    this.connection = undefined;
    this.become("away");
    this.deadline = clock() + this.patience;
  }

  /** Another instance has it. */
  forget(): void {
    this.uplink.credit?.close();
    this.outbox.clear();
    this.release();
  }

  /** Asks the client to connect anew. */
  renew(): void {
    if (!this.isOpen || !this.connection) return;
    this.#renewDue = this.controlDue = true;
    this.schedule();
  }

  // --- Down ---

  override attach(attempt: number, received: number, until?: Until): ReadableStream<Bytes> {
    this.#acknowledged(received);
    this.#pinged = false;
    this.#isLeft = false;
    // Its first event says it; but a poll's may be held until the answer ends, which this does.
    if (until !== "news") this.#ackDue = false;
    this.#renewDue = false;
    // "At 80 to 100 % of maxConnectionAge, so that clients who came together do not go together."
    const { maxConnectionAge } = this.host.settings;
    this.#renewAt = clock() + maxConnectionAge * (1 - Math.random() / 5);
    return super.attach(attempt, received, until);
  }

  protected preface(received: number): string {
    return encodeOpen(this.host.settings, {
      protocol: this.protocol,
      uplink: this.uplink,
      next: received + 1,
      attempt: this.attempt,
      heartbeatInterval: this.heartbeatInterval,
    });
  }

  protected encode(frame: Frame): Encoded {
    return frame.full;
  }

  protected encodeEnding(ending: Ending): Bytes {
    return encodeClose(CLOSE_EVENT, ending);
  }

  protected takeAlone(): Bytes | undefined {
    return this.outbox.hasRoom() ? this.outbox.take() : undefined;
  }

  protected gather(parts: Part[]): void {
    if (this.controlDue) this.#gatherControl(parts);
    // "A sender below its window may begin one message of any size; at it, only control frames and CLOSE."
    for (let size = 0; this.outbox.due && size < MAX_CHUNK && this.outbox.hasRoom();) {
      const bytes = this.outbox.take();
      parts.push(bytes);
      size += bytes.length;
      if (bytes.length >= LARGE_MESSAGE) break;
    }
  }

  #gatherControl(parts: Part[]): void {
    this.controlDue = false;
    // "A pending duplex-ack precedes the messages of the same chunk."
    if (this.#ackDue) {
      const { received, handled, credit } = this.uplink;
      const isMore = credit && credit.size > this.host.settings.window;
      const numbers = isMore ? `${received} ${handled} ${credit.size}` : `${received} ${handled}`;
      parts.push(`event: ${ACK_EVENT}\ndata: ${numbers}\n\n`);
    }
    this.#ackDue = false;
    if (this.#renewDue) parts.push(RENEWAL);
    this.#renewDue = false;
    for (const data of this.#pings.splice(0)) {
      const sent = this.outbox.nextUnsent - 1;
      parts.push(`event: ${PING_EVENT}\ndata: ${sent} ${data}\n\n`);
    }
  }

  override ping(data: Bytes): void {
    if (!this.isOpen) return;
    if (this.#pings.push(toBase64(data)) > MAX_PENDING_PINGS) this.#pings.shift();
    this.controlDue = true;
    this.schedule();
  }

  // --- Up ---

  heard(): void {
    this.#wasHeard = true;
    this.#lastHeard = clock();
    this.#pinged = false;
    // The answer to a poll may take long to arrive.
    if (this.isPolled && !this.connection && this.isOpen) {
      this.deadline = clock() + this.host.settings.closeTimeout;
    }
  }

  /** Reads the uplink half of a request whose response is the event stream. */
  readDuplex(request: Request): void {
    const { maxMessageSize } = this.host.settings;
    const body = readUplink(request, this, maxMessageSize, (error) => this.#uplinkEnded(error));
    if (this.connection) this.connection.body = body;
  }

  override lose(connection: Connection): void {
    if (connection.isCut) connection.body?.strand(this.host.stranded);
    super.lose(connection);
  }

  #uplinkEnded(error: unknown): void {
    if (!error) return;
    // The connection has ended. Deno tells the stream of that only when it is written to.
    if (!(error instanceof Refusal)) return this.beat();
    // No status can be told any more. A gap leaves the session to a resume, the rest is final.
    if (error.closeCode) this.close(error.closeCode, error.message);
    else this.drop();
  }

  receive(type: string, payload: Bytes, size: number): void {
    // Sent again, it finds the session wherever that is.
    if (this.isPacked) throw sessionMoves();
    if (type === "CLOSE") return this.#receiveClose(payload);
    if (!this.isOpen && !(this.ending?.delivers && !this.isOver)) {
      this.uplink.received++; // counted, so that the client can finish
      return this.handled(size);
    }
    if (!this.host.settings.bidir) {
      throw new Refusal(403, "This server only sends", { closeCode: 1003 });
    }
    // "A client that begins a message while the window is full is closed with 1008."
    if (this.unhandledBytes >= (this.uplink.credit?.size ?? this.host.settings.window)) {
      throw new Refusal(413, "Window overrun", { closeCode: 1008 });
    }
    this.deliver(type === "TEXT" ? decodeText(payload) : payload.slice(), size);
  }

  /** "The server acknowledges at once what it received …, and apart from that the bytes it has handled." */
  protected handled(size: number): void {
    this.uplink.handled += size;
    if (size && this.isOpen) this.#credit.handled(this.uplink.handled);
    this.#ackDue = this.controlDue = true;
    this.schedule();
    this.#settle();
  }

  get #credit(): Credit {
    return this.uplink.credit ??= new Credit(this.host.ledger, this.host.settings);
  }

  control(type: string, payload: Bytes): void {
    if (type === "ACK") return this.#receiveAck(parseNumber(decoder.decode(payload), "ACK"));
    if (type === "LEAVE") return this.#leave(parseNumber(decoder.decode(payload), "LEAVE"));
    if (type === "PING") this.handled(0); // shows the client that this body is being read
    // Not in the client's window, so a slow hook is not called for more of them.
    if (!this.isOpen || this.#pendingControls >= MAX_PENDING_PINGS) return;
    const pending = this.callHooks(type === "PING" ? "ping" : "pong", payload.slice());
    if (!pending) return;
    this.#pendingControls++;
    pending.then(() => {
      this.#pendingControls--;
      this.#settle();
    });
  }

  #settle(): void {
    if (!this.connection && !this.isBusy) this.host.settled(this);
  }

  /** "LEAVE says that the page of connection attempt is left, and ends that connection; … if no other resumes, that was a close by 1001." */
  #leave(attempt: number): void {
    if (!this.isOpen || attempt < this.attempt) return; // another has resumed
    this.drop();
    if (!this.isOpen) return;
    this.#isLeft = true;
    this.deadline = Math.min(this.deadline, clock() + LEAVE_PATIENCE);
    this.host.sweepAt(this.deadline + 1); // timers round down
  }

  #receiveAck(count: number): void {
    if (count >= this.outbox.nextUngiven) {
      throw new Refusal(400, "ACK of what was not sent", { closeCode: 1002 });
    }
    this.#acknowledged(this.outbox.confirm(count));
    this.schedule();
  }

  /** "An ACK that lets go of something begins that time anew": whoever goes on reading gets what was sent before. */
  #acknowledged(count: number): void {
    const reads = count >= this.outbox.firstUnacked || this.outbox.inFlight > 0;
    this.outbox.acknowledge(count);
    if (reads && !this.isOpen && !this.isOver) {
      this.deadline = clock() + this.host.settings.closeTimeout;
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
    const sent = this.outbox.nextUngiven - 1;
    if (this.isOpen) this.startClosing({ code, reason, sent });
    this.finish();
  }

  protected afterClose(): void {} // the client is to answer

  protected override finish(): void {
    this.uplink.credit?.close();
    super.finish();
  }

  override tick(now: number): void {
    const { idleTimeout } = this.host.settings;
    const isWatched = this.connection && idleTimeout && now < this.deadline;
    if (isWatched && now - this.#lastHeard >= idleTimeout) return this.drop();
    if (now >= this.#renewAt) {
      this.#renewAt = Infinity;
      this.renew();
    }
    this.outbox.rest();
    super.tick(now);
  }

  override speak(now: number): void {
    const { idleTimeout } = this.host.settings;
    // "A client not heard from for half of idleTimeout is asked by duplex-ping."
    const isQuiet = idleTimeout && now - this.#lastHeard >= idleTimeout / 2;
    if (isQuiet && this.connection && !this.#pinged) {
      this.#pinged = true;
      this.ping(EMPTY);
    }
    super.speak(now);
  }
}

/** A session of the plain level, crossws's wire: PROTOCOL.md, section 10. */
class PlainSession extends Session {
  /** The secret in its event ids, which can resume but not send. */
  readonly key: string = randomHex(16);
  #wasHeard = false;

  get isMovable(): boolean {
    return false; // what it has sent and received is not numbered
  }

  get wasHeard(): boolean {
    return this.#wasHeard;
  }

  /** "A plain client that left is gone after 5 s": it has no way to say so. */
  protected get patience(): number {
    return Math.min(this.host.settings.resumeTimeout, PLAIN_PATIENCE);
  }

  protected preface(received: number): string {
    const { bidir } = this.host.settings;
    return `retry: 1000\nid: ${this.key}.${received}\n` + // the id is of whatever event comes next
      (bidir ? `event: ${TOKEN_EVENT}\ndata: ${this.token}\n\n` : "");
  }

  protected encode(frame: Frame): Encoded {
    return frame.plain;
  }

  protected encodeEnding({ code, reason }: Ending): Bytes {
    return encodeClose("close", { code, reason });
  }

  protected takeAlone(): undefined {} // each has its id before it

  protected gather(parts: Part[]): void {
    for (let size = 0; this.outbox.due && size < MAX_CHUNK;) {
      parts.push(`id: ${this.key}.${this.outbox.nextUnsent}\n`);
      const bytes = this.outbox.take();
      parts.push(bytes);
      size += bytes.length;
    }
    this.outbox.forgetBeyond(PLAIN_HISTORY);
  }

  override send(frame: Frame, hold?: boolean): number {
    const sent = super.send(frame, hold);
    if (!this.connection) this.#keepHistory();
    return sent;
  }

  override lose(connection: Connection): void {
    const current = connection === this.connection;
    super.lose(connection);
    if (!current || this.isOver) return;
    this.#keepHistory();
    if (!this.isOpen) this.finish();
  }

  override close(code: number, reason: string, delivers?: boolean): void {
    super.close(code, reason, delivers);
    if (!this.isOver && !this.isOpen && !this.connection) this.finish();
  }

  /** Without a connection, its messages go to the history alone. */
  #keepHistory(): void {
    this.outbox.skip();
    this.outbox.forgetBeyond(PLAIN_HISTORY);
    this.wake();
  }

  heard(): void {
    this.#wasHeard = true;
  }

  /** "A body with a length is one message …, a streamed body one text message per chunk." */
  async read(request: Request): Promise<void> {
    checkUnread(request);
    const { maxMessageSize } = this.host.settings;
    const length = request.headers.get("content-length");
    try {
      checkSize(Number(length), maxMessageSize);
      if (request.body && length === null) return await this.#readChunks(request.body);
      const payload = request.body ? await this.#readWhole(request.body, Number(length)) : EMPTY;
      if (!payload) return; // the connection's end, or the session's
      if (payload.length < Number(length)) throw notArrived();
      await this.#receive(plainMessage(payload, mediaType(request.headers)));
    } catch (error) {
      const { closeCode } = error as Refusal;
      if (closeCode) this.close(closeCode, (error as Refusal).message);
      throw error;
    }
  }

  async #readWhole(
    body: ReadableStream<Uint8Array>,
    length: number,
  ): Promise<Bytes | undefined> {
    const whole = new Gathering();
    const { complete, error } = await readPlain(readerOf(body), this, (chunk) => {
      checkSize(whole.size + chunk.length, this.host.settings.maxMessageSize);
      whole.add(chunk, length);
    });
    throwRefusal(error);
    return complete ? whole.bytes.slice() : undefined;
  }

  async #readChunks(body: ReadableStream<Uint8Array>): Promise<void> {
    const text = new TextDecoder("utf-8", { ignoreBOM: true });
    const { error } = await readPlain(readerOf(body), this, (chunk) => {
      checkSize(chunk.length, this.host.settings.maxMessageSize);
      const message = text.decode(chunk, { stream: true });
      return message ? this.#receive(message) : undefined;
    });
    throwRefusal(error);
  }

  /** A streamed body is "paused while hooks are behind": until what this returns has settled. */
  #receive(data: string | Bytes): Promise<void> | undefined {
    if (!this.isOpen) return;
    const pending = this.deliver(data, data.length);
    if (this.unhandledBytes > this.host.settings.window) return pending;
  }

  /** The answer to its request is all that a plain client is told. */
  protected handled(): void {}

  protected afterClose(): void {
    this.finish(); // its client has no answer
  }
}

/** Any hook of a peer, as it is called. */
type Hook = (this: Partial<Hooks>, peer: Peer, argument: unknown) => unknown;
type HookName =
  | "open"
  | "message"
  | "close"
  | "drain"
  | "ping"
  | "pong"
  | "suspend"
  | "revive";

/** Those who wait for `bufferedAmount` to fall. */
class Waiters {
  readonly #waiting: Set<{ threshold: number; resolve: () => void }> = new Set();

  get isEmpty(): boolean {
    return !this.#waiting.size;
  }

  wait(threshold: number, signal: AbortSignal | undefined): Promise<void> {
    return new Promise((resolve, reject) => {
      const abort = () => {
        this.#waiting.delete(waiter);
        reject(signal!.reason);
      };
      const waiter = {
        threshold,
        resolve: () => {
          signal?.removeEventListener("abort", abort);
          resolve();
        },
      };
      this.#waiting.add(waiter);
      signal?.addEventListener("abort", abort, { once: true });
    });
  }

  /** It has fallen to so many bytes. */
  tell(bytes: number): void {
    for (const waiter of this.#waiting) {
      if (bytes > waiter.threshold) continue;
      this.#waiting.delete(waiter);
      waiter.resolve();
    }
  }
}

/**
 * "A closed session leaves a tombstone for the resume timeout (5 s where that is 0): it replays
 * duplex-close to a resumption and answers a repeated CLOSE with 204."
 */
class Tombstone implements Receiver {
  /** Its digest, if it is long: thousands of these may be left of one client. */
  readonly namespace: string;
  readonly ending: Ending;
  readonly expires: number;
  readonly uplink: Uplink;
  readonly takesGaps = true;
  readonly #onAnswer: () => void;

  constructor(session: Session, ending: Ending, lasts: number, onAnswer: () => void) {
    this.#onAnswer = onAnswer;
    this.namespace = digest(session.namespace);
    this.ending = ending;
    this.expires = clock() + lasts;
    this.uplink = session.uplink;
  }

  get over(): Ending {
    return this.ending;
  }

  heard(): void {}

  close(): void {}

  /** Whoever closes knows the end by now, or hears of it with the answer. */
  receive(type: string): void {
    this.uplink.received++;
    if (type === "CLOSE") this.#onAnswer();
  }

  control(): void {}
}

// --- Messages, as hooks are given them ---

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

// --- The downlink: one event stream after the other ---

/** What is flushed. */
interface Flushable {
  schedule(): void;
  /** At this time. */
  flush(now: number): void;
}

/**
 * The time that the runtime is busy with what is published to crowds, by the time that passes: each
 * publication by itself, so that those which share chunks do not hide it.
 */
class CrowdLoad {
  #load = 0;
  /** When a crowd was last flushed. */
  #flushedAt = 0;
  /** For how long the last one that is written kept the runtime busy. */
  #busy = 0;
  /** And all together that were written since the last flush, each publication by itself. */
  #work = 0;
  /** Jobs since the last flush that have published to a crowd. */
  #jobs = 0;
  /** The subscribers that the current job has published to. */
  #reach = 0;

  /** 0 while the runtime can follow, 1 where it is overloaded. */
  get excess(): number {
    return Math.max(0, Math.min(1, (this.#load - SATURATION) / (OVERLOAD - SATURATION)));
  }

  /** Somebody publishes to so many. */
  count(subscribers: number): void {
    if (!this.#reach) queueMicrotask(() => this.#reach = 0);
    const before = this.#reach;
    this.#reach += subscribers;
    if (before < CROWD && this.#reach >= CROWD) this.#jobs++;
  }

  /** A crowd is about to be flushed; `whenFree` is told how long that keeps the runtime busy. */
  measure(whenFree: (busy: number) => void): void {
    const now = clock();
    const jobs = this.#jobs;
    const passed = now - this.#flushedAt;
    const load = Math.min(MAX_LOAD, this.#work / passed || 0);
    const span = Math.max(LOAD_SPAN, LOAD_FLUSHES * this.#busy);
    this.#load += (load - this.#load) * (1 - Math.exp(-passed / span));
    this.#flushedAt = now;
    this.#jobs = this.#work = 0;
    afterTurn(() => {
      this.#busy = clock() - now;
      this.#work += jobs * this.#busy;
      whenFree(this.#busy);
    });
  }
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
  #stopped = false;
  readonly #load: CrowdLoad = new CrowdLoad();
  /** What was joined last during this flush. */
  #lastParts: Part[] = [];
  #lastChunk: Bytes = EMPTY;

  /** Somebody publishes to so many. Returns whether that is to be held. */
  publishes(subscribers: number): boolean {
    this.#load.count(subscribers);
    return !!this.#held && clock() < this.#holdUntil;
  }

  /** Flushes the session once the current job has done all its sends. */
  schedule(session: Flushable): void {
    if (this.#dirty.push(session) > 1) return;
    queueMicrotask(() => {
      const dirty = this.#dirty;
      this.#dirty = [];
      if (dirty.length >= CROWD && !this.#held) this.#onCrowd();
      const now = clock(); // for all: a look at it costs a hundredth of a delivery
      for (const session of dirty) session.flush(now);
      this.#lastParts = [];
      this.#lastChunk = EMPTY;
    });
  }

  /**
   * The chunks of a crowd keep the runtime busy for much longer than it took to make them. What
   * is published meanwhile, and faster than that can go on, would queue up behind them, chunk
   * after chunk. So it is held for as long as the runtime is busy, and up to as long again, and
   * goes as one chunk. Where the runtime can follow, nothing waits.
   */
  #onCrowd(): void {
    if (this.#stopped) return;
    let rest = 0;
    const held: Flushable[] = [];
    const end = () => {
      this.#held = undefined;
      for (const session of held) session.schedule();
    };
    this.#load.measure((busy) => {
      if (!rest) return;
      if (this.#stopped) end();
      else this.#restTimer = setTimeout(end, Math.min(rest * busy, MAX_REST));
    });
    rest = this.#load.excess;
    if (!rest) return;
    this.#held = held;
    this.#holdUntil = clock() + STALLED;
  }

  /** Flushes the session at the end of the rest, if there is one. */
  hold(session: Flushable): boolean {
    return !!this.#held?.push(session);
  }

  /** One chunk of many frames; subscribers that are sent the same frames share the chunk, too. */
  join(parts: Part[]): Bytes {
    const [first] = parts;
    if (parts.length === 1 && typeof first !== "string") return first!;
    const last = this.#lastParts;
    if (parts.length === last.length && parts.every((part, i) => part === last[i])) {
      return this.#lastChunk;
    }
    this.#lastParts = parts;
    return this.#lastChunk = concat(parts);
  }

  /** Nobody is left: no rest begins from now on, and none leaves a timer. */
  stop(): void {
    this.#stopped = true;
    clearTimeout(this.#restTimer);
  }
}

/** Who fills a connection. */
interface Source {
  flush(now: number): void;
  lose(connection: Connection): void;
}

/**
 * How long an event stream goes on: until it is lost, or, as a poll's, until its first flush
 * or the first that has any news.
 */
type Until = "lost" | "flushed" | "news";

/** One event stream of a session. It is given bytes when the runtime takes them. */
class Connection {
  readonly stream: ReadableStream<Bytes>;
  readonly until: Until;
  /** The runtime has asked for bytes, and has taken at once whatever it was given since. */
  asked = false;
  /** The first bytes, until they are out. */
  preface: Bytes | undefined;
  /** The other half of its request. */
  body: Body | undefined;
  /** The client has gone, as the runtime says. */
  isCut = false;
  #controller!: ReadableStreamDefaultController<Bytes>;
  /** Has the runtime ask again, when it next wants bytes. */
  #askAgain = (): void => {};

  constructor(source: Source, preface: Bytes, until: Until) {
    this.preface = preface;
    this.until = until;
    this.stream = new ReadableStream<Bytes>({
      start: (controller) => {
        this.#controller = controller;
      },
      pull: () => {
        this.asked = true;
        const taking = new Promise<void>((resolve) => this.#askAgain = resolve);
        source.flush(clock());
        return taking;
      },
      cancel: () => {
        this.isCut = true;
        source.lose(this);
      },
    }, { highWaterMark: 0 });
  }

  /**
   * Only when asked. A runtime that takes this at once is given the next chunk unasked: a question
   * for each costs a twentieth of a delivery. Once it reads no more, one chunk waits there, where
   * nobody counts it; what follows a large one is asked for.
   */
  write(chunk: Bytes): void {
    this.#controller.enqueue(chunk);
    if (this.#controller.desiredSize === 0 && chunk.length < LARGE_MESSAGE) return;
    this.asked = false;
    this.#askAgain();
  }

  end(): void {
    this.asked = false;
    try {
      // Also what the runtime has not read of yet begins with it.
      if (this.preface) this.#controller.enqueue(this.preface);
      this.#controller.close();
    } catch {
      // cancelled by the runtime already
    }
  }
}

/** An encoded message, shared by all who are sent it. */
class Encoded {
  readonly bytes: Bytes;
  /** How many outboxes hold it back. */
  #holders = 0;

  constructor(bytes: Bytes) {
    this.bytes = bytes;
  }

  hold(ledger: Ledger): void {
    if (this.#holders++ === 0) ledger.total += this.bytes.length + MESSAGE_COST;
    ledger.total += SLOT_COST;
  }

  letGo(ledger: Ledger): void {
    if (--this.#holders === 0) ledger.total -= this.bytes.length + MESSAGE_COST;
    ledger.total -= SLOT_COST;
  }
}

const NOTHING: Encoded = new Encoded(EMPTY);

/**
 * Down: twice as much each time that this carries more. A round lasts from the sending of a message
 * until it is acknowledged.
 */
class Window {
  readonly allowance: Allowance;
  /** In this round something had to wait for room. */
  isFull = false;
  /**
   * Whether twice the size carries more: what is acknowledged first went under the size before. It
   * begins with sizes that fast rounds alone speak for.
   */
  #trial: "starting" | "none" | "filling" | "running" = "starting";
  /** Full rounds until the next trial. */
  #pause = 0;
  /** Bytes a millisecond, of the last full round. */
  #rate = 0;
  /** The message whose acknowledgement ends this round, and when it was sent, if it was. */
  #last = 0;
  #since = 0;
  #bytes = 0;

  constructor(ledger: Ledger, settings: Settings) {
    this.allowance = new Allowance(ledger, settings);
  }

  sent(number: number): void {
    if (number !== this.#last || this.#since) return;
    this.#since = clock();
    this.#bytes = 0;
  }

  /** So many bytes, up to this message; `next` is sent next. */
  acknowledged(bytes: number, number: number, next: number): void {
    this.#bytes += bytes;
    if (number < this.#last) return;
    const elapsed = this.isFull && this.#since && clock() - this.#since;
    this.isFull = false;
    this.#last = next;
    const starts = this.#trial === "starting" && elapsed && this.#start(elapsed);
    if (!starts && elapsed && elapsed < ROUND_SPAN && this.#trial !== "filling") return; // it goes on
    this.#since = 0;
    if (elapsed && !starts) this.#judge(this.#bytes / elapsed);
  }

  /** Whether it has grown, by a round that was full. */
  #start(elapsed: number): boolean {
    const grows = elapsed < START_SPAN && this.allowance.resize(2 * this.allowance.size);
    if (!grows) this.#trial = "none";
    return grows;
  }

  #judge(rate: number): void {
    const { allowance } = this;
    const { size } = allowance;
    if (this.#trial === "filling") return void (this.#trial = "running");
    if (this.#trial === "none" && rate < this.#rate / 2) {
      allowance.resize(size * rate / this.#rate);
    } else if (this.#trial === "running" && rate < GAIN * this.#rate) {
      this.#trial = "none";
      this.#pause = TRIAL_EVERY;
      return void allowance.resize(size / 2);
    }
    this.#rate = rate;
    this.#trial = this.#pause-- <= 0 && allowance.resize(2 * allowance.size) ? "filling" : "none";
  }
}

/** The messages that a session sends, by number, from the first that is not acknowledged. */
class Outbox {
  /** The number of the first message kept. */
  firstUnacked = 1;
  /** The number of the next message for the current connection, and that of the first that none has been given. */
  nextUnsent = 1;
  nextUngiven = 1;
  /** Encoded bytes that the current connection was given and has not acknowledged. */
  inFlight = 0;
  /** Encoded bytes that no connection has been given yet. */
  waiting = 0;
  readonly #ledger: Ledger;
  readonly #settings: Settings;
  /** Once a window was full. */
  #window: Window | undefined;
  /** The number of the last message that the client is known to have. */
  #confirmed = 0;
  /** Encoded bytes of all that is kept. */
  #kept = 0;
  #messages: Encoded[] = [];
  #head = 0;

  constructor(ledger: Ledger, settings: Settings) {
    this.#ledger = ledger;
    this.#settings = settings;
  }

  /** The number of the last message ever pushed. */
  get last(): number {
    return this.firstUnacked + this.#messages.length - this.#head - 1;
  }

  /** How many messages the current connection is yet to be given. */
  get due(): number {
    return this.last - this.nextUnsent + 1;
  }

  /** What `maxBufferedAmount` is compared with: what waits, and what each message costs beside its bytes. */
  get cost(): number {
    return this.waiting + MESSAGE_COST * (this.last - this.nextUngiven + 1);
  }

  /** Whether the current connection may be given another message. */
  hasRoom(): boolean {
    if (this.inFlight < (this.#window?.allowance.size ?? this.#settings.window)) return true;
    this.#window ??= new Window(this.#ledger, this.#settings);
    this.#window.isFull = true;
    return false;
  }

  /** A look at the clock: of a connection with nothing under way nobody knows what it carries. */
  rest(): void {
    if (this.inFlight === 0) this.#forgetWindow();
  }

  #forgetWindow(): void {
    this.#window?.allowance.close();
    this.#window = undefined;
  }

  push(message: Encoded): void {
    message.hold(this.#ledger);
    this.#messages.push(message);
    this.#kept += message.bytes.length;
    this.waiting += message.bytes.length;
  }

  #at(number: number): Encoded {
    return this.#messages[this.#head + number - this.firstUnacked]!;
  }

  /** The next message, as given to the connection from now on. */
  take(): Bytes {
    this.#window?.sent(this.nextUnsent);
    const message = this.#at(this.nextUnsent++);
    const { length } = message.bytes;
    this.inFlight += length;
    if (this.nextUnsent > this.nextUngiven) {
      this.nextUngiven = this.nextUnsent;
      this.waiting -= length;
      message.letGo(this.#ledger);
    }
    // "What the client has acknowledged already comes once more", for the count's sake alone.
    if (this.nextUnsent <= this.#confirmed + 1) this.acknowledge(this.nextUnsent - 1);
    return message.bytes;
  }

  /** The client has this message: returns the last one that need not be kept for its connection. */
  confirm(number: number): number {
    this.#confirmed = Math.max(this.#confirmed, number);
    return Math.min(number, this.nextUnsent - 1);
  }

  /** What is kept, as it goes to another instance. */
  pack(): { firstUnacked: number; nextUngiven: number; frames: Bytes[] } {
    const { firstUnacked, nextUngiven } = this;
    const frames = this.#messages.slice(this.#head).map((message) => message.bytes);
    return { firstUnacked, nextUngiven, frames };
  }

  unpack(packed: ReturnType<Outbox["pack"]>): void {
    this.firstUnacked = this.nextUnsent = this.nextUngiven = packed.firstUnacked;
    for (const bytes of packed.frames) this.push(new Encoded(bytes));
    while (this.nextUnsent < packed.nextUngiven) this.take();
  }

  /** Whether all that comes after this number is still kept, and nothing of it was never given. */
  keepsAfter(received: number): boolean {
    return this.firstUnacked - 1 <= received && received < this.nextUngiven;
  }

  /** A new connection goes on after this message. */
  rewind(received: number): void {
    this.#forgetWindow();
    this.nextUnsent = received + 1;
    this.inFlight = 0;
  }

  /** Takes all that waits for given. */
  skip(): void {
    while (this.nextUngiven <= this.last) this.#at(this.nextUngiven++).letGo(this.#ledger);
    this.waiting = 0;
  }

  /** Lets go of the oldest of what was given, beyond so many bytes. */
  forgetBeyond(bytes: number): void {
    while (this.#kept > bytes && this.firstUnacked < this.nextUngiven) {
      this.acknowledge(this.firstUnacked);
    }
  }

  clear(): void {
    this.#forgetWindow();
    this.skip();
    this.acknowledge(this.last);
    this.nextUnsent = this.firstUnacked;
  }

  /** Lets go of everything up to this number. */
  acknowledge(number: number): void {
    const keep = Math.min(number, this.last);
    const { inFlight } = this;
    for (; this.firstUnacked <= keep; this.firstUnacked++) {
      const { length } = this.#messages[this.#head]!.bytes;
      this.#kept -= length;
      if (this.firstUnacked < this.nextUnsent) this.inFlight -= length;
      this.#messages[this.#head++] = NOTHING; // frees what was there
    }
    this.#window?.acknowledged(inFlight - this.inFlight, keep, this.nextUnsent);
    const { length } = this.#messages;
    if (this.#head === length || this.#head > 1024 && this.#head * 2 > length) {
      this.#messages = this.#messages.slice(this.#head);
      this.#head = 0;
    }
  }
}

/** How a session ends. */
interface Ending {
  code: number;
  reason: string;
  /** How many messages the server had sent, for the client to see whether it has them all. */
  sent: number;
  /** What the client had sent before it knew is still given to the hooks: the server is shutting down. */
  delivers?: boolean;
  /** It does not wait for the client's answer. */
  isSudden?: boolean;
}

/** A message as it goes out, encoded once for each wire level that anybody needs. */
class Frame {
  readonly #data: string | Bytes;
  #full: Encoded | undefined;
  #plain: Encoded | undefined;

  constructor(data: string | Bytes) {
    this.#data = data;
  }

  get full(): Encoded {
    return this.#full ??= new Encoded(encodeFull(this.#data));
  }

  get plain(): Encoded {
    return this.#plain ??= new Encoded(encodePlain(this.#data));
  }
}

/** The first event of a full session's stream. */
function encodeOpen(
  { idleTimeout, resumeTimeout, maxMessageSize, window }: Settings,
  { protocol, uplink, next, attempt, heartbeatInterval }: {
    protocol: string;
    uplink: Uplink;
    next: number;
    attempt: number;
    heartbeatInterval: number;
  },
): string {
  const { received, handled } = uplink;
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
  // "A stream begins with an empty comment": it ends the line at which the one before was cut.
  return `:\nevent: ${OPEN_EVENT}\ndata: ${terms}\n\n`;
}

function encodeFull(data: string | Bytes): Bytes {
  if (typeof data !== "string") return encodeBinary(data);
  if (data.includes("\r")) {
    const wellFormed = decoder.decode(encoder.encode(data)); // as everywhere, lone surrogates become U+FFFD
    return encoder.encode(`event: ${JSON_EVENT}\ndata: ${JSON.stringify(wellFormed)}\n\n`);
  }
  return encoder.encode(dataLines(data) + "\n");
}

/** In parts, since a string of more than 128 KiB costs V8 four times as much as they do. */
function encodeBinary(data: Bytes): Bytes {
  const parts = [`event: ${BINARY_EVENT}\ndata: `];
  for (let at = 0; at < data.length; at += BASE64_PART) {
    parts.push(toBase64(data.subarray(at, at + BASE64_PART)));
  }
  parts.push("\n\n");
  return parts.length > 3 ? concat(parts) : encoder.encode(parts.join(""));
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

function encodeClose(event: string, { code, reason, sent }: Partial<Ending>): Bytes {
  return encoder.encode(`event: ${event}\ndata: ${JSON.stringify({ code, reason, sent })}\n\n`);
}

// --- The uplink: WebSocket-over-HTTP frames ---

/**
 * Of a request's body; by shape, since the runtimes' types of readers differ. What a
 * read gives may be overwritten by the next.
 */
interface Reader {
  read(): Promise<{ done: true } | { done: false; value: Uint8Array }>;
}

/** Who takes the messages of an uplink body: a session, or what is left of one. */
interface Receiver {
  readonly uplink: Uplink;
  /** It is closing: a CLOSE may skip what the client does not send any more. */
  readonly takesGaps: boolean;
  /** How it has ended, once it has. */
  readonly over: Required<CloseDetails> | undefined;
  /** A body has brought bytes. */
  heard(): void;
  /** Takes message `received + 1`; `size` is that of its encoded frame. The payload is lent for the call. */
  receive(type: string, payload: Bytes, size: number): void;
  /** Takes a frame that has no number; its payload is lent, too. */
  control(type: string, payload: Bytes): void;
  close(code: number, reason: string): void;
}

/** What all sessions hold back, in bytes: a message that many wait for is counted once. */
interface Ledger {
  total: number;
  /** By how much all windows have grown. */
  lent: number;
}

/** What may be under way one way: `window` at first, and up to `maxWindow` as far as all have room. */
class Allowance {
  size: number;
  readonly #ledger: Ledger;
  readonly #settings: Settings;

  constructor(ledger: Ledger, settings: Settings) {
    this.#ledger = ledger;
    this.#settings = settings;
    this.size = settings.window;
  }

  /** Whether it is another size than before. */
  resize(wanted: number): boolean {
    const { window, maxWindow, maxTotalBufferedAmount } = this.#settings;
    const size = Math.max(window, Math.round(Math.min(wanted, maxWindow)));
    const { total, lent } = this.#ledger;
    const more = size - this.size;
    if (!more || more > 0 && total + lent + more > maxTotalBufferedAmount / 2) return false;
    this.grant(size);
    return true;
  }

  protected grant(size: number): void {
    this.#ledger.lent += size - this.size;
    this.size = size;
  }

  close(): void {
    this.resize(0);
  }
}

/** Up: what the hooks handle in a while, so that no client has to wait for its path alone. */
class Credit extends Allowance {
  #since = 0;
  #before = 0;
  /** At so many bytes the clock is looked at next: fewer in a span would earn no more. */
  #next = 0;

  /** What another instance has granted stands, whether there is room or not: the client goes by it. */
  goOn(size: number, handled: number): void {
    this.grant(Math.max(this.size, size));
    this.#since = clock();
    this.#before = handled;
  }

  /** So many bytes in all have been handled: whether the client may send more ahead than before. */
  handled(bytes: number): boolean {
    if (bytes < this.#next) return false;
    this.#next = bytes + this.size * CREDIT_SPAN / CREDIT_TIME;
    const now = clock();
    const elapsed = now - this.#since;
    if (elapsed < CREDIT_SPAN) return false;
    const wanted = CREDIT_TIME * (bytes - this.#before) / elapsed;
    this.#since = now;
    this.#before = bytes;
    return wanted > this.size && this.resize(wanted);
  }
}

/** What a session has been sent. Its tombstone goes on with it, as bodies do that end later. */
class Uplink {
  /** The number of the last message taken. */
  received = 0;
  /** Encoded bytes of the messages whose hooks have settled. */
  handled = 0;
  /** Once hooks have handled anything. */
  credit: Credit | undefined;
  /** Request bodies that are being read, the oldest first. */
  #bodies: Set<Body> | undefined;

  /** "At most two bodies of a session are read at once; a third ends the oldest." */
  begin(body: Body, most: number): void {
    const bodies = this.#bodies ??= new Set();
    for (const oldest of bodies) {
      if (bodies.size < most) break;
      this.end(oldest);
    }
    bodies.add(body);
  }

  end(body: Body): void {
    this.#bodies?.delete(body);
    body.release();
  }

  release(): void {
    for (const body of this.#bodies ?? []) this.end(body);
  }
}

/** How the reading of a body has ended: it was all there, or something failed, or nobody wanted the rest. */
interface BodyEnd {
  complete: boolean;
  error?: unknown;
}

/** Who is sent a body. */
type Listener = Pick<Receiver, "uplink" | "heard">;

/** Takes one chunk of a body: a promise pauses it, what is thrown ends it. */
type Take = (chunk: Bytes) => Promise<void> | void;

/** Who takes a body, chunk by chunk, and is told its end. */
interface Taker {
  listener: Listener;
  take: Take;
  ended(end: BodyEnd): void;
}

/**
 * The body of one request. It is never cancelled, since hosts that make their own streams may
 * not survive that: what nobody wants any more is read and dropped up to a bound, for what
 * comes next on the connection, and the rest is left alone.
 *
 * Its end is told by a call: a promise and the functions that await it would be held by each idle
 * session with an open body, 1.4 KB on Deno and 0.7 KB on Bun.
 */
class Body {
  /**
   * None once nobody wants the rest: some hosts wait for that as long as its connection lives, which
   * must not keep what has come, and whose it is.
   */
  #taker: Taker | undefined;
  #dropped = 0;
  #isOver = false;
  #stranded: Stranded | undefined;

  constructor(taker: Taker) {
    this.#taker = taker;
  }

  /** What still comes is dropped. */
  release(): void {
    this.#end({ complete: false });
  }

  #end(end: BodyEnd): void {
    const taker = this.#taker;
    if (!taker) return;
    this.#taker = undefined;
    taker.listener.uplink.end(this);
    taker.ended(end);
  }

  async read(reader: Reader): Promise<void> {
    let end: BodyEnd = { complete: true };
    try {
      for (let chunk = await reader.read(); !chunk.done; chunk = await reader.read()) {
        if (this.#taker) {
          const pending = this.#give(this.#taker, chunk.value as Bytes);
          if (pending) await pending;
        } else if ((this.#dropped += chunk.value.length) > MAX_DROPPED) return;
      }
    } catch (error) { // the connection's end
      end = { complete: false, error };
    } finally {
      this.#isOver = true;
      this.#stranded?.delete(this);
    }
    this.#end(end);
  }

  /** Its client has gone: the host is to end it. */
  strand(stranded: Stranded): void {
    if (this.#isOver) return;
    this.#stranded = stranded;
    stranded.add(this);
  }

  #give({ listener, take }: Taker, chunk: Bytes): Promise<void> | void {
    try {
      listener.heard();
      return take(chunk);
    } catch (error) {
      this.#end({ complete: false, error });
    }
  }
}

/**
 * Bodies whose clients have gone. A host that never ends them never lets go of their connections
 * either, and each takes a file descriptor.
 */
class Stranded {
  readonly #since: Map<Body, number> = new Map();
  #isTold = false;

  add(body: Body): void {
    this.#since.set(body, clock());
  }

  delete(body: Body): void {
    this.#since.delete(body);
  }

  /** Some for too long. */
  get areKept(): boolean {
    if (this.#since.size < MAX_STRANDED) return false;
    const [oldest] = this.#since.values();
    return clock() - oldest! > STRANDED_PATIENCE;
  }

  /** Whether nobody was told yet. */
  tell(): boolean {
    const isNews = !this.#isTold;
    this.#isTold = true;
    return isNews;
  }
}

/** Reads a body to its end, and tells that. */
function readBody(
  reader: Reader,
  listener: Listener,
  most: number,
  take: Take,
  ended: (end: BodyEnd) => void,
): Body {
  const body = new Body({ listener, take, ended });
  listener.uplink.begin(body, most);
  body.read(reader);
  return body;
}

/** The same for the body of a plain session. */
function readPlain(reader: Reader, listener: Listener, take: Take): Promise<BodyEnd> {
  return new Promise((resolve) => void readBody(reader, listener, MAX_PLAIN_BODIES, take, resolve));
}

/** What was read before us cannot be read again, and must not pass for a message that came. */
function checkUnread(request: Request): void {
  if (request.bodyUsed || request.body?.locked) throw notArrived();
}

/** A request that is read while it is answered, at a host that does not end such a body. */
function keepsClients(isNews: boolean): Refusal {
  return new Refusal(
    411,
    "This host keeps the connection of a client that is lost while its request is read and answered",
    isNews ? { context: { stage: "body" } } : {},
  );
}

/** A body that somebody else has read, or kept from us. */
function notArrived(cause?: unknown): Refusal {
  return new Refusal(
    Object(cause).status === 413 || Object(cause).statusCode === 413 ? 413 : 400,
    "The body did not arrive: a body parser, or a limit of body sizes, stands before this handler",
    { context: { stage: "body" }, cause },
  );
}

/** What has ended a body. Frameworks' limits fail with a status. */
function causeOf(error: unknown): unknown {
  if (error instanceof Refusal) return error;
  const { status, statusCode } = Object(error);
  const isLimit = typeof status === "number" || typeof statusCode === "number";
  return isLimit ? notArrived(error) : error;
}

/** Throws what is no mere end of the connection. */
function throwRefusal(error: unknown): void {
  const cause = causeOf(error);
  if (cause instanceof Refusal) throw cause;
}

/** Reads a request's frames and hands on those that are new. Tells what ended it early, if anything did. */
function readUplink(
  request: Request,
  receiver: Receiver,
  maxMessageSize: number,
  ended: (error?: unknown) => void,
): Body | undefined {
  if (!request.body) return void ended();
  let reader: Reader;
  try {
    checkUnread(request);
    reader = readerOf(request.body);
  } catch (error) {
    return void ended(error);
  }
  const { uplink } = receiver;
  const before = uplink.received;
  let size = 0;
  const parser = new UplinkParser(maxMessageSize, frameTaker(receiver));
  const take = (chunk: Bytes) => {
    size += chunk.length;
    parser.push(chunk);
  };
  return readBody(reader, receiver, MAX_BODIES, take, ({ complete, error }) => {
    const expected = Number(request.headers.get("content-length"));
    const isShort = complete && size < expected && uplink.received === before;
    ended(isShort ? notArrived() : causeOf(error));
  });
}

/** Hands on the frames of one body. */
function frameTaker(receiver: Receiver): (type: string, payload: Bytes, size: number) => void {
  const { uplink } = receiver;
  let number = 0; // nothing has told it yet
  return (type, payload, size) => {
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
    if (number > uplink.received + 1) {
      // "A server that has closed takes the CLOSE past the gap."
      if (type !== "CLOSE" || !receiver.takesGaps) throw new Refusal(409, "Messages are missing");
      uplink.received = number - 1;
    }
    if (number++ === uplink.received + 1) receiver.receive(type, payload, size);
  };
}

/**
 * Reads into a buffer of ours where the runtime can: with its own, Deno holds 64 KiB
 * for as long as a read is pending, which is all the time that a session is open. A large one is
 * kept over a few short reads.
 */
function readerOf(body: ReadableStream<Uint8Array>): Reader {
  let reader: ReadableStreamBYOBReader;
  try {
    reader = body.getReader({ mode: "byob" });
  } catch {
    return body.getReader() as Reader; // no byte stream, as on Bun
  }
  let buffer = new ArrayBuffer(SMALL_READ);
  let smallReads = 0; // in a row
  return {
    async read() {
      const size = buffer.byteLength;
      const chunk = await reader.read(new Uint8Array(buffer));
      if (chunk.done) return { done: true };
      const { buffer: used, length } = chunk.value;
      smallReads = length > SMALL_READ ? 0 : smallReads + 1;
      const next = length === size ? LARGE_READ : smallReads > MAX_SMALL_READS ? SMALL_READ : size;
      buffer = next === size ? used : new ArrayBuffer(next);
      return chunk;
    },
  };
}

/**
 * Bytes that come in chunks, in one copy that grows: to keep chunks of a byte would cost a hundred
 * times as much.
 */
class Gathering {
  #buffer: Bytes = EMPTY;
  size = 0;

  get bytes(): Bytes {
    return this.#buffer.subarray(0, this.size);
  }

  /** Makes room for what comes, not for what is announced. */
  add(chunk: Bytes, expected = 0): void {
    const size = this.size + chunk.length;
    if (size > this.#buffer.length) {
      const grown = new Uint8Array(Math.max(size, Math.min(expected, 2 * size)));
      grown.set(this.bytes);
      this.#buffer = grown;
    }
    this.#buffer.set(chunk, this.size);
    this.size = size;
  }
}

/** An incremental parser: frames may be split anywhere. Between chunks it holds one frame at most. */
class UplinkParser {
  readonly #max: number;
  readonly #onFrame: (type: string, payload: Bytes, size: number) => void;
  /** The beginning of a frame. */
  #held: Gathering = new Gathering();
  /** How long that frame will be, once its header tells. */
  #expected = 0;

  constructor(max: number, onFrame: (type: string, payload: Bytes, size: number) => void) {
    this.#max = max;
    this.#onFrame = onFrame;
  }

  push(chunk: Bytes): void {
    if (!this.#held.size) return this.#hold(chunk, this.#readFrames(chunk));
    // What follows a frame whose end is known is not copied.
    const missing = this.#expected ? this.#expected - this.#held.size : chunk.length;
    this.#held.add(chunk.subarray(0, missing), this.#expected);
    if (chunk.length < missing) return;
    const { bytes } = this.#held;
    const end = this.#readFrames(bytes);
    if (!end) return;
    this.#held = new Gathering();
    this.#hold(bytes, end);
    if (missing < chunk.length) this.push(chunk.subarray(missing));
  }

  #hold(bytes: Bytes, from: number): void {
    if (from < bytes.length) this.#held.add(bytes.subarray(from), this.#expected);
  }

  /** Gives where the last whole frame ends. */
  #readFrames(bytes: Bytes): number {
    this.#expected = 0;
    let at = 0;
    while (at < bytes.length) {
      const end = this.#readText(bytes, at) || this.#readFrame(bytes, at);
      if (!end) break;
      at = end;
    }
    return at;
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

// --- Options ---

/** The options as everybody here uses them: checked, with their defaults, times in ms. */
type Settings = { readonly [name in keyof typeof NUMBERS]: number } & {
  readonly bidir: boolean;
  /** The most that a session holds back during a rest: nowhere near `maxBufferedAmount`. */
  readonly mostHeld: number;
  /** How long a client has to answer a close, and to take the last bytes. */
  readonly closeTimeout: number;
  /** Where the runtime's idle cut could not be lifted, for want of `fetch`'s second argument. */
  readonly unattendedHeartbeat: number;
};

function settingsOf(options: SSEOptions, reports: Reports): Settings {
  checkOptions(options, reports);
  const names = Object.keys(NUMBERS) as (keyof typeof NUMBERS)[];
  const numbers = Object.fromEntries(names.map((name) => [name, numberOf(options, name)])) as {
    [name in keyof typeof NUMBERS]: number;
  };
  return {
    ...numbers,
    idleTimeout: numbers.idleTimeout * 1000,
    bidir: options.bidir ?? false,
    mostHeld: Math.min(MAX_HELD, numbers.maxBufferedAmount / 2),
    closeTimeout: numbers.resumeTimeout || CLOSE_TIMEOUT,
    unattendedHeartbeat: options.heartbeatInterval ?? UNATTENDED_HEARTBEAT_INTERVAL,
  };
}

function numberOf(options: SSEOptions, name: keyof typeof NUMBERS): number {
  const [fallback, least, most] = NUMBERS[name];
  const value = options[name] ?? fallback;
  if (typeof value === "number" && value >= least && value <= most) return value;
  throw new RangeError(`${name} must be a number from ${least} to ${most}`);
}

/** For those who have no types: a wrong value throws, an unknown name, which may be a later version's, is told once. */
function checkOptions(options: SSEOptions, reports: Reports): void {
  check("option", options, { ...OPTION_TYPES, ...NUMBERS }, reports);
  if (options.hooks) check("hook", options.hooks, HOOK_TYPES, reports);
}

function check(kind: string, given: object, known: object, reports: Reports): void {
  for (const [name, value] of Object.entries(given)) {
    if (!(name in known)) {
      const nearest = Object.keys(known).find((other) => areNear(name, other));
      reports.warnOnce(`unknown ${kind} "${name}"${nearest ? `: is it "${nearest}"?` : ""}`);
      continue;
    }
    const type = (known as Record<string, unknown>)[name];
    if (typeof type !== "string" || !type || value === undefined || value === null) continue;
    const actual: string = typeof value;
    if (actual !== type) {
      throw new TypeError(`The ${kind} "${name}" is a ${type}, not a ${actual}`);
    }
  }
}

/** One begins with the other, or they differ in a letter or two. */
function areNear(one: string, other: string): boolean {
  const [a, b] = [one.toLowerCase(), other.toLowerCase()];
  if (a.startsWith(b) || b.startsWith(a)) return true;
  let start = 0;
  while (start < a.length && a[start] === b[start]) start++;
  let end = 0;
  while (end < a.length - start && a.at(-1 - end) === b.at(-1 - end)) end++;
  return Math.max(a.length, b.length) - start - end <= 2;
}

// --- Headers and refusals ---

/** Anything that ends a request early: a status, a message, and where it matters a close code. */
class Refusal extends Error {
  readonly status: number;
  readonly headers: Record<string, string>;
  readonly closeCode: number | undefined;
  /** Whoever runs the server is to be told, too. */
  readonly context: ErrorContext | undefined;

  constructor(status: number, message: string, { closeCode, headers = {}, context, cause }: {
    closeCode?: number;
    headers?: Record<string, string>;
    context?: ErrorContext;
    cause?: unknown;
  } = {}) {
    super(message, { cause });
    this.status = status;
    this.headers = headers;
    this.closeCode = closeCode;
    this.context = context;
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

/** Tells whoever runs the server: `onError`, or the console where there is none. */
class Reports {
  readonly #options: SSEOptions;
  readonly #said: Set<string> = new Set();

  constructor(options: SSEOptions) {
    this.#options = options;
  }

  report(error: unknown, context: ErrorContext): void {
    const { onError } = this.#options;
    if (!onError) return print(error, context);
    try {
      onError.call(this.#options, error, context);
    } catch (failure) { // anybody can bring a report about
      console.error("[duplex-sse] onError failed:", failure);
    }
  }

  /** What would be said for every request is said for the first. */
  once(error: unknown, context: ErrorContext): void {
    if (!this.#saidBefore(context.stage)) this.report(error, context);
  }

  /** What is to be mended in how the server is set up. */
  warnOnce(message: string, request?: Request): void {
    if (this.#saidBefore(message)) return;
    this.report(new Error(message), { stage: "setup", ...request && { request } });
  }

  #saidBefore(what: string): boolean {
    const before = this.#said.has(what);
    this.#said.add(what);
    return before;
  }
}

/** Says on the console what nobody else wants to hear. */
function print(error: unknown, { stage, hook }: ErrorContext): void {
  if (stage === "setup") return console.warn(`[duplex-sse] ${(error as Error).message}`);
  const what = hook === "error"
    ? "the error hook failed"
    : hook
    ? `a hook failed (${hook})`
    : stage === "request" || stage === "body"
    ? "a request failed"
    : `sync ${stage} failed`;
  console.error(`[duplex-sse] ${what}:`, error);
}

function checkSize(size: number, maxMessageSize: number): void {
  if (size > maxMessageSize) throw new Refusal(413, "Message too large", { closeCode: 1009 });
}

function sessionMoves(): Refusal {
  return new Refusal(503, "The session moves");
}

function malformed(what: string): Refusal {
  return new Refusal(400, `Malformed: ${what}`, { closeCode: 1002 });
}

function decodeText(bytes: Bytes): string {
  // The strict one takes Deno nine times as long. U+FFFD may be the message's own.
  const text = decoder.decode(bytes);
  if (!text.includes("\uFFFD")) return text;
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
    /** "The body of a request with x-duplex-version is frames, whatever its content type." */
    isUplink: full || mediaType(headers) === UPLINK_TYPE,
    /** The answer is to end with the first news. */
    isPoll: full && headers.get(POLL_HEADER) === "1",
    opening: full && !token ? readOpening(headers) : "",
    attempt: optionalNumber(headers, ATTEMPT_HEADER),
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

/** For what streams, or until a body of this length has come: of that Bun wants 16 KiB a second. */
function liftIdleCut(request: Request, runtime: Runtime, length: string | null): void {
  if (typeof runtime?.timeout !== "function") return;
  const time = Math.ceil(Number(length) / SLOW_BODY);
  if (length === null) runtime.timeout(request, 0);
  else if (time > IDLE_CUT / 2) runtime.timeout(request, Math.min(IDLE_CUT + time, MAX_IDLE_CUT));
}

function remoteAddressOf(request: Request, runtime: Runtime): string | undefined {
  if (typeof runtime?.requestIP === "function") return runtime.requestIP(request)?.address;
  return runtime?.remoteAddr?.hostname ?? runtime?.incoming?.socket?.remoteAddress ??
    (request as { ip?: string }).ip; // srvx's
}

/** Hooks read a peer's request as long as it lives: Deno's is gone with its stream of HTTP/2. */
function keepReadable(request: Request): Request {
  void request.url; // kept from the first reading on
  return replaceHeaders(request, new Headers(request.headers));
}

/** Leaves a request as it is whose headers somebody fixed: they need not be kept. */
function replaceHeaders(request: Request, headers: Headers): Request {
  Reflect.defineProperty(request, "headers", {
    value: headers,
    configurable: true,
    enumerable: true,
  });
  return request;
}

function listed(header: string | null): string[] {
  return (header ?? "").split(",").map((part) => part.trim()).filter((part) => part);
}

/** What comes later replaces what was there, but for headers of which every value counts. */
function addHeaders(target: Headers, source: Headers): void {
  source.forEach((value, name) => {
    if (name === "set-cookie" || name === "vary") target.append(name, value);
    else target.set(name, value);
  });
}

/** The half of a token that tells the instance, and may be another one in each answer. */
function markOf(token: string): string {
  return token.slice(0, token.indexOf("."));
}

/** The half of a token that names a session, wherever it is; the key of a plain one's tombstone as it is. */
function secretOf(token: string): string {
  return token.slice(token.indexOf(".") + 1);
}

// --- Small things ---

/** What is counted since the start. */
interface Tally {
  opened: number;
  readonly closed: Record<number, number>;
  drops: number;
  resumptions: number;
  readonly refusals: Record<number, number>;
  movedIn: number;
  movedOut: number;
}

function newTally(): Tally {
  const nothing = { opened: 0, drops: 0, resumptions: 0, movedIn: 0, movedOut: 0 };
  return { ...nothing, closed: {}, refusals: {} };
}

function count(counts: Record<number, number>, key: number): void {
  counts[key] = (counts[key] ?? 0) + 1;
}

/** What crossws makes of a value: text, or bytes. */
function toData(value: unknown): string | Bytes {
  if (typeof value === "string") return value;
  if (value === undefined || value === null) return "";
  if (typeof value === "function" || typeof value === "symbol") return "{}";
  if (typeof value !== "object") return String(value);
  if (ArrayBuffer.isView(value)) {
    return new Uint8Array(value.buffer as ArrayBuffer, value.byteOffset, value.byteLength);
  }
  // Those of another realm, as test runners have, are of another class.
  const tag = Object.prototype.toString.call(value);
  if (tag.endsWith("ArrayBuffer]")) return new Uint8Array(value as ArrayBuffer);
  if (/t (Blob|File)]$/.test(tag)) {
    throw new TypeError("Read the Blob first: send(await blob.arrayBuffer())");
  }
  if (Array.isArray(value)) {
    if (value.every((item) => Number.isInteger(item) && item >= 0 && item < 256)) {
      return Uint8Array.from(value);
    }
    throw new TypeError("An array is sent as bytes, which these are not: use JSON.stringify");
  }
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

function concat(parts: Part[]): Bytes {
  let length = 0;
  for (const part of parts) length += part.length;
  const whole = new Uint8Array(length);
  let at = 0;
  for (const part of parts) {
    if (typeof part === "string") encoder.encodeInto(part, whole.subarray(at));
    else whole.set(part, at);
    at += part.length;
  }
  return whole;
}

function randomHex(bytes: number): string {
  const random = crypto.getRandomValues(new Uint8Array(bytes));
  return Array.from(random, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Nobody is to be told of such an end. */
function isLoss(ending: object): boolean {
  return ending === LOST || ending === LEFT;
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

/** Only hooks that say what is to be done then can go on elsewhere. */
function isMovable(hooks: Partial<Hooks>[]): boolean {
  return hooks.some((hooks) => hooks.revive);
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

/** Runs a call in the async context of where it was made. */
type Snapshot = <T>(call: () => T) => T;

/** Of the caller, where the runtime has such contexts and says so: without an import, and at no cost elsewhere. */
function snapshot(): Snapshot {
  const { process } = globalThis as { process?: { getBuiltinModule?(name: string): unknown } };
  const hooks = process?.getBuiltinModule?.("node:async_hooks") as
    | { AsyncLocalStorage?: { snapshot?(): Snapshot } }
    | undefined;
  return hooks?.AsyncLocalStorage?.snapshot?.() ?? ((call) => call());
}

/** Runs something in a task of its own. */
function nextTask(task: () => void): void {
  const { setImmediate } = globalThis as { setImmediate?: (task: () => void) => void };
  if (setImmediate) setImmediate(task);
  else setTimeout(task);
}

/** Whether something is done in time; there is little of that once the signal is aborted. */
async function inTime(doing: unknown, timeout: number, signal?: AbortSignal): Promise<boolean> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  let hurry!: () => void;
  const late = new Promise<false>((resolve) => {
    const wait = (time: number) => {
      clearTimeout(timer);
      timer = setTimeout(() => resolve(false), time);
    };
    wait(timeout);
    hurry = () => wait(Math.min(timeout, HURRY));
  });
  if (signal?.aborted) hurry();
  signal?.addEventListener("abort", hurry);
  const done = Promise.resolve(doing).then(() => true);
  return await Promise.race([done, late]).finally(() => {
    clearTimeout(timer);
    signal?.removeEventListener("abort", hurry);
  });
}

/** Runs something once the event loop has gone round: what was ready, the runtime's own writes too, is done by then. */
function afterTurn(task: () => void): void {
  nextTask(() => nextTask(task));
}

/** A long text, as short as will do to tell it from others. */
function digest(text: string): string {
  if (text.length <= 64) return text;
  let one = 0x811c9dc5; // FNV, once from each end
  let other = one;
  for (let i = 0; i < text.length; i++) {
    one = Math.imul(one ^ text.charCodeAt(i), 0x01000193);
    other = Math.imul(other ^ text.charCodeAt(text.length - 1 - i), 0x01000193);
  }
  return `\0${text.length} ${one} ${other}`;
}
