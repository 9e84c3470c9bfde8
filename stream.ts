/**
 * `WebSocketStream` over plain HTTP: a {@link WebSocketSSE} as two streams, with backpressure.
 *
 * {@link WebSocketStreamSSE} has the interface of Chromium's and the specification's
 * `WebSocketStream`. Who reads slowly slows the server down, whose `waitForDrain` waits for the
 * reader; who writes faster than the server takes waits in `write`. A dropped connection is
 * resumed beneath it, and nothing is lost.
 *
 * @example
 * ```ts ignore
 * import { WebSocketStreamSSE } from "jsr:@duplex/sse/stream";
 *
 * const { readable, writable } = await new WebSocketStreamSSE("https://example.com/chat").opened;
 * await writable.getWriter().write("hello");
 * for await (const message of readable) console.log(message);
 * ```
 *
 * @module
 */
import { WebSocketSSE, type WebSocketSSEOptions } from "./client.ts";

const OPEN = 1;
const MAX_REASON_BYTES = 123;
/** The server's default window: more would not be on its way in any case. */
const THRESHOLD = 256 * 1024;
/** For `waitForDrain`: less than nothing is never left, so that it waits for the end. */
const UNTIL_OVER = { threshold: -1 };

const encoder: TextEncoder = new TextEncoder();
const decoder: TextDecoder = new TextDecoder();

// --- Types ---

/** What comes of the server: text, or bytes. */
export type IncomingMessage = string | Uint8Array<ArrayBuffer>;

/** What goes to the server: text, or bytes. Anything else is made a string, as the standard has it. */
export type OutgoingMessage = string | ArrayBuffer | ArrayBufferView;

/** The options of {@link WebSocketStreamSSE}: those of the standard, and those of {@link WebSocketSSE}. */
export interface WebSocketStreamSSEOptions extends WebSocketSSEOptions {
  /** Subprotocols to offer; a list, as in the standard. Default: none. */
  protocols?: string[] | undefined;
  /** Ends the opening when it aborts. Once the session is open it does nothing. */
  signal?: AbortSignal | undefined;
  /**
   * In bytes: a write resolves when no more than that is unacknowledged. 0: when the server has
   * received all. Default: 262,144.
   */
  threshold?: number | undefined;
  /** The class beneath, as one of your own with other defaults. Default: {@link WebSocketSSE}. */
  WebSocket?: (new (url: string | URL, options: WebSocketSSEOptions) => WebSocketSSE) | undefined;
}

/** What {@link WebSocketStreamSSE.opened} resolves to. */
export interface WebSocketOpenInfo {
  /** Messages of the server. To cancel it closes the session. */
  readable: ReadableStream<IncomingMessage>;
  /** Messages to the server. To close or abort it closes the session. */
  writable: WritableStream<OutgoingMessage>;
  /** Always "". */
  extensions: string;
  /** The subprotocol that the server chose, or "". */
  protocol: string;
}

/** What {@link WebSocketStreamSSE.closed} resolves to. */
export interface WebSocketCloseInfo {
  /** As of a `close` event. */
  closeCode: number;
  /** As of a `close` event. */
  reason: string;
}

/** What a close may say. */
export interface WebSocketCloseOptions {
  /** 1000, or 3000 to 4999. Default: 1000 where there is a reason; else none, which is seen as 1005. */
  closeCode?: number | undefined;
  /** At most 123 bytes of UTF-8. Default: "". */
  reason?: string | undefined;
}

/** Closes the session with what an abort or a cancellation was given. */
type Closer = (reason: unknown) => void;

// --- WebSocketStreamSSE: the face ---

/**
 * A `WebSocketStream` over plain HTTP: same constructor, same promises and streams, same errors.
 *
 * Beyond the standard: a message that waits in the readable can be read after an end that was not
 * clean, too; and the options of {@link WebSocketSSE}.
 *
 * @example Upload a file, no faster than the server takes it
 * ```ts
 * import { WebSocketStreamSSE } from "@duplex/sse/stream";
 *
 * export async function upload(url: string, file: Blob): Promise<number> {
 *   const stream = new WebSocketStreamSSE(url, { protocols: ["upload.v1"] });
 *   const { writable } = await stream.opened;
 *   await file.stream().pipeTo(writable); // closes the session at its end
 *   return (await stream.closed).closeCode;
 * }
 * ```
 */
export class WebSocketStreamSSE {
  readonly #socket: WebSocketSSE;
  readonly #opened: Deferred<WebSocketOpenInfo> = deferred();
  readonly #closed: Deferred<WebSocketCloseInfo> = deferred();
  readonly #forgetSignal: () => void;
  /** Undefined until it is open. */
  #streams: { incoming: Incoming; outgoing: Outgoing } | undefined;

  /**
   * Begins to connect.
   *
   * @param url `http:`, `https:`, `ws:` or `wss:`; relative to the page where there is one.
   * @param options Of the standard, and ours.
   * @throws {TypeError} No URL, or an option of another type.
   * @throws {DOMException} SyntaxError and SecurityError, as `WebSocket` throws them.
   */
  constructor(url: string | URL, options: WebSocketStreamSSEOptions = {}) {
    if (!arguments.length) throw new TypeError("No URL");
    checkOptions(options);
    const { WebSocket = WebSocketSSE, threshold = THRESHOLD, signal, ...others } = options ?? {};
    const opening = new AbortController();
    if (signal?.aborted) opening.abort();
    const protocols = [...others.protocols ?? []];
    const socket = new WebSocket(url, { ...others, protocols, signal: opening.signal });
    socket.binaryType = "arraybuffer";
    this.#socket = socket;

    const abort = (): void => {
      this.#forgetSignal();
      this.#fail(signal!.reason);
      opening.abort();
    };
    this.#forgetSignal = () => signal?.removeEventListener("abort", abort);
    socket.addEventListener("open", () => this.#onOpen(threshold));
    socket.addEventListener("close", (event) => this.#onClose(event));
    if (signal?.aborted) this.#fail(signal.reason);
    else signal?.addEventListener("abort", abort);
  }

  /** The absolute URL as `ws:` or `wss:`. */
  get url(): string {
    return this.#socket.url;
  }

  /**
   * Resolves when the session is open. Rejects where it does not open: with the reason of the signal
   * that has aborted, else with a {@link WebSocketError}.
   */
  get opened(): Promise<WebSocketOpenInfo> {
    return this.#opened.promise;
  }

  /**
   * Resolves when the session has ended by a complete closing handshake, and the server had received
   * all that was written. Rejects otherwise: with a {@link WebSocketError}, or as {@link opened} has.
   */
  get closed(): Promise<WebSocketCloseInfo> {
    return this.#closed.promise;
  }

  /**
   * The socket beneath, for its `drop` and `resume` events, `stats`, `transport` and `resumed`. Its
   * `pause()` and `resume()` are the streams' own. Not of the standard.
   */
  get socket(): WebSocketSSE {
    return this.#socket;
  }

  /**
   * Starts the closing handshake: what was handed over before goes out before. A write that still
   * waits for another is rejected; to close {@link WebSocketOpenInfo.writable} sends them all.
   * Messages that come meanwhile are not read any more.
   *
   * @throws {TypeError} if it is given something else than an object.
   * @throws {DOMException} InvalidAccessError for another code, SyntaxError for a longer reason.
   */
  close(info: WebSocketCloseOptions = {}): void {
    const { closeCode, reason } = checkClose(info);
    this.#socket.close(closeCode ?? undefined, reason);
  }

  #onOpen(threshold: number): void {
    this.#forgetSignal();
    const socket = this.#socket;
    const close: Closer = (reason) => this.close(closeOf(reason));
    const incoming = new Incoming(socket, close);
    const outgoing = new Outgoing(socket, threshold, close, this.#closed.promise);
    this.#streams = { incoming, outgoing };
    this.#opened.resolve({
      ...{ readable: incoming.readable, writable: outgoing.writable },
      ...{ extensions: socket.extensions, protocol: socket.protocol },
    });
  }

  #onClose({ code, reason, wasClean }: CloseEvent): void {
    this.#forgetSignal();
    if (!this.#streams) {
      return this.#fail(failure("The WebSocket could not be opened", null, ""));
    }
    // The server does not receive any more what it has not received by now.
    const error = wasClean && !this.#socket.bufferedAmount
      ? undefined
      : failure("The WebSocket was not closed cleanly", code, reason);
    const { incoming, outgoing } = this.#streams;
    incoming.end(error);
    outgoing.end(error);
    if (error) this.#closed.reject(error);
    else this.#closed.resolve({ closeCode: code, reason });
  }

  #fail(error: unknown): void {
    this.#opened.reject(error);
    this.#closed.reject(error);
  }
}

export default WebSocketStreamSSE;

// --- The readable ---

/**
 * What comes down, at the pace of its reader: while a message waits in the stream's queue the socket
 * is paused. When the session is over, all that is left of it comes at once, and then its end.
 */
class Incoming {
  readonly readable: ReadableStream<IncomingMessage>;
  readonly #socket: WebSocketSSE;
  #controller!: ReadableStreamDefaultController<IncomingMessage>;
  #isCancelled = false;
  /** Nothing is gained by waiting any more. */
  #isOver = false;
  /** Of an end that was not clean, until the reader has had all that came before. */
  #error: WebSocketError | undefined;

  constructor(socket: WebSocketSSE, close: Closer) {
    this.#socket = socket;
    this.readable = new ReadableStream<IncomingMessage>({
      start: (controller) => {
        this.#controller = controller;
      },
      pull: () => this.#onPull(),
      cancel: (reason) => {
        this.#isCancelled = true;
        close(reason);
      },
    });
    socket.addEventListener("message", ({ data }) => this.#onMessage(data));
    socket.waitForDrain(UNTIL_OVER).then(() => {
      this.#isOver = true;
      socket.resume();
    });
  }

  end(error: WebSocketError | undefined): void {
    if (this.#isCancelled) return;
    this.#error = error;
    if (!error) this.#controller.close();
    else if (this.#hasRoom) this.#controller.error(error);
  }

  get #hasRoom(): boolean {
    return this.#controller.desiredSize! > 0;
  }

  #onPull(): void {
    if (this.#error) this.#controller.error(this.#error);
    else this.#socket.resume();
  }

  /** Not after a cancellation: the socket is closing then. */
  #onMessage(data: string | ArrayBuffer): void {
    this.#controller.enqueue(typeof data === "string" ? data : new Uint8Array(data));
    if (!this.#hasRoom && !this.#isOver) this.#socket.pause();
  }
}

// --- The writable ---

/** What goes up, at the pace of the server: a write waits until little enough is unacknowledged. */
class Outgoing {
  readonly writable: WritableStream<OutgoingMessage>;
  readonly #socket: WebSocketSSE;
  readonly #threshold: number;
  /** Rejects when the session has ended, with what the stream then fails with. */
  readonly #end: Deferred<never> = deferred();
  #controller!: WritableStreamDefaultController;
  #isClosing = false;
  /** A write waits, and the session is over. */
  #isStuck = false;

  constructor(socket: WebSocketSSE, threshold: number, close: Closer, closed: Promise<unknown>) {
    this.#socket = socket;
    this.#threshold = threshold;
    this.writable = new WritableStream<OutgoingMessage>({
      start: (controller) => {
        this.#controller = controller;
      },
      write: (chunk) => this.#write(chunk),
      close: async () => {
        this.#isClosing = true;
        close(undefined);
        await closed;
      },
      abort: close,
    });
  }

  end(error: WebSocketError | undefined): void {
    if (this.#isClosing) return;
    const reason = this.#isStuck || !error ? closedError() : error;
    this.#controller.error(reason);
    this.#end.reject(reason);
  }

  async #write(chunk: unknown): Promise<void> {
    const message = toMessage(chunk);
    const socket = this.#socket;
    if (socket.readyState !== OPEN) throw closedError();
    socket.send(message);
    const threshold = this.#threshold;
    // `abort` waits for this write, which may wait for a server that stands still.
    await socket.waitForDrain({ threshold, signal: this.#controller.signal });
    if (socket.bufferedAmount <= threshold) return;
    this.#isStuck = true;
    await this.#end.promise; // not before `closed`: who looks at both in turn has then seen to both
  }
}

function closedError(): DOMException {
  return new DOMException("The WebSocket is closed", "InvalidStateError");
}

// --- Errors and closes ---

/** Makes one with any code. */
let failure: (message: string, closeCode: number | null, reason: string) => WebSocketError;

/**
 * The error of a session that did not open, or did not close cleanly. Given to `abort` of the
 * writable or `cancel` of the readable, it tells with which code and reason to close.
 *
 * @example
 * ```ts
 * import { WebSocketError, type WebSocketOpenInfo } from "@duplex/sse/stream";
 *
 * export async function stop({ readable }: WebSocketOpenInfo): Promise<void> {
 *   await readable.cancel(new WebSocketError("Seen enough", { closeCode: 4001, reason: "enough" }));
 * }
 * ```
 */
export class WebSocketError extends DOMException {
  #closeCode: number | null;
  #reason: string;

  /**
   * Makes one with the codes that a close may have.
   *
   * @param message For people. Default: "".
   * @param info The code and the reason of the close. Default: none.
   * @throws {TypeError} if `info` is something else than an object.
   * @throws {DOMException} InvalidAccessError for a code that is not 1000 or 3000 to 4999, SyntaxError
   * for a reason of over 123 bytes.
   */
  constructor(message = "", info: WebSocketCloseOptions = {}) {
    super(message, "WebSocketError");
    const { closeCode, reason } = checkClose(info);
    this.#closeCode = closeCode;
    this.#reason = reason;
  }

  /** The code with which the session closed, or is to be closed; null where there is none. */
  get closeCode(): number | null {
    return this.#closeCode;
  }

  /** The reason with which the session closed, or is to be closed. */
  get reason(): string {
    return this.#reason;
  }

  static {
    failure = (message, closeCode, reason) => {
      const error = new WebSocketError(message);
      error.#closeCode = closeCode;
      error.#reason = reason;
      return error;
    };
  }
}

/** What an abort or a cancellation tells of a close: a browser's own WebSocketError counts, too. */
function closeOf(reason: unknown): WebSocketCloseOptions {
  if (!(reason instanceof DOMException) || reason.name !== "WebSocketError") return {};
  const { closeCode, reason: text } = reason as DOMException & Partial<WebSocketError>;
  const info = { closeCode: closeCode ?? undefined, reason: text };
  try {
    checkClose(info);
    return info;
  } catch { // of a session that ended by what only a server may say, or by nothing, as by 1006
    return {};
  }
}

/** As Web IDL converts it, and the standard checks it. */
function checkClose(
  info: WebSocketCloseOptions | null,
): { closeCode: number | null; reason: string } {
  checkDictionary(info);
  const bytes = encoder.encode(`${info?.reason ?? ""}`);
  const given = info?.closeCode;
  const closeCode = given !== undefined ? Number(given) & 0xffff : bytes.length ? 1000 : null;
  if (closeCode !== null && closeCode !== 1000 && !(closeCode >= 3000 && closeCode <= 4999)) {
    throw new DOMException(`Close code ${closeCode} may not be used`, "InvalidAccessError");
  }
  if (bytes.length > MAX_REASON_BYTES) {
    throw new DOMException("The reason is over 123 bytes", "SyntaxError");
  }
  return { closeCode, reason: decoder.decode(bytes) };
}

// --- Small things ---

interface Deferred<T> {
  readonly promise: Promise<T>;
  resolve(value: T): void;
  reject(reason: unknown): void;
}

/** Where nobody looks at the promise, its rejection is no complaint. (Node 20 has no `withResolvers`.) */
function deferred<T>(): Deferred<T> {
  let settle: Pick<Deferred<T>, "resolve" | "reject">;
  const promise = new Promise<T>((resolve, reject) => settle = { resolve, reject });
  promise.catch(() => {});
  return { promise, ...settle! };
}

function checkOptions(options: WebSocketStreamSSEOptions | null): void {
  checkDictionary(options);
  const { protocols, signal, threshold = 0 } = options ?? {};
  if (
    protocols !== undefined && !(Object(protocols) === protocols && Symbol.iterator in protocols)
  ) {
    throw new TypeError("protocols must be a list");
  }
  if (signal !== undefined && !(signal instanceof AbortSignal)) {
    throw new TypeError("signal must be an AbortSignal");
  }
  if (!(threshold >= 0)) throw new TypeError("threshold must be a number of bytes");
}

/** As Web IDL has it: an object, or nothing. */
function checkDictionary(value: unknown): void {
  if (value !== undefined && value !== null && Object(value) !== value) {
    throw new TypeError("Not an object");
  }
}

/** As Web IDL converts it: bytes of memory that is neither shared nor resizable; else a string. */
function toMessage(chunk: unknown): string | ArrayBuffer | ArrayBufferView {
  const buffer = ArrayBuffer.isView(chunk) ? chunk.buffer : chunk;
  const tag = Object.prototype.toString.call(buffer); // those of another realm are of another class
  if (!tag.endsWith("ArrayBuffer]")) return `${chunk}`;
  if (tag.includes("Shared") || (buffer as { resizable?: boolean }).resizable) {
    throw new TypeError("Shared and resizable memory cannot be written");
  }
  return chunk as ArrayBuffer | ArrayBufferView;
}
