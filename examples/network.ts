/**
 * The network of the demo, which can fail: a relay in front of the server that copies bytes. For
 * one browser tab, and nobody else, it drops connections or holds back what goes up.
 */

import { connect, createServer, type Server, type Socket } from "node:net";
import type { AddressInfo } from "node:net";
import { pipeline } from "node:stream/promises";

const REQUEST_LINE = /^[A-Z]+ (\S+) HTTP\/1\.1\r$/gm;
const TAB = /[?&]tab=([0-9a-f]{32})\b/;
const MAX_LINE = 4_096; // bytes of a request line that comes in parts
/**
 * Browsers' connections at once. Each takes three of the process's files, and once there are no
 * more of those, Deno never accepts a connection again.
 */
const MAX_CONNECTIONS = 1_000;
/** Every so many ms those connections end by which no byte came since. Bun pings every 120 s. */
const QUIET = 150_000;

export interface Where {
  hostname: string;
  port: number;
}

/** Relays from where browsers connect to a server on this machine, which may be replaced. */
export class Network {
  /** The port of the server behind. */
  #target = 0;
  readonly #server: Server;
  readonly #connections: Set<Connection> = new Set();
  /** When each fault of a tab is over. */
  readonly #cut: Faults = new Faults();
  readonly #held: Faults = new Faults();

  readonly #sweeping: ReturnType<typeof setInterval>;

  constructor({ maxConnections = MAX_CONNECTIONS, quiet = QUIET } = {}) {
    this.#server = createServer((client) => this.#accept(client));
    this.#server.maxConnections = maxConnections;
    this.#sweeping = setInterval(() => this.#sweep(), quiet);
  }

  /** Returns the port that it got. */
  listen({ hostname, port }: Where): Promise<number> {
    return new Promise((resolve, reject) => {
      this.#server.once("error", reject);
      this.#server.listen(port, hostname, () => {
        resolve((this.#server.address() as AddressInfo).port);
      });
    });
  }

  /** From now on relays to the server on this port; connections to the one before it are dropped. */
  relayTo(port: number): void {
    this.#target = port;
    for (const connection of this.#connections) connection.drop();
  }

  /** Drops the tab's connections, and each that it makes until `ms` milliseconds have passed. */
  cut(tab: string, ms: number): void {
    this.#cut.add(tab, ms);
    for (const connection of this.#connections) if (connection.tab === tab) connection.drop();
  }

  /** Keeps what the tab sends until `ms` milliseconds have passed; what comes down goes on. */
  hold(tab: string, ms: number): void {
    this.#held.add(tab, ms);
  }

  close(): void {
    clearInterval(this.#sweeping);
    this.#server.close();
    for (const connection of this.#connections) connection.drop();
  }

  /** Whoever neither says nor reads anything would stay for good. */
  #sweep(): void {
    for (const connection of this.#connections) if (connection.isQuiet()) connection.drop();
  }

  #accept(client: Socket): void {
    const connection = new Connection(client, this.#target, async (tab) => {
      if (this.#cut.left(tab) > 0) throw new Error("The network is cut");
      const wait = this.#held.left(tab);
      if (wait > 0) await new Promise((resolve) => setTimeout(resolve, wait));
    });
    this.#connections.add(connection);
    connection.ended.then(() => this.#connections.delete(connection));
  }
}

/** What goes wrong for which tabs, and for how long. */
class Faults {
  readonly #until: Map<string, number> = new Map();

  add(tab: string, ms: number): void {
    for (const [other, time] of this.#until) if (time <= Date.now()) this.#until.delete(other);
    this.#until.set(tab, Date.now() + ms);
  }

  /** In milliseconds. */
  left(tab: string): number {
    return (this.#until.get(tab) ?? 0) - Date.now();
  }
}

/** A connection of a browser, and the one to the server that belongs to it. */
class Connection {
  /** Whose request came last: browsers share connections among tabs. */
  tab = "";
  readonly ended: Promise<unknown>;
  readonly #client: Socket;
  readonly #server: Socket;
  readonly #pass: (tab: string) => Promise<void>;
  #line = ""; // the last one, as far as it came
  #passed = -1; // bytes of either direction, when last asked

  constructor(client: Socket, port: number, pass: (tab: string) => Promise<void>) {
    this.#client = client.setNoDelay();
    this.#server = connect(port, "127.0.0.1").setNoDelay();
    this.#pass = pass;
    const up = pipeline(
      client,
      (chunks: AsyncIterable<Uint8Array>) => this.#up(chunks),
      this.#server,
    );
    const down = pipeline(this.#server, client);
    // One that fails is a connection lost; the other direction goes with it.
    const either = [up, down].map((way) => way.catch(() => this.drop()));
    this.ended = Promise.all(either);
  }

  drop(): void {
    this.#client.destroy();
    this.#server.destroy();
  }

  /** Whether nothing has passed since this was asked last. */
  isQuiet(): boolean {
    const before = this.#passed;
    this.#passed = this.#client.bytesRead + this.#client.bytesWritten;
    return this.#passed === before;
  }

  async *#up(chunks: AsyncIterable<Uint8Array>): AsyncGenerator<Uint8Array> {
    for await (const chunk of chunks) {
      this.#read(chunk);
      await this.#pass(this.tab);
      yield chunk;
    }
  }

  #read(chunk: Uint8Array): void {
    const text = this.#line + new TextDecoder("latin1").decode(chunk);
    for (const [, path] of text.matchAll(REQUEST_LINE)) this.tab = TAB.exec(path!)?.[1] ?? "";
    this.#line = text.slice(text.lastIndexOf("\n") + 1).slice(-MAX_LINE);
  }
}
