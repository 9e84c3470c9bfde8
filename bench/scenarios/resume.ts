/**
 * A load balancer restarts: all connections are cut at once, and all come back,
 * while the server goes on publishing.
 *
 * @module
 */
import { bounded, figure, type Outcome, type Scale, spread } from "../measure.ts";
import { Remote } from "../rpc.ts";

export async function resume({ short, rounds, runtimes }: Scale): Promise<Outcome> {
  const outcome: Outcome = { figures: [], ratios: [] };
  const count = short ? 300 : 1000;
  for (const runtime of runtimes) {
    await using server = await Remote.start(runtime, "server.ts", "ours");
    await using load = await Remote.start("bun", "resumers.ts");
    await load.call("open", { port: await server.call("port"), count });
    await server.call("startNumbers", { every: 50 });
    const times: number[] = [];
    for (let round = 0; round < rounds; round++) {
      times.push(await load.call<number>("cutAndResume"));
    }
    const sent = await server.call<number>("stopNumbers");
    const complete = await load.call<number>("complete", { sent });
    outcome.figures.push(figure(`resume of ${count} sessions`, runtime, "ms", { ours: times }));
    const title = `${runtime}: resume of ${count} sessions`;
    outcome.ratios.push(
      bounded(`${title}, seconds`, spread(times.map((ms) => ms / 1000)), { atMost: 2 }),
      bounded(`${title}, have all ${sent} messages`, spread([complete / count]), { atLeast: 1 }),
    );
  }
  return outcome;
}
