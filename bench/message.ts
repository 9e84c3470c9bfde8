/**
 * The messages of the bench: 64 bytes that end with a marker found nowhere else
 * on any of the wires, so that the load can count without parsing.
 *
 * @module
 */

export const SIZE = 64;
export const MARKER = "^".charCodeAt(0);
/** Uplink messages in a burst, and between two answers. */
export const BATCH = 500;

const texts = Array.from({ length: 64 }, (_, i) => `${i} `.padEnd(SIZE - 1, "message ") + "^");

/** One of them; they differ, as messages do. */
export function text(i: number): string {
  return texts[i % texts.length]!;
}

/** One that tells a time in ms. */
export function stamped(time: number): string {
  return `${time.toFixed(3)} `.padEnd(SIZE - 1, "message ") + "^";
}

/** The time that a message tells whose marker stands there. */
export function stampOf(data: Uint8Array, end: number): number {
  let whole = 0;
  let i = end - SIZE + 1;
  for (; data[i] !== DOT; i++) whole = whole * 10 + data[i]! - ZERO;
  const [a, b, c] = [data[i + 1]!, data[i + 2]!, data[i + 3]!];
  return whole + ((a - ZERO) * 100 + (b - ZERO) * 10 + c - ZERO) / 1000;
}

const DOT = ".".charCodeAt(0);
const ZERO = "0".charCodeAt(0);
