/**
 * Polling, ours and Socket.IO's: the round trip of a message, and the requests that it takes, at
 * some rates and while nothing is said.
 *
 * @module
 */
import { figure, interleaved, type Outcome, ratio, type Samples, type Scale } from "../measure.ts";
import type { Poller } from "../polling.ts";
import { Remote } from "../rpc.ts";

const NAMES = ["socket.io", "ours"] as const satisfies Poller[];

export async function poll({ short, rounds, runtimes }: Scale): Promise<Outcome> {
  const outcome: Outcome = { figures: [], ratios: [] };
  for (const runtime of runtimes) {
    await using stack = new AsyncDisposableStack();
    const servers = {} as Record<Poller, Remote>;
    const clients = {} as Record<Poller, Remote>;
    for (const name of NAMES) {
      servers[name] = stack.use(await Remote.start(runtime, "polling.ts", "server", name));
      clients[name] = stack.use(await Remote.start(runtime, "polling.ts", "client", name));
      await clients[name].call("open", { port: await servers[name].call("port") });
      await clients[name].call("talk", { rate: 100, seconds: 2 }); // warming up
    }
    /** Requests while something goes on. */
    const requests = async (name: Poller, during: () => Promise<unknown>) => {
      const before = await servers[name].call<number>("requests");
      await during();
      return await servers[name].call<number>("requests") - before;
    };
    for (const rate of short ? [10, 100] : [1, 10, 100]) {
      const took: Samples<Poller> = { "socket.io": [], ours: [] };
      const seconds = rate === 1 ? 5 : 2;
      const asked = await interleaved(NAMES, short ? 2 : rounds, async (name) => {
        const all = await requests(name, async () => {
          took[name].push(await clients[name].call<number>("talk", { rate, seconds }));
        });
        return all / seconds;
      });
      const about = `poll, ${rate} messages/s each way`;
      outcome.figures.push(
        figure(`${about}: round trip p50`, runtime, "ms", took),
        figure(about, runtime, "requests/s", asked),
      );
      outcome.ratios.push(
        ratio(
          `${runtime}: ${about}: round trip p50, ours / socket.io`,
          took.ours,
          took["socket.io"],
          { atMost: 1 },
        ),
        ratio(
          `${runtime}: ${about}: requests, ours / socket.io`,
          asked.ours,
          asked["socket.io"],
          { atMost: 1.1 },
        ),
      );
    }
    if (short) continue; // in less than two minutes there are too few
    const pause = () => new Promise((resolve) => setTimeout(resolve, 120_000));
    const idle = await Promise.all(NAMES.map((name) => requests(name, pause)));
    const samples: Samples<Poller> = { "socket.io": [idle[0]!], ours: [idle[1]!] };
    outcome.figures.push(figure("poll, idle", runtime, "requests in 2 min", samples));
    outcome.ratios.push(
      ratio(
        `${runtime}: poll, idle: requests, ours / socket.io`,
        samples.ours,
        samples["socket.io"],
        {
          atMost: 1.1,
        },
      ),
    );
  }
  return outcome;
}
