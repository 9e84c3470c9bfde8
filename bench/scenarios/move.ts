/**
 * What it costs that a session goes to another instance, and how long a deploy takes.
 *
 * @module
 */
import { bounded, figure, type Outcome, type Scale, spread } from "../measure.ts";
import { Remote } from "../rpc.ts";

interface Deploy {
  milliseconds: number;
  /** On the backplane, for each session. */
  messages: number;
  bytes: number;
}

export async function move({ short, rounds, runtimes }: Scale): Promise<Outcome> {
  const outcome: Outcome = { figures: [], ratios: [], notes: [] };
  const sessions = short ? 200 : 1000;
  for (const runtime of runtimes) {
    await using child = await Remote.start(runtime, "moves.ts");
    await child.call("deploy", { sessions: 50 }); // which warms it up
    const deploys: Deploy[] = [];
    for (let i = 0; i < rounds; i++) deploys.push(await child.call("deploy", { sessions }));
    const ours = deploys.map(({ milliseconds }) => milliseconds);
    outcome.figures.push(
      figure(`deploy of ${sessions} sessions`, runtime, "ms", { ours }),
      figure("a move", runtime, "bytes", { ours: deploys.map(({ bytes }) => bytes) }),
    );
    const title = `${runtime}: deploy of ${sessions} sessions`;
    const messages = spread(deploys.map(({ messages }) => messages));
    outcome.ratios.push(
      bounded(`${title}, seconds`, spread(ours.map((ms) => ms / 1000)), { atMost: 3 }),
      bounded(`${title}, messages of the backplane for each`, messages, { atMost: 3.5 }),
    );
  }
  return outcome;
}
