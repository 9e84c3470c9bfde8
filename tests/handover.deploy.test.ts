/**
 * Deploys over a real Redis, Deno and Bun mixed: instances are replaced in turn under traffic, and
 * no client sees a close; an instance that is killed is known to be gone.
 *
 * The suite tries a few of them. `DUPLEX_SOAK=1` tries all: both applications, latencies and
 * transports, three seeds each, and holds the bounds that a machine with other work cannot.
 */
import process from "node:process";
import { type Transport, WebSocketSSE } from "../client.ts";
import { mulberry32 } from "./random.ts";
import { type Instance, launch, launchAll } from "./fleet.ts";
import {
  assert,
  assertEquals,
  assertGreater,
  assertLess,
  needs,
  note,
  once,
  sleep,
  test,
  type TestContext,
  until,
} from "./harness.ts";
import { gather, numbers, Talker } from "./talker.ts";

const skip = needs("redis-server", "deno", "bun");
const soak = !!process.env.DUPLEX_SOAK;

interface Deploy {
  /** Whether each client hears itself, or all others. */
  application: "echo" | "room";
  /** Of the network, each way, in ms. */
  latency: number;
  transport: Transport | "auto";
  clients: number;
  /** How often a client speaks, in ms. */
  every: number;
  /** Whether the balancer learns that an instance goes before it does, or after. */
  learns: "before" | "after";
  seed: number;
}

const DEPLOY: Deploy = {
  application: "echo",
  latency: 0,
  transport: "post",
  clients: 6,
  every: 10,
  learns: "before",
  seed: 1,
};
const ROOM = { application: "room", every: 50 } as const;

const few: Partial<Deploy>[] = [
  { transport: "auto", latency: 60 },
  { ...ROOM, transport: "post", seed: 2 },
  { clients: 60, every: 400, transport: "auto", seed: 3 },
  { learns: "after", transport: "post", seed: 4 },
];
const all: Partial<Deploy>[] = [1, 2, 3].flatMap((seed) =>
  (["auto", "post"] as const).flatMap((transport) =>
    [0, 60].flatMap((latency) => [
      { seed, transport, latency },
      { ...ROOM, seed, transport, latency },
      { learns: "after" as const, seed, transport, latency },
    ])
  )
);

/** Says numbers, with the time, and takes what it hears of each speaker only in order. */
class Speaker {
  readonly socket: WebSocketSSE;
  readonly name: string;
  /** What each session is to have got. */
  readonly said: string[] = [];
  /** How many of each speaker it has heard. */
  readonly heard: Record<string, number> = {};
  readonly failures: string[] = [];
  /** The longest that anything took to come, in ms. */
  stall = 0;

  constructor(t: TestContext, url: string, name: string, transport: Deploy["transport"]) {
    this.name = name;
    this.socket = new WebSocketSSE(`${url}/?c=${name}`, { signal: t.signal, transport });
    this.socket.onmessage = ({ data }) => {
      const [from, number, time] = data.split(":") as [string, string, string];
      this.stall = Math.max(this.stall, performance.now() - Number(time));
      const next = this.heard[from] ?? 0;
      if (Number(number) !== next) this.failures.push(`${from}: ${number} instead of ${next}`);
      this.heard[from] = Number(number) + 1;
    };
    this.socket.onclose = ({ code }) => this.failures.push(`close ${code}`);
  }

  say(application: Deploy["application"]): void {
    const text = `${this.name}:${this.said.length}:${performance.now()}`;
    this.said.push(application === "room" ? `publish ${text}` : text);
    this.socket.send(this.said.at(-1)!);
  }
}

/** Replaces one instance by another, as a platform does. */
async function replace(
  t: TestContext,
  { redis, instances, proxy }: Awaited<ReturnType<typeof launchAll>>,
  i: number,
  learns: Deploy["learns"],
): Promise<void> {
  const successor = await launch(t, i === 1 ? "deno" : "bun", redis, { MOVES: "1" });
  await sleep(200, t.signal); // its subscription
  const old = instances[i]!;
  const learn = () => proxy.ports.splice(proxy.ports.indexOf(old.port), 1, successor.port);
  if (learns === "before") learn();
  old.child.send("close 1012");
  const { sessions } = await old.child.json<{ sessions: object }>({ timeout: 30_000 });
  assertEquals(Object.keys(sessions), [], "all have moved");
  if (learns === "after") {
    await old.child.exited;
    await sleep(1_000, t.signal);
    learn();
  }
  instances[i] = successor;
}

/** How many sessions went to another instance in the second in which most of them did. */
function busiest(resumed: number[]): number {
  return Math.max(
    ...resumed.map((from) => resumed.filter((at) => at >= from && at < from + 1_000).length),
  );
}

/** Ends all sessions, and shows what the hooks have seen of each. */
async function checkHooks(speakers: Speaker[], instances: Instance[]): Promise<void> {
  const got = await gather(instances); // each was opened once, and is at one of them
  for (const { name, said } of speakers) assertEquals(got[name], said, name);
  for (const { socket } of speakers) {
    socket.onclose = null;
    socket.close(1000);
  }
  await Promise.all(speakers.map(({ socket }) => once(socket, "close")));
  const closes = async () => {
    const told = await Promise.all(instances.map((instance) => instance.tell()));
    return told.flatMap(({ sessions }) => Object.values(sessions)).flatMap(({ closes }) => closes);
  };
  await until(async () => (await closes()).length >= speakers.length);
  assertEquals(await closes(), speakers.map(() => 1000), "close, once a session");
}

for (const given of soak ? [...all, ...few] : few) {
  const deploy = { ...DEPLOY, ...given };
  const { application, latency, transport, clients, every, learns, seed } = deploy;
  const title = `three instances are replaced in turn, and nobody sees a close: ${clients} in ` +
    `${application === "echo" ? "an echo" : "a room"}, ${transport}, ${latency} ms, ` +
    `the balancer learns it ${learns}, seed ${seed}`;
  test(title, async (t) => {
    const random = mulberry32(seed);
    const fleet = await launchAll(t, { MOVES: "1" });
    fleet.proxy.latency = latency / 2;
    const resumed: number[] = []; // when
    fleet.proxy.choose = (request) => {
      const isStream = request.headers.get("accept")?.includes("text/event-stream");
      if (isStream && request.headers.has("x-crossws-id")) resumed.push(performance.now());
      return undefined;
    };
    const speakers = numbers(clients).map((name) =>
      new Speaker(t, fleet.proxy.url, name, transport)
    );
    await Promise.all(speakers.map(({ socket }) => once(socket, "open")));
    let isOver = false;
    const speaking = Promise.all(speakers.map(async (speaker) => {
      await sleep(random() * every, t.signal);
      while (!isOver && !t.signal.aborted) {
        speaker.say(application);
        await sleep(every / 2 + random() * every, t.signal);
      }
    }));
    for (const i of [0, 1, 2]) {
      await sleep(200 + random() * 800, t.signal);
      await replace(t, fleet, i, learns);
    }
    isOver = true;
    await speaking;
    const counts = Object.fromEntries(speakers.map(({ name, said }) => [name, said.length]));
    const { ...wanted } = counts;
    const want = (name: string) =>
      application === "echo" ? { [name]: wanted[name]! } : without(wanted, name);
    const all = ({ name, heard }: Speaker) => {
      const wants = want(name);
      return Object.keys(wants).every((from) => heard[from] === wants[from]);
    };
    await until(() => speakers.every((speaker) => all(speaker) || speaker.failures.length), {
      timeout: 30_000,
    });
    for (const { name, failures } of speakers) assertEquals(failures, [], name);
    for (const { name, heard } of speakers) assertEquals(heard, want(name), name);

    const stall = Math.max(...speakers.map(({ stall }) => stall));
    const most = busiest(resumed);
    note(`stall ${Math.round(stall)} ms, ${most} of ${resumed.length} resumptions in one second`);
    if (soak) console.log(title, Math.round(stall), most, resumed.length);
    const bound = learns === "before" ? 1_500 : 5_000;
    assertLess(stall, soak ? bound : 4 * bound);
    assertGreater(resumed.length, clients - 1, "who is not moved is not tested");
    if (clients >= 60) assert(most <= resumed.length / 3, `${most} of ${resumed.length}`);
    await checkHooks(speakers, fleet.instances);
  }, { skip, timeout: 120_000 });
}

function without(counts: Record<string, number>, name: string): Record<string, number> {
  return Object.fromEntries(Object.entries(counts).filter(([other]) => other !== name));
}

test("an instance that has two seconds' notice loses nothing, and closes nobody", async (t) => {
  const { redis, instances, proxy } = await launchAll(t, { MOVES: "1" });
  const talkers = numbers(6).map((name) => new Talker(t, proxy.url, name, { transport: "auto" }));
  await Promise.all(talkers.map(({ socket }) => once(socket, "open")));
  const talking = Promise.all(talkers.map((talker) => talker.talk(300, 40)));
  await sleep(500, t.signal);
  const old = instances[1]!;
  const successor = await launch(t, "deno", redis, { MOVES: "1" });
  await sleep(200, t.signal); // its subscription
  proxy.ports.splice(1, 1, successor.port);
  old.child.send("close 1012");
  const killed = setTimeout(() => old.child.kill("SIGKILL"), 2_000);
  t.defer(() => clearTimeout(killed));
  await old.child.exited;
  instances[1] = successor;
  await talking;
  await Promise.all(talkers.map((talker) => talker.heard()));
  const got = await gather(instances);
  for (const { name, sent, received, failures, closed } of talkers) {
    assertEquals([failures, received, closed], [[], sent, undefined], name);
    assertEquals(got[name], numbers(sent), name);
  }
}, { skip, timeout: 60_000 });

for (const ADDRESSED of ["0", "1"]) {
  const how = ADDRESSED === "1" ? ", where each is addressed" : "";
  test(`clients of an instance that was killed learn it within 15 s, not 30${how}`, async (t) => {
    const { instances, proxy } = await launchAll(t, { MOVES: "1", ADDRESSED });
    const talkers = numbers(6).map((name) => new Talker(t, proxy.url, name, { transport: "post" }));
    await Promise.all(talkers.map(({ socket }) => once(socket, "open")));
    const owned = Object.keys((await instances[1]!.tell()).sessions);
    await sleep(6_000, t.signal); // each has said that it is there
    const killed = performance.now();
    instances[1]!.child.kill("SIGKILL");
    proxy.ports.splice(1, 1);
    const ended = () => talkers.filter(({ closed }) => closed);
    await until(() => ended().length === owned.length, { timeout: 25_000 });
    for (const { closed, closedAt } of ended()) {
      assertEquals(closed!.code, 1006);
      assertLess(closedAt - killed, 20_000);
    }
    const others = talkers.filter(({ closed }) => !closed);
    await Promise.all(others.map((talker) => talker.talk(20)));
    await Promise.all(others.map((talker) => talker.heard()));
    for (const { sent, received, failures } of others) {
      assertEquals([received, failures], [sent, []]);
    }
  }, { skip, timeout: 60_000 });
}
