/**
 * A chat of the AI SDK four times: over its HTTP transport, over that with its resumable streams,
 * over a native WebSocket, and over ours. Each is used as its documentation says, and after an
 * error as somebody would who knows it well. For interruptions.ts.
 *
 * @module
 */
import {
  createUIMessageStreamResponse,
  DefaultChatTransport,
  UI_MESSAGE_STREAM_HEADERS,
  type UIMessage,
  type UIMessageChunk,
  WebSocketChatTransport,
} from "ai";
import { createResumableStreamContext } from "resumable-stream/ioredis";
import { Redis } from "ioredis";
import { type ChatChunk, chatHooks } from "../ai.ts";
import { WebSocketSSE } from "../client.ts";
import { cluster } from "../cluster.ts";
import { type Message, type Peer, sseAdapter, type SyncAdapter } from "../server.ts";
import { sleep, type TestContext, type TestServer, until } from "./harness.ts";
import { shutDown } from "./pair.ts";

/** How long a server that is to end has for its last bytes. */
const LINGER = 200;

export type Kind = "http" | "resumable" | "websocket" | "ours";

/** One answer that a model writes. */
export interface Run {
  readonly begun: number;
  /** Undefined while it is being written. */
  ended: number | undefined;
}

/** Where answers come from, which knows what became of them; and where whole ones are saved. */
export class Model {
  readonly tokens: number;
  /** Milliseconds between two tokens. */
  readonly pace: number;
  readonly runs: Run[] = [];
  /** As a database has it. */
  saved: UIMessage | undefined;
  /** Of resumable streams: the one under way, and how it is stopped. */
  active: { id: string; stop(): void } | undefined;

  constructor(tokens: number, pace: number) {
    this.tokens = tokens;
    this.pace = pace;
  }

  async *answer(signal: AbortSignal): AsyncGenerator<ChatChunk> {
    const run: Run = { begun: performance.now(), ended: undefined };
    this.runs.push(run);
    let text = "";
    try {
      yield { type: "start", messageId: "a" } as ChatChunk;
      yield { type: "text-start", id: "1" } as ChatChunk;
      for (let n = 0; n < this.tokens; n++) {
        // By the clock: a late timer does not make the answer longer.
        await sleep(Math.max(0, run.begun + (n + 1) * this.pace - performance.now()), signal);
        if (signal.aborted) return;
        text += `${n} `;
        yield { type: "text-delta", id: "1", delta: `${n} ` } as ChatChunk;
      }
      this.saved = { id: "a", role: "assistant", parts: [{ type: "text", text }] };
      yield { type: "text-end", id: "1" } as ChatChunk;
      yield { type: "finish" };
    } finally {
      run.ended = performance.now();
    }
  }

  get isWriting(): boolean {
    return this.runs.some(({ ended }) => ended === undefined);
  }
}

/** A server of several, perhaps. */
export interface Instance {
  readonly port: number;
  /** Ends it as a deploy does: what is under way may end. */
  retire(): Promise<void>;
}

/** What instances share. */
export interface Shared {
  /** Where the SDK's resumable streams are kept. */
  readonly redis?: number | undefined;
  /** Between instances of chats on sockets. */
  readonly sync?: SyncAdapter | undefined;
  /** The option of `chatHooks`. */
  readonly gather?: number | undefined;
}

export interface Transport {
  readonly chat: DefaultChatTransport<UIMessage> | WebSocketChatTransport<UIMessage>;
  /** What the browser does to connections of a page that it leaves. */
  close(): void;
}

export interface ConnectOptions {
  /** Ends what the page has left behind. */
  readonly signal: AbortSignal;
  onFrame?(text: string): void;
}

export interface Contender {
  /** Whether a page that has lost an answer asks for the rest of it, or for another answer. */
  readonly resumes: boolean;
  serve(t: TestContext, model: Model, shared: Shared): Promise<Instance>;
  connect(url: string, options: ConnectOptions): Transport;
  /** What the button does beside `stop()` of the SDK. */
  stop?(url: string): Promise<unknown>;
}

export const CONTENDERS: Record<Kind, Contender> = {
  http: { resumes: false, serve: serveHttp, connect: connectHttp },
  resumable: {
    resumes: true,
    serve: serveResumable,
    connect: connectHttp,
    // "add a dedicated stop endpoint that […] cancels the active work, and clears the active stream"
    stop: (url) =>
      fetch(`${url}/api/chat/c/stop`, { method: "POST" }).then((r) => r.body?.cancel()),
  },
  websocket: {
    resumes: true,
    serve: serveNative,
    connect: (url, { onFrame }) => connectSocket(WebSocket, url, onFrame),
  },
  ours: {
    resumes: true,
    serve: serveOurs,
    connect: (url, { onFrame, signal }) => {
      class Socket extends WebSocketSSE {
        constructor(url: string | URL, protocols?: string | string[]) {
          super(url, { protocols, signal });
        }
      }
      return connectSocket(Socket as never, url, onFrame);
    },
  },
};

// --- Servers ---

/** The answer ends with its request: so a stop reaches the model. */
async function serveHttp(t: TestContext, model: Model): Promise<Instance> {
  const server = await t.serve(async (request, info) => {
    info?.timeout?.(request, 0);
    if (request.method === "GET") return new Response(null, { status: 204 }); // nothing is kept
    await request.json();
    const stream = streamOf(model.answer(request.signal));
    return createUIMessageStreamResponse({ stream });
  });
  return instanceOf(server, () => written(model));
}

/** The SDK's recipe: the answer goes on in Redis, and its stop has a path of its own. */
async function serveResumable(t: TestContext, model: Model, shared: Shared): Promise<Instance> {
  const [publisher, subscriber] = [new Redis(shared.redis!), new Redis(shared.redis!)];
  t.defer(() => [publisher, subscriber].map((client) => client.disconnect()));
  const context = createResumableStreamContext({ waitUntil: null, publisher, subscriber });
  const server = await t.serve(async (request, info) => {
    info?.timeout?.(request, 0);
    const { pathname } = new URL(request.url);
    if (pathname.endsWith("/stop")) {
      model.active?.stop();
      model.active = undefined;
      return Response.json({ success: true });
    }
    if (request.method === "GET") {
      const stream = model.active && await context.resumeExistingStream(model.active.id);
      if (!stream) return new Response(null, { status: 204 });
      const body = stream.pipeThrough(new TextEncoderStream());
      return new Response(body, { headers: UI_MESSAGE_STREAM_HEADERS });
    }
    await request.json();
    model.active = undefined;
    const abort = new AbortController();
    t.defer(() => abort.abort());
    return createUIMessageStreamResponse({
      stream: streamOf(model.answer(abort.signal)),
      async consumeSseStream({ stream }) {
        const id = crypto.randomUUID();
        await context.createNewResumableStream(id, () => stream);
        model.active = { id, stop: () => abort.abort() };
      },
    });
  });
  return instanceOf(server, () => written(model));
}

/** The same hooks behind native sockets of Deno: what differs is the wire. */
async function serveNative(t: TestContext, model: Model, { sync }: Shared): Promise<Instance> {
  const hooks = hooksOf(t, model, { sync });
  const server = await t.serve((request) => {
    if (request.headers.get("upgrade") !== "websocket") return new Response("No", { status: 426 });
    const { socket, response } = Deno.upgradeWebSocket(request);
    const peer = {
      id: crypto.randomUUID(),
      namespace: "/",
      context: {},
      websocket: socket,
      get bufferedAmount() {
        return socket.bufferedAmount;
      },
      waitForDrain: () => until(() => socket.bufferedAmount === 0, { timeout: 60_000 }),
      send: (data: string) => socket.readyState === 1 && socket.send(data),
      close: (code: number, reason: string) => socket.close(code, reason),
    } as unknown as Peer;
    socket.onmessage = ({ data }) =>
      void hooks.message!(peer, { text: () => data } as unknown as Message);
    socket.onclose = () => void hooks.close!(peer, {});
    socket.onerror = () => {};
    t.defer(() => socket.close());
    return response;
  });
  // A socket stays where it is, so its instance does until the answer is whole.
  return instanceOf(server, () => written(model));
}

async function serveOurs(t: TestContext, model: Model, shared: Shared): Promise<Instance> {
  const hooks = hooksOf(t, model, shared);
  const sync = shared.sync && cluster(shared.sync);
  const ws = sseAdapter({ bidir: true, hooks, sync });
  const server = await t.serve(ws.fetch);
  t.defer(() => shutDown(ws));
  return instanceOf(server, async () => {
    await ws.close(1012);
    await hooks.settled();
  });
}

/** An instance that closes what is still open once all that was under way has ended. */
function instanceOf(server: TestServer, ended: () => Promise<void>): Instance {
  async function retire() {
    await ended();
    await sleep(LINGER);
    await server.close();
  }
  return { port: server.port, retire };
}

function hooksOf(t: TestContext, model: Model, { sync, gather }: Shared) {
  const hooks = chatHooks({ sync, gather, respond: (_, { signal }) => model.answer(signal) });
  t.defer(() => hooks.settled({ signal: AbortSignal.abort() }).catch(() => {}));
  return hooks;
}

/** Resolves when nothing is being written any more: that long a deploy leaves an instance. */
async function written(model: Model): Promise<void> {
  await until(() => !model.isWriting, { timeout: 60_000 });
}

function streamOf(answer: AsyncGenerator<ChatChunk>): ReadableStream<UIMessageChunk> {
  return new ReadableStream({
    async pull(controller) {
      const { done, value } = await answer.next();
      if (done) controller.close();
      else controller.enqueue(value as UIMessageChunk);
    },
    cancel: async () => void await answer.return(undefined),
  });
}

// --- Clients ---

function connectHttp(url: string): Transport {
  const closing = new AbortController();
  const fetchOfPage = async (input: RequestInfo | URL, init?: RequestInit): Promise<Response> => {
    const { body, status, headers } = await fetch(input, init);
    if (!body) return new Response(null, { status, headers });
    // Browsers close the connection of what is aborted; Deno's fetch may have lost the signal.
    const signals = [closing.signal, init?.signal];
    const closed = signals.reduce<ReadableStream<Uint8Array<ArrayBuffer>>>(
      (body, signal) => body.pipeThrough(new TransformStream(), signal ? { signal } : {}),
      body,
    );
    return new Response(closed, { status, headers });
  };
  const chat = new DefaultChatTransport<UIMessage>({
    api: `${url}/api/chat`,
    fetch: fetchOfPage as typeof fetch, // that of Bun's types can `preconnect`
  });
  return { chat, close: () => closing.abort() };
}

function connectSocket(
  Socket: typeof WebSocket,
  url: string,
  onFrame?: (text: string) => void,
): Transport {
  class Heard extends Socket {
    constructor(url: string | URL, protocols?: string | string[]) {
      super(url, protocols);
      this.addEventListener("message", ({ data }) => onFrame?.(data));
    }
  }
  const chat = new WebSocketChatTransport<UIMessage>({
    url,
    webSocket: (onFrame ? Heard : Socket) as never,
  });
  return { chat, close: () => chat.close() };
}
