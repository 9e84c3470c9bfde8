/**
 * Edge runtimes, the real ones: server.ts, pasted whole into a function of a
 * single file, serves from Deno, Bun, Cloudflare's workerd and Vercel's
 * edge-runtime. The examples for the platforms type-check, and run where their
 * runtime can be had.
 */
import { mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { esbuild } from "./bundle.ts";
import { converse } from "./conversation.ts";
import {
  assert,
  assertEquals,
  assertMatch,
  type Child,
  root,
  sleep,
  test,
  type TestContext,
  until,
} from "./harness.ts";
import { connect, type Connected } from "./pair.ts";

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

/** The options of the room, as text. */
const source = await readFile(join(root, "tests", "room.ts"), "utf8");
const ROOM = /^export const room: SSEOptions = (\{.*^\});$/ms.exec(source)![1]!;

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
    await converse(t, { port: Number(await child.line()) });
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
  const [port, child] = await workerd(t, await strip(code));
  await converse(t, { port });
  // Where it tells of what one request did to another; and of who left in the middle of an answer.
  t.expect("disconnected: ::write", "stack: ");
  const told = child.stderr().split("\n");
  assertEquals(told.filter((line) => !/disconnected: ::write|^stack: |^$/.test(line)), []);
}, { timeout: 60_000 });

test("server.ts pasted into a function of edge-runtime", async (t) => {
  const code = await paste(`${room}export default (request: Request) => ws.fetch(request);`, {
    ownDefault: true,
  });
  const [port, child] = await edgeRuntime(t, await vercel(code));
  await converse(t, { port });
  assertEquals(child.stderr(), "");
}, { timeout: 60_000 });

async function workerd(t: TestContext, script: string): Promise<[port: number, child: Child]> {
  const file = await write(t, "worker.mjs", script);
  const child = await t.spawn("node", "tests/fixtures/workerd.ts", { args: [file] });
  t.defer(async () => { // in order, or workerd would go on without it
    child.kill("SIGTERM");
    await child.exited;
  });
  return [Number(new URL(await child.line({ timeout: 30_000 })).port), child];
}

async function edgeRuntime(t: TestContext, script: string): Promise<[port: number, child: Child]> {
  const file = await write(t, "function.js", script);
  const child = await t.spawn("node", "tests/fixtures/edge-runtime.ts", { args: [file] });
  return [Number(new URL(await child.line({ timeout: 30_000 })).port), child];
}

// ---------------------------------------------------------------- examples

const folder = join(root, "examples", "edge");

test("the examples for edge platforms type-check", async (t) => {
  const [first, ...rest] = (await readdir(folder)).map((file) => join(folder, file));
  assertEquals(rest.length, 7);
  const child = await t.spawn("deno", first!, { flags: ["check"], args: rest });
  assertEquals((await child.exited).code, 0, child.stderr());
}, { timeout: 60_000 });

test("each of them tells the platform's limits, and what resumption makes of them", async () => {
  for (const file of await readdir(folder)) {
    const [head] = (await readFile(join(folder, file), "utf8")).split("*/\n");
    for (const limit of ["Duration", "First byte", "Isolation"]) {
      assert(head!.includes(`\n * - ${limit}: `), `${file} does not tell: ${limit}`);
    }
    assertMatch(head!, /\bresum(es|ption)\b/i, file);
  }
});

test("examples/README.md lists every example", async () => {
  const index = await readFile(join(root, "examples", "README.md"), "utf8");
  for (const file of await readdir(join(root, "examples"), { recursive: true })) {
    if (file.endsWith(".ts")) assert(index.includes(`](${file})`), file);
  }
});

/** A heartbeat of the examples here, in ms, instead of seconds. */
const HEARTBEAT = 300;

/** An example as it is, but for where the server is, and for its heartbeat. */
async function hurried(t: TestContext, name: string): Promise<string> {
  const source = await readFile(join(folder, name), "utf8");
  const server = JSON.stringify(join(root, "server.ts"));
  const code = source.replace('"../../server.ts"', server)
    .replace("bidir: true,", `bidir: true, heartbeatInterval: ${HEARTBEAT},`);
  assert(code.includes(server) && code.includes("heartbeatInterval"));
  return await write(t, name, code);
}

/**
 * Two who hear each other, and still do after two heartbeats, without a drop. A feed counts what is
 * said, and tells newcomers the count; in a room all hear it. Returns one of the two.
 */
async function meet(t: TestContext, port: number, kind: "room" | "feed"): Promise<Connected> {
  const both = [1, 2].map(() => connect(t, `http://127.0.0.1:${port}/room`));
  let count = 0;
  const hear = async ({ messages }: Connected) => {
    const heard = String(await messages.next());
    if (kind === "room") assertMatch(heard, /^[^:]+: hello$/);
    else assertEquals(heard, `{"count":${count}}`);
  };
  for (const each of both) {
    await each.opened;
    if (kind === "feed") await hear(each);
  }
  for (let round = 0; round < 2; round++) {
    for (const { socket } of both) {
      count++;
      socket.send("hello");
      for (const each of both) await hear(each);
    }
    await sleep(2 * HEARTBEAT, t.signal);
  }
  assertEquals(both.map(({ events, messages }) => [events, messages.left]), [
    [["open"], 0],
    [["open"], 0],
  ]);
  return both[0]!;
}

/** Runs a function as its platform does, on Deno; Deno.serve takes its address from the environment. */
async function onDeno(t: TestContext, file: string): Promise<[port: number, child: Child]> {
  const env = { DENO_SERVE_ADDRESS: "tcp:127.0.0.1:0" };
  t.expect("Listening on http");
  const child = await t.spawn("deno", file, { env });
  const port = await until(() => /Listening on http:\S+:(\d+)\//.exec(child.stderr())?.[1], {
    timeout: 10_000,
  });
  return [Number(port), child];
}

test("examples/edge/deno-deploy.ts: two hear each other, and its goodbye at SIGINT", async (t) => {
  const [port, child] = await onDeno(t, await hurried(t, "deno-deploy.ts"));
  const visitor = await meet(t, port, "room");
  child.kill("SIGINT");
  assertEquals((await visitor.closed).code, 1012);
  await child.exited; // Deno's node:child_process names the signal, however it ended
}, { timeout: 20_000 });

test("examples/edge/netlify.ts, on Deno: two hear each other", async (t) => {
  const file = await write(
    t,
    "feed.ts",
    `import feed, { config } from "${pathToFileURL(await hurried(t, "netlify.ts"))}";
    Deno.serve((request, info) => {
      if (new URL(request.url).pathname !== config.path.replace("feed", "room")) throw config;
      return feed(request, { ip: info.remoteAddr.hostname }) ?? new Response("the page");
    });`,
  );
  const [port] = await onDeno(t, file);
  await meet(t, port, "feed");
  assertEquals(await (await fetch(`http://127.0.0.1:${port}/room`)).text(), "the page");
}, { timeout: 20_000 });

test("examples/edge/cloudflare.ts, in workerd: two hear each other", async (t) => {
  const file = await hurried(t, "cloudflare.ts");
  const code = `export * from "${file}"; export { default } from "${file}";`;
  const [port] = await workerd(t, await bundled(code));
  await meet(t, port, "room");
  assertEquals(await (await fetch(`http://127.0.0.1:${port}/`)).text(), "Hello");
}, { timeout: 40_000 });

/** One file, as platforms make it of a module. */
function bundled(code: string): Promise<string> {
  return esbuild(["--loader=ts", "--bundle", "--format=esm"], { input: code });
}
