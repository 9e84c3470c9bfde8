/**
 * The client of duplex-sse: a `WebSocket` that needs no WebSocket upgrade.
 *
 * {@link WebSocketSSE} has the interface and the behaviour of the standard
 * `WebSocket`. Underneath, messages come as Server-Sent Events and go as POST
 * requests, streamed where that works. A dropped connection is resumed, in
 * silence: nothing is lost and nothing arrives twice.
 *
 * One file, no import: for browsers, Deno, Bun, Node 20 and workerd. PROTOCOL.md
 * specifies the wire; the lines quoted in comments here are from there.
 *
 * @example
 * ```ts ignore
 * import { WebSocketSSE } from "jsr:@duplex/sse/client";
 *
 * const socket = new WebSocketSSE("https://example.com/chat");
 * socket.onopen = () => socket.send("hello");
 * socket.onmessage = (event) => console.log(event.data);
 * ```
 *
 * @module
 */

// --- The wire's vocabulary. The same lines stand in server.ts; a test compares them. ---

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

// --- The client's own constants ---

// Numbers stand first: up to whatever is no literal, esbuild puts them in place of their names.

const CONNECTING = 0;
const OPEN = 1;
const CLOSING = 2;
const CLOSED = 3;

/**
 * A type that the lists of web application firewalls have, for a server behind one: what is sent
 * is no multipart, and nothing that looks for its parts is known to look further.
 */
const KNOWN_TYPE = "multipart/related";
/** "At first a streaming body is ended before 512 KiB in all (proxies cap a request at 1 MB)"; a batch, always. */
const MAX_BODY_BYTES = 512 * 1024;
/** "Each that was filled within 2 s and confirmed to its end lets the next be twice as long, up to 64 MiB." */
const MAX_GROWN_BYTES = 64 * 1024 * 1024;
/** Where that takes longer, nothing would be gained. */
const BULK_MS = 2_000;
const READ_BYTES = 16 * 1024;
/** Where a stream brings more at once. */
const MAX_READ_BYTES = 128 * 1024;
/** A stream that never ends its line must not fill the memory. */
const MAX_EVENT_CHARACTERS = 128 * 1024 * 1024;
const MAX_LINES = 1_000;
/** What a message that waits costs beside its characters, roughly. */
const ITEM_COST = 32;
/** For acknowledgement and answers to pings at once. */
const MAX_CONTROL_BYTES = 4 * 1024;
/** Browsers let a page send so much while it is being left. */
const MAX_KEEPALIVE_BYTES = 60 * 1024;
const OPEN_TIMEOUT_MS = 30_000;
/** How long a single request that carries both directions has to answer before we ask by GET. */
const DUPLEX_TIMEOUT_MS = 2_000;
/** How long a stream has for its first event at an opening, and once it has been answered. */
const FIRST_EVENT_TIMEOUT_MS = 3_000;
/** How long a resumption has to be answered, before the next one is a poll. */
const ANSWER_TIMEOUT_MS = 5_000;
/** How long a stream that is tried while polls work has for its first event: nothing comes meanwhile. */
const TRIAL_TIMEOUT_MS = 1_500;
/** When a stream is tried after polls: at first, where it may have been the network, and at most. */
const TRIAL_AFTER_MS = 30_000;
const UNSURE_TRIAL_AFTER_MS = 5_000;
/** A stream that ends sooner is followed after a pause, if the one before it was lost, too. */
const SHORT_LIFE_MS = 1_000;
/** After that we say what may be the matter, and make room. */
const SILENCE_MS = 2_000;
/** Who gives a request up sooner has not waited: a resumption has 1 s at least. */
const UNANSWERED_MS = 900;
/** A try that comes at the end of the time, or after it, since its pause was slept through. */
const LAST_TRY_MS = 800;
/** Of the slots that the tabs share over HTTP/1.1. */
const LAST_SLOT = 4;
/** How long a stream is held at least while another tab waits, and how soon all have had theirs. */
const MIN_TURN_MS = 1_000;
const ROUND_MS = 5_000;
/** For what the server says at first; then the next tab opens. */
const OPENING_TURN_MS = 100;
/** Besides 1 s for every 8 KiB. */
const POST_TIMEOUT_MS = 6_000;
/** So long the uplink may fail before that counts as a lost connection. */
const UPLINK_PATIENCE_MS = 5_000;
/** How long the page waits for one step of a close. */
const CLOSE_TIMEOUT_MS = 3_000;
/** How long a page waits for the one before it to let go of its session. */
const CLAIM_TIMEOUT_MS = 1_000;
/** Of messages that go on with a session: `sessionStorage` has room for 5 Mi characters, of base64. */
const MAX_KEPT_BYTES = 3.75 * 1024 * 1024;
/** So that two who go on with one session by the same text do not make the same attempts. */
const MAX_LEAP = 2 ** 20;
const MAX_REASON_BYTES = 123;
/** The most of any term: timers cannot wait longer. */
const MAX_TERM = 2 ** 31 - 1;
/** How long messages are unacknowledged before that goes along with one of ours. */
const ACK_DELAY_MS = 500;
/** Messages that an open uplink stream leaves unacknowledged, short of half a window or that time. */
const ACK_EVERY = 32;
/** Answers to pings that may wait. */
const MAX_PONGS = 16;
/** Of a heartbeat's interval. */
const TICKS = 4;
const WATCH_PERIOD_MS = 250;
/**
 * Watches without a confirmation, after which a stream is left: while it is not even read (it may
 * wait for the page's `headers`), at first, and once it has worked.
 */
const UNREAD_PATIENCE = 24;
const FIRST_PATIENCE = 6;
const PATIENCE = 12;
/** Streams in a row that end unconfirmed, after which another transport is taken, likewise. */
const FIRST_FAILURES = 2;
const MAX_FAILURES = 5;
/** Drops after which a streaming transport that has never worked is left. */
const MAX_UNPROVEN_DROPS = 3;
const MAX_RETRY_DELAY_MS = 2_000;
/** The pause does not grow beyond that of so many, where the page waits for its close. */
const MAX_LAST_RETRIES = 3;
const MAX_LEARNED = 100;
/** It may have been the network, and not something in front of the server. */
const LEARNED_FOR_MS = 600_000;
/** Requests in a row of which nothing was taken before we say so: a proxy may have repeated one. */
const DOUBT = 2;

const NO_ANSWER = "a request was not answered in time";
const NO_STREAM = "the answer was no event stream";
const NOTHING_CAME = "the stream began, but no session in it";
const ONLY_RECEIVES =
  "this event stream is no WebSocket's: it has no token to send with. To read it: bidir: false";

const HIDDEN =
  "the answer's headers are hidden from this page: its origin has to be shown x-crossws-id and " +
  "x-duplex-*, as the server's option cors does";

const INSPECT: symbol = Symbol.for("nodejs.util.inspect.custom");

const KEEPS_WAITING = "keeps us waiting. Over HTTP/1.1 all tabs share 6 connections: serve HTTP/2";
const TOOK_NOTHING =
  "took nothing of a whole request. Does something in front of it read the body, or cut it?";

const encoder: TextEncoder = new TextEncoder();
const decoder: TextDecoder = new TextDecoder();
const EMPTY: Bytes = new Uint8Array();

// --- Types ---

type Bytes = Uint8Array<ArrayBuffer>;

/**
 * How messages go up: within the one request, by a streaming request, or by one request a batch;
 * "poll": likewise, and those down come in the answers of one request after the other.
 */
export type Transport = "duplex" | "stream" | "post" | "poll";

/** Anything that the `Headers` constructor takes. */
export type HeadersLike = NonNullable<ConstructorParameters<typeof Headers>[0]>;

/** The options that {@link WebSocketSSE} takes beyond a `WebSocket`. */
export interface WebSocketSSEOptions {
  /** Subprotocols to offer. Default: none. */
  protocols?: string | string[] | undefined;
  /** Sent with every request. A function is called for each, so that fresh credentials are used. */
  headers?: HeadersLike | (() => HeadersLike | Promise<HeadersLike>) | undefined;
  /** As for `fetch`. Cookies go to another origin only with "include". Default: "same-origin". */
  credentials?: "omit" | "same-origin" | "include" | undefined;
  /** Whether `send` may be used. Default: true. */
  bidir?: boolean | undefined;
  /** @deprecated Use {@link WebSocketSSEOptions.bidir}. */
  bdir?: boolean | undefined;
  /** Whether streaming requests are tried at all. Default: true. */
  stream?: boolean | undefined;
  /** Which transport to begin with; a failing one is left for the next. Default: "auto", the best that works. */
  transport?: "auto" | Transport | undefined;
  /**
   * Carries the session over a reload: a page that is left keeps it in `sessionStorage`, under this
   * name or the URL, and a socket that is made with the same name goes on with it. Wants Web Locks,
   * so a secure context. Default: false.
   */
  persist?: boolean | string | undefined;
  /** What {@link WebSocketSSE.pack} has given: goes on with that session. Once: it is for one socket. */
  resume?: string | null | undefined;
  /** Used instead of the global `fetch`. */
  fetch?: ((input: string, init?: RequestInit) => Promise<Response>) | undefined;
  /** Fails the socket when it aborts. */
  signal?: AbortSignal | undefined;
}

/** The events of a {@link WebSocketSSE}. `drop` and `resume` are ours. */
export interface WebSocketSSEEventMap {
  /** The session has begun. */
  open: Event;
  /** A message has come. */
  // deno-lint-ignore no-explicit-any
  message: MessageEvent<any>;
  /** The session has failed; `close` follows. */
  error: WebSocketSSEErrorEvent;
  /** The session has ended. */
  close: CloseEvent;
  /** The connection was lost; a message that is sent now waits. */
  drop: Event;
  /** The connection is back, and nothing was lost. */
  resume: Event;
}

/** An event of type `error`, which says why a session has failed. Not of the standard, but for its type. */
export interface WebSocketSSEErrorEvent extends Event {
  /** Why, in a line: docs/errors.md has them all. Never with a token, a header or a query string. */
  readonly message: string;
  /** The same; its `cause` is what `fetch`, or a function among the options, has thrown. */
  readonly error: Error;
  /** The status of the answer that failed the session, where it was one. */
  readonly status: number | undefined;
}

/** The counts of {@link WebSocketSSE.stats}. */
export interface WebSocketSSEStats {
  /** Connections resumed. */
  resumes: number;
  /** Messages that were sent again, each time counted. */
  resent: number;
  /** Messages received. */
  received: number;
  /** Messages sent. */
  sent: number;
}

/** The options of {@link WebSocketSSE.waitForDrain}. */
export interface WebSocketSSEDrainOptions {
  /** In bytes: resolve at this much `bufferedAmount`, or less. Below 0: at the end of the session. Default: 0. */
  threshold?: number | undefined;
  /** Rejects with the signal's reason when it aborts. */
  signal?: AbortSignal | undefined;
}

/** An event handler attribute: a function, or null. */
// deno-lint-ignore no-explicit-any
export type EventHandler<E> = ((this: any, event: E) => any) | null;

/** Where a session stands. CONTRIBUTING.md tells what each means; {@link STEPS}, where it leads. */
type Phase =
  | "opening"
  | "open"
  | "dropped"
  | "renewing"
  | "leaving"
  | "left"
  | "plain leaving"
  | "ended";

/** The server's terms, with which it opens or resumes a session. Times in ms, sizes in bytes. */
interface Terms {
  protocol: string;
  heartbeatInterval: number;
  /** 0 or null: any time. */
  idleTimeout: number | null;
  resumeTimeout: number;
  window: number;
  received: number;
  handled: number;
  next: number;
  attempt: number;
}

/** A message on its way up, kept until it is acknowledged. */
interface Outgoing {
  /** Undefined while a Blob is being read. */
  frame: Bytes | undefined;
  /** Its share of `bufferedAmount`. */
  size: number;
  isClose: boolean;
}

/** A message on its way up, as one page leaves it to the next: in base64, and its size. */
type KeptMessage = [frame: string, size: number];

/** The counts of an {@link Outbox}, and its messages. */
interface KeptOutbox {
  firstUnacked: number;
  nextUnsent: number;
  begun: number;
  handled: number;
  messages: KeptMessage[];
}

/** What one page leaves to the next. */
interface Kept {
  /** Of the lock of the page that has the session. */
  id: string;
  token: string;
  terms: Terms;
  attempt: number;
  /** By the clock on the wall. */
  lostAt: number;
  dispatched: number;
  outbox: KeptOutbox;
}

/** Web Locks, as far as they are used: what a page of a secure context has. */
interface Locks {
  request(name: string, options: object, granted: () => unknown): Promise<unknown>;
  query(): Promise<{ pending: { name: string }[] }>;
}

/** One of the few event streams that all tabs may have. */
interface Slot {
  readonly index: number;
  /** By our clock, when its first connection was told the server's terms. */
  since?: number;
  /** Who has waited for too long has taken it. */
  isStolen?: true;
  free(): void;
}

/**
 * Why there is to be another connection. "turn": the last one was a poll that has been answered;
 * "held": a stream whose events did not come; "renewed": the old one goes on until the next is
 * answered; "shared": it was given up to another tab. None of these is a loss.
 */
type Reason = "lost" | "held" | "turn" | "renewed" | "shared";

/** What an `error` event tells. */
type Failure = Pick<WebSocketSSEErrorEvent, "message" | "error" | "status">;

/** Why a request came to nothing. */
type Trouble = { fault: string; cause?: unknown; status?: number | undefined };

/** What a `close` event tells. */
type Verdict = [code: number, reason: string, wasClean: boolean];

/** The rooms of one socket that its link and its uplink have in common. */
interface Parts {
  readonly session: Session;
  readonly inbox: Inbox;
  readonly outbox: Outbox;
  readonly receipts: Receipts;
  readonly requests: Requests;
  readonly transports: Transports;
  readonly pauses: Pauses;
  readonly keeper: Keeper;
}

// --- WebSocketSSE: the face, its events, its close ---

/**
 * A `WebSocket` over plain HTTP: same constructor, same events in the same order,
 * same exceptions. Differences are listed in the README.
 *
 * @example With options
 * ```ts
 * import { WebSocketSSE } from "@duplex/sse/client";
 *
 * function connect(token: string): WebSocketSSE {
 *   const socket = new WebSocketSSE("wss://example.com/room", {
 *     protocols: ["chat.v2"],
 *     headers: () => ({ authorization: `Bearer ${token}` }),
 *   });
 *   socket.binaryType = "arraybuffer";
 *   return socket;
 * }
 * ```
 */
export class WebSocketSSE extends EventTarget {
  /** 0 */
  declare static readonly CONNECTING: 0;
  /** 1 */
  declare static readonly OPEN: 1;
  /** 2 */
  declare static readonly CLOSING: 2;
  /** 3 */
  declare static readonly CLOSED: 3;
  /** 0 */
  declare readonly CONNECTING: 0;
  /** 1 */
  declare readonly OPEN: 1;
  /** 2 */
  declare readonly CLOSING: 2;
  /** 3 */
  declare readonly CLOSED: 3;

  readonly #url: URL;
  readonly #options: WebSocketSSEOptions;
  readonly #handlers: { [name: string]: unknown } = {};
  readonly #counts = { resumes: 0, received: 0, sent: 0 };
  readonly #handle = (event: Event): void => {
    const handler = this.#handlers[event.type];
    if (typeof handler === "function") handler.call(this, event); // any object may be set
  };
  readonly #leave = (): void => this.#course.leave(this.#readyState === OPEN);
  // Of a PageTransitionEvent, which Deno's types do not know.
  readonly #comeBack = (event: Event): void => {
    if ("persisted" in event && event.persisted) this.#course.comeBack();
  };
  readonly #abort = (): void => {
    this.#setPaused(false);
    this.#course.abort(this.#readyState === CONNECTING, this.#options.signal!.reason);
  };

  readonly #session: Session;
  readonly #waiters: Waiters = new Waiters();
  readonly #parts: Parts;
  readonly #course: Course;

  /** As told to the page: its events take their turns after {@link Session.phase}. */
  #readyState: 0 | 1 | 2 | 3 = CONNECTING;
  #binaryType: "blob" | "arraybuffer" = "blob";
  #protocol = "";
  /** A field, so that the accessor refuses any other `this`, as each of them does. */
  readonly #extensions = "";
  #bufferedAmount = 0;

  /**
   * Begins to connect. Events come later, never before the current task ends.
   *
   * @param url `http:`, `https:`, `ws:` or `wss:`; relative to the page where there is one.
   * @param init Subprotocols, as for a `WebSocket`, or options.
   * @throws {DOMException} SyntaxError, where the standard throws it: a URL that cannot
   * be parsed, has a fragment or another scheme; a subprotocol that is no token or offered twice.
   * SecurityError: a URL of `ws:` or `http:` in a page of `https:`, but to `localhost`.
   * @throws {TypeError} An option has a value that it cannot have. One of another name is warned of.
   */
  constructor(url: string | URL, init: string | string[] | WebSocketSSEOptions = {}) {
    super();
    if (!arguments.length) throw new TypeError("No URL");
    // As in Web IDL: whatever can be iterated is a list, whatever is no object a string.
    const options: WebSocketSSEOptions =
      typeof init === "object" && init && !(Symbol.iterator in init)
        ? init
        : { protocols: init as string };
    this.#url = parseURL(`${url}`); // as Web IDL has it, no symbol
    const offered = checkProtocols(options.protocols ?? []);
    refuseMixed(this.#url);
    this.#options = options;
    const session = this.#session = new Session(offered, (options.bidir ?? options.bdir) !== false);
    const requests = new Requests(this.#url, options, session);
    const inbox = new Inbox(!!options.fetch, (data) => this.#onMessage(data));
    const outbox = new Outbox(session);
    const receipts = new Receipts();
    this.#parts = {
      session,
      requests,
      inbox,
      outbox,
      receipts,
      transports: new Transports(requests.target, options),
      pauses: new Pauses(),
      keeper: new Keeper(options, requests.target, session, outbox, receipts),
    };
    this.#course = new Course(this.#parts, this.#reports());
    checkOptions(options, (text) => requests.warn(text));
    options.signal?.addEventListener("abort", this.#abort);
    if ("document" in globalThis) {
      globalThis.addEventListener("pagehide", this.#leave);
      globalThis.addEventListener("pageshow", this.#comeBack);
    }
    if (options.signal?.aborted) this.#abort();
    else this.#course.link.run();
  }

  /** The absolute URL as `ws:` or `wss:`, with the credentials that it was given. */
  get url(): string {
    return this.#url.href;
  }

  /** 0 CONNECTING, 1 OPEN, 2 CLOSING, 3 CLOSED. A dropped connection that may resume stays OPEN. */
  get readyState(): 0 | 1 | 2 | 3 {
    return this.#readyState;
  }

  /** Bytes of messages (text in UTF-8) that the server has not acknowledged. */
  get bufferedAmount(): number {
    return this.#bufferedAmount;
  }

  /** Always "". */
  get extensions(): string {
    return this.#extensions;
  }

  /** The subprotocol that the server chose, or "". */
  get protocol(): string {
    return this.#protocol;
  }

  /** How binary messages arrive: "blob" (default) or "arraybuffer". */
  get binaryType(): "blob" | "arraybuffer" {
    return this.#binaryType;
  }

  set binaryType(value: "blob" | "arraybuffer") {
    this.#binaryType = value === "blob" || value === "arraybuffer" ? value : this.#binaryType;
  }

  /** Handler of `open`. */
  get onopen(): EventHandler<Event> {
    return this.#handlerOf("open");
  }

  set onopen(handler: EventHandler<Event>) {
    this.#setHandler("open", handler);
  }

  /** Handler of `message`. */
  // deno-lint-ignore no-explicit-any
  get onmessage(): EventHandler<MessageEvent<any>> {
    return this.#handlerOf("message");
  }

  // deno-lint-ignore no-explicit-any
  set onmessage(handler: EventHandler<MessageEvent<any>>) {
    this.#setHandler("message", handler);
  }

  /** Handler of `error`, typed as a `WebSocket`'s: by `addEventListener` its `status` is known, too. */
  get onerror(): EventHandler<Event> {
    return this.#handlerOf("error");
  }

  set onerror(handler: EventHandler<Event>) {
    this.#setHandler("error", handler);
  }

  /** Handler of `close`. */
  get onclose(): EventHandler<CloseEvent> {
    return this.#handlerOf("close");
  }

  set onclose(handler: EventHandler<CloseEvent>) {
    this.#setHandler("close", handler);
  }

  /** The transport of the uplink now in use. Not of the standard. */
  get transport(): Transport {
    return this.#parts.transports.current;
  }

  /** Whether {@link pause} holds the events back. Not of the standard, but `ws` has it. */
  get isPaused(): boolean {
    return this.#parts.inbox.isPaused;
  }

  /**
   * Whether the session was begun by an earlier page or socket: see
   * {@link WebSocketSSEOptions.persist} and {@link pack}. If not, the page begins with nothing. Not
   * of the standard.
   */
  get resumed(): boolean {
    return this.#parts.keeper.hasTakenOver;
  }

  /**
   * Whether the event stream waits for its turn: over HTTP/1.1 all tabs share 5. Meanwhile nothing
   * comes; what is sent goes. Not of the standard.
   */
  get isWaiting(): boolean {
    return !!this.#course.link.slots.wait;
  }

  /** Counts since the beginning. Not of the standard. */
  get stats(): WebSocketSSEStats {
    return { ...this.#counts, resent: this.#parts.outbox.resent };
  }

  /**
   * Queues a message. It waits where it cannot go now, through dropped connections too.
   *
   * @throws {DOMException} InvalidStateError while connecting, or with `bidir: false`.
   */
  send(data: string | ArrayBufferLike | Blob | ArrayBufferView): void {
    if (!arguments.length) throw new TypeError("No message");
    const message = toMessage(data);
    const { level, sends } = this.#session;
    if (this.#readyState === CONNECTING || !sends) {
      throw new DOMException(sends ? "Still connecting" : "bidir is false", "InvalidStateError");
    }
    const [frame, size] = isBlob(message) ? [undefined, message.size] : level.encode(message);
    this.#bufferedAmount += size;
    if (this.#readyState !== OPEN) return;
    this.#counts.sent++;
    const entry = this.#parts.outbox.add(frame, size);
    const { link } = this.#course;
    link.uplink.pumpSoon();
    if (!isBlob(message)) return;
    message.arrayBuffer().then((buffer) => {
      [entry.frame] = level.encode(new Uint8Array(buffer));
      link.uplink.pump();
    }, (error) => this.#course.onFail("a Blob cannot be read", error));
  }

  /**
   * Resolves when the server has acknowledged so much that `bufferedAmount` is at most the threshold;
   * or when the session is over, which it tells even while {@link pause} holds `close` back: look at
   * `bufferedAmount`. Not of the standard; a server's peer has the same.
   *
   * @throws The reason of the signal, when that aborts.
   */
  waitForDrain({ threshold = 0, signal }: WebSocketSSEDrainOptions = {}): Promise<void> {
    if (signal?.aborted) return Promise.reject(signal.reason);
    if (this.#bufferedAmount <= threshold || this.#session.isOver) return Promise.resolve();
    return this.#waiters.wait(threshold, signal);
  }

  /**
   * Starts the closing handshake: messages that were sent before go out before.
   *
   * @param code 1000, or 3000 to 4999. Default: none, which the other side sees as 1005.
   * @param reason At most 123 bytes of UTF-8.
   * @throws {DOMException} InvalidAccessError for another code, SyntaxError for a longer reason.
   */
  close(code: number | undefined = undefined, reason: string | undefined = ""): void {
    if (!(#readyState in this)) throw new TypeError("Not a WebSocket");
    if (code !== undefined) {
      // As [Clamp] rounds: a half goes to the even neighbour, as it does up here.
      code = +code + 2 ** 52 - 2 ** 52;
      if (code !== 1000 && !(code >= 3000 && code <= 4999)) {
        throw new DOMException(`Close code ${code} may not be used`, "InvalidAccessError");
      }
    }
    const text = encoder.encode(`${reason}`);
    if (text.length > MAX_REASON_BYTES) {
      throw new DOMException("The reason is over 123 bytes", "SyntaxError");
    }
    if (this.#readyState >= CLOSING) return;
    const connecting = this.#readyState === CONNECTING;
    this.#readyState = CLOSING;
    this.#setPaused(false);
    if (this.#session.isEnding) return; // `close` is on its way
    if (connecting) this.#course.abandon();
    else this.#course.close(code ?? (text.length ? 1000 : 1005), text);
  }

  /**
   * Holds all events back, `close` among them, until {@link resume}. The server then sends no more
   * than its `window`, and its `waitForDrain` waits. Does nothing unless the socket is open or
   * closing. Not of the standard, but `ws` has it.
   */
  pause(): void {
    this.#setPaused(true);
  }

  /** Goes on after {@link pause}. So does `close()`: nothing comes after it that could wait. */
  resume(): void {
    this.#setPaused(false);
  }

  /**
   * Packs the session as text, with which another socket of the same URL, protocols and credentials
   * goes on: by the option `resume`, within the server's `resumeTimeout`, in whatever process. Both
   * ways nothing is lost and nothing arrives twice; a message counts as received once it was
   * dispatched here. This socket is over: it is CLOSING at once, sends nothing more, and `close` by
   * 1001 follows, which is not clean. The text has the session's token and what was sent and is not
   * acknowledged: keep it as secret as the credentials. Not of the standard.
   *
   * @returns Undefined, and then the socket goes on as if it had not been asked: while it connects
   * (unless to resume), closes or is closed, while a `Blob` is being read, with over 3.75 MiB not
   * acknowledged, and at a server that resumes nothing.
   * @example
   * ```ts
   * import { WebSocketSSE } from "@duplex/sse/client";
   *
   * const url = "https://example.com/chat";
   *
   * function save(socket: WebSocketSSE): void {
   *   const packed = socket.pack();
   *   if (packed) localStorage.setItem("chat", packed);
   * }
   *
   * function restore(): WebSocketSSE {
   *   const resume = localStorage.getItem("chat");
   *   localStorage.removeItem("chat"); // it is for one socket
   *   return new WebSocketSSE(url, { resume }); // its `resumed` tells whether that could be
   * }
   * ```
   */
  pack(): string | undefined {
    const packed = this.#course.pack(this.#readyState === OPEN);
    if (packed) {
      this.#readyState = CLOSING;
      this.#setPaused(false);
    }
    return packed;
  }

  #setPaused(isPaused: boolean): void {
    const { inbox } = this.#parts;
    if (this.#readyState === CONNECTING || this.#readyState === CLOSED) return;
    if (isPaused === inbox.isPaused) return;
    inbox.isPaused = isPaused;
    if (!isPaused) nextTask(() => this.#course.link.goOn());
  }

  /** For `console.log` of runtimes. A URL's credentials and query are often secret. */
  #shown(): unknown {
    const { readyState, protocol, transport, bufferedAmount, isWaiting } = this;
    const url = this.#url.href.replace(/\/\/.*@|[?].*/g, (part) => part[0] === "?" ? "?…" : "//");
    const { phase } = this.#session;
    return { // in quotes, as TypeScript 7.0 would rename it, for the class
      "WebSocketSSE": { url, readyState, phase, protocol, transport, bufferedAmount, isWaiting },
    };
  }

  static {
    defineMembers(this);
    Object.defineProperty(this.prototype, INSPECT, {
      value(this: WebSocketSSE) {
        return this.#shown();
      },
    });
  }

  #handlerOf<E>(type: string): EventHandler<E> {
    return this.#handlers[type] as EventHandler<E> ?? null;
  }

  /** HTML: it takes its place among the listeners when it is first set, and leaves it at null. */
  #setHandler(type: string, handler: unknown): void {
    const isObject = Object(handler) === handler;
    this.#handlers[type] = isObject ? handler : null;
    if (isObject) this.addEventListener(type, this.#handle);
    else this.removeEventListener(type, this.#handle);
  }

  // Reports from below

  #reports(): CourseHost {
    const { inbox, requests } = this.#parts;
    const { signal } = this.#options;
    return {
      onOpen: (protocol) =>
        inbox.add(() => {
          if (this.#readyState !== CONNECTING) return;
          this.#readyState = OPEN;
          this.#protocol = protocol;
          this.dispatchEvent(new Event("open"));
        }),
      onDrop: () => this.#tell("drop"),
      onResume: () => {
        this.#counts.resumes++;
        this.#tell("resume");
      },
      onReceipt: (size) => inbox.afterTask(() => this.#waiters.tell(this.#bufferedAmount -= size)),
      onClosing: () =>
        inbox.add(() => {
          if (this.#readyState === OPEN) this.#readyState = CLOSING;
        }),
      onEnd: (verdict, failure) => {
        if ("document" in globalThis) {
          globalThis.removeEventListener("pagehide", this.#leave);
          globalThis.removeEventListener("pageshow", this.#comeBack);
        }
        this.#waiters.tell(-Infinity);
        // As a browser does for its own: not of what the page itself has ended.
        const isOurs = this.#readyState < CLOSING && !signal?.aborted;
        if (failure && isOurs && "document" in globalThis) requests.warn(failure.message);
        inbox.add(() => {
          this.#readyState = CLOSED;
          if (failure) this.dispatchEvent(Object.assign(new Event("error"), failure));
          this.dispatchEvent(closeEvent(...verdict));
        });
      },
      onSilence: () => signal?.removeEventListener("abort", this.#abort),
    };
  }

  #tell(type: string): void {
    const { inbox } = this.#parts;
    inbox.add(() => this.dispatchEvent(new Event(type)));
    nextTask(() => inbox.dispatch()); // it may be no chunk of a stream that brings this about
  }

  #onMessage(data: string | Bytes): void {
    if (this.#session.terms) this.#parts.receipts.dispatched++;
    if (this.#readyState !== OPEN) return;
    this.#counts.received++;
    const value = typeof data === "string"
      ? data
      : this.#binaryType === "blob"
      ? new Blob([data])
      : data.buffer;
    this.dispatchEvent(
      new MessageEvent("message", { data: value, origin: this.#parts.requests.origin }),
    );
  }
}

/** As `EventTarget` has them, typed by the name of the event. */
export interface WebSocketSSE {
  /** As `EventTarget`'s, typed by event name. */
  addEventListener<K extends keyof WebSocketSSEEventMap>(
    type: K,
    listener: (this: WebSocketSSE, event: WebSocketSSEEventMap[K]) => unknown,
    options?: boolean | AddEventListenerOptions,
  ): void;
  /** As `EventTarget`'s, for events of any name. */
  addEventListener(
    type: string,
    listener: ((event: Event) => unknown) | { handleEvent(event: Event): unknown } | null,
    options?: boolean | AddEventListenerOptions,
  ): void;
  /** As `EventTarget`'s, typed by event name. */
  removeEventListener<K extends keyof WebSocketSSEEventMap>(
    type: K,
    listener: (this: WebSocketSSE, event: WebSocketSSEEventMap[K]) => unknown,
    options?: boolean | EventListenerOptions,
  ): void;
  /** As `EventTarget`'s, for events of any name. */
  removeEventListener(
    type: string,
    listener: ((event: Event) => unknown) | { handleEvent(event: Event): unknown } | null,
    options?: boolean | EventListenerOptions,
  ): void;
}

/** @deprecated The spelling of crossws's documentation; use {@link WebSocketSSE}. */
export const WebsocketSSE: typeof WebSocketSSE = WebSocketSSE;

export default WebSocketSSE;

// --- Course: the phases of a session, and its end ---

/** The reports of a {@link Course}: the page's events. */
interface CourseHost {
  onOpen(protocol: string): void;
  onDrop(): void;
  onResume(): void;
  /** The server has taken something of ours: of so much of `bufferedAmount`, it has all. */
  onReceipt(size: number): void;
  /** The server closes. */
  onClosing(): void;
  /** Nothing is received or sent any more, but a last word. */
  onEnd(verdict: Verdict, failure?: Failure): void;
  /** Nor is that. */
  onSilence(): void;
}

/** Moves the phase of a session: by what its connections meet, and by what the page wants. */
class Course implements LinkHost {
  readonly #session: Session;
  readonly #outbox: Outbox;
  readonly #pauses: Pauses;
  readonly #keeper: Keeper;
  readonly #requests: Requests;
  readonly #host: CourseHost;
  readonly #uplink: Uplink;
  readonly link: Link;

  /** Of a close under way. */
  #deadline: ReturnType<typeof setTimeout> | undefined;
  /** What `close` will tell, if the closing handshake that has begun comes to its end. */
  #verdict: Verdict | undefined;

  constructor(parts: Parts, host: CourseHost) {
    this.#session = parts.session;
    this.#outbox = parts.outbox;
    this.#pauses = parts.pauses;
    this.#keeper = parts.keeper;
    this.#requests = parts.requests;
    this.#host = host;
    this.link = new Link(parts, this);
    this.#uplink = this.link.uplink;
  }

  // While it is open

  onOpen(protocol: string): void {
    this.#session.enter("open");
    this.#host.onOpen(protocol);
  }

  onBreak(): boolean {
    const { phase, terms } = this.#session;
    if (phase === "leaving") this.#awaitReceipt(true);
    else if (!terms && phase !== "plain leaving") this.onFail();
    else if (phase === "open") this.#drop();
    return !!terms && !this.#session.isEnding;
  }

  onRenewal(): void {
    if (this.#session.phase === "open") this.#session.enter("renewing");
  }

  /** A renewal that does not come at once is a drop like any other. */
  onOutage(): void {
    if (this.#session.phase === "renewing") this.#drop();
  }

  /** There is a connection again. While nothing goes up, the page goes on waiting. */
  onResume(): void {
    const { phase } = this.#session;
    if (phase === "leaving") return this.#awaitReceipt();
    if (phase === "dropped" && this.#uplink.isStuck) return;
    this.#session.enter("open");
    if (phase !== "renewing") this.#host.onResume();
  }

  #drop(): void {
    this.#session.enter("dropped");
    this.#host.onDrop();
  }

  onProgress(size: number): void {
    this.#host.onReceipt(size);
    const { phase } = this.#session;
    if (phase === "dropped" && this.#uplink.isLinked) this.onResume();
    else if (phase === "leaving") {
      if (this.#outbox.isEmpty) this.#awaitAnswer();
      else this.#awaitReceipt();
    } else if (phase === "plain leaving" && this.#outbox.isEmpty) this.#finish();
  }

  // The page leaves

  /** What was sent before goes out before. */
  close(code: number, reason: Bytes): void {
    const frame = this.#session.level.close(code, reason);
    if (!frame) return this.#leavePlain();
    this.#session.enter("leaving");
    this.#verdict = [code, decoder.decode(reason), true];
    this.#outbox.add(frame, 0, true);
    this.#uplink.pumpSoon();
    this.#awaitReceipt();
  }

  /** Before the page has heard that the session is open. */
  abandon(): void {
    this.link.abandon();
    this.onFail("closed before it was open");
  }

  abort(isConnecting: boolean, reason: unknown): void {
    this.#uplink.dismiss();
    if (isConnecting) this.link.abandon();
    this.onFail("aborted by its signal", reason);
  }

  /**
   * The page itself is left, with its session or without: then what is unacknowledged and CLOSE go
   * out, as far as 64 KiB of keepalive go.
   */
  leave(isOpen: boolean): void {
    const { isOver, terms, level } = this.#session;
    if (isOver) return;
    if (this.#mayGoOn(isOpen) && this.link.keep()) return;
    if (terms) {
      if (isOpen) this.#outbox.add(level.close(1001, EMPTY), 0, true);
      this.#uplink.flush();
    }
    this.#end([1001, "", false]);
  }

  /** The session leaves this socket, as what is returned. The server hears nothing of that. */
  pack(isOpen: boolean): string | undefined {
    const packed = this.#mayGoOn(isOpen) ? this.#keeper.pack() : undefined;
    if (packed) this.#end([1001, "packed", false]);
    return packed;
  }

  /** Elsewhere, if the page has heard of the session, or will: it was begun by another. */
  #mayGoOn(isOpen: boolean): boolean {
    const { terms, phase, isEnding } = this.#session;
    const hasHeard = isOpen || this.#keeper.hasTakenOver;
    return hasHeard && !!terms?.resumeTimeout && phase !== "leaving" && !isEnding;
  }

  /** The page was kept, in the back/forward cache. Another may have its session by now. */
  async comeBack(): Promise<void> {
    const sleep = this.#keeper.untilAwake();
    if (!sleep) return;
    const isOurs = await this.#keeper.claimAgain();
    if (sleep !== this.#keeper.untilAwake()) return; // the page was left again meanwhile
    if (isOurs) this.#keeper.wake();
    else this.#end([1001, "", false]);
  }

  /** A server that takes nothing must not hold us; one that takes messages has its time. */
  #awaitReceipt(isAway: boolean = !this.#uplink.isLinked): void {
    if (this.#outbox.isEmpty) return;
    const patience = isAway && this.#outbox.isOnlyClose ? CLOSE_TIMEOUT_MS : this.#session.patience;
    this.#after(patience, () => this.onFail("the server did not take the close in time"));
  }

  /** The server has our close. If its answer is late, a new connection may bring it; else ours stands. */
  #awaitAnswer(): void {
    this.#after(CLOSE_TIMEOUT_MS, () => {
      this.#after(2 * CLOSE_TIMEOUT_MS, () => this.#finish());
      this.link.hangUp();
    });
  }

  /** "This wire has no close from the client: what it sent before goes out, then it leaves." */
  #leavePlain(): void {
    this.#session.enter("plain leaving");
    this.#verdict = [1006, "", false];
    if (this.#outbox.isEmpty) this.#finish();
    else this.#after(OPEN_TIMEOUT_MS, () => this.#finish());
  }

  #after(ms: number, task: () => void): void {
    clearTimeout(this.#deadline);
    this.#deadline = setTimeout(task, ms);
  }

  // The end

  /** The server's close: its own, or the answer to ours. */
  onClose(code: number, reason: string, isComplete: boolean): void {
    const { phase } = this.#session;
    if (!this.#session.mayEnter("left")) return;
    const verdict: Verdict = [code, reason, isComplete || phase === "leaving"];
    if (phase === "leaving" && this.#outbox.isEmpty) this.#end(verdict); // the answer to ours
    else this.#takeLeave(verdict, this.#outbox.last + 1);
  }

  /**
   * "The answer to an uplink says the same", which needs no stream. While the page reads, the stream
   * says it, behind all that was sent before.
   */
  onOver(code: number, reason: string): void {
    const { phase } = this.#session;
    if (phase === "leaving") this.#end([code, reason, true]);
    else if (phase === "left") this.#verdict = [code, reason, this.#verdict![2]];
  }

  /** The server closes as well, where it was it that refused. Ours takes the number of the message. */
  onTooLarge(): void {
    const verdict: Verdict = [1009, "Message too large", false];
    if (this.#session.terms) this.#takeLeave(verdict, this.#outbox.firstUnacked);
    else this.#end(verdict);
  }

  /** Sends CLOSE alone; messages that are still here go no more. */
  #takeLeave(verdict: Verdict, number: number): void {
    this.#session.enter("left");
    this.#host.onClosing();
    this.#verdict = verdict;
    // If the server cannot be told soon, that is no reason to keep the page waiting.
    this.#after(CLOSE_TIMEOUT_MS, () => this.#finish());
    const [code, reason] = verdict;
    this.#uplink.farewell(code, encoder.encode(reason), number);
  }

  onFarewell(): void {
    if (this.#session.isOver) this.#host.onSilence();
    else this.#finish();
  }

  /**
   * As a WebSocket fails: `error`, then `close` with 1006. After a close by either side, by that.
   * Without a word it was a request, or the connection.
   */
  onFail(fault?: string, cause?: unknown): void {
    // Our own close stands once the server has it.
    const stands = this.#session.phase !== "leaving" || this.#outbox.isEmpty;
    if (this.#verdict && stands) return this.#finish();
    const { trouble = { fault: "the connection ended", cause } } = this.#requests;
    const isOpening = this.#session.phase === "opening";
    this.#end([1006, "", false], failureOf(isOpening, fault ? { fault, cause } : trouble));
  }

  #finish(): void {
    this.#end(this.#verdict!);
  }

  /** Stops everything on the network at once; the last events come in their turn. */
  #end(verdict: Verdict, failure?: Failure): void {
    if (this.#session.isOver) return;
    this.#session.enter("ended");
    clearTimeout(this.#deadline);
    this.link.end();
    this.#pauses.end();
    this.#keeper.end();
    this.#requests.end();
    if (!this.#uplink.isTakingLeave) this.#host.onSilence();
    this.#host.onEnd(verdict, failure);
  }
}

// --- Link: the connection down: opened, read, resumed ---

/** The reports of a {@link Link}. */
interface LinkHost extends EventHost {
  /** The session has begun. */
  onOpen(protocol: string): void;
  /** The connection has ended. False: it is not to be resumed. */
  onBreak(): boolean;
  /** An attempt to resume has failed. */
  onOutage(): void;
  /** The connection is about to be replaced by ourselves. */
  onRenewal(): void;
  onResume(): void;
}

/** One connection after the other, until the session ends. */
class Link implements Carrier, EventTaker, Holder {
  readonly #session: Session;
  readonly #inbox: Inbox;
  readonly #receipts: Receipts;
  readonly #requests: Requests;
  readonly #transports: Transports;
  readonly #pauses: Pauses;
  readonly #keeper: Keeper;
  readonly #host: LinkHost;
  readonly uplink: Uplink;
  readonly #events: Events;
  readonly slots: Slots;

  #connection: Exchange | undefined;
  /** The connection that is being renewed, until the next one is answered. */
  #old: Exchange | undefined;
  /** Resumptions since something last came of a connection. */
  #retries = 0;
  /** How often the stream was damaged: once is resumed, twice is the end. */
  #damages = 0;
  /** Of the first events of a connection. */
  #deadline: ReturnType<typeof setTimeout> | undefined;
  /** Of an opening that has been answered. */
  #limit: ReturnType<typeof setTimeout> | undefined;

  constructor(parts: Parts, host: LinkHost) {
    this.#session = parts.session;
    this.#inbox = parts.inbox;
    this.#receipts = parts.receipts;
    this.#requests = parts.requests;
    this.#transports = parts.transports;
    this.#pauses = parts.pauses;
    this.#keeper = parts.keeper;
    this.#host = host;
    this.uplink = new Uplink(parts, this, host);
    this.#events = new Events(parts, this.uplink, this, host);
    this.slots = new Slots(parts, this);
  }

  /** The life of the session. */
  async run(): Promise<void> {
    try {
      const kept = this.#keeper.take();
      if (kept) this.#host.onProgress(this.#keeper.restore(kept)); // at once: it may be left, too
      const goesOn = kept && await this.#keeper.claim(kept.id); // unless another tab has it
      let connection = await (goesOn ? this.#next("lost") : this.#beginAnew());
      for (;;) {
        await this.#read(connection);
        if (this.uplink.wasTooLong(connection)) this.#host.onRenewal(); // our doing, and our secret
        const { isPoll, hasBegun, ended, successor } = connection;
        const why = isPoll && hasBegun ? "turn" : ended ?? "lost";
        const isOurs = successor || why !== "lost"; // ended by us, or as was agreed
        if (isOurs ? this.#session.isEnding : !this.#host.onBreak()) return;
        connection = await (successor ?? this.#next(why));
      }
    } catch (error) {
      // Once the server's close has come, our answer to that goes on by itself.
      if (!this.#session.isEnding) this.#host.onFail(undefined, error);
    }
  }

  /** The page leaves before the session is open to it: what the server has opened is closed at once. */
  abandon(): void {
    const connection = this.#connection;
    if (!connection || this.#session.level !== FULL) return;
    if (this.#session.token) return void this.uplink.farewell();
    // The answer may still come, with a session that must not be left behind.
    this.#connection = undefined;
    connection.endIn(CLOSE_TIMEOUT_MS);
  }

  /** Ends all requests; where there is a session, `run` goes on to resume it. */
  hangUp(): void {
    this.uplink.hangUp();
    this.#letGo();
    this.#connection?.end();
    this.#connection = undefined; // what is left in a parser must not count
    this.#inbox.isRead = false;
  }

  /** Something does not fit: "The client ends the stream and resumes, once …; the second time it fails with 1006." */
  distrust(): void {
    if (++this.#damages > 1) this.#host.onFail("the event stream is damaged");
    else this.hangUp();
  }

  /** "A duplex request is replaced as a whole", if it is full; `run` goes on with the other connection. */
  renew(isFull = false): void {
    const old = this.#connection;
    if (!old?.hasBegun || old.isPoll || this.#old) return; // a poll's next turn is another connection
    // The next one may be to be renewed as soon as it has begun, too.
    if (isFull || !old.isYoung) this.#retries = 0;
    this.#host.onRenewal();
    this.#old = old;
    this.#receipts.most = this.#receipts.dispatched;
    old.successor = this.#resume("renewed");
    old.successor.catch(() => {}); // `run` waits for it, if it still runs
  }

  /** Lets another tab have the stream for a while; what goes up goes on. False: not now. */
  giveWay(): boolean {
    const connection = this.#connection;
    if (!connection?.hasBegun || connection.isMidway || !this.#session.mayRenew) return false;
    this.#host.onRenewal();
    connection.ended = "shared";
    connection.end();
    return true;
  }

  /** Not at once all the same: uplink requests may get through where no stream does. */
  onHeard(): void {
    this.#retries = Math.min(this.#retries, 1);
  }

  end(): void {
    this.#events.end();
    this.slots.end();
    clearTimeout(this.#deadline);
    clearTimeout(this.#limit);
    this.hangUp();
  }

  // Opening

  /** The next connection. What the page before has left may be over, which is no failure. */
  async #next(why: Reason): Promise<Exchange> {
    try {
      return await this.#resume(why);
    } catch (error) {
      if (!this.#keeper.hasTakenOver || this.#session.phase !== "opening") throw error;
      this.hangUp(); // refused, or too late
    }
    return this.#beginAnew();
  }

  #beginAnew(): Promise<Exchange> {
    if (this.#session.isOver) throw new Error("Closed");
    this.#host.onProgress(this.#keeper.restore());
    this.#keeper.claim();
    return this.#open();
  }

  /** Leaves the session to the next page, or to this one, if it comes back. False: it cannot be. */
  keep(): boolean {
    this.#rewind();
    if (!this.#keeper.keep()) return false;
    this.uplink.leave();
    this.slots.end();
    this.hangUp();
    return true;
  }

  async #open(): Promise<Exchange> {
    const protocols = this.#session.offered.join(", ");
    const headers: Record<string, string> = {
      // "Opening is not idempotent: a client repeats it only with x-duplex-opening."
      [OPENING_HEADER]: randomName(),
      ...protocols && { [PROTOCOL_HEADER]: protocols },
    };
    const transports = this.#transports;
    if (transports.current === "duplex") {
      const connection = await this.#connect(headers, OPEN_TIMEOUT_MS, DUPLEX_TIMEOUT_MS);
      // Anything but our own answer, or a refusal for good, may be the fault of the transport.
      // crossws answers with a plain stream: another request would open another peer there.
      // But a firewall may refuse a content type that it does not know by 403.
      const { status, isOurs } = connection;
      if (connection.isStream || [401, 429, 503].includes(status) || status === 403 && isOurs) {
        return this.#accept(connection);
      }
      connection.end();
      if (transports.current === "duplex") transports.leave("stream");
    }
    if (!transports.polls) {
      const patience = FIRST_EVENT_TIMEOUT_MS * (this.slots.isBlind ? 2 : 1);
      const connection = await this.#connect(headers, OPEN_TIMEOUT_MS, patience);
      if (!connection.isUnanswered) return this.#accept(connection);
      transports.descend(true);
    }
    const connection = await this.#connect(headers, OPEN_TIMEOUT_MS);
    if (connection.isFull || connection.isUnanswered) return this.#accept(connection);
    connection.end();
    transports.ascend(); // a server that knows no polls may have been slow
    return this.#accept(await this.#connect(headers, OPEN_TIMEOUT_MS));
  }

  /**
   * Asks for an event stream, or for a piece of one; with the duplex transport the request carries
   * the uplink, too. `isPatient`: a poll need not be answered before there is news.
   */
  async #connect(
    headers: Record<string, string>,
    patience: number,
    answerTimeout?: number,
    isPatient = false,
  ): Promise<Exchange> {
    const slot = await this.slots.take(this.#old);
    if (this.#session.isEnding) throw new Error("Closed");
    const isPoll = this.#transports.polls;
    const connection = this.#connection = this.#transports.current === "duplex"
      ? this.uplink.exchange(frame("PING", EMPTY))
      : new Exchange(undefined, isPoll);
    connection.slot = slot;
    connection.position = this.#receipts.confirmable;
    connection.endIn(patience);
    await this.#requests.ask(connection, {
      headers: { accept: STREAM_TYPE, ...headers, ...isPoll && { [POLL_HEADER]: "1" } },
      bytes: isPoll ? this.uplink.poll(isPatient) : undefined,
      answerTimeout,
    });
    this.#inbox.inNewTask();
    // No answer at all: the request is held until its body ends, as any streaming one would be.
    // (Whatever else ends it lets go of it first.)
    if (this.#connection?.body && connection.isEnded) this.#transports.leave("post");
    // "A client takes the one that the latest answer names."
    if (connection.isFull) this.#session.token = connection.header(TOKEN_HEADER);
    connection.endIn(0);
    if (!this.#session.isOver) return connection;
    if (connection.isFull && !this.#session.terms) this.uplink.farewell();
    connection.end();
    throw new Error("Closed");
  }

  /** Checks the answer to an opening request; the session is open with its first events. */
  #accept(connection: Exchange): Exchange {
    if (!connection.isStream) {
      connection.end();
      throw new Error("Refused");
    }
    this.#limit = setTimeout(() => this.#host.onFail(NOTHING_CAME), OPEN_TIMEOUT_MS);
    if (connection.isFull) {
      return this.#await(connection, connection.isPoll ? OPEN_TIMEOUT_MS : undefined);
    }
    this.#session.level = PLAIN;
    this.#session.token = connection.header(TOKEN_HEADER);
    connection.body?.finish();
    connection.slot?.free(); // it cannot be given up for a while
    this.#transports.settle("post");
    if (this.#session.token || !this.#session.sends) this.openPlain();
    return connection;
  }

  /** Whoever answers, and holds the events, holds back a stream. */
  #await(connection: Exchange, patience = FIRST_EVENT_TIMEOUT_MS): Exchange {
    if (this.#session.isOver) throw new Error("Closed"); // by another answer, since this one came
    clearTimeout(this.#deadline);
    this.#deadline = setTimeout(() => {
      if (connection !== this.#connection) return;
      // The page is still at what the last one has brought: nobody has read on.
      if (!connection.reader) return void this.#await(connection, patience);
      connection.ended = connection.isPoll ? undefined : "held";
      if (connection.ended) this.#transports.descend(true);
      connection.end();
    }, patience);
    return connection;
  }

  openPlain(): void {
    this.#opened(this.#connection!.header("sec-websocket-protocol"));
  }

  #opened(protocol: string): void {
    clearTimeout(this.#limit);
    if (!protocol || this.#session.offered.includes(protocol)) return this.#host.onOpen(protocol);
    this.abandon();
    this.#host.onFail("the server chose a subprotocol that was not offered");
  }

  // Reading

  /** Reads one event stream to its end, whichever way that comes. */
  async #read(connection: Exchange): Promise<void> {
    this.#inbox.isRead = connection === this.#connection;
    const parser = this.#events.parser(() => connection === this.current);
    // Left to itself, Deno's decoder drops a mark in mid-stream that comes byte by byte.
    const text = new TextDecoder("utf-8", { ignoreBOM: true });
    const { position } = connection;
    let first = true;
    try {
      const reader = connection.reader = readerOf(connection.response!.body!); // if there is one
      for (;;) {
        const reading = reader.read();
        // What was there already may come in the task of what was before it.
        const waits = await isSlow(reading);
        const { done, value } = await reading;
        if (waits) this.#inbox.inNewTask();
        // An old reader must not go on counting once a resumption has told the count.
        if (done || connection !== this.current) break;
        connection.quietTicks = 0;
        const decoded = text.decode(value, { stream: true });
        parser.push(first && decoded[0] === "\uFEFF" ? decoded.slice(1) : decoded);
        first &&= !decoded;
        if (parser.partial > MAX_EVENT_CHARACTERS) this.#host.onFail("an event has no end");
        connection.isMidway = !!parser.partial && connection.position === position;
        const { length } = value; // whose buffer the next reading takes
        // The next chunk waits until this one is dispatched.
        if (this.#inbox.isBehind) await this.#inbox.dispatch();
        this.#receipts.read(length, parser.partial);
        this.#events.acknowledge(parser.partial);
        // A page that pauses is sent no more than a window, and goes on hearing the heartbeats; on
        // the other level nothing but the network holds the server back.
        if (this.#session.level === PLAIN) await this.#inbox.untilReady();
      }
    } catch {
      // the connection broke: as good as its end
    }
    connection.end();
    if (connection !== this.current) return;
    if (connection === this.#connection) this.#connection = undefined;
    this.#old = undefined;
    this.#inbox.isRead = false;
  }

  /** The one that is read: while it is being renewed, it goes on. */
  get current(): Exchange | undefined {
    return this.#old ?? this.#connection;
  }

  onTerms(terms: Terms): void {
    const connection = this.#connection!;
    const { next, attempt, received, handled, heartbeatInterval } = terms;
    const isOfThis = next === connection.position + 1 && attempt === this.#session.attempt;
    if (!isOfThis || !areTerms(terms)) return this.distrust();
    const isOpening = this.#session.phase === "opening";
    const wasLost = !!this.#session.lostAt;
    this.#session.terms = terms;
    this.#session.lostAt = 0;
    clearTimeout(this.#deadline);
    connection.hasBegun = true;
    this.#transports.onEvent(connection.isPoll);
    this.#receipts.settle(connection.position);
    this.#events.watch(heartbeatInterval);
    if (isOpening) this.#opened(terms.protocol);
    else this.#pauses.wake(); // the network is back
    this.uplink.begin(connection);
    // Which asks whether anything goes up.
    if (!isOpening && (wasLost || this.#session.phase === "renewing")) this.#host.onResume();
    this.uplink.confirm(received, handled);
    this.slots.onBegin();
  }

  /** What ends each stream as soon as it has spoken, or each poll by nothing new, is to wait. */
  onNews(isNew = false): void {
    const connection = this.#connection;
    if (connection?.isYoung && !(isNew && connection.isPoll)) this.onHeard();
    else this.#retries = 0;
  }

  /** The page does not pause any more. */
  async goOn(): Promise<void> {
    await this.#inbox.dispatch();
    this.#events.acknowledge(0);
    this.#pauses.wake(); // a poll may wait
  }

  // Resuming

  /** The next connection. */
  async #resume(why: Reason): Promise<Exchange> {
    const { resumeTimeout, heartbeatInterval } = this.#session.terms ?? UNTOLD;
    if (why === "lost" || !this.#session.terms) this.#lose();
    else if (why === "turn") {
      // A poll brings all again that is not dispatched: rarely, while that cannot be.
      if (this.#inbox.isPaused) await this.#pauses.wait(1, Infinity, (resumeTimeout || 5000) / 2);
      this.#transports.tryStream();
    }
    // A poll without any news is not followed at once: something may repeat each request.
    if (!this.#session.lostAt && why !== "turn" && why !== "renewed") this.#retries = 0;
    if (why === "shared") this.#session.lostAt = clock();
    const isTrial = why === "turn" && !this.#transports.polls;
    const patience = Math.max(Math.min(resumeTimeout / 3, 2 * heartbeatInterval), 1000);
    const { lostAt } = this.#session;
    const deadline = () => lostAt ? lostAt + resumeTimeout + this.#requests.grace : Infinity;
    let pause = 0;
    while (await this.#pauses.wait(this.#retries++, deadline(), pause)) {
      const isPatient = why === "turn" && this.#transports.polls;
      const timeout = isPatient
        ? heartbeatInterval + patience
        : isTrial
        ? TRIAL_TIMEOUT_MS
        : Math.min(patience, this.slots.isBlind ? patience : ANSWER_TIMEOUT_MS);
      const connection = await this.#connect(
        {
          [ATTEMPT_HEADER]: `${++this.#session.attempt}`,
          "last-event-id": `${why === "renewed" ? this.#receipts.most : this.#rewind()}`,
        },
        Math.max(LAST_TRY_MS, Math.min(deadline() - clock(), timeout)),
        undefined,
        isPatient,
      );
      if (connection.isFull) {
        this.#letGo();
        return this.#await(connection, isPatient || isTrial ? timeout : undefined);
      }
      const { isUnanswered } = connection; // before we end it, too
      connection.end();
      if (this.#session.isEnding) throw new Error("Closed");
      if (isUnanswered && !this.slots.isBlind) this.#transports.alternate();
      if (!this.#session.lostAt) { // a turn or a renewal that failed
        if (!isTrial) this.#host.onBreak();
        return this.#resume(isTrial ? "held" : "lost");
      }
      // "A streaming body at an instance that is not the session's." For this socket only.
      if (connection.rawStatus === 411) this.#transports.current = "post";
      else if (this.#requests.isFinal(connection)) break;
      else this.#host.onOutage();
      pause = connection.retryAfter;
    }
    throw new Error("Not resumed");
  }

  /** The connection that was renewed is needed no more. */
  #letGo(): void {
    this.#old?.end();
    this.#old = undefined;
    this.#receipts.most = Infinity;
  }

  /** What has come and was not dispatched is forgotten: it comes again. */
  #rewind(): number {
    this.#inbox.discard();
    return this.#receipts.rewind();
  }

  #lose(): void {
    this.hangUp(); // whatever cut the connection may hold the others for ever
    if (this.#session.lostAt) return;
    this.#session.lostAt = clock();
    if (this.#session.phase !== "renewing") this.uplink.onDrop();
  }
}

// --- Events: the server's words ---

/** The reports of {@link Events}. */
interface EventHost extends UplinkHost {
  /** `isComplete`: all that the server sent has come. */
  onClose(code: number, reason: string, isComplete: boolean): void;
}

/** The link that hears them. */
interface EventTaker {
  /** The connection whose words they are. */
  readonly current: Exchange | undefined;
  onTerms(terms: Terms): void;
  /** A message, an acknowledgement, or a question. `isNew`: it has not been said before. */
  onNews(isNew?: boolean): void;
  /** A session of the other level is open. */
  openPlain(): void;
  /** Something does not fit. */
  distrust(): void;
  renew(): void;
  hangUp(): void;
}

/** Takes each event of the streams for what it is, and their silence; and tells the server what has come. */
class Events {
  readonly #session: Session;
  readonly #inbox: Inbox;
  readonly #receipts: Receipts;
  readonly #uplink: Uplink;
  readonly #taker: EventTaker;
  readonly #host: EventHost;
  /** When the server last heard of us that a message is coming. */
  #spokeAt = 0;
  #lastAck = "";
  #ticker: ReturnType<typeof setInterval> | undefined;
  #ticks = 0;
  #tickedAt = 0;

  constructor(
    { session, inbox, receipts }: Parts,
    uplink: Uplink,
    taker: EventTaker,
    host: EventHost,
  ) {
    this.#session = session;
    this.#inbox = inbox;
    this.#receipts = receipts;
    this.#uplink = uplink;
    this.#taker = taker;
    this.#host = host;
  }

  /** Of one stream, until it is left. */
  parser(isCurrent: () => boolean): EventParser {
    const isFull = this.#session.level === FULL;
    return new EventParser((type, data) => {
      if (!isCurrent()) return;
      try {
        if (isFull) this.#onEvent(type, data);
        else this.#onPlainEvent(type, data);
      } catch {
        this.#taker.distrust(); // what cannot be parsed would be sent again for ever
      }
    });
  }

  #onEvent(type: string, data: string): void {
    switch (type) {
      case "":
      case "message":
        return this.#receive(data);
      case JSON_EVENT: {
        const text: unknown = JSON.parse(data);
        // What is no string is as bad as what is no JSON.
        return typeof text === "string" ? this.#receive(text) : this.#taker.distrust();
      }
      case BINARY_EVENT:
        return this.#receive(fromBase64(data));
      case OPEN_EVENT:
        // "Another duplex-open, whatever its data, ends the stream."
        if (this.#taker.current!.hasBegun) return this.#taker.hangUp();
        return this.#taker.onTerms(JSON.parse(data));
      case ACK_EVENT: {
        const counts = data.split(" ", 3).map(countOf); // what is behind them is not ours to know
        if (counts.includes(undefined)) return this.#taker.distrust();
        const [received, handled, window] = counts;
        this.#taker.onNews(data !== this.#lastAck);
        this.#lastAck = data;
        return this.#uplink.confirm(received!, handled, window);
      }
      case PING_EVENT: {
        const [sent, payload] = data.split(" ");
        // "The number of a duplex-ping, that does not fit the client's own count means damage."
        if (countOf(sent!) !== this.#taker.current!.position) return this.#taker.distrust();
        this.#taker.onNews();
        this.#receipts.pong(fromBase64(payload ?? ""));
        // With a poll it goes when the next one does.
        return this.#taker.current!.isPoll ? undefined : this.#uplink.pump();
      }
      case RENEW_EVENT:
        // "A client that is open connects anew, by a resumption, which is no drop."
        return this.#session.mayRenew ? this.#taker.renew() : undefined;
      case CLOSE_EVENT: {
        const { code, reason, sent } = JSON.parse(data);
        if (!isCloseCode(code) || !isReason(reason)) return this.#taker.distrust();
        return this.#host.onClose(code, reason, sent === this.#taker.current!.position);
      }
    }
  }

  /** "On this level a client takes no event whose name begins with duplex-." */
  #onPlainEvent(type: string, data: string): void {
    if (type === TOKEN_EVENT) {
      if (this.#session.token) return;
      this.#session.token = data; // the header could not be read
      return this.#taker.openPlain();
    }
    // "duplex-open before any token means that the answer's headers are hidden from it".
    if (type === OPEN_EVENT && !this.#session.token) return this.#host.onFail(HIDDEN);
    if (type.startsWith("duplex-")) return;
    // Any other event stream: we could not send.
    if (!this.#session.token && this.#session.sends) return this.#host.onFail(ONLY_RECEIVES);
    if (!type || type === "message") this.#inbox.add(data);
  }

  /** "The client's count advances when the event's blank line is parsed, whatever becomes of the event then." */
  #receive(data: string | Bytes): void {
    this.#taker.onNews(true);
    // While this connection was asked for, the one before it may have brought the message.
    if (++this.#taker.current!.position <= this.#receipts.received) return;
    this.#receipts.received++;
    // Ours sends a window of them at most.
    if (this.#inbox.isPaused && this.#inbox.size > MAX_EVENT_CHARACTERS) {
      return this.#host.onFail("the server sends on while the page pauses");
    }
    this.#inbox.add(data);
  }

  /**
   * "The client acknowledges with ACK at half a window, or at an eighth on an open uplink stream":
   * that costs no request, and keeps the server writing.
   */
  acknowledge(partial: number): void {
    const { terms } = this.#session;
    if (!terms) return;
    // The next poll acknowledges, too.
    const isBehind = this.#receipts.isBehind && !this.#taker.current?.isPoll;
    if (isBehind && this.#receipts.bytes >= terms.window / (this.#uplink.isStreaming ? 8 : 2)) {
      this.#uplink.acknowledge();
    } else if (partial && terms.idleTimeout && clock() > this.#spokeAt + terms.idleTimeout / 4) {
      // "A message of any size is no silence": its parts are not acknowledged, but we are there.
      if (this.#spokeAt) this.#uplink.acknowledge();
      this.#spokeAt = clock();
    }
  }

  watch(heartbeatInterval: number): void {
    clearInterval(this.#ticker);
    this.#tickedAt = clock();
    this.#ticker = setInterval(() => this.#tick(), heartbeatInterval / TICKS);
  }

  end(): void {
    clearInterval(this.#ticker);
  }

  /** One ticker: streams that went quiet, and keep-alive of ours. */
  #tick(): void {
    const connection = this.#taker.current;
    const terms = this.#session.terms!;
    const isLate = clock() > this.#tickedAt + terms.heartbeatInterval;
    this.#tickedAt = clock();
    if (connection?.reader) {
      this.#taker.onNews();
      // Not while the page is behind: then nothing is read.
      if (!this.#inbox.isBehind) connection.quietTicks += isLate ? TICKS : 1;
      if (connection.quietTicks > ticksOfPatience(terms)) this.#taker.hangUp();
    }
    if (++this.#ticks % 2) this.#uplink.keepAlive();
  }
}

// --- Uplink: what goes up, by which transport ---

/** The reports of an {@link Uplink}. */
interface UplinkHost {
  /** The server has handled or received something: of so much of `bufferedAmount`, all. */
  onProgress(size: number): void;
  /** A message is larger than the server, or something in front of it, takes. */
  onTooLarge(): void;
  /** The server has the last CLOSE, or will not have it. */
  onFarewell(): void;
  /** The server has ended the session, as it says itself. */
  onOver(code: number, reason: string): void;
  onFail(fault?: string, cause?: unknown): void;
}

/** The connection that an {@link Uplink} goes with. */
interface Carrier {
  /** What the server says does not fit. */
  distrust(): void;
  /** Something is the matter with any request: a resumption will tell what. */
  hangUp(): void;
  /** The body of the connection has taken all that it may. */
  renew(isFull: true): void;
  /** The server has been heard: the network is well. */
  onHeard(): void;
}

/** What a page may still send while it is being left, by all its sockets. */
let keepaliveLeft = MAX_KEEPALIVE_BYTES;

/** Sends what is in the outbox, and what the server waits to hear, over what is there. */
class Uplink {
  readonly #session: Session;
  readonly #inbox: Inbox;
  readonly #outbox: Outbox;
  readonly #receipts: Receipts;
  readonly #requests: Requests;
  readonly #transports: Transports;
  readonly #pauses: Pauses;
  readonly #keeper: Keeper;
  readonly #carrier: Carrier;
  readonly #host: UplinkHost;
  readonly #onError = (error: unknown): void => this.#host.onFail(undefined, error);

  /** There is a connection, whose session is open or resumed. */
  isLinked = false;
  /** Its body streams: the connection itself, or a request beside it. */
  #stream: Exchange | undefined;
  /** A batch that is on its way, or waits to be sent again. */
  #batch: Exchange | undefined;
  /** A POST with control frames alone. */
  #control: Exchange | undefined;
  /** Nothing is sent after a stream that failed. */
  #isPausing = false;
  #isScheduled = false;
  /** When the first of the requests was made that have failed since one did not; 0: none. */
  #failingSince = 0;
  /** When that was told as a lost connection, the last time. */
  #hungUpAt = 0;
  /** The pauses of a farewell. */
  #farewell: Pauses | undefined;
  #watch: ReturnType<typeof setInterval> | undefined;
  #quietWatches = 0;

  constructor(parts: Parts, carrier: Carrier, host: UplinkHost) {
    this.#session = parts.session;
    this.#inbox = parts.inbox;
    this.#outbox = parts.outbox;
    this.#receipts = parts.receipts;
    this.#requests = parts.requests;
    this.#transports = parts.transports;
    this.#pauses = parts.pauses;
    this.#keeper = parts.keeper;
    this.#carrier = carrier;
    this.#host = host;
  }

  /** A body streams: whatever goes up costs no request. */
  get isStreaming(): boolean {
    return !!this.#stream;
  }

  /** Nothing goes up, and that is known as a lost connection. */
  get isStuck(): boolean {
    return !!this.#hungUpAt;
  }

  /**
   * A request whose body this fills: the connection's, once it has begun, or a stream of our own.
   * Some fetches send no header before a byte of the body: then there is a preface.
   */
  exchange(preface: Bytes): Exchange {
    const exchange: Exchange = new Exchange(new Body(() => this.#fill(exchange), preface));
    return exchange;
  }

  /** The body of a poll. A PING is answered at once; without one, the answer waits for news. */
  poll(isPatient: boolean): Bytes {
    const { dispatched } = this.#receipts;
    const last = isPatient ? frame("ACK", encoder.encode(`${dispatched}`)) : frame("PING", EMPTY);
    return concat([...this.#receipts.take(), last]);
  }

  /** A connection has opened the session, or resumed it. */
  begin(connection: Exchange): void {
    if (!this.#session.isActive) return;
    this.isLinked = true;
    this.#transports.failures = 0;
    if (this.#stream?.isEnded) this.#endStream(); // of a connection that was renewed
    if (connection.body?.isOpen) this.#stream ??= connection;
  }

  /** Ends all that is on its way; a batch goes again by itself, all else when there is a connection. */
  hangUp(): void {
    this.isLinked = false;
    this.#endStream();
    this.#batch?.end();
    if (!this.#farewell) this.#control?.end();
  }

  /** Whether the connection ended with a body longer than it may be here. */
  wasTooLong(connection: Exchange): boolean {
    return connection === this.#stream && this.#session.phase === "open" &&
      this.#transports.onCut(connection.body!.total);
  }

  /** The connection was lost. */
  onDrop(): void {
    this.#transports.onDrop(this.#outbox.hasBegun);
    if (this.#session.phase === "leaving") this.pump();
  }

  get isTakingLeave(): boolean {
    return !!this.#farewell;
  }

  /** Ends a farewell. */
  dismiss(): void {
    this.#farewell?.end();
    this.#control?.end();
  }

  /**
   * Sends CLOSE alone, in place of all else, until the server has it. That may outlive the socket:
   * who closed and hears no answer would take it for lost.
   */
  async farewell(code = 1001, reason = EMPTY, number = this.#outbox.firstUnacked): Promise<void> {
    this.hangUp();
    const { level, terms } = this.#session;
    const bytes = concat([level.seq(number), level.close(code, reason)!]);
    // "A closed session leaves a tombstone for the resume timeout (5 s where that is 0)."
    const deadline = clock() + (terms ? terms.resumeTimeout || CLOSE_TIMEOUT_MS : 0);
    const pauses = this.#farewell = new Pauses(true);
    for (let retries = 1;; retries++) {
      const exchange = this.#control = new Exchange();
      exchange.endIn(POST_TIMEOUT_MS);
      await this.#requests.ask(exchange, { bytes, keepalive: true });
      exchange.end();
      if (exchange.ending) this.#host.onOver(...exchange.ending);
      if (level.confirmed(exchange, 1) || this.#requests.isFinal(exchange)) break;
      if (!await pauses.wait(retries, deadline, exchange.retryAfter)) break;
    }
    this.#farewell = undefined;
    this.#host.onFarewell();
  }

  /** Messages up to this number have arrived, and so many bytes of all have been handled. */
  confirm(received: number, handled = 0, window = 0): void {
    if (!this.#session.isActive) return; // an answer that was on its way
    if (this.#outbox.handle(handled, window)) this.#host.onProgress(0);
    if (received < this.#outbox.firstUnacked) return this.pump();
    if (!(received < this.#outbox.nextUnsent)) return this.#carrier.distrust();
    const size = this.#outbox.confirm(received);
    this.#carrier.onHeard();
    this.#quietWatches = 0;
    this.#transports.onConfirm(!!this.#stream);
    if (this.#stream) this.#stream.body!.isConfirmed = true;
    this.#host.onProgress(size);
    this.pump();
  }

  /** Messages of one task go together. */
  pumpSoon(): void {
    if (this.#isScheduled) return;
    this.#isScheduled = true;
    queueMicrotask(() => {
      this.#isScheduled = false;
      this.pump();
    });
  }

  /** Sends what can be sent. */
  pump(): void {
    if (!this.#session.isActive) return;
    const stream = this.#stream;
    if (stream) {
      const body = stream.body!;
      if (body.isOpen) return this.#fill(stream);
      // Ended, and nothing of it is to be confirmed. A request whose body was not wanted has yet to
      // be answered, but for one whose answer is our event stream.
      if ((body.isFinished || stream.reader) && body.next <= this.#outbox.firstUnacked) {
        this.#leaveStream();
      }
    }
    // A close waits for no stream; all else does, which the resumption brings.
    const posts = this.#transports.posts || !this.isLinked && this.#session.phase === "leaving";
    if (!posts && !this.isLinked) return;
    if (this.#outbox.isDue && !this.#stream && !this.#batch && !this.#isPausing) {
      const sending = posts ? this.#post() : this.#postStream();
      return void sending.catch(this.#onError); // an own fetch may answer with anything
    }
    // "A POST with control frames alone may run beside it."
    if (!this.#receipts.isOwed || this.#control) return;
    this.#postControl().catch(this.#onError);
  }

  /** At once, since the server may wait for it; or what carried the last one may be lost. */
  acknowledge(): void {
    this.#receipts.isDue = true;
    this.pump();
  }

  /**
   * "On an open uplink stream the client writes a PING when it wrote nothing for half an interval, or
   * an ACK where it owes one": by itself an acknowledgement costs the server as much as several
   * messages.
   */
  keepAlive(): void {
    const body = this.#stream?.body;
    if (!body) return;
    if (body.isOpen && body.isAsked && !body.wroteSinceTick) {
      if (this.#receipts.isBehind) this.acknowledge();
      else body.write([frame("PING", EMPTY)]);
    }
    body.wroteSinceTick = false;
  }

  /** All that is not acknowledged, as far as a page that is left may send it. */
  flush(): void {
    const load = new Load();
    const most = this.#outbox.isOnlyClose ? MAX_KEEPALIVE_BYTES : keepaliveLeft;
    const bytes = concat(this.#outbox.take(load, most, false));
    // All sockets of a page are left in one task.
    if (keepaliveLeft === MAX_KEEPALIVE_BYTES) {
      nextTask(() => keepaliveLeft = MAX_KEEPALIVE_BYTES);
    }
    keepaliveLeft -= load.used;
    this.#requests.ask(new Exchange(), { bytes, keepalive: true });
  }

  /** "LEAVE says that the page of connection attempt is left." */
  leave(): void {
    const bytes = frame("LEAVE", encoder.encode(`${this.#session.attempt}`));
    this.#requests.ask(new Exchange(), { bytes, keepalive: true });
  }

  // By streams

  /** "The uplink as long streaming POSTs", one after the other. */
  async #postStream(): Promise<void> {
    const stream = this.#stream = this.exchange(EMPTY);
    const body = stream.body!;
    this.#startWatch(); // it may never be read
    await this.#send(stream, body);
    if (this.#stream !== stream) return; // confirmed, or ended by ourselves
    this.#endStream();
    const { rawStatus, retryAfter } = stream;
    if (rawStatus !== 411 && this.#transports.onCut(body.total)) return this.acknowledge();
    if (rawStatus === 411 || rawStatus === 413 || !body.isConfirmed && this.#transports.fail()) {
      this.#transports.leave("post");
    } else if (this.#requests.isFinal(stream)) return this.#host.onFail();
    else {
      this.#isPausing = true;
      await this.#pauses.wait(this.#transports.failures, Infinity, this.#session.pause(retryAfter));
      this.#isPausing = false;
    }
    this.acknowledge();
  }

  /** Gives a streaming body what is due, when its reader has asked. */
  #fill(stream: Exchange): void {
    const body = stream.body!;
    // A duplex request whose answer is still to come waits for its session.
    if (stream !== this.#stream || !body.isOpen) return;
    if (this.#outbox.isDue) this.#startWatch();
    if (!body.isAsked) return;
    // Where much is received, what is no message adds up, too.
    const control = body.total - body.used;
    const { resumeTimeout, window } = this.#session.terms!;
    // A connection that cannot be resumed is not put at risk.
    const most = stream.reader && !resumeTimeout ? MAX_BODY_BYTES : this.#transports.maxBody;
    const messages = this.#outbox.take(body, most - control);
    const parts = [...this.#receipts.takeBeside(messages, window), ...messages];
    if (parts.length) body.write(parts);
    // The body has had its share: what follows goes in another, once this one is confirmed.
    if (this.#outbox.isDueAfter(body) || body.total > most - MAX_CONTROL_BYTES) {
      body.finish();
      if (body.next <= this.#outbox.firstUnacked) this.pump();
    }
  }

  /** The stream has ended, and all of it is confirmed. */
  #leaveStream(): void {
    const { reader, body } = this.#stream!;
    if (body!.isFinished && clock() < body!.begunAt + BULK_MS) {
      this.#transports.onWhole(body!.total);
    }
    this.#stream = undefined;
    if (!reader || !this.#session.terms!.resumeTimeout) return;
    this.isLinked = false;
    this.#carrier.renew(true);
  }

  #endStream(): void {
    this.#stream?.end();
    this.#stream = undefined;
    this.#stopWatch();
  }

  /** "A stream counts as working only while every message is confirmed within 3 s, the first within 1.5 s." */
  #startWatch(): void {
    this.#watch ??= setInterval(() => {
      const body = this.#stream?.body;
      if (!body || !this.#outbox.isDue) return this.#stopWatch();
      const patience = body.isConfirmed ? PATIENCE : body.total ? FIRST_PATIENCE : UNREAD_PATIENCE;
      if (++this.#quietWatches >= patience) this.#abandonStream();
    }, WATCH_PERIOD_MS);
  }

  #stopWatch(): void {
    clearInterval(this.#watch);
    this.#watch = undefined;
    this.#quietWatches = 0;
  }

  /** "Else it is abandoned for the next transport, and what was not acknowledged is sent again there." */
  #abandonStream(): void {
    const { reader, body } = this.#stream!;
    const wasTooLong = this.#transports.onCut(body!.total);
    if (wasTooLong && reader) return this.#carrier.hangUp();
    if (!wasTooLong) {
      this.#transports.leave(this.#transports.current === "duplex" ? "stream" : "post");
    }
    if (reader) { // its other half is our event stream
      body!.forget();
      this.#stream = undefined;
    }
    this.#endStream();
    this.acknowledge();
  }

  // By posting

  /**
   * "All that is queued goes in one POST …. One message POST is in flight, the next batch collects
   * meanwhile." On crossws's wire one message a request.
   */
  async #post(): Promise<void> {
    let since = 0;
    for (let retries = 0; this.#session.isActive && this.#outbox.isDue;) {
      const begun = clock();
      const load = new Load();
      const batch = this.#batch = new Exchange();
      const most = Math.min(this.#transports.maxBatch, this.#session.level.maxBatch);
      const bytes = concat([...this.#receipts.take(), ...this.#outbox.take(load, most)]);
      await this.#send(batch, load, bytes);
      if (!this.#session.isActive) return;
      // As told by the answer, or by the event stream.
      if (this.#outbox.firstUnacked > load.first) since = retries = 0;
      else {
        this.#receipts.isDue = true; // what it carried may be lost
        // "What a body is given for its size is not counted against the resume timeout."
        since = (since || begun) + Math.max(0, clock() - begun - POST_TIMEOUT_MS);
        if (this.#halve(batch, load)) continue;
        const tookNothing = batch.received! < load.first && !batch.ending;
        if (tookNothing && retries === DOUBT) this.#requests.warn(TOOK_NOTHING);
        if (!await this.#mayRetry(batch, ++retries, since)) return;
      }
    }
    this.#batch = undefined;
    this.pump();
  }

  /** Whether a batch that was too large goes again as smaller ones: for the server, or for a firewall. */
  #halve({ rawStatus, isTrusted }: Exchange, load: Load): boolean {
    const isTooLarge = rawStatus === 413 || !isTrusted && (rawStatus === 400 || rawStatus === 403);
    if (!isTooLarge || load.next === load.first + 1) return false;
    this.#transports.maxBatch = load.used >> 1;
    return true;
  }

  /** Waits, where a batch may go again. */
  async #mayRetry(batch: Exchange, retries: number, since: number): Promise<boolean> {
    const { terms, patience } = this.#session;
    // "Where nothing but its CLOSE is left, it tries again within 0.4 s each time."
    const isLast = this.#session.phase === "leaving" && this.#outbox.isOnlyClose;
    const pauses = isLast ? Math.min(retries, MAX_LAST_RETRIES) : retries;
    // Whoever says 413, a proxy, too: a message that is too large alone is "also 413".
    if (batch.rawStatus === 413) {
      this.#host.onTooLarge();
    } else if (
      !terms || this.#requests.isFinal(batch) ||
      !await this.#pauses.wait(pauses, since + patience + this.#requests.grace, batch.retryAfter)
    ) this.#host.onFail();
    else return true;
    return false;
  }

  async #postControl(): Promise<void> {
    const nothing = new Load();
    for (let retries = 0; this.#receipts.isOwed && this.#session.isActive;) {
      const control = this.#control = new Exchange();
      await this.#send(control, nothing, concat(this.#receipts.take()));
      if (control.received !== undefined) continue;
      this.#receipts.isDue = true;
      if (this.#requests.isFinal(control)) this.#carrier.hangUp();
      await this.#pauses.wait(++retries, Infinity, this.#session.pause(control.retryAfter));
    }
    this.#control = undefined;
  }

  /** Sends one body, and takes what its answer confirms: no status, but that, is success. */
  async #send(exchange: Exchange, load: Load, bytes?: Bytes): Promise<void> {
    await this.#keeper.untilAwake();
    const since = clock();
    if (bytes) exchange.endIn(POST_TIMEOUT_MS + bytes.length / 8);
    await this.#requests.ask(exchange, { bytes });
    this.#inbox.inNewTask();
    exchange.endIn(0);
    exchange.body?.finish(); // before another is begun
    exchange.response?.body?.cancel().catch(() => {});
    const received = this.#session.level.confirmed(exchange, load.first);
    exchange.received = received;
    if (received !== undefined) {
      const wasStuck = this.isStuck;
      this.#failingSince = this.#hungUpAt = 0;
      this.confirm(received);
      if (wasStuck) this.#host.onProgress(0);
      if (exchange.ending) this.#host.onOver(...exchange.ending);
    } else if (bytes && this.#session.isActive && this.#session.terms) this.#onFailure(since);
  }

  /** A request has failed. Where that lasts, the connection is lost, however well its stream does. */
  #onFailure(since: number): void {
    this.#failingSince ||= since;
    const patience = Math.min(UPLINK_PATIENCE_MS, this.#session.terms!.resumeTimeout / 3);
    if (clock() - Math.max(this.#failingSince, this.#hungUpAt) < patience) return;
    this.#hungUpAt = clock();
    this.#carrier.hangUp();
  }
}

// --- Slots: turns of the tabs, where all share few connections ---

/**
 * Event streams that an origin has at once in all tabs over HTTP/1.1, where browsers allow 6
 * connections. The first is for pages that are seen; the last is shared, whoever has it.
 */
const SEEN_SLOTS = [0, 1, 2, 3, 4];
const HIDDEN_SLOTS = [4, 3, 2, 1];

/** The link that has a slot. */
interface Holder {
  readonly current: Exchange | undefined;
  giveWay(): boolean;
}

/**
 * Over HTTP/1.1 a browser has 6 connections to an origin for all its tabs. Each event stream takes
 * one of 5 locks, and gives it up for a while to who waits for it.
 */
class Slots {
  readonly #session: Session;
  readonly #requests: Requests;
  readonly #transports: Transports;
  readonly #keeper: Keeper;
  readonly #holder: Holder;
  /** Of the locks, without their numbers. */
  readonly #name: string;
  readonly #look = (): void => void this.#giveWayInTurn().catch(() => {});
  /** Rung by who waits. */
  #bell: BroadcastChannel | undefined;
  /** Ends the wait for a slot. */
  wait: AbortController | undefined;
  #turn: ReturnType<typeof setTimeout> | undefined;
  #hasWarned = false;

  constructor({ session, requests, transports, keeper }: Parts, holder: Holder) {
    this.#session = session;
    this.#requests = requests;
    this.#transports = transports;
    this.#keeper = keeper;
    this.#holder = holder;
    this.#name = `duplex-sse ${requests.origin} `;
    requests.onSilence = (isUplink) => {
      if (isUplink || this.isBlind) this.#warn();
      this.#bell?.postMessage(0); // it may wait for what the streams of all tabs take
      if (isUplink && this.#bell) holder.giveWay();
    };
  }

  /** There is no telling who waits: a request without an answer may stand in the browser's queue. */
  get isBlind(): boolean {
    return this.#isCrowded && !locks();
  }

  get #isCrowded(): boolean {
    const { target } = this.#requests;
    return this.#transports.current === "post" && !isRuntime() &&
      (target.startsWith("http:") || protocolOf(target).startsWith("http/1"));
  }

  /**
   * Waits for a slot, where they are few; undefined where not, and where the wait is ended. A
   * connection that is renewed hands its own on: were each to have two, all might wait for another.
   */
  async take(old?: Exchange): Promise<Slot | undefined> {
    let slot: Slot | undefined;
    do {
      await this.#keeper.untilAwake();
      slot = old?.slot;
      if (!slot && !this.#session.isEnding && this.#isCrowded) {
        slot = await this.#takeInTurn().catch(() => undefined);
      }
    } while (this.#keeper.isAsleep);
    if (old) old.slot = undefined;
    if (this.#session.isEnding) slot?.free();
    return slot;
  }

  /** The first events of a connection have come. Who waits may have rung before. */
  onBegin(): void {
    const slot = this.#holder.current?.slot;
    if (!slot) return;
    slot.since ||= clock();
    if (!this.#session.terms!.resumeTimeout) slot.free(); // it cannot be given up for a while
    else if (locks()) this.#look();
  }

  /** Until the next one is taken. */
  end(): void {
    clearTimeout(this.#turn);
    this.wait?.abort();
    this.#bell?.close();
    this.#bell = undefined;
  }

  /** Asks for all that it may have; the first that is granted wins. */
  async #takeInTurn(): Promise<Slot | undefined> {
    const bell = this.#bell ??= new BroadcastChannel(this.#name);
    bell.onmessage = this.#look;
    // No secure context: all that can be done is to answer the bell.
    if (!locks()) return { index: 1, free() {} };
    const wait = this.wait = new AbortController();
    const { signal } = wait;
    return await new Promise((resolve) => {
      const request = (index: number, options: object) => {
        let slot: Slot | undefined;
        locks()!.request(this.#name + index, options, () => {
          if (signal.aborted) return;
          return new Promise<void>((free) => {
            resolve(slot = { index, free });
            wait.abort(); // the other requests, of which some may be granted already
          });
        }).catch(() => {
          if (slot) slot.isStolen = true; // else the wait has ended
          this.#look();
        });
      };
      const ask = async () => {
        for (const index of isSeen() ? SEEN_SLOTS : HIDDEN_SLOTS) request(index, { signal });
        await locks()!.query().catch(() => wait.abort()); // not allowed here
        if (!signal.aborted) bell.postMessage(0); // the others see by now that we wait
      };
      const warning = setTimeout(() => this.#warn(), SILENCE_MS);
      // Who has waited too long takes the last one from its holder, whoever is stuck.
      const theft = setTimeout(
        () => request(LAST_SLOT, { steal: true }),
        (this.#session.terms ?? UNTOLD).resumeTimeout / 2,
      );
      signal.addEventListener("abort", () => {
        clearTimeout(warning);
        clearTimeout(theft);
        this.wait = undefined;
        resolve(undefined);
      });
      globalThis.addEventListener("visibilitychange", ask, { signal });
      ask();
    });
  }

  #warn(): void {
    const { target } = this.#requests;
    if (this.#hasWarned || this.#session.phase === "dropped" || speaksHTTP2(target)) return;
    this.#hasWarned = true;
    this.#requests.warn(KEEPS_WAITING);
  }

  /** Gives the stream up to who waits for it, once it has been held for long enough. */
  async #giveWayInTurn(): Promise<void> {
    const connection = this.#holder.current;
    const slot = connection?.slot;
    if (!slot?.since) return;
    const { index } = slot;
    const { pending } = await locks()?.query() ?? {};
    // Whoever rings where there are no locks waits.
    const waiting = pending?.filter(({ name }) => name === this.#name + index).length ?? 1;
    const isKept = isSeen() && index !== LAST_SLOT || !waiting;
    if (isKept && !slot.isStolen || connection !== this.#holder.current) return;
    // A tab that is hidden has no use for the first.
    const turn = index && Math.max(MIN_TURN_MS, ROUND_MS / (waiting + 1));
    const left = slot.since + (this.#session.attempt ? turn : OPENING_TURN_MS) - clock();
    if (left <= 0 && this.#holder.giveWay()) return;
    clearTimeout(this.#turn);
    this.#turn = setTimeout(this.#look, left > 0 ? left : MIN_TURN_MS);
  }
}

/** A worker is not, whatever its page is. */
function isSeen(): boolean {
  return (globalThis as { document?: { hidden: boolean } }).document?.hidden === false;
}

// --- Transports: what streams here, and what was learned of it ---

/** The choice of a transport for the uplink. */
class Transports {
  readonly #host: string;
  readonly #isOurChoice: boolean;
  /** The page wants polls. */
  readonly #isAsked: boolean;
  /** For this socket; {@link leave} and {@link settle} tell the next one, too. */
  current: Transport;
  /** Bytes of messages in one request: so many get through. */
  maxBatch = MAX_BODY_BYTES;
  /** Streams in a row that ended unconfirmed. */
  failures = 0;
  /** A streaming body has been confirmed in this session. */
  #hasWorked = false;
  #drops = 0;
  /** The transport to go back to from polls. */
  #above: Transport = "post";
  /** While polls work: when a stream is tried; else 0. */
  #trialAt = 0;
  #trialAfter = TRIAL_AFTER_MS;
  /** Something holds streams. */
  #isSure = false;
  /** To be remembered once it has shown that it works. */
  #unlearned: Transport | undefined;

  constructor(target: string, options: WebSocketSSEOptions) {
    this.#host = new URL(target).host;
    const { transport = "auto", stream } = options;
    this.#isOurChoice = transport === "auto";
    this.#isAsked = transport === "poll";
    this.current = transport !== "auto"
      ? transport
      : stream === false
      ? "post"
      : this.#best(target);
  }

  /** "duplex" between runtimes; "stream" in Chromium over HTTP/2; "post" elsewhere. */
  #best(target: string): Transport {
    const known = learned.get(this.#host);
    if (known) return known;
    if (isRuntime()) return "duplex";
    // Who has the attribute can stream the body of a request; Firefox and WebKit make text of it.
    return "duplex" in Request.prototype && speaksHTTP2(target) ? "stream" : "post";
  }

  /** "Else it is abandoned for the next transport …. The client remembers that for the origin for ten minutes." */
  leave(next: Transport): void {
    this.current = next;
    if (this.#isOurChoice) this.#unlearned = next;
  }

  /** Messages go up by a request a batch. */
  get posts(): boolean {
    return this.current === "post" || this.polls;
  }

  /** Messages come down by a request a piece. */
  get polls(): boolean {
    return this.current === "poll";
  }

  /** A stream was held. `isSure`: it cannot have been the network. */
  descend(isSure: boolean): void {
    this.#above = this.current;
    this.current = "poll";
    this.#isSure ||= isSure;
    this.#trialAt = 0;
  }

  /** A stream is tried again. */
  ascend(): void {
    if (this.polls) this.current = this.#above;
  }

  /** There was no answer: it may be the network, or the transport. */
  alternate(): void {
    if (this.#isAsked) return;
    if (this.polls) this.ascend();
    else this.descend(false);
  }

  /** Now and then, while polls work. */
  tryStream(): void {
    if (this.#isAsked || clock() < this.#trialAt) return;
    this.#trialAfter = Math.min(2 * this.#trialAfter, LEARNED_FOR_MS);
    this.#isSure = true; // if it is held again
    this.ascend();
  }

  /** The first event of a connection has come. */
  onEvent(byPoll: boolean): void {
    if (!byPoll) {
      if (this.#trialAt) learned.forget(this.#host);
      this.#trialAt = 0;
      this.#trialAfter = TRIAL_AFTER_MS;
      return;
    }
    if (this.#trialAt) return;
    this.#trialAt = clock() + (this.#isSure ? this.#trialAfter : UNSURE_TRIAL_AFTER_MS);
    if (this.#isOurChoice && this.#isSure) learned.set(this.#host, "poll");
  }

  /** Bytes of a streaming body: so many get through. */
  get maxBody(): number {
    return lengths.get(this.#host)?.most ?? MAX_BODY_BYTES;
  }

  /** A streaming body was confirmed to its end, and soon. */
  onWhole(total: number): void {
    const found = lengths.get(this.#host);
    const longest = Math.max(total, this.maxBody);
    // "In a browser, which writes each refusal on its console, it stays at 512 KiB."
    // And it may not have been one of the longest: they are of all sockets.
    if (!isRuntime() || found?.isCeiling || total < longest / 2) return;
    lengths.set(this.#host, { most: Math.min(2 * longest, MAX_GROWN_BYTES), isCeiling: false });
  }

  /**
   * A streaming body did not come to its end. True: it was a long one, and the next is shorter. (A
   * message alone can be longer than any body should be: then nothing is gained by trying again.)
   */
  onCut(total: number): boolean {
    if (total <= MAX_BODY_BYTES || this.maxBody <= MAX_BODY_BYTES) return false;
    // "The next have half of that at most and grow no more."
    const most = Math.max(MAX_BODY_BYTES, Math.min(this.maxBody, total) >> 1);
    lengths.set(this.#host, { most, isCeiling: true });
    return true;
  }

  /** There is no other transport at this server. */
  settle(only: Transport): void {
    this.current = only;
    learned.set(this.#host, only);
  }

  onConfirm(byStream: boolean): void {
    this.failures = 0;
    this.#hasWorked ||= byStream;
    if (this.#unlearned) learned.set(this.#host, this.#unlearned);
    this.#unlearned = undefined;
  }

  /** A stream ended unconfirmed. True: too often; the network alone does not explain it. */
  fail(): boolean {
    // One that has worked was cut; one that has not may never work, or the network is down.
    return ++this.failures > (this.#hasWorked ? MAX_FAILURES : FIRST_FAILURES);
  }

  /** Where drops come sooner than the verdict on a stream, it would be tried for ever. */
  onDrop(hasBegun: boolean): void {
    if (this.posts) return; // polls, too: their cuts say nothing for a stream
    if (++this.#drops > MAX_UNPROVEN_DROPS && hasBegun && !this.#hasWorked) this.current = "post";
  }
}

// --- Reloads: a session that one page leaves to the next ---

const FRESH: KeptOutbox = { firstUnacked: 1, nextUnsent: 1, begun: 0, handled: 0, messages: [] };

/** Keeps a session in `sessionStorage` while its page is left, and nothing while there is a page. */
class Keeper {
  readonly #session: Session;
  readonly #outbox: Outbox;
  readonly #receipts: Receipts;
  readonly #locks: Locks | undefined;
  /** Where it is kept. */
  readonly #key: string;
  /** What the option `resume` has, until it is taken. */
  #carried: Kept | undefined;
  /** A tab that was duplicated has a copy of what is kept. The lock of this name tells whose it is. */
  #id = "";
  #free = (): void => {};
  #awake: Promise<void> | undefined;
  #wake = (): void => {};
  hasTakenOver = false;

  constructor(
    { persist, resume }: WebSocketSSEOptions,
    target: string,
    session: Session,
    outbox: Outbox,
    receipts: Receipts,
  ) {
    this.#session = session;
    this.#outbox = outbox;
    this.#receipts = receipts;
    this.#key = `duplex-sse ${persist === true ? target : persist}`;
    if (persist && "document" in globalThis) this.#locks = locks();
    if (resume === undefined || resume === null) return;
    this.#carried = keptOf(resume);
    if (!this.#carried) throw new TypeError("The option resume is not what pack() gave");
    this.#carried.attempt += Math.ceil(Math.random() * MAX_LEAP);
  }

  get isAsleep(): boolean {
    return !!this.#awake;
  }

  /** While the page is left, it must not speak for the session: another page may. */
  untilAwake(): Promise<void> | undefined {
    return this.#awake;
  }

  /** Takes what is kept, before another task can see it; with an id, only what is its. */
  take(id?: string): Kept | undefined {
    const carried = this.#carried;
    this.#carried = undefined;
    if (carried || !this.#locks) return carried;
    try {
      const kept = keptOf(sessionStorage.getItem(this.#key));
      if (!kept || id && kept.id !== id) return;
      sessionStorage.removeItem(this.#key);
      return kept;
    } catch {
      // it is not allowed
    }
  }

  /** Makes the session what was kept, or a new one; returns by how many bytes its outbox has shrunk. */
  restore(kept?: Kept): number {
    const { token = "", terms, attempt = 0, lostAt, dispatched = 0, outbox = FRESH } = kept ?? {};
    this.hasTakenOver = !!kept;
    Object.assign(this.#session, {
      token,
      terms,
      attempt,
      lostAt: lostAt ? clock() - Math.max(Date.now() - lostAt, 0) : 0,
    });
    this.#receipts.dispatched = dispatched;
    this.#receipts.rewind();
    const before = this.#outbox.size;
    this.#outbox.unpack(outbox);
    return before - this.#outbox.size;
  }

  /** Claims a session, or a new one: the page before may be about to let go of it. */
  claim(id: string = randomName()): boolean | Promise<boolean> {
    if (!this.#locks) return true;
    this.end();
    this.#id = id;
    const request = new AbortController();
    this.#free = () => request.abort();
    return new Promise((resolve) => {
      const timer = setTimeout(() => request.abort(), CLAIM_TIMEOUT_MS);
      this.#locks!.request(`duplex-sse session ${id}`, { signal: request.signal }, () => {
        clearTimeout(timer);
        resolve(true);
        return new Promise<void>((free) => this.#free = free);
      }).catch(() => resolve(false));
    });
  }

  /** The session as it stands. Undefined: it is too much, or not all there. */
  pack(): string | undefined {
    const { token, terms, attempt, lostAt } = this.#session;
    const outbox = this.#outbox.size > MAX_KEPT_BYTES ? undefined : this.#outbox.pack();
    if (!terms || !outbox) return;
    const kept: Kept = {
      id: this.#id || randomName(),
      token,
      terms,
      attempt,
      outbox,
      lostAt: Math.floor(Date.now() - (lostAt && clock() - lostAt)),
      dispatched: this.#receipts.dispatched,
    };
    return JSON.stringify(kept);
  }

  /** Keeps the session as it stands. False: it is too much, or not allowed. */
  keep(): boolean {
    const packed = this.#locks && this.#id && this.pack();
    if (!packed) return false;
    try {
      sessionStorage.setItem(this.#key, packed);
    } catch {
      return false;
    }
    this.end();
    const wake = this.#wake; // of a sleep that has not ended
    this.#awake = new Promise<void>((resolve) => this.#wake = resolve).then(wake);
    return true;
  }

  /** Back from the back/forward cache. False: another page has taken the session. */
  async claimAgain(): Promise<boolean> {
    return !!this.take(this.#id) && !!await this.claim(this.#id);
  }

  wake(): void {
    this.#awake = undefined;
    this.#wake();
  }

  end(): void {
    this.#free();
  }
}

/** What was packed, unless the text is something else: others can write where it was. */
function keptOf(text: string | null | undefined): Kept | undefined {
  try {
    const kept: Kept = JSON.parse(text!);
    const { token, terms, attempt, lostAt, dispatched, outbox } = kept;
    const { firstUnacked, nextUnsent, begun, handled, messages } = outbox;
    const counts = [
      attempt,
      lostAt,
      dispatched,
      begun,
      handled,
      firstUnacked - 1,
      nextUnsent - firstUnacked,
      firstUnacked + messages.length - nextUnsent,
      ...messages.map(([frame, size]) => fromBase64(frame) && size),
    ];
    const isToken = typeof token === "string" && /^[!-~]+$/.test(token);
    if (counts.every(isCount) && isToken && areTerms(terms)) return kept;
  } catch {
    // it is no JSON, or has another shape
  }
}

// --- Inbox: one task an event ---

/** Dispatches the page's messages and events, each in a task of its own, so that promises settle in between. */
class Inbox {
  #items: (string | Bytes | (() => void))[] = [];
  readonly #hasOwnFetch: boolean;
  readonly #onMessage: (data: string | Bytes) => void;
  /** Something has been dispatched in the current task, as far as we know when one ends. */
  #isUsedTask = false;
  #isPaused = false;
  /** Roughly, in bytes, what waits. */
  size = 0;
  #wake = (): void => {};
  /** A stream's reader dispatches between its chunks. */
  isRead = false;

  constructor(hasOwnFetch: boolean, onMessage: (data: string | Bytes) => void) {
    this.#hasOwnFetch = hasOwnFetch;
    this.#onMessage = onMessage;
  }

  get isPaused(): boolean {
    return this.#isPaused;
  }

  /** Nothing is dispatched while it is; {@link dispatch} goes on. */
  set isPaused(value: boolean) {
    this.#isPaused = value;
    if (!value) this.#wake();
  }

  async untilReady(): Promise<void> {
    if (this.#isPaused) await new Promise<void>((resolve) => this.#wake = resolve);
  }

  /** The reader waits for the page. */
  get isBehind(): boolean {
    return this.#items.length > 0 && !this.#isPaused;
  }

  add(item: string | Bytes | (() => void)): void {
    this.#items.push(item);
    this.size += ITEM_COST + item.length;
    if (!this.isRead) this.dispatch();
  }

  async dispatch(): Promise<void> {
    while (this.isBehind) {
      // Where nothing was dispatched in this task there is no need to wait for another.
      if (this.#mayBePageTask || !this.isRead) await new Promise<void>(nextTask);
      if (!this.isBehind) return;
      this.#isUsedTask = true;
      const item = this.#items.shift()!;
      this.size -= ITEM_COST + item.length;
      if (typeof item === "function") item();
      else this.#onMessage(item);
    }
  }

  /** Messages that wait are to come again. */
  discard(): void {
    this.#items = this.#items.filter((item) => typeof item === "function");
    this.size = ITEM_COST * this.#items.length;
  }

  /** Something has come of the network, which it does in a task of its own. */
  inNewTask(): void {
    this.#isUsedTask = false;
  }

  /** Runs at once, but never within a task of the page: `bufferedAmount` does not fall there. */
  afterTask(task: () => void): void {
    if (this.#mayBePageTask) nextTask(task);
    else task();
  }

  /** The page may have run in this task: an own `fetch` can answer within the caller's. */
  get #mayBePageTask(): boolean {
    return this.#isUsedTask || this.#hasOwnFetch;
  }
}

// --- Outbox: messages up, their numbers and the window ---

/** Messages on their way up: numbered as queued, kept until acknowledged. */
class Outbox {
  readonly #session: Session;
  #queue: Outgoing[] = [];
  /** The number of the first message in the queue. */
  firstUnacked = 1;
  /** The number of the first message that was never written. */
  nextUnsent = 1;
  /** Bytes of those before it. */
  #begunBytes = 0;
  #handledBytes = 0;
  /** What the server lets be under way beyond its terms, in bytes. */
  #granted = 0;
  /** Messages that were written again. */
  resent = 0;

  constructor(session: Session) {
    this.#session = session;
  }

  get isEmpty(): boolean {
    return !this.#queue.length;
  }

  /** The number of the last message. */
  get last(): number {
    return this.firstUnacked + this.#queue.length - 1;
  }

  /** All else has been acknowledged. */
  get isOnlyClose(): boolean {
    return !!this.#queue[0]?.isClose;
  }

  /** Something was written, and is not acknowledged. */
  get hasBegun(): boolean {
    return this.nextUnsent > this.firstUnacked;
  }

  add(frame: Bytes | undefined, size: number, isClose = false): Outgoing {
    const entry: Outgoing = { frame, size, isClose };
    this.#queue.push(entry);
    return entry;
  }

  /** Bytes of all messages. */
  get size(): number {
    return this.#queue.reduce((sum, { size }) => sum + size, 0);
  }

  /** Undefined while a Blob is being read. */
  pack(): KeptOutbox | undefined {
    if (this.#queue.some(({ frame }) => !frame)) return;
    const { firstUnacked, nextUnsent } = this;
    const messages = this.#queue.map(({ frame, size }): KeptMessage => [toBase64(frame!), size]);
    return {
      firstUnacked,
      nextUnsent,
      begun: this.#begunBytes,
      handled: this.#handledBytes,
      messages,
    };
  }

  unpack({ firstUnacked, nextUnsent, begun, handled, messages }: KeptOutbox): void {
    this.firstUnacked = firstUnacked;
    this.nextUnsent = nextUnsent;
    this.#begunBytes = begun;
    this.#handledBytes = handled;
    this.#queue = messages.map(([frame, size]) => ({
      frame: fromBase64(frame),
      size,
      isClose: false,
    }));
  }

  /** There is a message that may be written now. */
  get isDue(): boolean {
    return !!this.#due(this.firstUnacked);
  }

  isDueAfter(load: Load): boolean {
    return !!this.#due(Math.max(load.next, this.firstUnacked));
  }

  /** Message `number`, if it may be written now. */
  #due(number: number): Outgoing | undefined {
    const entry = this.#queue[number - this.firstUnacked];
    const { terms } = this.#session;
    // "The client's window counts the bytes begun less the bytes handled."
    const inFlight = this.#begunBytes - this.#handledBytes;
    // "A sender below its window may begin one message of any size; at it, only control frames and CLOSE."
    const allowed = number < this.nextUnsent || entry?.isClose || !terms ||
      inFlight < Math.max(terms.window, this.#granted);
    return entry?.frame && allowed ? entry : undefined;
  }

  /** Frames that may be written now, as far as they fit; mostly one message of any size does. */
  take(load: Load, most: number, atLeastOne = true): Bytes[] {
    const parts: Bytes[] = [];
    for (;;) {
      const number = Math.max(load.next, this.firstUnacked);
      const entry = this.#due(number);
      const size = entry?.frame?.length ?? 0;
      const fits = load.used + size <= most || atLeastOne && !load.used;
      if (!entry || !fits) return parts;
      // Those before have been acknowledged: by now, or when the body began.
      if (number !== load.next) parts.push(this.#session.level.seq(number));
      parts.push(entry.frame!);
      load.first ||= number;
      load.next = number + 1;
      load.used += size || 1; // crossws's wire has empty ones
      if (number < this.nextUnsent) this.resent++;
      else {
        this.#begunBytes += size;
        this.nextUnsent = load.next;
      }
    }
  }

  /** Messages up to this number have arrived; returns what they added to `bufferedAmount`. */
  confirm(received: number): number {
    let size = 0;
    const count = received - this.firstUnacked + 1;
    for (const entry of this.#queue.splice(0, count)) size += entry.size;
    this.firstUnacked = received + 1;
    return size;
  }

  /** So many bytes of all have been handled; returns whether that is more than before. */
  handle(bytes: number, window: number): boolean {
    // "The third number of a duplex-ack is the client's window from then on."
    if (window > this.#granted) this.#granted = window;
    const isMore = bytes > this.#handledBytes;
    if (isMore) this.#handledBytes = bytes;
    return isMore;
  }
}

/** Those who wait for `bufferedAmount` to fall. */
class Waiters {
  /** And to how many bytes. */
  readonly #waiting: Map<() => void, number> = new Map();

  wait(threshold: number, signal: AbortSignal | undefined): Promise<void> {
    return new Promise((resolve, reject) => {
      const abort = () => {
        this.#waiting.delete(settle);
        reject(signal!.reason);
      };
      const settle = () => {
        signal?.removeEventListener("abort", abort);
        resolve();
      };
      this.#waiting.set(settle, threshold);
      signal?.addEventListener("abort", abort);
    });
  }

  /** It has fallen to so many bytes. */
  tell(bytes: number): void {
    for (const [settle, threshold] of this.#waiting) {
      if (bytes > threshold) continue;
      this.#waiting.delete(settle);
      settle();
    }
  }
}

// --- Receipts: what the server is to hear of what came down ---

/** Acknowledgements, and answers to pings. They go along with any body that is sent anyway. */
class Receipts {
  /** The number of the last message that has come. */
  received = 0;
  /** The number of the last message that the page has seen, which is all that is acknowledged. */
  dispatched = 0;
  /** "Meanwhile the client acknowledges no more than its Last-Event-ID says, which the server must still keep." */
  most = Infinity;
  #acknowledged = 0;
  /** Bytes of the stream up to what was dispatched last, since an acknowledgement. */
  bytes = 0;
  /** Of an event that is under way, which count for the next acknowledgement. */
  #partial = 0;
  /** When the first was dispatched that is not acknowledged; 0: there is none. */
  #since = 0;
  /** Bytes up to messages that wait. */
  #waiting: { received: number; bytes: number }[] = [];
  /** The server is to hear it even if there is nothing new. */
  isDue = false;
  #pongs: Bytes[] = [];

  /** The server waits for what would otherwise go with the next body. */
  get isOwed(): boolean {
    return this.isDue || !!this.#pongs.length;
  }

  get confirmable(): number {
    return Math.min(this.dispatched, this.most);
  }

  /** Something was dispatched that is not acknowledged. */
  get isBehind(): boolean {
    for (let next; (next = this.#waiting[0]) && next.received <= this.dispatched;) {
      this.bytes += this.#waiting.shift()!.bytes;
    }
    if (this.confirmable > this.#acknowledged) this.#since ||= clock();
    return !!this.#since;
  }

  /** For how long, in ms, where that is so. */
  get age(): number {
    return clock() - this.#since;
  }

  /** So much of the stream has come; an event of so many characters is under way. */
  read(bytes: number, partial: number): void {
    this.#partial = 3 * partial; // a character has up to 3 bytes
    const { received } = this;
    const last = this.#waiting.at(-1);
    if (last?.received === received) last.bytes += bytes;
    else if (received > this.dispatched) this.#waiting.push({ received, bytes });
    else this.bytes += bytes;
  }

  /** Begins again with what was not dispatched; returns the number of the last that was. */
  rewind(): number {
    this.#waiting = [];
    this.bytes = this.#partial = 0;
    return this.received = this.dispatched;
  }

  /** An acknowledgement goes along: the last one may be lost. */
  pong(payload: Bytes): void {
    this.isDue = true;
    this.#pongs.push(frame("PONG", payload));
    if (this.#pongs.length > MAX_PONGS) this.#pongs.shift();
  }

  /** The server knows of so many: `Last-Event-ID`, or what goes out now, tells it. */
  settle(confirmed = this.confirmable): void {
    this.#acknowledged = confirmed;
    this.isDue = false;
    this.bytes = this.#partial;
    this.#since = 0;
  }

  /**
   * What goes along with messages on an open stream. There each costs a frame, so it does not go
   * with every message; but with one half as late and half as full as it would go by itself: a
   * chunk of its own may hold up the next one until the network has acknowledged it.
   */
  takeBeside(messages: Bytes[], window: number): Bytes[] {
    const isLate = this.isBehind && (this.age >= ACK_DELAY_MS || this.bytes >= window / 16);
    return this.take(messages.length && isLate ? 0 : ACK_EVERY);
  }

  /** Once there are more than `least`. */
  take(least = 0): Bytes[] {
    const parts = this.#pongs;
    this.#pongs = [];
    if (this.isDue || this.confirmable > this.#acknowledged + least) {
      this.settle();
      parts.push(frame("ACK", encoder.encode(`${this.confirmable}`)));
    }
    return parts;
  }
}

// --- Requests: one at a time, or both directions in one ---

/** How a request is made, besides what all of a socket have in common. */
interface RequestDetails {
  bytes?: Bytes | undefined;
  /** How long the answer may take from when the request is made. */
  answerTimeout?: number | undefined;
  keepalive?: boolean;
  headers?: Record<string, string>;
}

/** Makes all requests of a socket. */
class Requests {
  readonly target: string;
  /** Of messages: the URL would put it together anew for each. */
  readonly origin: string;
  readonly #authorization: string | undefined;
  readonly #options: WebSocketSSEOptions;
  readonly #session: Session;
  readonly #host: string;
  #type: string;
  /** A request waits for its answer. */
  onSilence: ((isUplink: boolean) => void) | undefined;
  /** Of the last request, if it came to nothing. */
  trouble: Trouble | undefined;
  /** Answers of 401 in a row. */
  #denials = 0;
  /** A request had no answer in its time, and none has had one of the server's since. */
  #isSilent = false;
  /** Deno's or Node's, for a connection of its own. */
  #client: HttpClient | undefined;

  constructor(url: URL, options: WebSocketSSEOptions, session: Session) {
    this.origin = url.origin;
    const target = new URL(url);
    // The bytes as they are, since what is escaped need not be UTF-8.
    const credentials = `${target.username}:${target.password}`
      .replace(/%([\da-f]{2})/gi, (_, hex) => String.fromCharCode(parseInt(hex, 16)));
    if (credentials !== ":") this.#authorization = `Basic ${btoa(credentials)}`;
    target.username = target.password = "";
    this.target = target.href.replace(/^ws/, "http");
    this.#options = options;
    this.#session = session;
    this.#host = target.host;
    this.#type = types.get(this.#host) ?? UPLINK_TYPE;
  }

  /**
   * "Where nothing answers at all, the server may have noticed as little, and has the session for
   * `idleTimeout` longer." In ms.
   */
  get grace(): number {
    const { terms } = this.#session;
    return this.#isSilent && terms?.resumeTimeout && terms.idleTimeout || 0;
  }

  /** Waits for the answer; none is as good as one that says nothing. */
  async ask(exchange: Exchange, details: RequestDetails): Promise<void> {
    const { bytes, answerTimeout } = details;
    const { signal } = exchange.abort;
    const hasBody = !!(exchange.body ?? bytes);
    // A poll waits for news, once there is a session; and as for a timeout, 8 KiB may take 1 s.
    const silence = "document" in globalThis && !(exchange.isPoll && this.#session.terms) &&
      setTimeout(() => this.onSilence?.(hasBody), SILENCE_MS + (bytes?.length ?? 0) / 8);
    // What the options give need not settle.
    const end = new Promise<undefined>((resolve) =>
      signal.addEventListener("abort", () => resolve(undefined))
    );
    let fault = "the option headers failed";
    let askedAt = Infinity;
    try {
      const headers = new Headers(await Promise.race([this.#given(), end]));
      this.#setHeaders(headers, hasBody, details.headers);
      signal.throwIfAborted();
      fault = "a request failed";
      if (answerTimeout) exchange.endIn(answerTimeout);
      askedAt = clock();
      exchange.response = await Promise.race([this.#send(exchange, headers, details), end]);
      if (bytes && this.#changeType(exchange)) return await this.ask(exchange, details);
      // "Only the server's word is final", once there is a session.
      exchange.isTrusted = !this.#session.terms || exchange.isOurs;
      if (exchange.isOurs) this.#isSilent = false;
      if (exchange.isTrusted) this.#denials = exchange.status === 401 ? this.#denials + 1 : 0;
      this.trouble = this.#troubleOf(exchange, !!details.headers?.accept);
    } catch (error) {
      // as good as an answer that says nothing
      const cause = withoutQuery(error, new URL(this.target).search);
      this.trouble = signal.aborted ? { fault: NO_ANSWER } : { fault, cause };
    } finally {
      clearTimeout(silence || undefined);
      if (exchange.isUnanswered && clock() > askedAt + UNANSWERED_MS) this.#suspect();
    }
  }

  #send(
    exchange: Exchange,
    headers: Headers,
    { bytes, keepalive }: RequestDetails,
  ): Promise<Response> {
    const { credentials, fetch: send = fetch } = this.#options;
    const client = this.#client;
    const body = exchange.body?.stream ?? bytes;
    return send(this.target, {
      method: body ? "POST" : "GET",
      headers,
      signal: exchange.abort.signal,
      redirect: "manual",
      cache: "no-store", // Chromium lets a second request of a URL wait for the first one's answer
      referrerPolicy: "no-referrer",
      ...credentials && { credentials },
      keepalive,
      // What goes up must not wait behind streams of other tabs.
      priority: exchange.slot && "low",
      body,
      duplex: "half",
      ...client && { client, dispatcher: client as never }, // of a type that not all know
    } as RequestInit);
  }

  /**
   * The connection may be dead. One of HTTP/2 is shared by all requests, however many of them are
   * given up: browsers notice that after 10 to 70 s, Deno and Node do not, but where they are told to
   * take another.
   */
  #suspect(): void {
    this.#isSilent = true;
    this.end();
    const { Deno } = globalThis as { Deno?: { createHttpClient?(options: object): HttpClient } };
    if (!this.#session.isOver) this.#client = Deno?.createHttpClient?.({}) ?? anotherAgent();
  }

  /** What is under way goes on. */
  end(): void {
    this.#client?.close();
    this.#client = undefined;
  }

  /** Of an answer, if it is not the one that was hoped for. */
  #troubleOf(exchange: Exchange, wantsStream: boolean): Trouble | undefined {
    const { response, rawStatus } = exchange;
    if (!response) return { fault: NO_ANSWER };
    const { level } = this.#session;
    if (wantsStream ? exchange.isStream : level.confirmed(exchange, 0) !== undefined) return;
    const fault = response.ok && wantsStream
      ? NO_STREAM
      : `the answer was ${rawStatus || "a redirect"}`;
    return { fault, status: rawStatus || undefined };
  }

  /** "A client that is refused with that type … MAY say multipart/related instead." */
  #changeType(exchange: Exchange): boolean {
    const known = types.get(this.#host);
    if (exchange.isOurs && known !== this.#type) types.set(this.#host, this.#type);
    const isRefused = [400, 403, 406, 415].includes(exchange.rawStatus) && !exchange.isOurs;
    if (!isRefused || known || this.#type === KNOWN_TYPE) return false;
    exchange.response!.body?.cancel().catch(() => {});
    this.#type = KNOWN_TYPE;
    return this.#session.level === FULL;
  }

  /** Whether the server has refused for good. Credentials that may be fresh are asked for once more. */
  isFinal({ status, received }: Exchange): boolean {
    if (status === 401 && this.#denials < 2 && typeof this.#options.headers === "function") {
      return false;
    }
    return received === undefined && !isTransient(status);
  }

  /** A function is asked each time. */
  #given(): HeadersLike | undefined | Promise<HeadersLike> {
    const { headers } = this.#options;
    return typeof headers === "function" ? headers() : headers;
  }

  #setHeaders(headers: Headers, hasBody: boolean, own: Record<string, string> = {}): void {
    const { token, level } = this.#session;
    if (this.#authorization && !headers.has("authorization")) {
      headers.set("authorization", this.#authorization);
    }
    if (token) headers.set(TOKEN_HEADER, token);
    if (level.version) headers.set(VERSION_HEADER, level.version);
    if (hasBody && level === FULL) headers.set("content-type", this.#type);
    for (const name in own) headers.set(name, own[name]!);
  }

  warn(text: string): void {
    console.warn(`${this.#host} ${text}`);
  }
}

/**
 * One request: an event stream, or messages on their way up, as bytes or by a {@link Body} that
 * streams. The duplex transport's is both.
 */
class Exchange {
  readonly abort: AbortController = new AbortController();
  readonly body: Body | undefined;
  /** Its answer ends with the first news. */
  readonly isPoll: boolean;
  /** The connection that replaces this one. */
  successor: Promise<Exchange> | undefined;
  /** The number of the last message that it has brought, or goes on after. */
  position = 0;
  /** The server has said its terms. */
  hasBegun = false;
  /** Why we ended it: it was a stream without an event, or another tab waits. */
  ended: "held" | "shared" | undefined;
  /** A message is under way, and is the first: if it is cut, it begins again. */
  isMidway = false;
  slot: Slot | undefined;
  response: Response | undefined;
  /** Of the event stream. */
  reader: Reader | undefined;
  /** Since its last byte. */
  quietTicks = 0;
  /** Its status counts. */
  isTrusted = false;
  /** The number of the last message that the server has, as its answer tells: it took what went up. */
  received: number | undefined;
  #timer: ReturnType<typeof setTimeout> | undefined;
  readonly #askedAt: number = clock();

  constructor(body?: Body, isPoll = false) {
    this.body = body;
    this.isPoll = isPoll;
  }

  get isEnded(): boolean {
    return this.abort.signal.aborted;
  }

  /** It has not lasted for long. */
  get isYoung(): boolean {
    return clock() < this.#askedAt + SHORT_LIFE_MS;
  }

  /** We have given up waiting for its answer. */
  get isUnanswered(): boolean {
    return this.isEnded && !this.response;
  }

  /** 0 before the answer, and where something in between has given it. */
  get status(): number {
    return this.isTrusted ? this.rawStatus : 0;
  }

  /** Whoever has given it. */
  get rawStatus(): number {
    return this.response?.status ?? 0;
  }

  get isStream(): boolean {
    return this.status === 200 && this.header("content-type").startsWith(STREAM_TYPE);
  }

  /** The server itself has answered. */
  get isOurs(): boolean {
    return !!(this.header(VERSION_HEADER) || this.header(RECEIVED_HEADER));
  }

  /** Version 1 was granted. */
  get isFull(): boolean {
    return this.status === 200 && this.header(VERSION_HEADER) === VERSION;
  }

  /** How the session has ended, where it has: the answer to an uplink says so. */
  get ending(): [code: number, reason: string] | undefined {
    return this.isTrusted ? parseEnding(this.header(CLOSE_HEADER)) : undefined;
  }

  /** How long the answer asks to wait before the next request, in ms. */
  get retryAfter(): number {
    const after = this.header("retry-after");
    return Number(after) * 1000 || Date.parse(after) - Date.now() || 0;
  }

  /** Of the answer; "" where there is none. */
  header(name: string): string {
    return this.response?.headers.get(name) ?? "";
  }

  /** Ends it after so long, in place of what was said before; 0: never. */
  endIn(ms: number): void {
    clearTimeout(this.#timer);
    if (ms && !this.isEnded) this.#timer = setTimeout(() => this.end(), ms);
  }

  /** Ends both directions; a read in progress ends, too. */
  end(): void {
    clearTimeout(this.#timer);
    this.abort.abort(); // first: else the body's end would be a clean one
    this.body?.abandon();
    this.reader?.cancel().catch(() => {});
    this.slot?.free();
  }
}

/** The messages that one body takes of the outbox. */
class Load {
  /** The number of the first of them; 0: none yet. */
  first = 0;
  /** The number of the next one; 0: to be told by a `SEQ`. */
  next = 0;
  /** Bytes so far. */
  used = 0;
}

/** A body that streams: filled when its reader asks, so that what waits goes as one chunk. */
class Body extends Load {
  readonly stream: ReadableStream<Bytes>;
  isOpen = true;
  isFinished = false;
  isAsked = false;
  wroteSinceTick = false;
  /** Something has been confirmed while this body was in use. */
  isConfirmed = false;
  /** Bytes of messages and all else so far. */
  total = 0;
  readonly begunAt: number = clock();
  #controller!: ReadableStreamDefaultController<Bytes>;

  /** `preface` goes by itself. */
  constructor(fill: () => void, preface: Bytes) {
    super();
    this.stream = new ReadableStream<Bytes>({
      start: (controller) => {
        this.#controller = controller;
      },
      pull: () => {
        this.isAsked = true;
        if (preface.length && !this.total) this.write([preface]);
        fill();
      },
      cancel: () => {
        this.isOpen = false;
      },
    }, { highWaterMark: 0 });
  }

  /** Only when asked. */
  write(parts: Bytes[]): void {
    const chunk = parts.length === 1 ? parts[0]! : concat(parts);
    this.total += chunk.length;
    this.wroteSinceTick = true;
    this.isAsked = false; // before enqueue, which may ask again
    this.#controller.enqueue(chunk);
  }

  /** A clean end: all that was written is to arrive. */
  finish(): void {
    if (!this.isOpen) return;
    this.#controller.close();
    this.isOpen = false;
    this.isFinished = true;
  }

  /**
   * Behind an abort, for readers that know of none; an error would go uncaught on Deno 2.0 and on
   * Bun 1.3. "An incomplete last frame is dropped."
   */
  abandon(): void {
    if (this.isOpen) this.#controller.close();
    this.isOpen = false;
  }

  /** Writes nothing more and ends nothing: the other half of the request is in use. */
  forget(): void {
    this.isOpen = false;
  }
}

/** Pauses before retries. */
class Pauses {
  readonly #wakers: Set<() => void> = new Set();
  readonly #isBackground: boolean;
  #isOver = false;

  /** In the background they keep no process alive. */
  constructor(isBackground = false) {
    this.#isBackground = isBackground;
  }

  /**
   * Waits longer each time, never in step with other clients, and as long as the server asks for.
   * False: it is too late to try again.
   */
  async wait(retries: number, deadline = Infinity, atLeast = 0): Promise<boolean> {
    const left = deadline - clock();
    const delay = Math.min(MAX_RETRY_DELAY_MS, 50 * 2 ** retries) * (0.5 + Math.random() / 2);
    if (retries && left > 0 && !this.#isOver) {
      await new Promise<void>((resolve) => {
        const wake = () => {
          clearTimeout(timer);
          this.#wakers.delete(wake);
          resolve();
        };
        // Who asks for more time than is left is asked shortly before its end.
        const most = Math.max(delay, Math.min(atLeast, left - 1000));
        const timer = setTimeout(wake, Math.min(most, left)) as {
          unref?(): void;
        } & ReturnType<typeof setTimeout>;
        if (this.#isBackground) timer.unref?.();
        this.#wakers.add(wake);
      });
    }
    return left > 0 && !this.#isOver;
  }

  /** Ends those that are running. */
  wake(): void {
    for (const wake of this.#wakers) wake();
  }

  /** Ends all, those to come, too. */
  end(): void {
    this.#isOver = true;
    this.wake();
  }
}

// --- Session: its phase, and what the server granted ---

/** Until the server has said its terms. */
const UNTOLD = { resumeTimeout: OPEN_TIMEOUT_MS, heartbeatInterval: 15_000 };

/** What cannot be terms, whoever says it, is damage. */
function areTerms(terms: Terms): boolean {
  const { protocol, received, handled, window, heartbeatInterval, resumeTimeout } = terms;
  const isTerm = (term: unknown, most = MAX_TERM) =>
    typeof term === "number" && term >= 0 && term <= most;
  return typeof protocol === "string" && [received, handled].every(isCount) &&
    [window, heartbeatInterval, resumeTimeout].every((term) => isTerm(term)) &&
    heartbeatInterval >= 1 && isTerm(terms.idleTimeout ?? 0, Infinity);
}

/**
 * "The client takes two intervals without a byte for a drop, or three quarters of the resume
 * timeout if that is less, but not less than one and a quarter intervals": else the session may be
 * over before its client misses it. Ticks, not clocks: after a long pause of this process they say
 * nothing of the network. So one that is late counts for an interval at most: a browser lets those
 * of a hidden tab come once a minute.
 */
function ticksOfPatience({ heartbeatInterval, resumeTimeout }: Terms): number {
  const share = resumeTimeout
    ? Math.floor(0.75 * TICKS * resumeTimeout / heartbeatInterval)
    : TICKS;
  return Math.max(TICKS + 1, Math.min(2 * TICKS, share));
}

/** Where each phase may lead. Any other step is a fault of ours. */
const STEPS: Readonly<Record<Phase, readonly Phase[]>> = {
  opening: ["open", "ended"],
  open: ["dropped", "renewing", "leaving", "left", "plain leaving", "ended"],
  dropped: ["open", "leaving", "left", "ended"],
  renewing: ["open", "dropped", "leaving", "left", "ended"],
  leaving: ["left", "ended"],
  left: ["ended"],
  "plain leaving": ["ended"],
  ended: [],
};

/** What a socket's rooms know of its session: the socket moves its phase, the link writes the rest. */
class Session {
  /** Subprotocols. */
  readonly offered: string[];
  /** Whether the page may send. */
  readonly sends: boolean;
  #phase: Phase = "opening";
  level: Level = FULL;
  token = "";
  /** Undefined before a session of the full level is open. */
  terms: Terms | undefined;
  /** Of the last connection, from 0. */
  attempt = 0;
  /** By our clock; 0 while there is a connection. */
  lostAt = 0;

  constructor(offered: string[], sends: boolean) {
    this.offered = offered;
    this.sends = sends;
  }

  get phase(): Phase {
    return this.#phase;
  }

  /** The server's close has come, or nothing more goes over the network. */
  get isEnding(): boolean {
    return this.#phase === "left" || this.isOver;
  }

  /** Nothing more goes over the network, whatever is still to be dispatched. */
  get isOver(): boolean {
    return this.#phase === "ended";
  }

  /** How long it waits for what does not get through. */
  get patience(): number {
    return this.terms?.resumeTimeout || OPEN_TIMEOUT_MS;
  }

  /** "Seconds that the client SHOULD wait at least, within the resume timeout"; in ms. */
  pause(retryAfter: number): number {
    return Math.min(retryAfter, this.patience);
  }

  /** The connection may be replaced. */
  get mayRenew(): boolean {
    return this.#phase === "open" && !!this.terms?.resumeTimeout;
  }

  /** Messages go up. */
  get isActive(): boolean {
    return !["opening", "left", "ended"].includes(this.#phase);
  }

  mayEnter(phase: Phase): boolean {
    return STEPS[this.#phase].includes(phase);
  }

  enter(phase: Phase): void {
    if (!this.mayEnter(phase)) throw new Error(`From ${this.#phase} to ${phase}`);
    this.#phase = phase;
  }
}

// --- Levels: the two wires ---

/** The answer to a request, as far as a level reads it. */
interface UplinkAnswer {
  readonly status: number;
  readonly response: Response | undefined;
  header(name: string): string;
}

/** The uplink of one of the two levels. */
interface Level {
  readonly version?: string;
  /** Bytes of messages in one POST; 0: one message. */
  readonly maxBatch: number;
  /** A message as it goes, and its own size. A copy, since the caller may change the bytes. */
  encode(message: string | Bytes): [frame: Bytes, size: number];
  /** The frame that tells the number of the next message. */
  seq(number: number): Bytes;
  /** The frame of a close, where the wire has one. */
  close(code: number, reason: Bytes): Bytes | undefined;
  /** The number of the last message that the answer to a request acknowledges, where it does. */
  confirmed(answer: UplinkAnswer, first: number): number | undefined;
}

/** Version 1: numbers, acknowledgements and resumption. */
const FULL: Level = {
  version: VERSION,
  maxBatch: MAX_BODY_BYTES,
  encode(message) {
    if (typeof message !== "string") return [frame("BINARY", message), message.length];
    // Most text is ASCII, so that its length is known and one encoding makes the frame.
    const head = `TEXT ${message.length.toString(16)}\r\n`;
    const bytes = encoder.encode(`${head}${message}\r\n`);
    const size = bytes.length - head.length - 2;
    if (size === message.length) return [bytes, size];
    return [frame("TEXT", bytes.subarray(head.length, -2)), size];
  },
  seq: (number) => frame("SEQ", encoder.encode(`${number}`)),
  // "Two bytes of code (big-endian) and the reason, or nothing: 1005."
  close: (code, reason) =>
    frame(
      "CLOSE",
      code === 1005 ? EMPTY : concat([new Uint8Array([code >> 8, code & 255]), reason]),
    ),
  confirmed(answer) {
    return answer.status === 204 ? countOf(answer.header(RECEIVED_HEADER)) : undefined;
  },
};

/** crossws's wire: the body of a request is the message, and its success says that it has arrived. */
const PLAIN: Level = {
  maxBatch: 0,
  encode(message) {
    const bytes = typeof message === "string" ? encoder.encode(message) : message.slice();
    return [bytes, bytes.length];
  },
  seq: () => EMPTY,
  close: () => undefined,
  confirmed: (answer, first) => answer.response?.ok ? first : undefined,
};

// --- Event streams ---

/** An incremental parser of Server-Sent Events. */
class EventParser {
  readonly #onEvent: (type: string, data: string) => void;
  #line = "";
  #type = "";
  /** The lines of data; many are joined to one, since each alone costs 30 times an empty one. */
  #lines: string[] | undefined;
  /** Their characters. */
  #size = 0;
  /** The CR at the end of the last chunk: it has ended a line, and an LF after it ends no other. */
  #cr = "";

  constructor(onEvent: (type: string, data: string) => void) {
    this.#onEvent = onEvent;
  }

  /** How many characters of an incomplete event are held. */
  get partial(): number {
    return this.#line.length + this.#size;
  }

  push(chunk: string): void {
    if (this.#cr || chunk.includes("\r")) {
      const whole = this.#cr + chunk;
      chunk = whole.replace(/\r\n?/g, "\n").slice(this.#cr.length);
      this.#cr = whole.endsWith("\r") ? "\r" : "";
    }
    let at = 0;
    for (let end; (end = chunk.indexOf("\n", at)) >= 0; at = end + 1) {
      if (this.#line) {
        const line = this.#line + chunk.slice(at, end);
        this.#line = "";
        this.#onLine(line, 0, line.length);
      } // Most events are one line of data and an empty one, in one chunk.
      else if (
        chunk[end + 1] === "\n" && !this.#lines && chunk.startsWith("data: ", at)
      ) this.#emit(chunk.slice(at + 6, end++));
      else this.#onLine(chunk, at, end);
    }
    this.#line += chunk.slice(at);
  }

  /** Comments, and the fields `id` and `retry`, mean nothing to us. */
  #onLine(text: string, at: number, end: number): void {
    if (at === end) return this.#emit(this.#lines?.join("\n"));
    const data = field("data", text, at, end);
    if (data === undefined) this.#type = field("event", text, at, end) ?? this.#type;
    else {
      this.#size += data.length + 1;
      const lines = this.#lines ??= [];
      if (lines.length > MAX_LINES) lines.push(`${lines.shift()}\n${lines.splice(0).join("\n")}`);
      lines.push(data);
    }
  }

  #emit(data: string | undefined): void {
    const type = this.#type;
    this.#type = "";
    this.#lines = undefined;
    this.#size = 0;
    if (data !== undefined) this.#onEvent(type, data);
  }
}

/** The value of the field, where the line from `at` to `end` is one of that name. */
function field(name: string, text: string, at: number, end: number): string | undefined {
  if (!text.startsWith(name, at)) return;
  at += name.length;
  if (at === end) return "";
  if (text[at] === ":") return text.slice(text[at + 1] === " " ? at + 2 : at + 1, end);
}

/** What we need of a stream's reader. */
interface Reader {
  read(): Promise<
    { done: true; value?: Uint8Array | undefined } | { done: false; value: Uint8Array }
  >;
  cancel(): Promise<void>;
}

/**
 * Reads into one buffer again and again where that is possible, larger where it is filled: Deno
 * allocates 64 KiB for each read otherwise. What a read gives is valid until the next.
 */
function readerOf(body: ReadableStream<Uint8Array>): Reader {
  try {
    const reader = body.getReader({ mode: "byob" });
    let buffer = new ArrayBuffer(READ_BYTES);
    return {
      async read() {
        const chunk = await reader.read(new Uint8Array(buffer));
        if (chunk.value) {
          const { length, buffer: used } = chunk.value;
          const isFilled = length === used.byteLength && length < MAX_READ_BYTES;
          buffer = isFilled ? new ArrayBuffer(2 * length) : used;
        }
        return chunk;
      },
      cancel: () => reader.cancel(),
    };
  } catch {
    return body.getReader() as Reader; // not a stream of bytes
  }
}

// --- Findings: what was learned of origins ---

/** For the next sockets, and for ten minutes: it may have been the network, and nothing in front. */
class Findings<T> {
  readonly #found: Map<string, { value: T; until: number }> = new Map();

  get(host: string): T | undefined {
    const found = this.#found.get(host);
    if (found && clock() < found.until) return found.value;
  }

  set(host: string, value: T): void {
    this.forget(host); // the oldest stand first
    if (this.#found.size >= MAX_LEARNED) this.forget(this.#found.keys().next().value!);
    this.#found.set(host, { value, until: clock() + LEARNED_FOR_MS });
  }

  forget(host: string): void {
    this.#found.delete(host);
  }
}

/** What was left of the transports: the next socket begins with it. */
const learned: Findings<Transport> = new Findings();
/** How long a streaming body may be. `isCeiling`: longer ones were cut. */
const lengths: Findings<{ most: number; isCeiling: boolean }> = new Findings();
/** The content type that gets through. */
const types: Findings<string> = new Findings();

// --- Small things ---

/** A frame of the uplink: WebSocket-over-HTTP. */
function frame(type: string, payload: Bytes): Bytes {
  return concat([
    encoder.encode(`${type} ${payload.length.toString(16)}\r\n`),
    payload,
    encoder.encode("\r\n"),
  ]);
}

/** Gives a class the members of `WebSocket`, as Web IDL defines them. */
function defineMembers(socket: { prototype: object }): void {
  const { prototype } = socket;
  for (const [name, value] of Object.entries({ CONNECTING, OPEN, CLOSING, CLOSED })) {
    for (const object of [socket, prototype]) {
      Object.defineProperty(object, name, { value, enumerable: true });
    }
  }
  const members =
    "url readyState bufferedAmount extensions protocol binaryType send close onopen onmessage onerror onclose";
  for (const name of members.split(" ")) {
    Object.defineProperty(prototype, name, { enumerable: true });
  }
  Object.defineProperty(prototype, Symbol.toStringTag, { value: "WebSocket", configurable: true });
  // By such a method Deno's EventTarget shows itself, whatever else there is.
  for (const symbol of Object.getOwnPropertySymbols(EventTarget.prototype)) {
    if (symbol.description!.endsWith("CustomInspect")) {
      Object.defineProperty(prototype, symbol, { value: undefined });
    }
  }
}

/** What `send` takes; whatever is no bytes is a string. */
function toMessage(data: unknown): string | Bytes | Blob {
  if (isBlob(data)) return data;
  if (ArrayBuffer.isView(data)) {
    if (!data.byteLength) return EMPTY; // the buffer may have gone elsewhere, which is no error
    return new Uint8Array(data.buffer as ArrayBuffer, data.byteOffset, data.byteLength);
  }
  // Shared ones are not everywhere.
  if (!tagOf(data).endsWith("ArrayBuffer]")) return `${data}`;
  return (data as ArrayBuffer).byteLength ? new Uint8Array(data as ArrayBuffer) : EMPTY;
}

/** Those of another realm, as of a frame, are of another class. */
function tagOf(value: unknown): string {
  return Object.prototype.toString.call(value);
}

function isBlob(value: unknown): value is Blob {
  return /t (Blob|File)]$/.test(tagOf(value));
}

/** The standard's steps: whatever the scheme that is given, that of a WebSocket comes out. */
function parseURL(value: string): URL {
  const { document, location } = globalThis as {
    document?: { baseURI?: string };
    location?: { href: string };
  };
  let url: URL | undefined;
  try {
    url = new URL(value, document?.baseURI ?? location?.href);
    url.protocol = url.protocol.replace("http", "ws");
  } catch {
    // told below
  }
  if (!url || !/^wss?:[^#]*$/.test(url.href)) {
    throw new DOMException(`${value} is no URL for a WebSocket`, "SyntaxError");
  }
  return url;
}

/** As browsers do: a page that came by TLS speaks without it to its own machine at most. */
function refuseMixed({ protocol, hostname }: URL): void {
  const { location } = globalThis as { location?: { protocol: string } };
  const isLocal = /^(.*\.)?localhost$|^127\.|^\[::1\]$/.test(hostname);
  if (location?.protocol === "https:" && protocol === "ws:" && !isLocal) {
    throw new DOMException("A page of https: may not use ws:", "SecurityError");
  }
}

/** What they may be, where that can be told. */
const OPTIONS: Readonly<Record<keyof WebSocketSSEOptions, string>> = {
  protocols: "",
  headers: "",
  credentials: "omit, same-origin or include",
  bidir: "",
  bdir: "",
  stream: "",
  transport: "auto, duplex, stream, post or poll",
  persist: "",
  resume: "",
  fetch: "a function",
  signal: "",
};

/** Another name is warned of, once: later versions may know it. */
function checkOptions(options: WebSocketSSEOptions, warn: (text: string) => void): void {
  const names = Object.keys(OPTIONS);
  for (const [name, value] of Object.entries(options)) {
    if (names.includes(name)) checkOption(name as keyof WebSocketSSEOptions, value);
    else if (!told.has(name)) {
      told.add(name);
      warn(`is asked for with an unknown option "${name}"; there are ${names.join(", ")}`);
    }
  }
}

function checkOption(name: keyof WebSocketSSEOptions, value: unknown): void {
  const choice = OPTIONS[name];
  if (!choice || value === undefined || value === null) return;
  const isOne = choice === "a function"
    ? typeof value === "function"
    : choice.split(/, | or /).includes(value as string);
  if (!isOne) throw new TypeError(`The option ${name} is ${choice}`);
}

const told: Set<string> = new Set();

function failureOf(isOpening: boolean, { fault, cause, status }: Trouble): Failure {
  const message = `${isOpening ? "Not opened" : "Lost"}: ${fault}`;
  return { message, error: new Error(message, cause === undefined ? {} : { cause }), status };
}

/** Deno and Bun name the whole URL in what their `fetch` throws, and in its causes; its query is often secret. */
function withoutQuery(error: unknown, query: string, depth = 9): unknown {
  if (!query || !(error instanceof Error)) return error;
  if (!depth) return; // causes may go round
  const { name, message, code } = error as Error & { code?: unknown };
  const cause = withoutQuery(error.cause, query, depth - 1);
  return Object.assign(new Error(message.replaceAll(query, "?…"), { cause }), { name, code });
}

function checkProtocols(value: string | string[]): string[] {
  const protocols = typeof value === "object" ? [...value].map((name) => `${name}`) : [`${value}`];
  if (
    new Set(protocols.map((name) => name.toLowerCase())).size < protocols.length ||
    protocols.some((name) => !/^[\w!#-'*+.^`|~-]+$/.test(name))
  ) {
    throw new DOMException("Subprotocols must be distinct tokens", "SyntaxError");
  }
  return protocols;
}

/** Node 20 has no CloseEvent, and Deno's takes itself for an Event. */
function closeEvent(code: number, reason: string, wasClean: boolean): Event {
  const init = { code, reason, wasClean };
  const event = globalThis.CloseEvent
    ? new CloseEvent("close", init)
    : Object.assign(new Event("close"), init);
  return Object.defineProperty(event, Symbol.toStringTag, { value: "CloseEvent" });
}

/** "The client retries on network errors, 408, 411, 425, 429 and 5xx …; any other status is final." */
function isTransient(status: number): boolean {
  return [0, 408, 411, 425, 429].includes(status) || status >= 500;
}

function isReason(reason: unknown): boolean {
  return typeof reason === "string" && encoder.encode(reason).length <= MAX_REASON_BYTES;
}

/** "Numbers are … without sign …, at most 2^53 - 1." */
function isCount(value: unknown): boolean {
  return Number.isSafeInteger(value) && (value as number) >= 0;
}

/** "Numbers are decimal, without sign or leading zeros": any other text is none. */
function countOf(text: string): number | undefined {
  const count = Number(text);
  return isCount(count) && `${count}` === text ? count : undefined;
}

/** What RFC 6455 lets a CLOSE carry, and 1005 for none. */
function isCloseCode(code: unknown): boolean {
  return Number.isInteger(code) && (code as number) >= 1000 && (code as number) <= 4999 &&
    ![1004, 1006, 1015].includes(code as number);
}

/** A code, and behind a space a reason that is encoded as a URI component. */
function parseEnding(text: string): [code: number, reason: string] | undefined {
  const [, code, encoded = ""] = /^(\d{4}) ?(\S*)$/.exec(text) ?? [];
  try {
    const reason = decodeURIComponent(encoded);
    if (isCloseCode(Number(code)) && isReason(reason)) return [Number(code), reason];
  } catch {
    // what cannot be read says nothing
  }
}

/** Deno, Bun and Node, whose fetch answers while the request's body is still being sent. */
function isRuntime(): boolean {
  const { process, document } = globalThis as {
    process?: { versions?: { node?: string } };
    document?: unknown;
  };
  return !!process?.versions?.node && !document;
}

/** As Deno has them, and Node by the name of Agent. */
interface HttpClient {
  close(): unknown;
}

/** As Node has them. */
interface Agent extends HttpClient {
  dispatch: unknown;
  [key: symbol]: unknown;
}

/**
 * One as that of Node's fetch, which speaks HTTP/2 from Node 26 on. None where that is of another
 * kind, a proxy's as it may be, or has interceptors.
 */
function anotherAgent(): HttpClient | undefined {
  const { [Symbol.for("undici.globalDispatcher.2")]: agent = {} as Agent } = globalThis as {
    [key: symbol]: Agent | undefined;
  };
  const Kind = agent.constructor as { new (options: unknown): Agent; name: string };
  if (Kind.name !== "Agent" || agent.dispatch !== Kind.prototype.dispatch) return;
  for (const key of Object.getOwnPropertySymbols(agent)) {
    if (key.description === "options") return new Kind(agent[key]);
  }
}

/** How something of the origin came to this page last; "" where that is not known. */
function protocolOf(target: string): string {
  let protocol = "";
  const { origin } = new URL(target);
  for (
    const entry of performance.getEntries() as (PerformanceEntry & { nextHopProtocol?: string })[]
  ) {
    if (entry.name.startsWith(`${origin}/`)) protocol = entry.nextHopProtocol || protocol;
  }
  return protocol;
}

function speaksHTTP2(target: string): boolean {
  return /^h[23]/.test(protocolOf(target));
}

function locks(): Locks | undefined {
  return (globalThis as { navigator?: { locks?: Locks } }).navigator?.locks;
}

/** 32 hexadecimal digits. (Only secure contexts have `randomUUID`.) */
function randomName(): string {
  return Array.from(
    crypto.getRandomValues(new Uint8Array(16)),
    (byte) => byte.toString(16).padStart(2, "0"),
  ).join("");
}

/** Milliseconds by a clock that nobody sets. */
function clock(): number {
  return performance.now();
}

/** Whether it takes more microtasks than a read does that need not wait for the network. */
async function isSlow(reading: Promise<unknown>): Promise<boolean> {
  let isPending = true;
  const settle = () => {
    isPending = false;
  };
  reading.then(settle, settle);
  await undefined;
  await undefined;
  await undefined;
  return isPending;
}

/** Runs something in a task of its own, sooner than a timer would. */
function nextTask(task: () => void): void {
  const { setImmediate } = globalThis as { setImmediate?: (task: () => void) => void };
  if (setImmediate) setImmediate(task);
  else if ("document" in globalThis) {
    pageTasks.push(task);
    pagePort ??= portOf(() => pageTasks.shift()!());
    pagePort.postMessage(0);
  } else {
    const port = portOf(() => {
      port.close();
      task();
    });
    port.postMessage(0);
  }
}

/** A page's tasks share a port, which costs half of one for each. Elsewhere it might outlive its request. */
const pageTasks: (() => void)[] = [];
let pagePort: MessagePort | undefined;

/** Calls for each message that is posted to the port. */
function portOf(call: () => void): MessagePort {
  const { port1, port2 } = new MessageChannel();
  port1.onmessage = call;
  return port2;
}

function concat(parts: Bytes[]): Bytes {
  const whole = new Uint8Array(parts.reduce((sum, { length }) => sum + length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

function toBase64(bytes: Bytes): string {
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text);
}

function fromBase64(text: string): Bytes {
  return (Uint8Array as { fromBase64?: (text: string) => Bytes }).fromBase64?.(text) ??
    Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}
