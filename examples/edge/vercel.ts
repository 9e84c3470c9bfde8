/**
 * Vercel Functions: a feed, as `api/feed.ts`, on the Node.js runtime, which is the default.
 *
 * - First byte: within the function's duration. Ours goes out at once.
 * - Duration: a request is ended after `maxDuration`. The client resumes it where it was, unseen by
 *   your code on both sides, while the instance lives.
 * - Isolation: the Edge runtime forbids a request to touch the stream of another, so that nobody
 *   hears anybody there: `runtime: "edge"` is not for this. On Node.js the requests of one region
 *   share an instance ("Fluid compute") while one is enough. A second one answers 404 to the sessions
 *   of the first, and their clients see 1006. Then connect anew (any wrapper that reconnects a
 *   WebSocket can do it): `open` tells the newcomer all it has to know. What must not break belongs
 *   on one server, or behind `sync: cluster(driver)`.
 */

import { sseAdapter } from "../../server.ts"; // yours: duplex-sse/server

export const maxDuration = 300; // seconds

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

export const GET = (request: Request): Promise<Response> => ws.fetch(request);
export const POST = GET;
