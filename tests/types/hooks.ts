/**
 * Hooks written for crossws, without a cast, and what `sseAdapter` infers.
 * Only type-checked, under `strict` and `exactOptionalPropertyTypes`.
 *
 * @module
 */
import {
  type AdapterOptions,
  defineHooks as defineCrosswsHooks,
  type Hooks as CrosswsHooks,
  type Message as CrosswsMessage,
  type Peer as CrosswsPeer,
  type SyncAdapter as CrosswsSyncAdapter,
} from "crossws";
import { makeHooks } from "graphql-ws/use/crossws";
import type { GraphQLSchema } from "graphql";
import {
  defineHooks,
  type Hooks,
  type Message,
  type Peer,
  sseAdapter,
  type SSEOptions,
  type SyncAdapter,
} from "../../server.ts";

// ---------------------------------------------------------------- of crossws

declare const partial: Partial<CrosswsHooks>;
declare const whole: CrosswsHooks;
declare const schema: GraphQLSchema;
declare const sync: CrosswsSyncAdapter;
declare const ourSync: SyncAdapter;

export const defined = defineCrosswsHooks({
  upgrade(request) {
    if (request.headers.has("x-no")) throw new Response(null, { status: 401 });
    return { headers: { "x-yes": "1" }, context: { user: 1 }, namespace: "room" };
  },
  open: (peer) => peer.subscribe("news"),
  message(peer, message) {
    peer.publish("news", message.text());
    peer.send(message.json<{ a: number }>().a);
  },
  close: (peer, { code, reason }) => peer.terminate?.() ?? void [code, reason],
  error: (peer, error) => void [peer.id, error.message],
  drain: async (peer) => await peer.waitForDrain({ threshold: 1 }),
});

export const options: SSEOptions["hooks"][] = [
  partial,
  whole,
  defined,
  defineCrosswsHooks({}),
  makeHooks({ schema }),
];
sseAdapter({ bidir: true, hooks: partial });
sseAdapter({ hooks: whole, sync });
sseAdapter({ hooks: defined });
sseAdapter({ hooks: makeHooks({ schema }) });
sseAdapter({ resolve: () => partial });
sseAdapter({ resolve: () => Promise.resolve(defined) });

/** Functions over crossws's types take our peers and messages. */
declare function greet(peer: CrosswsPeer): void;
declare function read(message: CrosswsMessage): void;
sseAdapter({ hooks: { open: greet, message: (_, message) => message.text() as unknown as void } });
export function borrow(hooks: Partial<CrosswsHooks>): Partial<Hooks> {
  return hooks;
}
void read;

/** A backplane is the same thing to both. */
export const drivers: [SyncAdapter, CrosswsSyncAdapter] = [sync, ourSync];

/** An adapter's options can be shared. */
declare const shared: Pick<AdapterOptions, "getNamespace" | "idleTimeout" | "handleProtocols">;
export const reused: Partial<SSEOptions> = { ...shared };

// ---------------------------------------------------------------- ours

sseAdapter({
  hooks: {
    upgrade: () => ({ context: { user: "alice", level: 1 } }),
    open(peer) {
      const user: string = peer.context.user;
      const level: number = peer.context.level;
      // @ts-expect-error: upgrade returns no such thing
      void [user, level, peer.context.admin];
      for (const other of peer.peers) other.context.user.toUpperCase();
    },
    message(peer, message) {
      peer.send(`${peer.context.user.toUpperCase()}: ${message.text()}`);
      // @ts-expect-error: a number
      peer.context.level.toUpperCase();
    },
  },
});

sseAdapter({
  hooks: {
    async upgrade(request) {
      await null;
      return { context: { path: new URL(request.url).pathname } };
    },
    close(peer) {
      peer.context.path.startsWith("/");
      // @ts-expect-error: upgrade returns no such thing
      void peer.context.user;
    },
  },
});

sseAdapter<{ id: number }>({
  hooks: {
    // @ts-expect-error: not the context that was asked for
    upgrade: () => ({ context: { id: "1" } }),
    open: (peer) => void peer.context.id.toFixed(),
  },
});

/** Without an upgrade hook the context is anything. */
sseAdapter({ hooks: { open: (peer) => void peer.context.anything } });

export const ours = defineHooks<{ user: string }>({
  open: (peer) => void peer.context.user.length,
});
sseAdapter({ hooks: ours }).peers.get("/")?.forEach((peer) => peer.context.user.length);

export const none: SSEOptions = { hooks: {} };
// @ts-expect-error: no such hook takes three arguments
sseAdapter({ hooks: { open: (_peer: Peer, _message: Message, _more: string) => {} } });
