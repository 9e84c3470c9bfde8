/**
 * What the servers of all examples do: they listen where `HOST` and `PORT` say, tell in one line of
 * a port that is taken, and at SIGINT and SIGTERM tell their clients that they end, so that those
 * connect again.
 */

import { readFile } from "node:fs/promises";
import process from "node:process";
import { fileURLToPath } from "node:url";
import type { Where } from "./network.ts";

/** An empty variable is as good as none. */
export function whereFrom(
  { HOST, PORT }: Record<string, string | undefined>,
  hostname: string,
): Where {
  return { hostname: HOST || hostname, port: toPort(PORT || "8000") };
}

export function toPort(text: string): number {
  if (!/^\d{1,5}$/.test(text) || Number(text) > 65_535) throw new Error(`Not a port: ${text}`);
  return Number(text);
}

/** Tells all clients that the server ends. */
export type Close = () => Promise<unknown>;

/** Answers requests. */
export type Fetch = (request: Request, info?: unknown) => Promise<Response>;

/** Keeps from `fetch` what is to no address, as what names a host of two words. */
export function wellFormed(fetch: Fetch): Fetch {
  return async (request, info) =>
    URL.canParse(request.url) ? await fetch(request, info) : malformed();
}

export function malformed(): Response {
  return new Response("Malformed request\n", { status: 400 });
}

/** The text of a file of ours, wherever this program has come from: at JSR it is an address. */
export async function textOf(url: URL): Promise<string> {
  if (url.protocol === "file:") return await readFile(fileURLToPath(url.href), "utf8");
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url} cannot be had: ${response.status}`);
  return await response.text();
}

/** Runs a server, and ends the process by what it returns; where it cannot run, by a line. */
export async function serving(start: () => Close | Promise<Close>): Promise<void> {
  try {
    const close = await start();
    for (const signal of ["SIGINT", "SIGTERM"] as const) {
      process.once(signal, async () => { // a second one ends it at once
        await close();
        process.exit();
      });
    }
  } catch (error) {
    console.error(explain(error as Error));
    process.exit(1);
  }
}

/** One line, where runtimes have a stack for a port that is taken. */
function explain(error: Error & { code?: string }): string {
  const taken = error.code === "EADDRINUSE" || error.name === "AddrInUse";
  return taken ? "That port is taken: choose another one, by PORT=8001" : error.message;
}
