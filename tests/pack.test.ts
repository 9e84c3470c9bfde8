/**
 * The packages, as their users have them: the npm tarball, installed in
 * projects that know nothing of this checkout, and what JSR would serve.
 */
import { execFile, spawn } from "node:child_process";
import { existsSync, readdirSync } from "node:fs";
import { copyFile, mkdir, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { basename, dirname, join, relative } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";
import { sseAdapter } from "../server.ts";
import { esbuild } from "./bundle.ts";
import { startChromium } from "./chromium.ts";
import {
  assert,
  assertEquals,
  assertMatch,
  assertStringIncludes,
  binary,
  needs,
  once,
  root,
  type TestContext,
  testOnce as test,
  until,
} from "./harness.ts";
import { connect, shutDown } from "./pair.ts";
import { entryPoints } from "./project.ts";

const timeout = 60_000;
const modules = join(root, "node_modules");

/** Runs a command to its end. */
function run(
  command: string,
  args: string[],
  { cwd = root, code: expected = 0, env = {} } = {},
): Promise<{ out: string; errors: string }> {
  env = { ...process.env, NO_COLOR: "1", npm_config_loglevel: "error", ...env };
  return new Promise((resolve, reject) => {
    execFile(command, args, { cwd, env }, (error, out, errors) => {
      const code = error ? error.code : 0;
      if (code === expected) resolve({ out, errors });
      else reject(new Error(`${command} ${args.join(" ")}: ${code}\n${out}\n${errors}`));
    });
  });
}

const node = binary("node")!;
const tsc = join(modules, "typescript", "bin", "tsc");

// ---------------------------------------------------------------- the tarball

let packed: Promise<string> | undefined;

/** The tarball, made once. */
function tarball(): Promise<string> {
  return packed ??= pack();
}

async function pack(): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), "duplex-pack-"));
  const { out } = await run(node, ["scripts/pack.mjs", folder]);
  return out.trim();
}

/** A folder with these files. */
async function folder(t: TestContext, files: Record<string, string>): Promise<string> {
  const dir = await mkdtemp(join(tmpdir(), "duplex-user-"));
  t.defer(() => rm(dir, { recursive: true, force: true }));
  for (const [name, text] of Object.entries(files)) {
    await mkdir(dirname(join(dir, name)), { recursive: true });
    await writeFile(join(dir, name), text);
  }
  return dir;
}

/** A project with these files, and the tarball installed. */
async function project(t: TestContext, files: Record<string, string>): Promise<string> {
  const dir = await folder(t, {
    "package.json": JSON.stringify({ private: true, type: "module" }),
    ...files,
  });
  const quiet = ["--offline", "--no-audit", "--no-fund", "--ignore-scripts"];
  await run("npm", ["install", ...quiet, await tarball()], { cwd: dir });
  return dir;
}

/** A program that uses every entry point; it prints what it hears. */
const program = (name: string) => `
import sseAdapter, { WebSocketSSE } from "${name}";
import { defineHooks, type Peer } from "${name}/server";
import { type Transport, WebSocketSSE as Same, type WebSocketSSEOptions } from "${name}/client";
import { cluster } from "${name}/cluster";
import { type NodeHandler, toNodeHandler } from "${name}/node";

const hooks = defineHooks<{ user: string }>({
  upgrade: () => ({ context: { user: "Ada" } }),
  message(peer: Peer<{ user: string }>, message) {
    peer.send(peer.context.user + ": " + message.text());
  },
});
const alone = cluster(() => ({ subscribe: async () => {}, publish: async () => {} }));
const ws = sseAdapter({ bidir: true, hooks, sync: alone });
const handler: NodeHandler = toNodeHandler(ws);
if (typeof handler !== "function") throw handler;
const transport: Transport = "post";
const options: WebSocketSSEOptions = {
  transport,
  fetch: (url, init) => ws.fetch(new Request(url, init)),
};
const socket: Same = new WebSocketSSE("http://localhost/room", options);
const echo = await new Promise<string>((resolve) => {
  socket.onopen = () => socket.send("hello");
  socket.onmessage = (event: MessageEvent<string>) => resolve(event.data);
});
console.log(echo);
socket.close(1000);
await ws.close();
`;
const HEARD = "Ada: hello\n";

/** Without types, for those who have none. */
const script = (name: string) =>
  esbuild(["--loader=ts", "--target=esnext"], { input: program(name) });

test("npm run pack before npm install says in a line what is missing", async (t) => {
  const dir = await folder(t, { "package.json": "{}" });
  await mkdir(join(dir, "scripts"));
  const script = join(dir, "scripts", "pack.mjs");
  await copyFile(join(root, "scripts", "pack.mjs"), script);
  const { errors } = await run("node", [script], { cwd: dir, code: 1 });
  const line = "The package is compiled by TypeScript, which is not installed: run npm install\n";
  assertEquals(errors, line);
});

test("the tarball holds what users need, and nothing else", async (t) => {
  const dir = await project(t, {});
  const installed = join(dir, "node_modules", "duplex-sse");
  const files = readdirSync(installed, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile()).map((entry) => entry.name).sort();
  const { version } = JSON.parse(await readFile(join(root, "deno.json"), "utf8"));
  const exports = await entryPoints();
  const entries = Object.values(exports).map((file) => basename(file, ".ts"))
    .concat("handover"); // which is cluster's, and no entry point
  assertEquals(
    files,
    [
      ...["CHANGELOG.md", "LICENSE", "PROTOCOL.md", "README.md", "package.json"],
      ...["bin.js", "bun-host.js", "chat.html", "chat.js", "demo.js", "network.js", "node-host.js"],
      ...["serving.js", "start.js"],
      ...["chat.js", "message.js", "mock.js", "page.html"], // of examples/ai
      ...entries.flatMap((entry) => [`${entry}.d.ts`, `${entry}.js`]),
    ].sort(),
  );
  const manifest = JSON.parse(await readFile(join(installed, "package.json"), "utf8"));
  assertEquals([manifest.name, manifest.version, manifest.private], [
    ...["duplex-sse", version],
    undefined,
  ]);
  assertEquals(Object.keys(manifest).filter((key) => /ependencies|scripts/.test(key)), []);
  assertEquals(Object.keys(manifest.exports), [...Object.keys(exports), "./package.json"]);
  for (const file of entries.flatMap((entry) => [`${entry}.js`, `${entry}.d.ts`])) {
    const text = await readFile(join(installed, file), "utf8");
    assert(!/from "\.\/\w+\.ts"|@duplex\/sse/.test(text), file);
  }
  const readme = await readFile(join(installed, "README.md"), "utf8");
  assertEquals(readme.match(/^[^|\n]* from "jsr:.*/gm), null);
}, { timeout });

test("the tarball names author and repository, as npm's provenance wants", async (t) => {
  const dir = await folder(t, {});
  const env = { GITHUB_SERVER_URL: "https://github.com", GITHUB_REPOSITORY: "someone/sse" };
  const { out } = await run(node, ["scripts/pack.mjs", join(dir, "new")], { env });
  const manifest = JSON.parse(
    (await run("tar", ["xzOf", out.trim(), "package/package.json"])).out,
  );
  assertEquals([manifest.repository, manifest.bugs], [
    { type: "git", url: "git+https://github.com/someone/sse.git" },
    { url: "https://github.com/someone/sse/issues" },
  ]);
  const license = await readFile(join(root, "LICENSE"), "utf8");
  assertStringIncludes(license, `Copyright (c) ${manifest.author}`);
  assertEquals([manifest.license, manifest.sideEffects, manifest.private], [
    ...["MIT", false],
    undefined,
  ]);
  assert(manifest.keywords.includes("websocket"));
  assertMatch(
    await readFile(join(root, ".github/workflows/publish.yml"), "utf8"),
    / --provenance /,
  );
}, { timeout });

test("publint and Are The Types Wrong find nothing in the tarball", async (t) => {
  const file = await tarball();
  const cli = (...path: string[]) => join(modules, ...path);
  const strict = [cli("publint", "src", "cli.js"), "run", file, "--strict"];
  assertMatch((await run(node, strict)).out, /All good!/);
  // The package is ESM only, which the profile takes as meant; require is tested below.
  const attw = cli("@arethetypeswrong", "cli", "dist", "index.js");
  const { out } = await run(node, [attw, file, "--profile", "esm-only", "--format", "json"]);
  const { analysis, problems } = JSON.parse(out);
  const entries = Object.keys(await entryPoints());
  assertEquals(Object.keys(analysis.entrypoints), [...entries, "./package.json"]);
  assertEquals([analysis.types.kind, Object.keys(problems)], ["included", ["CJSResolvesToESM"]]);

  // Both do see what is wrong.
  const dir = await folder(t, {});
  await run("tar", ["xzf", file, "-C", dir]);
  const manifest = join(dir, "package", "package.json");
  const text = await readFile(manifest, "utf8");
  await writeFile(manifest, text.replaceAll("./client.", "./cleint."));
  assertMatch(
    (await run(node, [strict[0]!, "run", join(dir, "package"), "--strict"], { code: 1 })).out,
    /cleint/,
  );
  await run("npm", ["pack", "--pack-destination", dir], { cwd: join(dir, "package") });
  const wrong = join(dir, basename(file));
  await run(node, [attw, wrong, "--profile", "esm-only"], { code: 1 });
}, { timeout });

for (const host of ["node-20", "node-22", "node-24"] as const) {
  test(`a CommonJS program on ${host}, from the tarball`, async (t) => {
    const dir = await project(t, {
      "main.cjs": `
        const { sseAdapter, WebSocketSSE } = require("duplex-sse");
        const { toNodeHandler } = require("duplex-sse/node");
        console.log([sseAdapter, WebSocketSSE, toNodeHandler].map((value) => typeof value).join());`,
    });
    const { out } = await run(binary(host)!, ["--no-warnings", "main.cjs"], { cwd: dir });
    assertEquals(out, "function,function,function\n");
  }, { timeout, skip: needs(host) });
}

test("CHANGELOG.md is kept in the format of keepachangelog.com", async () => {
  const text = await readFile(join(root, "CHANGELOG.md"), "utf8");
  const lines = text.split("\n");
  assertEquals(lines[0], "# Changelog");
  const versions = lines.filter((line) => line.startsWith("## "));
  assertEquals(versions[0], "## [Unreleased]");
  for (const version of versions.slice(1)) {
    assertMatch(version, /^## \[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d$/);
  }
  assertEquals(
    versions.slice(1),
    versions.slice(1).toSorted((a, b) => b.localeCompare(a, "en", { numeric: true })),
  );
  const kinds = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"];
  for (const line of lines.filter((line) => line.startsWith("### "))) {
    assert(kinds.includes(line.slice(4)), line);
  }
  // A tag publishes only what has a heading with its version and its day.
  const workflow = await readFile(join(root, ".github/workflows/publish.yml"), "utf8");
  const [, check] = /^ +(grep .*CHANGELOG\.md)$/m.exec(workflow)!;
  const dir = await mkdtemp(join(tmpdir(), "duplex-changelog-"));
  try {
    for (
      const [heading, code] of [["## [1.2.3] - 2027-01-31", 0], ["## [Unreleased]", 1]] as const
    ) {
      await writeFile(join(dir, "CHANGELOG.md"), `# Changelog\n\n${heading}\n`);
      await run("bash", ["-c", check!], { cwd: dir, env: { version: "1.2.3" }, code });
    }
  } finally {
    await rm(dir, { recursive: true });
  }
});

test("the documents of both packages link to what their readers have", async (t) => {
  const { out, errors } = await run(binary("deno")!, ["publish", "--dry-run", "--allow-dirty"]);
  const listed = `${out}${errors}`.matchAll(/^ +(file:\S+) \([\d.]+K?B\)$/gm);
  const atJsr = new Set(Array.from(listed, ([, url]) => relative(root, fileURLToPath(url!))));
  assert(atJsr.has("README.md"));
  const documents = ["README.md", "PROTOCOL.md"];
  const docs = readdirSync(join(root, "docs")).filter((name) => name.endsWith(".md"))
    .map((name) => `docs/${name}`);
  for (const file of [...documents, "examples/README.md", ...docs]) {
    for (const link of await links(join(root, file))) {
      const target = join(dirname(file), link);
      assert(/^https?:/.test(link) || atJsr.has(target), `at JSR, ${file} links to ${link}`);
    }
  }

  const installed = join(await project(t, {}), "node_modules", "duplex-sse");
  const { name, version } = JSON.parse(await readFile(join(root, "deno.json"), "utf8"));
  const jsr = `https://jsr.io/${name}/${version}/`;
  for (const file of documents) {
    for (const link of await links(join(installed, file))) {
      const known = link.startsWith(jsr)
        ? atJsr.has(link.slice(jsr.length))
        : /^https?:/.test(link) || existsSync(join(installed, link));
      assert(known, `at npm, ${file} links to ${link}`);
    }
  }
}, { timeout });

/** Where a document links to, itself aside. */
async function links(file: string): Promise<string[]> {
  const text = await readFile(file, "utf8");
  return [...text.matchAll(/\]\(([^)#]+)/g)].map((match) => match[1]!);
}

for (const runtime of ["node", "bun", "deno"] as const) {
  test(`a program on ${runtime}, from the tarball`, async (t) => {
    const dir = await project(t, { "main.js": await script("duplex-sse") });
    const args = runtime === "deno" ? ["run", "-A", "main.js"] : ["main.js"];
    const { out, errors } = await run(binary(runtime)!, args, { cwd: dir });
    assertEquals([out, errors], [HEARD, ""]);
  }, { timeout });
}

test(
  "the tarball's classes are shown by their names, which compilers may take for a variable's",
  async (t) => {
    const dir = await project(t, {
      "main.js": `import { WebSocketSSE } from "duplex-sse/client";
      import { sseAdapter } from "duplex-sse/server";
      import { WebSocketStreamSSE } from "duplex-sse/stream";
      const ws = sseAdapter({ bidir: true, hooks: { open: (peer) => console.log(peer) } });
      const fetch = (url, init) => ws.fetch(new Request(url, init));
      const socket = new WebSocketSSE("http://localhost/room", { fetch });
      const never = () => new Promise(() => {});
      console.log(socket, new WebSocketStreamSSE("http://localhost/room", { fetch: never }));
      socket.onopen = () => process.exit();`,
    });
    const { out } = await run(node, ["main.js"], { cwd: dir });
    const shown = out.match(/\b\w+(?=:? \{)/g);
    assertEquals(shown, ["WebSocketSSE", "WebSocketStreamSSE", "peer"]);
  },
  { timeout },
);

for (const entry of ["jsr:@duplex/sse", "@duplex/sse"]) {
  test(`a program on Deno, from ${entry} as JSR would serve it`, async (t) => {
    const { exports } = JSON.parse(await readFile(join(root, "deno.json"), "utf8"));
    const imports = Object.fromEntries(
      Object.entries<string>(exports).map(([path, file]) => [
        path.replace(".", entry),
        String(pathToFileURL(join(root, file))),
      ]),
    );
    const dir = await folder(t, {
      "deno.json": JSON.stringify({ imports }),
      "main.ts": program(entry),
    });
    const { out } = await run(binary("deno")!, ["run", "-A", "--check", "main.ts"], { cwd: dir });
    assertEquals(out, HEARD);
  }, { timeout });
}

// ---------------------------------------------------------------- types

for (
  const [name, { lib, types, skipLibCheck }] of Object.entries({
    "the DOM's types": { lib: "ESNext,DOM", types: "", skipLibCheck: "false" },
    "Bun's types alone": { lib: "ESNext", types: "bun-types", skipLibCheck: "true" },
  })
) {
  test(`a strict TypeScript project with ${name}`, async (t) => {
    const dir = await project(t, { "main.ts": program("duplex-sse") });
    for (
      const resolution of [
        ["--module", "NodeNext"],
        ["--module", "Preserve", "--moduleResolution", "Bundler"],
      ]
    ) {
      await run(node, [
        tsc,
        ...["--strict", "--verbatimModuleSyntax", "--exactOptionalPropertyTypes", "--noEmit"],
        ...["--target", "ESNext", "--lib", lib, "--skipLibCheck", skipLibCheck],
        ...["--types", types, "--typeRoots", modules],
        ...resolution,
        "main.ts",
      ], { cwd: dir });
    }
  }, { timeout });
}

// ---------------------------------------------------------------- bundles

const browser = await startChromium();

const page = `
import { WebSocketSSE } from "duplex-sse";
const socket = new WebSocketSSE("/room");
socket.onopen = () => socket.send("hello");
socket.onmessage = ({ data }) => document.title = data;
`;

const bundlers: Record<string, (dir: string) => Promise<unknown>> = {
  esbuild: (dir) =>
    esbuild(
      ["page.js", "--bundle", "--minify", "--format=esm", "--outfile=dist/page.js"],
      { cwd: dir },
    ),
  vite: (dir) => run(node, [join(modules, "vite", "bin", "vite.js"), "build"], { cwd: dir }),
};

for (const [name, bundle] of Object.entries(bundlers)) {
  test(`a page bundled by ${name}`, async (t) => {
    const html = '<!doctype html><title>-</title><script type="module" src="/page.js"></script>';
    const dir = await project(t, { "page.js": page, "index.html": html });
    await bundle(dir);
    const files = new Map<string, string>([["/", html]]);
    for (const file of readdirSync(join(dir, "dist"), { recursive: true }).map(String)) {
      if (!/\.(js|html)$/.test(file)) continue;
      files.set(
        `/${file}`.replace("index.html", ""),
        await readFile(join(dir, "dist", file), "utf8"),
      );
    }
    // The client alone: whoever imports it does not carry the server.
    const scripts = [...files].filter(([path]) => path.endsWith(".js")).map(([, text]) => text);
    assertEquals(scripts.length, 1);
    assert(!scripts[0]!.includes("maxPeers"));

    const ws = sseAdapter({
      bidir: true,
      hooks: { message: (peer, message) => void peer.send(`echo: ${message}`) },
    });
    t.defer(() => shutDown(ws));
    const server = await t.serve((request, info) => {
      if (ws.handles(request)) return ws.fetch(request, info);
      const path = new URL(request.url).pathname;
      const type = path.endsWith(".js") ? "text/javascript" : "text/html";
      return new Response(files.get(path) ?? null, { headers: { "content-type": type } });
    });
    const tab = await (await browser.windows(t)).newPage();
    await tab.goto(server.url);
    await tab.waitForFunction(() => document.title === "echo: hello");
  }, { timeout, skip: needs("chromium") });
}

// ---------------------------------------------------------------- the command

/** By the runtime that the shebang names, Node, where it exists; by Bun if told so. */
const launchers = {
  "npx": ["npx", "--yes", "--offline"],
  "bunx": [binary("bun")!, "x"],
  "bunx --bun": [binary("bun")!, "x", "--bun"],
};

for (const [name, [launcher, ...flags]] of Object.entries(launchers)) {
  test(`${name} runs the command from the tarball, and clients chat through it`, async (t) => {
    const dir = await folder(t, { "package.json": "{}" });
    const env = { npm_config_cache: join(dir, "npm"), npm_config_loglevel: "error", TMPDIR: dir };
    const options = { cwd: dir, env };
    const args = (...rest: string[]) => [...flags, "--package", file, "duplex-sse", ...rest];
    const file = await tarball();
    const { out } = await run(launcher!, args("--help"), options);
    assertMatch(out, /--port <number>[^]*--hostname <name>[^]*--help/);
    const { errors } = await run(launcher!, args("--port", "no"), { ...options, code: 2 });
    assertStringIncludes(errors, "Not a port: no");

    // `timeout` ends what it runs with all its children, which a launcher does not.
    const command = ["60", launcher!, ...args("--port", "0", "--hostname", "localhost")];
    const child = spawn("timeout", command, {
      ...options,
      env: { ...process.env, ...options.env },
    });
    const closed = new Promise((resolve) => child.on("close", resolve));
    t.defer(() => {
      child.kill();
      return closed;
    });
    let printed = "";
    for (const output of [child.stdout, child.stderr]) {
      output.setEncoding("utf8").on("data", (text: string) => printed += text);
    }
    const url = await until(() => /^Chat on (http:\/\/localhost:\d+\/)$/m.exec(printed)?.[1], {
      timeout: 15_000,
    });
    await chat(t, url);
    assertEquals(printed, `Chat on ${url}\n`);
  }, { timeout });
}

test("deno run jsr:@duplex/sse/bin starts the demo, as JSR would serve it", async (t) => {
  const jsr = await t.serve(async (request) => {
    const path = join(root, new URL(request.url).pathname);
    const type = path.endsWith(".ts") ? "text/typescript" : "text/plain";
    return new Response(await readFile(path), { headers: { "content-type": type } });
  });
  const { exports } = JSON.parse(await readFile(join(root, "deno.json"), "utf8"));
  const bin = new URL(exports["./bin"], jsr.url).href;
  const dir = await folder(t, {
    "deno.json": JSON.stringify({ imports: { "jsr:@duplex/sse/bin": bin } }),
    "main.ts": 'import "jsr:@duplex/sse/bin";',
  });
  // It may read no file: what it serves is where it has come from. From jsr.io all may import.
  const flags = ["-N", "--allow-env=HOST,PORT", "--allow-sys=networkInterfaces"]
    .concat(`--allow-import=${new URL(bin).host}`);
  const child = await t.spawn("deno", join(dir, "main.ts"), {
    flags: ["run", "--no-check", `--config=${join(dir, "deno.json")}`, ...flags],
    env: { DENO_DIR: join(dir, "cache"), HOST: "127.0.0.1", PORT: "0" },
  });
  t.expect("Download http");
  const line = await child.line({ timeout: 30_000 });
  const [, url] = /^Chat on (http:\S+)$/.exec(line)!;
  assertStringIncludes(await (await fetch(`${url}ai/`)).text(), "<title>AI chat");
  await chat(t, url!);
}, { timeout });

/** Two people meet. */
async function chat(t: TestContext, url: string): Promise<void> {
  assertStringIncludes(await (await fetch(url)).text(), "<title>Chat");
  const client = await fetch(`${url}client.js`);
  assertEquals(client.headers.get("content-type"), "text/javascript; charset=utf-8");
  assertStringIncludes(await client.text(), "class WebSocketSSE extends EventTarget");
  const tabs = ["a", "b"].map((digit) => digit.repeat(32)); // as the page has them, to be cut
  const [ada, grace] = tabs.map((tab) => {
    const { socket, opened, messages } = connect(t, `${url}chat?tab=${tab}`);
    const send = (message: unknown) => socket.send(JSON.stringify(message));
    const heard = (type: string) =>
      messages.all.map((data) => JSON.parse(String(data))).filter((m) => m.type === type);
    return { socket, opened, send, heard };
  }) as [Person, Person];
  for (const [person, name] of [[ada, "Ada"], [grace, "Grace"]] as const) {
    await person.opened;
    person.send({ type: "join", name });
    await until(() => person.heard("joined")[0]?.name === name);
  }
  const cut = await fetch(`${url}cut`, { method: "POST", headers: { "x-chat-tab": tabs[1]! } });
  assertEquals(cut.status, 204);
  await once(grace.socket, "drop");
  ada.send({ type: "say", id: "1", text: "Hello" });
  for (const { heard } of [ada, grace]) {
    const said = await until(() => heard("said")[0], { timeout: 15_000 });
    assertEquals([said!.name, said!.text], ["Ada", "Hello"]);
  }
  assertEquals(grace.socket.stats.resumes, 1);
  for (const { socket } of [ada, grace]) socket.close();
}

interface Person {
  readonly socket: ReturnType<typeof connect>["socket"];
  readonly opened: Promise<void>;
  send(message: unknown): void;
  // deno-lint-ignore no-explicit-any
  heard(type: string): any[];
}

test("the tarball is removed", async () => {
  await rm(dirname(await tarball()), { recursive: true });
});
