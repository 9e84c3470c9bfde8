/** What run.mjs and check.mjs share: binaries, child processes, counts. */
import { spawn } from "node:child_process";
import { existsSync, readdirSync } from "node:fs";
import { join, resolve } from "node:path";

export const root = resolve(import.meta.dirname, "..");
const modules = join(root, "node_modules");

/**
 * The binary itself, as npm installed it: killing npm's wrapper would leave
 * the runtime behind it running. Elsewhere, whatever PATH has.
 */
export function binary(name) {
  const scope = join(modules, "@deno");
  const places = name === "bun"
    ? ["bun.exe", "bun"].map((file) => join(modules, "bun", "bin", file))
    : existsSync(scope)
    ? readdirSync(scope).map((folder) => join(scope, folder, name))
    : [];
  return places.find((place) => existsSync(place)) ?? name;
}

/** Runs a command whose output is ours, or goes to a file; "code", or why it has none. */
export function run(command, args, { minutes = 60, output = "inherit" } = {}) {
  return new Promise((done) => {
    const child = spawn(command, args, {
      cwd: root,
      stdio: ["ignore", output, output],
    });
    const limit = setTimeout(() => child.kill("SIGKILL"), minutes * 60_000);
    child.on("error", (error) => {
      clearTimeout(limit);
      done(error.message);
    });
    child.on("close", (code, signal) => {
      clearTimeout(limit);
      done(code ?? `killed by ${signal} (the limit is ${minutes} minutes)`);
    });
  });
}

/** The line that ends a run, alone on its line. */
export function count({ passed, failed, skipped = 0 }) {
  const tail = skipped > 0 ? `, ${skipped} skipped` : "";
  return `${passed} passed, ${failed} failed${tail}`;
}
