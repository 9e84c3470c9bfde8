/**
 * Makes docs/chat.png of README.md: `node scripts/screenshots.mjs [folder]`, which is what
 * `npm run screenshots` does. A page of the demo, in Chromium, while it has its network cut.
 */
import { spawn } from "node:child_process";
import { mkdirSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import { createInterface } from "node:readline";
import { chromium } from "playwright-core";
import { binary } from "../tests/tools.mjs";

const root = dirname(import.meta.dirname);
const folder = resolve(process.argv[2] ?? join(root, "docs"));
const executablePath = process.env.CHROMIUM ?? "/usr/bin/chromium";
const screens = {
  "chat.png": { viewport: { width: 960, height: 640 }, colorScheme: "light" },
  "chat-phone.png": { viewport: { width: 390, height: 844 }, colorScheme: "dark" },
};

mkdirSync(folder, { recursive: true });
const server = spawn(binary("deno"), ["run", "-A", "--no-check", "examples/deno.ts"], {
  cwd: root,
  env: { ...process.env, HOST: "127.0.0.1", PORT: "0" },
  stdio: ["ignore", "pipe", "inherit"],
});
try {
  const { value: line } = await createInterface(server.stdout)[Symbol.asyncIterator]().next();
  const url = line.replace("Chat on ", "");
  const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
  try {
    const pages = await Promise.all(
      Object.entries(screens).map(([name, options]) => open(browser, url, name, options)),
    );
    await converse(pages.map(({ page }) => page));
    for (const { page, name } of pages) await page.screenshot({ path: join(folder, name) });
  } finally {
    await browser.close();
  }
} finally {
  server.kill();
}

async function open(browser, url, name, options) {
  const page = await (await browser.newContext(options)).newPage();
  await page.goto(url);
  await page.getByText("open").nth(1).waitFor();
  return { name, page };
}

/** Both have their networks cut while the robot counts, and one writes meanwhile. */
async function converse([ada, grace]) {
  for (const [page, name] of [[ada, "Ada"], [grace, "Grace"]]) {
    await page.fill("#name", name);
    await page.press("#name", "Enter");
  }
  await say(grace, "Good morning, Ada!");
  await say(ada, "Good morning. I am about to enter a tunnel.");
  await ada.waitForTimeout(500);
  await ada.click("#cut");
  await ada.waitForTimeout(700);
  await say(grace, "Can you read this?");
  await grace.click("#cut");
  await say(ada, "This I write in the tunnel");
  await ada.waitForTimeout(1_000);
  await grace.click("#count");
  await ada.waitForFunction(
    () => {
      const states = ["native", "ours"].map((name) => document.getElementById(`${name}-state`));
      return states.every(({ textContent }) => textContent === "open") &&
        document.querySelectorAll("[data-fate=lost]").length > 0 &&
        document.querySelectorAll("[data-fate=awaited]").length === 0;
    },
    undefined,
    { timeout: 30_000 },
  );
  for (const page of [ada, grace]) {
    await page.locator("[data-fate=lost]").first().evaluate((cell) => {
      cell.closest("tr").previousElementSibling.scrollIntoView({ block: "start" });
      document.getElementById("messages").scrollBy(0, -160); // the head stays in view
    });
  }
}

async function say(page, text) {
  await page.fill("#text", text);
  await page.press("#text", "Enter");
}
