/**
 * A TCP proxy that gives every byte so much latency, each way, and may be a line of a certain rate.
 *
 * @module
 */
import { type AddressInfo, connect, createServer, type Socket } from "node:net";

/** What a line of a certain rate has waiting before it, at most, in ms. */
const QUEUE = 50;

export interface Proxy extends AsyncDisposable {
  readonly port: number;
  /** Ends all connections, with what is on its way. */
  cut(): void;
}

/** `delay` in ms; `rate` in bytes a ms, of each connection and each way: what is beyond it waits at its sender. */
export async function delayingProxy(
  target: number,
  delay: number,
  rate: number = Infinity,
): Promise<Proxy> {
  const sockets = new Set<Socket>();
  const server = createServer({ noDelay: true }, (near) => {
    const far = connect({ port: target, host: "127.0.0.1", noDelay: true });
    relay(near, far);
    relay(far, near);
  });

  function relay(from: Socket, to: Socket): void {
    sockets.add(from);
    const later = inOrder(delay);
    let free = 0; // when the line has taken all until now
    const carry = async () => {
      for await (const bytes of from) {
        const now = performance.now();
        free = Math.max(free, now) + bytes.length / rate;
        later(() => to.write(bytes), free);
        if (free - now > QUEUE) await pause(free - now - QUEUE);
      }
    };
    carry().catch(() => {}); // "close" follows
    from.on("close", () => {
      sockets.delete(from);
      later(() => to.destroy(), free);
    });
    from.on("error", () => {}); // "close" follows
  }

  const cut = () => sockets.forEach((socket) => socket.resetAndDestroy());

  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  return {
    port: (server.address() as AddressInfo).port,
    cut,
    async [Symbol.asyncDispose]() {
      cut();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}

/** Calls what is given it so much later than its time, one after the other: timers may overtake. */
function inOrder(delay: number): (action: () => void, time: number) => void {
  const waiting: { action: () => void; due: number }[] = [];
  const run = () => {
    while (waiting.length && waiting[0]!.due <= performance.now()) waiting.shift()!.action();
    if (waiting.length) {
      setTimeout(run, Math.ceil(Math.max(0, waiting[0]!.due - performance.now())));
    }
  };
  return (action, time) => {
    const due = Math.max(time, performance.now()) + delay;
    if (waiting.push({ action, due }) === 1) run();
  };
}

const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));
