/**
 * Bugs to be planted: each changes one place of the product, as a slip of the hand would, and
 * breaks a rule that the simulator is to hold.
 *
 * @module
 */
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";
import { PRODUCT, type Product } from "./product.ts";

/** A bug: in `file` each `from` becomes its `to`. */
export interface Bug {
  name: string;
  file: "client" | "server";
  edits: [from: string, to: string][];
  /** It is found soon after this seed. */
  seed: number;
}

const bugOf = (file: Bug["file"]) => (name: string, seed: number, ...edit: string[]): Bug => {
  const edits: Bug["edits"] = [];
  for (let i = 0; i < edit.length; i += 2) edits.push([edit[i]!, edit[i + 1]!]);
  return { name, file, edits, seed };
};
const client = bugOf("client");
const server = bugOf("server");

export const BUGS: readonly Bug[] = [
  server("a gap is not noticed", 3, "if (number > uplink.received + 1) {", "if (false) {"),
  server(
    "what comes again is taken again",
    34,
    "if (number++ === uplink.received + 1) receiver.receive(",
    "if (number++ > 0) receiver.receive(",
  ),
  server(
    "the stream of before goes on beside the next",
    62,
    "    this.connection?.end();\n    this.attempt = attempt;",
    "    this.attempt = attempt;",
  ),
  server(
    "what an old stream was given still counts in the window",
    62,
    "    this.nextUnsent = received + 1;\n    this.inFlight = 0;",
    "    this.nextUnsent = received + 1;",
  ),
  server(
    "the server keeps to no window",
    443,
    "size < MAX_CHUNK && this.outbox.hasRoom();",
    "size < 64 * MAX_CHUNK;",
  ),
  server(
    "a window grows for ever",
    8773,
    "Math.min(wanted, maxWindow)",
    "wanted",
  ),
  server(
    "what was handled is not acknowledged",
    62,
    "this.uplink.handled);\n    this.#ackDue = this.controlDue = true;",
    "this.uplink.handled);",
  ),
  server(
    "a closing server refuses CLOSE past a gap",
    3,
    'if (type !== "CLOSE" || !receiver.takesGaps) throw',
    "throw",
  ),
  server(
    "who missed the end is not told",
    147,
    "    if (ending) {\n      for (const [oldest",
    "    if (false as boolean && ending) {\n      for (const [oldest",
  ),
  server(
    "a shutdown drops what it has acknowledged",
    106,
    "if (!this.isOpen && !(this.ending?.delivers && !this.isOver)) {",
    "if (!this.isOpen) {",
  ),
  server(
    "no deadline ends a session",
    12,
    "if (now >= this.deadline) this.terminate();",
    "",
  ),
  server(
    "all sessions together have no bound",
    140,
    "    if (this.ledger.total <= this.settings.maxTotalBufferedAmount) return;\n",
    "    return;\n",
  ),
  client(
    "an ACK is lost with the batch that carried it",
    3749,
    "this.#receipts.isDue = true; // what it carried may be lost",
    "",
  ),
  client(
    "a request that is ended goes on",
    1,
    "    this.abort.abort(); // first: else the body's end would be a clean one\n",
    "",
  ),
  client(
    "any answer of 2xx confirms",
    800,
    "const received = this.#session.level.confirmed(exchange, load.first);",
    "const received = exchange.rawStatus < 300 && exchange.rawStatus ? load.next - 1 : undefined;",
  ),
  client(
    "the client keeps to no window",
    7,
    "inFlight < Math.max(terms.window, this.#granted);",
    "terms.window > 0;",
  ),
  client(
    "a request waits for its answer for ever",
    297,
    "if (bytes) exchange.endIn(POST_TIMEOUT_MS + bytes.length / 8);",
    "",
  ),
  client(
    "nobody notices silence",
    196,
    "connection.quietTicks > ticksOfPatience(terms)) this.#taker.hangUp();",
    "connection.quietTicks > 1e6) this.#taker.hangUp();",
  ),
  client(
    "a stream without a first event is waited for",
    1557,
    '      connection.ended = connection.isPoll ? undefined : "held";',
    "return;",
  ),
  client(
    "a CLOSE that answers is sent once",
    8,
    "if (!await pauses.wait(retries, deadline, exchange.retryAfter)) break;",
    "break;",
  ),
  client(
    "a message that is too large leaves its session behind",
    455,
    "if (this.#session.terms) this.#takeLeave(verdict, this.#outbox.firstUnacked);",
    "if (false) this.#finish();",
  ),
  client(
    "a stranger's word is final",
    74,
    "exchange.isTrusted = !this.#session.terms || exchange.isOurs;",
    "exchange.isTrusted = true;",
  ),
  client(
    "what the last stream held is sent as if it had never been",
    1,
    "if (number !== load.next) parts.push(this.#session.level.seq(number));",
    "if (!load.used) parts.push(this.#session.level.seq(this.nextUnsent));",
  ),
];

/** The product with the bug in it; its file goes to `folder`. */
export async function plant(bug: Bug, folder: string): Promise<Product> {
  const { name, file, edits } = bug;
  let source = readFileSync(
    fileURLToPath(new URL(`../../${file}.ts`, import.meta.url).href),
    "utf8",
  );
  for (const [from, to] of edits) {
    const parts = source.split(from);
    if (parts.length !== 2) throw new Error(`"${name}" fits ${parts.length - 1} places: ${from}`);
    source = parts.join(to);
  }
  const path = join(folder, `${name.replaceAll(" ", "-")}.ts`);
  writeFileSync(path, source);
  return { ...PRODUCT, ...await import(pathToFileURL(path).href) };
}
