/**
 * Supabase Edge Functions: a room, as `supabase/functions/room/index.ts`.
 *
 * - Duration: a worker lives for 150 s (free) or 400 s (paid), all its requests together, and 2 s of
 *   processor time for each request. Clients are asked to connect anew before that
 *   (`maxConnectionAge`); resumption hides what is cut nevertheless.
 * - First byte: within 150 s. Ours goes out at once.
 * - Isolation: workers share nothing. `cluster` lets any of them answer, and with `revive` a session
 *   goes where its stream is.
 * - Shutdown: `beforeunload`, when a worker is retired. Sessions go to other workers; who finds none
 *   is told goodbye (1012), and connects anew.
 * - The page is always of another origin: `cors`. Supabase checks the token of every request by
 *   itself; give the client `headers: () => ({ authorization: "Bearer " + accessToken })`.
 */

import { redis } from "crossws/sync"; // yours: npm:crossws/sync
import { Redis } from "ioredis"; // yours: npm:ioredis
import { cluster } from "../../cluster.ts"; // yours: jsr:@duplex/sse/cluster
import { sseAdapter } from "../../server.ts"; // yours: jsr:@duplex/sse/server

/** Of a worker, in seconds. */
const LIFE = 150;

const client = new Redis(Deno.env.get("REDIS_URL")!);

const ws = sseAdapter({
  bidir: true,
  cors: ["https://example.com"],
  sync: cluster(redis({ client: client as never, channel: "room" })),
  maxConnectionAge: LIFE * 500, // half of what a worker has when it is new
  hooks: {
    open: (peer) => peer.subscribe("room"),
    revive() {}, // its topics come along, and there is nothing else
    message(peer, message) {
      ws.publish("room", `${peer}: ${message}`);
    },
  },
});

addEventListener("beforeunload", () => void ws.close(1012, "Restarting"));

Deno.serve(ws.fetch);
