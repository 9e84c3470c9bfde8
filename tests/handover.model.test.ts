/**
 * The handover protocol at random: `handover.ts` as it is breaks no rule in 10,000 walks, and
 * without any one of its rules it does.
 */
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { type MoveHead, Moves } from "../handover.ts";
import { assertEquals, assertGreater, root, test, type TestContext } from "./harness.ts";
import { walks } from "./handover.model.ts";

type Make = typeof Moves<number>;

/** Rules, and what takes each out: text of handover.ts that stands there once, and its replacement. */
const RULES: Record<string, [string, string]> = {
  "the giver keeps the session until it is confirmed": [
    "this.#limbos.set(session, {",
    "this.#mover.release(session, 'moved'); if (!1) this.#limbos.set(session, {",
  ],
  "the giver asks before it takes back": [
    "if (!this.#isOld(limbo.since)) this.#inquire(limbo);",
    "if (!this.#isOld(limbo.since)) this.#onTaken({ ...limbo, yes: false });",
  ],
  "a no binds": [
    "if (!yes && adoption?.id === id) this.#end(adoption);",
    "",
  ],
  "what was taken is remembered": [
    "this.#taken.set(id, session, this.#mover.now());",
    "",
  ],
  "a state that nobody waits for is dropped": [
    "if (adoption?.id !== id || this.#isOld(head.time)) return;",
    "if (!adoption) { if (status === 'here') this.#mover.take(session, state, []); return; }",
  ],
  "the session waits for publications that it has had": [
    "if (this.#caughtUp(adoption.arrived)) this.#take(adoption);\n  }",
    "this.#take(adoption);\n  }",
  ],
  "the session is given publications that it has missed": [
    "one.n > (counts[one.from] ?? 0)",
    "one.n > Infinity",
  ],
  "publications that it has had are not repeated": [
    "one.n > (counts[one.from] ?? 0)",
    "one.n > 0",
  ],
  "a pointer to where it went is kept": [
    "this.#moved.set(session, limbo.to, this.#mover.now());",
    "",
  ],
};

test("10,000 walks of the handover protocol break no rule", async () => {
  assertEquals(await walks(10_000, Moves as Make), { broken: 0 });
}, { timeout: 120_000 });

for (const [rule, [text, replacement]] of Object.entries(RULES)) {
  test(`without its rule the handover protocol breaks: ${rule}`, async (t) => {
    const make = await without(t, text, replacement);
    assertGreater((await walks(10_000, make, 1)).broken, 0);
  }, { timeout: 120_000 });
}

/** `handover.ts` with a piece of it replaced. */
async function without(t: TestContext, text: string, replacement: string): Promise<Make> {
  const source = await readFile(join(root, "handover.ts"), "utf8");
  assertEquals(source.split(text).length, 2, `stands once in handover.ts: ${text}`);
  const folder = await mkdtemp(join(tmpdir(), "duplex-rules-"));
  t.defer(() => rm(folder, { recursive: true }));
  const file = join(folder, "handover.ts");
  await writeFile(file, source.replace(text, replacement));
  return (await import(pathToFileURL(file).href)).Moves;
}

test("of an instance that has long been quiet, and was never heard here, nothing is waited for", () => {
  for (const quiet of [["silent"], []]) {
    const taken: unknown[] = [];
    const sent: MoveHead[] = [];
    const moves = new Moves<string>("here", 5_000, 30_000, {
      ...{ now: () => 0, send: (_to, head) => void sent.push(head), owns: () => taken.length > 0 },
      ...{ pack: () => undefined, restore() {}, release() {}, quiet: () => [] },
      take: (_session, _state, missed) => void taken.push(missed),
      counts: () => ({ heard: 3 }),
    });
    moves.adopt("session", "there", { attempt: 1, received: 0, namespace: "/" });
    const { id } = sent[0]!;
    const counts = { heard: 3, silent: 2 };
    moves.receive({
      ...{ kind: "state", status: "here", from: "there", session: "session", time: 0 },
      ...{ id, counts, quiet },
    }, new Uint8Array());
    assertEquals(taken.length, quiet.length);
    moves.tick(1_000);
    assertEquals(taken, [[]]);
    assertEquals(sent.map(({ kind }) => kind), ["adopt", "adopted"]);
  }
});
