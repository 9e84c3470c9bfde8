/** How Node serves the demo: it has no WebSocket server of its own. */

import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import process from "node:process";
import { toNodeHandler } from "../node.ts"; // yours: duplex-sse/node
import type { Host } from "./demo.ts";

export function node(stripTypes: Host["stripTypes"]): Host {
  return {
    name: `Node ${process.versions.node}`,
    native: false,
    stripTypes,
    serve({ fetch }) {
      const server = createServer(toNodeHandler({ fetch }));
      return new Promise((resolve, reject) => {
        server.on("error", reject);
        server.listen(0, "127.0.0.1", () => {
          const { port } = server.address() as AddressInfo;
          resolve({ port, stop: () => void server.close().closeAllConnections() });
        });
      });
    },
  };
}
