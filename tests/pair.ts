/**
 * A server and its clients, for tests of what passes between them: queues of
 * what has happened, so that a test waits for events and never for time.
 *
 * @module
 */
import { type Transport, WebSocketSSE, type WebSocketSSEOptions } from "../client.ts";
import { type SSEAdapter, sseAdapter, type SSEOptions } from "../server.ts";
import {
  type Deferred,
  deferred,
  once,
  type ServeOptions,
  type TestContext,
  type TestServer,
  within,
} from "./harness.ts";

/** Things in the order they came, each taken once. */
export class Queue<T> {
  /** Everything that ever came. */
  readonly all: T[] = [];
  #taken = 0;
  #waiting: Deferred<void> | undefined;

  push(item: T): void {
    this.all.push(item);
    this.#waiting?.resolve();
    this.#waiting = undefined;
  }

  async next({ timeout = 5_000 } = {}): Promise<T> {
    while (this.#taken === this.all.length) {
      this.#waiting ??= deferred();
      await within(this.#waiting.promise, timeout, `item ${this.#taken + 1} of a queue`);
    }
    return this.all[this.#taken++]!;
  }

  /** The next so many. */
  async take(count: number, options?: { timeout?: number }): Promise<T[]> {
    const items: T[] = [];
    while (items.length < count) items.push(await this.next(options));
    return items;
  }

  /** How many have come and were not taken. */
  get left(): number {
    return this.all.length - this.#taken;
  }
}

export interface Pair<Context> extends TestServer {
  readonly ws: SSEAdapter<Context>;
}

/** What may stand between the runtime and the adapter. */
export type Around = (
  request: Request,
  next: (request: Request) => Promise<Response>,
) => Response | Promise<Response>;

/** Serves an adapter until the test ends. Bidirectional, if not told otherwise. */
export async function listen<Context extends Record<string, unknown>>(
  t: TestContext,
  options: SSEOptions<Context>,
  around?: Around,
  serving?: ServeOptions,
): Promise<Pair<Context>> {
  const ws = sseAdapter<Context>({ bidir: true, ...options });
  const server = await t.serve(
    around ? (request, info) => around(request, (request) => ws.fetch(request, info)) : ws.fetch,
    serving,
  );
  t.defer(() => shutDown(ws));
  return Object.assign(server, { ws });
}

/** An adapter that ends with the test. Bidirectional, if not told otherwise. */
export function adapter(t: TestContext, options: SSEOptions): SSEAdapter {
  const ws = sseAdapter({ bidir: true, ...options });
  t.defer(() => shutDown(ws));
  return ws;
}

/** Ends an adapter without waiting for clients that have gone. */
// deno-lint-ignore no-explicit-any
export async function shutDown(ws: SSEAdapter<any>): Promise<void> {
  await ws.close(1001, "", { signal: AbortSignal.abort() });
}

/** A socket of ours that is closed when the test ends, and keeps nothing of what comes. */
export function dial(
  t: TestContext,
  url: string,
  transport: Transport,
  options: WebSocketSSEOptions = {},
): WebSocketSSE {
  const socket = new WebSocketSSE(url, { transport, ...options });
  t.defer(() => closeAll([socket]));
  return socket;
}

export async function closeAll(sockets: WebSocketSSE[]): Promise<void> {
  await Promise.all(sockets.map(async (socket) => {
    if (socket.readyState === WebSocketSSE.CLOSED) return;
    const closed = once(socket, "close", { timeout: 8000 });
    socket.close();
    await closed;
  }));
}

export interface Connected {
  readonly socket: WebSocketSSE;
  /** The data of its messages. */
  readonly messages: Queue<unknown>;
  /** The types of all its events but messages. */
  readonly events: string[];
  readonly opened: Promise<void>;
  readonly closed: Promise<CloseEvent>;
}

/** A socket of ours that ends with the test. */
export function connect(
  t: TestContext,
  url: string,
  init: WebSocketSSEOptions = {},
): Connected {
  const socket = new WebSocketSSE(url, { signal: t.signal, ...init });
  socket.binaryType = "arraybuffer";
  const messages = new Queue<unknown>();
  const events: string[] = [];
  const opened = deferred();
  const closed = deferred<CloseEvent>();
  for (const type of ["open", "error", "close", "drop", "resume"]) {
    socket.addEventListener(type, () => void events.push(type));
  }
  socket.addEventListener("message", (event) => messages.push(event.data));
  socket.addEventListener("open", () => opened.resolve());
  socket.addEventListener("close", (event) => closed.resolve(event));
  return {
    socket,
    messages,
    events,
    // Getters: a limit that nobody waits for would outlive the test.
    get opened() {
      return within(opened.promise, 10_000, "opening");
    },
    get closed() {
      return within(closed.promise, 10_000, "closing");
    },
  };
}

/** The clock, turned by hand from where it stands. */
export function handClock(t: TestContext): { time: number } {
  const { now } = performance;
  const clock = { time: now.call(performance) };
  t.defer(() => performance.now = now);
  performance.now = () => clock.time;
  return clock;
}
