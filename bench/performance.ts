/**
 * The tables of README.md and docs/performance.md, from what the bench has recorded.
 *
 * @module
 */
import type { Figure, Outcome, Ratio } from "./measure.ts";
import { marksOf, put, table } from "./markdown.ts";
import { short } from "./report.ts";

/** What results.json is. */
export interface Results {
  machine: string;
  outcomes: Record<string, Outcome>;
  /** The ratios of a short run, by name. */
  short: Record<string, number>;
}

/** Puts what is recorded into a document, wherever it has marks for it. */
export function update(document: string, { outcomes }: Results): string {
  return marksOf(document).reduce((text, name) => {
    if (name === "readme") return put(text, name, summary(outcomes));
    const outcome = outcomes[name];
    return outcome ? put(text, name, rows(outcome)) : text;
  }, document);
}

/** Of README's table: a title, and the figure that it tells. */
const SUMMARY: readonly [title: string, scenario: string, figure: string][] = [
  ["fan-out to 100, bursts of 20, messages/s", "fanOutBursts", "fan-out to 100, bursts of 20"],
  ["fan-out to 1,000, one at a time, messages/s", "fanOutSingly", "fan-out to 1000, one at a time"],
  ["fan-out to 100 every 10 ms, p50, ms", "offered", "fan-out to 100 every 10 ms, p50"],
  ["fan-out to 100 every 10 ms, p99, ms", "offered", "fan-out to 100 every 10 ms, p99"],
  ["round trip p50, ms", "roundTrip", "round trip p50"],
  ["round trip p99, ms", "roundTrip", "round trip p99"],
  ["uplink, one client, bursts of 500, messages/s", "uplink", "uplink, clients"],
  ["text of 64 KiB up, MB/s", "bulk", "bulk up, text of 64 KiB"],
  ["text of 64 KiB down, MB/s", "bulk", "bulk down, text of 64 KiB"],
  ["1,000 idle sessions, MB", "memory", "memory of 1000 idle sessions"],
];

const RUNTIMES = ["deno", "bun"] as const;
const SHOWN = ["native", "raw", "crossws", "ours"];

function summary(outcomes: Record<string, Outcome>): string {
  const cell = (figure: Figure | undefined) =>
    SHOWN.map((name) => {
      const text = figure?.values[name] ? short(figure.values[name].median) : "–";
      return name === "ours" ? `**${text}**` : text;
    }).join(" / ");
  const lines = SUMMARY.map(([title, scenario, name]) => {
    const figures = outcomes[scenario]?.figures ?? [];
    const of = (runtime: string) =>
      figures.find((figure) => figure.name === name && figure.runtime === runtime);
    return [title, ...RUNTIMES.map((runtime) => cell(of(runtime)))];
  });
  const kinds = SHOWN.join(" / ");
  return table(["", `Deno: ${kinds}`, `Bun: ${kinds}`], lines);
}

/** All figures of a scenario, then its ratios beside their targets. */
function rows(outcome: Outcome): string {
  return [figuresOf(outcome), ratiosOf(outcome)].filter(Boolean).join("\n\n");
}

function figuresOf({ figures }: Outcome): string {
  const names = [...new Set(figures.map(({ name }) => name))];
  const cell = (figure: Figure | undefined) =>
    Object.entries(figure?.values ?? {}).map(([name, { median }]) => `${name} ${short(median)}`)
      .join(", ");
  const runtimes = columnsOf(figures.map(({ runtime }) => runtime));
  return table(
    ["medians", ...runtimes.map(titleOf)],
    names.map((name) => {
      const all = figures.filter((figure) => figure.name === name);
      const of = (runtime: string) => all.find((figure) => figure.runtime === runtime);
      return [`${name}, ${all[0]!.unit}`, ...runtimes.map((runtime) => cell(of(runtime)))];
    }),
  );
}

function ratiosOf({ ratios }: Outcome): string {
  if (!ratios.length) return "";
  const parts = ratios.map((ratio) => {
    const [, runtime = "any", name] = /^(?:(deno|bun): )?(.*)$/.exec(ratio.name)!;
    return { ratio, runtime, name: name! };
  });
  const runtimes = columnsOf(parts.map(({ runtime }) => runtime));
  const names = [...new Set(parts.map(({ name }) => name))];
  return table(
    ["ratios, their medians (least to most)", ...runtimes.map(titleOf), "wanted"],
    names.map((name) => {
      const all = parts.filter((part) => part.name === name);
      const of = (runtime: string) => all.find((part) => part.runtime === runtime)?.ratio;
      const wanted = [...new Set(all.map(({ ratio }) => wantedOf(ratio)))].join(", ");
      return [name, ...runtimes.map((runtime) => cellOf(of(runtime))), wanted];
    }),
  );
}

function cellOf(ratio: Ratio | undefined): string {
  if (!ratio) return "";
  const { value: { median, min, max }, target, atLeast } = ratio;
  const range = min === max ? "" : ` (${short(min)} to ${short(max)})`;
  const missed = target !== undefined && (atLeast ? median < target : median > target);
  return `${short(median)}${range}${missed ? ", missed" : ""}`;
}

function wantedOf({ target, atLeast }: Ratio): string {
  return target === undefined ? "" : `${atLeast ? "≥" : "≤"} ${target}`;
}

/** "any" is one column. */
function columnsOf(runtimes: string[]): string[] {
  return [...RUNTIMES, "any"].filter((runtime) => runtimes.includes(runtime));
}

function titleOf(runtime: string): string {
  return runtime === "any" ? "figure" : runtime === "deno" ? "Deno" : "Bun";
}
