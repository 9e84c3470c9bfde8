/**
 * The chat on Deno: `deno run -N -R --allow-env=HOST,PORT examples/deno.ts`
 */

import { stripTypeScriptTypes } from "node:module";
import { chat } from "./chat.ts";
import { start } from "./start.ts";

const { fetch, close } = chat((source) => stripTypeScriptTypes(source));

start((where) => Deno.serve({ ...where, onListen: () => {} }, fetch).addr.port, close);
