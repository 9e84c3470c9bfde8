/**
 * What runs in a browser's page: real clients of the page's own origin.
 *
 * @module
 */
import { WebSocketSSE as Crossws } from "crossws/websocket/sse";
import { WebSocketSSE } from "../client.ts";
import { wallClock } from "./clock.ts";
import { type Percentiles, percentiles, roundTrips, type Socket } from "./trips.ts";

export type PageKind = "native" | "raw" | "crossws" | "ours";

/** What the page offers to whoever drives the browser. */
export interface BenchPage {
  /** Echoes, one after the other; milliseconds. */
  roundTrip(kind: PageKind, trips: number): Promise<Percentiles>;
  /** Opens a socket that takes as many stamped messages. */
  listen(kind: PageKind, messages: number): Promise<void>;
  /** How late those were, in ms, once all have come. */
  delays(): Promise<Percentiles>;
}

const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

async function open(kind: PageKind): Promise<Socket> {
  const url = new URL("/?topics=1", location.href).href;
  const socket = await make(kind, url);
  await new Promise<void>((resolve, reject) => {
    socket.onopen = resolve;
    socket.onerror = () => reject(new Error(`${kind} failed to open`));
  });
  if (kind === "crossws") await pause(200); // it is open before it can send
  return socket;
}

function make(kind: PageKind, url: string): Socket | Promise<Socket> {
  if (kind === "native") return new WebSocket(url.replace(/^http/, "ws")) as Socket;
  if (kind === "ours") return new WebSocketSSE(url) as Socket;
  // By default it streams where no browser can, and nothing arrives.
  if (kind === "crossws") return new Crossws(url, { stream: mayStream() }) as unknown as Socket;
  return streams(url);
}

/**
 * The limit of the platform: an event stream down; up a streamed body, where the browser has that
 * and HTTP/2, or else a request for each message.
 */
async function streams(url: string): Promise<Socket> {
  const id = crypto.randomUUID();
  const encoder = new TextEncoder();
  const decoder = new TextDecoder();
  const abort = new AbortController();
  const { signal } = abort;
  const down = (await fetch(`${url}&id=${id}`, { signal })).body!.getReader();
  await down.read();
  const socket: Socket = {
    ...{ onopen: null, onmessage: null, onerror: null },
    send: await uplink(`${url}&to=${id}`, signal, encoder),
    close: () => abort.abort(),
  };
  const read = async () => {
    let text = "";
    for (let chunk = await down.read(); !chunk.done; chunk = await down.read()) {
      text += decoder.decode(chunk.value, { stream: true });
      for (let end = text.indexOf("\n\n"); end >= 0; end = text.indexOf("\n\n")) {
        socket.onmessage?.({ data: text.slice("data: ".length, end) });
        text = text.slice(end + 2);
      }
    }
  };
  read().catch(() => {}); // aborted
  setTimeout(() => socket.onopen?.());
  return socket;
}

/** Whether this browser streams bodies up to this server. */
function mayStream(): boolean {
  const body = new ReadableStream();
  const init = { method: "POST", body, duplex: "half" } as RequestInit;
  // A browser that does not know streams makes a text of it.
  if (new Request(location.href, init).headers.has("content-type")) return false;
  const [navigation] = performance.getEntriesByType("navigation");
  return (navigation as PerformanceNavigationTiming).nextHopProtocol === "h2";
}

async function uplink(
  url: string,
  signal: AbortSignal,
  encoder: TextEncoder,
): Promise<(text: string) => void> {
  const post = (body: BodyInit) =>
    void fetch(url, { method: "POST", body, signal, duplex: "half" } as RequestInit)
      .catch(() => {}); // aborted
  if (!mayStream()) return post;
  const { readable, writable } = new TransformStream<Uint8Array, Uint8Array>();
  post(readable);
  const writer = writable.getWriter();
  await pause(100);
  return (text) => void writer.write(encoder.encode(text));
}

let arrived: Promise<number[]>;

const page: BenchPage = {
  async roundTrip(kind, trips) {
    return await roundTrips(await open(kind), trips);
  },

  async listen(kind, messages) {
    const now = wallClock();
    const socket = await open(kind);
    arrived = new Promise((resolve) => {
      const times: number[] = [];
      socket.onmessage = ({ data }) => {
        times.push(now() - parseFloat(data));
        if (times.length < messages) return;
        socket.close();
        resolve(times);
      };
    });
  },

  delays: async () => percentiles((await arrived).slice(100)),
};

Object.assign(globalThis, { page });
