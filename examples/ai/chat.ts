/**
 * A chat with a model, under the path `/ai/`: its page, the messages of each chat, and the socket.
 * The page speaks the frames of the AI SDK's `WebSocketChatTransport`, so `useChat` could as well.
 */

import { type ChatChunk, chatHooks, type ChatStream } from "../../ai.ts";
import { sseAdapter } from "../../mod.ts";
import { textOf } from "../serving.ts";
import { apply, type Chunk, type Message } from "./message.ts";
import { mock } from "./mock.ts";

/** What strangers may have kept here: so many chats, whose messages take so many bytes. */
const MAX_CHATS = 200;
const MAX_MESSAGES = 256 * 1024;
/** Answers at once: the messages of each are objects meanwhile, which take many times their bytes. */
const MAX_ANSWERS = 100;
const MAX_PEERS = 200;
/** How long a shutdown waits for answers. */
const LAST_WORDS_MS = 4_000;

/** Answers a chat whose messages are these. */
export type Model = (
  chat: { messages: Message[]; id: string },
  signal: AbortSignal,
) => ChatStream | Promise<ChatStream>;

export interface AIChat {
  fetch(request: Request, info?: unknown): Promise<Response>;
  /** Lets answers end that are under way, then tells every tab that the server restarts. */
  close(): Promise<void>;
}

/** `stripTypes` turns TypeScript into JavaScript, which every runtime can do itself. */
export function aiChat(stripTypes: (source: string) => string, model: Model = mock): AIChat {
  const chats = new Map<string, string>(); // as JSON

  /** A chat as it is now, the latest of all. */
  function save(id: string, messages: Message[]): void {
    chats.delete(id);
    chats.set(id, JSON.stringify(messages));
    for (const oldest of chats.keys()) {
      if (chats.size <= MAX_CHATS) break;
      chats.delete(oldest);
    }
  }

  /** Passes the answer on, and saves it when it has ended, or was stopped. */
  async function* recorded(id: string, messages: Message[], signal: AbortSignal) {
    const continued = messages.at(-1)?.role === "assistant" ? messages.at(-1) : undefined;
    const answer: Message = structuredClone(continued) ?? { id: "", role: "assistant", parts: [] };
    try {
      const stream = await model({ messages, id }, signal);
      for await (const chunk of stream as AsyncIterable<ChatChunk & Chunk>) {
        if (chunk.messageId) answer.id = chunk.messageId;
        apply(answer, chunk);
        yield chunk;
      }
    } finally {
      save(id, [...continued ? messages.slice(0, -1) : messages, answer]);
    }
  }

  const hooks = chatHooks<Message>({
    keepEnded: 0, // then it is among the messages
    maxRuns: MAX_ANSWERS,
    respond({ id, messages }, { signal, peer }) {
      save(id, messages);
      peer.publish(id, JSON.stringify({ type: "turn" })); // other tabs resume it
      return recorded(id, messages, signal);
    },
  });
  const ws = sseAdapter({
    bidir: true,
    maxMessageSize: MAX_MESSAGES,
    maxPeers: MAX_PEERS,
    hooks: {
      ...hooks,
      // Only our page asks for it: the SDK's transport would not understand a "turn".
      open(peer) {
        const chat = new URL(peer.request.url).searchParams.get("follow");
        if (chat) peer.subscribe(chat);
      },
    },
  });

  async function fetch(request: Request, info?: unknown): Promise<Response> {
    const { pathname, searchParams } = new URL(request.url);
    if (pathname === "/ai/chat" && ws.handles(request)) return await ws.fetch(request, info);
    switch (`${request.method} ${pathname}`) {
      case "GET /ai":
        return new Response(null, { status: 308, headers: { location: "/ai/" } });
      case "GET /ai/":
        return answer("text/html", await read("./page.html"));
      case "GET /ai/client.js":
        return answer("text/javascript", stripTypes(await read("../../client.ts")));
      case "GET /ai/message.js":
        return answer("text/javascript", stripTypes(await read("./message.ts")));
      case "GET /ai/messages":
        return answer("application/json", chats.get(searchParams.get("chat") ?? "") ?? "[]");
      default:
        return new Response("Not found\n", { status: 404 });
    }
  }

  async function close(): Promise<void> {
    await hooks.settled({ signal: AbortSignal.timeout(LAST_WORDS_MS) }).catch(() => {});
    await ws.close(1012, "Restarting", { signal: AbortSignal.timeout(1_000) });
  }
  return { fetch, close };
}

function read(path: string): Promise<string> {
  return textOf(new URL(path, import.meta.url));
}

function answer(type: string, body: string): Response {
  const headers = { "content-type": `${type}; charset=utf-8`, "cache-control": "no-cache" };
  return new Response(body, { headers });
}
