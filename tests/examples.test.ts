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
  root,
  test,
  type TestContext,
  until,
} from "./harness.ts";
import { connect } from "./pair.ts";

const DENO_FLAGS = "run -N -R --allow-env=PORT";

const servers = [
  { name: "deno", file: "examples/deno.ts", flags: DENO_FLAGS.split(" ") },
  { name: "bun", file: "examples/bun.ts", flags: [] },
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
  const { socket, opened, messages } = connect(t, url);
  const heard = (type: string) =>
    messages.all.map((data) => JSON.parse(String(data))).filter((message) => message.type === type);
  const send = (message: unknown) => socket.send(JSON.stringify(message));
  const joined = opened.then(() => send({ type: "join", name }));
  return { socket, joined, heard, send };
}

for (const { name, file, flags } of servers) {
  test(`${file} serves the page, the client and the chat`, async (t) => {
    const child = await t.spawn(name, file, { flags: [...flags], env: { PORT: "0" } });
    const line = await child.line();
    assertMatch(line, /^Chat on http:\/\/127\.0\.0\.1:\d+\/$/);
    const url = line.replace("Chat on ", "");

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
}
