/**
 * Real clients, in a process of their own, on the same runtime as the server.
 *
 * @module
 */
import { WebSocketSSE } from "../client.ts";
import { BATCH, text } from "./message.ts";
import { answer } from "./rpc.ts";
import { roundTrips, type Socket } from "./trips.ts";

type Kind = "native" | "raw" | "crossws" | "ours";

async function open(kind: Kind, port: number, transport?: "post"): Promise<Socket> {
  const url = `http://127.0.0.1:${port}/?topics=0`;
  const socket = await make(kind, url, transport);
  await new Promise<void>((resolve, reject) => {
    socket.onopen = resolve;
    socket.onerror = () => reject(new Error(`${kind} failed to open`));
  });
  // crossws's client is open before it can send
  if (kind === "crossws") await new Promise((resolve) => setTimeout(resolve, 200));
  return socket;
}

async function make(kind: Kind, url: string, transport?: "post"): Promise<Socket> {
  if (kind === "native") return new WebSocket(url.replace("http", "ws")) as Socket;
  if (kind === "raw") return await stream(url);
  if (kind === "ours") {
    return new WebSocketSSE(url, { transport: transport ?? "auto" }) as Socket;
  }
  const scope = globalThis as { EventSource?: unknown };
  scope.EventSource ??= (await import("eventsource")).EventSource; // Bun has none
  const { WebSocketSSE: Crossws } = await import("crossws/websocket/sse");
  return new Crossws(url) as Socket;
}

/** The limit of the platform: one streaming request of the runtime's own, and nothing else. */
async function stream(url: string): Promise<Socket> {
  const encoder = new TextEncoder();
  const decoder = new TextDecoder();
  const { readable, writable } = new TransformStream<Uint8Array, Uint8Array>();
  const up = writable.getWriter();
  up.write(encoder.encode("hello")); // some send no header before a byte
  const abort = new AbortController();
  const { signal } = abort;
  const init = { method: "POST", body: readable, duplex: "half", signal } as RequestInit;
  const down = (await fetch(url, init)).body!.getReader();
  await down.read();
  const socket: Socket = {
    onopen: null,
    onmessage: null,
    onerror: null,
    send: (text) => void up.write(encoder.encode(text)),
    close: () => abort.abort(),
  };
  const read = async () => {
    for (let chunk = await down.read(); !chunk.done; chunk = await down.read()) {
      socket.onmessage?.({ data: decoder.decode(chunk.value) });
    }
  };
  read().catch(() => {}); // aborted
  setTimeout(() => socket.onopen?.());
  return socket;
}

answer({
  /** Echoes, one after the other; milliseconds. */
  async roundTrip({ kind, port, trips }) {
    return await roundTrips(await open(kind, port), trips);
  },

  /** Bursts up, each when one has been answered; messages per second. */
  async uplink({ kind, port, bursts, ahead }) {
    const socket = await open(kind, port);
    const started = performance.now();
    await new Promise<void>((resolve) => {
      let sent = 0;
      let answered = 0;
      const send = () => {
        if (sent++ < bursts) { for (let i = 0; i < BATCH; i++) socket.send(text(i)); }
      };
      socket.onmessage = () => {
        if (++answered === bursts) resolve();
        else send();
      };
      for (let i = 0; i < ahead; i++) send();
    });
    const rate = bursts * BATCH / (performance.now() - started) * 1000;
    socket.close();
    return rate;
  },

  /** Offers messages at a fixed rate by `post`, for so long, whatever becomes of them. */
  async offer({ port, rate, seconds }) {
    const socket = await open("ours", port, "post");
    const started = performance.now();
    let sent = 0;
    await new Promise<void>((resolve) => {
      const timer = setInterval(() => {
        const passed = Math.min(seconds, (performance.now() - started) / 1000);
        while (sent < passed * rate) socket.send(text(sent++));
        if (passed < seconds) return;
        clearInterval(timer);
        resolve();
      }, 5);
    });
    socket.close();
    return sent;
  },
});
