/**
 * Every server of examples/, with a heartbeat of 300 ms in the place of 15 s: two peers hear each
 * other beyond it without a drop; at the signals of a terminal and of a supervisor both are told 1012;
 * and where it listens, or cannot, is said in one line.
 */
import { cp, mkdtemp, readdir, readFile, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { RedisServer } from "./bus.ts";
import {
  assertEquals,
  assertGreater,
  type Child,
  needs,
  root,
  type Runtime,
  sleep,
  type TestContext,
  testOnce,
  until,
} from "./harness.ts";
import { connect, type Connected } from "./pair.ts";

const HEARTBEAT = 300;

interface Example {
  file: string;
  runtimes: readonly Runtime[];
  /** Of the address that it prints. */
  path: string;
  needs?: string;
  /** What is sent so that both hear it, and how that is seen. */
  say(n: number): string;
  hears(data: string, n: number): boolean;
  /** What is sent first. */
  greet?: (n: number) => string;
}

const chat = {
  path: "/chat",
  say: (n: number) => JSON.stringify({ type: "say", id: `${n}`, text: `said ${n}` }),
  hears: (data: string, n: number) => data.includes(`"text":"said ${n}"`),
  greet: (n: number) => JSON.stringify({ type: "join", name: `P${n}` }),
};
const all = ["deno", "bun", "node-24"] as const;

const examples: Example[] = [
  ...all.map((runtime) => ({
    file: `${runtime.replace(/-.*/, "")}.ts`,
    runtimes: [runtime],
    ...chat,
  })),
  { file: "bin.ts", runtimes: ["bun", "node-24"], ...chat },
  {
    file: "cluster.ts",
    runtimes: ["deno", "bun"],
    path: "/chat",
    needs: "redis-server",
    say: (n) => `said ${n}`,
    hears: (data, n) => data.startsWith(`said ${n} (`),
  },
  {
    file: "ai/main.ts",
    runtimes: all,
    path: "/ai/chat?follow=c",
    // Who follows a chat is told of each turn in it.
    say: (n) =>
      JSON.stringify({
        ...{ type: "send", requestId: `${n}`, id: "c", trigger: "submit-message" },
        ...{ headers: {}, body: {} },
        messages: [{ id: `${n}`, role: "user", parts: [{ type: "text", text: `said ${n}` }] }],
      }),
    hears: (data) => data === '{"type":"turn"}' || data.includes(`"end"`),
  },
];

/** The modules and examples, hurried. */
async function hurried(t: TestContext): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), "duplex-examples-"));
  t.defer(() => rm(folder, { recursive: true }));
  const modules = (await readdir(root)).filter((name) => /\.(ts|json)$/.test(name));
  for (const name of [...modules, "examples"]) {
    await cp(join(root, name), join(folder, name), { recursive: true });
  }
  await symlink(join(root, "node_modules"), join(folder, "node_modules"));
  let changed = 0;
  for (const name of ["chat.ts", "cluster.ts", "ai/chat.ts"]) {
    const file = join(folder, "examples", name);
    const code = await readFile(file, "utf8");
    const quick = code.replace("bidir: true,", `bidir: true, heartbeatInterval: ${HEARTBEAT},`);
    if (quick !== code) changed++;
    await writeFile(file, quick);
  }
  assertEquals(changed, 3);
  return folder;
}

/** Starts one, and has two peers in it. */
async function start(t: TestContext, runtime: Runtime, example: Example, env = {}) {
  const folder = await hurried(t);
  const redis = example.needs && await RedisServer.start(t);
  const launch = (env: Record<string, string>) =>
    t.spawn(runtime, join(folder, "examples", example.file), {
      flags:
        { deno: ["run", "-A", "--no-check"], "node-24": ["--no-warnings"] }[runtime as "deno"] ??
          [],
      asItIs: true,
      env: {
        HOST: "127.0.0.1",
        PORT: "0",
        ...redis && { REDIS_PORT: `${redis.port}` },
        ...env,
      },
    });
  const child = await launch(env);
  const { origin } = new URL(/http:\S+\//.exec(await child.line({ timeout: 20_000 }))![0]);
  return { child, origin, launch };
}

async function enter(t: TestContext, origin: string, { path, greet }: Example) {
  const people = [1, 2].map(() => connect(t, origin + path));
  for (const [n, { opened, socket }] of people.entries()) {
    await opened;
    if (greet) socket.send(greet(n));
  }
  return people;
}

/** Each says something, and both hear it. */
async function talk(people: Connected[], { say, hears }: Example, n: number): Promise<void> {
  const counts = people.map(({ messages }) => messages.all.length);
  people[n % 2]!.socket.send(say(n));
  for (const [i, { messages }] of people.entries()) {
    await until(
      () => messages.all.slice(counts[i]!).some((data) => hears(String(data), n)),
      { timeout: 15_000 },
    );
  }
}

async function ended(child: Child, signal: "SIGINT" | "SIGTERM", people: Connected[]) {
  child.kill(signal);
  for (const { closed, events } of people) {
    const { code, wasClean } = await closed;
    assertEquals([code, wasClean, events.includes("error")], [1012, true, false]);
  }
  await child.exited;
  assertEquals(child.stderr(), "");
}

for (const example of examples) {
  for (const runtime of example.runtimes) {
    const options = {
      timeout: 60_000,
      skip: needs(runtime.replace("-24", ""), ...example.needs ? [example.needs] : []),
    };

    testOnce(
      `examples/${example.file} on ${runtime}: two hear each other beyond a heartbeat`,
      async (t) => {
        const { child, origin } = await start(t, runtime, example);
        const people = await enter(t, origin, example);
        if (example.needs) await sleep(300, t.signal); // subscriptions
        for (let n = 0; n < 4; n++) {
          await talk(people, example, n);
          await sleep(HEARTBEAT, t.signal);
        }
        assertEquals(people.map(({ events }) => events), [["open"], ["open"]], "no drop");
        await ended(child, "SIGTERM", people);
      },
      options,
    );

    // Of the demo by its runtimes tests/examples.test.ts tells it.
    if (example.path === "/chat" && example.file === `${runtime.replace(/-.*/, "")}.ts`) continue;
    testOnce(
      `examples/${example.file} on ${runtime}: HOST and PORT, a port that is taken, SIGINT`,
      async (t) => {
        const { child, origin, launch } = await start(t, runtime, example, { HOST: "127.0.0.2" });
        const { hostname, port } = new URL(origin);
        assertEquals(hostname, "127.0.0.2");
        assertGreater(Number(port), 0);
        t.expect(/exited by 1$/, "That port is taken", "Not a port");
        const said: Record<string, string> = {
          [port]: "That port is taken: choose another one, by PORT=8001\n",
          // The command prints its help besides: tests/pack.test.ts.
          ...example.file !== "bin.ts" && { many: "Not a port: many\n" },
        };
        for (const [PORT, line] of Object.entries(said)) {
          const next = await launch({ HOST: "127.0.0.2", PORT });
          assertEquals([(await next.exited).code, next.stderr()], [1, line]);
        }
        await ended(child, "SIGINT", await enter(t, origin, example));
      },
      options,
    );
  }
}
