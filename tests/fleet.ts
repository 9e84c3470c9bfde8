/**
 * Instances of a cluster in processes of their own, Deno and Bun, over a real Redis, behind a
 * proxy that sends each request to the next one.
 *
 * @module
 */
import { RedisServer, type RoundRobin, roundRobin } from "./bus.ts";
import type { Told } from "./fixtures/instance.ts";
import { type Child, sleep, type TestContext } from "./harness.ts";

export interface Instance {
  readonly child: Child;
  readonly port: number;
  tell(): Promise<Told>;
}

/** Starts one instance, with environment variables of tests/fixtures/cluster.ts. */
export async function launch(
  t: TestContext,
  runtime: "deno" | "bun",
  redis: RedisServer,
  env: Record<string, string> = {},
): Promise<Instance> {
  const child = await t.spawn(runtime, "tests/fixtures/cluster.ts", {
    env: { REDIS_PORT: `${redis.port}`, ...env },
  });
  const { port } = await child.json<{ port: number }>({ timeout: 20_000 });
  return {
    child,
    port,
    tell() {
      child.send("tell");
      return child.json<Told>();
    },
  };
}

/** Starts three of them. */
export async function launchAll(t: TestContext, env: Record<string, string> = {}): Promise<{
  redis: RedisServer;
  instances: Instance[];
  proxy: RoundRobin;
}> {
  const redis = await RedisServer.start(t);
  const runtimes = ["deno", "bun", "deno"] as const;
  const instances = await Promise.all(
    runtimes.map((runtime) => launch(t, runtime, redis, env)),
  );
  const proxy = await roundRobin(t, instances.map(({ port }) => port));
  await sleep(200, t.signal); // their subscriptions
  return { redis, instances, proxy };
}
