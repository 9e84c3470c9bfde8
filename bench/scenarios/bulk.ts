/**
 * Bulk, by real clients: megabytes a second, of large messages one after the other.
 *
 * @module
 */
import { figure, interleaved, type Outcome, ratio, type Scale } from "../measure.ts";
import { Remote } from "../rpc.ts";

const UP = ["native", "raw", "post", "ours"] as const;
const DOWN = ["native", "raw", "ours"] as const;
const SIZES = { "64 KiB": 64 * 1024, "1 MiB": 1024 * 1024 };

export async function bulk({ short, rounds, runtimes }: Scale): Promise<Outcome> {
  const outcome: Outcome = { figures: [], ratios: [] };
  for (const runtime of runtimes) {
    await using server = await Remote.start(runtime, "bulk.ts", "server");
    await using client = await Remote.start(runtime, "bulk.ts", "client");
    const port = await server.call<number>("port");
    for (const direction of ["up", "down"] as const) {
      for (const binary of [true, false]) {
        for (const [title, size] of Object.entries(SIZES)) {
          if (short && size > 64 * 1024) continue;
          const count = Math.ceil((short ? 16 : 64) * 1024 * 1024 / size);
          const name = `bulk ${direction}, ${binary ? "binary" : "text"} of ${title}`;
          const samples = await interleaved(
            direction === "up" ? UP : DOWN,
            rounds + 1,
            (kind) =>
              client.call<number>("transfer", { kind, port, direction, binary, size, count }),
          );
          for (const values of Object.values(samples)) values.shift(); // warming up
          const { native, raw, ours, post } = samples as Record<(typeof UP)[number], number[]>;
          outcome.figures.push(figure(name, runtime, "MB/s", samples));
          if (direction === "down") {
            const atLeast = runtime === "bun" ? 0.4 : binary ? 0.8 : 0.9;
            outcome.ratios.push(
              ratio(`${runtime}: ${name}, ours / native`, ours, native, { atLeast }),
            );
            continue;
          }
          const best = raw.map((value, i) => Math.max(value, post[i]!));
          outcome.ratios.push(
            ratio(`${runtime}: ${name}, ours / the better of raw and post`, ours, best, {
              atLeast: 0.9,
            }),
            ratio(`${runtime}: ${name}, ours / post`, ours, post, { atLeast: 1 }),
          );
        }
      }
    }
  }
  return outcome;
}
