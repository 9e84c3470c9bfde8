import { test, needs, assertEquals } from "./harness.ts";
import { windows } from "./chromium.ts";
for (const i of [1,2]) test("x"+i, async (t) => {
  const c = await windows(t);
  const p = await c.newPage();
  await p.goto("data:text/html,hi");
  assertEquals(await p.evaluate("1+1"), 2);
}, { skip: needs("chromium"), timeout: 30000 });
