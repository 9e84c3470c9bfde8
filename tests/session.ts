/**
 * The two ends of a full session by hand: a client of raw requests for tests
 * of the server, and a scripted server, behind `fetch`, for tests of the client.
 *
 * @module
 */
import { rawRequest, type RawResponse } from "./harness.ts";

export interface Event {
  type: string;
  data: string;
}

/** The event stream of a raw request. */
export class EventStream implements AsyncDisposable {
  readonly response: RawResponse;
  #text = "";
  #decoder = new TextDecoder("utf-8", { ignoreBOM: true });

  constructor(response: RawResponse) {
    this.response = response;
  }

  get status(): number {
    return this.response.status;
  }

  /** The next event, comments left out; undefined at the end of the stream. */
  async next(): Promise<Event | undefined> {
    for (;;) {
      const end = this.#text.indexOf("\n\n");
      if (end < 0) {
        const chunk = await this.response.read();
        if (!chunk) return;
        this.#text += this.#decoder.decode(chunk, { stream: true });
        continue;
      }
      const lines = this.#text.slice(0, end).split("\n");
      this.#text = this.#text.slice(end + 2);
      const data = lines.filter((line) => line.startsWith("data: ")).map((line) => line.slice(6));
      const type = lines.find((line) => line.startsWith("event: "))?.slice(7) ?? "";
      if (data.length) return { type, data: data.join("\n") };
    }
  }

  /** The next event of this type; what comes before it is left out. "" is a message. */
  async until(type: string): Promise<string> {
    for (let event; (event = await this.next());) if (event.type === type) return event.data;
    throw new Error(`the stream ended before "${type}"`);
  }

  async messages(count: number): Promise<string[]> {
    const messages = [];
    while (messages.length < count) messages.push(await this.until(""));
    return messages;
  }

  /** Resolves when the server has ended the stream, in order or not. */
  async ended(): Promise<Event[]> {
    const rest = [];
    try {
      for (let event; (event = await this.next());) rest.push(event);
    } catch {
      // as good as its end
    }
    return rest;
  }

  drop(): void {
    this.response.destroy();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.response[Symbol.asyncDispose]();
  }
}

/** A client that does nothing by itself. */
export class RawSession {
  readonly port: number;
  readonly path: string;
  token = "";

  constructor(port: number, path = "/") {
    this.port = port;
    this.path = path;
  }

  #head(method: string, headers: Record<string, string | number>): string {
    const all = { host: "localhost", "x-duplex-version": 1, ...headers };
    const lines = Object.entries(all).map(([name, value]) => `${name}: ${value}\r\n`);
    return `${method} ${this.path} HTTP/1.1\r\n${lines.join("")}\r\n`;
  }

  async open(): Promise<EventStream> {
    const head = this.#head("GET", { accept: "text/event-stream" });
    const stream = new EventStream(await rawRequest(this.port, head));
    this.token = stream.response.headers.get("x-crossws-id") ?? "";
    return stream;
  }

  async resume(attempt: number, lastEventId: number): Promise<EventStream> {
    const head = this.#head("GET", {
      accept: "text/event-stream",
      "x-crossws-id": this.token,
      "x-duplex-attempt": attempt,
      "last-event-id": lastEventId,
    });
    return new EventStream(await rawRequest(this.port, head));
  }

  /** Sends frames; gives the status and what the server has received. */
  async send(frames: string, number?: number): Promise<[status: number, received: number]> {
    if (number) frames = seq(number) + frames;
    const head = this.#head("POST", {
      "x-crossws-id": this.token,
      "content-type": "application/websocket-events",
      "content-length": new TextEncoder().encode(frames).length,
      connection: "close",
    });
    await using response = await rawRequest(this.port, head + frames);
    return [response.status, Number(response.headers.get("x-duplex-received"))];
  }
}

/** Tells the number of the next message of a body. */
export const seq = (number: number | string): string =>
  `SEQ ${`${number}`.length.toString(16)}\r\n${number}\r\n`;

/** A frame of text. */
export const text = (data: string): string =>
  `TEXT ${new TextEncoder().encode(data).length.toString(16)}\r\n${data}\r\n`;

export const ack = (count: number): string =>
  `ACK ${`${count}`.length.toString(16)}\r\n${count}\r\n`;

/** 4000 is 0x0fa0, which is not UTF-8: 3127 is 0x0c37. */
export const CLOSE_3127 = "CLOSE 5\r\n\x0c\x37bye\r\n";

// ---------------------------------------------------------------- a scripted server

/** One request of the client, to be answered by the test. */
export interface Asked {
  readonly method: string;
  readonly headers: Headers;
  readonly body: string;
  readonly signal: AbortSignal;
  respond(status: number, headers?: Record<string, string>): void;
  /** As a network that fails. */
  fail(): void;
  /** Grants a full session, with an event stream that the test writes. */
  stream(terms?: Partial<Terms>, token?: string): ScriptedStream;
}

interface Terms {
  received: number;
  handled: number;
  next: number;
  attempt: number;
  resumeTimeout: number;
  heartbeatInterval: number;
  window: number;
}

export interface ScriptedStream {
  write(text: string): void;
  /** Ends it, as a proxy might. */
  end(): void;
  /** Breaks it. */
  fail(): void;
}

export const SCRIPTED_TOKEN = `${"ab".repeat(8)}.${"cd".repeat(16)}`;

/** Stands in for `fetch`. The test takes the requests one by one. */
export class ScriptedServer {
  readonly asked: Asked[] = [];
  #wake = () => {};

  readonly fetch = (_url: string, init?: RequestInit): Promise<Response> => {
    const { promise, resolve, reject } = Promise.withResolvers<Response>();
    const headers = new Headers(init!.headers);
    const signal = init!.signal!;
    signal.addEventListener("abort", () => reject(signal.reason));
    const body = init!.body instanceof Uint8Array ? new TextDecoder().decode(init!.body) : "";
    this.asked.push({
      method: init!.method!,
      headers,
      body,
      signal,
      respond: (status, headers = {}) => resolve(new Response(null, { status, headers })),
      fail: () => reject(new TypeError("network error")),
      stream: (terms, token) => {
        const { stream, response } = scripted(Number(headers.get("x-duplex-attempt") ?? 0), {
          next: Number(headers.get("last-event-id") ?? 0) + 1,
          ...terms,
        }, token);
        signal.addEventListener("abort", () => stream.fail());
        resolve(response);
        return stream;
      },
    });
    this.#wake();
    return promise;
  };

  /** The next request, as the client makes it. */
  async next(): Promise<Asked> {
    while (!this.asked.length) await new Promise<void>((resolve) => this.#wake = resolve);
    return this.asked.shift()!;
  }
}

function scripted(
  attempt: number,
  terms: Partial<Terms>,
  token = SCRIPTED_TOKEN,
): { stream: ScriptedStream; response: Response } {
  let controller!: ReadableStreamDefaultController<Uint8Array>;
  let open = true;
  const body = new ReadableStream<Uint8Array>({
    start: (given) => void (controller = given),
    cancel: () => void (open = false),
  });
  const encoder = new TextEncoder();
  const stop = (action: () => void) => {
    if (open) action();
    open = false;
  };
  const stream: ScriptedStream = {
    write: (text) => open && controller.enqueue(encoder.encode(text)),
    end: () => stop(() => controller.close()),
    fail: () => stop(() => controller.error(new TypeError("network error"))),
  };
  const state = {
    protocol: "",
    heartbeatInterval: 15_000,
    idleTimeout: 60_000,
    resumeTimeout: 5_000,
    maxMessageSize: 1_000_000,
    window: 262_144,
    received: 0,
    handled: 0,
    next: 1,
    attempt,
    ...terms,
  };
  stream.write(`event: duplex-open\ndata: ${JSON.stringify(state)}\n\n`);
  const response = new Response(body, {
    headers: {
      "content-type": "text/event-stream",
      "x-crossws-id": token,
      "x-duplex-version": "1",
    },
  });
  return { stream, response };
}
