/**
 * One suite for two runtimes: tests declared here run under `deno test` and
 * under `bun test`. What a test opens it gives to its context, which closes
 * it when the test ends, also when it fails.
 *
 * @module
 */
import { createServer } from "node:net";
import { jsr } from "./assert.ts";
import { certificate } from "./certificate.ts";
import { between, Complaints, type Expected, hear, lines } from "./complaints.ts";
import { type BodyChunks, type Data, rawRequest as rawHttp1, type RawResponse } from "./raw.ts";
import {
  binary,
  type Child,
  onPath,
  type Runtime,
  runtimes,
  spawn,
  type SpawnOptions,
} from "./spawn.ts";
import { forgetTimers, untilNoTimers, watchTimers } from "./timers.ts";

export {
  assert,
  assertEquals,
  assertExists,
  assertGreater,
  assertGreaterOrEqual,
  assertInstanceOf,
  AssertionError,
  assertLess,
  assertLessOrEqual,
  assertMatch,
  assertNotEquals,
  assertRejects,
  assertStrictEquals,
  assertStringIncludes,
  assertThrows,
  fail,
  fallback,
  jsr,
} from "./assert.ts";
export { binary, nodes, older, root, spawn, strip } from "./spawn.ts";
export type { Child, Runtime, SpawnOptions, Stripped } from "./spawn.ts";
export { certificate };
export type { BodyChunks, Data, RawResponse } from "./raw.ts";

/** The runtime that runs the tests; Node runs those that tests/hosts.test.ts gives it. */
export const runtime: "deno" | "bun" | "node" = "Deno" in globalThis
  ? "deno"
  : "Bun" in globalThis
  ? "bun"
  : "node";

/** Whether the suites that are run over both versions of HTTP speak HTTP/2 here. */
export let isHttp2 = false;
let leftOut: string[] = [];

// ---------------------------------------------------------------- tests

export interface TestOptions {
  /** In milliseconds; 10 s by default. */
  timeout?: number;
  /** Why the test cannot run here; see `needs`. */
  skip?: string | undefined;
}

export type TestBody = (t: TestContext) => void | Promise<void>;

/** What a test opens and must be closed, in reverse, when it ends; and what is complained of meanwhile. */
export class TestContext {
  readonly name: string;
  readonly complaints: Complaints = new Complaints();
  #stack = new AsyncDisposableStack();
  #ended = new AbortController();

  constructor(name: string) {
    this.name = name;
  }

  /** Aborted when the test ends. */
  get signal(): AbortSignal {
    return this.#ended.signal;
  }

  defer(cleanUp: () => unknown): void {
    this.#stack.defer(async () => void await cleanUp());
  }

  use<T extends AsyncDisposable | Disposable>(resource: T): T {
    return this.#stack.use(resource);
  }

  /**
   * Names what may be complained of in this test: an error that nobody handles, a warning, a line
   * on the stderr of a child. By anything else it fails.
   */
  expect(...complaints: Expected[]): void {
    this.complaints.expect(...complaints);
  }

  async serve(handler: Handler, options?: ServeOptions): Promise<TestServer> {
    return this.use(await serve(handler, options));
  }

  async spawn(
    runtime: Runtime,
    file: string,
    options?: SpawnOptions,
  ): Promise<Child> {
    const child = await spawn(runtime, file, options);
    this.defer(async () => {
      const { code, signal } = await child.exited;
      // From 128 on it names a signal, which the test has sent.
      if (code && code < 128) this.complaints.add(`${runtime} ${file}: it exited by ${code}`);
      if (signal && !ENDING.includes(signal)) this.complaints.add(`${runtime} ${file}: ${signal}`);
      this.complaints.add(...lines(child.stderr()).map((line) => `${runtime} ${file}: ${line}`));
    });
    return this.use(child);
  }

  /** Called by `test`. */
  async end(): Promise<void> {
    this.#ended.abort();
    await within(this.#stack.disposeAsync(), 10_000, "cleaning up");
    // Deno takes what is under way at this moment for left behind: a stream that was just
    // cancelled, or the signature of the message that tells of it. What leaks is still there after.
    if (runtime !== "deno") return;
    await new Promise((resolve) => setTimeout(resolve, SETTLING));
    for (const place of await untilNoTimers(LINGERING)) console.log(`a timer is left:\n${place}`);
  }
}

/** In milliseconds. */
const SETTLING = 10;

/** In milliseconds: longer than any pause between two tries. */
const LINGERING = 2_500;

/** A child that ends by another one has crashed. */
const ENDING = ["SIGTERM", "SIGKILL", "SIGINT"];

type Declare = (
  name: string,
  body: () => Promise<void>,
  timeout: number,
  skip: boolean,
) => void;

/** Tests that wait for the runner that tests/fixtures/on-node.ts is. */
export const declared: Parameters<Declare>[] = [];

const declare = await declarer();

/** The runner's own way to declare a test. */
async function declarer(): Promise<Declare> {
  if (runtime === "deno") {
    // Deno loads this for each file: what comes after its last test fails the file.
    watchTimers();
    Deno.test?.afterAll?.(() => {
      const late = between.take();
      if (late.length > 0) throw new Error(`after the last test:\n${late.join("\n")}`);
    });
    return (name, fn, _timeout, ignore) => Deno.test({ name, fn, ignore });
  }
  // In a variable, so that Deno's type checker does not look for it.
  if (runtime === "node") return (...test) => void declared.push(test);
  const specifier = "bun:test";
  const { test } = await import(specifier);
  return (name, body, timeout, skip) => (skip ? test.skip : test)(name, body, timeout);
}

/** Declares a test. A skipped one carries its reason in its name. */
export function test(
  name: string,
  body: TestBody,
  { timeout = 10_000, skip }: TestOptions = {},
): void {
  if (skip) return declare(`${name} (skipped: ${skip})`, noop, 0, true);
  if (runtime !== "node" && isHttp2) {
    if (leftOut.includes(name)) return;
    name = `over HTTP/2: ${name}`;
  }
  // The runner's own limit is wider: ours cleans up and says what it knows.
  declare(name, () => run(name, body, timeout), timeout + 15_000, false);
}

/** A test of programs that it starts itself, each on a runtime of its own: by Deno's run alone. */
export const testOnce: typeof test = (...args) => {
  if (runtime === "deno") test(...args);
};

const noop = () => Promise.resolve();

/** Runs a test's body as `test` does: time limit, clean-up, notes. */
export async function run(
  name: string,
  body: TestBody,
  timeout: number,
): Promise<void> {
  notes.length = 0;
  forgetTimers();
  const context = new TestContext(name);
  const failures: unknown[] = [];
  const leave = hear(context.complaints);
  try {
    await within((async () => await body(context))(), timeout, `"${name}"`);
  } catch (error) {
    failures.push(error);
  }
  try {
    await context.end();
  } catch (error) {
    failures.push(error);
  }
  leave();
  const complaints = context.complaints.take();
  if (complaints.length > 0) failures.push(new Error(`unexpected:\n${complaints.join("\n")}`));
  if (failures.length > 0) throw failure(failures);
}

const notes: string[] = [];

/** Something to be printed if the running test fails, such as a seed. */
export function note(text: string): void {
  notes.push(text);
}

function failure(failures: unknown[]): unknown {
  const [error, ...more] = failures;
  for (const each of more) console.log("also, at its end:", each);
  // A DOMException's message cannot be added to.
  if (!(error instanceof Error) || error instanceof DOMException) {
    notes.forEach((text) => console.log(text));
  } else if (notes.length > 0) {
    // Some runners print the stack, which repeats the message, some both.
    const text = `\n[${notes.join("; ")}]`;
    const stack = error.stack?.replace(error.message, error.message + text);
    error.message += text;
    if (stack) error.stack = stack;
  }
  return error;
}

// ---------------------------------------------------------------- needs

/** What tests need beyond npm: the command's names, and how to get it. */
const needed: Record<string, { commands: string[]; install: string }> = {
  chromium: {
    commands: ["chromium", "chromium-browser", "google-chrome"],
    install: "apt-get install chromium",
  },
  nginx: { commands: ["nginx"], install: "apt-get install nginx-light" },
  haproxy: { commands: ["haproxy"], install: "apt-get install haproxy" },
  caddy: { commands: ["caddy"], install: "apt-get install caddy" },
  apache: { commands: ["apache2"], install: "apt-get install apache2" },
  modsecurity: { commands: ["mlogc"], install: "apt-get install libapache2-mod-security2" },
  "owasp-crs": {
    commands: ["/usr/share/modsecurity-crs/owasp-crs.load"],
    install: "apt-get install modsecurity-crs",
  },
  firefox: { commands: ["firefox-esr", "firefox"], install: "apt-get install firefox-esr" },
  webkit: { commands: ["WebKitWebDriver"], install: "apt-get install webkit2gtk-driver" },
  "redis-server": {
    commands: ["redis-server"],
    install: "apt-get install redis-server",
  },
  "nats-server": {
    commands: ["nats-server"],
    install: "apt-get install nats-server",
  },
  postgres: { commands: ["postgres"], install: "apt-get install postgresql" },
  openssl: { commands: ["openssl"], install: "apt-get install openssl" },
  curl: { commands: ["curl"], install: "apt-get install curl" },
  xvfb: { commands: ["xvfb-run"], install: "apt-get install xvfb" },
  python3: { commands: ["python3"], install: "apt-get install python3" },
};

/** The path of a command that `needs` knows, or of a runtime. */
export function command(name: string): string | undefined {
  const known = runtimes.find((runtime) => runtime === name);
  if (known) return binary(known);
  return (needed[name]?.commands ?? [name]).map(onPath).find(Boolean);
}

/** A reason to skip, if any of these is missing: commands, runtimes, "jsr". */
export function needs(...names: string[]): string | undefined {
  const missing = names.map(lack).filter((reason) => reason !== undefined);
  return missing.length > 0 ? missing.join(", ") : undefined;
}

function lack(name: string): string | undefined {
  if (name === "jsr") {
    return jsr ? undefined : "needs JSR: deno test -A, with jsr.io in reach";
  }
  if (command(name)) return;
  const install = needed[name]?.install ?? "npm install";
  return `needs ${name}: ${install}`;
}

// ---------------------------------------------------------------- waiting

/** On Node three hosts begin at once, on a machine that has two cores: each limit is for one alone. */
const PATIENCE = runtime === "node" ? 3 : 1;

/** The result of a promise, or an error if it takes too long. */
export async function within<T>(
  promise: Promise<T>,
  limit: number,
  what = "a promise",
): Promise<T> {
  const timeout = limit * PATIENCE;
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(
      () => reject(new Error(`timeout: ${what} took more than ${timeout} ms`)),
      timeout,
    );
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** The next event of a type. */
export async function once<E extends Event = Event>(
  target: EventTarget,
  type: string,
  { timeout = 5_000 }: { timeout?: number } = {},
): Promise<E> {
  const { promise, resolve } = deferred<E>();
  const listener = (event: Event) => resolve(event as E);
  target.addEventListener(type, listener, { once: true });
  try {
    return await within(promise, timeout, `event "${type}"`);
  } finally {
    target.removeEventListener(type, listener);
  }
}

type Falsy = false | 0 | "" | null | undefined;

/**
 * Waits until a condition holds, and returns its value. It polls: only for
 * what no event tells.
 */
export async function until<T>(
  predicate: () => T | Falsy | Promise<T | Falsy>,
  { timeout = 5_000, interval = 5 }: { timeout?: number; interval?: number } = {},
): Promise<T> {
  const late = performance.now() + timeout * PATIENCE;
  for (;;) {
    const value = await predicate();
    if (value) return value;
    if (performance.now() > late) {
      throw new Error(`timeout: not within ${timeout} ms: ${predicate}`);
    }
    await sleep(interval);
  }
}

/** Waits; a signal, such as a test's, ends the wait early and in order. */
export function sleep(
  milliseconds: number,
  signal?: AbortSignal,
): Promise<void> {
  return new Promise((resolve) => {
    const end = () => {
      clearTimeout(timer);
      signal?.removeEventListener("abort", end);
      resolve();
    };
    const timer = setTimeout(end, signal?.aborted ? 0 : milliseconds);
    signal?.addEventListener("abort", end);
  });
}

/**
 * A port for another process, or for one that comes back. Not of those that the system hands
 * out: whoever listens or connects meanwhile would be given it.
 */
export async function freePort(): Promise<number> {
  for (;;) {
    const port = 10_000 + Math.floor(Math.random() * 20_000);
    const server = createServer();
    const free = await new Promise<boolean>((resolve) => {
      server.on("error", () => resolve(false));
      server.listen(port, () => resolve(true));
    });
    if (!free) continue;
    await new Promise((resolve) => server.close(resolve));
    return port;
  }
}

export interface Deferred<T> {
  promise: Promise<T>;
  resolve(value: T | PromiseLike<T>): void;
  reject(reason?: unknown): void;
}

export function deferred<T = void>(): Deferred<T> {
  return Promise.withResolvers<T>();
}

// ---------------------------------------------------------------- servers

export type Handler = (
  request: Request,
  // deno-lint-ignore no-explicit-any -- Deno's info or Bun's server
  info?: any,
) => Response | Promise<Response>;

export interface ServeOptions {
  /** Default: a free one. */
  port?: number;
  /** Serves https with a certificate made for the occasion (needs openssl). */
  tls?: boolean;
  /** HTTP/2 under Bun, which needs to be told; Deno speaks it over TLS. */
  http2?: boolean;
}

export interface TestServer extends AsyncDisposable {
  /** Without a slash at its end, as `http://127.0.0.1:8000`. */
  readonly url: string;
  readonly port: number;
  /** The certificate in PEM, if it serves https. */
  readonly cert: string | undefined;
  /** A fetch that trusts the certificate. */
  readonly fetch: (input: string | URL | Request, init?: RequestInit) => Promise<Response>;
  /** Drops every connection: shutting down would wait for open streams. */
  close(): Promise<void>;
}

/** What of Bun the harness uses (its types would leak into the program). */
interface BunRuntime {
  serve(options: Record<string, unknown>): {
    port: number;
    stop(closeActiveConnections: boolean): Promise<void>;
  };
}

/** Starts a real server on the runtime that runs the test. */
export async function serve(
  handler: Handler,
  options: ServeOptions = {},
): Promise<TestServer> {
  const secure = options.tls || runtime === "node" && nodeHost.tls;
  const pair = secure ? await certificate() : undefined;
  const hostname = "127.0.0.1";
  const { port = 0, http2 } = options;
  const { actual, close } = runtime === "node"
    ? await nodeHost.serve(handler, { hostname, port, ...pair })
    : runtime === "deno"
    ? serveDeno(handler, { hostname, port, ...pair })
    : serveBun(handler, {
      hostname,
      port,
      ...(pair && { tls: pair }),
      ...(http2 && { http2 }),
    });
  const trusting = trust(pair?.cert);
  let closing: Promise<void> | undefined;
  const closeOnce = () => closing ??= close().then(() => trusting.close());
  return {
    url: `${pair ? "https" : "http"}://${hostname}:${actual}`,
    port: actual,
    cert: pair?.cert,
    fetch: trusting.fetch,
    close: closeOnce,
    [Symbol.asyncDispose]: closeOnce,
  };
}

export interface Listening {
  actual: number;
  close(): Promise<void>;
}

/** How Node serves, which has many ways: tests/hosts.ts has them. */
export interface NodeHost {
  /** It always serves https. */
  tls?: boolean;
  /** Does once what takes long, before any test. */
  prepare?(): Promise<void>;
  serve(
    handler: Handler,
    options: { hostname: string; port: number; key?: string; cert?: string },
  ): Promise<Listening>;
}

/** The one that serves here, on Node. */
export let nodeHost: NodeHost;

export function serveBy(host: NodeHost): void {
  nodeHost = host;
  if (host.tls) speakHttp2();
}

/** From now on these suites speak HTTP/2, without the tests of these names. */
export function speakHttp2(...names: string[]): void {
  isHttp2 = true;
  leftOut = names;
}

/** A request by hand: over HTTP/1.1 byte by byte, over HTTP/2 what its head and body say. */
export async function rawRequest(
  port: number,
  head: Data,
  body?: BodyChunks,
): Promise<RawResponse> {
  if (!isHttp2) return await rawHttp1(port, head, body);
  const { rawHttp2 } = await import("./raw2.ts");
  return await rawHttp2(port, head, body);
}

function serveDeno(
  handler: Handler,
  options: { hostname: string; port: number },
): Listening {
  const abort = new AbortController();
  const underWay = new Set<Promise<Response>>();
  const server = Deno.serve(
    { ...options, signal: abort.signal, onListen: () => {} },
    (request, info) => {
      const answer = handler(request, info);
      if (!(answer instanceof Promise)) return answer;
      underWay.add(answer);
      const over = () => void underWay.delete(answer);
      answer.then(over, over);
      return answer;
    },
  );
  return {
    actual: server.addr.port,
    async close() {
      abort.abort();
      await server.finished;
      // Until it has answered, a handler holds the body that it was given, which counts as a leak.
      await within(Promise.allSettled(underWay), 2_000, "answers").catch(noop);
    },
  };
}

function serveBun(
  handler: Handler,
  options: Record<string, unknown>,
): Listening {
  const { Bun } = globalThis as unknown as { Bun: BunRuntime };
  const server = Bun.serve({
    ...options,
    development: false,
    fetch: (request: Request, info: unknown) => handler(request, info),
  });
  return { actual: server.port, close: () => server.stop(true) };
}

function trust(ca: string | undefined): Pick<TestServer, "fetch" | "close"> {
  if (!ca) return { fetch, close: noop };
  if (runtime === "node") return { fetch, close: noop }; // its entry trusts whatever it meets
  if (runtime === "bun") {
    const options = { tls: { ca } } as RequestInit;
    return {
      fetch: (input, init) => fetch(input, { ...init, ...options }),
      close: noop,
    };
  }
  const client = Deno.createHttpClient({ caCerts: [ca] });
  return {
    fetch: (input, init) => fetch(input, Object.assign({ ...init }, { client })),
    close: () => Promise.resolve(client.close()),
  };
}
