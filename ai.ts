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
 * import { convertToModelMessages, generateId, streamText, toUIMessageStream } from "npm:ai";
 *
 * const ws = sseAdapter({
 *   bidir: true,
 *   hooks: chatHooks({
 *     async respond({ messages }, { signal }) {
 *       const { stream } = streamText({
 *         model: "openai/gpt-5",
 *         messages: await convertToModelMessages(messages),
 *         abortSignal: signal,
 *       });
 *       const generateMessageId = generateId;
 *       return toUIMessageStream({ stream, originalMessages: messages, generateMessageId });
 *     },
 *   }),
 * });
 * ```
 *
 * @module
 */
import type {
  Hooks,
  MaybePromise,
  Message,
  Peer,
  SyncAdapter,
  SyncDriver,
  SyncMessage,
} from "./server.ts";

// --- Limits ---

const KEEP_UNWATCHED = 300_000;
const KEEP_ENDED = 60_000;
const MAX_LOG = 4 * 1024 * 1024;
const MAX_TOTAL_LOG = 256 * 1024 * 1024;
const MAX_RUNS = 10_000;
const MAX_RUNS_PER_PEER = 100;
/** How long an answer that was stopped has to end by itself, in ms. */
const STOP_TIMEOUT = 5_000;
/** How long a session that moves has to come back to its answers. */
const MOVE_TIMEOUT = 30_000;
/** How long another instance has to say that it has a chat's run. */
const FIND_TIMEOUT = 1_000;
/** What was said has so long to be published before this instance ends. */
const SAY_TIMEOUT = 5_000;
/** How often instances that show each other's runs hear of each other; after three silences one is gone. */
const WATCH_PERIOD = 2_000;
const MAX_SILENCES = 3;
/** A run so old was there before one of the same chat that another instance has just begun. */
const DOUBT = 1_000;
/** Timers go no further, and never fire sooner than in 24 days. */
const MAX_DELAY = 2 ** 31 - 1;
/** A chat's and a request's id are at most so long. */
const MAX_ID = 256;
/** A viewer with more than this before it is shown nothing until it is down to a quarter. */
const MAX_WAITING = 256 * 1024;
/** The most of a text that one frame says, in characters. */
const MAX_PIECE = 64 * 1024;
/** Frames to another instance that it has not confirmed; it does so each quarter. */
const WINDOW = 32;
/** Chunks that are read in one go, before others have their turn. */
const MAX_HURRY = 1_000;
/** What a chunk costs in a log, besides its JSON. */
const CHUNK_COST = 100;

const BUSY = "An answer is already on its way in this chat.";
const FAILED = "The request failed.";
const FULL = "Too many answers are on their way.";
const TOO_LONG = "The answer is too long to be resumed.";
const UNFIT = "The request is not one of a chat.";

/** In a session that moves: what its client is being shown. */
const SHOWN = "duplex-chat";
const START: Place = { index: 0, offset: 0, sequence: 0 };

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
  /** Who asked; may have left before the answer ends. */
  readonly peer: Peer<Context>;
}

/** The pieces of an answer. */
export type ChatStream = ReadableStream<ChatChunk> | AsyncIterable<ChatChunk>;

/** Where an error came from that {@link ChatOptions.onError} is told of. */
export interface ChatErrorContext {
  /** One of the options, or what it has returned; `sync` is the backplane. */
  readonly stage: "respond" | "validate" | "errorText" | "sync";
  /** The chat's id. */
  readonly chat?: string;
  /** Who asked. */
  // deno-lint-ignore no-explicit-any
  readonly peer?: Peer<any>;
}

/** Options of {@link chatHooks}. Times are milliseconds, sizes bytes. */
export interface ChatOptions<UIMessage = ChatMessage, Context = Record<string, unknown>> {
  /** Answers a request. What it throws is told to `onError`; the client learns `errorText` of it. */
  respond(request: ChatRequest<UIMessage>, context: ChatContext<Context>): MaybePromise<ChatStream>;
  /**
   * Whose chats these are: peers of one owner see each other's chats, no others. Default: what
   * `upgrade` has left as `context.user`, a string or a number, or an object with such an `id`; if
   * it has left none, whoever knows a chat's id sees the chat.
   */
  owner?(peer: Peer<Context>): string;
  /**
   * The SDK's `safeValidateWebSocketChatTransportRequest`; `respond` gets the `data` that it returns.
   * Default: the frame's shape is checked, not its messages.
   */
  validate?(
    frame: { value: unknown },
  ): MaybePromise<{ success: boolean; data?: unknown; error?: unknown }>;
  /** How long an answer goes on while nobody listens. Default: 300000; 0: it is stopped at once. */
  keepUnwatched?: number | undefined;
  /** How long an answer that has ended can be resumed. Default: 60000. */
  keepEnded?: number | undefined;
  /**
   * The most that is kept of one answer, in characters of JSON. Beyond, it goes on, but cannot be
   * resumed. Default: 4 Mi.
   */
  maxLog?: number | undefined;
  /**
   * The most that is kept of all answers, likewise. Beyond, those that have ended are forgotten,
   * the oldest first, and the one that grows cannot be resumed. Default: 256 Mi.
   */
  maxTotalLog?: number | undefined;
  /**
   * Answers under way or kept at once. Beyond, those that have ended are forgotten, the oldest
   * first; where none has, requests are refused. Default: 10000.
   */
  maxRuns?: number | undefined;
  /** Answers under way that one peer has asked for; beyond, it is refused. Default: 100. */
  maxRunsPerPeer?: number | undefined;
  /**
   * How long text is gathered after a piece of it was shown: what comes meanwhile is shown as one
   * piece, which takes fewer bytes. Neither the first piece waits nor what is no text. Default: 0,
   * each piece is shown as it comes.
   */
  gather?: number | undefined;
  /**
   * A backplane, as for `sync` (without `cluster`). Answers of other instances are then resumed and
   * stopped from here; and where the adapter has `cluster`, sessions that are shown one can move.
   */
  sync?: SyncAdapter | undefined;
  /** Told of each failure. Default: `console.error`. */
  onError?(error: unknown, context: ChatErrorContext): void;
  /** What the client is told of a failure. Default: nothing but that there was one. */
  errorText?(error: unknown): string;
}

/** Hooks for `sseAdapter`, alone or spread among others. */
export interface ChatHooks<Context> extends Pick<Hooks<Context>, "message" | "close"> {
  /** With `sync`: a session goes to another instance. */
  suspend?(peer: Peer<Context>): void;
  /** With `sync`: a session has come from another instance, or has come back. */
  revive?(peer: Peer<Context>): void;
  /**
   * Resolves when no answer is under way here, and all who were shown one have the whole of it: to
   * be awaited before the process ends, after `close(1012)` has sent its sessions to other instances.
   * It is the last thing to ask: then the driver of `sync` is closed, which would keep a process alive.
   *
   * @throws the signal's reason, once it aborts: whatever is under way ends then, and nothing is kept.
   */
  settled(options?: { signal?: AbortSignal | undefined }): Promise<void>;
}

type AnyPeer = Peer<never>;

/** What the server says: the SDK's frames. */
type Reply =
  | { type: "start" }
  | { type: "chunk"; sequence: number; chunk: ChatChunk }
  | { type: "end" }
  | { type: "error"; errorText: string }
  | { type: "no-active" };

/** How far somebody has been shown an answer. */
interface Place {
  /** The index of the chunk that is shown next, or of which more may come. */
  readonly index: number;
  /** How much of that chunk's text was shown. */
  readonly offset: number;
  /** The number of the next frame. */
  readonly sequence: number;
}

/** Somebody who is shown a run, here or at another instance. */
interface Viewer {
  /** Names it among all: the peer's id and the request's. */
  readonly id: string;
  /** One peer is shown a run once. */
  readonly peer: string;
  show(reply: Reply, place: Place): void;
  /** Until it can be shown more; undefined: it can. */
  full(): Promise<void> | undefined;
}

/** What a session that moves is shown. */
interface Shown {
  readonly key: string;
  readonly viewer: string;
  readonly place: Place;
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
): ChatHooks<Context> {
  const chats = new Chats(options as unknown as ChatOptions<unknown, never>);
  const hooks: Omit<ChatHooks<Context>, "settled"> = {
    message: (peer, message) => chats.receive(peer as AnyPeer, message as Message<never>),
    close: (peer) => chats.leave(peer.id),
    ...options.sync && {
      suspend: (peer: Peer<Context>) => chats.suspend(peer as AnyPeer),
      revive: (peer: Peer<Context>) => chats.revive(peer as AnyPeer),
    },
  };
  // Not among what `{ ...hooks }` copies: it is no hook.
  const settled = { value: chats.settled.bind(chats) };
  return Object.defineProperties(hooks, { settled }) as ChatHooks<Context>;
}

export default chatHooks;

// --- Chats: frames in, runs by chat ---

/** All runs of one server. */
class Chats {
  readonly #options: ChatOptions<unknown, never>;
  readonly #limits: Limits;
  /** By owner and chat, the oldest first. */
  readonly #runs: Map<string, Run> = new Map();
  /** By the ids of those who are shown them: a stop need not look for its run. */
  readonly #shown: Map<string, Run> = new Map();
  /** Those under way, and those, also forgotten ones, that somebody has yet to be shown the end of. */
  readonly #unsettled: Map<Run, string> = new Map();
  /** Requests that are being checked, by their viewers' ids: whether they were stopped meanwhile. */
  readonly #checking: Map<string, { stopped: boolean }> = new Map();
  readonly #others: Others | undefined;
  /** Of all logs. */
  #logged = 0;

  constructor(options: ChatOptions<unknown, never>) {
    this.#options = options;
    this.#limits = limitsOf(options);
    if (!options.sync) return;
    this.#others = new Others(options.sync, {
      runs: this.#runs,
      leave: (peer) => this.#leave(peer),
      shown: this.#shown,
      maxFinding: this.#limits.maxRunsPerPeer,
      report: (error) => this.#report(error, { stage: "sync" }),
    });
  }

  async receive(peer: AnyPeer, message: Message<never>): Promise<void> {
    const frame = parse(message.text());
    // Not of a chat at all: nothing can be told by a frame.
    if (!frame) return peer.close(1008, UNFIT);
    const viewer = viewerAt(peer, frame.requestId);
    if (frame.type === "abort") return this.#abort(viewer.id);
    const asked = { stopped: false };
    this.#checking.set(viewer.id, asked);
    const request = await this.#check(peer, frame).finally(() => this.#checking.delete(viewer.id));
    if (hasLeft(peer) && frame.type === "resume") return;
    if (!request) return reply(viewer, { type: "error", errorText: UNFIT });
    const key = this.#keyOf(peer, frame.id as string);
    if (frame.type === "resume") return await this.#resume(key, viewer, asked.stopped);
    if (!asked.stopped) this.#start(peer, key, { ...request, requestId: frame.requestId }, viewer);
  }

  /** The request as it was validated. */
  async #check(peer: AnyPeer, frame: Frame): Promise<ChatRequest<unknown> | undefined> {
    if (!isRequest(frame)) return;
    try {
      const verdict = await this.#options.validate?.({ value: frame });
      if (verdict && !verdict.success) return;
      return (verdict?.data ?? frame) as ChatRequest<unknown>;
    } catch (error) {
      this.#report(error, { stage: "validate", chat: frame.id as string, peer });
    }
  }

  /** A chat is its owner's: another's chat of the same id is another chat. */
  #keyOf(peer: AnyPeer, chat: string): string {
    const owner = this.#options.owner ? this.#options.owner(peer) : userOf(peer);
    return JSON.stringify([peer.namespace, owner, chat]);
  }

  #start(peer: AnyPeer, key: string, request: ChatRequest<unknown>, viewer: Viewer): void {
    const former = this.#runs.get(key);
    if (former?.phase === "running") return reply(viewer, { type: "error", errorText: BUSY });
    former?.end({ type: "end" });
    former?.forget();
    if (!this.#hasRoom(peer.id)) return reply(viewer, { type: "error", errorText: FULL });
    const run = new Run(this.#limits, peer.id, {
      grown: (by) => this.#onGrown(run, by),
      shown: (id) => {
        this.#shown.set(id, run);
        this.#unsettled.set(run, key); // perhaps again
      },
      hidden: (id) => void (this.#shown.get(id) === run && this.#shown.delete(id)),
      settled: () => void this.#unsettled.delete(run),
      forgotten: () => void (this.#runs.get(key) === run && this.#runs.delete(key)),
    });
    this.#runs.set(key, run);
    this.#unsettled.set(run, key);
    run.add(viewer);
    if (hasLeft(peer)) run.leave(peer.id); // while its request was being checked
    this.#others?.begin(key, run);
    this.#answer(run, request, peer);
  }

  /** Whether one more may begin, if need be in the place of the oldest that has ended. */
  #hasRoom(peer: string): boolean {
    let own = 0;
    for (const run of this.#runs.values()) if (run.starter === peer && !run.isOver) own++;
    if (own >= this.#limits.maxRunsPerPeer) return false;
    return this.#runs.size < this.#limits.maxRuns || this.#forgetOldest();
  }

  #forgetOldest(): boolean {
    for (const run of this.#runs.values()) {
      if (!run.isOver) continue;
      run.forget();
      return true;
    }
    return false;
  }

  #onGrown(run: Run, by: number): void {
    this.#logged += by;
    while (this.#logged > this.#limits.maxTotalLog && this.#forgetOldest());
    if (this.#logged > this.#limits.maxTotalLog && by > 0) run.giveUpLog();
  }

  async #answer(run: Run, request: ChatRequest<unknown>, peer: AnyPeer): Promise<void> {
    try {
      const { signal } = run;
      await run.play(await this.#options.respond(request, { signal, peer }));
    } catch (error) {
      // What was stopped mostly says that it was.
      if (run.phase !== "running") return run.end({ type: "end" });
      const about = { chat: request.id, peer };
      this.#report(error, { stage: "respond", ...about });
      run.fail(this.#textOf(error, about));
    }
  }

  #textOf(error: unknown, about: { chat: string; peer: AnyPeer }): string {
    try {
      const text: unknown = this.#options.errorText?.(error);
      return typeof text === "string" ? text : FAILED; // an object might say far more
    } catch (failure) {
      this.#report(failure, { stage: "errorText", ...about });
      return FAILED;
    }
  }

  async #resume(key: string, viewer: Viewer, stopped: boolean): Promise<void> {
    const run = this.#runs.get(key);
    if (run) {
      if (stopped) return run.stop();
      if (run.isWhole) reply(viewer, { type: "start" });
      return run.add(viewer);
    }
    const finding = this.#others?.find(key, viewer);
    if (stopped) return this.#others?.stop(viewer.id);
    const there = await finding;
    if (there) return;
    const isFull = this.#others && there === undefined;
    reply(viewer, isFull ? { type: "error", errorText: FULL } : { type: "no-active" });
  }

  #abort(id: string): void {
    const asked = this.#checking.get(id);
    if (asked) return void (asked.stopped = true);
    const run = this.#shown.get(id);
    if (run) run.stop(id);
    else this.#others?.stop(id);
  }

  /** The peer is shown nothing any more; its runs go on. */
  leave(peer: string): void {
    this.#leave(peer);
    this.#others?.leave(peer);
  }

  #leave(peer: string): void {
    for (const run of this.#unsettled.keys()) run.leave(peer);
  }

  /** Leaves in the context of a session that moves what it is shown, and how far. */
  suspend(peer: AnyPeer): void {
    const shown: Shown[] = this.#others!.take(peer.id);
    for (const [run, key] of this.#unsettled) {
      const taken = run.take(peer.id);
      if (!taken) continue;
      shown.push({ key, ...taken });
      this.#others!.expect(run, { key, ...taken });
    }
    if (shown.length > 0) Object.assign(peer.context, { [`${SHOWN} ${peer.id}`]: shown });
  }

  /** Goes on with what the session was shown. */
  revive(peer: AnyPeer): void {
    const context = peer.context as Record<string, Shown[]>;
    const shown = context[`${SHOWN} ${peer.id}`] ?? [];
    delete context[`${SHOWN} ${peer.id}`];
    for (const { key, viewer: id, place } of shown) {
      const viewer = viewerAt(peer, requestOf(id));
      const run = this.#runs.get(key);
      if (!run) this.#others!.follow(key, viewer, place);
      else {
        this.#others!.dismiss(id);
        run.add(viewer, place);
      }
    }
  }

  async settled({ signal }: { signal?: AbortSignal | undefined } = {}): Promise<void> {
    const { promise, reject } = deferred<never>();
    const abort = () => {
      reject(signal!.reason);
      for (const run of [...this.#runs.values()]) run.abandon();
    };
    if (signal?.aborted) abort();
    signal?.addEventListener("abort", abort);
    // Where timers can do so, ours keep no process alive: it would end before its answers have.
    const awake = setInterval(() => {}, WATCH_PERIOD);
    promise.catch(() => {}); // told by the race, where there is one
    try {
      if (signal?.aborted) await promise;
      for (;;) {
        const waits = [...this.#unsettled.keys()].map((run) => run.settled);
        if (this.#others?.alone) waits.push(this.#others.alone);
        if (waits.length === 0) break;
        await Promise.race([promise, ...waits]);
      }
      await this.#others?.said(promise);
    } finally {
      this.#others?.close();
      await this.#others?.said(promise).catch(() => {});
      clearInterval(awake);
      signal?.removeEventListener("abort", abort);
    }
  }

  #report(error: unknown, context: ChatErrorContext): void {
    const { onError } = this.#options;
    if (!onError) return console.error(`[duplex-sse] ${context.stage} failed:`, error);
    try {
      onError.call(this.#options, error, context);
    } catch (failure) {
      console.error("[duplex-sse] onError failed:", failure, "It was told:", error);
    }
  }
}

/** By default: who the user is. An object that cannot tell would be everybody's. */
function userOf(peer: AnyPeer): string {
  const { user } = Object(peer.context) as { user?: unknown };
  const id = typeof user === "object" && user !== null ? (user as { id?: unknown }).id : user;
  if (typeof id === "string" || typeof id === "number" || typeof id === "bigint") return `${id}`;
  if (user === undefined || user === null) return "";
  throw new TypeError("context.user is no string, and has no id: set the option `owner`");
}

// --- Other instances ---

/** What instances say to each other: who has a run, and what it shows. */
type Word =
  | { kind: "begin"; key: string; run: string; from: string }
  | { kind: "busy"; run: string }
  | Find
  | { kind: "here"; viewer: string; turn: number; from: string }
  | { kind: "none"; viewer: string; turn: number }
  | { kind: "show"; viewer: string; turn: number; at: Place; reply: Reply; place: Place }
  | { kind: "took"; viewer: string; turn: number; n: number }
  | { kind: "had"; viewer: string; turn: number }
  | { kind: "stop"; viewer: string; from: string }
  | { kind: "stopped"; viewer: string }
  | { kind: "leave"; peer: string };

interface Find {
  readonly kind: "find";
  readonly key: string;
  readonly viewer: string;
  readonly from: string;
  /** Whose run it was; else whoever has it answers. */
  readonly owner?: string | undefined;
  readonly turn: number;
  readonly place: Place;
}

/** What {@link Others} are told of this instance. */
interface Home {
  /** By owner and chat. */
  readonly runs: ReadonlyMap<string, Run>;
  /** By the ids of their viewers. */
  readonly shown: ReadonlyMap<string, Run>;
  /** No run is shown to the peer any more. */
  leave(peer: string): void;
  /** How many chats a peer may look for at once: all other instances are asked for each. */
  readonly maxFinding: number;
  readonly report: (error: unknown) => void;
}

/**
 * Runs of other instances, and viewers there of runs here. Words may get lost, be repeated, and stay
 * away with their instance: whoever misses one asks again, from the place where it is, in a new turn.
 */
class Others {
  readonly #id: string = crypto.randomUUID();
  readonly #driver: SyncDriver;
  readonly #home: Home;
  /** How many of its questions each peer waits for. */
  readonly #finding: Map<string, number> = new Map();
  /** Viewers here of runs elsewhere. */
  readonly #remotes: Map<string, Remote> = new Map();
  /** Viewers elsewhere of runs here, until they have said that they had all. */
  readonly #guests: Map<string, Guest> = new Map();
  #alone: Deferred<void> | undefined;
  /** Words that the driver has not yet published. */
  readonly #saying: Set<Promise<void>> = new Set();
  #timer: ReturnType<typeof setInterval> | undefined;
  #isClosed = false;

  constructor(connect: SyncAdapter, home: Home) {
    this.#home = home;
    this.#driver = connect({ id: this.#id });
    this.#try(() => this.#driver.subscribe((message) => this.#receive(message)));
  }

  /** Hears and says no more. */
  close(): void {
    this.#isClosed = true;
    clearInterval(this.#timer);
    this.#try(() => this.#driver.close?.());
  }

  /** Resolves when all that was said is published, or the driver has had its time. Fails as `hurry` does. */
  async said(hurry: Promise<never>): Promise<void> {
    const { promise, resolve } = deferred();
    const late = setTimeout(resolve, SAY_TIMEOUT);
    await Promise.race([hurry, promise, Promise.all(this.#saying)])
      .finally(() => clearTimeout(late));
  }

  /** Resolves when nobody elsewhere has yet to be shown the end of a run; undefined: nobody has. */
  get alone(): Promise<void> | undefined {
    return this.#guests.size > 0 ? (this.#alone ??= deferred()).promise : undefined;
  }

  /** A viewer that was here will ask for the rest from elsewhere, which its instance may not outlive. */
  expect(run: Run, shown: Shown): void {
    this.#guests.set(shown.viewer, new Guest(run, { ...shown, turn: 0 }, () => {}));
    this.#watch();
  }

  /** A viewer elsewhere needs no more, or is here again. */
  dismiss(viewer: string): void {
    this.#guests.delete(viewer);
    if (this.#guests.size > 0) return;
    this.#alone?.resolve();
    this.#alone = undefined;
  }

  /** Says that a run has begun: elsewhere, of one chat, none may be under way, and none be kept. */
  begin(key: string, { id }: Run): void {
    this.#say("*", { kind: "begin", key, run: id, from: this.#id });
  }

  /** Whether another instance has the run, and shows it from now on; undefined: the peer asks too much. */
  async find(key: string, viewer: Viewer): Promise<boolean | undefined> {
    const { peer } = viewer;
    const others = this.#finding.get(peer) ?? 0;
    if (others >= this.#home.maxFinding) return;
    this.#finding.set(peer, others + 1);
    const { promise, resolve } = deferred<boolean>();
    this.#ask(new Remote(key, viewer, START, resolve));
    const late = setTimeout(() => resolve(false), FIND_TIMEOUT);
    const there = await promise.finally(() => clearTimeout(late));
    if (!there) this.#remotes.delete(viewer.id);
    this.#found(peer);
    this.#watch();
    return there;
  }

  #found(peer: string): void {
    const left = this.#finding.get(peer)! - 1;
    if (left > 0) this.#finding.set(peer, left);
    else this.#finding.delete(peer);
  }

  /** Goes on showing a run that another instance has. */
  follow(key: string, viewer: Viewer, place: Place): void {
    this.#ask(new Remote(key, viewer, place));
  }

  #ask(remote: Remote): void {
    const { key, viewer, place, owner } = remote;
    this.#remotes.set(viewer.id, remote);
    this.#watch();
    const turn = remote.nextTurn();
    const asked = { key, viewer: viewer.id, owner, turn, place };
    this.#say(owner ?? "*", { kind: "find", from: this.#id, ...asked });
  }

  stop(id: string): void {
    const remote = this.#remotes.get(id);
    if (!remote) return;
    remote.stop();
    this.#say(remote.owner ?? "*", { kind: "stop", viewer: id, from: this.#id });
  }

  leave(peer: string): void {
    if (this.take(peer).length > 0) this.#say("*", { kind: "leave", peer });
  }

  /** What the peer is shown, which it is no more. */
  take(peer: string): Shown[] {
    const taken = [...this.#remotes.values()].filter(({ viewer }) => viewer.peer === peer);
    for (const remote of taken) {
      remote.settle(false);
      this.#remotes.delete(remote.viewer.id);
    }
    this.#watch();
    return taken.filter(({ phase }) => phase !== "stopping")
      .map(({ key, viewer, place }) => ({ key, viewer: viewer.id, place }));
  }

  #receive({ namespace, topic, data }: SyncMessage): void {
    if (namespace !== NAMESPACE || typeof data !== "string") return;
    if (topic !== topicOf(this.#id) && topic !== topicOf("*")) return;
    try {
      this.#hear(JSON.parse(data) as Word);
    } catch (error) {
      this.#home.report(error);
    }
    this.#watch();
  }

  #hear(word: Word): void {
    switch (word.kind) {
      case "begin":
        return this.#onBegin(word);
      case "busy":
        return this.#runOf(word.run)?.fail(BUSY);
      case "find":
        return this.#onFind(word);
      case "took":
        return this.#guests.get(word.viewer)?.took(word.turn, word.n);
      case "had":
        if (this.#guests.get(word.viewer)?.turn === word.turn) this.dismiss(word.viewer);
        return;
      case "stop":
        this.#home.shown.get(word.viewer)?.stop(word.viewer);
        this.dismiss(word.viewer);
        return this.#say(word.from, { kind: "stopped", viewer: word.viewer });
      case "leave":
        for (const [id, { peer }] of this.#guests) if (peer === word.peer) this.dismiss(id);
        return this.#home.leave(word.peer);
      default:
        return this.#onAnswer(word);
    }
  }

  #runOf(id: string): Run | undefined {
    for (const run of this.#home.runs.values()) if (run.id === id) return run;
  }

  #onBegin({ key, run: id, from }: Word & { kind: "begin" }): void {
    const run = this.#home.runs.get(key);
    if (run?.phase !== "running") {
      run?.end({ type: "end" });
      return run?.forget();
    }
    // Of two that have begun at once, both instances know which one goes on.
    if (run.age > DOUBT || run.id < id) return this.#say(from, { kind: "busy", run: id });
    run.fail(BUSY);
  }

  /** Shows a run that is here to a viewer elsewhere. */
  #onFind(find: Find): void {
    const { key, viewer, from, owner, turn } = find;
    // Whoever has not had the end of a run may go on with it, when it is kept for nobody else.
    const former = this.#guests.get(viewer);
    const run = former && former.key === key ? former.run : this.#home.runs.get(key);
    if (!run) {
      if (owner) this.#say(from, { kind: "none", viewer, turn });
      return this.dismiss(viewer);
    }
    this.#say(from, { kind: "here", viewer, turn, from: this.#id });
    const guest = new Guest(run, find, (at, reply, place) => {
      this.#say(from, { kind: "show", viewer, turn, at, reply, place });
    });
    this.#guests.set(viewer, guest);
    this.#watch();
    run.add(guest, find.place);
  }

  /** What another instance says of a run that it has, or has not. */
  #onAnswer(word: Word & { kind: "here" | "none" | "show" | "stopped" }): void {
    const remote = this.#remotes.get(word.viewer);
    if (!remote) return;
    if (word.kind === "stopped") {
      if (remote.phase === "stopping") this.#remotes.delete(word.viewer);
      return;
    }
    if (word.turn !== remote.turn || remote.phase === "stopping") return;
    if (word.kind === "here") return remote.found(word.from);
    if (word.kind === "none") return this.#lose(remote);
    if (!remote.owner || word.at.sequence < remote.place.sequence) return; // it was shown
    // One was lost; or it is of an answer to the same question as the one that we follow.
    if (!isSame(word.at, remote.place)) return this.#ask(remote);
    remote.show(word.reply, word.place);
    if (isLast(word.reply)) {
      this.#remotes.delete(word.viewer);
      return this.#say(remote.owner, { kind: "had", viewer: word.viewer, turn: remote.turn });
    }
    if (remote.place.sequence - remote.taken >= WINDOW / 4) this.#confirm(remote);
  }

  /** Says that what was shown has been taken, as soon as the viewer can take more. */
  async #confirm(remote: Remote): Promise<void> {
    const { turn, place } = remote;
    remote.taken = place.sequence; // is about to be
    await remote.viewer.full();
    if (remote.turn !== turn) return;
    remote.confirmed = place.sequence;
    this.#sayTaken(remote);
  }

  #sayTaken({ owner, viewer, turn, confirmed: n }: Remote): void {
    if (owner) this.#say(owner, { kind: "took", viewer: viewer.id, turn, n });
  }

  #lose({ viewer, place }: Remote): void {
    this.#remotes.delete(viewer.id);
    viewer.show({ type: "error", errorText: FAILED }, place);
  }

  /** Asks after silent instances, while there is anybody to be shown anything. */
  #watch(): void {
    if (this.#isClosed || this.#remotes.size + this.#guests.size === 0) {
      clearInterval(this.#timer);
      return void (this.#timer = undefined);
    }
    this.#timer ??= setInterval(() => {
      for (const remote of this.#remotes.values()) {
        if (!remote.tick()) this.#sayTaken(remote);
        else if (remote.silences > MAX_SILENCES) this.#lose(remote);
        else if (remote.phase === "stopping") this.stop(remote.viewer.id);
        else this.#ask(remote);
      }
      for (const [id, guest] of this.#guests) {
        if (++guest.silences <= MAX_SILENCES) continue;
        this.dismiss(id);
        this.#home.leave(guest.peer);
      }
      this.#watch();
    }, WATCH_PERIOD);
    unref(this.#timer);
  }

  #say(to: string, word: Word): void {
    if (this.#isClosed) return;
    const data = JSON.stringify(word);
    const message = { namespace: NAMESPACE, topic: topicOf(to), data };
    this.#try(() => this.#driver.publish(message));
  }

  #try(action: () => MaybePromise<void>): void {
    const work = (async () => await action())().catch((error) => this.#home.report(error))
      .finally(() => this.#saying.delete(work));
    this.#saying.add(work);
  }
}

/** No peer can be in a namespace that begins so, and `cluster` on the same channel passes it over. */
const NAMESPACE = "\0duplex-chat";

function topicOf(instance: string): string {
  return `chat ${instance}`;
}

function isSame(one: Place, other: Place): boolean {
  return one.index === other.index && one.offset === other.offset &&
    one.sequence === other.sequence;
}

function isLast({ type }: Reply): boolean {
  return type === "end" || type === "error";
}

/** A viewer here of a run elsewhere. */
class Remote {
  phase: "asking" | "shown" | "stopping" = "asking";
  readonly key: string;
  readonly viewer: Viewer;
  /** How far it has been shown. */
  place: Place;
  owner: string | undefined;
  /** Which of our questions is being answered; words of earlier ones mean nothing. */
  turn = 0;
  /** The number of the frame up to which the viewer takes, and up to which the owner was told so. */
  taken = 0;
  confirmed = 0;
  /** How often in sequence nothing was heard for a period. */
  silences = 0;
  #heard = false;
  readonly #settle: ((there: boolean) => void) | undefined;

  constructor(key: string, viewer: Viewer, place: Place, settle?: (there: boolean) => void) {
    this.key = key;
    this.viewer = viewer;
    this.place = place;
    this.#settle = settle;
  }

  nextTurn(): number {
    this.taken = this.confirmed = this.place.sequence;
    return ++this.turn;
  }

  found(owner: string): void {
    this.#heard = true;
    if (this.owner) return; // the first one to say so
    this.owner = owner;
    this.phase = "shown";
    if (this.#settle) this.viewer.show({ type: "start" }, this.place);
    this.settle(true);
  }

  settle(there: boolean): void {
    this.#settle?.(there);
  }

  show(reply: Reply, place: Place): void {
    this.#heard = true;
    this.place = place;
    this.viewer.show(reply, place);
  }

  stop(): void {
    this.phase = "stopping";
    this.settle(true);
  }

  /** Whether nothing was heard since the last tick. */
  tick(): boolean {
    this.silences = this.#heard ? 0 : this.silences + 1;
    this.#heard = false;
    return this.silences > 0;
  }
}

/** A viewer elsewhere of a run here. */
class Guest implements Viewer {
  readonly id: string;
  readonly peer: string;
  readonly key: string;
  readonly run: Run;
  readonly turn: number;
  silences = 0;
  readonly #say: (at: Place, reply: Reply, place: Place) => void;
  #place: Place;
  #taken: number;
  #room: Deferred<void> | undefined;

  constructor(
    run: Run,
    { viewer, key, turn, place }: Shown & { readonly turn: number },
    say: (at: Place, reply: Reply, place: Place) => void,
  ) {
    this.id = viewer;
    this.peer = peerOf(viewer);
    this.key = key;
    this.run = run;
    this.turn = turn;
    this.#place = place;
    this.#taken = place.sequence;
    this.#say = say;
  }

  show(reply: Reply, place: Place): void {
    this.#say(this.#place, reply, place);
    this.#place = place;
  }

  full(): Promise<void> | undefined {
    if (this.#place.sequence - this.#taken < WINDOW) return;
    return (this.#room ??= deferred()).promise;
  }

  took(turn: number, n: number): void {
    if (turn !== this.turn) return;
    this.silences = 0;
    this.#taken = n;
    if (this.full()) return;
    this.#room?.resolve();
    this.#room = undefined;
  }
}

// --- A run: one answer ---

/** What a run tells of itself. */
interface RunEvents {
  grown(by: number): void;
  /** A viewer is shown it, and is no more. */
  shown(viewer: string): void;
  hidden(viewer: string): void;
  settled(): void;
  forgotten(): void;
}

/** One answer: what there is of it, and who is shown it. */
class Run {
  /** running → stopping → ended, or running → ended; forgotten at last. */
  phase: "running" | "stopping" | "ended" | "forgotten" = "running";
  readonly id: string = crypto.randomUUID();
  /** The peer that asked for it. */
  readonly starter: string;
  readonly #limits: Limits;
  readonly #events: RunEvents;
  readonly #abort: AbortController = new AbortController();
  readonly #log: ChatLog = new ChatLog();
  /** By peer, since one is shown it once. */
  readonly #showings: Map<string, Showing> = new Map();
  readonly #born: number = performance.now();
  #settled: Deferred<void> = deferred();
  /** Of whatever is waited for: viewers, the end of what was stopped, or to be forgotten. */
  #timer: ReturnType<typeof setTimeout> | undefined;
  #reader: ChunkReader | undefined;
  /** What its viewers are told at its end. */
  #last: Reply = { type: "end" };
  /** While others have their turn, chunks are gathered, and shown together. */
  #rest: Promise<void> | undefined;
  #hurry = 0;
  /** Text was shown, and more of it waits. */
  #gathering: ReturnType<typeof setTimeout> | undefined;
  /** Whether there is anything that was not yet given to all. */
  #hasNews = false;

  constructor(limits: Limits, starter: string, events: RunEvents) {
    this.#limits = limits;
    this.starter = starter;
    this.#events = events;
  }

  get signal(): AbortSignal {
    return this.#abort.signal;
  }

  /** In ms. */
  get age(): number {
    return performance.now() - this.#born;
  }

  get isOver(): boolean {
    return this.phase === "ended" || this.phase === "forgotten";
  }

  /** Whether it can be shown from its beginning. */
  get isWhole(): boolean {
    return this.#log.isKept;
  }

  /** Resolves when it is over, and all its viewers know. */
  get settled(): Promise<void> {
    return this.#settled.promise;
  }

  /** Whether this viewer is shown it. */
  shows(id: string): boolean {
    return this.#showings.get(peerOf(id))?.viewer.id === id;
  }

  /** Shows the run from a place on; a peer's earlier request for it ends. */
  add(viewer: Viewer, place: Place = START): void {
    const former = this.#showings.get(viewer.peer);
    if (former) this.#remove(former);
    if (former && former.viewer.id !== viewer.id) former.viewer.show({ type: "end" }, former.place);
    if (!this.#log.has(place)) return viewer.show({ type: "error", errorText: TOO_LONG }, place);
    const showing = new Showing(viewer, this.#log, place, () => this.#remove(showing));
    if (this.isOver && this.#showings.size === 0) this.#settled = deferred();
    this.#showings.set(viewer.peer, showing);
    this.#events.shown(viewer.id);
    if (this.phase === "running") clearTimeout(this.#timer);
    if (this.isOver) showing.end(this.#last);
    else showing.pump();
  }

  #remove(showing: Showing): void {
    showing.cancel();
    this.#showings.delete(showing.viewer.peer);
    this.#events.hidden(showing.viewer.id);
    this.#settle();
  }

  #settle(): void {
    if (!this.isOver || this.#showings.size > 0) return;
    this.#settled.resolve();
    this.#events.settled();
  }

  /** Shows all that the stream brings, to its end. */
  async play(stream: ChatStream): Promise<void> {
    const reader = readerOf(stream);
    this.#reader = reader;
    if (this.isOver) return cancel(reader); // stopped before it began
    for (let item = await reader.read(); !item.done; item = await reader.read()) {
      if (this.isOver) return;
      this.#show(item.value);
      // A source that never waits would leave nobody else a turn.
      if (++this.#hurry > MAX_HURRY) await this.#rest;
    }
    this.end({ type: "end" });
  }

  #show(chunk: ChatChunk): void {
    this.#events.grown(this.#log.push(chunk));
    if (this.#log.size > this.#limits.maxLog) this.giveUpLog();
    this.#hasNews = true;
    // What is not kept is not held back either: it would grow without a bound.
    if (textOf(chunk) === undefined || !this.#log.isKept) this.#gatherNoMore();
    if (this.#rest) return;
    this.#pump();
    this.#rest = new Promise((resolve) =>
      setTimeout(() => {
        this.#rest = undefined;
        this.#hurry = 0;
        this.#pump();
        resolve();
      })
    );
  }

  #pump(): void {
    if (!this.#hasNews || this.#gathering !== undefined) return;
    this.#hasNews = false;
    const { gather } = this.#limits;
    if (gather > 0 && this.#log.isKept && this.#log.endsInText) {
      this.#gathering = setTimeout(() => {
        this.#gatherNoMore();
        this.#pump();
      }, Math.min(gather, MAX_DELAY));
    }
    for (const showing of this.#showings.values()) {
      if (this.#log.isKept) showing.pump();
      else showing.hurry();
    }
    this.#log.trim();
  }

  #gatherNoMore(): void {
    clearTimeout(this.#gathering);
    this.#gathering = undefined;
  }

  /** Keeps nothing that was shown: nobody can resume it any more. */
  giveUpLog(): void {
    if (!this.#log.isKept) return;
    for (const showing of this.#showings.values()) showing.hurry();
    this.#events.grown(-this.#log.giveUp());
  }

  fail(errorText: string): void {
    this.end({ type: "error", errorText });
    this.forget(); // "failed responses cannot resume", so that a retry is a new one
  }

  /** Ends it for all; the viewer who said so is shown no more. */
  stop(id?: string): void {
    if (id !== undefined && this.shows(id)) this.#remove(this.#showings.get(peerOf(id))!);
    if (this.phase !== "running") return;
    this.phase = "stopping";
    this.#abort.abort();
    // It may say that it was stopped, and what it has until then.
    this.#wait(STOP_TIMEOUT, () => this.end({ type: "end" }));
  }

  leave(peer: string): void {
    if (this.take(peer)) this.#unwatched(this.#limits.keepUnwatched);
  }

  /** How far a peer has been shown it, which is shown no more of it here, but may be elsewhere. */
  take(peer: string): { viewer: string; place: Place } | undefined {
    const showing = this.#showings.get(peer);
    if (!showing) return;
    this.#remove(showing);
    this.#unwatched(Math.max(this.#limits.keepUnwatched, MOVE_TIMEOUT));
    return { viewer: showing.viewer.id, place: showing.place };
  }

  #unwatched(ms: number): void {
    if (this.#showings.size || this.phase !== "running") return;
    this.#wait(ms, () => this.stop());
  }

  end(last: Reply): void {
    if (this.isOver) return;
    this.phase = "ended";
    this.#last = last;
    this.#gatherNoMore();
    this.#abort.abort();
    if (this.#reader) cancel(this.#reader);
    for (const showing of this.#showings.values()) showing.end(last);
    this.#settle();
    this.#wait(this.#limits.keepEnded, () => this.forget());
  }

  forget(): void {
    if (this.phase === "forgotten") return;
    clearTimeout(this.#timer);
    this.phase = "forgotten";
    this.#events.forgotten();
    this.#events.grown(-this.#log.size); // viewers that lag hold it a little longer
  }

  abandon(): void {
    this.stop();
    this.end({ type: "end" });
    this.forget();
  }

  #wait(ms: number, then: () => void): void {
    clearTimeout(this.#timer);
    if (ms > MAX_DELAY) return;
    this.#timer = setTimeout(then, ms);
    unref(this.#timer);
  }
}

// --- Who is shown it: each at its own pace ---

/** One viewer of one log. */
class Showing {
  readonly viewer: Viewer;
  place: Place;
  readonly #log: ChatLog;
  readonly #onEnd: () => void;
  #phase: "showing" | "waiting" | "over" = "showing";
  /** Comes after all that the log has. */
  #last: Reply | undefined;

  constructor(viewer: Viewer, log: ChatLog, place: Place, onEnd: () => void) {
    this.viewer = viewer;
    this.#log = log;
    this.place = place;
    this.#onEnd = onEnd;
  }

  /** Shows what there is, as long as the viewer takes it. */
  pump(): void {
    while (this.#phase === "showing" && this.#showNext()) this.#waitIfFull();
  }

  /** Shows all that there is, since it will not be kept. */
  hurry(): void {
    while (this.#phase !== "over" && this.#showNext());
  }

  #showNext(): boolean {
    const piece = this.#log.after(this.place);
    if (piece) {
      const { sequence } = this.place;
      this.place = { ...piece.place, sequence: sequence + 1 };
      this.viewer.show({ type: "chunk", sequence, chunk: piece.chunk }, this.place);
      return true;
    }
    if (!this.#last) return false;
    this.#phase = "over";
    this.viewer.show(this.#last, this.place);
    this.#onEnd();
    return false;
  }

  #waitIfFull(): void {
    const room = this.viewer.full();
    if (!room) return;
    this.#phase = "waiting";
    room.then(() => {
      if (this.#phase !== "waiting") return;
      this.#phase = "showing";
      this.pump();
    });
  }

  end(last: Reply): void {
    this.#last = last;
    this.pump();
  }

  cancel(): void {
    this.#phase = "over";
  }
}

/** What there is of an answer: as few chunks as say the same. */
class ChatLog {
  /** In characters of JSON, about. */
  size = 0;
  /** Whether it can be shown from its beginning. */
  isKept = true;
  readonly #chunks: ChatChunk[] = [];
  /** How many chunks, from the first, are gone, and how long the text of the last of them was. */
  #gone = 0;
  #goneText = 0;

  get endsInText(): boolean {
    const last = this.#chunks.at(-1);
    return last !== undefined && textOf(last) !== undefined;
  }

  /** How much it has grown. */
  push(chunk: ChatChunk): number {
    const last = this.#chunks.at(-1);
    const joined = last && join(last, chunk);
    let cost: number;
    if (joined) {
      this.#chunks[this.#chunks.length - 1] = joined;
      cost = textOf(chunk)!.length;
    } else {
      const json = JSON.stringify(chunk);
      this.#chunks.push(JSON.parse(json)); // the source may go on using its own
      cost = json.length + CHUNK_COST;
    }
    if (!this.isKept) return 0;
    this.size += cost;
    return cost;
  }

  /** Whether nothing that comes after the place is gone. */
  has({ index, offset }: Place): boolean {
    if (index === this.#gone - 1) return offset > 0 && offset >= this.#goneText;
    return index >= this.#gone;
  }

  /** What comes after a place, as one chunk, and where the next one is. */
  after({ index, offset }: Omit<Place, "sequence">): Piece | undefined {
    if (index < this.#gone) return this.after({ index: this.#gone, offset: 0 });
    const chunk = this.#chunks[index - this.#gone];
    if (!chunk) return;
    const text = textOf(chunk);
    if (!text) return { chunk, place: { index: index + 1, offset: 0 } };
    if (offset >= text.length) return this.after({ index: index + 1, offset: 0 });
    const end = Math.min(offset + MAX_PIECE, text.length);
    const whole = end - offset === text.length;
    const piece = whole ? chunk : withText(chunk, text.slice(offset, end));
    return { chunk: piece, place: { index, offset: end } };
  }

  /** Keeps from now on only what was not shown. By how much it has shrunk. */
  giveUp(): number {
    const { size } = this;
    this.size = 0;
    this.isKept = false;
    this.trim();
    return size;
  }

  /** Lets go of what was shown, if it is not kept. */
  trim(): void {
    const last = this.#chunks.at(-1);
    if (this.isKept || !last) return;
    this.#gone += this.#chunks.length;
    this.#goneText = textOf(last)?.length ?? 0;
    this.#chunks.length = 0;
  }
}

interface Piece {
  readonly chunk: ChatChunk;
  /** Where the next one is. */
  readonly place: Omit<Place, "sequence">;
}

/** Chunks that continue a text, a reasoning or a tool's input, and the field that does. */
const TEXTS: Record<string, string> = {
  "text-delta": "delta",
  "reasoning-delta": "delta",
  "tool-input-delta": "inputTextDelta",
};

/** The text of a chunk that continues one, and says nothing else. */
function textOf(chunk: ChatChunk): string | undefined {
  const field = Object.hasOwn(TEXTS, chunk.type) ? TEXTS[chunk.type]! : "";
  const text = (chunk as unknown as Record<string, unknown>)[field];
  return typeof text === "string" && Object.keys(chunk).length === 3 ? text : undefined;
}

function withText(chunk: ChatChunk, text: string): ChatChunk {
  return { ...chunk, [TEXTS[chunk.type]!]: text } as ChatChunk;
}

/** One chunk for two that follow each other, if nothing is lost by it. */
function join(last: ChatChunk, chunk: ChatChunk): ChatChunk | undefined {
  const [text, more] = [textOf(last), textOf(chunk)];
  if (!text || more === undefined || last.type !== chunk.type) return;
  const { id, toolCallId } = last as { id?: unknown; toolCallId?: unknown };
  const other = chunk as { id?: unknown; toolCallId?: unknown };
  if (id === other.id && toolCallId === other.toolCallId) return withText(last, text + more);
}

// --- Streams ---

interface ChunkReader {
  read(): Promise<{ done: true } | { done: false; value: ChatChunk }>;
  cancel(): unknown;
}

/** WebKit cannot iterate a stream, and a generator has no reader. */
function readerOf(stream: ChatStream): ChunkReader {
  if (stream instanceof ReadableStream) return stream.getReader() as ChunkReader;
  const iterator = Object(stream)[Symbol.asyncIterator]?.() as AsyncIterator<ChatChunk> | undefined;
  if (!iterator) throw new TypeError("respond must return a stream of UI message chunks");
  return {
    read: () => iterator.next() as ReturnType<ChunkReader["read"]>,
    cancel: () => iterator.return?.(),
  };
}

/** Nobody waits for its end, nor hears of its failure. */
function cancel(reader: ChunkReader): void {
  (async () => await reader.cancel())().catch(() => {});
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

/** A viewer at this instance: a request of a peer. */
function viewerAt(peer: AnyPeer, requestId: string): Viewer {
  return {
    id: `${peer.id} ${requestId}`,
    peer: peer.id,
    show: (reply) => void peer.send(JSON.stringify({ ...reply, requestId })),
    full() {
      if (peer.bufferedAmount <= MAX_WAITING) return;
      return peer.waitForDrain({ threshold: MAX_WAITING / 4 });
    },
  };
}

/** The ids of peers have no space. */
function peerOf(viewer: string): string {
  return viewer.slice(0, viewer.indexOf(" "));
}

function requestOf(viewer: string): string {
  return viewer.slice(viewer.indexOf(" ") + 1);
}

function reply(viewer: Viewer, reply: Reply): void {
  viewer.show(reply, START);
}

// --- Options ---

interface Limits {
  readonly keepUnwatched: number;
  readonly keepEnded: number;
  readonly maxLog: number;
  readonly maxTotalLog: number;
  readonly maxRuns: number;
  readonly maxRunsPerPeer: number;
  readonly gather: number;
}

function limitsOf(options: Partial<Limits> | ChatOptions<unknown, never>): Limits {
  const numberOf = (name: keyof Limits, fallback: number): number => {
    const value = options[name] ?? fallback;
    if (typeof value === "number" && value >= 0) return value;
    throw new RangeError(`${name} must be a number of at least 0`);
  };
  return {
    keepUnwatched: numberOf("keepUnwatched", KEEP_UNWATCHED),
    keepEnded: numberOf("keepEnded", KEEP_ENDED),
    maxLog: numberOf("maxLog", MAX_LOG),
    maxTotalLog: numberOf("maxTotalLog", MAX_TOTAL_LOG),
    maxRuns: numberOf("maxRuns", MAX_RUNS),
    maxRunsPerPeer: numberOf("maxRunsPerPeer", MAX_RUNS_PER_PEER),
    gather: numberOf("gather", 0),
  };
}

/** Does not keep a process alive, where timers can say so. */
function unref(timer: unknown): void {
  (timer as { unref?(): void }).unref?.();
}

// --- Promises ---

/** As of `Promise.withResolvers`, which Node 20 has not. */
interface Deferred<T> {
  readonly promise: Promise<T>;
  readonly resolve: (value: T) => void;
  readonly reject: (reason: unknown) => void;
}

function deferred<T = void>(): Deferred<T> {
  let resolve!: Deferred<T>["resolve"];
  let reject!: Deferred<T>["reject"];
  const promise = new Promise<T>((yes, no) => [resolve, reject] = [yes, no]);
  return { promise, resolve, reject };
}
