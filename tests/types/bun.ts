/**
 * The class under bun-types alone, whose `WebSocket` asks for more than the
 * standard: held against the standard's members of it. Only type-checked.
 *
 * @module
 */
import { WebSocketSSE } from "../../client.ts";

/** The members of the standard's `WebSocket`, without those of `EventTarget`. */
type Standard =
  | "CONNECTING"
  | "OPEN"
  | "CLOSING"
  | "CLOSED"
  | "url"
  | "readyState"
  | "bufferedAmount"
  | "onopen"
  | "onerror"
  | "onclose"
  | "extensions"
  | "protocol"
  | "close"
  | "onmessage"
  | "send";

export const socket: Pick<WebSocket, Standard> = new WebSocketSSE("wss://example.com/");
/** Bun knows a third one. */
export const binaryType: WebSocket["binaryType"] =
  new WebSocketSSE("wss://example.com/").binaryType;
