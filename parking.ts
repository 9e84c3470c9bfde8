/**
 * A parking store: a session whose client is away when its instance ends, or is about to be frozen,
 * waits in a store that all instances share, for the instance that its client comes to.
 *
 * Four lines make a store of Redis, PostgreSQL, Deno KV or a Durable Object: docs/scale.md has them.
 * docs/cluster-protocol.md specifies what is put there; its sentences are quoted here.
 *
 * @example
 * ```ts ignore
 * import { sseAdapter } from "jsr:@duplex/sse/server";
 * import { cluster } from "jsr:@duplex/sse/cluster";
 * import { parking } from "jsr:@duplex/sse/parking";
 * import { redis } from "npm:crossws/sync";
 * import { Redis } from "npm:ioredis";
 *
 * const client = new Redis();
 * const store = {
 *   put: (key, bytes, ttl) => client.set(key, Buffer.from(bytes), "PX", ttl),
 *   take: (key) => client.getdelBuffer(key),
 * };
 *
 * const ws = sseAdapter({
 *   bidir: true,
 *   sync: cluster(redis({ client, channel: "chat" }), { parking: parking(store) }),
 *   hooks: { revive() {}, message: (peer, message) => peer.send(message.text()) },
 * });
 * ```
 *
 * @module
 */

import type { Packed, RoutingHost, SessionParking } from "./server.ts";

// --- Limits ---

/** In bytes: what a session takes, with what its client has not acknowledged. */
const DEFAULT_MAX_SIZE = 1024 * 1024;
/** And all that are on their way to the store. */
const MAX_PENDING_BYTES = 64 * 1024 * 1024;
/** In ms, like all times here: how long the store has for each step. */
const DEFAULT_TIMEOUT = 2_000;
/** How long bytes count as on their way: a store that has not settled by then may never do so. */
const PUT_PATIENCE = 30_000;
/** How often an instance that ends tries again to bring back what it has taken. */
const LAST_PERIOD = 100;
/** How much longer than its client is waited for a session stays in the store. */
const SLACK = 30_000;
/** How long an instance knows which sessions have left it for the store. */
const MEMORY = 90_000;
const MAX_REMEMBERED = 100_000;
/** In a second. */
const MAX_REPORTS = 10;
const SILENT = "The store of parked sessions does not answer";
/** So many pointers lead one to the next. */
const MAX_HOPS = 4;
const MISPLACED = "What is parked is not what its name says";

const encoder: TextEncoder = new TextEncoder();
const decoder: TextDecoder = new TextDecoder();

// --- Types ---

type Bytes = Uint8Array<ArrayBuffer>;

/** A value, or the promise of one. */
export type MaybePromise<T> = T | Promise<T>;

/** Where sessions wait. All instances share it; keys are hexadecimal, values sealed. */
export interface ParkingStore {
  /** Keeps the bytes for so long, in ms. Resolves when they are there; rejects where that is not known. */
  put(key: string, bytes: Uint8Array<ArrayBuffer>, ttl: number): MaybePromise<unknown>;
  /**
   * Removes the bytes and returns them, in one step: of all that ask for a key, one gets it, once.
   * Nothing where there are none, or no more.
   */
  take(key: string): MaybePromise<Uint8Array | null | undefined>;
}

/** Options of {@link parking}. */
export interface ParkingOptions {
  /**
   * Parks a session as soon as its client is away, and not only when the instance ends: for
   * platforms that freeze an instance which has no request. Default: false.
   */
  whenAway?: boolean;
  /** Told of each parking that the platform is to wait for before it freezes: its own `waitUntil`. */
  waitUntil?(work: Promise<void>): void;
  /** The largest session that is parked, in bytes. Default: 1 MiB. */
  maxSize?: number;
  /** How long the store has for each step of a parking, in ms. Default: 2000. */
  timeout?: number;
}

/** What parking needs of its instance. */
export interface Quay {
  /** The instance's id. */
  readonly instance: string;
  /** The server: what of it concerns sessions out of service. */
  readonly host: Pick<RoutingHost, "resumeTimeout" | "pack" | "restore" | "release" | "report">;
  /** By the clock of the day, in ms. */
  now(): number;
  /** Has time go on. */
  wake(): void;
  /** How many publications of each instance have been delivered here. */
  counts(): Readonly<Record<string, number>>;
  /** Whether the session is asked for here. */
  asks(session: string): boolean;
  /** Takes a session into service that is asked for here. Resolves when that is done; false: nobody asks any more. */
  take(
    session: string,
    state: Uint8Array<ArrayBuffer>,
    counts: Readonly<Record<string, number>>,
  ): Promise<boolean>;
  /** Tells the instance that parked the session that it was taken here. */
  confirm(to: string, id: string, session: string): void;
  /** SHA-256. */
  digest(text: string): Promise<Uint8Array<ArrayBuffer>>;
  /** With a key that the token alone gives. */
  seal(token: string, bytes: Uint8Array<ArrayBuffer>): Promise<Uint8Array<ArrayBuffer>>;
  /** The reverse; rejects what is not by that key. */
  unseal(token: string, bytes: Uint8Array<ArrayBuffer>): Promise<Uint8Array<ArrayBuffer>>;
  /** As the bytes of a `state`. */
  encodePacked(packed: Packed): Uint8Array<ArrayBuffer>;
}

/** What {@link parking} makes, for the option of the same name of `cluster`. */
export type ParkingAdapter = (quay: Quay) => Parking;

/** Who asks for a session. */
export interface Asking {
  /** Its name on the backplane. */
  readonly session: string;
  /** The one that `upgrade` has given the client here. */
  readonly namespace: string;
}

/** What a value in the store begins with. */
interface Label {
  readonly kind: "session" | "pointer";
  readonly id: string;
  readonly from: string;
  readonly namespace: string;
  /** By the clock of the day: until when it may be taken. */
  readonly until: number;
  /** The names of the pointers, which tell it from an older state of the session. */
  readonly keys: readonly string[];
  /** The publications that the session has had. */
  readonly counts: Readonly<Record<string, number>>;
}

/** A session from the store. */
interface Landing extends Label {
  readonly state: Bytes;
}

/**
 * Where a parked session is: storing (nobody could take it but its instance) → pointing → parked →
 * reclaiming → over; "left" when its instance is about to end, and will not take it back. What is
 * over has no more steps, whatever the store says later.
 */
type Phase = "storing" | "pointing" | "parked" | "reclaiming" | "left" | "over";

interface Parked {
  readonly id: string;
  readonly token: string;
  /** The first halves of those that its client may come with, and the latest of its connections. */
  readonly marks: readonly string[];
  readonly attempt: number;
  readonly since: number;
  phase: Phase;
  /** Of the phase, by ticks. */
  age: number;
  /** The instance is about to end. */
  leaves: boolean;
  /** Somebody waits for it. */
  wanted: boolean;
  /** How often it was asked back of the store. */
  takes: number;
  /** When it is known what has become of the parking, and of the session. */
  readonly stored: Deferred;
  readonly end: Deferred;
}

// --- Public surface ---

/**
 * Makes the `parking` option of `cluster` out of a store. Sessions whose hooks have `revive` are
 * parked there when their instance ends and no other has taken them.
 *
 * A store that fails is told to `onError`: then sessions are what they are without it.
 *
 * @throws {RangeError} if `maxSize` or `timeout` is below 1.
 *
 * @example A store of sessions that hold no more than 64 KiB each
 * ```ts
 * import { parking, type ParkingStore } from "@duplex/sse/parking";
 *
 * const parked = new Map<string, Uint8Array<ArrayBuffer>>();
 * const store: ParkingStore = { // of all instances in this process
 *   put: (key, bytes) => void parked.set(key, bytes),
 *   take(key) {
 *     const bytes = parked.get(key);
 *     parked.delete(key);
 *     return bytes;
 *   },
 * };
 * const adapter = parking(store, { maxSize: 64 * 1024 });
 * ```
 */
export function parking(store: ParkingStore, options: ParkingOptions = {}): ParkingAdapter {
  const { maxSize = DEFAULT_MAX_SIZE, timeout = DEFAULT_TIMEOUT } = options;
  if (!(maxSize >= 1)) throw new RangeError("maxSize must be a number of at least 1");
  if (!(timeout >= 1)) throw new RangeError("timeout must be a number of at least 1");
  return (quay) => new Parking(store, quay, { ...options, maxSize, timeout });
}

// --- Parking: sessions between two instances ---

/**
 * The sessions of one instance that are parked, and its way to those that others have parked.
 *
 * @example How `cluster` comes by it
 * ```ts
 * import { type Parking, parking, type ParkingStore, type Quay } from "@duplex/sse/parking";
 *
 * declare const store: ParkingStore;
 * declare const quay: Quay; // an instance
 *
 * const parked: Parking = parking(store)(quay);
 * console.log(parked.size);
 * ```
 */
export class Parking implements SessionParking {
  readonly #store: ParkingStore;
  readonly #quay: Quay;
  readonly #options: ParkingOptions & { maxSize: number; timeout: number };
  /** By the half of the token that stays. */
  readonly #parked: Map<string, Parked> = new Map();
  /** Where those went that were taken elsewhere: "" where that is not known. */
  readonly #gone: Map<string, { id: string; to: string; since: number }> = new Map();
  /** Sessions that are being taken out of the store here, by name. */
  readonly #landing: Map<string, { token: string; end: Promise<boolean> }> = new Map();
  readonly #waits: Waits = new Waits();
  readonly #ticks: Ticks = new Ticks(() => this.#quay.wake());
  /** Those that are to be parked once their hooks have settled. */
  readonly #busy: Busy = new Busy();
  /** Those for which something is on its way to the store, for as long as that may take. */
  readonly #putting: Set<string> = new Set();
  readonly #pointing: Pointing = new Pointing();
  readonly #gate: Gate = new Gate();
  #failing = false;
  readonly #limit: Limit = new Limit();

  /** @ignore `parking` makes it. */
  constructor(
    store: ParkingStore,
    quay: Quay,
    options: ParkingOptions & { maxSize: number; timeout: number },
  ) {
    this.#store = store;
    this.#quay = quay;
    this.#options = options;
  }

  /** Sessions of this instance that wait in the store, as far as it knows. */
  get size(): number {
    let size = 0;
    for (const { phase } of this.#parked.values()) {
      if (phase === "parked" || phase === "reclaiming") size++;
    }
    return size;
  }

  /** Something is kept that a tick will look at. */
  get remembers(): boolean {
    return this.#parked.size + this.#gone.size + this.#gate.size + this.#ticks.size > 0;
  }

  /** The store has failed when it was asked last, or has not answered for the session: that may be there. */
  mayBring(session: string): boolean {
    return this.#failing || this.#waits.isFor(session);
  }

  /** Sessions that are in nobody's hands but this instance's, until they are in service or put back. */
  get taking(): Promise<unknown>[] {
    return this.#waits.taking;
  }

  /** What stands behind the instance in a token, another each time. */
  mark(): string {
    return hex(crypto.getRandomValues(new Uint8Array(4)));
  }

  /** Whether the session of this name is in this instance's hands, out of the store or on its way back. */
  isLanding(session: string): boolean {
    return this.#landing.has(session) || this.#waits.isFor(session);
  }

  /** The end of the session's stay, if it is parked: then it is here, or is known not to be. */
  moving(token: string): Promise<void> | undefined {
    const parked = this.#parked.get(secretOf(token));
    return parked && parked.phase !== "left" ? parked.end.promise : undefined;
  }

  /** Where a session went that was parked here: "" where that is not known; undefined: it was not. */
  whereabouts(token: string): string | undefined {
    const secret = secretOf(token);
    return this.#parked.get(secret)?.phase === "left" ? "" : this.#gone.get(secret)?.to;
  }

  // --- The instance that has the session ---

  /** Its client is away: what is done about it in this task comes first. */
  away(token: string): void {
    if (!this.#options.whenAway) return;
    const tries = () => this.#park(token, false);
    const work = this.#busy.next(secretOf(token), tries).catch((error) => this.#report(error));
    try {
      this.#options.waitUntil?.(work);
    } catch (error) { // as a platform's own does that is not called as its method
      this.#report(error);
    }
  }

  /** Its hooks have settled, or its client is away no more: a poll may be over in the same task. */
  stir(token: string, isBack = false): void {
    this.#busy.stir(secretOf(token), isBack);
  }

  /** Parks the session, if it can be packed. Resolves when that is done, or has failed. */
  async park(token: string, leaves: boolean): Promise<void> {
    await this.#park(token, leaves);
  }

  /** The same. True: not before the session's hooks have settled. */
  async #park(token: string, leaves: boolean): Promise<boolean> {
    const secret = secretOf(token);
    const before = this.#parked.get(secret);
    if (before) {
      before.leaves ||= leaves;
      if (before.phase === "parked") this.#settle(before);
      if (before.phase !== "reclaiming" || !leaves) {
        await before.stored.promise;
        return false;
      }
      await before.end.promise; // it may be out of the store already
      return await this.#park(token, leaves);
    }
    let isBusy = false;
    await this.#gate.pass(async () => {
      isBusy = await this.#begin(token, leaves);
    });
    return isBusy;
  }

  /** Nobody has parked it; or somebody has, while there was no room. */
  async #begin(token: string, leaves: boolean): Promise<boolean> {
    const secret = secretOf(token);
    if (this.#parked.has(secret)) return await this.#park(token, leaves);
    // What still goes to the store for it would come between.
    const packed = this.#putting.has(secret) ? undefined : this.#quay.host.pack(token);
    if (!packed || packed === "busy") return packed === "busy";
    const state = this.#quay.encodePacked(packed);
    const size = state.length;
    const parked = begun(token, packed, leaves, this.#now);
    this.#parked.set(secret, parked);
    this.#quay.wake();
    if (size > this.#options.maxSize) {
      this.#report(tooLarge(size));
      this.#back(parked);
      return false;
    }
    this.#putting.add(secret);
    const leave = this.#gate.enter(size, () => this.#putting.delete(secret));
    this.#put(parked, packed, state).finally(leave);
    await parked.stored.promise;
    return false;
  }

  /**
   * "First the session, under a name that nobody else knows; then the pointer to it." So what fails
   * before the pointer has failed for good, and what fails afterwards is decided by who takes it.
   */
  async #put(parked: Parked, { namespace, marks }: Packed, state: Bytes): Promise<void> {
    const { id, token, since } = parked;
    const { instance: from, host } = this.#quay;
    const ttl = host.resumeTimeout + SLACK;
    const counts = this.#quay.counts();
    const seal = (kind: Label["kind"], keys: string[], rest?: Bytes) => {
      const label = { kind, id, from, namespace, until: since + ttl, keys, counts };
      return this.#quay.seal(token, encode(label, rest));
    };
    try {
      const tokens = marks.map((mark) => `${mark}.${secretOf(token)}`);
      const keys = await Promise.all(tokens.map((one) => keyOf(this.#quay, one)));
      if (this.#pointing.isFull(keys)) return this.#giveUp(parked);
      await this.#store.put(id, await seal("session", keys, state), ttl);
      if (!isStill(parked, "storing")) return; // too late: it is in service again
      this.#enter(parked, "pointing");
      const pointer = await seal("pointer", keys);
      const put = (key: string) => this.#store.put(key, pointer, ttl);
      await this.#pointing.point(id, keys, this.#quay, put);
      this.#failing = false;
      if (!isStill(parked, "pointing")) return;
      this.#enter(parked, "parked");
      this.#settle(parked);
    } catch (error) {
      this.#fail(error);
      this.#giveUp(parked);
    }
  }

  #enter(parked: Parked, phase: Phase): void {
    parked.phase = phase;
    parked.age = 0;
  }

  /** It is parked: somebody may have asked for it meanwhile. */
  #settle(parked: Parked): void {
    parked.stored.resolve();
    if (parked.leaves) {
      this.#enter(parked, "left");
      this.#quay.host.release(parked.token, "moved");
      parked.end.resolve();
    } else if (parked.wanted) this.#waits.hold(this.#reclaim(parked));
  }

  /** Nobody can have taken what nothing points to; else the store says whether somebody has. */
  #giveUp(parked: Parked): void {
    if (parked.phase === "storing") this.#back(parked);
    else if (parked.phase === "pointing") this.#waits.hold(this.#reclaim(parked));
  }

  /**
   * Somebody wants the session here, whose client has come with a token of this first half; without
   * `attempt`, by an uplink. Resolves when it is here, or elsewhere; false: elsewhere.
   */
  async want(token: string, attempt?: number, mark: string = markOf(token)): Promise<boolean> {
    const parked = this.#parked.get(secretOf(token));
    const phase = parked?.phase ?? "over";
    if (phase === "storing") this.#back(parked!); // nobody can have taken it
    else if (parked && isTaken(parked, mark, attempt)) this.#leave(parked, "");
    else if (phase !== "left" && phase !== "over") {
      parked!.wanted = true;
      if (phase === "parked") this.#waits.hold(this.#reclaim(parked!));
      await parked!.end.promise;
    }
    if (phase !== "over") this.away(token); // if that was an uplink, nobody else would park it again
    return this.whereabouts(token) === undefined;
  }

  /** It "takes it back as anybody takes it": who was frozen finds out so that its session has left. */
  async #reclaim(parked: Parked): Promise<void> {
    this.#enter(parked, "reclaiming");
    const take = ++parked.takes;
    let found: Landing | undefined;
    try {
      const bytes = await this.#store.take(parked.id);
      this.#failing = false;
      found = bytes ? await this.#sessionOf(parked, bytes) : undefined;
    } catch (error) {
      this.#fail(error);
      if (take === parked.takes) this.#postpone(parked);
      return;
    }
    const waits = isStill(parked, "reclaiming") || isStill(parked, "parked");
    if (found && !waits) await this.#cameLate(parked, found);
    else if (found && (parked.wanted || !isLate(parked, this.#quay))) this.#back(parked);
    else if (found) this.#leave(parked, "", "lost"); // its client has not come back
    else if (isStill(parked, "reclaiming") && take === parked.takes) this.#leave(parked, "");
  }

  /** The store has not said whether it has the session: it is asked again by the next tick. */
  #postpone(parked: Parked): void {
    if (!isStill(parked, "reclaiming")) return;
    this.#enter(parked, "parked");
    if (parked.leaves) this.#settle(parked);
  }

  /** It was given up here by then: the next who asks for it is to find it. */
  async #cameLate({ token }: Parked, found: Landing): Promise<void> {
    if (this.whereabouts(token) !== "") return; // somebody is known to have it
    await this.#bring(this.#retrieval(token, found), () => Promise.resolve(false));
  }

  /** Anybody can put anything there, once it is taken. */
  async #sessionOf({ token, id }: Parked, bytes: Uint8Array): Promise<Landing | undefined> {
    try {
      const [label, state] = decode(await this.#quay.unseal(token, copy(bytes)));
      if (label.kind === "session" && label.id === id) return { ...label, state };
    } catch (error) {
      this.#report(error);
    }
  }

  /** Another instance says that it has taken the session. */
  taken(token: string, id: string, by: string): void {
    const parked = this.#parked.get(secretOf(token));
    if (parked?.id === id && parked.phase !== "storing") this.#leave(parked, by);
    const gone = this.#gone.get(secretOf(token));
    if (gone?.id === id) gone.to = by; // that it was taken may have been known sooner than by whom
  }

  #back(parked: Parked): void {
    this.#forget(parked);
    this.#quay.host.restore(parked.token);
    parked.end.resolve();
  }

  #leave(parked: Parked, to: string, end: "moved" | "lost" = "moved"): void {
    const wasHere = parked.phase !== "left";
    this.#forget(parked);
    if (this.#gone.size >= MAX_REMEMBERED) this.#gone.delete(this.#gone.keys().next().value!);
    this.#gone.set(secretOf(parked.token), { id: parked.id, to, since: this.#now });
    if (wasHere) this.#quay.host.release(parked.token, end);
    parked.end.resolve();
  }

  #forget(parked: Parked): void {
    this.#enter(parked, "over");
    this.#parked.delete(secretOf(parked.token));
    parked.stored.resolve();
  }

  /** The session is here, from wherever it came. */
  arrived(token: string): void {
    const parked = this.#parked.get(secretOf(token));
    if (parked) this.#leave(parked, ""); // it left, and nobody has told
    this.#gone.delete(secretOf(token));
  }

  /** Room is needed: what has been parked for longest is left to the store alone. False: there is none. */
  letGo(): boolean {
    for (const parked of this.#parked.values()) {
      if (parked.phase !== "parked") continue;
      this.#leave(parked, "");
      return true;
    }
    return false;
  }

  hurry(): void {
    this.#gate.giveUp();
    for (const parked of [...this.#parked.values()]) {
      if (parked.phase === "storing") this.#back(parked);
      else if (parked.phase !== "left") this.#leave(parked, "");
    }
    this.#waits.end();
    this.#ticks.end(this.#options.timeout);
  }

  // --- The instance that its client comes to ---

  /** Looks for a session in the store, and takes it. False: it is not there. */
  async look(asking: Asking, token: string): Promise<boolean> {
    const { session } = asking;
    const before = this.#landing.get(session);
    if (before && (await before.end || before.token === token)) return await before.end;
    // Another token names another pointer. Not at once: either would find the other in its way.
    if (this.#landing.has(session)) return await this.look(asking, token);
    const end = this.#inTime(asking, token).finally(() => this.#landing.delete(session));
    this.#landing.set(session, { token, end });
    return await end;
  }

  /** Whatever the store says later is taken as well, by whoever waits then. */
  async #inTime(asking: Asking, token: string): Promise<boolean> {
    const fetch = (end: () => void) => this.#waits.hold(this.#fetch(asking, token, end), asking);
    const silent = () => this.#fail(new Error(SILENT));
    return !!await this.#waits.inTime(fetch, this.#options.timeout, silent);
  }

  /** `answered`: the store has no more to say. */
  async #fetch(asking: Asking, token: string, answered: () => void): Promise<boolean> {
    const one = this.#retrieval(token);
    try {
      const isFound = await one.find(asking).finally(answered);
      this.#failing = false;
      if (!isFound) return false;
    } catch (error) {
      this.#fail(error);
      if (!one.isOurs) return false;
    }
    return await this.#bring(one, (found) => this.#land(asking, found));
  }

  #retrieval(token: string, found?: Landing): Retrieval {
    const { timeout } = this.#options;
    return new Retrieval(this.#store, this.#quay, token, found, {
      put: async (...value) => await this.#ticks.within(timeout, this.#store.put(...value)),
      point: (...pointers) => this.#ticks.within(timeout, this.#pointing.point(...pointers)),
      report: (error) => this.#report(error),
    });
  }

  /** "Where that fails it is tried again", since nobody else can come to the session meanwhile. */
  async #bring(one: Retrieval, land: (found: Landing) => Promise<boolean>): Promise<boolean> {
    for (;;) {
      try {
        return await one.bring(land);
      } catch (error) {
        this.#fail(error);
      }
      if (one.until <= this.#now || !await this.#ticks.next(one.size)) return false;
    }
  }

  /** The store answers for who has parked the session, as any owner does. */
  async #land({ session, namespace }: Asking, found: Landing): Promise<boolean> {
    const { id, from, state, counts } = found;
    if (found.namespace !== namespace || !this.#quay.asks(session)) return false;
    if (!await this.#quay.take(session, state, counts)) return false;
    this.#quay.confirm(from, id, session);
    return true;
  }

  // --- Failures and time ---

  #fail(error: unknown): void {
    this.#failing = true;
    this.#report(error);
  }

  #report(error: unknown): void {
    if (!this.#limit.isPassed(this.#now)) this.#quay.host.report(error, { stage: "delivery" });
  }

  get #now(): number {
    return this.#quay.now();
  }

  /** Ticks, not clocks: while this process was frozen, it was not the store that was slow. */
  tick(period: number): void {
    const now = this.#now;
    const { resumeTimeout } = this.#quay.host;
    if (this.#gate.tick(period, this.#options.timeout)) this.#fail(new Error(SILENT));
    this.#ticks.tick(period);
    for (const parked of [...this.#parked.values()]) {
      parked.age += period;
      const { phase, age, since } = parked;
      if ((phase === "storing" || phase === "pointing") && age > this.#options.timeout) {
        this.#fail(new Error(SILENT));
        this.#giveUp(parked);
      } else if (phase === "reclaiming" && age > this.#options.timeout) {
        this.#fail(new Error(SILENT));
        this.#postpone(parked);
      } else if (phase === "left") {
        if (age > MEMORY) this.#forget(parked);
      } else if (phase === "parked" && age > MEMORY && now - since > resumeTimeout + MEMORY) {
        this.#leave(parked, ""); // the store does not answer, and has it no more
      } else if (phase === "parked" && (parked.wanted || isLate(parked, this.#quay))) {
        // "After the resume timeout an instance takes back what nobody has come for."
        this.#waits.hold(this.#reclaim(parked));
      }
    }
    for (const [secret, { since }] of this.#gone) {
      if (now - since <= MEMORY) break;
      this.#gone.delete(secret);
    }
  }
}

/** Sessions whose hooks are at work, and who waits for that. */
class Busy {
  readonly #ends: Map<string, Deferred> = new Map();
  /** Sessions that are to be parked in the next task, unless their clients are back by then. */
  readonly #due: Set<string> = new Set();

  async next(session: string, isAtWork: () => Promise<boolean>): Promise<void> {
    this.#due.add(session);
    await new Promise((resolve) => setTimeout(resolve));
    // With hooks at work it cannot be packed: then it is parked once they have settled.
    if (this.#due.delete(session)) await this.repeat(session, isAtWork);
  }

  /** Tries until they are at work no more, each time that they have settled. */
  async repeat(session: string, isAtWork: () => Promise<boolean>): Promise<void> {
    // They may settle before it is known here that they had not.
    for (let settled = this.#wait(session); await isAtWork(); settled = this.#wait(session)) {
      await settled;
    }
    this.stir(session);
  }

  #wait(session: string): Promise<void> {
    const end = this.#ends.get(session) ?? deferred();
    this.#ends.set(session, end);
    return end.promise;
  }

  stir(session: string, isBack = false): void {
    if (isBack) this.#due.delete(session);
    this.#ends.get(session)?.resolve();
    this.#ends.delete(session);
  }
}

/** Waits for the store, which the end of the instance ends, too. */
class Waits {
  readonly #ends: Set<() => void> = new Set();
  /** By name, of a session that was not here. */
  readonly #taking: Map<Promise<unknown>, string | undefined> = new Map();

  /** What may have been taken out of the store, and is not where it belongs yet. */
  get taking(): Promise<unknown>[] {
    return [...this.#taking.keys()];
  }

  /** Whether the session of this name is among them, for all that is known. */
  isFor(session: string): boolean {
    return [...this.#taking.values()].includes(session);
  }

  hold<T>(taking: Promise<T>, asking?: Asking): Promise<T> {
    this.#taking.set(taking, asking?.session);
    return taking.finally(() => this.#taking.delete(taking));
  }

  /** What is done in time; `silent` is called where it is not. */
  async inTime<T>(
    doing: (answered: () => void) => Promise<T>,
    timeout: number,
    silent: () => void,
  ): Promise<T | undefined> {
    const late = deferred();
    const timer = setTimeout(() => {
      silent();
      late.resolve();
    }, timeout);
    const answered = () => {
      clearTimeout(timer);
      this.#ends.delete(end);
    };
    const end = () => {
      answered();
      late.resolve();
    };
    this.#ends.add(end);
    return await Promise.race([doing(answered), late.promise.then(() => undefined)]);
  }

  end(): void {
    for (const end of this.#ends) end();
  }
}

/** Time, by ticks; and by a timer once no more come, for who is not done by then. */
class Ticks {
  readonly #wake: () => void;
  readonly #listeners: Set<(period: number) => void> = new Set();
  /** In bytes: what those hold that wait for the next one. */
  #held = 0;
  /** How long the instance goes on, once it ends. */
  #left = Infinity;
  #timer: ReturnType<typeof setInterval> | undefined;

  constructor(wake: () => void) {
    this.#wake = wake;
  }

  /** Who waits. */
  get size(): number {
    return this.#listeners.size;
  }

  /** The next one. False: none comes, or there is no room for what is held meanwhile. */
  async next(size: number): Promise<boolean> {
    if (this.#left <= 0 || this.#held + size > MAX_PENDING_BYTES) return false;
    this.#held += size;
    await new Promise<void>((resolve) => {
      const listener = () => {
        this.#listeners.delete(listener);
        resolve();
      };
      this.#listen(listener);
    });
    this.#held -= size;
    return true;
  }

  /** What the store does not do in so much time has failed, though it may yet come. */
  async within(time: number, doing: MaybePromise<unknown>): Promise<void> {
    let age = 0;
    let listener = (_period: number) => {};
    const late = new Promise<never>((_, reject) => {
      listener = (period) => {
        if ((age += period) > time) reject(new Error(SILENT));
      };
    });
    this.#listen(listener);
    await Promise.race([doing, late]).finally(() => this.#listeners.delete(listener));
  }

  #listen(listener: (period: number) => void): void {
    this.#listeners.add(listener);
    this.#wake();
    this.#run();
  }

  tick(period: number): void {
    for (const listener of [...this.#listeners]) listener(period);
  }

  end(time: number): void {
    this.#left = time;
    this.#run();
  }

  #run(): void {
    if (this.#left === Infinity || this.#timer !== undefined || !this.size) return;
    this.#timer = setInterval(() => {
      this.#left -= LAST_PERIOD;
      this.tick(LAST_PERIOD);
      if (this.size) return;
      clearInterval(this.#timer);
      this.#timer = undefined;
    }, LAST_PERIOD);
  }
}

/** Bytes on their way to the store. */
interface Entrant {
  readonly size: number;
  readonly left: () => void;
  age: number;
}

/** What is on its way to the store; where that is too much, others wait for their turn. */
class Gate {
  #bytes = 0;
  readonly #inside: Set<Entrant> = new Set();
  readonly #waiting: { go: () => void; giveUp: () => void }[] = [];
  /** How long nothing has arrived. */
  #stalled = 0;

  /** Those on their way, and those who wait. */
  get size(): number {
    return this.#inside.size + this.#waiting.length;
  }

  async pass(begin: () => Promise<void>): Promise<void> {
    if (this.#bytes < MAX_PENDING_BYTES) return await begin();
    await new Promise<void>((resolve) => {
      this.#waiting.push({ go: () => resolve(begin()), giveUp: resolve });
    });
  }

  /** Returns what is to be called when they have arrived; `left` is, then or when that takes too long. */
  enter(size: number, left: () => void): () => void {
    const one = { size, age: 0, left };
    this.#inside.add(one);
    this.#bytes += size;
    return () => this.#leave(one);
  }

  #leave(one: Entrant): void {
    if (!this.#inside.delete(one)) return; // it was given up
    one.left();
    this.#bytes -= one.size;
    this.#stalled = 0;
    while (this.#bytes < MAX_PENDING_BYTES && this.#waiting.length) this.#waiting.shift()!.go();
  }

  /** Whether the store is too slow for those who wait, or for what is on its way. */
  tick(period: number, patience: number): boolean {
    let isLate = false;
    for (const one of this.#inside) {
      one.age += period;
      if (one.age <= PUT_PATIENCE) continue;
      this.#leave(one); // else a store that never settles would keep the gate shut for ever
      isLate = true;
    }
    this.#stalled = this.#waiting.length ? this.#stalled + period : 0;
    if (this.#stalled <= patience) return isLate;
    this.giveUp();
    return true;
  }

  giveUp(): void {
    for (const { giveUp } of this.#waiting.splice(0)) giveUp();
  }
}

/**
 * Pointers on their way, however long: a late one may replace a newer. So that it leads there, too,
 * the newer is also put behind the name that the late one has.
 */
class Pointing {
  /** By their own, the names that they lead to. */
  readonly #names: Map<string, Set<string>> = new Map();

  /** Whether they are more than anybody follows. */
  isFull(keys: readonly string[]): boolean {
    return this.#of(keys).length > MAX_HOPS;
  }

  #of(keys: readonly string[]): string[] {
    return [...new Set(keys.flatMap((key) => [...this.#names.get(key) ?? []]))];
  }

  /**
   * Puts the pointers: the newest first, so that who takes the session by the other finds none on its
   * way that could come later. All of them, though it may be over here: it may be the store's alone.
   */
  async point(
    id: string,
    keys: readonly string[],
    quay: Quay,
    put: (key: string) => MaybePromise<unknown>,
  ): Promise<void> {
    const behind = await Promise.all(this.#of(keys).map((late) => nameBehind(quay, late)));
    for (const key of keys) this.#names.set(key, (this.#names.get(key) ?? new Set()).add(id));
    try {
      for (const key of [...behind, ...keys.toReversed()]) await put(key);
    } finally {
      for (const key of keys) {
        const names = this.#names.get(key);
        if (names?.delete(id) && !names.size) this.#names.delete(key);
      }
    }
  }
}

/** Anybody can bring a report about, by asking for a session that never was. */
class Limit {
  #second = 0;
  #count = 0;

  isPassed(now: number): boolean {
    const second = Math.floor(now / 1_000);
    if (second !== this.#second) this.#count = 0;
    this.#second = second;
    return ++this.#count > MAX_REPORTS;
  }
}

function begun(
  token: string,
  { marks, attempt }: Packed,
  leaves: boolean,
  since: number,
): Parked {
  return {
    ...{ id: hex(crypto.getRandomValues(new Uint8Array(16))), token, leaves },
    ...{ marks, attempt },
    ...{ since, phase: "storing", age: 0, wanted: false, takes: 0 },
    ...{ stored: deferred(), end: deferred() },
  };
}

function tooOld(left: number): Error {
  const seconds = Math.round(-left / 1_000);
  return new Error(`A parked session is too old, or clocks differ: ${seconds} s`);
}

function tooLarge(size: number): RangeError {
  return new RangeError(`A session of ${size} bytes is too large to be parked`);
}

/** Its client is waited for no longer. */
function isLate({ since }: Parked, quay: Quay): boolean {
  return quay.now() - since > quay.host.resumeTimeout;
}

/** "A client that comes later, and with another token", was told it by who has taken the session. */
function isTaken({ phase, attempt: last, marks }: Parked, mark: string, attempt = last): boolean {
  return (phase === "parked" || phase === "pointing") && attempt > last && !marks.includes(mark);
}

/** Meanwhile it may have gone on. */
function isStill({ phase }: Parked, then: Phase): boolean {
  return phase === then;
}

/** What a retrieval needs besides the store itself. */
interface Line {
  /** As of the store, and rejects where that is not done in time. */
  put(key: string, bytes: Bytes, ttl: number): Promise<void>;
  /** As of those that are on their way, likewise. */
  readonly point: Pointing["point"];
  report(error: unknown): void;
}

/**
 * A session on its way out of the store: by the pointer to it, to who waits for it here, or else
 * back there. Where a step fails it is in this instance's hands, or nobody else knows where it is.
 */
class Retrieval {
  readonly #store: ParkingStore;
  readonly #quay: Quay;
  readonly #token: string;
  readonly #line: Line;
  /** Its name in the store, whoever takes it by that. */
  #id: string | undefined;
  /** It was taken by that name. */
  #found: Landing | undefined;
  /** The pointer that led to it, and until when it may be taken. */
  #key: string | undefined;
  #until = 0;

  constructor(
    store: ParkingStore,
    quay: Quay,
    token: string,
    found: Landing | undefined,
    line: Line,
  ) {
    this.#store = store;
    this.#quay = quay;
    this.#line = line;
    this.#token = token;
    this.#found = found;
    if (found) this.#until = found.until;
  }

  /** It is here, or nothing points to it, for all that is known. */
  get isOurs(): boolean {
    return this.#id !== undefined || this.#found !== undefined;
  }

  /** By the clock of the day. */
  get until(): number {
    return this.#until;
  }

  /** In bytes. */
  get size(): number {
    return this.#found?.state.length ?? 0;
  }

  /** "Who takes the session has it": the pointer alone decides nothing. False: it is not there. */
  async find(asking: Asking): Promise<boolean> {
    const key = this.#key = await keyOf(this.#quay, this.#token);
    let pointer = await this.#store.take(key);
    for (let hops = 0; pointer && hops <= MAX_HOPS; hops++) {
      const [label] = await open(this.#quay, this.#token, pointer, "pointer", key);
      const end = await this.#follow(label, asking, pointer);
      if (end !== undefined) return end;
      pointer = await this.#store.take(await nameBehind(this.#quay, label.id));
      const left = label.until - this.#quay.now();
      if (!pointer && left <= 0) this.#line.report(tooOld(left));
    }
    return false;
  }

  /** Undefined: it leads to nothing. */
  async #follow(
    { id, until, namespace }: Label,
    asking: Asking,
    pointer: Uint8Array,
  ): Promise<boolean | undefined> {
    const left = until - this.#quay.now();
    if (left <= 0) return; // a newer one may have been replaced by it
    this.#until = until;
    this.#id = id;
    const returned = async () => {
      await this.#line.put(this.#key!, copy(pointer), left);
      this.#id = undefined; // the next who follows it decides
    };
    if (namespace === asking.namespace) return await this.#take(returned) || undefined;
    await returned();
    return false;
  }

  /** False: somebody else has it. */
  async #take(failed = () => Promise.resolve()): Promise<boolean> {
    const id = this.#id!;
    let bytes: Uint8Array | null | undefined;
    try {
      bytes = await this.#store.take(id);
    } catch (error) {
      await failed();
      throw error;
    }
    this.#id = this.#found = undefined;
    if (!bytes) return false;
    const [label, state] = await open(this.#quay, this.#token, bytes, "session", this.#key);
    if (label.id !== id) throw new Error(MISPLACED);
    this.#found = { ...label, state };
    return true;
  }

  /**
   * Gives it to `land`, or parks it again, under another name. False: somebody else has it. Where it
   * throws it may be tried again.
   */
  async bring(land: (found: Landing) => Promise<boolean>): Promise<boolean> {
    if (this.#id !== undefined && !await this.#take()) return false;
    if (!this.#found) return false; // it was not what its name says
    if (await land(this.#found)) return true;
    const { state, ...label } = this.#found;
    const left = label.until - this.#quay.now();
    const id = hex(crypto.getRandomValues(new Uint8Array(16)));
    const seal = (kind: Label["kind"], rest?: Bytes) =>
      this.#quay.seal(this.#token, encode({ ...label, id, kind }, rest));
    await this.#line.put(id, await seal("session", state), left);
    const pointer = await seal("pointer");
    this.#id = id; // whoever follows one of the pointers can take it
    const put = (key: string) => this.#store.put(key, pointer, left);
    await this.#line.point(id, label.keys, this.#quay, put);
    return true;
  }
}

// --- Values in the store ---

/** The length of the label, the label, and what it stands on. */
function encode(label: Label, rest: Bytes = new Uint8Array()): Bytes {
  const head = encoder.encode(JSON.stringify(label));
  const bytes = new Uint8Array(4 + head.length + rest.length);
  new DataView(bytes.buffer).setUint32(0, head.length);
  bytes.set(head, 4);
  bytes.set(rest, 4 + head.length);
  return bytes;
}

function decode(bytes: Bytes): [Label, Bytes] {
  const end = 4 + new DataView(bytes.buffer, bytes.byteOffset).getUint32(0);
  return [JSON.parse(decoder.decode(bytes.subarray(4, end))), bytes.slice(end)];
}

/** Of a value in the store, what it is, if it is that. */
async function open(
  quay: Quay,
  token: string,
  bytes: Uint8Array,
  kind: Label["kind"],
  key: string | undefined,
): Promise<[Label, Bytes]> {
  const opened = decode(await quay.unseal(token, copy(bytes)));
  // "Each says which pointers belong to it": nothing older can stand in for it.
  const [{ kind: is, keys }] = opened;
  if (is === kind && (key === undefined || keys.includes(key))) return opened;
  throw new Error(MISPLACED);
}

/** "The pointer's name is made of the whole token", which each answer to a resumption renews. */
async function keyOf(quay: Quay, token: string): Promise<string> {
  return hex((await quay.digest(`duplex-sse park ${token}`)).subarray(0, 16));
}

/** Where the pointer goes on that leads to a name where nothing is. */
async function nameBehind(quay: Quay, id: string): Promise<string> {
  return hex((await quay.digest(`duplex-sse park behind ${id}`)).subarray(0, 16));
}

/** A driver's bytes may be a view of something larger, or shared. */
function copy(bytes: Uint8Array): Bytes {
  return new Uint8Array(bytes);
}

// --- Small things ---

/** As of `Promise.withResolvers`, which Node 20 has not. */
interface Deferred {
  readonly promise: Promise<void>;
  readonly resolve: () => void;
}

function deferred(): Deferred {
  let resolve!: () => void;
  const promise = new Promise<void>((settle) => resolve = settle);
  return { promise, resolve };
}

/** The half of a token that each answer to a resumption renews. */
function markOf(token: string): string {
  return token.slice(0, token.indexOf("."));
}

function hex(bytes: Uint8Array): string {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** The half of a token that stays the same wherever the session is. */
function secretOf(token: string): string {
  return token.slice(token.indexOf(".") + 1);
}
