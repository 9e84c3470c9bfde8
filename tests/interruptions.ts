/**
 * One answer of a model, and what may interrupt it, over each of contenders.ts. For bench/ai.ts,
 * which compares them, and for ai.interruptions.test.ts, which holds ours to what it promises.
 *
 * @module
 */
import { Chat } from "@ai-sdk/react";
import type { UIMessage } from "ai";
import { roundRobin } from "./bus.ts";
import { chaos, type ChaosProxy } from "./chaos.ts";
import {
  type Contender,
  CONTENDERS,
  type Kind,
  Model,
  type Shared,
  type Transport,
} from "./contenders.ts";
import { sleep, type TestContext, until } from "./harness.ts";

/** What became of an answer. */
export interface Result {
  /** Tokens of it that the page does not show at last. */
  lost: number;
  /** Tokens that it shows more than once. */
  repeated: number;
  /** Answers that were written on when their page had given them up, stopped them or asked anew. */
  orphaned: number;
  /** How many answers the model has begun. */
  begun: number;
  /** How often the SDK's `Chat` failed, so that the page's own code had to go on. */
  failures: number;
  /** From each interruption to the next token that was not there before, in ms. */
  gaps: number[];
  /** Interruptions after which none came. */
  never: number;
}

/** How long each takes, in ms. */
export interface Speed {
  /** Between two tokens. */
  readonly pace: number;
  /** What a platform allows a stream. */
  readonly limit: number;
}

/** How soon an answer must end that nobody wants any more. */
const PATIENCE = 1_000;
/** Before a page that has lost its answer asks for it again. */
const RETRY = 20;
/** A page gives up after so many times what the answer takes, but not before so many ms. */
const ENDURANCE = 3;
const LEAST_ENDURANCE = 15_000;

const QUESTION: UIMessage = {
  id: "q",
  role: "user",
  parts: [{ type: "text", text: "Hello?" }],
};

// --- The page ---

/** What the SDK's own `Chat` shows, and what a page does when it shows an error. */
class Page {
  /** The highest token that it has ever shown. */
  best = -1;
  /** When that came. */
  last = 0;
  /** How often its `Chat` failed. */
  failures = 0;
  /** Whether it waits for nothing any more. */
  ended = false;
  readonly #contender: Contender;
  readonly #url: string;
  readonly #model: Model;
  readonly #signal: AbortSignal;
  readonly #marks: { at: number; best: number; gap: number | undefined }[] = [];
  #transport: { close(): void } | undefined;
  #chat: Chat<UIMessage> | undefined;
  /** How many streams of its pages have come to an end while they were there. */
  #streams = 0;

  constructor(contender: Contender, url: string, model: Model, signal: AbortSignal) {
    this.#contender = contender;
    this.#url = url;
    this.#model = model;
    this.#signal = signal;
  }

  /** The tokens that it shows. */
  get shown(): number[] {
    const { parts } = this.#chat?.messages.findLast(({ role }) => role === "assistant") ??
      { parts: [] };
    const text = parts.map((part) => part.type === "text" ? part.text : "").join("");
    return text.split(" ").filter(Boolean).map(Number);
  }

  get isBusy(): boolean {
    return this.#chat?.status === "submitted" || this.#chat?.status === "streaming";
  }

  ask(): void {
    const chat = this.#open([]);
    this.#follow(chat, () => chat.sendMessage(QUESTION));
  }

  /** A page knows no more than what is saved: the question. */
  reload(): void {
    this.close();
    const chat = this.#open([QUESTION]);
    this.#follow(chat, () => this.#recover(chat));
  }

  async stop(): Promise<void> {
    await Promise.all([this.#contender.stop?.(this.#url), this.#chat?.stop()]);
  }

  close(): void {
    this.#chat = undefined;
    this.#transport?.close();
  }

  /** Notes an interruption. */
  interrupted(): void {
    this.#marks.push({ at: performance.now(), best: this.best, gap: undefined });
  }

  get gaps(): { gaps: number[]; never: number } {
    const marks = this.#marks.filter(({ best }) => best < this.#model.tokens - 1);
    const gaps = marks.flatMap(({ gap }) => gap ?? []);
    return { gaps, never: marks.length - gaps.length };
  }

  #open(messages: UIMessage[]): Chat<UIMessage> {
    const transport = this.#transport = this.#contender.connect(this.#url, {
      signal: this.#signal,
    });
    const chat = this.#chat = new Chat<UIMessage>({
      id: "c",
      messages,
      transport: transport.chat,
      onFinish: () => void (chat === this.#chat && this.#streams++),
    });
    chat["~registerMessagesCallback"](() => chat === this.#chat && this.#see());
    return chat;
  }

  #see(): void {
    const best = Math.max(-1, ...this.shown);
    if (best <= this.best) return;
    this.best = best;
    this.last = performance.now();
    for (const mark of this.#marks) mark.gap ??= this.last - mark.at;
  }

  async #follow(chat: Chat<UIMessage>, act: () => Promise<void>): Promise<void> {
    this.ended = false;
    await act();
    while (chat === this.#chat && chat.status === "error") {
      this.failures++;
      await sleep(RETRY);
      if (chat === this.#chat) await this.#recover(chat);
    }
    if (chat === this.#chat) this.ended = true;
  }

  /** Shows the rest of the answer, or else what is saved, or else asks for another. */
  async #recover(chat: Chat<UIMessage>): Promise<void> {
    if (this.#contender.resumes) {
      const streams = this.#streams;
      await chat.resumeStream();
      if (chat !== this.#chat || chat.status === "error" || this.#streams > streams) return;
    }
    const { saved } = this.#model;
    if (!saved) return await chat.regenerate();
    chat.messages = [QUESTION, saved];
    chat.clearError();
  }
}

// --- Interruptions ---

interface Stage {
  readonly page: Page;
  readonly model: Model;
  finish(): Promise<Result>;
}

export interface Interruption {
  readonly name: string;
  run(t: TestContext, kind: Kind, shared: Shared, speed: Speed): Promise<Result>;
}

/** Every connection is cut each 300 ms. */
const cuts: Interruption = {
  name: "a cut every 300 ms",
  async run(t, kind, shared, { pace }) {
    const model = new Model(200, pace);
    const network = t.use(await chaos(await serve(t, kind, model, shared), { seed: 1 }));
    const { page, finish } = stage(t, kind, model, network.url);
    const cutting = setInterval(() => {
      if (page.best < 0) return; // a socket that has never opened is not one that is cut
      if (!page.ended) page.interrupted();
      network.cutAll();
    }, 300);
    t.defer(() => clearInterval(cutting));
    page.ask();
    return await finish().finally(() => clearInterval(cutting));
  },
};

const reloads: Interruption = {
  name: "ten reloads in mid-answer",
  async run(t, kind, shared, { pace }) {
    const model = new Model(200, pace);
    const { page, finish } = stage(t, kind, model, urlOf(await serve(t, kind, model, shared)));
    page.ask();
    for (let n = 0; n < 10; n++) {
      await sleep(10 * pace);
      page.interrupted();
      page.reload();
    }
    return await finish();
  },
};

/** Three instances, to which requests go in turn, are replaced one after the other. */
const deploy: Interruption = {
  name: "a rolling deploy of three instances",
  async run(t, kind, shared, { pace }) {
    const model = new Model(300, pace);
    const launch = () => CONTENDERS[kind].serve(t, model, shared);
    const instances = [await launch(), await launch(), await launch()];
    await sleep(200); // their subscriptions
    const balance = kind === "websocket" ? connectionBalancer : roundRobin;
    const proxy = await balance(t, instances.map(({ port }) => port));
    const { page, finish } = stage(t, kind, model, proxy.url);
    page.ask();
    await until(() => page.best >= 0, { timeout: LEAST_ENDURANCE });
    const retiring: Promise<void>[] = [];
    for (const at of [0, 1, 2]) {
      await sleep(50 * pace);
      const next = await launch();
      await sleep(100); // its subscriptions
      page.interrupted();
      proxy.ports[at] = next.port;
      retiring.push(instances[at]!.retire());
    }
    const result = await finish();
    await Promise.all(retiring);
    return result;
  },
};

/** No connection lives longer than a platform allows; the answer takes a quarter more. */
const limit: Interruption = {
  name: "a limit for each stream",
  async run(t, kind, shared, { pace, limit }) {
    const model = new Model(Math.round(1.25 * limit / pace), pace);
    const port = await serve(t, kind, model, shared);
    const network = t.use(await chaos(port, { seed: 1, cutEvery: [limit, limit + 1] }));
    const { page, finish } = stage(t, kind, model, network.url);
    page.ask();
    const cut = setInterval(() => !page.ended && page.interrupted(), limit);
    t.defer(() => clearInterval(cut));
    return await finish().finally(() => clearInterval(cut));
  },
};

/** A proxy that passes no answer on before it is whole, and no upgrade. */
const buffering: Interruption = {
  name: "a proxy that buffers",
  async run(t, kind, shared, { pace }) {
    const model = new Model(200, pace);
    const url = await bufferingProxy(t, await serve(t, kind, model, shared));
    const { page, finish } = stage(t, kind, model, url);
    page.interrupted();
    page.ask();
    return await finish();
  },
};

/** Stop is pressed as soon as the page that was loaded again has the button. */
const stop: Interruption = {
  name: "a stop right after a reload",
  async run(t, kind, shared, { pace }) {
    const model = new Model(1_000, pace);
    const { page } = stage(t, kind, model, urlOf(await serve(t, kind, model, shared)));
    page.ask();
    await until(() => page.best > 0);
    page.reload();
    await until(() => page.isBusy, { interval: 1 });
    await page.stop();
    const stopped = performance.now();
    await sleep(PATIENCE);
    const { shown } = page;
    return {
      lost: 0, // whatever comes no more was not wanted
      repeated: shown.length - new Set(shown).size,
      orphaned: orphans(model, stopped),
      begun: model.runs.length,
      failures: page.failures,
      gaps: [],
      never: 0,
    };
  },
};

export const INTERRUPTIONS: readonly Interruption[] = [
  cuts,
  reloads,
  deploy,
  limit,
  buffering,
  stop,
];

// --- The stage ---

async function serve(t: TestContext, kind: Kind, model: Model, shared: Shared): Promise<number> {
  // One instance needs no backplane.
  const { port } = await CONTENDERS[kind].serve(t, model, { ...shared, sync: undefined });
  return port;
}

function stage(t: TestContext, kind: Kind, model: Model, url: string): Stage {
  const page = new Page(CONTENDERS[kind], url, model, t.signal);
  t.defer(() => page.close());
  const begun = performance.now();
  async function finish(): Promise<Result> {
    const patience = Math.max(ENDURANCE * model.tokens * model.pace, LEAST_ENDURANCE);
    await until(() => page.ended || performance.now() - begun > patience, {
      timeout: 2 * patience,
    });
    const { shown } = page;
    const unique = new Set(shown).size;
    const left = performance.now();
    page.close();
    if (model.isWriting) await sleep(PATIENCE);
    return {
      lost: model.tokens - unique,
      repeated: shown.length - unique,
      orphaned: orphans(model, left),
      begun: model.runs.length,
      failures: page.failures,
      ...page.gaps,
    };
  }
  return { page, model, finish };
}

/** Answers that were written on after the next one had begun, or after the page had left. */
function orphans({ runs }: Model, left: number): number {
  return runs.filter(({ ended = Infinity }, at) => {
    const unwanted = runs[at + 1]?.begun ?? left;
    return ended > unwanted + PATIENCE;
  }).length;
}

function urlOf(port: number): string {
  return `http://127.0.0.1:${port}`;
}

// --- Proxies ---

async function bufferingProxy(t: TestContext, port: number): Promise<string> {
  // A client that has gone is told to the server; that Deno says so too late does no harm here.
  t.expect("Deno.serve: request.signal aborts on successful responses");
  const { url } = await t.serve(async (request, info) => {
    info?.timeout?.(request, 0);
    const { pathname, search } = new URL(request.url);
    const headers = new Headers(request.headers);
    for (const name of ["host", "connection", "accept-encoding", "upgrade"]) headers.delete(name);
    try {
      const body = await request.bytes();
      const response = await fetch(`${urlOf(port)}${pathname}${search}`, {
        method: request.method,
        headers,
        signal: AbortSignal.any([request.signal, t.signal]),
        ...body.length > 0 && { body },
      });
      const { status, headers: answered } = response;
      const whole = [204, 304].includes(status) ? null : await response.bytes();
      return new Response(whole, { status, headers: answered });
    } catch {
      return new Response("Bad gateway", { status: 502 });
    }
  });
  return url;
}

/** For native sockets, which stay where they were opened: connections go in turn. */
async function connectionBalancer(
  t: TestContext,
  ports: number[],
): Promise<{ url: string; ports: number[] }> {
  const { connect, createServer } = await import("node:net");
  let turn = 0;
  const server = createServer((near) => {
    const far = connect(ports[turn++ % ports.length]!, "127.0.0.1");
    near.pipe(far).pipe(near);
    for (const [one, other] of [[near, far], [far, near]] as const) {
      one.on("error", () => other.destroy()).on("close", () => other.destroy());
    }
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  t.defer(() => server.close());
  const { port } = server.address() as { port: number };
  return { url: urlOf(port), ports };
}

// --- Overhead ---

/** Longer than a kernel waits before it confirms: Deno's `fetch` holds a small piece back until then. */
const QUIET = 300;

/** What a token costs. */
export interface Overhead {
  /** Bytes of the SDK's chunk as JSON, and of the SDK's frame around it where there is one. */
  chunk: number;
  frame: number;
  /** All bytes that came down, those of HTTP among them. */
  down: number;
  /** All bytes that went up, the question aside. */
  up: number;
  /** Milliseconds from a question to its first token, beyond the model's own. */
  first: Firsts;
}

/** The median of pages of one kind. */
interface Firsts {
  /** Of one that has asked before. */
  open: number;
  /** Of a new one that has asked what is under way, as `resume: true` does. */
  resumed: number;
  /** Of a new one that asks as soon as it is there. */
  cold: number;
}

export interface Path {
  readonly pace: number;
  /** Milliseconds each way. */
  readonly delay: number;
  /** How many questions are asked of each kind of page. */
  readonly rounds: number;
}

/** Answers at a model's pace, with nothing in between but a delay. */
export async function overhead(
  t: TestContext,
  kind: Kind,
  shared: Shared,
  path: Path,
): Promise<Overhead> {
  const { rounds } = path;
  const page = await Asker.open(t, kind, shared, path, 100);
  await page.ask();
  const asked: Asked[] = [];
  for (let round = 0; round < rounds; round++) asked.push(await page.ask());
  const cold: number[] = [];
  const resumed: number[] = [];
  for (let round = 0; round < rounds; round++) {
    // Of a server of its own each, of which nobody has learned anything.
    cold.push((await (await Asker.open(t, kind, shared, path, 5)).ask()).first);
    const page = await Asker.open(t, kind, shared, path, 5);
    await page.resume();
    resumed.push((await page.ask()).first);
  }
  const middle = (key: keyof Asked) => median(asked.map((each) => each[key]));
  return {
    ...{ chunk: middle("chunk"), frame: middle("frame"), down: middle("down"), up: middle("up") },
    first: { open: middle("first"), resumed: median(resumed), cold: median(cold) },
  };
}

/** One question: bytes for each token of its answer, and the time to the first one. */
interface Asked extends Omit<Overhead, "first"> {
  first: number;
}

/** A page that counts. */
class Asker {
  readonly #transport: Transport;
  readonly #network: ChaosProxy;
  readonly #model: Model;
  readonly #quiet: number;
  #framed = 0;

  /** A page, and a server with a model that answers in so many tokens. */
  static async open(
    t: TestContext,
    kind: Kind,
    shared: Shared,
    { pace, delay }: Path,
    tokens: number,
  ): Promise<Asker> {
    const model = new Model(tokens, pace);
    const port = await serve(t, kind, model, shared);
    const network = t.use(await chaos(port, { seed: 1, ...delay > 0 && { delay } }));
    return new Asker(t, kind, model, network, 2 * delay + QUIET);
  }

  constructor(t: TestContext, kind: Kind, model: Model, network: ChaosProxy, quiet: number) {
    this.#model = model;
    this.#network = network;
    this.#quiet = quiet;
    this.#transport = CONTENDERS[kind].connect(network.url, {
      signal: t.signal,
      onFrame: (text) => this.#framed += text.length,
    });
    t.defer(() => this.#transport.close());
  }

  async resume(): Promise<void> {
    await this.#transport.chat.reconnectToStream({ chatId: "c" });
    await sleep(this.#quiet);
  }

  async ask(): Promise<Asked> {
    const { stats } = this.#network;
    const { tokens, pace } = this.#model;
    this.#framed = 0;
    const asked = performance.now();
    const before = { ...stats };
    const stream = await this.#transport.chat.sendMessages({
      chatId: "c",
      trigger: "submit-message",
      messageId: undefined,
      messages: [QUESTION],
      abortSignal: undefined,
    });
    let chunks = 0;
    let up = 0;
    let first: number | undefined;
    for await (const chunk of stream) {
      chunks += JSON.stringify(chunk).length;
      if (chunk.type !== "text-delta" || first !== undefined) continue;
      first = performance.now() - asked - pace;
      up = stats.up;
    }
    await sleep(this.#quiet); // as somebody who reads before the next question
    return {
      chunk: chunks / tokens,
      frame: (this.#framed || chunks) / tokens,
      down: (stats.down - before.down) / tokens,
      up: (stats.up - up) / tokens,
      first: first!,
    };
  }
}

function median(values: number[]): number {
  return values.toSorted((a, b) => a - b)[values.length >> 1]!;
}
