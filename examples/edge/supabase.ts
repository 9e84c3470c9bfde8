/**
 * Supabase Edge Functions: a room, as `supabase/functions/room/index.ts`.
 *
 * - Duration: a worker lives for 150 s (free) or 400 s (paid), all its requests together, and 2 s of
 *   processor time for each request. It says so shortly before with `beforeunload`: we say goodbye
 *   (1012), and clients connect anew. Within a worker's life resumption hides every dropped connection.
 * - First byte: within 150 s. Ours goes out at once.
 * - Isolation: workers share nothing. A request that reaches another than the one with its session
 *   gets 404, and the client sees 1006; `sync: cluster(driver)` lets any worker answer.
 * - The page is always of another origin: `cors`. Supabase checks the token of every request by
 *   itself; give the client `headers: () => ({ authorization: "Bearer " + accessToken })`.
 */

import { sseAdapter } from "../../server.ts"; // yours: jsr:@duplex/sse/server

const ws = sseAdapter({
  bidir: true,
  cors: ["https://example.com"],
  hooks: {
    open: (peer) => peer.subscribe("room"),
    message(peer, message) {
      ws.publish("room", `${peer}: ${message}`);
    },
  },
});

addEventListener("beforeunload", () => void ws.close(1012, "Restarting"));

Deno.serve(ws.fetch);
