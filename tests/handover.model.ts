/**
 * The handover protocol, walked at random: three instances with the real `Moves`, a backplane that
 * loses, repeats and reorders, instances that freeze and thaw, timeouts at any moment; in each
 * fourth walk one that is killed at any step.
 *
 * Checked at every step: at most one instance has the session; each message up reaches the hook
 * once and in order; each publication reaches the session once and in order. At the end, when
 * nothing is lost any more, the client reaches it wherever it resumes, unless one was killed.
 *
 * @module
 */
import type { MoveHead, Mover, Moves, Publication } from "../handover.ts";

type Make = typeof Moves<number>;

const SESSION = "s";
const NAMES = ["A", "B", "C"] as const;
type Name = typeof NAMES[number];
/** Of messages up, and of publications. */
const MOST = 12;
const STEPS = 400;
const TIMEOUT = 1_000;

/** A rule of the protocol was broken. */
export class Violation extends Error {}

interface State {
  received: number;
  attempt: number;
}

interface Sent {
  to: Name;
  from: Name;
  head: MoveHead;
  state: Uint8Array<ArrayBuffer>;
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

/** One instance: `Moves`, and a server of one session that only counts. */
class Instance implements Mover<number> {
  readonly name: Name;
  readonly moves: Moves<number>;
  readonly #world: World;
  /** The session in service. */
  session: State | undefined;
  /** The session in limbo, and publications that have come meanwhile. */
  #limbo: { state: State; missed: number[] } | undefined;
  frozen = false;
  killed = false;
  /** Publications read from the channel. */
  read = 0;

  constructor(name: Name, world: World, make: Make) {
    this.name = name;
    this.#world = world;
    this.moves = new make(name, TIMEOUT, 30_000, this);
  }

  now(): number {
    return this.#world.now;
  }

  /** It does nothing more, and what it had is lost. */
  kill(): void {
    this.killed = this.frozen = true;
    this.session = this.#limbo = undefined;
  }

  send(to: string, head: MoveHead, state: Uint8Array<ArrayBuffer> = new Uint8Array()): void {
    this.#world.bus.push({ to: to as Name, from: this.name, head, state });
  }

  owns(): boolean {
    return !!this.session;
  }

  pack(_session: string, { attempt }: { attempt: number }): Uint8Array<ArrayBuffer> | undefined {
    if (!this.session || attempt < this.session.attempt) return;
    this.#limbo = { state: this.session, missed: [] };
    this.session = undefined;
    return new TextEncoder().encode(JSON.stringify({ ...this.#limbo.state, attempt }));
  }

  restore(): void {
    if (!this.#limbo) throw new Violation(`${this.name} has nothing to take back`);
    this.session = this.#limbo.state;
    this.#world.got.push(...this.#limbo.missed);
    this.#limbo = undefined;
  }

  release(): void {
    this.#limbo = undefined;
  }

  take(_session: string, state: Uint8Array, missed: number[]): void {
    this.session = JSON.parse(new TextDecoder().decode(state));
    this.#world.got.push(...missed);
    this.#world.tell(this.name);
  }

  counts(): { channel: number } {
    return { channel: this.read };
  }

  quiet(): string[] {
    return [];
  }

  /** The next publication of the channel comes here. */
  hear(): void {
    if (this.read >= this.#world.published) return;
    const n = ++this.read;
    this.#limbo?.missed.push(n);
    if (this.session) this.#world.got.push(n);
    this.moves.published({ from: "channel", n, namespace: "", message: n } as Publication<number>);
  }

  /** The client's resumption comes here. */
  resume(attempt: number): void {
    if (this.session) {
      this.session.attempt = Math.max(attempt, this.session.attempt);
      return this.#world.tell(this.name);
    }
    const owner = this.moves.whereabouts(SESSION) ?? this.#world.hint;
    this.moves.adopt(SESSION, owner, { attempt, received: 0, namespace: "" });
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
  /** The instance that the client's token names. */
  hint: Name = "A";
  readonly bus: Sent[] = [];
  /** Messages as the hook saw them, publications as the session was given them. */
  readonly hook: number[] = [];
  readonly got: number[] = [];
  readonly instances: Instance[];
  /** The step at which an instance is killed. */
  readonly #fatal: number;
  #steps = 0;
  readonly #random: () => number;

  constructor(seed: number, make: Make) {
    this.#fatal = seed % 4 ? Infinity : Math.floor(seed / 4 % STEPS);
    this.#random = numbers(seed);
    this.instances = NAMES.map((name) => new Instance(name, this, make));
    this.instances[0]!.session = { received: 0, attempt: 0 };
  }

  get #instance(): Instance {
    return this.instances[Math.floor(this.#random() * this.instances.length)]!;
  }

  #of(name: Name): Instance {
    return this.instances[NAMES.indexOf(name)]!;
  }

  /** The answer tells the client where its session is, unless it gets lost. */
  tell(name: Name): void {
    if (!this.lossy || this.#random() > 0.3) this.hint = name;
  }

  step(): void {
    const instance = this.#instance;
    if (this.#steps++ === this.#fatal) instance.kill();
    switch (Math.floor(this.#random() * 7)) {
      case 0:
        return this.#deliver();
      case 1:
        return instance.frozen ? undefined : instance.hear();
      case 2:
        if (this.published < MOST) this.published++;
        return;
      case 3:
        return instance.frozen ? undefined : instance.resume(++this.attempt);
      case 4:
        return this.#uplink(instance);
      case 5:
        return this.#tick(instance);
      default:
        instance.frozen = this.#random() < 0.3 || instance.killed;
    }
  }

  /** Any message of the backplane comes, or is lost, or comes and stays. */
  #deliver(): void {
    if (!this.bus.length) return;
    const at = Math.floor(this.#random() * this.bus.length);
    const { to, from, head, state } = this.bus[at]!;
    const instance = this.#of(to);
    if (instance.frozen) return;
    const lost = this.lossy && this.#random() < 0.1;
    if (lost || !this.lossy || this.#random() > 0.1) this.bus.splice(at, 1);
    if (lost) return;
    // One channel carries all in one order: publications that the asker had come before its question.
    if (head.kind === "adopt") this.#hearAll(instance, this.#of(from).read);
    instance.moves.receive(structuredClone(head), state);
  }

  #hearAll(instance: Instance, upTo: number): void {
    while (instance.read < upTo) instance.hear();
  }

  #uplink(instance: Instance): void {
    if (this.acknowledged >= MOST || instance.frozen) return;
    const to = instance.session
      ? instance
      : this.#of((instance.moves.whereabouts(SESSION) ?? this.hint) as Name);
    if (!to.frozen) to.uplink(this.acknowledged + 1);
  }

  #tick(instance: Instance): void {
    this.now += Math.floor(this.#random() * 200);
    if (!instance.frozen) instance.moves.tick(Math.floor(this.#random() * TIMEOUT));
  }

  check(): void {
    const owners = this.instances.filter((one) => one.session).map((one) => one.name);
    if (owners.length > 1) throw new Violation(`two instances have it: ${owners}`);
    if (this.hook.some((n, at) => n !== at + 1)) throw new Violation(`the hook saw ${this.hook}`);
    if (this.got.some((n, at) => n !== at + 1)) throw new Violation(`publications: ${this.got}`);
  }

  /** Nothing is lost or frozen any more: wherever the client resumes, the session comes there. */
  async settle(): Promise<void> {
    this.lossy = false;
    const alive = this.instances.filter((one) => !one.killed);
    for (const instance of alive) instance.frozen = false;
    const isLost = alive.length < this.instances.length; // with the one that had it, maybe
    for (const instance of alive) {
      const [turns, period] = isLost ? [10, 5_000] : [100, 500];
      for (let turn = 0; turn < turns && !instance.session; turn++) {
        await this.#turn(instance, period);
      }
      if (!instance.session && !isLost) {
        throw new Violation(`the client does not reach it by ${instance.name}`);
      }
    }
  }

  async #turn(instance: Instance, period: number): Promise<void> {
    instance.resume(++this.attempt);
    for (let n = 0; this.bus.length && n < 200; n++) {
      await undefined;
      this.#deliver();
      this.check();
    }
    this.now += period;
    for (const one of this.instances.filter(({ killed }) => !killed)) {
      this.#hearAll(one, this.published);
      one.moves.tick(period);
    }
    await undefined;
    this.check();
  }
}

/** Walks once; throws a {@link Violation}. */
export async function walk(seed: number, make: Make): Promise<void> {
  const world = new World(seed, make);
  for (let i = 0; i < STEPS; i++) {
    world.step();
    world.check();
    if (i % 4 === 0) await undefined; // those who wait go on
  }
  await world.settle();
}

/** How many of so many walks break a rule, and how the first does. */
export async function walks(
  count: number,
  make: Make,
  enough = Infinity,
): Promise<{ broken: number; first?: string }> {
  let broken = 0;
  let first: string | undefined;
  for (let seed = 1; seed <= count && broken < enough; seed++) {
    try {
      await walk(seed, make);
    } catch (error) {
      if (!(error instanceof Violation)) throw error;
      broken++;
      first ??= `seed ${seed}: ${error.message}`;
    }
  }
  return { broken, ...first !== undefined && { first } };
}
