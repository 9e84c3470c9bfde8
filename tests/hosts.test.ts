/**
 * Node's hosts run the suites of the standard, of bad input and of closing, in processes of their
 * own where the server is as others would have it: whatever nobody catches fails them.
 */
import { mkdtemp, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { buildNext, esbuild } from "./bundle.ts";
import {
  assertEquals,
  assertGreater,
  freePort,
  nodes,
  root,
  runtime,
  test,
  type TestContext,
  testOnce,
} from "./harness.ts";
import { converse } from "./conversation.ts";
import { hosts } from "./hosts.ts";

const STANDARD = ["", ".close", ".options", ".send"].map((part) => `standard${part}.test.ts`);
const BAD_INPUT = ["bad-input.test.ts"];

/** Of the suites, the tests that are not about a server, or about what Node has not. */
const EXCEPT = [
  // Programs of their own, on each runtime.
  "^handlers that throw do not break a socket on ",
  // Node has no `addEventListener` of its own.
  "^in a page, a relative URL",
  // Between two events that come at once Node runs microtasks, but no task.
  ": bufferedAmount never falls within a task$",
];

/** Over HTTP/2: undici's fetch never ends a body of no bytes there. tests/http2.test.ts has it. */
const EXCEPT_HTTP2 = ["^an uplink POST of nothing is answered 204"];

/** Ours on both versions of HTTP, and what others have made; at once what a line has. */
const everywhere = [
  ["node:http", "srvx"],
  ["@hono/node-server", "like Next.js", "next"],
];
/** Below these is ours. */
const within = ["express", "koa", "fastify"];

type Node = typeof nodes[number];

/** One application for all tests here. */
let next: Promise<string> | undefined;

interface Report {
  passed?: number;
  failed?: string[];
  error?: string;
}

/** The suites as one file that Node 20 understands. The first are run four at a time. */
async function bundle(t: TestContext, ...phases: string[][]): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), "duplex-hosts-"));
  t.defer(() => rm(folder, { recursive: true }));
  await symlink(join(root, "node_modules"), join(folder, "node_modules"));
  const file = (name: string) => JSON.stringify(join(root, "tests", name));
  const code = phases.flatMap((names, i) => [
    ...names.map((name) => `await import(${file(name)});`),
    `await run(${i === 0 && names.length > 1 ? 4 : 1});`,
  ]);
  await writeFile(
    join(folder, "suite.ts"),
    [
      `import ${file("fixtures/older-node.ts")};`,
      `import { run, end } from ${file("fixtures/on-node.ts")};`,
      ...code,
      "end();",
    ].join("\n"),
  );
  const suite = join(folder, "suite.mjs");
  await esbuild([
    join(folder, "suite.ts"),
    ...["--bundle", "--format=esm", "--platform=node", "--target=node20", "--packages=external"],
    `--define:import.meta.dirname=${JSON.stringify(JSON.stringify(join(root, "tests")))}`,
    ...[`--outfile=${suite}`, "--log-level=warning"],
  ]);
  return suite;
}

/** Runs the suites of one host; what has failed. */
async function failures(t: TestContext, node: Node, host: string, suite: string) {
  const child = await t.spawn(node, suite, {
    env: {
      DUPLEX_HOST: host,
      DUPLEX_EXCEPT: [...EXCEPT, ...host === "node:http2" ? EXCEPT_HTTP2 : []].join("|"),
      ...host === "next" && { DUPLEX_NEXT: await (next ??= buildNext()) },
    },
  });
  const failures: string[] = [];
  let passed = 0;
  for await (const line of child.lines()) {
    const report: Report = JSON.parse(line);
    if (report.error) failures.push(`${host}: ${report.failed}: ${report.error}`);
    passed += report.passed ?? 0;
  }
  assertGreater(passed, 300);
  return failures;
}

test("on Node, whatever nobody catches, and a warning, fails a host's suites", async (t) => {
  t.expect("too many listeners", "--trace-warnings"); // as Node itself says it
  const suite = await bundle(t, ["fixtures/planted.ts"]);
  const child = await t.spawn("node-24", suite, {
    env: { DUPLEX_HOST: "node:http", DUPLEX_EXCEPT: "" },
  });
  const reports: Report[] = [];
  for await (const line of child.lines()) reports.push(JSON.parse(line));
  const failed = reports.map(({ failed, error }) => `${failed}: ${error}`);
  const planted = {
    "a rejection": "Error: of nobody",
    "an error in a timer": "Error: of nobody",
    "a warning": "Warning: too many listeners",
  };
  for (const [name, error] of Object.entries(planted)) {
    const isTold = (text: string) => text.startsWith(`planted: ${name}: ${error}\n`);
    assertEquals(failed.filter(isTold).length, 1, `${name}: ${failed}`);
  }
}, { timeout: 30_000 });

/** Each on several hosts at once: they wait more than they work. */
function suites(node: Node, hosts: string[], ...phases: string[][]): void {
  const names = phases.flat().map((name) => name.replace(/^standard\.(?!test)|\.test\.ts$/g, ""))
    .join(", ");
  test(`on ${node}, by ${hosts.join(", ")}: ${names}`, async (t) => {
    t.expect("a request came for a session of another instance"); // which is part of bad input
    const suite = await bundle(t, ...phases);
    const all = await Promise.all(hosts.map((host) => failures(t, node, host, suite)));
    assertEquals(all.flat().join("\n\n"), "");
  }, { timeout: 240_000 });
}

// Each once: it is Node that runs them, whoever has started it.
for (const node of nodes.filter((_, i) => i % 2 === (runtime === "deno" ? 0 : 1))) {
  for (const hosts of everywhere) suites(node, hosts, STANDARD, BAD_INPUT);
  suites(node, ["node:http2"], STANDARD, BAD_INPUT, ["http2.test.ts"]);
}
if (runtime === "bun") suites("node-24", within, STANDARD);

testOnce("in Next.js itself, by the route of docs/frameworks.md", async (t) => {
  const port = await freePort();
  const script = join(root, "node_modules", "next", "dist", "bin", "next");
  const where = ["--port", `${port}`, "--hostname", "127.0.0.1"];
  const args = ["start", await (next ??= buildNext()), ...where];
  const child = await t.spawn("node-24", script, { args, env: { NEXT_TELEMETRY_DISABLED: "1" } });
  while (!/Ready/.test(await child.line({ timeout: 20_000 })));
  await converse(t, { port, path: "/recipe" });
  assertEquals(child.stderr(), "");
}, { timeout: 90_000 });

test("the application of Next.js is removed", async () => {
  if (next) await rm(await next, { recursive: true });
});

test("every host is tested", () => {
  assertEquals(
    Object.keys(hosts).sort(),
    [...everywhere.flat(), ...within, "node:http2"].sort(),
  );
});
