/**
 * A chat with a model, on Deno, Bun and Node (22.18 or later), without a key:
 *
 *     deno run -A examples/ai/main.ts    (or: bun examples/ai/main.ts, node examples/ai/main.ts)
 *
 * It listens where `HOST` and `PORT` say; 127.0.0.1 and 8000 by default. `AI_PROVIDER` and `AI_MODEL` choose another model than the mock: see model.ts.
 */

import { createServer } from "node:http";
import * as nodeModule from "node:module";
import type { AddressInfo } from "node:net";
import process from "node:process";
import { toNodeHandler } from "../../node.ts";
import type { Where } from "../network.ts";
import { type Fetch, serving, wellFormed, whereFrom } from "../serving.ts";
import { aiChat } from "./chat.ts";

const { AI_PROVIDER, AI_MODEL } = process.env;
const { Bun } = globalThis as unknown as {
  Bun?: {
    serve(options: object): { port: number };
    Transpiler: new (options: { loader: "ts" }) => { transformSync(source: string): string };
  };
};

const model = AI_PROVIDER
  ? await (await import("./model.ts")).modelOf(AI_PROVIDER, AI_MODEL ?? "")
  : undefined;
await serving(async () => {
  const { fetch, close } = aiChat(stripTypes, model);
  const where = whereFrom(process.env, "127.0.0.1");
  const port = await listen(
    where,
    wellFormed(async (request, info) =>
      new URL(request.url).pathname === "/"
        ? new Response(null, { status: 302, headers: { location: "/ai/" } })
        : await fetch(request, info)
    ),
  );
  console.log(`Chat on http://${where.hostname}:${port}/ai/`);
  return close;
});

/** Returns the port. */
async function listen(where: Where, fetch: Fetch): Promise<number> {
  if ("Deno" in globalThis) return Deno.serve({ ...where, onListen: () => {} }, fetch).addr.port;
  if (Bun) return Bun.serve({ ...where, fetch }).port;
  const server = createServer(toNodeHandler({ fetch }));
  await new Promise<void>((resolve, reject) => {
    server.once("error", reject);
    server.listen(where.port, where.hostname, resolve);
  });
  return (server.address() as AddressInfo).port;
}

function stripTypes(source: string): string {
  if (Bun) return new Bun.Transpiler({ loader: "ts" }).transformSync(source);
  const { stripTypeScriptTypes } = nodeModule as { stripTypeScriptTypes?(source: string): string };
  return stripTypeScriptTypes!(source);
}
