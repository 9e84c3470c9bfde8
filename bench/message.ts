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
