/**
 * The tables of docs/ai.md, from what bench/ai.ts has measured.
 *
 * @module
 */
import type { Kind } from "../tests/contenders.ts";
import type { Overhead, Result, Speed } from "../tests/interruptions.ts";
import { table } from "./markdown.ts";

/** A kind of contender, and perhaps how it was set up: "ours, gather: 50". */
export type Wire = string;

/** What ai.json is. */
export interface AiResults {
  machine: string;
  speed: Speed;
  /** By the interruption's name: of each round. */
  interruptions: Record<string, Partial<Record<Kind, Result[]>>>;
  overhead: Record<Wire, Overhead>;
}

const NAMES: Record<Kind, string> = {
  http: "HTTP",
  resumable: "HTTP, resumable",
  websocket: "WebSocket",
  ours: "duplex-sse",
};

/** For each interruption and wire the worst of the rounds, and the median time to the next token. */
export function interruptionTable({ interruptions }: AiResults): string {
  const lines = Object.entries(interruptions).flatMap(([name, byKind]) =>
    Object.entries(byKind).map(([kind, rounds]) => {
      const worst = (key: "lost" | "repeated" | "orphaned" | "begun" | "failures") =>
        `${Math.max(...rounds.map((round) => round[key]))}`;
      const next = rounds.some(({ never }) => never > 0)
        ? "never"
        : time(median(rounds.flatMap(({ gaps }) => gaps)));
      return [
        name,
        NAMES[kind as Kind],
        ...[worst("lost"), worst("repeated"), worst("orphaned"), worst("begun")],
        ...[worst("failures"), next],
      ];
    })
  );
  return table(
    ["interruption", "wire", "lost", "repeated", "orphaned", "begun", "failures", "next token"],
    lines,
  );
}

/** Bytes of a token and times to the first one, and how they compare with those of HTTP. */
export function overheadTable({ overhead }: AiResults): string {
  const { http } = overhead;
  const lines = Object.entries(overhead).map(([wire, values]) => {
    const [kind, setting] = wire.split(", ") as [Kind, string?];
    const compared = (value: number, text: string, other: number | undefined) =>
      other === undefined ? text : `${text}, ${(value / other).toFixed(2)}x`;
    const first = (key: keyof Overhead["first"]) =>
      compared(values.first[key], time(values.first[key]), http?.first[key]);
    return [
      setting ? `${NAMES[kind]}, \`${setting}\`` : NAMES[kind],
      values.frame.toFixed(0),
      compared(values.down, values.down.toFixed(0), http?.down),
      first("open"),
      first("resumed"),
      first("cold"),
    ];
  });
  return table(
    [
      "wire",
      "JSON/token",
      "bytes/token",
      "first token",
      "of a new page, `resume`",
      "of a new page",
    ],
    lines,
  );
}

function median(values: number[]): number | undefined {
  return values.toSorted((a, b) => a - b)[values.length >> 1];
}

function time(ms: number | undefined): string {
  return ms === undefined ? "–" : `${Math.round(ms)} ms`;
}
