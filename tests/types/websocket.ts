/**
 * The class against the environment's own `WebSocket`: DOM's where tsc and
 * `deno check` have it, Deno's where Deno has nothing else. Only type-checked.
 *
 * @module
 */
import { WebSocketSSE, WebsocketSSE } from "../../client.ts";

/** Not only an instance: whoever asks for the class can be given ours. */
export const constructor: typeof WebSocket = WebSocketSSE;
export const alias: typeof WebSocket = WebsocketSSE;
export const socket: WebSocket = new WebSocketSSE("wss://example.com/", ["a", "b"]);
export const constants: [0, 1, 2, 3] = [
  WebSocketSSE.CONNECTING,
  WebSocketSSE.OPEN,
  WebSocketSSE.CLOSING,
  WebSocketSSE.CLOSED,
];

/** What is written for a `WebSocket` type-checks for ours. */
export function use(socket: WebSocketSSE): void {
  socket.onmessage = (event) => socket.send(event.data);
  socket.onclose = ({ code, reason, wasClean }) => void [code + 1, reason.length, wasClean];
  socket.onopen = socket.onerror = function (event) {
    event.preventDefault();
  };
  socket.onmessage = null;
  socket.addEventListener("message", (event) => event.origin.length, { once: true });
  socket.addEventListener("close", function (event) {
    this.send(event.reason);
  });
  socket.addEventListener("resume", (event: Event) => event.type);
  socket.addEventListener("anything", { handleEvent: (event) => event.type });
  socket.binaryType = "arraybuffer";
  for (
    const data of ["", new ArrayBuffer(1), new Uint8Array(1), new DataView(new ArrayBuffer(1))]
  ) {
    const result: void = socket.send(data);
    void result;
  }
  socket.send(new Blob([]));
  socket.close();
  socket.close(1000, "reason");
}

/** What may be missing may be undefined, under `exactOptionalPropertyTypes` too. */
export function conditional(signal: AbortSignal | undefined, token?: string): WebSocketSSE {
  const headers = token ? { authorization: token } : undefined;
  return new WebSocketSSE("/chat", { signal, headers, protocols: undefined });
}

/** What the standard forbids is an error. */
export function misuse(socket: WebSocketSSE): void {
  // @ts-expect-error: read-only
  socket.readyState = 1;
  // @ts-expect-error: read-only
  socket.OPEN = 1;
  // @ts-expect-error: not one of the two
  socket.binaryType = "text";
  // @ts-expect-error: not a transport
  new WebSocketSSE("", { transport: "carrier pigeon" });
  // @ts-expect-error: a close event has no data
  socket.addEventListener("close", (event) => event.data);
}
