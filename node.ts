/**
 * The server on Node: the adapter as a handler of `node:http`, `node:https` and `node:http2`, and as
 * a middleware of the frameworks that are built on them.
 *
 * One file, no import: it knows Node's requests and responses by what they can do. A host that makes
 * a `Request` by itself (srvx, Hono's server, Next.js and others) needs none of this, but `ws.fetch`.
 *
 * @example A server of its own
 * ```ts ignore
 * import { createServer } from "node:http";
 * import { toNodeHandler } from "@duplex/sse/node";
 * import { sseAdapter } from "@duplex/sse/server";
 *
 * const ws = sseAdapter({ bidir: true, hooks: { message: (peer, data) => void peer.send(`${data}`) } });
 * createServer(toNodeHandler(ws)).listen(8000);
 * ```
 *
 * @example In a framework, before whatever reads bodies
 * ```ts ignore
 * app.use(toNodeHandler(ws)); // Express, Connect, NestJS, Koa
 * app.addHook("onRequest", toNodeHandler(ws)); // Fastify
 * ```
 *
 * @module
 */

// --- Limits ---

/** What Node limits a whole request to, in ms, where nobody has chosen a limit. */
const DEFAULT_REQUEST_TIMEOUT = 300_000;
/** The most that is read of a body that nobody wants, in bytes, and for how long, in ms. */
const MAX_REST = 1024 * 1024;
const MAX_REST_TIME = 2_000;
/** How long an adapter may read on behind the end of its stream, in ms. */
const MAX_LAST_WORDS = 10_000;
/** How long its client has to take what is left of that, in ms. */
const MAX_LAST_BYTES = 30_000;

// --- Types ---

/** What is served: what `sseAdapter` returns, or any `fetch`. */
export interface FetchAdapter {
  /** Answers a request. */
  fetch(request: Request, info?: unknown): Response | Promise<Response>;
  /** Whether a request is for `fetch`, where there is a `next` for the others. Default: all are. */
  handles?(request: Request): boolean;
}

/** Options of {@link toNodeHandler}. */
export interface NodeHandlerOptions {
  /**
   * Told what has failed of an answer, and for which request; what `sseAdapter` knows of goes to its
   * own `onError`. Default: `console.error`.
   */
  onError?(error: unknown, context: NodeErrorContext): void;
}

/** Where an error came from that {@link NodeHandlerOptions.onError} is told of. */
export interface NodeErrorContext {
  /** No answer could be made; or its body failed, and the client's connection was cut. */
  readonly stage: "request" | "response";
  /** None, where no `Request` can be made of what came. */
  readonly request?: Request;
}

/** Goes on with what comes after this handler; an error is the framework's to answer. */
export type Next = (error?: Error) => unknown;

/** The part that is used of Node's `IncomingMessage` and `Http2ServerRequest`. */
export interface NodeRequest {
  /** As in Node. */
  readonly method?: string | undefined;
  /** As in Node. */
  readonly url?: string | undefined;
  /** As in Node. */
  readonly headers: Record<string, string | string[] | undefined>;
  /** As in Node. */
  readonly rawHeaders: string[];
  /** As in Node. */
  readonly socket: unknown;
  /** As in Node: the whole body has come. */
  readonly complete: boolean;
  /** As in Node: somebody has read of the body. */
  readonly readableDidRead: boolean;
  /** As in Node. */
  iterator(options?: { destroyOnReturn?: boolean }): AsyncIterator<Uint8Array>;
  /** As in Node. */
  setTimeout(milliseconds: number): unknown;
  /** As in Node. */
  on(event: string, listener: () => void): unknown;
  /** As in Node. */
  destroy(): unknown;
}

/** The part that is used of Node's `ServerResponse` and `Http2ServerResponse`. */
export interface NodeResponse {
  /** As in Node. */
  statusCode: number;
  /** As in Node. */
  readonly headersSent: boolean;
  /** As in Node: `end` was called. */
  readonly writableEnded: boolean;
  /** As in Node. */
  getHeader(name: string): number | string | string[] | undefined;
  /** As in Node. */
  setHeader(name: string, value: string | string[]): unknown;
  /** As in Node. */
  write(chunk: Uint8Array): boolean;
  /** As in Node; not in HTTP/2. */
  flushHeaders?(): unknown;
  /** As in Node. */
  end(): unknown;
  /** As in Node. */
  on(event: string, listener: () => void): unknown;
  /** As in Node. */
  off(event: string, listener: () => void): unknown;
}

/** The part that is used of Koa's context. */
export interface KoaContext {
  /** Node's own request. */
  readonly req: NodeRequest;
  /** Node's own response. */
  readonly res: NodeResponse;
  /** Whether Koa answers. */
  respond?: boolean | undefined;
  /** Koa's own word to the application of an error. */
  onerror?(error: unknown): void;
}

/** The part that is used of Fastify's request. */
export interface FastifyRequest {
  /** Node's own request. */
  readonly raw: NodeRequest;
}

/** The part that is used of Fastify's reply. */
export interface FastifyReply {
  /** Node's own response. */
  readonly raw: NodeResponse;
  /** Tells Fastify that it is not the one who answers. */
  hijack(): unknown;
}

/** What {@link toNodeHandler} returns: it tells by its arguments who calls it. */
export interface NodeHandler {
  /** A listener of Node's servers, and a middleware of Express and Connect. */
  (request: NodeRequest, response: NodeResponse, next?: Next): void;
  /** A middleware of Koa. */
  (context: KoaContext, next: () => Promise<unknown>): unknown;
  /** A hook of Fastify, for `onRequest`: later ones come when bodies have been read. */
  (request: FastifyRequest, reply: FastifyReply, done: Next): void;
}

// --- The handler ---

/**
 * Makes a handler of an adapter. Where there is a `next`, it takes the requests that `ws.handles`,
 * else all of them.
 *
 * A body lasts as long as its session, so the first one that streams lifts the server's
 * `requestTimeout` where that is Node's default of 300 s. One that you have chosen stays: then the
 * clients are cut by it, and resume.
 *
 * Mount it before body parsers: it answers 400 to a request whose body has been read.
 *
 * @example
 * ```ts
 * import { toNodeHandler } from "@duplex/sse/node";
 * import { sseAdapter } from "@duplex/sse/server";
 *
 * const handler = toNodeHandler(sseAdapter({ bidir: true }));
 * // createServer(handler), createSecureServer({ key, cert }, handler), app.use(handler)
 * ```
 */
export function toNodeHandler(ws: FetchAdapter, options: NodeHandlerOptions = {}): NodeHandler {
  const mount = { ws, options };
  // deno-lint-ignore no-explicit-any -- three kinds of callers, told from each other here
  return ((first: any, second: any, third?: Next): unknown => {
    if (typeof second === "function") return inKoa(mount, first, second);
    if (typeof second?.hijack === "function") return inFastify(mount, first, second, third!);
    handle(mount, new Exchange(first, second, first), third);
  }) as NodeHandler;
}

/** What {@link toNodeHandler} was given. */
interface Mount {
  readonly ws: FetchAdapter;
  readonly options: NodeHandlerOptions;
}

function handle({ ws, options }: Mount, exchange: Exchange, next?: Next): void {
  if (next && !exchange.isFor(ws)) return void next();
  exchange.answer(ws).catch((error) => {
    if (next && !exchange.begun) next(error as Error);
    else exchange.fail(error, options);
  });
}

async function inKoa(
  { ws, options }: Mount,
  context: KoaContext,
  next: () => Promise<unknown>,
): Promise<unknown> {
  const exchange = new Exchange(context.req, context.res, context);
  if (!exchange.isFor(ws)) return await next();
  context.respond = false;
  // Koa tells the application of a connection that was lost, as if that were a fault of its own.
  const tell = context.onerror;
  context.onerror = (error) => {
    if (!exchange.isLoss(error)) tell?.call(context, error);
  };
  await exchange.answer(ws).catch((error) => exchange.fail(error, options));
}

function inFastify(
  { ws, options }: Mount,
  request: FastifyRequest,
  reply: FastifyReply,
  done: Next,
): void {
  const exchange = new Exchange(request.raw, reply.raw, request);
  if (!exchange.isFor(ws)) return void done();
  reply.hijack();
  exchange.answer(ws).catch((error) => exchange.fail(error, options));
}

// --- One request and its answer ---

/** What frameworks know better than Node, being told which proxies to trust. */
interface Seen {
  /** The path before Express has cut the mount point off. */
  originalUrl?: string;
  protocol?: string;
  ip?: string;
}

/** What is no part of both kinds of requests, or not public. */
interface Socket {
  readonly destroyed?: boolean;
  readonly encrypted?: boolean;
  readonly remoteAddress?: string;
  readonly server?: { requestTimeout?: number };
}

/** A request of HTTP/2 is a stream of its connection, which can be ended alone. */
interface Http2Stream {
  readonly destroyed: boolean;
  readonly endAfterHeaders: boolean;
  destroy(): void;
}

class Exchange {
  readonly #incoming: NodeRequest & { readonly stream?: Http2Stream };
  readonly #outgoing: NodeResponse;
  readonly #socket: Socket;
  readonly #seen: Seen;
  /** None, where no `Request` can be made of what came. */
  readonly #request: Request | undefined;
  readonly #gone = new AbortController();
  #chunks: AsyncIterator<Uint8Array> | undefined;
  /** The host has said that it reads no more of the body. */
  #unwanted = false;

  constructor(incoming: NodeRequest, outgoing: NodeResponse, seen: object) {
    this.#incoming = incoming;
    this.#outgoing = outgoing;
    this.#socket = incoming.socket as Socket ?? {};
    this.#seen = seen;
    try {
      this.#request = this.#toRequest();
    } catch {
      // TRACE, a Host that is none: `answer` refuses them, a framework may know what to do.
    }
  }

  get begun(): boolean {
    return this.#outgoing.headersSent;
  }

  isFor(ws: FetchAdapter): boolean {
    return !!this.#request && (ws.handles?.(this.#request) ?? true);
  }

  /** Whether an error says only that the client has gone: Node's have a code, and no socket is left. */
  isLoss(error: unknown): boolean {
    return !!this.#socket.destroyed &&
      typeof (error as { code?: unknown } | null)?.code === "string";
  }

  async answer(ws: FetchAdapter): Promise<void> {
    const request = this.#request;
    this.#watch();
    if (!request) return await this.#reply(new Response("Malformed request\n", { status: 400 }));
    // The adapter sees that somebody else has the body, says so, and refuses.
    if (request.body && this.#incoming.readableDidRead) request.body.getReader();
    else if (request.body) this.#liftLimits();
    const hostname = this.#seen.ip ?? this.#socket.remoteAddress;
    await this.#reply(await ws.fetch(request, { remoteAddr: { hostname } }));
  }

  /** After a failure of what answers, or of the body of its answer. */
  fail(error: unknown, options: NodeHandlerOptions): void {
    if (this.#gone.signal.aborted) return; // nobody is there to be told
    const stage = this.begun ? "response" : "request";
    report(options, error, { stage, ...this.#request && { request: this.#request } });
    if (this.begun) return this.#cut();
    this.#outgoing.statusCode = 500;
    this.#outgoing.end();
  }

  #cut(): void {
    (this.#incoming.stream ?? this.#incoming).destroy();
  }

  // --- In ---

  #toRequest(): Request {
    const { method = "GET", rawHeaders, url = "/", headers } = this.#incoming;
    const received = new Headers();
    for (let i = 0; i < rawHeaders.length; i += 2) {
      // Those of HTTP/2 that begin with a colon are its request line.
      if (!rawHeaders[i]!.startsWith(":")) received.append(rawHeaders[i]!, rawHeaders[i + 1]!);
    }
    const scheme = this.#seen.protocol ?? (this.#socket.encrypted ? "https" : "http");
    const origin = `${scheme}://${headers[":authority"] ?? headers.host ?? "localhost"}`;
    const target = this.#seen.originalUrl ?? url;
    return new Request(target.startsWith("/") ? origin + target : new URL(target, origin), {
      method,
      headers: received,
      signal: this.#gone.signal,
      ...this.#hasBody(method) && { body: this.#toStream(), duplex: "half" },
    } as RequestInit);
  }

  #hasBody(method: string): boolean {
    const { headers, stream } = this.#incoming;
    if (method === "GET" || method === "HEAD") return false;
    if (stream) return !stream.endAfterHeaders;
    return "transfer-encoding" in headers || Number(headers["content-length"] ?? 0) > 0;
  }

  /** The body is not touched before somebody reads it: it may be for another handler. */
  #toStream(): ReadableStream<Uint8Array> {
    return new ReadableStream<Uint8Array>({
      pull: async (controller) => {
        const { done, value } = await this.#read();
        if (done) controller.close();
        else controller.enqueue(value);
      },
      // To destroy it would take the answer along: what is left is dropped after that.
      cancel: () => void (this.#unwanted = true),
    }, { highWaterMark: 0 });
  }

  async #read(): Promise<IteratorResult<Uint8Array, undefined>> {
    this.#chunks ??= this.#incoming.iterator({ destroyOnReturn: false });
    const { done, value } = await this.#chunks.next();
    if (done) return { done, value: undefined };
    // Not as a Buffer, whose `slice` copies nothing.
    return { done: false, value: new Uint8Array(value.buffer, value.byteOffset, value.length) };
  }

  /** A body that streams is as long as its session. */
  #liftLimits(): void {
    const { server } = this.#socket;
    if ("content-length" in this.#incoming.headers) return;
    // Node has but one for all requests of the server.
    if (server?.requestTimeout === DEFAULT_REQUEST_TIMEOUT) server.requestTimeout = 0;
    this.#incoming.setTimeout(0);
  }

  // --- Out ---

  #watch(): void {
    const gone = () => {
      if (!this.#outgoing.writableEnded) this.#gone.abort();
    };
    this.#outgoing.on("close", gone);
    this.#outgoing.on("error", gone);
    if ((this.#incoming.stream ?? this.#socket).destroyed) gone();
  }

  async #reply(response: Response): Promise<void> {
    const outgoing = this.#outgoing;
    if (this.#gone.signal.aborted) return void response.body?.cancel().catch(() => {});
    outgoing.statusCode = response.status;
    for (const [name, value] of response.headers) this.#setHeader(name, value);
    const streams = /^text\/event-stream/.test(response.headers.get("content-type") ?? "");
    if (streams) {
      this.#incoming.setTimeout(0);
      await this.#write(response.body, () => this.#awaitTaken());
      outgoing.end();
      // The adapter still reads: of a session that closes, its client's last frames are to come.
      if (this.#request?.body?.locked && !this.#unwanted) this.#awaitRest();
      else await this.#dropRest();
      return;
    }
    // What comes behind an unread body cannot be told from it. An end before all of that has come
    // would reset the connection, and perhaps the answer with it.
    const lingers = this.#hasRest && !this.#incoming.stream;
    if (lingers) outgoing.setHeader("connection", "close");
    await this.#write(response.body);
    if (lingers) outgoing.flushHeaders?.();
    if (lingers) await this.#dropRest();
    outgoing.end();
    if (!lingers) await this.#dropRest();
  }

  #setHeader(name: string, value: string): void {
    const before = this.#outgoing.getHeader(name);
    const all = before !== undefined && (name === "set-cookie" || name === "vary");
    this.#outgoing.setHeader(name, all ? [before, value].flat().map(String) : value);
  }

  async #write(body: ReadableStream<Uint8Array> | null, atEnd = () => {}): Promise<void> {
    const reader = body?.getReader();
    if (!reader) return;
    const { signal } = this.#gone;
    const stop = () => void reader.cancel(signal.reason).catch(() => {});
    signal.addEventListener("abort", stop);
    if (signal.aborted) stop();
    reader.closed.then(atEnd, () => {});
    for (;;) {
      const { done, value } = await reader.read();
      if (done || signal.aborted) break;
      if (!this.#outgoing.write(value)) await this.#drained();
    }
    signal.removeEventListener("abort", stop);
  }

  /** Once what was written is on its way, or nobody is there to take it. */
  #drained(): Promise<void> {
    return new Promise((resolve) => {
      const ready = () => {
        this.#outgoing.off("drain", ready);
        this.#outgoing.off("close", ready);
        resolve();
      };
      this.#outgoing.on("drain", ready);
      this.#outgoing.on("close", ready);
    });
  }

  /** The stream has ended: who takes no more of it must not hold its connection for ever. */
  #awaitTaken(): void {
    if (this.#gone.signal.aborted) return;
    const late = setTimeout(() => this.#cut(), MAX_LAST_BYTES);
    this.#outgoing.on("close", () => clearTimeout(late));
  }

  /** Reads and drops what the adapter has left of the body; cuts where that is too much. */
  async #dropRest(): Promise<void> {
    if (!this.#hasRest) return;
    const late = setTimeout(() => this.#cutRest(), MAX_REST_TIME);
    try {
      for (let left = MAX_REST; left > 0;) {
        const { done, value } = await this.#read();
        if (done) return;
        left -= value.length;
      }
      this.#cutRest();
    } catch {
      // The connection has gone, and the rest with it.
    } finally {
      clearTimeout(late);
    }
  }

  /** Leaves the rest of the body to the adapter, for a while. */
  #awaitRest(): void {
    if (!this.#hasRest || this.#gone.signal.aborted) return; // who has gone says no more
    const late = setTimeout(() => this.#cutRest(), MAX_LAST_WORDS);
    this.#incoming.on("close", () => clearTimeout(late));
  }

  get #hasRest(): boolean {
    return !!this.#request?.body && !this.#incoming.complete;
  }

  /** Not a connection that has gone on to the next request. */
  #cutRest(): void {
    if (this.#hasRest) this.#cut();
  }
}

function report(
  options: NodeHandlerOptions,
  error: unknown,
  context: NodeErrorContext,
): void {
  if (!options.onError) return console.error(`[duplex-sse] a ${context.stage} failed:`, error);
  try {
    options.onError(error, context);
  } catch (failure) { // anybody can bring a report about
    console.error("[duplex-sse] onError failed:", failure);
  }
}
