/**
 * Deploys over a real Redis, Deno and Bun mixed: instances are replaced in turn under traffic, and
 * no client sees a close; an instance that is killed is known to be gone.
 */
import type { Transport } from "../client.ts";
import { launch, launchAll } from "./fleet.ts";
import { assertEquals, assertLess, needs, once, sleep, test, until } from "./harness.ts";
import { gather, numbers, Talker } from "./talker.ts";

const skip = needs("redis-server", "deno", "bun");

for (const transport of ["auto", "post"] as (Transport | "auto")[]) {
  test(
    `three instances are replaced in turn, and nobody on ${transport} sees a close`,
    async (t) => {
      const { redis, instances, proxy } = await launchAll(t, { MOVES: "1" });
      const talkers = numbers(6).map((name) => new Talker(t, proxy.url, name, { transport }));
      const drops: string[] = [];
      for (const { name, socket } of talkers) {
        socket.addEventListener("drop", () => void drops.push(name));
      }
      await Promise.all(talkers.map(({ socket }) => once(socket, "open")));
      const talking = Promise.all(talkers.map((talker) => talker.talk(600, 40)));
      for (const i of [0, 1, 2]) {
        await sleep(300, t.signal);
        const successor = await launch(t, i === 1 ? "deno" : "bun", redis, { MOVES: "1" });
        await sleep(200, t.signal); // its subscription
        const old = instances[i]!;
        proxy.ports.splice(proxy.ports.indexOf(old.port), 1, successor.port);
        instances[i] = successor;
        old.child.send("close 1012");
        const { sessions } = await old.child.json<{ sessions: object }>({ timeout: 15_000 });
        assertEquals(Object.keys(sessions), [], "all have moved");
      }
      await talking;
      await Promise.all(talkers.map((talker) => talker.heard()));
      const got = await gather(instances);
      for (const { name, sent, received, failures, closed } of talkers) {
        assertEquals([failures, received, closed], [[], sent, undefined], name);
        assertEquals(got[name], numbers(sent), name);
      }
    },
    { skip, timeout: 90_000 },
  );
}

test("clients of an instance that was killed learn it within 15 s, not 30", async (t) => {
  const { instances, proxy } = await launchAll(t, { MOVES: "1" });
  const talkers = numbers(6).map((name) => new Talker(t, proxy.url, name, { transport: "post" }));
  await Promise.all(talkers.map(({ socket }) => once(socket, "open")));
  const owned = Object.keys((await instances[1]!.tell()).sessions);
  await sleep(6_000, t.signal); // each has said that it is there
  const killed = performance.now();
  instances[1]!.child.kill("SIGKILL");
  proxy.ports.splice(1, 1);
  const ended = () => talkers.filter(({ closed }) => closed);
  await until(() => ended().length === owned.length, { timeout: 25_000 });
  for (const { closed, closedAt } of ended()) {
    assertEquals(closed!.code, 1006);
    assertLess(closedAt - killed, 20_000);
  }
  const others = talkers.filter(({ closed }) => !closed);
  await Promise.all(others.map((talker) => talker.talk(20)));
  await Promise.all(others.map((talker) => talker.heard()));
  for (const { sent, received, failures } of others) {
    assertEquals([received, failures], [sent, []]);
  }
}, { skip, timeout: 60_000 });
