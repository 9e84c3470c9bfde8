/**
 * Commands between the bench and its child processes: a JSON line in, a JSON
 * line out, one at a time for each child.
 *
 * @module
 */
import process from "node:process";
import { createInterface } from "node:readline";
import { type Child, type Runtime, spawn } from "../tests/spawn.ts";

export type { Runtime };

// deno-lint-ignore no-explicit-any
type Commands = Record<string, (input: any) => unknown>;

/** The child's side: answers commands until its input ends. */
export function answer(commands: Commands): void {
  const lines = createInterface({ input: process.stdin });
  lines.on("line", async (line) => {
    const { command, ...input } = JSON.parse(line);
    try {
      console.log(JSON.stringify({ result: await commands[command]!(input) ?? null }));
    } catch (error) {
      console.log(JSON.stringify({ error: `${command}: ${(error as Error).stack ?? error}` }));
    }
  });
  lines.on("close", () => process.exit());
}

/** The bench's side of a child. */
export class Remote implements AsyncDisposable {
  readonly child: Child;
  readonly name: string;

  constructor(child: Child, name: string) {
    this.child = child;
    this.name = name;
  }

  /** Starts a script of this folder, with its garbage collector within reach. */
  static start(runtime: Runtime, script: string, ...args: string[]): Promise<Remote> {
    return this.startIn({}, runtime, script, ...args);
  }

  static async startIn(
    environment: Record<string, string>,
    runtime: Runtime,
    script: string,
    ...args: string[]
  ): Promise<Remote> {
    const env = { DENO_V8_FLAGS: "--expose-gc", ...environment };
    return new Remote(
      await spawn(runtime, `bench/${script}`, { args, env }),
      [runtime, script, ...args].join(" "),
    );
  }

  async call<T = void>(command: string, input: object = {}, timeout = 120_000): Promise<T> {
    this.child.send(JSON.stringify({ command, ...input }));
    const { result, error } = await this.child.json<{ result: T; error?: string }>({ timeout });
    if (error) throw new Error(`${this.name}: ${error}\n${this.child.stderr().slice(-2000)}`);
    return result;
  }

  [Symbol.asyncDispose](): PromiseLike<void> {
    return this.child[Symbol.asyncDispose]();
  }
}
