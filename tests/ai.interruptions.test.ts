/**
 * Whatever interrupts the answer of a model, it comes whole and once, is written but once, and its
 * page sees no failure. The short form of bench/ai.ts, which measures other wires beside ours.
 */
import { MemoryBus } from "./bus.ts";
import { assertEquals, test } from "./harness.ts";
import { INTERRUPTIONS } from "./interruptions.ts";

test("no interruption loses or repeats any of an answer, or writes it twice", async (t) => {
  const shared = { sync: new MemoryBus(t).adapter };
  // All at once, since they mostly wait.
  const results = await Promise.all(INTERRUPTIONS.map(async ({ name, run }) => {
    const { gaps: _, ...counts } = await run(t, "ours", shared, { pace: 6, limit: 1_000 });
    return { name, ...counts };
  }));
  const none = { lost: 0, repeated: 0, orphaned: 0, failures: 0, never: 0 };
  assertEquals(results, INTERRUPTIONS.map(({ name }) => ({ name, begun: 1, ...none })));
}, { timeout: 40_000 });
