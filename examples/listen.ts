/**
 * Serves a fetch handler on `node:http`.
 */

import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { toNodeHandler } from "../node.ts"; // yours: duplex-sse/node
import type { Where } from "./start.ts";

/** Returns the port. */
export function listen(
  fetch: (request: Request, info?: unknown) => Promise<Response>,
  { port, hostname }: Where,
): Promise<number> {
  const server = createServer(toNodeHandler({ fetch }));
  return new Promise((resolve, reject) => {
    server.on("error", reject);
    server.listen(port, hostname, () => resolve((server.address() as AddressInfo).port));
  });
}
