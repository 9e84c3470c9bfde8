/**
 * Timers that a test has set and that still wait at its end. Deno takes each for a leak at that
 * moment, though some soon end by themselves, such as the pause before a farewell goes again.
 *
 * @module
 */

type Timer = ReturnType<typeof setTimeout>;

const { setTimeout: setOwn, clearTimeout: clearOwn } = globalThis;
/** And where each was set. */
const waiting = new Map<Timer, Error>();

/** Takes note of timers from now on. */
export function watchTimers(): void {
  const set = (task: (...args: unknown[]) => void, ms?: number, ...args: unknown[]): Timer => {
    const timer: Timer = setOwn(() => {
      waiting.delete(timer);
      task(...args);
    }, ms);
    waiting.set(timer, new Error());
    return timer;
  };
  const clear = (timer?: Timer): void => {
    if (timer !== undefined) waiting.delete(timer);
    clearOwn(timer);
  };
  Object.assign(globalThis, {
    setTimeout: Object.assign(set, setOwn),
    clearTimeout: Object.assign(clear, clearOwn),
  });
}

/** Those of the tests before are no concern of the next. */
export function forgetTimers(): void {
  waiting.clear();
}

/** Waits until none is left, so long at most, in ms; then says where those were set that are. */
export async function untilNoTimers(patience: number): Promise<string[]> {
  const until = performance.now() + patience;
  while (waiting.size > 0 && performance.now() < until) {
    await new Promise((resolve) => setOwn(resolve, 5));
  }
  return [...waiting.values()].map(({ stack = "" }) => stack.split("\n").slice(2, 6).join("\n"));
}
