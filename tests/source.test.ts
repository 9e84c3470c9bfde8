/** Rules of the two source files: they can be pasted, and loading them does nothing. */
import { mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import {
  assert,
  assertEquals,
  assertGreater,
  assertLessOrEqual,
  assertStringIncludes,
  needs,
  nodes,
  root,
  type Runtime,
  strip,
  test,
} from "./harness.ts";

const files = ["server.ts", "client.ts"];
const read = (file: string) => readFile(join(root, file), "utf8");

/** Code without what stands in comments, which may well speak of imports. */
const withoutComments = (code: string) =>
  code.replace(/\/\*[\s\S]*?\*\//g, "").replace(/(^|\s)\/\/.*$/gm, "$1");

/** What Node 20 has not, the oldest that is supported; the tests' own use of it is made up for. */
const TOO_NEW =
  /\b(withResolvers|(Async)?DisposableStack|fromAsync|groupBy|Promise\.try|(values|keys|entries)\(\)\.(?!next)\w+)\b/;

test("the modules call nothing that the oldest Node has not", async () => {
  const modules = (await readdir(root)).filter((file) => file.endsWith(".ts"));
  assertGreater(modules.length, 6);
  for (const file of modules) {
    const code = withoutComments(await read(file)).split("\n");
    assertEquals([file, ...code.filter((line) => TOO_NEW.test(line))], [file]);
  }
});

for (const file of files) {
  test(`${file} imports nothing, in no way`, async () => {
    const code = withoutComments(await read(file));
    assertEquals(code.match(/^.*\bimport\b.*$/gm), null);
    assertEquals(code.match(/^.*\brequire\b.*$/gm), null);
    assertEquals(code.match(/^.*\bexport\b.*\bfrom\b.*$/gm), null);
    assertEquals(code.match(/^.*\bimportScripts\b.*$/gm), null);
  });

  test(`${file} names no runtime's own objects`, async () => {
    const code = withoutComments(await read(file));
    assertEquals(code.match(/^.*\b(Deno|Bun|process|__dirname)\..*$/gm), null);
  });

  test(`${file} loads with its types erased by the runtime that runs the tests`, async () => {
    await using stripped = await strip(file);
    await import(`file://${stripped.file}`);
  });

  for (const runtime of ["deno", "bun", ...nodes] satisfies Runtime[]) {
    test(
      `loading ${file} on ${runtime} starts no timer, no I/O, draws no randomness`,
      async (t) => {
        const stripped = t.use(await strip(file));
        const child = await t.spawn(runtime, "tests/fixtures/load.mjs", { args: [stripped.file] });
        const lines: string[] = [];
        for await (const line of child.lines()) lines.push(line);
        const { code } = await child.exited;
        const name = file === "server.ts" ? "sseAdapter" : "WebSocketSSE";
        assertEquals([lines, code], [[`loaded: ${name}`], 0], child.stderr());
      },
      { skip: needs(runtime) },
    );
  }
}

for (const call of ["setTimeout(() => {})", "fetch('http://localhost:1')", "Math.random()"]) {
  test(`${call} while loading would be noticed`, async (t) => {
    t.expect("while loading", "exited by 1");
    const folder = await mkdtemp(join(tmpdir(), "duplex-load-"));
    t.defer(() => rm(folder, { recursive: true }));
    const file = join(folder, "module.mjs");
    await writeFile(file, `export const value = ${call};`);
    const child = await t.spawn("deno", "tests/fixtures/load.mjs", { args: [file] });
    assertEquals((await child.exited).code, 1);
    assertStringIncludes(child.stderr(), "while loading");
  });
}

test("the wire's vocabulary is the same in both files", async () => {
  const [server, client] = await Promise.all(
    files.map(async (file) => vocabulary(await read(file))),
  );
  assert(server!.length > 10);
  assertEquals(server, client);
});

/** The lines between the vocabulary's heading and the next. */
function vocabulary(code: string): string[] {
  const lines = code.split("\n");
  const begin = lines.findIndex((line) => line.startsWith("// --- The wire's vocabulary."));
  const end = lines.findIndex((line, i) => i > begin && line.startsWith("// ---"));
  assert(begin > 0 && end > begin, "the heading of the vocabulary");
  return lines.slice(begin + 1, end).filter((line) => line);
}

test("every name of the vocabulary is used, or at least known, in both files", async () => {
  for (const file of files) {
    const code = await read(file);
    for (const line of vocabulary(code)) {
      const [, name] = /^const ([A-Z_]+) = "[^"]+";$/.exec(line) ?? [];
      assert(name, `${file}: ${line}`);
      assert(code.split(new RegExp(`\\b${name}\\b`)).length > 2, `${file} does not use ${name}`);
    }
  }
});

test("what a cluster needs of server.ts is at most 127 lines", async () => {
  const lines = (await read("server.ts")).split("\n");
  const seam = new Set<number>();
  for (const [at, line] of lines.entries()) {
    if (!/Routing(Host|Driver)|\brouter\b|backplane\?\.(instance|connect)/.test(line)) continue;
    if (/^\s*\/?\*/.test(line)) continue; // only spoken of
    let first = at;
    while (/^\s*(\/\*|\*|\/\/)/.test(lines[first - 1]!)) first--;
    // What opens a block ends where a line of the same depth closes it.
    const close = `${/^ */.exec(line)}}`;
    const last = line.endsWith("{") ? lines.findIndex((l, i) => i > at && l.startsWith(close)) : at;
    for (let i = first; i <= last; i++) seam.add(i);
  }
  assertLessOrEqual(seam.size, 127);
  assertGreater(seam.size, 40, "the seam is somewhere else");
});

for (const file of [...files, "cluster.ts", "handover.ts", "parking.ts"]) {
  const document = files.includes(file) ? "PROTOCOL.md" : "docs/cluster-protocol.md";
  test(`what ${file} quotes stands in ${document}`, async () => {
    const spec = normal(await read(document));
    const quoted = quotations(await read(file));
    assertGreater(quoted.length, 5);
    assertEquals(quoted.filter((part) => !spec.includes(normal(part))), []);
  });
}

/** Sentences, and parts of some, that comments quote. */
function quotations(code: string): string[] {
  const comments = code.match(/\/\*\*?[^]*?\*\/|(^[ \t]*\/\/.*\n)+|\/\/.*$/gm)!
    .filter((comment) => !comment.includes("@example"))
    .map((comment) =>
      comment.replace(/^\s*(\/\*\*|\*\/|\*|\/\/)\s?|\s*\*\/$/gm, "").replace(/\s+/g, " ")
    );
  return comments.flatMap((comment) => [...comment.matchAll(/"([^"]*)"/g)])
    .flatMap(([, text]) => text!.split(/…|(?<=\.) /))
    .filter((part) => part.trim().includes(" ")); // one word is a name or a value
}

function normal(text: string): string {
  return text.replace(/\s+/g, " ").replace(/[`*_]/g, "").toLowerCase().replace(
    /^[\s.,]+|[\s.,]+$/g,
    "",
  );
}
