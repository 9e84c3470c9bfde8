/**
 * What becomes of a promise, or of a stream.
 *
 * @module
 */
import { sleep, within } from "./harness.ts";

/** What a promise rejects with. */
export async function failureOf(promise: Promise<unknown>): Promise<unknown> {
  try {
    await within(promise, 9_000, "a rejection");
  } catch (error) {
    return error;
  }
  throw new Error("It has not rejected");
}

export async function isPending(promise: Promise<unknown>): Promise<boolean> {
  const pending = Symbol();
  const settled = promise.catch(() => {});
  return await Promise.race([settled, sleep(100).then(() => pending)]) === pending;
}

/** Reads to the end: what came, and the error there, if there is one. */
export async function readAll<T>(
  reader: ReadableStreamDefaultReader<T>,
): Promise<{ all: T[]; error: unknown }> {
  const all: T[] = [];
  try {
    for (;;) {
      const { done, value } = await within(reader.read(), 5_000, "a read");
      if (done) return { all, error: undefined };
      all.push(value);
    }
  } catch (error) {
    return { all, error };
  }
}
