/**
 * A real network's latency, and a cut every 5 s: what arrives, how late, and how much goes through,
 * beside a native WebSocket that reconnects by partysocket.
 *
 * @module
 */
import {
  bounded,
  figure,
  type Outcome,
  ratio,
  type Samples,
  type Scale,
  spread,
} from "../measure.ts";
import { delayingProxy, type Proxy } from "../proxy.ts";
import { Remote, type Runtime } from "../rpc.ts";

const NAMES = ["native", "ours"] as const;
type Name = (typeof NAMES)[number];
/** In bytes: `window`, by default. */
const FIRST_WINDOW = 256 * 1024;
/** In ms. */
const CUT_EVERY = 5_000;
/** A line of 100 Mbit/s, in bytes a ms. */
const LINE = 12_500;
/** For what is on its way, in ms: partysocket waits for up to 5 s before it tries again. */
const SETTLING = { native: 6_000, ours: 2_000 };

/** What came of a conversation. */
interface Talk {
  /** Messages that did not arrive, of a hundred. */
  lost: number;
  p50: number;
  p99: number;
}

/** What a client has to tell in the end. */
interface Ended {
  said: number;
  received: number;
  p50: number;
  p99: number;
  bytes: number;
}

export async function network({ short, rounds, runtimes }: Scale): Promise<Outcome> {
  const outcome: Outcome = { figures: [], ratios: [] };
  for (const runtime of runtimes) {
    for (const delay of short ? [20] : [20, 100]) {
      const talks: Record<Name, Talk[]> = { native: [], ours: [] };
      const goodput: Samples<Name> = { native: [], ours: [] };
      const onLine: Samples<Name> = { native: [], ours: [] };
      for (let round = 0; round < (short ? 1 : Math.min(rounds, 3)); round++) {
        for (const name of NAMES) {
          // A short run looks at what must hold, and at what may collapse.
          if (!short || name === "ours") {
            talks[name].push(await talk(runtime, name, delay, short ? 1 : 2));
          }
          goodput[name].push(await flood(runtime, name, delay, short ? 2_000 : 8_000));
          if (!short) onLine[name].push(await flood(runtime, name, delay, 8_000, LINE));
        }
      }
      tell(outcome, runtime, delay, talks, goodput);
      if (!short) tellLine(outcome, runtime, delay, onLine);
    }
  }
  return outcome;
}

function tell(
  { figures, ratios }: Outcome,
  runtime: Runtime,
  delay: number,
  talks: Record<Name, Talk[]>,
  goodput: Samples<Name>,
): void {
  const network = `${delay} ms each way, a cut every 5 s`;
  const sampled = (what: keyof Talk): Samples<Name> => ({
    native: talks.native.map((talk) => talk[what]),
    ours: talks.ours.map((talk) => talk[what]),
  });
  const rate = `100 messages/s each way, ${network}`;
  const lost = sampled("lost");
  ratios.push(bounded(`${runtime}: lost, ${rate}`, spread(lost.ours), { atMost: 0 }));
  const name = `goodput down, ${network}`;
  // What native sockets make of two seconds says little.
  if (lost.native.length) {
    ratios.push(
      ratio(`${runtime}: ${name}, ours / native`, goodput.ours, goodput.native, { atLeast: 0.4 }),
    );
  }
  const first = goodput.ours.map(() => FIRST_WINDOW / (2 * delay) / 1000);
  ratios.push(
    ratio(`${runtime}: ${name}, ours / what the first window carries`, goodput.ours, first, {
      atLeast: 2,
    }),
  );
  figures.push(figure(name, runtime, "MB/s", goodput));
  if (!lost.native.length) return;
  figures.push(figure(`lost, ${rate}`, runtime, "%", lost));
  for (const what of ["p50", "p99"] as const) {
    const samples = sampled(what);
    figures.push(figure(`${what}, ${rate}`, runtime, "ms", samples));
    ratios.push(ratio(`${runtime}: ${what}, ${rate}, ours / native`, samples.ours, samples.native));
  }
}

function tellLine(
  { figures, ratios }: Outcome,
  runtime: Runtime,
  delay: number,
  goodput: Samples<Name>,
): void {
  const name = `goodput down a line of 100 Mbit/s, ${delay} ms each way, a cut every 5 s`;
  figures.push(figure(name, runtime, "MB/s", goodput));
  const target = { atLeast: 0.8 };
  ratios.push(
    ratio(`${runtime}: ${name}, ours / native`, goodput.ours, goodput.native, target),
  );
}

async function talk(runtime: Runtime, kind: Name, delay: number, cuts: number): Promise<Talk> {
  await using ends = await connect(runtime, kind, delay);
  const { server, client, proxy } = ends;
  await server.call("talk");
  await client.call("talk");
  for (let cut = 0; cut < cuts; cut++) {
    await pause(CUT_EVERY / 2);
    proxy.cut();
    await pause(CUT_EVERY / 2);
  }
  await client.call("hush");
  await server.call("hush");
  await pause(SETTLING[kind]);
  const { sent, heard } = await server.call<{ sent: number; heard: number }>("hush");
  const { said, received, ...delays } = await client.call<Ended>("close");
  return { ...delays, lost: 100 * (1 - (received + heard) / (sent + said)) };
}

/** Megabytes a second, with a cut in the middle. */
async function flood(
  runtime: Runtime,
  kind: Name,
  delay: number,
  ms: number,
  rate?: number,
): Promise<number> {
  await using ends = await connect(runtime, kind, delay, rate);
  const { server, client, proxy } = ends;
  await server.call("flood");
  await pause(ms / 2);
  proxy.cut();
  await pause(ms / 2);
  const { bytes } = await client.call<Ended>("close");
  await server.call("hush");
  return bytes / ms / 1000;
}

interface Ends extends AsyncDisposable {
  server: Remote;
  client: Remote;
  proxy: Proxy;
}

async function connect(
  runtime: Runtime,
  kind: Name,
  delay: number,
  rate?: number,
): Promise<Ends> {
  await using stack = new AsyncDisposableStack();
  const server = stack.use(await Remote.start(runtime, "network.ts", "server"));
  const client = stack.use(await Remote.start(runtime, "network.ts", "client"));
  const proxy = stack.use(await delayingProxy(await server.call("port"), delay, rate));
  await client.call("open", { kind, port: proxy.port });
  const { move } = stack;
  const rest = move.call(stack);
  return { server, client, proxy, [Symbol.asyncDispose]: () => rest.disposeAsync() };
}

const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));
