/**
 * Messages up from one client: by raw sockets, by real clients, and by `post`
 * through a network with latency.
 *
 * @module
 */
import { figure, interleaved, type Outcome, ratio, type Scale } from "../measure.ts";
import { delayingProxy } from "../proxy.ts";
import { Remote, type Runtime } from "../rpc.ts";

const NAMES = ["native", "crossws", "ours"] as const;
const KINDS = { native: "ws", crossws: "sse", ours: "duplex" } as const;
/** Bursts on their way before one is answered. */
const AHEAD = 4;

export async function uplink({ short, rounds, runtimes }: Scale): Promise<Outcome> {
  const outcome: Outcome = { figures: [], ratios: [] };
  for (const runtime of runtimes) {
    await using stack = new AsyncDisposableStack();
    const client = stack.use(await Remote.start(runtime, "client.ts"));
    const load = stack.use(await Remote.start("bun", "load.ts"));
    const ports = {} as Record<string, number>;
    for (const name of NAMES) {
      const server = stack.use(await Remote.start(runtime, "server.ts", name));
      ports[name] = await server.call("port");
    }
    const run = (by: Remote, kind: string, port: number, share = 1) => {
      const bursts = Math.ceil((short ? 20 : 200) * share);
      return by.call<number>("uplink", { kind, port, bursts, ahead: AHEAD });
    };
    for (
      const [how, by, kinds] of [
        ["clients", client, undefined],
        ["raw sockets", load, KINDS],
      ] as const
    ) {
      const samples = await interleaved(
        NAMES,
        rounds + 1,
        (name) => run(by, kinds?.[name] ?? name, ports[name]!, name === "crossws" ? 0.2 : 1),
      );
      for (const name of NAMES) samples[name].shift(); // warming up
      const name = `uplink, ${how}`;
      outcome.figures.push(figure(name, runtime, "messages/s", samples));
      // No real client is as fast as raw sockets are, so the target is for real ones.
      const target = by === client ? { atLeast: 1 } : undefined;
      outcome.ratios.push(
        ratio(`${runtime}: ${name}, ours / native`, samples.ours, samples.native, target),
      );
    }
  }
  return outcome;
}

/** Offered messages per second. A window of 256 KiB holds 3,500 of them, and goes once a round trip. */
const OFFERED = 10_000;

export async function latency({ short, rounds, runtimes }: Scale): Promise<Outcome> {
  const outcome: Outcome = { figures: [], ratios: [] };
  const delays = short ? [0, 100] : [0, 10, 100]; // milliseconds, each way
  for (const runtime of runtimes) {
    const samples = await interleaved(
      delays.map((delay) => `${delay} ms`),
      short ? 1 : rounds,
      (name) => delivered(runtime, parseInt(name), short ? 1 : 2),
    );
    const name = `post, ${OFFERED} messages/s offered`;
    outcome.figures.push(figure(name, runtime, "messages/s", samples));
    for (const delay of delays.slice(1)) {
      const title = `${runtime}: ${name}, ${delay} ms each way / 0 ms`;
      const atLeast = 0.8;
      outcome.ratios.push(ratio(title, samples[`${delay} ms`]!, samples["0 ms"]!, { atLeast }));
    }
  }
  return outcome;
}

/** What arrives per second once it flows. */
async function delivered(runtime: Runtime, delay: number, seconds: number): Promise<number> {
  await using server = await Remote.start(runtime, "server.ts", "ours");
  await using client = await Remote.start(runtime, "client.ts");
  await using proxy = await delayingProxy(await server.call("port"), delay);
  const offer = client.call("offer", { port: proxy.port, rate: OFFERED, seconds: seconds + 1.5 });
  await pause(1250);
  const first = await server.call<{ received: number; now: number }>("received");
  await pause(seconds * 1000);
  const last = await server.call<{ received: number; now: number }>("received");
  await offer;
  return (last.received - first.received) / (last.now - first.now) * 1000;
}

const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));
