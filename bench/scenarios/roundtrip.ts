/**
 * Round trip of one message between real clients and an echo.
 *
 * @module
 */
import { figure, interleaved, type Outcome, ratio, type Samples, type Scale } from "../measure.ts";
import { Remote } from "../rpc.ts";

const NAMES = ["native", "raw", "crossws", "ours"] as const;

export async function roundTrip({ short, rounds, runtimes }: Scale): Promise<Outcome> {
  const outcome: Outcome = { figures: [], ratios: [] };
  for (const runtime of runtimes) {
    await using stack = new AsyncDisposableStack();
    const client = stack.use(await Remote.start(runtime, "client.ts"));
    const ports = {} as Record<string, number>;
    for (const name of NAMES) {
      const server = stack.use(await Remote.start(runtime, "server.ts", name));
      ports[name] = await server.call("port");
    }
    const trips = short ? 1000 : 4000;
    // Native code is as fast at once, JavaScript once it has been compiled: 20,000 trips do.
    for (const kind of NAMES) {
      const input = { kind, port: ports[kind], trips: short ? 5000 : 20_000 };
      await client.call("roundTrip", input);
    }
    // Short trips of native sockets have two speeds, 0.025 and 0.07 ms on Bun, by whether the
    // processes fall asleep in between: no measure for a few of them, so a short run compares raw.
    const target = { atMost: runtime === "deno" ? 1.45 : 1.6 };
    const p99: Samples = { native: [], raw: [], crossws: [], ours: [] };
    const p50 = await interleaved(NAMES, rounds, async (kind) => {
      const times = await client.call<{ p50: number; p99: number }>(
        "roundTrip",
        { kind, port: ports[kind], trips },
      );
      p99[kind]!.push(times.p99);
      return times.p50;
    });
    outcome.figures.push(
      figure("round trip p50", runtime, "ms", p50),
      figure("round trip p99", runtime, "ms", p99),
    );
    outcome.ratios.push(
      ratio(
        `${runtime}: round trip p50, ours / native`,
        p50.ours,
        p50.native,
        short ? undefined : target,
      ),
      ratio(
        `${runtime}: round trip p50, ours / raw`,
        p50.ours,
        p50.raw,
        { atMost: short ? 1.5 : 1.15 },
      ),
    );
    if (short) continue; // a short run has too few for a 99th percentile
    outcome.ratios.push(
      ratio(`${runtime}: round trip p99, ours / native`, p99.ours!, p99.native!, { atMost: 2 }),
      ratio(`${runtime}: round trip p99, ours / raw`, p99.ours!, p99.raw!),
    );
  }
  return outcome;
}
