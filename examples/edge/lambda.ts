/**
 * AWS Lambda: a room, behind a function URL or an API Gateway that streams responses, on Node.js.
 *
 * - First byte: ours goes out at once, and a heartbeat before the 30 s of silence that the edge of
 *   API Gateway allows.
 * - Duration: 15 min, or the function's timeout. Clients are asked to connect anew before that
 *   (`maxConnectionAge`); resumption hides what is cut nevertheless.
 * - Isolation: an environment has one request at a time, and is frozen between them. The `POST`s of
 *   a session never reach the environment of its stream: `cluster` carries each there, and an
 *   answer takes two trips over Redis. Each client that listens keeps one environment busy. One
 *   whose client has gone is frozen with its session: so that waits in Redis (`parking`), and the
 *   handler returns when it is there.
 * - A request's body comes whole: clients use `transport: "post"`, which spares them the trial.
 * - Shutdown: SIGTERM where an extension is registered, 500 ms.
 */

import { Buffer } from "node:buffer";
import process from "node:process";
import type { Writable } from "node:stream";
import { pipeline } from "node:stream/promises";
import { redis } from "crossws/sync";
import { Redis } from "ioredis";
import { cluster } from "../../cluster.ts"; // yours: duplex-sse/cluster
import { parking, type ParkingStore } from "../../parking.ts"; // yours: duplex-sse/parking
import { sseAdapter } from "../../server.ts"; // yours: duplex-sse/server

/** In seconds, as in the function's configuration. */
const TIMEOUT = 900;

/** What Lambda passes of a request (payload format 2.0). */
interface Event {
  rawPath: string;
  rawQueryString: string;
  headers: Record<string, string>;
  requestContext: { domainName: string; http: { method: string; sourceIp: string } };
  body?: string;
  isBase64Encoded?: boolean;
}

type Handler = (event: Event, output: Writable) => Promise<void>;

/** Lambda's own global. */
declare const awslambda: {
  streamifyResponse(handler: Handler): Handler;
  HttpResponseStream: {
    from(output: Writable, head: { statusCode: number; headers: Record<string, string> }): Writable;
  };
};

const client = new Redis(process.env.REDIS_URL!);

const store: ParkingStore = {
  put: (key, bytes, ttl) => client.set(`parked:${key}`, Buffer.from(bytes), "PX", Math.ceil(ttl)),
  take: (key) => client.getdelBuffer(`parked:${key}`),
};
/** What is to be done before this environment may be frozen. */
const parked: Set<Promise<void>> = new Set();

const ws = sseAdapter({
  bidir: true,
  sync: cluster(redis({ client: client as never, channel: "room" }), {
    parking: parking(store, {
      whenAway: true,
      waitUntil(work) {
        parked.add(work);
        work.finally(() => parked.delete(work));
      },
    }),
  }),
  maxConnectionAge: TIMEOUT * 800,
  hooks: {
    open: (peer) => peer.subscribe("room"),
    revive() {}, // its topics come along, and there is nothing else
    message(peer, message) {
      ws.publish("room", `${peer}: ${message}`);
    },
  },
});

process.once("SIGTERM", () => void ws.close(1012, "", { signal: AbortSignal.timeout(400) }));

export const handler: Handler = awslambda.streamifyResponse(async (event, output) => {
  const { method, sourceIp } = event.requestContext.http;
  const response = await ws.fetch(toRequest(event, method), { remoteAddress: sourceIp });
  const head = {
    statusCode: response.status,
    headers: Object.fromEntries(response.headers),
  };
  const stream = awslambda.HttpResponseStream.from(output, head);
  await pipeline(response.body ?? [], stream).catch(() => {}); // its client has gone
  await new Promise(setImmediate); // which its session is told by now
  await Promise.all(parked);
});

function toRequest(event: Event, method: string): Request {
  const { domainName } = event.requestContext;
  const url = `https://${domainName}${event.rawPath}?${event.rawQueryString}`;
  const body = event.body && Buffer.from(event.body, event.isBase64Encoded ? "base64" : "utf8");
  return new Request(url, { method, headers: event.headers, ...body && { body } });
}
