/**
 * A server in a child process, whose memory is its own, and a reader over a
 * bare socket that reads, and acknowledges, only when it is told to.
 *
 * @module
 */
import type { Peer, SSEAdapter, SSEOptions } from "../server.ts";
import { type Child, type Deferred, deferred, rawRequest, type RawResponse } from "./harness.ts";
import { type Runtime, spawn } from "./spawn.ts";

export const MB = 1024 * 1024;
/** The long versions: `DUPLEX_SOAK=1`. */
export const soak: boolean = process.env.DUPLEX_SOAK === "1";

/** What functions that run in the child are given. */
export interface MeasuredState {
  /** For the hooks to fill. */
  peers: Peer[];
  closed: { id: string; code?: number; reason?: string }[];
  drains: number;
  sent: number;
  most: number;
  /** Bytes given to all connections. */
  given: number;
  // deno-lint-ignore no-explicit-any
  notes: Record<string, any>;
  ws: SSEAdapter;
  /** A timer that works also where timers have been replaced. */
  later(milliseconds: number): Promise<void>;
  /** After a forced collection. */
  memory(): Promise<{ rss: number; heap: number }>;
}

export interface Command {
  id: number;
  source: string;
  args: unknown[];
}

export interface Answer {
  id: number;
  value?: unknown;
  error?: string;
}

export interface Measured extends AsyncDisposable {
  readonly port: number;
  readonly url: string;
  readonly child: Child;
  /** Runs a function in the child. It sees its arguments and nothing of this file. */
  run<A extends unknown[], R>(
    task: (state: MeasuredState, ...args: A) => R | Promise<R>,
    ...args: A
  ): Promise<R>;
}

/** Starts a server; `setup` runs in the child and returns the adapter's options. */
export async function measured(
  runtime: Runtime,
  setup: (state: MeasuredState) => SSEOptions,
): Promise<Measured> {
  const child = await spawn(runtime, "tests/fixtures/measured.ts", {
    args: [String(setup)],
    env: { DENO_V8_FLAGS: "--expose-gc" },
  });
  const { port } = await child.json<{ port: number }>();
  const pending = new Map<number, Deferred<unknown>>();
  let ids = 0;
  const reading = (async () => {
    for await (const line of child.lines()) {
      const { id, value, error } = JSON.parse(line) as Answer;
      if (error) pending.get(id)?.reject(new Error(error));
      else pending.get(id)?.resolve(value);
      pending.delete(id);
    }
    for (const { reject } of pending.values()) {
      reject(new Error(`the server has exited\n${child.stderr().slice(-4000)}`));
    }
  })();
  return {
    port,
    child,
    url: `http://127.0.0.1:${port}`,
    run<A extends unknown[], R>(task: (state: MeasuredState, ...args: A) => R, ...args: A) {
      const answer = deferred<unknown>();
      pending.set(++ids, answer as Deferred<unknown>);
      answer.promise.catch(() => {}); // a test that has failed may not wait for it
      child.send(JSON.stringify({ id: ids, source: String(task), args } satisfies Command));
      return answer.promise as Promise<never>;
    },
    async [Symbol.asyncDispose]() {
      await child[Symbol.asyncDispose]();
      await reading;
    },
  };
}

const decoder = new TextDecoder();

/** An event stream over a socket that is read only as far as `next` and `take` ask. */
export class RawStream implements AsyncDisposable {
  readonly response: RawResponse;
  readonly full: boolean;
  readonly port: number;
  token = "";
  /** Messages seen. */
  received = 0;
  #acknowledgedAt = 0;
  #bytes = 0;
  #text = "";
  #events: { type: string; data: string }[] = [];

  static async open(
    port: number,
    { full = true, path = "/", window = 256 * 1024 } = {},
  ): Promise<RawStream> {
    const version = full ? "x-duplex-version: 1\r\n" : "";
    const response = await rawRequest(
      port,
      `GET ${path} HTTP/1.1\r\nhost: x\r\naccept: text/event-stream\r\n${version}`,
    );
    const stream = new RawStream(port, response, full, window);
    const { type } = await stream.next();
    if (response.status !== 200 || type !== (full ? "duplex-open" : "crossws-id")) {
      throw new Error(`${response.status}`);
    }
    stream.token = response.headers.get("x-crossws-id")!;
    return stream;
  }

  readonly #window: number;

  constructor(port: number, response: RawResponse, full: boolean, window: number) {
    this.port = port;
    this.response = response;
    this.full = full;
    this.#window = window;
  }

  /** The next event of any kind. At the stream's end: type "end". */
  async next(): Promise<{ type: string; data: string }> {
    while (!this.#events.length) {
      const chunk = await this.response.read();
      if (!chunk) return { type: "end", data: "" };
      this.#bytes += chunk.length;
      this.#text += decoder.decode(chunk, { stream: true });
      const events = this.#text.split("\n\n");
      this.#text = events.pop()!;
      for (const event of events) this.#parse(event);
      if (this.full && this.#bytes - this.#acknowledgedAt > this.#window / 2) {
        this.#acknowledgedAt = this.#bytes;
        await this.acknowledge();
      }
    }
    return this.#events.shift()!;
  }

  /** The next message's data; other events are left out. */
  async message(): Promise<string> {
    for (;;) {
      const { type, data } = await this.next();
      if (type === "message" || type === "") return data;
      if (type === "end" || type.endsWith("close")) throw new Error(`${type} ${data}`);
    }
  }

  /** Tells the server what has been received. */
  async acknowledge(count: number = this.received): Promise<number> {
    const text = String(count);
    return await this.post(`ACK ${text.length.toString(16)}\r\n${text}\r\n`);
  }

  /** Sends a body of frames; the answer's status. */
  async post(body: string, headers: Record<string, string> = {}): Promise<number> {
    const response = await fetch(`http://127.0.0.1:${this.port}/`, {
      method: "POST",
      headers: {
        "content-type": "application/websocket-events",
        "x-crossws-id": this.token,
        ...headers,
      },
      body,
    });
    await response.body?.cancel();
    return response.status;
  }

  #parse(event: string): void {
    let type = "";
    const data: string[] = [];
    for (const line of event.split("\n")) {
      if (line.startsWith("event: ")) type = line.slice(7);
      else if (line.startsWith("data: ")) data.push(line.slice(6));
    }
    if (!data.length) return; // a comment
    this.#events.push({ type, data: data.join("\n") });
    if (["", "message", "duplex-json", "duplex-binary"].includes(type)) this.received++;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.response[Symbol.asyncDispose]();
  }
}
