/**
 * Clients that count what they say to instances of a cluster, and what comes back.
 *
 * @module
 */
import { type Transport, WebSocketSSE, type WebSocketSSEOptions } from "../client.ts";
import type { Told } from "./fixtures/instance.ts";
import { assert, assertEquals, once, sleep, type TestContext, until } from "./harness.ts";

/** A client that counts, and takes what comes back only in order. */
export class Talker {
  readonly name: string;
  readonly socket: WebSocketSSE;
  readonly failures: string[] = [];
  closed: CloseEvent | undefined;
  closedAt = 0;
  sent = 0;
  received = 0;

  constructor(t: TestContext, url: string, name: string, options: WebSocketSSEOptions = {}) {
    this.name = name;
    this.socket = new WebSocketSSE(`${url}/?c=${name}`, { signal: t.signal, ...options });
    this.socket.onmessage = ({ data }) => {
      if (data === `${this.received}`) this.received++;
      else this.failures.push(`${data} after ${this.received - 1}`);
    };
    this.socket.onclose = (event) => {
      this.closed = event;
      this.closedAt = performance.now();
    };
  }

  /** Says so many things, a few at a time. */
  async talk(count: number, pause = 2): Promise<void> {
    for (const last = this.sent + count; this.sent < last && !this.closed;) {
      this.socket.send(`${this.sent++}`);
      if (this.sent % 5 === 0) await sleep(pause);
    }
  }

  async heard(timeout = 30_000): Promise<void> {
    await until(() => this.received === this.sent || this.closed, { timeout, interval: 20 });
  }
}

/** One for each transport, through a network that may cut their openings. */
export function talkers(
  t: TestContext,
  url: string,
  transports: Transport[],
): Promise<Talker[]> {
  return Promise.all(transports.map(async (transport, i) => {
    for (let attempt = 0;; attempt++) { // opening is not repeated by the client itself
      const talker = new Talker(t, url, `${i}.${attempt}`, { transport });
      await Promise.race([once(talker.socket, "open"), once(talker.socket, "close")]);
      if (talker.socket.readyState === WebSocketSSE.OPEN) return talker;
    }
  }));
}

/** Whether each of three instances had its turn at both methods. */
export function everyTurn(log: string[]): boolean {
  return ["GET", "POST"].every((method) => [0, 1, 2].every((i) => log.includes(`${method} ${i}`)));
}

/** All that the instances know, and that each session was at one alone. */
export async function gather(
  instances: { tell(): Promise<Told> }[],
): Promise<Record<string, string[]>> {
  const got: Record<string, string[]> = {};
  for (const { sessions } of await Promise.all(instances.map((instance) => instance.tell()))) {
    for (const [name, seen] of Object.entries(sessions)) {
      assertEquals(seen.opens, 1, name);
      // An opening whose answer was lost may be repeated at another instance; it hears nothing.
      if (got[name] && !seen.got.length) continue;
      assert(!got[name]?.length, `${name} was at two instances`);
      got[name] = seen.got;
    }
  }
  return got;
}

export const numbers = (count: number): string[] => Array.from({ length: count }, (_, i) => `${i}`);
