/**
 * Sessions that change their instance: the protocol between the two, without the network. A
 * session belongs where its stream is: an instance that gets the resumption of another's session
 * asks for it. `cluster` carries the messages, authenticates and seals them; docs/cluster-protocol.md
 * specifies them; its sentences are quoted here.
 *
 * Everything is synchronous: a session is given away, taken and taken back in one step each, so
 * that at no moment two instances have it, whatever the backplane loses, repeats or delays. Where its
 * topics have to be joined first, it is claimed in one step, and in service in a later one.
 *
 * @module
 */

// --- Limits ---

/** In ms, like all times here: how long publications that the session has had are waited for. */
const CATCH_UP = 1_000;
/** "A state older than 30 s is dropped": by then its giver will not take it back either. */
const MAX_AGE = 30_000;
/** How long an instance knows which sessions it has taken: more than twice as long. */
const MEMORY = 90_000;
const MAX_REMEMBERED = 100_000;
/** Publications that are kept, though nobody needs them any more. */
const MAX_NEEDLESS = 1_000;
/** "A claim follows at most four pointers." */
const MAX_HOPS = 4;

type Bytes = Uint8Array<ArrayBuffer>;

// --- Types ---

/** How many publications of each instance have been delivered, by its id. */
export type Counts = { readonly [instance: string]: number };

/** Where the client of a session stands, as its resumption says. */
export interface Claim {
  readonly attempt: number;
  readonly received: number;
  readonly namespace: string;
  /** The first half of its token. */
  readonly mark?: string;
}

/** What instances tell each other of a session: `from` says it, and `id` is the adoption's. */
export type MoveHead =
  | AdoptHead
  | StateHead
  | Head<"adopted"> & Owed
  | RestHead
  | Head<"have">
  | Head<"taken"> & Owed & { readonly yes: boolean };

interface Head<Kind extends string> {
  readonly kind: Kind;
  readonly id: string;
  readonly session: string;
  readonly from: string;
}

/** The question for a session. */
export interface AdoptHead extends Head<"adopt">, Claim {
  readonly time: number;
}

/** The answer to `adopt`: the session, where it has gone, or that it stays. */
export interface StateHead extends Head<"state"> {
  readonly time: number;
  readonly status: "here" | "moved" | "stays";
  /** With "moved". */
  readonly to?: string;
  /** With "here": the publications that the session has had, or could have. */
  readonly counts?: Counts;
  /** Instances of which nothing has been heard for so long that no more of that is to come. */
  readonly quiet?: readonly string[];
}

/** The giver is to send what has been published to the session since it was packed. */
interface Owed {
  readonly owed?: boolean;
}

/** That, and the publications that the session has had by then. */
export interface RestHead extends Head<"rest"> {
  readonly counts: Counts;
}

/** A publication, and its number among those of its instance. */
export interface Publication<Message> {
  readonly from: string;
  readonly n: number;
  readonly namespace: string;
  readonly message: Message;
}

/** The topics of a session that is to come, as the backplane brings them here. */
export interface Hearing {
  /** Resolves when what is published to them from now on comes here; undefined: there are none. */
  readonly begun: Promise<void> | undefined;
  /** Whoever has subscribed hears them by itself. */
  end(): void;
}

/** A session as it is given away. */
export interface Given {
  readonly state: Bytes;
  /** The first halves of the tokens that its client may have. */
  readonly marks: readonly string[];
}

/** What a move needs of the instance. A session is named by its name on the backplane. */
export interface Mover<Message> {
  /** By the clock of the day, in ms: it goes on while a process is frozen. */
  now(): number;
  send(to: string, head: MoveHead, state?: Bytes): void;
  /** Sessions may come: not to where all are closed. */
  readonly takes: boolean;
  /** Whether the session is here, and no other instance has it. */
  owns(session: string): boolean;
  /** Takes the session out of service and returns it, packed; undefined: it cannot move now. */
  pack(session: string, claim: Claim): Given | undefined;
  /** Puts a packed session back in service. */
  restore(session: string): void;
  /** Forgets a packed session: another instance has it, or it is lost. */
  release(session: string, end: "moved" | "lost"): void;
  /** What has been published to a packed session since. */
  rest(session: string): Bytes;
  /** Begins to hear the topics of a session that comes; undefined: every publication comes here. */
  hear(state: Bytes): Hearing | undefined;
  /** Takes a session into service for who claims it, with the rest that its giver kept, and what it has missed. */
  take(claim: Claim, state: Bytes, missed: Message[], rest?: Bytes): void;
  /** How many publications of each instance have been delivered here, or to a session before it came. */
  counts(): Counts;
  /** A session comes that has had so many: who takes it next must not give it those again. */
  had(counts: Counts): void;
  /** Those of them whose last one was delivered so long ago, in ms; sooner, where they have left. */
  quiet(time: number): string[];
}

/** A session that its owner has sent. */
interface Arrival {
  readonly from: string;
  readonly state: Bytes;
  counts: Counts;
  readonly quiet: readonly string[];
  readonly hearing: Hearing | undefined;
  /** It waits for publications that it has had, for its topics, or, being ours, for its giver's rest. */
  phase: "catching up" | "joining" | "ours";
}

/** A session that this instance has asked for. */
interface Adoption {
  id: string;
  /** Who is asked. */
  owner: string;
  readonly session: string;
  readonly claim: Claim;
  hops: number;
  /** By ticks. */
  age: number;
  /** How many publications have been kept before it was asked for. */
  readonly since: number;
  /** The session, while publications that it has had there are still to come here. */
  arrived: Arrival | undefined;
  readonly end: Deferred;
}

/** A session given away, until its taker says that it has it. No hook runs meanwhile. */
interface Limbo {
  readonly id: string;
  readonly session: string;
  readonly to: string;
  readonly since: number;
  readonly answer: { readonly head: StateHead; readonly state: Bytes };
  /** For which of its client's connections, and the marks that any of them could have had by then. */
  readonly attempt: number;
  readonly marks: readonly string[];
  readonly end: Deferred;
  /** Since it became too old to be taken back, by ticks. */
  overdue: number;
}

// --- Moves ---

/** The sessions that are on their way, to this instance or from it, and where those are that left. */
export class Moves<Message> {
  readonly #instance: string;
  readonly #timeout: number;
  readonly #mover: Mover<Message>;
  /** By session, the oldest first; by the ids by which they are asked for; and those that have come. */
  readonly #adoptions: Map<string, Adoption> = new Map();
  readonly #asked: Map<string, Adoption> = new Map();
  readonly #arrived: Set<Adoption> = new Set();
  /** Who is to ask for the session next, once it is not on its way. */
  readonly #next: Map<string, Claim> = new Map();
  /** Publications since the oldest was asked for, kept once for all, and how many went before them. */
  #published: Publication<Message>[] = [];
  #passed = 0;
  readonly #limbos: Map<string, Limbo> = new Map();
  /** Adoptions by which a session came here, and sessions that went from here to which instance. */
  readonly #taken: Memory<string> = new Memory(MEMORY);
  readonly #moved: Memory<string>;
  /** Adoptions that were refused, by either side: their `adopt` may still be to come, or come again. */
  readonly #over: Memory<true> = new Memory(MAX_AGE);
  #isOver = false;

  /**
   * `timeout` bounds how long a session is waited for; a client that has not heard where its
   * session went may come back within the `resumeTimeout`.
   */
  constructor(instance: string, timeout: number, resumeTimeout: number, mover: Mover<Message>) {
    this.#moved = new Memory(MEMORY + resumeTimeout);
    this.#instance = instance;
    this.#timeout = timeout;
    this.#mover = mover;
  }

  /** Sessions on their way. */
  get size(): number {
    return this.#adoptions.size + this.#limbos.size;
  }

  /** Sessions given away whose taker has not confirmed it yet. */
  get leaving(): number {
    return this.#limbos.size;
  }

  /** Something is kept that a tick will forget. */
  get remembers(): boolean {
    return this.size + this.#taken.size + this.#moved.size + this.#over.size > 0;
  }

  /** Whether the session is in this instance's hands, though not in service. */
  holds(session: string): boolean {
    return this.#limbos.has(session) || !!this.#adoptions.get(session)?.arrived;
  }

  /** The instance that the session went to from here, as far as this one knows. */
  whereabouts(session: string): string | undefined {
    return this.#moved.get(session);
  }

  /** The end of the session's way, if it is on one: then it is here, or is known not to be. */
  moving(session: string): Promise<void> | undefined {
    return (this.#adoptions.get(session) ?? this.#limbos.get(session))?.end.promise;
  }

  // --- The instance that gets a resumption ---

  /** Asks `owner` for the session. Resolves when it is here, or stays where it is. */
  async adopt(session: string, owner: string, claim: Claim): Promise<void> {
    const latest = this.#next.get(session) ?? this.#adoptions.get(session)?.claim;
    if (latest && latest.attempt > claim.attempt) return;
    this.#next.set(session, claim);
    for (let end; (end = this.moving(session));) await end;
    // "The client's latest connection is the next": behind those that it has given up is too late.
    if (this.#next.get(session) !== claim) return;
    this.#next.delete(session);
    if (this.#isOver || owner === this.#instance || this.#mover.owns(session)) return;
    const end = deferred();
    const adoption = {
      id: "",
      owner,
      session,
      claim,
      hops: 0,
      age: 0,
      since: this.#passed + this.#published.length,
      arrived: undefined,
      end,
    };
    this.#adoptions.set(session, adoption);
    this.#ask(adoption, owner);
    await end.promise;
  }

  #ask(adoption: Adoption, owner: string): void {
    adoption.owner = owner;
    const { session, claim } = adoption;
    const id = this.#rename(adoption);
    const time = this.#mover.now();
    const from = this.#instance;
    this.#mover.send(owner, { kind: "adopt", id, from, session, time, ...claim });
  }

  #rename(adoption: Adoption): string {
    this.#asked.delete(adoption.id);
    adoption.id = newId();
    this.#asked.set(adoption.id, adoption);
    return adoption.id;
  }

  /** Whether the session is waited for, and nobody has sent it. */
  asks(session: string): boolean {
    return this.#adoptions.get(session)?.arrived === undefined && this.#adoptions.has(session);
  }

  /** The id by which the session has been asked for, and is waited for. */
  asking(session: string): string | undefined {
    return this.#adoptions.get(session)?.id;
  }

  /** The same by another id: the answer of whom was asked before is not waited for any more. */
  askAnew(session: string): string | undefined {
    const adoption = this.#adoptions.get(session);
    if (!adoption || adoption.arrived) return;
    return this.#rename(adoption);
  }

  /** Whether the session has come by the id by which it was asked for. */
  took(id: string): boolean {
    return this.#taken.get(id) !== undefined;
  }

  /** As which client. */
  claimOf(session: string): Claim | undefined {
    return this.#adoptions.get(session)?.claim;
  }

  /** And the session of such an id. */
  sessionOf(id: string): string | undefined {
    return this.#byId(id)?.session;
  }

  #byId(id: string): Adoption | undefined {
    const adoption = this.#asked.get(id);
    return adoption?.arrived ? undefined : adoption;
  }

  /** Anyone may say that nobody knows the session: then it is not waited for. */
  unknown(id: string): void {
    const adoption = this.#byId(id);
    if (adoption) this.#end(adoption);
  }

  /** Another instance than the one that was asked has the session. */
  redirect(id: string, to: string): void {
    const adoption = this.#byId(id);
    if (!adoption || [this.#instance, adoption.owner].includes(to)) return;
    if (adoption.hops++ < MAX_HOPS) this.#ask(adoption, to);
  }

  /** A publication has been delivered here. */
  published(publication: Publication<Message>): void {
    if (!this.#adoptions.size) return;
    this.#published.push(publication);
    for (const adoption of [...this.#arrived]) {
      const { phase, counts } = adoption.arrived!;
      const isLast = publication.n >= (counts[publication.from] ?? Infinity); // few are
      if (isLast && phase === "catching up" && this.#caughtUp(adoption.arrived!)) {
        this.#take(adoption);
      }
    }
  }

  /** The owner's answer. */
  #onState(head: StateHead, state: Bytes): void {
    const { id, session, from, status, to, counts = {}, quiet = [] } = head;
    if (this.#taken.get(id)) return this.#confirm(from, id, session); // a confirmation was lost
    const adoption = this.#adoptions.get(session);
    // "A state that nobody waits for is dropped": its giver asks, and takes it back.
    if (adoption?.id !== id || adoption.arrived || this.#isOld(head.time)) return;
    // It may have come here, and left again.
    const next = to === this.#instance ? this.#moved.get(session) : to;
    if (status === "moved" && next && adoption.hops++ < MAX_HOPS) return this.#ask(adoption, next);
    if (status !== "here") return this.#end(adoption);
    if (!this.#mover.takes) return this.#refuse(adoption);
    const hearing = this.#mover.hear(state);
    const phase = hearing ? "joining" : "catching up";
    adoption.arrived = { from, state, counts, quiet, hearing, phase };
    adoption.age = 0;
    this.#arrived.add(adoption);
    const claim = (joined: boolean) => this.#claim(adoption, joined);
    if (hearing?.begun) hearing.begun.then(() => claim(true), () => claim(false));
    else if (hearing || this.#caughtUp(adoption.arrived)) this.#take(adoption);
  }

  /** "It joins the session's topics first", then says that it has it, and waits for the giver's rest. */
  #claim(adoption: Adoption, joined: boolean): void {
    const { id, session, arrived } = adoption;
    if (this.#adoptions.get(session) !== adoption) return; // it has been refused meanwhile
    if (!joined || !this.#mover.takes) return this.#refuse(adoption);
    if (!arrived!.from) return this.#take(adoption); // of what was parked nobody keeps any
    arrived!.phase = "ours";
    adoption.age = 0;
    this.#taken.set(id, session, this.#mover.now());
    this.#confirm(arrived!.from, id, session);
  }

  #onRest({ id, session, counts }: RestHead, rest: Bytes): void {
    const adoption = this.#adoptions.get(session);
    if (adoption?.id !== id || adoption.arrived?.phase !== "ours") return;
    adoption.arrived.counts = counts;
    this.#take(adoption, rest);
  }

  /**
   * Every publication that the session has had has come here, too. Of an instance that was never
   * heard here nothing is to come where that `isLate`, or the instance has long been quiet: it spoke
   * before this one began to listen.
   */
  #caughtUp({ counts, quiet }: Pick<Arrival, "counts" | "quiet">, isLate = false): boolean {
    const here = this.#mover.counts();
    const least = (from: string, n: number) => isLate || quiet.includes(from) ? n : 0;
    return Object.entries(counts).every(([from, n]) =>
      from === this.#instance || (here[from] ?? least(from, n)) >= n
    );
  }

  #take(adoption: Adoption, rest?: Bytes): void {
    const { id, session, since, claim, arrived } = adoption;
    const { from, state, counts, phase } = arrived!;
    // "It is given the publications that are beyond the counts."
    const missed = this.#published.slice(since - this.#passed)
      .filter((one) => one.n > (counts[one.from] ?? 0))
      .filter((one) => !one.namespace || one.namespace === claim.namespace);
    this.#moved.delete(session);
    this.#taken.set(id, session, this.#mover.now());
    this.#forget(adoption); // before the hook "revive", which may publish: that counts on
    this.#mover.had(counts);
    this.#mover.take(claim, state, missed.map(({ message }) => message), rest);
    if (phase !== "ours") this.#confirm(from, id, session);
    this.#end(adoption);
  }

  #confirm(to: string, id: string, session: string): void {
    const head = { kind: "adopted", id, session, from: this.#instance } as const;
    this.#mover.send(to, this.#isOwed(id, session) ? { ...head, owed: true } : head);
  }

  /** The session is ours, and what its giver kept for it is to come. */
  #isOwed(id: string, session: string): boolean {
    const adoption = this.#adoptions.get(session);
    return adoption?.id === id && adoption.arrived?.phase === "ours";
  }

  /** Waits no more; if it was not taken, it is refused from now on. */
  #end(adoption: Adoption): void {
    this.#forget(adoption);
    adoption.arrived?.hearing?.end();
    adoption.end.resolve();
  }

  /** "Whoever waits no longer says no by itself": who is deaf would never hear its giver ask. */
  #refuse(adoption: Adoption): void {
    const { id, session, owner, arrived } = adoption;
    this.#end(adoption);
    const head = { kind: "taken", id, session, from: this.#instance, yes: false } as const;
    this.#mover.send(arrived?.from ?? owner, head);
  }

  /** And what was kept for it alone, many at a time. */
  #forget(adoption: Adoption): void {
    this.#adoptions.delete(adoption.session);
    this.#asked.delete(adoption.id);
    this.#arrived.delete(adoption);
    const [oldest] = this.#adoptions.values();
    const { length } = this.#published;
    const needless = oldest ? oldest.since - this.#passed : length;
    if (needless < length && needless < MAX_NEEDLESS) return;
    this.#published = this.#published.slice(needless);
    this.#passed += needless;
  }

  // --- The instance that has the session ---

  #onAdopt(head: AdoptHead): void {
    const { id, from, session, attempt, received, namespace } = head;
    if (this.#isOld(head.time) || this.#over.get(id)) return;
    this.comes(session, head);
    const limbo = this.#limbos.get(session);
    if (limbo?.id === id) return this.#mover.send(from, limbo.answer.head, limbo.answer.state);
    const time = this.#mover.now();
    const answer = { kind: "state", id, session, from: this.#instance, time } as const;
    // "On its way it stays": the request itself is brought here, and waits.
    const moving = this.moving(session);
    const given = !moving && this.#mover.owns(session) &&
      this.#mover.pack(session, { attempt, received, namespace });
    if (given) {
      const counts = this.#mover.counts();
      const quiet = this.#mover.quiet(CATCH_UP);
      return this.#giveAway({ ...answer, status: "here", counts, quiet }, head, given);
    }
    this.#over.set(id, true, time); // who has this answer waits for no other
    const to = !moving && this.#moved.get(session); // nothing where it is here
    this.#mover.send(from, { ...answer, status: to ? "moved" : "stays", ...to && { to } });
  }

  /** "Whoever gives a session away keeps it in limbo until the taker confirms." */
  #giveAway(head: StateHead, { from: to, attempt }: AdoptHead, { state, marks }: Given): void {
    const { id, session, time: since } = head;
    const limbo = { id, session, to, since, attempt, marks, end: deferred(), overdue: 0 };
    this.#limbos.set(session, { ...limbo, answer: { head, state } });
    this.#mover.send(to, head, state);
  }

  /** "A client that comes later, and with another token", was told it by who has taken the session. */
  comes(session: string, { attempt, mark }: Pick<Claim, "attempt" | "mark">): void {
    const limbo = this.#limbos.get(session);
    if (mark === undefined || !limbo || attempt <= limbo.attempt) return;
    if (!limbo.marks.includes(mark)) this.#onTaken({ ...limbo, yes: true });
  }

  /** "It asks whether the taker has it", and only a "no" brings the session back. */
  #inquire({ id, session, to }: Limbo): void {
    this.#mover.send(to, { kind: "have", id, session, from: this.#instance });
  }

  #onHave({ id, session, from }: Head<"have">): void {
    const yes = this.#taken.get(id) !== undefined || this.#mover.owns(session);
    const adoption = this.#adoptions.get(session);
    // It is about to be taken: soon it is known.
    if (!yes && adoption?.id === id && adoption.arrived) return;
    // "A no binds": the state is refused, should it still come.
    if (!yes && adoption?.id === id) this.#end(adoption);
    const owed = this.#isOwed(id, session);
    const head = { kind: "taken", id, session, from: this.#instance, yes } as const;
    this.#mover.send(from, owed ? { ...head, owed } : head);
  }

  #onTaken(
    { id, session, yes, owed }: Pick<Head<"taken">, "id" | "session"> & Owed & { yes: boolean },
  ): void {
    if (!yes) this.#over.set(id, true, this.#mover.now());
    const limbo = this.#limbos.get(session);
    if (limbo?.id !== id) return;
    if (!yes && limbo.overdue) return; // its taker may have forgotten
    this.#limbos.delete(session);
    if (yes) {
      if (owed) this.#giveRest(limbo);
      this.#moved.set(session, limbo.to, this.#mover.now());
      this.#mover.release(session, "moved");
    } else this.#mover.restore(session);
    limbo.end.resolve();
  }

  /** "What was published to the session meanwhile the giver has kept", and it follows the session. */
  #giveRest({ id, session, to }: Limbo): void {
    const counts = this.#mover.counts();
    const head = { kind: "rest", id, session, from: this.#instance, counts } as const;
    this.#mover.send(to, head, this.#mover.rest(session));
  }

  // --- Messages and time ---

  /** Takes a message that is authentic. */
  receive(head: MoveHead, state: Bytes): void {
    switch (head.kind) {
      case "adopt":
        return this.#onAdopt(head);
      case "state":
        return this.#onState(head, state);
      case "adopted":
        return this.#onTaken({ ...head, yes: true });
      case "rest":
        return this.#onRest(head, state);
      case "have":
        return this.#onHave(head);
      case "taken":
        return this.#onTaken(head);
    }
  }

  #isOld(time: number): boolean {
    return Math.abs(this.#mover.now() - time) > MAX_AGE;
  }

  /** Ticks, not clocks: while this process paused, it was not the others who were silent. */
  tick(period: number): void {
    for (const adoption of [...this.#adoptions.values()]) {
      adoption.age += period;
      const { arrived } = adoption;
      const patience = arrived ? Math.min(CATCH_UP, this.#timeout) : this.#timeout;
      if (adoption.age < patience) continue;
      // Where publications do not come here that the session has had, it stays: at most once. What
      // was parked cannot stay.
      const isLate = arrived?.phase === "catching up" && this.#caughtUp(arrived, true);
      if (isLate || arrived?.phase === "ours" || arrived?.from === "") this.#take(adoption);
      else this.#refuse(adoption);
    }
    for (const limbo of [...this.#limbos.values()]) {
      this.#inquire(limbo);
      if (this.#isOld(limbo.since) && (limbo.overdue += period) > this.#timeout) {
        // Nobody takes it any more, and neither do we: the taker may have it. If this process was
        // frozen meanwhile, it has had time to read what it was told.
        this.#limbos.delete(limbo.session);
        this.#mover.release(limbo.session, "lost");
        limbo.end.resolve();
      }
    }
    this.#taken.forget(this.#mover.now());
    this.#moved.forget(this.#mover.now());
    this.#over.forget(this.#mover.now());
  }

  /**
   * Nobody is heard and no tick comes any more: requests that wait for a session go without it, and
   * who has sent it, or is about to, is told that nobody has taken it. What is ours is taken without
   * its rest: nobody else has it, and nobody else would tell its hooks of its end.
   */
  close(): void {
    this.#isOver = true;
    for (const { end } of this.#limbos.values()) end.resolve();
    this.#limbos.clear();
    for (const adoption of [...this.#adoptions.values()]) {
      if (adoption.arrived?.phase === "ours") this.#take(adoption);
      else this.#refuse(adoption);
    }
  }
}

function newId(): string {
  return crypto.randomUUID().replaceAll("-", "");
}

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

/** What is known for a while. */
class Memory<Value> {
  readonly #duration: number;
  readonly #entries: Map<string, { value: Value; since: number }> = new Map();

  constructor(duration: number) {
    this.#duration = duration;
  }

  get size(): number {
    return this.#entries.size;
  }

  get(key: string): Value | undefined {
    return this.#entries.get(key)?.value;
  }

  set(key: string, value: Value, now: number): void {
    this.#entries.delete(key); // the oldest stand first
    if (this.#entries.size >= MAX_REMEMBERED) {
      this.#entries.delete(this.#entries.keys().next().value!);
    }
    this.#entries.set(key, { value, since: now });
  }

  delete(key: string): void {
    this.#entries.delete(key);
  }

  forget(now: number): void {
    for (const [key, { since }] of this.#entries) {
      if (now - since <= this.#duration) break;
      this.#entries.delete(key);
    }
  }
}
