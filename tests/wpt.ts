/**
 * The web platform's own tests of WebSocket and WebSocketStream, from a folder that holds them: which there are, what
 * each consists of, and what of them is expected to fail. docs/standard.md says how to run them.
 *
 * @module
 */
import { readdir, readFile } from "node:fs/promises";
import { dirname, join, posix } from "node:path";
import { root } from "./harness.ts";

/** What their tests say of each subtest. */
export interface Subtest {
  /** File, variant and name. */
  id: string;
  passed: boolean;
  message: string;
}

/** One file of theirs in one of its variants. */
export interface Case {
  /** As `/websockets/Send-data.any.js`. */
  path: string;
  /** As `?wss`, or "". */
  variant: string;
  /** Whether it says that it takes long. */
  long: boolean;
  /** Whether it needs a page around it: a document, windows, cookies. */
  needsPage: boolean;
  /** Paths of what it loads before its own script. */
  scripts: string[];
}

/** Addresses that their templates ask for. */
export interface Addresses {
  host: string;
  http: number;
  https: number;
}

/** Never of use to us: these drive a browser. */
const LEFT_OUT = /^\/websockets\/back-forward-cache-/;
/** Where those of WebSocketStream are. */
const STREAM = "/websockets/stream/";
/** What only a page has. */
const PAGE =
  /\bdocument\b|iframe|window\.(open|parent|top)|_ORIGIN|cookie|new Worker\b|XMLHttpRequest|multi-globals/i;
/** What a worker's script loads by itself. */
const IMPORT = /importScripts\(["'](.*?)["']\);?/g;
/** Their server knows it by another name. */
const ALIASES: Record<string, string> = {
  "/resources/WebIDLParser.js": "/resources/webidl2/lib/webidl2.js",
};
/** What others load. */
const SUPPORT =
  /\/(support|resources|handlers)\/|-[12]\.html$|constants\.sub\.js|url-parsing\/(current|incumbent)\//;

/** The two interfaces that are tested. */
export type Tested = "WebSocket" | "WebSocketStream";

export async function cases(folder: string, tested: Tested): Promise<Case[]> {
  const files = (await readdir(join(folder, "websockets"), { recursive: true }))
    .map((file) => `/websockets/${file}`)
    .filter((file) => /\.(any|window|worker)\.js$|\.html$/.test(file))
    .filter((file) => !LEFT_OUT.test(file) && !SUPPORT.test(file))
    .filter((file) => file.startsWith(STREAM) === (tested === "WebSocketStream"))
    .sort();
  return (await Promise.all(files.map((file) => casesOf(folder, file)))).flat();
}

async function casesOf(folder: string, path: string): Promise<Case[]> {
  const text = await readFile(join(folder, path), "utf8");
  const html = path.endsWith(".html");
  const meta = (name: string): string[] => {
    const pattern = html
      ? new RegExp(`<meta name="?${name}"? content="?([^">]*)"?`, "g")
      : new RegExp(`^// META: ${name}=(.*)$`, "gm");
    return [...text.matchAll(pattern)].map((match) => match[1]!.trim());
  };
  const scripts = html
    ? [...text.matchAll(/<script src="?([^\s">]+)/g)].map((match) => match[1]!)
    : [...meta("script"), ...loaded(text)];
  const variants = meta("variant");
  return (variants.length ? variants : [""]).map((variant) => ({
    path,
    variant,
    long: meta("timeout").includes("long"),
    needsPage: PAGE.test(path + text) || path.endsWith(".window.js"),
    scripts: scripts
      .filter((script) => !/testharness(report)?\.js$/.test(script))
      .map((script) => posix.resolve(dirname(path), script)),
  }));
}

function loaded(script: string): string[] {
  return [...script.matchAll(IMPORT)].map((match) => match[1]!);
}

/** What a case runs, as one classic script: what it loads, then its own. */
export async function scriptOf(
  folder: string,
  { path, scripts }: Case,
  addresses: Addresses,
): Promise<string> {
  const host = path.includes("mixed-content") ? "wpt.test" : addresses.host;
  const read = (file: string) => textOf(folder, file, { ...addresses, host });
  const own = await read(path);
  const parts = [
    await read("/resources/testharness.js"),
    ...await Promise.all(scripts.map(read)),
    ...path.endsWith(".html")
      ? [...own.matchAll(/<script>(.*?)<\/script>/gs)].map((match) => match[1]!)
      : [own.replace(IMPORT, "")],
  ];
  return parts.join("\n;\n");
}

/** What a page of theirs says that is not in UTF-8. */
export const LATIN = /charset="?windows-1252/;

/** Of a text of characters below 256. */
export function bytesOf(text: string): Uint8Array<ArrayBuffer> {
  return Uint8Array.from(text, (character) => character.charCodeAt(0));
}

/** A file of theirs, with what its templates ask for. */
export async function textOf(
  folder: string,
  file: string,
  { host, http, https }: Addresses,
): Promise<string> {
  const text = await readFile(join(folder, ALIASES[file] ?? file), "latin1");
  const filled = !file.includes(".sub.") ? text : text
    .replace(/\{\{ports\[(?:http|ws)\]\[\d\]\}\}/g, `${http}`)
    .replace(/\{\{ports\[(?:https|wss|h2)\]\[\d\]\}\}/g, `${https}`)
    .replace(/\{\{hosts\[alt\]\[\w*\]\}\}/g, "127.0.0.1")
    .replace(/\{\{domains\[(\w*)\]\}\}/g, (_, sub) => `${sub && `${sub}.`}${host}`)
    .replace(/\{\{host\}\}/g, host);
  return new TextDecoder(LATIN.test(text) ? "latin1" : "utf-8").decode(bytesOf(filled));
}

/** Why subtests are expected to fail: a row of docs/standard.md. */
export interface Expectation {
  /** "deno", "bun" or "chromium". */
  where: string[];
  /** What the subtests' ids contain. */
  part: string;
  reason: string;
}

/** The rows of docs/standard.md: `| where | part | reason |`. */
export async function expectations(): Promise<Expectation[]> {
  const text = await readFile(join(root, "docs/standard.md"), "utf8");
  const rows = text.matchAll(/^\| ([a-zA-Z, ]+) +\| `([^`]+)` +\| (.+?) +\|$/gm);
  return [...rows].map(([, where, part, reason]) => ({
    where: where!.toLowerCase().split(/, */).map((name) => name.trim()),
    part: part!,
    reason: reason!,
  }));
}
