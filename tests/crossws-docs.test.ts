/**
 * The examples of crossws's page on its SSE adapter, as they stand there but
 * for the specifiers: a crossws user moves over by changing an import.
 * https://crossws.h3.dev/adapters/sse
 */
import { WebsocketSSE } from "../client.ts"; // crossws/websocket/sse
import sseAdapter from "../server.ts"; // crossws/adapters/sse
import { WebSocketSSE } from "../mod.ts";
import { assert, assertEquals, assertMatch, assertStrictEquals, test } from "./harness.ts";
import { Queue, shutDown } from "./pair.ts";

/** The page's "Server side", with its console in a queue. */
function page(console: { log(line: string): void }) {
  const ws = sseAdapter({
    bidir: true, // Enable bidirectional messaging support
    hooks: {
      upgrade(_request) {
        // In case of bidirectional mode, extra auth is recommended based on request
        // You can return a new Response() instead to abort
        return {
          headers: {},
        };
      },
      open(peer) {
        // Use this hook to send messages to peer
        peer.send(`Welcome ${peer}`);
      },
      message(peer, message) {
        // Accepting messages from peer (bidirectional mode)
        console.log(`Message from ${peer}: ${message}`); // Message from <id>: ping
      },
    },
  });

  /** "Inside your web server handler"; what passes its test is noted. */
  const handler = {
    async fetch(request: Request): Promise<Response> {
      // Handle crossws upgrade
      if (
        request.headers.get("accept") === "text/event-stream" ||
        request.headers.has("x-crossws-id")
      ) {
        return await ws.fetch(request);
      }

      // Your normal application logic
      return new Response("default page");
    },
  };
  return { ws, handler };
}

for (const transport of ["auto", "duplex", "stream", "post"] as const) {
  test(`crossws's documented server and client talk, every request passing its hand-written test: ${transport}`, async (t) => {
    const logged = new Queue<string>();
    const requests: { passes: boolean; handled: boolean }[] = [];
    const { ws: adapter, handler } = page({ log: (line) => logged.push(line) });
    const { url } = await t.serve((request) => {
      const { headers } = request;
      requests.push({
        passes: headers.get("accept") === "text/event-stream" || headers.has("x-crossws-id"),
        handled: adapter.handles(request),
      });
      return handler.fetch(request);
    });
    t.defer(() => shutDown(adapter));
    const received = new Queue<string>();
    const closed = new Queue<number>();
    const console = { log: (_: string, data: string) => received.push(data) };

    // The page's "Client side".
    const ws = new WebsocketSSE(url, { bdir: true, transport });

    ws.addEventListener("open", () => {
      ws.send("ping");
    });

    ws.addEventListener("message", (event) => {
      console.log("Received:", event.data);
    });

    ws.addEventListener("close", (event) => closed.push(event.code));

    const welcome = await received.next();
    assertMatch(welcome, /^Welcome [0-9a-f-]{36}$/);
    const line = await logged.next();
    assertEquals(line, `Message from ${welcome.slice("Welcome ".length)}: ping`);
    ws.close(1000);
    assertEquals(await closed.next(), 1000);
    assert(requests.length > 0);
    for (const request of requests) assertEquals(request, { passes: true, handled: true });
    assertEquals(await (await fetch(url)).text(), "default page");
  });
}

test("WebsocketSSE, as crossws's documentation spells it, is WebSocketSSE", () => {
  assertStrictEquals(WebsocketSSE, WebSocketSSE);
});

test("bdir: false, as documented by crossws, is bidir: false: send throws", async (t) => {
  const { ws: adapter, handler } = page({ log() {} });
  const { url } = await t.serve((request) => handler.fetch(request));
  t.defer(() => shutDown(adapter));
  const received = new Queue<string>();
  const ws = new WebsocketSSE(url, { bdir: false, signal: t.signal });
  ws.onmessage = (event) => received.push(event.data);
  await received.next();
  let thrown: unknown;
  try {
    ws.send("ping");
  } catch (error) {
    thrown = error;
  }
  assertEquals((thrown as DOMException).name, "InvalidStateError");
});
