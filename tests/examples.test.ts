/** The examples run as the README says, and their chat can be used by a program as well. */
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import {
  assert,
  assertEquals,
  assertMatch,
  assertStringIncludes,
  type Child,
  root,
  test,
  type TestContext,
  until,
} from "./harness.ts";
import { connect } from "./pair.ts";

const DENO_FLAGS = "run -N -R --allow-env=HOST,PORT";

const servers = [
  { name: "deno", file: "examples/deno.ts", flags: DENO_FLAGS.split(" ") },
  { name: "bun", file: "examples/bun.ts", flags: [] },
  // It removes the types of itself, and of the client, and says so.
  { name: "node-24", file: "examples/node.ts", flags: ["--no-warnings"] },
] as const;

test("the documented commands are the ones tested here", async () => {
  const read = (file: string) => readFile(join(root, file), "utf8");
  const { scripts } = JSON.parse(await read("package.json"));
  assertEquals(scripts.start, `npx --yes deno@2 ${DENO_FLAGS} examples/deno.ts`);
  const { tasks } = JSON.parse(await read("deno.json"));
  assertEquals(tasks.start, `deno ${DENO_FLAGS} examples/deno.ts`);
  assertMatch(await read("README.md"), /^npm start$/m);
  const examples = (await read("examples/README.md")).split("\n");
  for (const command of [scripts.start, "npx --yes bun@1 examples/bun.ts"]) {
    assert(examples.includes(command), command);
  }
});

/** A socket that chats; what it has heard, by the type of message. */
function enter(t: TestContext, url: string, name: string) {
  const { socket, opened, messages, closed } = connect(t, url);
  const heard = (type: string) =>
    messages.all.map((data) => JSON.parse(String(data))).filter((message) => message.type === type);
  const send = (message: unknown) => socket.send(JSON.stringify(message));
  const joined = opened.then(() => send({ type: "join", name }));
  return { socket, joined, heard, send, closed };
}

for (const { name, file, flags } of servers) {
  test(`${file} serves the page, the client and the chat`, async (t) => {
    const child = await t.spawn(name, file, {
      flags: [...flags],
      asItIs: true,
      env: { PORT: "0" },
    });
    const url = await address(child);

    const page = await fetch(url);
    assertEquals(page.headers.get("content-type"), "text/html; charset=utf-8");
    assertStringIncludes(await page.text(), 'import { WebSocketSSE } from "/client.js"');

    const script = await fetch(`${url}client.js`);
    assertEquals(script.headers.get("content-type"), "text/javascript; charset=utf-8");
    const code = await script.text();
    // A browser takes it: as a module it has the client, and no type is left to stumble over.
    const folder = await mkdtemp(join(tmpdir(), "duplex-example-"));
    t.defer(() => rm(folder, { recursive: true }));
    await writeFile(join(folder, "client.mjs"), code);
    const module = await import(pathToFileURL(join(folder, "client.mjs")).href);
    assertEquals(typeof module.WebSocketSSE, "function");

    const missing = await fetch(`${url}missing`);
    assertEquals([missing.status, await missing.text()], [404, "Not found\n"]);

    const ada = enter(t, `${url}chat`, "Ada");
    await ada.joined;
    const grace = enter(t, `${url}chat`, "Grace");
    await grace.joined;
    for (const each of [ada, grace]) {
      await until(() => each.heard("who").at(-1)?.names.join() === "Ada,Grace");
    }
    ada.send({ type: "say", text: "Hello" });
    for (const each of [ada, grace]) {
      const said = await until(() => each.heard("said")[0]);
      assertEquals([said.name, said.text], ["Ada", "Hello"]);
    }
    ada.socket.close(1000);
    await until(() => grace.heard("who").at(-1)?.names.join() === "Grace");
    assertEquals(child.stderr(), "");
  }, { timeout: 30_000 });

  for (const signal of ["SIGINT", "SIGTERM"] as const) {
    test(`${file} tells its clients at ${signal} that it restarts, and ends`, async (t) => {
      const child = await t.spawn(name, file, {
        flags: [...flags],
        asItIs: true,
        env: { PORT: "0" },
      });
      const url = await address(child);
      const people = [enter(t, `${url}chat`, "Ada"), enter(t, `${url}chat`, "Grace")];
      for (const { joined } of people) await joined;
      for (const { heard } of people) await until(() => heard("who").at(-1)?.names.length === 2);
      child.kill(signal);
      for (const { closed } of people) {
        const { code, reason, wasClean } = await closed;
        assertEquals([code, reason, wasClean], [1012, "Restarting", true]);
      }
      await child.exited;
      assertEquals(child.stderr(), "");
    }, { timeout: 30_000 });
  }

  test(
    `${file} listens where HOST says, and tells in one line of a port that is taken`,
    async (t) => {
      const first = await t.spawn(name, file, {
        flags: [...flags],
        asItIs: true,
        env: { HOST: "127.0.0.2", PORT: "0" },
      });
      const url = new URL(await address(first));
      assertEquals(url.hostname, "127.0.0.2");
      t.expect(/exited by 1$/, "That port is taken", "Not a port");
      const said = {
        [url.port]: "That port is taken: choose another one, by PORT=8001\n",
        many: "Not a port: many\n",
      };
      for (const [PORT, line] of Object.entries(said)) {
        const next = await t.spawn(name, file, {
          flags: [...flags],
          asItIs: true,
          env: { HOST: "127.0.0.2", PORT },
        });
        assertEquals([(await next.exited).code, next.stderr()], [1, line]);
      }
    },
    { timeout: 30_000 },
  );
}

async function address(child: Child): Promise<string> {
  const line = await child.line();
  assertMatch(line, /^Chat on http:\/\/127\.0\.0\.\d:\d+\/$/);
  return line.replace("Chat on ", "");
}
