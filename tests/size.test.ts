/** What a page or a function carries: minified and gzipped, held to a budget. */
import { gzipSync } from "node:zlib";
import { esbuild } from "./bundle.ts";
import { assertLessOrEqual, test } from "./harness.ts";

/** In bytes: 1 to 3 % above what is there, so that growth is noticed. */
const budgets = {
  "client.ts": 16_700,
  "server.ts": 20_450,
  "cluster.ts": 14_050,
  "stream.ts": 2_000,
};

for (const [file, budget] of Object.entries(budgets)) {
  test(`${file} is at most ${budget / 1000} kB, minified and gzipped`, async () => {
    // It comes beside the client.
    const beside = file === "stream.ts" ? ["--external:./client.ts"] : [];
    const minified = await esbuild([file, "--bundle", "--minify", "--format=esm", ...beside]);
    const size = gzipSync(minified, { level: 9 }).length;
    const kB = (bytes: number) => `${(bytes / 1000).toFixed(1)} kB`;
    console.log(`${file}: ${kB(minified.length)} minified, ${kB(size)} gzipped`);
    assertLessOrEqual(size, budget);
  });
}
