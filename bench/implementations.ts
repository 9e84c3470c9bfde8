/**
 * What is compared, each as plain as its documentation shows it. All subscribe
 * a connection to the topics that its URL names, and take messages the same way.
 *
 * @module
 */
import crosswsAdapter from "crossws/adapters/sse";
import { sseAdapter } from "../server.ts";

export type Name = "native" | "raw" | "crossws" | "ours";

export interface Implementation {
  // deno-lint-ignore no-explicit-any
  fetch(request: Request, info: any): Response | Promise<Response> | undefined;
  /** What Bun.serve wants for its own WebSocket. */
  websocket?: unknown;
  publish(topic: string, text: string): void;
  /** How many are connected. */
  count(): number;
}

/** A message from a client, and how to answer its sender. */
export type OnMessage = (text: string, reply: (text: string) => void) => void;

/** `?topics=3` is the topics 0, 1 and 2; one by default. */
function topicsOf(request: Request): string[] {
  const count = Number(/topics=(\d+)/.exec(request.url)?.[1] ?? 1);
  return Array.from({ length: count }, (_, i) => `${i}`);
}

class Topics<Peer> {
  readonly peers = new Set<Peer>();
  readonly #topics = new Map<string, Set<Peer>>();

  add(peer: Peer, topics: string[]): void {
    this.peers.add(peer);
    for (const topic of topics) {
      if (!this.#topics.has(topic)) this.#topics.set(topic, new Set());
      this.#topics.get(topic)!.add(peer);
    }
  }

  delete(peer: Peer): void {
    this.peers.delete(peer);
    for (const peers of this.#topics.values()) peers.delete(peer);
  }

  of(topic: string): Iterable<Peer> {
    return this.#topics.get(topic) ?? [];
  }
}

/** Deno's WebSocket: a loop of `send`, since it has no publish. */
function nativeDeno(onMessage: OnMessage): Implementation {
  const sockets = new Topics<WebSocket>();
  return {
    fetch(request) {
      // The load answers no pings.
      const { socket, response } = Deno.upgradeWebSocket(request, { idleTimeout: 0 });
      socket.onopen = () => sockets.add(socket, topicsOf(request));
      socket.onmessage = ({ data }) => onMessage(data, (text) => socket.send(text));
      socket.onclose = () => sockets.delete(socket);
      return response;
    },
    publish(topic, text) {
      for (const socket of sockets.of(topic)) socket.send(text);
    },
    count: () => sockets.peers.size,
  };
}

interface BunSocket {
  data: string[];
  subscribe(topic: string): void;
  send(text: string): void;
}

/** Bun's WebSocket, with its native publish. */
function nativeBun(onMessage: OnMessage): Implementation {
  // deno-lint-ignore no-explicit-any
  let server: any;
  let count = 0;
  return {
    fetch(request, info) {
      server = info;
      if (!server.upgrade(request, { data: topicsOf(request) })) return new Response("Upgrade");
    },
    websocket: {
      idleTimeout: 0,
      open(socket: BunSocket) {
        for (const topic of socket.data) socket.subscribe(topic);
        count++;
      },
      message(socket: BunSocket, text: string) {
        onMessage(text, (reply) => socket.send(reply));
      },
      close: () => count--,
    },
    publish: (topic, text) => server.publish(topic, text),
    count: () => count,
  };
}

/** The limit of the platform: one encoding for all, one enqueue per message, and nothing else. */
function raw(): Implementation {
  type Controller = ReadableStreamDefaultController<Uint8Array>;
  const streams = new Topics<Controller>();
  const encoder = new TextEncoder();
  const decoder = new TextDecoder();
  /** Those of pages, which cannot read an answer while they still send. */
  const named = new Map<string, Controller>();
  const echoTo = async (stream: Controller, body: ReadableStream<Uint8Array<ArrayBuffer>>) => {
    for await (const chunk of body) {
      stream.enqueue(encoder.encode(`data: ${decoder.decode(chunk)}\n\n`));
    }
    return new Response(null, { status: 204 });
  };
  return {
    fetch(request) {
      const [, to] = /[?&]to=([\w-]+)/.exec(request.url) ?? [];
      if (to) return echoTo(named.get(to)!, request.body!);
      if (request.body) return echo(request.body);
      const [, id = ""] = /[?&]id=([\w-]+)/.exec(request.url) ?? [];
      let controller: Controller;
      const stream = new ReadableStream<Uint8Array<ArrayBuffer>>({
        start(given) {
          controller = given;
          controller.enqueue(encoder.encode(":\n\n"));
          streams.add(controller, topicsOf(request));
          if (id) named.set(id, controller);
        },
        cancel() {
          streams.delete(controller);
          named.delete(id);
        },
      });
      return new Response(stream, { headers: { "content-type": "text/event-stream" } });
    },
    publish(topic, text) {
      const bytes = encoder.encode(`data: ${text}\n\n`);
      for (const controller of streams.of(topic)) controller.enqueue(bytes);
    },
    count: () => streams.peers.size,
  };
}

/** Each chunk as it comes. */
function echo(body: ReadableStream<Uint8Array<ArrayBuffer>>): Response {
  const reader = body.getReader();
  const stream = new ReadableStream<Uint8Array<ArrayBuffer>>({
    async pull(controller) {
      const chunk = await reader.read();
      if (chunk.done) controller.close();
      else controller.enqueue(chunk.value);
    },
    cancel: () => reader.cancel(),
  }, { highWaterMark: 0 });
  return new Response(stream);
}

function crossws(onMessage: OnMessage): Implementation {
  const adapter = crosswsAdapter({
    bidir: true,
    hooks: {
      open(peer) {
        for (const topic of topicsOf(peer.request)) peer.subscribe(topic);
      },
      message(peer, message) {
        onMessage(message.text(), (text) => peer.send(text));
      },
    },
  });
  return {
    fetch: (request) => adapter.fetch(request),
    publish: (topic, text) => adapter.publish(topic, text),
    count: () => count(adapter.peers),
  };
}

function ours(onMessage: OnMessage, heartbeatInterval?: number): Implementation {
  const adapter = sseAdapter({
    bidir: true,
    ...heartbeatInterval && { heartbeatInterval },
    hooks: {
      open(peer) {
        for (const topic of topicsOf(peer.request)) peer.subscribe(topic);
      },
      message(peer, message) {
        onMessage(message.text(), (text) => peer.send(text));
      },
    },
  });
  return {
    fetch: (request, info) => adapter.fetch(request, info),
    publish: (topic, text) => adapter.publish(topic, text),
    count: () => count(adapter.peers),
  };
}

function count(peers: Map<string, Set<unknown>>): number {
  let sum = 0;
  for (const set of peers.values()) sum += set.size;
  return sum;
}

/** Makes the one of that name; `heartbeatInterval` is for ours. */
export function implement(
  name: Name,
  onMessage: OnMessage,
  heartbeatInterval?: number,
): Implementation {
  if (name === "ours") return ours(onMessage, heartbeatInterval);
  if (name === "crossws") return crossws(onMessage);
  if (name === "raw") return raw();
  return "Deno" in globalThis ? nativeDeno(onMessage) : nativeBun(onMessage);
}
