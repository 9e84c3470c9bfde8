/**
 * Sessions that do nothing: what they hold, and what keeping them alive costs.
 *
 * @module
 */
import type { Name } from "../implementations.ts";
import {
  bounded,
  figure,
  interleaved,
  type Outcome,
  ratio,
  type Scale,
  spread,
} from "../measure.ts";
import { Remote, type Runtime } from "../rpc.ts";

const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

/** Ours twice: by GET, which is what raw does, and with an open uplink besides. */
const KINDS = { native: "ws", raw: "sse", crossws: "sse", ours: "get", "ours, duplex": "duplex" };
const NAMES = Object.keys(KINDS) as (keyof typeof KINDS)[];

export async function memory({ short, rounds, runtimes }: Scale): Promise<Outcome> {
  const outcome: Outcome = { figures: [], ratios: [] };
  for (const runtime of runtimes) {
    for (const connections of short ? [300] : [1000, 10_000]) {
      const samples = await interleaved(
        short ? ["raw", "ours", "ours, duplex"] : NAMES,
        short ? 1 : connections === 1000 ? rounds : 1,
        (name) => held(runtime, name, connections),
      );
      const name = `memory of ${connections} idle sessions`;
      outcome.figures.push(figure(name, runtime, "MB", samples));
      const [alone, open] = runtime === "deno" ? [1.25, 1.5] : [1.6, 2];
      outcome.ratios.push(
        ratio(`${runtime}: ${name}, ours / raw`, samples.ours, samples.raw, { atMost: alone }),
        ratio(
          `${runtime}: ${name}, ours with open uplink / raw`,
          samples["ours, duplex"],
          samples.raw,
          { atMost: open },
        ),
      );
    }
  }
  return outcome;
}

/** MB more than before they were there, in a fresh process that has served some already. */
async function held(
  runtime: Runtime,
  name: keyof typeof KINDS,
  connections: number,
): Promise<number> {
  const implementation = name.split(",")[0] as Name;
  await using server = await Remote.start(runtime, "server.ts", implementation);
  await using load = await Remote.start("bun", "load.ts");
  const port = await server.call<number>("port");
  await load.call("open", { kind: KINDS[name], port, connections: 50 });
  await load.call("close");
  await pause(100);
  const before = await server.call<number>("memory");
  await load.call("open", { kind: KINDS[name], port, connections });
  await pause(200);
  return await server.call<number>("memory") - before;
}

const HEARTBEAT = 2000;

export async function tenThousand({ short, runtimes }: Scale): Promise<Outcome> {
  const outcome: Outcome = { figures: [], ratios: [] };
  const connections = short ? 1000 : 10_000;
  for (const runtime of runtimes) {
    await using stack = new AsyncDisposableStack();
    const server = stack.use(
      await Remote.start(runtime, "server.ts", "ours", `${HEARTBEAT}`),
    );
    const port = await server.call<number>("port");
    const loads: Remote[] = [];
    for (let i = 0; i < 4; i++) loads.push(stack.use(await Remote.start("bun", "load.ts")));
    const share = { kind: "get", port, connections: connections / loads.length };
    await Promise.all(loads.map((load) => load.call("open", share)));
    const open = await server.call<number>("count");
    const rounds = await heartbeats(server, loads, connections, short ? 1 : 5);
    const name = `a heartbeat of ${connections} sessions`;
    outcome.figures.push(figure(name, runtime, "CPU ms", { ours: rounds }));
    const value = open / connections;
    outcome.ratios.push(
      bounded(`${runtime}: ${connections} sessions at once, open`, spread([value]), { atLeast: 1 }),
    );
  }
  return outcome;
}

/** Processor time that a round of heartbeats costs; those that came are counted. */
async function heartbeats(
  server: Remote,
  loads: Remote[],
  connections: number,
  rounds: number,
): Promise<number[]> {
  const written = async () => {
    const bytes = await Promise.all(loads.map((load) => load.call<number>("bytes")));
    return bytes.reduce((sum, bytes) => sum + bytes, 0) / "3\r\n:\n\n\r\n".length;
  };
  const costs: number[] = [];
  for (let round = 0; round < rounds; round++) {
    const before = [await server.call<number>("cpu"), await written()] as const;
    await pause(HEARTBEAT);
    const spent = await server.call<number>("cpu") - before[0];
    costs.push(spent * connections / (await written() - before[1]));
  }
  return costs;
}
