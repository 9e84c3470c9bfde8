/**
 * `npm run docs` makes a site of all documents and of every export, whose links lead somewhere and
 * which takes nothing from elsewhere. The same is asked of the documents as they stand here.
 */
import { execFile } from "node:child_process";
import { existsSync, statSync } from "node:fs";
import { mkdtemp, readdir, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join, relative } from "node:path";
import process from "node:process";
import { promisify } from "node:util";
import {
  assert,
  assertEquals,
  assertGreater,
  binary,
  needs,
  root,
  test,
  type TestContext,
  testOnce,
} from "./harness.ts";
import { entryPoints } from "./project.ts";

const execute = promisify(execFile);
/** Where it stands on its host: deeper than at the root, where a wrong path would do as well. */
const BASE = "/duplex-sse/";

/** The documents, by their paths. */
async function documents(): Promise<string[]> {
  const docs = await readdir(join(root, "docs"));
  return ["README.md", "PROTOCOL.md", "CHANGELOG.md", "CONTRIBUTING.md", "examples/README.md"]
    .concat(docs.filter((name) => name.endsWith(".md")).map((name) => `docs/${name}`));
}

const read = (file: string) => readFile(join(root, file), "utf8");

/** Markdown without its code. */
const prose = (text: string) => text.replace(/^```[^]*?^```$/gm, "").replace(/`[^`\n]*`/g, "``");

/** The anchors of a document's headings, as GitHub makes them. */
function anchors(text: string): Set<string> {
  const found = new Map<string, number>();
  const names = new Set<string>();
  for (const [, heading] of text.replace(/^```[^]*?^```$/gm, "").matchAll(/^#+ (.*)$/gm)) {
    const plain = heading!.replace(/\[([^\]]*)\]\([^)]*\)/g, "$1").toLowerCase();
    const name = plain.replace(/[^\p{L}\p{M}\p{N}\p{Pc}\- ]/gu, "").replaceAll(" ", "-");
    const times = found.get(name) ?? 0;
    found.set(name, times + 1);
    names.add(times ? `${name}-${times}` : name);
  }
  return names;
}

test("links of the documents lead to files and headings that exist, or are addresses", async () => {
  const lost: string[] = [];
  let links = 0;
  for (const file of await documents()) {
    for (const [, link] of prose(await read(file)).matchAll(/\]\(([^)]+)\)/g)) {
      links++;
      if (/^\w+:/.test(link!)) {
        if (!isAddress(link!)) lost.push(`${file}: ${link}`);
        continue;
      }
      const [path, anchor] = link!.split("#") as [string, string?];
      const target = path ? join(file, "..", path) : file;
      const exists = existsSync(join(root, target)) &&
        (anchor === undefined || anchors(await read(target)).has(anchor));
      if (!exists) lost.push(`${file}: ${link}`);
    }
  }
  assertEquals(lost, []);
  assertGreater(links, 80);
});

/** Whether it is an absolute address, of a host that may exist or of this machine. */
function isAddress(link: string): boolean {
  const url = URL.parse(link);
  if (url?.hostname === "127.0.0.1") return true;
  return url?.protocol === "https:" && url.hostname.includes(".") && !/[\s"<>]/.test(link);
}

testOnce("npm run docs makes a site of the documents and of every export", async (t) => {
  const folder = await build(t);
  const files = await filesOf(folder);
  const pages = (await documents()).map((file) =>
    file.replace(/README\.md$/, "index.md").replace(/\.md$/, ".html")
  );
  for (const page of [...pages, "reference.html"]) assert(files.has(page), page);
  assertEquals(await missingExports(files), []);
  const site = new Site(folder, files);
  const { lost, links } = await site.check();
  assertEquals(lost, []);
  assertGreater(links, 10_000);
  await site.checkHome();
}, { timeout: 240_000, skip: needs("deno") });

async function build(t: TestContext): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), "duplex-docs-"));
  t.defer(() => rm(folder, { recursive: true }));
  const { scripts } = JSON.parse(await read("package.json"));
  assertEquals(scripts.docs, "node scripts/site.mjs");
  const { stdout, stderr } = await execute("node", ["scripts/site.mjs", folder], {
    cwd: root,
    env: { ...process.env, DOCS_BASE: BASE },
  });
  assertEquals([stdout, stderr], [`${folder}\n`, ""]);
  return folder;
}

async function filesOf(folder: string): Promise<Set<string>> {
  const entries = await readdir(folder, { recursive: true, withFileTypes: true });
  return new Set(
    entries.filter((entry) => entry.isFile())
      .map(({ parentPath, name }) => relative(folder, join(parentPath, name))),
  );
}

/** Those exports of the entry points that have no page in the reference. */
async function missingExports(files: Set<string>): Promise<string[]> {
  const missing: string[] = [];
  let found = 0;
  for (const file of Object.values(await entryPoints())) {
    const { stdout } = await execute(binary("deno")!, ["doc", "--json", join(root, file)], {
      maxBuffer: 64 * 1024 * 1024,
    });
    const [module] = Object.values<{ symbols: { name: string }[] }>(JSON.parse(stdout).nodes);
    // mod.ts has nothing of its own.
    const places = file === "./mod.ts" ? ["server", "client"] : [file.slice(2, -3)];
    for (const { name } of module!.symbols) {
      found++;
      const exists = places.some((place) => files.has(`api/${place}/~/${name}.html`));
      if (!exists) missing.push(`${file}: ${name}`);
    }
  }
  assertGreater(found, 60);
  return missing;
}

/** A site that was built for `BASE`. */
class Site {
  readonly #folder: string;
  readonly #files: Set<string>;
  readonly #ids = new Map<string, Set<string>>();

  constructor(folder: string, files: Set<string>) {
    this.#folder = folder;
    this.#files = files;
  }

  /** The links that lead nowhere, or that load what is not of the site. */
  async check(): Promise<{ lost: string[]; links: number }> {
    const lost = new Set<string>();
    let links = 0;
    for (const file of this.#files) {
      if (!file.endsWith(".html")) continue;
      const html = await this.#read(file);
      for (const [, tag, link] of html.matchAll(/<(\w+)\s[^>]*?\b(?:href|src)="([^"]*)"/g)) {
        links++;
        const target = link!.replaceAll("&#x2F;", "/").replaceAll("&amp;", "&");
        const fits = /^\w+:/.test(target)
          ? target.startsWith("data:") || tag === "a" && isAddress(target)
          : await this.#leads(file, target);
        if (!fits) lost.add(`${file}: ${link}`);
      }
    }
    return { lost: [...lost], links };
  }

  async #leads(from: string, link: string): Promise<boolean> {
    const url = new URL(link, `http://site${BASE}${from}`);
    if (!url.pathname.startsWith(BASE)) return false;
    const path = decodeURIComponent(url.pathname.slice(BASE.length));
    const isFolder = path === "" || path.endsWith("/");
    const file = isFolder ? `${path}index.html` : path;
    if (!this.#files.has(file)) return false;
    if (url.hash === "" || url.hash === "#") return true;
    return (await this.#idsOf(file)).has(decodeURIComponent(url.hash.slice(1)));
  }

  async #idsOf(file: string): Promise<Set<string>> {
    let ids = this.#ids.get(file);
    if (!ids) {
      const html = await this.#read(file);
      ids = new Set(Array.from(html.matchAll(/\sid="([^"]*)"/g), (match) => match[1]!));
      this.#ids.set(file, ids);
    }
    return ids;
  }

  #read(file: string): Promise<string> {
    return readFile(join(this.#folder, file), "utf8");
  }

  /** The first screen is the README's, with its pictures, and leads to all other documents. */
  async checkHome(): Promise<void> {
    const home = await this.#read("index.html");
    assert(home.includes("Everything a <code>WebSocket</code> does, over plain HTTP"));
    for (const picture of this.#files) {
      if (/\.(png|svg)$/.test(picture)) {
        assertGreater(statSync(join(this.#folder, picture)).size, 1_000);
      }
    }
    const led = new Set(Array.from(home.matchAll(/href="([^"#]+)/g), (match) => match[1]!));
    const unled = (await documents()).filter((file) => file !== "README.md")
      .map((file) => BASE + file.replace(/README\.md$/, "").replace(/\.md$/, ".html"))
      .filter((link) => !led.has(link));
    assertEquals(unled, []);
  }
}
