/**
 * Chats of the AI SDK for tests: its own transport over our socket, and answers that come word by
 * word.
 *
 * @module
 */
import {
  safeValidateWebSocketChatTransportRequest,
  type UIMessage,
  type UIMessageChunk,
  WebSocketChatTransport,
} from "ai";
import { type ChatChunk, type ChatHooks, chatHooks, type ChatOptions } from "../ai.ts";
import { WebSocketSSE } from "../client.ts";
import type { SyncAdapter } from "../server.ts";
import { type Deferred, deferred, type TestContext } from "./harness.ts";
import { connect, type Connected, listen } from "./pair.ts";

export type Chat = WebSocketChatTransport<UIMessage>;
export type Pieces = ReadableStream<UIMessageChunk>;
export type Options = Partial<ChatOptions>;

export const question: UIMessage = {
  id: "q",
  role: "user",
  parts: [{ type: "text", text: "Hello?" }],
};

/** An answer of so many words, the next one as soon as `next` resolves. */
export async function* words(
  count: number,
  next: () => Promise<unknown>,
): AsyncGenerator<ChatChunk> {
  yield { type: "start", messageId: "a" } as ChatChunk;
  yield { type: "text-start", id: "1" } as ChatChunk;
  for (let n = 0; n < count; n++) {
    await next();
    yield { type: "text-delta", id: "1", delta: `${n} ` } as ChatChunk;
  }
  yield { type: "text-end", id: "1" } as ChatChunk;
  yield { type: "finish" };
}

export const text = (count: number): string =>
  Array.from({ length: count }, (_, n) => `${n} `).join("");

/** Serves chats, and gives the URL. */
export async function serve(t: TestContext, options: Options, sync?: SyncAdapter): Promise<string> {
  return (await listen(t, { hooks: chats(t, { ...options, ...sync && { sync } }) })).url;
}

/** Hooks that keep nothing when the test ends. */
export function chats(t: TestContext, options: Options): ChatHooks<Record<string, unknown>> {
  const hooks = chatHooks({
    keepEnded: 0,
    validate: safeValidateWebSocketChatTransportRequest,
    respond: () => words(3, () => Promise.resolve()),
    ...options,
  });
  t.defer(() => hooks.settled({ signal: AbortSignal.abort() }).catch(() => {}));
  return hooks;
}

/** The SDK's own, over sockets of ours that end with the test. */
export function transport(t: TestContext, url: string): Chat {
  class Socket extends WebSocketSSE {
    constructor(url: string | URL, protocols?: string | string[]) {
      super(url, { protocols, signal: t.signal });
    }
  }
  return new WebSocketChatTransport<UIMessage>({ url, webSocket: Socket as never });
}

export function send(chat: Chat, chatId = "c", abortSignal?: AbortSignal): Promise<Pieces> {
  return chat.sendMessages({
    chatId,
    trigger: "submit-message",
    messageId: undefined,
    messages: [question],
    abortSignal,
  });
}

/** The text of an answer, to its end. */
export function read(pieces: Pieces, onPiece?: (text: string) => void): Promise<string> {
  const reading = readAll(pieces, onPiece);
  reading.catch(() => {}); // told to whoever waits for it
  return reading;
}

async function readAll(pieces: Pieces, onPiece?: (text: string) => void): Promise<string> {
  let whole = "";
  const reader = pieces.getReader();
  for (let item = await reader.read(); !item.done; item = await reader.read()) {
    if (item.value.type === "text-delta") whole += item.value.delta;
    onPiece?.(whole);
  }
  return whole;
}

/** A gate that lets one word through for each `open()`. */
export class Gate {
  #waiting: Deferred<void> = deferred();
  readonly wait = async (): Promise<void> => {
    await this.#waiting.promise;
    this.#waiting = deferred();
  };
  open(): void {
    this.#waiting.resolve();
  }
}

/** Rejects when the signal aborts. */
export function aborted(signal: AbortSignal): Promise<never> {
  return new Promise((_, reject) => {
    signal.addEventListener("abort", () => reject(signal.reason));
  });
}

/** A socket by hand. */
export interface RawChat extends Connected {
  say(frame: Record<string, unknown>): void;
  ask(chat: string, requestId?: string): void;
  resume(chat: string, requestId?: string): void;
  /** The next frame. */
  hear(): Promise<Record<string, unknown>>;
}

export async function raw(t: TestContext, url: string): Promise<RawChat> {
  const connected = connect(t, url);
  await connected.opened;
  const say = (frame: Record<string, unknown>) => connected.socket.send(JSON.stringify(frame));
  const rest = { headers: {}, body: {} };
  const asking = { trigger: "submit-message", messages: [question], ...rest };
  return Object.assign(connected, {
    say,
    ask: (id: string, requestId = id) => say({ type: "send", requestId, id, ...asking }),
    resume: (id: string, requestId = id) => say({ type: "resume", requestId, id, ...rest }),
    hear: async () => JSON.parse(`${await connected.messages.next()}`),
  });
}
