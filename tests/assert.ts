/**
 * Assertions through one seam: `@std/assert` where JSR can be reached (Deno
 * with a network), else the same names built on `node:assert/strict`. The
 * specifier is in a variable, so that type checkers do not look for it.
 *
 * @module
 */
import strict from "node:assert/strict";
import { inspect, isDeepStrictEqual } from "node:util";

// deno-lint-ignore no-explicit-any
type ErrorClass<E extends Error = Error> = new (...args: any[]) => E;

/** The part of `@std/assert` that the tests use. */
interface Assertions {
  AssertionError: ErrorClass;
  assert(value: unknown, message?: string): asserts value;
  assertEquals<T>(actual: T, expected: T, message?: string): void;
  assertNotEquals<T>(actual: T, expected: T, message?: string): void;
  assertStrictEquals<T>(
    actual: unknown,
    expected: T,
    message?: string,
  ): asserts actual is T;
  assertExists<T>(
    actual: T,
    message?: string,
  ): asserts actual is NonNullable<T>;
  assertInstanceOf<T>(
    actual: unknown,
    // deno-lint-ignore no-explicit-any
    type: abstract new (...args: any[]) => T,
    message?: string,
  ): asserts actual is T;
  assertMatch(actual: string, expected: RegExp, message?: string): void;
  assertStringIncludes(
    actual: string,
    expected: string,
    message?: string,
  ): void;
  assertGreater<T>(actual: T, expected: T, message?: string): void;
  assertGreaterOrEqual<T>(actual: T, expected: T, message?: string): void;
  assertLess<T>(actual: T, expected: T, message?: string): void;
  assertLessOrEqual<T>(actual: T, expected: T, message?: string): void;
  assertThrows<E extends Error = Error>(
    body: () => unknown,
    type?: ErrorClass<E>,
    includes?: string,
    message?: string,
  ): E;
  assertRejects<E extends Error = Error>(
    body: () => PromiseLike<unknown>,
    type?: ErrorClass<E>,
    includes?: string,
    message?: string,
  ): Promise<E>;
  fail(message?: string): never;
}

/** What stands in for `@std/assert` where JSR is out of reach. */
export const fallback: Assertions = {
  AssertionError: strict.AssertionError,
  assert: (value, message = "") => ok(value, message || "assertion failed"),
  assertEquals(actual, expected, message) {
    try {
      strict.deepStrictEqual(actual, expected);
    } catch (error) {
      if (message) (error as Error).message += `\n${message}`;
      throw error;
    }
  },
  assertNotEquals: (actual, expected, message) =>
    ok(!isDeepStrictEqual(actual, expected), told("values differ", message)),
  assertStrictEquals: (actual, expected, message) =>
    ok(
      Object.is(actual, expected),
      told(`${inspect(expected)} itself, not ${inspect(actual)}`, message),
    ),
  assertExists: (actual, message) => ok(actual != null, told(`a value, not ${actual}`, message)),
  assertInstanceOf: (actual, type, message) =>
    ok(
      actual instanceof type,
      told(`an instance of ${type.name}, not ${actual}`, message),
    ),
  assertMatch: (actual, expected, message) =>
    ok(
      expected.test(actual),
      told(`"${actual}" to match ${expected}`, message),
    ),
  assertStringIncludes: (actual, expected, message) =>
    ok(
      actual.includes(expected),
      told(`"${actual}" to contain "${expected}"`, message),
    ),
  assertGreater: (a, b, message) => ok(a > b, told(`${a} > ${b}`, message)),
  assertGreaterOrEqual: (a, b, message) => ok(a >= b, told(`${a} >= ${b}`, message)),
  assertLess: (a, b, message) => ok(a < b, told(`${a} < ${b}`, message)),
  assertLessOrEqual: (a, b, message) => ok(a <= b, told(`${a} <= ${b}`, message)),
  assertThrows(body, type, includes, message) {
    try {
      body();
    } catch (error) {
      return expected(error, type, includes, message);
    }
    return fallback.fail(told("the function to throw", message));
  },
  async assertRejects(body, type, includes, message) {
    let pending;
    try {
      pending = body();
      // As in `@std/assert`: a function that throws at once did not reject.
    } catch (error) {
      fallback.fail(told(`a rejection, but it threw: ${error}`, message));
    }
    try {
      await pending;
    } catch (error) {
      return expected(error, type, includes, message);
    }
    return fallback.fail(told("the promise to reject", message));
  },
  fail: (message = "failed") => strict.fail(message),
};

function ok(value: unknown, message: string): asserts value {
  if (!value) strict.fail(message);
}

function told(expectation: string, message?: string): string {
  return `expected ${expectation}${message ? `: ${message}` : ""}`;
}

/** Holds a thrown error against its class and a part of its message. */
function expected<E extends Error>(
  error: unknown,
  type: ErrorClass<E> | undefined,
  includes = "",
  message?: string,
): E {
  if (type) fallback.assertInstanceOf(error, type, message);
  if (includes) {
    fallback.assertStringIncludes(String((error as E).message), includes);
  }
  return error as E;
}

const specifier = "@std/assert";
const chosen: Assertions = await import(specifier).catch(() => fallback);

/** Whether packages of JSR can be loaded here. */
export const jsr: boolean = chosen !== fallback;

// Written out with their types: an assertion narrows only through a name that
// is declared with its type.
export const assert: Assertions["assert"] = chosen.assert;
export const assertEquals: Assertions["assertEquals"] = chosen.assertEquals;
export const assertNotEquals: Assertions["assertNotEquals"] = chosen.assertNotEquals;
export const assertStrictEquals: Assertions["assertStrictEquals"] = chosen.assertStrictEquals;
export const assertExists: Assertions["assertExists"] = chosen.assertExists;
export const assertInstanceOf: Assertions["assertInstanceOf"] = chosen.assertInstanceOf;
export const assertMatch: Assertions["assertMatch"] = chosen.assertMatch;
export const assertStringIncludes: Assertions["assertStringIncludes"] = chosen.assertStringIncludes;
export const assertGreater: Assertions["assertGreater"] = chosen.assertGreater;
export const assertGreaterOrEqual: Assertions["assertGreaterOrEqual"] = chosen.assertGreaterOrEqual;
export const assertLess: Assertions["assertLess"] = chosen.assertLess;
export const assertLessOrEqual: Assertions["assertLessOrEqual"] = chosen.assertLessOrEqual;
export const assertThrows: Assertions["assertThrows"] = chosen.assertThrows;
export const assertRejects: Assertions["assertRejects"] = chosen.assertRejects;
export const AssertionError: Assertions["AssertionError"] = chosen.AssertionError;
export const fail: Assertions["fail"] = chosen.fail;
