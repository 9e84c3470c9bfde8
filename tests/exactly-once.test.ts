/**
 * "Exactly once, in order, both ways, across any number of dropped connections":
 * both sides send at the same time while every connection between them is cut,
 * silenced, delayed or refused, and recorded requests are sent again.
 *
 * DUPLEX_SEED=… repeats a run, DUPLEX_SOAK=1 makes it ten times as long.
 */
import process from "node:process";
import { WebSocketSSE } from "../client.ts";
import { chaos, type ChaosProxy, pickSeed } from "./chaos.ts";
import type { ClientReport } from "./fixtures/exchange-client.ts";
import {
  Checker,
  CLOSE_CODE,
  type Exchange,
  exchangeServer,
  Messages,
  type Report,
} from "./fixtures/exchange.ts";
import {
  assert,
  assertEquals,
  type Child,
  needs,
  note,
  older,
  type Runtime,
  runtime,
  sleep,
  test,
  type TestContext,
  until,
  within,
} from "./harness.ts";
import { shutDown } from "./pair.ts";
import { type Configuration, proxy as startProxy } from "./proxies.ts";
import { mulberry32 } from "./random.ts";

const SOAK = !!process.env.DUPLEX_SOAK;
const COUNT = SOAK ? 20_000 : 2_000;
const TIMEOUT = SOAK ? 900_000 : 60_000;
const MAX_QUEUED = 256 * 1024;

for (const server of ["deno", "bun", ...older] as const) {
  for (const transport of ["duplex", "stream", "post"] as const) {
    test(
      `over ${transport} to ${server}, ${COUNT} messages each way arrive exactly once and in order`,
      (t) => exchange(t, server, transport),
      { timeout: TIMEOUT, skip: needs(server) },
    );
  }
}

for (const client of older) {
  for (const transport of ["auto", "stream", "post"] as const) {
    test(
      `over ${transport} from ${client}, ${COUNT} messages each way arrive exactly once and in order`,
      async (t) => {
        const seed = pickSeed();
        const terms: Exchange = { seed, count: COUNT, closer: "client" };
        const server = exchangeServer(terms);
        t.defer(() => shutDown(server.ws));
        t.expect("This host keeps the connection"); // Deno's, of those that are cut
        const { port } = await t.serve(server.ws.fetch);
        const proxy = t.use(await chaos(port, { seed, cutEvery: [5, 30] }));
        const child = await t.spawn(client, "tests/fixtures/exchange-client.ts", {
          args: [proxy.url, transport],
          env: { DUPLEX_EXCHANGE: JSON.stringify(terms) },
        });
        const report = await child.json<ClientReport>({ timeout: TIMEOUT - 5_000 });
        const { name, resumes, ...seen } = report;
        const close = "4000 all is said true";
        assertEquals(seen, { sent: COUNT, received: COUNT, failures: [], close });
        assert(resumes > 0, "the connection was never lost");
        // Others may be left of openings whose answers were cut.
        const { closes, peers: _, ...known } = (await until(() => server.report(name)))!;
        assertEquals(known, { opened: 1, received: COUNT, sent: COUNT, failures: [] });
        assertEquals(closes, [{ code: 4000, reason: "all is said" }]);
        assertEquals((await child.exited).code, 0);
      },
      { timeout: TIMEOUT, skip: needs(client) },
    );
  }
}

// What nginx holds it delivers when the connection is cut, or not, or a part of it.
for (
  const [transport, configuration] of [["post", "shipped"], ["stream", "shipped"], [
    "duplex",
    "documented",
  ]] as const
) {
  test(
    `over ${transport} through nginx, as ${configuration}, all arrive exactly once and in order`,
    (t) => exchange(t, runtime, transport, configuration),
    { timeout: TIMEOUT, skip: needs(runtime, "nginx", "openssl") },
  );
}

async function exchange(
  t: TestContext,
  server: Runtime,
  transport: "duplex" | "stream" | "post",
  nginx?: Configuration,
): Promise<void> {
  const seed = pickSeed();
  const closer = server === runtime ? "client" : "server";
  const terms: Exchange = { seed, count: COUNT, closer };
  const child = await t.spawn(server, "tests/fixtures/exchange.ts", {
    env: { DUPLEX_EXCHANGE: JSON.stringify(terms) },
  });
  const { port } = await child.json<{ port: number }>();
  const behind = nginx ? (await startProxy(t, "nginx", port, { configuration: nginx })).port : port;
  const proxy = t.use(
    await chaos(behind, {
      seed,
      cutEvery: [5, 100],
      delay: [0, 4],
      stall: 0.05,
      refuse: { every: [500, 1500], for: [20, 200] },
      record: (head) => /^x-crossws-id:/im.test(head),
    }),
  );
  const began = performance.now();
  const { socket, query } = await open(t, proxy, transport);
  const replays = replay(t, proxy, seed);

  const checker = new Checker(seed, "server");
  const events: string[] = ["open"];
  socket.binaryType = "arraybuffer";
  const finish = () => {
    const { sent } = socket.stats;
    if (closer === "client" && sent === COUNT && checker.received === COUNT) {
      socket.close(CLOSE_CODE.client, "all is said");
    }
  };
  const transports = new Set<string>();
  socket.onmessage = ({ data }) => {
    checker.take(typeof data === "string" ? data : new Uint8Array(data));
    finish();
  };
  socket.onopen = () => events.push("open");
  socket.onerror = () => events.push("error");
  const closed = new Promise<void>((resolve) => {
    socket.onclose = ({ code, reason, wasClean }) => {
      events.push(`close ${code} ${reason} ${wasClean}`);
      resolve();
    };
  });
  socket.addEventListener("drop", finish); // and never more than once, whatever comes
  const sending = send(socket, new Messages(seed, "client"), transports, finish);
  const progress = () =>
    note(
      `${Math.round(performance.now() - began)} ms, received ${checker.received}, ` +
        `by ${[...transports].join()}, ${JSON.stringify(socket.stats)}, ` +
        JSON.stringify(proxy.stats),
    );
  await within(Promise.all([closed, sending]), TIMEOUT - 5_000, "the exchange").finally(progress);

  proxy.calm();
  await replays();
  const report = await until(async () => {
    const report = await ask(child, query);
    return report.closes.length > 0 && report;
  });
  const code = CLOSE_CODE[closer];
  assertEquals(checker.failures, []);
  assertEquals(report.failures, []);
  assertEquals(events, ["open", `close ${code} all is said true`]);
  assertEquals([checker.received, report.received, report.sent], [COUNT, COUNT, COUNT]);
  // Once: nothing that still comes along may change it.
  await sleep(200, t.signal);
  const { opened, closes } = await ask(child, query);
  assertEquals([opened, closes], [1, [{ code, reason: "all is said" }]]);
  assert(socket.stats.resumes > 0, "the connection was never lost");
  if (process.env.DUPLEX_VERBOSE) {
    console.log(
      transport,
      server,
      `DUPLEX_SEED=${seed}`,
      Math.round(performance.now() - began),
      [...transports].join(),
      JSON.stringify([socket.stats, proxy.stats]),
    );
  }
}

/** Opening is not idempotent and is not repeated by the client: that is up to its user. */
async function open(
  t: TestContext,
  proxy: ChaosProxy,
  transport: "duplex" | "stream" | "post",
): Promise<{ socket: WebSocketSSE; query: string }> {
  for (let n = 1;; n++) {
    const query = `?${n}`;
    const giveUp = new AbortController();
    const { signal } = giveUp;
    const socket = new WebSocketSSE(`${proxy.url}/${query}`, { transport, signal });
    t.defer(() => giveUp.abort());
    const late = setTimeout(() => giveUp.abort(), 3_000); // it may have fallen silent
    await new Promise((resolve) => socket.onopen = socket.onclose = resolve);
    clearTimeout(late);
    const opened = socket.readyState === WebSocketSSE.OPEN;
    if (opened && socket.transport === transport) return { socket, query };
    giveUp.abort();
  }
}

async function send(
  socket: WebSocketSSE,
  messages: Messages,
  transports: Set<string>,
  done: () => void,
): Promise<void> {
  for (let n = 0; n < COUNT; n++) {
    socket.send(messages.next());
    transports.add(socket.transport);
    while (socket.bufferedAmount > MAX_QUEUED && socket.readyState === WebSocketSSE.OPEN) {
      await sleep(2);
    }
  }
  done();
}

/** Sends recorded requests of the session again, as a broken proxy might; returns how to stop. */
function replay(t: TestContext, proxy: ChaosProxy, seed: number): () => Promise<void> {
  const random = mulberry32(seed);
  const stop = new AbortController();
  t.defer(() => stop.abort());
  const running = (async () => {
    while (!stop.signal.aborted) {
      await sleep(100 + 200 * random(), stop.signal);
      const choice = proxy.recordings.filter(({ head, complete }) =>
        complete || /^accept: text\/event-stream/im.test(head)
      ).slice(-20);
      const recording = choice[Math.floor(random() * choice.length)];
      if (!recording || stop.signal.aborted) continue;
      const response = await proxy.replay(recording).catch(() => undefined);
      await sleep(20 * random(), stop.signal);
      await response?.[Symbol.asyncDispose]();
    }
  })();
  return () => {
    stop.abort();
    return running;
  };
}

let asking: Promise<unknown> = Promise.resolve();

function ask(child: Child, query: string): Promise<Report> {
  const answer = asking.catch(() => {}).then(() => {
    child.send(query);
    return child.json<Report>();
  });
  asking = answer;
  return answer;
}
