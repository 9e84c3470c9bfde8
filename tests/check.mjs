/**
 * The static checks, each by its name: `node tests/check.mjs`, which is what
 * `npm run check` does. An argument picks those whose names contain it.
 */
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { binary, count, root, run } from "./tools.mjs";

const deno = binary("deno");
const tsc = join(root, "node_modules", "typescript", "bin", "tsc");
const modules = [
  "mod.ts",
  "server.ts",
  "client.ts",
  "stream.ts",
  "cluster.ts",
  "drivers.ts",
  "parking.ts",
  "ai.ts",
  "node.ts",
];

const checks = {
  "deno fmt": () => run(deno, ["fmt", "--check"]),
  "deno lint": () => run(deno, ["lint"]),
  // Alone, so that no type that the tests bring along can leak in; and with
  // none of our options, as in a program that uses the module.
  "deno check of mod.ts alone": () => run(deno, ["check", "mod.ts"]),
  "deno check of mod.ts without deno.json": () => run(deno, ["check", "--no-config", "mod.ts"]),
  "deno check of everything": () => run(deno, ["check", "."]),
  "deno doc --lint": () => run(deno, ["doc", "--lint", ...modules]),
  "deno publish --dry-run": () => run(deno, ["publish", "--dry-run", "--allow-dirty"]),
  "tsc with the DOM's types, strict and erasable": () =>
    run(process.execPath, [tsc, "-p", "tests/tsconfig.web.json"]),
  "tsc with the hooks of crossws and graphql-ws, and DOM's WebSocket": () =>
    run(process.execPath, [tsc, "-p", "tests/tsconfig.types.json"]),
  "deno check against the WebSocket of Deno alone": () =>
    run(deno, ["check", "--no-config", "tests/types/websocket.ts"]),
  "tsc with Bun's types alone": () => run(process.execPath, [tsc, "-p", "tests/tsconfig.bun.json"]),
  "the same version in deno.json and package.json": sameVersion,
  "no root tsconfig.json, which Deno would read": noTsconfig,
};

const [filter = ""] = process.argv.slice(2);
const failed = [];
let passed = 0;
for (const [name, check] of Object.entries(checks)) {
  if (!name.includes(filter)) continue;
  console.log(`\ncheck: ${name}`);
  const code = await check();
  if (code === 0) passed++;
  else failed.push(`${name}: ${code}`);
}

console.log();
for (const failure of failed) console.log(`failed check: ${failure}`);
console.log(`\n${count({ passed, failed: failed.length })}`);
process.exitCode = passed > 0 && failed.length === 0 ? 0 : 1;

function sameVersion() {
  const [one, other] = ["deno.json", "package.json"].map((file) =>
    JSON.parse(readFileSync(join(root, file), "utf8")).version
  );
  return one === other ? 0 : `${one} and ${other}`;
}

function noTsconfig() {
  return readdirSync(root).includes("tsconfig.json") ? "there is one" : 0;
}
