/**
 * A chat on three machines, as it were: three processes behind a proxy that knows nothing of
 * sessions and sends each request to the next one. Redis connects them, and a browser tab is
 * served by all of them, whichever has its session.
 *
 *     npm install
 *     deno run -A examples/cluster.ts    (or: bun examples/cluster.ts)
 *
 * It listens where `HOST` and `PORT` say; 127.0.0.1 and 8000 by default. `REDIS_PORT` names a Redis
 * that runs already; else this starts `redis-server` for itself.
 */

import { type ChildProcess, spawn } from "node:child_process";
import { readFile } from "node:fs/promises";
import * as nodeModule from "node:module";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { redis } from "crossws/sync";
import { Redis } from "ioredis";
import { cluster } from "../cluster.ts";
import { sseAdapter } from "../mod.ts";
import type { Where } from "./network.ts";
import { type Fetch, serving, wellFormed, whereFrom } from "./serving.ts";

const PAGE = `<!doctype html>
<meta charset="utf-8">
<title>A chat on three machines</title>
<form><input autofocus placeholder="Say something"></form>
<ul></ul>
<script type="module">
  import { WebSocketSSE } from "/client.js";
  const socket = new WebSocketSSE("/chat");
  const [form, input, list] = ["form", "input", "ul"].map((name) => document.querySelector(name));
  socket.onmessage = ({ data }) => list.append(
    Object.assign(document.createElement("li"), { textContent: data }),
  );
  form.onsubmit = (event) => {
    event.preventDefault();
    socket.send(input.value);
    input.value = "";
  };
</script>
`;

const { INSTANCE, REDIS_PORT } = process.env;
await serving(() => INSTANCE ? runInstance(INSTANCE, Number(REDIS_PORT)) : runAll());

/** One instance: nothing in it knows of the others but `sync`. */
function runInstance(name: string, redisPort: number): () => Promise<void> {
  const client = new Redis(redisPort, "127.0.0.1");
  client.on("error", () => {}); // it connects again, and onError is told of what failed meanwhile
  const ws = sseAdapter({
    bidir: true,
    sync: cluster(redis({ client: client as never, channel: "chat" })),
    hooks: {
      open(peer) {
        peer.subscribe("chat");
        peer.send(`Your session is at instance ${name}.`);
      },
      message(_, message) {
        ws.publish("chat", `${message.text().slice(0, 500)} (said at instance ${name})`);
      },
    },
  });
  console.log(serve({ hostname: "127.0.0.1", port: 0 }, ws.fetch));
  return () => ws.close(1012, "Restarting", { signal: AbortSignal.timeout(3_000) });
}

/** The instances, and the proxy in front of them, which ends when they have. */
async function runAll(): Promise<() => Promise<unknown>> {
  const where = whereFrom(process.env, "127.0.0.1");
  const script = stripTypes(
    await readFile(fileURLToPath(new URL("../client.ts", import.meta.url).href), "utf8"),
  );
  const ports: number[] = [];
  let turn = 0;
  const port = serve(where, async (request, info) => {
    const { pathname, search } = new URL(request.url);
    if (pathname === "/") return text("text/html", PAGE);
    if (pathname === "/client.js") return text("text/javascript", script);
    (info as { timeout?(request: Request, seconds: number): void })?.timeout?.(request, 0); // Bun
    return await forward(
      request,
      `http://127.0.0.1:${ports[turn++ % ports.length]}${pathname}${search}`,
    );
  });
  const redisPort = REDIS_PORT ? Number(REDIS_PORT) : await startRedis();
  const instances = ["1", "2", "3"].map((name) => startInstance(name, redisPort));
  ports.push(...await Promise.all(instances.map(({ port }) => port)));
  console.log(`Chat on http://${where.hostname}:${port}/, at ports ${ports.join(", ")}`);
  return () => Promise.all(instances.map(({ end }) => end()));
}

async function forward(request: Request, target: string): Promise<Response> {
  const { method, body } = request;
  const headers = new Headers(request.headers);
  for (const name of ["host", "connection", "accept-encoding"]) headers.delete(name);
  const init = { method, headers, ...body && { body, duplex: "half" } } as RequestInit;
  try {
    const response = await fetch(target, init);
    return new Response(response.body, { status: response.status, headers: response.headers });
  } catch {
    return new Response("Bad gateway\n", { status: 502 });
  }
}

/** This file once more, as an instance; what it says first is its port. */
function startInstance(
  name: string,
  redisPort: number,
): { port: Promise<number>; end(): Promise<void> } {
  const file = fileURLToPath(import.meta.url);
  const child = spawn(process.execPath, "Deno" in globalThis ? ["run", "-A", file] : [file], {
    env: { ...process.env, INSTANCE: name, REDIS_PORT: `${redisPort}` },
    stdio: ["ignore", "pipe", "inherit"],
    detached: true, // a terminal's SIGINT is for us, who pass it on
  });
  const ended = new Promise<void>((resolve) => child.once("exit", () => resolve()));
  endWithUs(child);
  const port = new Promise<number>((resolve, reject) => {
    child.on("error", reject);
    child.on("exit", () => reject(new Error(`Instance ${name} ended`)));
    child.stdout!.once("data", (line) => resolve(Number(String(line))));
  });
  const end = () => {
    child.kill("SIGTERM");
    return ended;
  };
  return { port, end };
}

async function startRedis(): Promise<number> {
  const port = 16379;
  const args = ["--port", `${port}`, "--bind", "127.0.0.1", "--save", ""];
  const child = spawn("redis-server", args, { detached: true });
  endWithUs(child);
  return await new Promise((resolve) => {
    child.on("error", () => {
      console.error(
        "This needs Redis: apt-get install redis-server, brew install redis, or\n" +
          "docker run -p 6379:6379 redis and the variable REDIS_PORT=6379.",
      );
      process.exit(1);
    });
    child.stdout!.on("data", (line) => /Ready to accept/.test(String(line)) && resolve(port));
  });
}

function endWithUs(child: ChildProcess): void {
  process.on("exit", () => child.kill());
}

/** Either runtime's server; says its port. */
function serve(where: Where, answer: Fetch): number {
  const fetch = wellFormed(answer);
  const { Bun } = globalThis as { Bun?: { serve(options: unknown): { port: number } } };
  return Bun
    ? Bun.serve({ ...where, fetch }).port
    : Deno.serve({ ...where, onListen: () => {} }, fetch).addr.port;
}

function text(type: string, body: string): Response {
  return new Response(body, { headers: { "content-type": `${type}; charset=utf-8` } });
}

/** What the runtime brings along for it. */
function stripTypes(source: string): string {
  const { Bun } = globalThis as {
    Bun?: { Transpiler: new (options: unknown) => { transformSync(source: string): string } };
  };
  return Bun
    ? new Bun.Transpiler({ loader: "ts" }).transformSync(source)
    : nodeModule.stripTypeScriptTypes(source);
}
