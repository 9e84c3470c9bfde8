/**
 * One instance of the chat: its hooks, and the routes of its page. The same room exists twice, for
 * WebSocketSSE and for native WebSockets, so that the page can show both side by side.
 */

import { type Peer, type SSEAdapter, sseAdapter, type SyncAdapter } from "../mod.ts";
import { type Fetch, textOf, wellFormed } from "./serving.ts";

const MAX_NAME = 24; // characters
const MAX_TEXT = 500; // characters
const MAX_NATIVE = 200; // sockets
/** Of a native socket, in bytes: a message, which our own take as well, and what it has not read. */
export const MAX_MESSAGE = 16 * 1024;
export const MAX_UNREAD = 256 * 1024;

/** How long the shutdown waits for tabs whose network is down: platforms kill after 5 to 10 s. */
const GOODBYE_MS = 4_000;

/** How long a button's answer has to get out, before what it asked for may cut it. */
const ANSWER_MS = 50;

/** Of a native WebSocket, what Deno's and Bun's have in common. */
export interface NativeSocket {
  send(text: string): unknown;
  close(code: number, reason: string): void;
  /** What it was sent and has not read, in bytes: Deno's, and Bun's. */
  readonly bufferedAmount?: number;
  getBufferedAmount?(): number;
  /** Bun's: there, whoever does not answer a close may go on talking. Deno hears nothing more. */
  terminate?(): void;
}

/** What a runtime tells of its native sockets. */
export interface NativeRoom {
  /** Whether a request is for a native socket, and may have one. */
  takes(request: Request): boolean;
  open(socket: NativeSocket): void;
  message(socket: NativeSocket, text: string): void;
  close(socket: NativeSocket): void;
}

export interface ChatOptions {
  /** Turns TypeScript into JavaScript, which every runtime can do itself. */
  stripTypes(source: string): string;
  /** Connects this instance with the one that follows it. */
  sync: SyncAdapter;
  /** What the page's buttons do, by their path, for a tab. */
  controls: Record<string, (tab: string) => void>;
  /** What the page is told of the server, as JSON. */
  about(): unknown;
  /** Answers what is under `/ai/`: another chat, with a model. */
  ai: Fetch;
}

export interface Chat {
  fetch: Fetch;
  readonly native: NativeRoom;
  /** Says something to everybody. */
  tell(said: Said): void;
  /** Sends all sessions to the instance that follows; where none does, tells every tab to come again. */
  close(followed: boolean): Promise<void>;
}

/** Somebody said something. */
export interface Said {
  /** The sender's own, by which a page knows what it has already. */
  id: string;
  name: string;
  text: string;
  /** When it was sent, by the server's clock, in milliseconds since 1970. */
  at: number;
}

export function chat({ stripTypes, sync, controls, about, ai }: ChatOptions): Chat {
  const ws: SSEAdapter = sseAdapter({
    bidir: true,
    maxMessageSize: MAX_MESSAGE,
    maxPeers: 200,
    sync,
    hooks: {
      open: (peer) => peer.subscribe("chat"),
      message(peer, message) {
        room.hear(message.text(), peer.context, (answer) => void peer.send(answer));
      },
      revive: () => room.tellWho(), // from the instance before this one
      close: () => room.tellWho(),
    },
  });
  const present = (): Peer[] => Array.from(ws.peers.values()).flatMap((peers) => [...peers]);
  const room = new Room(
    (text) => ws.publish("chat", text),
    () => present().map(({ context }) => context),
  );
  const native = new NativeSockets();
  const tell = (said: Said) =>
    [room, native.room].forEach((each) => each.tell({ type: "said", ...said }));
  let client: string | undefined;

  async function answerAll(request: Request, info?: unknown): Promise<Response> {
    const { pathname } = new URL(request.url);
    if (/^\/ai(\/|$)/.test(pathname)) return await ai(request, info);
    if (ws.handles(request)) return await ws.fetch(request, info);
    switch (`${request.method} ${pathname}`) {
      case "GET /":
        return answer("text/html", await read("./chat.html"));
      case "GET /client.js":
        return answer("text/javascript", client ??= stripTypes(await read("../client.ts")));
      case "GET /about":
        return answer("application/json", JSON.stringify(about()));
    }
    const control = request.method === "POST" ? controls[pathname] : undefined;
    if (!control) return new Response("Not found\n", { status: 404 });
    // Pages of other origins cannot send this header.
    const tab = request.headers.get("x-chat-tab");
    if (!/^[0-9a-f]{32}$/.test(tab ?? "")) return new Response("Which tab?\n", { status: 400 });
    setTimeout(() => control(tab!), ANSWER_MS);
    return new Response(null, { status: 204 });
  }

  return {
    fetch: wellFormed(answerAll),
    native,
    tell,
    close(followed) {
      native.end();
      if (!followed) { for (const peer of present()) peer.close(1012, "Restarting"); }
      return ws.close(1012, "Restarting", { signal: AbortSignal.timeout(GOODBYE_MS) });
    },
  };
}

/** What a room keeps of a socket. */
type Context = Record<string, unknown>;

/** What is said and by whom, whatever brings it. */
class Room {
  readonly #publish: (text: string) => void;
  readonly #present: () => Context[];

  constructor(publish: (text: string) => void, present: () => Context[]) {
    this.#publish = publish;
    this.#present = present;
  }

  hear(text: string, sender: Context, reply: (text: string) => void): void {
    const input = parse(text);
    const answer = (event: Record<string, unknown>) => reply(JSON.stringify(event));
    if (input?.type === "clock") {
      answer({ type: "clock", now: Date.now() });
    } else if (input?.type === "join") {
      const names = this.#present().filter((each) => each !== sender).map(({ name }) => name);
      sender.name = unique(line(input.name) || "guest", new Set(names));
      answer({ type: "joined", name: sender.name });
      this.tellWho();
    } else if (input?.type === "say") {
      const said = clip(input.text, MAX_TEXT);
      if (!sender.name) answer({ type: "error", text: "Join first." });
      else if (said) {
        const at = Number.isFinite(input.at) ? input.at : Date.now();
        this.tell({ type: "said", id: clip(input.id, 64), name: sender.name, text: said, at });
      }
    } else {
      answer({ type: "error", text: "This chat understands join, say and clock, in JSON." });
    }
  }

  tell(event: Record<string, unknown>): void {
    this.#publish(JSON.stringify(event));
  }

  tellWho(): void {
    const names = this.#present().map(({ name }) => name).filter(Boolean);
    this.tell({ type: "who", names });
  }
}

/**
 * The room of native WebSockets. What ours do by themselves is to be done here: to look at origins,
 * to bound what comes, and what waits for those who do not read.
 */
class NativeSockets implements NativeRoom {
  readonly room: Room;
  readonly #sockets: Map<NativeSocket, Context> = new Map();

  constructor() {
    this.room = new Room(
      (text) => this.#sockets.forEach((_, socket) => this.#send(socket, text)),
      () => [...this.#sockets.values()],
    );
  }

  takes({ url, headers }: Request): boolean {
    const origin = headers.get("origin"); // programs have none
    return headers.get("upgrade")?.toLowerCase() === "websocket" &&
      /^\w+:\/\/[^/?]*\/native(\?|$)/.test(url) &&
      (!origin || origin.replace(/^\w+:\/\//, "") === headers.get("host"));
  }

  open(socket: NativeSocket): void {
    if (this.#sockets.size >= MAX_NATIVE) return socket.close(1013, "Full");
    this.#sockets.set(socket, {});
  }

  message(socket: NativeSocket, text: string): void {
    const context = this.#sockets.get(socket);
    if (!context) return;
    if (text.length > MAX_MESSAGE) return this.#drop(socket, 1009, "Too large");
    this.room.hear(text, context, (reply) => this.#send(socket, reply));
  }

  close(socket: NativeSocket): void {
    this.#sockets.delete(socket);
  }

  end(): void {
    for (const socket of this.#sockets.keys()) this.#drop(socket, 1012, "Restarting");
  }

  #send(socket: NativeSocket, text: string): void {
    const unread = socket.getBufferedAmount?.() ?? socket.bufferedAmount ?? 0;
    if (unread <= MAX_UNREAD) return void socket.send(text);
    this.close(socket);
    if (socket.terminate) socket.terminate();
    else socket.close(1013, "Too slow");
  }

  #drop(socket: NativeSocket, code: number, reason: string): void {
    this.close(socket);
    socket.close(code, reason);
  }
}

/** The JSON object that a message is; nothing if it is none. */
function parse(text: string): Record<string, unknown> | undefined {
  try {
    const value: unknown = JSON.parse(text);
    return typeof value === "object" && value !== null ? { ...value } : undefined;
  } catch {
    return undefined;
  }
}

/** A name fit to be shown: one line, without control characters. */
function line(name: unknown): string {
  return clip(clip(name, 1_000).replace(/[\p{C}\p{Z}]+/gu, " "), MAX_NAME);
}

/** At most `length` characters of what should be a string, and is from a stranger. */
function clip(text: unknown, length: number): string {
  return typeof text === "string" ? [...text.trim()].slice(0, length).join("").trim() : "";
}

function unique(name: string, taken: Set<unknown>): string {
  for (let n = 1;; n++) {
    const candidate = n === 1 ? name : `${name} ${n}`;
    if (!taken.has(candidate)) return candidate;
  }
}

function read(path: string): Promise<string> {
  return textOf(new URL(path, import.meta.url));
}

function answer(type: string, body: string): Response {
  return new Response(body, {
    headers: {
      "content-type": `${type}; charset=utf-8`,
      "cache-control": "no-cache",
    },
  });
}
