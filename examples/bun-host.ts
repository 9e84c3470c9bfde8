/** How Bun serves the demo. */

import type { Host } from "./demo.ts";
import type { NativeSocket } from "./chat.ts";

/** What of Bun this uses: the command of the npm package has none of its types. */
interface BunRuntime {
  version: string;
  serve(options: {
    hostname: string;
    port: number;
    fetch(request: Request, server: BunServer): Promise<Response> | undefined;
    websocket: {
      open(socket: NativeSocket): void;
      message(socket: NativeSocket, data: string | Uint8Array): void;
      close(socket: NativeSocket): void;
    };
  }): BunServer;
}

interface BunServer {
  readonly port: number;
  upgrade(request: Request): boolean;
  stop(closeActiveConnections: boolean): Promise<void>;
}

export function bun(stripTypes: Host["stripTypes"]): Host {
  const { Bun } = globalThis as unknown as { Bun: BunRuntime };
  return {
    name: `Bun ${Bun.version}`,
    native: true,
    stripTypes,
    serve({ fetch, native }) {
      const server = Bun.serve({
        hostname: "127.0.0.1",
        port: 0,
        fetch: (request, server) => server.upgrade(request) ? undefined : fetch(request, server),
        websocket: {
          open: (socket) => native.open(socket),
          message: (socket, data) => native.message(socket, String(data)),
          close: (socket) => native.close(socket),
        },
      });
      return { port: server.port, stop: () => server.stop(true) };
    },
  };
}
