/**
 * Makes the site of the documents: `node scripts/site.mjs [folder]`, which is what `npm run docs`
 * does, in site/ by default. VitePress makes the pages, `deno doc` the reference out of the doc
 * comments. It needs no network. Where the site does not stand at the root of its host, DOCS_BASE
 * is the path to it, as in "/duplex-sse/".
 */
import { execFileSync } from "node:child_process";
import { appendFileSync, cpSync, mkdirSync, mkdtempSync, readdirSync } from "node:fs";
import { readFileSync, rmSync, statSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, dirname, extname, join, posix, resolve, sep } from "node:path";
import { pathToFileURL } from "node:url";
import { binary, root } from "../tests/tools.mjs";

const destination = resolve(process.argv[2] ?? join(root, "site"));
const pages = [
  ...["README.md", "PROTOCOL.md", "CHANGELOG.md", "CONTRIBUTING.md", "examples/README.md"],
  ...readdirSync(join(root, "docs")).filter((name) => name.endsWith(".md")).map((name) =>
    `docs/${name}`
  ),
];
/** Each file that a page links to, and that is none itself. The reference links to its sources. */
const shown = new Set(
  JSON.parse(read("deno.json")).publish.include.filter((name) => name.endsWith(".ts")),
);
/** An example gets a page; others are pictures, or text to be copied. */
const isExample = (file) => /^examples\/.*\.ts$/.test(file);
const isPicture = (file) => [".png", ".svg"].includes(extname(file));
const { name: package_ } = JSON.parse(read("package.json"));
/** Its code and words are wider than a phone. */
const NARROW = `
  .ddoc > *, #content, #content > main { min-width: 0; max-width: 100%; }
  .ddoc { max-width: 100vw; box-sizing: border-box; }
  pre { overflow-x: auto; }
  main { overflow-wrap: anywhere; }
  .breadcrumbs { flex-wrap: wrap; }
  @media (max-width: 700px) {
    #topnav { height: auto; }
    #topnav > div { flex-wrap: wrap; height: auto; gap: 0.5rem; }
    .ddoc .toc { display: none; }
  }
`;
const stage = mkdtempSync(join(tmpdir(), "duplex-site-"));

try {
  for (const page of pages) write(placeOf(page), linked(page));
  for (const file of shown) {
    if (isExample(file)) write(`${file}.md`, example(file));
    else cpSync(join(root, file), made(isPicture(file) ? file : `public/${file}.txt`));
  }
  cpSync(join(root, "scripts", "site.config.mjs"), made(".vitepress/config.mjs"));
  write("reference.md", contents());
  symlinkSync(join(root, "node_modules"), join(stage, "node_modules"));
  const vitepress = join(root, "node_modules", "vitepress", "bin", "vitepress.js");
  run(process.execPath, [vitepress, "build", stage, "--outDir", destination]);
  reference(join(destination, "api"));
  console.log(destination);
} finally {
  rmSync(stage, { recursive: true });
}

/**
 * The reference of the entry points, by `deno doc`, as pages of their own. What mod.ts exports is of
 * the server and of the client.
 */
function reference(folder) {
  run(binary("deno"), ["doc", "--html", `--name=${package_}`, `--output=${folder}`, ...entries()]);
  const home = pathToFileURL(root).href.replaceAll("/", "&#x2F;") + "&#x2F;";
  for (const file of readdirSync(folder, { recursive: true })) {
    if (!file.endsWith(".html")) continue;
    const path = join(folder, file);
    const up = "../".repeat(file.split(sep).length);
    const html = readFileSync(path, "utf8")
      // Where its source is on this machine helps nobody else.
      .replaceAll(new RegExp(`${home}([\\w.]+)`, "g"), `${up}$1.txt`)
      .replace(/(<ul class="breadcrumbs">\s*<li>\s*<a href=)"[^"]*"/, `$1"${up}reference.html"`)
      .replaceAll(/\bfrom &quot;(?=\w+&quot;)/g, `$&${package_}/`);
    writeFileSync(path, html);
  }
  rmSync(join(folder, "index.html")); // it is empty
  appendFileSync(join(folder, "page.css"), NARROW);
}

function entries() {
  const { "./bin": _, ...exports } = JSON.parse(read("deno.json")).exports; // that one is run
  return Object.values(exports).filter((file) => file !== "./mod.ts");
}

/** The page that leads to the reference: each export with the first sentence about it. */
function contents() {
  const { nodes } = JSON.parse(run(binary("deno"), ["doc", "--json", ...entries()]));
  const text = ["# Reference", "The types that both ends share are of `server`."];
  for (const [url, { module_doc: module, symbols }] of Object.entries(nodes)) {
    const entry = basename(url, ".ts");
    text.push(`## ${package_}/${entry}`, firstSentence(module.doc));
    const rows = symbols.flatMap(({ name, declarations }) => {
      if (declarations.every(({ kind }) => kind === "reference")) return []; // another's export
      const doc = declarations.map(({ jsDoc }) => jsDoc?.doc).find(Boolean) ?? "";
      return [`| [${name}](/api/${entry}/~/${name}.html) | ${firstSentence(doc)} |`];
    });
    text.push(["| export | |", "| --- | --- |", ...rows].join("\n"));
  }
  return text.join("\n\n");
}

function firstSentence(doc) {
  const [sentence] = /^[^]*?[.:](?=\s|$)/.exec(doc) ?? [doc.split("\n\n")[0]];
  return sentence.replace(/\s+/g, " ").replace(/:$/, ".").replaceAll("|", "\\|")
    .replace(/\{@link ([\w.]+)\}/g, "`$1`").replaceAll("<", "&lt;");
}

/** What a command prints. It throws with what the command says, if that fails. */
function run(command, args) {
  const options = { cwd: root, stdio: ["ignore", "pipe", "pipe"], maxBuffer: 64 * 1024 * 1024 };
  return execFileSync(command, args, options).toString();
}

function read(file) {
  return readFileSync(join(root, file), "utf8");
}

/** The path of a file of the stage, in a folder that exists. */
function made(file) {
  mkdirSync(dirname(join(stage, file)), { recursive: true });
  return join(stage, file);
}

function write(file, text) {
  writeFileSync(made(file), text);
}

/** A folder's README is what its address shows. */
function placeOf(page) {
  return page.replace(/README\.md$/, "index.md");
}

/** A page whose links to other files of the checkout lead to pages of the site. */
function linked(page) {
  return read(page).replace(/\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)/g, (_, target, anchor = "") => {
    const file = posix.join(posix.dirname(page), target);
    if (!statSync(join(root, file)).isFile()) throw new Error(`${page} links to a folder: ${file}`);
    if (pages.includes(file)) return `](/${placeOf(file)}${anchor})`;
    shown.add(file);
    return `](/${file}${isPicture(file) ? "" : isExample(file) ? ".md" : ".txt"})`;
  });
}

function example(file) {
  return `---\naside: false\n---\n\n# ${file}\n\n\`\`\`\`ts\n${read(file)}\n\`\`\`\`\n`;
}
