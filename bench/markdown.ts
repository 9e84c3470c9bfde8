/**
 * Tables of Markdown, as `deno fmt` aligns them.
 *
 * @module
 */

export function table(head: string[], lines: string[][]): string {
  const widths = head.map((name, at) =>
    Math.max(3, name.length, ...lines.map((line) => line[at]!.length))
  );
  const row = (cells: string[]) =>
    `| ${cells.map((cell, at) => cell.padEnd(widths[at]!)).join(" | ")} |`;
  return [row(head), row(widths.map((width) => "-".repeat(width))), ...lines.map(row)].join("\n");
}

const mark = (name: string) => new RegExp(`<!-- bench: ${name} -->[^]*?<!-- end -->`);

/** Puts a table between its marks. */
export function put(document: string, name: string, table: string): string {
  if (!mark(name).test(document)) throw new Error(`There are no marks of ${name}`);
  return document.replace(mark(name), () => `<!-- bench: ${name} -->\n\n${table}\n\n<!-- end -->`);
}

/** The names of the tables that a document has. */
export function marksOf(document: string): string[] {
  return [...document.matchAll(/<!-- bench: (\w+) -->/g)].map(([, name]) => name!);
}
