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

/** Three digits of it. */
export function short(value: number): string {
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

// --- The plot ---

const PANEL = { left: 44, width: 290, height: 180, top: 34 };
const SATURATION = /^fan-out to 1000 at (\d+) % of native's capacity, p50$/;

interface Point {
  share: number;
  native: number;
  ours: number;
}

/** Latency over the offered rate, native and ours: a panel for each runtime. */
export function plot(outcomes: Record<string, Outcome>): string {
  const panels = ["deno", "bun"].map((runtime) => pointsOf(outcomes, runtime));
  const most = Math.max(...panels.flat().flatMap(({ native, ours }) => [native, ours]));
  const decades = [1, 10, 100, 1000, 10_000].filter((ms) => ms <= 10 * most);
  const parts = panels.map((points, i) => panel(points, i, decades));
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} 270" role="img">
<title>Median latency of a publication to 1,000 subscribers, over the rate offered</title>
<style>${STYLE}
  .native, .ours { stroke-width: 2 } polyline { fill: none !important } line { stroke: #8c959f55 }
  polyline.native { stroke: #8c959f } polyline.ours { stroke: #0969da }
</style>
${parts.join("\n")}
<text x="${PANEL.left}" y="264">rate, in % of what native sockets carry; latency in ms, its median</text>
</svg>`;
}

function pointsOf(outcomes: Record<string, Outcome>, runtime: string): Point[] {
  const { figures } = outcomes["saturation"] ?? { figures: [] };
  return figures.filter((figure) => figure.runtime === runtime).flatMap(({ name, values }) => {
    const share = Number(SATURATION.exec(name)?.[1]);
    if (!share) return [];
    return [{ share, native: values["native"]!.median, ours: values["ours"]!.median }];
  });
}

function panel(points: Point[], index: number, decades: number[]): string {
  const { width, height, top } = PANEL;
  const left = PANEL.left + index * (width + PANEL.left + 10);
  const x = (share: number) => Math.round(left + share / 150 * width);
  const [low, high] = [Math.log10(decades[0]!), Math.log10(decades.at(-1)!)];
  const y = (ms: number) => {
    const part = (Math.log10(Math.max(ms, decades[0]!)) - low) / (high - low);
    return Math.round(top + height * (1 - part));
  };
  const grid = decades.map((ms) =>
    `<line x1="${left}" x2="${left + width}" y1="${y(ms)}" y2="${y(ms)}"/>` +
    `<text x="${left - 6}" y="${y(ms) + 4}" text-anchor="end">${ms}</text>`
  );
  const ticks = points.map(({ share }) =>
    `<text x="${x(share)}" y="${top + height + 18}" text-anchor="middle">${share}</text>`
  );
  const lines = (["native", "ours"] as const).map((name) => {
    const last = points.at(-1)!;
    const line = points.map((point) => `${x(point.share)},${y(point[name])}`).join(" ");
    return `<polyline class="${name}" points="${line}"/>` +
      `<text class="${name}" x="${x(last.share)}" y="${
        y(last[name]) - 6
      }" text-anchor="end">${name}</text>`;
  });
  const title = `<text class="title" x="${left}" y="16">${index ? "Bun" : "Deno"}</text>`;
  return [title, ...grid, ...ticks, ...lines].join("\n");
}
