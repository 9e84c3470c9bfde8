/**
 * The table, the chart, and on what machine they were made.
 *
 * @module
 */
import { execFile } from "node:child_process";
import { cpus, totalmem } from "node:os";
import { promisify } from "node:util";
import type { Figure, Outcome, Ratio, Spread } from "./measure.ts";
import { binary } from "../tests/spawn.ts";

/** Figures, then ratios with their targets. */
export function table(outcomes: Record<string, Outcome>): string {
  const all = Object.values(outcomes);
  const lines = all.flatMap(({ figures }) => figures).map((figure) => [
    `${figure.runtime}: ${figure.name}, ${figure.unit}`,
    Object.entries(figure.values).map(([name, value]) => `${name} ${show(value)}`).join(" | "),
  ]);
  const width = Math.max(...lines.map(([name]) => name!.length));
  return [
    "",
    ...lines.map(([name, values]) => `${name!.padEnd(width)}  ${values}`),
    "",
    ...all.flatMap(({ ratios }) => ratios).map(describe),
    "",
    ...all.flatMap(({ notes }) => notes ?? []),
  ].join("\n");
}

/** One ratio in a line, and whether it meets its target. */
export function describe({ name, value, target, atLeast }: Ratio): string {
  if (target === undefined) return `      ${name}: ${show(value)}`;
  const met = atLeast ? value.median >= target : value.median <= target;
  return `${met ? "ok    " : "MISSED"} ${name}: ${show(value)}, target ${
    atLeast ? "≥" : "≤"
  } ${target}`;
}

function show({ median, min, max }: Spread): string {
  return min === max ? short(median) : `${short(median)} (${short(min)} to ${short(max)})`;
}

function short(value: number): string {
  if (Math.abs(value) >= 10_000) return `${Math.round(value / 1000)}k`;
  return String(Number(value.toPrecision(value >= 100 ? 4 : 3)));
}

/** The machine and the versions. */
export async function machine(): Promise<string> {
  const run = promisify(execFile);
  const deno = (await run(binary("deno")!, ["--version"])).stdout.split(/\s/)[1];
  const bun = (await run(binary("bun")!, ["--version"])).stdout.trim();
  const processors = cpus();
  const memory = Math.round(totalmem() / 2 ** 30);
  return `${processors.length} × ${processors[0]!.model.trim()}, ${memory} GiB; ` +
    `Deno ${deno}, Bun ${bun}`;
}

// --- The chart ---

const CHARTED = [
  "fan-out to 100, bursts of 20",
  "fan-out to 1000, one at a time",
  "uplink, clients",
];
const BAR = 14;
const LEFT = 90;
const WIDTH = 720;

const STYLE = `
  text { font: 12px system-ui, sans-serif; fill: #24292f }
  .title { font-weight: 600 }
  .native { fill: #8c959f } .raw { fill: #b6bdc5 } .crossws { fill: #d4a72c } .ours { fill: #0969da }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .native { fill: #6e7681 } .raw { fill: #484f58 } .crossws { fill: #bb8009 } .ours { fill: #58a6ff }
  }`;

/** Bars of messages per second: one group for each scenario and runtime. */
export function chart(outcomes: Record<string, Outcome>): string {
  const figures = Object.values(outcomes).flatMap(({ figures }) => figures);
  const parts: string[] = [];
  let y = 20;
  for (const name of CHARTED) {
    for (const figure of figures.filter((figure) => figure.name === name)) {
      const drawn = group(figure, y);
      parts.push(drawn.svg);
      y = drawn.end + 24;
    }
  }
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${y}" role="img">
<title>Messages per second</title>
<style>${STYLE}
</style>
${parts.join("\n")}
</svg>`; // nothing after it: JSR would not know what it is
}

function group({ name, runtime, values }: Figure, top: number): { svg: string; end: number } {
  const title = `${runtime === "deno" ? "Deno" : "Bun"}: ${name}, messages/s`;
  const lines = [`<text class="title" x="0" y="${top}">${title}</text>`];
  const most = Math.max(...Object.values(values).map(({ median }) => median));
  let y = top + 10;
  for (const [implementation, { median }] of Object.entries(values)) {
    const length = Math.max(1, Math.round(median / most * (WIDTH - LEFT - 70)));
    lines.push(
      `<text x="0" y="${y + 11}">${implementation}</text>` +
        `<rect class="${implementation}" x="${LEFT}" y="${y}" width="${length}" height="${BAR}" rx="2"/>` +
        `<text x="${LEFT + length + 6}" y="${y + 11}">${short(median)}</text>`,
    );
    y += BAR + 4;
  }
  return { svg: lines.join("\n"), end: y };
}
