/**
 * Cloudflare Workers: one Durable Object for each room, named by the path.
 *
 * - Isolation: requests to a plain Worker are spread over many isolates, and even within one workerd
 *   cancels what a request does to the stream of another that has ended. A Durable Object has neither
 *   limit: all sessions of a room live in one, wherever its clients are, and every resumption finds
 *   its session.
 * - Duration: none for a stream in which something moves; Cloudflare's proxy cuts it after about
 *   100 s without a byte, and `heartbeatInterval` stays far below. A deployment, or a move to another
 *   machine, ends the object and its sessions: clients find 404, see 1006 and connect again.
 * - First byte: Cloudflare's proxy waits about 100 s for it. Ours goes out at once.
 * - Departures show only when something is written: it is the heartbeat that notices them.
 * - Hibernation is for WebSockets: an object with an open event stream stays in memory and is billed
 *   for it. It is let go when the last session has ended.
 *
 * wrangler.jsonc:
 *
 *     {
 *       "main": "cloudflare.ts",
 *       "compatibility_date": "2026-04-01",
 *       "compatibility_flags": ["enable_request_signal"],
 *       "durable_objects": { "bindings": [{ "name": "ROOMS", "class_name": "Room" }] },
 *       "migrations": [{ "tag": "v1", "new_sqlite_classes": ["Room"] }]
 *     }
 */

import { sseAdapter } from "../../server.ts"; // yours: duplex-sse/server

/** What we use of @cloudflare/workers-types. */
interface Env {
  ROOMS: {
    idFromName(name: string): unknown;
    get(id: unknown): { fetch(request: Request): Promise<Response> };
  };
}

export class Room {
  readonly #ws = sseAdapter({
    bidir: true,
    hooks: {
      open: (peer) => peer.subscribe("room"),
      message: (peer, message) => {
        this.#ws.publish("room", `${peer}: ${message}`);
      },
    },
  });

  fetch(request: Request): Response | Promise<Response> {
    return this.#ws.handles(request) ? this.#ws.fetch(request) : new Response("Hello");
  }
}

export default {
  fetch(request: Request, env: Env): Promise<Response> {
    const room = env.ROOMS.idFromName(new URL(request.url).pathname);
    return env.ROOMS.get(room).fetch(request);
  },
};
