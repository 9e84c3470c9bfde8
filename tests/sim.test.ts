/**
 * The simulator: the real client against the real server through a network that does what
 * networks do, in virtual time. A seed that fails prints how to run it again, and the shortest
 * way to it. DUPLEX_SEEDS=… takes another number of seeds; tests/sim/main.ts takes a million.
 */
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import {
  assert,
  assertEquals,
  assertGreater,
  assertGreaterOrEqual,
  runtime,
  test,
} from "./harness.ts";
import { BUGS, plant } from "./sim/bugs.ts";
import { inTask } from "./sim/clock.ts";
import { PRODUCT } from "./sim/product.ts";
import { format, playSeeds } from "./sim/report.ts";
import { drawScenario } from "./sim/scenario.ts";
import { run } from "./sim/world.ts";

const SEEDS = Number(process.env.DUPLEX_SEEDS ?? 2000);
/** Each runtime its own. */
const FROM = runtime === "deno" ? 1 : 1 + SEEDS;
const TIMEOUT = Math.max(300_000, 100 * SEEDS);

/** Seeds that have failed, each for a reason of its own. */
const FAILED = [
  ...[2383, 3579, 4984, 5125, 6019, 7038, 7818, 8132, 9040, 9175, 9786, 10337, 10401, 10542, 10615],
  ...[1796, 2070, 12096, 13356, 13597, 17014, 17854, 18778, 19778, 21938, 22438, 24212],
  ...[21012, 25127, 25195, 26946, 31069, 32675, 33143, 38398, 45190, 49405, 53719, 55759, 62420],
  ...[3525, 64604, 64780, 68510, 69978, 75623, 79901, 87898, 93371, 94403, 94442, 96887, 97392],
  ...[117113, 119989, 443080, 447178],
];

/** Likewise, where all goes by polls. */
const FAILED_BY_POLLS = [3, 471, 498, 548, 1799, 3044, 3579, 412052];

/** Likewise, where nothing goes wrong. */
const FAILED_WITHOUT_FAULTS = [4586, 16768, 20513, 21975, 28568, 32766, 35387, 41412, 201915];

/** A bug that is planted is found among so many seeds. */
const SOON = 70;

test(`${SEEDS} seeds: safe, live, agreed on the end, and nothing is left`, async () => {
  const summary = await playSeeds(PRODUCT, SEEDS, { from: FROM });
  console.log(format(summary));
  assertEquals(summary.first, undefined);
  assertEquals(summary.runs, SEEDS);
  assertGreater(summary.messages, 10 * SEEDS);
  for (const kind of ["cut", "foreign", "repeat", "half-open", "lose answer"]) {
    assertGreater(summary.hits.get(kind) ?? 0, SEEDS / 100, `too few faults of a kind: ${kind}`);
  }
}, { timeout: TIMEOUT });

test(`${SEEDS / 4} seeds by polls alone`, async () => {
  const options = { from: FROM, transport: "poll" } as const;
  const summary = await playSeeds(PRODUCT, SEEDS / 4, options);
  console.log(format(summary));
  assertEquals(summary.first, undefined);
  for (const from of FAILED_BY_POLLS) {
    const { first } = await playSeeds(PRODUCT, 1, { ...options, from });
    assertEquals(first, undefined);
  }
}, { timeout: TIMEOUT });

test("seeds that have failed do so no more", async () => {
  for (const from of FAILED) {
    const { first } = await playSeeds(PRODUCT, 1, { from });
    assertEquals(first, undefined);
  }
}, { timeout: 60_000 });

test("each of the bugs that are planted is found", async (t) => {
  const folder = await mkdtemp(join(tmpdir(), "duplex-sse-bugs-"));
  t.defer(() => rm(folder, { recursive: true }));
  assertGreaterOrEqual(BUGS.length, 15);
  for (const bug of BUGS) {
    const product = await plant(bug, folder);
    let found: string | undefined;
    for (let seed = bug.seed; seed < bug.seed + SOON && !found; seed++) {
      const { violations } = await inTask(() => run(product, drawScenario(seed)));
      found = violations[0]?.check;
    }
    assert(found, bug.name);
    console.log(`${bug.name}: "${found}"`);
  }
}, { timeout: 300_000 });

test("without faults there is no drop, nothing is sent again, and all ends are clean", async () => {
  const summary = await playSeeds(PRODUCT, SEEDS / 4, { from: FROM, quiet: true });
  assertEquals(summary.first, undefined);
  assertEquals(summary.hits.size, 0);
  for (const from of FAILED_WITHOUT_FAULTS) {
    const { first } = await playSeeds(PRODUCT, 1, { from, quiet: true });
    assertEquals(first, undefined);
  }
}, { timeout: TIMEOUT });

test("a seed is one run, event by event", async () => {
  for (const seed of [3, 14, 159]) {
    const scenario = drawScenario(seed);
    const [first, second] = await inTask(() =>
      [1, 2].map(() => run(PRODUCT, scenario, true).trace.join("\n"))
    );
    assert(first);
    assertEquals(first, second);
  }
});

test("a run leaves the globals as they were", async () => {
  const globals = () => [
    ...[setTimeout, setInterval, clearTimeout, setImmediate, MessageChannel],
    ...[performance.now, Date.now, Math.random, crypto.getRandomValues, crypto.subtle],
  ];
  const before = globals();
  await inTask(() => run(PRODUCT, drawScenario(1)));
  assert(globals().every((value, i) => value === before[i]));
});
