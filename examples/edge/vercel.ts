/**
 * Vercel Edge Functions: a feed, as `api/feed.ts`.
 *
 * - First byte: within 25 s. Ours goes out at once.
 * - Duration: a stream is ended after 300 s. The client resumes it where it was, unseen by your
 *   code on both sides, while the instance lives.
 * - Isolation: instances share nothing and come and go with the load; one region makes it rarer that
 *   a request reaches another, but nothing rules it out. There it is answered 404, and the client
 *   sees 1006. Then connect anew (any wrapper that reconnects a WebSocket can do it): `open` tells
 *   the newcomer all it has to know. Sessions that must not break belong on one server, or behind
 *   `sync: cluster(driver)`.
 * - `request.signal` never fires: the heartbeat notices who has left.
 */

import { sseAdapter } from "../../server.ts"; // yours: duplex-sse/server

export const config = { runtime: "edge", regions: ["fra1"] };

let count = 0;

const ws = sseAdapter({
  bidir: true,
  hooks: {
    open(peer) {
      peer.subscribe("feed");
      peer.send({ count });
    },
    message() {
      ws.publish("feed", { count: ++count });
    },
  },
});

export default (request: Request): Promise<Response> => ws.fetch(request);
