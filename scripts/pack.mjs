/**
 * Makes the npm package: `node scripts/pack.mjs [folder]`, which is what `npm run pack` does. Prints
 * the path of the tarball. The checkout's own package.json stays private; the package gets another.
 */
import { execFileSync } from "node:child_process";
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join, resolve } from "node:path";

const root = dirname(import.meta.dirname);
const destination = resolve(process.argv[2] ?? root);
const tsc = join(root, "node_modules", "typescript", "bin", "tsc");
if (!existsSync(tsc)) {
  console.error("The package is compiled by TypeScript, which is not installed: run npm install");
  process.exit(1);
}
mkdirSync(destination, { recursive: true });
const stage = mkdtempSync(join(tmpdir(), "duplex-pack-"));
const read = (file) => JSON.parse(readFileSync(join(root, file), "utf8"));
const { name, version } = read("package.json");
/** As at JSR: entry points and the files behind them. */
const { name: jsr, exports } = read("deno.json");
/** What JSR's users run is not imported: npm's have it as `bin`. */
const entries = Object.entries(exports).filter(([entry]) => entry !== "./bin");
/** What these import besides each other. */
const behind = ["handover.ts"];

try {
  // Types beside the code for what is imported, none for what is run.
  compile(entries.map(([, file]) => file), "--declaration", "--isolatedDeclarations");
  compile(["examples/bin.ts"], "--types", "node");
  for (const file of [...entries.map(([, file]) => file), ...behind]) {
    edit(to(file, ".d.ts"), (text) => text.replace(/(\bfrom "\.\/\w+)\.ts"/g, '$1.js"'));
    // What comments import is called otherwise here, and shown by editors.
    for (const extension of [".js", ".d.ts"]) {
      edit(to(file, extension), (text) => text.replaceAll(`jsr:${jsr}`, jsr).replaceAll(jsr, name));
    }
  }
  // The chat's page is given the client as it is here: as JavaScript.
  edit("examples/chat.js", (text) => {
    if (!text.includes("../client.ts")) throw new Error("examples/chat.ts has changed");
    return text.replace("../client.ts", "../client.js");
  });
  edit("examples/ai/chat.js", (text) => {
    if (!text.includes("../../client.ts")) throw new Error("examples/ai/chat.ts has changed");
    return text.replace("../../client.ts", "../../client.js")
      .replace('read("./message.ts")', 'read("./message.js")');
  });
  const documents = ["README.md", "PROTOCOL.md", "CHANGELOG.md", "LICENSE"];
  for (const file of ["examples/chat.html", "examples/ai/page.html", ...documents]) {
    copyFileSync(join(root, file), join(stage, file));
  }
  // Outside of its tables, README's programs import this package.
  const programs = new RegExp(`^([^|\n]* from ")jsr:${jsr}`, "gm");
  // What the package lacks, JSR has: in this version, for those who read at npm as well.
  const link = (text) =>
    text.replace(/\]\(\.\/([^)]+)\)/g, (link, file) => {
      return existsSync(join(stage, file)) ? link : `](https://jsr.io/${jsr}/${version}/${file})`;
    });
  edit("README.md", (text) => link(text).replace(programs, `$1${name}`));
  edit("PROTOCOL.md", link);
  writeFileSync(join(stage, "package.json"), JSON.stringify(manifest(), null, 2) + "\n");
  const packed = execFileSync("npm", [
    ...["pack", "--json", "--loglevel=error", "--pack-destination", destination],
  ], { cwd: stage, encoding: "utf8", shell: process.platform === "win32" });
  console.log(join(destination, JSON.parse(packed)[0].filename));
} finally {
  rmSync(stage, { recursive: true });
}

function compile(files, ...options) {
  execFileSync(process.execPath, [
    tsc,
    ...["--rootDir", root, "--outDir", stage],
    ...["--target", "ES2022", "--module", "NodeNext", "--lib", "ESNext,DOM,DOM.Iterable"],
    ...["--rewriteRelativeImportExtensions", "--verbatimModuleSyntax", "--strict"],
    ...["--exactOptionalPropertyTypes", "--skipLibCheck", "--types", ""],
    ...options,
    ...files.map((file) => join(root, file)),
  ], { cwd: root, stdio: ["ignore", "inherit", "inherit"] });
}

function edit(file, change) {
  writeFileSync(join(stage, file), change(readFileSync(join(stage, file), "utf8")));
}

function to(file, extension) {
  return file.replace(/\.ts$/, extension);
}

function manifest() {
  return {
    name,
    version,
    description: "Everything a WebSocket does, over plain HTTP: SSE down, POST up, resumed",
    keywords: [
      ...["websocket", "websockets", "sse", "server-sent-events", "eventsource", "http"],
      ...["realtime", "long-polling", "crossws", "edge", "serverless", "deno", "bun"],
    ],
    license: "MIT",
    author: /^Copyright \(c\) (.+)$/m.exec(readFileSync(join(root, "LICENSE"), "utf8"))[1],
    ...home(),
    type: "module",
    sideEffects: false,
    main: "./mod.js",
    types: "./mod.d.ts",
    exports: {
      ...Object.fromEntries(
        entries.map(([entry, file]) => [
          entry,
          { types: to(file, ".d.ts"), default: to(file, ".js") },
        ]),
      ),
      "./package.json": "./package.json",
    },
    bin: { "duplex-sse": "examples/bin.js" },
    engines: { node: ">=20" },
  };
}

/**
 * Where people find the code and report what fails: the repository that it is built in. npm holds
 * the provenance against it. Elsewhere than in GitHub's workflows, where nobody publishes, the
 * page at JSR alone is known.
 */
function home() {
  const homepage = `https://jsr.io/${jsr}`;
  const { GITHUB_SERVER_URL: server, GITHUB_REPOSITORY: repository } = process.env;
  if (!repository) return { homepage };
  const url = `${server}/${repository}`;
  return {
    homepage,
    repository: { type: "git", url: `git+${url}.git` },
    bugs: { url: `${url}/issues` },
  };
}
