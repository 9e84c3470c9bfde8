/** The demo's page as two people see it, in Chromium, served by Deno, by Bun and by Node. */
import { execFile } from "node:child_process";
import { mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import type { BrowserContextOptions, Page } from "playwright-core";
import { picture, startChromium } from "./chromium.ts";
import {
  assert,
  assertEquals,
  assertGreater,
  assertMatch,
  binary,
  command,
  deferred,
  freePort,
  needs,
  root,
  test,
  type TestContext,
  testOnce,
  until,
} from "./harness.ts";

const browser = await startChromium();
const timeout = 90_000;
const skip = needs("chromium");

type Server = "deno" | "bun" | "node-24";

/** What a page says in its console while the network is cut. */
const CUT = [
  /status of 503|ERR_(CONNECTION_|EMPTY_RESPONSE|INCOMPLETE_CHUNKED|SOCKET_NOT)|WebSocket is closed|Not opened: |WebSocket connection to/,
];

/** Starts the demo on a free port. */
async function run(t: TestContext, server: Server, port = 0) {
  const file = `examples/${server.replace(/-.*/, "")}.ts`;
  const child = await t.spawn(server, file, {
    asItIs: true,
    ...server === "node-24" && { flags: ["--no-warnings"] },
    env: { HOST: "127.0.0.1", PORT: `${port}` },
  });
  return { child, url: (await child.line()).replace("Chat on ", "") };
}

/** A page in which somebody has joined. */
async function enter(t: TestContext, url: string, name: string, options?: BrowserContextOptions) {
  const page = await (await browser.windows(t, options)).newPage();
  await page.goto(url);
  await sees(page, "#ours-state", ["open"]);
  await page.fill("#name", name);
  await page.press("#name", "Enter");
  await page.waitForFunction(
    (name) => document.querySelector("#people")!.textContent!.includes(name),
    name,
  );
  return page;
}

/** What a part of the page says, one string an element. */
function texts(page: Page, selector: string): Promise<string[]> {
  return page.locator(selector).allTextContents();
}

/** Waits until a part of the page says exactly this. */
async function sees(page: Page, selector: string, expected: string[]): Promise<void> {
  let last: string[] = [];
  await until(async () => {
    last = await texts(page, selector);
    return JSON.stringify(last) === JSON.stringify(expected);
  }, { timeout: 20_000, interval: 50 }).catch(() => {});
  assertEquals(last, expected, `${selector} in the tab`);
}

async function say(page: Page, text: string): Promise<void> {
  await page.fill("#text", text);
  await page.press("#text", "Enter");
}

const said = "#log [data-testid=message] th span";

/** Waits until our socket has brought a message, late or not: servers start faster here or there. */
async function arrives(page: Page, text: string): Promise<void> {
  const isHere = async () => ["here", "late"].includes((await fates(page, text))[1]!);
  await until(isHere, { timeout: 60_000 });
}

/** The fate of a message by each socket. */
async function fates(page: Page, text: string): Promise<(string | undefined)[]> {
  const row = page.locator("#log tr", { has: page.getByText(text, { exact: true }) });
  return await row.locator("td").evaluateAll((cells) =>
    cells.map((cell) => (cell as HTMLElement).dataset.fate)
  );
}

for (const server of ["deno", "bun"] as const) {
  test(`two people on ${server}: what a cut network loses, and what comes late`, async (t) => {
    t.expect(...CUT);
    const { url } = await run(t, server);
    const ada = await enter(t, url, "Ada");
    const grace = await enter(t, url, "Grace");
    for (const page of [ada, grace]) {
      await sees(page, "#people", ["2 here: Ada, Grace"]);
      await sees(page, "#native-state", ["open"]);
    }
    await say(ada, "Good morning!");
    for (const page of [ada, grace]) {
      await sees(page, said, ["Good morning!"]);
      await until(async () => `${await fates(page, "Good morning!")}` === "here,here");
      await sees(page, "#transport", ["post, resumed 0×"]); // over HTTP/1.1 no browser can stream
    }
    await picture(ada, `demo-${server}-open`);

    await ada.click("#cut");
    for (const name of ["native", "ours"]) await sees(ada, `#${name}-state`, ["reconnecting"]);
    await say(ada, "I am in a tunnel");
    await say(grace, "Can you hear me?");
    await until(async () => `${await fates(grace, "Can you hear me?")}` === "here,here");
    await picture(ada, `demo-${server}-cut`);
    for (const name of ["native", "ours"]) await sees(ada, `#${name}-state`, ["open"]);
    // It was said while the native socket was away: nobody says it again.
    await until(async () => `${await fates(ada, "Can you hear me?")}` === "lost,late", {
      timeout: 20_000,
    });
    assertEquals((await fates(grace, "I am in a tunnel"))[1], "late");
    assertEquals(await fates(ada, "I am in a tunnel"), ["late", "late"]);
    // How long each took: a second at least is what makes it late.
    const took = async (text: string) => {
      const row = ada.locator("#log tr", { has: ada.getByText(text, { exact: true }) });
      return `${await row.locator("td").allTextContents()}`;
    };
    assertMatch(await took("Good morning!"), /^\d{1,3} ms,\d{1,3} ms$/);
    assertMatch(await took("I am in a tunnel"), /^\d+\.\d s,\d+\.\d s$/);
    assertMatch(await took("Can you hear me?"), /^lost,\d+\.\d s$/);
    for (const page of [ada, grace]) {
      assertEquals(new Set(await texts(page, said)).size, 3);
      assertEquals((await texts(page, said)).length, 3);
    }
    assertMatch((await texts(ada, "#native-sum"))[0]!, /^2 arrived1 lost/);
    assertMatch((await texts(ada, "#ours-sum"))[0]!, /^3 arrived0 lost/);
    await sees(ada, "#transport", ["post, resumed 1×"]);
    await sees(grace, "#transport", ["post, resumed 0×"]);
    await picture(ada, `demo-${server}-after`);
    await ada.close();
    await sees(grace, "#people", ["1 here: Grace"]);
  }, { timeout, skip });
}

test(
  "whichever socket is back first, messages stand in their order, and a reader in his place",
  async (t) => {
    t.expect(...CUT, "keeps us waiting");
    const { url } = await run(t, "bun");
    const ada = await enter(t, url, "Ada", { viewport: { width: 800, height: 600 } });
    const grace = await enter(t, url, "Grace");
    const numbers = Array.from({ length: 35 }, (_, n) => `${n + 1}`);
    const count = async (from: number, to: number) => {
      for (const text of numbers.slice(from - 1, to)) await say(grace, text);
    };
    await count(1, 3);
    await until(async () => `${await fates(ada, "3")}` === "here,here");
    const back = deferred<void>(); // our socket's requests get through only from then on
    await ada.route("**/chat?**", async (route) => {
      await back.promise;
      await route.continue();
    });
    await ada.click("#cut");
    for (const name of ["native", "ours"]) await sees(ada, `#${name}-state`, ["reconnecting"]);
    await count(4, 5);
    await sees(ada, "#native-state", ["open"]);
    await count(6, 35);
    await until(async () => `${await fates(ada, "35")}` === "here,awaited");
    assertEquals(await texts(ada, said), numbers.toSpliced(3, 2)); // those of the cut are not here
    await ada.locator("#messages").evaluate((part) => part.scrollTop -= 250);
    const top = () =>
      ada.getByText("25", { exact: true }).evaluate((part) => {
        return part.getBoundingClientRect().top;
      });
    const before = await top();
    back.resolve();
    await sees(ada, said, numbers);
    assert(Math.abs(await top() - before) < 2, `from ${before} to ${await top()}`);
    await ada.unrouteAll();
    await ada.reload();
    await sees(ada, "#ours-state", ["open"]);
    await say(grace, "after the reload");
    await sees(ada, said, [...numbers, "after the reload"]);
  },
  { timeout, skip },
);

test(
  "alone, one is told whom to invite, lets a robot count, and restarts the server",
  async (t) => {
    t.expect(...CUT);
    const { url } = await run(t, "bun");
    const page = await enter(t, url, "Ada");
    await page.locator("#alone").waitFor();
    assertMatch((await texts(page, "#alone"))[0]!, /Nobody else is here yet.*another tab.*robot/s);
    await page.fill("#text", "half a sen");
    await page.click("#count");
    await page.locator("#alone").waitFor({ state: "hidden" });
    await page.click("#restart");
    await until(async () => (await texts(page, "#transport"))[0] === "post, resumed 1×", {
      timeout: 15_000,
    });
    await page.waitForFunction(
      () => document.querySelectorAll("#log [data-testid=message]").length === 40,
      undefined,
      { timeout: 20_000 },
    );
    const counted = (await texts(page, said)).map(Number);
    assertEquals(counted, Array.from({ length: 40 }, (_, n) => n + 1));
    assertEquals(await texts(page, ".note"), []); // its session went to the new server
    await page.waitForFunction(() => !document.querySelector("[data-fate=awaited]"));
    assertGreater(await page.locator("[data-fate=lost]").count(), 0);
    assertEquals(await page.locator("td:last-child[data-fate=lost]").count(), 0);
    assertEquals(await page.inputValue("#text"), "half a sen");
    await picture(page, "demo-restarted");
  },
  { timeout, skip },
);

test(
  "a server that is gone for a while is found again, and what was written arrives",
  async (t) => {
    t.expect(...CUT);
    const port = await freePort();
    const first = await run(t, "node-24", port);
    const ada = await enter(t, first.url, "Ada");
    await sees(ada, "#native-state", ["none here"]);
    assertMatch((await texts(ada, ".note"))[0]!, /^Node 24.* has no WebSocket server of its own/);
    first.child.kill("SIGTERM");
    await first.child.exited;
    await sees(ada, "#ours-state", ["reconnecting"]);
    await say(ada, "Written while nobody listened");
    assertEquals(await fates(ada, "Written while nobody listened"), ["none", "awaited"]);
    await ada.fill("#text", "half a sen");
    await run(t, "node-24", port);
    await arrives(ada, "Written while nobody listened");
    await sees(ada, "#ours-state", ["open"]);
    assertEquals(await ada.inputValue("#text"), "half a sen");
    await ada.reload();
    assertEquals(await ada.inputValue("#text"), "half a sen");
    await ada.waitForFunction(() =>
      (document.querySelector("#name") as HTMLInputElement).value === "Ada"
    );
  },
  { timeout, skip },
);

test("what a killed server has not acknowledged goes to the next one", async (t) => {
  t.expect(...CUT, /status of 404|Lost: the answer was 404|No answer from instance/);
  const port = await freePort();
  const first = await run(t, "node-24", port);
  const ada = await enter(t, first.url, "Ada");
  first.child.kill("SIGKILL");
  await first.child.exited;
  await sees(ada, "#ours-state", ["reconnecting"]);
  await say(ada, "Written before it is known to be over");
  assertEquals((await texts(ada, ".note")).length, 1); // which is about Node
  await run(t, "node-24", port);
  await arrives(ada, "Written before it is known to be over");
  assertMatch((await texts(ada, ".note"))[1]!, /^The session is over \(1006\)/);
}, { timeout, skip });

testOnce(
  "a page is loaded again in the middle of a conversation: nobody notices, and nothing is missing",
  async (t) => {
    const { url } = await run(t, "deno");
    const ada = await enter(t, url, "Ada");
    const grace = await enter(t, url, "Grace");
    await say(ada, "One moment");
    for (const page of [ada, grace]) {
      await until(async () => `${await fates(page, "One moment")}` === "here,here");
    }
    await ada.fill("#text", "half a sen");
    const away = deferred<() => void>();
    await ada.route("**/about", async (route) => {
      await new Promise<void>((resolve) => away.resolve(resolve));
      await route.continue();
    });
    await ada.reload();
    const load = await away.promise;
    await say(grace, "Are you still there?");
    await until(async () => `${await fates(grace, "Are you still there?")}` === "here,here");
    load();
    await sees(ada, said, ["One moment", "Are you still there?"]);
    await until(async () => `${await fates(ada, "One moment")}` === "here,here");
    assertEquals(await ada.inputValue("#text"), "half a sen");
    assertMatch(
      (await texts(ada, ".note"))[0]!,
      /^This page was loaded again. Its session goes on/,
    );
    assertEquals(await ada.locator("[data-me]").count(), 1);
    await say(ada, "I am");
    for (const page of [ada, grace]) {
      await sees(page, said, ["One moment", "Are you still there?", "I am"]);
      await sees(page, "#people", ["2 here: Ada, Grace"]); // who comes anew stands last
    }
    assertMatch(`${await fates(ada, "Are you still there?")}`, /^(awaited|lost),(here|late)$/);
    await picture(ada, "demo-reloaded");
    for (const page of [ada, grace]) {
      assertMatch((await texts(page, "#ours-sum"))[0]!, /^3 arrived0 lost/);
      await sees(page, "#transport", ["post, resumed 0×"]);
    }
  },
  { timeout, skip: skip ?? needs("deno") },
);

testOnce("twelve tabs of the demo talk over HTTP/1.1, and each hears all", async (t) => {
  t.expect("keeps us waiting"); // while others have their turn
  const { url } = await run(t, "deno");
  const context = await browser.windows(t);
  const pages = await Promise.all(Array.from({ length: 12 }, () => context.newPage()));
  await Promise.all(pages.map((page) => page.goto(url)));
  for (const page of pages) await sees(page, "#ours-state", ["open"]);
  const texts = pages.map((_, n) => `from tab ${n + 1}`);
  await Promise.all(pages.map((page, n) => say(page, texts[n]!)));
  for (const page of pages) {
    await page.waitForFunction(
      () => {
        const cells = document.querySelectorAll("#log td:last-child");
        return cells.length === 12 &&
          [...cells].every((cell) => /here|late/.test((cell as HTMLElement).dataset.fate!));
      },
      undefined,
      { timeout: 30_000 },
    );
    assertEquals((await page.locator(said).allTextContents()).sort(), texts.toSorted());
    assertMatch((await page.locator("#people").textContent())!, /^12 here: /);
    assertMatch((await page.locator("#ours-sum").textContent())!, /^12 arrived0 lost/);
    assertEquals(await page.locator("#transport").textContent(), "post, resumed 0×");
    assertEquals(await page.locator(".note").count(), 0);
  }
}, { timeout, skip: skip ?? needs("deno") });

test("the demo is used by keyboard, and read by a screen reader", async (t) => {
  const { url } = await run(t, "bun");
  const page = await enter(t, url, "Someone with a long name");
  await page.locator("#text:focus").waitFor(); // leaving the name leads to the message
  await page.keyboard.type("Typed without a mouse");
  await page.keyboard.press("Enter");
  await sees(page, said, ["Typed without a mouse"]);
  const reached: string[] = [];
  while (reached.length < 8 && !reached.includes("name")) {
    await page.keyboard.press("Shift+Tab");
    reached.push(await page.evaluate(() => document.activeElement!.id));
  }
  assertEquals(reached, ["messages", "restart", "hold", "cut", "count", "name"]);
  await page.locator("#hold").focus();
  await page.keyboard.press("Enter");
  await page.waitForFunction(() =>
    /^Held: \d s$/.test(document.querySelector("#hold")!.textContent!)
  );
  assertEquals(await page.locator("#hold").getAttribute("aria-disabled"), "true");
  const tree = await page.locator("body").ariaSnapshot();
  for (
    const part of [
      /textbox "Your name"/,
      /button "Cut my network"/,
      /table "Each message, and how long it took by either socket"/,
      /columnheader "WebSocket .*"/,
      /rowheader "Someone with a long name Typed without a mouse"/,
      /status: open/,
      /textbox "Message"/,
    ]
  ) assertMatch(tree, part);
  assertEquals(await page.locator("#log").getAttribute("aria-live"), "polite");
}, { timeout, skip });

const SCREENS = {
  phone: [390, 844],
  "narrow phone": [360, 640],
  "phone on its side": [844, 390],
  laptop: [1280, 720],
  "laptop, enlarged twofold": [640, 360],
} as const;
for (const [screen, [width, height]] of Object.entries(SCREENS)) {
  test(`the demo fits a ${screen}, light and dark`, async (t) => {
    const { url } = await run(t, "bun");
    for (const colorScheme of ["light", "dark"] as const) {
      const page = await enter(t, url, "Ada", { viewport: { width, height }, colorScheme });
      for (const text of ["Good morning!", "Is anybody there?"]) await say(page, text);
      await sees(page, said, ["Good morning!", "Is anybody there?"]);
      await picture(page, `demo-${width}-${colorScheme}`);
      const { scroll, outside, low, log } = await page.evaluate(measure);
      assertEquals([scroll, outside, low], [[0, 0], [], []]);
      assertGreater(log, 80); // px for messages
      await page.close();
    }
  }, { timeout, skip });
}

test("the demo, enlarged fourfold, is scrolled one way, and has room for messages", async (t) => {
  const { url } = await run(t, "bun");
  const page = await enter(t, url, "Ada", { viewport: { width: 320, height: 256 } });
  await say(page, "Good morning!");
  await sees(page, said, ["Good morning!"]);
  const { scroll, log } = await page.evaluate(measure);
  assertEquals(scroll[0], 0);
  assertGreater(log, 48); // px for messages
}, { timeout, skip });

test("a button that tells how long it takes keeps its size", async (t) => {
  const { url } = await run(t, "bun");
  const page = await enter(t, url, "Ada");
  const left = () => page.locator("#restart").evaluate((part) => part.getBoundingClientRect().left);
  const before = await left();
  for (const [id, busy] of [["count", /^It counts: /], ["hold", /^Held: /]] as const) {
    await page.click(`#${id}`);
    await page.locator(`#${id}`, { hasText: busy }).waitFor();
    assertEquals(await left(), before);
  }
}, { timeout, skip });

/** In the page: what sticks out, and which texts have less contrast than 4.5. */
function measure() {
  const { scrollWidth, scrollHeight, clientWidth, clientHeight } = document.documentElement;
  const parts = [...document.querySelectorAll("header *, #controls *, thead *, #composer *")]
    .filter((part) => part.checkVisibility() && !part.matches(".spoken, label"));
  const outside = parts.filter((part) => {
    const { top, left, right, bottom } = part.getBoundingClientRect();
    return top < 0 || left < 0 || right > innerWidth || bottom > innerHeight;
  }).map((part) => part.id || part.outerHTML);
  const parse = (color: string) => color.match(/[\d.]+/g)!.map(Number);
  const light = (color: string) => {
    const [r, g, b] = parse(color).slice(0, 3).map((value) => {
      const part = value / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r! + 0.7152 * g! + 0.0722 * b!;
  };
  const behind = (part: Element | null): string => {
    if (!part) return "rgb(255, 255, 255)";
    const color = getComputedStyle(part).backgroundColor;
    return parse(color)[3] === 0 ? behind(part.parentElement) : color;
  };
  const low = [...document.querySelectorAll("h1, p, b, span, button, label, td, th")]
    .filter((part) => part.checkVisibility() && part.textContent!.trim())
    .filter((part) => {
      const [one, other] = [light(getComputedStyle(part).color), light(behind(part))]
        .sort((a, b) => b - a) as [number, number];
      return (one + 0.05) / (other + 0.05) < 4.5;
    }).map((part) => part.outerHTML);
  return {
    scroll: [scrollWidth - clientWidth, scrollHeight - clientHeight],
    outside,
    low,
    log: document.querySelector("#messages")!.clientHeight -
      document.querySelector("thead")!.clientHeight,
  };
}

testOnce("the pictures in the documents are made by scripts/screenshots.mjs", async (t) => {
  const folder = await mkdtemp(join(tmpdir(), "duplex-pictures-"));
  t.defer(() => rm(folder, { recursive: true }));
  await promisify(execFile)(binary("node")!, ["scripts/screenshots.mjs", folder], {
    cwd: root,
    env: { ...process.env, CHROMIUM: command("chromium")! },
  });
  for (const name of ["chat.png", "chat-phone.png"]) {
    const [made, kept] = await Promise.all(
      [folder, join(root, "docs")].map((place) => readFile(join(place, name))),
    );
    // Width and height, in a PNG's first chunk; times differ, and so do the bytes.
    assertEquals(made!.subarray(0, 24), kept!.subarray(0, 24), name);
    assert(made!.length > 20_000, "something is in it");
  }
}, { timeout, skip: needs("chromium", "deno", "node") });
