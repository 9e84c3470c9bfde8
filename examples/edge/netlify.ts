/**
 * Netlify Edge Functions: a feed, as `netlify/edge-functions/feed.ts`.
 *
 * - First byte: the response's headers within 40 s. Ours go out at once.
 * - Duration: 50 ms of processor time for a request, waiting not counted. A stream to which a lot is
 *   written is ended by that; the client resumes it, which begins a new request with a new budget.
 * - Isolation: instances share nothing, and one is near each of your users. A request that reaches
 *   another than the one with its session gets 404, and the client sees 1006; then connect anew,
 *   `open` tells the newcomer all it has to know. `sync: cluster(driver)` lets any instance answer.
 */

import { sseAdapter } from "../../server.ts"; // yours: jsr:@duplex/sse/server

/** What we use of @netlify/edge-functions. */
interface Context {
  ip: string;
}

export const config = { path: "/feed" };

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

/** Without a response, Netlify goes on to the page or function behind the path. */
export default (request: Request, { ip }: Context): Promise<Response> | undefined =>
  ws.handles(request)
    ? ws.fetch(request, { remoteAddr: { hostname: ip } }) // peer.remoteAddress
    : undefined;
