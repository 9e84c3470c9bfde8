/**
 * A scripted server, behind `fetch`, for tests of the client: the test answers each request, and
 * writes the event streams.
 *
 * @module
 */

/** One request of the client, to be answered by the test. */
export interface Asked {
  readonly method: string;
  readonly headers: Headers;
  readonly body: string;
  readonly signal: AbortSignal;
  /** As the server itself: with its mark, unless `x-duplex-version` is "". */
  respond(status: number, headers?: Record<string, string>): void;
  /** As a network that fails. */
  fail(): void;
  /** Grants the stream, and says nothing on it. */
  stall(): void;
  /** Grants the stream, which breaks before it says anything. */
  cut(): void;
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
  idleTimeout: number;
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

const STREAM_HEADERS = {
  "content-type": "text/event-stream",
  "x-crossws-id": SCRIPTED_TOKEN,
  "x-duplex-version": "1",
};

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
      respond: (status, headers = {}) => {
        const all = new Headers({ "x-duplex-version": "1", ...headers });
        if (headers["x-duplex-version"] === "") all.delete("x-duplex-version");
        resolve(new Response(null, { status, headers: all }));
      },
      fail: () => reject(new TypeError("network error")),
      cut() {
        const body = new ReadableStream({
          pull: (controller) => controller.error(new TypeError("network error")),
        });
        resolve(new Response(body, { headers: STREAM_HEADERS }));
      },
      stall() {
        const body = new ReadableStream({
          start: (controller) =>
            signal.addEventListener(
              "abort",
              () => controller.error(new TypeError("network error")),
            ),
        });
        resolve(new Response(body, { headers: STREAM_HEADERS }));
      },
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

/** How a stream begins. */
export function preface(terms: Partial<Terms>): string {
  const all = {
    protocol: "",
    heartbeatInterval: 15_000,
    idleTimeout: 60_000,
    resumeTimeout: 5_000,
    maxMessageSize: 1_000_000,
    window: 262_144,
    received: 0,
    handled: 0,
    next: 1,
    attempt: 0,
    ...terms,
  };
  return `:\nevent: duplex-open\ndata: ${JSON.stringify(all)}\n\n`;
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
  stream.write(preface({ attempt, ...terms }));
  const response = new Response(body, {
    headers: { ...STREAM_HEADERS, "x-crossws-id": token },
  });
  return { stream, response };
}
