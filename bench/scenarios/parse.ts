/**
 * Parsing the downlink, against eventsource-parser on inputs of its own benchmark's kinds.
 *
 * @module
 */
import { figure, type Outcome, ratio, type Samples, type Scale } from "../measure.ts";
import { Remote } from "../rpc.ts";

type Speeds = Record<string, Record<"eventsource-parser" | "ours", number[]>>;

export async function parse({ short, rounds, runtimes }: Scale): Promise<Outcome> {
  const outcome: Outcome = { figures: [], ratios: [] };
  for (const runtime of runtimes) {
    await using child = await Remote.start(runtime, "parsers.ts");
    const speeds = await child.call<Speeds>("run", { rounds, ms: short ? 20 : 150 });
    const all: Samples = { "eventsource-parser": [], ours: [] };
    for (const [input, samples] of Object.entries(speeds)) {
      outcome.figures.push(figure(`parsing: ${input}`, runtime, "MB/s", samples));
      outcome.ratios.push(
        ratio(`${runtime}: parsing ${input}`, samples.ours, samples["eventsource-parser"]),
      );
    }
    for (const name of ["eventsource-parser", "ours"] as const) {
      all[name] = Array.from(
        { length: rounds },
        (_, i) => geometricMean(Object.values(speeds).map((samples) => samples[name][i]!)),
      );
    }
    outcome.ratios.push(
      ratio(
        `${runtime}: parsing, all inputs, ours / eventsource-parser`,
        all.ours!,
        all["eventsource-parser"]!,
        { atLeast: 0.8 },
      ),
    );
  }
  return outcome;
}

function geometricMean(values: number[]): number {
  return Math.exp(values.reduce((sum, value) => sum + Math.log(value), 0) / values.length);
}
