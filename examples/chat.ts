/**
 * The chat that `deno.ts`, `bun.ts` and `node.ts` serve: its hooks, the routes of its page, and a switch that cuts the network
 * of one browser tab, to see that nothing is lost.
 */

import { readFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { sseAdapter } from "../mod.ts";

const MAX_NAME = 24; // characters
const MAX_TEXT = 500; // characters
const CUT_MS = 5_000;
const MAX_CUTS = 1_000; // tabs that are cut at the same time

/** How long the shutdown waits for tabs whose network is down: platforms kill after 5 to 10 s. */
const GOODBYE_MS = 4_000;

export interface Chat {
  fetch(request: Request, info?: unknown): Promise<Response>;
  /** Tells every tab that the server restarts. */
  close(): Promise<void>;
}

/** Makes the chat. `stripTypes` turns TypeScript into JavaScript, which every runtime can do itself. */
export function chat(stripTypes: (source: string) => string): Chat {
  const names = new Map<string, string>(); // by peer.id, which is public and no secret

  const ws = sseAdapter({
    bidir: true,
    maxMessageSize: 16 * 1024,
    maxPeers: 200,
    hooks: {
      open(peer) {
        peer.subscribe("chat");
      },
      message(peer, message) {
        const input = parse(message.text());
        if (input?.type === "ping" && typeof input.id === "number") {
          peer.send(JSON.stringify({ type: "pong", id: input.id }));
        } else if (input?.type === "join") {
          const taken = new Set(names.values());
          taken.delete(names.get(peer.id) ?? ""); // joining again changes the name
          const name = unique(line(input.name) || "guest", taken);
          names.set(peer.id, name);
          peer.send(JSON.stringify({ type: "joined", name }));
          tellWho();
        } else if (input?.type === "say") {
          const name = names.get(peer.id);
          const text = clip(input.text, MAX_TEXT);
          if (!name) sorry("Join first.");
          else if (text) tell({ type: "said", name, text, at: Date.now() });
        } else {
          sorry("This chat understands join, say and ping, in JSON.");
        }

        function sorry(text: string): void {
          peer.send(JSON.stringify({ type: "error", text }));
        }
      },
      close(peer) {
        if (names.delete(peer.id)) tellWho();
      },
    },
  });

  function tell(event: Record<string, unknown>): void {
    ws.publish("chat", JSON.stringify(event));
  }

  function tellWho(): void {
    tell({ type: "who", names: [...names.values()] });
  }

  const network = cuttable((request, info) => ws.fetch(request, info));
  let client: string | undefined;

  const close = () => ws.close(1012, "Restarting", { signal: AbortSignal.timeout(GOODBYE_MS) });

  async function answerAll(request: Request, info?: unknown): Promise<Response> {
    if (ws.handles(request)) return await network.fetch(request, info);
    switch (`${request.method} ${new URL(request.url).pathname}`) {
      case "GET /":
        return answer("text/html", await read("./chat.html"));
      case "GET /client.js":
        return answer(
          "text/javascript",
          client ??= stripTypes(await read("../client.ts")),
        );
      case "POST /cut":
        return network.cut(request);
      default:
        return new Response("Not found\n", { status: 404 });
    }
  }
  return { fetch: answerAll, close };
}

/**
 * Wraps a fetch handler so that the network of one browser tab can be cut: the streams it has open fail, and until
 * `CUT_MS` have passed its requests are answered with 503. A tab is told by the header `x-chat-tab`.
 */
function cuttable(
  fetch: (request: Request, info: unknown) => Response | Promise<Response>,
) {
  const lines = new Set<{ tab: string; cut: () => void }>(); // what the tabs have open
  const back = new Map<string, number>(); // when a tab's network is back, the soonest first

  function hold(tab: string, cut: () => void): () => void {
    const line = { tab, cut };
    lines.add(line);
    return () => lines.delete(line);
  }

  function breakable(
    tab: string,
    body: ReadableStream<Uint8Array>,
  ): ReadableStream<Uint8Array> {
    const reader = body.getReader();
    return new ReadableStream<Uint8Array>({
      start(controller) {
        const release = hold(tab, () => {
          controller.error("The network of a tab was cut, as it asked");
          reader.cancel().catch(() => {}); // it may have failed by itself
        });
        reader.closed.then(release, release);
      },
      async pull(controller) {
        const { done, value } = await reader.read();
        if (done) controller.close();
        else controller.enqueue(value);
      },
      cancel: (reason) => reader.cancel(reason),
    }, { highWaterMark: 0 });
  }

  return {
    cut(request: Request): Response {
      const tab = request.headers.get("x-chat-tab");
      if (!tab || tab.length > 64) {
        return new Response("Which tab?\n", { status: 400 });
      }
      back.delete(tab);
      back.set(tab, Date.now() + CUT_MS);
      for (const [other, time] of back) {
        if (time > Date.now() && back.size <= MAX_CUTS) break;
        back.delete(other);
      }
      for (const line of lines) if (line.tab === tab) line.cut();
      return new Response(null, { status: 204 });
    },

    async fetch(request: Request, info: unknown): Promise<Response> {
      const tab = request.headers.get("x-chat-tab");
      if (!tab) return fetch(request, info);
      const down = () => new Response("The network is cut\n", { status: 503 });
      if ((back.get(tab) ?? 0) > Date.now()) return down();

      // A streaming upload has no response yet that could fail: it is answered in the midst of it.
      let resolve!: (nothing: undefined) => void; // Node 20 has no Promise.withResolvers
      const cut = new Promise<undefined>((done) => resolve = done);
      const release = hold(tab, () => resolve(undefined));
      try {
        const pending = Promise.resolve(fetch(request, info));
        const response = await Promise.race([pending, cut]);
        if (!response) {
          pending.then((late) => late.body?.cancel()).catch(() => {}); // nobody is there to read it
          return down();
        }
        return response.body ? new Response(breakable(tab, response.body), response) : response;
      } finally {
        release();
      }
    },
  };
}

/** The JSON object that a message is; nothing if it is none. */
function parse(text: string): Record<string, unknown> | undefined {
  try {
    const value: unknown = JSON.parse(text);
    return typeof value === "object" && value !== null ? { ...value } : undefined;
  } catch {
    return undefined;
  }
}

/** A name fit to be shown: one line, without control characters. */
function line(name: unknown): string {
  return clip(clip(name, 1_000).replace(/[\p{C}\p{Z}]+/gu, " "), MAX_NAME);
}

/** At most `length` characters of what should be a string, and is from a stranger. */
function clip(text: unknown, length: number): string {
  return typeof text === "string" ? [...text.trim()].slice(0, length).join("").trim() : "";
}

function unique(name: string, taken: Set<string>): string {
  for (let n = 1;; n++) {
    const candidate = n === 1 ? name : `${name} ${n}`;
    if (!taken.has(candidate)) return candidate;
  }
}

function read(path: string): Promise<string> {
  return readFile(fileURLToPath(new URL(path, import.meta.url).href), "utf8");
}

function answer(type: string, body: string): Response {
  return new Response(body, {
    headers: {
      "content-type": `${type}; charset=utf-8`,
      "cache-control": "no-cache",
    },
  });
}
