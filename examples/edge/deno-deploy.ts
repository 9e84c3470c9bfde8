/**
 * Deno Deploy: a room.
 *
 * - Duration: no limit of a request's own, but an instance without traffic is stopped, and a new
 *   deployment replaces it: SIGINT, and SIGKILL 5 s later. So we say goodbye at SIGINT (1012, which
 *   tells clients to connect again); without that they would find 404 and see 1006.
 * - First byte: no limit of concern; the stream begins at once.
 * - Isolation: instances share nothing, and several may run, by region and by load. Resumption
 *   hides every dropped connection as long as a client's requests reach the instance that has its
 *   session; another answers 404, and the client sees 1006. One region keeps that rare;
 *   `sync: cluster(driver)` of cluster.ts lets any instance answer, over Redis or another backplane.
 */

import { sseAdapter } from "../../server.ts"; // yours: jsr:@duplex/sse/server

const ws = sseAdapter({
  bidir: true,
  hooks: {
    open: (peer) => peer.subscribe("room"),
    message(peer, message) {
      ws.publish("room", `${peer}: ${message}`);
    },
  },
});

Deno.addSignalListener("SIGINT", async () => {
  await ws.close(1012, "Restarting", { signal: AbortSignal.timeout(4_000) });
  Deno.exit();
});

Deno.serve((request, info) =>
  ws.handles(request) ? ws.fetch(request, info) : new Response("Hello")
);
