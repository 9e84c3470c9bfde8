/**
 * The load, in a process of its own: raw sockets on Bun, so that the client is
 * not what is measured. It speaks just enough of each wire, and counts messages
 * by their marker.
 *
 * @module
 */
/// <reference types="bun-types" />
import { wallClock } from "./clock.ts";
import { BATCH, MARKER, SIZE, stampOf, text } from "./message.ts";
import { answer } from "./rpc.ts";

/** `duplex` and `get` are ours, `sse` is any other event stream. */
type Kind = "ws" | "sse" | "duplex" | "get";

const UPLINK = "content-type: application/websocket-events\r\ntransfer-encoding: chunked\r\n";
const FULL = "accept: text/event-stream\r\nx-duplex-version: 1\r\n";
const HEADS: Record<Kind, (path: string) => string> = {
  ws: (path) =>
    `GET ${path} HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n` +
    "sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
  sse: (path) => `GET ${path} HTTP/1.1\r\nhost: localhost\r\naccept: text/event-stream\r\n\r\n`,
  get: (path) => `GET ${path} HTTP/1.1\r\nhost: localhost\r\n${FULL}\r\n`,
  duplex: (path) =>
    `POST ${path} HTTP/1.1\r\nhost: localhost\r\n${FULL}${UPLINK}\r\n` +
    chunk(frame("SEQ", "1") + frame("PING", "")),
};
/** A client acknowledges at an eighth of a window, or when it has been silent for half a heartbeat, in ms. */
const ACKNOWLEDGE = 32 * 1024;
const SILENCE = 7_500;

interface Link {
  kind: Kind;
  socket: Bun.Socket<Link>;
  opened: (head: string) => void;
  isOpen: boolean;
  received: number;
  unacknowledged: number;
  /** When it last said anything. */
  spokeAt: number;
  /** What the socket did not take yet. */
  rest: Uint8Array | undefined;
}

const links: Link[] = [];
let left = Infinity;
let bytes = 0;
/** Connections that the server ended. */
let closed = 0;
let whenDone = () => {};
let lastAt = 0;
let onMessages = () => {};
/** Milliseconds between a message's stamp and its arrival, while they are to be noted. */
let delays: number[] | undefined;
let now = wallClock();

function onData(socket: Bun.Socket<Link>, data: Uint8Array): void {
  const link = socket.data;
  if (!link.isOpen) {
    link.isOpen = true;
    link.opened(new TextDecoder().decode(data));
  }
  let count = 0;
  const at = delays ? now() : 0;
  for (let i = 0; i < data.length; i++) {
    if (data[i] !== MARKER) continue;
    count++;
    // One that two chunks share is counted alone.
    if (delays && i >= SIZE - 1) delays.push(at - stampOf(data, i));
  }
  bytes += data.length;
  link.received += count;
  link.unacknowledged += data.length;
  if (link.kind === "duplex" && link.unacknowledged >= ACKNOWLEDGE) acknowledge(link);
  left -= count;
  if (left <= 0) whenDone();
  if (count) onMessages();
}

function acknowledge(link: Link): void {
  link.unacknowledged = 0;
  link.spokeAt = performance.now();
  write(link, encode(chunk(frame("ACK", `${link.received}`))));
}

/** Each when it is due, as the timers of clients are. */
setInterval(() => {
  const due = performance.now() - SILENCE;
  for (const link of links) if (link.kind === "duplex" && link.spokeAt < due) acknowledge(link);
}, 50);

function connect(kind: Kind, port: number, head: string): Promise<{ link: Link; head: string }> {
  return new Promise((resolve, reject) => {
    Bun.connect<Link>({
      hostname: "127.0.0.1",
      port,
      socket: {
        binaryType: "uint8array",
        open(socket) {
          const opened = (answer: string) => {
            if (/^HTTP\/1.1 (101|200)/.test(answer)) resolve({ link, head: answer });
            else reject(new Error(answer));
          };
          const link: Link = {
            kind,
            socket,
            opened,
            isOpen: false,
            received: 0,
            unacknowledged: 0,
            spokeAt: performance.now() - SILENCE * Math.random(),
            rest: undefined,
          };
          socket.data = link;
          links.push(link);
          write(link, encode(head));
        },
        data: onData,
        drain(socket) {
          const { rest } = socket.data;
          socket.data.rest = undefined;
          if (rest) write(socket.data, rest);
        },
        close(socket) {
          if (links.includes(socket.data)) closed++;
          reject(new Error(`${socket.data.kind}: closed`));
        },
        connectError: (_, error) => reject(error),
      },
    }).catch(reject);
  });
}

function write(link: Link, data: Uint8Array): void {
  if (link.rest) {
    link.rest = Buffer.concat([link.rest, data]);
    return;
  }
  const written = link.socket.write(data);
  if (written >= 0 && written < data.length) link.rest = data.slice(written);
}

const encode = (text: string) => new TextEncoder().encode(text);

function chunk(body: string): string {
  return `${body.length.toString(16)}\r\n${body}\r\n`;
}

function frame(type: string, payload: string): string {
  return `${type} ${payload.length.toString(16)}\r\n${payload}\r\n`;
}

/** A text frame as a client sends it, masked with zeros. */
function webSocketFrame(text: string): Uint8Array {
  return new Uint8Array([0x81, 0x80 | SIZE, 0, 0, 0, 0, ...encode(text)]);
}

/** A burst of messages as a client of each wire writes it at once. */
function burstOf(kind: Kind): Uint8Array {
  const texts = Array.from({ length: BATCH }, (_, i) => text(i));
  if (kind === "ws") return Buffer.concat(texts.map(webSocketFrame));
  if (kind === "duplex") return encode(chunk(texts.map((text) => frame("TEXT", text)).join("")));
  return encode(texts.map(chunk).join("")); // crossws: one chunk a message
}

/** crossws takes messages as the chunks of a second request. */
async function openUplink(port: number, head: string): Promise<Link> {
  const token = /x-crossws-id: (\S+)/i.exec(head)![1];
  connect(
    "sse",
    port,
    `POST / HTTP/1.1\r\nhost: localhost\r\nx-crossws-id: ${token}\r\ntransfer-encoding: chunked\r\n\r\n`,
  ).catch(() => {}); // it is not answered before its end
  await Bun.sleep(50);
  return links.at(-1)!;
}

answer({
  /** Opens connections, some at a time. */
  async open({ kind, port, path = "/", connections }) {
    const head = HEADS[kind as Kind](path);
    for (let i = 0; i < connections; i += 200) {
      const batch = Math.min(200, connections - i);
      await Promise.all(Array.from({ length: batch }, () => connect(kind, port, head)));
    }
  },

  /** Messages that are to come from now on. */
  expect({ messages }) {
    left = messages;
    lastAt = 0;
    whenDone = () => {
      lastAt = Date.now();
      left = Infinity;
    };
  },

  /** The time at which the last of them came. */
  async arrived() {
    for (const late = Date.now() + 30_000; !lastAt; await Bun.sleep(1)) {
      if (Date.now() < late) continue;
      throw new Error(`${left} messages are missing, ${closed} connections have closed`);
    }
    return lastAt;
  },

  /** How late messages come from now on is noted. */
  note() {
    delays = [];
    now = wallClock();
  },

  /** Percentiles of that, in ms, once the last of them came. */
  delays() {
    const sorted = Float64Array.from(delays!).sort();
    delays = undefined;
    return { p50: sorted[sorted.length >> 1], p99: sorted[Math.floor(sorted.length * 0.99)] };
  },

  /** Bytes of all connections until now. */
  bytes: () => bytes,

  /** Bursts up, each when one has been answered; messages per second. */
  async uplink({ kind, port, bursts, ahead }) {
    const { link, head } = await connect(kind, port, HEADS[kind as Kind]("/"));
    const up = kind === "sse" ? await openUplink(port, head) : link;
    const burst = burstOf(kind);
    const started = performance.now();
    const before = link.received;
    for (let i = 0; i < ahead; i++) write(up, burst);
    let sent = ahead;
    await new Promise<void>((resolve) => {
      let seen = before;
      onMessages = () => {
        for (; seen < link.received; seen++) {
          if (sent < bursts) {
            sent++;
            write(up, burst);
          }
        }
        if (seen - before === bursts) resolve();
      };
    });
    onMessages = () => {};
    const rate = bursts * BATCH / (performance.now() - started) * 1000;
    up.socket.terminate();
    link.socket.terminate();
    return rate;
  },

  close() {
    for (const { socket } of links.splice(0)) socket.terminate();
  },
});
