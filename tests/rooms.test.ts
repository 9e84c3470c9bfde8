/**
 * How the sources are cut: into rooms, the banner sections of a file, that name only what stands
 * below them; and no class, function or set of fields that is too large to hold in mind. No
 * parser is needed, since `deno fmt` puts the beginning and the end of everything at its own depth.
 */
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { assertEquals, assertGreater, root, test } from "./harness.ts";

const MAX_CLASS = 430;
const MAX_FUNCTION = 52;
const MAX_MUTABLE_FIELDS = 12;

/** For each file: how many rooms, classes and functions are found in it at least, so that none is overlooked. */
const FILES: Record<string, { rooms: number; functions: number }> = {
  "server.ts": { rooms: 12, functions: 200 },
  "client.ts": { rooms: 12, functions: 100 },
  "stream.ts": { rooms: 5, functions: 20 },
  "cluster.ts": { rooms: 12, functions: 100 },
  "handover.ts": { rooms: 3, functions: 20 },
  "drivers.ts": { rooms: 6, functions: 25 },
  "parking.ts": { rooms: 6, functions: 20 },
  "node.ts": { rooms: 4, functions: 10 },
  "ai.ts": { rooms: 9, functions: 60 },
};

interface Room {
  title: string;
  text: string;
  names: string[];
}

/** Comments out, but for banners; line breaks stay. */
function withoutComments(code: string): string {
  return code.replace(/\/\*[\s\S]*?\*\//g, (comment) => comment.replace(/[^\n]/g, ""))
    .replace(/^(.*?)(^|\s)\/\/(?! ---).*$/gm, "$1");
}

function roomsOf(code: string): Room[] {
  return code.split(/^\/\/ --- /m).slice(1).map((text) => ({
    title: text.slice(0, text.indexOf("\n")).replace(/ -*$/, ""),
    text,
    names: [...text.matchAll(
      /^(?:export )?(?:default )?(?:abstract )?(?:async )?(?:class|function|interface|type|const|let) (\w+)/gm,
    )].map((match) => match[1]!),
  }));
}

/** Each may be named from anywhere. */
const GROUND = /vocabulary|constants|Limits|travels|Types/;

/** Each room that names what stands above it. */
function arrowsUp(rooms: Room[]): string[] {
  return rooms.flatMap(({ title, text }, i) =>
    rooms.slice(0, i).filter((above) => !GROUND.test(above.title)).flatMap((above) =>
      above.names.filter((name) => new RegExp(`(?<![.#\\w"'/])${name}(?![\\w"':?])`).test(text))
        .map((name) => `${title} names ${name} of ${above.title}`)
    )
  );
}

interface Block {
  name: string;
  lines: number;
  text: string;
}

/** What begins with such a line ends with the first brace at its own depth. */
function blocks(code: string, beginning: RegExp): Block[] {
  const lines = code.split("\n");
  return lines.flatMap((line, at) => {
    const [, indent, name] = beginning.exec(line) ?? [];
    if (indent === undefined || line.endsWith("}") || line.endsWith(";")) return [];
    const end = lines.findIndex((other, i) => i > at && other.startsWith(`${indent}}`));
    const text = lines.slice(at, end + 1);
    return [{ name: name!, lines: text.length, text: text.join("\n") }];
  });
}

const classes = (code: string) => blocks(code, /^()(?:export )?(?:abstract )?(?:class) (\w+).*\{$/);

/** Functions, and the methods of classes; a body that begins some lines below its name counts from the name. */
const functions = (code: string) => [
  ...blocks(code, /^()(?:export )?(?:default )?(?:async )?function\*? (\w+).*[({]$/),
  ...classes(code).flatMap(({ text }) =>
    blocks(
      text,
      /^( {2})(?:static |protected |override |async |get |set )*(?!if|for|while|switch|try)(#?\w+)\((?:.*[({])?$/,
    )
  ),
];

/** Fields that are not `readonly`. */
const mutableFields = ({ text }: Block) =>
  text.split("\n").filter((line) =>
    /^ {2}(?:protected |private )?#?\w+[!?]?(?:: [^=(]+)?(?: = .*|;)$/.test(line) &&
    !/^ {2}(?:static|declare|readonly|return)\b/.test(line)
  );

for (const [file, least] of Object.entries(FILES)) {
  const read = async () => withoutComments(await readFile(join(root, file), "utf8"));

  test(`the rooms of ${file} look only down`, async () => {
    const rooms = roomsOf(await read());
    assertGreater(rooms.length, least.rooms - 1);
    assertEquals(arrowsUp(rooms), []);
  });

  test(`nothing in ${file} is too large to hold in mind`, async () => {
    const code = await read();
    const found = { classes: classes(code), functions: functions(code) };
    assertGreater(found.functions.length, least.functions - 1);
    const large = [
      ...found.classes.filter(({ lines }) => lines > MAX_CLASS),
      ...found.functions.filter(({ lines }) => lines > MAX_FUNCTION),
    ];
    assertEquals(large.map(({ name, lines }) => `${name}: ${lines} lines`), []);
    const full = found.classes.map((one) => ({ name: one.name, fields: mutableFields(one) }))
      .filter(({ fields }) => fields.length > MAX_MUTABLE_FIELDS);
    assertEquals(full, []);
  });
}

test("an arrow up, a long class, a long function and a field too many are noticed", () => {
  const code = [
    "// --- Above ---",
    "class Upper {",
    ...Array.from({ length: 13 }, (_, i) => `  #field${i} = ${i};`),
    "  readonly kept: number = 1;",
    "  method(",
    "    argument: string,",
    "  ): void {",
    ...Array(60).fill("    argument;"),
    "  }",
    "}",
    "// --- Below ---",
    "function lower(): Upper {",
    "  return new Upper();",
    "}",
  ].join("\n");
  assertEquals(arrowsUp(roomsOf(code)), ["Below names Upper of Above"]);
  const [upper] = classes(code);
  assertEquals([upper!.lines, mutableFields(upper!).length], [80, 13]);
  assertEquals(functions(code).map(({ name, lines }) => [name, lines]), [["lower", 3], [
    "method",
    64,
  ]]);
});

test("a session's phases have a table of transitions, and nothing else changes one", async () => {
  const code = withoutComments(await readFile(join(root, "server.ts"), "utf8"));
  const [, table] = /^const TRANSITIONS[^{]*(\{[^}]*\})/m.exec(code)!;
  const transitions = JSON.parse(table!.replace(/,(\s*[\]}])/g, "$1")) as Record<string, string[]>;
  const phases = [
    ...["carried", "away", "limbo", "closing carried", "closing away", "lingering", "gone"],
  ];
  assertEquals(Object.keys(transitions), phases);
  for (const next of Object.values(transitions)) {
    assertEquals(next.filter((phase) => !phases.includes(phase)), []);
  }
  assertEquals([transitions.gone, transitions.lingering], [[], ["gone"]], "an end is an end");
  for (const phase of phases.filter((phase) => phase.startsWith("closing"))) {
    assertEquals(transitions[phase]!.filter((next) => /^(carried|away)$/.test(next)), []);
  }
  const set = code.split("\n").filter((line) => /#phase(: Phase)? = /.test(line));
  assertEquals(set.map((line) => line.trim()), ['#phase: Phase = "away";', "this.#phase = phase;"]);
  const [become] = functions(code).filter(({ name }) => name === "become");
  assertEquals(/includes\(phase\)\) \{\n\s*throw/.test(become!.text), true, "any other throws");
});
