/**
 * Plays many seeds and sums up what they came to.
 *
 * @module
 */
import process from "node:process";
import { inTask } from "./clock.ts";
import type { Product } from "./product.ts";
import { drawScenario, type Scenario, type ScenarioOptions } from "./scenario.ts";
import { shrink } from "./shrink.ts";
import { type Outcome, run } from "./world.ts";

export interface Summary {
  runs: number;
  messages: number;
  requests: number;
  events: number;
  /** Virtual time of all runs together, in ms. */
  lasted: number;
  hits: Map<string, number>;
  /** How many runs took an excuse, by its name. */
  excuses: Map<string, number>;
  /** Seeds by the check that failed first. */
  failures: Map<string, number[]>;
  /** The first failure, with its shortest trace. */
  first: string | undefined;
}

export interface PlayOptions extends ScenarioOptions {
  from?: number;
  /** Stops at the first failure. */
  first?: boolean;
  /** Called now and then. */
  progress?: (summary: Summary) => void;
}

/** Seeds of one task; between them the runtime gets to tell of unhandled rejections. */
const TOGETHER = 20;

export async function playSeeds(
  product: Product,
  count: number,
  options: PlayOptions = {},
): Promise<Summary> {
  const { from = 1, first, progress } = options;
  const summary: Summary = {
    ...{ runs: 0, messages: 0, requests: 0, events: 0, lasted: 0 },
    hits: new Map(),
    excuses: new Map(),
    failures: new Map(),
    first: undefined,
  };
  const rejections = watchRejections();
  for (let seed = from; seed < from + count; seed += TOGETHER) {
    const until = Math.min(seed + TOGETHER, from + count);
    await inTask(() => playSome(product, seed, until, options, summary));
    await inTask(() => {}); // by now they would have been told
    if (rejections.seen.length) {
      failed(summary, "unhandled rejection", seed, () => String(rejections.seen[0]));
      rejections.seen.length = 0;
    }
    progress?.(summary);
    if (first && summary.first) break;
  }
  rejections.stop();
  return summary;
}

function playSome(
  product: Product,
  from: number,
  until: number,
  options: PlayOptions,
  summary: Summary,
): void {
  for (let seed = from; seed < until; seed++) {
    const outcome = run(product, drawScenario(seed, options));
    add(summary, outcome);
    const [violation] = outcome.violations;
    if (!violation) continue;
    failed(summary, violation.check, seed, () => explain(product, outcome, options));
    if (options.first) return;
  }
}

function add(summary: Summary, outcome: Outcome): void {
  summary.runs++;
  summary.messages += outcome.messages;
  summary.requests += outcome.requests;
  summary.events += outcome.events;
  summary.lasted += outcome.lasted;
  for (const [name, count] of outcome.hits) increase(summary.hits, name, count);
  for (const name of new Set(outcome.excuses)) increase(summary.excuses, name, 1);
}

function increase(counts: Map<string, number>, name: string, by: number): void {
  counts.set(name, (counts.get(name) ?? 0) + by);
}

function failed(summary: Summary, check: string, seed: number, tell: () => string): void {
  const seeds = summary.failures.get(check) ?? [];
  summary.failures.set(check, [...seeds, seed]);
  summary.first ??= `seed ${seed}: ${check}\n${tell()}`;
}

/** How to run it again, what is wrong, and the shortest way to it. */
export function explain(
  product: Product,
  outcome: Outcome,
  { quiet, transport }: ScenarioOptions,
): string {
  const shortest: Scenario = shrink(outcome, (scenario) => run(product, scenario));
  const again = run(product, shortest, true);
  const { script, faults, ...rest } = shortest;
  const seed = outcome.scenario.seed;
  const options = `${quiet ? " --quiet" : ""}${transport ? ` --transport ${transport}` : ""}`;
  return [
    `again: deno run -A tests/sim/main.ts --from ${seed} --seeds 1${options}`,
    ...again.violations.map(({ check, detail }) => `${check}: ${detail}`),
    JSON.stringify(rest),
    ...[...script, ...faults].map((entry) => JSON.stringify(entry)),
    "",
    ...again.trace,
  ].join("\n");
}

/** Both runtimes tell `process`, and let it live where somebody listens. */
function watchRejections(): { seen: unknown[]; stop(): void } {
  const seen: unknown[] = [];
  const listener = (reason: unknown) => void seen.push((reason as Error)?.stack ?? reason);
  process.on("unhandledRejection", listener);
  return { seen, stop: () => process.off("unhandledRejection", listener) };
}

/** As lines. */
export function format(summary: Summary): string {
  const list = (counts: Map<string, number>) =>
    [...counts].sort(([, a], [, b]) => b - a).map(([name, count]) => `${count} ${name}`).join(", ");
  const failures = [...summary.failures]
    .map(([check, seeds]) => `  ${check}: ${seeds.length}, seeds ${seeds.slice(0, 40).join(" ")}`);
  return [
    `${summary.runs} runs, ${summary.messages} messages, ${summary.requests} requests, ` +
    `${Math.round(summary.lasted / 3_600_000)} hours of virtual time`,
    `faults that hit: ${list(summary.hits) || "none"}`,
    `excuses for 1006, in runs: ${list(summary.excuses) || "none"}`,
    `failures: ${[...summary.failures.values()].flat().length}`,
    ...failures,
  ].join("\n");
}
