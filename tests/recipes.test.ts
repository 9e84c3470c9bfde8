/** Each recipe of docs/recipes.md, as it stands there: in Chromium, in vitest, by curl, or here. */
import { execFile, spawn } from "node:child_process";
import { readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { promisify } from "node:util";
import { type SSEAdapter, sseAdapter } from "../server.ts";
import { esbuild } from "./bundle.ts";
import { clientScript, startChromium } from "./chromium.ts";
import {
  assertEquals,
  assertMatch,
  assertStringIncludes,
  binary,
  freePort,
  needs,
  root,
  serve,
  sleep,
  test,
  type TestContext,
  until,
} from "./harness.ts";
import { connect, listen, shutDown } from "./pair.ts";
import { project, recipeOf } from "./project.ts";

const browser = await startChromium();
const skip = needs("chromium");

const recipe = (name: string) => recipeOf("docs/recipes.md", name);

const echo = () => {
  const seen = { opened: 0, codes: [] as number[] };
  const ws = sseAdapter({
    bidir: true,
    resumeTimeout: 2_000,
    hooks: {
      open: () => void seen.opened++,
      message: (peer, message) => void peer.send(`echo: ${message}`),
      close: (_, { code }) => void seen.codes.push(code!),
    },
  });
  return { ws, seen };
};

/** A page that runs a program with these recipes beside it. */
async function open(
  t: TestContext,
  main: string,
  names: string[],
  files: Record<string, string> = {},
) {
  const { ws, seen } = echo();
  t.defer(() => shutDown(ws));
  const sources = { "main.tsx": main };
  for (const name of names) Object.assign(sources, { [name]: await recipe(name) });
  const folder = await project(t, sources);
  const scripts = new Map<string, string>(Object.entries(files));
  for (const name of ["main.tsx", ...names.filter((name) => name === "worker.ts")]) {
    const options = [
      "--bundle",
      "--format=esm",
      "--jsx=automatic",
      '--define:process.env.NODE_ENV="development"',
    ];
    scripts.set(
      `/${name.replace(/\.\w+$/, ".js")}`,
      await esbuild([name, ...options], { cwd: folder }),
    );
  }
  const server = await t.serve((request, info) => {
    if (ws.handles(request)) return ws.fetch(request, info);
    const script = scripts.get(new URL(request.url).pathname);
    const html = scripts.get("/") ??
      '<div id="app"></div><script type="module" src="/main.js"></script>';
    return script === undefined || script === scripts.get("/")
      ? new Response(`<!doctype html><title>-</title><link rel="icon" href="data:,">${html}`, {
        headers: { "content-type": "text/html" },
      })
      : new Response(script, { headers: { "content-type": "text/javascript" } });
  });
  const page = await (await browser.windows(t)).newPage();
  await page.goto(server.url);
  const titled = (title: string) =>
    page.waitForFunction((title) => document.title === title, title, { timeout: 15_000 });
  return { page, titled, seen, ws };
}

const options = { timeout: 40_000, skip };

test("React, whose StrictMode mounts twice", async (t) => {
  const main = `
    import { StrictMode, useEffect, useState } from "react";
    import { createRoot } from "react-dom/client";
    import { useSocket } from "./react.tsx";
    function Room() {
      const { messages, socket } = useSocket("/room");
      useEffect(() => socket?.send("hello"), [socket]);
      document.title = messages.join();
      return null;
    }
    const root = createRoot(document.getElementById("app"));
    root.render(<StrictMode><Room /></StrictMode>);
    window.unmount = () => root.unmount();`;
  const { page, titled, seen, ws } = await open(t, main, ["react.tsx"]);
  await titled("echo: hello");
  assertEquals([...ws.peers.values()].reduce((sum, peers) => sum + peers.size, 0), 1);
  await page.evaluate("unmount()");
  await until(() => seen.codes.length === seen.opened);
  assertEquals(seen.codes.at(-1), 1000);
}, options);

test("Vue", async (t) => {
  const main = `
    import { effectScope, watchEffect } from "vue";
    import { useSocket } from "./vue.ts";
    const scope = effectScope();
    scope.run(() => {
      const { messages, socket } = useSocket("/room");
      socket.onopen = () => socket.send("hello");
      watchEffect(() => document.title = messages.value.join());
    });
    window.unmount = () => scope.stop();`;
  const { page, titled, seen } = await open(t, main, ["vue.ts"]);
  await titled("echo: hello");
  await page.evaluate("unmount()");
  await until(() => seen.codes.length === 1);
  assertEquals(seen, { opened: 1, codes: [1000] });
}, options);

test("Svelte", async (t) => {
  const main = `
    import { messages } from "./svelte.ts";
    const leave = messages("/room", "hello").subscribe((all) => document.title = all.join());
    window.unmount = leave;`;
  const { page, titled, seen } = await open(t, main, ["svelte.ts"]);
  await titled("echo: hello");
  await page.evaluate("unmount()");
  await until(() => seen.codes.length === 1);
  assertEquals(seen, { opened: 1, codes: [1000] });
}, options);

test("a worker", async (t) => {
  const main = `
    const worker = new Worker("/worker.js", { type: "module" });
    worker.onmessage = ({ data }) => data === "open" ? worker.postMessage("hello") : document.title = data;
    window.unmount = () => worker.postMessage("close");`;
  const { page, titled, seen } = await open(t, main, ["worker.ts"]);
  await titled("echo: hello");
  await page.evaluate("unmount()");
  await until(() => seen.codes.length === 1);
  assertEquals(seen, { opened: 1, codes: [1000] });
}, options);

test("behind a service worker", async (t) => {
  const main = `
    import { WebSocketSSE } from "duplex-sse/client";
    await navigator.serviceWorker.register("/service-worker.js");
    await navigator.serviceWorker.ready;
    if (!navigator.serviceWorker.controller) location.reload();
    else {
      const socket = new WebSocketSSE("/room");
      socket.onopen = () => socket.send("hello");
      socket.onmessage = ({ data }) => document.title = data;
    }`;
  const script = await recipe("service-worker.js");
  const { titled } = await open(t, main, [], { "/service-worker.js": script });
  await titled("echo: hello");
}, options);

test("a page without a bundler", async (t) => {
  const text = await readFile(join(root, "docs/recipes.md"), "utf8");
  const [, html] = /^```html\n([^]*?)^```$/m.exec(text)!;
  const { titled } = await open(t, "", [], { "/": html!, "/client.js": await clientScript() });
  await titled("echo: hello");
}, options);

test("Vite's proxy, and a module that it replaces", async (t) => {
  const { ws, seen } = echo();
  t.defer(() => shutDown(ws));
  const server = await t.serve((request, info) => ws.fetch(request, info));
  const config = (await recipe("vite.config.js")).replace("http://127.0.0.1:8000", server.url);
  const hot = await recipe("hot.ts");
  const folder = await project(t, {
    "package.json": '{ "type": "module" }',
    "vite.config.js": config.replace("server: {", `server: { fs: { strict: false }, `),
    "index.html":
      '<!doctype html><title>-</title><link rel="icon" href="data:,"><script type="module" src="/main.ts"></script>',
    "main.ts": 'import "./hot.ts"; import.meta.hot?.accept("./hot.ts");',
    "hot.ts": hot,
  });
  const port = await freePort();
  const vite = spawn(binary("node-24") ?? "node", [
    join(root, "node_modules/vite/bin/vite.js"),
    ...["--host", "127.0.0.1", "--port", `${port}`, "--strictPort"],
  ], { cwd: folder, stdio: ["ignore", "pipe", "pipe"] });
  const exited = new Promise((resolve) => vite.on("close", resolve));
  t.defer(async () => {
    vite.kill();
    await exited;
  });
  let printed = "";
  for (const output of [vite.stdout, vite.stderr]) {
    output.setEncoding("utf8").on("data", (text: string) => printed += text);
  }
  await until(() => printed.includes(`${port}`), { timeout: 20_000 });
  const { socket, opened, messages } = connect(t, `http://127.0.0.1:${port}/room`, {
    transport: "post",
  });
  await opened;
  socket.send("hello");
  assertEquals(await messages.next(), "echo: hello");

  const page = await (await browser.windows(t)).newPage();
  await page.goto(`http://127.0.0.1:${port}/`);
  await until(() => seen.opened === 2, { timeout: 20_000 });
  await writeFile(
    join(folder, "hot.ts"),
    (await readFile(join(folder, "hot.ts"), "utf8")) + "// new\n",
  );
  await until(() => seen.opened === 3 && seen.codes.length === 1, { timeout: 20_000 });
  assertEquals(seen.codes, [1000], printed);
}, { timeout: 90_000, skip });

/** Either recipe's `send`, to a URL. */
const senders: Record<string, (t: TestContext, url: string) => Promise<(text: string) => void>> = {
  async "again.ts"(t, url) {
    const text = (await recipe("again.ts")).replace('"/room"', JSON.stringify(url));
    const folder = await project(t, { "again.ts": text });
    return (await import(`file://${folder}/again.ts`)).send;
  },
  async "reconnecting.ts"(t, url) {
    const folder = await project(t, { "reconnecting.ts": await recipe("reconnecting.ts") });
    return (await import(`file://${folder}/reconnecting.ts`)).reconnecting(url, () => {});
  },
};

const againAfterALoss = (name: string) => async (t: TestContext) => {
  t.expect("a request came for a session of another instance"); // which the second server has not
  const got: string[] = [];
  const hooks = {
    message: (_: unknown, message: { text(): string }) => void got.push(message.text()),
  };
  const port = await freePort();
  const start = async (): Promise<{ ws: SSEAdapter; end(): Promise<void> }> => {
    const ws = sseAdapter({ bidir: true, resumeTimeout: 300, hooks });
    const server = await serve((request, info) => ws.fetch(request, info), { port });
    return {
      ws,
      async end() { // as a process that is killed
        await server.close();
        for (const peers of ws.peers.values()) for (const peer of peers) peer.terminate();
        await ws.close(1001, "", { signal: AbortSignal.abort() });
      },
    };
  };
  const first = await start();
  const send = await senders[name]!(t, `http://127.0.0.1:${port}/room`);
  send("before it was open");
  await until(() => got.length === 1);
  await sleep(100); // for what acknowledges it
  for (let n = 0; n < 50; n++) send(`${n} to the first`);
  await first.end();
  for (let n = 0; n < 50; n++) send(`${n} between`);
  const second = await start();
  await until(() => got.includes("49 between"), { timeout: 20_000 });
  send("to the second");
  await until(() => got.includes("to the second"));
  const all = [
    ...["before it was open"],
    ...Array.from({ length: 50 }, (_, n) => `${n} to the first`),
    ...Array.from({ length: 50 }, (_, n) => `${n} between`),
    "to the second",
  ];
  assertEquals(all.filter((text) => !got.includes(text)), []);
  const firsts = got.filter((text, at) => got.indexOf(text) === at);
  assertEquals(firsts, all, "in order");
  assertEquals(got.filter((text) => text === all[0]).length, 1, "acknowledged, so not sent again");
  // The clean end: 1000 is the one that it does not come back from.
  for (const peers of second.ws.peers.values()) for (const peer of peers) peer.close(1000);
  await until(() => [...second.ws.peers.values()].every((peers) => peers.size === 0));
  await second.end();
};

for (const name of Object.keys(senders)) {
  const title = `connecting again after 1006 loses nothing that was queued (${name})`;
  test(title, againAfterALoss(name), { timeout: 60_000 });
}

test("authentication by cookie, bearer token and ticket; renewed and revoked", async (t) => {
  const folder = await project(t, { "auth.ts": await recipe("auth.ts") });
  const [cookies, tokens, tickets] = ["c", "b", "t"].map((key) => new Map([[key, `by ${key}`]]));
  const declared = { cookies, tokens, tickets };
  Object.assign(globalThis, declared);
  t.defer(() => Object.keys(declared).forEach((name) => Reflect.deleteProperty(globalThis, name)));
  const { ws } = await import(`file://${folder}/auth.ts`) as { ws: SSEAdapter };
  t.defer(() => shutDown(ws));
  const server = await t.serve((request, info) => ws.fetch(request, info));
  const transport = "post";
  let token = "b";
  const enter = (query: string, headers?: () => HeadersInit) =>
    connect(t, `${server.url}/room${query}`, { transport, ...headers && { headers } });
  const people = {
    "by c": enter("", () => ({ cookie: "session=c" })),
    "by b": enter("", () => ({ authorization: `Bearer ${token}` })),
    "by t": enter("?ticket=t"),
  };
  for (const [user, { socket, opened, messages }] of Object.entries(people)) {
    await opened;
    for (const text of ["one", "two"]) {
      socket.send(text);
      assertEquals(await messages.next(), `${user}: ${text}`);
    }
  }
  for (const [query, cookie] of [["", ""], ["?ticket=t", ""], ["", "session=x"]] as const) {
    const stranger = enter(query, () => ({ cookie }));
    assertEquals((await stranger.closed).code, 1006);
  }

  tokens!.set("b2", "by b");
  tokens!.delete("b");
  token = "b2"; // the next request has it
  people["by b"].socket.send("renewed");
  assertEquals(await people["by b"].messages.next(), "by b: renewed");
  tokens!.set("c2", "by c");
  token = "c2"; // somebody else's, which is valid
  people["by b"].socket.send("as somebody else");
  assertEquals((await people["by b"].closed).code, 1006);
  cookies!.delete("c"); // revoked
  const statuses: (number | undefined)[] = [];
  people["by c"].socket.addEventListener("error", ({ status }) => void statuses.push(status));
  people["by c"].socket.send("still there?");
  assertEquals((await people["by c"].closed).code, 1006);
  assertEquals(statuses, [401]);
  people["by t"].socket.close(1000);
  await people["by t"].closed;
}, { timeout: 30_000 });

test("one's own app in vitest, with node, jsdom and happy-dom, without a port", async (t) => {
  const own = await recipe("app.test.ts");
  const stubbed = own.replace("{ expect, test }", "{ expect, test, vi }").replace(
    /(const socket = .+), \{\s+fetch: (.+),\s+\}\)/,
    'vi.stubGlobal("fetch", $2);\n$1)',
  );
  assertStringIncludes(stubbed, 'WebSocketSSE("http://test/room");');
  const folder = await project(t, {
    "package.json": '{ "type": "module" }',
    "app.test.ts": own,
    "stubbed.test.ts": stubbed,
  });
  const vitest = join(root, "node_modules/vitest/vitest.mjs");
  for (const environment of ["node", "jsdom", "happy-dom"]) {
    const args = [vitest, "run", "--environment", environment, "--reporter=verbose"];
    const run = promisify(execFile)(binary("node-24") ?? "node", args, {
      cwd: folder,
      env: { ...process.env, NO_COLOR: "1" },
    });
    const { stdout } = await run.catch((error) => error);
    assertMatch(stdout, /Tests +2 passed/, environment);
  }
}, { timeout: 90_000, skip: needs("node-24") });

test("a session by curl", async (t) => {
  const text = await readFile(join(root, "docs/recipes.md"), "utf8");
  const [watch, send] = [...text.matchAll(/^```sh\n(.*)\n```$/gm)].map((match) => match[1]!);
  const { ws } = echo();
  t.defer(() => shutDown(ws));
  const server = await t.serve((request, info) => ws.fetch(request, info));
  const shell = (line: string) =>
    line.replace("http://127.0.0.1:8000", server.url).replace(/^curl/, "exec curl");
  const child = spawn("bash", ["-c", shell(watch!)]);
  const exited = new Promise((resolve) => child.on("close", resolve));
  t.defer(() => {
    child.kill();
    return exited;
  });
  let heard = "";
  child.stdout.setEncoding("utf8").on("data", (text: string) => heard += text);
  const token = await until(() => /event: crossws-id\ndata: (\S+)/.exec(heard)?.[1]);
  await promisify(execFile)("bash", ["-c", shell(send!)], {
    env: { ...process.env, TOKEN: token },
  });
  await until(() => heard.includes("data: echo: hello"));
}, { skip: needs("curl") });

test("what the page of recipes says of versions: the wire's is in each answer", async (t) => {
  const { url } = await listen(t, { bidir: true });
  const answer = await fetch(url, {
    headers: { accept: "text/event-stream", "x-duplex-version": "1" },
  });
  assertEquals(answer.headers.get("x-duplex-version"), "1");
  await answer.body!.cancel();
  const text = await readFile(join(root, "PROTOCOL.md"), "utf8");
  assertStringIncludes(text, "x-duplex-version: 1");
});
