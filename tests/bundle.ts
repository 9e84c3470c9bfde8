/**
 * esbuild, by its command: its API leaves a service or a worker running, which
 * Deno's sanitizers take for a leak.
 *
 * @module
 */
import { spawn } from "node:child_process";
import { join } from "node:path";
import { root } from "./harness.ts";

/** Runs esbuild in a folder; what it wrote to its output. */
export function esbuild(args: string[], { input = "", cwd = root } = {}): Promise<string> {
  const child = spawn(join(root, "node_modules", ".bin", "esbuild"), args, { cwd });
  let out = "";
  let errors = "";
  child.stdout.setEncoding("utf8").on("data", (text: string) => out += text);
  child.stderr.setEncoding("utf8").on("data", (text: string) => errors += text);
  child.stdin.end(input);
  return new Promise((resolve, reject) => {
    child.on("error", reject);
    child.on("close", (code) => code === 0 ? resolve(out) : reject(new Error(errors)));
  });
}
