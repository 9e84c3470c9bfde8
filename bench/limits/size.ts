/**
 * Where the client's bytes go, by the headings of client.ts: what each adds to the whole when
 * minified and gzipped, from the top down. `deno run -A bench/limits/size.ts`, or with `bun`.
 */
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { gzipSync } from "node:zlib";
import { transform } from "esbuild";

const source = await readFile(join(import.meta.dirname!, "../../client.ts"), "utf8");
const headings = ["The head"];
const marked = source.replace(/^( *)\/\/ --- (.*) ---$/gm, (_, indent, heading) => {
  const mark = `MARK(${headings.push(heading) - 1});`;
  return indent ? `static { ${mark} }` : mark; // within the class, or outside
});
const { code } = await transform(marked, { loader: "ts", minify: true, format: "esm" });
const pieces = code.split(/(?:static\{)?MARK\((\d+)\)[;,]?\}?/);
let text = "";
let before = 0;
for (let i = 0; i < pieces.length; i += 2) {
  text += pieces[i];
  const size = gzipSync(text, { level: 9 }).length;
  console.log(`${size - before}`.padStart(5), headings[Number(pieces[i - 1] ?? 0)]);
  before = size;
}
console.log(`${before}`.padStart(5), "bytes in all");
