/**
 * Three processes over real Redis and PostgreSQL, which park sessions as soon as their clients are
 * away, and are frozen again and again while every client is cut: what a client has asked of one
 * that was frozen is read when it has long gone on elsewhere.
 *
 * DUPLEX_SEED=… repeats a run, as far as processes can; DUPLEX_SOAK=1 makes it ten times as long.
 */
import { join } from "node:path";
import process from "node:process";
import { PostgresServer, RedisServer } from "./bus.ts";
import { chaos, pickSeed } from "./chaos.ts";
import { type Instance, launchFleet } from "./fleet.ts";
import {
  assertEquals,
  assertGreater,
  needs,
  sleep,
  type TestContext,
  testOnce,
  until,
} from "./harness.ts";
import { soak } from "./measured.ts";
import { project, recipeOf } from "./project.ts";
import { mulberry32 } from "./random.ts";
import { gather, numbers, talkers } from "./talker.ts";

const DURATION = soak ? 80_000 : 8_000;
const SESSIONS = 8;

const kinds = {
  Redis: { tool: "redis-server", file: "redis-store.ts", start: RedisServer.start },
  PostgreSQL: { tool: "postgres", file: "postgres-store.ts", start: PostgresServer.start },
} as const;

for (const [name, { tool, file, start }] of Object.entries(kinds)) {
  const skip = needs(tool, "deno", "bun");
  testOnce(
    `no session is lost where instances over ${name} are frozen again and again`,
    async (t) => {
      t.expect("took nothing of a whole request"); // a client that was cut, and read late
      const backplane = await start(t);
      const folder = await project(t, { [file]: await recipeOf("docs/scale.md", file) });
      const { instances, proxy } = await launchFleet(t, backplane, {
        ...{ STORE: join(folder, file), MOVES: "1", HEARTBEAT: "500", WHEN_AWAY: "1" },
        ...backplane instanceof RedisServer && {
          REDIS_URL: `redis://127.0.0.1:${backplane.port}`,
        },
      });
      const network = t.use(await chaos(proxy.port, { seed: pickSeed() }));
      const random = mulberry32(network.seed);
      const all = await talkers(t, network.url, Array(SESSIONS).fill("post"));
      let over = false;
      const talking = Promise.all(all.map(async (one) => {
        while (!over && !one.closed) await one.talk(5, 100);
      }));
      for (const end = performance.now() + DURATION; performance.now() < end;) {
        const frozen = Math.floor(3 * random());
        const thaw = freeze(t, instances[frozen]!);
        // Of some a balancer finds out soon; the others are sent their share.
        let turn = 0;
        if (random() < 0.7) proxy.choose = () => (frozen + 1 + turn++ % 2) % 3;
        if (random() < 0.85) network.cutAll(random() < 0.5 ? "rst" : "fin");
        await sleep(300 + 2_500 * random(), t.signal);
        thaw();
        proxy.choose = undefined;
        await sleep(700 * random(), t.signal);
      }
      over = true;
      await talking;
      await Promise.all(all.map((one) => one.heard()));
      let got: Record<string, string[]> = {};
      await until(async () => { // some are on their way still
        got = await gather(instances);
        return all.every(({ name }) => got[name]);
      }, { timeout: 20_000, interval: 100 });
      for (const { name, sent, received, failures, closed, socket } of all) {
        assertEquals([closed?.code, failures, received], [undefined, [], sent], name);
        assertEquals(got[name], numbers(sent), name);
        assertGreater(socket.stats.resumes, 0, name);
      }
    },
    { skip, timeout: DURATION + 60_000 },
  );
}

/** Returns what lets it go on. */
function freeze(t: TestContext, { child }: Instance): () => void {
  process.kill(child.pid, "SIGSTOP");
  const thaw = () => void process.kill(child.pid, "SIGCONT");
  t.defer(thaw);
  return thaw;
}
