/**
 * More than one machine: any instance may answer for any session.
 *
 * Wraps a driver of `crossws/sync` (Redis, PostgreSQL, BroadcastChannel, …), so that
 * instances behind a load balancer share publications and need no sticky sessions: a
 * request that comes to the wrong instance is taken to its session's owner over the
 * driver, and the answer back. docs/cluster-protocol.md specifies what travels.
 *
 * @example
 * ```ts ignore
 * import { sseAdapter } from "jsr:@duplex/sse/server";
 * import { cluster } from "jsr:@duplex/sse/cluster";
 * import { redis } from "npm:crossws/sync";
 * import { Redis } from "npm:ioredis";
 *
 * const ws = sseAdapter({
 *   bidir: true,
 *   sync: cluster(redis({ client: new Redis(), channel: "chat" })),
 *   hooks: { message: (peer, message) => peer.publish("chat", message.text()) },
 * });
 * ```
 *
 * @module
 */
import {
  type Claim,
  type Counts,
  type Given,
  type Hearing,
  type MoveHead,
  type Mover,
  Moves,
} from "./handover.ts";
import type { Parking, ParkingAdapter } from "./parking.ts";
import type {
  ClusterStats,
  ErrorContext,
  MaybePromise,
  Packed,
  RoutingDriver,
  RoutingHost,
  SyncAdapter,
  SyncDriver,
  SyncMessage,
  SyncPlace,
} from "./server.ts";

export type { MaybePromise, SyncAdapter, SyncDriver, SyncMessage, SyncPlace } from "./server.ts";

// --- What travels: docs/cluster-protocol.md ---

const VERSION = 1;
/** No peer can be in a namespace that begins so. */
const RESERVED = "\0";
const NAMESPACE = "\0duplex";
/** Addressed to every instance; and what may be. */
const ALL = "*";
const TO_ALL: Set<string> = new Set(["publication", "present", "bye", "hello", "where"]);
/** Asked as if it were an instance: the parking store. */
const STORE = "";

/** A fragment begins with the version, the id of its message, its index and how many there are. */
const ID_SIZE = 16;
const FRAGMENT_HEADER = 1 + ID_SIZE + 4 + 4;
/** A message begins with its authentication code and the length of its head. */
const MAC_SIZE = 32;
/** What a sealed session begins with. */
const IV_SIZE = 12;
const MESSAGE_HEADER = MAC_SIZE + 4;
/** Of 16 MiB of brackets a parser makes seconds and a gigabyte, before anything is verified. */
const MAX_HEAD = 64 * 1024;

const UPLINK_TYPE = "application/websocket-events";
const STREAM_TYPE = "text/event-stream";
const TOKEN_HEADER = "x-crossws-id";
/** Credentials are for the `upgrade` hook, and stay where they came in. */
const ROUTED_HEADERS = [
  "accept",
  "content-type",
  "last-event-id",
  "x-duplex-version",
  "x-duplex-attempt",
  "x-duplex-poll",
];

// --- Limits ---

/** Redis takes much more; a batch of 512 KiB fits in one. */
const DEFAULT_MAX_PAYLOAD = 1024 * 1024;
const DEFAULT_TIMEOUT = 5_000;
/** How long each step of a shutdown takes that is aborted. */
const HURRY = 500;
/** Room for what a driver writes around a message, beside what crossws's write. */
const ENVELOPE_SLACK = 64;
/** What a client puts in one batch, besides one message of any size. */
const MAX_BATCH = 512 * 1024;
/** A body without a length is whole after this, or it is a stream. */
const LENGTHLESS_PATIENCE = 250;
/** One with a length has so long, in ms, and as long as it takes at so many bytes a ms: what clients wait. */
const BODY_PATIENCE = 15_000;
const BODY_RATE = 8;
/** Of a body that nobody wants any more, so much is read, for what comes next on its connection. */
const MAX_DROPPED = 32 * 1024 * 1024;
/** Or what `maxMessageSize` asks for. Four of them may be incomplete. */
const MAX_MESSAGE = 16 * 1024 * 1024;
/** What a fragment that waits for the others takes besides its bytes, about. */
const PIECE_COST = 512;
const MAX_PENDING = 1024;
const MAX_PENDING_BYTES = 32 * 1024 * 1024;
const MAX_RELAYS = 100_000;
/** Pieces of a stream that may be under way. */
const CREDIT = 8;
const PIECE = 256 * 1024;
/** How far clocks may differ, and how long a request can be told from its repetition. */
const REPLAY_WINDOW = 30_000;
const MAX_SEEN = 100_000;
/** What the owner says has this long to contradict what anybody could say. */
const DOUBT = 1_000;
const REPORT_PERIOD = 1_000;
const DEAF = "Nothing is heard from the backplane, though it takes what is published";
/** Until a subscription that failed is tried again, twice as long each time. */
const RETRY_PERIOD = 500;
const MAX_RETRY_PERIOD = 30_000;
const PRUNE_PERIOD = 60_000;
/** How often an instance that has sessions says so, and after which silence it is gone. */
const PRESENCE_PERIOD = 5_000;
const GONE = 12_000;
const MAX_INSTANCES = 10_000;
/** Of so many the publications are counted: all counts go along with each session that moves. */
const MAX_COUNTED = 1_000;
/**
 * How long an instance has to answer for a session that may have left it, before all are asked, in
 * ms; or so many times what answers take.
 */
const WHERE_AFTER = 300;
const MANY_TIMES = 3;
/** How often a request may be sent on, by instances that know where its session has gone. */
const MAX_REDIRECTIONS = 4;

const encoder: TextEncoder = new TextEncoder();
const decoder: TextDecoder = new TextDecoder("utf-8", { ignoreBOM: true });
const EMPTY: Bytes = new Uint8Array();

// --- Types ---

type Bytes = Uint8Array<ArrayBuffer>;
type Stage = ErrorContext["stage"];
type Report = (context: ErrorContext, error: unknown) => void;

/**
 * crossws's driver, that may be able to address one instance: by `send`, or by `join`, since what is
 * meant for one is published to a topic that it alone has joined.
 */
export interface ClusterDriver extends SyncDriver {
  /** The most that it carries at once, in bytes, where `maxPayload` is not given. */
  readonly maxPayload?: number | undefined;
  /**
   * How many messages it has heard, those too that it has published itself: where this stands still
   * the instance is deaf, and takes nobody for gone. Undefined: it does not tell.
   */
  readonly heard?: number | undefined;
  /**
   * Relays to the one instance whose driver was made with this id. Without it,
   * every instance gets, and drops, what is meant for one.
   */
  send?(id: string, message: SyncMessage): MaybePromise<void>;
}

/** Makes a {@link ClusterDriver} for the instance with this id: any driver of `crossws/sync` will do. */
export type ClusterAdapter = (context: { id: string }) => ClusterDriver;

/** Options of {@link cluster}. */
export interface ClusterOptions {
  /**
   * The most that the driver carries at once, in bytes, with the JSON and the base64 that
   * crossws's drivers make of a message. Larger ones go in parts. PostgreSQL: 8000. Default: as
   * the driver says, or 1 MiB.
   */
  maxPayload?: number;
  /** How long another instance has to answer, in ms, before a client is told 503. Default: 5000. */
  timeout?: number;
  /** Where sessions wait whose clients are away when their instance ends: `parking(store)`. */
  parking?: ParkingAdapter;
}

interface Settings {
  timeout: number;
  parking: ParkingAdapter | undefined;
}

/** What stands at the head of a message. All but publications and "unknown" are authenticated. */
type Head =
  | PublicationHead
  | MoveHead
  | { kind: "present"; instance: string; commitment: string }
  | { kind: "bye"; instance: string; secret: string }
  | { kind: "hello"; from: string }
  | { kind: "moved"; id: string; to: string }
  | WhereHead
  | RequestHead
  | AnswerHead
  | { kind: "credit"; id: string; got: number; ask: boolean }
  | { kind: "alive"; id: string; sent: number }
  | { kind: "cancel"; id: string }
  | { kind: "unknown"; id: string };

/** Where sessions can move it tells its instance, and its number among that one's publications. */
interface PublicationHead {
  kind: "publication";
  namespace: string;
  topic: string;
  binary: boolean;
  from?: string;
  n?: number;
}

/** Asks all for a session whose instance says nothing: it may be frozen, and the session elsewhere. */
interface WhereHead {
  kind: "where";
  id: string;
  session: string;
  from: string;
}

/** What an instance received for another's session. */
interface RequestHead {
  kind: "request";
  id: string;
  /** Who will relay the answer. */
  from: string;
  /** The session's name, which does not give away its token. */
  session: string;
  time: number;
  method: string;
  headers: Record<string, string>;
  namespace: string;
}

/** A part of the owner's response: number 0 is its beginning. */
interface AnswerHead {
  kind: "answer";
  id: string;
  n: number;
  end: boolean;
  status?: number;
  headers?: Record<string, string>;
  /** The owner's, that its farewell will reveal: told each instance once, where one can be addressed. */
  commitment?: string;
}

/** A message as it came in. */
interface Incoming {
  head: Head;
  body: Bytes;
  mac: Bytes;
  /** What the code authenticates. */
  signed: Bytes;
}

// --- Public surface ---

/**
 * Makes the `sync` option of an adapter out of a driver, for any number of instances
 * that share the driver's channel.
 *
 * @throws {RangeError} if `maxPayload` is below 1024 or `timeout` below 1.
 *
 * @example
 * ```ts
 * import { cluster } from "@duplex/sse/cluster";
 * import { sseAdapter, type SyncAdapter } from "@duplex/sse/server";
 *
 * const serve = (driver: SyncAdapter) => sseAdapter({ sync: cluster(driver, { timeout: 2000 }) });
 * ```
 */
export function cluster(adapter: ClusterAdapter, options: ClusterOptions = {}): SyncAdapter {
  const { maxPayload, timeout = DEFAULT_TIMEOUT } = options;
  if (maxPayload !== undefined && !(maxPayload >= 1024)) {
    throw new RangeError("maxPayload must be a number of at least 1024");
  }
  if (!(timeout >= 1)) throw new RangeError("timeout must be a number of at least 1");
  return ({ id }) => {
    // The first half of a token; the driver's own name is the same, so that `send` can find it.
    const instance = id.replaceAll("-", "").slice(0, 16);
    const driver = adapter({ id: instance });
    const most = maxPayload ?? driver.maxPayload ?? DEFAULT_MAX_PAYLOAD;
    return new Router(instance, driver, most, { timeout, parking: options.parking });
  };
}

// --- The router: requests and their answers over the bus ---

class Router implements RoutingDriver {
  readonly #instance: string;
  readonly #driver: ClusterDriver;
  readonly #timeout: number;
  readonly #bus: Bus;
  readonly #report: Report;
  #host!: RoutingHost;
  #names!: Names;
  #deliver: (message: SyncMessage) => void = () => {};
  /** Requests received here, by id, until their responses have ended. */
  readonly #relays: Map<string, Relay> = new Map();
  /** Streams of ours that other instances relay, by the id of their request. */
  readonly #served: Map<string, Served> = new Map();
  readonly #bodies: RoutedBodies = new RoutedBodies();
  readonly #replays: Replays = new Replays();
  readonly #subscription: Subscription;
  readonly #presence: Presence;
  readonly #searches: Searches;
  #migration!: Migration;
  readonly #parks: ParkingAdapter | undefined;
  /** What came in and is not done with. */
  readonly #work: Set<Promise<void>> = new Set();
  #timer: ReturnType<typeof setInterval> | undefined;
  #closed = false;

  constructor(instance: string, driver: ClusterDriver, maxPayload: number, options: Settings) {
    const { timeout } = options;
    this.#parks = options.parking;
    this.#instance = instance;
    this.#driver = driver;
    this.#timeout = timeout;
    this.#report = limited((context, error) => this.#host.report(error, context));
    this.#bus = new Bus(driver, maxPayload, timeout);
    this.#presence = new Presence(instance, timeout, {
      ...{ addresses: driver.join !== undefined, heard: () => driver.heard },
      deaf: () => this.#report({ stage: "subscribe" }, new Error(DEAF)),
      tell: (to, head) => void this.#tell(to, head),
    });
    this.#searches = new Searches(timeout, (key, id, session, isAgain) => {
      if (this.#bus.busy) return;
      void this.#send(ALL, key, { kind: "where", id, session, from: instance });
      this.#migration.look(session, isAgain);
    });
    const receive = (message: SyncMessage) => this.#receive(message);
    this.#subscription = new Subscription(driver, instance, this.#report, receive);
  }

  // --- As a driver ---

  attach(host: RoutingHost): void {
    this.#host = host;
    this.#names = new Names((token) => host.has(token));
    this.#migration = new Migration(this.#instance, this.#timeout, {
      ...{ host, names: this.#names, presence: this.#presence, searches: this.#searches },
      send: (to, key, head, body) => this.#send(to, key, head, body),
      wake: () => this.#startTimer(),
      ...{ parks: this.#parks, places: this.#driver },
    });
    this.#bus.take(host.maxMessageSize + 2 * MAX_BATCH); // a routed body, and a head
  }

  own(token: string): void {
    this.#names.own(token);
    this.parking?.arrived(token);
    this.#startTimer(); // to be present
  }

  subscribe(deliver: (message: SyncMessage) => void): MaybePromise<void> {
    this.#deliver = deliver;
    this.#subscription.begin();
  }

  async join(place: SyncPlace): Promise<void> {
    await this.#driver.join?.(place);
  }

  async leave(place: SyncPlace): Promise<void> {
    await this.#driver.leave?.(place);
  }

  publish(message: SyncMessage): Promise<void> {
    const { namespace, topic } = message;
    return this.#publish(message)
      .catch((error) => this.#report({ stage: "publish", namespace, topic }, error));
  }

  async #publish(message: SyncMessage): Promise<void> {
    if (message.namespace.startsWith(RESERVED)) {
      throw new RangeError("A namespace of the backplane's own");
    }
    const isCounted = this.#host.movable || this.#migration.isCounting;
    const n = isCounted ? this.#migration.count(this.#instance, message) : undefined;
    if (n === undefined && this.#bus.carries(message)) return await this.#bus.publish(message);
    // "Where places can be joined, numbered ones go there", else to all: a move must not miss any.
    const place = n === undefined || this.#driver.join ? message : undefined;
    await this.#bus.publishParts(encodePublication(message, this.#instance, n), place);
  }

  get parking(): Parking | undefined {
    return this.#migration.parking;
  }

  stats(): ClusterStats {
    const { pending, pendingBytes } = this.#bus;
    return {
      instances: this.#presence.size,
      relayed: this.#relays.size,
      served: this.#served.size,
      parked: this.parking?.size ?? 0,
      pending,
      pendingBytes,
    };
  }

  async close(signal?: AbortSignal): Promise<void> {
    // What others are about to answer: cut off, it would be asked for again, a second later.
    const asking = [...this.#relays.values()].filter(({ streams }) => !streams);
    const answers = Promise.all(asking.map(({ response }) => response));
    await within(answers, Math.min(DOUBT, this.#timeout), signal);
    this.#closed = true;
    if (this.#subscription.stands) this.#presence.leave();
    clearInterval(this.#timer);
    this.#searches.end();
    this.#subscription.end();
    this.#migration.close();
    this.#bodies.end();
    for (const relay of this.#relays.values()) relay.end();
    for (const served of this.#served.values()) served.cancel();
    this.#bus.look();
    // Answers on their way, the last CLOSE's among them, and what goes back to the store.
    const last = [...this.#work, ...this.#migration.sending, ...this.parking?.taking ?? []];
    await within(Promise.allSettled(last), this.#timeout, signal);
    this.#bus.end();
    await closeDriver(this.#driver, this.#timeout, signal).catch((error) =>
      this.#report({ stage: "subscribe" }, error)
    );
  }

  // --- As the instance that received a request ---

  async adopt(token: string, claim: Claim, take: Take): Promise<void> {
    if (this.#closed || !this.#subscription.stands || this.#bus.behind) return;
    this.#startTimer();
    await this.#migration.bring(token, claim, take);
    if (!this.#host.owns(token)) return;
    // Who was asked may have gone, and nobody else would say that the session is here by now.
    for (const relay of this.#relays.values()) {
      if (relay.isOf(token)) relay.redirect(this.#instance);
    }
  }

  async settled(token: string, attempt: number | undefined): Promise<void> {
    await this.#migration.settled(token, await nameOf(token), attempt);
  }

  tokenHere(token: string): string {
    // "A token's mark … is another one in each answer" where there is a store.
    return `${this.#instance}${this.parking?.mark() ?? ""}.${secretOf(token)}`;
  }

  async isAlone(): Promise<boolean> {
    return this.#host.movable && await this.#presence.isAlone(this.#timeout);
  }

  async route(request: Request, token: string, namespace: string): Promise<Response> {
    try {
      const session = await nameOf(token);
      await this.#migration.settled(token, session); // another request may just have asked for it
      if (this.#host.owns(token)) return await this.#host.fetch(request, namespace);
      const owner = await this.#migration.ownerOf(token, session);
      // It may come back, or be where it was sent.
      if (this.#migration.isMoving(token, session)) return unavailable();
      // "Its owner is gone: 404", as from an instance that knows nothing of it, such as this one.
      if (!owner || owner === this.#instance) {
        const isDoubtful = this.#bus.busy || this.#migration.hides(request, token, session);
        return isDoubtful ? unavailable() : noSession(); // who is busy has asked nobody
      }
      const body = await this.#bodies.read(request, this.#host.maxMessageSize + MAX_BATCH);
      if (body instanceof Response) return body;
      if (this.#closed) return shuttingDown();
      if (this.#bus.behind || this.#relays.size >= MAX_RELAYS) return unavailable();
      return await this.#ask(request, body, token, session, owner, namespace);
    } catch (error) {
      this.#report({ stage: "publish", namespace }, error);
      return unavailable();
    }
  }

  async #ask(
    { method, headers: given }: Request,
    body: Bytes,
    token: string,
    session: string,
    owner: string,
    namespace: string,
  ): Promise<Response> {
    const key = await keyOf(token);
    const headers = routedHeaders(given);
    const id = hex(crypto.getRandomValues(new Uint8Array(ID_SIZE)));
    const relay: Relay = new Relay(id, key, token, owner, this.#timeout, {
      send: (head) => this.#send(relay.owner, key, head, EMPTY, () => this.#relays.has(id)),
      forget: () => {
        this.#relays.delete(id);
        this.#subscription.leave(id);
      },
      again: () =>
        void (relay.owner === this.#instance ? this.#answerHere(relay, head, body) : go()),
    });
    const head: RequestHead = {
      ...{ kind: "request", id, from: this.#instance, session, time: Date.now() },
      ...{ method, headers, namespace },
    } as const;
    const go = async () => {
      this.#presence.asked(relay.owner);
      return await this.#send(relay.owner, key, head, body) || relay.fail();
    };
    const late = setTimeout(() => {
      const instance = relay.owner;
      const error = new Error(`No answer from instance ${instance}`);
      this.#report({ stage: "delivery", instance, namespace }, error);
      relay.fail();
    }, this.#timeout);
    const heard = this.#host.movable && this.#searches.begin(() => id, session, key);
    this.#relays.set(id, relay);
    this.#startTimer();
    if (this.#presence.isDeaf || !this.#subscription.await(id, body.length, go)) relay.fail();
    return await relay.response.finally(() => {
      clearTimeout(late);
      if (heard) heard(relay.owner === owner);
    });
  }

  /** Who was asked says that the session is here; it may have left again. */
  async #answerHere(relay: Relay, head: RequestHead, body: Bytes): Promise<void> {
    const { token } = relay;
    await this.#migration.settled(token, head.session);
    if (relay.isOver) return; // its client has been told otherwise
    const left = !this.#host.has(token);
    const to = left && this.#migration.whereabouts(token, head.session);
    if (to) relay.redirect(to);
    else if (to === STORE || this.#migration.isMoving(token, head.session)) relay.fail();
    else relay.answer(await this.#host.fetch(...routed(head, token, body)));
  }

  // --- As the instance that owns the session ---

  async #serve(message: Incoming, head: RequestHead): Promise<void> {
    const known = await this.#names.find(head.session) ?? this.#migration.expected(head.session);
    if (!known) return await this.#sayUnknown(head);
    const key = await (known.key ??= keyOf(known.token));
    await authenticate(key, message);
    this.#presence.heard(head.from);
    checkTime(head.time);
    if (this.#closed) return; // silence is 503 there
    // "A request for a session that is on its way waits" until it is known where it is.
    await this.#migration.reached(known.token, head);
    const isNamed = await this.#names.find(head.session);
    // From here on in one step: else it may leave after it was seen here, which would be 404.
    if (this.#migration.isMoving(known.token, head.session)) return; // silence is 503 there
    const to = this.#migration.whereabouts(known.token, head.session);
    if (to === undefined && !isNamed) return; // it has not come
    if (to !== undefined && !this.#host.has(known.token)) {
      if (to !== STORE) await this.#send(head.from, key, { kind: "moved", id: head.id, to });
      return;
    }
    this.#replays.check(head);
    this.#startTimer(); // to forget it, though nothing is relayed
    const response = await this.#host.fetch(...routed(head, known.token, message.body));
    await this.#answer(head, key, response);
  }

  async #sayUnknown({ id, from }: { id: string; from: string }) {
    if (!this.#bus.busy) await this.#tell(from, { kind: "unknown", id }); // anybody can ask
  }

  #answer(head: RequestHead, key: CryptoKey, response: Response): Promise<void> {
    return giveAnswer(head, key, response, {
      ...{ served: this.#served, presence: this.#presence, timeout: this.#timeout },
      send: (...message) => this.#send(...message),
      wake: () => this.#startTimer(),
    });
  }

  // --- Sessions that move ---

  async #onMove(message: Incoming, head: MoveHead): Promise<void> {
    const known = head.kind !== "adopt" || await this.#names.find(head.session) ||
      this.#migration.expected(head.session);
    if (!known) return await this.#sayUnknown(head);
    await this.#migration.receive(message, head);
    this.#presence.heard(head.from);
  }

  // --- The bus ---

  /** What anybody may say. */
  #tell(to: string, head: Head): Promise<void> {
    return this.#bus.send(to, encodeMessage(head))
      .catch((error) => this.#report({ stage: "publish", instance: to }, error));
  }

  /** Sends what is authenticated. False when it could not be. */
  async #send(
    to: string,
    key: CryptoKey,
    head: Head,
    body: Bytes = EMPTY,
    waits?: () => boolean,
  ): Promise<boolean> {
    try {
      const message = encodeMessage(head, body);
      const mac = await crypto.subtle.sign("HMAC", key, message.subarray(MAC_SIZE));
      message.set(new Uint8Array(mac));
      await this.#bus.send(to, message, waits);
      return true;
    } catch (error) {
      this.#report({ stage: "publish", instance: to }, error);
      return false;
    }
  }

  /** Whatever comes in: nothing of it may do more harm than a report. */
  #receive(message: SyncMessage): void {
    try {
      if (!message.namespace.startsWith(RESERVED)) return this.#deliver(message);
      if (message.topic !== this.#instance && message.topic !== ALL || this.#closed) return;
      const whole = this.#bus.assemble(message);
      if (!whole) return this.#startTimer(); // to forget what stays incomplete
      const incoming = decodeMessage(whole);
      if (message.topic === ALL && !TO_ALL.has(incoming.head.kind)) {
        throw new Error("A request to all on the backplane"); // all would answer
      }
      const work = this.#dispatch(incoming)
        .catch((error) => this.#report(contextOf(incoming.head), error))
        .finally(() => this.#work.delete(work));
      this.#work.add(work);
    } catch (error) {
      this.#report({ stage: "delivery" }, error);
    }
  }

  async #dispatch(message: Incoming): Promise<void> {
    const { head, body } = message;
    switch (head.kind) {
      case "publication": {
        const { namespace, topic, binary, from, n } = head;
        if (namespace.startsWith(RESERVED)) {
          throw new Error("A publication to a reserved namespace");
        }
        const publication = { namespace, topic, data: binary ? body : decoder.decode(body) };
        this.#deliver(publication);
        if (from && from !== this.#instance) this.#migration.count(from, publication, n);
        return;
      }
      case "present":
        return this.#presence.hear(head.instance, head.commitment);
      case "hello":
        if (!this.#bus.busy) await this.#presence.greet(head.from); // anybody can ask
        return this.#startTimer(); // to be asked again
      case "bye":
        return await this.#presence.farewell(head.instance, head.secret);
      case "adopt":
      case "state":
      case "adopted":
      case "rest":
      case "have":
      case "taken":
        return await this.#onMove(message, head);
      case "where":
        return await this.#migration.locate(message, head);
      case "request":
        return await this.#serve(message, head);
      case "unknown":
        this.#migration.moves.unknown(head.id);
        this.#presence.heard(this.#relays.get(head.id)?.owner ?? "");
        return this.#relays.get(head.id)?.doubt();
      case "answer":
      case "moved":
      case "alive":
        return await this.#onAnswer(message, head);
      case "credit":
      case "cancel": {
        const served = this.#served.get(head.id);
        if (!served) return;
        await authenticate(served.key, message);
        return head.kind === "credit" ? served.allow(head.got, head.ask) : served.cancel();
      }
      default:
        throw new Error("A message of an unknown kind on the backplane");
    }
  }

  /** What the owner says of a request that was received here. */
  async #onAnswer(message: Incoming, head: Head & { kind: "answer" | "moved" | "alive" }) {
    const relay = this.#relays.get(head.id);
    if (!relay && head.kind === "moved") return await this.#migration.redirect(message, head);
    if (!relay) return; // ended meanwhile
    await authenticate(relay.key, message);
    this.#presence.heard(relay.owner);
    if (head.kind === "moved") return relay.redirect(head.to);
    if (head.kind === "alive") return relay.compare(head.sent);
    if (head.commitment) this.#presence.commit(relay.owner, head.commitment);
    relay.take(head, message.body);
  }

  // --- Time ---

  #startTimer(): void {
    if (this.#timer !== undefined || this.#closed) return;
    const period = Math.min(500, this.#timeout / 2);
    this.#timer = setInterval(() => this.#tick(period), period);
    (this.#timer as { unref?(): void }).unref?.(); // where timers can do so
  }

  /** Ticks, not clocks: while this process paused, it was not the others who were silent. */
  #tick(period: number): void {
    for (const relay of this.#relays.values()) relay.tick(period);
    for (const served of this.#served.values()) served.tick(period);
    this.#bus.tick(period);
    this.#replays.forget();
    const holding = this.#host.size > 0;
    this.#presence.tick(period, holding, this.#bus.stuck);
    this.#migration.tick(period);
    const busy = holding || this.#presence.waits || this.#relays.size || this.#served.size ||
      this.#replays.size;
    if (busy || this.#bus.assembling || this.#migration.remembers) return;
    clearInterval(this.#timer);
    this.#timer = undefined;
  }
}

/** Who stops while the backplane is down must be able to. */
async function closeDriver(driver: SyncDriver, timeout: number, signal?: AbortSignal) {
  if (await within(driver.close?.(), timeout, signal) || signal?.aborted) return;
  throw new Error("The backplane does not close");
}

// --- Relaying: the receiving instance's side of one request ---

/** What a relay needs of its instance. */
interface Line {
  /** To the owner. */
  send(head: Head): Promise<boolean>;
  /** Sends the request again, to another owner. */
  again(): void;
  forget(): void;
}

/** Where a relayed request stands: asking → doubted → streaming → ended; steps may be left out. */
type RelayPhase = "asking" | "doubted" | "streaming" | "ended";

/** A request that waits for its response, or a response on its way to the client. */
class Relay {
  readonly key: CryptoKey;
  readonly response: Promise<Response>;
  /** The instance that is asked. */
  owner: string;
  readonly token: string;
  readonly #id: string;
  readonly #timeout: number;
  readonly #line: Line;
  readonly #parts: Sequence = new Sequence();
  readonly #credit: Credit;
  #phase: RelayPhase = "asking";
  #respond!: (response: Response) => void;
  #doubt: ReturnType<typeof setTimeout> | undefined;
  #controller: ReadableStreamDefaultController<Bytes> | undefined;
  /** The runtime has asked for bytes and had none since. */
  #asked = false;
  /** The last part has come. */
  #finished = false;
  #queue: Bytes[] = [];
  #redirections = 0;

  constructor(
    id: string,
    key: CryptoKey,
    token: string,
    owner: string,
    timeout: number,
    line: Line,
  ) {
    this.#id = id;
    this.key = key;
    this.token = token;
    this.owner = owner;
    this.#timeout = timeout;
    this.#line = line;
    this.#credit = new Credit(timeout, (got, ask) => {
      line.send({ kind: "credit", id, got, ask });
    });
    this.response = new Promise((resolve) => this.#respond = resolve);
  }

  get streams(): boolean {
    return this.#phase === "streaming";
  }

  get isOver(): boolean {
    return this.#phase === "ended";
  }

  /** Whether it is for the session of this token, whichever of its instances that names. */
  isOf(token: string): boolean {
    return secretOf(token) === secretOf(this.token);
  }

  /** "Anyone on the backplane can say unknown", so the owner may yet contradict. */
  doubt(): void {
    if (this.#phase !== "asking") return;
    this.#phase = "doubted";
    this.#doubt = setTimeout(() => this.fail(noSession()), Math.min(DOUBT, this.#timeout));
  }

  /** The owner says that another instance has the session. */
  redirect(to: string): void {
    const isDoubted = this.#phase === "doubted"; // who was said not to know it may have it by now
    if (this.#phase !== "asking" && !isDoubted || to === this.owner && !isDoubted) return;
    this.#phase = "asking";
    clearTimeout(this.#doubt);
    if (++this.#redirections > MAX_REDIRECTIONS) { // who has it says so itself, when all are asked
      this.#redirections = 0;
      this.owner = "";
      return;
    }
    this.owner = to;
    this.#line.again();
  }

  /** Who was asked has not answered, and that has taken no time that tells anything. */
  fail(response: Response = unavailable()): void {
    this.owner = "";
    this.answer(response);
  }

  /** The answer did not come over the backplane. */
  answer(response: Response): void {
    if (this.isOver) response.body?.cancel().catch(() => {}); // nobody else would end it
    this.#respond(response);
    this.end();
  }

  take(head: AnswerHead, body: Bytes): void {
    if (this.#phase === "ended" || head.n > this.#credit.got + 2 * CREDIT) return;
    const parts = this.#parts.take({ head, body });
    if (parts) this.#credit.heard();
    for (const part of parts ?? []) this.#accept(part);
    this.#flush();
  }

  #accept({ head: { n, end, status, headers }, body }: Part): void {
    this.#finished = end;
    if (n > 0) return void this.#queue.push(body);
    clearTimeout(this.#doubt);
    if (end) {
      this.#respond(
        new Response(body.length ? body : null, { status: status!, headers: headers! }),
      );
      return this.end();
    }
    this.#phase = "streaming";
    // "The token does not travel": the header that tells it is put back here.
    const all = { ...headers, [TOKEN_HEADER]: this.token };
    this.#respond(new Response(this.#stream(), { status: status!, headers: all }));
  }

  #stream(): ReadableStream<Bytes> {
    return new ReadableStream<Bytes>({
      start: (controller) => {
        this.#controller = controller;
      },
      pull: () => {
        this.#asked = true;
        this.#flush();
      },
      cancel: () => this.#cancel(),
    }, { highWaterMark: 0 });
  }

  #flush(): void {
    if (!this.#asked || this.#phase !== "streaming") return;
    if (!this.#queue.length) {
      if (this.#finished) this.end();
      return;
    }
    const parts = this.#queue;
    this.#queue = [];
    this.#credit.spend(parts.length, this.#finished);
    this.#asked = false; // before enqueue, which may ask again
    const chunk = concat(parts);
    if (chunk.length) this.#controller!.enqueue(chunk);
    else this.end(); // only the last part can be empty
  }

  /** The owner says how many parts it has sent. */
  compare(sent: number): void {
    this.#credit.heard();
    this.#parts.expect(sent);
  }

  /** "One that is missing for 1 s, or two timeouts of silence, ends the relayed stream." */
  tick(period: number): void {
    if (this.#phase !== "streaming") return;
    if (this.#parts.missing(period) > DOUBT || this.#credit.tick(period) > 2 * this.#timeout) {
      this.#cancel();
    }
  }

  #cancel(): void {
    this.#line.send({ kind: "cancel", id: this.#id });
    this.end();
  }

  /** The end, whatever there has been until now: 503, or the end of the stream. */
  end(): void {
    if (this.#phase === "ended") return;
    this.#phase = "ended";
    clearTimeout(this.#doubt);
    this.#respond(unavailable());
    this.#line.forget();
    try {
      this.#controller?.close();
    } catch {
      // cancelled by the runtime already
    }
  }
}

/** A part of an answer. */
interface Part {
  readonly head: AnswerHead;
  readonly body: Bytes;
}

/** Parts in the order of their numbers: the bus may repeat and reorder them. */
class Sequence {
  /** The number of the part that is to come next; those after it wait. */
  #next = 0;
  readonly #held: Map<number, Part> = new Map();
  /** How long a part has been missing, in ms; undefined: none is. */
  #gap: number | undefined;

  /** Returns the parts that are in order with this one; nothing for one that has come before. */
  take(part: Part): Part[] | undefined {
    if (part.head.n < this.#next) return;
    this.#held.set(part.head.n, part);
    const parts: Part[] = [];
    for (let next = this.#held.get(this.#next); next; next = this.#held.get(this.#next)) {
      this.#held.delete(this.#next++);
      this.#gap = undefined;
      parts.push(next);
    }
    if (this.#held.size) this.#gap ??= 0;
    return parts;
  }

  /** So many parts, besides number 0, have been sent. */
  expect(sent: number): void {
    if (sent >= this.#next) this.#gap ??= 0;
  }

  /** How long a part has been missing, a tick later. */
  missing(period: number): number {
    if (this.#gap === undefined) return 0;
    return this.#gap += period;
  }
}

/** How far the owner may go on, and whether it is there. */
class Credit {
  readonly #timeout: number;
  readonly #tell: (got: number, ask: boolean) => void;
  /** Parts given to the client, and how many of them the owner was told. */
  #got = 0;
  #told = 0;
  /** How long the owner has said nothing, and was told nothing, in ms. */
  #quiet = 0;
  #untold = 0;
  /** The owner was asked whether it is there. */
  #asked = false;

  constructor(timeout: number, tell: (got: number, ask: boolean) => void) {
    this.#timeout = timeout;
    this.#tell = tell;
  }

  get got(): number {
    return this.#got;
  }

  heard(): void {
    this.#quiet = 0;
    this.#asked = false;
  }

  /** The client was given so many parts. */
  spend(parts: number, last: boolean): void {
    this.#got += parts;
    if (this.#got - this.#told >= CREDIT / 2 && !last) this.#say(false);
  }

  /** "The receiver says credit every 4 parts and every 5 s." Returns how long the owner is silent. */
  tick(period: number): number {
    this.#quiet += period;
    this.#untold += period;
    const ask = this.#quiet >= this.#timeout && !this.#asked;
    if (ask || this.#untold >= this.#timeout) this.#say(ask);
    return this.#quiet;
  }

  #say(ask: boolean): void {
    this.#told = this.#got;
    this.#untold = 0;
    this.#asked ||= ask;
    this.#tell(this.#got, ask);
  }
}

// --- Serving: the owner's side of one stream ---

/** A session's event stream, read as far as the relaying instance asks. */
class Served {
  readonly key: CryptoKey;
  readonly #id: string;
  readonly #reader: { read(): Promise<{ done: boolean; value?: Uint8Array }>; cancel(): unknown };
  readonly #timeout: number;
  readonly #send: (head: Head, body?: Bytes) => Promise<boolean>;
  #sent = 0;
  #allowed = CREDIT;
  #wake = () => {};
  cancelled = false;
  /** An answer to whether this instance is there is on its way. */
  #assuring = false;
  /** How long the relaying instance has said nothing, in ms. */
  #quiet = 0;

  constructor(
    id: string,
    key: CryptoKey,
    reader: ReadableStreamDefaultReader<Uint8Array>,
    timeout: number,
    send: (head: Head, body?: Bytes) => Promise<boolean>,
  ) {
    this.#id = id;
    this.key = key;
    this.#reader = reader as never;
    this.#timeout = timeout;
    this.#send = send;
  }

  /** While a part is being sent nothing is read: the busier the bus, the larger the parts. */
  async run(): Promise<void> {
    while (!this.cancelled) {
      await this.#credit();
      const { done, value } = await this.#reader.read();
      const bytes = (value ?? EMPTY) as Bytes;
      for (let at = 0; at < Math.max(bytes.length, 1); at += PIECE) {
        await this.#credit();
        if (this.cancelled) return;
        const head: Head = { kind: "answer", id: this.#id, n: ++this.#sent, end: done };
        if (!await this.#send(head, bytes.subarray(at, at + PIECE))) return;
      }
      if (done) return;
    }
  }

  async #credit(): Promise<void> {
    while (this.#sent >= this.#allowed && !this.cancelled) {
      await new Promise<void>((resolve) => this.#wake = resolve);
    }
  }

  allow(got: number, ask: boolean): void {
    this.#quiet = 0;
    this.#allowed = Math.max(this.#allowed, Math.min(got, this.#sent) + CREDIT);
    this.#wake();
    if (!ask || this.#assuring) return; // a repeated question would pile up answers
    this.#assuring = true;
    this.#send({ kind: "alive", id: this.#id, sent: this.#sent })
      .finally(() => this.#assuring = false);
  }

  /** The relaying instance, or its client, has gone: as good as a dropped connection. */
  cancel(): void {
    if (this.cancelled) return;
    this.cancelled = true;
    this.#wake();
    Promise.resolve(this.#reader.cancel()).catch(() => {});
  }

  tick(period: number): void {
    if ((this.#quiet += period) > 3 * this.#timeout) this.cancel();
  }
}

/** What an answer is given with. */
interface Answering {
  readonly served: Map<string, Served>;
  readonly presence: Presence;
  readonly timeout: number;
  send(
    to: string,
    key: CryptoKey,
    head: Head,
    body: Bytes | undefined,
    waits: () => boolean,
  ): Promise<boolean>;
  /** Has time go on. */
  wake(): void;
}

/** Gives the session's response to the instance that relays it, to its end. */
async function giveAnswer(
  { id, from }: RequestHead,
  key: CryptoKey,
  response: Response,
  { served: all, presence, timeout, wake, ...bus }: Answering,
): Promise<void> {
  const { status } = response;
  const late = clock() + timeout; // nobody waits for the beginning any more
  const waits = () => !(all.get(id)?.cancelled ?? clock() > late);
  const send = (head: Head, body?: Bytes) => bus.send(from, key, head, body, waits);
  const commitment = await presence.introduce(from);
  const begin = { kind: "answer", id, n: 0, status, ...commitment && { commitment } } as const;
  const headers = Object.fromEntries(response.headers);
  delete headers[TOKEN_HEADER];
  if (!response.headers.get("content-type")?.startsWith(STREAM_TYPE) || !response.body) {
    const body = new Uint8Array(await response.arrayBuffer());
    return void await send({ ...begin, end: true, headers }, body);
  }
  const served = new Served(id, key, response.body.getReader(), timeout, send);
  all.set(id, served);
  wake();
  try {
    if (await send({ ...begin, end: false, headers })) await served.run();
  } finally {
    all.delete(id);
    served.cancel();
  }
}

// --- Replays: requests that were served before ---

/** The ids of the requests of the last minute, and when they may be forgotten. */
class Replays {
  readonly #requests: Map<string, number> = new Map();
  /** Of uplinks the latest will do, since the numbers of messages tell a repetition. */
  readonly #uplinks: Map<string, number> = new Map();

  get size(): number {
    return this.#requests.size + this.#uplinks.size;
  }

  /** Remembers a request; throws at one that was served before, or if that cannot be told. */
  check({ id, method, headers }: RequestHead): void {
    if (this.#requests.has(id) || this.#uplinks.has(id)) {
      throw new Error("A request on the backplane is replayed");
    }
    const isUplink = method === "POST" && headers.accept !== STREAM_TYPE &&
      ("x-duplex-version" in headers || headers["content-type"]?.startsWith(UPLINK_TYPE));
    const seen = isUplink ? this.#uplinks : this.#requests;
    if (seen.size >= MAX_SEEN) {
      if (!isUplink) throw new Error("Too many requests to tell them from replayed ones");
      seen.delete(seen.keys().next().value!);
    }
    seen.set(id, clock() + 2 * REPLAY_WINDOW);
  }

  forget(): void {
    const now = clock();
    for (const seen of [this.#requests, this.#uplinks]) {
      for (const [id, expires] of seen) {
        if (now < expires) break; // they came in this order
        seen.delete(id);
      }
    }
  }
}

function checkTime(time: number): void {
  const off = Date.now() - time;
  if (Math.abs(off) <= REPLAY_WINDOW) return;
  const seconds = Math.round(off / 1000);
  throw new Error(`A request on the backplane is replayed, or clocks differ: ${seconds} s`);
}

// --- Moves: sessions that come here, and that go ---

/** What an instance's migration stands among. */
interface Surroundings {
  readonly host: RoutingHost;
  readonly names: Names;
  readonly presence: Presence;
  readonly searches: Searches;
  readonly send: Send;
  /** Has time go on. */
  readonly wake: () => void;
  readonly parks: ParkingAdapter | undefined;
  /** Without `join` all hear all. */
  readonly places: Pick<SyncDriver, "join" | "leave">;
}

/** Carries the moves of `handover.ts` over the backplane, with what the server packs and takes. */
class Migration implements Mover<SyncMessage> {
  readonly moves: Moves<SyncMessage>;
  readonly parking: Parking | undefined;
  readonly #instance: string;
  readonly #host: RoutingHost;
  readonly #names: Names;
  readonly #presence: Presence;
  readonly #searches: Searches;
  readonly #send: Send;
  readonly #timeout: number;
  readonly #wake: () => void;
  readonly #places: Surroundings["places"];
  /** Who asks for sessions, and what takes them into service. */
  readonly #wanted: WeakMap<Claim, { token: string; take: Take }> = new WeakMap();
  /** Their tokens, and since when: their givers may ask whether they have come. */
  readonly #asked: Map<string, { token: string; since: number }> = new Map();
  /** How many publications of each instance have been delivered here. */
  readonly #counts: Map<string, { n: number; at: number }> = new Map();
  /** Of the last one of this instance, whichever counts had to make room. */
  #number = 0;
  /** What goes out, and what comes in, of each session. */
  readonly #outgoing: Lines = new Lines();
  readonly #incoming: Lines = new Lines();

  constructor(
    instance: string,
    timeout: number,
    { host, names, presence, searches, send, wake, parks, places }: Surroundings,
  ) {
    this.#instance = instance;
    this.#timeout = timeout;
    this.#wake = wake;
    this.#places = places;
    this.#host = host;
    this.#names = names;
    this.#presence = presence;
    this.#searches = searches;
    this.#send = send;
    this.moves = new Moves(instance, timeout, host.resumeTimeout, this);
    this.parking = parks?.({
      ...{ instance, host, wake, digest, seal, unseal, encodePacked },
      now: () => this.now(),
      counts: () => this.counts(),
      asks: (session) => host.takes && this.moves.asks(session),
      take: (session, state, counts) => this.#takeParked(session, state, counts),
      confirm: (to, id, session) =>
        this.send(to, { kind: "adopted", id, session, from: this.#instance }),
    });
  }

  /** Resolves when the session is here, or stays where it is. */
  async bring(token: string, claim: Claim, take: Take): Promise<void> {
    if (this.#presence.isDeaf) return; // the session would leave, and never arrive
    const session = await nameOf(token);
    if (this.parking && !this.hintOf(token, session)) { // nobody needs to be asked first
      await this.#adopt(token, session, STORE, claim, take);
      if (this.#host.owns(token)) return;
    }
    const owner = await this.ownerOf(token, session).catch(() => {}); // `route` says it
    if (!owner) return;
    this.#presence.asked(owner);
    const adopting = this.#adopt(token, session, owner, claim, take);
    const id = () => this.moves.asking(session); // another one after each hop
    const heard = id() && this.#searches.begin(id, session, await keyOf(token));
    await adopting.finally(() => heard && heard());
  }

  /**
   * "A session belongs where its stream is": an uplink waits until a resumption has told that, unless
   * its token tells that the client has heard of another instance.
   */
  async settled(token: string, session: string, attempt?: number): Promise<void> {
    if (this.parking && attempt !== undefined) {
      this.moves.comes(session, { attempt, mark: markOf(token) });
    }
    const wants = attempt !== undefined || !token.startsWith(this.#instance);
    const parked = wants ? this.parking?.want(token, attempt) : this.parking?.moving(token);
    if (parked) await within(parked, this.#timeout);
    const moving = this.moves.moving(session);
    if (moving) await within(moving, this.#timeout);
  }

  /** A request was brought here: the token is the one that is known here, which tells nothing of its client's. */
  async reached(token: string, { session, headers }: RequestHead): Promise<void> {
    await this.settled(token, session, "x-duplex-attempt" in headers ? 0 : undefined);
  }

  tick(period: number): void {
    this.moves.tick(period);
    this.parking?.tick(period);
  }

  close(): void {
    this.moves.close();
    this.parking?.hurry();
  }

  /** What is being said of sessions. */
  get sending(): Promise<void>[] {
    return this.#outgoing.all;
  }

  /** Something is kept that a tick will forget. */
  get remembers(): boolean {
    return this.moves.remembers || !!this.parking?.remembers;
  }

  /** The session is in this instance's hands, though not in service. */
  holds(session: string): boolean {
    return this.moves.holds(session) || !!this.parking?.isLanding(session);
  }

  /** A session that is in this instance's hands, and is to be in service soon. */
  expected(session: string): Known | undefined {
    const token = this.holds(session) ? this.#asked.get(session)?.token : undefined;
    return token === undefined ? undefined : { token };
  }

  isMoving(token: string, session: string): boolean {
    return !!(this.moves.moving(session) ?? this.parking?.moving(token));
  }

  /**
   * "An uplink takes nothing out of the store", and one that fails says nothing of what it has; nor
   * does who is deaf know that nobody has the session. It may have come here meanwhile, too.
   */
  hides({ headers }: Request, token: string, session: string): boolean {
    if (this.#presence.doubts || this.#host.has(token)) return true;
    if (this.#presence.isUnsure(this.#searches.begunAt(session))) return true;
    return !!this.parking && (this.parking.mayBring(session) || !headers.has("x-duplex-attempt"));
  }

  async #adopt(token: string, session: string, owner: string, claim: Claim, take: Take) {
    this.#remember(session, token);
    const mine = this.parking ? { ...claim, mark: markOf(token) } : { ...claim };
    this.#wanted.set(mine, { token, take });
    await this.moves.adopt(session, owner, mine);
    // If that was a connection that its client has given up, nobody else would park it again.
    if (this.#host.owns(token)) this.parking?.away(token);
  }

  /** Sessions can move, here or elsewhere: then each publication is counted. */
  get isCounting(): boolean {
    return this.#counts.size > 0;
  }

  /** Numbers a publication of this instance, or takes the number of another's. */
  count(from: string, message: SyncMessage, n: number = ++this.#number): number {
    this.#count(from, n, clock());
    this.moves.published({ from, n, namespace: message.namespace, message });
    return n;
  }

  #count(from: string, n: number, at: number): void {
    if (!this.#counts.delete(from) && this.#counts.size >= MAX_COUNTED) {
      this.#counts.delete(this.#counts.keys().next().value!);
    }
    this.#counts.set(from, { n, at }); // who has been silent for longest stands first
  }

  /** "What is said of a session is sent and taken in turn"; an `adopt` may wait for the store. */
  async receive(message: Incoming, head: MoveHead): Promise<void> {
    const take = () => this.#receive(message, head);
    await (head.kind === "adopt" ? take() : this.#incoming.run(head.session, take));
  }

  /** Takes what another instance says of a session, if that session's token vouches for it. */
  async #receive(message: Incoming, head: MoveHead): Promise<void> {
    const token = this.#asked.get(head.session)?.token ??
      (await this.#names.find(head.session))?.token;
    if (token === undefined) return; // its end is known no more: the asker finds out by its request
    await authenticate(await keyOf(token), message);
    this.#wake();
    if (head.kind === "adopted") this.parking?.taken(token, head.id, head.from);
    // Silence: then all are asked, and the store.
    if (head.kind === "adopt" && await this.#wants(token, head) === false) return;
    const isSealed = head.kind === "rest" || head.kind === "state" && head.status === "here";
    this.moves.receive(head, isSealed ? await unseal(token, message.body) : EMPTY);
  }

  /** Without a mark, as of who has no store, it shows no more than an uplink. */
  async #wants(token: string, { attempt, mark }: Claim): Promise<boolean | undefined> {
    return await this.parking?.want(token, mark === undefined ? mark : attempt, mark);
  }

  /**
   * The token tells where the session was when its client last heard; of an instance that is gone
   * others may know, and it may be back. Undefined: it is nowhere.
   */
  async ownerOf(token: string, session: string): Promise<string | undefined> {
    return this.hintOf(token, session) || await this.#searches.find(session, await keyOf(token));
  }

  /**
   * The instance that is to be asked first, unless it is gone. "What an instance knows of a session
   * that left it speaks for tokens that name it alone": a client with another one has heard of the
   * session since, and old pointers lead through all instances.
   */
  hintOf(token: string, session: string): string | undefined {
    const named = token.slice(0, 16);
    const left = this.whereabouts(token, session);
    const owners = named === this.#instance ? [left ?? named] : [named, left ?? STORE];
    return owners.find((owner) => !this.#presence.isGone(owner));
  }

  whereabouts(token: string, session: string): string | undefined {
    return this.moves.whereabouts(session) ?? this.parking?.whereabouts(token);
  }

  /** "Whoever has the session answers moved", and nobody else. */
  async locate(message: Incoming, { id, session, from }: WhereHead): Promise<void> {
    const token = (await this.#names.find(session))?.token ?? this.#asked.get(session)?.token;
    if (token === undefined || from === this.#instance) return;
    const holds = this.holds(session) || this.parking?.moving(token);
    if (!this.#host.owns(token) && !holds) return;
    const key = await keyOf(token);
    await authenticate(key, message);
    await this.#send(from, key, { kind: "moved", id, to: this.#instance });
  }

  /** The answer to that: to a search, or to an adoption for which all were asked. */
  async redirect(message: Incoming, { id, to }: { id: string; to: string }): Promise<void> {
    const search = this.#searches.get(id);
    const session = this.moves.sessionOf(id);
    const token = session !== undefined && this.#asked.get(session)?.token;
    const key = search?.key ?? (token && await keyOf(token));
    if (!key) return;
    await authenticate(key, message);
    if (search) search.settle(to);
    else this.moves.redirect(id, to);
  }

  #remember(session: string, token: string): void {
    this.#asked.delete(session); // the oldest stand first
    for (const [oldest, { since }] of this.#asked) {
      if (this.now() - since < 2 * REPLAY_WINDOW && this.#asked.size < MAX_SEEN) break;
      this.#asked.delete(oldest);
    }
    this.#asked.set(session, { token, since: this.now() });
  }

  // --- As a mover ---

  now(): number {
    return Date.now();
  }

  send(to: string, head: MoveHead, state?: Bytes): void {
    const token = this.#tokenOf(head.session);
    if (to === STORE) {
      if (head.kind === "adopt") {
        // Who was asked for as well had its answer by that.
        this.#look(head.session).then(() => this.moves.unknown(head.id));
      }
      return; // it needs no confirmation
    }
    // The next tick asks again. Before the state it would be told "no", which binds.
    if (head.kind === "have" && this.#outgoing.isBusy(head.session)) return;
    const sending = async () => {
      const body = state && await seal(token, state);
      await this.#send(to, await keyOf(token), head, body);
    };
    this.#outgoing.run(head.session, sending)
      .catch((error) => this.#host.report(error, { stage: "publish", instance: to }));
  }

  get takes(): boolean {
    return this.#host.takes;
  }

  owns(session: string): boolean {
    const token: string | undefined = this.#tokenOf(session); // it has its name a little later
    return token !== undefined && this.#host.owns(token);
  }

  pack(session: string, claim: Claim): Given | undefined {
    const packed = this.#host.pack(this.#tokenOf(session), claim);
    if (!packed || packed === "busy") return;
    return { state: encodePacked(packed), marks: packed.marks };
  }

  restore(session: string): void {
    this.#host.restore(this.#tokenOf(session));
  }

  release(session: string, end: "moved" | "lost"): void {
    this.#host.release(this.#tokenOf(session), end);
  }

  rest(session: string): Bytes {
    return encodePacked({ frames: this.#host.rest(this.#tokenOf(session)) });
  }

  take(claim: Claim, state: Bytes, missed: SyncMessage[], rest?: Bytes): void {
    const packed = decodePacked(state);
    const frames = rest ? [...packed.frames, ...decodePacked(rest).frames] : packed.frames;
    this.#wanted.get(claim)!.take({ ...packed, frames }, missed);
  }

  hear(state: Bytes): Hearing | undefined {
    if (!this.#places.join) return;
    const { namespace, topics } = headOf(state);
    return hearingOf(this.#places, topics.map((topic) => ({ namespace, topic })), (error) => {
      this.#host.report(error, { stage: "subscribe", namespace });
    });
  }

  counts(): Counts {
    return Object.fromEntries([...this.#counts].map(([from, { n }]) => [from, n]));
  }

  had(counts: Counts): void {
    for (const [from, n] of Object.entries(counts)) {
      const known = this.#counts.get(from);
      if (n > (known?.n ?? 0)) this.#count(from, n, known?.at ?? -Infinity);
    }
  }

  quiet(time: number): string[] {
    const now = clock();
    const isQuiet = ([from, { at }]: [string, { at: number }]) =>
      now - at >= (this.#presence.hasLeft(from) ? time / 4 : time);
    return [...this.#counts].filter(isQuiet).map(([from]) => from);
  }

  // --- The parking store ---

  /** Whoever is asked for the session says nothing: it may have parked it, and be frozen. */
  look(session: string, isAgain = false): void {
    this.#presence.said(); // all were asked, and so is this instance
    // "Halfway, all are asked for a sign": until then whoever has it says so.
    if (isAgain) this.#presence.ask(this.#searches.begunAt(session));
    this.#wake();
    this.#look(session);
  }

  /** By the token of who asks for the session, which names the pointer to it. */
  async #look(session: string): Promise<void> {
    const claim = this.moves.claimOf(session);
    if (!claim) return;
    const { token } = this.#wanted.get(claim)!;
    await this.parking?.look({ session, namespace: claim.namespace }, token);
  }

  /** The store answers for who has parked the session: nothing is to come of whom we never heard. */
  async #takeParked(session: string, state: Bytes, counts: Counts): Promise<boolean> {
    const id = this.moves.askAnew(session)!;
    const head = { kind: "state", status: "here", id, session, from: STORE, counts } as const;
    this.moves.receive({ ...head, time: this.now(), quiet: Object.keys(counts) }, state);
    await this.moves.moving(session);
    return this.moves.took(id);
  }

  /** Of a session that is here, was, or was asked for. */
  #tokenOf(session: string): string {
    return this.#asked.get(session)?.token ?? this.#names.tokenOf(session)!;
  }
}

/** Hears places for a while; what fails is told to `report`. */
function hearingOf(
  driver: Surroundings["places"],
  places: SyncPlace[],
  report: (error: unknown) => void,
): Hearing {
  const begin = async () => {
    await Promise.all(places.map(async (place) => await driver.join!(place)));
  };
  const begun = places.length ? begin() : undefined;
  begun?.catch(report);
  return {
    begun,
    end() {
      for (const place of places) (async () => await driver.leave?.(place))().catch(report);
    },
  };
}

/** Sends a message that is authenticated with the key. Resolves when the driver has it. */
type Send = (to: string, key: CryptoKey, head: Head, body?: Bytes) => Promise<unknown>;

/** Work of the same name is done one after the other, as it came: signing and sealing take their time. */
class Lines {
  readonly #last: Map<string, Promise<void>> = new Map();

  isBusy(name: string): boolean {
    return this.#last.has(name);
  }

  /** The end of each. */
  get all(): Promise<void>[] {
    return [...this.#last.values()];
  }

  async run(name: string, work: () => Promise<void>): Promise<void> {
    const before = this.#last.get(name) ?? Promise.resolve();
    const mine = before.then(work, work);
    this.#last.set(name, mine);
    try {
      await mine;
    } finally {
      if (this.#last.get(name) === mine) this.#last.delete(name);
    }
  }
}

/** A search for a session whose instance is gone. */
interface Search {
  readonly key: CryptoKey;
  /** When all were asked. */
  readonly begun: number;
  readonly where: Promise<string | undefined>;
  readonly settle: (owner?: string) => void;
}

/**
 * A session can have left an instance that is frozen since, or gone: all are asked, and who has it
 * says so.
 */
class Searches {
  readonly #ask: (key: CryptoKey, id: string, session: string, isAgain?: boolean) => void;
  /** How long an instance has to answer before all are asked, at least and most, and all have then; in ms. */
  readonly #soonest: number;
  readonly #latest: number;
  readonly #patience: number;
  /** What answers take, in ms: one that is quicker tells it, and slower ones do together. */
  #usual = 0;
  readonly #waits: Set<() => void> = new Set();
  /** What has been found stays for a while, for the requests that follow. */
  readonly #bySession: Map<string, Search> = new Map();
  readonly #byId: Map<string, Search> = new Map();
  #ended = false;

  constructor(
    timeout: number,
    ask: (key: CryptoKey, id: string, session: string, isAgain?: boolean) => void,
  ) {
    this.#latest = timeout / 2;
    this.#soonest = Math.min(WHERE_AFTER, this.#latest);
    this.#patience = Math.min(DOUBT, timeout);
    this.#ask = ask;
  }

  /**
   * An instance was asked for the session: returns what is to be called when it is over, and whether
   * that one has answered. Until then all are asked, twice as late each time, since the session may
   * be on its way; later still where answers take long: "a slow backplane would only be slower if all
   * were asked."
   */
  begin(
    idOf: () => string | undefined,
    session: string,
    key: CryptoKey,
  ): (isAnswer?: boolean) => void {
    const start = clock();
    let timer: ReturnType<typeof setTimeout>;
    const wait = (time: number) => {
      timer = setTimeout(() => {
        const id = idOf();
        if (id) this.#ask(key, id, session);
        wait(2 * time);
      }, time);
    };
    wait(Math.max(this.#soonest, Math.min(MANY_TIMES * this.#usual, this.#latest)));
    const stop = () => {
      clearTimeout(timer);
      this.#waits.delete(stop);
    };
    this.#waits.add(stop);
    if (this.#ended) stop();
    return (isAnswer) => {
      stop();
      if (isAnswer) this.#usual = Math.min(clock() - start, 4 * this.#usual + 10);
    };
  }

  /** The instance that has the session, or undefined if none says so in time. */
  async find(session: string, key: CryptoKey): Promise<string | undefined> {
    const known = this.#bySession.get(session);
    if (known || this.#ended) return await known?.where;
    if (this.#bySession.size >= MAX_RELAYS) throw new Error("Too many sessions are looked for");
    const id = hex(crypto.getRandomValues(new Uint8Array(ID_SIZE)));
    let resolve!: (owner?: string) => void;
    const where = new Promise<string | undefined>((settle) => resolve = settle);
    // It may have gone from who was not asked yet to who had answered, or the question got lost.
    const again = setTimeout(() => this.#ask(key, id, session, true), this.#patience / 2);
    const forget = () => {
      clearTimeout(timer);
      clearTimeout(again);
      this.#bySession.delete(session);
      this.#byId.delete(id);
      this.#waits.delete(end);
    };
    const end = () => {
      forget();
      resolve();
    };
    const settle = (owner?: string) => {
      resolve(owner);
      clearTimeout(timer);
      clearTimeout(again);
      timer = setTimeout(forget, this.#patience);
    };
    let timer = setTimeout(settle, this.#patience);
    this.#waits.add(end);
    const search = { key, begun: clock(), where, settle };
    this.#bySession.set(session, search);
    this.#byId.set(id, search);
    this.#ask(key, id, session);
    return await where;
  }

  /** When all were asked for the session, if that tells anything still. */
  begunAt(session: string): number {
    return this.#bySession.get(session)?.begun ?? -Infinity;
  }

  /** The search that an answer is for. */
  get(id: string): Search | undefined {
    return this.#byId.get(id);
  }

  end(): void {
    this.#ended = true;
    for (const stop of this.#waits) stop();
  }
}

/** Takes a session into service. */
type Take = (packed: Packed, missed: SyncMessage[]) => void;

/** The length of a JSON head, the head, and the frames of the log one after the other. */
function encodePacked({ frames, ...rest }: Pick<Packed, "frames">): Bytes {
  const sizes = frames.map((frame) => frame.length);
  const head = encoder.encode(JSON.stringify({ ...rest, sizes }));
  return concat([uint32(head.length), head, ...frames]);
}

/** All but the log: that is copied, and may be large. */
function headOf(bytes: Bytes): Omit<Packed, "frames"> & { sizes: number[]; end: number } {
  const end = 4 + new DataView(bytes.buffer, bytes.byteOffset).getUint32(0);
  return { ...JSON.parse(decoder.decode(bytes.subarray(4, end))), end };
}

function decodePacked(bytes: Bytes): Packed {
  const { sizes, end, ...rest } = headOf(bytes);
  let at = end;
  const frames = sizes.map((size) => bytes.slice(at, at += size));
  return { ...rest, frames };
}

// --- Presence: which instances are there ---

/** What is known of another instance. */
interface Other {
  /** Undefined: it has told none. Empty: two have claimed to be it. */
  commitment: string | undefined;
  /** How long it is silent, in ms, by ticks. */
  age: number;
  /** When it was heard last. */
  at: number;
  left: boolean;
  /** It has been asked something since it was heard last. */
  asked: boolean;
}

/** How an instance speaks of itself. */
interface Voice {
  /** The backplane takes an instance's words to those alone whom they concern. */
  readonly addresses: boolean;
  /** How much has been heard, its own words too; undefined: nobody knows. */
  heard(): number | undefined;
  /** Nothing is heard any more. */
  deaf(): void;
  tell(to: string, head: Head): void;
}

/**
 * "An instance that has sessions says so every 5 s", to all; or, where one can be addressed, who is
 * asked and silent is asked for a sign. It commits to a secret, which its farewell reveals, so that
 * nobody else can say it.
 */
class Presence {
  readonly #instance: string;
  readonly #voice: Voice;
  readonly #secret: string = hex(crypto.getRandomValues(new Uint8Array(ID_SIZE)));
  readonly #others: Map<string, Other> = new Map();
  /** Those that were told the commitment, each by itself. */
  readonly #told: Set<string> = new Set();
  /** How long this instance has been listening, and has not said that it is there. By ticks. */
  #age = 0;
  #silence = PRESENCE_PERIOD;
  /** Told of the next sign. */
  #signed = () => {};
  /** When all were asked for one. */
  #asked = -Infinity;
  /** What had been heard when something was said that comes back, and when that was. */
  #before: number | undefined;
  #since = 0;
  readonly #patience: number;
  /** How long it has not come back, nor anything else, in ms, by ticks. */
  #deaf = 0;
  /** What had been heard at the last tick, and for how long that has been all, in ms. */
  #heard: number | undefined;
  #quiet = 0;

  constructor(instance: string, timeout: number, voice: Voice) {
    this.#instance = instance;
    this.#voice = voice;
    this.#patience = Math.min(DOUBT, timeout) / 2;
  }

  /** Something is said that comes back to this instance too, if it hears. */
  said(): void {
    if (this.#isUnheard) return;
    this.#before = this.#voice.heard();
    this.#since = clock();
  }

  get #isUnheard(): boolean {
    return this.#before !== undefined && this.#before === this.#voice.heard();
  }

  /** This instance may be deaf: then the silence of others says nothing. */
  get doubts(): boolean {
    return this.#isUnheard && clock() - this.#since >= this.#patience;
  }

  /** It has been so for longer. */
  get isDeaf(): boolean {
    return this.#deaf > DOUBT;
  }

  /** Whether the instance has left, or is silent for so long that it must have died. */
  isGone(instance: string): boolean {
    if (instance === this.#instance) return false;
    if (instance === STORE) return true;
    const other = this.#others.get(instance);
    if (other) return other.left || other.age >= GONE && !this.doubts;
    return !this.#voice.addresses && this.#age >= GONE;
  }

  /** Whether the instance has said farewell. */
  hasLeft(instance: string): boolean {
    return !!this.#others.get(instance)?.left;
  }

  /** How many others are there. */
  get size(): number {
    let size = 0;
    for (const instance of this.#others.keys()) if (!this.isGone(instance)) size++;
    return size;
  }

  /** Whether somebody is asked, and has not answered. */
  get waits(): boolean {
    return this.#isUnheard || [...this.#others.values()].some(({ asked }) => asked);
  }

  /** Anything that is authentic shows that its instance is there. */
  heard(instance: string): void {
    const other = this.#others.get(instance);
    if (other) Object.assign(other, { age: 0, at: clock(), asked: false });
  }

  /** All are to give a sign, if they were not asked for one since: anybody can have a session looked for. */
  ask(since: number): void {
    if (this.#asked >= since) return;
    this.#asked = clock();
    for (const [instance, other] of this.#others) other.asked ||= !this.isGone(instance);
    this.#voice.tell(ALL, { kind: "hello", from: this.#instance });
  }

  /** Whether one that may be there has given none since: it may be frozen, and have what nobody has. */
  isUnsure(since: number): boolean {
    return [...this.#others].some(([instance, { at }]) => at < since && !this.isGone(instance));
  }

  /** The instance is to answer. */
  asked(instance: string): void {
    if (this.#voice.addresses && instance !== this.#instance) this.#know(instance).asked = true;
  }

  #know(instance: string): Other {
    let other = this.#others.get(instance);
    if (!other) {
      if (this.#others.size >= MAX_INSTANCES) {
        this.#others.delete(this.#others.keys().next().value!);
      }
      other = { commitment: undefined, age: 0, at: clock(), left: false, asked: false };
      this.#others.set(instance, other);
    }
    return other;
  }

  hear(instance: string, commitment: string): void {
    this.#signed();
    // "A sign shows that its instance is there, and nothing else": nobody has authenticated it.
    if (this.#voice.addresses) return this.heard(instance);
    this.commit(instance, commitment);
  }

  commit(instance: string, commitment: string): void {
    const other = this.#know(instance);
    this.heard(instance);
    other.commitment ??= commitment;
    if (other.commitment === commitment) return;
    // "Where two claim to be the same, neither's farewell is believed", nor is one that was.
    other.commitment = "";
    other.left = false;
  }

  async farewell(instance: string, secret: string): Promise<void> {
    // "An instance that hears its own farewell contradicts": somebody has claimed its name before it.
    if (instance === this.#instance && this.#silence > 0) this.#tell();
    const commitment = await commitmentOf(secret);
    const other = this.#others.get(instance);
    if (other?.commitment === commitment) other.left = true;
  }

  /** `holding`: this instance has sessions; `stuck`: its backplane takes nothing. */
  tick(period: number, holding: boolean, stuck: boolean): void {
    if (stuck) return void (this.#deaf = 0); // nobody could be heard, nor this instance
    this.#age += period;
    this.#silence += period;
    this.#listen(period, holding);
    for (const [instance, other] of this.#others) {
      if (this.#voice.addresses && !other.asked) continue;
      const periods = Math.floor(other.age / PRESENCE_PERIOD);
      other.age = this.isDeaf ? 0 : other.age + period;
      if (!this.#voice.addresses) {
        if (this.isGone(instance)) other.asked = false; // nobody waits for it any more
        continue;
      }
      // "Whoever is gone is asked anew after a minute."
      if (other.age > GONE + PRUNE_PERIOD) this.#others.delete(instance);
      else if (Math.floor(other.age / PRESENCE_PERIOD) > periods) {
        this.#voice.tell(instance, { kind: "hello", from: this.#instance });
        if (!this.#isUnheard) this.#sayToItself(); // is it the other one that is silent?
      }
    }
    if (!this.#voice.addresses && holding && this.#silence >= PRESENCE_PERIOD) this.#tell();
  }

  #listen(period: number, holding: boolean): void {
    const wasDeaf = this.isDeaf;
    const heard = this.#voice.heard();
    this.#deaf = this.doubts ? this.#deaf + period : 0;
    this.#quiet = heard === this.#heard ? this.#quiet + period : 0;
    this.#heard = heard;
    // Who has asked nobody misses what is published all the same.
    const isQuiet = holding && this.#quiet >= PRESENCE_PERIOD && !this.#isUnheard;
    if (this.#deaf || isQuiet) this.#sayToItself(); // while it is deaf, until it hears again
    if (!this.isDeaf) return;
    if (!wasDeaf) this.#voice.deaf();
    // Whoever asks it in vain would take it for gone.
    if (this.#silence >= PRESENCE_PERIOD) this.#tell();
  }

  #sayToItself(): void {
    if (this.#voice.heard() === undefined) return;
    this.said();
    this.#voice.tell(this.#instance, { kind: "hello", from: this.#instance });
  }

  /** "A sign", to who has asked for it; or to all who may have, once a tick. */
  async greet(to: string): Promise<void> {
    if (to === this.#instance) return;
    if (this.#voice.addresses) this.#voice.tell(to, await this.#present());
    else if (this.#silence > 0) this.#tell();
  }

  /** "Where nobody says so within 300 ms" there is no other instance. */
  async isAlone(timeout: number): Promise<boolean> {
    if (this.size) return false;
    const sign = new Promise<void>((resolve) => this.#signed = resolve);
    this.#voice.tell(ALL, { kind: "hello", from: this.#instance });
    return !await within(sign, Math.min(WHERE_AFTER, timeout));
  }

  /** The commitment, for an instance that has not been told it. */
  async introduce(to: string): Promise<string | undefined> {
    if (!this.#voice.addresses || this.#told.has(to) || this.#told.size >= MAX_INSTANCES) return;
    this.#told.add(to);
    return await commitmentOf(this.#secret);
  }

  #tell(): void {
    this.#silence = 0;
    this.#present().then((head) => this.#voice.tell(ALL, head));
  }

  async #present(): Promise<Head> {
    const commitment = await commitmentOf(this.#secret);
    return { kind: "present", instance: this.#instance, commitment };
  }

  /** To those who know this instance; who never heard of it need no farewell. */
  leave(): void {
    const head: Head = { kind: "bye", instance: this.#instance, secret: this.#secret };
    if (!this.#voice.addresses) return this.#voice.tell(ALL, head);
    for (const to of this.#told) this.#voice.tell(to, head);
  }
}

async function commitmentOf(secret: string): Promise<string> {
  return hex(await digest(`duplex-sse presence ${secret}`));
}

// --- Names and keys of sessions ---

interface Known {
  readonly token: string;
  key?: Promise<CryptoKey>;
  /** Its session has gone; the name stays a while, so that 404 can be said with authority. */
  gone?: boolean;
}

/** This instance's sessions by the names that they have on the bus. */
class Names {
  readonly #has: (token: string) => boolean;
  readonly #known: Map<string, Known> = new Map();
  readonly #naming: Set<Promise<void>> = new Set();
  #pruned: number = clock();

  constructor(has: (token: string) => boolean) {
    this.#has = has;
  }

  own(token: string): void {
    const naming: Promise<void> = nameOf(token).then((name) => {
      this.#known.set(name, { token });
      this.#naming.delete(naming);
    });
    this.#naming.add(naming);
    if (clock() - this.#pruned > PRUNE_PERIOD) this.#prune();
  }

  /** The token of a session that has its name already. */
  tokenOf(name: string): string | undefined {
    return this.#known.get(name)?.token;
  }

  async find(name: string): Promise<Known | undefined> {
    if (!this.#known.has(name)) await Promise.all(this.#naming);
    return this.#known.get(name);
  }

  #prune(): void {
    this.#pruned = clock();
    for (const [name, known] of this.#known) {
      if (this.#has(known.token)) continue;
      if (known.gone) this.#known.delete(name);
      known.gone = true;
    }
  }
}

async function digest(text: string): Promise<Bytes> {
  return new Uint8Array(await crypto.subtle.digest("SHA-256", encoder.encode(text)));
}

/** The half of a token that each answer to a resumption renews, where there is a store. */
function markOf(token: string): string {
  return token.slice(0, token.indexOf("."));
}

/** The half of a token that stays the same wherever the session is. */
function secretOf(token: string): string {
  return token.slice(token.indexOf(".") + 1);
}

/** "A session's name is the first 16 bytes, in hex, of SHA-256." */
async function nameOf(token: string): Promise<string> {
  return hex((await digest(`duplex-sse name ${secretOf(token)}`)).subarray(0, 16));
}

async function keyOf(token: string): Promise<CryptoKey> {
  const key = await digest(`duplex-sse key ${secretOf(token)}`);
  const algorithm = { name: "HMAC", hash: "SHA-256" };
  return await crypto.subtle.importKey("raw", key, algorithm, false, ["sign", "verify"]);
}

async function sealOf(token: string): Promise<CryptoKey> {
  const key = await digest(`duplex-sse seal ${secretOf(token)}`);
  return await crypto.subtle.importKey("raw", key, "AES-GCM", false, ["encrypt", "decrypt"]);
}

/** "A session travels sealed": AES-GCM, behind its nonce. */
async function seal(token: string, bytes: Bytes): Promise<Bytes> {
  const iv = crypto.getRandomValues(new Uint8Array(IV_SIZE));
  const sealed = await crypto.subtle.encrypt({ name: "AES-GCM", iv }, await sealOf(token), bytes);
  return concat([iv, new Uint8Array(sealed)]);
}

async function unseal(token: string, sealed: Bytes): Promise<Bytes> {
  const iv = sealed.subarray(0, IV_SIZE);
  const bytes = sealed.subarray(IV_SIZE);
  const key = await sealOf(token);
  return new Uint8Array(await crypto.subtle.decrypt({ name: "AES-GCM", iv }, key, bytes));
}

async function authenticate(key: CryptoKey, { mac, signed }: Incoming): Promise<void> {
  if (await crypto.subtle.verify("HMAC", key, mac, signed)) return;
  throw new Error("A forged message on the backplane");
}

// --- The subscription, without which no answer would be heard ---

/** Subscribes to the driver, again and again until that stands; requests wait for it. */
class Subscription {
  readonly #driver: ClusterDriver;
  readonly #instance: string;
  readonly #report: Report;
  readonly #receive: (message: SyncMessage) => void;
  #state: "failing" | "standing" | "ended" = "failing";
  /** Until the next attempt. */
  #retry: ReturnType<typeof setTimeout> | undefined;
  /** Requests that wait, by the ids of their relays. */
  readonly #waiting: Map<string, { size: number; go: () => void }> = new Map();
  #waitingBytes = 0;

  constructor(
    driver: ClusterDriver,
    instance: string,
    report: Report,
    receive: (message: SyncMessage) => void,
  ) {
    this.#driver = driver;
    this.#instance = instance;
    this.#report = report;
    this.#receive = receive;
  }

  /** A backplane that is down at the start would else leave this instance deaf for good. */
  async begin(pause: number = RETRY_PERIOD): Promise<void> {
    let failed = false; // the driver may have left a listener of this attempt, too
    try {
      await this.#driver.subscribe((message) => failed || this.#receive(message));
      if (this.#state === "ended") return;
      // What is meant for this instance, or for all, is published to topics, too.
      const topics = [this.#instance, ALL];
      await Promise.all(
        topics.map((topic) => this.#driver.join?.({ namespace: NAMESPACE, topic })),
      );
      if (this.#state === "failing") this.#state = "standing";
      for (const { go } of this.#waiting.values()) go();
      this.#waiting.clear();
      this.#waitingBytes = 0;
    } catch (error) {
      failed = true;
      this.#report({ stage: "subscribe" }, error);
      if (this.#state === "ended") return;
      const longer = Math.min(2 * pause, MAX_RETRY_PERIOD);
      this.#retry = setTimeout(() => this.begin(longer), pause);
      (this.#retry as { unref?(): void }).unref?.(); // where timers can do so
    }
  }

  /** Goes on once the subscription stands. False: too much waits already. */
  await(id: string, size: number, go: () => void): boolean {
    if (this.#state === "standing") {
      go();
      return true;
    }
    if (this.#waitingBytes >= MAX_PENDING_BYTES) return false;
    this.#waiting.set(id, { size, go });
    this.#waitingBytes += size;
    return true;
  }

  get stands(): boolean {
    return this.#state === "standing";
  }

  leave(id: string): void {
    this.#waitingBytes -= this.#waiting.get(id)?.size ?? 0;
    this.#waiting.delete(id);
  }

  end(): void {
    this.#state = "ended";
    clearTimeout(this.#retry);
  }
}

// --- The bus: messages of any size over payloads of a limited one ---

interface Assembly {
  /** By index, as they come: what a fragment says of the others costs nothing. */
  readonly pieces: Map<number, Bytes>;
  readonly count: number;
  size: number;
  readonly expires: number;
}

class Bus {
  readonly #driver: ClusterDriver;
  readonly #maxPayload: number;
  readonly #timeout: number;
  /** Bytes of a message that a fragment carries. */
  readonly #capacity: number;
  readonly #assemblies: Map<string, Assembly> = new Map();
  #assembled = 0;
  #maxMessage = MAX_MESSAGE;
  /** Goes on by ticks. */
  #time = 0;
  #pending = 0;
  #pendingBytes = 0;
  /** The last publish was refused; and how long those that are pending have seen none settled. */
  #failing = false;
  #stalled = 0;
  /** Streams' messages, until less is pending. */
  readonly #waiting: (() => void)[] = [];
  #isOver = false;

  constructor(driver: ClusterDriver, maxPayload: number, timeout: number) {
    this.#driver = driver;
    this.#maxPayload = maxPayload;
    this.#timeout = timeout;
    const around = envelope({ namespace: NAMESPACE, topic: "0".repeat(16), data: EMPTY });
    this.#capacity = Math.floor((maxPayload - around) / 4) * 3 - FRAGMENT_HEADER;
  }

  /** Makes room for messages of so many bytes. */
  take(size: number): void {
    this.#maxMessage = Math.max(this.#maxMessage, size);
  }

  /** Publishes that the driver has not settled, and their bytes. */
  get pending(): number {
    return this.#pending;
  }

  get pendingBytes(): number {
    return this.#pendingBytes;
  }

  /** "1024 publishes or 32 MiB that the driver has not settled." */
  get behind(): boolean {
    return this.#pending >= MAX_PENDING || this.#pendingBytes >= MAX_PENDING_BYTES;
  }

  /** Half of that is for what somebody vouches for. */
  get busy(): boolean {
    return this.#pending >= MAX_PENDING / 2;
  }

  /** The driver fails, or settles nothing for a second. */
  get stuck(): boolean {
    return this.#failing || this.#stalled > DOUBT;
  }

  get assembling(): boolean {
    return this.#assemblies.size > 0;
  }

  /** Whether a publication can go as crossws would send it. */
  carries(message: SyncMessage): boolean {
    const { namespace, topic, data } = message;
    const most = 6 * (namespace.length + topic.length + data.length); // "\u0000" for each
    return most + 256 < this.#maxPayload || envelope(message) < this.#maxPayload;
  }

  async publish(message: SyncMessage): Promise<void> {
    if (this.behind) throw new Error("The backplane is behind: a publication was dropped");
    await this.#put(ALL, message);
  }

  /** To those who have joined the place, where a driver knows that; or to all. */
  async publishParts(bytes: Bytes, place?: SyncPlace): Promise<void> {
    await this.send(ALL, bytes, undefined, place);
  }

  /** In as many fragments as it takes. While too much is pending it throws, once it `waits` no more. */
  async send(to: string, bytes: Bytes, waits?: () => boolean, place?: SyncPlace): Promise<void> {
    if (bytes.length > this.#maxMessage) throw new RangeError("Too large for the backplane");
    while (this.behind) {
      if (this.#isOver || !waits?.()) throw new Error("The backplane is behind");
      await new Promise<void>((resolve) => this.#waiting.push(resolve));
    }
    const count = Math.ceil(bytes.length / this.#capacity);
    const id = crypto.getRandomValues(new Uint8Array(ID_SIZE));
    const sending: Promise<void>[] = [];
    for (let index = 0; index < count; index++) {
      const begin = index * this.#capacity;
      const data = concat([
        Uint8Array.of(VERSION),
        id,
        uint32(index),
        uint32(count),
        bytes.subarray(begin, begin + this.#capacity),
      ]);
      sending.push(this.#put(to, { namespace: NAMESPACE, topic: to, data }, place));
    }
    await Promise.all(sending);
  }

  async #put(to: string, message: SyncMessage, place: SyncPlace = message): Promise<void> {
    const size = message.data.length;
    this.#pending++;
    this.#pendingBytes += size;
    try {
      if (to !== ALL && this.#driver.send) await this.#driver.send(to, message);
      else await this.#driver.publish(message, place);
      this.#failing = false;
      this.#stalled = 0;
    } catch (error) {
      this.#failing = true;
      throw error;
    } finally {
      this.#pending--;
      this.#pendingBytes -= size;
      if (!this.behind) this.#waiting.shift()?.();
    }
  }

  /** The whole message, with its last fragment. */
  assemble({ data }: SyncMessage): Bytes | undefined {
    if (typeof data === "string" || data.length < FRAGMENT_HEADER) {
      throw new Error("Garbage on the backplane");
    }
    if (data[0] !== VERSION) throw new Error(`Version ${data[0]} on the backplane`);
    const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
    const index = view.getUint32(1 + ID_SIZE);
    const count = view.getUint32(1 + ID_SIZE + 4);
    const piece: Bytes = new Uint8Array(data.subarray(FRAGMENT_HEADER)); // Buffer's slice is no copy
    if (count === 1 && index === 0) return piece;
    if (index >= count || count * 256 > this.#maxMessage) {
      throw new Error("Garbage on the backplane");
    }
    const id = hex(data.subarray(1, 1 + ID_SIZE));
    let assembly = this.#assemblies.get(id);
    if (!assembly) {
      const expires = this.#time + this.#timeout;
      assembly = { pieces: new Map(), count, size: 0, expires };
      this.#assemblies.set(id, assembly);
    }
    const { pieces } = assembly;
    if (assembly.count !== count || pieces.has(index)) return;
    pieces.set(index, piece);
    assembly.size += piece.length;
    this.#assembled += piece.length + PIECE_COST;
    const complete = pieces.size === count;
    if (complete || assembly.size > this.#maxMessage) this.#discard(id, assembly);
    for (const [id, oldest] of this.#assemblies) {
      if (this.#assembled <= 4 * this.#maxMessage) break;
      this.#discard(id, oldest);
    }
    if (!complete) return;
    return concat(Array.from({ length: count }, (_, index) => pieces.get(index)!));
  }

  #discard(id: string, { size, pieces }: Assembly): void {
    if (this.#assemblies.delete(id)) this.#assembled -= size + PIECE_COST * pieces.size;
  }

  /** Forgets what stayed incomplete, and has those who wait look whether they are to. */
  tick(period: number): void {
    this.#time += period;
    this.#stalled = this.#pending ? this.#stalled + period : 0;
    this.look();
    for (const [id, assembly] of this.#assemblies) {
      if (this.#time <= assembly.expires) break;
      this.#discard(id, assembly);
    }
  }

  look(): void {
    for (const look of this.#waiting.splice(0)) look();
  }

  /** No tick comes any more. */
  end(): void {
    this.#isOver = true;
    this.look();
  }
}

/** The size of what crossws's drivers make of a message. */
function envelope({ namespace, topic, data }: SyncMessage): number {
  const binary = typeof data !== "string";
  const text = JSON.stringify({ namespace, topic, binary, data: binary ? "" : data });
  return encoder.encode(text).length + (binary ? 4 * Math.ceil(data.length / 3) : 0) +
    `{"id":"0123456789abcdef","msg":}`.length + ENVELOPE_SLACK;
}

// --- Messages as bytes ---

/** With room for the authentication code in front. */
function encodeMessage(head: Head, body: Bytes = EMPTY): Bytes {
  const text = encoder.encode(JSON.stringify(head));
  return concat([new Uint8Array(MAC_SIZE), uint32(text.length), text, body]);
}

function encodePublication(message: SyncMessage, from: string, n: number | undefined): Bytes {
  const { namespace, topic, data } = message;
  const binary = typeof data !== "string";
  const head: Head = { kind: "publication", namespace, topic, binary, ...n && { from, n } };
  return encodeMessage(head, binary ? data as Bytes : encoder.encode(data));
}

function decodeMessage(whole: Bytes): Incoming {
  const length = whole.length < MESSAGE_HEADER
    ? Infinity
    : new DataView(whole.buffer, whole.byteOffset).getUint32(MAC_SIZE);
  if (MESSAGE_HEADER + length > whole.length || length > MAX_HEAD) {
    throw new Error("Garbage on the backplane");
  }
  let head: unknown;
  try {
    head = JSON.parse(decoder.decode(whole.subarray(MESSAGE_HEADER, MESSAGE_HEADER + length)));
  } catch {
    // told below
  }
  if (!isHead(head)) throw new Error("Garbage on the backplane");
  return {
    head,
    body: whole.slice(MESSAGE_HEADER + length),
    mac: whole.subarray(0, MAC_SIZE),
    signed: whole.subarray(MAC_SIZE),
  };
}

/** The types of what is used before the code is verified, and of what it cannot vouch for. */
function isHead(head: unknown): head is Head {
  if (typeof head !== "object" || !head) return false;
  const { kind, namespace, topic, id, from, session, time, n } = head as Record<string, unknown>;
  const { instance, commitment, secret } = head as Record<string, unknown>;
  if (kind === "publication") {
    return typeof namespace === "string" && typeof topic === "string" &&
      (from === undefined || isInstance(from) && Number.isSafeInteger(n));
  }
  if (kind === "present") return isInstance(instance) && isHex(commitment, 64); // it is kept
  if (kind === "hello") return isInstance(from);
  if (kind === "bye") return isInstance(instance) && typeof secret === "string";
  if (!isHex(id, 32)) return false;
  const names = ["request", "where", "adopt", "state", "adopted", "rest", "have", "taken"]
    .includes(kind as string);
  if (names && (typeof session !== "string" || !isInstance(from))) return false;
  return kind !== "request" || typeof time === "number";
}

/** The id of an instance. */
function isInstance(value: unknown): value is string {
  return isHex(value, 16);
}

function isHex(value: unknown, length: number): value is string {
  return typeof value === "string" && value.length === length && !/[^0-9a-f]/.test(value);
}

// --- Requests and responses ---

function routedHeaders(given: Headers): Record<string, string> {
  const headers: Record<string, string> = {};
  for (const name of ROUTED_HEADERS) {
    const value = given.get(name);
    if (value !== null) headers[name] = value;
  }
  return headers;
}

/** The request as its session's instance gets it, and its namespace. */
function routed(
  { method, headers: given, namespace }: RequestHead,
  token: string,
  body: Bytes,
): [Request, string] {
  const isPost = method === "POST";
  const length = isPost && { "content-length": `${body.length}` };
  const headers = { ...given, [TOKEN_HEADER]: token, ...length };
  const init = { method, headers, ...isPost && { body } };
  return [new Request("http://relayed.invalid/", init), namespace];
}

/**
 * The body of a request for another instance's session, which goes on as a whole. It is never
 * cancelled, since hosts that make their own streams may not survive that: what nobody wants any
 * more is read and dropped up to a bound.
 */
class RoutedBody {
  /** The body, or why it is not taken. */
  readonly end: Promise<Bytes | Response>;
  #settle!: (end: Bytes | Response) => void;
  /** Undefined once it is settled. One copy that grows: chunks of a byte would cost a hundred times as much. */
  #buffer: Bytes | undefined = EMPTY;
  #size = 0;
  #dropped = 0;
  /** Bytes that it holds, or held when it was settled. */
  held = 0;
  /** As its sender says: no more need be held. */
  readonly #length: number;

  /** `take` is told how many bytes have come, and how many more are held for them. */
  constructor(
    body: ReadableStream<Uint8Array>,
    length: number,
    take: (size: number, more: number) => void,
  ) {
    this.#length = length;
    this.end = new Promise((resolve) => this.#settle = resolve);
    this.#read(body.getReader(), take);
  }

  refuse(response: Response): void {
    this.#buffer = undefined;
    this.#settle(response);
  }

  async #read(
    reader: ReadableStreamDefaultReader<Uint8Array>,
    take: (size: number, more: number) => void,
  ): Promise<void> {
    try {
      for (let chunk = await reader.read(); !chunk.done; chunk = await reader.read()) {
        if (this.#buffer) {
          const before = this.held;
          this.#append(chunk.value);
          take(this.#size, this.held - before);
        } else if ((this.#dropped += chunk.value.length) > MAX_DROPPED) return;
      }
      // An abort looks like the body's end to some.
      const isShort = this.#size < this.#length && this.#length < Infinity;
      if (isShort) this.refuse(cut());
      else if (this.#buffer) this.#settle(this.#buffer.subarray(0, this.#size));
      this.#buffer = undefined;
    } catch {
      this.refuse(cut());
    }
  }

  #append(chunk: Uint8Array): void {
    let buffer = this.#buffer!;
    const size = this.#size + chunk.length;
    if (size > buffer.length) {
      this.#buffer = new Uint8Array(Math.max(size, Math.min(2 * buffer.length, this.#length)));
      this.#buffer.set(buffer.subarray(0, this.#size));
      buffer = this.#buffer;
    }
    buffer.set(chunk, this.#size);
    this.#size = size;
    this.held = buffer.length;
  }
}

/** All such bodies: they hold so much together, and none stands still for ever. */
class RoutedBodies {
  /** The oldest first. */
  readonly #pending: Set<RoutedBody> = new Set();
  #held = 0;

  async read(request: Request, most: number): Promise<Bytes | Response> {
    const { body, headers, method } = request;
    if (!body || method === "GET") return EMPTY;
    const length = headers.get("content-length");
    const routed = new RoutedBody(body, Number(length ?? Infinity), (size, more) => {
      if (size > most) routed.refuse(refuse(413, "Too large"));
      if (more && (this.#held += more) > MAX_PENDING_BYTES) this.#relieve(routed);
    });
    if (isDuplex(request)) routed.refuse(noStream());
    else if (Number(length) > most) routed.refuse(refuse(413, "Too large"));
    const timer = length === null
      ? setTimeout(() => routed.refuse(noStream()), LENGTHLESS_PATIENCE)
      : setTimeout(
        () => routed.refuse(tooLate()),
        BODY_PATIENCE + Math.min(Number(length), most) / BODY_RATE,
      );
    this.#pending.add(routed);
    try {
      return await routed.end;
    } finally {
      clearTimeout(timer);
      this.#pending.delete(routed);
      this.#held -= routed.held;
    }
  }

  /** Elsewhere they may go at once. */
  end(): void {
    for (const body of this.#pending) body.refuse(shuttingDown());
  }

  /** Those that began first have had their time. */
  #relieve(newest: RoutedBody): void {
    let held = this.#held;
    for (const oldest of this.#pending) {
      if (held <= MAX_PENDING_BYTES) return;
      held -= oldest.held;
      if (oldest !== newest) oldest.refuse(unavailable());
    }
  }
}

/** The body of a duplex request is open for as long as its answer; that of a poll is finite. */
function isDuplex({ headers }: Request): boolean {
  return headers.get("accept") === STREAM_TYPE && !headers.has("x-duplex-poll") &&
    (headers.has("x-duplex-version") ||
      (headers.get("content-type") ?? "").startsWith(UPLINK_TYPE));
}

/** "A body that streams cannot be routed …, is **411**." */
function noStream(): Response {
  return refuse(411, "This instance takes no streaming body for another's session");
}

function cut(): Response {
  return refuse(400, "The body was cut");
}

function tooLate(): Response {
  return refuse(408, "The body is not there");
}

function refuse(status: number, reason: string, headers: Record<string, string> = {}): Response {
  return new Response(`${reason}\n`, {
    status,
    headers: {
      "content-type": "text/plain; charset=utf-8",
      "cache-control": "no-store",
      ...headers,
    },
  });
}

/** Elsewhere it may go at once. */
function shuttingDown(): Response {
  return refuse(503, "Shutting down");
}

function noSession(): Response {
  return refuse(404, "No such session");
}

/** "Without an answer within 5 s the client is told 503 and tries again." */
function unavailable(): Response {
  return refuse(503, "The session's instance does not answer", { "retry-after": "1" });
}

// --- Small things ---

/** At most one report a second of each stage, which tells how many there were. */
function limited(report: Report): Report {
  const stages = new Map<Stage, { since: number; left: number }>();
  return (context, error) => {
    const now = clock();
    const last = stages.get(context.stage);
    if (last && now - last.since < REPORT_PERIOD) return void last.left++;
    stages.set(context.stage, { since: now, left: 0 });
    const reason = error instanceof Error
      ? error
      : new Error("The backplane failed", { cause: error });
    if (!last?.left) report(context, reason);
    else report(context, new Error(`${reason.message} (and ${last.left} more)`, { cause: error }));
  };
}

/** What is known of a message that could not be used; anybody may have written it. */
function contextOf(head: Head): ErrorContext {
  const { from, namespace, topic } = head as unknown as Record<string, unknown>;
  const known = Object.entries({ instance: from, namespace, topic })
    .filter(([, value]) => typeof value === "string");
  return { stage: "delivery", ...Object.fromEntries(known) };
}

/** Whether something is done in time; there is little of that once the signal is aborted. */
async function within(doing: unknown, timeout: number, signal?: AbortSignal): Promise<boolean> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  let hurry!: () => void;
  const late = new Promise<false>((resolve) => {
    const wait = (time: number) => {
      clearTimeout(timer);
      timer = setTimeout(() => resolve(false), time);
    };
    wait(timeout);
    hurry = () => wait(Math.min(timeout, HURRY));
  });
  if (signal?.aborted) hurry();
  signal?.addEventListener("abort", hurry);
  const done = Promise.resolve(doing).then(() => true);
  return await Promise.race([done, late]).finally(() => {
    clearTimeout(timer);
    signal?.removeEventListener("abort", hurry);
  });
}

/** Milliseconds, for what happens here: other than Date.now(), it is never set back. */
function clock(): number {
  return performance.now();
}

function uint32(value: number): Bytes {
  const bytes = new Uint8Array(4);
  new DataView(bytes.buffer).setUint32(0, value);
  return bytes;
}

function hex(bytes: Uint8Array): string {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function concat(parts: Uint8Array[]): Bytes {
  let length = 0;
  for (const part of parts) length += part.length;
  const whole = new Uint8Array(length);
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}
