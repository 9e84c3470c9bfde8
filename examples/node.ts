/**
 * The chat on Node: `node examples/node.ts`, from version 22.18 on, which removes types by itself.
 * For older ones there is the command of the npm package: bin.ts.
 */

import { stripTypeScriptTypes } from "node:module";
import { node } from "./node-host.ts";
import { start } from "./start.ts";

start(node((source) => stripTypeScriptTypes(source)));
