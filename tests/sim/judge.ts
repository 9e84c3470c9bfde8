/**
 * What must hold: safety, liveness, agreement. Each excuse for a 1006 has a name and a
 * condition, and is counted.
 *
 * @module
 */
import type { Client, Session } from "./ends.ts";
import { endOf, type Fault } from "./faults.ts";
import { same, show, sizeOf } from "./messages.ts";
import type { World } from "./world.ts";

// --- Liveness ---

/** Whether nothing more is to come for this client: all has arrived, or both ends have ended. */
export function settled(world: World, client: Client): boolean {
  return unfinished(world, client) === undefined;
}

/** What is still to come, where something is. */
export function unfinished(world: World, client: Client): string | undefined {
  const session = world.sessionOf(client);
  if (client.ending) {
    if (!session || session.ending || session.server.killed) return;
    if (client.ending.code === 1006 || client.aborted) return; // how should the server know?
    return `${session} has not ended, though its client has`;
  }
  const isDark = world.servers.every(({ down }) => down); // by whom should it hear?
  // "What was sent before it has the resume timeout to get through."
  if (client.closing) return isDark && client.sent.length ? undefined : `${client} has not closed`;
  if (!client.counts.open && world.network.wasHit(client.number)) return; // it has half a minute
  if (!session) return client.counts.open ? `${client} has no session` : `${client} has not opened`;
  if (isDark && (session.ending || session.server.killed)) return;
  if (session.closing || session.ending) return `${client} has not heard of the end`;
  const up = client.sent.length - session.received.length;
  if (up) return `${up} messages of ${client} have not arrived`;
  const down = session.sent.length - client.received.length;
  if (down > 0) return `${down} messages to ${client} have not arrived`;
  const publications = missing(session.publications, client.publications).length;
  if (publications) return `${publications} publications to ${client} have not arrived`;
  if (session.unsettled) return `${session.unsettled} hooks of ${session} have not settled`;
  if (client.socket.bufferedAmount) return `${client} has a bufferedAmount`;
}

function missing(all: string[], some: string[]): string[] {
  const has = new Set(some);
  return all.filter((name) => !has.has(name));
}

// --- Safety and agreement, when all is over ---

export function judge(world: World): void {
  for (const client of world.clients) judgeClient(world, client);
  const known = new Set(world.clients.map((client) => world.sessionOf(client)));
  for (const session of world.servers.flatMap((server) => server.sessions)) {
    if (!session.ending && !session.server.killed) world.violated("no end", `${session}`);
    if (known.has(session)) continue;
    if (session.received.length) world.violated("orphan", `${session} received something`);
  }
}

function judgeClient(world: World, client: Client): void {
  const session = world.sessionOf(client);
  const { counts, ending } = client;
  if (!ending) return world.violated("no end", `${client}`);
  if (counts.open > 1) world.violated("open twice", `${client}`);
  if (counts.close !== 1) world.violated("close twice", `${client}`);
  if (!session) {
    if (counts.open) world.violated("no session", `${client} opened`);
    if (!excuse(world, client, session)) world.violated("1006", `${client} did not open`);
    return;
  }
  judgeOrder(world, client, session);
  if (world.scenario.level === "full") {
    judgeBounds(world, client, session);
    if (session.shutDown) judgeDelivery(world, client, session);
  }
  judgeEnd(world, client, session);
  // Whose end was excused has been without a connection.
  const isFit = !session.terminated && client.ending!.code !== 1006;
  if (isQuiet(world) && isFit) judgeQuiet(world, client);
}

/** "A prefix of what was sent, in order, undamaged, once." */
function judgeOrder(world: World, client: Client, session: Session): void {
  const up = firstDifference(client.sent, session.received);
  if (up) world.violated("uplink", `${session} has ${up}`);
  const down = firstDifference(session.sent, client.received);
  if (down) world.violated("downlink", `${client} has ${down}`);
  const ours = new Set(session.publications);
  const received = client.publications.filter((name) => ours.has(name));
  if (received.some((name, i) => name !== session.publications[i])) {
    world.violated("publications", `${client} has ${received} of ${session.publications}`);
  }
  const { repeat } = world.scenario.backplane;
  if (!repeat && new Set(client.publications).size < client.publications.length) {
    world.violated("publications", `${client} has one twice: ${client.publications}`);
  }
}

/** "Only a server that shuts down gives its hooks what comes before the client's CLOSE": what it has acknowledged. */
function judgeDelivery(world: World, client: Client, session: Session): void {
  let left = client.socket.bufferedAmount;
  let acknowledged = client.sent.length;
  // An empty message does not show in the amount: it may be one that is not acknowledged.
  for (; acknowledged; acknowledged--) {
    const size = sizeOf(client.sent[acknowledged - 1]!);
    if (size > left) break;
    left -= size;
  }
  const got = session.received.length;
  if (acknowledged <= got) return;
  world.violated("delivery", `${session} has ${got}, of ${acknowledged} acknowledged`);
}

function firstDifference(sent: unknown[], received: unknown[]): string | undefined {
  for (const [i, data] of received.entries()) {
    if (i >= sent.length) return `${show(data)} beyond the ${sent.length} that were sent`;
    if (!same(sent[i], data)) return `${show(data)} in the place ${i + 1} of ${show(sent[i])}`;
  }
}

/** An event stream, a batch, and control frames beside it; and the CLOSE that outlives them. */
const MOST_REQUESTS = 4;

/** "A session's unacknowledged bytes by window and one message." */
function judgeBounds(world: World, client: Client, session: Session): void {
  const { network, scenario: { server } } = world;
  const requests = network.most.get(client.number)!;
  if (requests > MOST_REQUESTS) world.violated("bound", `${client}: ${requests} requests at once`);
  // Acknowledgements, and what a stream begins with, are in no window.
  const control = 40 * (client.sent.length + 10) + 1024;
  const most = Math.max(server.window, server.maxWindow) + session.largestDown + control;
  for (const trip of network.trips) {
    if (trip.client !== client.number || trip.mostDown <= most) continue;
    world.violated("bound", `${trip}: ${trip.mostDown} bytes down, of ${most}`);
  }
}

function judgeEnd(world: World, client: Client, session: Session): void {
  const [here, there] = [client.ending!, session.ending];
  if (session.server.killed || !there) {
    if (here.code !== 1006) return;
    return void (excuse(world, client, session) || world.violated("1006", `${client}`));
  }
  const name = `${client} has ${here.code} "${here.reason}", ` +
    `the server ${there.code} "${there.reason}"`;
  if (here.code === 1006 || there.code === 1006) {
    if (!excuse(world, client, session)) {
      world.violated(here.code === there.code ? "1006" : "codes", name);
    }
    return;
  }
  // A refused message ends its socket, whatever the server was about to say.
  const wasAboutTo = session.closing || there.code === 1013;
  if (client.oversized && here.code === 1009 && wasAboutTo) return;
  if (isOutOfReach(client, session) || isUnheard(world, client, session)) return;
  if (here.code !== there.code || here.reason !== there.reason) world.violated("codes", name);
  if (isOfTheServer(world, client, session)) return;
  if (!here.wasClean && !client.oversized) world.violated("not clean", name);
  judgeComplete(world, client, session);
}

/** The instance that closed it was gone before this client could hear the last word: then its own stands. */
function isOutOfReach({ closing, ending }: Client, { server }: Session): boolean {
  const isOurs = closing?.code === ending!.code && closing.reason === ending!.reason;
  return isOurs && server.shutdown?.done !== undefined && server.shutdown.done < ending!.at;
}

/** Both have closed, and without resumption a stream that died brings no answer: then each has its own. */
function isUnheard({ scenario, network }: World, client: Client, session: Session): boolean {
  return scenario.server.resumeTimeout === 0 && !!client.closing && !!session.closing &&
    network.wasHit(client.number);
}

/** "Close codes of the server's own": where something gave a reason for them. */
function isOfTheServer({ scenario }: World, client: Client, session: Session): boolean {
  const { maxBufferedAmount, maxTotalBufferedAmount } = scenario.server;
  switch (client.ending!.code) {
    case 1009:
      return client.oversized;
    case 1011:
      return !!session.failing;
    case 1013:
      return Math.min(maxBufferedAmount, maxTotalBufferedAmount) <= LITTLE;
    default:
      return false;
  }
}

/** What a few messages fill. */
const LITTLE = 65536;

/** "All of it at a clean close: what was sent before the closer's close." */
function judgeComplete(world: World, client: Client, session: Session): void {
  const { reason, code } = client.ending!;
  const by = (closing: Client["closing"]) => closing?.reason === reason && closing.code === code;
  if (by(session.closing)) {
    const { sent } = session.closing!;
    // "As with a WebSocket whose readyState is CLOSING": it takes nothing any more. Nor does one
    // whose message was too large, which says so.
    const reads = !client.closing && client.ending!.wasClean;
    if (client.received.length < sent && reads) {
      world.violated("incomplete", `${client} has ${client.received.length} of ${sent}`);
    }
  } else if (by(client.closing)) {
    const { sent } = client.closing!;
    if (session.received.length < sent && !session.closing) {
      world.violated("incomplete", `${session} has ${session.received.length} of ${sent}`);
    }
  } else world.violated("codes", `nobody closed with ${code} "${reason}"`);
}

// --- Where nothing goes wrong ---

function isQuiet({ scenario: { faults, backplane, traits, level } }: World): boolean {
  return !faults.length && !backplane.until && level === "full" &&
    traits.streamsUp === "pass" && traits.fullDuplex && !traits.holdsAnswers;
}

function judgeQuiet(world: World, client: Client): void {
  const { drop } = client.counts;
  const { resent, resumes } = client.socket.stats;
  const { instances, script, traits } = world.scenario;
  // There a stream is refused, or too slow to be told from one that is held.
  const isSpread = traits.balance === "random" ||
    script.some(({ do: what }) => what === "instance shuts down"); // its clients go to others then
  const isRouted = instances > 1 && isSpread;
  const isSlow = traits.rate < Infinity;
  const mayLeave = isRouted || isSlow;
  // A server that has had too much takes no more of a batch: the rest goes again until that is heard.
  const isRefused = client.ending?.code === 1013;
  // "Reads the body whole": so long the owner of a session hears nothing of it.
  const isUnheard = isRouted && isSlow;
  if ((drop || resumes) && !isUnheard) {
    world.violated("quiet", `${client} was dropped ${drop} times`);
  }
  if (resent && !mayLeave && !isRefused && !client.oversized) {
    world.violated("quiet", `${client} sent ${resent} again`);
  }
}

// --- Excuses ---

type Excuse = (world: World, client: Client, session: Session | undefined) => boolean;

/** Why a session may have ended with 1006, at either end or at both. */
const EXCUSES: Record<string, Excuse> = {
  /** It was asked for. */
  "terminated": (_, __, session) => !!session?.terminated,
  /** It was asked for at the client, and the server is not told. */
  "aborted": (_, { aborted }) => aborted,
  /** The state of its sessions is gone with an instance. */
  "killed": (_, __, session) => !!session?.server.killed,
  /** As a WebSocket's handshake: what answers it last is final. */
  "not opened": ({ network, servers }, client) =>
    !client.counts.open &&
    (network.wasHit(client.number) || servers.some(({ killed }) => killed)),
  /** "Newcomers get 503." */
  "shut down": ({ servers }, client) =>
    !client.counts.open &&
    servers.some(({ shutdown }) => shutdown && shutdown.at < client.ending!.at),
  /** It never came to an opening. */
  "closed while connecting": (_, client) => !client.counts.open && !!client.closing,
  /** "This wire has no close from the client", and no resumption by one that sends. */
  "plain": ({ scenario }) => scenario.level === "plain",
  /** It closed while nothing came through: for so long a page waits. */
  "closed while away": (world, { closing, ending }) =>
    !!closing && !!ending && isBadFrom(world, closing.at, CLOSE_PATIENCE),
  /** By these options the session is over before its client can miss it. */
  "no time to notice": ({ scenario: { server, faults } }) =>
    server.resumeTimeout < 1.5 * server.heartbeatInterval &&
    faults.some((fault) => !!unnoticed(fault)),
  /** "But for one that closes at that moment, and whose connection (or the backplane …) breaks before it is told." */
  "shut down while closing": ({ network, scenario }, { closing, number, ending }, session) => {
    const { at, done } = session?.server.shutdown ?? {};
    const { backplane, traits } = scenario;
    // From its farewell on, the others say 404 of its sessions, if they are told no better.
    if (backplane.loss > 0) return at !== undefined && at < ending!.at && !!session?.ending;
    // What it was told, and did not know, is lost with the instance.
    const isLost = !!closing &&
      (traits.rate < Infinity || network.wasHit(number) && session?.shutDown);
    return !!isLost && done !== undefined && done < ending!.at;
  },
  /** What the server said last is lost with the only instance that knew it. */
  "lost with its instance": ({ network }, { number, ending }, session) =>
    !!session?.ending && network.wasHit(number) &&
    session.server.shutdown?.done !== undefined && session.server.shutdown.done < ending!.at,
  /** "Of whom nothing was heard for 12 s, by ticks of one's own clock, is gone." */
  "frozen for too long": ({ scenario: { instances, faults } }, _, session) =>
    instances > 1 && !!session &&
    longest(
        faults.filter((fault) => fault.kind === "freeze" && fault.whose === session.server.owner),
      ) >= FROZEN,
  /** Nobody waits for a client that was lost, or asks again where an instance that is down says 503. */
  "no resumption": ({ scenario: { server, traits }, network, servers }, { number }, session) =>
    server.resumeTimeout === 0 &&
    (network.wasHit(number) || servers.length > 1 && servers.some(({ shutdown }) => shutdown) ||
      // Nor is a close's time long enough for what has to come before it.
      traits.rate < Infinity && !!session?.closing),
  /** "Until the resume timeout is over." */
  "away too long": (world) => longest(world.scenario.faults) >= patienceOf(world),
};

/** Counts the excuse that holds, if any does. */
function excuse(world: World, client: Client, session: Session | undefined): boolean {
  const found = Object.entries(EXCUSES).find(([, holds]) => holds(world, client, session));
  if (found) world.excuses.push(found[0]);
  return !!found;
}

/** The longest time without a pause of these, in ms. */
function longest(faults: readonly Fault[]): number {
  let longest = 0;
  let [from, until] = [0, 0];
  for (const fault of [...faults].sort((a, b) => a.at - b.at)) {
    if (fault.at > until) from = fault.at;
    until = Math.max(until, endOf(fault));
    longest = Math.max(longest, until - from);
  }
  return longest;
}

/** "3 s at most"; the last of the requests that come "within 0.4 s each time" needs its answer, too. */
const CLOSE_PATIENCE = 2_400;

/** A request that is given up only with the socket, or not before. */
const UNANSWERED = 2_900;

/** Of an instance in a cluster, in ms: it may have spoken a while before. */
const FROZEN = 7_000;

/** How long an instance waits for the answer of another, which was lost between them, in ms. */
const BACKPLANE_PATIENCE = 5_000;

/** How long a request waits for an answer that does not come. */
function unnoticed(fault: Fault): number {
  const silent = fault.kind === "silence" || fault.kind === "stall" || fault.kind === "half-open" ||
    fault.kind === "lose answer" && fault.silent;
  return silent ? UNANSWERED : 0;
}

/** How long after its end a fault keeps the answer to a request from coming. */
function unanswered(fault: Fault): number {
  return fault.kind === "slow" ? 2 * fault.by : unnoticed(fault);
}

/** Whether something was wrong all this time. */
function isBadFrom(
  { start, scenario: { faults, backplane, traits } }: World,
  from: number,
  ms: number,
): boolean {
  let until = from - start + 4 * traits.latency[1]; // what it sent before is still under way
  if (backplane.loss && until < backplane.until) until = backplane.until + BACKPLANE_PATIENCE;
  for (const fault of [...faults].sort((a, b) => a.at - b.at)) {
    if (fault.at <= until) until = Math.max(until, endOf(fault) + unanswered(fault));
  }
  return until - (from - start) >= ms;
}

/** A resumption that begins while something is wrong takes a third of its time, and a pause. */
function patienceOf({ scenario: { server } }: World): number {
  return Math.max(1, server.resumeTimeout * 2 / 3 - 2500);
}
