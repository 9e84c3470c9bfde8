/** The chaos proxy itself: what it promises to do to connections, it does. */
import { chaos } from "./chaos.ts";
import {
  assert,
  assertEquals,
  assertLess,
  assertRejects,
  assertStringIncludes,
  type Handler,
  rawRequest,
  type RawResponse,
  run,
  sleep,
  test,
  type TestContext,
  until,
  within,
} from "./harness.ts";
import { mulberry32 } from "./random.ts";

const encoder = new TextEncoder();
const get = "GET / HTTP/1.1\r\nhost: x";
const post = "POST / HTTP/1.1\r\nhost: x\r\n";

const echo: Handler = async (request) => new Response(await request.text());

/** An endless body of short lines, one every few milliseconds. */
function ticking(t: TestContext, onCancel = () => {}): Response {
  let stopped = false;
  return new Response(
    new ReadableStream<Uint8Array>({
      async pull(controller) {
        await sleep(2, t.signal);
        if (!stopped && !t.signal.aborted) {
          controller.enqueue(encoder.encode("tick\n"));
        }
      },
      cancel() {
        stopped = true;
        onCancel();
      },
    }, { highWaterMark: 0 }),
  );
}

/** Reads until the connection breaks; the number of bytes that came. */
async function readToBreak(response: RawResponse): Promise<number> {
  let bytes = 0;
  try {
    for (let chunk; (chunk = await response.read());) bytes += chunk.length;
  } catch {
    return bytes;
  }
  throw new Error("the body ended in order");
}

test("mulberry32 repeats itself with its seed", () => {
  const draw = (random: () => number) => Array.from({ length: 5 }, random);
  assertEquals(draw(mulberry32(1)), draw(mulberry32(1)));
  assert(draw(mulberry32(1))[0] !== draw(mulberry32(2))[0]);
  assert(draw(mulberry32(3)).every((value) => value >= 0 && value < 1));
});

test("without options the proxy changes nothing", async (t) => {
  const server = await t.serve(echo);
  const proxy = t.use(await chaos(server.port));
  const body = "x".repeat(3_000_000);
  const response = await fetch(proxy.url, { method: "POST", body });
  assertEquals(await response.text(), body);
  assertEquals(proxy.stats.cuts, 0);
  assert(proxy.stats.up > body.length && proxy.stats.down > body.length);
});

test("a failing test prints the seed", async (t) => {
  const server = await t.serve(echo);
  const error = await assertRejects(() =>
    run("inner", async (t) => {
      t.use(await chaos(server.port, { seed: 4711 }));
      throw new Error("lost");
    }, 1000)
  );
  assertStringIncludes((error as Error).message, "DUPLEX_SEED=4711");
});

test("cutEvery cuts at some byte, and both sides notice", async (t) => {
  let cancelled = 0;
  const server = await t.serve(() => ticking(t, () => cancelled++));
  const proxy = t.use(
    await chaos(server.port, { seed: 1, cutEvery: [20, 60] }),
  );
  let opened = 0;
  for (; opened < 10; opened++) {
    try {
      await readToBreak(t.use(await rawRequest(proxy.port, get)));
    } catch {
      // Cut before its head came.
    }
  }
  assertEquals(proxy.stats.cuts, opened);
  await until(() => cancelled === opened && proxy.open === 0);
});

for (const how of ["rst", "fin"] as const) {
  test(`cutAll by ${how} ends a stream at both sides`, async (t) => {
    let cancelled = false;
    const server = await t.serve(() => ticking(t, () => cancelled = true));
    const proxy = t.use(await chaos(server.port));
    const response = t.use(await rawRequest(proxy.port, get));
    await response.read();
    proxy.cutAll(how);
    await readToBreak(response);
    await until(() => cancelled && proxy.open === 0);
  });
}

test("stallAll is silence without an end; resumeAll loses nothing", async (t) => {
  const server = await t.serve(() => ticking(t));
  const proxy = t.use(await chaos(server.port));
  const response = t.use(await rawRequest(proxy.port, get));
  await response.read();
  proxy.stallAll();
  await sleep(20);
  // What had passed before is still there to be read.
  let passed = "";
  const decoder = new TextDecoder();
  let read = response.read();
  for (;;) {
    const chunk = await within(read, 100).catch(() => null);
    if (!chunk) break;
    passed += decoder.decode(chunk);
    read = response.read();
  }
  const newcomer = rawRequest(proxy.port, get);
  await assertRejects(() => within(newcomer, 100));
  const { down } = proxy.stats;
  await sleep(50);
  assertEquals(proxy.stats.down, down);
  proxy.resumeAll();
  passed += decoder.decode((await read)!);
  assert("tick\n".repeat(passed.length / 5 + 1).startsWith(passed));
  assertEquals(t.use(await newcomer).status, 200);
  assertEquals(proxy.stats.stalls, 2);
});

test("stallAll can spare newcomers; a client that leaves is not noticed", async (t) => {
  let cancelled = 0;
  const server = await t.serve(() => ticking(t, () => cancelled++));
  const proxy = t.use(await chaos(server.port));
  const old = t.use(await rawRequest(proxy.port, get));
  await old.read();
  proxy.stallAll({ newcomers: false });
  old.destroy();
  const young = t.use(await rawRequest(proxy.port, get));
  assert(await young.read());
  await sleep(50);
  assertEquals(cancelled, 0);
  proxy.resumeAll();
  await until(() => cancelled === 1);
});

test("stall makes some of the cuts silences", async (t) => {
  const server = await t.serve(() => ticking(t));
  const proxy = t.use(
    await chaos(server.port, { cutEvery: [5, 10], stall: 1 }),
  );
  // The silence may come before the head.
  const response = rawRequest(proxy.port, get);
  await until(() => proxy.stats.stalls === 1);
  assertEquals(proxy.stats.cuts, 0);
  proxy.calm();
  assert(await t.use(await response).read());
});

test("refuse resets newcomers for a while", async (t) => {
  const server = await t.serve(echo);
  const proxy = t.use(await chaos(server.port));
  proxy.refuse(100);
  await assertRejects(() => rawRequest(proxy.port, get));
  const response = await until(() => rawRequest(proxy.port, get).catch(() => undefined));
  assertEquals(t.use(response).status, 200);
  assert(proxy.stats.refusals > 0);
});

test("windows of refusal come by themselves, until calm", async (t) => {
  const server = await t.serve(echo);
  const proxy = t.use(
    await chaos(server.port, { refuse: { every: [5, 10], for: [20, 30] } }),
  );
  const attempt = () => rawRequest(proxy.port, get).catch(() => undefined);
  await until(async () => {
    await (await attempt())?.[Symbol.asyncDispose]();
    return proxy.stats.refusals > 0;
  });
  proxy.calm();
  assertEquals(t.use((await attempt())!).status, 200);
});

test("delay holds every piece back, in order", async (t) => {
  const server = await t.serve(echo);
  const proxy = t.use(await chaos(server.port, { delay: [30, 40] }));
  const start = performance.now();
  const body = Array.from({ length: 20_000 }, (_, i) => i).join();
  const response = await fetch(proxy.url, { method: "POST", body });
  assertEquals(await response.text(), body);
  assert(performance.now() - start >= 60);
});

test("a paused reader is felt by the server, through the proxy", async (t) => {
  let sent = 0;
  const chunk = new Uint8Array(64 * 1024);
  const server = await t.serve(() =>
    new Response(
      new ReadableStream<Uint8Array>({
        pull(controller) {
          sent += chunk.length;
          controller.enqueue(chunk);
        },
      }),
    )
  );
  const proxy = t.use(await chaos(server.port));
  const response = t.use(await rawRequest(proxy.port, get));
  response.pause();
  await until(async () => {
    const before = sent;
    await sleep(150);
    return sent === before;
  });
  assertLess(sent, 64 * 1024 * 1024);
  response.resume();
  const before = sent;
  for (let read = 0; read < before + 1e6;) {
    read += (await response.read())!.length;
  }
});

test("recorded requests are cut out of a connection, and replayed", async (t) => {
  const bodies: string[] = [];
  const server = await t.serve(async (request) => {
    const body = await request.text();
    bodies.push(body);
    return new Response(`got ${body}`);
  });
  const proxy = t.use(
    await chaos(server.port, { record: (head) => head.includes("x-take") }),
  );
  const requests = [
    `${post}content-length: 4\r\n\r\nskip`,
    `${post}x-take: 1\r\ncontent-length: 5\r\n\r\nfirst`,
    `${post}x-take: 1\r\ntransfer-encoding: chunked\r\n\r\n3\r\nsec\r\n3\r\nond\r\n0\r\n\r\n`,
    `${get}\r\nconnection: close\r\n\r\n`,
  ];
  const response = t.use(await rawRequest(proxy.port, requests.join("")));
  await response.text();
  await until(() => bodies.length === 4);
  assertEquals(proxy.recordings.length, 2);
  assert(proxy.recordings.every((recording) => recording.complete));
  const [first, second] = proxy.recordings;
  assertEquals(first!.bytes(), encoder.encode(requests[1]!));
  assertEquals(second!.bytes(), encoder.encode(requests[2]!));
  const again = t.use(await proxy.replay(second!));
  assertEquals(await again.text(), "got second");
});

test("a recording of a cut request is incomplete, and replays as far as it goes", async (t) => {
  let cut = 0;
  const server = await t.serve(async (request) => {
    try {
      return new Response(await request.text());
    } catch (error) {
      cut++;
      throw error;
    }
  });
  const proxy = t.use(await chaos(server.port, { record: () => true }));
  const half = `${post}content-length: 9\r\n\r\nhalf`;
  const lost = rawRequest(proxy.port, half).catch(() => "lost");
  await until(() => proxy.recordings.length === 1);
  proxy.cutAll("rst");
  assertEquals(await lost, "lost");
  await until(() => cut === 1);
  assert(!proxy.recordings[0]!.complete);
  assertEquals(proxy.recordings[0]!.bytes(), encoder.encode(half));
});

test("close ends what is open, stalled, delayed and about to be cut", async (t) => {
  const server = await t.serve(() => ticking(t));
  const proxy = await chaos(server.port, {
    cutEvery: [1000, 2000],
    delay: 50,
    refuse: { every: [1000, 2000], for: [10, 20] },
  });
  const flowing = t.use(await rawRequest(proxy.port, get));
  proxy.stallAll();
  const silent = rawRequest(proxy.port, get).catch(() => "lost");
  await until(() => proxy.open === 2);
  proxy.refuse(1000);
  await proxy.close();
  assertEquals(proxy.open, 0);
  assertEquals(await silent, "lost");
  await readToBreak(flowing);
});
