/**
 * Several Workers, each with an adapter and a server of its own, that share nothing but
 * crossws's BroadcastChannel driver.
 */
import { roundRobin } from "./bus.ts";
import { chaos, pickSeed } from "./chaos.ts";
import type { Command, Init, Said } from "./fixtures/cluster-worker.ts";
import type { Told } from "./fixtures/instance.ts";
import { assertEquals, assertGreater, test, type TestContext, within } from "./harness.ts";
import { connect, Queue } from "./pair.ts";
import { everyTurn, gather, numbers, talkers } from "./talker.ts";

let channels = 0;

class Instance {
  readonly #worker: Worker;
  readonly #said: Queue<Said> = new Queue();
  port = 0;

  constructor(t: TestContext, init: Init) {
    const file = new URL("./fixtures/cluster-worker.ts", import.meta.url);
    const worker = this.#worker = new Worker(file.href, { type: "module" });
    t.defer(() => worker.terminate());
    worker.onmessage = ({ data }) => this.#said.push(data);
    worker.postMessage(init);
  }

  static async start(t: TestContext, init: Init): Promise<Instance> {
    const instance = new Instance(t, init);
    const failed = new Promise<never>((_, reject) => {
      instance.#worker.onerror = (event) => reject(new Error(event.message));
    });
    const ready = instance.#said.next({ timeout: 20_000 }) as Promise<{ port: number }>;
    instance.port = (await Promise.race([ready, failed])).port;
    return instance;
  }

  get url(): string {
    return `http://127.0.0.1:${this.port}`;
  }

  do(command: Command): void {
    this.#worker.postMessage(command);
  }

  async tell(): Promise<Told> {
    this.do("tell");
    return await this.#said.next() as Told;
  }
}

function startAll(t: TestContext, maxPayload?: number): Promise<Instance[]> {
  const channel = `duplex-workers-${channels++}`;
  return Promise.all([0, 1, 2].map(() => Instance.start(t, { channel, maxPayload })));
}

for (
  const [how, maxPayload] of [
    ["as it is", undefined],
    ["in one payload by cluster()", 1024 * 1024],
    ["in fragments of cluster()", 8000],
  ] as const
) {
  test(
    `between workers, crossws's broadcastChannel driver, ${how}: each publication to each subscriber once`,
    async (t) => {
      const instances = await startAll(t, maxPayload);
      const join = async (path: string) =>
        await Promise.all(instances.map(async ({ url }) => {
          const { opened, socket, messages } = connect(t, url + path, { transport: "post" });
          await opened;
          return { socket, messages, expected: [] as unknown[] };
        }));
      const room = await join("/room");
      const other = await join("/other");
      const expect = async (data: unknown, ...clients: typeof room) => {
        for (const { messages, expected } of clients) {
          expected.push(data);
          assertEquals(plain(await messages.next()), data);
        }
      };
      for (const [i, instance] of instances.entries()) {
        // The publisher has no echo, neither from here nor from the channel.
        room[i]!.socket.send(`publish said to ${i}`);
        await expect(`said to ${i}`, ...room.filter((_, at) => at !== i));
        const large = `${i} ä\u0000\n`.repeat(50_000);
        const bytes = Uint8Array.from({ length: 100_000 }, (_, at) => at * (i + 3));
        for (const data of [large, bytes, new Uint8Array([0, 255, 254])]) {
          instance.do({ publish: data, namespace: "/room" });
          await expect(data, ...room);
        }
        other[i]!.socket.send(`publish elsewhere ${i}`);
        await expect(`elsewhere ${i}`, ...other.filter((_, at) => at !== i));
      }
      // A channel keeps the order of each publisher: what came twice would stand before these.
      for (const [i, instance] of instances.entries()) {
        instance.do({ publish: `everywhere ${i}` });
        await expect(`everywhere ${i}`, ...room, ...other);
      }
      for (const { messages, expected } of [...room, ...other]) {
        assertEquals(messages.all.map(plain), expected);
      }
      for (const instance of instances) assertEquals((await instance.tell()).errors, []);
    },
    { timeout: 40_000 },
  );
}

/** The client's binaryType is "arraybuffer". */
function plain(data: unknown): unknown {
  return data instanceof ArrayBuffer ? new Uint8Array(data) : data;
}

test(
  "between workers, every request at the next one: exactly once, in order, through cuts",
  async (t) => {
    const instances = await startAll(t, 1024 * 1024);
    const proxy = await roundRobin(t, instances.map(({ port }) => port));
    const network = t.use(await chaos(proxy.port, { seed: pickSeed(), cutEvery: [100, 500] }));
    const all = await talkers(t, network.url, ["post", "stream", "duplex"]);
    do await Promise.all(all.map((talker) => talker.talk(300, 10))); while (!everyTurn(proxy.log));
    await within(Promise.all(all.map((talker) => talker.heard())), 30_000, "hearing all");
    network.calm();
    const got = await gather(instances); // asserts that hooks ran at the owner alone
    for (const { name, sent, received, failures, socket } of all) {
      assertEquals([failures, received], [[], sent], name);
      assertEquals(got[name], numbers(sent), name);
      assertGreater(socket.stats.resumes, 0, name);
    }
  },
  { timeout: 60_000 },
);
