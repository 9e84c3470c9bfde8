/**
 * The drivers of drivers.ts, each with a server of its own and a way to take that away.
 *
 * @module
 */
import { connect } from "@nats-io/transport-node";
import { Redis } from "ioredis";
import postgres from "postgres";
import type { ClusterAdapter } from "../cluster.ts";
import { nats, pgsql, redis } from "../drivers.ts";
import { NatsServer, PostgresServer, RedisServer } from "./bus.ts";
import { needs, type TestContext } from "./harness.ts";

/** A backplane, and what runs it. */
export interface Topical {
  readonly adapter: ClusterAdapter;
  readonly server: { readonly port: number; start(): Promise<void>; kill(): Promise<void> };
}

export interface TopicalDriver {
  readonly name: string;
  readonly skip: string | undefined;
  start(t: TestContext): Promise<Topical>;
  connect(t: TestContext): Promise<ClusterAdapter>;
}

async function overRedis(t: TestContext): Promise<Topical> {
  const server = await RedisServer.start(t);
  const client = new Redis(server.port, "127.0.0.1", { retryStrategy: () => 100 });
  client.on("error", () => {}); // of an outage
  t.defer(() => client.disconnect());
  return { server, adapter: redis({ client, channel: "duplex" }) };
}

async function overNats(t: TestContext): Promise<Topical> {
  const server = await NatsServer.start(t);
  const client = await connect({
    servers: `127.0.0.1:${server.port}`,
    maxReconnectAttempts: -1,
    reconnectTimeWait: 100,
  });
  t.defer(() => client.close());
  return { server, adapter: nats({ client, channel: "duplex" }) };
}

async function overPostgres(t: TestContext): Promise<Topical> {
  const server = await PostgresServer.start(t);
  const { port } = server;
  const client = postgres({
    ...{ host: "127.0.0.1", port, username: "test", database: "postgres" },
    backoff: () => 0.1,
    connect_timeout: 5,
    fetch_types: false,
  });
  t.defer(() => client.end({ timeout: 1 }));
  return { server, adapter: pgsql({ client, channel: "duplex" }) };
}

export const drivers: TopicalDriver[] = [
  driver("sharded channels of Redis", needs("redis-server"), overRedis),
  driver("subjects of NATS", needs("nats-server"), overNats),
  driver("channels of PostgreSQL", needs("postgres"), overPostgres),
];

function driver(
  name: string,
  skip: string | undefined,
  start: (t: TestContext) => Promise<Topical>,
): TopicalDriver {
  return { name, skip, start, connect: async (t) => (await start(t)).adapter };
}
