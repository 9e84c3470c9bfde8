/**
 * Sessions that go from one instance to another, without a network: the clients are streams that
 * are read, the backplane encodes as crossws's drivers do and counts.
 *
 * @module
 */
import { decodeEnvelope, encodeEnvelope } from "crossws/sync";
import { cluster, type ClusterAdapter } from "../cluster.ts";
import { type SSEAdapter, sseAdapter, type SyncMessage } from "../server.ts";
import { answer } from "./rpc.ts";

const URL_ = "http://localhost/room";
const FULL = { accept: "text/event-stream", "x-duplex-version": "1" };
const LOG = 10; // messages that a client has not acknowledged when it goes
const decoder = new TextDecoder();

/** What the backplane has carried. */
const carried = { messages: 0, bytes: 0 };
const instances: Map<string, (message: SyncMessage) => void> = new Map();

const bus: ClusterAdapter = ({ id }) => ({
  subscribe: (deliver) => void instances.set(id, deliver),
  publish(message) {
    const payload = encodeEnvelope(id, message);
    carried.messages++;
    carried.bytes += payload.length;
    for (const [other, deliver] of instances) {
      if (other !== id) queueMicrotask(() => deliver(decodeEnvelope(payload)!.msg));
    }
  },
  close: () => void instances.delete(id),
});

function start(): SSEAdapter {
  return sseAdapter({
    bidir: true,
    maxPeers: 10_000,
    sync: cluster(bus),
    hooks: {
      open(peer) {
        peer.context.user = { name: "somebody", id: 42 };
        for (let i = 0; i < LOG; i++) peer.send(`message ${i} of about fifty bytes, as in a chat`);
      },
      revive() {},
    },
  });
}

/** Opens a session at one instance; its client resumes at the other as soon as it is asked to. */
async function open(from: SSEAdapter, to: SSEAdapter): Promise<{ moved: Promise<void> }> {
  const response = await from.fetch(new Request(URL_, { headers: FULL }));
  const reader = response.body!.getReader();
  const token = response.headers.get("x-crossws-id")!;
  let text = "";
  const seen = async (mark: string) => {
    while (!text.includes(mark)) text += decoder.decode((await reader.read()).value);
  };
  await seen(`message ${LOG - 1}`);
  const resume = async (attempt = 1): Promise<Response> => {
    const position = { "x-duplex-attempt": `${attempt}`, "last-event-id": "0" };
    const headers = { ...FULL, ...position, "x-crossws-id": token };
    const resumed = await to.fetch(new Request(URL_, { headers }));
    if (resumed.status === 200) return resumed;
    const said = await resumed.text();
    if (resumed.status !== 503 || attempt > 20) throw new Error(`${resumed.status}: ${said}`);
    await new Promise((resolve) => setTimeout(resolve, 100));
    return await resume(attempt + 1);
  };
  const move = async () => {
    await seen("duplex-renew");
    const resumed = await resume();
    text = "";
    const again = resumed.body!.getReader();
    while (!text.includes(`message ${LOG - 1}`)) {
      text += decoder.decode((await again.read()).value);
    }
    await again.cancel();
  };
  return { moved: move() };
}

answer({
  /** A deploy: ms until all sessions are at the other instance, and what one of them has cost. */
  async deploy({ sessions }) {
    const [old, young] = [start(), start()];
    await new Promise((resolve) => setTimeout(resolve, 20));
    const clients: { moved: Promise<void> }[] = [];
    for (let i = 0; i < sessions; i++) clients.push(await open(old, young));
    await new Promise((resolve) => setTimeout(resolve, 50));
    Object.assign(carried, { messages: 0, bytes: 0 });
    const started = performance.now();
    await Promise.all([old.close(1012), ...clients.map(({ moved }) => moved)]);
    const milliseconds = performance.now() - started;
    const { movedIn } = young.stats();
    const { messages, bytes } = carried;
    for (const peers of young.peers.values()) for (const peer of peers) peer.terminate();
    await young.close();
    if (movedIn !== sessions) throw new Error(`${movedIn} of ${sessions} have moved`);
    return { milliseconds, messages: messages / sessions, bytes: bytes / sessions };
  },
});
