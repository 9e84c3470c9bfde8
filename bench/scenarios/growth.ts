/**
 * How cost grows with the number of subscribers, of topics, and of peers that
 * have nothing to do with a message.
 *
 * @module
 */
import type { Name } from "../implementations.ts";
import {
  bounded,
  figure,
  interleaved,
  type Outcome,
  type Samples,
  type Scale,
  spread,
} from "../measure.ts";
import { Remote, type Runtime } from "../rpc.ts";

interface Shape {
  subscribers: number;
  topics: number;
}

export async function subscribers(scale: Scale): Promise<Outcome> {
  const counts = scale.short ? [10, 100, 1000] : [10, 100, 1000, 5000];
  return await growth(
    scale,
    "by subscribers",
    Object.fromEntries(counts.map((count) => [count, { subscribers: count, topics: 1 }])),
  );
}

export async function topics(scale: Scale): Promise<Outcome> {
  const counts = scale.short ? [1, 1000] : [1, 100, 10_000];
  return await growth(
    scale,
    "by topics of 20 subscribers",
    Object.fromEntries(counts.map((count) => [count, { subscribers: 20, topics: count }])),
  );
}

async function growth(
  { short, rounds, runtimes }: Scale,
  name: string,
  shapes: Record<string, Shape>,
): Promise<Outcome> {
  const outcome: Outcome = { figures: [], ratios: [] };
  for (const runtime of runtimes) {
    for (const implementation of short ? ["ours"] as const : ["raw", "ours"] as const) {
      const samples: Samples = {};
      for (const [count, shape] of Object.entries(shapes)) {
        samples[count] = await costs(runtime, implementation, shape, rounds, short);
      }
      const title = `µs per message ${name}, ${implementation}`;
      outcome.figures.push(figure(title, runtime, "CPU µs", samples));
      if (implementation === "raw") continue;
      const medians = Object.values(samples).map((values) => spread(values).median);
      const value = spread([Math.max(...medians) / Math.min(...medians)]);
      outcome.ratios.push(
        bounded(`${runtime}: ${title}, worst / best`, value, { atMost: 1.5 }),
      );
    }
  }
  return outcome;
}

/** Processor µs of the server for one delivered message, in bursts of 20. */
async function costs(
  runtime: Runtime,
  name: Name,
  { subscribers, topics }: Shape,
  rounds: number,
  short: boolean,
): Promise<number[]> {
  await using server = await Remote.start(runtime, "server.ts", name);
  await using load = await Remote.start("bun", "load.ts");
  await load.call("open", {
    kind: name === "raw" ? "sse" : "duplex",
    port: await server.call("port"),
    path: `/?topics=${topics}`,
    connections: subscribers,
  });
  const burst = 20;
  const deliveries = short ? 20_000 : 200_000;
  const bursts = Math.max(2, Math.ceil(deliveries / burst / subscribers));
  const every = Math.max(2, subscribers * 0.06); // ms: enough to write one before the next
  const messages = bursts * burst * subscribers;
  let timers = 0;
  const run = async () => {
    await load.call("expect", { messages });
    const cpu = await server.call<number>("paced", { bursts, burst, topics, every });
    await load.call("arrived");
    return (cpu - timers) * 1000 / messages;
  };
  await run(); // warming up
  // The bench's own timers cost something, too.
  const ticks = 200;
  const idle = { bursts: ticks, burst: 0, topics, every: 2 };
  timers = await server.call<number>("paced", idle) / ticks * bursts;
  const { costs } = await interleaved(["costs"], rounds, run);
  return costs;
}

export async function unheard({ short, rounds, runtimes }: Scale): Promise<Outcome> {
  const outcome: Outcome = { figures: [], ratios: [] };
  for (const runtime of runtimes) {
    await using crossws = await Remote.start(runtime, "server.ts", "crossws");
    await using ours = await Remote.start(runtime, "server.ts", "ours");
    const measure = async (server: Remote, peers: number) => {
      const run = (publishes: number) =>
        server.call<number>("unheard", { peers, publishes: Math.ceil(publishes) });
      const publishes = server === ours ? 1e6 : 1e7 / peers;
      await run(publishes);
      const { costs } = await interleaved(["costs"], rounds, () => run(publishes));
      return costs;
    };
    const many = short ? 1000 : 10_000;
    const few = { crossws: await measure(crossws, 10), ours: await measure(ours, 10) };
    const crowd = { crossws: await measure(crossws, many), ours: await measure(ours, many) };
    outcome.figures.push(
      figure("publish to nobody, 10 peers", runtime, "ns", few),
      figure(`publish to nobody, ${many} peers`, runtime, "ns", crowd),
    );
    const value = spread(crowd.ours.map((sample, i) => sample / few.ours[i]!));
    const title = `${runtime}: publish to nobody, ${many} peers / 10 peers`;
    outcome.ratios.push(bounded(title, value, { atMost: 1.5 }));
  }
  return outcome;
}
