/**
 * The chat on Bun: `bun examples/bun.ts`
 */

/// <reference types="bun-types" />
import { chat } from "./chat.ts";
import { start } from "./start.ts";

const typescript = new Bun.Transpiler({ loader: "ts" });
const { fetch, close } = chat((source) => typescript.transformSync(source));

start((where) => Bun.serve({ ...where, fetch }).port!, close);
