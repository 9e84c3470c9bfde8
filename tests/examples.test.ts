/** The examples run as the README says, and their chat can be used by a program as well. */
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { networkInterfaces, tmpdir } from "node:os";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import {
  assert,
  assertEquals,
  assertGreater,
  assertMatch,
  assertStringIncludes,
  type Child,
  once,
  root,
  sleep,
  test,
  type TestContext,
  until,
} from "./harness.ts";
import { connect } from "./pair.ts";

const DENO_FLAGS = "run -N -R --allow-env=HOST,PORT --allow-sys=networkInterfaces";

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
  const connected = connect(t, url);
  const { socket, opened, messages, events } = connected;
  const heard = (type: string) =>
    messages.all.map((data) => JSON.parse(String(data))).filter((message) => message.type === type);
  const send = (message: unknown) => socket.send(JSON.stringify(message));
  const joined = opened.then(() => send({ type: "join", name }));
  return { socket, joined, heard, send, events, closed: () => connected.closed };
}

for (const { name, file, flags } of servers) {
  test(`${file} serves the page, the client and the chat`, async (t) => {
    const child = await t.spawn(name, file, {
      flags: [...flags],
      asItIs: true,
      env: { HOST: "127.0.0.1", PORT: "0" },
    });
    const url = await address(child);

    const page = await fetch(url);
    assertEquals(page.headers.get("content-type"), "text/html; charset=utf-8");
    assertStringIncludes(await page.text(), 'import { WebSocketSSE } from "/client.js"');

    const ai = await fetch(`${url}ai`);
    assertEquals([ai.status, ai.url], [200, `${url}ai/`]);
    assertStringIncludes(await ai.text(), "<title>AI chat: duplex-sse</title>");

    const script = await fetch(`${url}client.js`);
    assertEquals(script.headers.get("content-type"), "text/javascript; charset=utf-8");
    const code = await script.text();
    // A browser takes it: as a module it has the client, and no type is left to stumble over.
    const folder = await mkdtemp(join(tmpdir(), "duplex-example-"));
    t.defer(() => rm(folder, { recursive: true }));
    await writeFile(join(folder, "client.mjs"), code);
    const module = await import(pathToFileURL(join(folder, "client.mjs")).href);
    assertEquals(typeof module.WebSocketSSE, "function");

    const { server, native, addresses } = await (await fetch(`${url}about`)).json();
    assertMatch(server, new RegExp(`^${name.replace(/-.*/, "")} `, "i"));
    assertEquals([native, addresses], [name !== "node-24", []]);

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
        env: { HOST: "127.0.0.1", PORT: "0" },
      });
      const url = await address(child);
      const people = [enter(t, `${url}chat`, "Ada"), enter(t, `${url}chat`, "Grace")];
      for (const { joined } of people) await joined;
      for (const { heard } of people) await until(() => heard("who").at(-1)?.names.length === 2);
      child.kill(signal);
      for (const { closed } of people) {
        const { code, reason, wasClean } = await closed();
        assertEquals([code, reason, wasClean], [1012, "Restarting", true]);
      }
      await child.exited;
      assertEquals(child.stderr(), "");
    }, { timeout: 30_000 });
  }

  test(`${file} deploys a new server, and nobody sees a close`, async (t) => {
    const child = await t.spawn(name, file, {
      flags: [...flags],
      asItIs: true,
      env: { HOST: "127.0.0.1", PORT: "0" },
    });
    const url = await address(child);
    const people = [enter(t, `${url}chat`, "Ada"), enter(t, `${url}chat`, "Grace")];
    for (const { joined } of people) await joined;
    for (const { heard } of people) await until(() => heard("who").at(-1)?.names.length === 2);
    const { closed, said } = name === "node-24" ? NO_SOCKET : await nativeSocket(t, url);
    await press(url, "count", TABS[0]!);
    await press(url, "restart", TABS[0]!);
    for (const { events } of people) {
      await until(() => events.includes("resume"), { timeout: 15_000 });
    }
    people[0]!.send({ type: "say", id: "1", text: "After" });
    for (const { heard, events } of people) {
      await until(() => heard("said").some(({ text }) => text === "40"), { timeout: 20_000 });
      const spoken = heard("said");
      const robot = spoken.filter(({ name }) => name === "Robot").map(({ text }) => text);
      assertEquals(robot, Array.from({ length: 40 }, (_, n) => `${n + 1}`));
      assertEquals(spoken.filter(({ name }) => name === "Ada").map(({ text }) => text), ["After"]);
      assertEquals([events.includes("close"), heard("who").at(-1).names.toSorted()], [
        ...[false, ["Ada", "Grace"]],
      ]);
    }
    await closed;
    assert(said.length < 40, `the native socket heard ${said}`);
    assertEquals(child.stderr(), "");
  }, { timeout: 60_000 });

  test(`${file} cuts and holds the network of the tab that asks, and no other's`, async (t) => {
    const child = await t.spawn(name, file, {
      flags: [...flags],
      asItIs: true,
      env: { HOST: "127.0.0.1", PORT: "0" },
    });
    const url = await address(child);
    const [ada, grace] = TABS.map((tab, n) =>
      enter(t, `${url}chat?tab=${tab}`, ["Ada", "Grace"][n]!)
    );
    for (const { joined, heard } of [ada!, grace!]) {
      await joined;
      await until(() => heard("joined").length > 0);
    }
    for (const tab of ["", "short", "X".repeat(32)]) {
      const refused = await fetch(`${url}cut`, { method: "POST", headers: { "x-chat-tab": tab } });
      assertEquals([refused.status, await refused.text()], [400, "Which tab?\n"]);
    }
    await press(url, "cut", TABS[0]!);
    await once(ada!.socket, "drop");
    ada!.send({ type: "say", id: "1", text: "In a tunnel" });
    grace!.send({ type: "say", id: "2", text: "Ada?" });
    await until(() => grace!.heard("said").length === 1);
    await once(ada!.socket, "resume", { timeout: 15_000 });
    for (const { heard } of [ada!, grace!]) {
      await until(() => heard("said").length === 2);
      assertEquals(heard("said").map(({ id }) => id), ["2", "1"]);
    }

    await press(url, "hold", TABS[0]!);
    const held = performance.now();
    await sleep(200, t.signal); // the answer comes before what it asked for
    ada!.send({ type: "say", id: "3", text: "Held" });
    grace!.send({ type: "say", id: "4", text: "Not held" });
    await until(() => ada!.heard("said").some(({ id }) => id === "4"));
    await until(() => grace!.heard("said").some(({ id }) => id === "3"), { timeout: 15_000 });
    assertGreater(performance.now() - held, 4_500);
    for (const { heard } of [ada!, grace!]) {
      await until(() => heard("said").length === 4);
      assertEquals(heard("said").map(({ id }) => id), ["2", "1", "4", "3"]);
    }
    assertEquals(grace!.events, ["open"]);
    assertEquals(child.stderr(), "");
  }, { timeout: 60_000 });

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

test(
  "without HOST it tells the addresses that a phone can reach, and the page does, too",
  async (t) => {
    const lan = Object.values(networkInterfaces()).flatMap((each) => each ?? [])
      .filter(({ family, internal }) => family === "IPv4" && !internal)
      .map(({ address }) => address);
    for (const { name, file, flags } of servers) {
      const child = await t.spawn(name, file, {
        flags: [...flags],
        asItIs: true,
        env: { HOST: "", PORT: "0" },
      });
      const url = new URL(await address(child));
      const others = lan.map((address) => `http://${address}:${url.port}/`);
      for (const other of others) {
        assertEquals(await child.line(), `From this network: ${other}`);
        const page = await fetch(other);
        assertStringIncludes(await page.text(), "<title>Chat");
      }
      assertEquals((await (await fetch(`${url}about`)).json()).addresses, others);
    }
  },
  { timeout: 30_000 },
);

/** As the page names its tabs. */
const TABS = ["a", "b"].map((digit) => digit.repeat(32));

/** Presses a button of the page. */
async function press(url: string, button: string, tab: string): Promise<void> {
  const response = await fetch(`${url}${button}`, {
    method: "POST",
    headers: { "x-chat-tab": tab },
  });
  assertEquals(response.status, 204);
}

const NO_SOCKET = { closed: Promise.resolve(), said: [] as string[] };

/** A native socket in the room, and what the robot says by it until it closes. */
async function nativeSocket(t: TestContext, url: string) {
  const socket = new WebSocket(`${url.replace("http", "ws")}native?tab=${TABS[1]}`);
  t.defer(() => socket.close());
  const said: string[] = [];
  const closed = once(socket, "close", { timeout: 40_000 });
  socket.addEventListener("message", ({ data }) => {
    const message = JSON.parse(data);
    if (message.name === "Robot") said.push(message.text);
  });
  await once(socket, "open");
  return { closed, said };
}

async function address(child: Child): Promise<string> {
  const line = await child.line();
  assertMatch(line, /^Chat on http:\/\/127\.0\.0\.\d:\d+\/$/);
  return line.replace("Chat on ", "");
}
