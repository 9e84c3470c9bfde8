/**
 * The web platform's tests of WebSocket and WebSocketStream, with ours in their place: client and server on the runtime
 * that runs this, and in Chromium. Their files are not part of this repository: the variable
 * DUPLEX_WPT names a folder that has them (docs/standard.md). Without it no test is declared here.
 */
import { mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import type { BrowserContext } from "playwright-core";
import { esbuild } from "./bundle.ts";
import { startChromium } from "./chromium.ts";
import {
  assert,
  assertEquals,
  needs,
  note,
  runtime,
  sleep,
  test,
  type TestContext,
} from "./harness.ts";
import {
  type Addresses,
  bytesOf,
  type Case,
  cases,
  expectations,
  LATIN,
  scriptOf,
  type Subtest,
  type Tested,
  textOf,
} from "./wpt.ts";
import type { Job, Outcomes } from "./fixtures/wpt-worker.ts";
import { handlers } from "./wpt-site.ts";
import { shutDown } from "./pair.ts";

const { DUPLEX_WPT: folder, DUPLEX_WPT_ONLY = "", DUPLEX_WPT_NATIVE } = process.env;
/** For each: how many subtests there are at least, so that none is overlooked, and files at a time. */
const TESTED: Record<Tested, { least: number; width: number }> = {
  WebSocket: { least: 1_000, width: 6 }, // most of them wait
  WebSocketStream: { least: 100, width: 1 }, // some send much, or need all that a browser connects
};
const tests = folder ? Object.keys(TESTED) as Tested[] : [];

for (const tested of tests) {
  test(`web platform tests of ${tested} on ${runtime}`, async (t) => {
    const { addresses, cert } = await serveSite(t);
    // On a port of its own, as theirs is: requests to another origin say where they come from.
    const page = (await t.serve(() => new Response(null, { status: 404 }))).port;
    const worker = await built(t, "tests/fixtures/wpt-worker.ts", "esm");
    const all = (await chosen(tested)).filter((each) => !each.needsPage);
    const subtests = await inTurn(all, TESTED[tested], async (each) => {
      const script = await scriptOf(folder!, each, addresses);
      const job = jobOf(each, script, { ...addresses, http: page }, cert);
      return await runInWorker(worker, { ...job, site: `http://localhost:${addresses.http}` });
    });
    await judge(runtime, subtests, TESTED[tested]);
  }, { timeout: 1_200_000 });
}

if (folder && runtime === "deno") {
  const chromium = await startChromium();
  const ways = [false, ...DUPLEX_WPT_NATIVE ? [true] : []];
  for (const [native, tested] of ways.flatMap((way) => tests.map((each) => [way, each] as const))) {
    test(`web platform tests of ${native ? "native " : ""}${tested} in Chromium`, async (t) => {
      const { addresses } = await serveSite(t, native);
      const windows = await chromium.windows(t);
      // Their pages do what a browser complains of, and break off what they send.
      t.expect(/^page: /, "The body did not arrive");
      const subtests = await inTurn(
        await chosen(tested),
        TESTED[tested],
        (each) => runInPage(windows, each, urlOf(each, addresses)),
      );
      await judge(native ? "native" : "chromium", subtests, TESTED[tested]);
    }, { timeout: 1_200_000, skip: needs("chromium", "openssl") });
  }
}

/** Their cases, or those whose names contain what the variable says. */
async function chosen(tested: Tested): Promise<Case[]> {
  return (await cases(folder!, tested)).filter(({ path }) => path.includes(DUPLEX_WPT_ONLY));
}

/** Runs all, some at a time. */
async function inTurn<T, R>(
  items: T[],
  { width }: { width: number },
  run: (item: T) => Promise<R[]>,
): Promise<R[]> {
  const results: R[][] = [];
  const rest = items.entries();
  await Promise.all(Array.from({ length: width }, async () => {
    for (const [index, item] of rest) results[index] = await run(item);
  }));
  return results.flat();
}

/** The handlers and their files on two ports, with TLS and without. */
async function serveSite(
  t: TestContext,
  native = false,
): Promise<{ addresses: Addresses; cert: string }> {
  const site = handlers(native);
  const addresses: Addresses = { host: "localhost", http: 0, https: 0 };
  const client = native
    ? ""
    : await readFile(await built(t, "tests/fixtures/wpt-page.ts", "iife"), "utf8");
  const answer = async (request: Request, info: unknown): Promise<Response> => {
    const { pathname } = new URL(request.url);
    if (pathname.endsWith("/redirect_response.py")) {
      return new Response(null, { status: 301, headers: { location: "/echo" } });
    }
    if (pathname.endsWith("/set-cookie.py")) return setCookie(request);
    if (pathname.endsWith("/check.py")) return new Response("PASS"); // no request is an upgrade
    if (/\/stash-(put|take)\.py$/.test(pathname)) return stash(request);
    if (pathname === "/common/blank.html") await sleep(1_000); // it is asked to come slowly
    const answer = site.fetch(request, info);
    // On the machine itself no content is mixed: for that test theirs has another name.
    const host = request.headers.get("referer")?.includes("mixed-content") && "wpt.test";
    const named = { ...addresses, ...host && { host } };
    return await answer ?? await fileOf(folder!, request.url, named, client);
  };
  const plain = await t.serve(answer);
  const secure = await t.serve(answer, { tls: true, http2: true });
  t.defer(() => shutDown(site.ws));
  addresses.http = plain.port;
  addresses.https = secure.port;
  return { addresses, cert: secure.cert! };
}

/** A value that one request leaves to another. */
function stash({ url }: Request): Response {
  const { pathname, searchParams } = new URL(url);
  const key = searchParams.get("key")!;
  if (pathname.endsWith("put.py")) stashed.set(key, searchParams.get("value")!);
  const body = JSON.stringify(stashed.get(key) ?? null);
  if (pathname.endsWith("take.py")) stashed.delete(key);
  return new Response(body, { headers: { "content-type": "application/json" } });
}

const stashed: Map<string, string> = new Map();

function setCookie(request: Request): Response {
  const cookie = decodeURIComponent(new URL(request.url).search.slice(1));
  return new Response("", { headers: { "content-type": "text/plain", "set-cookie": cookie } });
}

/** A file as it is, or the page that their server makes around a script; with our client in it. */
async function fileOf(
  folder: string,
  url: string,
  addresses: Addresses,
  client: string,
): Promise<Response> {
  const pathname = decodeURI(new URL(url).pathname);
  const type = /js$/.test(pathname) ? "text/javascript" : "text/html";
  const headers = { "content-type": `${type}; charset=utf-8` };
  if (pathname === "/duplex.js") return new Response(client, { headers });
  if (pathname === "/resources/testharnessreport.js") return new Response(REPORT, { headers });
  try {
    const source = pathname.replace(/\.html$/, ".js");
    const text = /\.(any|window|worker)\.html$/.test(pathname)
      ? await pageAround(folder, source)
      : await textOf(folder, pathname, addresses);
    const ours = '<script src="/duplex.js"></script>';
    const first = pathname.endsWith(".html")
      ? text.includes("<script") ? text.replace("<script", `${ours}<script`) : text + ours
      : pathname.endsWith(".worker.js")
      ? `importScripts("/duplex.js");${text}`
      : text;
    return LATIN.test(first)
      ? new Response(bytesOf(first), { headers: { "content-type": type } })
      : new Response(first, { headers });
  } catch {
    return new Response(null, { status: 404 });
  }
}

/** How the outcomes come out of a page. */
const REPORT = `add_completion_callback((tests, status) => globalThis.outcomes = {
  tests: tests.map(({ name, status, message }) => ({ name, status, message })),
  status: { name: "harness", status: status.status, message: status.message },
});`;

async function pageAround(folder: string, source: string): Promise<string> {
  const text = await textOf(folder, source, { host: "", http: 0, https: 0 });
  const scripts = [...text.matchAll(/^\/\/ META: script=(.*)$/gm)].map((match) => match[1]!);
  const tags = ["/resources/testharness.js", "/resources/testharnessreport.js"]
    .concat(source.endsWith(".worker.js") ? [] : [...scripts, source])
    .map((path) => `<script src="${path}"></script>`);
  if (source.endsWith(".worker.js")) {
    tags.push(
      `<script>fetch_tests_from_worker(new Worker("${source}" + location.search))</script>`,
    );
  }
  // Theirs is longer only where the file says so: the machine may have more to do.
  return `<!doctype html><meta charset=utf-8><meta name=timeout content=long>${tags.join("")}`;
}

/** A script of ours in one file, without types: Deno would check them for each worker anew. */
async function built(t: TestContext, entry: string, format: "esm" | "iife"): Promise<string> {
  const out = await mkdtemp(join(tmpdir(), "duplex-wpt-"));
  t.defer(() => rm(out, { recursive: true }));
  const file = join(out, "script.mjs");
  await esbuild([
    entry,
    "--bundle",
    "--external:node:*",
    `--format=${format}`,
    `--outfile=${file}`,
  ]);
  return file;
}

function urlOf({ path, variant }: Case, { http, https }: Addresses): string {
  const secure = variant.includes("wpt_flags=") || path.includes(".https.");
  const origin = `http${secure ? "s" : ""}://localhost:${secure ? https : http}`;
  return origin + path.replace(/\.js$/, ".html") + variant;
}

function jobOf(
  each: Case,
  script: string,
  addresses: Addresses,
  cert: string,
): Omit<Job, "site"> {
  return {
    script,
    location: urlOf(each, addresses).replace(/\.html(?=\?|$)/, each.path.match(/\.\w+$/)![0]),
    title: each.path,
    cert,
    timeout: timeoutOf(each),
  };
}

const timeoutOf = ({ long }: Case): number => long ? 60_000 : 15_000;
/** The harness of a page ends it after a minute. */
const PAGE_TIMEOUT = 75_000;

async function runInPage(windows: BrowserContext, each: Case, url: string): Promise<Subtest[]> {
  const id = each.path + each.variant;
  const page = await windows.newPage();
  try {
    await page.goto(url, { waitUntil: "commit" });
    await page.waitForFunction("globalThis.outcomes", undefined, {
      timeout: PAGE_TIMEOUT,
    });
    return subtests(id, await page.evaluate("outcomes") as Outcomes);
  } catch (error) {
    return [{ id: `${id}: harness`, passed: false, message: `${error}` }];
  } finally {
    await page.close();
  }
}

function subtests(id: string, { tests, status }: Outcomes): Subtest[] {
  const outcomes = tests.length ? tests : [status];
  return outcomes.map(({ name, status, message }) => ({
    id: `${id}: ${name}`,
    passed: status === 0,
    message: message ?? "",
  }));
}

async function runInWorker(script: string, job: Job): Promise<Subtest[]> {
  const worker = new Worker(new URL(`file://${script}`), { type: "module" });
  const { pathname, search } = new URL(job.location);
  const id = pathname + search;
  try {
    return await new Promise((resolve) => {
      const fail = (message: string) => resolve([{ id: `${id}: harness`, passed: false, message }]);
      const timer = setTimeout(() => fail("no report"), job.timeout + 5_000);
      worker.onerror = (event) => {
        event.preventDefault?.();
        clearTimeout(timer);
        fail(`error: ${event.message}`);
      };
      worker.onmessage = ({ data }: MessageEvent<Outcomes>) => {
        if (data.type !== "outcomes") return; // of their harness, or of a test
        clearTimeout(timer);
        resolve(subtests(id, data));
      };
      worker.postMessage(job);
    });
  } finally {
    worker.terminate();
  }
}

/** Each failure must be one that docs/standard.md gives a reason for, and each of those must fail. */
async function judge(
  where: string,
  subtests: Subtest[],
  { least }: { least: number },
): Promise<void> {
  const listed = (await expectations()).filter((each) => each.where.includes(where));
  const failed = subtests.filter((each) => !each.passed);
  const passed = subtests.length - failed.length;
  const once = subtests.filter(({ id }) => !/\?(wss|wpt_flags)/.test(id));
  const passedOnce = once.filter((each) => each.passed).length;
  const counts = `${passed} of ${subtests.length} subtests pass, each variant counted; ` +
    `${passedOnce} of ${once.length} without those for TLS and HTTP/2`;
  console.log(`${where}: ${counts}`);
  const unlisted = failed.filter(({ id }) => !listed.some(({ part }) => id.includes(part)));
  const passing = listed
    .filter(({ part }) => subtests.some(({ id }) => id.includes(part)))
    .filter(({ part }) => !failed.some(({ id }) => id.includes(part)));
  for (const { id, message } of unlisted) console.log(`  unlisted: ${id}: ${message}`);
  for (const { part } of passing) console.log(`  listed, and passes: ${part}`);
  note(counts);
  assert(DUPLEX_WPT_ONLY || subtests.length > least);
  assertEquals(unlisted.map(({ id }) => id), []);
  assertEquals(passing.map(({ part }) => part), []);
}
