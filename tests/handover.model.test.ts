/**
 * The handover protocol at random: `handover.ts` as it is breaks no rule in 10,000 walks, and
 * without any one of its rules it does.
 */
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { pathToFileURL } from "node:url";
import { type MoveHead, type Mover, Moves } from "../handover.ts";
import { parking } from "../parking.ts";
import {
  assertEquals,
  assertGreater,
  assertLess,
  root,
  sleep,
  test,
  type TestContext,
  testOnce,
} from "./harness.ts";
import { idle, walks } from "./handover.model.ts";

type Make = typeof Moves<number>;

/** Rules, and what takes each out: text of handover.ts that stands there once, and its replacement. */
const RULES: Record<string, [string, string]> = {
  "the giver keeps the session until it is confirmed": [
    "this.#limbos.set(session, {",
    "this.#mover.release(session, 'moved'); if (!1) this.#limbos.set(session, {",
  ],
  "the giver asks before it takes back": [
    "this.#inquire(limbo);",
    "this.#onTaken({ ...limbo, yes: false });",
  ],
  "a no binds": [
    "if (!yes && adoption?.id === id) this.#end(adoption);",
    "",
  ],
  "whoever waits no longer says no by itself": [
    "    this.#mover.send(arrived?.from ?? owner, head);\n",
    "",
  ],
  "what was taken is remembered": [
    "this.#moved.delete(session);\n    this.#taken.set(id, session, this.#mover.now());",
    "this.#moved.delete(session);",
  ],
  "a state that nobody waits for is dropped": [
    "if (adoption?.id !== id || adoption.arrived || this.#isOld(head.time)) return;",
    "if (!adoption) { if (status === 'here') this.#mover.take({} as never, state, []); return; }",
  ],
  "the session waits for publications that it has had": [
    "else if (hearing || this.#caughtUp(adoption.arrived)) this.#take(adoption);",
    "else this.#take(adoption);",
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

/** The same where an instance hears the topics alone that it has joined. */
const TOPICAL_RULES: Record<string, [string, string]> = {
  "a session that comes hears its topics before it is said to be here": [
    "if (hearing?.begun) hearing.begun.then(() => claim(true), () => claim(false));",
    "if (hearing?.begun) claim(true);",
  ],
  "what was published to it meanwhile follows it": [
    "this.#mover.send(to, head, this.#mover.rest(session));",
    "this.#mover.send(to, head, new TextEncoder().encode('[]'));",
  ],
  "what followed it is not repeated": [
    "adoption.arrived.counts = counts;",
    "",
  ],
  "who has said that it is here keeps it": [
    'arrived?.phase === "ours" || arrived?.from',
    "arrived?.from",
  ],
};

/** The same of parking.ts. */
const PARKING_RULES: Record<string, [string, string]> = {
  "a session that was parked is taken back as anybody takes it": [
    "found = bytes ? await this.#sessionOf(parked, bytes) : undefined;",
    "found = {} as never;",
  ],
  "what is taken back is what was parked": [
    'if (label.kind === "session" && label.id === id) return',
    "return",
  ],
  "nothing points to a session that is in service again": [
    'if (!isStill(parked, "storing")) return;',
    "",
  ],
  "what fails once something points to it is decided by who takes it": [
    'else if (parked.phase === "pointing") this.#waits.hold(this.#reclaim(parked));',
    'else if (parked.phase === "pointing") this.#back(parked);',
  ],
  "a parking that is over takes no more steps": [
    'this.#enter(parked, "over");',
    "",
  ],
  "an older state does not stand in for a newer one": [
    "&& (key === undefined || keys.includes(key))",
    "",
  ],
  "a token's mark is another one in each answer": [
    "return hex(crypto.getRandomValues(new Uint8Array(4)));",
    "return '';",
  ],
  "what nobody waits for any more is parked again": [
    "if (await land(this.#found)) return true;",
    "await land(this.#found); return true;",
  ],
  "what something points to is taken again before it is put back once more": [
    "this.#id = id; // whoever",
    "// whoever",
  ],
  "a session that has come is parked here no more": [
    'if (parked) this.#leave(parked, "");',
    "",
  ],
  "publications that it has had are not repeated": [
    "await this.#quay.take(session, state, counts))",
    "await this.#quay.take(session, state, {}))",
  ],
};

/** `DUPLEX_SOAK=1`: as many as without a store. */
const WALKS = process.env.DUPLEX_SOAK ? 10_000 : 2_000;

testOnce(`${WALKS} walks with a parking store break no rule`, async () => {
  assertEquals(await walks(WALKS, Moves as Make, { park: parking }), { broken: 0 });
}, { timeout: 120_000 });

for (const [rule, [text, replacement]] of Object.entries(PARKING_RULES)) {
  testOnce(`without its rule parking breaks: ${rule}`, async (t) => {
    const { parking } = await without(t, "parking.ts", text, replacement);
    const { broken } = await walks(10_000, Moves as Make, { enough: 1, park: parking });
    assertGreater(broken, 0);
  }, { timeout: 120_000 });
}

test("10,000 walks of the handover protocol break no rule", async () => {
  assertEquals(await walks(10_000, Moves as Make), { broken: 0 });
}, { timeout: 120_000 });

for (const [rule, [text, replacement]] of Object.entries(RULES)) {
  test(`without its rule the handover protocol breaks: ${rule}`, async (t) => {
    const { Moves } = await without(t, "handover.ts", text, replacement);
    assertGreater((await walks(10_000, Moves as Make, { enough: 1 })).broken, 0);
  }, { timeout: 120_000 });
}

test("10,000 walks by topics break no rule", async () => {
  assertEquals(await walks(10_000, Moves as Make, { topical: true }), { broken: 0 });
}, { timeout: 120_000 });

for (const [rule, [text, replacement]] of Object.entries(TOPICAL_RULES)) {
  test(`without its rule the handover by topics breaks: ${rule}`, async (t) => {
    const { Moves } = await without(t, "handover.ts", text, replacement);
    const { broken } = await walks(10_000, Moves as Make, { enough: 1, topical: true });
    assertGreater(broken, 0);
  }, { timeout: 120_000 });
}

/** A file with a piece of it replaced. */
async function without(
  t: TestContext,
  name: "handover.ts" | "parking.ts",
  text: string,
  replacement: string,
): Promise<{ Moves: Make; parking: typeof parking }> {
  const source = await readFile(join(root, name), "utf8");
  assertEquals(source.split(text).length, 2, `stands once in ${name}: ${text}`);
  const folder = await mkdtemp(join(tmpdir(), "duplex-rules-"));
  t.defer(() => rm(folder, { recursive: true }));
  const file = join(folder, name);
  await writeFile(file, source.replace(text, replacement));
  return await import(pathToFileURL(file).href);
}

test("of an instance that has long been quiet, and was never heard here, nothing is waited for", () => {
  for (const quiet of [["silent"], []]) {
    const taken: unknown[] = [];
    const sent: MoveHead[] = [];
    const moves = new Moves<string>("here", 5_000, 30_000, {
      ...{ now: () => 0, send: (_to, head) => void sent.push(head), owns: () => taken.length > 0 },
      ...{
        pack: () => undefined,
        restore() {},
        release() {},
        had() {},
        quiet: () => [],
        takes: true,
      },
      ...{ rest: () => new Uint8Array(), hear: () => undefined },
      take: (_claim, _state, missed) => void taken.push(missed),
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

test("a session that came late is given a second like any for what is to come with it", async () => {
  const taken: unknown[] = [];
  const sent: MoveHead[] = [];
  let heard = 1;
  const moves = new Moves<string>("here", 5_000, 30_000, {
    ...idle((_to, head) => void sent.push(head)),
    take: (_claim, _state, missed) => void taken.push(missed),
    counts: () => ({ there: heard }),
  });
  const adopting = moves.adopt("session", "there", { attempt: 1, received: 0, namespace: "/" });
  moves.tick(1_500);
  const head = { kind: "state", status: "here", from: "there", session: "session" } as const;
  moves.receive({ ...head, id: sent[0]!.id, time: 0, counts: { there: 2 } }, new Uint8Array());
  moves.tick(500);
  heard = 2;
  moves.published({ from: "there", n: 2, namespace: "/", message: "had" });
  await adopting;
  assertEquals(taken, [[]]);
});

test("who was frozen is told that its session was taken, however late it asks", async () => {
  let now = 0;
  const done: string[] = [];
  const moves: Record<string, Moves<string>> = {};
  let isDeaf = true;
  const mover = (name: string): Mover<string> => ({
    ...idle(() => {}),
    now: () => now,
    send(to, head, state = new Uint8Array()) {
      if (to !== "giver" || !isDeaf) queueMicrotask(() => moves[to]!.receive(head, state));
    },
    owns: () => (done.length > 0) === (name === "taker"),
    pack: () => ({ state: new Uint8Array(), marks: [] }),
    release: (_session, end) => void done.push(`release ${end}`),
    take: () => void done.push("take"),
  });
  for (const name of ["giver", "taker"]) {
    moves[name] = new Moves(name, 5_000, 30_000, mover(name));
  }
  const claim = { time: 0, attempt: 1, received: 0, namespace: "/" };
  const asking = moves.taker!.adopt("session", "giver", claim);
  moves.giver!.receive({
    ...{ ...claim, kind: "adopt", id: moves.taker!.asking("session")! },
    ...{ from: "taker", session: "session" },
  }, new Uint8Array());
  await asking;
  assertEquals(done, ["take"], "and nobody hears that it was");
  now = 200_000;
  isDeaf = false;
  moves.taker!.tick(500); // it knows no more how it has come
  moves.giver!.tick(500);
  await sleep(0);
  assertEquals(done, ["take", "release moved"]);
});

test("who has been told that a session stays is not given it by the same question, should it come again", () => {
  const sent: MoveHead[] = [];
  let isBusy = true;
  const moves = new Moves<string>("here", 5_000, 30_000, {
    ...idle((_to, head) => void sent.push(head)),
    ...{
      owns: () => true,
      pack: () => isBusy ? undefined : { state: new Uint8Array(), marks: [] },
    },
  });
  const ids = { from: "there", session: "session" };
  const claim = { time: 0, attempt: 1, received: 0, namespace: "/" };
  for (const id of ["a", "a", "b"]) {
    moves.receive({ ...ids, ...claim, kind: "adopt", id }, new Uint8Array());
    isBusy = false;
  }
  const states = sent.map((head) => head.kind === "state" && `${head.id} ${head.status}`);
  assertEquals(states, ["a stays", "b here"]);
});

test("who is told that a session is wanted no more gives it to nobody who asked for it before", () => {
  const sent: MoveHead[] = [];
  const moves = new Moves<string>("here", 5_000, 30_000, {
    ...idle((_to, head) => void sent.push(head)),
    ...{ owns: () => true, pack: () => ({ state: new Uint8Array(), marks: [] }) },
  });
  const ids = { id: "a", from: "there", session: "session" };
  moves.receive({ ...ids, kind: "taken", yes: false }, new Uint8Array());
  const claim = { time: 0, attempt: 1, received: 0, namespace: "/" };
  moves.receive({ ...ids, ...claim, kind: "adopt" }, new Uint8Array());
  assertEquals([sent, moves.size, moves.remembers], [[], 0, true]);
  moves.receive({ ...ids, ...claim, kind: "adopt", id: "b" }, new Uint8Array());
  moves.receive({ ...ids, kind: "taken", id: "b", yes: false }, new Uint8Array());
  moves.receive({ ...ids, ...claim, kind: "adopt", id: "b" }, new Uint8Array());
  assertEquals(sent.map(({ id }) => id), ["b"], "nor to who repeats what was said");
});

test("of the connections that wait for a session the latest is the next to ask for it, and the last", async () => {
  const sent: MoveHead[] = [];
  const moves = new Moves<string>("here", 5_000, 30_000, idle((_to, head) => void sent.push(head)));
  const attempts = [3, 4, 6, 5, 6];
  const asking = attempts.map((attempt) =>
    moves.adopt("session", "there", { attempt, received: 0, namespace: "/" })
  );
  moves.unknown(sent[0]!.id);
  await Promise.all(asking.slice(0, -1)); // those that were given up are kept no longer
  moves.adopt("session", "there", { attempt: 2, received: 0, namespace: "/" });
  moves.unknown(sent[1]!.id);
  await Promise.all(asking);
  assertEquals(sent.map((head) => head.kind === "adopt" && head.attempt), [3, 6]);
  assertEquals(moves.remembers, false);
});

for (
  const [who, claim, knows] of [
    ["with another token", { attempt: 2, mark: "new" }, true],
    ["with one that it had", { attempt: 2, mark: "old" }, false],
    ["that is older", { attempt: 1, mark: "new" }, false],
    ["where there is no store", { attempt: 2 }, false],
  ] as const
) {
  test(`who has given a session away ${knows ? "knows" : "does not know"} by a client ${who} that it was taken`, () => {
    const done: string[] = [];
    const moves = new Moves<string>("here", 5_000, 30_000, {
      ...idle(() => {}),
      ...{ owns: () => !done.length, pack: () => ({ state: new Uint8Array(), marks: ["old"] }) },
      release: (_session, end) => void done.push(end),
    });
    const ids = { id: "a", from: "there", session: "session" };
    const first = { time: 0, attempt: 1, received: 0, namespace: "/", mark: "old" };
    moves.receive({ ...ids, ...first, kind: "adopt" }, new Uint8Array());
    assertEquals(moves.leaving, 1);
    moves.receive({ ...ids, ...first, ...claim, kind: "adopt", id: "b" }, new Uint8Array());
    assertEquals([moves.leaving, done], knows ? [0, ["moved"]] : [1, []]);
    assertEquals(moves.whereabouts("session"), knows ? "there" : undefined);
  });
}

for (
  const [what, joins, takes, kinds] of [
    ["claimed when they are joined, for one message more", true, true, "state adopted rest"],
    ["left where they cannot be", false, true, "state taken"],
    ["left where its taker closes meanwhile", true, false, "state taken"],
  ] as const
) {
  test(`a session with topics is ${what}`, async () => {
    const said: string[] = [];
    const done: string[] = [];
    const moves: Record<string, Moves<string>> = {};
    const mover = (name: string): Mover<string> => ({
      ...idle(() => {}),
      send(to, head, state = new Uint8Array()) {
        said.push(head.kind);
        queueMicrotask(() => moves[to]!.receive(head, state));
      },
      get takes() {
        return takes || !done.includes("hear");
      },
      owns: () => name === "giver" && !done.length,
      pack: () => ({ state: new Uint8Array(), marks: [] }),
      restore: () => void done.push("restore"),
      release: () => void done.push("release"),
      rest: () => new Uint8Array([1]),
      hear() {
        done.push("hear");
        const begun = sleep(0).then(() => {
          if (!joins) throw new Error("it cannot be joined");
        });
        return { begun, end: () => void done.push("end") };
      },
      take: (_claim, _state, _missed, rest) => void done.push(`take ${rest}`),
    });
    for (const name of ["giver", "taker"]) {
      moves[name] = new Moves(name, 5_000, 30_000, mover(name));
    }
    await moves.taker!.adopt("session", "giver", { attempt: 1, received: 0, namespace: "/" });
    if (joins && takes) assertEquals(done, ["hear", "release", "take 1", "end"]);
    else {
      await sleep(0); // nobody has to ask
      assertEquals(done, ["hear", "end", "restore"]);
    }
    assertEquals(said.join(" "), `adopt ${kinds}`);
  });
}

test("who has taken a session knows what that has been published, though it was not there", () => {
  const sent: MoveHead[] = [];
  const had: unknown[] = [];
  const moves = new Moves<string>("here", 5_000, 30_000, {
    ...idle((_to, head) => void sent.push(head)),
    ...{ had: (counts) => void had.push(counts), take: () => void had.push("take") },
  });
  moves.adopt("session", "there", { attempt: 1, received: 0, namespace: "/" });
  const head = { kind: "state", status: "here", from: "there", session: "session" } as const;
  const counts = { silent: 12 };
  const { id } = sent[0]!;
  moves.receive({ ...head, id, time: 0, counts, quiet: ["silent"] }, new Uint8Array());
  assertEquals(had, [counts, "take"], "before its hook, which may send it on");
});

test("a session that is ours is taken, though its instance closes before its rest has come", async () => {
  const done: string[] = [];
  const sent: MoveHead[] = [];
  const moves = new Moves<string>("here", 5_000, 30_000, {
    ...idle((_to, head) => void sent.push(head)),
    hear: () => ({ begun: Promise.resolve(), end: () => void done.push("end") }),
    take: (_claim, _state, missed, rest) => void done.push(`take ${missed} ${rest}`),
  });
  const adopting = moves.adopt("session", "there", { attempt: 1, received: 0, namespace: "/" });
  const [{ id }] = sent as [MoveHead];
  const head = { kind: "state", status: "here", from: "there", session: "session", id } as const;
  moves.receive({ ...head, time: 0, counts: { there: 1 } }, new Uint8Array());
  await sleep(0);
  moves.published({ from: "there", n: 2, namespace: "/", message: "heard" });
  assertEquals(done, []);
  moves.close();
  await adopting;
  assertEquals(done, ["take heard undefined", "end"]);
  assertEquals(sent.map(({ kind }) => kind), ["adopt", "adopted"]);
});

test("a publication that nobody waits for costs the same however many sessions have come", () => {
  const sent: MoveHead[] = [];
  let looks = 0;
  let heard = 0;
  const moves = new Moves<string>("here", 5_000, 30_000, {
    ...idle((_to, head) => void sent.push(head)),
    counts: () => (looks++, { there: heard }),
  });
  for (let n = 0; n < 1_000; n++) {
    moves.adopt(`${n}`, "there", { attempt: 1, received: 0, namespace: "/" });
    const head = { kind: "state", status: "here", from: "there", session: `${n}` } as const;
    moves.receive({ ...head, id: sent[n]!.id, time: 0, counts: { there: 20 } }, new Uint8Array());
  }
  looks = 0;
  for (let n = 1; n <= 10; n++) {
    moves.published({ from: "there", n: ++heard, namespace: "/", message: "" });
    moves.published({ from: "elsewhere", n, namespace: "/", message: "" });
  }
  assertEquals(looks, 0);
  heard = 20;
  moves.published({ from: "there", n: 20, namespace: "/", message: "" });
  assertEquals(moves.size, 0);
});

test("a publication costs the same however many sessions are waited for, and no more is kept of it", () => {
  const sent: MoveHead[] = [];
  const moves = new Moves<string>("here", 5_000, 30_000, idle((_to, head) => void sent.push(head)));
  for (let n = 0; n < 1_000; n++) { // anybody can make up tokens
    moves.adopt(`${n}`, "there", { attempt: 1, received: 0, namespace: "/" });
  }
  let looks = 0;
  for (let n = 1; n <= 10; n++) {
    moves.published({
      ...{ from: "there", n, message: "" },
      get namespace() {
        looks++;
        return "/";
      },
    });
  }
  assertLess(looks, 100);
  for (const { id } of sent) moves.unknown(id);
  assertEquals(moves.size, 0);
});
