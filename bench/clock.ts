/**
 * A clock that two processes have in common, finer than `Date.now`.
 *
 * @module
 */

/** Returns the time of day in ms, to a microsecond: as `performance` goes on from an edge of `Date.now`. */
export function wallClock(): () => number {
  let offset = -Infinity;
  // It is rounded down, so what is largest is nearest.
  for (const until = performance.now() + 4; performance.now() < until;) {
    offset = Math.max(offset, Date.now() - performance.now());
  }
  return () => offset + performance.now();
}
