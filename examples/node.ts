/**
 * A fetch handler on node:http, without any package. It streams both ways at once, which the
 * duplex transport needs, and lets the handler know when the client has gone.
 */

import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";

type Handler = (request: Request, info: unknown) => Response | Promise<Response>;

/** Serves a fetch handler, which must not throw. */
export function serve(handler: Handler, options: { port: number; hostname: string }): Server {
  const server = createServer((incoming, outgoing) => {
    answer(handler, incoming, outgoing).catch(() => outgoing.destroy());
  });
  server.requestTimeout = 0; // a request whose body is the uplink lasts as long as its session
  return server.listen(options.port, options.hostname);
}

async function answer(
  handler: Handler,
  incoming: IncomingMessage,
  outgoing: ServerResponse,
): Promise<void> {
  const info = { remoteAddr: { hostname: incoming.socket.remoteAddress } };
  const response = await handler(toRequest(incoming), info);
  response.headers.forEach((value, name) => outgoing.appendHeader(name, value));
  outgoing.writeHead(response.status);
  const reader = response.body?.getReader();
  outgoing.on("close", () => reader?.cancel().catch(() => {}));
  for (;;) {
    const { done, value } = await reader?.read() ?? { done: true };
    if (done || outgoing.destroyed) break;
    if (!outgoing.write(value)) await new Promise<void>((go) => ready(outgoing, go));
  }
  outgoing.end();
}

/** Once what was written is on its way, or nobody is there to take it. */
function ready(outgoing: ServerResponse, go: () => void): void {
  const done = () => {
    outgoing.off("drain", done).off("close", done);
    go();
  };
  outgoing.on("drain", done).on("close", done);
}

function toRequest(incoming: IncomingMessage): Request {
  const { method, headers, rawHeaders } = incoming;
  const pairs = Array.from(
    { length: rawHeaders.length / 2 },
    (_, i): [string, string] => [rawHeaders[2 * i]!, rawHeaders[2 * i + 1]!],
  );
  const empty = method === "GET" || method === "HEAD" || headers["content-length"] === "0";
  return new Request(new URL(incoming.url!, `http://${headers.host ?? "localhost"}`), {
    method,
    headers: pairs,
    ...!empty && { body: toStream(incoming), duplex: "half" },
  } as RequestInit);
}

/** `Readable.toWeb` would do, but it throws where nobody can catch it when its reader has gone (Node 20). */
function toStream(incoming: IncomingMessage): ReadableStream<Uint8Array> {
  const chunks = incoming.iterator({ destroyOnReturn: false });
  return new ReadableStream<Uint8Array>({
    async pull(controller) {
      const { done, value } = await chunks.next();
      if (done) controller.close();
      else controller.enqueue(new Uint8Array(value));
    },
    cancel() {
      // What is left is read and dropped: to destroy it would take the answer along.
      Promise.resolve(chunks.return?.()).then(() => incoming.resume(), () => {});
    },
  }, { highWaterMark: 0 });
}
