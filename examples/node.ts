/**
 * The chat on Node: `node examples/node.ts`, from version 22.18 on, which removes types by itself.
 * For older ones there is the command of the npm package: bin.ts.
 */

import { stripTypeScriptTypes } from "node:module";
import { chat } from "./chat.ts";
import { listen } from "./listen.ts";
import { start } from "./start.ts";

const { fetch, close } = chat((source) => stripTypeScriptTypes(source));

start((where) => listen(fetch, where), close);
