/**
 * What it costs that hooks run in the async context of their session's opening.
 *
 * @module
 */
import { figure, type Outcome, ratio, type Samples, type Scale } from "../measure.ts";
import { Remote } from "../rpc.ts";

export async function context({ short, rounds, runtimes }: Scale): Promise<Outcome> {
  const outcome: Outcome = { figures: [], ratios: [] };
  for (const runtime of runtimes) {
    await using child = await Remote.start(runtime, "contexts.ts");
    const samples = await child.call<Samples>("run", { rounds, ms: short ? 500 : 4_000 });
    outcome.figures.push(
      figure("opening and closing, without a network", runtime, "µs a session", samples),
    );
    outcome.ratios.push(
      ratio(
        `${runtime}: opening and closing, hooks in their session's async context / in none`,
        samples["own context"]!,
        samples.none!,
        { atMost: 1.1 },
      ),
    );
  }
  return outcome;
}
