/**
 * Seeded chance. Whatever is drawn for one thing comes of dice of its own, so that to
 * take another thing out of a scenario changes nothing of this one.
 *
 * @module
 */

import { mulberry32 } from "../random.ts";

/** Draws the same numbers each time for the same seed. */
export class Dice {
  /** From 0 to 1. */
  readonly next: () => number;

  constructor(seed: number) {
    this.next = mulberry32(seed);
  }

  chance(probability: number): boolean {
    return this.next() < probability;
  }

  /** A whole number, both ends among them. */
  int(least: number, most: number): number {
    return least + Math.floor(this.next() * (most - least + 1));
  }

  between(least: number, most: number): number {
    return least + this.next() * (most - least);
  }

  /** A whole number from 1; each order of magnitude is as likely as any other. */
  size(most: number): number {
    return Math.floor(Math.exp(this.next() * Math.log(most + 1)));
  }

  pick<T>(list: readonly T[]): T {
    return list[Math.floor(this.next() * list.length)]!;
  }

  /** As `pick`, each with its weight. */
  weighted<T extends string>(weights: Readonly<Partial<Record<T, number>>>): T {
    const entries = Object.entries(weights) as [T, number][];
    let left = this.next() * entries.reduce((sum, [, weight]) => sum + weight, 0);
    for (const [name, weight] of entries) if ((left -= weight) < 0) return name;
    return entries.at(-1)![0];
  }
}

/** Dice for one thing, that is named by numbers. */
export function diceFor(...names: number[]): Dice {
  let hash = 0x9e3779b9;
  for (const name of names) {
    hash = Math.imul(hash ^ (name | 0), 0x85ebca6b);
    hash ^= hash >>> 13;
    hash = Math.imul(hash, 0xc2b2ae35) ^ (hash >>> 16);
  }
  return new Dice(hash);
}
