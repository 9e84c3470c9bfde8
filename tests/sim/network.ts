/**
 * The network between `fetch` of the client and `fetch` of the servers, with whatever stands in
 * it. It knows requests and bytes, and nothing of the protocol.
 *
 * @module
 */
import type { Clock, Owner } from "./clock.ts";
import { type Dice, diceFor } from "./dice.ts";
import { type Fate, fateOf, type Fault, hits } from "./faults.ts";
import { type Bytes, Pipe } from "./pipe.ts";

/** How the network is while nothing is wrong. */
export interface Traits {
  /** The least and the most that a piece takes one way, in ms. */
  latency: [number, number];
  /** Bytes that fit between the two ends, in each direction of a request. */
  capacity: number;
  /** Bytes in a second. */
  rate: number;
  /** Bodies are byte streams, as on Deno, and not as on Bun. */
  byob: boolean;
  /** A fetch answers while its body is still being sent: runtimes do, browsers do not. */
  fullDuplex: boolean;
  /** What becomes of bodies that stream up: some proxies hold them, HTTP/1.1 in pages has none. */
  streamsUp: "pass" | "are held" | "fail";
  /** How many bytes of an answer are held until there are more: by a proxy that buffers. */
  holdsAnswers?: number | undefined;
  /** Nobody gets to know that there is more than crossws's wire. */
  plain: boolean;
  /** A request goes to any instance, or all of a client's to the same. */
  balance: "random" | "sticky";
}

/** Names the session in a server's answer. */
export const NAME_HEADER = "x-crossws-id";

/** A server as the network sees it. */
export interface Instance {
  readonly owner: Owner;
  fetch(request: Request): Promise<Response>;
  /** Undefined while it is up. */
  down?: boolean;
}

export interface NetworkOptions {
  seed: number;
  traits: Traits;
  faults: readonly Fault[];
  instances: readonly Instance[];
  note(text: string): void;
  /** Something that must never be. */
  violated(check: string, detail: string): void;
}

export class Network {
  readonly clock: Clock;
  readonly traits: Traits;
  readonly note: NetworkOptions["note"];
  readonly violated: NetworkOptions["violated"];
  readonly instances: readonly Instance[];
  readonly trips: Set<Trip> = new Set();
  /** Requests made, and faults that hit, by name. */
  readonly counts = { requests: 0, hits: new Map<string, number>() };
  /** Bytes of the largest body that has its length. */
  largestBody = 0;
  /** When something that is held came through for the last time: what follows may be held. */
  lastRelease = 0;
  /** The most requests that a client had under way. */
  readonly most: Map<number, number> = new Map();
  /** What the answers that each client was given name its session, the latest first. */
  readonly names: Map<number, string[]> = new Map();
  readonly #seed: number;
  readonly #faults: readonly Fault[];
  readonly #start: number;
  /** Of each client. */
  readonly #numbers: Map<number, number> = new Map();

  constructor(clock: Clock, options: NetworkOptions) {
    this.clock = clock;
    this.traits = options.traits;
    this.note = options.note;
    this.violated = options.violated;
    this.instances = options.instances;
    this.#seed = options.seed;
    this.#faults = options.faults;
    this.#start = clock.now;
    for (const fault of options.faults) this.#schedule(fault);
  }

  /** The `fetch` of a client. */
  fetchOf(client: number): (input: string, init?: RequestInit) => Promise<Response> {
    return (input, init = {}) => {
      const number = (this.#numbers.get(client) ?? 0) + 1;
      this.#numbers.set(client, number);
      const name = 1000 * client + number;
      const method = init.method ?? "GET";
      const fate = fateOf(this.#faults, this.clock.now - this.#start, method, name);
      for (const hit of fate.hit) this.count(hit);
      const trip = new Trip(this, { client, number, input, init, fate, seed: this.#seed });
      this.counts.requests++;
      const { body } = init;
      if (body instanceof Uint8Array) this.largestBody = Math.max(this.largestBody, body.length);
      this.trips.add(trip);
      this.most.set(client, Math.max(this.most.get(client) ?? 0, this.#openOf(client)));
      return trip.begin();
    };
  }

  /** How many requests of a client are under way, as it sees it. */
  #openOf(client: number): number {
    let open = 0;
    for (const trip of this.trips) if (trip.client === client && !trip.clientDone) open++;
    return open;
  }

  /** Whether this client reads the answer of a request that it made after this one. */
  hasNewer({ client, number }: Trip): boolean {
    for (const trip of this.trips) {
      if (trip.client === client && trip.number > number && trip.reads) return true;
    }
    return false;
  }

  /** Whether any fault hit a request of this client. */
  wasHit(client: number): boolean {
    for (const trip of this.trips) if (trip.client === client && trip.hit.size) return true;
    return false;
  }

  count(hit: string): void {
    this.counts.hits.set(hit, (this.counts.hits.get(hit) ?? 0) + 1);
  }

  /** What hits requests that are under way, or processes. */
  #schedule(fault: Fault): void {
    const { clock } = this;
    const at = this.#start + fault.at;
    const forHit = (action: (trip: Trip) => void) => () => {
      for (const trip of [...this.trips]) {
        if (trip.over || !hits(fault, trip.method, 1000 * trip.client + trip.number)) continue;
        this.count(fault.kind);
        trip.hit.add(fault.kind);
        action(trip);
      }
    };
    if (fault.kind === "cut") clock.at(at, forHit((trip) => trip.cut(fault)), "network");
    if (fault.kind === "half-open") clock.at(at, forHit((trip) => trip.die()), "network");
    if (fault.kind === "pause") {
      clock.at(at, forHit((trip) => trip.pause(at + fault.lasts)), "network");
    }
    if (fault.kind !== "freeze") return;
    clock.at(at, () => {
      this.count(fault.kind);
      this.note(`${fault.whose} stands still for ${fault.lasts} ms`);
      clock.freeze(fault.whose, at + fault.lasts);
    }, "network");
  }

  /** The connections of an instance that is killed. */
  hangUp(owner: Owner): void {
    for (const trip of [...this.trips]) trip.hangUp(owner);
  }
}

function isStream({ status, headers }: Response): boolean {
  return status === 200 && !!headers.get("content-type")?.startsWith("text/event-stream");
}

interface TripOptions {
  client: number;
  number: number;
  input: string;
  init: RequestInit;
  fate: Fate;
  seed: number;
}

/** How the server's side of a request goes on: with its answer, or without. */
interface Side {
  readonly owner: Owner;
  /** The server has been given the request. */
  given: boolean;
  readonly up: Pipe;
  readonly down: Pipe;
}

/** One request, from the client's call until both ends are done with it. */
export class Trip {
  readonly client: number;
  readonly number: number;
  readonly method: string;
  readonly hit: Set<string>;
  /** The client waits for nothing of this any more. */
  clientDone = false;
  readonly #network: Network;
  readonly #clock: Clock;
  readonly #dice: Dice;
  readonly #fate: Fate;
  readonly #input: string;
  readonly #init: RequestInit;
  readonly #owner: Owner;
  readonly #sides: Side[] = [];
  readonly #abort = () => this.#abandon(this.#init.signal!.reason);
  #resolve!: (response: Response) => void;
  #reject!: (error: unknown) => void;
  /** What the client reads, and what it sends as a stream. */
  #side: Side | undefined;
  #streams = false;
  #dead = false;
  #lag = 0;
  #requestSent = false;
  #onRequestSent: (() => void) | undefined;

  constructor(network: Network, { client, number, input, init, fate, seed }: TripOptions) {
    this.#network = network;
    this.#clock = network.clock;
    this.#dice = diceFor(seed, 7, client, number);
    this.#fate = fate;
    this.#input = input;
    this.#init = init;
    this.#owner = `client ${client}`;
    this.client = client;
    this.number = number;
    this.method = init.method ?? "GET";
    this.hit = new Set(fate.hit);
  }

  /**
   * Both ends are done with it. A body of which nothing comes any more may still be read: its
   * server ends quiet connections by itself, where the answer has gone.
   */
  get over(): boolean {
    return this.clientDone &&
      this.#sides.every(({ given, up, down }) =>
        !given || down.sourceDone && (up.sinkDone || !up.awaited || this.#dead)
      );
  }

  /** The client has an event stream of this. */
  get reads(): boolean {
    return !this.clientDone && !!this.#side && this.#streams;
  }

  /** The most bytes that were on their way down at once. */
  get mostDown(): number {
    return Math.max(0, ...this.#sides.map(({ down }) => down.most));
  }

  toString(): string {
    return `${this.#owner}'s request ${this.number} (${this.method})`;
  }

  begin(): Promise<Response> {
    const { signal } = this.#init;
    const promise = new Promise<Response>((resolve, reject) => {
      this.#resolve = resolve;
      this.#reject = reject;
    });
    const { hit } = this.#fate;
    this.#note(`sends ${this.#size()}${hit.length ? `; meets: ${hit.join(", ")}` : ""}`);
    if (signal?.aborted) {
      this.#done();
      this.#reject(signal.reason);
      return promise;
    }
    signal?.addEventListener("abort", this.#abort);
    this.#set(() => this.#go());
    return promise;
  }

  // --- What the network does to it ---

  /** Cuts it, once so many bytes more have come through. */
  cut(
    { direction, bytes, clean }: { direction: "up" | "down"; bytes: number; clean: boolean },
  ): void {
    // A server knows the length of a body that has one, and so whether it was cut.
    clean &&= !this.#network.traits.plain;
    const cut = () => {
      this.#note(`is cut${clean ? ", which looks like the end" : ""}`);
      this.#fail(clean);
      this.#leaveServer(clean);
    };
    const side = this.#sides[0];
    if (!side || !bytes) cut();
    else side[direction].cutAfter(bytes, cut);
  }

  /** Nothing passes any more, and nobody is told. */
  die(): void {
    // On crossws's wire nobody would notice before the kernels do.
    if (this.#network.traits.plain) return this.cut({ direction: "down", bytes: 0, clean: false });
    this.#note("dies without a sign");
    this.#dead = true;
    for (const { up, down } of this.#sides) {
      up.die();
      down.die();
    }
  }

  /** Long after it died. */
  giveUp(): void {
    for (const { down } of this.#sides) down.giveUp();
  }

  pause(until: number): void {
    this.#note(`stands until ${until}`);
    for (const { up, down } of this.#sides) {
      up.pause(until);
      down.pause(until);
    }
  }

  /** The server's process is gone, and its kernel says so. */
  hangUp(owner: Owner): void {
    const sides = this.#sides.filter((side) => side.owner === owner);
    for (const { up, down } of sides) up.sinkDone = down.sourceDone = true;
    if (sides.length && (!this.#side || sides.includes(this.#side))) this.#fail(false);
  }

  // --- On its way ---

  #go(): void {
    if (this.clientDone) return;
    const { traits } = this.#network;
    const { silent, foreign } = this.#fate;
    // There nothing tells a stranger's success from the server's, or silence from a slow server.
    const refused = this.#fate.refused || traits.plain && (silent || foreign! < 300);
    const streams = this.#init.body instanceof ReadableStream;
    if (refused || streams && traits.streamsUp === "fail") return this.#fail(false);
    if (silent || this.#dead) return; // until the client gives up
    if (foreign !== undefined) return this.#set(() => this.#answerForeign(foreign));
    const instance = this.#choose();
    if (instance.down) return this.#set(() => this.#answerForeign(502));
    this.#serve(instance, this.#sides.length === 0);
    if (this.#repeats) {
      this.#clock.after(
        this.#fate.repeat!.after,
        () => this.#serve(this.#choose(), false),
        "network",
      );
    }
  }

  /** A stream cannot be sent again; and crossws's wire has no numbers that would tell. */
  get #repeats(): boolean {
    const { body } = this.#init;
    return !!this.#fate.repeat && !(body instanceof ReadableStream) &&
      !(this.#network.traits.plain && body);
  }

  #choose(): Instance {
    const { instances, traits } = this.#network;
    const up = instances.filter((instance) => !instance.down);
    if (!up.length) return instances[0]!;
    return traits.balance === "sticky" ? up[this.client % up.length]! : this.#dice.pick(up);
  }

  /** Gives the request to a server. */
  #serve(instance: Instance, first: boolean): void {
    const { traits } = this.#network;
    const { body } = this.#init;
    const held = this.#fate.holdsRequest || traits.streamsUp === "are held";
    if (this.#dead) return;
    const side = this.#connect(instance.owner);
    this.#sides.push(side);
    const give = () => side.given || this.#hand(instance, side, first);
    side.up.feed(body instanceof ReadableStream ? body : body as Bytes | null ?? null);
    if (!held || !(body instanceof ReadableStream)) return this.#set(give, instance.owner);
    this.#onRequestSent = give;
    if (this.#requestSent) give();
  }

  #connect(owner: Owner): Side {
    const { traits } = this.#network;
    const options = {
      latency: () => this.#latency(),
      capacity: traits.capacity,
      rate: traits.rate,
      byob: traits.byob,
      dice: this.#dice,
    };
    const held = this.#fate.holdsRequest || traits.streamsUp === "are held";
    const side: Side = {
      owner,
      given: false,
      up: new Pipe(this.#clock, {
        ...options,
        from: this.#owner,
        to: owner,
        hold: held ? Infinity : undefined,
        onCancel: () => {},
        onEnd: () => {},
        onSent: () => this.#sent(),
      }),
      down: new Pipe(this.#clock, {
        ...options,
        from: owner,
        to: this.#owner,
        // On crossws's wire nothing tells a stream that is held from one that is quiet.
        hold: traits.plain ? undefined : this.#fate.holdsAnswer ?? traits.holdsAnswers,
        // The answer that nobody is given ends nothing.
        onCancel: () => void (side === this.#side && this.#cancel()),
        onEnd: () => void (side === this.#side && this.#end()),
        onRelease: () => this.#network.lastRelease = this.#clock.now,
      }),
    };
    return side;
  }

  /** The last byte of the request has gone. */
  #sent(): void {
    this.#requestSent = true;
    this.#set(() => {
      this.#onRequestSent?.();
      this.#onRequestSent = undefined;
    }, "network");
  }

  #hand(instance: Instance, side: Side, first: boolean): void {
    if (this.clientDone && first) return; // the client has gone before the request came
    side.given = true;
    const overtaken = !first && this.method === "GET" && this.#network.hasNewer(this);
    instance.fetch(this.#request(side)).then((response) => {
      if (overtaken && isStream(response)) {
        this.#network.violated("takeover", `${this}, repeated, takes the stream of a newer one`);
      }
      this.#clock.at(this.#clock.now, () => this.#answer(side, response), side.owner);
    });
  }

  #request(side: Side): Request {
    const { headers: given, body } = this.#init;
    const headers = new Headers(given);
    if (this.#network.traits.plain) headers.delete("x-duplex-version");
    const bytes = body instanceof Uint8Array ? body.length : undefined;
    if (bytes !== undefined) headers.set("content-length", `${bytes}`);
    return new Request(this.#input, {
      method: this.method,
      headers,
      ...bytes !== 0 && body && { body: side.up.stream, duplex: "half" },
    } as RequestInit);
  }

  /** A server's answer sets out for the client. */
  #answer(side: Side, response: Response): void {
    const { repeat, loseAnswer } = this.#fate;
    const nth = this.#sides.indexOf(side);
    const wanted = !this.#repeats || nth === (repeat!.answer === "first" ? 0 : 1);
    if (!wanted || this.clientDone) return this.#discard(side, response, repeat?.reads ?? 0);
    side.down.feed(response.body as ReadableStream<Uint8Array> | null);
    if (this.#dead) return;
    if (this.#fate.stalls && !this.#network.traits.plain) side.down.die(); // before anything comes
    if (loseAnswer) return this.#lose(loseAnswer);
    const { fullDuplex } = this.#network.traits;
    const give = () => this.#set(() => this.#give(side, response));
    const streams = this.#init.body instanceof ReadableStream;
    if (fullDuplex || !streams || this.#requestSent) give();
    else this.#onRequestSent = give;
  }

  #lose(how: "failure" | "silence"): void {
    this.#note(`loses its answer, in ${how}`);
    if (how === "silence") this.die();
    else {
      this.#set(() => this.#fail(false));
      this.#leaveServer(false);
    }
  }

  #give(side: Side, response: Response): void {
    if (this.clientDone || this.#dead) return;
    const { status, headers } = response;
    this.#note(`is answered: ${status}`);
    const name = headers.get(NAME_HEADER);
    const { names } = this.#network;
    if (name) names.set(this.client, [name, ...names.get(this.client) ?? []]);
    this.#side = side;
    this.#streams = isStream(response);
    const hasBody = ![204, 304].includes(status);
    this.#resolve(new Response(hasBody ? side.down.stream : null, { status, headers }));
    if (hasBody) return;
    side.down.sinkDone = true;
    this.#end();
  }

  /** Somebody else's answer, whose body has nothing of ours. */
  #answerForeign(status: number): void {
    if (this.clientDone || this.#dead) return;
    this.#note(`is answered by a stranger: ${status || "a redirection"}`);
    const body = [204, 0].includes(status) ? null : "<!doctype html><title>Welcome</title>";
    const headers = { "content-type": "text/html" };
    this.#resolve(status ? new Response(body, { status, headers }) : Response.error());
    this.#end();
  }

  /** Reads an answer that nobody is given, for a while. */
  #discard(side: Side, response: Response, reads: number): void {
    side.down.feed(response.body as ReadableStream<Uint8Array> | null);
    const reader = side.down.stream.getReader() as { read(): Promise<{ done: boolean }> };
    const read = (): Promise<unknown> => reader.read().then(({ done }) => done || read(), () => {});
    read();
    this.#clock.after(reads, () => {
      side.down.drop();
      side.down.sinkDone = true;
      side.up.break(undefined);
    }, side.owner);
  }

  // --- Ends ---

  /** The client gives up. */
  #abandon(reason: unknown): void {
    if (this.clientDone) return;
    this.#note("is given up");
    this.#done();
    this.#reject(reason);
    this.#side?.down.break(reason);
    this.#dropRequest(reason);
    if (!this.#dead) this.#leaveServer(this.#dice.chance(0.5));
  }

  /** The client lets go of the answer's body. */
  #cancel(): void {
    if (this.clientDone) return;
    this.#done();
    this.#dropRequest(new TypeError("Cancelled"));
    if (!this.#dead) this.#leaveServer(this.#dice.chance(0.5));
  }

  /** The connection broke, which the client sees by a failure or by what looks like the end. */
  #fail(clean: boolean): void {
    if (this.clientDone) return;
    const error = new TypeError("The network failed");
    this.#clock.after(0, () => {
      if (this.clientDone) return;
      this.#done();
      this.#reject(error);
      this.#side?.down.break(clean ? undefined : error);
      this.#dropRequest(error);
    }, this.#owner);
  }

  /** The answer has come as a whole. What is left of the request has nowhere to go. */
  #end(): void {
    if (this.clientDone) return;
    this.#done();
    this.#dropRequest(new TypeError("The answer is complete"));
    if (this.#side && !this.#dead) {
      this.#set(() => this.#side!.up.break(undefined), this.#side.owner);
    }
  }

  #done(): void {
    this.clientDone = true;
    this.#init.signal?.removeEventListener("abort", this.#abort);
  }

  #dropRequest(reason: unknown): void {
    const { body } = this.#init;
    for (const { up } of this.#sides) up.drop(reason);
    if (body instanceof ReadableStream && !body.locked) body.cancel(reason).catch(() => {});
  }

  /** The server gets to know that its client has gone. */
  #leaveServer(clean: boolean): void {
    for (const { up, down, owner } of this.#sides) {
      this.#set(() => {
        up.break(clean ? undefined : new TypeError("The connection was reset"));
        down.drop();
      }, owner);
    }
  }

  // --- Small things ---

  #latency(): number {
    const [least, most] = this.#network.traits.latency;
    return this.#fate.slower + this.#dice.between(least, most);
  }

  /** Does something after the time that it takes to get there, and after what was sent before. */
  #set(action: () => void, owner: Owner = this.#owner): void {
    this.#lag = Math.max(this.#lag, this.#clock.now + this.#latency());
    this.#clock.at(this.#lag, action, owner);
  }

  #size(): string {
    const { body } = this.#init;
    if (body instanceof ReadableStream) return "a stream";
    return body instanceof Uint8Array ? `${body.length} bytes` : "no body";
  }

  #note(text: string): void {
    this.#network.note(`${this} ${text}`);
  }
}
