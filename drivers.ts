/**
 * Backplanes for many instances: each is addressed by itself, and hears only the topics that
 * somebody there has subscribed to, so that an instance is given no more as others are added.
 *
 * For Redis 7 (sharded channels, on ioredis), NATS (subjects, on @nats-io) and PostgreSQL
 * (LISTEN and NOTIFY, on postgres). Clients are handed in, so this file imports none of them, and
 * they stay yours: what configures, watches and ends them is theirs.
 *
 * @example
 * ```ts ignore
 * import { sseAdapter } from "jsr:@duplex/sse/server";
 * import { cluster } from "jsr:@duplex/sse/cluster";
 * import { redis } from "jsr:@duplex/sse/drivers";
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
import type { MaybePromise, SyncDriver, SyncMessage, SyncPlace } from "./server.ts";

export type { MaybePromise, SyncDriver, SyncMessage, SyncPlace } from "./server.ts";

// --- Limits ---

/** Until a channel that could not be joined or left is tried again, in ms. */
const RETRY_PERIOD = 500;
/** How long a backplane has for each step of its end, in ms. */
const END_TIMEOUT = 1_000;
/** NOTIFY takes less than this, in bytes. */
const POSTGRES_PAYLOAD = 8000;
/** A statement does not grow without end while the one before it runs. */
const POSTGRES_BATCH = 200;
/** How long one has, in ms: of a connection that is cut the client may never tell. */
const POSTGRES_TIMEOUT = 10_000;
/** PostgreSQL cuts a longer name of a channel off; the hash behind it takes 12. */
const POSTGRES_CHANNEL = 63 - 12;

// --- Types ---

/** A driver that hears what it has joined, and nothing else. */
export interface TopicDriver extends SyncDriver {
  /** The most that the backplane carries at once, in bytes, if that is less than 1 MiB. */
  readonly maxPayload?: number | undefined;
  /**
   * How many messages it has heard, those that it has published itself too: `cluster` then knows
   * when nothing is heard any more, and takes nobody for gone. Undefined: it does not tell.
   */
  readonly heard?: number | undefined;
  /** Sends to the instances that have joined the place, or to all. */
  publish(message: SyncMessage, place?: SyncPlace): Promise<void>;
  /** Resolves when what is published to the place from now on is heard. */
  join(place: SyncPlace): Promise<void>;
  /** Resolves when the place is no longer heard. */
  leave(place: SyncPlace): Promise<void>;
  /** Leaves all places. */
  close(): Promise<void>;
}

/** Makes a {@link TopicDriver} for the instance with this id. */
export type TopicAdapter = (context: { id: string }) => TopicDriver;

/** Of ioredis, a `Redis` or a `Cluster`: what {@link redis} calls. */
export interface RedisClient extends RedisSubscriber {
  /** `SPUBLISH`. */
  spublish(channel: string, payload: string): Promise<unknown>;
  /** Makes the connection that hears. */
  duplicate(): RedisSubscriber;
}

/** Of ioredis: what {@link redis} calls on the connection that hears. */
export interface RedisSubscriber {
  /** `SSUBSCRIBE`. */
  ssubscribe(channel: string): Promise<unknown>;
  /** `SUNSUBSCRIBE`. */
  sunsubscribe(channel: string): Promise<unknown>;
  /** For `smessage`, `error` and `end`. */
  // deno-lint-ignore no-explicit-any -- other events have other arguments
  on(event: string, listener: (...args: any[]) => void): unknown;
  /** `end` when it does not connect again. */
  readonly status: string;
  /** Ends the connection. */
  disconnect(): void;
}

/** Of @nats-io, a `NatsConnection` of any transport: what {@link nats} calls. */
export interface NatsClient {
  /** Sends to who has subscribed to the subject. */
  publish(subject: string, payload: string): void;
  /** Calls `callback` for what comes on the subject. */
  subscribe(
    subject: string,
    options: { callback: (error: Error | null, message: { string(): string }) => void },
  ): { unsubscribe(): void };
  /** Resolves when the server has had everything so far. */
  flush(): Promise<void>;
}

/** Of postgres, what `postgres()` returns: what {@link pgsql} calls. */
export interface PostgresClient {
  /** `LISTEN`: again by itself when the connection was lost. */
  listen(channel: string, take: (payload: string) => void): Promise<{
    unlisten(): Promise<unknown>;
  }>;
  /** Runs a query with its parameters, until it is cancelled. */
  unsafe(query: string, parameters: string[]): PromiseLike<unknown> & { cancel?(): unknown };
}

/** Options of every driver. */
export interface DriverOptions<Client> {
  /** It is not ended with the server, since it may have other uses. */
  client: Client;
  /** What the names of all channels begin with: servers that share it are one cluster. */
  channel: string;
}

/** What a client does, in terms of channels. */
interface Line {
  /** What is told comes back to who listens, though by another connection, which may be lost alone. */
  readonly echoes: boolean;
  /** Calls `take` for what comes on the channel, once the promise has resolved. */
  listen(channel: string, take: (payload: string) => void): Promise<unknown>;
  unlisten(channel: string): Promise<unknown>;
  tell(channel: string, payload: string): Promise<unknown>;
  close(): MaybePromise<void>;
}

// --- Public surface ---

/**
 * Makes a driver over Redis 7 or later: a sharded channel for each topic, so the nodes of a
 * Redis Cluster share the work.
 *
 * @example
 * ```ts ignore
 * import { Redis } from "npm:ioredis";
 *
 * const sync = cluster(redis({ client: new Redis(), channel: "chat" }));
 * ```
 */
export function redis({ client, channel }: DriverOptions<RedisClient>): TopicAdapter {
  return ({ id }) => new Channels(id, `${channel}:`, new RedisLine(client));
}

/**
 * Makes a driver over NATS: a subject for each topic.
 *
 * @example
 * ```ts ignore
 * import { connect } from "npm:@nats-io/transport-node";
 *
 * const sync = cluster(nats({ client: await connect(), channel: "chat" }));
 * ```
 */
export function nats({ client, channel }: DriverOptions<NatsClient>): TopicAdapter {
  return ({ id }) => new Channels(id, `${channel}.`, new NatsLine(client));
}

/**
 * Makes a driver over PostgreSQL: a channel for each topic. What is published while a statement
 * is on its way goes together in the next one.
 *
 * @throws {RangeError} if the channel is longer than 50 bytes.
 *
 * @example
 * ```ts ignore
 * import postgres from "npm:postgres";
 *
 * const sync = cluster(pgsql({ client: postgres(), channel: "chat" }));
 * ```
 */
export function pgsql({ client, channel }: DriverOptions<PostgresClient>): TopicAdapter {
  const prefix = `${channel}:`;
  if (new TextEncoder().encode(prefix).length > POSTGRES_CHANNEL) {
    throw new RangeError("channel must be at most 50 bytes");
  }
  return ({ id }) => new Channels(id, prefix, new PostgresLine(client), POSTGRES_PAYLOAD);
}

// --- Channels: who hears what ---

/** A channel of the backplane, while somebody wants it or it still has to be left. */
interface Channel {
  /** How many places that are joined are heard on it. */
  wanted: number;
  /** Undefined: that failed, and nobody knows how far it came. */
  stands: boolean | undefined;
  /** It is being joined or left. */
  work: Promise<void> | undefined;
  retry: ReturnType<typeof setTimeout> | undefined;
}

class Channels implements TopicDriver {
  readonly maxPayload: number | undefined;
  readonly #id: string;
  readonly #prefix: string;
  readonly #line: Line;
  readonly #channels: Map<string, Channel> = new Map();
  #heard = 0;
  #deliver: (message: SyncMessage) => void = () => {};
  #closed = false;

  constructor(id: string, prefix: string, line: Line, maxPayload?: number) {
    this.#id = id;
    this.#prefix = prefix;
    this.#line = line;
    this.maxPayload = maxPayload;
  }

  get heard(): number | undefined {
    return this.#line.echoes ? this.#heard : undefined;
  }

  subscribe(deliver: (message: SyncMessage) => void): void {
    this.#deliver = deliver;
  }

  async publish(message: SyncMessage, place: SyncPlace = message): Promise<void> {
    await this.#line.tell(this.#nameOf(place), encodeEnvelope(this.#id, message));
  }

  async join(place: SyncPlace): Promise<void> {
    await Promise.all(this.#namesOf(place).map((name) => this.#want(name, 1)));
  }

  async leave(place: SyncPlace): Promise<void> {
    await Promise.all(this.#namesOf(place).map((name) => this.#want(name, -1)));
  }

  close(): Promise<void> {
    this.#closed = true;
    const leaving = [...this.#channels].map(async ([name, channel]) => {
      clearTimeout(channel.retry);
      await channel.work?.catch(() => {}); // it may just be being joined
      if (channel.stands !== false) await this.#line.unlisten(name);
    });
    // Who stops while the backplane is down must be able to.
    return within(END_TIMEOUT, Promise.allSettled(leaving)).then(() => this.#line.close());
  }

  /** What is published to all namespaces is published to the topic of the empty one. */
  #namesOf({ namespace, topic }: SyncPlace): string[] {
    const places = namespace.startsWith("\0") || !namespace ? [namespace] : [namespace, ""];
    return places.map((namespace) => this.#nameOf({ namespace, topic }));
  }

  #nameOf({ namespace, topic }: SyncPlace): string {
    return this.#prefix + hash(`${namespace}\0${topic}`);
  }

  #want(name: string, more: number): Promise<void> {
    let channel = this.#channels.get(name);
    if (!channel) {
      channel = { wanted: 0, stands: false, work: undefined, retry: undefined };
      this.#channels.set(name, channel);
    }
    channel.wanted += more;
    return this.#settle(name, channel);
  }

  #settle(name: string, channel: Channel): Promise<void> {
    if (channel.work || this.#closed || channel.wanted > 0 === channel.stands) {
      return channel.work ?? Promise.resolve();
    }
    return channel.work = this.#work(name, channel);
  }

  /** Joins or leaves until that is what is wanted, which may change meanwhile. */
  async #work(name: string, channel: Channel): Promise<void> {
    clearTimeout(channel.retry);
    if (!channel.wanted) await undefined; // joined again in this turn it is heard all the time
    try {
      while (channel.wanted > 0 !== channel.stands && !this.#closed) {
        const joins = channel.wanted > 0;
        if (joins) await this.#line.listen(name, (payload) => this.#take(payload));
        else await this.#line.unlisten(name);
        channel.stands = joins;
      }
      if (!channel.wanted) this.#channels.delete(name);
    } catch (error) {
      channel.stands = undefined;
      if (!this.#closed) this.#retry(name, channel);
      throw error;
    } finally {
      channel.work = undefined;
    }
  }

  #retry(name: string, channel: Channel): void {
    channel.retry = setTimeout(() => this.#settle(name, channel).catch(() => {}), RETRY_PERIOD);
    (channel.retry as { unref?(): void }).unref?.(); // where timers can do so
  }

  #take(payload: string): void {
    this.#heard++;
    const envelope = decodeEnvelope(payload);
    if (envelope && envelope.id !== this.#id && !this.#closed) this.#deliver(envelope.message);
  }
}

// --- Clients ---

class RedisLine implements Line {
  readonly echoes = true;
  readonly #client: RedisClient;
  #subscriber: RedisSubscriber | undefined;
  readonly #takes: Map<string, (payload: string) => void> = new Map();

  constructor(client: RedisClient) {
    this.#client = client;
  }

  async listen(channel: string, take: (payload: string) => void): Promise<void> {
    this.#takes.set(channel, take);
    await this.#hearing().ssubscribe(channel);
  }

  async unlisten(channel: string): Promise<void> {
    await this.#hearing().sunsubscribe(channel);
    this.#takes.delete(channel);
  }

  async tell(channel: string, payload: string): Promise<void> {
    await this.#client.spublish(channel, payload);
  }

  async close(): Promise<void> {
    const subscriber = this.#subscriber;
    if (!subscriber || subscriber.status === "end") return;
    const ended = new Promise<void>((resolve) => subscriber.on("end", resolve));
    subscriber.disconnect();
    await within(END_TIMEOUT, ended); // who was about to connect says nothing
  }

  /** The client joins its channels again by itself after each loss of the connection. */
  #hearing(): RedisSubscriber {
    if (this.#subscriber) return this.#subscriber;
    const subscriber = this.#subscriber = this.#client.duplicate();
    subscriber.on("error", () => {}); // the client has them, too
    subscriber.on("smessage", (channel: string, payload: string) => {
      this.#takes.get(channel)?.(payload);
    });
    return subscriber;
  }
}

class NatsLine implements Line {
  /** It has one connection, and a client that is told `noEcho` never hears itself. */
  readonly echoes = false;
  readonly #client: NatsClient;
  readonly #subscriptions: Map<string, { unsubscribe(): void }> = new Map();
  #flush: Promise<void> | undefined;

  constructor(client: NatsClient) {
    this.#client = client;
  }

  async listen(channel: string, take: (payload: string) => void): Promise<void> {
    // The client keeps its subscriptions over a loss of the connection: none is made twice.
    if (!this.#subscriptions.has(channel)) {
      const callback = (error: Error | null, message: { string(): string }) => {
        if (!error) take(message.string());
      };
      this.#subscriptions.set(channel, this.#client.subscribe(channel, { callback }));
    }
    await this.#settled();
  }

  async unlisten(channel: string): Promise<void> {
    this.#subscriptions.get(channel)?.unsubscribe();
    this.#subscriptions.delete(channel);
    await this.#settled();
  }

  async tell(channel: string, payload: string): Promise<void> {
    this.#client.publish(channel, payload);
    await this.#settled(); // else nobody would know how far behind the server is
  }

  close(): void {
    for (const subscription of this.#subscriptions.values()) subscription.unsubscribe();
  }

  /** Resolves when the server has all until now: what is said in one turn is asked for once. */
  #settled(): Promise<void> {
    return this.#flush ??= Promise.resolve().then(() => {
      this.#flush = undefined;
      return this.#client.flush();
    });
  }
}

/** Numbered, since a transaction notifies once of payloads that are the same. */
const NOTIFY = "select pg_notify(m ->> 0, n || ' ' || (m ->> 1)) " +
  "from json_array_elements($1::text::json) with ordinality t(m, n)";

class PostgresLine implements Line {
  readonly echoes = true;
  readonly #client: PostgresClient;
  readonly #listening: Map<string, { unlisten(): Promise<unknown> }> = new Map();
  /** The client keeps each listener that it could not begin with, and begins later: the last one counts. */
  readonly #takes: Map<string, (payload: string) => void> = new Map();
  /** What goes with the next statement, and its end. */
  #next: { messages: [channel: string, payload: string][]; end: Promise<void> } | undefined;
  #last: Promise<unknown> = Promise.resolve();

  constructor(client: PostgresClient) {
    this.#client = client;
  }

  async listen(channel: string, take: (payload: string) => void): Promise<void> {
    const mine = (payload: string) => {
      if (this.#takes.get(channel) === mine) take(payload.slice(payload.indexOf(" ") + 1));
    };
    this.#takes.set(channel, mine);
    this.#listening.set(channel, await this.#client.listen(channel, mine));
  }

  async unlisten(channel: string): Promise<void> {
    this.#takes.delete(channel);
    await this.#listening.get(channel)?.unlisten();
    this.#listening.delete(channel);
  }

  /** One statement at a time: else the connections of a pool would overtake each other. */
  tell(channel: string, payload: string): Promise<void> {
    const full = (this.#next?.messages.length ?? 0) >= POSTGRES_BATCH;
    if (!this.#next || full) this.#begin();
    const next = this.#next!;
    next.messages.push([channel, payload]);
    return next.end;
  }

  #begin(): void {
    const messages: [string, string][] = [];
    const end = this.#last.then(async () => {
      if (this.#next?.messages === messages) this.#next = undefined;
      // As one text: of arrays a client knows only what it has asked the server for.
      const query = this.#client.unsafe(NOTIFY, [JSON.stringify(messages)]);
      // Whatever it waits for, others must not: the next goes by another connection.
      const isDone = await within(POSTGRES_TIMEOUT, query);
      if (isDone) return;
      Promise.resolve(query.cancel?.()).catch(() => {});
      throw new Error("PostgreSQL does not answer");
    });
    this.#next = { messages, end };
    this.#last = end.catch(() => {}); // told to those who wait for it
  }

  close(): void {}
}

/** Waits for something that may never be done. True: it is. */
async function within(time: number, doing: PromiseLike<unknown>): Promise<boolean> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise<false>((resolve) => timer = setTimeout(() => resolve(false), time));
  const done = Promise.resolve(doing).then(() => true);
  return await Promise.race([done, late]).finally(() => clearTimeout(timer));
}

// --- What travels ---

/** crossws's form of a message. */
function encodeEnvelope(id: string, { namespace, topic, data }: SyncMessage): string {
  const binary = typeof data !== "string";
  return JSON.stringify({
    id,
    msg: { namespace, topic, binary, data: binary ? toBase64(data) : data },
  });
}

/** Anybody may have written it. */
function decodeEnvelope(payload: string): { id: string; message: SyncMessage } | undefined {
  try {
    const { id, msg: { namespace, topic, binary, data } } = JSON.parse(payload);
    if (![id, namespace, topic, data].every((value) => typeof value === "string")) return;
    return { id, message: { namespace, topic, data: binary ? fromBase64(data) : data } };
  } catch {
    return;
  }
}

function toBase64(bytes: Uint8Array): string {
  const { toBase64 } = bytes as { toBase64?(): string };
  if (toBase64) return toBase64.call(bytes);
  let text = "";
  for (let at = 0; at < bytes.length; at += 0x2000) {
    text += String.fromCharCode(...bytes.subarray(at, at + 0x2000));
  }
  return btoa(text);
}

function fromBase64(text: string): Uint8Array<ArrayBuffer> {
  const characters = atob(text);
  const bytes = new Uint8Array(characters.length);
  for (let at = 0; at < bytes.length; at++) bytes[at] = characters.charCodeAt(at);
  return bytes;
}

/**
 * 53 bits (cyrb53) of a name that may be long, and have any characters. Two that share a channel
 * are given each other's messages, which say where they belong, and drop them.
 */
function hash(text: string): string {
  let [a, b] = [0xdeadbeef, 0x41c6ce57];
  for (let at = 0; at < text.length; at++) {
    const code = text.charCodeAt(at);
    a = Math.imul(a ^ code, 2654435761);
    b = Math.imul(b ^ code, 1597334677);
  }
  a = Math.imul(a ^ (a >>> 16), 2246822507) ^ Math.imul(b ^ (b >>> 13), 3266489909);
  b = Math.imul(b ^ (b >>> 16), 2246822507) ^ Math.imul(a ^ (a >>> 13), 3266489909);
  return (4294967296 * (2097151 & b) + (a >>> 0)).toString(36);
}
