/** CONTRIBUTING.md is a map of the code as it stands. (rooms.test.ts holds the rules of the house.) */
import { existsSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { assert, assertEquals, assertGreater, root, test } from "./harness.ts";

const read = (file: string) => readFile(join(root, file), "utf8");

/** The rows of the first table behind these words, without its head. */
function table(text: string, behind: string): string[][] {
  const at = text.indexOf(behind);
  assert(at >= 0, behind);
  const lines = text.slice(at).split("\n");
  const first = lines.findIndex((line) => line.startsWith("|"));
  const rows = lines.slice(first, lines.findIndex((line, i) => i > first && !line.startsWith("|")));
  return rows.slice(2).map((row) => row.split("|").slice(1, -1).map((cell) => cell.trim()));
}

/** Code without its comments, but with the banners; lines stay where they are. */
function bare(code: string): string {
  return code.replace(/\/\*[^]*?\*\//g, (comment) => comment.replace(/[^\n]/g, ""))
    .replace(/(^|\s)\/\/(?! ---).*$/gm, "$1");
}

/** The titles of the banners, in order. */
const rooms = (code: string) =>
  Array.from(code.matchAll(/^\/\/ --- (.*) ---$/gm), (match) => match[1]!);

/** What each file begins and ends with, and needs no telling. */
const GROUND = /vocabulary|constants|^Types|^Public surface/;

for (
  const [file, heading] of [["server.ts", "The server's rooms"], [
    "client.ts",
    "The client's rooms",
  ]] as const
) {
  test(`CONTRIBUTING.md lists the rooms of ${file}, and tests that exist`, async () => {
    const rows = table(await read("CONTRIBUTING.md"), `## ${heading}`);
    const titles = rooms(await read(file)).map((title) => title.split(/[:,.]/)[0]!)
      .filter((title) => !GROUND.test(title));
    assertEquals(rows.map(([title]) => title), titles);
    for (const [title, , sections, tests] of rows) {
      for (const name of tests!.split(", ").filter(Boolean)) {
        assert(existsSync(join(root, `tests/${name}.test.ts`)), `${title}: ${name}`);
      }
      const spec = await read("PROTOCOL.md");
      for (const section of sections!.match(/\d+|\bA\b/g) ?? []) {
        const heading = section === "A" ? "\n## Appendix A." : `\n## ${section}. `;
        assert(spec.includes(heading), `${title}: section ${section}`);
      }
    }
  });
}

for (
  const [file, constant, behind] of [
    ["server.ts", "TRANSITIONS", "A session of the server"],
    ["client.ts", "STEPS", "A socket of the client"],
  ] as const
) {
  test(`CONTRIBUTING.md has the phases of ${file} as they are`, async () => {
    const code = await read(file);
    const [, body] = new RegExp(`^const ${constant}\\b[^{]*\\{\\n([^]*?)^\\};`, "m").exec(code)!;
    const steps = [...body!.matchAll(/^ {2}"?([\w ]+)"?: \[(.*)\],$/gm)]
      .map(([, phase, next]) => [phase, next!.replaceAll('"', "") || "—"]);
    assertEquals(steps.length, body!.trim().split("\n").length);
    assertEquals(table(await read("CONTRIBUTING.md"), behind), steps);
  });
}

test("CONTRIBUTING.md's journeys go by ways that exist", async () => {
  const text = await read("CONTRIBUTING.md");
  const code = bare(await read("server.ts")) + bare(await read("client.ts"));
  const journeys = text.split("## Journeys")[1]!;
  const stops = [...new Set(Array.from(journeys.matchAll(/`(#?\w+)`/g), (match) => match[1]!))];
  assertGreater(stops.length, 25);
  const hooksAndEvents = new Set(["drop", "resume", "message", "upgrade", "SEQ"]);
  const lost = stops.filter((name) =>
    !hooksAndEvents.has(name) &&
    !new RegExp(`(^ *[\\w ]*|class )(?<!\\w)${name}(\\(| \\{|<)`, "m").test(code)
  );
  assertEquals(lost, []);
});
