/**
 * What a page has to load, minified and gzipped.
 *
 * @module
 */
import { gzipSync } from "node:zlib";
import { build, stop } from "esbuild";
import { bounded, figure, type Outcome, spread } from "../measure.ts";
import { root } from "../../tests/spawn.ts";

const MODULES = {
  "client.ts": 'export { WebSocketSSE } from "./client.ts"',
  "server.ts": 'export { sseAdapter } from "./server.ts"',
  "socket.io-client": 'export { io } from "socket.io-client"',
  "centrifuge": 'export { Centrifuge } from "centrifuge"',
};

export async function size(): Promise<Outcome> {
  const samples: Record<string, number[]> = {};
  for (const [name, contents] of Object.entries(MODULES)) {
    const { outputFiles } = await build({
      stdin: { contents, resolveDir: root },
      bundle: true,
      minify: true,
      format: "esm",
      platform: "browser",
      target: "es2022",
      write: false,
    });
    samples[name] = [gzipSync(outputFiles[0]!.contents, { level: 9 }).length / 1024];
  }
  await stop();
  return {
    figures: [figure("size, minified and gzipped", "any", "KB", samples)],
    ratios: [bounded("size of the client, KB", spread(samples["client.ts"]!), { atMost: 9 })],
  };
}
