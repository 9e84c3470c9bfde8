/**
 * The chat on Bun: `bun examples/bun.ts`
 */

/// <reference types="bun-types" />
import { chat } from "./chat.ts";

const typescript = new Bun.Transpiler({ loader: "ts" });

const server = Bun.serve({
  hostname: "127.0.0.1",
  port: Number(process.env.PORT || 8000),
  fetch: chat((source) => typescript.transformSync(source)),
});

console.log(`Chat on http://${server.hostname}:${server.port}/`);
