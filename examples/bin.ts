#!/usr/bin/env node
/**
 * The command of the npm package: serves the chat, on Bun where it is run by Bun, else on Node.
 */

import process from "node:process";
import { parseArgs } from "node:util";
import { chat } from "./chat.ts";
import { listen } from "./listen.ts";
import { start, toPort, type Where, whereFrom } from "./start.ts";

const HELP = `Serves the chat example of duplex-sse.

Usage: duplex-sse [options]

Options:
  --port <number>    Where to listen; 0 takes a free port. Default: $PORT, or 8000
  --hostname <name>  The address to listen on. Default: $HOST, or 127.0.0.1
  --help             Prints this
`;

interface Bun {
  serve(options: Where & { fetch: ReturnType<typeof chat>["fetch"] }): { port: number };
}

const where = parse();
if (where) {
  const { fetch, close } = chat((script) => script); // types were removed when the package was made
  const { Bun } = globalThis as { Bun?: Bun };
  start(
    Bun ? (where) => Bun.serve({ ...where, fetch }).port : (where) => listen(fetch, where),
    close,
    where,
  );
}

/** Nothing where help was all that was asked for. */
function parse(): Where | undefined {
  try {
    const { values } = parseArgs({
      options: {
        port: { type: "string" },
        hostname: { type: "string" },
        help: { type: "boolean", short: "h" },
      },
    });
    if (values.help) return void process.stdout.write(HELP);
    const { hostname, port } = whereFrom(process.env);
    return {
      hostname: values.hostname ?? hostname,
      port: values.port === undefined ? port : toPort(values.port),
    };
  } catch (error) {
    console.error(`${(error as Error).message}\n\n${HELP}`);
    process.exit(2);
  }
}
