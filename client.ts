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
const TOKEN_EVENT = "crossws-id";
const OPEN_EVENT = "duplex-open";
const JSON_EVENT = "duplex-json";
const BINARY_EVENT = "duplex-binary";
const ACK_EVENT = "duplex-ack";
const PING_EVENT = "duplex-ping";
const CLOSE_EVENT = "duplex-close";

// --- The client's own constants ---

const CONNECTING = 0;
const OPEN = 1;
const CLOSING = 2;
const CLOSED = 3;

/** "A streaming body is ended before 512 KiB in all (proxies cap a request at 1 MB)"; batches, too. */
const MAX_BODY = 512 * 1024;
const READ_SIZE = 16 * 1024;
/** Characters of one event: a stream that never ends its line must not fill the memory. */
const MAX_EVENT = 128 * 1024 * 1024;
/** What acknowledgement and answers to pings may take at once. */
const MAX_CONTROL = 4 * 1024;
/** What browsers let a page send while it is being left. */
const MAX_KEEPALIVE = 60 * 1024;
const OPEN_TIMEOUT = 30_000;
/** How long a single request that carries both directions has to answer before we ask by GET. */
const DUPLEX_TIMEOUT = 2_000;
/** After that we say what may be the matter. */
const ANSWER_TIMEOUT = 5_000;
/** Besides 1 s for every 8 KiB. */
const POST_TIMEOUT = 15_000;
const CLOSE_ANSWER_TIMEOUT = 3_000;
/** The most of any term: timers cannot wait longer, in ms. */
const MAX_TERM = 2 ** 31 - 1;
const ACK_DELAY = 1_000;
/** Messages that an open uplink stream leaves unacknowledged, short of half a window or that time. */
const ACK_EVERY = 32;
/** Answers to pings that may wait. */
const MAX_PONGS = 16;
/** Half heartbeats without a byte, after which a stream is taken for dropped. */
const QUIET_TICKS = 4;
const WATCH_PERIOD = 250;
/**
 * Watches without a confirmation, after which a stream is left: while it is not even read (it may
 * wait for the page's `headers`), at first, and once it has worked.
 */
const UNREAD_PATIENCE = 60;
const FIRST_PATIENCE = 6;
const PATIENCE = 12;
/** Streams in a row that end unconfirmed, after which another transport is taken, likewise. */
const FIRST_FAILURES = 2;
const MAX_FAILURES = 5;
const MAX_RETRY_DELAY = 2_000;
const MAX_LEARNED = 100;
/** It may have been the network, and not what stands in front of the server. */
const LEARNED_FOR = 600_000;

const encoder: TextEncoder = new TextEncoder();
const EMPTY: Bytes = new Uint8Array();

type Bytes = Uint8Array<ArrayBuffer>;

/** What was left of the transports for an origin, and until when the next socket begins with it. */
const learned: Map<string, { transport: Transport; until: number }> = new Map();

// --- Types ---

/** How messages go up: within the one request, by a streaming request, or by one request a batch. */
export type Transport = "duplex" | "stream" | "post";

/** Anything that the `Headers` constructor takes. */
export type HeadersLike = NonNullable<ConstructorParameters<typeof Headers>[0]>;

/** What {@link WebSocketSSE} takes beyond a `WebSocket`. */
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
  error: Event;
  /** The session has ended. */
  close: CloseEvent;
  /** The connection was lost; what is sent now waits. */
  drop: Event;
  /** The connection is back, and nothing was lost. */
  resume: Event;
}

/** What {@link WebSocketSSE.stats} counts. */
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

/** An event handler attribute: a function, or null. */
// deno-lint-ignore no-explicit-any
export type EventHandler<E> = ((this: any, event: E) => any) | null;

/** What the server says when it opens or resumes a session. */
interface Terms {
  protocol: string;
  heartbeatInterval: number;
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
  /** What it adds to `bufferedAmount`. */
  size: number;
  isClose: boolean;
}

// --- Public surface ---

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

  /** Handler of `open`. */
  declare onopen: EventHandler<Event>;
  /** Handler of `message`. */
  // deno-lint-ignore no-explicit-any
  declare onmessage: EventHandler<MessageEvent<any>>;
  /** Handler of `error`. */
  declare onerror: EventHandler<Event>;
  /** Handler of `close`. */
  declare onclose: EventHandler<CloseEvent>;

  readonly #url: URL;
  readonly #target: string;
  readonly #authorization: string | undefined;
  readonly #protocols: string[];
  readonly #options: WebSocketSSEOptions;
  readonly #handlers: { [name: string]: unknown } = {};
  readonly #stats: WebSocketSSEStats = { resumes: 0, resent: 0, received: 0, sent: 0 };
  readonly #handle = (event: Event): void => {
    const handler = this.#handlers[event.type];
    if (typeof handler === "function") handler.call(this, event); // any object may be set
  };
  readonly #leave = (): void => this.#pageHides();
  readonly #abort = (): void => this.#fail();

  #readyState: 0 | 1 | 2 | 3 = CONNECTING;
  #binaryType: "blob" | "arraybuffer" = "blob";
  #protocol = "";
  #bufferedAmount = 0;
  #transport: Transport;

  // The session
  #token = "";
  /** Version 1 was granted: numbers, acknowledgements and resumption. Else crossws's plain wire. */
  #full = false;
  #terms: Terms | undefined;
  #attempt = 0;
  #connection: Exchange | undefined;
  /** Nothing more goes over the network, whatever is still to be dispatched. */
  #ended = false;
  /** By our clock; 0 while there is a connection. */
  #droppedAt = 0;
  /** The connection is being replaced by ourselves. */
  #renewing = false;
  /** How often the stream was damaged: once is resumed, twice is the end. */
  #damages = 0;
  #ticker: ReturnType<typeof setInterval> | undefined;
  /** Of whatever is waited for: the first events, or the end of a close. */
  #deadline: ReturnType<typeof setTimeout> | undefined;
  /** Ends the pauses before retries. */
  readonly #pauses: Set<() => void> = new Set();
  /** Resumptions since something last came of a connection. */
  #retries = 0;
  /** Set by the server's close: ends the socket, once ours has been answered. */
  #finishClose: (() => void) | undefined;

  // Down: counted as parsed, dispatched one task each
  #received = 0;
  #acknowledged = 0;
  /** The server is to hear it even if there is nothing new. */
  #ackDue = false;
  #unacknowledgedBytes = 0;
  readonly #inbox: (() => void)[] = [];
  /** Something has been dispatched in the current task, as far as we know when one ends. */
  #dispatchedInTask = false;

  // Up: numbered as queued, kept until acknowledged
  #out: Outgoing[] = [];
  /** The number of the first message in `#out`. */
  #first = 1;
  #pumping = false;
  /** The number of the first message that was never written. */
  #fresh = 1;
  /** Bytes of those before it. They count in the window. */
  #writtenBytes = 0;
  #handledBytes = 0;
  #pongs: Bytes[] = [];
  #ackTimer: ReturnType<typeof setTimeout> | undefined;
  /** A body that streams. */
  #body: Exchange | undefined;
  /** The batch that is on its way. */
  #posted: Exchange | undefined;
  #postedControl: Exchange | undefined;
  #maxBatch = MAX_BODY;
  #streamFailures = 0;
  /** A streaming body has been confirmed in this session. */
  #streamWorked = false;
  /** What to remember for the origin, once it has shown that it works. */
  #unlearned: Transport | undefined;
  #watch: ReturnType<typeof setInterval> | undefined;
  #quietWatches = 0;

  /**
   * Begins to connect. Events come later, never before the current task ends.
   *
   * @param url `http:`, `https:`, `ws:` or `wss:`; relative to the page where there is one.
   * @param init Subprotocols, as for a `WebSocket`, or options.
   * @throws {DOMException} SyntaxError, where the standard throws it: a URL that cannot
   * be parsed, has a fragment or another scheme; a subprotocol that is no token or offered twice.
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
    this.#protocols = checkProtocols(options.protocols ?? []);
    this.#options = options;
    const target = new URL(this.#url);
    // The bytes as they are, since what is escaped need not be UTF-8.
    const credentials = `${target.username}:${target.password}`
      .replace(/%([\da-f]{2})/gi, (_, hex) => String.fromCharCode(parseInt(hex, 16)));
    if (credentials !== ":") this.#authorization = `Basic ${btoa(credentials)}`;
    target.username = target.password = "";
    this.#target = target.href.replace(/^ws/, "http");
    this.#transport = this.#chooseTransport();
    options.signal?.addEventListener("abort", this.#abort);
    if ("document" in globalThis) globalThis.addEventListener("pagehide", this.#leave);
    if (options.signal?.aborted) this.#fail();
    else this.#run();
  }

  /** The absolute URL, with the credentials that it was given. A fragment is refused. */
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
    return "";
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
    if (value === "blob" || value === "arraybuffer") this.#binaryType = value;
  }

  /** The transport of the uplink now in use. Not of the standard. */
  get transport(): Transport {
    return this.#transport;
  }

  /** Counts since the beginning. Not of the standard. */
  get stats(): WebSocketSSEStats {
    return { ...this.#stats };
  }

  /**
   * Queues a message. What cannot go now waits, through dropped connections too.
   *
   * @throws {DOMException} InvalidStateError while connecting, or with `bidir: false`.
   */
  send(data: string | ArrayBufferLike | Blob | ArrayBufferView): void {
    if (!arguments.length) throw new TypeError("No message");
    const message = toMessage(data);
    if (this.#readyState === CONNECTING || !this.#sends) {
      throw new DOMException(
        this.#sends ? "Still connecting" : "bidir is false",
        "InvalidStateError",
      );
    }
    const [frame, size] = message instanceof Blob
      ? [undefined, message.size]
      : this.#encode(message);
    this.#bufferedAmount += size;
    if (this.#readyState !== OPEN) return;
    this.#stats.sent++;
    const entry = this.#enqueue(frame, size);
    if (!(message instanceof Blob)) return;
    message.arrayBuffer().then((buffer) => {
      [entry.frame] = this.#encode(new Uint8Array(buffer));
      this.#pump();
    }, () => this.#fail());
  }

  /**
   * Starts the closing handshake: what was sent before goes out before.
   *
   * @param code 1000, or 3000 to 4999. Default: none, which the other side sees as 1005.
   * @param reason At most 123 bytes of UTF-8.
   * @throws {DOMException} InvalidAccessError for another code, SyntaxError for a longer reason.
   */
  close(code: number | undefined = undefined, reason: string | undefined = ""): void {
    if (code !== undefined) {
      // As [Clamp] rounds: a half goes to the even neighbour, as it does up here.
      code = +code + 2 ** 52 - 2 ** 52;
      if (code !== 1000 && !(code >= 3000 && code <= 4999)) {
        throw new DOMException(`Close code ${code} may not be used`, "InvalidAccessError");
      }
    }
    const text = encoder.encode(`${reason}`);
    if (text.length > 123) throw new DOMException("The reason is over 123 bytes", "SyntaxError");
    if (this.#readyState >= CLOSING) return;
    const connecting = this.#readyState === CONNECTING;
    this.#readyState = CLOSING;
    if (this.#ended || this.#finishClose) return; // `close` is on its way
    if (connecting || !this.#full && !this.#out.length) return this.#fail(!connecting);
    if (!this.#full) { // crossws's wire has no close: what was sent before is all that can go
      this.#finishClose = () => this.#end(1006, "", false, false);
      this.#deadline = setTimeout(this.#finishClose, OPEN_TIMEOUT);
      return;
    }
    this.#enqueueClose(code ?? (text.length ? 1000 : undefined), text);
    this.#awaitClose();
  }

  // --- As Web IDL defines them ---

  static {
    for (const [name, value] of Object.entries({ CONNECTING, OPEN, CLOSING, CLOSED })) {
      Object.defineProperty(this, name, { value, enumerable: true });
      Object.defineProperty(this.prototype, name, { value, enumerable: true });
    }
    const members = [
      "url",
      "readyState",
      "bufferedAmount",
      "extensions",
      "protocol",
      "binaryType",
      "send",
      "close",
    ];
    for (const name of members) Object.defineProperty(this.prototype, name, { enumerable: true });
    Object.defineProperty(this.prototype, Symbol.toStringTag, {
      value: "WebSocket",
      configurable: true,
    });
    for (const type of ["open", "message", "error", "close"]) {
      Object.defineProperty(this.prototype, `on${type}`, {
        configurable: true,
        enumerable: true,
        get(this: WebSocketSSE) {
          return this.#handlers[type] ?? null;
        },
        // HTML: it takes its place among the listeners when it is first set, and leaves it at null.
        set(this: WebSocketSSE, value: unknown) {
          const isObject = Object(value) === value;
          this.#handlers[type] = isObject ? value : null;
          if (isObject) this.addEventListener(type, this.#handle);
          else this.removeEventListener(type, this.#handle);
        },
      });
    }
  }

  get #sends(): boolean {
    return (this.#options.bidir ?? this.#options.bdir) !== false;
  }

  // --- Opening ---

  /** The life of the session: one connection after the other, until it ends. */
  async #run(): Promise<void> {
    try {
      let connection = await this.#open();
      while (!this.#ended) {
        await this.#read(connection);
        if (this.#ended || this.#finishClose) return;
        if (!this.#terms) return this.#fail();
        connection = await this.#resume();
      }
    } catch {
      this.#fail(); // whatever it was, the page learns no more of it than of a failed WebSocket
    }
  }

  /** "duplex" between runtimes; "stream" in Chromium over HTTP/2; "post" elsewhere. */
  #chooseTransport(): Transport {
    const { transport = "auto", stream } = this.#options;
    if (transport !== "auto") return transport;
    if (stream === false) return "post";
    const known = learned.get(this.#url.host);
    if (known && clock() < known.until) return known.transport;
    if (isRuntime()) return "duplex";
    // Who has the attribute can stream the body of a request; Firefox and WebKit make text of it.
    return "duplex" in Request.prototype && speaksHTTP2(this.#target) ? "stream" : "post";
  }

  async #open(): Promise<Exchange> {
    const protocols = this.#protocols.join(", ");
    const headers: Record<string, string> = protocols ? { [PROTOCOL_HEADER]: protocols } : {};
    if (this.#transport === "duplex") {
      const connection = await this.#connect(headers, OPEN_TIMEOUT, DUPLEX_TIMEOUT);
      // Anything but our own answer, or a refusal for good, may be the fault of the transport.
      // crossws answers with a plain stream: another request would open another peer there.
      if (connection.isStream || [401, 403, 429, 503].includes(connection.status)) {
        return this.#accept(connection);
      }
      connection.end();
      if (this.#transport === "duplex") this.#leaveTransport("stream");
    }
    return this.#accept(await this.#connect(headers, OPEN_TIMEOUT));
  }

  /** Asks for an event stream; with the duplex transport the request carries the uplink, too. */
  async #connect(
    headers: Record<string, string>,
    timeout: number,
    answerTimeout?: number,
  ): Promise<Exchange> {
    if (this.#ended) throw new Error("Closed");
    const connection = this.#connection = this.#transport === "duplex"
      ? new Exchange(this.#first, (body) => this.#fill(body))
      : new Exchange();
    await this.#ask(connection, {
      extra: { accept: STREAM_TYPE, ...headers },
      timeout,
      answerTimeout,
    });
    // No answer at all: the request is held until its body ends, as any streaming one would be.
    // (Whatever else ends it lets go of it first.)
    if (this.#connection?.stream && connection.abort.signal.aborted) this.#leaveTransport("post");
    return connection;
  }

  /** Checks what came back for an opening request; the session is open with its first events. */
  #accept(connection: Exchange): Exchange {
    if (this.#ended || !connection.isStream) {
      connection.end();
      throw new Error(`Refused: ${connection.status}`);
    }
    this.#deadline = setTimeout(() => this.#fail(), OPEN_TIMEOUT);
    this.#full = connection.isFull;
    this.#token = connection.response!.headers.get(TOKEN_HEADER) ?? "";
    if (!this.#full) {
      connection.finish();
      this.#transport = "post";
      learn(this.#url.host, "post");
      if (this.#token || !this.#sends) this.#openedPlain();
    }
    return connection;
  }

  #openedPlain(): void {
    this.#opened(this.#connection!.response!.headers.get("sec-websocket-protocol") ?? "");
  }

  #opened(protocol: string): void {
    clearTimeout(this.#deadline);
    if (protocol && !this.#protocols.includes(protocol)) return this.#fail();
    this.#deliver(() => {
      if (this.#readyState !== CONNECTING) return;
      this.#readyState = OPEN;
      this.#protocol = protocol;
      this.dispatchEvent(new Event("open"));
    });
  }

  /** Waits for the answer, and not for ever. Every request of this socket goes by here. */
  async #ask(
    exchange: Exchange,
    { bytes, timeout, answerTimeout, keepalive, extra }: {
      bytes?: Bytes | undefined;
      timeout?: number | undefined;
      /** From when the request is made, instead of from now. */
      answerTimeout?: number | undefined;
      keepalive?: boolean;
      extra?: Record<string, string>;
    },
  ): Promise<void> {
    const { stream, abort: { signal } } = exchange;
    const { headers: given, credentials, fetch: send = fetch } = this.#options;
    const body = stream ?? bytes;
    const endIn = (ms?: number) => ms && setTimeout(() => exchange.end(), ms);
    let timer = endIn(timeout);
    const warning = "document" in globalThis && setTimeout(() => this.#warn(), ANSWER_TIMEOUT);
    // What the options give need not settle.
    const end = new Promise<undefined>((resolve) =>
      signal.addEventListener("abort", () => resolve(undefined))
    );
    try {
      // A function is asked each time.
      const headers = new Headers(
        typeof given === "function" ? await Promise.race([given(), end]) : given,
      );
      this.#setHeaders(headers, exchange, !!body);
      for (const name in extra) headers.set(name, extra[name]!);
      signal.throwIfAborted();
      if (answerTimeout) {
        clearTimeout(timer);
        timer = endIn(answerTimeout);
      }
      const asked = send(this.#target, {
        method: body ? "POST" : "GET",
        headers,
        signal,
        redirect: "manual",
        ...credentials && { credentials },
        keepalive,
        body,
        duplex: "half",
      } as RequestInit);
      exchange.response = await Promise.race([asked, end]);
      this.#dispatchedInTask = false; // what comes of the network comes in a task of its own
    } catch {
      // as good as an answer that says nothing
    } finally {
      clearTimeout(timer);
      clearTimeout(warning || undefined);
    }
  }

  #setHeaders(headers: Headers, { stream }: Exchange, hasBody: boolean): void {
    if (this.#authorization && !headers.has("authorization")) {
      headers.set("authorization", this.#authorization);
    }
    if (this.#full || !this.#token) headers.set(VERSION_HEADER, VERSION);
    if (this.#token) headers.set(TOKEN_HEADER, this.#token);
    if (stream || hasBody && this.#full) headers.set("content-type", UPLINK_TYPE);
  }

  /** Six event streams take all that a browser has for an origin; whatever comes then waits. */
  #warn(): void {
    if (this.#droppedAt || speaksHTTP2(this.#target)) return;
    console.warn(
      `${this.#url.host} does not answer. Over HTTP/1.1 all tabs share 6 connections: serve HTTP/2`,
    );
  }

  // --- Down ---

  /** Reads one event stream to its end, whichever way that comes. */
  async #read(connection: Exchange): Promise<void> {
    const reader = connection.reader = readerOf(connection.response!.body!);
    const parser = new EventParser((type, data) => {
      if (connection !== this.#connection) return;
      try {
        this.#onEvent(type, data);
      } catch {
        this.#distrust(); // what cannot be parsed would be sent again for ever
      }
    });
    // Left to itself, Deno's decoder drops a mark in mid-stream that comes byte by byte.
    const text = new TextDecoder("utf-8", { ignoreBOM: true });
    let first = true;
    try {
      for (;;) {
        const reading = reader.read();
        const waited = !await Promise.race([reading, soon()]);
        const { done, value } = await reading;
        // What was there already may come in the task of what was before it.
        if (waited) this.#dispatchedInTask = false;
        // An old reader must not go on counting once a resumption has told the count.
        if (done || connection !== this.#connection) break;
        connection.quietTicks = 0;
        const decoded = text.decode(value, { stream: true });
        parser.push(first && decoded[0] === "\uFEFF" ? decoded.slice(1) : decoded);
        first &&= !decoded;
        if (parser.partial > MAX_EVENT) this.#fail();
        // After, since what came with duplex-open is yet to be acknowledged.
        this.#unacknowledgedBytes += value.length;
        this.#acknowledgeWindow(parser.partial);
        await this.#dispatchInbox(); // the next chunk waits until this one is dispatched
      }
    } catch {
      // the connection broke: as good as its end
    }
    connection.end();
    if (connection === this.#connection) this.#connection = undefined;
  }

  #onEvent(type: string, data: string): void {
    if (!this.#full && type.startsWith("duplex-")) return; // on crossws's wire, nothing of ours
    // Any other event stream: we could not send.
    if (!this.#full && !this.#token && this.#sends && type !== TOKEN_EVENT) return this.#fail();
    switch (type) {
      case "":
      case "message":
        return this.#receive(data);
      case JSON_EVENT: {
        const text: unknown = JSON.parse(data);
        // What is no string is as bad as what is no JSON.
        return typeof text === "string" ? this.#receive(text) : this.#distrust();
      }
      case BINARY_EVENT:
        return this.#receive(fromBase64(data));
      case TOKEN_EVENT:
        if (!this.#full && !this.#token) {
          this.#token = data; // the header could not be read
          this.#openedPlain();
        }
        return this.#pump();
      case OPEN_EVENT:
        return this.#onOpen(JSON.parse(data));
      case ACK_EVENT: {
        const [received, handled] = data.split(" ").map(Number) as [number, number];
        if (handled > this.#handledBytes) {
          this.#handledBytes = handled;
          this.#awaitClose(); // that takes something off the queue is progress, too
        }
        return this.#confirm(received);
      }
      case PING_EVENT: {
        const [sent, payload] = data.split(" ");
        // "The number of a duplex-ping, that does not fit the client's own count means damage."
        if (Number(sent) !== this.#received) return this.#distrust();
        this.#pongs.push(frame("PONG", fromBase64(payload ?? "")));
        if (this.#pongs.length > MAX_PONGS) this.#pongs.shift();
        return this.#pump();
      }
      case CLOSE_EVENT:
        return this.#onClose(JSON.parse(data));
    }
  }

  #onOpen(terms: Terms): void {
    if (!this.#full || !this.#token) return;
    const { next, attempt, received, handled, window, heartbeatInterval, resumeTimeout } = terms;
    if (
      next !== this.#received + 1 || attempt !== this.#attempt ||
      typeof terms.protocol !== "string" ||
      !(received >= 0 && handled >= 0 && heartbeatInterval >= 1) ||
      [window, heartbeatInterval, resumeTimeout].some((term) => !(term >= 0 && term <= MAX_TERM))
    ) return this.#distrust();
    const opening = !this.#terms;
    this.#terms = terms;
    this.#handledBytes = Math.max(this.#handledBytes, handled);
    this.#acknowledged = this.#received;
    this.#ackDue = false;
    this.#unacknowledgedBytes = 0;
    this.#tick();
    if (opening) this.#opened(terms.protocol);
    else {
      this.#droppedAt = 0;
      this.#streamFailures = 0;
      for (const wake of this.#pauses) wake(); // the network is back
      if (!this.#renewing) {
        this.#stats.resumes++;
        this.#deliver(() => this.dispatchEvent(new Event("resume")));
      }
      this.#renewing = false;
    }
    if (this.#connection?.open) this.#body ??= this.#connection;
    this.#confirm(terms.received);
  }

  /** "The client's count advances when the event's blank line is parsed, whatever becomes of the event then." */
  #receive(data: string | Bytes): void {
    this.#received++;
    this.#retries = 0;
    this.#deliver(() => {
      if (this.#readyState !== OPEN) return;
      this.#stats.received++;
      const value = typeof data === "string"
        ? data
        : this.#binaryType === "blob"
        ? new Blob([data])
        : data.buffer;
      this.dispatchEvent(new MessageEvent("message", { data: value, origin: this.#url.origin }));
    });
  }

  #deliver(task: () => void): void {
    this.#inbox.push(task);
    if (!this.#connection?.reader) this.#dispatchInbox(); // else the reader's loop does it
  }

  /** Each event in a task of its own, so that promises settle in between. */
  async #dispatchInbox(): Promise<void> {
    while (this.#inbox.length) {
      // Where nothing was dispatched in this task there is no need to wait for another.
      if (this.#mayBePageTask || !this.#connection?.reader) await new Promise<void>(nextTask);
      this.#dispatchedInTask = true;
      this.#inbox.shift()?.();
    }
  }

  /** The page may have run in this task: an own `fetch` can answer within the caller's. */
  get #mayBePageTask(): boolean {
    return this.#dispatchedInTask || !!this.#options.fetch;
  }

  /** `bufferedAmount` never falls within a task of the page. */
  #lowerBufferedAmount(size: number): void {
    const fall = () => this.#bufferedAmount -= size;
    if (this.#mayBePageTask) nextTask(fall);
    else fall();
  }

  /** "The client acknowledges with ACK at half a window." A part of an event counts for the next time. */
  #acknowledgeWindow(partial: number): void {
    if (!this.#terms || this.#received === this.#acknowledged) return;
    if (this.#unacknowledgedBytes >= this.#terms.window / 2) {
      this.#unacknowledgedBytes = 3 * partial; // characters have up to 3 bytes
      this.#acknowledge();
    } else if (this.#body) {
      // "On an open uplink stream 1 s after the first message that it has not acknowledged": free there.
      this.#ackTimer ??= setTimeout(() => {
        this.#ackTimer = undefined;
        if (this.#body) this.#acknowledge();
      }, ACK_DELAY);
    }
  }

  // --- Drops and resumption ---

  /** One ticker: streams that went quiet, and keep-alive of ours. */
  #tick(): void {
    clearInterval(this.#ticker);
    this.#ticker = setInterval(() => {
      const connection = this.#connection;
      if (connection?.reader) this.#retries = 0;
      // "The client takes two intervals without a byte for a drop." Ticks, not clocks: after a
      // long pause of this process they say nothing of the network.
      // Nor while the page is behind: then nothing is read.
      const reads = connection?.reader && !this.#inbox.length;
      if (reads && ++connection.quietTicks > QUIET_TICKS) this.#hangUp();
      if (this.#body?.open && this.#body.asked && !this.#body.wroteSinceTick) {
        this.#body.write([frame("PING", EMPTY)]);
      }
      if (this.#body) this.#body.wroteSinceTick = false;
    }, this.#terms!.heartbeatInterval / 2);
  }

  /** Ends all requests; if there is a session, `#run` goes on to resume it. */
  #hangUp(): void {
    this.#endBody();
    for (const exchange of [this.#connection, this.#posted, this.#postedControl]) exchange?.end();
    this.#connection = undefined; // what is left in its parser must not count
  }

  #distrust(): void {
    if (++this.#damages > 1) this.#fail();
    else this.#hangUp();
  }

  async #resume(): Promise<Exchange> {
    this.#hangUp(); // whatever cut the connection may hold the others for ever
    // Where drops come sooner than the verdict on a stream, it would be tried for ever.
    if (this.#fresh > this.#first && !this.#streamWorked && this.#stats.resumes > 2) {
      this.#transport = "post";
    }
    if (!this.#droppedAt) {
      this.#droppedAt = clock();
      this.#dropped();
    }
    const { resumeTimeout, heartbeatInterval } = this.#terms!;
    const patience = Math.max(Math.min(resumeTimeout / 3, 2 * heartbeatInterval), 1000);
    const deadline = this.#droppedAt + resumeTimeout;
    while (await this.#pause(this.#retries++, deadline)) {
      const connection = await this.#connect({
        [ATTEMPT_HEADER]: `${++this.#attempt}`,
        "last-event-id": `${this.#received}`,
      }, Math.min(deadline - clock(), patience) || 1);
      if (connection.isFull) {
        this.#token = connection.response!.headers.get(TOKEN_HEADER) ?? this.#token;
        return connection;
      }
      connection.end();
      // "A streaming body at an instance that is not the session's." For this socket only.
      if (connection.status === 411) this.#transport = "post";
      else if (!isTransient(connection.status)) break;
      else if (this.#renewing) {
        this.#renewing = false;
        this.#dropped();
      }
    }
    throw new Error("Not resumed");
  }

  #dropped(): void {
    this.#deliver(() => this.dispatchEvent(new Event("drop")));
  }

  /** Waits longer each time, and never in step with other clients. False: it is too late to try again. */
  async #pause(retries: number, deadline = Infinity): Promise<boolean> {
    const delay = Math.min(MAX_RETRY_DELAY, 50 * 2 ** retries, deadline - clock());
    if (retries && delay > 0 && !this.#ended) {
      await new Promise<void>((resolve) => {
        const wake = () => {
          clearTimeout(timer);
          this.#pauses.delete(wake);
          resolve();
        };
        const timer = setTimeout(wake, delay * (0.5 + Math.random() / 2));
        this.#pauses.add(wake);
      });
    }
    return delay > 0 && !this.#ended;
  }

  // --- Up ---

  /** A message as it goes, and its own size. A copy, since the caller may change the bytes. */
  #encode(message: string | Bytes): [Bytes, number] {
    if (!this.#full) { // plain: the body of a request is the message
      const bytes = typeof message === "string" ? encoder.encode(message) : message.slice();
      return [bytes, bytes.length];
    }
    if (typeof message !== "string") return [frame("BINARY", message), message.length];
    // Most text is ASCII, so that its length is known and one encoding makes the frame.
    const head = `TEXT ${message.length.toString(16)}\r\n`;
    const bytes = encoder.encode(`${head}${message}\r\n`);
    const size = bytes.length - head.length - 2;
    if (size === message.length) return [bytes, size];
    return [frame("TEXT", bytes.subarray(head.length, -2)), size];
  }

  /** What is sent in one task goes together. */
  #enqueue(bytes: Bytes | undefined, size: number, isClose = false): Outgoing {
    const entry: Outgoing = { frame: bytes, size, isClose };
    this.#out.push(entry);
    if (!this.#pumping) {
      this.#pumping = true;
      queueMicrotask(() => {
        this.#pumping = false;
        this.#pump();
      });
    }
    return entry;
  }

  #enqueueClose(code: number | undefined, reason: Bytes): void {
    const payload = code === undefined
      ? EMPTY
      : concat([new Uint8Array([code >> 8, code & 255]), reason]);
    this.#enqueue(frame("CLOSE", payload), 0, true);
  }

  /** Message `number`, if it may be written now. */
  #due(number: number): Outgoing | undefined {
    const entry = this.#out[number - this.#first];
    // "The client's window counts the bytes begun less the bytes handled." And "a sender below its
    // window may begin one message of any size; at it, only control frames and CLOSE."
    const allowed = number < this.#fresh || entry?.isClose || !this.#terms ||
      this.#writtenBytes - this.#handledBytes < this.#terms.window;
    return entry?.frame && allowed ? entry : undefined;
  }

  /** What may be written now, as far as it fits in the body; mostly one message of any size does. */
  #take(body: Exchange, most: number, atLeastOne = true): Bytes[] {
    const parts: Bytes[] = [];
    for (;;) {
      const number = Math.max(body.next, this.#first);
      const entry = this.#due(number);
      const size = entry?.frame?.length ?? 0;
      const fits = body.used + size <= most || atLeastOne && !body.used;
      if (!entry || !fits) return parts;
      // SEQ is "the number of the next message in this body": those before have been acknowledged.
      if (this.#full && (!body.used || number !== body.next)) {
        parts.push(frame("SEQ", encoder.encode(`${number}`)));
      }
      parts.push(entry.frame!);
      body.used += size || 1; // crossws's wire has empty ones
      body.next = number + 1;
      if (number < this.#fresh) this.#stats.resent++;
      else {
        this.#writtenBytes += size;
        this.#fresh = body.next;
      }
    }
  }

  /** Messages up to this number have arrived. */
  #confirm(received: number): void {
    if (this.#ended) return; // an answer that was on its way
    if (received < this.#first) return this.#pump();
    if (!(received < this.#fresh)) return this.#distrust(); // it was never sent
    let size = 0;
    for (const entry of this.#out.splice(0, received - this.#first + 1)) size += entry.size;
    this.#lowerBufferedAmount(size);
    this.#first = received + 1;
    this.#retries = 0;
    this.#quietWatches = 0;
    this.#streamFailures = 0;
    if (this.#unlearned) learn(this.#url.host, this.#unlearned);
    this.#unlearned = undefined;
    if (this.#body) this.#body.confirmed = this.#streamWorked = true;
    this.#awaitClose();
    if (!this.#out.length) this.#finishClose?.();
    this.#pump();
  }

  /** Sends what can be sent, over what is there. */
  #pump(): void {
    if (this.#ended || !(this.#full ? this.#terms : this.#token)) return;
    const body = this.#body;
    if (body?.open) return this.#fill(body);
    // Ended, by us or by who read it, and nothing of it is to be confirmed.
    if (body && body.next <= this.#first) this.#replaceBody(body);
    if (this.#transport !== "post" && this.#droppedAt) return; // the resumption brings a new stream
    if (this.#due(this.#first) && !this.#body && !this.#posted) {
      const sending = this.#transport === "post" ? this.#post() : this.#stream();
      return void sending.catch(() => this.#fail()); // an own fetch may answer with anything
    }
    // "A POST with control frames alone may run beside it."
    if (this.#owesControl && !this.#postedControl) this.#postControl().catch(() => this.#fail());
  }

  /** At once, since the server may wait for it; or what carried the last one may be lost. */
  #acknowledge(): void {
    this.#ackDue = true;
    this.#pump();
  }

  /** The server waits for what would otherwise go with the next body. */
  get #owesControl(): boolean {
    return this.#ackDue || !!this.#pongs.length;
  }

  /** Acknowledgement and answers to pings go along with any body that is sent anyway. */
  #takeControl(): Bytes[] {
    const parts = this.#pongs;
    this.#pongs = [];
    // On an open stream, where each would cost a frame, not with every message.
    const due = this.#terms && this.#received > this.#acknowledged + (this.#body ? ACK_EVERY : 0);
    if (this.#ackDue || due) {
      this.#ackDue = false;
      this.#acknowledged = this.#received;
      parts.push(frame("ACK", encoder.encode(`${this.#received}`)));
    }
    return parts;
  }

  // Streaming

  /** "The uplink as long streaming POSTs", one after the other. */
  async #stream(): Promise<void> {
    const body = this.#body = new Exchange(this.#first, (body) => this.#fill(body));
    this.#startWatch(); // it may never be read
    const { status } = await this.#send(body);
    if (this.#ended || this.#body !== body) return; // confirmed, or ended by ourselves
    this.#endBody();
    // One that has worked was cut; one that has not may never work, or the network is down.
    const most = this.#streamWorked ? MAX_FAILURES : FIRST_FAILURES;
    if (status === 411 || status === 413 || !body.confirmed && ++this.#streamFailures > most) {
      this.#leaveTransport("post");
    } else if (isFinal(status)) return this.#fail();
    else if (this.#streamFailures) {
      this.#posted = body; // as if it were one: nothing is sent meanwhile
      await this.#pause(this.#streamFailures);
      this.#posted = undefined;
    }
    this.#acknowledge();
  }

  /** Gives a streaming body what is due, when its reader has asked. */
  #fill(body: Exchange): void {
    if (!body.open) return;
    if (body === this.#body && this.#due(this.#first)) this.#startWatch();
    if (!body.asked) return;
    if (body !== this.#body) { // a duplex request whose answer is still to come
      if (!body.total) body.write([frame("PING", EMPTY)]); // some fetches send no header before a byte
      return;
    }
    // Where much is received, what is no message adds up, too.
    const control = body.total - body.used;
    const parts = [...this.#takeControl(), ...this.#take(body, MAX_BODY - control)];
    if (parts.length) body.write(parts);
    // The body has had its share: what follows goes in another, once this one is confirmed.
    if (this.#due(Math.max(body.next, this.#first)) || body.total > MAX_BODY - MAX_CONTROL) {
      body.finish();
    }
    if (!body.open && body.next <= this.#first) this.#pump();
  }

  /** A duplex request is replaced as a whole: its resumption, which nobody notices, brings another. */
  #replaceBody(body: Exchange): void {
    this.#body = undefined;
    if (body !== this.#connection || !this.#terms!.resumeTimeout) return;
    this.#droppedAt = clock();
    this.#renewing = true;
    body.end();
  }

  #endBody(): void {
    this.#body?.end();
    this.#body = undefined;
    this.#stopWatch();
  }

  /** "A stream counts as working only while every message is confirmed within 3 s, the first within 1.5 s." */
  #startWatch(): void {
    this.#watch ??= setInterval(() => {
      const body = this.#body;
      if (!body || !this.#due(this.#first)) return this.#stopWatch();
      const patience = body.confirmed ? PATIENCE : body.total ? FIRST_PATIENCE : UNREAD_PATIENCE;
      if (++this.#quietWatches < patience) return;
      this.#leaveTransport(this.#transport === "duplex" ? "stream" : "post");
      if (body === this.#connection) { // its other half is our event stream
        body.open = false;
        this.#body = undefined;
      }
      this.#endBody();
      this.#acknowledge();
    }, WATCH_PERIOD);
  }

  #stopWatch(): void {
    clearInterval(this.#watch);
    this.#watch = undefined;
    this.#quietWatches = 0;
  }

  /** "Else it is abandoned for the next transport …. The client remembers that for the origin for ten minutes." */
  #leaveTransport(next: Transport): void {
    this.#transport = next;
    if ((this.#options.transport ?? "auto") === "auto") this.#unlearned = next;
  }

  // Posting

  /**
   * "All that is queued goes in one POST …. One message POST is in flight, the next batch collects
   * meanwhile." On crossws's wire one message a request.
   */
  async #post(): Promise<void> {
    let since = 0;
    for (let retries = 0; !this.#ended && this.#due(this.#first);) {
      const batch = this.#posted = new Exchange(this.#first);
      const parts = [...this.#takeControl(), ...this.#take(batch, this.#full ? this.#maxBatch : 0)];
      const body = concat(parts);
      const { status } = await this.#send(batch, body, POST_TIMEOUT + body.length / 8);
      if (this.#first > batch.first) since = retries = 0; // as told by the answer, or by the event stream
      // Whoever says 413, a proxy, too: a message that is too large alone is "also 413".
      else if (status === 413 && batch.next === batch.first + 1) {
        return this.#end(1009, "Message too large", false);
      } else if (isFinal(status) && status !== 413 || !this.#full) return this.#fail();
      else {
        this.#ackDue = true; // what it carried may be lost
        if (status === 413) {
          this.#maxBatch = batch.used >> 1;
          continue;
        }
        since ||= clock();
        const patience = this.#terms!.resumeTimeout || OPEN_TIMEOUT;
        if (!await this.#pause(++retries, since + patience)) return this.#fail();
      }
    }
    this.#posted = undefined;
    this.#pump();
  }

  async #postControl(): Promise<void> {
    for (let retries = 0; this.#owesControl && !this.#ended;) {
      const exchange = this.#postedControl = new Exchange();
      const { response } = await this.#send(exchange, concat(this.#takeControl()), POST_TIMEOUT);
      if (response?.ok) continue;
      if (isFinal(exchange.status)) this.#hangUp(); // the resume will tell what is the matter
      else {
        this.#ackDue = true;
        await this.#pause(++retries);
      }
    }
    this.#postedControl = undefined;
  }

  /** Sends one body and takes what its answer confirms. */
  async #send(exchange: Exchange, bytes?: Bytes, timeout?: number): Promise<Exchange> {
    await this.#ask(exchange, { bytes, timeout });
    const { response, first } = exchange;
    if (response) exchange.finish(); // before another is begun
    response?.body?.cancel().catch(() => {});
    if (response?.ok) {
      this.#confirm(this.#full ? Number(response.headers.get(RECEIVED_HEADER)) : first);
    }
    return exchange;
  }

  // --- Ends ---

  /** The server's close: its own, or the answer to ours. Ours goes out, then the socket is closed. */
  #onClose({ code, reason, sent }: { code: number; reason: string; sent: number }): void {
    if (this.#ended || this.#finishClose) return;
    if (!Number.isInteger(code) || typeof reason !== "string") return this.#distrust();
    const ours = this.#readyState === CLOSING;
    const wasClean = ours || this.#received === sent;
    this.#deliver(() => {
      if (this.#readyState === OPEN) this.#readyState = CLOSING;
    });
    this.#endBody();
    this.#transport = "post";
    this.#finishClose = () => this.#end(code, reason, wasClean);
    clearTimeout(this.#deadline);
    // If the server cannot be told, that is no reason to keep the page waiting.
    this.#deadline = setTimeout(this.#finishClose, CLOSE_ANSWER_TIMEOUT);
    if (!ours) this.#enqueueClose(code === 1005 ? undefined : code, encoder.encode(reason));
    else if (!this.#out.length) this.#finishClose();
    else this.#pump();
  }

  /** A server that answers nothing must not hold us; one that takes what is queued has its time. */
  #awaitClose(): void {
    if (this.#readyState !== CLOSING || this.#finishClose) return;
    clearTimeout(this.#deadline);
    this.#deadline = setTimeout(() => this.#fail(), this.#terms!.resumeTimeout || OPEN_TIMEOUT);
  }

  /** As a WebSocket fails: `error`, then `close` with 1006; "quietly" without the former. */
  #fail(quietly = false): void {
    if (this.#finishClose) this.#finishClose();
    else this.#end(1006, "", false, !quietly);
  }

  /** Stops everything on the network at once; the last events come in their turn. */
  #end(code: number, reason: string, wasClean: boolean, failed = !wasClean && code === 1006): void {
    if (this.#ended) return;
    this.#ended = true;
    clearInterval(this.#ticker);
    clearTimeout(this.#deadline);
    clearTimeout(this.#ackTimer);
    this.#hangUp();
    for (const wake of this.#pauses) wake();
    this.#options.signal?.removeEventListener("abort", this.#abort);
    if ("document" in globalThis) globalThis.removeEventListener("pagehide", this.#leave);
    this.#deliver(() => {
      this.#readyState = CLOSED;
      if (failed) this.dispatchEvent(new Event("error"));
      this.dispatchEvent(closeEvent(code, reason, wasClean));
    });
  }

  /** A page that is left sends what is unacknowledged and CLOSE, as far as 64 KiB of keepalive go. */
  #pageHides(): void {
    if (this.#ended) return;
    if (this.#terms) {
      if (this.#readyState === OPEN) this.#enqueueClose(1001, EMPTY);
      const last = new Exchange(this.#first);
      const bytes = concat(this.#take(last, MAX_KEEPALIVE, false));
      this.#ask(last, { bytes, keepalive: true });
    }
    this.#end(1001, "", false);
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

// --- One request ---

/**
 * One request: an event stream, or messages on their way up, as bytes or as a stream that is
 * filled when its reader asks, so that what waits goes as one chunk. The duplex transport's is both.
 */
class Exchange {
  readonly abort: AbortController = new AbortController();
  response: Response | undefined;
  /** Of the event stream. */
  reader: Reader | undefined;
  /** Ticks of half a heartbeat since its last byte. */
  quietTicks = 0;

  /** The body, where it streams. */
  readonly stream: ReadableStream<Bytes> | undefined;
  open = false;
  asked = false;
  wroteSinceTick = false;
  /** Something has been confirmed while this body was in use. */
  confirmed = false;
  /** The number of the first message, if there may be one. */
  readonly first: number;
  /** The number of the next message. */
  next: number;
  /** Bytes of the streaming body so far. */
  total = 0;
  /** Bytes of messages so far. */
  used = 0;
  #controller!: ReadableStreamDefaultController<Bytes>;

  constructor(first = 0, fill?: (body: Exchange) => void) {
    this.first = this.next = first;
    if (!fill) return;
    this.open = true;
    this.stream = new ReadableStream<Bytes>({
      start: (controller) => {
        this.#controller = controller;
      },
      pull: () => {
        this.asked = true;
        fill(this);
      },
      cancel: () => {
        this.open = false;
      },
    }, { highWaterMark: 0 });
  }

  /** 0 before the answer. */
  get status(): number {
    return this.response?.status ?? 0;
  }

  get isStream(): boolean {
    return this.status === 200 &&
      !!this.response!.headers.get("content-type")?.startsWith(STREAM_TYPE);
  }

  /** Version 1 was granted. */
  get isFull(): boolean {
    return this.status === 200 && this.response!.headers.get(VERSION_HEADER) === VERSION;
  }

  /** Only when asked. */
  write(parts: Bytes[]): void {
    const chunk = concat(parts);
    this.total += chunk.length;
    this.wroteSinceTick = true;
    this.asked = false; // before enqueue, which may ask again
    this.#controller.enqueue(chunk);
  }

  /** A clean end of the body: all that was written is to arrive. */
  finish(): void {
    if (this.open) this.#controller.close();
    this.open = false;
  }

  /** Ends both directions; a read in progress ends, too. */
  end(): void {
    // Deno reports the error of a body that it has not begun to read as uncaught.
    if (!this.total) this.abort.abort();
    // By an error: an abort looks like the body's end to some, and would deliver a part.
    if (this.open) this.#controller.error(new Error("Abandoned"));
    this.open = false;
    this.reader?.cancel().catch(() => {});
    this.abort.abort();
  }
}

// --- Event streams ---

/** An incremental parser of Server-Sent Events. */
class EventParser {
  readonly #onEvent: (type: string, data: string) => void;
  #line = "";
  #type = "";
  #data: string | undefined;
  /** The CR at the end of the last chunk: it has ended a line, and an LF after it ends no other. */
  #cr = "";

  constructor(onEvent: (type: string, data: string) => void) {
    this.#onEvent = onEvent;
  }

  /** How many characters of an incomplete event are held. */
  get partial(): number {
    return this.#line.length + (this.#data?.length ?? 0);
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
        chunk[end + 1] === "\n" && this.#data === undefined && chunk.startsWith("data: ", at)
      ) this.#emit(chunk.slice(at + 6, end++));
      else this.#onLine(chunk, at, end);
    }
    this.#line += chunk.slice(at);
  }

  /** Comments, and the fields `id` and `retry`, mean nothing to us. */
  #onLine(text: string, at: number, end: number): void {
    if (at === end) return this.#emit(this.#data);
    const data = field("data", text, at, end);
    if (data === undefined) this.#type = field("event", text, at, end) ?? this.#type;
    else this.#data = this.#data === undefined ? data : `${this.#data}\n${data}`;
  }

  #emit(data: string | undefined): void {
    const type = this.#type;
    this.#type = "";
    this.#data = undefined;
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
 * Reads into one buffer again and again where that is possible: Deno allocates 64 KiB
 * for each read otherwise. What a read gives is valid until the next.
 */
function readerOf(body: ReadableStream<Uint8Array>): Reader {
  try {
    const reader = body.getReader({ mode: "byob" });
    let buffer = new ArrayBuffer(READ_SIZE);
    return {
      async read() {
        const chunk = await reader.read(new Uint8Array(buffer));
        if (chunk.value) buffer = chunk.value.buffer;
        return chunk;
      },
      cancel: () => reader.cancel(),
    };
  } catch {
    return body.getReader() as Reader; // not a stream of bytes
  }
}

// --- Small things ---

/** A frame of the uplink: WebSocket-over-HTTP. */
function frame(type: string, payload: Bytes): Bytes {
  return concat([
    encoder.encode(`${type} ${payload.length.toString(16)}\r\n`),
    payload,
    encoder.encode("\r\n"),
  ]);
}

/** What `send` takes; whatever is no bytes is a string. */
function toMessage(data: unknown): string | Bytes | Blob {
  if (data instanceof Blob) return data;
  if (ArrayBuffer.isView(data)) {
    if (!data.byteLength) return EMPTY; // the buffer may have gone elsewhere, which is no error
    return new Uint8Array(data.buffer as ArrayBuffer, data.byteOffset, data.byteLength);
  }
  // Shared ones are not everywhere, and those of another realm are of another class.
  const isBuffer = Object.prototype.toString.call(data).endsWith("ArrayBuffer]");
  if (!isBuffer) return `${data}`;
  return (data as ArrayBuffer).byteLength ? new Uint8Array(data as ArrayBuffer) : EMPTY;
}

function parseURL(value: string): URL {
  try {
    const { document, location } = globalThis as {
      document?: { baseURI?: string };
      location?: { href: string };
    };
    const url = new URL(value, document?.baseURI ?? location?.href);
    if (/^(http|ws)s?:[^#]*$/.test(url.href)) return url;
  } catch {
    // told below
  }
  throw new DOMException(`${value} is no URL for a WebSocket`, "SyntaxError");
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

function learn(host: string, transport: Transport): void {
  learned.delete(host); // the oldest stand first
  if (learned.size >= MAX_LEARNED) learned.delete(learned.keys().next().value!);
  learned.set(host, { transport, until: clock() + LEARNED_FOR });
}

/** Node 20 has no CloseEvent. */
function closeEvent(code: number, reason: string, wasClean: boolean): Event {
  const init = { code, reason, wasClean };
  return globalThis.CloseEvent
    ? new CloseEvent("close", init)
    : Object.assign(new Event("close"), init);
}

/** "The client retries on network errors, 408, 411, 425, 429 and 5xx …; any other status is final." */
function isTransient(status: number): boolean {
  return [0, 408, 411, 425, 429].includes(status) || status >= 500;
}

function isFinal(status: number): boolean {
  return status >= 300 && !isTransient(status);
}

/** Deno, Bun and Node, whose fetch answers while the request's body is still being sent. */
function isRuntime(): boolean {
  const { process, document } = globalThis as {
    process?: { versions?: { node?: string } };
    document?: unknown;
  };
  return !!process?.versions?.node && !document;
}

/** Whether anything this page has of the origin came over HTTP/2 or 3. */
function speaksHTTP2(target: string): boolean {
  const { origin } = new URL(target);
  return performance.getEntries().some((entry) =>
    entry.name.startsWith(origin) &&
    /^h[23]/.test((entry as { nextHopProtocol?: string }).nextHopProtocol ?? "")
  );
}

/** Milliseconds by a clock that nobody sets. */
function clock(): number {
  return performance.now();
}

/** After more microtasks than a read takes that need not wait for the network. */
async function soon(): Promise<void> {
  await undefined;
  await undefined;
  await undefined;
}

/** Runs something in a task of its own, sooner than a timer would. */
function nextTask(task: () => void): void {
  const { setImmediate } = globalThis as { setImmediate?: (task: () => void) => void };
  if (setImmediate) setImmediate(task);
  else {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      task();
    };
    port2.postMessage(0);
  }
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

function fromBase64(text: string): Bytes {
  return (Uint8Array as { fromBase64?: (text: string) => Bytes }).fromBase64?.(text) ??
    Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}
