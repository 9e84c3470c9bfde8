/**
 * GraphQL subscriptions without a WebSocket: graphql-ws on both ends, unmodified. The server gets
 * its crossws hooks, the client our class in place of `WebSocket`.
 *
 * Run it, it asks and answers itself: `deno run -A examples/graphql.ts`, `bun examples/graphql.ts`
 */

import { buildSchema } from "graphql";
import { createClient } from "graphql-ws";
import { makeHooks } from "graphql-ws/use/crossws";
import { serve } from "srvx";
import { sseAdapter, WebSocketSSE } from "../mod.ts";

const schema = buildSchema(`
  type Query { hello(name: String!): String! }
  type Subscription { countdown(from: Int!): Int! }
`);

const roots = {
  query: { hello: ({ name }: { name: string }) => `Hello, ${name}!` },
  subscription: {
    async *countdown({ from }: { from: number }) {
      for (let countdown = from; countdown >= 0; countdown--) yield { countdown };
    },
  },
};

const ws = sseAdapter({ bidir: true, hooks: makeHooks({ schema, roots }) });
const server = serve({ hostname: "127.0.0.1", port: 0, silent: true, fetch: ws.fetch });
await server.ready();

const client = createClient({
  url: new URL("/graphql", server.url).href,
  webSocketImpl: WebSocketSSE,
});
for (const query of [`{ hello(name: "Ada") }`, "subscription { countdown(from: 3) }"]) {
  for await (const { data } of client.iterate({ query })) console.log(JSON.stringify(data));
}
await client.dispose();
await ws.close();
await server.close(true);
