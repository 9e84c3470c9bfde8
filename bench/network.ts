/**
 * A conversation over a network that cuts: `network.ts server` and `network.ts client`, each a
 * process of its own. A native WebSocket reconnects by partysocket, as an application would have it.
 *
 * @module
 */
import process from "node:process";
import ReconnectingWebSocket from "partysocket/ws";
import { WebSocketSSE } from "../client.ts";
import { sseAdapter } from "../server.ts";
import { answer } from "./rpc.ts";

type Kind = "native" | "ours";

/** One message, each way, so often, in ms. */
const EVERY = 10;
const PADDING = "x".repeat(1000);
const BLOCK = new Uint8Array(64 * 1024);
/** What a flood may have waiting, in bytes. */
const AHEAD = 4 * 1024 * 1024;

// --- The server: it sends to whoever is connected, and counts what comes ---

interface Peer {
  send(data: string | Uint8Array): unknown;
  buffered(): number;
}

const peers = new Set<Peer>();
const heard = new Set<number>();
let sent = 0;
let timer: ReturnType<typeof setInterval> | undefined;

function send(): void {
  sent++;
  for (const peer of peers) peer.send(`${sent} ${Date.now()} ${PADDING}`);
}

function flood(): void {
  for (const peer of peers) while (peer.buffered() < AHEAD) peer.send(BLOCK);
}

const hear = (text: string) => void heard.add(parseInt(text));

function serve(): number {
  const ours = new Map<unknown, Peer>();
  const adapter = sseAdapter({
    bidir: true,
    hooks: {
      open(peer) {
        const one: Peer = {
          send: (data) => peer.send(data),
          buffered: () => peer.bufferedAmount,
        };
        ours.set(peer, one);
        peers.add(one);
      },
      message: (_, message) => hear(message.text()),
      close: (peer) => void peers.delete(ours.get(peer)!),
    },
  });
  const hostname = "127.0.0.1";
  // deno-lint-ignore no-explicit-any
  const { Bun } = globalThis as { Bun?: { serve(options: any): { port: number } } };
  if (!Bun) {
    const handler: Deno.ServeHandler = (request, info) => {
      if (!request.headers.has("upgrade")) return adapter.fetch(request, info);
      const { socket, response } = Deno.upgradeWebSocket(request);
      const peer: Peer = {
        send: (data) => socket.readyState === 1 && socket.send(data as string),
        buffered: () => socket.bufferedAmount,
      };
      socket.onopen = () => peers.add(peer);
      socket.onclose = () => peers.delete(peer);
      socket.onerror = () => peers.delete(peer);
      socket.onmessage = ({ data }) => hear(data);
      return response;
    };
    return Deno.serve({ port: 0, hostname, onListen: () => {} }, handler).addr.port;
  }
  return Bun.serve({
    port: 0,
    hostname,
    idleTimeout: 0,
    // deno-lint-ignore no-explicit-any
    fetch(request: Request, server: any) {
      if (!request.headers.has("upgrade")) return adapter.fetch(request, server);
      if (!server.upgrade(request, { data: {} })) return new Response("Upgrade");
    },
    websocket: {
      backpressureLimit: 8 * AHEAD,
      // deno-lint-ignore no-explicit-any
      open(socket: any) {
        const buffered = () => socket.getBufferedAmount();
        socket.data.peer = { send: (data) => socket.send(data), buffered } satisfies Peer;
        peers.add(socket.data.peer);
      },
      // deno-lint-ignore no-explicit-any
      message: (_: any, data: string) => hear(data),
      // deno-lint-ignore no-explicit-any
      close: (socket: any) => void peers.delete(socket.data.peer),
    },
  }).port;
}

// --- The client ---

interface Socket {
  binaryType: string;
  onopen: ((event: never) => void) | null;
  onmessage: ((event: { data: unknown }) => void) | null;
  send(data: string): void;
  close(): void;
}

function open(kind: Kind, port: number): Socket {
  const socket = kind === "native"
    ? new ReconnectingWebSocket(`ws://127.0.0.1:${port}/`)
    : new WebSocketSSE(`http://127.0.0.1:${port}/`);
  return socket as unknown as Socket;
}

let socket: Socket | undefined;
let sending: ReturnType<typeof setInterval> | undefined;
let said = 0;
let bytes = 0;
const delays = new Map<number, number>();

function take(data: unknown): void {
  if (typeof data !== "string") return void (bytes += (data as ArrayBuffer).byteLength);
  const [number, time] = data.split(" ", 2);
  delays.set(Number(number), Date.now() - Number(time));
}

/** Of what has come, in ms. */
function quantile(share: number): number {
  const sorted = [...delays.values()].sort((a, b) => a - b);
  return sorted[Math.floor(share * (sorted.length - 1))]!;
}

const client = {
  async open({ kind, port }: { kind: Kind; port: number }): Promise<void> {
    delays.clear();
    bytes = 0;
    socket = open(kind, port);
    socket.binaryType = "arraybuffer";
    socket.onmessage = ({ data }) => take(data);
    await new Promise<void>((resolve) => socket!.onopen = () => resolve());
  },
  talk(): void {
    said = 0;
    sending = setInterval(() => socket!.send(`${++said} ${PADDING}`), EVERY);
  },
  hush(): void {
    clearInterval(sending);
  },
  close() {
    socket!.close();
    return { said, received: delays.size, p50: quantile(0.5), p99: quantile(0.99), bytes };
  },
};

const server = {
  port: serve,
  talk(): void {
    sent = 0;
    heard.clear();
    timer = setInterval(send, EVERY);
  },
  flood(): void {
    timer = setInterval(flood, 1);
  },
  hush() {
    clearInterval(timer);
    return { sent, heard: heard.size };
  },
};

if (process.argv[2] === "server") answer(server);
else answer(client);
