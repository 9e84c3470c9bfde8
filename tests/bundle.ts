/**
 * Compilers, by their commands: esbuild's API leaves a service or a worker running, which Deno's
 * sanitizers take for a leak.
 *
 * @module
 */
import { spawn } from "node:child_process";
import { mkdir, mkdtemp, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import process from "node:process";
import { root } from "./harness.ts";
import { recipes } from "./project.ts";
import { withoutTypes } from "./spawn.ts";

/** Runs esbuild in a folder; what it wrote to its output. */
export function esbuild(args: string[], { input = "", cwd = root } = {}): Promise<string> {
  return compile("esbuild", args, { input, cwd });
}

/** The global that tells the route of Next's application whose handler is asked. */
export const NEXT_HANDLER = "duplexHandlerInNext";

/**
 * An application of Next.js, with its own compiler: one route handler for whatever is asked, and at
 * /recipe the route of docs/frameworks.md. It lies in the project, since the compiler looks for its
 * modules nowhere else; and there it takes no types. Whoever is the last removes it.
 */
export async function buildNext(): Promise<string> {
  const folder = await mkdtemp(join(root, "node_modules", ".duplex-next-"));
  const methods = ["DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"];
  const files = {
    "app/[[...path]]/route.js": `export const dynamic = "force-dynamic";
      const serve = (request) => globalThis.${NEXT_HANDLER}.getStore()(request);
      export { ${methods.map((method) => `serve as ${method}`).join(", ")} };`,
    "app/recipe/route.js": `import { sseAdapter } from "../../../../server.ts";
      import { room } from "../../../../tests/room.ts";
      export const dynamic = "force-dynamic";
      const ws = globalThis.ws ??= sseAdapter(room);
      ${withoutTypes((await recipes("Next.js"))[0]!)}`,
    "package.json": '{ "private": true, "type": "module" }',
    "next.config.js": `export default { turbopack: { root: ${JSON.stringify(root)} } };`,
  };
  for (const [name, text] of Object.entries(files)) {
    await mkdir(dirname(join(folder, name)), { recursive: true });
    await writeFile(join(folder, name), text);
  }
  await compile("next", ["build"], { cwd: folder, env: { NEXT_TELEMETRY_DISABLED: "1" } });
  return folder;
}

function compile(
  command: string,
  args: string[],
  { input = "", cwd, env = {} }: { input?: string; cwd: string; env?: Record<string, string> },
): Promise<string> {
  const child = spawn(join(root, "node_modules", ".bin", command), args, {
    cwd,
    env: { ...process.env, ...env },
  });
  let out = "";
  let errors = "";
  child.stdout.setEncoding("utf8").on("data", (text: string) => out += text);
  child.stderr.setEncoding("utf8").on("data", (text: string) => errors += text);
  child.stdin.end(input);
  return new Promise((resolve, reject) => {
    child.on("error", reject);
    child.on("close", (code) => code === 0 ? resolve(out) : reject(new Error(errors || out)));
  });
}
