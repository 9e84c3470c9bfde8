/**
 * The standard is the oracle: the same hooks are served over native WebSockets
 * (by crossws) and by our server, and the same assertions hold for the runtime's
 * `WebSocket` and for each transport of `WebSocketSSE`.
 *
 * @module
 */
import type { Hooks } from "crossws";
import { type Transport, WebSocketSSE, type WebSocketSSEOptions } from "../client.ts";
import { sseAdapter, type SSEOptions } from "../server.ts";
import { once, runtime, test, type TestContext } from "./harness.ts";

/** What both kinds of socket are to the assertions. */
export type Socket = WebSocket;

/** One implementation of the standard, client and server. */
export interface Target {
  readonly name: string;
  readonly native: boolean;
  readonly transport: Transport | undefined;
  /** Makes a socket; it is closed when the test ends. */
  socket(t: TestContext, url: string | URL, protocols?: string | string[]): Socket;
  /** Serves the hooks; the URL ends without a slash. */
  serve(t: TestContext, hooks?: Partial<Hooks>): Promise<string>;
}

const transports: Transport[] = ["duplex", "stream", "post"];

export const ours: Target[] = transports.map((transport) => ({
  name: `WebSocketSSE, ${transport}`,
  native: false,
  transport,
  socket: (t, url, protocols) =>
    connect(t, url, { transport, ...protocols !== undefined && { protocols } }) as Socket,
  serve: (t, hooks = echo) => serveSSE(t, { hooks }),
}));

export const native: Target = {
  name: "WebSocket",
  native: true,
  transport: undefined,
  socket: (t, url, protocols) => closing(t, new WebSocket(url, protocols)),
  serve: (t, hooks = echo) => serveNative(t, hooks),
};

/** Echoes text as text and bytes as bytes. */
export const echo: Partial<Hooks> = {
  message: (peer, message) =>
    void peer.send(
      typeof message.rawData === "string" ? message.text() : message.uint8Array(),
    ),
};

export interface ContractOptions {
  /** Why the runtime's own WebSocket cannot be asked, by runtime. */
  notNative?: { deno?: string; bun?: string; node?: string };
}

/** Declares one test for each implementation. */
export function contract(
  sentence: string,
  body: (t: TestContext, target: Target) => void | Promise<void>,
  { notNative = {} }: ContractOptions = {},
): void {
  // A deviation is said where the test is; it is no test that could not run.
  // What Node has natively is a client alone, and not in every version.
  const targets = runtime === "node" || notNative[runtime] ? ours : [native, ...ours];
  for (const target of targets) test(`${target.name}: ${sentence}`, (t) => body(t, target));
}

/** A `WebSocketSSE` that is closed when the test ends. */
export function connect(
  t: TestContext,
  url: string | URL,
  options: WebSocketSSEOptions = {},
): WebSocketSSE {
  return closing(t, new WebSocketSSE(url, options));
}

function closing<S extends EventTarget & { readyState: number; close(): void }>(
  t: TestContext,
  socket: S,
): S {
  t.defer(async () => {
    if (socket.readyState === 3) return;
    const closed = once(socket, "close");
    socket.close();
    await closed;
  });
  return socket;
}

/** Our server with these options; it is shut down when the test ends. */
export async function serveSSE(t: TestContext, options: SSEOptions = {}): Promise<string> {
  const resumeTimeout = runtime === "node" ? 6_000 : 2_000; // hosts run beside each other
  const adapter = sseAdapter({ bidir: true, resumeTimeout, ...options });
  const server = await t.serve(adapter.fetch);
  t.defer(() => adapter.close());
  return server.url;
}

/** What is used of Bun and of crossws's adapters, whose types would leak into the program. */
interface BunRuntime {
  serve(options: Record<string, unknown>): { port: number; stop(force: boolean): Promise<void> };
}
interface NativeAdapter {
  handleUpgrade(request: Request, info: unknown): Promise<Response>;
  websocket?: unknown;
}

async function serveNative(t: TestContext, hooks: Partial<Hooks>): Promise<string> {
  const specifier = `crossws/adapters/${runtime}`;
  const { default: adapt } = await import(specifier);
  const adapter: NativeAdapter = adapt({ hooks });
  const handler = (request: Request, info: unknown) => adapter.handleUpgrade(request, info);
  if (runtime === "deno") return (await t.serve(handler)).url;
  const { Bun } = globalThis as unknown as { Bun: BunRuntime };
  const server = Bun.serve({
    port: 0,
    hostname: "127.0.0.1",
    fetch: handler,
    websocket: adapter.websocket,
  });
  t.defer(() => server.stop(true));
  return `http://127.0.0.1:${server.port}`;
}

/** Opens a socket to a path of the server, and waits until it is open. */
export async function open(
  t: TestContext,
  target: Target,
  hooks?: Partial<Hooks>,
): Promise<Socket> {
  const socket = target.socket(t, (await target.serve(t, hooks)).replace("http", "ws"));
  await once(socket, "open");
  return socket;
}

/** The data of the next messages, in order. */
export function messages(socket: EventTarget, count: number): Promise<unknown[]> {
  const data: unknown[] = [];
  return new Promise((resolve, reject) => {
    const listener = (event: Event) => {
      data.push((event as MessageEvent).data);
      if (data.length < count) return;
      socket.removeEventListener("message", listener);
      resolve(data);
    };
    socket.addEventListener("message", listener);
    socket.addEventListener("close", (event) => {
      if (data.length >= count) return;
      const { code, reason } = event as CloseEvent;
      reject(new Error(`closed after ${data.length} of ${count} messages: ${code} ${reason}`));
    });
  });
}

/** The names of all events of a socket, in the order of their dispatch. */
export function record(socket: EventTarget): string[] {
  const names: string[] = [];
  for (const name of ["open", "message", "error", "close"]) {
    socket.addEventListener(name, () => names.push(name));
  }
  return names;
}
