/**
 * What must work wherever the server runs: one conversation, held with a room
 * that runs elsewhere, in another runtime or framework.
 *
 * @module
 */
import type { Transport } from "../client.ts";
import type { SSEOptions } from "../server.ts";
import { chaos } from "./chaos.ts";
import { assertEquals, type TestContext, until } from "./harness.ts";
import { connect } from "./pair.ts";

/** As source, so that it can be pasted: a room that echoes, tells everyone, and says who left. */
export const ROOM = `{
  bidir: true,
  heartbeatInterval: 500,
  idleTimeout: 2,
  resumeTimeout: 2000,
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
      peer.publish("room", "left " + code + " " + reason);
    },
  },
}`;

/** The same, for servers that import it. */
export const room: SSEOptions = {
  bidir: true,
  heartbeatInterval: 500,
  idleTimeout: 2,
  resumeTimeout: 2000,
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

export interface Place {
  port: number;
  /** Default: `/room`. */
  path?: string;
  /** The uplink's transport that `auto` finds there; any, if not given. */
  transport?: Transport;
}

/** Both directions, text and binary, subprotocols, resumption, closing, departures that say nothing. */
export async function converse(t: TestContext, place: Place): Promise<void> {
  const { port, path = "/room" } = place;
  const proxy = t.use(await chaos(port, { seed: 1 }));
  const observer = connect(t, `http://127.0.0.1:${port}${path}`, { transport: "post" });
  await observer.opened;
  assertEquals(await observer.messages.next(), "welcome");

  // Both directions, in order, whatever the size.
  const ada = connect(t, `${proxy.url}${path}`, { protocols: ["other", "chat"] });
  await ada.opened;
  assertEquals(ada.socket.protocol, "chat");
  assertEquals(await ada.messages.next(), "welcome");
  const bytes = Uint8Array.from({ length: 100_000 }, (_, i) => i * 7);
  ada.socket.send("one\r\ntwo\n");
  ada.socket.send(bytes);
  ada.socket.send("");
  assertEquals(await ada.messages.next(), "one\r\ntwo\n");
  assertEquals(new Uint8Array(await ada.messages.next() as ArrayBuffer), bytes);
  assertEquals(await ada.messages.next(), "");
  if (place.transport) assertEquals(ada.socket.transport, place.transport);
  ada.socket.send("tell hello");
  assertEquals(await observer.messages.next(), "hello");

  // Cut: what both say meanwhile arrives, once and in order.
  const resumed = once(ada, "resume");
  proxy.refuse(300);
  proxy.cutAll("rst");
  for (let n = 1; n <= 5; n++) {
    observer.socket.send(`tell observer ${n}`);
    ada.socket.send(`tell ada ${n}`);
  }
  await until(resumed, { timeout: 10_000 });
  const said = (name: string) => [1, 2, 3, 4, 5].map((n) => `${name} ${n}`);
  assertEquals(await ada.messages.take(5), said("observer"));
  assertEquals(await observer.messages.take(5), said("ada"));
  assertEquals([ada.messages.left, observer.messages.left], [0, 0]);

  // A close with its code and reason, both ways.
  ada.socket.close(4001, "enough");
  const { code, reason, wasClean } = await ada.closed;
  assertEquals([code, reason, wasClean], [4001, "enough", true]);
  assertEquals(await observer.messages.next(), "left 4001 enough");

  // A network that dies, and one that only falls silent: the server notices.
  for (const dead of ["cut", "silent"] as const) {
    const grace = connect(t, `${proxy.url}${path}`);
    await grace.opened;
    assertEquals(await grace.messages.next(), "welcome");
    if (dead === "cut") {
      proxy.refuse(60_000);
      proxy.cutAll("rst");
    } else proxy.stallAll();
    assertEquals(await observer.messages.next({ timeout: 15_000 }), "left 1006 ");
    proxy.resumeAll();
    proxy.calm();
    await grace.closed; // 404: its session is over
  }
  observer.socket.close();
  await observer.closed;
}

function once({ events }: { events: string[] }, type: string): () => boolean {
  return () => events.includes(type);
}
