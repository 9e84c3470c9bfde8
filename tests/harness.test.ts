/** The harness itself: a failure must be one, and nothing may be left open. */
import {
  assert,
  assertEquals,
  assertRejects,
  assertStrictEquals,
  assertStringIncludes,
  assertThrows,
  deferred,
  needs,
  nodes,
  note,
  older,
  once,
  rawRequest,
  run,
  type Runtime,
  runtime,
  sleep,
  test,
  until,
} from "./harness.ts";
import { fallback } from "./assert.ts";

const encoder = new TextEncoder();

test("a failed assertion fails its test, and what it opened is closed", async () => {
  const closed: string[] = [];
  const error = await assertRejects(() =>
    run("inner", (t) => {
      t.defer(() => closed.push("first"));
      t.defer(() => closed.push("second"));
      note("seed 7");
      assertEquals(1, 2);
    }, 1000)
  );
  assertEquals(closed, ["second", "first"]);
  assertStringIncludes((error as Error).message, "seed 7");
});

test("a test that takes too long fails, and its signal is aborted", async () => {
  let signal: AbortSignal | undefined;
  const error = await assertRejects(() =>
    run("inner", (t) => {
      signal = t.signal;
      return new Promise<void>(() => {});
    }, 20)
  );
  assertStringIncludes((error as Error).message, "20 ms");
  assert(signal?.aborted);
});

test("a failing clean-up fails its test", async () => {
  await assertRejects(
    () => run("inner", (t) => t.defer(() => Promise.reject(Error("x"))), 1000),
    Error,
    "x",
  );
});

test("needs names what is missing and the command that installs it", () => {
  assertEquals(needs("node"), undefined);
  assertEquals(needs("no-such"), "needs no-such: npm install");
});

test("the fallback assertions fail when they should", async () => {
  const { AssertionError: E } = fallback;
  assertThrows(() => fallback.assert(0), E);
  const differ = () => fallback.assertEquals({ a: 1 }, { a: 2 }, "why");
  assertThrows(differ, E, "why");
  assertThrows(() => fallback.assertNotEquals([1], [1]), E);
  assertThrows(() => fallback.assertStrictEquals({}, {}), E);
  assertThrows(() => fallback.assertExists(null), E);
  assertThrows(() => fallback.assertInstanceOf(1, Date), E);
  assertThrows(() => fallback.assertMatch("a", /b/), E);
  assertThrows(() => fallback.assertStringIncludes("a", "b"), E);
  assertThrows(() => fallback.assertGreater(1, 1), E);
  assertThrows(() => fallback.assertLessOrEqual(2, 1), E);
  assertThrows(() => fallback.assertThrows(() => {}), E);
  assertThrows(() => fallback.assertThrows(() => fail("a"), TypeError), E);
  assertThrows(() => fallback.assertThrows(() => fail("a"), Error, "b"), E);
  await assertRejects(() => fallback.assertRejects(() => Promise.resolve()), E);
  const thrown = fallback.assertThrows(() => fail("a"), Error, "a");
  assertStrictEquals(thrown.message, "a");
});

function fail(message: string): never {
  throw new Error(message);
}

test("once, until and deferred wait, and give up", async () => {
  const target = new EventTarget();
  const { promise, resolve } = deferred<number>();
  queueMicrotask(() => target.dispatchEvent(new Event("a")));
  assertEquals((await once(target, "a")).type, "a");
  await assertRejects(() => once(target, "b", { timeout: 10 }), Error, '"b"');
  let calls = 0;
  assertEquals(await until(() => ++calls > 3 && calls), 4);
  await assertRejects(
    () => until(() => false, { timeout: 10 }),
    Error,
    "10 ms",
  );
  resolve(5);
  assertEquals(await promise, 5);
});

/** A stream that says one thing and then stays open. */
function quietStream(text: string, onCancel = () => {}): Response {
  return new Response(
    new ReadableStream<Uint8Array>({
      start: (controller) => controller.enqueue(encoder.encode(text)),
      cancel: onCancel,
    }),
  );
}

test("serve passes the runtime's second argument, and closes under open streams", async (t) => {
  let address: string | undefined;
  const server = await t.serve((request, info) => {
    address = info.remoteAddr?.hostname ?? info.requestIP(request).address;
    return quietStream("hello");
  });
  const response = await fetch(server.url);
  const reader = response.body!.getReader();
  assertEquals((await reader.read()).value, encoder.encode("hello"));
  assertEquals(address, "127.0.0.1");
  await server.close();
  await reader.read().catch(() => {});
  await assertRejects(() => fetch(server.url));
});

for (const http2 of [false, true]) {
  test(`serve with tls, http2: ${http2}`, async (t) => {
    const server = await t.serve(
      async (request) => new Response(await request.text()),
      { tls: true, http2 },
    );
    assert(server.url.startsWith("https:"));
    const response = await server.fetch(server.url, {
      method: "POST",
      body: "over tls",
    });
    assertEquals(await response.text(), "over tls");
  }, { skip: needs("openssl") });
}

test("rawRequest controls the body's pieces and reads the answer's", async (t) => {
  const server = await t.serve(async (request) =>
    new Response(`${request.method} ${await request.text()}`, {
      headers: { "x-a": request.headers.get("x-a") ?? "" },
    })
  );
  const response = t.use(
    await rawRequest(
      server.port,
      "POST / HTTP/1.1\r\nhost: x\r\nx-a: é\r\ntransfer-encoding: chunked",
      ["a", "bc"],
    ),
  );
  assertEquals(response.status, 200);
  assert(response.headers.has("x-a"));
  assertEquals(await response.text(), "POST abc");
});

test("rawRequest reads both ends of a duplex request", async (t) => {
  const server = await t.serve((request) => new Response(request.body));
  const response = t.use(
    await rawRequest(
      server.port,
      "POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n",
    ),
  );
  assertEquals(await response.read(), encoder.encode("one"));
  await response.write("two");
  assertEquals(await response.read(), encoder.encode("two"));
  await response.end();
  assertEquals(await response.read(), null);
});

test("a paused raw reader is felt by the server, a destroyed one cancels", async (t) => {
  let pulled = 0;
  let cancelled = false;
  const chunk = new Uint8Array(64 * 1024);
  const server = await t.serve(() =>
    new Response(
      new ReadableStream<Uint8Array>({
        pull(controller) {
          pulled++;
          controller.enqueue(chunk);
        },
        cancel: () => void (cancelled = true),
      }),
    )
  );
  const response = t.use(
    await rawRequest(server.port, "GET / HTTP/1.1\r\nhost: x"),
  );
  response.pause();
  await until(async () => {
    const before = pulled;
    await sleep(100);
    return pulled === before;
  });
  const before = pulled;
  response.resume();
  for (let read = 0; read < 8e6;) read += (await response.read())!.length;
  await until(() => pulled > before);
  response.destroy();
  await until(() => cancelled);
});

for (const child of ["deno", "bun", "node", ...nodes, ...older, "deno-2.9.5"] satisfies Runtime[]) {
  test(`spawn runs a script on ${child}, and kills it`, async (t) => {
    const running = await t.spawn(child, "tests/fixtures/echo.ts", {
      args: ["argument"],
      env: { DUPLEX_ECHO: "environment" },
    });
    const { version, ...first } = await running.json<Record<string, unknown>>();
    const [name, wanted = ""] = child.split("-");
    assertEquals(first, { runtime: name, args: ["argument", "environment"] });
    assert(String(version).startsWith(wanted), `${version}`);
    running.send("hello");
    assertEquals(await running.line(), "echo hello");
    running.kill();
    assertEquals((await running.exited).signal, "SIGTERM");
    await assertRejects(() => running.line(), Error, "ended its output");
  }, { skip: needs(child) });
}

test("a child that says nothing is reported with its stderr", async (t) => {
  const child = await t.spawn(runtime, "tests/fixtures/echo.ts", {
    env: { DUPLEX_ECHO: "" },
  });
  await child.line();
  child.send("to stderr: oh");
  t.expect("to stderr: oh");
  await until(() => child.stderr());
  const late = () => child.line({ timeout: 10 });
  await assertRejects(late, Error, "oh");
});
