/**
 * The bench: `deno task bench`. Everything that is compared runs in the same
 * run, on the same runtime, in turns.
 *
 *     deno run -A bench/main.ts [--short] [--only name,name] [--runtime deno|bun] [--record]
 *
 * A full run writes results.json, its charts, and the tables of README.md and
 * docs/performance.md. `--short` is for CI: it fails when a ratio has collapsed, see
 * `collapsed`; `--record` keeps its ratios to compare with.
 *
 * @module
 */
import { readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import process from "node:process";
import { parseArgs } from "node:util";
import type { Outcome, Ratio, Scale, Scenario } from "./measure.ts";
import { chart, describe, machine, plot, table } from "./report.ts";
import { type Results, update } from "./performance.ts";
import type { Runtime } from "./rpc.ts";
import { binary } from "./scenarios/binary.ts";
import { browsers } from "./scenarios/browsers.ts";
import { bulk } from "./scenarios/bulk.ts";
import { context } from "./scenarios/context.ts";
import { fanOutBursts, fanOutSingly } from "./scenarios/fanout.ts";
import { subscribers, topics, unheard } from "./scenarios/growth.ts";
import { memory, tenThousand } from "./scenarios/idle.ts";
import { move } from "./scenarios/move.ts";
import { network } from "./scenarios/network.ts";
import { offered, saturation } from "./scenarios/offered.ts";
import { parse } from "./scenarios/parse.ts";
import { poll } from "./scenarios/poll.ts";
import { resume } from "./scenarios/resume.ts";
import { roundTrip } from "./scenarios/roundtrip.ts";
import { size } from "./scenarios/size.ts";
import { latency, uplink } from "./scenarios/uplink.ts";

const SCENARIOS: Record<string, Scenario> = {
  fanOutBursts,
  fanOutSingly,
  offered,
  saturation,
  roundTrip,
  uplink,
  latency,
  bulk,
  network,
  browsers,
  memory,
  tenThousand,
  resume,
  move,
  poll,
  size,
  parse,
  subscribers,
  topics,
  unheard,
  binary,
  context,
};
const RESULTS = join(import.meta.dirname!, "results.json");

const { values: options } = parseArgs({
  options: {
    short: { type: "boolean", default: false },
    record: { type: "boolean", default: false },
    only: { type: "string" },
    runtime: { type: "string" },
  },
});
const scale: Scale = {
  short: options.short,
  rounds: options.short ? 3 : 5,
  runtimes: options.runtime ? [options.runtime as Runtime] : ["deno", "bun"],
};
const recorded: Results = await readFile(RESULTS, "utf8").then(JSON.parse, () => ({
  machine: "",
  outcomes: {},
  short: {},
}));

const wanted = (options.only ?? "").toLowerCase().split(",");
let passed = 0;
const failed: string[] = [];
const outcomes: Record<string, Outcome> = {};
for (const [name, scenario] of Object.entries(SCENARIOS)) {
  if (!wanted.some((part) => name.toLowerCase().includes(part))) continue;
  const started = performance.now();
  let outcome = await scenario(scale);
  // What looks like a collapse is looked at twice: it may have been the machine.
  if (options.short && outcome.ratios.some(collapsed)) outcome = await scenario(scale);
  outcomes[name] = outcome;
  for (const ratio of outcome.ratios) {
    if (options.short && collapsed(ratio)) failed.push(ratio.name);
    else if (ratio.target !== undefined) passed++;
  }
  console.error(`${name}: ${((performance.now() - started) / 1000).toFixed(1)} s`);
}

console.log(table(outcomes));
if (options.short) {
  if (options.record) {
    const ratios = Object.values(outcomes).flatMap(({ ratios }) => ratios);
    for (const { name, value, target } of ratios) {
      if (target !== undefined) recorded.short[name] = round(value.median);
    }
    await save(recorded);
  }
  for (const name of failed) console.log(`collapsed: ${describe(ratioOf(name))}`);
  console.log(`\n${passed} passed, ${failed.length} failed`);
  process.exitCode = failed.length ? 1 : 0;
} else if (!options.runtime) {
  Object.assign(recorded.outcomes, outcomes);
  recorded.machine = await machine();
  await save(recorded);
  await writeFile(RESULTS.replace(".json", ".svg"), chart(recorded.outcomes));
  if ("saturation" in recorded.outcomes) {
    await writeFile(join(import.meta.dirname!, "latency.svg"), plot(recorded.outcomes));
  }
  const saved: Results = JSON.parse(await readFile(RESULTS, "utf8")); // which is rounded
  for (const file of ["README.md", "docs/performance.md"]) {
    const path = join(import.meta.dirname!, "..", file);
    await writeFile(path, update(await readFile(path, "utf8"), saved));
  }
}

/**
 * Worse than half of what was recorded, or of the target where nothing was. What
 * meets its target has not collapsed, however good it once was.
 */
function collapsed({ name, value: { median }, target, atLeast }: Ratio): boolean {
  if (target === undefined) return false;
  const good = recorded.short[name] ?? target;
  if (atLeast) return median < good / 2 && median < target;
  return median > good * 2 && median > target;
}

function ratioOf(name: string): Ratio {
  return Object.values(outcomes).flatMap(({ ratios }) => ratios)
    .find((ratio) => ratio.name === name)!;
}

function round(value: number): number {
  return Number(value.toPrecision(4));
}

async function save(results: Results): Promise<void> {
  const text = JSON.stringify(
    results,
    (_, value) => typeof value === "number" ? round(value) : value,
    2,
  );
  await writeFile(RESULTS, text + "\n");
}
