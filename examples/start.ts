/** Starts the demo where it is told to, and tells its addresses. */

import { networkInterfaces } from "node:os";
import process from "node:process";
import { demo, type Host } from "./demo.ts";
import type { Where } from "./network.ts";
import { serving, whereFrom } from "./serving.ts";

/** By default the whole network is served, so that a phone can join: `HOST=127.0.0.1` is alone. */
export const EVERYWHERE = "0.0.0.0";

/** Starts the demo, and ends the process with it. */
export function start(host: Host, where?: Where): Promise<void> {
  return serving(async () => {
    const { hostname, port } = where ?? whereFrom(process.env, EVERYWHERE);
    const others = hostname === EVERYWHERE || hostname === "::" ? lan() : [];
    const { port: actual, close } = await demo(host, { hostname, port }, (port) => {
      return others.map((address) => `http://${address}:${port}/`);
    });
    const own = others.length > 0 || hostname === EVERYWHERE ? "127.0.0.1" : hostname;
    console.log(`Chat on http://${own.includes(":") ? `[${own}]` : own}:${actual}/`);
    for (const address of others) console.log(`From this network: http://${address}:${actual}/`);
    return close;
  });
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
