/**
 * A scenario: all that is drawn before a run begins. The same scenario is the same run.
 *
 * @module
 */
import { type Dice, diceFor } from "./dice.ts";
import { drawFault, endOf, type Fault, KINDS } from "./faults.ts";
import type { Traits } from "./network.ts";

export const TRANSPORTS = ["duplex", "stream", "post"] as const;
export type Transport = (typeof TRANSPORTS)[number] | "poll";

/** What somebody does at some time: `seed` is of the dice that tell the rest. */
export interface Step {
  /** In ms since the beginning. */
  at: number;
  client: number;
  seed: number;
  do:
    | "client sends"
    | "client sends too much"
    | "client aborts"
    | "server sends"
    | "server publishes"
    | "server pings"
    | "server fails"
    | "client closes"
    | "server closes"
    | "server terminates"
    | "instance shuts down"
    | "all shut down";
  /** How many messages, and their most bytes. */
  count: number;
  most: number;
}

export interface ServerTraits {
  heartbeatInterval: number;
  /** In s. */
  idleTimeout: number;
  resumeTimeout: number;
  window: number;
  maxMessageSize: number;
  maxBufferedAmount: number;
  maxTotalBufferedAmount: number;
  maxWindow: number;
}

/** How hooks behave: probabilities, and times in ms. */
export interface HookTraits {
  echoes: number;
  slow: number;
  slowest: number;
  publishes: number;
  closes: number;
  greets: boolean;
}

export interface Backplane {
  loss: number;
  repeat: number;
  /** The longest that a message is under way, in ms. */
  delay: number;
  /** When it becomes reliable, in ms. */
  until: number;
}

export interface Scenario {
  seed: number;
  level: "full" | "plain";
  transport: "auto" | Transport;
  clients: number;
  instances: number;
  server: ServerTraits;
  hooks: HookTraits;
  traits: Traits;
  backplane: Backplane;
  /** How long the conversation rests before it is looked at, in ms. */
  rests: number;
  script: Step[];
  faults: Fault[];
}

export interface ScenarioOptions {
  /** Nothing goes wrong. */
  quiet?: boolean;
  /** This one, whatever is drawn. Polls are drawn where something holds streams, else by this alone. */
  transport?: Transport | undefined;
  /** How likely each kind of fault is. */
  kinds?: Partial<Record<Fault["kind"], number>>;
  /** These instead of what is drawn, in a conversation that says little. */
  faults?: readonly Fault[];
}

/** When the last fault is over, and the script as well. */
export function wellAt({ script, faults, backplane, rests }: Scenario): number {
  return rests +
    Math.max(0, backplane.until, ...script.map(({ at }) => at), ...faults.map(endOf));
}

export function drawScenario(
  seed: number,
  { quiet, transport, kinds = KINDS, faults }: ScenarioOptions = {},
): Scenario {
  const dice = diceFor(seed, 1);
  const level = dice.chance(0.1) ? "plain" : "full";
  const instances = dice.chance(0.25) ? 3 : 1;
  const clients = dice.weighted({ 1: 6, 2: 3, 3: 1 });
  const server = drawServer(dice);
  limitAll(diceFor(seed, 6), server);
  const traits = drawTraits(dice, level === "plain", quiet ?? false);
  if (dice.chance(0.03)) makeLong(dice, server, traits);
  const length = dice.int(200, 3000);
  const scenario: Scenario = {
    seed,
    level,
    transport: dice.pick(["auto", ...TRANSPORTS]),
    clients: Number(clients),
    instances,
    server,
    hooks: drawHooks(dice),
    traits,
    backplane: { loss: 0, repeat: 0, delay: dice.int(0, 5), until: 0 },
    rests: dice.chance(0.1) ? dice.int(0, 3000 * server.idleTimeout) : 0,
    script: [],
    faults: [],
  };
  if (transport) scenario.transport = transport;
  scenario.script = drawScript(dice, scenario, length);
  if (faults) return { ...scenario, script: [], faults: [...faults], transport: "post" };
  if (!quiet) misfortune(dice, scenario, length, kinds);
  return scenario;
}

function drawServer(dice: Dice): ServerTraits {
  const heartbeatInterval = dice.weighted({ 15000: 4, 5000: 2, 1000: 1, 300: 1 });
  const server = {
    heartbeatInterval: Number(heartbeatInterval),
    idleTimeout: Number(dice.weighted({ 60: 6, 20: 1, 5: 1 })),
    resumeTimeout: Number(dice.weighted({ 30000: 12, 60000: 2, 15000: 2, 0: 0.3 })),
    window: dice.chance(0.4) ? 256 * 1024 : dice.int(64, 8192),
    maxMessageSize: 128 * 1024,
    maxBufferedAmount: dice.chance(0.95) ? 16 * 1024 * 1024 : dice.int(0, 4096),
  };
  const { window, maxBufferedAmount } = server;
  return { ...server, maxTotalBufferedAmount: maxBufferedAmount, maxWindow: 8 * window };
}

/** A few messages reach the bound of all sessions, too: by dice of its own, so seeds stay what they were. */
function limitAll(dice: Dice, server: ServerTraits): void {
  if (dice.chance(0.05)) server.maxTotalBufferedAmount = dice.int(0, 65536);
}

function drawTraits(dice: Dice, plain: boolean, quiet: boolean): Traits {
  const least = dice.pick([0, 0, 1, 10, 60]);
  return {
    latency: [least, least + dice.pick([0, 1, 20])],
    capacity: dice.pick([4096, 65536, 4194304]),
    rate: dice.chance(0.9) ? Infinity : dice.int(20_000, 500_000),
    byob: dice.chance(0.5),
    fullDuplex: quiet || dice.chance(0.8),
    streamsUp: quiet ? "pass" : dice.weighted({ pass: 10, "are held": 1, fail: 1 }),
    plain,
    balance: dice.chance(0.5) ? "random" : "sticky",
  };
}

/** One message takes longer than all patience: "a message of any size is no silence". */
function makeLong(dice: Dice, server: ServerTraits, traits: Traits): void {
  Object.assign(server, { heartbeatInterval: 500, idleTimeout: 2, window: 64 * 1024 });
  traits.rate = dice.int(15_000, 40_000);
}

function drawHooks(dice: Dice): HookTraits {
  return {
    echoes: dice.pick([0, 0.3, 1]),
    slow: dice.pick([0, 0, 0.2, 0.5]),
    slowest: dice.pick([1, 20, 100]),
    publishes: dice.pick([0, 0, 0.2]),
    closes: dice.chance(0.05) ? 0.05 : 0,
    greets: dice.chance(0.5),
  };
}

function drawScript(dice: Dice, scenario: Scenario, length: number): Step[] {
  const { server, clients } = scenario;
  const { window } = server;
  const steps: Step[] = [];
  const long = scenario.traits.rate < 50_000 && server.heartbeatInterval === 500;
  const most = long ? 120 * 1024 : Math.min(dice.size(3 * window), 64 * 1024);
  const add = (what: Step["do"], at: number, client: number, count = 1) =>
    steps.push({
      at: Math.floor(at),
      client,
      seed: dice.int(0, 2 ** 31 - 1),
      do: what,
      count,
      most,
    });
  const drawCount = () => Math.min(dice.size(20), Math.ceil(20 * window / most) + 1);
  for (let client = 0; client < clients; client++) {
    const times = dice.int(0, 6);
    for (let i = 0; i < times; i++) {
      const what = dice.weighted({
        "client sends": 50,
        "server sends": 50,
        "server publishes": 10,
        "server pings": 10,
        "client sends too much": 1,
        "client aborts": 1,
        "server fails": 1,
      });
      add(what, dice.between(0, length), client, drawCount());
    }
    addClose(dice, add, length, client, drawCount());
  }
  return steps.sort((a, b) => a.at - b.at);
}

type Add = (what: Step["do"], at: number, client: number, count?: number) => void;

/** How a conversation ends: from either side or both at once, with much on its way, or not at all. */
function addClose(dice: Dice, add: Add, length: number, client: number, count: number): void {
  const at = length + dice.int(0, 100);
  const shortly = () => at + (dice.chance(0.5) ? 0 : dice.int(0, 300));
  if (dice.chance(0.4)) add("client sends", at, client, count);
  if (dice.chance(0.4)) add("server sends", at, client, count);
  const how = dice.weighted({
    none: 4,
    client: 4,
    server: 4,
    both: 3,
    terminate: 0.5,
    instance: 1,
    all: 1,
  });
  if (how === "client" || how === "both") add("client closes", shortly(), client);
  if (how === "server" || how === "both") add("server closes", shortly(), client);
  if (how === "terminate") add("server terminates", shortly(), client);
  if (how === "instance") add("instance shuts down", shortly(), client);
  if (how === "all") add("all shut down", shortly(), client);
}

function misfortune(
  dice: Dice,
  scenario: Scenario,
  length: number,
  kinds: Partial<Record<Fault["kind"], number>>,
): void {
  const { clients, instances } = scenario;
  const owners = [
    ...Array.from({ length: clients }, (_, i) => `client ${i}`),
    ...Array.from({ length: instances }, (_, i) => `server ${i}`),
  ];
  const storm = dice.chance(0.03);
  const count = storm ? dice.int(10, 40) : dice.size(8);
  for (let i = 0; i < count; i++) {
    scenario.faults.push(
      drawFault(dice, { kinds, until: length + 500, longest: storm ? 20_000 : 3000, owners }),
    );
  }
  scenario.faults.sort((a, b) => a.at - b.at);
  if (instances === 1 || dice.chance(0.3)) return;
  const [loss, repeat] = [dice.pick([0, 0.02, 0.2]), dice.pick([0, 0.05, 0.3])];
  scenario.backplane = { loss, repeat, delay: dice.pick([0, 5, 300]), until: length + 500 };
}
