/**
 * One instance of bench/cluster.ts: told what to do by lines of JSON, it answers with what its
 * driver has given it.
 *
 * @module
 */
import process from "node:process";
import { createInterface } from "node:readline";
import { connect } from "@nats-io/transport-node";
import { redis as broadcasting } from "crossws/sync";
import { Redis } from "ioredis";
import postgres from "postgres";
import { cluster, type ClusterAdapter } from "../cluster.ts";
import { nats, pgsql, redis } from "../drivers.ts";
import { sseAdapter } from "../server.ts";

export interface Given {
  messages: number;
  bytes: number;
}

export interface Ready {
  token: string;
}

export type Order =
  | { kind: "join"; joins: boolean }
  | { kind: "wait"; ms: number }
  | { kind: "route"; token: string; times: number }
  | { kind: "publish"; times: number };

const { DRIVER, BACKPLANE, MOVABLE } = process.env;
const port = Number(BACKPLANE);
const host = "127.0.0.1";
const channel = "bench";
const ROOM = "http://bench/room";

let given: Given = { messages: 0, bytes: 0 };
/** Messages to another instance's session. */
let sent = 0;

const adapters: Record<string, () => ClusterAdapter | Promise<ClusterAdapter>> = {
  crossws: () => broadcasting({ client: new Redis(port, host) as never, channel }),
  redis: () => redis({ client: new Redis(port, host), channel }),
  nats: async () => nats({ client: await connect({ servers: `${host}:${port}` }), channel }),
  pgsql: () =>
    pgsql({
      client: postgres({ host, port, username: "test", database: "postgres", max: 1 }),
      channel,
    }),
};

/** Counts what the driver delivers, before anything looks at it. */
const counted = (adapter: ClusterAdapter): ClusterAdapter => (context) => {
  const driver = adapter(context);
  const subscribe = driver.subscribe.bind(driver);
  driver.subscribe = (deliver) =>
    subscribe((message) => {
      given.messages++;
      given.bytes += message.data.length;
      deliver(message);
    });
  return driver;
};

const ws = sseAdapter({
  bidir: true,
  sync: cluster(counted(await adapters[DRIVER!]!())),
  hooks: {
    message: (peer, message) => void peer.send(message.rawData),
    ...MOVABLE && { revive() {} },
  },
});

const opening = await ws.fetch(
  new Request(ROOM, { headers: { accept: "text/event-stream", "x-duplex-version": "1" } }),
);
opening.body!.pipeTo(new WritableStream());
say({ token: opening.headers.get("x-crossws-id") });

for await (const line of createInterface({ input: process.stdin })) {
  await obey(JSON.parse(line));
  say(given);
  given = { messages: 0, bytes: 0 };
}

async function obey(order: Order): Promise<void> {
  switch (order.kind) {
    case "join": {
      const [peer] = [...ws.peers.values()].flatMap((peers) => [...peers]);
      if (order.joins) peer!.subscribe("news");
      return;
    }
    case "wait":
      return await pause(order.ms);
    case "route":
      for (let n = 0; n < order.times; n++) await route(order.token, ++sent);
      return await pause(500); // for those that others route here
    case "publish":
      for (let n = 0; n < order.times; n++) ws.publish("news", "x".repeat(100));
      return await pause(500);
  }
}

/** An uplink of one message of 100 bytes, for another instance's session. */
async function route(token: string, n: number): Promise<void> {
  const response = await ws.fetch(
    new Request(ROOM, {
      method: "POST",
      headers: { "x-crossws-id": token, "content-type": "application/websocket-events" },
      body: `SEQ ${`${n}`.length.toString(16)}\r\n${n}\r\nTEXT 64\r\n${"x".repeat(100)}\r\n`,
    }),
  );
  if (response.status !== 204) throw new Error(`${response.status}: ${await response.text()}`);
}

function pause(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

function say(what: unknown): void {
  console.log(JSON.stringify(what));
}
