/**
 * Firefox by WebDriver BiDi, WebKit by its WebDriver, of which no library is needed. One
 * browser a test file; each test has a session and a window of its own.
 *
 * @module
 */
import { type ChildProcess, spawn } from "node:child_process";
import { existsSync, readdirSync } from "node:fs";
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import type { Readable } from "node:stream";
import { inspect } from "node:util";
import puppeteer, { type Page } from "puppeteer-core";
import type { Complaints } from "./complaints.ts";
import { command, freePort, runtime, type TestContext, until, within } from "./harness.ts";

/** A window. Functions run in its page: they see nothing of where they are written. */
export interface Tab {
  goto(url: string): Promise<void>;
  run<A extends unknown[], R>(body: (...args: A) => R, ...args: A): Promise<Awaited<R>>;
  /** Runs it until what it gives is true. */
  wait<A extends unknown[]>(body: (...args: A) => unknown, ...args: A): Promise<void>;
}

/** Opens a window that closes with the test. */
export type Browser = (t: TestContext) => Promise<Tab>;

/** A tab among others of one window: the one that was opened or shown last is seen. */
export interface ShownTab extends Tab {
  show(): Promise<void>;
}

/** Opens tabs of one window, which close with the test. */
export type Tabs = (t: TestContext) => Promise<() => Promise<ShownTab>>;

const START = 60_000;
const WAIT = 30_000;

// ---------------------------------------------------------------- Firefox

const preferences = {
  "app.normandy.enabled": false,
  "app.update.disabledForTesting": true,
  "browser.shell.checkDefaultBrowser": false,
  "browser.startup.page": 0,
  "datareporting.policy.dataSubmissionEnabled": false,
  "datareporting.healthreport.uploadEnabled": false,
  "extensions.update.enabled": false,
  "network.captive-portal-service.enabled": false,
  "network.connectivity-service.enabled": false,
  "network.dns.disablePrefetch": true,
  "services.settings.server": "",
  "toolkit.telemetry.enabled": false,
};

/** Starts Firefox, outside of any test. Where it is not installed the tests are to be skipped. */
export async function startFirefox(): Promise<Browser> {
  const tabs = await startFirefoxTabs();
  return async (t) => await (await tabs(t))();
}

/** The same, for tests of several tabs. */
export async function startFirefoxTabs(): Promise<Tabs> {
  const executable = command("firefox");
  if (!executable) return () => Promise.reject(new Error("There is no Firefox"));
  const profile = await mkdtemp(join(tmpdir(), "duplex-firefox-"));
  const lines = Object.entries(preferences)
    .map(([name, value]) => `user_pref("${name}", ${JSON.stringify(value)});\n`);
  await writeFile(join(profile, "user.js"), lines.join(""));
  const child = spawn(executable, [
    ...["--headless", "--no-remote", "--remote-debugging-port=0", "--profile", profile],
    "about:blank",
  ], { stdio: "ignore", env: { ...process.env, HOME: profile } });
  await endWithFile(child, [profile]);
  return async (t) => {
    const { ws_port: port } = await until(async () => {
      const text = await readFile(join(profile, "WebDriverBiDiServer.json"), "utf8").catch(() =>
        ""
      );
      return text && JSON.parse(text) as { ws_port: number };
    }, { timeout: START, interval: 50 });
    const browser = await puppeteer.connect({
      protocol: "webDriverBiDi",
      browserWSEndpoint: `ws://127.0.0.1:${port}/session`,
      acceptInsecureCerts: true,
    });
    t.defer(() => browser.disconnect()); // and ends the session: Firefox has one at a time
    return await tabsOf(browser, t);
  };
}

async function tabsOf(
  browser: Awaited<ReturnType<typeof puppeteer.connect>>,
  t: TestContext,
): Promise<() => Promise<ShownTab>> {
  const context = await browser.createBrowserContext();
  t.defer(() => context.close());
  return async () => new PuppeteerTab(await context.newPage(), t.complaints);
}

/** Tabs of Chromium as it has them: those that Playwright opens take themselves for seen. */
export function chromiumTabs(endpoint: () => Promise<string>): Tabs {
  return async (t) => {
    const browser = await puppeteer.connect({ browserWSEndpoint: await endpoint() });
    t.defer(() => browser.disconnect());
    return await tabsOf(browser, t);
  };
}

class PuppeteerTab implements ShownTab {
  readonly #page: Page;

  constructor(page: Page, complaints: Complaints) {
    this.#page = page;
    page.on("pageerror", (error) => complaints.add(`page: ${inspect(error)}`));
    page.on("console", (message) => {
      if (!["warn", "error"].includes(message.type())) return;
      complaints.add(`page: console.${message.type()}: ${message.text()}`);
    });
  }

  async show(): Promise<void> {
    await this.#page.bringToFront();
  }

  async goto(url: string): Promise<void> {
    await this.#page.goto(url, { timeout: START });
  }

  async run<A extends unknown[], R>(body: (...args: A) => R, ...args: A): Promise<Awaited<R>> {
    return JSON.parse(await this.#page.evaluate(script(body, args)) as string).value;
  }

  wait<A extends unknown[]>(body: (...args: A) => unknown, ...args: A): Promise<void> {
    return wait(this, body, args);
  }
}

// ---------------------------------------------------------------- WebKit

/** Starts WebKit's driver and a display for it, outside of any test. */
export async function startWebKit(): Promise<Browser> {
  const executable = command("webkit");
  const binary = miniBrowser();
  if (!executable || !binary || !command("xvfb")) {
    return () => Promise.reject(new Error("There is no WebKit"));
  }
  const home = await mkdtemp(join(tmpdir(), "duplex-webkit-"));
  const display = await startDisplay();
  const port = await freePort();
  const child = spawn(executable, [`--port=${port}`], {
    stdio: "ignore",
    env: { ...process.env, DISPLAY: display, HOME: home, XDG_RUNTIME_DIR: home },
  });
  await endWithFile(child, [home]);
  const url = `http://127.0.0.1:${port}`;
  return async (t) => {
    await until(() => ask("GET", `${url}/status`).then(() => true, () => false), {
      timeout: START,
      interval: 50,
    });
    const { sessionId } = await ask<{ sessionId: string }>("POST", `${url}/session`, {
      capabilities: {
        alwaysMatch: {
          acceptInsecureCerts: true,
          timeouts: { script: WAIT, pageLoad: WAIT },
          "webkitgtk:browserOptions": { binary, args: ["--automation"] },
        },
      },
    });
    t.defer(() => ask("DELETE", `${url}/session/${sessionId}`));
    const tab = new WebKitTab(`${url}/session/${sessionId}`, t.complaints);
    t.defer(() => tab.listen());
    return tab;
  };
}

/** Where Debian and Ubuntu have it. */
function miniBrowser(): string | undefined {
  const folder = "/usr/lib/x86_64-linux-gnu";
  if (!existsSync(folder)) return;
  return readdirSync(folder).filter((name) => name.startsWith("webkit2gtk-")).sort().reverse()
    .map((name) => join(folder, name, "MiniBrowser")).find(existsSync);
}

/** Xvfb writes the number of a free display into a pipe. */
async function startDisplay(): Promise<string> {
  const child = spawn(
    "Xvfb",
    ["-displayfd", "3", "-screen", "0", "800x600x24", "-nolisten", "tcp"],
    {
      stdio: ["ignore", "ignore", "ignore", "pipe"],
    },
  );
  await endWithFile(child, []);
  const number = await within(
    new Promise((resolve, reject) => {
      (child.stdio[3] as Readable).once("data", resolve);
      child.once("error", reject);
    }),
    START,
    "Xvfb",
  );
  return `:${String(number).trim()}`;
}

/** One command of WebDriver. */
async function ask<R>(method: string, url: string, body?: unknown): Promise<R> {
  const response = await fetch(url, {
    method,
    ...body !== undefined && { body: JSON.stringify(body) },
    signal: AbortSignal.timeout(START),
  });
  const { value } = await response.json();
  if (!response.ok) throw new Error(`${method} ${url}: ${JSON.stringify(value)}`);
  return value;
}

class WebKitTab implements Tab {
  readonly #session: string;
  readonly #complaints: Complaints;

  constructor(session: string, complaints: Complaints) {
    this.#session = session;
    this.#complaints = complaints;
  }

  /** Its driver tells nothing of errors: our pages keep them, until they are left. */
  async listen(): Promise<void> {
    const said = await this.run(() => (globalThis as { complaints?: string[] }).complaints);
    this.#complaints.add(...(said ?? []).map((text) => `page: ${text}`));
  }

  async goto(url: string): Promise<void> {
    await this.listen();
    await ask("POST", `${this.#session}/url`, { url });
  }

  async run<A extends unknown[], R>(body: (...args: A) => R, ...args: A): Promise<Awaited<R>> {
    const answer = await ask<string>("POST", `${this.#session}/execute/async`, {
      script: `const done = arguments[0]; ${
        script(body, args)
      }.then(done, (error) => done(JSON.stringify({ error: String(error) })))`,
      args: [],
    });
    const { value, error } = JSON.parse(answer);
    if (error) throw new Error(error);
    return value;
  }

  wait<A extends unknown[]>(body: (...args: A) => unknown, ...args: A): Promise<void> {
    return wait(this, body, args);
  }
}

// ---------------------------------------------------------------- both

/** An expression that runs a function and gives its result in JSON. */
function script(body: (...args: never[]) => unknown, args: unknown[]): string {
  const call = `(${body})(...${JSON.stringify(args)})`;
  return `(async () => JSON.stringify({ value: await ${call} }))()`;
}

async function wait<A extends unknown[]>(
  tab: Tab,
  body: (...args: A) => unknown,
  args: A,
): Promise<void> {
  try {
    await until(() => tab.run(body, ...args), { timeout: WAIT, interval: 20 });
  } catch (error) {
    throw new Error(`${error}\n${body}`);
  }
}

/** The runner's own way to tell that the file's tests are over. */
async function endWithFile(child: ChildProcess, folders: string[]): Promise<void> {
  const exited = new Promise((resolve) => child.once("exit", resolve));
  const end = async () => {
    child.kill("SIGKILL");
    await exited;
    for (const folder of folders) {
      // Its other processes may still write for a moment.
      await until(() => rm(folder, { recursive: true, force: true }).then(() => true, () => false));
    }
  };
  if (runtime === "deno") return Deno.test.afterAll(end);
  const specifier = "bun:test";
  (await import(specifier)).afterAll(end);
}
