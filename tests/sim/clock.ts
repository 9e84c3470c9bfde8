/**
 * Virtual time: the timers, clocks and chance of a run are the simulator's. Time passes from
 * one event to the next, each with all its microtasks; nothing real is waited for.
 *
 * @module
 */
import { createHash, createHmac } from "node:crypto";
import type { Dice } from "./dice.ts";

/** Whose event it is: one that is frozen has its events late, one that is dead has none. */
export type Owner = string;

interface Event {
  due: number;
  /** When it would have come: what a frozen owner missed comes in its order. */
  since: number;
  /** Events of one moment happen in the order in which they were scheduled. */
  order: number;
  owner: Owner;
  run: () => void;
  /** Of an interval. */
  period?: number | undefined;
  cancelled: boolean;
}

/** What `setTimeout` returns: an object, as on most runtimes. */
export type Timer = Event & { unref(): void; ref(): void };

/** A run that takes more events than this goes round in circles. */
const MOST_EVENTS = 60_000;

export class Clock {
  now: number;
  /** Whose code is running. */
  owner: Owner = "world";
  events = 0;
  /** Thrown where nobody catches: a process would end by it. */
  readonly uncaught: unknown[] = [];
  #order = 0;
  readonly #heap: Event[] = [];
  readonly #frozen: Map<Owner, number> = new Map();
  readonly #dead: Set<Owner> = new Set();
  readonly #drain: () => void;

  constructor(start: number) {
    this.now = start;
    this.#drain = drain;
  }

  at(due: number, run: () => void, owner: Owner = this.owner, period?: number): Timer {
    const event = {
      due,
      since: due,
      order: this.#order++,
      owner,
      run,
      period,
      cancelled: false,
      unref: () => event,
      ref: () => event,
    };
    push(this.#heap, event);
    return event as unknown as Timer;
  }

  after(delay: number, run: () => void, owner?: Owner): Timer {
    return this.at(this.now + delay, run, owner);
  }

  cancel(timer: unknown): void {
    if (typeof timer === "object" && timer) (timer as Event).cancelled = true;
  }

  /** The events of this owner come no sooner than that. */
  freeze(owner: Owner, until: number): void {
    this.#frozen.set(owner, Math.max(until, this.#frozen.get(owner) ?? 0));
  }

  /** No event of this owner comes any more: its process was killed. */
  kill(owner: Owner): void {
    this.#dead.add(owner);
  }

  /** Timers that are still to come, of living owners. */
  pending(): Owner[] {
    return this.#heap.filter((event) => !event.cancelled && !this.#dead.has(event.owner))
      .map((event) => event.owner);
  }

  /** Runs what is due until then; sooner if the condition holds. */
  runUntil(time: number, done: () => boolean = () => false): void {
    this.#drain();
    while (!done()) {
      const event = this.#heap[0];
      if (!event || event.due > time) {
        this.now = Math.max(this.now, time);
        return;
      }
      pop(this.#heap);
      if (!event.cancelled && !this.#dead.has(event.owner)) this.#run(event);
    }
  }

  #run(event: Event): void {
    const thaw = this.#frozen.get(event.owner) ?? 0;
    if (thaw > event.due) {
      event.due = thaw;
      return push(this.#heap, event);
    }
    if (++this.events > MOST_EVENTS) throw new Error("The run goes round in circles");
    this.now = Math.max(this.now, event.due);
    this.owner = event.owner;
    if (event.period !== undefined) {
      event.due = event.since = this.now + event.period;
      event.order = this.#order++;
      push(this.#heap, event);
    }
    event.run();
    this.#drain();
    this.owner = "world";
  }
}

// --- The heap ---

function before(a: Event, b: Event): boolean {
  if (a.due !== b.due) return a.due < b.due;
  return a.since === b.since ? a.order < b.order : a.since < b.since;
}

function push(heap: Event[], event: Event): void {
  let at = heap.push(event) - 1;
  while (at > 0) {
    const parent = (at - 1) >> 1;
    if (!before(event, heap[parent]!)) break;
    heap[at] = heap[parent]!;
    at = parent;
  }
  heap[at] = event;
}

function pop(heap: Event[]): void {
  const last = heap.pop()!;
  if (!heap.length) return;
  let at = 0;
  for (;;) {
    let child = 2 * at + 1;
    if (child >= heap.length) break;
    if (child + 1 < heap.length && before(heap[child + 1]!, heap[child]!)) child++;
    if (!before(heap[child]!, last)) break;
    heap[at] = heap[child]!;
    at = child;
  }
  heap[at] = last;
}

// --- Microtasks ---

/** Runs all microtasks. Only outside of one; both runtimes have a call for it. */
const drain: () => void = await drainer();

async function drainer(): Promise<() => void> {
  if ("Deno" in globalThis) {
    const { internal } = Deno as unknown as { internal: symbol };
    // deno-lint-ignore no-explicit-any -- not of the public interface
    const core = (Deno as any)[internal].core;
    return () => core.runMicrotasks();
  }
  const specifier = "bun:jsc"; // in a variable, so that Deno does not look for it
  return (await import(specifier)).drainMicrotasks;
}

/** Runs something in a task of its own, where microtasks can be drained. */
export function inTask<T>(run: () => T): Promise<T> {
  return new Promise((resolve, reject) => {
    realTimeout(() => {
      try {
        resolve(run());
      } catch (error) {
        reject(error);
      }
    });
  });
}

const realTimeout = setTimeout;
const realMicrotask = queueMicrotask;

// --- The globals of a run ---

/** Replaces what tells or makes time and chance, and returns what puts it back. */
export function install(clock: Clock, dice: Dice): () => void {
  const restores: (() => void)[] = [];
  const replace = (target: object, name: string, value: unknown) => {
    const own = Object.getOwnPropertyDescriptor(target, name);
    Object.defineProperty(target, name, { value, configurable: true, writable: true });
    restores.push(() => {
      if (own) Object.defineProperty(target, name, own);
      else delete (target as Record<string, unknown>)[name];
    });
  };
  for (const [name, value] of Object.entries(timersOf(clock))) replace(globalThis, name, value);
  replace(performance, "now", () => clock.now);
  replace(Date, "now", () => EPOCH + clock.now);
  replace(Math, "random", () => dice.next());
  for (const [name, value] of Object.entries(cryptoOf(dice))) replace(crypto, name, value);
  return () => restores.reverse().forEach((restore) => restore());
}

const EPOCH = Date.UTC(2026, 0, 1);

function timersOf(clock: Clock): Record<string, unknown> {
  type Callback = (...args: unknown[]) => void;
  const delayOf = (delay: unknown) => Math.max(1, Number(delay) || 0);
  const clear = (timer: unknown) => clock.cancel(timer);
  return {
    setTimeout: (run: Callback, delay?: number, ...args: unknown[]) =>
      clock.after(delayOf(delay), () => run(...args)),
    setInterval: (run: Callback, delay?: number, ...args: unknown[]) =>
      clock.at(clock.now + delayOf(delay), () => run(...args), clock.owner, delayOf(delay)),
    setImmediate: (run: Callback, ...args: unknown[]) => clock.after(0, () => run(...args)),
    clearTimeout: clear,
    clearInterval: clear,
    clearImmediate: clear,
    queueMicrotask: (run: Callback) =>
      realMicrotask(() => {
        try {
          run();
        } catch (error) {
          clock.uncaught.push(error);
        }
      }),
    MessageChannel: class {
      readonly port1: { onmessage?: (event: { data: unknown }) => void; close(): void };
      readonly port2: { postMessage(data: unknown): void; close(): void };
      constructor() {
        const port1 = this.port1 = { close: () => {} } as this["port1"];
        const postMessage = (data: unknown) =>
          void clock.after(0, () => port1.onmessage?.({ data }));
        this.port2 = { postMessage, close: () => {} };
      }
    },
  };
}

/** Signatures of the cluster's in the same task, where the real ones take a thread's time. */
function cryptoOf(dice: Dice): Record<string, unknown> {
  const fill = <T extends Uint8Array>(bytes: T): T => {
    for (let at = 0; at < bytes.length; at++) bytes[at] = Math.floor(dice.next() * 256);
    return bytes;
  };
  const hmac = (key: Uint8Array, data: Uint8Array) =>
    new Uint8Array(createHmac("sha256", key).update(data).digest()).buffer;
  const subtle = {
    digest: (_: unknown, data: Uint8Array) =>
      Promise.resolve(new Uint8Array(createHash("sha256").update(data).digest()).buffer),
    importKey: (_: unknown, key: Uint8Array) => Promise.resolve(key),
    sign: (_: unknown, key: Uint8Array, data: Uint8Array) => Promise.resolve(hmac(key, data)),
    verify: (_: unknown, key: Uint8Array, mac: Uint8Array, data: Uint8Array) => {
      const right = new Uint8Array(hmac(key, data));
      return Promise.resolve(right.length === mac.length && right.every((b, i) => b === mac[i]));
    },
  };
  const randomUUID = () => {
    const hex = Array.from(fill(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join(
      "",
    );
    return [8, 13, 18, 23].reduce((text, at) => `${text.slice(0, at)}-${text.slice(at)}`, hex);
  };
  return { getRandomValues: fill, randomUUID, subtle };
}
