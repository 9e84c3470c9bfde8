/**
 * What every server of the demo does: it listens where `HOST` and `PORT` say, tells the addresses,
 * and at SIGINT and SIGTERM tells its clients that it ends, so that they connect again.
 */

import { networkInterfaces } from "node:os";
import process from "node:process";
import { demo, type Host } from "./demo.ts";
import type { Where } from "./network.ts";

/** By default the whole network is served, so that a phone can join: `HOST=127.0.0.1` is alone. */
export function whereFrom({ HOST, PORT }: Record<string, string | undefined>): Where {
  return { hostname: HOST || "0.0.0.0", port: toPort(PORT || "8000") };
}

export function toPort(text: string): number {
  if (!/^\d{1,5}$/.test(text) || Number(text) > 65_535) throw new Error(`Not a port: ${text}`);
  return Number(text);
}

/** Starts the demo, and ends the process with it. */
export async function start(host: Host, where?: Where): Promise<void> {
  try {
    const { hostname, port } = where ?? whereFrom(process.env);
    const others = hostname === "0.0.0.0" || hostname === "::" ? lan() : [];
    const { port: actual, close } = await demo(host, { hostname, port }, (port) => {
      return others.map((address) => `http://${address}:${port}/`);
    });
    const own = others.length > 0 || hostname === "0.0.0.0" ? "127.0.0.1" : hostname;
    console.log(`Chat on http://${own.includes(":") ? `[${own}]` : own}:${actual}/`);
    for (const address of others) console.log(`From this network: http://${address}:${actual}/`);
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

/** The addresses of this machine that a phone in the same network can reach. */
function lan(): string[] {
  try {
    return Object.values(networkInterfaces()).flatMap((each) => each ?? [])
      .filter(({ family, internal }) => family === "IPv4" && !internal)
      .map(({ address }) => address);
  } catch {
    return []; // Deno, without --allow-sys=networkInterfaces
  }
}

/** One line, where runtimes have a stack for a port that is taken. */
function explain(error: Error & { code?: string }): string {
  const taken = error.code === "EADDRINUSE" || error.name === "AddrInUse";
  return taken ? "That port is taken: choose another one, by PORT=8001" : error.message;
}
