/**
 * The two ends of a conversation, each with a record of what it did and what happened to it.
 *
 * @module
 */
import type { WebSocketSSE } from "../../client.ts";
import type { Hooks, Message, Peer, SSEAdapter } from "../../server.ts";
import type { Clock, Owner } from "./clock.ts";
import { diceFor } from "./dice.ts";
import { type Data, drawMessage, eventSizeOf, show, sizeOf } from "./messages.ts";
import { type Instance, NAME_HEADER } from "./network.ts";
import type { Product } from "./product.ts";
import type { HookTraits, Scenario } from "./scenario.ts";

/** What both ends may use. */
export interface Stage {
  readonly scenario: Scenario;
  readonly clock: Clock;
  note(text: string): void;
  /** Something that must never be. */
  violated(check: string, detail: string): void;
  publish(publisher: Session | undefined, server: Server, data: string): void;
}

export interface Ending {
  code: number;
  reason: string;
  wasClean?: boolean;
  at: number;
}

/** A close that was asked for. */
export interface Closing extends Ending {
  /** How many messages had been sent before. */
  sent: number;
}

export const PUBLICATION = "pub:";
export const TOPIC = "room";
/** Of a message that waits, beside its bytes: at most. */
const MESSAGE_COST = 512;
const PING = "are you there?";

// --- The client ---

/** A socket, and all that came of it. */
export class Client {
  readonly number: number;
  readonly socket: WebSocketSSE;
  readonly sent: Data[] = [];
  /** Without publications. */
  readonly received: unknown[] = [];
  readonly publications: string[] = [];
  readonly counts = { open: 0, close: 0, error: 0, drop: 0, resume: 0 };
  closing: Closing | undefined;
  ending: Ending | undefined;
  /** It has sent a message that is larger than the server takes. */
  oversized = false;
  /** Its signal was aborted before it had ended. */
  aborted = false;
  readonly #abort = new AbortController();
  readonly #stage: Stage;

  constructor(
    stage: Stage,
    number: number,
    connect: (number: number, signal: AbortSignal) => WebSocketSSE,
  ) {
    this.#stage = stage;
    this.number = number;
    const socket = this.socket = connect(number, this.#abort.signal);
    socket.binaryType = "arraybuffer";
    for (const name of ["open", "error", "drop", "resume"] as const) {
      socket.addEventListener(name, () => {
        this.counts[name]++;
        stage.note(`${this} ${name}`);
      });
    }
    socket.addEventListener("message", (event) => this.#take(event.data));
    socket.addEventListener("close", ({ code, reason, wasClean }) => {
      this.counts.close++;
      this.ending = { code, reason, wasClean, at: stage.clock.now };
      stage.note(`${this} close ${code} "${reason}"${wasClean ? "" : ", not clean"}`);
    });
  }

  toString(): string {
    return `client ${this.number}`;
  }

  /** Sends some messages in one task, where it may. */
  send(seed: number, count: number, most: number): void {
    for (let i = 0; i < count && this.socket.readyState === 1; i++) {
      const plain = this.#stage.scenario.level === "plain";
      const message = drawMessage(diceFor(seed, i), most, plain);
      this.sent.push(message);
      this.#stage.note(`${this} sends ${this.sent.length}: ${show(message)}`);
      this.socket.send(message);
    }
    const buffered = this.socket.bufferedAmount;
    const all = this.sent.reduce((size, data) => size + sizeOf(data), 0);
    if (buffered < 0 || buffered > all) {
      this.#stage.violated("bufferedAmount", `${this}: ${buffered} of ${all}`);
    }
  }

  sendTooMuch(): void {
    if (this.socket.readyState !== 1 || this.#stage.scenario.level === "plain") return;
    this.oversized = true;
    const message = "x".repeat(this.#stage.scenario.server.maxMessageSize + 1);
    this.sent.push(message);
    this.#stage.note(`${this} sends ${this.sent.length}, which is too large`);
    this.socket.send(message);
  }

  close(seed: number): void {
    if (this.socket.readyState >= 2) return;
    const dice = diceFor(seed, 1);
    const { now } = this.#stage.clock;
    const code = dice.pick([undefined, 1000, dice.int(3000, 4999)]);
    const reason = code === undefined ? "" : `client ${this.number} at ${Math.round(now)}`;
    this.closing = { code: code ?? 1005, reason, sent: this.sent.length, at: now };
    this.#stage.note(`${this} closes: ${code} "${reason}"`);
    if (code === undefined) this.socket.close();
    else this.socket.close(code, reason);
  }

  abort(): void {
    this.aborted ||= !this.ending;
    this.#abort.abort();
  }

  #take(data: unknown): void {
    if (this.counts.close) this.#stage.violated("order", `${this}: a message after close`);
    if (!this.counts.open) this.#stage.violated("order", `${this}: a message before open`);
    this.#stage.note(`${this} receives ${this.received.length + 1}: ${show(data)}`);
    if (typeof data === "string" && data.startsWith(PUBLICATION)) this.publications.push(data);
    else this.received.push(data);
  }
}

// --- The server ---

/** One instance. */
export class Server implements Instance {
  readonly owner: Owner;
  readonly adapter: SSEAdapter;
  readonly sessions: Session[] = [];
  /** Sessions by what their openings were answered. */
  readonly names: Map<string, Session> = new Map();
  down = false;
  killed = false;
  /** It has been told to shut down; undefined is not yet done. */
  shutdown: { at: number; done?: number } | undefined;
  readonly #stage: Stage;

  constructor(
    stage: Stage,
    owner: Owner,
    product: Product,
    options: Parameters<Product["sseAdapter"]>[0],
  ) {
    this.#stage = stage;
    this.owner = owner;
    const { server } = stage.scenario;
    this.adapter = product.sseAdapter({ ...options, ...server, bidir: true, hooks: this.#hooks() });
  }

  /** What its sessions hold back, in bytes of payload. */
  get held(): number {
    return this.sessions.reduce((sum, { peer }) => sum + peer.bufferedAmount, 0);
  }

  /** The same, by the most that the adapter may count for it. */
  get mostHeld(): number {
    const sent = this.sessions.map(({ sent, publications }) => sent.length + publications.length);
    return this.held + MESSAGE_COST * sent.reduce((sum, n) => sum + n, 0);
  }

  /** Never throws, says its documentation; then it must not. */
  async fetch(request: Request): Promise<Response> {
    try {
      const response = await this.adapter.fetch(request, {});
      const name = response.headers.get(NAME_HEADER);
      const session = this.sessions.find(({ peer }) => peer.request === request);
      if (name && session) this.names.set(name, session);
      return response;
    } catch (error) {
      this.#stage.violated("fetch threw", String(error));
      return new Response(null, { status: 500 });
    }
  }

  async shutDown(code: number, reason: string): Promise<void> {
    if (this.shutdown) return;
    this.#stage.note(`${this.owner} shuts down: ${code} "${reason}"`);
    const shutdown: Server["shutdown"] = this.shutdown = { at: this.#stage.clock.now };
    for (const session of this.sessions) session.closes(code, reason, true);
    await this.adapter.close(code, reason);
    shutdown.done = this.#stage.clock.now;
    this.down = true;
    this.#stage.note(`${this.owner} is down`);
  }

  #hooks(): Partial<Hooks> {
    const find = (peer: Peer) => this.sessions.find((session) => session.peer === peer)!;
    return {
      open: (peer) => {
        if (find(peer)) this.#stage.violated("open twice", "at the server");
        this.sessions.push(new Session(this.#stage, this, peer));
      },
      message: (peer, message) => find(peer).take(message),
      close: (peer, { code = 0, reason = "" }) => find(peer).end(code, reason),
      pong: (_, data) => {
        const text = new TextDecoder().decode(data);
        if (text && text !== PING) this.#stage.violated("pong", text);
      },
      error: (peer, error) => {
        const { failing } = find(peer) ?? {};
        if (failing !== error) this.#stage.violated("a hook failed", String(error));
      },
    };
  }
}

/** A session as the server's hooks see it. */
export class Session {
  readonly peer: Peer;
  readonly server: Server;
  /** Number of its client, by the URL. */
  readonly client: number;
  /** Without publications. */
  readonly sent: Data[] = [];
  readonly received: Data[] = [];
  /** Publications of this instance that it is to be sent. */
  readonly publications: string[] = [];
  /** Messages, and their bytes, whose hooks have not settled. */
  unsettled = 0;
  unsettledBytes = 0;
  /** Of the largest message up, and the largest event down. */
  largestUp = 0;
  largestDown = 0;
  closing: Closing | undefined;
  ending: Ending | undefined;
  terminated = false;
  /** It was closed by the shutdown of its server. */
  shutDown = false;
  /** Thrown by the hook of the next message. */
  failing: Error | undefined;
  readonly #stage: Stage;
  readonly #hooks: HookTraits;

  constructor(stage: Stage, server: Server, peer: Peer) {
    this.#stage = stage;
    this.#hooks = stage.scenario.hooks;
    this.server = server;
    this.peer = peer;
    this.client = Number(new URL(peer.request.url).searchParams.get("client"));
    stage.note(`${this} open`);
    peer.subscribe(TOPIC);
    if (this.#hooks.greets) this.send("hello");
  }

  toString(): string {
    return `${this.server.owner}'s peer of client ${this.client}`;
  }

  get open(): boolean {
    return this.peer.websocket.readyState === 1;
  }

  send(data: Data): void {
    if (!this.open) return;
    this.sent.push(data);
    this.largestDown = Math.max(this.largestDown, eventSizeOf(data));
    this.#stage.note(`${this} sends ${this.sent.length}: ${show(data)}`);
    const { maxBufferedAmount, maxTotalBufferedAmount } = this.#stage.scenario.server;
    const { mostHeld } = this.server; // this message is counted, too
    if (this.peer.send(data) === 0) {
      this.sent.pop();
      const bound = Math.min(maxBufferedAmount, maxTotalBufferedAmount);
      if (mostHeld <= bound) this.#stage.violated("send refused", `${this}`);
    }
    if (this.peer.bufferedAmount > maxBufferedAmount + this.largestDown) {
      this.#stage.violated("bound", `${this}: bufferedAmount ${this.peer.bufferedAmount}`);
    }
    const { held } = this.server;
    if (held > maxTotalBufferedAmount + this.largestDown) {
      this.#stage.violated("bound", `${this.server.owner}: all hold ${held}`);
    }
  }

  sendSome(seed: number, count: number, most: number): void {
    const plain = this.#stage.scenario.level === "plain";
    for (let i = 0; i < count; i++) this.send(drawMessage(diceFor(seed, i), most, plain));
  }

  close(seed: number): void {
    if (!this.open) return;
    const dice = diceFor(seed, 2);
    const code = dice.pick([undefined, 1000, 1012, dice.int(3000, 4999)]);
    const reason = code === undefined ? "" : `server at ${Math.round(this.#stage.clock.now)}`;
    this.#stage.note(`${this} closes: ${code} "${reason}"`);
    this.closes(code ?? 1005, reason);
    this.peer.close(code, reason);
  }

  /** For the record. */
  closes(code: number, reason: string, isShutdown = false): void {
    if (!this.open) return;
    this.shutDown = isShutdown;
    this.closing = { code, reason, sent: this.sent.length, at: this.#stage.clock.now };
  }

  ping(): void {
    this.peer.ping(PING);
  }

  fail(): void {
    this.failing = new Error("as planned");
  }

  terminate(): void {
    if (this.ending) return;
    this.#stage.note(`${this} is terminated`);
    this.terminated = true;
    this.peer.terminate();
  }

  // --- As hooks are called ---

  async take(message: Message): Promise<void> {
    if (this.ending) this.#stage.violated("order", `${this}: a message after close`);
    const data = message.rawData as Data;
    const number = this.received.push(data);
    this.#stage.note(`${this} receives ${number}: ${show(data)}`);
    const size = sizeOf(data);
    this.largestUp = Math.max(this.largestUp, size);
    if (this.failing) throw this.failing;
    const dice = diceFor(this.#stage.scenario.seed, 3, this.client, number);
    this.#react(dice, data, number);
    if (!dice.chance(this.#hooks.slow)) return;
    this.#hold(size, 1);
    await new Promise<void>((resolve) => setTimeout(resolve, dice.size(this.#hooks.slowest)));
    this.#hold(-size, -1);
    if (dice.chance(this.#hooks.echoes)) this.send(data);
  }

  #react(dice: ReturnType<typeof diceFor>, data: Data, number: number): void {
    const { echoes, publishes, closes } = this.#hooks;
    if (dice.chance(echoes)) this.send(data);
    if (dice.chance(publishes)) {
      this.#stage.publish(this, this.server, `${PUBLICATION}${this.client}.${number}`);
    }
    if (dice.chance(closes)) this.close(dice.int(0, 1e9));
  }

  /** "A sender below its window may begin one message of any size." */
  #hold(size: number, count: number): void {
    this.unsettled += count;
    this.unsettledBytes += size;
    if (this.#stage.scenario.level === "plain") return;
    const { window, maxWindow } = this.#stage.scenario.server;
    if (this.unsettledBytes > Math.max(window, maxWindow) + this.largestUp) {
      this.#stage.violated("bound", `${this}: ${this.unsettledBytes} unsettled bytes`);
    }
  }

  end(code: number, reason: string): void {
    if (this.ending) this.#stage.violated("close twice", `${this}`);
    this.ending = { code, reason, at: this.#stage.clock.now };
    this.#stage.note(`${this} close ${code} "${reason}"`);
  }
}
