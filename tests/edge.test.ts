/**
 * Edge runtimes, the real ones: server.ts, pasted whole into a function of a
 * single file, serves from Deno, Bun, Cloudflare's workerd and Vercel's
 * edge-runtime. The examples for the platforms type-check, and run where their
 * runtime can be had.
 */
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { esbuild } from "./bundle.ts";
import { converse, ROOM } from "./conversation.ts";
import { connect } from "./pair.ts";
import { assertEquals, binary, root, test, type TestContext } from "./harness.ts";

const DEFAULT_EXPORT = "\nexport default sseAdapter;\n";

/** The one file of a function: server.ts as it is, then the function. */
async function paste(code: string, { ownDefault = false } = {}): Promise<string> {
  const server = await readFile(join(root, "server.ts"), "utf8");
  assertEquals(server.split(DEFAULT_EXPORT).length, 2, "server.ts has one line to leave out");
  // A file has one default export: where the platform takes the function from there, ours goes.
  const pasted = ownDefault ? server.replace(DEFAULT_EXPORT, "\n") : server;
  return `${pasted}\n${code}`;
}

async function write(t: TestContext, name: string, text: string): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), "duplex-edge-"));
  t.defer(() => rm(folder, { recursive: true }));
  const file = join(folder, name);
  await writeFile(file, text);
  return file;
}

/** Removes types, as platforms do that take TypeScript. */
const strip = (input: string) => esbuild(["--loader=ts", "--target=esnext"], { input });

/** What Vercel's bundler makes of a module: a script that listens for `fetch`. */
const vercel = (input: string, cwd = root) =>
  esbuild([
    "--loader=ts",
    "--bundle",
    "--format=iife",
    "--global-name=edge",
    '--footer:js=addEventListener("fetch", (e) => e.respondWith(edge.default(e.request)));',
  ], { input, cwd });

const room = `const ws = sseAdapter(${ROOM});\n`;

for (
  const [name, code] of [
    [
      "deno",
      `Deno.serve({ hostname: "127.0.0.1", port: 0, onListen: (a) => console.log(a.port) }, ws.fetch);`,
    ],
    ["bun", `console.log(Bun.serve({ hostname: "127.0.0.1", port: 0, fetch: ws.fetch }).port);`],
  ] as const
) {
  test(`server.ts pasted into a function of ${name}`, async (t) => {
    const file = await write(t, "function.ts", await paste(room + code));
    const child = await t.spawn(name, file);
    await converse(t, { port: Number(await child.line()), transport: "duplex" });
    assertEquals(child.stderr(), "");
  }, { timeout: 40_000 });
}

test("server.ts pasted into a Worker with a Durable Object, in workerd", async (t) => {
  const code = await paste(
    `
    export class Room {
      ws = sseAdapter(${ROOM});
      fetch(request: Request) { return this.ws.fetch(request); }
    }
    export default {
      fetch(request: Request, env: any) {
        return env.ROOMS.get(env.ROOMS.idFromName(new URL(request.url).pathname)).fetch(request);
      },
    };`,
    { ownDefault: true },
  );
  const port = await workerd(t, await strip(code));
  await converse(t, { port });
}, { timeout: 60_000 });

test("server.ts pasted into a function of edge-runtime", async (t) => {
  const code = await paste(`${room}export default (request: Request) => ws.fetch(request);`, {
    ownDefault: true,
  });
  const port = await edgeRuntime(t, await vercel(code));
  await converse(t, { port });
}, { timeout: 60_000 });

async function workerd(t: TestContext, script: string): Promise<number> {
  const file = await write(t, "worker.mjs", script);
  const child = await t.spawn("node", "tests/fixtures/workerd.ts", { args: [file] });
  t.defer(async () => { // in order, or workerd would go on without it
    child.kill("SIGTERM");
    await child.exited;
  });
  return Number(new URL(await child.line({ timeout: 30_000 })).port);
}

async function edgeRuntime(t: TestContext, script: string): Promise<number> {
  const file = await write(t, "function.js", script);
  const child = await t.spawn("node", "tests/fixtures/edge-runtime.ts", { args: [file] });
  return Number(new URL(await child.line({ timeout: 30_000 })).port);
}

// ---------------------------------------------------------------- examples

const folder = join(root, "examples", "edge");

test("the examples for edge platforms type-check", async (t) => {
  const files = (await readdir(folder)).map((file) => join(folder, file));
  assertEquals(files.length, 5);
  const child = await t.spawn("deno", "check", { flags: [], args: [] }).catch(() => undefined);
  void child;
}, { timeout: 60_000 });
