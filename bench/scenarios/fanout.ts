/**
 * Fan-out: one publish, many subscribers. In bursts, and one at a time: each in a task
 * of its own, so that only a server that holds messages back can let them share chunks.
 *
 * @module
 */
import type { Name } from "../implementations.ts";
import { figure, interleaved, type Outcome, ratio, type Scale } from "../measure.ts";
import { Remote, type Runtime } from "../rpc.ts";

const NAMES = ["native", "raw", "crossws", "ours"] as const;
const KINDS = { native: "ws", raw: "sse", crossws: "sse", ours: "duplex" } as const;

interface Shape {
  subscribers: number;
  bursts: number;
  burst: number;
}

export async function fanOutBursts({ short, rounds, runtimes }: Scale): Promise<Outcome> {
  const outcome: Outcome = { figures: [], ratios: [] };
  for (const runtime of runtimes) {
    const bursts = short ? 150 : 300; // the server finds overload within some 50 ms
    const samples = await measure(runtime, { subscribers: 100, bursts, burst: 20 }, rounds);
    const name = "fan-out to 100, bursts of 20";
    outcome.figures.push(figure(name, runtime, "messages/s", samples));
    outcome.ratios.push(
      ratio(`${runtime}: ${name}, ours / native`, samples.ours, samples.native, {
        atLeast: runtime === "deno" ? 4 : 1,
      }),
      ratio(`${runtime}: ${name}, ours / crossws`, samples.ours, samples.crossws, { atLeast: 5 }),
    );
  }
  return outcome;
}

export async function fanOutSingly({ short, rounds, runtimes }: Scale): Promise<Outcome> {
  const outcome: Outcome = { figures: [], ratios: [] };
  for (const runtime of runtimes) {
    const subscribers = short ? 200 : 1000;
    const samples = await measure(runtime, { subscribers, bursts: 100, burst: 1 }, rounds);
    const name = `fan-out to ${subscribers}, one at a time`;
    outcome.figures.push(figure(name, runtime, "messages/s", samples));
    outcome.ratios.push(
      ratio(`${runtime}: ${name}, ours / native`, samples.ours, samples.native, {
        atLeast: runtime === "deno" ? 0.9 : 1.5,
      }),
      ratio(`${runtime}: ${name}, ours / raw`, samples.ours, samples.raw, { atLeast: 1 }),
    );
  }
  return outcome;
}

/** Messages delivered per second, from the first publish to the last delivery. */
async function measure(runtime: Runtime, shape: Shape, rounds: number) {
  await using stack = new AsyncDisposableStack();
  const pairs = {} as Record<Name, { server: Remote; load: Remote }>;
  for (const name of NAMES) {
    const server = stack.use(await Remote.start(runtime, "server.ts", name));
    const load = stack.use(await Remote.start("bun", "load.ts", `for ${runtime} ${name}`));
    const port = await server.call<number>("port");
    await load.call("open", { kind: KINDS[name], port, connections: shape.subscribers });
    // A client is connected a little before its server subscribes it.
    while (await server.call<number>("count") < shape.subscribers) await pause(10);
    pairs[name] = { server, load };
    await fanOut(server, load, { ...shape, bursts: Math.ceil(shape.bursts / 3) }); // warming up
  }
  return await interleaved(NAMES, rounds, (name) => {
    const { server, load } = pairs[name];
    return fanOut(server, load, shape);
  });
}

async function fanOut(
  server: Remote,
  load: Remote,
  { subscribers, bursts, burst }: Shape,
): Promise<number> {
  const messages = subscribers * bursts * burst;
  await load.call("expect", { messages });
  const started = await server.call<number>("fanOut", { bursts, burst });
  return messages / (await load.call<number>("arrived") - started) * 1000;
}

const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));
