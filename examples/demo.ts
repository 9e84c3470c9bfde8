/**
 * The whole demo: a network that can fail, the instance of the chat behind it, which can be
 * replaced as in a deploy, and a robot that counts, for those who are alone.
 */

import { cluster, type ClusterAdapter, type SyncMessage } from "../cluster.ts";
import { aiChat } from "./ai/chat.ts";
import { type Chat, chat, type ChatOptions } from "./chat.ts";
import { Network, type Where } from "./network.ts";

const FAULT_MS = 5_000;
const LAST_BYTES_MS = 250; // in which what was said last passes the network
const COUNT_TO = 40;
const COUNT_MS = 250;

/** What a runtime does for the demo. */
export interface Host {
  /** Its name, and whether `serve` takes upgrades to a native WebSocket. */
  name: string;
  native: boolean;
  stripTypes: ChatOptions["stripTypes"];
  /** Serves on a free port of this machine alone. */
  serve(chat: Chat): Serving | Promise<Serving>;
}

export interface Serving {
  port: number;
  /** Ends the server with all its connections. */
  stop(): unknown;
}

/** One that runs. */
export interface Demo {
  port: number;
  close(): Promise<void>;
}

/** `addresses` are told to the page, which tells them to whoever is alone in the room. */
export async function demo(
  host: Host,
  where: Where,
  addresses: (port: number) => string[],
): Promise<Demo> {
  const network = new Network();
  const port = await network.listen(where);
  let running: { chat: Chat; serving: Serving } | undefined;
  let restarting: Promise<void> | undefined;
  let counting: ReturnType<typeof setInterval> | undefined;
  const sync = cluster(backplane());
  const controls = {
    "/cut": (tab: string) => network.cut(tab, FAULT_MS),
    "/hold": (tab: string) => network.hold(tab, FAULT_MS),
    "/restart": () => void (restarting ??= replace().finally(() => restarting = undefined)),
    "/count": count,
  };
  const ai = aiChat(host.stripTypes);
  const about = () => ({ server: host.name, native: host.native, addresses: addresses(port) });

  /** As in a deploy: the new instance is there before the old one goes. */
  async function replace(): Promise<void> {
    const before = running;
    const next = chat({ stripTypes: host.stripTypes, sync, controls, about, ai: ai.fetch });
    const serving = await host.serve(next);
    running = { chat: next, serving };
    network.relayTo(serving.port);
    await before?.chat.close(true);
    await before?.serving.stop();
  }

  function count(): void {
    if (counting) return;
    const run = crypto.randomUUID();
    let n = 0;
    counting = setInterval(() => {
      const id = `${run} ${++n}`;
      running?.chat.tell({ id, name: "Robot", text: `${n}`, at: Date.now() });
      if (n < COUNT_TO) return;
      clearInterval(counting);
      counting = undefined;
    }, COUNT_MS);
  }

  await replace();
  return {
    port,
    async close() {
      clearInterval(counting);
      await restarting;
      await Promise.all([running?.chat.close(false), ai.close()]);
      await new Promise((resolve) => setTimeout(resolve, LAST_BYTES_MS));
      network.close();
      await running?.serving.stop();
    },
  };
}

/** Connects instances within this process; between processes it would be Redis. */
function backplane(): ClusterAdapter {
  const instances = new Map<string, (message: SyncMessage) => void>();
  return ({ id }) => ({
    subscribe: (deliver) => void instances.set(id, deliver),
    publish(message) {
      for (const [to, deliver] of instances) if (to !== id) queueMicrotask(() => deliver(message));
    },
    close: () => void instances.delete(id),
  });
}
