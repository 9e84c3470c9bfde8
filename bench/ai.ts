/**
 * One answer of an AI chat through what interrupts it, over four wires, and what a token costs on
 * each: `npm run bench:ai`.
 *
 *     deno run -A bench/ai.ts [--short] [--only http,resumable,websocket,ours] [--rows cut,reload]
 *
 * Servers, clients and what is between them run in this process; Redis, which the SDK's resumable
 * streams want, is started as Debian installs it. Prints the tables of docs/ai.md. A full run also
 * writes ai.json, with which tests/docs.test.ts compares them.
 *
 * @module
 */
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import process from "node:process";
import { parseArgs } from "node:util";
import { MemoryBus, RedisServer } from "../tests/bus.ts";
import type { Kind, Shared } from "../tests/contenders.ts";
import { TestContext } from "../tests/harness.ts";
import { type Interruption, INTERRUPTIONS, overhead, type Result } from "../tests/interruptions.ts";
import { type AiResults, interruptionTable, overheadTable, type Wire } from "./ai-tables.ts";
import { machine } from "./report.ts";

const RESULTS = join(import.meta.dirname!, "ai.json");
/** How long ours gathers where it is measured so. */
const GATHER = 50;

const { values: options } = parseArgs({
  options: {
    short: { type: "boolean", default: false },
    only: { type: "string", default: "http,resumable,websocket,ours" },
    rows: { type: "string", default: "" },
  },
});
const kinds = options.only.split(",") as Kind[];
const rows = INTERRUPTIONS.filter(({ name }) =>
  options.rows.split(",").some((word) => name.includes(word))
);
const speed = options.short ? { pace: 10, limit: 1_000 } : { pace: 20, limit: 8_000 };
const [rounds, questions] = options.short ? [1, 3] : [3, 10];

/** On a stage of its own, which leaves nothing behind. */
async function on<T>(
  name: string,
  kind: Kind,
  act: (t: TestContext, shared: Shared) => Promise<T>,
): Promise<T> {
  const t = new TestContext(name);
  try {
    const redis = kind === "resumable" ? (await RedisServer.start(t)).port : undefined;
    return await act(t, { redis, sync: new MemoryBus(t).adapter });
  } finally {
    await t.end();
  }
}

async function interrupt({ name, run }: Interruption, kind: Kind): Promise<Result[]> {
  const results: Result[] = [];
  for (let round = 0; round < rounds; round++) {
    results.push(await on(name, kind, (t, shared) => run(t, kind, shared, speed)));
  }
  console.log(`${name}, ${kind}: ${JSON.stringify(results, rounded)}`);
  return results;
}

/** JSON with tenths of milliseconds and bytes. */
function rounded(_key: string, value: unknown): unknown {
  return typeof value === "number" ? Math.round(value * 10) / 10 : value;
}

const results: AiResults = { machine: await machine(), speed, interruptions: {}, overhead: {} };
for (const row of rows) {
  const byKind: Partial<Record<Kind, Result[]>> = results.interruptions[row.name] = {};
  for (const kind of kinds) byKind[kind] = await interrupt(row, kind);
}
const DELAY = 20;
for (const kind of kinds) {
  for (const gather of kind === "ours" ? [0, GATHER] : [0]) {
    const wire: Wire = gather ? `${kind}, gather: ${gather}` : kind;
    results.overhead[wire] = await on(
      wire,
      kind,
      (t, shared) =>
        overhead(t, kind, { ...shared, gather }, {
          pace: speed.pace,
          delay: DELAY,
          rounds: questions,
        }),
    );
    console.log(`${wire}: ${JSON.stringify(results.overhead[wire], rounded)}`);
  }
}
// Tables of what is written, no digit more.
const text = JSON.stringify(results, rounded, 2);
const written: AiResults = JSON.parse(text);
console.log(`\n${interruptionTable(written)}\n\n${overheadTable(written)}`);
const isFull = !options.short && kinds.length === 4 && rows.length === INTERRUPTIONS.length;
if (isFull) await writeFile(RESULTS, `${text}\n`);
process.exit();
