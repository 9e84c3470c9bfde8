/**
 * duplex-sse: everything a WebSocket does, over plain HTTP.
 *
 * The server, {@link sseAdapter}, and the client, {@link WebSocketSSE}, together.
 * Each is also an entry point of its own, one file without any import:
 * `@duplex/sse/server` and `@duplex/sse/client`.
 *
 * @example Server and client in one program
 * ```ts
 * import { sseAdapter, WebSocketSSE } from "@duplex/sse";
 *
 * const ws = sseAdapter({
 *   bidir: true,
 *   hooks: { message: (peer, message) => void peer.send(`echo ${message}`) },
 * });
 *
 * // The client may be given any fetch: here it calls the server's directly.
 * const socket = new WebSocketSSE("http://localhost/", {
 *   transport: "post",
 *   fetch: (url, init) => ws.fetch(new Request(url, init)),
 * });
 * const echo = await new Promise((resolve) => {
 *   socket.onopen = () => socket.send("hello");
 *   socket.onmessage = (event) => resolve(event.data);
 * });
 * console.log(echo); // echo hello
 * socket.close();
 * await ws.close();
 * ```
 *
 * @module
 */

export { defineHooks, sseAdapter, sseAdapter as default } from "./server.ts";
export type {
  CloseDetails,
  ClusterStats,
  Cors,
  ErrorContext,
  Hooks,
  MaybePromise,
  Message,
  Peer,
  PeerContext,
  PeerWebSocket,
  SSEAdapter,
  SSEOptions,
  Stats,
  SyncAdapter,
  SyncDriver,
  SyncMessage,
  UpgradeRequest,
  UpgradeResult,
  WaitForDrainOptions,
} from "./server.ts";
export { WebSocketSSE, WebsocketSSE } from "./client.ts";
export type {
  EventHandler,
  HeadersLike,
  Transport,
  WebSocketSSEDrainOptions,
  WebSocketSSEEventMap,
  WebSocketSSEOptions,
  WebSocketSSEStats,
} from "./client.ts";
