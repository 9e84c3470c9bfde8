/** Hooks may read their peer's request at any time, also when it has long been answered. */
import { chaos } from "./chaos.ts";
import { assertEquals, needs, once, test } from "./harness.ts";
import { connect, listen, Queue } from "./pair.ts";

const skip = needs("openssl");

for (const http2 of [false, true]) {
  for (const transport of ["duplex", "post"] as const) {
    test(
      `over HTTP/${
        http2 ? 2 : 1.1
      }, ${transport}: a peer's request is read when its connection has ended`,
      async (t) => {
        const seen = new Queue<unknown[]>();
        const closed = new Queue<unknown[]>();
        const { port, fetch } = await listen(
          t,
          {
            getNamespace: () => "/",
            hooks: {
              message: (peer, message) =>
                seen.push([
                  message.data,
                  peer.request.headers.get("x-name"),
                  new URL(peer.request.url).search,
                  peer.websocket.protocol,
                ]),
              close: (peer, { code }) => closed.push([code, peer.request.headers.get("x-name")]),
            },
          },
          undefined,
          http2 ? { tls: true, http2 } : {},
        );
        const network = t.use(await chaos(port));
        const url = `${network.url.replace("http:", http2 ? "https:" : "http:")}/?q=1`;
        const { socket, opened } = connect(t, url, {
          transport,
          fetch: fetch as typeof globalThis.fetch,
          headers: { "x-name": "ada" },
        });
        await opened;
        const resumed = once(socket, "resume", { timeout: 10_000 });
        network.cutAll("rst");
        await resumed;
        socket.send("after");
        assertEquals(await seen.next(), ["after", "ada", "?q=1", ""]);
        socket.close(4000);
        assertEquals(await closed.next(), [4000, "ada"]);
      },
      { skip: http2 ? skip : undefined, timeout: 30_000 },
    );
  }
}
