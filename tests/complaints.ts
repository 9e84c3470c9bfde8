/**
 * What a runtime, a child or a page complains of, and nobody expected: an error that nothing
 * handled, a warning, a line on stderr. The test during which it comes fails by it.
 *
 * @module
 */
import process from "node:process";
import { format, inspect } from "node:util";

/** A complaint that a test may get: one that contains this, or matches it. */
export type Expected = string | RegExp;

/** Complaints, until the test that got them ends. */
export class Complaints {
  readonly #expected: Expected[] = [];
  readonly #all: string[] = [];

  expect(...expected: Expected[]): void {
    this.#expected.push(...expected);
  }

  /** Expected ones may come before they are named, as long as the test has not ended. */
  add(...complaints: string[]): void {
    this.#all.push(...complaints);
  }

  /** Those that were not expected; each is told once. */
  take(): string[] {
    return this.#all.splice(0).filter((complaint) =>
      !this.#expected.some((expected) =>
        typeof expected === "string" ? complaint.includes(expected) : expected.test(complaint)
      )
    );
  }
}

/** Who gets what this process complains of: the innermost test that runs. */
const running: Complaints[] = [];

/** What came while no test ran: the next one gets it, or the file, when it ends. */
export const between: Complaints = new Complaints();

/** Has this process complain to these, until it is called. */
export function hear(complaints: Complaints): () => void {
  install();
  complaints.add(...between.take().map((text) => `after an earlier test: ${text}`));
  running.push(complaints);
  return () => void running.splice(running.lastIndexOf(complaints), 1);
}

function complain(text: string): void {
  (running.at(-1) ?? between).add(text);
}

/**
 * The lines of a stderr, without those that belong to the one before (stacks, frames, excerpts
 * of code), and without Deno's progress.
 */
export function lines(stderr: string): string[] {
  return stderr.split("\n").filter((line) => /^[^\s}\])]/.test(line))
    .filter((line) => !/^(Download|Check) /.test(line));
}

let installed = false;

/** Not while loading: a child that imports a helper is to fail by itself. */
function install(): void {
  if (installed) return;
  installed = true;
  // Bun's test runner itself fails the test, or the run, by an error that nobody handles.
  if ("Deno" in globalThis) {
    globalThis.addEventListener("unhandledrejection", (event) => {
      event.preventDefault();
      complain(`unhandled rejection: ${inspect((event as PromiseRejectionEvent).reason)}`);
    });
    globalThis.addEventListener("error", (event) => {
      event.preventDefault();
      complain(`uncaught error: ${inspect((event as ErrorEvent).error)}`);
    });
  }
  process.on("warning", (warning: Error) => complain(`warning: ${inspect(warning)}`));
  for (const name of ["warn", "error"] as const) {
    const print = console[name];
    console[name] = (...args: unknown[]) => {
      complain(`console.${name}: ${format(...args)}`);
      print(...args);
    };
  }
}
