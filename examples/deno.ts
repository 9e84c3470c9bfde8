/**
 * The chat on Deno: `deno run -N -R --allow-env=HOST,PORT --allow-sys=networkInterfaces
 * examples/deno.ts`, or without a checkout `jsr:@duplex/sse/bin` in the place of the file.
 */

import { stripTypeScriptTypes } from "node:module";
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
      if (request.headers.get("upgrade") !== "websocket") return fetch(request, info);
      const { socket, response } = Deno.upgradeWebSocket(request);
      socket.onopen = () => native.open(socket);
      socket.onmessage = ({ data }) => native.message(socket, String(data));
      socket.onclose = () => native.close(socket);
      return response;
    });
    return { port: addr.port, stop: () => stopping.abort() };
  },
});
