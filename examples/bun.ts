/**
 * The chat on Bun: `bun examples/bun.ts`
 */

/// <reference types="bun-types" />
import { bun } from "./bun-host.ts";
import { start } from "./start.ts";

const typescript = new Bun.Transpiler({ loader: "ts" });

start(bun((source) => typescript.transformSync(source)));
