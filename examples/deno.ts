/**
 * The chat on Deno: `deno run -N -R --allow-env=HOST,PORT --allow-sys=networkInterfaces
 * examples/deno.ts`, or without a checkout `jsr:@duplex/sse/bin` in the place of the file.
 */

import { stripTypeScriptTypes } from "node:module";
import { malformed } from "./serving.ts";
import { start } from "./start.ts";

start({
  name: `Deno ${Deno.version.deno}`,
  native: true,
  stripTypes: (source) => stripTypeScriptTypes(source),
  serve({ fetch, native }) {
    const stopping = new AbortController();
    const { addr } = Deno.serve({
      hostname: "127.0.0.1",
      port: 0,
      signal: stopping.signal,
      onListen: () => {},
    }, (request, info) => {
      if (!native.takes(request)) return fetch(request, info);
      const upgraded = upgrade(request);
      if (!upgraded) return malformed();
      const { socket, response } = upgraded;
      socket.onopen = () => native.open(socket);
      socket.onmessage = ({ data }) => native.message(socket, String(data));
      socket.onclose = () => native.close(socket);
      return response;
    });
    return { port: addr.port, stop: () => stopping.abort() };
  },
});

/** Nothing where a header is missing that a handshake has. */
function upgrade(request: Request): Deno.WebSocketUpgrade | undefined {
  try {
    return Deno.upgradeWebSocket(request);
  } catch {
    return undefined;
  }
}
