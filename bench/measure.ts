/**
 * What a scenario gives: figures (samples by implementation) and ratios with
 * their targets. Rounds are interleaved, so that all see the same machine.
 *
 * @module
 */
import type { Runtime } from "./rpc.ts";

/** How large and how often. */
export interface Scale {
  short: boolean;
  rounds: number;
  runtimes: Runtime[];
}

export interface Spread {
  median: number;
  min: number;
  max: number;
}

export interface Figure {
  name: string;
  runtime: string;
  unit: string;
  values: Record<string, Spread>;
}

export interface Ratio {
  /** Unique, with the runtime: how it is found again in results.json. */
  name: string;
  value: Spread;
  target?: number;
  /** Whether more is better. */
  atLeast: boolean;
}

export interface Outcome {
  figures: Figure[];
  ratios: Ratio[];
  notes?: string[];
}

export type Samples<Name extends string = string> = Record<Name, number[]>;

export type Scenario = (scale: Scale) => Promise<Outcome>;

/** Measures each in turn, round after round. */
export async function interleaved<Name extends string>(
  names: readonly Name[],
  rounds: number,
  measure: (name: Name) => Promise<number>,
): Promise<Samples<Name>> {
  const samples = Object.fromEntries(names.map((name) => [name, []])) as never as Samples<Name>;
  for (let round = 0; round < rounds; round++) {
    for (const name of names) samples[name].push(await measure(name));
  }
  return samples;
}

export function spread(samples: number[]): Spread {
  const sorted = samples.toSorted((a, b) => a - b);
  const middle = sorted.length >> 1;
  const median = sorted.length % 2 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
  return { median, min: sorted[0]!, max: sorted.at(-1)! };
}

export function figure(name: string, runtime: string, unit: string, samples: Samples): Figure {
  const values = Object.entries(samples).map(([name, values]) => [name, spread(values)]);
  return { name, runtime, unit, values: Object.fromEntries(values) };
}

/** One over the other, round by round: what slows the machine down slows both. */
export function ratio(
  name: string,
  over: number[],
  under: number[],
  target?: { atLeast: number } | { atMost: number },
): Ratio {
  const value = spread(over.map((sample, i) => sample / under[i]!));
  return bounded(name, value, target);
}

export function bounded(
  name: string,
  value: Spread,
  target?: { atLeast: number } | { atMost: number },
): Ratio {
  if (!target) return { name, value, atLeast: true };
  if ("atLeast" in target) return { name, value, target: target.atLeast, atLeast: true };
  return { name, value, target: target.atMost, atLeast: false };
}
