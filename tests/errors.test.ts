/** docs/errors.md has a row for every message that the sources can give, and no other. */
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { assert, assertEquals, root, test } from "./harness.ts";

/** One message as a source gives it: an interpolated part is "…". */
interface Told {
  message: string;
  /** A class, the name of a DOMException, "console", or the status of an answer. */
  kind: string;
}

const GIVES =
  /\bnew (Refusal|TypeError|RangeError|DOMException|Error)\(|\b(onFail)\(|\b(fault)(?: =|:) |\bconsole\.(?:warn|error)\(|\bwarn(?:Once)?\(/g;
const PART = /\$\{(?:[^{}`]|`(?:\$\{[^}]*\}|[^`])*`)*\}/;
const LITERAL = new RegExp(`"(?:[^"\\\\\\n]|\\\\.)*"|\`(?:${PART.source}|[^\`$])*\``);
/** A literal, sums of them, or the name of a constant. */
const TOKENS = new RegExp(
  `(?:${LITERAL.source})(?:\\s*\\+\\s*(?:${LITERAL.source}))*|\\b[A-Z][A-Z_]+\\b`,
  "g",
);

/** Every message of a source, without a parser: the literals in what makes or writes an error. */
export function messagesOf(source: string): Told[] {
  const code = source.replace(/^\s*(\/\/|\*|\/\*\*).*$/gm, "");
  const constants = new Map(
    [...code.matchAll(/^const ([A-Z_]+)(?:: string)? =\s+((?:"[^"\n]*"[\s+]*)+);/gm)]
      .map(([, name, sum]) => [name!, textOf(sum!)]),
  );
  return [...code.matchAll(GIVES)].flatMap((match) => {
    const type = match[1];
    const tellsWhy = !!(match[2] ?? match[3]); // what an `error` event tells
    const args = argumentsAt(code, match.index + match[0].length, match[3] ? "{;,}" : "{)");
    const texts = [...args.matchAll(TOKENS)]
      .map(([token]) => /^["`]/.test(token) ? textOf(token) : constants.get(token))
      .filter((text) => text !== undefined && /\w/.test(text)) as string[];
    if (type === "DOMException") {
      const name = texts.pop()!;
      return texts.map((message) => ({ message, kind: name }));
    }
    const statuses = args.split(LITERAL)[0]!.match(/\b\d{3}\b/g);
    const status = [...new Set(statuses)].join(" or ");
    return texts.map((message) => ({
      message,
      kind: type === "Refusal" ? status : type ?? (tellsWhy ? "error event" : "console"),
    }));
  });
}

/** Until it is closed, or an object begins: that holds headers, codes and causes. */
function argumentsAt(code: string, start: number, ends: string): string {
  let depth = 1;
  for (let at = start; at < code.length; at++) {
    const literal = /["`]/.test(code[at]!) && new RegExp(LITERAL.source, "y");
    if (literal) {
      literal.lastIndex = at;
      at += (literal.exec(code)?.[0].length ?? 1) - 1;
    } else if (code[at] === "(") depth++;
    else if (depth === 1 && ends.includes(code[at]!)) return code.slice(start, at);
    else if (code[at] === ")") depth--;
  }
  return "";
}

/** Of a literal or a sum of them. */
function textOf(sum: string): string {
  return [...sum.matchAll(new RegExp(LITERAL.source, "g"))]
    .map(([literal]) => literal.slice(1, -1).replace(new RegExp(PART.source, "g"), "…"))
    .join("");
}

/** Each section of the page is about one file; each row begins with message and kind. */
function rowsOf(page: string, file: string): Told[] {
  const section = page.split(/^## /m).find((section) => section.startsWith(`\`${file}\``)) ?? "";
  return [...section.matchAll(/^\| `(.+?)` +\| (.+?) +\| .{10,} \| .{3,} \|$/gm)]
    .map(([, message, kind]) => ({
      message: message!.replace(/^`|`$/g, "").trim(),
      kind: kind!.trim(),
    }));
}

const key = ({ message, kind }: Told) => `${kind}: ${message}`;

for (
  const file of [
    "client.ts",
    "stream.ts",
    "server.ts",
    "cluster.ts",
    "parking.ts",
    "drivers.ts",
    "ai.ts",
    "node.ts",
  ]
) {
  test(`docs/errors.md explains every message of ${file}, and none that it does not give`, async () => {
    const source = await readFile(join(root, file), "utf8");
    const page = await readFile(join(root, "docs/errors.md"), "utf8");
    const given = messagesOf(source);
    assert(given.length > 0);
    const explained = rowsOf(page, file);
    const [inSource, inPage] = [given, explained].map((told) => new Set(told.map(key)));
    assertEquals([...inSource!].filter((each) => !inPage!.has(each)), [], "not explained");
    assertEquals([...inPage!].filter((each) => !inSource!.has(each)), [], "given no more");
    assertEquals(inPage!.size, explained.length, "a row stands twice");
  });
}

/** Of the web, of its hosts and of the AI SDK. */
const OTHERS = [
  ...["Accept", "Access", "GET", "POST", "https", "localhost", "onopen", "controller"],
  ...["x", "curl", "toUIMessageStream"],
];

test("what docs/errors.md says to set, call or read is there for a user", async () => {
  const files = ["client", "server", "stream", "cluster", "parking", "drivers", "ai", "node"];
  const sources = await Promise.all(
    files.map((file) => readFile(join(root, `${file}.ts`), "utf8")),
  );
  const faces = sources.join("\n").match(
    /^export (default )?(interface|class|function|type) [^]*?^\}?$/gm,
  )!.join("\n");
  const page = await readFile(join(root, "docs/errors.md"), "utf8");
  const remedies = page.split("\n").filter((line) => line.startsWith("| `"))
    .map((line) => line.split(" | ").at(-1)!);
  const named = remedies.flatMap((text) => [...text.matchAll(/`([a-z]\w*)\b[^`]*`/gi)])
    .map(([, name]) => name!);
  const unknown = named.filter((name) => !new RegExp(`\\b${name}\\b`).test(faces));
  assertEquals(new Set(unknown), new Set(OTHERS));
});

test("what gives a message is found in whatever form it is written", () => {
  const source = [
    'const TEXT = "a constant, " +\n  "over two lines";',
    'throw new TypeError("plain");',
    'throw new Refusal(409, `of ${a.b("x")} and ${c}`, { headers: { allow: "GET" } });',
    'throw new Refusal(isLarge ? 413 : 400, "either");',
    'throw new TypeError(`not ${typeof x === "string" ? `"${x}"` : x}`);',
    'throw new DOMException(sends ? "one" : "other", "SyntaxError");',
    "console.error(`[x] ${what} failed:`, error);",
    "this.warn(TEXT);",
    '  // throw new Error("a comment");',
    'new Error(`(${deep(1)}) "quoted"`, { cause: "no message" })',
    'host.onFail("ended", "cause");',
    "host.onFail(TEXT, cause);",
    "fault = isOne ? `of ${one}` : TEXT;",
    'return { fault: "as a field", cause: "no message" };',
  ].join("\n");
  assertEquals(messagesOf(source), [
    { message: "plain", kind: "TypeError" },
    { message: "of … and …", kind: "409" },
    { message: "either", kind: "413 or 400" },
    { message: "not …", kind: "TypeError" },
    { message: "one", kind: "SyntaxError" },
    { message: "other", kind: "SyntaxError" },
    { message: "[x] … failed:", kind: "console" },
    { message: "a constant, over two lines", kind: "console" },
    { message: '(…) "quoted"', kind: "Error" },
    { message: "ended", kind: "error event" },
    { message: "cause", kind: "error event" },
    { message: "a constant, over two lines", kind: "error event" },
    { message: "of …", kind: "error event" },
    { message: "a constant, over two lines", kind: "error event" },
    { message: "as a field", kind: "error event" },
  ]);
});
