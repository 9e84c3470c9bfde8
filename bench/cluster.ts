/**
 * What an instance is given by the backplane, as instances are added: `npm run bench:cluster`.
 *
 *     deno run -A bench/cluster.ts [--counts 3,10,30] [--only redis|nats|pgsql|crossws] [--movable]
 *
 * Each instance is a process; servers are started as Debian's packages install them. Prints a table
 * of messages and bytes an instance: for each request that it routes, each publication to a room
 * that is on three instances, and each second in which nothing happens. With `--movable` sessions can
 * move from one instance to another.
 *
 * @module
 */
import { type ChildProcess, spawn } from "node:child_process";
import process from "node:process";
import { createInterface } from "node:readline";
import { parseArgs } from "node:util";
import { NatsServer, PostgresServer, RedisServer } from "../tests/bus.ts";
import { TestContext } from "../tests/harness.ts";
import type { Given, Order, Ready } from "./cluster-instance.ts";

const WARMING = 5;
const ROUTED = 20;
const PUBLISHED = 20;
const QUIET = 10_000;

const { values: options } = parseArgs({
  options: {
    counts: { type: "string", default: "3,10,30" },
    only: { type: "string" },
    movable: { type: "boolean", default: false },
  },
});

/** One process. */
class Instance {
  readonly #child: ChildProcess;
  readonly #answers: AsyncIterator<string>;
  ready!: Ready;

  constructor(driver: string, port: number) {
    this.#child = spawn(
      process.execPath,
      ["run", "-A", "--no-check", new URL("./cluster-instance.ts", import.meta.url).pathname],
      {
        env: {
          ...process.env,
          ...{ DRIVER: driver, BACKPLANE: `${port}`, MOVABLE: options.movable ? "1" : "" },
        },
        stdio: ["pipe", "pipe", "inherit"],
      },
    );
    this.#answers = createInterface({ input: this.#child.stdout! })[Symbol.asyncIterator]();
  }

  async start(): Promise<void> {
    this.ready = await this.#next();
  }

  async #next<T>(): Promise<T> {
    const { value, done } = await this.#answers.next();
    if (done) throw new Error("An instance has ended");
    return JSON.parse(value);
  }

  /** What it has been given since the last order, once it has done this one. */
  async do(order: Order): Promise<Given> {
    this.#child.stdin!.write(`${JSON.stringify(order)}\n`);
    return await this.#next();
  }

  kill(): void {
    this.#child.kill("SIGKILL");
  }
}

async function measure(driver: string, port: number, count: number): Promise<string> {
  const instances = Array.from({ length: count }, () => new Instance(driver, port));
  try {
    for (const instance of instances) await instance.start();
    const all = async (order: (at: number) => Order) => {
      const given = await Promise.all(instances.map((one, at) => one.do(order(at))));
      return (by: number) => {
        const sum = (key: keyof Given) =>
          given.reduce((sum, one) => sum + one[key], 0) / count / by;
        return `${sum("messages").toFixed(2)} | ${sum("bytes").toFixed(0)}`;
      };
    };
    await all((at) => ({ kind: "join", joins: at < 3 }));
    await all(() => ({ kind: "wait", ms: 1_000 }));
    await all(() => ({ kind: "wait", ms: 0 })); // what came with the beginning
    const next = (at: number) => instances[(at + 1) % count]!.ready.token;
    const route = (times: number) => all((at) => ({ kind: "route", token: next(at), times }));
    await route(WARMING); // where many processes compile at once, all are asked for what comes late
    // Each instance routes as many, so it also answers as many.
    const routed = await route(ROUTED);
    await all(() => ({ kind: "wait", ms: 500 }));
    const published = await all((at) => ({
      kind: "publish",
      times: at === 3 % count ? PUBLISHED : 0,
    }));
    const idle = await all(() => ({ kind: "wait", ms: QUIET }));
    const cells = [driver, count, routed(ROUTED), published(PUBLISHED), idle(QUIET / 1000)];
    return `| ${cells.join(" | ")} |`;
  } finally {
    for (const instance of instances) instance.kill();
  }
}

const t = new TestContext("bench:cluster");
const servers: Record<string, () => Promise<{ port: number }>> = {
  crossws: () => RedisServer.start(t),
  redis: () => RedisServer.start(t),
  nats: () => NatsServer.start(t),
  pgsql: () => PostgresServer.start(t),
};
try {
  console.log(
    "| driver | instances | routed: messages | bytes | published | bytes | idle/s | bytes |",
  );
  console.log("| --- | --- | --- | --- | --- | --- | --- | --- |");
  for (const [driver, start] of Object.entries(servers)) {
    if (options.only && options.only !== driver) continue;
    const { port } = await start();
    for (const count of options.counts.split(",").map(Number)) {
      console.log(await measure(driver, port, count));
    }
  }
} finally {
  await t.end();
}
