/**
 * The last resort on both sides of the comparison: `polling.ts server <ours | socket.io>` echoes,
 * `polling.ts client <ours | socket.io>` talks to it by polls alone.
 *
 * @module
 */
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import process from "node:process";
import { WebSocketSSE } from "../client.ts";
import { sseAdapter } from "../server.ts";
import { answer } from "./rpc.ts";

export type Poller = "ours" | "socket.io";

const [role, name] = process.argv.slice(2) as ["server" | "client", Poller];
const { Bun } = globalThis as unknown as {
  Bun?: { serve(options: Record<string, unknown>): { port: number } };
};

if (role === "server") {
  let requests = 0;
  const port = await serve(() => void requests++);
  answer({ port: () => port, requests: () => requests });
} else {
  let socket: Socket;
  answer({
    open: async ({ port }) => void (socket = await open(port)),
    talk: ({ rate, seconds }) => talk(socket, rate, seconds),
    close: () => socket.close(),
  });
}

async function serve(count: () => void): Promise<number> {
  const hostname = "127.0.0.1";
  if (name === "ours") {
    const ws = sseAdapter({
      bidir: true,
      hooks: { message: (peer, message) => void peer.send(message.text()) },
    });
    const fetch = (request: Request, info: unknown) => {
      count();
      return ws.fetch(request, info);
    };
    if (Bun) return Bun.serve({ port: 0, hostname, idleTimeout: 0, fetch }).port;
    return Deno.serve({ port: 0, hostname, onListen: () => {} }, fetch).addr.port;
  }
  const { Server } = await import("socket.io");
  const http = createServer();
  const io = new Server(http, { transports: ["polling"], serveClient: false });
  http.on("request", count); // after it: it takes the listeners that are there
  io.on("connection", (socket) => {
    socket.on("message", (text: string) => void socket.emit("message", text));
  });
  await new Promise<void>((resolve) => http.listen(0, hostname, resolve));
  return (http.address() as AddressInfo).port;
}

interface Socket {
  send(text: string): void;
  onmessage: (text: string) => void;
  close(): void;
}

async function open(port: number): Promise<Socket> {
  const url = `http://127.0.0.1:${port}/`;
  if (name === "ours") {
    const client = new WebSocketSSE(url, { transport: "poll" });
    await new Promise((resolve) => client.onopen = resolve);
    const socket: Socket = {
      send: (text) => client.send(text),
      onmessage: () => {},
      close: () => client.close(),
    };
    client.onmessage = ({ data }) => socket.onmessage(data);
    return socket;
  }
  const { io } = await import("socket.io-client");
  const client = io(url, { transports: ["polling"], upgrade: false });
  await new Promise<void>((resolve) => client.on("connect", resolve));
  const socket: Socket = {
    send: (text) => void client.emit("message", text),
    onmessage: () => {},
    close: () => void client.close(),
  };
  client.on("message", (text: string) => socket.onmessage(text));
  return socket;
}

/** So many messages a second; the milliseconds that half of their echoes took at most. */
async function talk(socket: Socket, rate: number, seconds: number): Promise<number> {
  const times: number[] = [];
  const sent: number[] = [];
  const count = rate * seconds;
  await new Promise<void>((resolve) => {
    socket.onmessage = (text) => {
      times.push(performance.now() - sent[Number(text)]!);
      if (times.length === count) resolve();
    };
    const timer = setInterval(() => {
      socket.send(`${sent.push(performance.now()) - 1}`);
      if (sent.length === count) clearInterval(timer);
    }, 1000 / rate);
  });
  return times.toSorted((a, b) => a - b)[times.length >> 1]!;
}
