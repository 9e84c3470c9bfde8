/**
 * Child processes on each runtime. They run the real binary, never npm's
 * wrapper: killing a wrapper leaves the runtime behind it running.
 *
 * @module
 */
import { type ChildProcess, spawn as start } from "node:child_process";
import { existsSync, readdirSync } from "node:fs";
import { mkdir, mkdtemp, readFile, rm, symlink } from "node:fs/promises";
import { writeFile } from "node:fs/promises";
import * as nodeModule from "node:module";
import { tmpdir } from "node:os";
import { dirname, join, relative, resolve } from "node:path";
import process from "node:process";

/** "node" is the machine's own; those with a version come from npm, as optional dependencies. */
export const runtimes = [
  ...["deno", "bun", "node"] as const,
  ...["node-20", "node-22", "node-24", "node-26", "deno-2.9.5"] as const,
  ...["deno-2.0", "bun-1.3"] as const,
];

export type Runtime = typeof runtimes[number];

/** Every Node that is supported. */
export const nodes = ["node-20", "node-22", "node-24", "node-26"] as const satisfies Runtime[];

/** The oldest versions that are supported, and the last before today's. */
export const older = ["deno-2.0", "bun-1.3"] as const satisfies Runtime[];

/** The root of the repository. */
export const root: string = resolve(import.meta.dirname!, "..");

const modules = join(root, "node_modules");

/** The binary of a runtime, or undefined where it is not installed. */
export function binary(runtime: Runtime): string | undefined {
  switch (runtime) {
    case "deno":
      return inPackages("@deno", "deno") ?? onPath("deno");
    case "bun":
      return ["bun/bin/bun.exe", "bun/bin/bun"]
        .map((file) => join(modules, file)).find(existsSync) ?? onPath("bun");
    case "node":
      return onPath("node");
    case "deno-2.0":
    case "deno-2.9.5":
      return [join(modules, runtime, "deno")].find(existsSync);
    case "bun-1.3":
      return [join(modules, runtime, "bin", "bun")].find(existsSync);
    default:
      return [join(modules, runtime, "bin", "node")].find(existsSync);
  }
}

/** npm installs one package of `@deno/*`: the one that fits the machine. */
function inPackages(scope: string, file: string): string | undefined {
  const folder = join(modules, scope);
  if (!existsSync(folder)) return;
  return readdirSync(folder).map((name) => join(folder, name, file))
    .find(existsSync);
}

/** The full path of a command, or undefined. */
export function onPath(command: string): string | undefined {
  const extra = "/usr/sbin:/usr/local/sbin"; // nginx and haproxy live there
  const postgres = "/usr/lib/postgresql"; // a folder for each version, in Debian
  const versions = existsSync(postgres) ? readdirSync(postgres) : [];
  return `${process.env.PATH}:${extra}`.split(":")
    .filter((folder) => !folder.startsWith(modules)) // npm puts one of our Nodes there
    .concat(versions.map((version) => join(postgres, version, "bin")))
    .map((folder) => resolve(folder, command)).find(existsSync); // or where it says itself
}

export interface SpawnOptions {
  /** What the runtime is told before the script's name. Default for Deno: that all is allowed. */
  flags?: string[];
  args?: string[];
  env?: Record<string, string>;
  /** Runs a `.ts` file as it is on Node, too: version 24 can. */
  asItIs?: boolean;
}

/** A running child. Its output is a queue of lines, each taken once. */
export interface Child extends AsyncDisposable {
  readonly pid: number;
  /** The next line of its output; throws when it exits or takes too long. */
  line(options?: { timeout?: number }): Promise<string>;
  /** The next line, parsed as JSON. */
  json<T = unknown>(options?: { timeout?: number }): Promise<T>;
  /** The lines still to come; ends with the output. */
  lines(): AsyncGenerator<string>;
  /** Writes a line to its input. */
  send(line: string): void;
  kill(signal?: "SIGTERM" | "SIGKILL" | "SIGINT" | "SIGSTOP" | "SIGCONT"): void;
  /** What it wrote to stderr until now. */
  stderr(): string;
  readonly exited: Promise<{ code: number | null; signal: string | null }>;
}

/**
 * Runs a script on a runtime. `file` is relative to the root. Node 20 cannot
 * strip types, so on every Node a `.ts` file runs as a stripped copy.
 */
export async function spawn(
  runtime: Runtime,
  file: string,
  options: SpawnOptions = {},
): Promise<Child> {
  const command = binary(runtime);
  if (!command) throw new Error(`${runtime} is not installed`);
  await using stack = new AsyncDisposableStack();
  let script = resolve(root, file);
  if (runtime.startsWith("node") && script.endsWith(".ts") && !options.asItIs) {
    const stripped = stack.use(await strip(script));
    script = stripped.file;
  }
  const { flags = runtime.startsWith("deno") ? ["run", "-A", "--no-check"] : [] } = options;
  const child = start(command, [...flags, script, ...options.args ?? []], {
    cwd: root,
    env: { ...process.env, NO_COLOR: "1", ...options.env },
    stdio: ["pipe", "pipe", "pipe"],
  });
  return new RunningChild(`${runtime} ${file}`, child, stack.move());
}

class RunningChild implements Child {
  readonly pid: number;
  readonly exited: Child["exited"];
  #name: string;
  #child: ChildProcess;
  #owned: AsyncDisposableStack;
  #lines: string[] = [];
  #ended = false;
  #stderr = "";
  #wake = () => {};

  constructor(name: string, child: ChildProcess, owned: AsyncDisposableStack) {
    this.#name = name;
    this.#child = child;
    this.#owned = owned;
    this.pid = child.pid!;
    // "close" and not "exit": by then its output has been read to the end.
    this.exited = new Promise((resolve, reject) => {
      child.on("close", (code, signal) => resolve({ code, signal }));
      child.on("error", reject);
    });
    this.exited.catch(() => {});
    child.stdin!.on("error", () => {}); // It may exit before it has read.
    child.stderr!.setEncoding("utf8");
    child.stderr!.on("data", (text: string) => this.#stderr += text);
    this.#read();
  }

  async line({ timeout = 10_000 } = {}): Promise<string> {
    const late = performance.now() + timeout;
    while (this.#lines.length === 0) {
      const left = late - performance.now();
      if (this.#ended) throw this.#failure("ended its output");
      if (left <= 0) throw this.#failure(`wrote no line for ${timeout} ms`);
      await this.#woken(left);
    }
    return this.#lines.shift()!;
  }

  async json<T = unknown>(options?: { timeout?: number }): Promise<T> {
    const line = await this.line(options);
    try {
      return JSON.parse(line);
    } catch {
      throw this.#failure(`wrote a line that is not JSON: ${line}`);
    }
  }

  async *lines(): AsyncGenerator<string> {
    for (;;) {
      while (this.#lines.length > 0) yield this.#lines.shift()!;
      if (this.#ended) return;
      await this.#woken(60_000);
    }
  }

  send(line: string): void {
    this.#child.stdin!.write(line + "\n");
  }

  /** Deno's own sends no second signal. */
  kill(signal: Parameters<Child["kill"]>[0] = "SIGTERM"): void {
    if (this.#ended) return; // its number may be another's by now
    try {
      process.kill(this.pid, signal);
    } catch {
      // it has ended
    }
  }

  stderr(): string {
    return this.#stderr;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.kill("SIGKILL");
    await this.exited.catch(() => {});
    await this.#owned.disposeAsync();
  }

  #read(): void {
    let partial = "";
    const stdout = this.#child.stdout!;
    stdout.setEncoding("utf8");
    stdout.on("data", (text: string) => {
      const lines = (partial + text).split("\n");
      partial = lines.pop()!;
      this.#lines.push(...lines);
      this.#wake();
    });
    this.exited.catch(() => {}).then(() => {
      if (partial) this.#lines.push(partial);
      this.#ended = true;
      this.#wake();
    });
  }

  #woken(timeout: number): Promise<void> {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, timeout);
      this.#wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }

  #failure(what: string): Error {
    return new Error(`${this.#name} ${what}\n${this.#stderr.slice(-4000)}`);
  }
}

/** A stripped copy of a script; disposing it removes the copy. */
export interface Stripped extends AsyncDisposable {
  readonly file: string;
}

/**
 * Copies a `.ts` file and what it imports by relative paths into a temporary
 * folder, as `.mjs` without types. Packages resolve as in the repository.
 */
export async function strip(file: string): Promise<Stripped> {
  const folder = await mkdtemp(join(tmpdir(), "duplex-strip-"));
  await symlink(modules, join(folder, "node_modules"));
  const place = (source: string) => join(folder, relative(root, source).replace(/\.ts$/, ".mjs"));
  const queue = [resolve(root, file)];
  for (const source of queue) { // grows while it is walked
    const code = withoutTypes(await readFile(source, "utf8")).replace(
      /((?:\bfrom|\bimport)\s*\(?\s*")(\.[^"]+)\.ts"/g,
      (_, before, path) => {
        const found = resolve(dirname(source), path + ".ts");
        if (!queue.includes(found)) queue.push(found);
        return `${before}${path}.mjs"`;
      },
    );
    await mkdir(dirname(place(source)), { recursive: true });
    await writeFile(place(source), code);
  }
  return {
    file: place(queue[0]!),
    [Symbol.asyncDispose]: () => rm(folder, { recursive: true, force: true }),
  };
}

/** Removes types with what the runtime brings along; changes nothing else. */
export function withoutTypes(code: string): string {
  const { stripTypeScriptTypes } = nodeModule as {
    stripTypeScriptTypes?: (code: string) => string;
  };
  if (stripTypeScriptTypes) return stripTypeScriptTypes(code);
  const { Bun } = globalThis as unknown as {
    Bun: {
      Transpiler: new (options: { loader: string; target: string }) => {
        transformSync(code: string): string;
      };
    };
  };
  return new Bun.Transpiler({ loader: "ts", target: "node" })
    .transformSync(code);
}
