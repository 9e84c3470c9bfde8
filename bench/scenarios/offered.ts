/**
 * Fan-out at rates that do not wait for the server: how long a publication takes to
 * each of its subscribers, and what a delivery costs the server.
 *
 * @module
 */
import { figure, interleaved, type Outcome, ratio, type Samples, type Scale } from "../measure.ts";
import { Remote, type Runtime } from "../rpc.ts";

const NAMES = ["native", "raw", "ours"] as const;
type Name = (typeof NAMES)[number];
const KINDS = { native: "ws", raw: "sse", ours: "duplex" } as const;

/** Subscribers, and how often each of them is sent a message, in ms. */
type Rate = readonly [subscribers: number, every: number];
const RATES: readonly Rate[] = [[100, 50], [100, 10], [100, 2], [1000, 100], [1000, 20], [
  1000,
  10,
]];
const SHORT_RATES: readonly Rate[] = [[100, 10], [100, 2]];
/** Where the cost of a delivery is told: 10,000 and 20,000 of them a second. */
const COSTS: readonly Rate[] = [[100, 10], [1000, 50]];
/** Of the rate that native sockets carry. */
const SHARES = [0.25, 0.5, 0.75, 1, 1.5];
/** A rate is carried while its 99th percentile is below that, in ms. */
const BEARABLE = 100;

/** Latency at fixed rates, far below what the servers carry and near to it. */
export async function offered({ short, rounds, runtimes }: Scale): Promise<Outcome> {
  const outcome: Outcome = { figures: [], ratios: [] };
  for (const runtime of runtimes) {
    for (const subscribers of short ? [100] : [100, 1000]) {
      await using crowd = await Crowd.gather(runtime, subscribers);
      for (const rate of (short ? SHORT_RATES : RATES).filter(([count]) => count === subscribers)) {
        const name = `fan-out to ${subscribers} every ${rate[1]} ms`;
        const { p50, p99 } = await crowd.measure(rate[1], rounds);
        outcome.figures.push(
          figure(`${name}, p50`, runtime, "ms", p50),
          figure(`${name}, p99`, runtime, "ms", p99),
        );
        const target = { atMost: 1.2 };
        outcome.ratios.push(
          ratio(`${runtime}: ${name}, p50, ours / native`, p50.ours, p50.native, target),
        );
        if (short) continue; // too few for a 99th percentile
        outcome.ratios.push(
          ratio(`${runtime}: ${name}, p99, ours / native`, p99.ours, p99.native, { atMost: 1.5 }),
        );
      }
      if (short) continue;
      for (const [, every] of COSTS.filter(([count]) => count === subscribers)) {
        const name = `CPU of a delivery, ${
          Math.round(subscribers * 1000 / every)
        }/s to ${subscribers}`;
        const { cost } = await crowd.measure(every, rounds);
        outcome.figures.push(figure(name, runtime, "µs", cost));
        outcome.ratios.push(
          ratio(`${runtime}: ${name}, ours / raw`, cost.ours, cost.raw, { atMost: 1.2 }),
        );
      }
    }
  }
  return outcome;
}

/** How much is carried, and latency at shares of what native sockets carry. */
export async function saturation({ short, rounds, runtimes }: Scale): Promise<Outcome> {
  const outcome: Outcome = { figures: [], ratios: [] };
  if (short) return outcome;
  for (const runtime of runtimes) {
    await using crowd = await Crowd.gather(runtime, 1000);
    const most = await interleaved(["native", "ours"], 3, (name) => crowd.capacity(name));
    const title = `fan-out to 1000, carried at p99 < ${BEARABLE} ms`;
    outcome.figures.push(figure(title, runtime, "messages/s", most));
    outcome.ratios.push(
      ratio(`${runtime}: ${title}, ours / native`, most.ours, most.native, {
        atLeast: runtime === "deno" ? 3 : 2,
      }),
    );
    const carried = most.native.toSorted((a, b) => a - b)[1]!;
    for (const share of SHARES) {
      const { p50 } = await crowd.measure(1000 / (carried * share), rounds, ["native", "ours"]);
      const name = `fan-out to 1000 at ${share * 100} % of native's capacity, p50`;
      outcome.figures.push(figure(name, runtime, "ms", p50));
      const atMost = share <= 0.5 ? 1.2 : share < 1 ? 1.5 : 1;
      outcome.ratios.push(
        ratio(`${runtime}: ${name}, ours / native`, p50.ours, p50.native, { atMost }),
      );
    }
  }
  return outcome;
}

interface Delays {
  p50: number;
  p99: number;
}

/** As many subscribers of each implementation. */
class Crowd implements AsyncDisposable {
  readonly #stack = new AsyncDisposableStack();
  readonly #pairs = {} as Record<Name, { server: Remote; load: Remote }>;
  readonly #subscribers: number;

  private constructor(subscribers: number) {
    this.#subscribers = subscribers;
  }

  static async gather(runtime: Runtime, subscribers: number): Promise<Crowd> {
    const crowd = new Crowd(subscribers);
    for (const name of NAMES) {
      const server = crowd.#stack.use(await Remote.start(runtime, "server.ts", name));
      const load = crowd.#stack.use(await Remote.start("bun", "load.ts", `for ${runtime} ${name}`));
      crowd.#pairs[name] = { server, load };
      const port = await server.call<number>("port");
      await load.call("open", { kind: KINDS[name], port, connections: subscribers });
      // A client is connected a little before its server subscribes it.
      while (await server.call<number>("count") < subscribers) await pause(10);
      await crowd.#offer(name, 80_000 / subscribers, subscribers / 80); // warming up
    }
    return crowd;
  }

  async measure(every: number, rounds: number, names: readonly Name[] = NAMES) {
    const p50 = Object.fromEntries(names.map((name) => [name, []])) as never as Samples<Name>;
    const p99: Samples<Name> = structuredClone(p50);
    // Longer of what comes seldom.
    const messages = Math.ceil((every < 50 ? 600 : 1200) / every);
    const cost = await interleaved(names, rounds, async (name) => {
      const { delays, cost } = await this.#offer(name, messages, every);
      p50[name].push(delays.p50);
      p99[name].push(delays.p99);
      return cost;
    });
    return { p50, p99, cost };
  }

  /** Messages a second, to an eighth. */
  async capacity(name: Name): Promise<number> {
    let rate = 50;
    let step = 2;
    while (step > 1.125) {
      const next = rate * step;
      const { delays } = await this.#offer(name, Math.ceil(next / 2), 1000 / next);
      if (delays.p99 < BEARABLE) rate = next;
      else step **= 0.5;
    }
    return rate;
  }

  async #offer(name: Name, messages: number, every: number) {
    const { server, load } = this.#pairs[name];
    const deliveries = messages * this.#subscribers;
    await load.call("expect", { messages: deliveries });
    await load.call("note");
    const cpu = await server.call<number>("offer", { messages, every });
    await load.call("arrived");
    const delays = await load.call<Delays>("delays");
    return { delays, cost: cpu * 1000 / deliveries };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#stack.disposeAsync();
  }
}

const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));
