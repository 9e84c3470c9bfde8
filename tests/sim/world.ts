/**
 * One run: a scenario played by real clients and real servers in virtual time.
 *
 * @module
 */
import type { WebSocketSSE } from "../../client.ts";
import { LossyBus } from "./backplane.ts";
import { Clock, install } from "./clock.ts";
import { diceFor } from "./dice.ts";
import { Client, PUBLICATION, Server, type Session, type Stage, TOPIC } from "./ends.ts";
import { judge, settled, unfinished } from "./judge.ts";
import { Network } from "./network.ts";
import type { Product } from "./product.ts";
import { endOf } from "./faults.ts";
import { type Scenario, type Step, wellAt } from "./scenario.ts";

/** A check that did not hold. */
export interface Violation {
  check: string;
  detail: string;
}

/** What a run came to. */
export interface Outcome {
  scenario: Scenario;
  violations: Violation[];
  /** Excuses taken for a 1006, by name. */
  excuses: string[];
  messages: number;
  requests: number;
  /** Faults that hit something, by name. */
  hits: Map<string, number>;
  events: number;
  /** Virtual time, in ms. */
  lasted: number;
  /** What happened, if it was asked for. */
  trace: string[];
}

/** "Once the network is well, all is delivered within 10 s." */
export const LIVENESS = 10_000;
/** How long a shutdown may take beyond that. */
const QUIET = 5_000;
/**
 * "Of whom nothing was heard for 12 s, by ticks of one's own clock, is gone", which an idle instance
 * begins to count with the first request for it. One that waits for its answer meanwhile takes 5 s, and
 * the next one 1 s more.
 */
const GONE = 18_000;
/** A cluster knows the requests that it served for a minute. */
const FORGOTTEN = 62_000;

/** How long an instance waits for another, in ms. */
const RELAY_TIMEOUT = 5_000;

let runs = 0;

export class World implements Stage {
  readonly scenario: Scenario;
  readonly clock: Clock;
  readonly network: Network;
  readonly clients: Client[] = [];
  readonly servers: Server[] = [];
  readonly start: number;
  readonly violations: Violation[] = [];
  readonly trace: string[] = [];
  readonly excuses: string[] = [];
  readonly #product: Product;
  readonly #tracing: boolean;
  readonly #bus: LossyBus;
  /** What was learned of an origin in another run says nothing in this one. */
  readonly #host = `run${++runs}.test`;
  #published = 0;

  constructor(product: Product, scenario: Scenario, tracing: boolean) {
    this.#product = product;
    this.#tracing = tracing;
    this.scenario = scenario;
    const { seed, traits, faults, instances, backplane } = scenario;
    this.clock = new Clock(1_000_000);
    this.start = this.clock.now;
    this.#bus = new LossyBus(this.clock, diceFor(seed, 4), backplane);
    for (let i = 0; i < instances; i++) this.servers.push(this.#startServer(`server ${i}`));
    this.network = new Network(this.clock, {
      seed,
      traits,
      faults,
      instances: this.servers,
      note: (text) => this.note(text),
      violated: (check, detail) => this.violated(check, detail),
    });
  }

  /** When the network is well for good. */
  get well(): number {
    return this.start + wellAt(this.scenario);
  }

  note(text: string): void {
    if (this.#tracing) this.trace.push(`${(this.clock.now - this.start).toFixed(1)} ${text}`);
  }

  violated(check: string, detail: string): void {
    if (this.violations.some((known) => known.check === check)) return;
    this.violations.push({ check, detail });
    this.note(`!!! ${check}: ${detail}`);
  }

  publish(publisher: Session | undefined, server: Server, data: string): void {
    const name = `${data}.${++this.#published}`;
    this.note(`${server.owner} publishes ${name}`);
    for (const session of server.sessions) {
      if (session !== publisher && session.open) session.publications.push(name);
    }
    if (publisher) publisher.peer.publish(TOPIC, name);
    else server.adapter.publish(TOPIC, name);
  }

  /** The session that a client has, by what it was answered. */
  sessionOf(client: Client): Session | undefined {
    for (const name of this.network.names.get(client.number) ?? []) {
      for (const { names } of this.servers) if (names.has(name)) return names.get(name);
    }
  }

  // --- The run ---

  play(): void {
    const { clock, scenario } = this;
    for (let i = 0; i < scenario.clients; i++) {
      clock.after(i, () => this.#connect(i), `client ${i}`);
    }
    for (const step of scenario.script) {
      clock.at(this.start + step.at, () => this.#do(step), this.#ownerOf(step));
    }
    for (const fault of scenario.faults) {
      if (fault.kind === "kill") {
        clock.at(this.start + fault.at, () => this.#kill(fault.instance, fault.lasts), "world");
      }
    }
    clock.runUntil(this.well + 1);
    clock.runUntil(this.#deadline(), () => this.clients.every((client) => settled(this, client)));
    for (const client of this.clients) {
      const reason = unfinished(this, client);
      if (reason) this.violated("frozen", reason);
    }
    this.#closeAll();
    this.#quiesce();
    for (const error of clock.uncaught) this.violated("uncaught", String(error));
    judge(this);
  }

  /** Whoever is still there says goodbye. */
  #closeAll(): void {
    const { clock, clients } = this;
    for (const client of clients) {
      if (!client.ending) {
        clock.after(0, () => client.close(client.number), `client ${client.number}`);
      }
    }
    const gone = () =>
      clients.every((client) => client.ending) &&
      this.servers.every(({ sessions, killed }) =>
        killed || sessions.every(({ ending }) => ending)
      );
    clock.runUntil(clock.now + LIVENESS, gone);
    if (this.servers.every(({ down }) => down)) return; // what is unsent has the resume timeout
    for (const client of clients) {
      if (!client.ending) this.violated("slow close", `${client} has closed, and not ended`);
    }
  }

  /** Nothing may be left, beyond tombstones and then at all. */
  #quiesce(): void {
    const { clock, servers, scenario: { server } } = this;
    const expired = 2 * (server.resumeTimeout + 1000 * server.idleTimeout) + FORGOTTEN;
    clock.runUntil(clock.now + expired);
    for (const trip of this.network.trips) trip.giveUp();
    clock.runUntil(clock.now + QUIET);
    this.#checkLeft();
    for (const owner of clock.pending()) this.violated("left: timer", `of ${owner}`);
    for (const { owner, adapter, killed } of servers) {
      if (adapter.peers.size && !killed) this.violated("left: peers", `at ${owner}`);
    }
    for (const server of servers) {
      if (!server.shutdown) clock.after(0, () => void server.shutDown(1001, ""), server.owner);
    }
    clock.runUntil(clock.now + QUIET);
    for (const { owner, shutdown, killed } of servers) {
      if (!killed && shutdown?.done === undefined) this.violated("shutdown hangs", owner);
    }
    for (const owner of clock.pending()) {
      this.violated("left: timer", `of ${owner}, after shutdown`);
    }
  }

  #checkLeft(): void {
    for (const trip of this.network.trips) {
      if (!trip.clientDone) this.violated("left: request", `${trip}`);
      else if (!trip.over) this.violated("left: request", `${trip}, at the server`);
    }
  }

  #deadline(): number {
    const { faults, server, traits, instances, transport, backplane } = this.scenario;
    // As of one that is half-open: a stream of which something has come, and the rest is held.
    let from = Math.max(this.well, this.network.lastRelease + 2.5 * server.heartbeatInterval);
    // "Two timeouts of silence": so long a poll is under way whose end the backplane has lost.
    if (backplane.loss) from = Math.max(from, this.start + backplane.until + 2 * RELAY_TIMEOUT);
    for (const fault of faults) {
      // "The client takes two intervals without a byte for a drop."
      const unnoticed = fault.kind === "half-open" || fault.kind === "lose answer" && fault.silent
        ? 2.5 * server.heartbeatInterval
        : 0;
      from = Math.max(from, this.start + fault.at + unnoticed);
      // A poll has nothing to say for a whole interval: it may as well be lost.
      const isPoll = transport === "poll" && (fault.kind === "stall" || fault.kind === "silence");
      if (isPoll) from = Math.max(from, this.start + endOf(fault) + 2.5 * server.heartbeatInterval);
      if (fault.kind === "kill" && instances > 1) from = Math.max(from, this.well + GONE);
      // "A POST 6 s, and 1 s more for every 8 KiB": in silence, a slow line and none are alike.
      const silent = fault.kind === "silence" || unnoticed > 0;
      if (silent) from = Math.max(from, this.start + endOf(fault) + this.network.largestBody / 8);
    }
    return from + LIVENESS + this.#transferTime(traits.rate) + this.#turns();
  }

  /** On the plain level each message is a request, after the answer to the one before. */
  #turns(): number {
    const { level, script, traits: { latency } } = this.scenario;
    if (level !== "plain") return 0;
    const sent = script.filter((step) => step.do === "client sends");
    return sent.reduce((sum, { count }) => sum + count, 0) * 3 * latency[1];
  }

  /** What is sent takes its time where the network is slow, at worst each way once more. */
  #transferTime(rate: number): number {
    let bytes = 0;
    for (const { count, most } of this.scenario.script) bytes += Math.max(count * most, 1);
    return rate === Infinity ? 0 : 1000 * 4 * bytes / rate;
  }

  // --- Who does what ---

  #ownerOf({ do: what, client }: Step): string {
    if (what.startsWith("client")) return `client ${client}`;
    return "world"; // at the server of the client's session, which is not known yet
  }

  #connect(number: number): void {
    this.clients[number] = new Client(this, number, (_, signal) => this.#socket(number, signal));
  }

  #socket(number: number, signal: AbortSignal): WebSocketSSE {
    const { transport } = this.scenario;
    return new this.#product.WebSocketSSE(`http://${this.#host}/chat?client=${number}`, {
      transport,
      signal,
      fetch: this.network.fetchOf(number),
    });
  }

  #startServer(owner: string): Server {
    const { instances } = this.scenario;
    const sync = instances > 1 ? { sync: this.#product.cluster(this.#bus.adapterOf(owner)) } : {};
    return new Server(this, owner, this.#product, { ...sync, onError: () => {} });
  }

  #do(step: Step): void {
    const { client: number, seed, count, most } = step;
    const client = this.clients[number];
    if (!client) return;
    switch (step.do) {
      case "client sends":
        return client.send(seed, count, most);
      case "client sends too much":
        return client.sendTooMuch();
      case "client aborts":
        return client.abort();
      case "client closes":
        return client.close(seed);
      case "all shut down":
        return this.servers.forEach((server) => this.#shutDown(server));
    }
    const session = this.sessionOf(client);
    if (!session || session.server.killed) return;
    const { server } = session;
    this.clock.after(0, () => {
      switch (step.do) {
        case "server sends":
          return session.sendSome(seed, count, most);
        case "server publishes":
          return this.publish(undefined, server, `${PUBLICATION}server`);
        case "server pings":
          return session.ping();
        case "server fails":
          return session.fail();
        case "server closes":
          return session.close(seed);
        case "server terminates":
          return session.terminate();
        case "instance shuts down":
          return this.#shutDown(server);
      }
    }, server.owner);
  }

  #shutDown(server: Server): void {
    this.clock.after(0, () => void server.shutDown(1012, "restarting"), server.owner);
  }

  #kill(index: number, lasts: number): void {
    const server = this.servers[index];
    if (!server || server.killed || server.shutdown) return;
    this.note(`${server.owner} is killed`);
    this.network.count("kill");
    server.killed = server.down = true;
    this.clock.kill(server.owner);
    this.#bus.leave(server.owner);
    this.network.hangUp(server.owner);
    this.clock.after(lasts, () => {
      this.note("another instance comes in its place");
      this.servers.push(this.#startServer(`server ${this.servers.length}`));
    }, "world");
  }
}

/** Plays a scenario, with nothing real but the product. */
export function run(product: Product, scenario: Scenario, tracing = false): Outcome {
  let world: World | undefined;
  const log: string[] = [];
  const restoreConsole = catchConsole(log);
  let uninstall = () => {};
  const violations: Violation[] = [];
  try {
    world = prepare(product, scenario, tracing, (restore) => uninstall = restore);
    world.play();
  } catch (error) {
    violations.push({ check: "the run failed", detail: String((error as Error).stack ?? error) });
  } finally {
    uninstall();
    restoreConsole();
  }
  // A server that comes in the place of one that was killed hears of sessions that it does not know.
  const killed = world?.servers.some((server) => server.killed);
  // Who is warned that something reads bodies before the server is right where requests are repeated.
  const repeats = !!world?.network.counts.hits.get("repeat");
  const said = log.find((line) => !repeats || !line.includes("took nothing of a whole request"));
  if (said && !killed) violations.push({ check: "console", detail: said });
  return outcomeOf(scenario, world, violations);
}

function prepare(
  product: Product,
  scenario: Scenario,
  tracing: boolean,
  onInstall: (restore: () => void) => void,
): World {
  const world = new World(product, scenario, tracing);
  onInstall(install(world.clock, diceFor(scenario.seed, 5)));
  return world;
}

function catchConsole(log: string[]): () => void {
  const { error, warn } = console;
  const take = (...args: unknown[]) => void log.push(args.map(String).join(" "));
  console.error = console.warn = take;
  return () => Object.assign(console, { error, warn });
}

function outcomeOf(scenario: Scenario, world: World | undefined, more: Violation[]): Outcome {
  const sessions = world?.servers.flatMap((server) => server.sessions) ?? [];
  const received = (ends: { received: unknown[] }[]) =>
    ends.reduce((sum, end) => sum + end.received.length, 0);
  return {
    scenario,
    violations: [...world?.violations ?? [], ...more],
    excuses: world?.excuses ?? [],
    messages: received(world?.clients ?? []) + received(sessions),
    requests: world?.network.counts.requests ?? 0,
    hits: world?.network.counts.hits ?? new Map(),
    events: world?.clock.events ?? 0,
    lasted: world ? world.clock.now - world.start : 0,
    trace: world?.trace ?? [],
  };
}
