/**
 * Google Cloud Run: a room, on Node.js.
 *
 * - First byte: within the request's timeout. Ours goes out at once.
 * - Duration: a request is ended after its timeout, 5 to 60 min. Clients are asked to connect anew
 *   before that (`maxConnectionAge`); resumption hides what is cut nevertheless.
 * - Isolation: an instance serves many requests, but two of a session may meet different ones; the
 *   affinity that may be asked for is no promise. `cluster` lets any of them answer, and with
 *   `revive` a session goes where its stream is. Without a request an instance has no processor.
 * - Shutdown: SIGTERM, 10 s. Sessions go to the other instances.
 */

import { createServer } from "node:http";
import process from "node:process";
import { redis } from "crossws/sync";
import { Redis } from "ioredis";
import { cluster } from "../../cluster.ts"; // yours: duplex-sse/cluster
import { toNodeHandler } from "../../node.ts"; // yours: duplex-sse/node
import { sseAdapter } from "../../server.ts"; // yours: duplex-sse/server

/** In seconds, as `gcloud run deploy --timeout` has it. */
const TIMEOUT = 3600;

const client = new Redis(process.env.REDIS_URL!);

const ws = sseAdapter({
  bidir: true,
  sync: cluster(redis({ client: client as never, channel: "room" })),
  maxConnectionAge: TIMEOUT * 800,
  hooks: {
    open: (peer) => peer.subscribe("room"),
    revive() {}, // its topics come along, and there is nothing else
    message(peer, message) {
      ws.publish("room", `${peer}: ${message}`);
    },
  },
});

process.once("SIGTERM", async () => {
  await ws.close(1012, "", { signal: AbortSignal.timeout(8_000) });
  process.exit();
});

createServer(toNodeHandler(ws)).listen(Number(process.env.PORT ?? 8080));
