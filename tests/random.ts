/**
 * Chance that can be repeated. It needs nothing else: what other runtimes run imports it, too.
 *
 * @module
 */

/** The well-known small generator: same seed, same numbers from 0 to 1. */
export function mulberry32(seed: number): () => number {
  let state = seed | 0;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}
