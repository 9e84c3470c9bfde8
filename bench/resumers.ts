/**
 * Sessions that are all cut at once and all resume at once, on raw sockets. Each
 * reads its messages, which are numbered, and notices one that is missing, comes
 * twice or comes late.
 *
 * @module
 */
/// <reference types="bun-types" />
import { answer } from "./rpc.ts";

const HEAD = "POST / HTTP/1.1\r\nhost: localhost\r\naccept: text/event-stream\r\n" +
  "x-duplex-version: 1\r\ncontent-type: application/websocket-events\r\n" +
  "transfer-encoding: chunked\r\n";
const BODY = "\r\na\r\nPING 0\r\n\r\n\r\n"; // a chunk with a PING
const MESSAGE = /\ndata: #(\d+)#\n/g;

class Session {
  received = 0;
  #port: number;
  #token = "";
  #attempt = 0;
  #text = "";
  #socket: Bun.Socket | undefined;
  #opened = () => {};
  #failed = (_: Error) => {};

  constructor(port: number) {
    this.#port = port;
  }

  /** Resolves when the server's first events have come. */
  async connect(): Promise<void> {
    const resume = this.#token &&
      `x-crossws-id: ${this.#token}\r\nx-duplex-attempt: ${++this.#attempt}\r\n` +
        `last-event-id: ${this.received}\r\n`;
    this.#text = "";
    const opened = new Promise<void>((resolve, reject) => {
      this.#opened = resolve;
      this.#failed = reject;
    });
    this.#socket = await Bun.connect({
      hostname: "127.0.0.1",
      port: this.#port,
      socket: {
        open: (socket) => void socket.write(HEAD + resume + BODY),
        data: (socket, bytes) => {
          if (socket === this.#socket || !this.#socket) this.#read(bytes.toString("latin1"));
        },
        close: (socket) => {
          if (socket === this.#socket) this.#failed(new Error("closed"));
        },
      },
    });
    await opened;
  }

  cut(): void {
    const socket = this.#socket;
    this.#socket = undefined;
    socket?.terminate();
  }

  #read(text: string): void {
    // The lines of HTTP's chunks stand between events here, never within a short one.
    this.#text += text;
    if (!this.#text.includes("event: duplex-open")) return;
    if (!this.#text.startsWith("HTTP/1.1 200")) this.#failed(new Error(this.#text));
    this.#token ||= /x-crossws-id: (\S+)/i.exec(this.#text)![1]!;
    let end = 0;
    for (const match of this.#text.matchAll(MESSAGE)) {
      if (Number(match[1]) !== ++this.received) {
        throw new Error(`message ${match[1]} came as number ${this.received}`);
      }
      end = match.index + match[0].length - 1;
    }
    if (end) this.#text = "HTTP/1.1 200 event: duplex-open" + this.#text.slice(end);
    this.#opened();
  }
}

let sessions: Session[] = [];

answer({
  async open({ port, count }) {
    sessions = Array.from({ length: count }, () => new Session(port));
    for (let i = 0; i < count; i += 200) {
      await Promise.all(sessions.slice(i, i + 200).map((session) => session.connect()));
    }
  },

  /** Milliseconds until every session is back. */
  async cutAndResume() {
    for (const session of sessions) session.cut();
    const started = performance.now();
    await Promise.all(sessions.map((session) => session.connect()));
    return performance.now() - started;
  },

  /** How many sessions have had every message, within two seconds. */
  async complete({ sent }) {
    const late = performance.now() + 2_000;
    const complete = () => sessions.filter(({ received }) => received === sent).length;
    while (complete() < sessions.length && performance.now() < late) await Bun.sleep(5);
    return complete();
  },

  close() {
    for (const session of sessions) session.cut();
  },
});
