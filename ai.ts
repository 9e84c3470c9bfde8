/**
 * The server's half of the AI SDK's `WebSocketChatTransport`: chats whose answers nothing
 * interrupts. Give {@link chatHooks} to `sseAdapter`, and `WebSocketSSE` to the transport.
 *
 * A run (the answer to one request) belongs to its chat, not to the socket that asked for it. It
 * goes on while nobody listens, is replayed to any number of tabs and devices, and ends by a stop
 * from any of them.
 *
 * @example
 * ```ts ignore
 * import { sseAdapter } from "jsr:@duplex/sse/server";
 * import { chatHooks } from "jsr:@duplex/sse/ai";
 * import { convertToModelMessages, streamText } from "npm:ai";
 *
 * const ws = sseAdapter({
 *   bidir: true,
 *   hooks: chatHooks({
 *     async respond({ messages }, { signal }) {
 *       const result = streamText({
 *         model: "openai/gpt-5",
 *         messages: await convertToModelMessages(messages),
 *         abortSignal: signal,
 *       });
 *       return result.toUIMessageStream({ originalMessages: messages });
 *     },
 *   }),
 * });
 * ```
 *
 * @module
 */
import type { Hooks, MaybePromise, Message, Peer, SyncAdapter, SyncDriver } from "./server.ts";

// --- Limits ---

const KEEP_UNWATCHED = 300_000;
const KEEP_ENDED = 60_000;
const MAX_LOG = 4 * 1024 * 1024;
const MAX_RUNS = 1_000;
/** How long another instance has to say that it has a chat's run, in ms. */
const FIND_TIMEOUT = 1_000;
/** How long an answer that was stopped has to end by itself, in ms. */
const STOP_TIMEOUT = 5_000;
/** A chat's and a request's id are at most so long. */
const MAX_ID = 256;

const BUSY = "An answer is already on its way in this chat.";
const FAILED = "The request failed.";
const FULL = "Too many answers are on their way.";
const TOO_LONG = "The answer is too long to be resumed.";
const UNFIT = "The request is not one of a chat.";

// --- Types ---

/** A piece of an answer, as the AI SDK's `UIMessageChunk`. */
export interface ChatChunk {
  /** As the SDK names it: "start", "text-delta", "tool-input-available", "finish", … */
  readonly type: string;
}

/** A request for an answer: the SDK's frame of type "send". */
export interface ChatRequest<UIMessage = ChatMessage> {
  /** "send". */
  readonly type: "send";
  /** Names the request among those of its socket. */
  readonly requestId: string;
  /** The chat's. */
  readonly id: string;
  /** A new message, or another answer to an old one. */
  readonly trigger: "submit-message" | "regenerate-message";
  /** With "regenerate-message", the message that is to be replaced. */
  readonly messageId?: string | undefined;
  /** All messages of the chat. */
  readonly messages: UIMessage[];
  /** What the client's transport was given as headers; these are not the handshake's. */
  readonly headers: Record<string, string>;
  /** What the client's transport was given as body. */
  readonly body: object;
  /** What the client gave to `sendMessage`. */
  readonly metadata?: unknown;
}

/** A message as the AI SDK's `UIMessage`, as far as any server knows it. */
export interface ChatMessage {
  /** The message's. */
  readonly id: string;
  /** Whose it is. */
  readonly role: "system" | "user" | "assistant";
  /** Text, files, tools' calls and results, …: each application has parts of its own. */
  // deno-lint-ignore no-explicit-any
  readonly parts: any[];
  /** The application's. */
  // deno-lint-ignore no-explicit-any
  readonly metadata?: any;
}

/** What `respond` is told beside the request. */
export interface ChatContext<Context> {
  /** Aborts when somebody stops the answer, or when nobody has listened for `keepUnwatched`. */
  readonly signal: AbortSignal;
  /** Who asked. */
  readonly peer: Peer<Context>;
}

/** The pieces of an answer. */
export type ChatStream = ReadableStream<ChatChunk> | AsyncIterable<ChatChunk>;

/** Options of {@link chatHooks}. Times are milliseconds, sizes bytes. */
export interface ChatOptions<UIMessage = ChatMessage, Context = Record<string, unknown>> {
  /** Answers a request. What it throws is told to `onError`; the client learns `errorText` of it. */
  respond(request: ChatRequest<UIMessage>, context: ChatContext<Context>): MaybePromise<ChatStream>;
  /**
   * Whose chats these are: peers of one owner see each other's chats, no others. Default:
   * `peer.context.user` if `upgrade` has left one; else whoever knows a chat's id sees it.
   */
  owner?(peer: Peer<Context>): string;
  /** The SDK's `safeValidateWebSocketChatTransportRequest`. Default: the frame's shape is checked, not its messages. */
  validate?(frame: { value: unknown }): MaybePromise<{ success: boolean; error?: unknown }>;
  /** How long an answer goes on while nobody listens. Default: 300000; 0: it is stopped at once. */
  keepUnwatched?: number | undefined;
  /** How long an answer that has ended can be resumed. Default: 60000. */
  keepEnded?: number | undefined;
  /** The most that is kept of one answer, in bytes of JSON. Beyond it goes on, but cannot be resumed. Default: 4 MiB. */
  maxLog?: number | undefined;
  /** Answers under way or kept at once; beyond, requests are refused. Default: 1000. */
  maxRuns?: number | undefined;
  /** A backplane, as for `sync`: resuming and stopping then reach answers of other instances. */
  sync?: SyncAdapter | undefined;
  /** Told what failed. Default: `console.error`. */
  onError?(error: unknown, context: { readonly chat: string }): void;
  /** What the client is told of a failure. Default: nothing but that there was one. */
  errorText?(error: unknown): string;
}

type AnyPeer = Peer<never>;

/** What the server says: the SDK's frames. */
type Reply =
  | { type: "start" }
  | { type: "chunk"; sequence: number; chunk: ChatChunk }
  | { type: "end" }
  | { type: "error"; errorText: string }
  | { type: "no-active" };

/** Somebody who is shown a run, here or at another instance. */
interface Viewer {
  /** Names it among all: the peer's id and the request's. */
  readonly id: string;
  /** One peer is shown a run once. */
  readonly peer: string;
  show(reply: Reply): void;
}

// --- Public surface ---

/**
 * Makes hooks for `sseAdapter` that answer the AI SDK's `WebSocketChatTransport`.
 *
 * @throws {RangeError} if a number among the options is NaN or negative.
 *
 * @example An answer without a model
 * ```ts
 * import { chatHooks } from "@duplex/sse/ai";
 *
 * const hooks = chatHooks({
 *   async *respond({ messages }) {
 *     yield { type: "start" };
 *     yield { type: "text-start", id: "1" };
 *     yield { type: "text-delta", id: "1", delta: `Message ${messages.length}` };
 *     yield { type: "text-end", id: "1" };
 *     yield { type: "finish" };
 *   },
 * });
 * ```
 */
export function chatHooks<UIMessage = ChatMessage, Context = Record<string, unknown>>(
  options: ChatOptions<UIMessage, Context>,
): Pick<Hooks<Context>, "message" | "close"> {
  const chats = new Chats(options as unknown as ChatOptions<unknown, never>);
  return {
    message: (peer, message) => chats.receive(peer as AnyPeer, message as Message<never>),
    close: (peer) => chats.leave(peer.id),
  };
}

export default chatHooks;

// --- Chats: frames in, runs by chat ---

/** All runs of one server. */
class Chats {
  readonly #options: ChatOptions<unknown, never>;
  readonly #limits: Limits;
  /** By owner and chat. */
  readonly #runs: Map<string, Run> = new Map();
  readonly #others: Others | undefined;

  constructor(options: ChatOptions<unknown, never>) {
    this.#options = options;
    this.#limits = {
      keepUnwatched: numberOf(options.keepUnwatched, KEEP_UNWATCHED, "keepUnwatched"),
      keepEnded: numberOf(options.keepEnded, KEEP_ENDED, "keepEnded"),
      maxLog: numberOf(options.maxLog, MAX_LOG, "maxLog"),
      maxRuns: numberOf(options.maxRuns, MAX_RUNS, "maxRuns"),
    };
    if (options.sync) {
      this.#others = new Others(options.sync, this.#runs, (e) => this.#report(e, ""));
    }
  }

  async receive(peer: AnyPeer, message: Message<never>): Promise<void> {
    const frame = parse(message.text());
    // Not of a chat at all: nothing can be told by a frame.
    if (!frame) return peer.close(1008, UNFIT);
    const { type, requestId } = frame;
    if (type === "abort") return this.#abort(peer, requestId);
    const reply = replyTo(peer, requestId);
    const verdict = await this.#validate(frame);
    if (!verdict) return reply({ type: "error", errorText: UNFIT });
    const key = this.#keyOf(peer, frame.id as string);
    if (type === "resume") return await this.#resume(peer, key, requestId, reply);
    this.#start(peer, key, frame as unknown as ChatRequest<unknown>, reply);
  }

  async #validate(frame: Frame): Promise<boolean> {
    if (!isRequest(frame)) return false;
    const { validate } = this.#options;
    return !validate || (await validate({ value: frame })).success;
  }

  /** A chat is its owner's: another's chat of the same id is another chat. */
  #keyOf(peer: AnyPeer, chat: string): string {
    const { user } = peer.context as { user?: unknown };
    const owner = this.#options.owner?.(peer) ?? (user === undefined ? "" : String(user));
    return JSON.stringify([peer.namespace, owner, chat]);
  }

  #start(
    peer: AnyPeer,
    key: string,
    request: ChatRequest<unknown>,
    reply: (reply: Reply) => void,
  ): void {
    const former = this.#runs.get(key);
    if (former?.phase === "running") return reply({ type: "error", errorText: BUSY });
    if (!former && this.#runs.size >= this.#limits.maxRuns) {
      return reply({ type: "error", errorText: FULL });
    }
    former?.forget();
    const run = new Run(this.#limits, () => {
      if (this.#runs.get(key) === run) this.#runs.delete(key);
    });
    this.#runs.set(key, run);
    run.add({ id: viewerId(peer, request.requestId), peer: peer.id, show: reply });
    if (hasLeft(peer)) run.leave(peer.id); // while its request was being checked
    this.#answer(run, request, peer);
  }

  async #answer(run: Run, request: ChatRequest<unknown>, peer: AnyPeer): Promise<void> {
    try {
      const { signal } = run;
      await run.play(await this.#options.respond(request, { signal, peer }));
    } catch (error) {
      if (run.phase !== "running") return run.stopped(); // mostly it says that it was aborted
      this.#report(error, request.id);
      run.fail(this.#options.errorText?.(error) ?? FAILED);
    }
  }

  async #resume(
    peer: AnyPeer,
    key: string,
    requestId: string,
    reply: (reply: Reply) => void,
  ): Promise<void> {
    const viewer = { id: viewerId(peer, requestId), peer: peer.id, show: reply };
    const run = this.#runs.get(key);
    if (hasLeft(peer)) return;
    if (run) return run.add(viewer, true);
    if (await this.#others?.find(key, viewer)) {
      if (hasLeft(peer)) this.#others!.leave(peer.id);
    } else reply({ type: "no-active" });
  }

  #abort(peer: AnyPeer, requestId: string): void {
    const id = viewerId(peer, requestId);
    for (const run of this.#runs.values()) if (run.shows(id)) return run.stop(id);
    this.#others?.stop(id);
  }

  /** The peer is shown nothing any more; its runs go on. */
  leave(peer: string): void {
    for (const run of this.#runs.values()) run.leave(peer);
    this.#others?.leave(peer);
  }

  #report(error: unknown, chat: string): void {
    const { onError } = this.#options;
    if (onError) onError.call(this.#options, error, { chat });
    else console.error("[duplex-sse] an answer failed:", error);
  }
}

interface Limits {
  readonly keepUnwatched: number;
  readonly keepEnded: number;
  readonly maxLog: number;
  readonly maxRuns: number;
}

// --- A run: one answer ---

/** One answer: what there is of it, and who is shown it. */
class Run {
  /** running → stopping → ended, or running → ended; forgotten at last. */
  phase: "running" | "stopping" | "ended" | "forgotten" = "running";
  readonly #limits: Limits;
  readonly #onForget: () => void;
  readonly #abort: AbortController = new AbortController();
  readonly #log: ChatLog;
  /** By their ids, with the number of the next chunk of each. */
  readonly #viewers: Map<string, { viewer: Viewer; next: number }> = new Map();
  /** Of whatever is waited for: viewers, the end of what was stopped, or to be forgotten. */
  #timer: ReturnType<typeof setTimeout> | undefined;
  #reader: { cancel(): unknown } | undefined;

  constructor(limits: Limits, onForget: () => void) {
    this.#limits = limits;
    this.#onForget = onForget;
    this.#log = new ChatLog(limits.maxLog);
  }

  get signal(): AbortSignal {
    return this.#abort.signal;
  }

  get #over(): boolean {
    return this.phase === "ended" || this.phase === "forgotten";
  }

  /** Whether this viewer is shown it. */
  shows(id: string): boolean {
    return this.#viewers.has(id);
  }

  /** Shows the run from its beginning; one peer is shown it once. */
  add(viewer: Viewer, replay = false): void {
    for (const { viewer: { id, peer } } of this.#viewers.values()) {
      if (peer === viewer.peer) this.#viewers.delete(id);
    }
    if (!this.#log.chunks) return viewer.show({ type: "error", errorText: TOO_LONG });
    if (replay) viewer.show({ type: "start" });
    this.#log.chunks.forEach((chunk, sequence) => viewer.show({ type: "chunk", sequence, chunk }));
    if (this.phase === "ended") return viewer.show({ type: "end" });
    this.#viewers.set(viewer.id, { viewer, next: this.#log.chunks.length });
    if (this.phase === "running") clearTimeout(this.#timer);
  }

  /** Shows all that the stream brings, to its end. */
  async play(stream: ChatStream): Promise<void> {
    const reader = readerOf(stream);
    this.#reader = reader;
    if (this.#over) return void reader.cancel(); // stopped before it began
    for (let item = await reader.read(); !item.done; item = await reader.read()) {
      if (this.#over) return;
      this.#show(item.value);
    }
    this.#end({ type: "end" });
  }

  #show(chunk: ChatChunk): void {
    this.#log.push(chunk);
    for (const shown of this.#viewers.values()) {
      shown.viewer.show({ type: "chunk", sequence: shown.next++, chunk });
    }
  }

  fail(errorText: string): void {
    this.#end({ type: "error", errorText });
    this.forget(); // "failed responses cannot resume", so that a retry is a new one
  }

  /** Ends it for all; the viewer who said so is shown no more. */
  stop(id?: string): void {
    if (id !== undefined) this.#viewers.delete(id);
    if (this.phase !== "running") return;
    this.phase = "stopping";
    this.#abort.abort();
    // It may say that it was stopped, and what it has until then.
    this.#wait(STOP_TIMEOUT, () => this.#end({ type: "end" }));
  }

  /** Nothing more comes of what was stopped. */
  stopped(): void {
    this.#end({ type: "end" });
  }

  leave(peer: string): void {
    for (const [id, { viewer }] of this.#viewers) {
      if (viewer.peer === peer) this.#viewers.delete(id);
    }
    if (this.#viewers.size || this.phase !== "running") return;
    this.#wait(this.#limits.keepUnwatched, () => this.stop());
  }

  #end(last: Reply): void {
    if (this.#over) return;
    this.phase = "ended";
    this.#abort.abort();
    Promise.resolve(this.#reader?.cancel()).catch(() => {});
    for (const { viewer } of this.#viewers.values()) viewer.show(last);
    this.#viewers.clear();
    this.#wait(this.#limits.keepEnded, () => this.forget());
  }

  forget(): void {
    clearTimeout(this.#timer);
    this.phase = "forgotten";
    this.#onForget();
  }

  #wait(ms: number, then: () => void): void {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(then, ms);
    (this.#timer as { unref?(): void }).unref?.(); // where timers can do so
  }
}

/** What there is of an answer, for those who come later: as few chunks as say the same. */
class ChatLog {
  /** Undefined once it was too much. */
  chunks: ChatChunk[] | undefined = [];
  readonly #max: number;
  #size = 0;

  constructor(max: number) {
    this.#max = max;
  }

  push(chunk: ChatChunk): void {
    if (!this.chunks) return;
    const joined = join(this.chunks.at(-1), chunk);
    this.#size += joined ? (chunk as Delta).delta.length : JSON.stringify(chunk).length;
    if (joined) this.chunks[this.chunks.length - 1] = joined;
    else this.chunks.push(chunk);
    if (this.#size > this.#max) this.chunks = undefined;
  }
}

/** A chunk that continues a text, a reasoning or a tool's input. */
type Delta = ChatChunk & { readonly id?: string; readonly delta: string };

/** One delta for two that follow each other, if nothing is lost by it. */
function join(last: ChatChunk | undefined, chunk: ChatChunk): ChatChunk | undefined {
  const known = chunk.type === "text-delta" || chunk.type === "reasoning-delta";
  if (!known || last?.type !== chunk.type) return;
  const [one, other] = [last as Delta, chunk as Delta];
  const plain = [one, other].every((delta) => Object.keys(delta).length === 3);
  if (plain && one.id === other.id) return { ...one, delta: one.delta + other.delta } as Delta;
}

interface ChunkReader {
  read(): Promise<{ done: true } | { done: false; value: ChatChunk }>;
  cancel(): unknown;
}

/** WebKit cannot iterate a stream, and a generator has no reader. */
function readerOf(stream: ChatStream): ChunkReader {
  if (stream instanceof ReadableStream) return stream.getReader() as ChunkReader;
  const iterator = stream[Symbol.asyncIterator]();
  return {
    read: () => iterator.next() as ReturnType<ChunkReader["read"]>,
    cancel: () => iterator.return?.(),
  };
}

// --- Other instances ---

/** What instances say to each other: who has a run, and what it shows. */
type Word =
  | { kind: "find"; key: string; viewer: string; peer: string; from: string }
  | { kind: "show"; viewer: string; n: number; reply: Reply; from: string }
  | { kind: "stop"; viewer: string }
  | { kind: "leave"; peer: string };

/** Runs of other instances: asked for when a chat is resumed whose run is not here. */
class Others {
  readonly #id: string = crypto.randomUUID();
  readonly #driver: SyncDriver;
  readonly #runs: Map<string, Run>;
  readonly #report: (error: unknown) => void;
  /** Viewers here of runs elsewhere. */
  readonly #remote: Map<string, Remote> = new Map();

  constructor(connect: SyncAdapter, runs: Map<string, Run>, report: (error: unknown) => void) {
    this.#runs = runs;
    this.#report = report;
    this.#driver = connect({ id: this.#id });
    this.#try(() => this.#driver.subscribe(({ topic, data }) => this.#receive(topic, data)));
  }

  /** Whether another instance has the run, and shows it from now on. */
  async find(key: string, viewer: Viewer): Promise<boolean> {
    const found = Promise.withResolvers<boolean>();
    const late = setTimeout(() => found.resolve(false), FIND_TIMEOUT);
    this.#remote.set(viewer.id, { viewer, next: 0, found: () => found.resolve(true) });
    this.#say("*", { kind: "find", key, viewer: viewer.id, peer: viewer.peer, from: this.#id });
    const there = await found.promise.finally(() => clearTimeout(late));
    if (!there) this.#remote.delete(viewer.id);
    return there;
  }

  stop(viewer: string): void {
    if (this.#remote.delete(viewer)) this.#say("*", { kind: "stop", viewer });
  }

  leave(peer: string): void {
    let left = false;
    for (const [id, { viewer }] of this.#remote) {
      if (viewer.peer === peer) left = this.#remote.delete(id);
    }
    if (left) this.#say("*", { kind: "leave", peer });
  }

  #receive(topic: string, data: string | Uint8Array): void {
    if (topic !== this.#id && topic !== "*" || typeof data !== "string") return;
    const word = JSON.parse(data) as Word;
    switch (word.kind) {
      case "find":
        return this.#show(word);
      case "show":
        return this.#shown(word);
      case "stop":
        for (const run of this.#runs.values()) if (run.shows(word.viewer)) run.stop(word.viewer);
        return;
      case "leave":
        for (const run of this.#runs.values()) run.leave(word.peer);
    }
  }

  /** Shows a run that is here to a viewer elsewhere. */
  #show({ key, viewer, peer, from }: Word & { kind: "find" }): void {
    let n = 0;
    const show = (reply: Reply) => {
      this.#say(from, { kind: "show", viewer, n: n++, reply, from: this.#id });
    };
    this.#runs.get(key)?.add({ id: viewer, peer, show }, true);
  }

  #shown({ viewer, n, reply }: Word & { kind: "show" }): void {
    const remote = this.#remote.get(viewer);
    if (!remote || n < remote.next) return; // gone, or repeated
    remote.found();
    const lost = n > remote.next++;
    remote.viewer.show(lost ? { type: "error", errorText: FAILED } : reply);
    if (lost || reply.type === "end" || reply.type === "error") this.#remote.delete(viewer);
  }

  #say(topic: string, word: Word): void {
    const data = JSON.stringify(word);
    this.#try(() => this.#driver.publish({ namespace: "duplex-chat", topic, data }));
  }

  #try(action: () => MaybePromise<void>): void {
    try {
      Promise.resolve(action()).catch(this.#report);
    } catch (error) {
      this.#report(error);
    }
  }
}

interface Remote {
  readonly viewer: Viewer;
  /** The number of the reply that is to come next. */
  next: number;
  readonly found: () => void;
}

// --- Frames ---

/** A frame of the client, of which no more than this is certain. */
type Frame = Record<string, unknown> & { type: string; requestId: string };

function parse(text: string): Frame | undefined {
  let frame: unknown;
  try {
    frame = JSON.parse(text);
  } catch {
    return;
  }
  const { type, requestId } = Object(frame) as Record<string, unknown>;
  return typeof type === "string" && isId(requestId) ? frame as Frame : undefined;
}

/** The shape of "send" and "resume". */
function isRequest({ type, id, headers, body, messages, trigger }: Frame): boolean {
  if (!isId(id) || !isRecord(headers) || !isRecord(body)) return false;
  return type === "resume" || type === "send" && Array.isArray(messages) &&
      (trigger === "submit-message" || trigger === "regenerate-message");
}

function isId(value: unknown): value is string {
  return typeof value === "string" && value.length > 0 && value.length <= MAX_ID;
}

function isRecord(value: unknown): boolean {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** The `close` hook has run, or is about to. */
function hasLeft(peer: AnyPeer): boolean {
  return peer.websocket.readyState !== 1;
}

function viewerId(peer: AnyPeer, requestId: string): string {
  return `${peer.id} ${requestId}`;
}

function replyTo(peer: AnyPeer, requestId: string): (reply: Reply) => void {
  return (reply) => void peer.send(JSON.stringify({ ...reply, requestId }));
}

function numberOf(value: number | undefined, fallback: number, name: string): number {
  const number = value ?? fallback;
  if (number >= 0) return number;
  throw new RangeError(`${name} must be a number of at least 0`);
}
