#!/usr/bin/env node
/**
 * The command of the npm package: serves the chat, on Bun where it is run by Bun, else on Node.
 */

import process from "node:process";
import { parseArgs } from "node:util";
import { bun } from "./bun-host.ts";
import type { Where } from "./network.ts";
import { node } from "./node-host.ts";
import { toPort, whereFrom } from "./serving.ts";
import { EVERYWHERE, start } from "./start.ts";

const HELP = `Serves the chat example of duplex-sse.

Usage: duplex-sse [options]

Options:
  --port <number>    Where to listen; 0 takes a free port. Default: $PORT, or 8000
  --hostname <name>  The address to listen on. Default: $HOST, or 0.0.0.0,
                     which others in the network reach; 127.0.0.1 is this machine alone
  --help             Prints this
`;

const where = parse();
if (where) {
  const stripTypes = (script: string) => script; // they were removed when the package was made
  start("Bun" in globalThis ? bun(stripTypes) : node(stripTypes), where);
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
    const { hostname, port } = whereFrom(process.env, EVERYWHERE);
    return {
      hostname: values.hostname ?? hostname,
      port: values.port === undefined ? port : toPort(values.port),
    };
  } catch (error) {
    console.error(`${(error as Error).message}\n\n${HELP}`);
    process.exit(2);
  }
}
