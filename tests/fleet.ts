/**
 * Instances of a cluster in processes of their own, Deno and Bun, over a real Redis or PostgreSQL,
 * behind a proxy that sends each request to the next one.
 *
 * @module
 */
import { type PostgresServer, RedisServer, type RoundRobin, roundRobin } from "./bus.ts";
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
  backplane: RedisServer | PostgresServer,
  env: Record<string, string> = {},
): Promise<Instance> {
  const child = await t.spawn(runtime, "tests/fixtures/cluster.ts", {
    env: { ...backplane.env, ...env },
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
export async function launchFleet(
  t: TestContext,
  backplane: RedisServer | PostgresServer,
  env: Record<string, string> = {},
): Promise<{ instances: Instance[]; proxy: RoundRobin }> {
  const runtimes = ["deno", "bun", "deno"] as const;
  const instances = await Promise.all(
    runtimes.map((runtime) => launch(t, runtime, backplane, env)),
  );
  const proxy = await roundRobin(t, instances.map(({ port }) => port));
  await sleep(200, t.signal); // their subscriptions
  return { instances, proxy };
}

/** The same over a Redis of their own. */
export async function launchAll(t: TestContext, env: Record<string, string> = {}): Promise<{
  redis: RedisServer;
  instances: Instance[];
  proxy: RoundRobin;
}> {
  const redis = await RedisServer.start(t);
  return { redis, ...await launchFleet(t, redis, env) };
}
