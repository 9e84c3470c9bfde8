/**
 * Beside other routes, in frameworks; with hooks that were written for crossws;
 * under libraries that take a WebSocket class. None of them is told anything.
 */
import { execFile } from "node:child_process";
import { cp, mkdir, mkdtemp, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { dirname, join, relative } from "node:path";
import process from "node:process";
import { promisify } from "node:util";
import { Centrifuge } from "centrifuge";
import { defineHooks } from "crossws";
import { defineWebSocketHandler, H3 } from "h3";
import { Hono } from "hono";
import { WebSocket as PartySocket } from "partysocket";
import { WebSocketSSE } from "../client.ts";
import { sseAdapter } from "../server.ts";
import { converse } from "./conversation.ts";
import {
  assertEquals,
  assertMatch,
  assertStringIncludes,
  binary,
  deferred,
  freePort,
  needs,
  root,
  runtime,
  test,
  type TestContext,
  testOnce,
  until,
  within,
} from "./harness.ts";
import { listen, Queue, shutDown } from "./pair.ts";
import { mounts, recipes } from "./project.ts";
import { room } from "./room.ts";
import { withoutTypes } from "./spawn.ts";
import { frame, wireClient } from "./wire.ts";

const { hooks: _, ...options } = room;

/** The hooks of the room, as a crossws project has them. */
const hooks = defineHooks({
  open(peer) {
    peer.subscribe("room");
    peer.send("welcome");
  },
  message(peer, message) {
    const text = message.text();
    if (text.startsWith("tell ")) peer.publish("room", text.slice(5));
    else peer.send(message.rawData);
  },
  close(peer, { code, reason }) {
    peer.publish("room", `left ${code} ${reason}`);
  },
});

/** The other routes answer as if we were not there. */
async function checkOthers(url: string): Promise<void> {
  assertEquals(await (await fetch(url)).text(), "the page");
  assertEquals(await (await fetch(`${url}/room`)).text(), "about the room");
  const missing = await fetch(`${url}/missing`);
  await missing.text();
  assertEquals(missing.status, 404);
}

test("in Hono, beside other routes", async (t) => {
  const addresses: (string | undefined)[] = [];
  const ws = sseAdapter({
    ...room,
    resolve: () => ({ open: (peer) => void addresses.push(peer.remoteAddress) }),
  });
  t.defer(() => shutDown(ws));
  const app = new Hono();
  app.get("/", (c) => c.text("the page"));
  app.use("/room", (c, next) => ws.handles(c.req.raw) ? ws.fetch(c.req.raw, c.env) : next());
  app.get("/room", (c) => c.text("about the room"));
  const server = await t.serve(app.fetch);
  await checkOthers(server.url);
  await converse(t, server);
  assertEquals(new Set(addresses), new Set(["127.0.0.1"]));
}, { timeout: 40_000 });

/** So that one runtime of the tests does not start them all. */
const testOnBun: typeof test = (...args) => {
  if (runtime === "bun") test(...args);
};

testOnBun("in Oak as npm has it, between middleware", async (t) => {
  const ws = sseAdapter(room);
  t.defer(() => shutDown(ws));
  const { Application } = await import("@oakserver/oak");
  const app = new Application();
  const [code] = await mounts("Oak");
  new Function("app", "ws", code!.replaceAll("!", ""))(app, ws);
  app.use((c) => {
    const { pathname } = c.request.url;
    if (pathname === "/") c.response.body = "the page";
    if (pathname === "/room") c.response.body = "about the room";
  });
  // Of npm, it answers with the classes of undici, whatever the runtime has.
  const server = await t.serve(async (request) => {
    const { body, status, headers } = (await app.handle(request as never))!;
    return new Response(body as BodyInit | null, { status, headers: [...headers] });
  });
  await checkOthers(server.url);
  await converse(t, server);
}, { timeout: 40_000 });

test("in h3, by the hooks of defineWebSocketHandler", async (t) => {
  const app = new H3();
  app.get("/", () => "the page");
  app.all(
    "/room",
    (event) => event.req.headers.get("accept") === "*/*" ? "about the room" : socket(event),
  );
  const socket = defineWebSocketHandler(hooks);
  const ws = sseAdapter({
    ...options,
    resolve: async (request) => (await app.fetch(request) as { crossws?: typeof hooks }).crossws,
  });
  t.defer(() => shutDown(ws));
  const server = await t.serve((request, info) =>
    ws.handles(request) ? ws.fetch(request, info) : app.fetch(request)
  );
  await checkOthers(server.url);
  await converse(t, server);
}, { timeout: 40_000 });

test("in a plain fetch router, by the hooks of crossws's defineHooks", async (t) => {
  const ws = sseAdapter({ ...options, hooks });
  t.defer(() => shutDown(ws));
  const routes: Record<string, (request: Request, info: unknown) => Response | Promise<Response>> =
    {
      "/": () => new Response("the page"),
      "/room": (request, info) =>
        ws.handles(request) ? ws.fetch(request, info) : new Response("about the room"),
    };
  const server = await t.serve((request, info) => {
    const route = routes[new URL(request.url).pathname];
    return route ? route(request, info) : new Response("Not found", { status: 404 });
  });
  await checkOthers(server.url);
  await converse(t, server);
}, { timeout: 40_000 });

for (
  const framework of [
    "express",
    "express, mounted at a path",
    "fastify",
    "koa",
    "hono",
    "nestjs",
  ]
) {
  test(`on Node, in ${framework}, beside other routes`, async (t) => {
    const child = await t.spawn("node-24", "tests/fixtures/framework.ts", { args: [framework] });
    const port = Number(await child.line());
    const url = `http://127.0.0.1:${port}`;
    await checkOthers(url);
    const echoed = await fetch(`${url}/echo`, {
      method: "POST",
      headers: { "content-type": "text/plain" }, // Bun sends none by itself
      body: "a body",
    });
    assertEquals(await echoed.text(), "a body");
    await converse(t, { port });
    await checkOthers(url);
  }, { timeout: 40_000 });
}

/** A folder that has these files and what this checkout has installed. */
async function project(t: TestContext, files: Record<string, string>): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), "duplex-framework-"));
  t.defer(() => rm(folder, { recursive: true }));
  const all = {
    "package.json": JSON.stringify({ private: true, type: "module" }),
    "ws.js": `import { sseAdapter } from "${relative(folder, root)}/server.ts";
      import { room } from "${relative(folder, root)}/tests/room.ts";
      export const ws = globalThis.ws ??= sseAdapter(room);`,
    ...files,
  };
  for (const [name, text] of Object.entries(all)) {
    await mkdir(dirname(join(folder, name)), { recursive: true });
    await writeFile(join(folder, name), text);
  }
  await symlink(join(root, "node_modules"), join(folder, "node_modules"));
  return folder;
}

/** The framework's own compiler, in such a folder. */
async function build(
  t: TestContext,
  files: Record<string, string>,
  [program, ...args]: string[],
): Promise<string> {
  const folder = await project(t, files);
  const script = [join(root, "node_modules", program!), ...args];
  const env = { ...process.env, NUXT_TELEMETRY_DISABLED: "1", ASTRO_TELEMETRY_DISABLED: "1" };
  await promisify(execFile)(binary("node-24")!, script, { cwd: folder, env });
  return folder;
}

/** What was built, until it answers. */
async function launch(t: TestContext, script: string) {
  const port = await freePort();
  await t.spawn("node-24", script, {
    env: { PORT: `${port}`, HOST: "127.0.0.1", BODY_SIZE_LIMIT: "Infinity" },
  });
  const url = `http://127.0.0.1:${port}`;
  await until(() => fetch(url).then((answer) => answer.text(), () => ""), { timeout: 20_000 });
  return { port, url };
}

testOnce("in Nitro, built for Node", async (t) => {
  const recipe = (await recipes("Nitro"))[0]!;
  const folder = await build(t, {
    "nitro.config.ts": 'export default { serverDir: "./" };',
    "routes/index.ts": 'export default () => "the page";',
    "routes/room.ts": `import { defineHandler } from "nitro/h3";
      import { ws } from "../ws.js";
      const socket = ${recipe.replace("export default ", "")};
      export default defineHandler((event) =>
        ws.handles(event.req) ? socket(event) : "about the room");`,
  }, ["nitro/dist/cli/index.mjs", "build"]);
  const { port, url } = await launch(t, join(folder, ".output", "server", "index.mjs"));
  await checkOthers(url);
  await converse(t, { port });
}, { timeout: 90_000, skip: needs("node-24") });

testOnBun("in SvelteKit, built for Node", async (t) => {
  const page = 'export const GET = () => new Response("the page");';
  const folder = await build(t, {
    "svelte.config.js": `import adapter from "@sveltejs/adapter-node";
      export default { kit: { adapter: adapter() } };`,
    "vite.config.js": `import { sveltekit } from "@sveltejs/kit/vite";
      export default { plugins: [sveltekit()] };`,
    "src/app.html": "%sveltekit.head%%sveltekit.body%",
    "src/routes/+server.ts": page,
    "src/routes/room/+server.ts": `import { ws } from "../../../ws.js";
      ${(await recipes("SvelteKit"))[0]}`,
  }, ["vite/bin/vite.js", "build"]);
  const { port, url } = await launch(t, join(folder, "build", "index.js"));
  assertEquals(await (await fetch(url)).text(), "the page");
  await converse(t, { port });
}, { timeout: 90_000, skip: needs("node-24") });

testOnce("in Nuxt, built for Node", async (t) => {
  const recipe = (await recipes("Nuxt"))[0]!;
  const folder = await build(t, {
    "nuxt.config.ts": 'export default { compatibilityDate: "2026-01-01" };',
    "app/app.vue": "<template><p>the page</p></template>",
    "server/routes/room.ts": `import { ws } from "../../ws.js";
      const socket = ${recipe.replace("export default ", "")};
      export default defineEventHandler((event) =>
        ws.handles(toWebRequest(event)) ? socket(event) : "about the room");`,
  }, ["nuxt/bin/nuxt.mjs", "build"]);
  const { port, url } = await launch(t, join(folder, ".output", "server", "index.mjs"));
  assertStringIncludes(await (await fetch(url)).text(), "<p>the page</p>");
  assertEquals(await (await fetch(`${url}/room`)).text(), "about the room");
  await converse(t, { port });
}, { timeout: 120_000, skip: needs("node-24") });

for (const mode of ["standalone", "middleware"]) {
  testOnBun(`in Astro, built for Node as ${mode}`, async (t) => {
    const page = `export const prerender = false;
      export const GET = () => new Response("the page");`;
    const folder = await build(t, {
      // Bundled whole: what Astro imports is not what stands first in our node_modules.
      "astro.config.mjs": `import node from "@astrojs/node";
        export default {
          adapter: node({ mode: "${mode}" }),
          vite: { ssr: { noExternal: true } },
        };`,
      "src/pages/index.ts": page,
      "src/pages/room.ts": `import { ws } from "../../ws.js";
        ${(await recipes("Astro")).join("\n")}`,
      "main.js": `import { handler } from "./dist/server/entry.mjs";
        import { createServer } from "node:http";
        createServer(handler).listen(process.env.PORT, "127.0.0.1");`,
    }, ["astro/bin/astro.mjs", "build"]);
    const main = mode === "standalone" ? join("dist", "server", "entry.mjs") : "main.js";
    const { port, url } = await launch(t, join(folder, main));
    assertEquals(await (await fetch(url)).text(), "the page");
    await converse(t, { port });
  }, { timeout: 90_000, skip: needs("node-24") });
}

testOnBun("in React Router, built for Node", async (t) => {
  const folder = await build(t, {
    // It would install what is not named here.
    "package.json": JSON.stringify({
      ...{ private: true, type: "module" },
      dependencies: { "@react-router/node": "*", isbot: "*" },
    }),
    "vite.config.js": `import { reactRouter } from "@react-router/dev/vite";
      export default { plugins: [reactRouter()] };`,
    "app/root.jsx": `import { Outlet } from "react-router";
      export default () => <Outlet />;`,
    "app/routes.ts": `export default [
        { file: "page.jsx", index: true },
        { file: "room.ts", path: "room" },
      ];`,
    "app/page.jsx": "export default () => <p>the page</p>;",
    "app/room.ts": `import { ws } from "../ws.js";
      ${(await recipes("React Router"))[0]}`,
    "main.js": `import { createServer } from "node:http";
      import { createRequestHandler } from "react-router";
      import { toNodeHandler } from "${root}/node.ts";
      import * as build from "./build/server/index.js";
      const handle = createRequestHandler(build, "production");
      createServer(toNodeHandler({ fetch: (request) => handle(request) }))
        .listen(process.env.PORT, "127.0.0.1");`,
  }, ["@react-router/dev/bin.cjs", "build"]);
  const { port, url } = await launch(t, join(folder, "main.js"));
  assertStringIncludes(await (await fetch(url)).text(), "<p>the page</p>");
  await converse(t, { port });
}, { timeout: 90_000, skip: needs("node-24") });

/**
 * What npm has of Oak is made for Node: whatever Deno has itself comes from packages there. And Oak
 * 14 takes a Deno that has `global` for Node.
 */
const denosOwn = `const { Blob, crypto, Deno, fetch, File, FormData, Headers, Request, Response } =
    globalThis;
  export { Blob, crypto, Deno, fetch, File, FormData, Headers, Request, Response };
  export const dntGlobalThis = new Proxy(globalThis, {
    has: (all, name) => name !== "global" && name in all,
  });`;

testOnce("in Oak on Deno, by its own server", async (t) => {
  const folder = await project(t, {
    "main.ts": `import { Application } from "./oak/mod.js";
      import { ws } from "./ws.js";
      const app = new Application();
      ${(await mounts("Oak"))[0]};
      app.use((c) => {
        const { pathname } = c.request.url;
        if (pathname === "/") c.response.body = "the page";
        if (pathname === "/room") c.response.body = "about the room";
      });
      app.addEventListener("listen", ({ port, serverType }) => console.log(serverType, port));
      await app.listen({ hostname: "127.0.0.1", port: 0 });`,
  });
  await cp(join(root, "node_modules/@oakserver/oak/esm"), join(folder, "oak"), { recursive: true });
  await writeFile(join(folder, "oak", "_dnt.shims.js"), denosOwn);
  const child = await t.spawn("deno", join(folder, "main.ts"));
  const [server, port] = (await child.line()).split(" ");
  assertEquals(server, "native");
  await checkOthers(`http://127.0.0.1:${port}`);
  await converse(t, { port: Number(port) });
}, { timeout: 40_000 });

/** How these call the functions that a route exports: each with its own argument. */
const contracts = {
  "Next.js": (request: Request) => request,
  SvelteKit: (request: Request) => ({ request }),
  Astro: (request: Request) => ({ request }),
  "React Router": (request: Request) => ({ request }),
};

for (const [framework, argument] of Object.entries(contracts)) {
  test(`the route of docs/frameworks.md for ${framework}, called as it calls it`, async (t) => {
    const [code] = await recipes(framework);
    const ws = sseAdapter(room);
    t.defer(() => shutDown(ws));
    const route = new Function(
      "ws",
      `${withoutTypes(code!).replaceAll("export ", "")}
      return { ${code!.match(/(?<=export const )\w+/g)!.join()} };`,
    )(ws);
    assertEquals(
      Object.keys(route),
      {
        "Next.js": ["GET", "POST", "OPTIONS"],
        SvelteKit: ["GET", "POST"],
        Astro: ["ALL"],
        "React Router": ["loader", "action"],
      }[framework]!,
    );
    const server = await t.serve((request) => {
      const called = framework === "React Router"
        ? request.method === "GET" ? route.loader : route.action
        : route[request.method] ?? route.ALL;
      return called(argument(request));
    });
    await converse(t, server);
  }, { timeout: 40_000 });
}

test("on Node, behind a body parser: 400, and one word to onError of what stands before us", async (t) => {
  const child = await t.spawn("node-24", "tests/fixtures/framework.ts", {
    args: ["express, behind a body parser"],
  });
  const url = `http://127.0.0.1:${await child.line()}/room`;
  const session = await wireClient(t, url);
  for (let i = 0; i < 2; i++) {
    const refused = await session.post(frame("TEXT", "hi"));
    assertStringIncludes(await refused.text(), "a body parser");
    assertEquals([refused.status, refused.headers.get("x-duplex-received")], [400, null]);
  }
  assertMatch(await child.line(), /^onError: Error: The body did not arrive: a body parser/);
});

test("on Node, fetch as it is in a route: 500, and the name of what is to be used", async (t) => {
  const child = await t.spawn("node-24", "tests/fixtures/framework.ts", {
    args: ["express, by fetch alone"],
  });
  const response = await fetch(`http://127.0.0.1:${await child.line()}/room`);
  assertEquals(response.status, 500);
  assertStringIncludes(await response.text(), "toNodeHandler(ws)");
});

for (const runtime of ["deno", "bun"] as const) {
  test(`examples/graphql.ts: graphql-ws on both ends, on ${runtime}`, async (t) => {
    const child = await t.spawn(runtime, "examples/graphql.ts");
    const lines: unknown[] = [];
    for await (const line of child.lines()) lines.push(JSON.parse(line));
    assertEquals(lines, [
      { hello: "Hello, Ada!" },
      ...[3, 2, 1, 0].map((countdown) => ({ countdown })),
    ]);
    assertEquals([(await child.exited).code, child.stderr()], [0, ""]);
  }, { timeout: 20_000 });
}

/** The class for libraries that let go of a socket before it has closed: the test waits for it. */
function awaited(t: TestContext): typeof WebSocketSSE {
  const sockets: WebSocketSSE[] = [];
  t.defer(() => until(() => sockets.every(({ readyState }) => readyState === 3)));
  return class extends WebSocketSSE {
    constructor(...init: ConstructorParameters<typeof WebSocketSSE>) {
      super(...init);
      sockets.push(this);
    }
  };
}

test("partysocket reconnects after what we cannot resume", async (t) => {
  const server = await listen(t, room);
  const messages = new Queue<unknown>();
  let closes = 0;
  const socket = new PartySocket(`${server.url}/room`, [], {
    WebSocket: awaited(t),
    minReconnectionDelay: 10,
    maxReconnectionDelay: 50,
  });
  t.defer(() => socket.close());
  socket.addEventListener("message", ({ data }) => messages.push(data));
  socket.addEventListener("close", () => closes++); // at an error it makes up an event of its own, with 1000
  socket.send("queued before the opening");
  assertEquals(await messages.take(2), ["welcome", "queued before the opening"]);
  for (const peer of server.ws.peers.get("/room")!) peer.terminate(); // as when its instance is gone
  assertEquals(await messages.next(), "welcome");
  assertEquals(closes, 1);
  socket.send("again");
  assertEquals(await messages.next(), "again");
  const closed = deferred();
  socket.addEventListener("close", () => closed.resolve());
  socket.close(1000);
  await within(closed.promise, 5_000, "closing");
});

test("partysocket tells of a refusal what it tells of a native WebSocket's", async (t) => {
  const { url } = await t.serve(() => new Response("no", { status: 404 }));
  const told = async (WebSocket: unknown) => {
    const socket = new PartySocket(url, [], { WebSocket, maxRetries: 0 });
    t.defer(() => socket.close());
    const closes = new Queue<[code: number, reason: string, wasClean: boolean]>();
    socket.addEventListener("close", (event) => {
      closes.push([event.code, event.reason, event.wasClean]);
    });
    return await closes.next();
  };
  assertEquals(await told(awaited(t)), await told(WebSocket));
});

test("centrifuge connects, subscribes and publishes, and again after what we cannot resume", async (t) => {
  const server = await listen(t, {
    hooks: {
      message(peer, message) {
        // A command on each line, as Centrifugo takes them.
        for (const line of message.text().split("\n")) {
          const { id, publish, ...command } = JSON.parse(line);
          const [kind] = Object.keys(publish ? { publish } : command);
          const reply = kind === "connect" ? { client: peer.id, version: "1" } : {};
          peer.send(JSON.stringify({ id, [kind!]: reply }));
          if (publish) {
            const { channel, data } = publish;
            peer.send(JSON.stringify({ push: { channel, pub: { data } } }));
          }
        }
      },
    },
  });
  const client = new Centrifuge(`${server.url.replace("http", "ws")}/connection`, {
    websocket: awaited(t),
    minReconnectDelay: 10,
    maxReconnectDelay: 50,
  });
  t.defer(() => client.disconnect());
  const publications = new Queue<unknown>();
  const transports = new Queue<string>();
  client.on("connected", ({ transport }) => transports.push(transport));
  const news = client.newSubscription("news");
  news.on("publication", ({ data }) => publications.push(data));
  news.subscribe();
  client.connect();
  await news.ready(5_000);
  await news.publish({ n: 1 });
  assertEquals(await publications.next(), { n: 1 });
  for (const peer of server.ws.peers.get("/connection")!) peer.terminate();
  assertEquals(await transports.take(2), ["websocket", "websocket"]);
  await news.ready(5_000);
  await news.publish({ n: 2 });
  assertEquals(await publications.next(), { n: 2 });
});
