/**
 * A TCP proxy that gives every byte so much latency, each way.
 *
 * @module
 */
import { type AddressInfo, connect, createServer, type Socket } from "node:net";

export interface Proxy extends AsyncDisposable {
  readonly port: number;
  /** Ends all connections, with what is on its way. */
  cut(): void;
}

export async function delayingProxy(target: number, delay: number): Promise<Proxy> {
  const sockets = new Set<Socket>();
  const server = createServer({ noDelay: true }, (near) => {
    const far = connect({ port: target, host: "127.0.0.1", noDelay: true });
    relay(near, far);
    relay(far, near);
  });

  function relay(from: Socket, to: Socket): void {
    sockets.add(from);
    const later = (action: () => void) => delay ? setTimeout(action, delay) : action();
    from.on("data", (bytes) => void later(() => to.write(bytes)));
    from.on("close", () => {
      sockets.delete(from);
      later(() => to.destroy());
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
