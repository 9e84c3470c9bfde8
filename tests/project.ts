/**
 * Projects as users have them, of the recipes that stand in the documents.
 *
 * @module
 */
import { mkdir, mkdtemp, readFile, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { assertEquals, root, type TestContext } from "./harness.ts";

/** The recipe of a page that is in a file of this name. */
export async function recipeOf(page: string, name: string): Promise<string> {
  const text = await readFile(join(root, page), "utf8");
  const found = [...text.matchAll(/^```\w+\n([^]*?)^```$/gm)].map((match) => match[1]!)
    .filter((code) => code.startsWith(`// ${name}\n`));
  assertEquals(found.length, 1, name);
  return found[0]!;
}

/** A folder with these files, in which packages are those of this checkout, and ours is it. */
export async function project(t: TestContext, files: Record<string, string>): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), "duplex-recipe-"));
  t.defer(() => rm(folder, { recursive: true }));
  for (const [name, text] of Object.entries(files)) {
    await mkdir(dirname(join(folder, name)), { recursive: true });
    const code = text.replace(/"duplex-sse\/(\w+)"/g, (_, entry) => `"${root}/${entry}.ts"`);
    await writeFile(join(folder, name), code);
  }
  await symlink(join(root, "node_modules"), join(folder, "node_modules"));
  return folder;
}

/** What deno.json exports to be imported, by its entry; `./bin` is run. */
export async function entryPoints(): Promise<Record<string, string>> {
  const { exports } = JSON.parse(await readFile(join(root, "deno.json"), "utf8"));
  const { "./bin": _, ...entries } = exports;
  return entries;
}

/** The modules in the row of docs/frameworks.md that is a framework's. */
export function recipes(framework: string): Promise<string[]> {
  return mounts(framework, /`(export [^`]+)`/g);
}

/** All that stands in its second column as code. */
export async function mounts(framework: string, code = /`([^`]+)`/g): Promise<string[]> {
  const text = await readFile(join(root, "docs/frameworks.md"), "utf8");
  const row = text.split("\n").find((line) => line.startsWith(`| ${framework} `));
  const cell = row!.replace(/^\|[^|]*\|/, "").replace(/\|[^|]*\|$/, "");
  return Array.from(cell.matchAll(code), (match) => match[1]!);
}
