/** How Bun serves the demo. */

import type { Host } from "./demo.ts";
import { MAX_MESSAGE, MAX_UNREAD, type NativeSocket } from "./chat.ts";
import { malformed } from "./serving.ts";

/** What of Bun this uses: the command of the npm package has none of its types. */
interface BunRuntime {
  version: string;
  serve(options: {
    hostname: string;
    port: number;
    fetch(request: Request, server: BunServer): Promise<Response> | Response | undefined;
    websocket: {
      maxPayloadLength: number;
      backpressureLimit: number;
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
        fetch(request, server) {
          if (!native.takes(request)) return fetch(request, server);
          return server.upgrade(request) ? undefined : malformed();
        },
        websocket: {
          maxPayloadLength: MAX_MESSAGE,
          backpressureLimit: MAX_UNREAD, // of its PONGs, too
          open: (socket) => native.open(socket),
          message: (socket, data) => native.message(socket, String(data)),
          close: (socket) => native.close(socket),
        },
      });
      return { port: server.port, stop: () => server.stop(true) };
    },
  };
}
