/**
 * Two parsers of event streams, on the same chunks: ours out of the client's
 * source, which does not export it, and eventsource-parser.
 *
 * @module
 */
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createParser } from "eventsource-parser";
import { answer } from "./rpc.ts";
import { inputs } from "./streams.ts";

type OnEvent = () => void;
interface Parser {
  push(chunk: string): void;
}

async function ours(): Promise<(onEvent: OnEvent) => Parser> {
  const folder = await mkdtemp(join(tmpdir(), "duplex-bench-"));
  const source = await readFile(join(import.meta.dirname!, "../client.ts"), "utf8");
  const file = join(folder, "client.ts");
  await writeFile(file, `${source}\nexport { EventParser };\n`);
  const { EventParser } = await import(file);
  await rm(folder, { recursive: true });
  return (onEvent) => new EventParser(onEvent);
}

function theirs(onEvent: OnEvent): Parser {
  const parser = createParser({ onEvent });
  return { push: (chunk) => parser.feed(chunk) };
}

/** MB per second, by parsing the chunks again and again with fresh parsers. */
function speed(make: (onEvent: OnEvent) => Parser, chunks: string[], ms: number): number {
  let events = 0;
  const onEvent = () => events++;
  let times = 0;
  const started = performance.now();
  while (performance.now() - started < ms) {
    const parser = make(onEvent);
    for (const chunk of chunks) parser.push(chunk);
    times++;
  }
  const passed = performance.now() - started;
  if (events === 0) throw new Error("no event was parsed");
  const length = chunks.reduce((sum, chunk) => sum + chunk.length, 0);
  return times * length / 1e6 / passed * 1000;
}

answer({
  async run({ rounds, ms }) {
    const parsers = { "eventsource-parser": theirs, ours: await ours() };
    const speeds: Record<string, Record<string, number[]>> = {};
    for (const [input, chunks] of Object.entries(inputs())) {
      speeds[input] = {};
      for (let round = -1; round < rounds; round++) {
        for (const [name, make] of Object.entries(parsers)) {
          const sample = speed(make, chunks, ms);
          if (round >= 0) (speeds[input][name] ??= []).push(sample); // the first warms up
        }
      }
    }
    return speeds;
  },
});
