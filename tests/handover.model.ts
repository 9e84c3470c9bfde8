/**
 * The handover protocol, walked at random: three instances with the real `Moves`, a backplane that
 * loses, repeats and reorders, instances that freeze and thaw, timeouts at any moment; in each
 * fourth walk one that is killed at any step, and in another fourth one that is deaf from any step
 * on, and can still speak.
 *
 * The client's resumptions are read at once, or late, when it has long made others, and may be
 * read by two instances. It goes by the answer to the last one that it has made.
 *
 * By topics, an instance hears publications only while it has joined their topic, as it does for a
 * session that is here, in limbo or coming.
 *
 * With parking, a store is among them: it executes late, says that it has failed though it has not,
 * or not at all; and somebody puts values back there that are older than the client's last answer.
 *
 * Checked at every step: at most one instance has the session; each message up reaches the hook
 * once and in order; each publication reaches the session once and in order (at most once with
 * parking, and by topics where the giver's rest was lost). At the end, when nothing is lost any
 * more, the client reaches it wherever it resumes, unless one was killed, or the store has failed,
 * or who is deaf has it, or has given it away and does not hear what has become of it.
 *
 * @module
 */
import type { Counts, Given, Hearing, MoveHead, Mover, Moves, Publication } from "../handover.ts";
import type { Parking, parking as makeParking, ParkingStore, Quay } from "../parking.ts";
import type { Packed } from "../server.ts";

type Make = typeof Moves<number>;
type Park = typeof makeParking;

const SESSION = "s";
/** How the store is called among instances. */
const STORE = "";
const NAMES = ["A", "B", "C"] as const;
type Name = typeof NAMES[number];
/** Of messages up, and of publications. */
const MOST = 12;
const STEPS = 400;
const TIMEOUT = 1_000;

/** A rule of the protocol was broken. */
export class Violation extends Error {}

/** An instance that has no sessions, and takes what it is given for nothing. */
export function idle(send: (to: string, head: MoveHead) => void): Mover<string> {
  return {
    ...{ send, now: () => 0, takes: true, owns: () => false, pack: () => undefined },
    ...{ restore() {}, release() {}, take() {}, counts: () => ({}), had() {}, quiet: () => [] },
    ...{ rest: () => new Uint8Array(), hear: () => undefined },
  };
}

/** What the client resumes by. */
interface Resumption {
  readonly attempt: number;
  readonly token: string;
}

interface State {
  received: number;
  attempt: number;
  /** Those that its client may come with. */
  tokens: string[];
}

type Bytes = Uint8Array<ArrayBuffer>;

/** What a store is asked, until it has answered. */
interface Operation {
  readonly by: Instance;
  readonly execute: () => unknown;
  readonly resolve: (value: never) => void;
  readonly reject: (error: Error) => void;
  isAnswered: boolean;
}

interface Sent {
  to: Name;
  from: Name;
  head: MoveHead;
  state: Uint8Array<ArrayBuffer>;
  /** How much was published before it was sent. */
  before: number;
}

/** Numbers as they come from a seed (xorshift). */
function numbers(seed: number): () => number {
  let state = (seed * 2654435761) >>> 0 || 1;
  return () => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) / 2 ** 32;
  };
}

const encoder = new TextEncoder();
const decoder = new TextDecoder();
const encode = (value: unknown) => encoder.encode(JSON.stringify(value)) as Bytes;

const markOf = (token: string) => token.split(".")[0]!;

/** Spreads a text over 16 bytes. */
function digest(text: string): Bytes {
  const bytes = new Uint8Array(16);
  for (const [i, byte] of encoder.encode(text).entries()) {
    bytes[i % 16] = bytes[i % 16]! * 31 + byte;
  }
  return bytes;
}

/** The name of a token's pointer. */
const pointerOf = (token: string) =>
  Array.from(digest(`duplex-sse park ${token}`), (byte) => byte.toString(16).padStart(2, "0"))
    .join("");

/** What stands on a value in the store: `keys` are the names of the pointers that belong to it. */
function labelOf(bytes: Bytes): { kind: string; id: string; from: string; keys: string[] } {
  const end = 4 + new DataView(bytes.buffer).getUint32(0);
  return JSON.parse(decoder.decode(bytes.subarray(4, end)));
}

/** One instance: `Moves`, and a server of one session that only counts. */
class Instance implements Mover<number> {
  readonly name: Name;
  readonly moves: Moves<number>;
  readonly parking: Parking | undefined;
  readonly #world: World;
  /** The session in service. */
  session: State | undefined;
  /** The session in limbo, and publications that have come meanwhile. */
  #limbo: { state: State; missed: number[] } | undefined;
  /** Nobody has told who took the session. */
  #hasLost = false;
  /** The token of the last request. */
  #asked = "";
  /** The name under which it has parked the session last. */
  #parkedAs = "";
  frozen = false;
  killed = false;
  deaf = false;
  readonly takes = true;
  /** Publications read from the channel. */
  read = 0;
  /** The last of them that it heard. */
  #heard = 0;
  /** How many have gone by before it joined, if it has. */
  joined: number | undefined;
  /** Sessions that come, and hear already. */
  #coming = 0;

  constructor(name: Name, world: World, make: Make, park?: Park) {
    this.name = name;
    this.#world = world;
    this.moves = new make(name, TIMEOUT, 30_000, this);
    this.parking = park?.(world.storeOf(this), { timeout: TIMEOUT })(this.#quay());
  }

  #quay(): Quay {
    return {
      instance: this.name,
      host: {
        resumeTimeout: 30_000,
        pack: () => {
          const state = this.#unload();
          return state && { ...state, namespace: "", state } as unknown as Packed;
        },
        restore: () => this.restore(),
        release: () => this.release(),
        report: () => {},
      },
      now: () => this.now(),
      wake: () => {},
      counts: () => this.counts(),
      asks: () => this.moves.asks(SESSION),
      take: async (session, state, counts) => {
        const head = { kind: "state", status: "here", session, from: STORE, counts } as const;
        const id = this.moves.askAnew(SESSION)!;
        this.moves.receive({ ...head, id, time: this.now(), quiet: Object.keys(counts) }, state);
        await this.moves.moving(SESSION);
        return this.moves.took(id);
      },
      confirm: (to, id, session) =>
        this.send(to, { kind: "adopted", id, session, from: this.name }),
      digest: (text) => Promise.resolve(digest(text)),
      seal: (_token, bytes) => {
        const { kind, id, from } = labelOf(bytes);
        if (kind === "session" && from === this.name) this.#parkedAs = id;
        return Promise.resolve(bytes);
      },
      unseal: (_token, bytes) => Promise.resolve(bytes),
      encodePacked: (packed) => encode((packed as unknown as { state: State }).state),
    };
  }

  #unload(): State | undefined {
    if (!this.session) return;
    this.#limbo = { state: this.session, missed: [] };
    this.session = undefined;
    return this.#limbo.state;
  }

  now(): number {
    return this.#world.now;
  }

  /** It has the session, or has not heard who took it. */
  get hides(): boolean {
    return !!this.session || !!this.#limbo || this.#hasLost;
  }

  /** It does nothing more, and what it had is lost. */
  kill(): void {
    this.killed = this.frozen = true;
    this.session = this.#limbo = undefined;
  }

  send(to: string, head: MoveHead, state: Uint8Array<ArrayBuffer> = new Uint8Array()): void {
    if (to === STORE) {
      if (head.kind !== "adopt") return;
      this.#look().then((found) => found || this.moves.unknown(head.id));
      return;
    }
    const { published: before } = this.#world;
    this.#world.bus.push({ to: to as Name, from: this.name, head, state, before });
  }

  owns(): boolean {
    return !!this.session;
  }

  pack(_session: string, { attempt }: { attempt: number }): Given | undefined {
    if (!this.session || attempt < this.session.attempt) return;
    return { state: encode(this.#unload()), marks: this.#limbo!.state.tokens.map(markOf) };
  }

  restore(): void {
    if (!this.#limbo) {
      this.#world.fault ??= `${this.name} has nothing to take back`;
      return;
    }
    this.session = this.#limbo.state;
    this.#world.got.push(...this.#limbo.missed);
    this.#limbo = undefined;
  }

  release(_session?: string, end?: "moved" | "lost"): void {
    this.#limbo = undefined;
    this.#hasLost ||= end === "lost";
    this.#settle();
  }

  rest(): Bytes {
    return encode(this.#limbo?.missed ?? []);
  }

  hear(): Hearing | undefined {
    if (!this.#world.topical) return;
    const begun = new Promise<void>((resolve) => {
      this.#world.joins.push({
        by: this,
        execute: () => {
          this.#coming++;
          this.#settle();
          resolve();
        },
      });
    });
    return {
      begun,
      end: () => {
        this.#coming = Math.max(0, this.#coming - 1);
        this.#settle();
      },
    };
  }

  /** Joins the topic, or leaves it. */
  #settle(): void {
    const wants = this.session || this.#limbo || this.#coming;
    this.joined = wants ? this.joined ?? this.#world.published : undefined;
  }

  take(_claim: unknown, state: Uint8Array, missed: number[], rest?: Bytes): void {
    this.session = JSON.parse(decoder.decode(state)) as State;
    if (this.#world.topical && !rest) this.#world.hasGaps = true;
    if (rest) this.#world.got.push(...JSON.parse(decoder.decode(rest)));
    this.#world.got.push(...missed);
    this.#settle();
    this.parking?.arrived(this.#world.token);
  }

  /** The answer to a resumption names the next token. One that is late is 409. */
  #answer({ attempt, token }: Resumption): void {
    const session = this.session!;
    if (attempt < session.attempt) return;
    const next = `${this.name}${this.parking?.mark() ?? ""}.${SESSION}`;
    const known = attempt === session.attempt ? session.tokens : [token];
    Object.assign(session, { attempt, tokens: [...known, next].slice(-4) });
    this.#world.tell(next, attempt);
  }

  counts(): { channel: number } {
    return { channel: this.#heard };
  }

  had({ channel = 0 }: Counts): void {
    this.#heard = Math.max(this.#heard, channel);
  }

  quiet(): string[] {
    return [];
  }

  /** The next publication of the channel comes here. */
  next(): void {
    if (this.read >= this.#world.published || this.deaf) return;
    const n = ++this.read;
    if (this.#world.topical && !(n > (this.joined ?? Infinity))) return;
    this.#heard = n;
    this.#limbo?.missed.push(n);
    if (this.session) this.#world.got.push(n);
    this.moves.published({ from: "channel", n, namespace: "", message: n } as Publication<number>);
  }

  /** The client's resumption comes here. */
  resume(resumption: Resumption): void {
    this.#asked = resumption.token;
    this.#underWay(resumption.token, this.#bring(resumption));
  }

  async #bring(resumption: Resumption): Promise<void> {
    const { token, attempt } = resumption;
    if (this.parking) this.moves.comes(SESSION, { attempt, mark: markOf(token) });
    if (!this.session) await this.parking?.want(token, attempt);
    if (!this.session) await this.#adopt(resumption);
    if (this.session) this.#answer(resumption);
  }

  async #adopt({ token, attempt }: Resumption): Promise<void> {
    const mark = this.parking && markOf(token);
    const claim = { attempt, received: 0, namespace: "", ...mark && { mark } };
    const left = this.moves.whereabouts(SESSION) ?? this.parking?.whereabouts(token);
    const owner = left ?? token[0]!;
    const inStore = this.parking && this.#world.isGone(owner);
    await this.moves.adopt(SESSION, inStore ? STORE : owner, claim);
    const holder = inStore && this.#holder();
    if (!this.session && holder) await this.moves.adopt(SESSION, holder.name, claim);
  }

  /** Who says so when all are asked. */
  #holder(): Instance | undefined {
    return this.#world.instances.find((one) =>
      one !== this && !one.frozen && !one.deaf && one.session
    );
  }

  /** It has parked the session under this name, and has not been told what has become of it. */
  waitsFor(id: string): boolean {
    return this.#parkedAs === id && !!this.parking?.moving(this.#world.token);
  }

  /** The token of a request that waits for the session. */
  get asked(): string | undefined {
    return this.moves.asking(SESSION) === undefined ? undefined : this.#asked;
  }

  /** Whoever is asked says nothing: all are asked, and the store. */
  look(): void {
    const id = this.moves.asking(SESSION);
    if (id === undefined) return;
    const holder = this.#holder();
    if (holder) this.moves.redirect(id, holder.name);
    if (this.parking) this.#look();
  }

  async #look(): Promise<boolean> {
    const asking = { session: SESSION, namespace: "" };
    return await this.#underWay(this.#asked, this.parking!.look(asking, this.#asked));
  }

  async #underWay<T>(token: string, work: Promise<T>): Promise<T> {
    const one = { token };
    this.#world.underWay.add(one);
    return await work.finally(() => this.#world.underWay.delete(one));
  }

  async receive(head: MoveHead, state: Bytes): Promise<void> {
    const { token } = this.#world;
    if (head.kind === "adopted") this.parking?.taken(token, head.id, head.from);
    if (head.kind === "adopt" && this.parking) {
      const wanting = this.parking.want(token, head.attempt, head.mark);
      if (!await this.#underWay(`${head.mark}.s`, wanting)) return;
    }
    this.moves.receive(head, state);
  }

  /** The client's message `number` comes here, or is routed here. */
  uplink(number: number): void {
    if (!this.session) return;
    if (number === this.session.received + 1) {
      this.session.received = number;
      this.#world.hook.push(number);
    }
    this.#world.acknowledged = Math.max(this.#world.acknowledged, this.session.received);
  }
}

/** Everything that a walk goes through. */
class World {
  now = 0;
  published = 0;
  acknowledged = 0;
  attempt = 0;
  lossy = true;
  /** The client's. */
  token: string = "A.s";
  /** What was found where nobody waits for it. */
  fault: string | undefined;
  /** Requests that are under way, and with which token. */
  readonly underWay: Set<{ token: string }> = new Set();
  readonly values: Map<string, Bytes> = new Map();
  readonly #history: [key: string, bytes: Bytes][] = [];
  readonly #operations: Operation[] = [];
  #isOver = false;
  /** The store fails now and then, and somebody else writes there. */
  readonly #unsound: boolean;
  readonly bus: Sent[] = [];
  /** Resumptions that will be read late. */
  readonly #late: { by: Instance; resumption: Resumption }[] = [];
  /** Topics that are to be joined. */
  readonly joins: { by: Instance; execute: () => void }[] = [];
  /** Instances hear what they have joined alone. */
  readonly topical: boolean;
  /** What a giver kept for its session was lost. */
  hasGaps = false;
  /** Messages as the hook saw them, publications as the session was given them. */
  readonly hook: number[] = [];
  readonly got: number[] = [];
  readonly instances: Instance[];
  /** The step at which something happens to an instance for good. */
  readonly #fatal: number;
  readonly #fate: "killed" | "deaf";
  #steps = 0;
  readonly #random: () => number;

  constructor(seed: number, make: Make, { park, topical = false }: Variant) {
    this.topical = topical;
    this.#unsound = seed % 2 === 1;
    this.#fate = seed % 4 ? "deaf" : "killed";
    this.#fatal = seed % 2 ? Infinity : Math.floor(seed / 4 % STEPS);
    this.#random = numbers(seed);
    this.instances = NAMES.map((name) => new Instance(name, this, make, park));
    this.instances[0]!.session = { received: 0, attempt: 0, tokens: [this.token] };
    this.instances[0]!.joined = 0;
  }

  /** The instance that the client's token names. */
  get hint(): Name {
    return this.token[0] as Name;
  }

  isGone(name: string): boolean {
    return name === STORE || this.#of(name as Name).killed;
  }

  get #instance(): Instance {
    return this.instances[Math.floor(this.#random() * this.instances.length)]!;
  }

  #of(name: Name): Instance {
    return this.instances[NAMES.indexOf(name)]!;
  }

  /** The answer tells the client where its session is, unless it gets lost, or it has asked again. */
  tell(token: string, attempt: number): void {
    if (attempt === this.attempt && (!this.lossy || this.#random() > 0.3)) this.token = token;
  }

  /** The client resumes by an instance, which may be slow to read that. */
  #resume(by: Instance): void {
    const resumption = { attempt: ++this.attempt, token: this.token };
    const isRepeated = this.#random() < 0.1;
    if (by.frozen || isRepeated || this.#random() < 0.2) {
      this.#late.push({ by: isRepeated ? this.#instance : by, resumption });
    }
    if (!by.frozen) by.resume(resumption);
  }

  #readLate(): void {
    const at = Math.floor(this.#random() * this.#late.length);
    const { by, resumption } = this.#late[at] ?? {};
    if (!by || by.frozen) return;
    this.#late.splice(at, 1);
    by.resume(resumption!);
  }

  // --- The store ---

  storeOf(by: Instance): ParkingStore {
    const ask = <T>(execute: () => T) =>
      new Promise<T>((resolve, reject) => {
        if (this.#isOver) return reject(new Error("the walk is over"));
        this.#operations.push({ by, execute, resolve, reject, isAnswered: false });
      });
    return {
      put: (key, bytes) =>
        ask(() => {
          this.values.set(key, bytes);
          this.#history.push([key, bytes]);
        }),
      take: (key) =>
        ask(() => {
          const bytes = this.values.get(key);
          this.values.delete(key);
          return bytes;
        }),
    };
  }

  /** Whoever waits for the store waits no more, and no longer than for that. */
  end(): void {
    this.#isOver = true;
    for (const { reject } of this.#operations.splice(0)) reject(new Error("the walk is over"));
  }

  /** It does any of what it was asked; who is frozen hears of it later. */
  async #operate(): Promise<void> {
    const at = Math.floor(this.#random() * this.#operations.length);
    const operation = this.#operations[at];
    if (!operation || operation.by.frozen) return;
    const { execute, resolve, reject } = operation;
    const luck = this.#unsound && this.lossy ? this.#random() : 1;
    const error = new Error("the store failed");
    if (luck < 0.05 && !operation.isAnswered) { // it will be executed nevertheless, maybe
      operation.isAnswered = true;
      reject(error);
    } else {
      this.#operations.splice(at, 1);
      if (luck < 0.1) reject(error);
      else if (luck > 0.15) resolve(execute() as never);
      else {
        execute();
        reject(error);
      }
    }
    for (let n = 0; n < 20; n++) await undefined;
  }

  /**
   * Somebody brings back, under any name, what was put for other tokens than the client has now, or
   * had when it made the requests that are under way; and not what its own instance has parked and
   * has not been told of since: that asks for it by its name, whatever the client's token is.
   */
  #forge(): void {
    if (!this.#unsound) return;
    const any = <T>(all: T[]) => all[Math.floor(this.#random() * all.length)];
    const asked = this.instances.flatMap((one) => one.asked ?? []);
    const marks = this.bus.flatMap(({ head }) => head.kind === "adopt" ? `${head.mark}.s` : []);
    const tokens = [
      this.token,
      ...marks,
      ...asked,
      ...[...this.underWay, ...this.#late.map(({ resumption }) => resumption)]
        .map(({ token }) => token),
    ];
    const known = tokens.map(pointerOf);
    const isOld = (bytes: Bytes) => {
      const { id, from, keys } = labelOf(bytes);
      return !this.#of(from as Name).waitsFor(id) && !keys.some((key) => known.includes(key));
    };
    const old = any(this.#history.filter(([, bytes]) => isOld(bytes)));
    const name = this.#random() < 0.5 ? old : any(this.#history);
    if (old) this.values.set(name![0], old[1]);
  }

  /** The session's client is away, or its instance is about to end. */
  #park(instance: Instance): void {
    instance.parking?.park(this.token, this.#random() < 0.1);
  }

  step(): void | Promise<void> {
    const instance = this.#instance;
    if (this.#steps++ === this.#fatal) {
      if (this.#fate === "deaf") instance.deaf = true;
      else instance.kill();
    }
    if (this.joins.length && this.#random() < 0.2) return this.#join();
    const kinds = instance.parking ? 14 : 8;
    switch (Math.floor(this.#random() * kinds)) {
      case 8:
      case 9:
      case 10:
        return this.#operate();
      case 11:
        return instance.frozen ? undefined : this.#park(instance);
      case 12:
        return instance.frozen ? undefined : instance.look();
      case 13:
        return this.#forge();
      case 0:
        return this.#deliver();
      case 1:
        return instance.frozen ? undefined : instance.next();
      case 2:
        if (this.published < MOST) this.published++;
        return;
      case 3:
        return this.#resume(instance);
      case 4:
        return this.#uplink(instance);
      case 5:
        return this.#tick(instance);
      case 6:
        return this.#readLate();
      default:
        instance.frozen = this.#random() < 0.3 || instance.killed;
    }
  }

  /** Any message of the backplane comes, or is lost, or comes and stays. */
  #deliver(): void {
    if (!this.bus.length) return;
    const at = Math.floor(this.#random() * this.bus.length);
    const { to, from, head, state, before } = this.bus[at]!;
    const instance = this.#of(to);
    if (instance.frozen) return;
    // Who is deaf says "no" once, to whoever asks in vain.
    const isSafe = this.#fate === "deaf" && head.kind === "taken" && !head.yes;
    const lost = instance.deaf || this.lossy && !isSafe && this.#random() < 0.1;
    if (lost || !this.lossy || this.#random() > 0.1) this.bus.splice(at, 1);
    if (lost) return;
    // One channel carries all in one order: publications that the asker had come before its question.
    if (head.kind === "adopt") this.#hearAll(instance, this.#of(from).read);
    if (this.topical) this.#hearAll(instance, head.kind === "rest" ? head.counts.channel! : before);
    instance.receive(structuredClone(head), state);
  }

  #hearAll(instance: Instance, upTo: number): void {
    while (instance.read < upTo) instance.next();
  }

  /** The backplane brings the topic to any of those who asked for it. */
  #join(): void {
    const at = Math.floor(this.#random() * this.joins.length);
    if (!this.joins[at]!.by.frozen) this.joins.splice(at, 1)[0]!.execute();
  }

  #uplink(instance: Instance): void {
    if (this.acknowledged >= MOST || instance.frozen) return;
    const to = instance.session
      ? instance
      : this.#of((instance.moves.whereabouts(SESSION) ?? this.hint) as Name);
    const hears = to === instance || !to.deaf && !instance.deaf;
    if (!to.frozen && hears) to.uplink(this.acknowledged + 1);
  }

  #tick(instance: Instance): void {
    this.now += Math.floor(this.#random() * 200);
    if (instance.frozen) return;
    const period = Math.floor(this.#random() * TIMEOUT);
    // What was parked is taken a second later at most: publications are faster than that.
    if (instance.parking && !instance.deaf && instance.moves.holds(SESSION)) {
      this.#hearAll(instance, this.published);
    }
    instance.moves.tick(period);
    instance.parking?.tick(period);
  }

  check(): void {
    if (this.fault) throw new Violation(this.fault);
    const owners = this.instances.filter((one) => one.session).map((one) => one.name);
    if (owners.length > 1) throw new Violation(`two instances have it: ${owners}`);
    if (this.hook.some((n, at) => n !== at + 1)) throw new Violation(`the hook saw ${this.hook}`);
    const parks = !!this.instances[0]!.parking;
    const canMiss = parks || this.hasGaps;
    if (this.got.some((n, at) => canMiss ? n <= (this.got[at - 1] ?? 0) : n !== at + 1)) {
      throw new Violation(`publications: ${this.got}`);
    }
  }

  /** Nothing is lost or frozen any more: wherever the client resumes, the session comes there. */
  async settle(): Promise<void> {
    this.lossy = false;
    const alive = this.instances.filter((one) => !one.killed);
    for (const instance of alive) instance.frozen = false;
    // With the one that had it, or in a store that has failed, maybe.
    const parks = !!this.instances[0]!.parking;
    const isLost = alive.length < this.instances.length || parks && this.#unsound;
    for (const instance of alive.filter(({ deaf }) => !deaf)) {
      const [turns, period] = isLost ? [10, 5_000] : [100, 500];
      for (let turn = 0; turn < turns && !instance.session; turn++) {
        await this.#turn(instance, period);
      }
      const isHidden = alive.some(({ deaf, hides }) => deaf && hides);
      if (!instance.session && !isLost && !isHidden) {
        throw new Violation(`the client does not reach it by ${instance.name}`);
      }
    }
  }

  async #turn(instance: Instance, period: number): Promise<void> {
    instance.resume({ attempt: ++this.attempt, token: this.token });
    const looks = instance.parking || this.instances.some(({ deaf }) => deaf);
    for (let round = looks ? 4 : 1; round > 0 && !instance.session; round--) {
      if (instance.parking) { for (let n = 0; n < 20; n++) await undefined; }
      if (round === 2) instance.look();
      for (let n = 0; this.bus.length && n < 200; n++) {
        await undefined;
        this.#deliver();
        this.check();
      }
      while (this.joins.some(({ by }) => !by.frozen)) this.#join();
      while (this.#operations.some(({ by }) => !by.frozen)) await this.#operate();
    }
    this.now += period;
    for (const one of this.instances.filter(({ killed }) => !killed)) {
      if (!one.deaf) this.#hearAll(one, this.published);
      one.moves.tick(period);
      one.parking?.tick(period);
    }
    await undefined;
    this.check();
  }
}

/** What else there is. */
interface Variant {
  readonly park?: Park | undefined;
  readonly topical?: boolean;
}

/** Walks once; throws a {@link Violation}. */
export async function walk(seed: number, make: Make, variant: Variant): Promise<void> {
  const world = new World(seed, make, variant);
  try {
    for (let i = 0; i < STEPS; i++) {
      const step = world.step();
      if (step) await step;
      world.check();
      if (i % 4 === 0) await undefined; // those who wait go on
    }
    await world.settle();
  } finally {
    world.end();
  }
}

/** How many of so many walks break a rule, and how the first does. */
export async function walks(
  count: number,
  make: Make,
  { enough = Infinity, ...variant }: Variant & { enough?: number } = {},
): Promise<{ broken: number; first?: string }> {
  let broken = 0;
  let first: string | undefined;
  for (let seed = 1; seed <= count && broken < enough; seed++) {
    try {
      await walk(seed, make, variant);
    } catch (error) {
      if (!(error instanceof Violation)) throw error;
      broken++;
      first ??= `seed ${seed}: ${error.message}`;
    }
  }
  return { broken, ...first !== undefined && { first } };
}
