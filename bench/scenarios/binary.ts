/**
 * What base64 costs, in time and in bytes, beside text of the same length.
 *
 * @module
 */
import { figure, type Outcome, type Samples, type Scale } from "../measure.ts";
import { Remote } from "../rpc.ts";

interface Costs {
  /** µs */
  encode: Samples;
  decode: Samples;
  /** Bytes on the wire over bytes of the message. */
  growth: number;
  native: boolean;
}

export async function binary({ rounds, runtimes }: Scale): Promise<Outcome> {
  const outcome: Outcome = { figures: [], ratios: [], notes: [] };
  for (const runtime of runtimes) {
    await using child = await Remote.start(runtime, "base64.ts");
    for (const size of [1024, 65536]) {
      const { encode, decode, growth, native } = await child.call<Costs>("run", { size, rounds });
      const name = `of ${size / 1024} KB`;
      outcome.figures.push(
        figure(`encoding ${name}`, runtime, "µs", encode),
        figure(`decoding ${name}`, runtime, "µs", decode),
      );
      outcome.notes!.push(
        `${runtime}: a binary message ${name} is ${growth.toFixed(3)} times as long on the wire; ` +
          `base64 is ${native ? "the engine's own" : "by btoa and atob"}`,
      );
    }
  }
  return outcome;
}
