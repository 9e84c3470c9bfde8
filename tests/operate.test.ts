/**
 * docs/operate.md: its recipes, scraped after what they count has happened; its tables; and that
 * every failure comes to `onError`.
 */
import { MeterProvider, MetricReader } from "@opentelemetry/sdk-metrics";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { Registry } from "prom-client";
import type { SSEAdapter, SSEOptions, Stats } from "../server.ts";
import { chaos, pickSeed } from "./chaos.ts";
import {
  assert,
  assertEquals,
  assertGreater,
  assertMatch,
  root,
  test,
  type TestContext,
  until,
} from "./harness.ts";
import { cluster } from "../cluster.ts";
import { MemoryBus } from "./bus.ts";
import { connect, listen, shutDown } from "./pair.ts";
import { project, recipeOf } from "./project.ts";

const FILES = ["meters.ts", "prometheus.ts", "prom-client.ts", "opentelemetry.ts", "server.ts"];

interface Meter {
  name: string;
  type: "counter" | "gauge";
  read(stats: Stats): unknown;
}

interface Recipes {
  meters: Meter[];
  ws: SSEAdapter;
  app: { fetch(request: Request, info?: unknown): Response | Promise<Response> };
  exposition(stats: Stats): Response;
  collect(ws: SSEAdapter, registry: Registry): void;
  observe(ws: SSEAdapter, meter: ReturnType<MeterProvider["getMeter"]>): void;
}

/** The modules of the page. */
async function recipes(t: TestContext): Promise<Recipes> {
  const files: Record<string, string> = {};
  for (const name of FILES) files[name] = await recipeOf("docs/operate.md", name);
  const folder = await project(t, files);
  const [meters, prometheus, client, telemetry, server] = await Promise.all(
    FILES.map((name) => import(`file://${folder}/${name}`)),
  );
  return { ...meters, ...prometheus, ...client, ...telemetry, ...server, app: server.default };
}

/** Collects when it is asked to. */
class Reader extends MetricReader {
  protected onShutdown(): Promise<void> {
    return Promise.resolve();
  }

  protected onForceFlush(): Promise<void> {
    return Promise.resolve();
  }
}

/** The samples of the text format, whose grammar each line must fit. */
function samplesOf(text: string): Map<string, number> {
  const samples = new Map<string, number>();
  let type = "";
  for (const line of text.trimEnd().split("\n").filter((line) => line)) {
    const kind = /^# TYPE (\w+) (counter|gauge)$/.exec(line)?.[1];
    if (kind) type = kind;
    if (line.startsWith("#")) assertMatch(line, /^# (HELP \w+ \S.*|TYPE \w+ (counter|gauge))$/);
    else {
      const [, sample, name, value] = /^((\w+)(?:\{\w+="[^"\\]*"\})?) (\d+)$/.exec(line) ?? [];
      assertEquals(name, type, line);
      assert(!samples.has(sample!), `${sample} twice`);
      samples.set(sample!, Number(value));
    }
  }
  return samples;
}

/** What OpenTelemetry has collected, called as Prometheus calls it. */
async function collected(reader: Reader): Promise<Map<string, number>> {
  const { resourceMetrics, errors } = await reader.collect();
  assertEquals(errors, []);
  const samples = new Map<string, number>();
  for (const { metrics } of resourceMetrics.scopeMetrics) {
    for (const { descriptor: { name }, dataPoints } of metrics) {
      for (const { attributes, value } of dataPoints) {
        const labels = Object.entries(attributes).map(([label, text]) => `${label}="${text}"`);
        samples.set(labels.length > 0 ? `${name}{${labels}}` : name, value as number);
      }
    }
  }
  return samples;
}

test("Prometheus, prom-client and OpenTelemetry are told what has happened", async (t) => {
  const { ws, app, collect, observe } = await recipes(t);
  t.defer(() => shutDown(ws));
  const server = await t.serve((request, info) => app.fetch(request, info));
  const registry = new Registry();
  collect(ws, registry);
  const reader = new Reader();
  const provider = new MeterProvider({ readers: [reader] });
  observe(ws, provider.getMeter("duplex-sse"));
  /** The same from all three. */
  const scrape = async (): Promise<Map<string, number>> => {
    const response = await fetch(`${server.url}/metrics`);
    assertMatch(response.headers.get("content-type")!, /^text\/plain; version=0\.0\.4/);
    const samples = samplesOf(await response.text());
    assertEquals(samplesOf(await registry.metrics()), samples, "prom-client");
    assertEquals(await collected(reader), samples, "OpenTelemetry");
    return samples;
  };
  const before = await scrape();
  assertEquals(before.get("duplex_opened_total"), 0);

  const network = t.use(await chaos(server.port, { seed: pickSeed() }));
  const [ada, bob] = [network.url, server.url].map((url) =>
    connect(t, `${url}/room`, { transport: "post" })
  );
  await Promise.all([ada!.opened, bob!.opened]);
  network.cutAll("rst");
  await until(() => ws.stats().resumptions === 1);
  bob!.socket.close(4321);
  await bob!.closed;
  await until(() => ws.stats().peers === 1);
  for (let n = 0; n < 3; n++) {
    const refused = await fetch(`${server.url}/room`, {
      method: "PUT",
      headers: { accept: "text/event-stream" },
    });
    assertEquals([refused.status, await refused.text()], [405, "Use GET or POST\n"]);
  }
  assertEquals(await (await fetch(server.url)).text(), "Hello");
  const { drops } = ws.stats(); // the server may hear of the new connection before the old one's end
  assertEquals(
    Object.fromEntries(await scrape()),
    {
      'duplex_sessions{phase="connected"}': 1,
      'duplex_sessions{phase="away"}': 0,
      'duplex_sessions{phase="closing"}': 0,
      'duplex_sessions{phase="moving"}': 0,
      duplex_peers: 1,
      duplex_buffered_bytes: ws.stats().bufferedAmount,
      duplex_opened_total: 2,
      'duplex_closed_total{code="4321"}': 1,
      duplex_drops_total: drops,
      duplex_resumptions_total: 1,
      'duplex_refusals_total{status="405"}': 3,
      duplex_moved_in_total: 0,
      duplex_moved_out_total: 0,
    },
  );
  ada!.socket.close(1000);
  await ada!.closed;
  await until(() => ws.stats().peers === 0);
  const after = await scrape();
  assertEquals(after.get('duplex_closed_total{code="1000"}'), 1);
  assertEquals(after.get('duplex_sessions{phase="connected"}'), 0);
  await provider.shutdown();
});

test("drops and bytes held back, and a cluster's counters, come to the page of metrics", async (t) => {
  const { exposition } = await recipes(t);
  const { ws, url } = await listen(t, { idleTimeout: 0, sync: cluster(new MemoryBus(t).adapter) });
  const gone = new AbortController();
  const headers = { accept: "text/event-stream", "x-duplex-version": "1" };
  await fetch(url, { headers, signal: gone.signal });
  gone.abort();
  await until(() => {
    for (const peers of ws.peers.values()) for (const peer of peers) peer.ping(); // Deno looks then
    return ws.stats().drops === 1;
  });
  for (const peers of ws.peers.values()) for (const peer of peers) peer.send("a".repeat(1000));
  const samples = samplesOf(await exposition(ws.stats()).text());
  assertEquals(samples.get('duplex_sessions{phase="away"}'), 1);
  assertEquals(samples.get("duplex_drops_total"), 1);
  assertGreater(samples.get("duplex_buffered_bytes")!, 1000);
  assertEquals(samples.get("duplex_cluster_instances"), 0);
  assertEquals(samples.get("duplex_cluster_pending_bytes"), ws.stats().cluster!.pendingBytes);
});

test("docs/operate.md explains each counter, and its meters and alerts miss none", async (t) => {
  const { meters } = await recipes(t);
  const text = await readFile(join(root, "docs/operate.md"), "utf8");
  const [, interfaces] = /^(export interface Stats \{[^]*?^\}\n[^]*?^\})$/m.exec(
    await readFile(join(root, "server.ts"), "utf8"),
  )!;
  const declared = [...interfaces!.matchAll(/^( +)readonly (\w+): (.*)$/gm)];
  const own = declared.slice(0, declared.findIndex(([, , name]) => name === "cluster"));
  const clusters = declared.slice(own.length + 1);
  const counters = [
    ...own.filter(([, indent]) => indent!.length > 2).map(([, , name]) => `sessions.${name}`),
    ...own.filter(([, indent, name]) => indent!.length === 2 && name !== "sessions")
      .map(([, , name]) => name!),
    ...clusters.map(([, , name]) => `cluster.${name}`),
  ];
  const rows = [...text.matchAll(/^\| `([\w.]+)` +\| (?:\w+)? +\| .{9,} \| .{9,} \|$/gm)]
    .map(([, name]) => name!);
  assertEquals(counters.toSorted(), rows.toSorted());

  // Each meter reads one counter, or one group of them, and none is left.
  const read = new Set<string>();
  const spy = (path: string): unknown =>
    new Proxy({}, {
      get: (_, key) => (read.add(`${path}${String(key)}`), spy(`${key as string}.`)),
    });
  for (const meter of meters) meter.read(spy("") as Stats);
  const groups = counters.map((name) => name.replace(/^sessions\..*/, "sessions"));
  assertEquals(
    [...read].filter((name) => name !== "cluster").toSorted(),
    [
      ...new Set(groups),
    ].toSorted(),
  );
  assertEquals(read.size, meters.length + 1);

  const [, alerts] = /^```yaml\n([^]*?)^```$/m.exec(text)!;
  const names = alerts!.match(/\bduplex_\w+/g)!;
  assertGreater(names.length, 8);
  for (const name of names) assert(meters.some((meter) => meter.name === name), name);
});

test("the log of docs/operate.md has a line for each failure, and no token", async (t) => {
  const folder = await project(t, { "log.ts": await recipeOf("docs/operate.md", "log.ts") });
  const { onError } = await import(`file://${folder}/log.ts`) as Pick<SSEOptions, "onError">;
  const { ws, url } = await listen(t, {
    onError,
    hooks: {
      open() {
        throw new TypeError("of a hook");
      },
    },
  });
  const printed: string[] = [];
  const { log } = console;
  t.defer(() => console.log = log);
  console.log = (line: string) => void printed.push(line);
  const { closed } = connect(t, `${url}/room?secret`);
  assertEquals((await closed).code, 1011);
  console.log = log;
  const { stack, peer, ...line } = JSON.parse(printed[0]!);
  assertEquals(line, { level: "error", stage: "hook", hook: "open" });
  assertMatch(stack, /^TypeError: of a hook\n/);
  assertMatch(peer, /^[\w-]{8,}$/);
  assertEquals(printed.length, 1);
  assertEquals([...ws.peers.values()].flatMap((peers) => [...peers]), []);
  assert(!/secret/.test(printed[0]!));
});
