/**
 * A client by hand: it sends exactly the bytes and headers that a test says,
 * over a real connection or into an adapter's `fetch`, and reads the stream
 * event by event. And a server to misuse, with somebody else on it.
 *
 * @module
 */
import { type Hooks, type SSEAdapter, sseAdapter, type SSEOptions } from "../server.ts";
import {
  assertEquals,
  deferred,
  isHttp2,
  runtime,
  type TestContext,
  type TestServer,
  until,
  within,
} from "./harness.ts";
import net from "node:net";
import { Queue } from "./pair.ts";
import { concat } from "./split.ts";

export type Fetch = (request: Request) => Promise<Response>;
type Headers_ = Record<string, string>;
type Bytes = Uint8Array<ArrayBuffer>;

const encoder = new TextEncoder();
const bytesOf = (data: string | Uint8Array) =>
  (typeof data === "string" ? encoder.encode(data) : data) as Uint8Array<ArrayBuffer>;

/** A frame of the uplink, with the length that is right. */
export function frame(type: string, payload: string | Uint8Array = ""): Uint8Array<ArrayBuffer> {
  const bytes = bytesOf(payload);
  const head = encoder.encode(`${type} ${bytes.length.toString(16)}\r\n`);
  return concat([head, bytes, encoder.encode("\r\n")]) as Uint8Array<ArrayBuffer>;
}

/** A frame of text, to be joined with others. */
export const text = (data: string): string =>
  `TEXT ${encoder.encode(data).length.toString(16)}\r\n${data}\r\n`;

export const ack = (count: number): string =>
  `ACK ${`${count}`.length.toString(16)}\r\n${count}\r\n`;

/** Tells the number of the next message of a body. */
export const seq = (number: number | string): string =>
  `SEQ ${`${number}`.length.toString(16)}\r\n${number}\r\n`;

/** 4000 is 0x0fa0, which is not UTF-8: 3127 is 0x0c37. */
export const CLOSE_3127 = "CLOSE 5\r\n\x0c\x37bye\r\n";

/** The payload of a CLOSE. */
export function closePayload(code: number, reason: string | Uint8Array = ""): Uint8Array {
  return concat([new Uint8Array([code >> 8, code & 255]), bytesOf(reason)]);
}

/** A body whose messages count from this number. */
export function from<Body extends string | Uint8Array | ReadableStream>(
  number: number | string,
  body: Body,
): Body extends ReadableStream ? ReadableStream<Bytes> : Bytes {
  const head = frame("SEQ", `${number}`);
  const whole = body instanceof ReadableStream
    ? prefixed(head, body as ReadableStream<Uint8Array>)
    : concat([head, bytesOf(body)]);
  return whole as ReturnType<typeof from<Body>>;
}

function prefixed(head: Bytes, body: ReadableStream<Uint8Array>): ReadableStream<Bytes> {
  const reader = body.getReader();
  let begun = false;
  return new ReadableStream<Bytes>({
    async pull(controller) {
      if (!begun) {
        begun = true;
        return controller.enqueue(head);
      }
      const { done, value } = await reader.read();
      if (done) controller.close();
      else controller.enqueue(value as Bytes);
    },
    cancel: (reason) => reader.cancel(reason),
  }, { highWaterMark: 0 });
}

/** A body that goes as these chunks, and, unless it is to stay open, ends. */
export function streamOf(
  chunks: Iterable<string | Uint8Array>,
  { open = false, cancelled = () => {} }: { open?: boolean; cancelled?: () => void } = {},
): ReadableStream<Uint8Array<ArrayBuffer>> {
  const iterator = chunks[Symbol.iterator]();
  return new ReadableStream({
    pull(controller) {
      const { done, value } = iterator.next();
      if (!done) return controller.enqueue(bytesOf(value));
      if (!open) return controller.close();
      return new Promise(() => {});
    },
    cancel: cancelled,
  }, { highWaterMark: 0 });
}

/** The same body as runtimes that have byte streams give it: read into the reader's own buffer. */
export function byteStreamOf(chunks: Iterable<string | Uint8Array>): ReadableStream<Bytes> {
  const iterator = chunks[Symbol.iterator]();
  return new ReadableStream({
    type: "bytes",
    pull(controller) {
      let next = iterator.next();
      while (!next.done && !next.value.length) next = iterator.next(); // it takes no empty chunk
      if (!next.done) return controller.enqueue(bytesOf(next.value).slice());
      controller.close();
      controller.byobRequest?.respond(0);
    },
  });
}

/** A POST body by hand; a stream goes in chunks. */
export function post(
  url: string,
  headers: Headers_,
  body?: string | Uint8Array | ReadableStream | null,
  signal?: AbortSignal,
): Request {
  return new Request(url, {
    method: "POST",
    headers,
    ...signal && { signal },
    ...body !== undefined && body !== null &&
      { body: typeof body === "string" ? encoder.encode(body) : body as BodyInit },
    ...body instanceof ReadableStream && { duplex: "half" },
  } as RequestInit);
}

export interface WireEvent {
  /** "message" where none is named. */
  type: string;
  data: string;
}

/** The events of a stream, one by one. */
export class EventReader {
  /** The last that was given. */
  id = "";
  readonly #reader: ReadableStreamDefaultReader<Uint8Array>;
  readonly #decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  #text = "";

  constructor(body: ReadableStream<Uint8Array>) {
    this.#reader = body.getReader();
  }

  /** The next event, or the next of a type; undefined at the end of the stream. */
  async next(type?: string): Promise<WireEvent | undefined> {
    for (;;) {
      const event = await within(this.#next(), 5_000, `event ${type ?? ""}`);
      if (!event || type === undefined || event.type === type) return event;
    }
  }

  /** The data of the next event of a type; throws if there is none. */
  async find(type: string): Promise<string> {
    const event = await this.next(type);
    if (!event) throw new Error(`the stream ended before "${type}"`);
    return event.data;
  }

  async messages(count: number): Promise<string[]> {
    const messages = [];
    while (messages.length < count) messages.push(await this.find("message"));
    return messages;
  }

  /** Resolves when the server has ended the stream, in order or not. */
  async ended(): Promise<WireEvent[]> {
    const rest = [];
    try {
      for (let event; (event = await this.#next());) rest.push(event);
    } catch {
      // as good as its end
    }
    return rest;
  }

  async cancel(): Promise<void> {
    await this.#reader.cancel().catch(() => {});
  }

  async #next(): Promise<WireEvent | undefined> {
    for (;;) {
      const end = this.#text.indexOf("\n\n");
      if (end < 0) {
        const { done, value } = await this.#reader.read();
        if (done) return;
        this.#text += this.#decoder.decode(value, { stream: true });
        continue;
      }
      const lines = this.#text.slice(0, end).split("\n");
      this.#text = this.#text.slice(end + 2);
      const field = (name: string) =>
        lines.filter((line) => line.startsWith(`${name}: `)).map((l) => l.slice(name.length + 2));
      this.id = field("id")[0] ?? this.id;
      const data = field("data");
      if (data.length) return { type: field("event")[0] ?? "message", data: data.join("\n") };
    }
  }
}

/** What a client of either level must say to open. */
export const FULL: Headers_ = { accept: "text/event-stream", "x-duplex-version": "1" };
export const UPLINK: Headers_ = { "content-type": "application/websocket-events" };

/** POSTs of somebody's session that follow each other on one connection: their statuses, until it ends. */
export async function onOneConnection(
  port: number,
  requests: { path?: string; token: string; length: number; body?: Uint8Array }[],
): Promise<string[]> {
  if (isHttp2) return await onOneHttp2(port, requests);
  const socket = net.connect(port, "127.0.0.1");
  const ended = deferred();
  const answers = new Queue<string>();
  socket.on("error", () => {}); // what is still to be sent when the other end is gone
  socket.on("close", () => {
    ended.resolve();
    answers.push("ended");
  });
  socket.on("data", (data) => {
    for (const [, status] of `${data}`.matchAll(/HTTP\/1\.1 (\d+)/g)) answers.push(status!);
  });
  const statuses: string[] = [];
  try {
    for (const { path = "/", token, length, body } of requests) {
      const headers = {
        ...UPLINK,
        host: "127.0.0.1",
        "x-duplex-version": "1",
        "x-crossws-id": token,
      };
      const lines = Object.entries(headers).map(([name, value]) => `${name}: ${value}\r\n`);
      socket.write(`POST ${path} HTTP/1.1\r\n${lines.join("")}content-length: ${length}\r\n\r\n`);
      if (body) socket.write(body);
      statuses.push(await answers.next());
    }
  } finally {
    socket.destroy();
    await ended.promise;
  }
  return statuses;
}

async function onOneHttp2(
  port: number,
  requests: Parameters<typeof onOneConnection>[1],
): Promise<string[]> {
  const { connectHttp2, statusOf } = await import("./raw2.ts");
  const session = await connectHttp2(port);
  const statuses: string[] = [];
  for (const { path = "/", token, length, body } of requests) {
    if (session.closed || session.destroyed) {
      statuses.push("ended");
      continue;
    }
    const stream = session.request({
      ":method": "POST",
      ":path": path,
      ...UPLINK,
      "x-duplex-version": "1",
      "x-crossws-id": token,
      "content-length": `${length}`,
    }, { endStream: !body });
    const status = statusOf(stream);
    if (body) stream.end(body);
    stream.resume();
    statuses.push(await status);
  }
  const closed = new Promise((resolve) => session.once("close", resolve));
  if (!session.destroyed) {
    session.destroy();
    await closed;
  }
  return statuses;
}

export class NotOpened extends Error {
  readonly status: number;

  constructor(status: number, text: string) {
    super(`not opened: ${status} ${text}`);
    this.status = status;
  }
}

/** A client that does nothing by itself: one session, held by its stream. */
export class WireClient implements AsyncDisposable {
  readonly response: Response;
  readonly url: string;
  readonly events: EventReader;
  readonly #fetch: Fetch;
  readonly #full: boolean;
  token = "";
  /** What `duplex-open` said. */
  terms: Record<string, number | string> = {};
  seq = 1;
  /** Ends a duplex request; without it, its body would keep the connection. */
  #abort: AbortController | undefined;

  private constructor(fetch: Fetch, url: string, response: Response, full: boolean) {
    this.#fetch = fetch;
    this.url = url;
    this.response = response;
    this.events = new EventReader(response.body!);
    this.#full = full;
  }

  /** The resume secret and number of the last `id:` line. */
  get id(): string {
    return this.events.id;
  }

  static async open(
    fetch: Fetch,
    url: string,
    { full = true, headers = {} }: { full?: boolean; headers?: Headers_ } = {},
  ): Promise<WireClient> {
    const accept = full ? FULL : { accept: "text/event-stream" };
    const request = new Request(url, { headers: { ...accept, ...headers } });
    return await WireClient.of(fetch, url, await fetch(request), full);
  }

  /** With the uplink in the body of the request that opens. */
  static async duplex(
    fetch: Fetch,
    url: string,
    body: ReadableStream,
  ): Promise<WireClient> {
    const abort = new AbortController();
    const request = post(url, { ...FULL, ...UPLINK }, body, abort.signal);
    const peer = await WireClient.of(fetch, url, await fetch(request), true);
    peer.#abort = abort;
    return peer;
  }

  /** A stream that has just been answered. */
  static async of(
    fetch: Fetch,
    url: string,
    response: Response,
    full = true,
  ): Promise<WireClient> {
    if (response.status !== 200) {
      throw new NotOpened(response.status, await response.text());
    }
    const peer = new WireClient(fetch, url, response, full);
    peer.token = response.headers.get("x-crossws-id") ?? "";
    if (full) {
      peer.terms = JSON.parse(await peer.events.find("duplex-open"));
      peer.seq = Number(peer.terms.received) + 1;
    }
    return peer;
  }

  /** As the session's client that comes back; throws if it is refused. */
  async resume(attempt: number, lastEventId: number): Promise<WireClient> {
    const headers = {
      ...FULL,
      "x-crossws-id": this.token,
      "x-duplex-attempt": `${attempt}`,
      "last-event-id": `${lastEventId}`,
    };
    const response = await this.#fetch(new Request(this.url, { headers }));
    return await WireClient.of(this.#fetch, this.url, response);
  }

  next(type?: string): Promise<WireEvent | undefined> {
    return this.events.next(type);
  }

  /** The next message, whichever level. */
  message(): Promise<string> {
    return this.events.find("message");
  }

  /** The code that the server's close gives. */
  async closed(): Promise<number> {
    return JSON.parse(await this.events.find(this.#full ? "duplex-close" : "close")).code;
  }

  /** Sends frames, whose messages count from this number; the status, and what the server has received. */
  async frames(frames: string, number?: number): Promise<[status: number, received: number]> {
    const response = await this.post((number === undefined ? "" : seq(number)) + frames, UPLINK);
    await response.body?.cancel();
    return [response.status, Number(response.headers.get("x-duplex-received"))];
  }

  /** Sends a body; its messages count from the next number, unless it comes with headers of its own. */
  async post(
    body?: string | Uint8Array | ReadableStream | null,
    headers?: Headers_,
  ): Promise<Response> {
    if (this.#full && !headers && body) body = from(this.seq, body);
    headers ??= this.#full ? UPLINK : {};
    return await this.#fetch(post(this.url, {
      "x-crossws-id": this.token,
      ...this.#full ? { "x-duplex-version": "1" } : { "content-type": "text/plain" },
      ...headers,
    }, body));
  }

  /** Sends one text and returns the status. */
  async send(text: string): Promise<number> {
    const response = await this.post(this.#full ? frame("TEXT", text) : text);
    await response.body?.cancel();
    if (response.ok) this.seq++;
    return response.status;
  }

  /** Says, or answers, CLOSE. */
  async close(code = 1000): Promise<number> {
    const response = await this.post(frame("CLOSE", closePayload(code)));
    await response.body?.cancel();
    return response.status;
  }

  /** Drops the connection. */
  async drop(): Promise<void> {
    this.#abort?.abort();
    await this.events.cancel();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.drop().catch(() => {});
  }
}

/** A client of the full level, which ends with the test. */
export async function wireClient(
  t: TestContext,
  url: string,
  headers: Headers_ = {},
): Promise<WireClient> {
  return t.use(await WireClient.open((request) => fetch(request), url, { headers }));
}

/** What a hook was called with, in order. */
export interface Call {
  hook: string;
  detail: unknown;
}

/** A server that echoes and counts, with a bystander who must not notice anything. */
export class Scene {
  readonly ws: SSEAdapter;
  readonly calls: Call[] = [];
  readonly fetch: Fetch;
  readonly url: string;
  readonly port: number;
  readonly t: TestContext;

  private constructor(
    t: TestContext,
    ws: SSEAdapter,
    calls: Call[],
    server: { url: string; port: number; fetch: TestServer["fetch"] },
  ) {
    this.t = t;
    this.ws = ws;
    this.calls = calls;
    this.url = `${server.url}/room`;
    this.port = server.port;
    this.fetch = (request) => server.fetch(request);
  }

  static async make(
    t: TestContext,
    options: SSEOptions = {},
    hooks: Partial<Hooks> = {},
  ): Promise<Scene> {
    const calls: Call[] = [];
    // Those of the bystander are not counted.
    const log = (hook: string, namespace: string, detail: unknown) => {
      if (namespace !== "/bystander") calls.push({ hook, detail });
    };
    const ws = sseAdapter({
      bidir: true,
      // As long as a runtime may stall where all else is busy, too: what answers in time needs it.
      resumeTimeout: runtime === "node" ? 800 : 500, // hosts run beside each other
      ...options,
      hooks: {
        upgrade: (request) => {
          log("upgrade", new URL(request.url).pathname, request.method);
        },
        open: (peer) => log("open", peer.namespace, peer),
        message(peer, message) {
          log("message", peer.namespace, message.rawData);
          peer.send(message.rawData);
        },
        close: (peer, { code }) => log("close", peer.namespace, code),
        error: (peer, error) => log("error", peer.namespace, error),
        drain: (peer) => log("drain", peer.namespace, undefined),
        ping: (peer, data) => log("ping", peer.namespace, data),
        pong: (peer, data) => log("pong", peer.namespace, data),
        ...hooks,
      },
    });
    const server = await t.serve((request, info) => ws.fetch(request, info), { tls: isHttp2 });
    t.defer(() => ws.close());
    return new Scene(t, ws, calls, server);
  }

  /** The names of the hooks called, without those of admission. */
  hooks(...but: string[]): string[] {
    return this.calls.map(({ hook }) => hook).filter((hook) => !["upgrade", ...but].includes(hook));
  }

  /** How often a hook was called. */
  count(hook: string): number {
    return this.calls.filter((call) => call.hook === hook).length;
  }

  async open(options?: { full?: boolean; headers?: Headers_ }): Promise<WireClient> {
    return this.t.use(await WireClient.open(this.fetch, this.url, options));
  }

  async duplex(body: ReadableStream): Promise<WireClient> {
    return this.t.use(await WireClient.duplex(this.fetch, this.url, body));
  }

  /** A request by hand, whose answer is read to its end. */
  async ask(request: Request): Promise<{ status: number; headers: Headers; text: string }> {
    const { status, headers, ...response } = await this.fetch(request).then(async (response) => ({
      status: response.status,
      headers: response.headers,
      text: await response.text(),
    }));
    return { status, headers, ...response };
  }

  /** Ends what is there, and shows that the server goes on serving others and keeps nobody. */
  async check(bystander: WireClient | undefined): Promise<void> {
    if (bystander) {
      assertEquals(await bystander.send("still there?"), 204);
      assertEquals(await bystander.message(), "still there?");
      assertEquals(await bystander.close(), 204);
    }
    await until(() => this.ws.peers.size === 0 && this.count("close") >= this.count("open"));
    assertEquals(this.count("close"), this.count("open"), "close, once a session");
  }
}

/** Misuses a server while another peer is on it, who must be served afterwards as before. */
export async function misuse(
  t: TestContext,
  body: (scene: Scene) => Promise<void>,
  options: SSEOptions = {},
  hooks: Partial<Hooks> = {},
): Promise<void> {
  const scene = await Scene.make(t, options, hooks);
  const url = scene.url.replace("/room", "/bystander");
  const bystander = t.use(await WireClient.open(scene.fetch, url));
  await body(scene);
  await scene.check(options.bidir === false ? undefined : bystander);
}

/** Collects what goes to the console instead of printing it, until the test ends. */
export function quiet(t: TestContext): unknown[][] {
  const said: unknown[][] = [];
  for (const name of ["log", "error", "warn", "info", "debug"] as const) {
    const original = console[name];
    console[name] = (...args: unknown[]) => void said.push(args);
    t.defer(() => console[name] = original);
  }
  return said;
}
