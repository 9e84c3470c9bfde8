/**
 * A room that echoes, tells everyone, and says who left: what the server of
 * tests/conversation.ts does, wherever it runs. Its lines are also pasted, as
 * text, so it uses nothing from outside.
 *
 * @module
 */
import type { SSEOptions } from "../server.ts";

export const room: SSEOptions = {
  bidir: true,
  heartbeatInterval: 500,
  idleTimeout: 2,
  resumeTimeout: 2_000,
  handleProtocols: (offered) => offered.has("chat") ? "chat" : "",
  hooks: {
    open(peer) {
      peer.subscribe("room");
      peer.send("welcome");
    },
    message(peer, message) {
      const data = message.rawData;
      if (typeof data === "string" && data.startsWith("tell ")) peer.publish("room", data.slice(5));
      else peer.send(data);
    },
    close(peer, { code, reason }) {
      peer.publish("room", `left ${code} ${reason}`);
    },
  },
};
