/**
 * The simulator by itself: `deno run -A tests/sim/main.ts --seeds 1000000`.
 *
 * `--from 7` begins with that seed, `--quiet` leaves all faults out, `--transport poll` takes that
 * one, `--trace` shows what happened in a run that did not fail, `--all` goes on after a failure.
 */
import process from "node:process";
import { parseArgs } from "node:util";
import { inTask } from "./clock.ts";
import { PRODUCT } from "./product.ts";
import { format, playSeeds } from "./report.ts";
import { drawScenario, type Transport } from "./scenario.ts";
import { run } from "./world.ts";

const { values } = parseArgs({
  options: {
    seeds: { type: "string", default: "1000" },
    from: { type: "string", default: "1" },
    quiet: { type: "boolean", default: false },
    transport: { type: "string" },
    trace: { type: "boolean", default: false },
    all: { type: "boolean", default: false },
  },
});
const [seeds, from] = [Number(values.seeds), Number(values.from)];
const { quiet, all } = values;
const transport = values.transport as Transport | undefined;

if (values.trace) {
  const { trace } = await inTask(() =>
    run(PRODUCT, drawScenario(from, { quiet, transport }), true)
  );
  console.log(trace.join("\n"));
}
let told = 0;
const summary = await playSeeds(PRODUCT, seeds, {
  quiet,
  transport,
  from,
  first: !all,
  progress: ({ runs }) => {
    if (runs - told < 10_000) return;
    told = runs;
    console.error(`${runs} runs`);
  },
});
if (summary.first) console.log(`${summary.first}\n`);
console.log(format(summary));
process.exitCode = summary.failures.size ? 1 : 0;
