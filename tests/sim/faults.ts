/**
 * What may go wrong between client and server, as a list: each entry is one fault with its
 * time, so that a failure is made shorter by leaving entries out.
 *
 * @module
 */
import { type Dice, diceFor } from "./dice.ts";

/** Which requests a fault is about, by their method: `GET`s, `POST`s, or both. */
export type Leg = "GET" | "POST" | "both";

interface Timed {
  /** In ms since the beginning of the run. */
  at: number;
  leg: Leg;
  /** How many of the requests it meets are hit, from 0 to 1. */
  share: number;
  /** Of the dice that tell which. */
  seed: number;
}

/** For a while: it meets the requests that are made meanwhile. */
interface Lasting extends Timed {
  /** In ms. */
  lasts: number;
}

/** The client sees a failure at once, and the server nothing. */
interface Refuse extends Lasting {
  kind: "refuse";
}
/** No answer, and no failure either. */
interface Silence extends Lasting {
  kind: "silence";
}
/** Somebody in the middle answers in the server's place; 0 is a redirection, as a page sees it. */
interface Foreign extends Lasting {
  kind: "foreign";
  status: number;
}
/** The server does it, but its answer is lost: by a failure, or in silence. */
interface LoseAnswer extends Lasting {
  kind: "lose answer";
  silent: boolean;
}
/** A proxy sends the request once more, after so many ms. */
interface Repeat extends Lasting {
  kind: "repeat";
  after: number;
  /** Which answer the client is given; that of the other goes nowhere. */
  answer: "first" | "second";
  /** How long the other is read, in ms. */
  reads: number;
}
/** The head of the answer comes, and nothing after it. */
interface Stall extends Lasting {
  kind: "stall";
}
/** Bodies of answers come as a whole, or by so many bytes. */
interface HoldAnswer extends Lasting {
  kind: "hold answer";
  bytes: number;
}
/** Bodies of requests come as a whole. */
interface HoldRequest extends Lasting {
  kind: "hold request";
}
/** All takes longer by so many ms. */
interface Slow extends Lasting {
  kind: "slow";
  by: number;
}
/** Nothing moves on what is under way, and then it moves on. */
interface Pause extends Lasting {
  kind: "pause";
}
/** What is under way is cut, after so many bytes of a direction. */
interface Cut extends Timed {
  kind: "cut";
  direction: "up" | "down";
  bytes: number;
  /** Whether a body's reader takes it for its end; else it fails. */
  clean: boolean;
}
/** What is under way dies without a sign at either end. */
interface HalfOpen extends Timed {
  kind: "half-open";
}
/** A process stands still. */
interface Freeze extends Lasting {
  kind: "freeze";
  whose: string;
}
/** An instance is killed, and another comes in its place. */
interface Kill extends Lasting {
  kind: "kill";
  instance: number;
}

export type Fault =
  | Refuse
  | Silence
  | Foreign
  | LoseAnswer
  | Repeat
  | Stall
  | HoldAnswer
  | HoldRequest
  | Slow
  | Pause
  | Cut
  | HalfOpen
  | Freeze
  | Kill;

/** All that happens to one request from its beginning. */
export interface Fate {
  refused?: boolean;
  silent?: boolean;
  foreign?: number;
  loseAnswer?: "failure" | "silence";
  repeat?: Repeat;
  stalls?: boolean;
  /** How many bytes of the answer's body are held until there are more; Infinity: to its end. */
  holdsAnswer?: number;
  holdsRequest?: boolean;
  slower: number;
  /** Names of the faults that hit it. */
  hit: string[];
}

/** When the fault is over. What it did to a connection may be noticed later. */
export function endOf(fault: Fault): number {
  return fault.at + ("lasts" in fault ? fault.lasts : 0) +
    (fault.kind === "repeat" ? fault.after + fault.reads : 0);
}

/** Whether a fault hits this request, of those that it meets. */
export function hits(fault: Fault, method: string, number: number): boolean {
  if (fault.leg !== "both" && fault.leg !== method) return false;
  return fault.share >= 1 || diceFor(fault.seed, number).chance(fault.share);
}

/** What the faults do to a request that is made now. */
export function fateOf(
  faults: readonly Fault[],
  now: number,
  method: string,
  number: number,
): Fate {
  const fate: Fate = { slower: 0, hit: [] };
  for (const fault of faults) {
    if (!("lasts" in fault) || now < fault.at || now >= fault.at + fault.lasts) continue;
    if (!hits(fault, method, number)) continue;
    if (doom(fate, fault)) fate.hit.push(fault.kind);
  }
  return fate;
}

/** False: this fault is not about new requests. */
function doom(fate: Fate, fault: Fault): boolean {
  switch (fault.kind) {
    case "refuse":
      return fate.refused = true;
    case "silence":
      return fate.silent = true;
    case "foreign":
      fate.foreign = fault.status;
      return true;
    case "lose answer":
      fate.loseAnswer = fault.silent ? "silence" : "failure";
      return true;
    case "repeat":
      fate.repeat = fault;
      return true;
    case "stall":
      return fate.stalls = true;
    case "hold answer":
      fate.holdsAnswer = fault.bytes;
      return true;
    case "hold request":
      return fate.holdsRequest = true;
    case "slow":
      fate.slower += fault.by;
      return true;
    default:
      return false;
  }
}

/** "502", "404", …: what a stranger in the middle says. */
export const FOREIGN = [404, 403, 401, 400, 407, 302, 0, 204, 200, 502, 503, 511] as const;

/** How likely each kind is, where all are. */
export const KINDS = {
  "refuse": 3,
  "silence": 2,
  "foreign": 4,
  "lose answer": 3,
  "repeat": 3,
  "stall": 1,
  "hold answer": 1,
  "hold request": 1,
  "slow": 1,
  "pause": 2,
  "cut": 6,
  "half-open": 1,
  "freeze": 1,
  "kill": 0.05,
} as const;

export interface FaultOptions {
  /** How likely each kind is. */
  kinds: Partial<Record<Fault["kind"], number>>;
  /** Faults begin before, in ms. */
  until: number;
  /** The longest that one lasts, in ms. */
  longest: number;
  owners: string[];
}

/** Draws one fault. */
export function drawFault(dice: Dice, options: FaultOptions): Fault {
  const kind = dice.weighted(options.kinds);
  const timed: Timed = {
    at: Math.floor(dice.between(0, options.until)),
    leg: dice.weighted({ both: 3, GET: 1, POST: 1 }),
    share: dice.pick([1, 1, 0.5, 0.2]),
    seed: dice.int(0, 2 ** 31 - 1),
  };
  const lasts = dice.size(options.longest);
  const all = { ...timed, leg: "both" as const, share: 1 };
  switch (kind) {
    case "cut":
      return {
        kind,
        ...timed,
        direction: dice.pick(["up", "down"]),
        bytes: dice.chance(0.3) ? 0 : dice.size(4096),
        clean: dice.chance(0.4),
      };
    case "half-open":
      return { kind, ...timed };
    case "foreign":
      return { kind, ...timed, lasts, status: dice.pick(FOREIGN) };
    case "lose answer":
      return { kind, ...timed, lasts, silent: dice.chance(0.3) };
    case "repeat": {
      const after = dice.size(dice.chance(0.8) ? 300 : 3000);
      const answer = dice.pick(["first", "second"] as const);
      return { kind, ...timed, lasts, after, answer, reads: dice.size(3000) };
    }
    case "hold answer":
      return { kind, ...timed, lasts, bytes: dice.pick([Infinity, 4096]) };
    case "slow":
      return { kind, ...timed, lasts, by: dice.int(100, 3000) };
    case "freeze":
      return { kind, ...all, lasts, whose: dice.pick(options.owners) };
    case "kill":
      return { kind, ...all, lasts, instance: dice.int(0, 2) };
    default:
      return { kind, ...timed, lasts };
  }
}
