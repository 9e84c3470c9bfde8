/**
 * One Chromium for a test file. Each test connects to it, gets windows of its
 * own, and leaves: so that nothing of a test outlives it.
 *
 * @module
 */
import { spawn } from "node:child_process";
import fs from "node:fs";
import { mkdir, mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import {
  type BrowserContext,
  type BrowserContextOptions,
  chromium,
  type Page,
} from "playwright-core";
import { command, runtime, strip, type TestContext, until } from "./harness.ts";

/** The pipe is not spoken on: when it ends with the test's process, however that comes, so does Chromium. */
const flags =
  "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync --remote-debugging-port=0 --remote-debugging-pipe";

/** A running Chromium, which ends with the file that started it. */
export interface Chromium {
  /** Windows of a profile of their own: cookies and cache are not shared with other tests. */
  windows(t: TestContext, options?: BrowserContextOptions): Promise<BrowserContext>;
  /** Where it wants to be spoken to. */
  endpoint(): Promise<string>;
}

/**
 * Starts Chromium, outside of any test, for all tests of the file. Where it is not
 * installed those are skipped: see `needs`.
 */
export async function startChromium(): Promise<Chromium> {
  const executable = command("chromium");
  if (!executable) {
    const none = () => Promise.reject(new Error("There is no Chromium"));
    return { windows: none, endpoint: none };
  }
  const profile = await mkdtemp(join(tmpdir(), "duplex-chromium-"));
  const child = spawn(
    executable,
    [...flags.split(" "), `--user-data-dir=${profile}`, "about:blank"],
    { stdio: ["ignore", "ignore", "ignore", "pipe", "pipe"] }, // for --remote-debugging-pipe
  );
  const exited = new Promise((resolve) => child.once("exit", resolve));
  (await afterAll())(async () => {
    child.kill("SIGKILL");
    await exited;
    // Its other processes may still write for a moment.
    await until(() => rm(profile, { recursive: true }).then(() => true, () => false));
  });
  return {
    endpoint: () => endpoint(profile),
    async windows(t, options) {
      const browser = await chromium.connectOverCDP(await endpoint(profile), {
        artifactsDir: profile, // a folder of its own it would remove too late for Deno's sanitizers
      });
      t.defer(async () => {
        await browser.close();
        await Promise.allSettled(removals);
      });
      const context = await browser.newContext({ ignoreHTTPSErrors: true, ...options });
      context.on("weberror", (error) => t.complaints.add(`page: ${error.error().stack}`));
      context.on("console", (message) => {
        if (!["warning", "error"].includes(message.type())) return;
        t.complaints.add(`page: console.${message.type()}: ${message.text()}`);
      });
      t.defer(() => context.close());
      return context;
    },
  };
}

/** The runner's own way to tell that the file's tests are over. */
async function afterAll(): Promise<(action: () => Promise<void>) => void> {
  if (runtime === "deno") return (action) => Deno.test.afterAll(action);
  const specifier = "bun:test";
  return (await import(specifier)).afterAll;
}

/** Where Chromium wants to be spoken to: it writes the port and a path into its profile. */
async function endpoint(profile: string): Promise<string> {
  const file = join(profile, "DevToolsActivePort");
  const [, port, path] = await until(
    async () => /^(\d+)\n(\/.+)/.exec(await readFile(file, "utf8").catch(() => "")),
    { timeout: 30_000, interval: 50 },
  );
  return `ws://127.0.0.1:${port}${path}`;
}

// As it disconnects, Playwright removes a file without waiting for it. Deno's sanitizers would
// count that as a leak of the test.
const { unlink } = fs.promises;
const removals = new Set<Promise<void>>();
Object.assign(fs.promises, {
  unlink(path: string): Promise<void> {
    const removal = unlink(path);
    removals.add(removal);
    removal.catch(() => {}).then(() => removals.delete(removal));
    return removal;
  },
});

/** The client as a browser can load it. */
export async function clientScript(): Promise<string> {
  await using stripped = await strip("client.ts");
  return await readFile(stripped.file, "utf8");
}

const artifacts = process.env.DUPLEX_ARTIFACTS ?? "/tmp/duplex-artifacts";

/** Takes a picture for people to look at; no test depends on it. */
export async function picture(page: Page, name: string): Promise<void> {
  await mkdir(artifacts, { recursive: true });
  await page.screenshot({ path: join(artifacts, `${name}.png`) });
}
