/**
 * What every server of the chat does: it listens where `HOST` and `PORT` say, and at SIGINT and
 * SIGTERM tells its clients that it restarts, so that they connect again by themselves.
 */

import process from "node:process";

export interface Where {
  hostname: string;
  port: number;
}

/** By default only this machine is served. For a container, `HOST=0.0.0.0`. */
export function whereFrom({ HOST, PORT }: Record<string, string | undefined>): Where {
  return { hostname: HOST || "127.0.0.1", port: toPort(PORT || "8000") };
}

export function toPort(text: string): number {
  if (!/^\d{1,5}$/.test(text) || Number(text) > 65_535) throw new Error(`Not a port: ${text}`);
  return Number(text);
}

/** `listen` returns the port that it got; `close` shuts down in order. */
export async function start(
  listen: (where: Where) => number | Promise<number>,
  close: () => Promise<void>,
  where?: Where,
): Promise<void> {
  try {
    const { hostname, port } = where ?? whereFrom(process.env);
    const actual = await listen({ hostname, port });
    const host = hostname.includes(":") ? `[${hostname}]` : hostname;
    console.log(`Chat on http://${host}:${actual}/`);
  } catch (error) {
    console.error(explain(error as Error));
    process.exit(1);
  }
  for (const signal of ["SIGINT", "SIGTERM"] as const) {
    process.once(signal, async () => { // a second one ends it at once
      await close();
      process.exit();
    });
  }
}

/** One line, where runtimes have a stack for a port that is taken. */
function explain(error: Error & { code?: string }): string {
  const taken = error.code === "EADDRINUSE" || error.name === "AddrInUse";
  return taken ? "That port is taken: choose another one, by PORT=8001" : error.message;
}
