/**
 * Bulk, up and down, by real clients: `bulk.ts server` and `bulk.ts client`, each a
 * process of its own.
 *
 * @module
 */
import process from "node:process";
import { WebSocketSSE } from "../client.ts";
import { sseAdapter } from "../server.ts";
import { answer } from "./rpc.ts";

type Kind = "native" | "raw" | "post" | "ours";

/** What is sent: so many messages of one size. */
interface Load {
  binary: boolean;
  size: number;
  count: number;
}

/** What a sender may have waiting. */
const AHEAD = 4 * 1024 * 1024;
/** The last byte of the last message. */
const LAST = "!";

const nextTask = () => new Promise((resolve) => setTimeout(resolve));

function messageOf({ binary, size }: Load, end = "x"): string | Uint8Array<ArrayBuffer> {
  const text = end.padStart(size, "x");
  return binary ? new TextEncoder().encode(text) : text;
}

function isLast(data: string | Uint8Array): boolean {
  return typeof data === "string" ? data.endsWith(LAST) : data.at(-1) === LAST.charCodeAt(0);
}

// --- The server ---

interface Sender {
  send(data: string | Uint8Array): void;
  /** Resolves when there is room. */
  ready(): Promise<void> | undefined;
}

/** Answers the last message; what is JSON asks for messages down. */
async function onMessage(sender: Sender, data: string | Uint8Array): Promise<void> {
  if (typeof data === "string" && data.startsWith("{")) {
    const load: Load = JSON.parse(data);
    const message = messageOf(load);
    for (let i = 0; i < load.count; i++) {
      sender.send(message);
      await sender.ready();
    }
  } else if (isLast(data)) sender.send("done");
}

async function untilBelow(buffered: () => number): Promise<void> {
  while (buffered() > AHEAD) await nextTask();
}

function serve(): number {
  const adapter = sseAdapter({
    bidir: true,
    maxMessageSize: 4 * 1024 * 1024,
    hooks: {
      message(peer, { rawData }) {
        const sender: Sender = {
          send: (data) => void peer.send(data),
          ready: () =>
            peer.bufferedAmount > 0 ? peer.waitForDrain({ threshold: AHEAD }) : undefined,
        };
        void onMessage(sender, rawData as string | Uint8Array); // not what the window is about
      },
    },
  });
  const hostname = "127.0.0.1";
  const { Bun } = globalThis as {
    // deno-lint-ignore no-explicit-any
    Bun?: { serve(options: any): { port: number } };
  };
  if (!Bun) {
    const handler: Deno.ServeHandler = (request, info) => {
      const { pathname } = new URL(request.url);
      if (pathname === "/raw") return raw(request);
      if (pathname !== "/native") return adapter.fetch(request, info);
      const { socket, response } = Deno.upgradeWebSocket(request);
      socket.binaryType = "arraybuffer";
      const sender: Sender = {
        send: (data) => socket.send(data as string),
        ready: () => untilBelow(() => socket.bufferedAmount),
      };
      socket.onmessage = ({ data }) =>
        onMessage(sender, typeof data === "string" ? data : new Uint8Array(data));
      return response;
    };
    return Deno.serve({ port: 0, hostname, onListen: () => {} }, handler).addr.port;
  }
  return Bun.serve({
    port: 0,
    hostname,
    idleTimeout: 0,
    maxRequestBodySize: Number.MAX_SAFE_INTEGER,
    // deno-lint-ignore no-explicit-any
    fetch(request: Request, server: any) {
      const { pathname } = new URL(request.url);
      if (pathname === "/raw") return raw(request);
      if (pathname !== "/native") return adapter.fetch(request, server);
      if (!server.upgrade(request)) return new Response("Upgrade");
    },
    websocket: {
      maxPayloadLength: 8 * 1024 * 1024,
      backpressureLimit: 8 * AHEAD,
      // deno-lint-ignore no-explicit-any
      message(socket: any, data: string | Uint8Array) {
        const sender: Sender = {
          send: (data) => socket.send(data),
          ready: () => untilBelow(() => socket.getBufferedAmount()),
        };
        return onMessage(sender, data);
      },
    },
  }).port;
}

/** The limit of the platform: bytes, as they come, or chunk after chunk. */
async function raw(request: Request): Promise<Response> {
  if (request.body) {
    const reader = request.body.getReader();
    while (!(await reader.read()).done);
    return new Response("done");
  }
  const load: Load = JSON.parse(request.headers.get("x-load")!);
  const chunk = messageOf({ ...load, binary: true }) as Uint8Array<ArrayBuffer>;
  let left = load.count;
  return new Response(
    new ReadableStream<Uint8Array<ArrayBuffer>>({
      pull(controller) {
        if (left--) controller.enqueue(chunk);
        else controller.close();
      },
    }, { highWaterMark: 0 }),
  );
}

// --- The client ---

interface Socket {
  binaryType: string;
  readonly bufferedAmount: number;
  onopen: (() => void) | null;
  onerror: (() => void) | null;
  onmessage: ((event: { data: unknown }) => void) | null;
  send(data: string | Uint8Array): void;
  close(): void;
}

async function open(kind: Kind, port: number): Promise<Socket> {
  const socket = kind === "native"
    ? new WebSocket(`ws://127.0.0.1:${port}/native`) as Socket
    : new WebSocketSSE(`http://127.0.0.1:${port}/`, {
      transport: kind === "post" ? "post" : "auto",
    }) as unknown as Socket;
  socket.binaryType = "arraybuffer";
  await new Promise<void>((resolve, reject) => {
    socket.onopen = resolve;
    socket.onerror = () => reject(new Error(`${kind} failed to open`));
  });
  return socket;
}

async function up(socket: Socket, load: Load): Promise<void> {
  const message = messageOf(load);
  const done = new Promise<unknown>((resolve) => socket.onmessage = resolve);
  for (let i = 1; i < load.count; i++) {
    socket.send(message);
    await untilBelow(() => socket.bufferedAmount);
  }
  socket.send(messageOf(load, LAST));
  await done;
}

async function down(socket: Socket, load: Load): Promise<void> {
  let left = load.count;
  await new Promise<void>((resolve) => {
    socket.onmessage = () => {
      if (!--left) resolve();
    };
    socket.send(JSON.stringify(load));
  });
}

async function rawUp(url: string, load: Load): Promise<void> {
  const chunk = messageOf({ ...load, binary: true }) as Uint8Array<ArrayBuffer>;
  let left = load.count;
  const body = new ReadableStream<Uint8Array<ArrayBuffer>>({
    pull(controller) {
      if (left--) controller.enqueue(chunk);
      else controller.close();
    },
  }, { highWaterMark: 0 });
  const answer = await fetch(url, { method: "POST", body, duplex: "half" } as RequestInit);
  await answer.text();
}

async function rawDown(url: string, load: Load): Promise<void> {
  const { body } = await fetch(url, { headers: { "x-load": JSON.stringify(load) } });
  const reader = body!.getReader();
  while (!(await reader.read()).done);
}

const commands = {
  /** Megabytes a second. */
  async transfer({ kind, port, direction, ...load }: Load & {
    kind: Kind;
    port: number;
    direction: "up" | "down";
  }) {
    const socket = kind === "raw" ? undefined : await open(kind, port);
    const url = `http://127.0.0.1:${port}/raw`;
    const started = performance.now();
    if (socket) await (direction === "up" ? up : down)(socket, load);
    else await (direction === "up" ? rawUp : rawDown)(url, load);
    const ms = performance.now() - started;
    socket?.close();
    return load.count * load.size / ms / 1000;
  },
};

if (process.argv[2] === "server") {
  const port = serve();
  answer({ port: () => port });
} else answer(commands);
