/**
 * A function platform: eight instances, Deno and Bun mixed, over a real Redis. Any of them gets any
 * request, streams are cut after a while, and who has no request open is frozen at once. With
 * `maxConnectionAge` below that limit nobody notices.
 */
import process from "node:process";
import { launch } from "./fleet.ts";
import { RedisServer } from "./bus.ts";
import {
  assertEquals,
  assertGreater,
  assertLess,
  needs,
  note,
  once,
  sleep,
  test,
  until,
} from "./harness.ts";
import { platform } from "./platform.ts";
import { numbers, Talker } from "./talker.ts";

const skip = needs("redis-server", "deno", "bun");
/** In ms: how long a stream may last, and how often each client speaks. */
const long = !!process.env.DUPLEX_SOAK;
const LIMIT = long ? 8_000 : 3_000;
const INTERVAL = 500;
const INSTANCES = long ? 8 : 4;
const CLIENTS = long ? 12 : 4;
const ROUNDS = long ? 10 : 3;

test(
  "streams are renewed before the platform cuts them, and who is idle may be frozen",
  async (t) => {
    const redis = await RedisServer.start(t);
    const env = { MOVES: "1", MAX_AGE: `${LIMIT * 0.75}` };
    const instances = [];
    for (let i = 0; i < INSTANCES; i++) {
      instances.push(launch(t, i % 2 ? "bun" : "deno", redis, env));
    }
    const backends = (await Promise.all(instances))
      .map(({ child, port }) => ({ pid: child.pid, port }));
    await sleep(300, t.signal); // their subscriptions
    const front = await platform(t, backends, { limit: LIMIT, freezes: true });
    const told: string[] = [];
    const talkers = numbers(CLIENTS).map((name) =>
      new Talker(t, front.url, name, { transport: "post" })
    );
    let heard = 0;
    const last = talkers.map(() => 0);
    let stall = 0;
    talkers.forEach(({ socket, name }, i) => {
      for (const type of ["drop", "close"]) {
        socket.addEventListener(type, () => void told.push(`${name} ${type}`));
      }
      socket.addEventListener("message", () => {
        const now = performance.now();
        if (last[i]) stall = Math.max(stall, now - last[i]!);
        last[i] = now;
        heard++;
      });
    });
    await Promise.all(talkers.map(({ socket }) => once(socket, "open")));
    const end = performance.now() + ROUNDS * LIMIT;
    await Promise.all(talkers.map(async (talker) => {
      await sleep(Math.random() * INTERVAL, t.signal);
      while (performance.now() < end && !talker.closed) {
        talker.socket.send(`${talker.sent++}`);
        await sleep(INTERVAL, t.signal);
      }
    }));
    await until(() => talkers.every(({ sent, received }) => sent === received), {
      timeout: 10_000,
    });
    note(`stall ${Math.round(stall)} ms, ${JSON.stringify([front.statuses, front.counts])}`);
    if (long) console.log(`stall ${Math.round(stall)} ms`, heard, front.statuses, front.counts);
    for (const { failures } of talkers) assertEquals(failures, []);
    assertEquals(told, []);
    assertEquals(Object.keys(front.statuses).filter((status) => Number(status) >= 400), []);
    assertEquals(front.counts.cut, 0, "each was renewed in time");
    assertGreater(front.counts.frozen, ROUNDS);
    // Twice the interval, and as much again for a machine that is busy with the instances.
    assertLess(stall, 4 * INTERVAL);
  },
  { skip, timeout: long ? 180_000 : 60_000 },
);
