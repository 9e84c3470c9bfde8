/**
 * The chat on Deno: `deno run -N -R --allow-env=PORT examples/deno.ts`
 */

import { stripTypeScriptTypes } from "node:module";
import { chat } from "./chat.ts";

Deno.serve({
  hostname: "127.0.0.1",
  port: Number(Deno.env.get("PORT") || 8000),
  onListen: ({ hostname, port }) => console.log(`Chat on http://${hostname}:${port}/`),
}, chat((source) => stripTypeScriptTypes(source)));
