/**
 * In browsers: a round trip, and a stream of 1,000 messages a second.
 *
 * @module
 */
import { build, stop } from "esbuild";
import puppeteer, { type Browser, type Page } from "puppeteer-core";
import { certificate } from "../../tests/certificate.ts";
import { onPath, root } from "../../tests/spawn.ts";
import { figure, interleaved, type Outcome, ratio, type Samples, type Scale } from "../measure.ts";
import type { BenchPage, PageKind } from "../page.ts";
import { Remote, type Runtime } from "../rpc.ts";
import type { Percentiles } from "../trips.ts";

declare const globalThis: { page: BenchPage };

const NAMES = ["native", "raw", "crossws", "ours"] as const satisfies PageKind[];
const BROWSERS = {
  Chromium: { browser: "chrome", executablePath: onPath("chromium")! },
  Firefox: { browser: "firefox", executablePath: onPath("firefox-esr")! },
} as const;
const TRIPS = 250;
/** A stream's. */
const MESSAGES = 1_000;
const EVERY = 1;

interface Setting {
  browser: Browser;
  runtime: Runtime;
  protocol: "HTTP/1.1" | "HTTP/2";
  html: string;
}

export async function browsers({ short, rounds, runtimes }: Scale): Promise<Outcome> {
  const outcome: Outcome = { figures: [], ratios: [] };
  if (short) return outcome; // the tests open both browsers
  const html = `<!DOCTYPE html><link rel="icon" href="data:,"><script>${await bundle()}</script>`;
  for (const [name, options] of Object.entries(BROWSERS)) {
    const args = name === "Chromium" ? ["--no-sandbox", "--disable-quic"] : [];
    await using stack = new AsyncDisposableStack();
    const browser = await puppeteer.launch({ ...options, args, acceptInsecureCerts: true });
    stack.defer(() => browser.close());
    for (const runtime of runtimes) {
      for (const protocol of ["HTTP/1.1", "HTTP/2"] as const) {
        const setting = { browser, runtime, protocol, html };
        tell(outcome, runtime, `${name}, ${protocol}`, await measure(setting, rounds));
      }
    }
  }
  return outcome;
}

/** The page and its clients; their text may stand in a page. */
async function bundle(): Promise<string> {
  const { outputFiles } = await build({
    entryPoints: [`${root}/bench/page.ts`],
    ...{ bundle: true, format: "iife", platform: "browser", target: "es2022", write: false },
  });
  await stop();
  return outputFiles[0]!.text.replaceAll("</script", "<\\/script");
}

type Measured = Record<"trip" | "trip99" | "stream" | "stream99", Samples<PageKind>>;

async function measure(setting: Setting, rounds: number): Promise<Measured> {
  await using stack = new AsyncDisposableStack();
  const pairs = {} as Record<PageKind, { server: Remote; page: Page }>;
  for (const kind of NAMES) pairs[kind] = await show(setting, kind, stack);
  const none = (): Samples<PageKind> => ({ native: [], raw: [], crossws: [], ours: [] });
  const measured = { trip: none(), trip99: none(), stream: none(), stream99: none() };
  // The first round is to warm up.
  const { trip99, stream99 } = measured;
  measured.trip = await interleaved(NAMES, rounds + 1, async (kind) => {
    const { p50, p99 } = await roundTrip(pairs[kind].page, kind);
    trip99[kind].push(p99);
    return p50;
  });
  measured.stream = await interleaved(NAMES, rounds + 1, async (kind) => {
    const { p50, p99 } = await stream(pairs[kind], kind);
    stream99[kind].push(p99);
    return p50;
  });
  for (const samples of Object.values(measured)) {
    for (const kind of NAMES) samples[kind].shift();
  }
  return measured;
}

/** A server of that kind, and its page in a window of its own. */
async function show(
  { browser, runtime, protocol, html }: Setting,
  kind: PageKind,
  stack: AsyncDisposableStack,
): Promise<{ server: Remote; page: Page }> {
  const isSecure = protocol === "HTTP/2";
  const environment = isSecure ? { DUPLEX_TLS: JSON.stringify(await certificate()) } : undefined;
  const server = stack.use(await Remote.startIn(environment ?? {}, runtime, "server.ts", kind));
  await server.call("show", { html });
  const page = await browser.newPage();
  stack.defer(() => page.close());
  const origin = `${isSecure ? "https" : "http"}://127.0.0.1:${await server.call("port")}`;
  await page.goto(`${origin}/page`);
  return { server, page };
}

/** Only a window in front has timers and tasks in time. */
async function roundTrip(page: Page, kind: PageKind): Promise<Percentiles> {
  await page.bringToFront();
  return await page.evaluate(
    (kind, trips) => globalThis.page.roundTrip(kind, trips),
    kind,
    TRIPS,
  );
}

async function stream(
  { server, page }: { server: Remote; page: Page },
  kind: PageKind,
): Promise<Percentiles> {
  await page.bringToFront();
  await page.evaluate((kind, most) => globalThis.page.listen(kind, most), kind, MESSAGES);
  // A client is connected a little before its server subscribes it.
  while (await server.call<number>("count") < 1) await new Promise((done) => setTimeout(done, 10));
  await server.call("offer", { messages: MESSAGES, every: EVERY });
  return await page.evaluate(() => globalThis.page.delays());
}

function tell(
  { figures, ratios }: Outcome,
  runtime: Runtime,
  where: string,
  { trip, trip99, stream, stream99 }: Measured,
): void {
  const rows = {
    "round trip": [trip, trip99],
    "1000 messages/s down": [stream, stream99],
  } as const;
  for (const [row, [p50, p99]] of Object.entries(rows)) {
    const name = `${where}: ${row}`;
    figures.push(
      figure(`${name}, p50`, runtime, "ms", p50),
      figure(`${name}, p99`, runtime, "ms", p99),
    );
    ratios.push(
      ratio(`${runtime}: ${name}, p50, ours / raw`, p50.ours, p50.raw, { atMost: 1.15 }),
      ratio(`${runtime}: ${name}, p50, ours / native`, p50.ours, p50.native),
    );
  }
}
