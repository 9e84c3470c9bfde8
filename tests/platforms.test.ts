/**
 * The examples for platforms that have several instances, over a real Redis, each behind a front
 * that does to it what the platform does: any instance gets any request, streams are cut, who has
 * no request is frozen or has one at a time. Two peers hear each other all the while. Then instances
 * go, by the platform's signal, and they hear each other afterwards.
 */
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import type { SSEAdapter } from "../server.ts";
import { MemoryBus, RedisServer } from "./bus.ts";
import {
  assert,
  assertEquals,
  assertGreater,
  assertMatch,
  type Child,
  freePort,
  needs,
  note,
  root,
  sleep,
  type TestContext,
  testOnce,
  until,
} from "./harness.ts";
import { connect, shutDown } from "./pair.ts";
import { platform, type PlatformOptions } from "./platform.ts";
import { project } from "./project.ts";
import { wireClient } from "./wire.ts";

interface Place extends PlatformOptions {
  instances: number;
  /** How many of them go. */
  going: number;
  runtime: "node-24" | "deno";
  /** What stands around the example, as the platform does. Default: nothing. */
  main?: string;
  /** Tells an instance that it is to go. */
  end(child: Child): void;
}

/** In ms: how long a request may take. */
const LIMIT = 3_500;
/** In ms: when clients are asked to connect anew. */
const AGE = 1_200;

const places: Record<string, Place> = {
  vercel: {
    ...{ runtime: "node-24", instances: 3, going: 2, limit: LIMIT, freezes: true },
    main: `import { serve } from "srvx";
      import { GET, POST } from "./vercel.ts";
      const fetch = (request) => ({ GET, POST })[request.method](request);
      serve({ hostname: "127.0.0.1", port: process.env.PORT, silent: true, fetch,
        gracefulShutdown: false });`,
    end: (child) => child.kill("SIGTERM"),
  },
  lambda: {
    ...{ runtime: "node-24", instances: 6, going: 2, limit: LIMIT, freezes: true, exclusive: true },
    patience: 10_000,
    main: `import { createServer } from "node:http";
      globalThis.awslambda = {
        streamifyResponse: (handler) => handler,
        HttpResponseStream: {
          from: (output, { statusCode, headers }) => output.writeHead(statusCode, headers),
        },
      };
      const { handler } = await import("./lambda.ts");
      createServer(async (request, response) => {
        const body = Buffer.concat(await Array.fromAsync(request));
        const [rawPath, rawQueryString = ""] = request.url.split("?");
        const http = { method: request.method, sourceIp: "127.0.0.1" };
        await handler({
          ...{ rawPath, rawQueryString, headers: request.headers },
          requestContext: { domainName: "lambda.test", http },
          ...body.length && { body: body.toString("base64"), isBase64Encoded: true },
        }, response);
      }).listen(process.env.PORT, "127.0.0.1");`,
    end: (child) => child.kill("SIGTERM"),
  },
  "cloud-run": {
    ...{ runtime: "node-24", instances: 3, going: 2, limit: LIMIT },
    end: (child) => child.kill("SIGTERM"),
  },
  fly: {
    ...{ runtime: "node-24", instances: 3, going: 2 },
    end: (child) => child.kill("SIGINT"),
  },
  supabase: {
    ...{ runtime: "deno", instances: 3, going: 2, limit: LIMIT },
    main: `import "./supabase.ts";
      process.stdin.once("data", () => dispatchEvent(new Event("beforeunload")));`,
    end: (child) => child.send("end"),
  },
};

for (const [name, place] of Object.entries(places)) {
  testOnce(
    `examples/edge/${name}.ts: streams are cut, instances go, and two hear each other`,
    async (t) => {
      const redis = await RedisServer.start(t);
      const folder = await deployed(t, name, place);
      const instances = await Promise.all(
        Array.from({ length: place.instances }, () => launch(t, folder, place, redis)),
      );
      // Functions end by nothing but this.
      t.defer(() => instances.forEach(({ child }) => child.kill("SIGKILL")));
      await sleep(300, t.signal); // their subscriptions
      const front = await platform(t, instances, place);
      const people = [1, 2].map(() => connect(t, `${front.url}/room`, { transport: "post" }));
      for (const { opened } of people) await opened;
      let said = 0;
      const talk = async (isOver: () => boolean) => {
        while (!isOver()) {
          people[said % 2]!.socket.send(`${++said}`);
          for (const { messages, events } of people) {
            note(`${said}: ${events} ${JSON.stringify([front.statuses, front.counts])}`);
            assertMatch(String(await messages.next({ timeout: 20_000 })), RegExp(`: ${said}$`));
          }
          await sleep(100, t.signal);
        }
      };
      const start = performance.now();
      await talk(() => performance.now() > start + 2 * LIMIT);
      assertGreater(front.statuses[200]!, 3); // each has connected anew, and again
      if (place.freezes) assertGreater(front.counts.frozen, 0);
      for (const instance of instances.slice(0, place.going)) {
        front.retire(instance);
        place.end(instance.child);
        assertEquals(await instance.child.line({ timeout: 30_000 }), "closed");
        instance.child.kill("SIGKILL");
        const end = said + 3;
        await talk(() => said === end);
      }
      for (const { events, messages, socket } of people) {
        assertEquals([socket.readyState, events.includes("close"), messages.left], [1, false, 0]);
        socket.close();
      }
    },
    { timeout: 90_000, skip: needs("redis-server", place.runtime) },
  );
}

testOnce(
  "examples/edge/lambda.ts: who was away is taken up, though the environment that it left is frozen",
  async (t) => {
    const place = places.lambda!;
    const redis = await RedisServer.start(t);
    const folder = await deployed(t, "lambda", place);
    const instances = await Promise.all([1, 2, 3].map(() => launch(t, folder, place, redis)));
    t.defer(() => instances.forEach(({ child }) => child.kill("SIGKILL")));
    await sleep(300, t.signal); // their subscriptions
    // The handler goes on when its client has gone, which only it knows.
    const front = await platform(t, instances, { freezes: true, exclusive: true, lingers: 1_000 });
    let client = await wireClient(t, `${front.url}/room`);
    for (let n = 1; n < 4; n++) {
      assertEquals(await client.send(`${n}`), 204);
      assertMatch(await client.message(), RegExp(`: ${n}$`));
      await client.drop();
      const areFrozen = () => front.backends.every(({ isFrozen, had }) => isFrozen || !had);
      await until(areFrozen, { timeout: 10_000 });
      client = t.use(await client.resume(n, n));
    }
    assertEquals(Object.keys(front.statuses), ["200", "204"]);
  },
  { timeout: 60_000, skip: needs("redis-server", "node-24") },
);

/** A folder with the example as it is, but for where our files are, and for its hours. */
async function deployed(t: TestContext, name: string, { main }: Place): Promise<string> {
  const source = await readFile(join(root, "examples", "edge", `${name}.ts`), "utf8");
  const code = source.replace(/"\.\.\/\.\.\/(\w+\.ts)"/g, `"${root}/$1"`)
    .replace(/maxConnectionAge: [^,]+,/, `maxConnectionAge: ${AGE}, heartbeatInterval: 500,`)
    .replace(/AbortSignal\.timeout\([\d_]+\)/, "AbortSignal.timeout(8_000)")
    .replace("ws.close(", "closing(");
  assert(code.includes(`maxConnectionAge: ${AGE}`));
  return await project(t, {
    "package.json": JSON.stringify({ private: true, type: "module" }),
    [`${name}.ts`]: `${code}
      async function closing(...how: unknown[]) {
        await ws.close(...how as []);
        console.log("closed");
      }`,
    "main.ts": main ?? `import "./${name}.ts";`,
  });
}

async function launch(
  t: TestContext,
  folder: string,
  { runtime }: Place,
  redis: RedisServer,
): Promise<{ child: Child; pid: number; port: number }> {
  const port = await freePort();
  const child = await t.spawn(runtime, join(folder, "main.ts"), {
    ...runtime === "node-24" && { asItIs: true, flags: ["--no-warnings"] },
    env: {
      PORT: `${port}`,
      DENO_SERVE_ADDRESS: `tcp:127.0.0.1:${port}`,
      REDIS_URL: `redis://127.0.0.1:${redis.port}`,
    },
  });
  t.expect("Listening on http");
  const answers = async () => {
    const refusal = await fetch(`http://127.0.0.1:${port}/`, { method: "PUT" }).catch(() => {});
    await refusal?.body?.cancel();
    return refusal;
  };
  await until(answers, { timeout: 20_000 });
  return { child, pid: child.pid, port };
}

testOnce("the room of docs/platforms.md goes on counting where its session goes", async (t) => {
  const [code] = (await readFile(join(root, "docs/platforms.md"), "utf8"))
    .match(/(?<=^```ts\n)[^]*?(?=^```$)/m)!;
  const folder = await project(t, { "room.ts": code });
  const { room } = await import(pathToFileURL(join(folder, "room.ts")).href);
  const bus = new MemoryBus(t);
  const instances: SSEAdapter[] = [1, 2].map(() => room(bus.adapter, 50));
  t.defer(() => Promise.all(instances.map(shutDown)));
  let at = 0;
  const front = await t.serve((request, info) => instances[at]!.fetch(request, info));
  const people = [1, 2].map(() => connect(t, `${front.url}/room`, { transport: "post" }));
  const heard = (n: number) => people[n]!.messages.all.map((data) => JSON.parse(String(data)));
  for (const { opened } of people) await opened;
  await until(() => heard(0).length > 3 && heard(1).length > 3);
  at = 1;
  await instances[0]!.close(1012);
  const { length } = heard(0);
  people[1]!.socket.send('"after"');
  await until(() => [0, 1].every((n) => heard(n).includes("after")));
  await until(() => heard(0).length > length + 3);
  for (const n of [0, 1]) {
    const ticks = heard(n).flatMap(({ ticks }) => ticks ?? []);
    assertEquals(ticks, ticks.map((_: number, i: number) => i + 1), "each once, in order");
    assert(!people[n]!.events.includes("close"));
  }
  assertEquals(instances.map((ws) => ws.stats().peers), [0, 2]);
}, { timeout: 30_000 });
