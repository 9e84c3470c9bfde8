/**
 * A proxy that holds event streams, as virus scanners, quick tunnels and buffering proxies do:
 * to their end, or so many bytes at a time; all of them, or those of some methods. It works on
 * HTTP, and what it does can change while it runs.
 *
 * @module
 */
import http from "node:http";
import type { AddressInfo } from "node:net";

export interface Holding {
  /** Bytes that are passed on together; `Infinity` waits for the end of the answer. */
  readonly bytes: number;
  /** Whose answers are held. Default: all. */
  readonly method?: "GET" | "POST";
  /** Whether the head of an answer is held along with its first bytes. Default: true. */
  readonly head?: boolean;
  /** Whether it goes on reading an answer whose client has gone. Default: false. */
  readonly deaf?: boolean;
  /** Bytes of event streams that pass in a second, a few at a time. Default: any number. */
  readonly rate?: number;
}

/** A request as it came. */
export interface Passed {
  readonly method: string;
  readonly headers: http.IncomingHttpHeaders;
  /** By `performance.now()`. */
  readonly at: number;
  /** Whether some of its answer has reached the client. */
  answered: boolean;
}

export interface Holder extends AsyncDisposable {
  /** Without a slash at its end. */
  readonly url: string;
  readonly port: number;
  readonly requests: Passed[];
  /** What is held from now on; undefined: nothing. */
  holding: Holding | undefined;
  /** Requests whose answers are under way. */
  readonly open: number;
  /** Ends every connection. */
  cutAll(): void;
}

/** Starts a proxy in front of a port. */
export async function holder(target: number, holding?: Holding): Promise<Holder> {
  const requests: Passed[] = [];
  const exchanges = new Set<Exchange>();
  const server = http.createServer((request, response) => {
    const { method = "GET", headers } = request;
    const passed = { method, headers, at: performance.now(), answered: false };
    requests.push(passed);
    const exchange = new Exchange(target, request, response, passed, () => self.holding);
    exchanges.add(exchange);
    exchange.ended.then(() => exchanges.delete(exchange));
  });
  server.requestTimeout = 0;
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address() as AddressInfo;
  const self: Holder = {
    url: `http://127.0.0.1:${port}`,
    port,
    requests,
    holding,
    get open() {
      return exchanges.size;
    },
    cutAll() {
      for (const exchange of exchanges) exchange.cut();
    },
    async [Symbol.asyncDispose]() {
      const closed = new Promise((resolve) => server.close(resolve));
      const ended = [...exchanges].map((exchange) => (exchange.cut(), exchange.ended));
      server.closeAllConnections();
      await Promise.all([closed, ...ended]);
    },
  };
  return self;
}

/** One request on its way, and its answer. */
class Exchange {
  /** Nothing of it is left, at either side. */
  readonly ended: Promise<unknown>;
  readonly #response: http.ServerResponse;
  readonly #upstream: http.ClientRequest;
  readonly #passed: Passed;
  #answer: http.IncomingMessage | undefined;
  #held: Uint8Array[] = [];
  #heldBytes = 0;

  constructor(
    target: number,
    request: http.IncomingMessage,
    response: http.ServerResponse,
    passed: Passed,
    holding: () => Holding | undefined,
  ) {
    this.#response = response;
    this.#passed = passed;
    const { method, url: path, headers } = request;
    const upstream = this.#upstream = http.request(
      { host: "127.0.0.1", port: target, method, path, headers, agent: false },
      (answer) => {
        const now = holding();
        this.#begin(answer, now && (now.method ?? method) === method ? now : undefined);
      },
    );
    upstream.flushHeaders();
    request.pipe(upstream);
    request.on("error", () => this.cut());
    upstream.on("error", () => this.cut());
    response.on("error", () => this.cut());
    response.on("close", () => {
      if (!response.writableFinished && !holding()?.deaf) this.cut();
    });
    this.ended = Promise.all([
      new Promise((resolve) => response.on("close", resolve)),
      new Promise((resolve) => upstream.on("close", resolve)),
    ]);
  }

  cut(): void {
    this.#upstream.destroy();
    this.#answer?.destroy();
    this.#response.socket?.destroy(); // in Bun it outlives the response
    this.#response.destroy();
  }

  #begin(answer: http.IncomingMessage, holding: Holding | undefined): void {
    this.#answer = answer;
    const isStream = answer.headers["content-type"]?.startsWith("text/event-stream");
    const { bytes = 0, head = true } = isStream && holding || {};
    const headers = { ...answer.headers };
    if (isStream) delete headers["content-length"];
    this.#response.writeHead(answer.statusCode!, headers);
    if (!bytes || !head) this.#response.flushHeaders();
    if (isStream && holding?.rate) return void this.#trickle(answer, holding.rate);
    answer.on("data", (chunk: Uint8Array) => {
      this.#held.push(chunk);
      this.#heldBytes += chunk.length;
      if (this.#heldBytes >= bytes) this.#pass();
    });
    answer.on("end", () => {
      this.#pass();
      this.#passed.answered = true;
      this.#response.end();
    });
    answer.on("error", () => this.cut());
    // A stream that broke off is no answer that has ended.
    answer.on("close", () => answer.complete || this.cut());
  }

  async #trickle(answer: http.IncomingMessage, rate: number): Promise<void> {
    const piece = rate / 20;
    try {
      for await (const chunk of answer as AsyncIterable<Uint8Array>) {
        for (let at = 0; at < chunk.length && !this.#response.destroyed; at += piece) {
          const part = chunk.subarray(at, at + piece);
          this.#response.write(part);
          await new Promise((resolve) => setTimeout(resolve, part.length / rate * 1000));
        }
      }
      this.#passed.answered = true;
      this.#response.end();
    } catch {
      this.cut();
    }
  }

  #pass(): void {
    for (const chunk of this.#held) this.#response.write(chunk);
    if (this.#held.length) this.#passed.answered = true;
    this.#held = [];
    this.#heldBytes = 0;
  }
}
