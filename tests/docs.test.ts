// README.md and PROTOCOL.md tell the truth: every snippet is executed or type-checked here, and
// every HTTP exchange of the two protocols is held against real servers.

import { existsSync } from "node:fs";
import { mkdtemp, readdir, readFile, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { execFile } from "node:child_process";
import { gzipSync } from "node:zlib";
import { type AiResults, interruptionTable, overheadTable } from "../bench/ai-tables.ts";
import { marksOf } from "../bench/markdown.ts";
import { update } from "../bench/performance.ts";
import { cluster } from "../cluster.ts";
import { sseAdapter, type SSEOptions } from "../mod.ts";
import { MemoryBus } from "./bus.ts";
import { esbuild } from "./bundle.ts";
import { CONTENDERS } from "./contenders.ts";
import {
  assert,
  assertEquals,
  assertGreater,
  assertMatch,
  binary,
  freePort,
  rawRequest,
  root,
  test,
  type TestContext,
  within,
} from "./harness.ts";
import { INTERRUPTIONS } from "./interruptions.ts";
import { entryPoints } from "./project.ts";

interface Block {
  language: string;
  text: string;
}

async function blocks(file: string): Promise<Block[]> {
  const text = await readFile(join(root, file), "utf8");
  return [...text.matchAll(/^```([a-z][a-z ]*)\n([\s\S]*?)^```$/gm)]
    .map(([, language, text]) => ({ language: language!, text: text! }));
}

/** Runs a program to its end, or until it has printed what is awaited. */
function output(args: string[], awaited?: string): Promise<{ code: number | null; out: string }> {
  return new Promise((resolve) => {
    let out = "";
    const child = execFile(binary("deno")!, args, { env: { ...process.env, NO_COLOR: "1" } });
    const take = (chunk: string) => {
      out += chunk;
      if (awaited !== undefined && out.includes(awaited)) child.kill();
    };
    child.stdout!.on("data", take);
    child.stderr!.on("data", take);
    child.on("close", (code) => resolve({ code, out }));
  });
}

/** A folder where `jsr:@duplex/sse` is this checkout, and packages are those that it has. */
async function consumer(): Promise<{ dir: string; [Symbol.asyncDispose](): Promise<void> }> {
  const dir = await mkdtemp(join(tmpdir(), "duplex-docs-"));
  const { exports } = JSON.parse(await readFile(join(root, "deno.json"), "utf8"));
  const imports = Object.fromEntries(
    Object.entries<string>(exports).flatMap(([entry, file]) =>
      ["jsr:@duplex/sse", "@duplex/sse"].map((name) => [
        entry.replace(".", name),
        `file://${join(root, file)}`,
      ])
    ),
  );
  await writeFile(
    join(dir, "deno.json"),
    JSON.stringify({
      imports,
      nodeModulesDir: "manual",
      compilerOptions: {
        lib: ["deno.window", "dom", "dom.iterable", "dom.asynciterable", "esnext"],
      },
    }),
  );
  await writeFile(join(dir, "package.json"), await readFile(join(root, "package.json")));
  await symlink(join(root, "node_modules"), join(dir, "node_modules"));
  return { dir, [Symbol.asyncDispose]: () => rm(dir, { recursive: true, force: true }) };
}

/** The `@example` snippets of a source file's doc comments, those marked `ignore` aside. */
async function examples(file: string): Promise<string[]> {
  const source = await readFile(join(root, file), "utf8");
  return [...source.matchAll(/\/\*\*[\s\S]*?\*\//g)].flatMap(([comment]) =>
    [...comment.replace(/^ *\* ?/gm, "").matchAll(/^```ts\n([\s\S]*?)^```$/gm)].map((m) => m[1]!)
  );
}

test("README.md's snippets type-check, as do the examples in doc comments", async (t) => {
  const { dir } = t.use(await consumer());
  const snippets = (await blocks("README.md")).filter(({ language }) => language === "ts")
    .map(({ text }) => text);
  for (const page of ["frameworks", "ai", "operate", "platforms", "pages"]) {
    const file = `docs/${page}.md`;
    for (const { language, text } of await blocks(file)) {
      if (language === "ts") snippets.push(text);
    }
  }
  const files = [
    "server.ts",
    "client.ts",
    "stream.ts",
    "cluster.ts",
    "drivers.ts",
    "parking.ts",
    "ai.ts",
    "node.ts",
  ];
  for (const file of ["mod.ts", ...files]) {
    snippets.push(...await examples(file));
  }
  assert(snippets.length >= 8, `only ${snippets.length} snippets found`);
  await typeCheck(dir, snippets);
}, { timeout: 60_000 });

async function typeCheck(dir: string, snippets: string[]): Promise<void> {
  const files = await Promise.all(snippets.map(async (text, i) => {
    const [, name = `snippet-${i}.ts`] = /^\/\/ (\S+\.ts)\n/.exec(text) ?? []; // some import each other
    const file = join(dir, name);
    const code = text.replaceAll('"duplex-sse/', '"jsr:@duplex/sse/'); // as npm calls it
    await writeFile(file, `${code}\nexport {};\n`);
    return file;
  }));
  const { code, out } = await output(["check", ...files]);
  assertEquals(code, 0, out);
}

/** The cells of the row that begins with this one, in the tables of README.md's section. */
async function row(section: string, name: string): Promise<string[]> {
  const readme = await readFile(join(root, "README.md"), "utf8");
  const [, text] = readme.split(`\n## ${section}\n`);
  const line = text!.split("\n## ")[0]!.split("\n").find((line) => line.startsWith(`| ${name} `));
  assert(line, `README.md's section ${section} has no row ${name}`);
  return line.split("|").slice(1, -1).map((cell) => cell.trim());
}

/** What stands in backticks. */
const codes = (cell: string) => Array.from(cell.matchAll(/`([^`]+)`/g), (match) => match[1]!);

test("README.md's recipes type-check, and so does the move from crossws", async (t) => {
  const { dir } = t.use(await consumer());
  const recipe = async (name: string) => codes((await row("Recipes", name))[1]!);
  const ours = 'import { sseAdapter, WebSocketSSE } from "jsr:@duplex/sse";';
  const room = `${ours} const ws = sseAdapter({ bidir: true });`;
  const [hooks, option] = await recipe("graphql-ws");
  const onNode = await recipe("Node");
  const node = onNode.find((code) => code.startsWith("serve("))!;
  const [server, use, hook] = ["createServer(", "app.use(", "app.addHook("].map((start) =>
    onNode.find((code) => code.startsWith(start))!
  );
  const handler = `${room} import { toNodeHandler } from "jsr:@duplex/sse/node";`;
  const [diff] = (await blocks("README.md")).filter(({ language }) => language === "diff");
  const added = diff!.text.split("\n").filter((line) => line.startsWith("+"));
  assert(diff!.text.split("\n").length <= 5 + 1);
  await typeCheck(dir, [
    `${room} import { Hono } from "hono"; const app = new Hono(); ${(await recipe("Hono"))[0]};`,
    `${ours} import { H3 } from "h3"; const app = new H3(); ${(await recipe("h3"))[0]};`,
    `${room} import { serve } from "srvx"; ${node};`,
    `${room} import { serve } from "@hono/node-server"; ${node};`,
    `${handler} import { createServer } from "node:http"; ${server}.listen(0);`,
    `${handler} import { createServer } from "node:https"; ${server}.listen(0);`,
    `${handler} import { createServer } from "node:http2"; ${server}.listen(0);`,
    `${handler} import express from "express"; const app = express(); ${use};`,
    `${handler} import Koa from "koa"; const app = new Koa(); ${use};`,
    `${handler} import fastify from "fastify"; const app = fastify(); ${hook};`,
    `${ours}
    import type { GraphQLSchema } from "graphql";
    import { createClient } from "graphql-ws";
    import { makeHooks } from "graphql-ws/use/crossws";
    declare const schema: GraphQLSchema;
    sseAdapter({ ${hooks} });
    createClient({ url: "", ${option} });`,
    `${ours} import { WebSocket as ReconnectingWebSocket } from "partysocket"; const url = "";
    ${(await recipe("partysocket"))[0]};`,
    `${added.map((line) => line.slice(1)).join("\n")} new WebSocketSSE("", {}); sseAdapter({});`,
  ]);
}, { timeout: 60_000 });

for (
  const [file, section, name, unlisted] of [
    ["server.ts", "Server", "SSEOptions", ["perMessageDeflate", "compress"]], // do nothing
    ["client.ts", "Client", "WebSocketSSEOptions", ["bdir"]], // as crossws misspells it
  ] as const
) {
  test(`README.md lists each member of ${name}, with its default`, async () => {
    const source = await readFile(join(root, file), "utf8");
    const [, body] = new RegExp(`^export interface ${name}\\b.*\\{$([^]*?)^\\}$`, "m").exec(
      source,
    )!;
    let members = 0;
    for (
      const [, comment, member] of body!.matchAll(/\/\*\*([^]*?)\*\/\s+(?:\/\/.*\s+)*(\w+)\?/g)
    ) {
      if ((unlisted as readonly string[]).includes(member!)) continue;
      members++;
      const [, listed] = await row(section, `\`${member}\``);
      const [, value] = /\bDefault: ("[\w-]+"|[\d,]+(?: [KM]iB)?|true|false|none)/.exec(comment!) ??
        [];
      const plain = (text: string) => text.replace(/[\`,]/g, "");
      if (value) assertEquals(plain(listed!), plain(value), member);
    }
    assertEquals(members, body!.match(/^ {2}\w+\?/gm)!.length - unlisted.length);
  });
}

test("README.md tells the sizes as they are", async () => {
  const readme = await readFile(join(root, "README.md"), "utf8");
  for (const file of ["client", "server", "cluster"]) {
    const minified = await esbuild([`${file}.ts`, "--bundle", "--minify", "--format=esm"]);
    const size = gzipSync(minified, { level: 9 }).length / 1000;
    const told = [
      ...readme.matchAll(new RegExp(`\\b${file}\`? (?:is |another )?([\\d.]+) kB`, "g")),
    ];
    assertGreater(told.length, 0);
    for (const [text, number] of told) { // zlibs differ a little
      assert(Math.abs(Number(number) - size) <= 0.1, `${text}: ${size} kB`);
    }
  }
});

test("every function and class has an example, at each entry point", async () => {
  let found = 0;
  for (const file of Object.values(await entryPoints())) {
    const { code, out } = await output(["doc", "--json", join(root, file)]);
    assertEquals(code, 0, out);
    const [module] = Object.values<Documented>(JSON.parse(out).nodes);
    assert(module!.module_doc?.tags?.some(({ kind }) => kind === "example"), file);
    for (const { name, declarations } of module!.symbols) {
      if (!declarations.some(({ kind }) => kind === "function" || kind === "class")) continue;
      if (name === "WebsocketSSE") continue; // the other spelling of WebSocketSSE
      const tags = declarations.flatMap(({ jsDoc }) => jsDoc?.tags ?? []);
      assert(tags.some(({ kind }) => kind === "example"), `${file}: ${name}`);
      found++;
    }
  }
  assert(found > 6);
}, { timeout: 30_000 });

interface Documented {
  module_doc?: { tags?: { kind: string }[] };
  symbols: {
    name: string;
    declarations: { kind: string; jsDoc?: { tags?: { kind: string }[] } }[];
  }[];
}

test("README.md's first snippet prints what stands below it", async (t) => {
  const { dir } = t.use(await consumer());
  const [program, result] = await blocks("README.md");
  assertEquals([program!.language, result!.language], ["ts", "text"]);
  const port = await freePort();
  await writeFile(join(dir, "first.ts"), program!.text.replaceAll("8000", String(port)));
  const { out } = await within(output(["run", "-A", join(dir, "first.ts")], result!.text), 30_000);
  assert(out.includes(result!.text), out);
}, { timeout: 40_000 });

test("README.md's two commands are scripts of package.json", async () => {
  const { scripts } = JSON.parse(await readFile(join(root, "package.json"), "utf8"));
  const commands = (await blocks("README.md")).filter(({ language }) => language === "sh")
    .map(({ text }) => text.trim());
  assertEquals(commands, ["npm start", "npm it"]);
  assertMatch(scripts.start, /examples\/deno\.ts$/);
  assertMatch(scripts.test, /tests\/run\.mjs$/);
});

test("links in the documents lead somewhere", async () => {
  let links = 0;
  const docs = await readdir(join(root, "docs"));
  const files = ["README.md", "PROTOCOL.md", "CHANGELOG.md", "examples/README.md"]
    .concat(docs.filter((name) => name.endsWith(".md")).map((name) => `docs/${name}`));
  for (const file of files) {
    const text = await readFile(join(root, file), "utf8");
    for (const [, target] of text.matchAll(/\]\((?!https?:)([^)#]+)/g)) {
      links++;
      assert(existsSync(join(root, file, "..", target!)), `${file} links to ${target}`);
    }
  }
  assert(links > 4);
});

const echo = (options: SSEOptions = {}) =>
  sseAdapter({
    bidir: true,
    ...options,
    hooks: {
      open: (peer) => void peer.send("Welcome"),
      message: (peer, message) => void peer.send(message.rawData),
    },
  });

/** Starts a server with the hooks of the documents; gives its port. */
async function listen(t: TestContext, options?: SSEOptions): Promise<number> {
  const ws = echo(options);
  const server = t.use(await t.serve((request, info) => ws.fetch(request, info)));
  t.defer(() => ws.close(1001, "", { signal: AbortSignal.abort() }));
  return server.port;
}

test("PROTOCOL.md's exchanges happen as they stand there", async (t) => {
  assertEquals(await execute(t, "PROTOCOL.md", { localhost: await listen(t) }), 11);
});

test("docs/cluster-protocol.md's exchanges happen as they stand there", async (t) => {
  const sync = cluster(new MemoryBus(t).adapter);
  const ports = { a: await listen(t, { sync }), b: await listen(t, { sync }) };
  assertEquals(await execute(t, "docs/cluster-protocol.md", ports), 4);
});

test("docs/conformance.md names tests that exist", async () => {
  const text = await readFile(join(root, "docs/conformance.md"), "utf8");
  const rows = [...text.matchAll(/^\| ([SC])(\d+) +\|.*\| ([\w.-]+): (.*?) +\|$/gm)];
  const lines = text.match(/^\| [SC]\d.*$/gm)!;
  assertEquals(rows.length, lines.length, "each rule has a test");
  for (const [at, [, side, number, file, name]] of rows.entries()) {
    assertEquals(Number(number), rows.slice(0, at).filter((row) => row[1] === side).length + 1);
    const source = await readFile(join(root, `tests/${file}.test.ts`), "utf8");
    const names = Array.from(
      source.matchAll(/\btest\(\s*(["`])([^]*?)\1,/g),
      (match) => match[2]!.replace(/\$\{[^}]*\}/g, "…").replaceAll("\\", ""),
    );
    assert(names.some((known) => fits(name!, known)), `${side}${number}: ${file} has no "${name}"`);
  }
});

/** Whether this is the name of a test, in which … stands for what varies. */
function fits(name: string, known: string): boolean {
  return known === name || name.endsWith("…") && known.startsWith(name);
}

/** Says each request of a document to the host that it names; gives how many answers fitted. */
async function execute(
  t: TestContext,
  file: string,
  ports: Record<string, number>,
): Promise<number> {
  const found = new Map<string, string>();
  let answer: Awaited<ReturnType<typeof rawRequest>> | undefined;
  let stream: Reading | undefined;
  let checked = 0;
  for (const { language, text } of await blocks(file)) {
    if (language === "http request") {
      const port = ports[/^Host: (.*)$/m.exec(text)![1]!]!;
      answer = t.use(await rawRequest(port, ...splitRequest(fill(text, found))));
    } else if (language === "http response") {
      const [head, body] = text.split(/\n\n([\s\S]*)/) as [string, string?];
      checkHead(answer!, head, found);
      const reading = new Reading(answer!);
      if (body) await reading.expect(body, found);
      if (answer!.headers.get("content-type")?.startsWith("text/event-stream")) stream = reading;
      checked++;
    } else if (language === "sse") {
      await stream!.expect(text, found);
      checked++;
    }
  }
  return checked;
}

/** What a response's body brings, piece by piece. */
class Reading {
  readonly #answer: Awaited<ReturnType<typeof rawRequest>>;
  #text = "";

  constructor(answer: Awaited<ReturnType<typeof rawRequest>>) {
    this.#answer = answer;
  }

  async expect(expected: string, found: Map<string, string>): Promise<void> {
    const pattern = template(expected, found);
    const decoder = new TextDecoder();
    while (!pattern.test(this.#text)) {
      const chunk = await within(this.#answer.read(), 3_000, `${expected}\n-- had:\n${this.#text}`);
      if (!chunk) throw new Error(`expected\n${expected}\nbut the body was\n${this.#text}`);
      this.#text += decoder.decode(chunk, { stream: true });
    }
    const match = pattern.exec(this.#text)!;
    for (const [name, value] of Object.entries(match.groups ?? {})) found.set(name, value);
    this.#text = this.#text.slice(match[0].length).replace(/^\n+/, "");
  }
}

function checkHead(
  answer: Awaited<ReturnType<typeof rawRequest>>,
  head: string,
  found: Map<string, string>,
): void {
  const [status, ...headers] = head.trimEnd().split("\n");
  assertEquals(answer.status, Number(status!.split(" ")[1]));
  for (const header of headers) {
    const [name, value] = header.split(": ") as [string, string];
    const match = template(value, found).exec(answer.headers.get(name) ?? "");
    assert(match, `${name}: ${answer.headers.get(name)} is not ${value}`);
    for (const [name, value] of Object.entries(match.groups ?? {})) found.set(name, value);
  }
}

/** A pattern of the expected text, where `{name}` is what was found before, or anything new. */
function template(expected: string, found: Map<string, string>): RegExp {
  const seen = new Set<string>();
  const source = expected.split(/(\{[a-z]+\})/).map((part) => {
    const name = /^\{([a-z]+)\}$/.exec(part)?.[1];
    if (!name) return part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
    if (found.has(name)) return found.get(name)!.replace(".", "\\.");
    if (seen.has(name)) return `\\k<${name}>`;
    seen.add(name);
    return `(?<${name}>[0-9a-f]+(?:\\.[0-9a-f]{32})?)`;
  });
  return new RegExp(`^${source.join("")}`);
}

function fill(text: string, found: Map<string, string>): string {
  return text.replace(/\{([a-z]+)\}/g, (_, name) => found.get(name) ?? `{${name}}`);
}

/** The request's head and body, with the line breaks of HTTP and of uplink frames. */
function splitRequest(text: string): [string, string[]] {
  const [head, body] = text.split(/\n\n([\s\S]*)/) as [string, string?];
  const frames = head.includes("websocket-events");
  const payload = body === undefined || body === ""
    ? ""
    : frames
    ? body.replaceAll("\n", "\r\n")
    : body.trimEnd();
  const streams = /^transfer-encoding: chunked$/m.test(head);
  const length = head.startsWith("POST") && !streams ? `\ncontent-length: ${payload.length}` : "";
  return [`${head.trimEnd()}${length}\n\n`.replaceAll("\n", "\r\n"), payload ? [payload] : []];
}

test("docs/ai.md's tables are what bench/ai.ts has measured, and ours loses nothing there", async () => {
  const docs = await readFile(join(root, "docs/ai.md"), "utf8");
  const results: AiResults = JSON.parse(await readFile(join(root, "bench/ai.json"), "utf8"));
  const { interruptions, overhead } = results;
  assertEquals(Object.keys(interruptions), INTERRUPTIONS.map(({ name }) => name));
  for (const [name, byKind] of Object.entries(interruptions)) {
    assertEquals(Object.keys(byKind), Object.keys(CONTENDERS), name);
    for (const { gaps: _, ...counts } of byKind.ours!) {
      const none = { lost: 0, repeated: 0, orphaned: 0, failures: 0, never: 0 };
      assertEquals(counts, { begun: 1, ...none }, name);
    }
  }
  for (const table of [interruptionTable(results), overheadTable(results)]) {
    assert(docs.includes(`\n\n${table}\n\n`), `docs/ai.md should have:\n${table}`);
  }
  const { http, "ours, gather: 50": gathered, ours } = overhead;
  assert(gathered!.down <= 1.1 * http!.down, "with `gather` at most 1.1 times the bytes of HTTP");
  for (const { first } of [ours!, gathered!]) {
    for (const page of ["open", "resumed"] as const) {
      const most = 1.1 * http!.first[page];
      assert(first[page] <= most, `${page}: at most 1.1 times its time to the first token`);
    }
  }
});

test("the tables of README.md and docs/performance.md are what the bench has recorded", async () => {
  const results = JSON.parse(await readFile(join(root, "bench/results.json"), "utf8"));
  for (const file of ["README.md", "docs/performance.md"]) {
    const document = await readFile(join(root, file), "utf8");
    for (const name of marksOf(document)) {
      assert(name === "readme" || results.outcomes[name], `${name} has not been recorded`);
    }
    assertEquals(document, update(document, results), file);
  }
  const scenarios = marksOf(await readFile(join(root, "docs/performance.md"), "utf8"));
  assertEquals(scenarios.toSorted(), Object.keys(results.outcomes).toSorted());
});

test("docs/ai.md's bounds are those of ai.ts", async () => {
  const docs = await readFile(join(root, "docs/ai.md"), "utf8");
  const source = await readFile(join(root, "ai.ts"), "utf8");
  const [, options] = /export interface ChatOptions<([\s\S]*?)^}/m.exec(source)!;
  const bounds = [...options!.matchAll(/^ {2}(\w+)\?: number/gm)].map(([, name]) => name!);
  assertEquals(bounds.length, 7);
  for (const name of bounds) {
    const [, constant] = new RegExp(`numberOf\\("${name}", (\\w+)\\)`).exec(source)!;
    const [, value] = new RegExp(`const ${constant} = (.*);`).exec(source) ?? [, constant];
    const product = value!.replaceAll("_", "").split(" * ").map(Number).reduce((a, b) => a * b);
    const row = new RegExp(`^\\| \`${name}\` +\\| ([\\d,]+)( Mi)?`, "m").exec(docs);
    assert(row, name);
    const [, shown, unit] = row;
    assertEquals(Number(shown!.replaceAll(",", "")) * (unit ? 2 ** 20 : 1), product, name);
  }
});
