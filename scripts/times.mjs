/**
 * How long the README's two commands take on a machine that has one Node, its npm and nothing else:
 * `node scripts/times.mjs` for `npm start`, until the demo answers; `node scripts/times.mjs it` for
 * `npm it`, to its end. Versions of Node may follow; each is tried from a fresh clone of HEAD, with
 * an empty npm cache and an empty home. Deno and Bun on PATH are not seen.
 */
import { execFileSync, spawn } from "node:child_process";
import { mkdirSync, mkdtempSync, rmSync, symlinkSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { root } from "../tests/tools.mjs";

/** The npm that each Node comes with. */
const npms = { 20: "10", 22: "10", 24: "11" };
/** Three times: a network has its moods. */
const TIMES = 3;

const args = process.argv.slice(2);
const command = args[0] === "it" ? args.shift() : "start";
for (const version of args.length > 0 ? args : Object.keys(npms)) {
  const seconds = [];
  for (let i = 0; i < (command === "it" ? 1 : TIMES); i++) seconds.push(await time(version));
  console.log(
    `npm ${command} on Node ${version}: ${seconds.map((s) => s.toFixed(1)).join(", ")} s`,
  );
}

/** In seconds. */
async function time(version) {
  const folder = mkdtempSync(join(tmpdir(), "duplex-times-"));
  try {
    const clone = join(folder, "clone");
    execFileSync("git", ["clone", "--quiet", root, clone]);
    const env = await machine(folder, version);
    const start = performance.now();
    await (command === "it" ? toTheEnd(clone, env) : untilItAnswers(clone, env));
    return (performance.now() - start) / 1_000;
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

/** The environment of a machine with this Node alone. */
function machine(folder, version) {
  const bin = join(folder, "bin");
  const home = join(folder, "home");
  for (const each of [bin, home]) mkdirSync(each);
  symlinkSync(join(root, "node_modules", `node-${version}`, "bin", "node"), join(bin, "node"));
  const quiet = ["--silent", "--no-audit", "--no-fund"];
  execFileSync("npm", ["install", ...quiet, "--prefix", folder, `npm@${npms[version]}`]);
  for (const name of ["npm", "npx"]) {
    symlinkSync(join(folder, "node_modules", "npm", "bin", `${name}-cli.js`), join(bin, name));
  }
  // Certificates are the network's; what npm and others have been told here is not.
  const told = /^(npm_|DENO_|BUN_|NODE_(?!EXTRA_CA_CERTS))/;
  const others = Object.entries(process.env).filter(([name]) => !told.test(name));
  return { ...Object.fromEntries(others), HOME: home, PATH: `${bin}:/usr/bin:/bin` };
}

async function toTheEnd(cwd, env) {
  const child = spawn("npm", ["it", "--no-audit", "--no-fund"], { cwd, env, stdio: "inherit" });
  const code = await new Promise((resolve) => child.on("close", resolve));
  if (code !== 0) throw new Error(`npm it: ${code}`);
}

async function untilItAnswers(cwd, env) {
  const port = await freePort();
  const child = spawn("npm", ["start"], {
    cwd,
    env: { ...env, PORT: `${port}`, HOST: "127.0.0.1" },
    stdio: "ignore",
    detached: true, // a group of its own, to be ended together
  });
  const ended = new Promise((resolve) => child.on("close", resolve));
  try {
    while (!await answers(port)) {
      if (child.exitCode !== null) throw new Error(`npm start: ${child.exitCode}`);
      await sleep(50);
    }
  } finally {
    process.kill(-child.pid); // whoever npm has started, too
    await ended;
  }
}

function answers(port) {
  return fetch(`http://127.0.0.1:${port}/`).then((response) => response.ok, () => false);
}

function freePort() {
  return new Promise((resolve) => {
    const server = createServer().listen(0, "127.0.0.1", () => {
      const { port } = server.address();
      server.close(() => resolve(port));
    });
  });
}
