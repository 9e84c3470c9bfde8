/** The runner behind `npm test`: what it counts, names and exits with. */
import { execFile } from "node:child_process";
import { mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { assertEquals, assertMatch, assertStringIncludes, root, runtime, test } from "./harness.ts";

/** Runs tests/run.mjs on this runtime; its exit code and what it says. */
function runTests(
  file: string,
  env: Record<string, string>,
): Promise<{ code: number; output: string }> {
  return new Promise((resolve) => {
    const child = execFile(
      "node",
      ["tests/run.mjs", "--only", runtime, file],
      { cwd: root, env: { ...process.env, ...env } },
      (_error, output) => resolve({ code: child.exitCode!, output }),
    );
  });
}

const lastLine = (output: string) => output.trimEnd().split("\n").at(-1);

test("run.mjs names what failed and what was skipped, and why", async () => {
  const { code, output } = await runTests("tests/fixtures/outcomes.ts", {
    CI: "",
  });
  assertEquals(code, 1);
  assertEquals(lastLine(output), "1 passed, 1 failed, 2 skipped");
  assertMatch(output, new RegExp(`^slowest \\(${runtime}\\):\n( +\\d+\\.\\d s  .+\n){4}`, "m"));
  assertStringIncludes(output, `failed (${runtime}): fails & says so\n`);
  assertStringIncludes(
    output,
    `skipped (${runtime}): needs a thing ` +
      "(skipped: needs no-such: npm install)\n",
  );
}, { timeout: 30_000 });

test("run.mjs with CI=true allows skipping only for JSR", async () => {
  const { output } = await runTests("tests/fixtures/outcomes.ts", {
    CI: "true",
  });
  assertEquals(lastLine(output), "1 passed, 2 failed, 1 skipped");
}, { timeout: 30_000 });

test("run.mjs with CI=true runs once more what failed, and names what passes then", async (t) => {
  const folder = await mkdtemp(join(tmpdir(), "duplex-unsteady-"));
  t.defer(() => rm(folder, { recursive: true }));
  const env = { DUPLEX_TRACE: join(folder, "trace") };
  const { code, output } = await runTests("tests/fixtures/unsteady.ts", { CI: "true", ...env });
  assertEquals(code, 1);
  const unsteady = "fails (once) / & never again";
  assertStringIncludes(output, `unsteady (${runtime}), passed when run again: ${unsteady}\n`);
  assertStringIncludes(output, `failed (${runtime}): fails always\n`);
  assertEquals(lastLine(output), "2 passed, 1 failed");
  assertEquals((await readFile(env.DUPLEX_TRACE, "utf8")).split("\n"), [
    ...["passes", "fails always", unsteady],
    ...["fails always", unsteady, ""],
  ]);
  const alone = await runTests("tests/fixtures/unsteady.ts", { CI: "", DUPLEX_TRACE: "" });
  assertEquals(lastLine(alone.output), "1 passed, 2 failed");
}, { timeout: 60_000 });

test("run.mjs fails when a file cannot be loaded", async () => {
  const { code, output } = await runTests("tests/fixtures/broken.ts", {});
  assertEquals(code, 1);
  assertEquals(lastLine(output), "0 passed, 1 failed");
}, { timeout: 30_000 });

test("a test fails by what is complained of in it, unless it expects that", async () => {
  const { output } = await runTests("tests/fixtures/complaining.ts", {});
  const failed = [...output.matchAll(/^failed \(\w+\): (.*)$/gm)].map(([, name]) => name!);
  assertEquals(failed.filter((name) => !name.startsWith("fails: ")), []);
  assertEquals(lastLine(output), "2 passed, 12 failed");
}, { timeout: 30_000 });
