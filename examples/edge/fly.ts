/**
 * Fly.io, Railway, Render and whatever else runs a server in several machines: a room, on Node.js.
 *
 * - First byte: no limit of concern. Ours goes out at once.
 * - Duration: none on Fly.io, 15 min on Railway, 100 min on Render. Clients are asked to connect
 *   anew before that (`maxConnectionAge`); resumption hides what is cut nevertheless.
 * - Isolation: the proxy sends a request to any machine. `cluster` lets each of them answer, and
 *   with `revive` a session goes where its stream is.
 * - Shutdown: Fly.io sends SIGINT and waits 5 s, Railway SIGTERM and 3 s, unless told otherwise.
 *   Sessions go to the other machines, so deploy one after the other.
 */

import { createServer } from "node:http";
import process from "node:process";
import { redis } from "crossws/sync";
import { Redis } from "ioredis";
import { cluster } from "../../cluster.ts"; // yours: duplex-sse/cluster
import { toNodeHandler } from "../../node.ts"; // yours: duplex-sse/node
import { sseAdapter } from "../../server.ts"; // yours: duplex-sse/server

/** In seconds; on Fly.io it may be left out. */
const LIMIT = 900;

const client = new Redis(process.env.REDIS_URL!);

const ws = sseAdapter({
  bidir: true,
  sync: cluster(redis({ client: client as never, channel: "room" })),
  maxConnectionAge: LIMIT * 800,
  hooks: {
    open: (peer) => peer.subscribe("room"),
    revive() {}, // its topics come along, and there is nothing else
    message(peer, message) {
      ws.publish("room", `${peer}: ${message}`);
    },
  },
});

for (const signal of ["SIGINT", "SIGTERM"] as const) {
  process.once(signal, async () => {
    await ws.close(1012, "", { signal: AbortSignal.timeout(2_500) });
    process.exit();
  });
}

createServer(toNodeHandler(ws)).listen(Number(process.env.PORT ?? 8080));
