#!/usr/bin/env node
/**
 * The command of the npm package: serves the chat, on Bun where it is run by Bun, else on Node.
 */

import process from "node:process";
import { parseArgs } from "node:util";
import { chat } from "./chat.ts";
import { serve } from "./node.ts";

const HELP = `Serves the chat example of duplex-sse.

Usage: duplex-sse [options]

Options:
  --port <number>    Where to listen; 0 takes a free port. Default: 8000
  --hostname <name>  The address to listen on. Default: 127.0.0.1
  --help             Prints this
`;

interface Bun {
  serve(options: {
    port: number;
    hostname: string;
    fetch: ReturnType<typeof chat>;
  }): { port: number };
}

const options = parse();
if (options.help) process.stdout.write(HELP);
else await start(Number(options.port), options.hostname);

function parse(): { help: boolean; port: string; hostname: string } {
  try {
    const { values } = parseArgs({
      options: {
        port: { type: "string", default: "8000" },
        hostname: { type: "string", default: "127.0.0.1" },
        help: { type: "boolean", short: "h", default: false },
      },
    });
    if (!/^\d{1,5}$/.test(values.port) || Number(values.port) > 65_535) {
      throw new Error(`Not a port: ${values.port}`);
    }
    return values;
  } catch (error) {
    console.error(`${(error as Error).message}\n\n${HELP}`);
    process.exit(2);
  }
}

async function start(port: number, hostname: string): Promise<void> {
  const fetch = chat((script) => script); // types were removed when the package was made
  const { Bun } = globalThis as { Bun?: Bun };
  if (Bun) port = Bun.serve({ port, hostname, fetch }).port;
  else port = await startNode(fetch, port, hostname);
  const host = hostname.includes(":") ? `[${hostname}]` : hostname;
  console.log(`Chat on http://${host}:${port}/`);
}

function startNode(
  fetch: ReturnType<typeof chat>,
  port: number,
  hostname: string,
): Promise<number> {
  return new Promise((resolve) => {
    const server = serve(fetch, { port, hostname });
    server.on("listening", () => {
      const address = server.address();
      resolve(typeof address === "object" && address ? address.port : port);
    });
    server.on("error", (error) => {
      console.error(error.message);
      process.exit(1);
    });
  });
}
