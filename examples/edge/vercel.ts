/**
 * Vercel Functions: a room, as `api/room.ts`, on the Node.js runtime, which is the default.
 *
 * - First byte: within the function's duration. Ours goes out at once.
 * - Duration: a request is ended after `maxDuration`. Clients are asked to connect anew before that
 *   (`maxConnectionAge`), so that nobody sees it; resumption hides what is cut nevertheless.
 * - Isolation: the Edge runtime forbids a request to touch the stream of another, so that nobody
 *   hears anybody there: `runtime: "edge"` is not for this. On Node.js the requests of one region
 *   share an instance while one is enough, without affinity, and an instance without a request is
 *   frozen. `cluster` lets any of them answer, and with `revive` a session goes where its stream is.
 * - Shutdown: SIGTERM, 500 ms.
 */

import process from "node:process";
import { redis } from "crossws/sync";
import { Redis } from "ioredis";
import { cluster } from "../../cluster.ts"; // yours: duplex-sse/cluster
import { sseAdapter } from "../../server.ts"; // yours: duplex-sse/server

export const maxDuration = 300; // seconds

const client = new Redis(process.env.REDIS_URL!);

const ws = sseAdapter({
  bidir: true,
  sync: cluster(redis({ client: client as never, channel: "room" })),
  maxConnectionAge: maxDuration * 800,
  hooks: {
    open: (peer) => peer.subscribe("room"),
    revive() {}, // its topics come along, and there is nothing else
    message(peer, message) {
      ws.publish("room", `${peer}: ${message}`);
    },
  },
});

process.once("SIGTERM", () => void ws.close(1012, "", { signal: AbortSignal.timeout(400) }));

export const GET = (request: Request): Promise<Response> => ws.fetch(request);
export const POST = GET;
