/**
 * Runs the suite under Deno and under Bun: `node tests/run.mjs`, which is what
 * `npm test` does. Both run at once, since tests wait more than they work; what Bun says comes when
 * Deno is done. Arguments: `--only deno|bun` (or DUPLEX_ONLY in the environment), `--in-turn` for
 * one after the other, and files or parts of their names. With CI=true a test may be skipped only
 * because it needs JSR. At the end it names the tests that took longest.
 *
 * Of the whole suite, the few tests that failed are run once more, alone: a machine that others use,
 * too, stands still for seconds, and then whatever has a limit fails. What passes then is counted as
 * passed, and named as unsteady. More than a few are no accident.
 */
import { closeSync, existsSync, mkdtempSync, openSync } from "node:fs";
import { readdirSync, readFileSync, rmSync } from "node:fs";
import { availableParallelism, tmpdir } from "node:os";
import { join, relative, resolve } from "node:path";
import { binary, count, root, run } from "./tools.mjs";

/** Each with the tests of a name that the pattern matches, or with all. */
const runners = {
  // Types are checked by check.mjs, once; here each worker of a test would be checked again.
  deno: (report, pattern, files) => [
    ...["test", "-A", "--no-check", `--junit-path=${report}`],
    ...(pattern ? [`--filter=/${pattern.replaceAll("/", "\\/")}/`] : []),
    ...files,
  ],
  bun: (report, pattern, files) => [
    ...["test", "--reporter=junit", `--reporter-outfile=${report}`],
    ...(pattern ? ["-t", pattern] : []),
    ...files,
  ],
};
/** So many failures may be the machine's. */
const FEW = 8;

const { only, inTurn, files, isWhole } = parse(process.argv.slice(2));
const names = only ? [only] : Object.keys(runners);
const results = [];
for (const first of inTurn ? await each(names, test) : await atOnce(names)) {
  results.push(await lookTwice(first));
}

for (const { name, slowest } of results) {
  console.log(`\nslowest (${name}):`);
  for (const { test, seconds } of slowest) {
    console.log(`${seconds.toFixed(1).padStart(7)} s  ${test}`);
  }
}
console.log();
for (const { name, failed, skipped, unsteady } of results) {
  for (const test of unsteady) console.log(`unsteady (${name}), passed when run again: ${test}`);
  for (const test of failed) console.log(`failed (${name}): ${test}`);
  for (const test of skipped) console.log(`skipped (${name}): ${test}`);
}
const total = { passed: 0, failed: 0, skipped: 0 };
for (const { passed, failed, skipped } of results) {
  total.passed += passed;
  total.failed += failed.length;
  total.skipped += skipped.length;
}
if (total.passed + total.failed === 0) console.log("No test ran.");
console.log(`\n${count(total)}`);
process.exitCode = total.passed > 0 && total.failed === 0 ? 0 : 1;

function parse(args) {
  const parsed = {
    only: process.env.DUPLEX_ONLY || undefined,
    inTurn: availableParallelism() < 2,
    isWhole: false,
    files: [],
  };
  for (let arg; (arg = args.shift()) !== undefined;) {
    if (arg === "--only") parsed.only = args.shift();
    else if (arg === "--in-turn") parsed.inTurn = true;
    else parsed.files.push(...find(arg));
  }
  if (parsed.only && !runners[parsed.only]) {
    fail(`not a runner: ${parsed.only}`);
  }
  if (parsed.files.length === 0) {
    parsed.isWhole = true;
    parsed.files.push("./tests/"); // Bun takes a path for a filter unless it begins with a dot.
  }
  return parsed;
}

/** A path as it is, or the test files that have the word in their names. */
function find(word) {
  const path = resolve(word);
  if (existsSync(path)) return [`./${relative(root, path)}`];
  const found = readdirSync(join(root, "tests"))
    .filter((file) => file.endsWith(".test.ts") && file.includes(word));
  return found.length > 0 ? found.map((file) => `./tests/${file}`) : fail(`no test file: ${word}`);
}

function fail(message) {
  console.error(message);
  process.exit(2);
}

async function each(names, run) {
  const results = [];
  for (const name of names) results.push(await run(name));
  return results;
}

/** Runs all at once: the first says what it says at once, the others when those before are done. */
async function atOnce([first, ...others]) {
  const folder = mkdtempSync(join(tmpdir(), "duplex-test-"));
  try {
    const log = (name) => join(folder, `${name}.log`);
    const running = others.map((name) => {
      const output = openSync(log(name), "w");
      return test(name, { output }).finally(() => closeSync(output));
    });
    const results = [await test(first)];
    for (const name of others) {
      results.push(await running.shift());
      console.log(`\n${name} test`);
      process.stdout.write(readFileSync(log(name)));
    }
    return results;
  } finally {
    rmSync(folder, { recursive: true });
  }
}

/** Runs what failed once more, if that may have been the machine. */
async function lookTwice(first) {
  const again = first.failed.filter((test) => first.ran.has(test));
  const isFew = again.length > 0 && first.failed.length <= FEW;
  if (!(isWhole || process.env.CI === "true") || !isFew) return { ...first, unsteady: [] };
  const pattern = `^(${again.map(literal).join("|")})$`;
  // Loading the others would start their browsers. Only Bun tells where a test stands.
  const places = [...new Set(again.map((test) => first.places.get(test)))];
  const second = await test(first.name, { pattern, where: places.every(Boolean) ? places : files });
  const unsteady = again.filter((test) => second.ran.has(test) && !second.failed.includes(test));
  // A crash or a leak that belongs to no test excuses none.
  if (second.failed.some((test) => !second.ran.has(test))) return { ...first, unsteady: [] };
  const failed = first.failed.filter((test) => !unsteady.includes(test));
  return { ...first, failed, unsteady, passed: first.passed + unsteady.length };
}

function literal(text) {
  return text.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&");
}

/** Runs one runner and reads the counts from the report it writes. */
async function test(name, { pattern, output, where = files } = {}) {
  if (!output) console.log(`\n${name} test${pattern ? ", once more" : ""}`);
  const folder = mkdtempSync(join(tmpdir(), "duplex-test-"));
  const report = join(folder, "report.xml");
  try {
    const code = await run(binary(name), runners[name](report, pattern, where), { output });
    const result = read(name, existsSync(report) ? readFileSync(report) : "", pattern);
    // A file that could not be loaded, a crash or a leak shows only here.
    if (code !== 0 && result.failed.length === 0) {
      result.failed.push(`the run itself: ${code}`);
    }
    return result;
  } finally {
    rmSync(folder, { recursive: true });
  }
}

/** Sorts the cases of a JUnit report, or those of a name that the pattern matches. */
function read(name, report, pattern = "") {
  const result = { name, passed: 0, failed: [], skipped: [], ran: new Set(), places: new Map() };
  const took = [];
  const cases = /<testcase\b([^>]*?)(?:\/>|>([\s\S]*?)<\/testcase>)/g;
  for (const [, attributes, inner = ""] of String(report).matchAll(cases)) {
    const test = unescape(/\bname="([^"]*)"/.exec(attributes)?.[1] ?? "?");
    if (!new RegExp(pattern).test(test)) continue;
    took.push({ test, seconds: Number(/\btime="([^"]*)"/.exec(attributes)?.[1] ?? 0) });
    const place = /\bfile="(tests\/[^"]+)"/.exec(attributes)?.[1];
    if (place) result.places.set(test, `./${place}`);
    const isSkipped = /<skipped\b/.test(inner);
    if (!isSkipped) result.ran.add(test);
    if (/<(failure|error)\b/.test(inner)) result.failed.push(test);
    else if (!isSkipped) result.passed++;
    else if (allowed(test)) result.skipped.push(test);
    else {result.failed.push(
        `${test}: nothing else may be skipped with CI=true`,
      );}
  }
  const slowest = took.sort((a, b) => b.seconds - a.seconds).slice(0, 10);
  return { ...result, slowest };
}

function allowed(test) {
  return process.env.CI !== "true" || test.includes("needs JSR");
}

function unescape(text) {
  const named = { lt: "<", gt: ">", quot: '"', apos: "'", amp: "&" };
  return text.replace(
    /&(?:#(\d+)|#x([\da-f]+)|(\w+));/gi,
    (all, dec, hex, of) =>
      of ? named[of] ?? all : String.fromCodePoint(dec ? Number(dec) : parseInt(hex, 16)),
  );
}
