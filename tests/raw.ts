/**
 * An HTTP/1.1 client over a bare socket, for tests that need control of every
 * byte: malformed heads, frames split anywhere, a reader that stops reading,
 * a connection that is reset.
 *
 * @module
 */
import net from "node:net";
import { concat } from "./split.ts";

/** Bytes, or text to be sent as UTF-8. */
export type Data = string | Uint8Array;

/** The body of a request: sent in these pieces, one write each. */
export type BodyChunks = Iterable<Data> | AsyncIterable<Data>;

/** A response whose body is still arriving, on a connection of its own. */
export interface RawResponse extends AsyncDisposable {
  readonly status: number;
  readonly headers: Headers;
  /** The next piece of the body, or null at its end. */
  read(): Promise<Uint8Array | null>;
  /** The rest of the body as text. */
  text(): Promise<string>;
  /** More of the request's body, as a chunk if the request is chunked. */
  write(chunk: Data): Promise<void>;
  /** Ends the request's body (only if it is chunked: it has an end mark). */
  end(): Promise<void>;
  /** Stops reading, so that the server feels it once the kernel is full. */
  pause(): void;
  resume(): void;
  /** Drops the connection with a RST, as a dead network or process would. */
  destroy(): void;
}

const encoder = new TextEncoder();
const decoder = new TextDecoder();
const bytesOf = (data: Data) => typeof data === "string" ? encoder.encode(data) : data;

/**
 * Sends a head exactly as given (a missing blank line at its end is added)
 * and the pieces of a body, framed as chunks if the head says so. The promise
 * is settled by the response's head; the body of the request goes on beside it.
 */
export async function rawRequest(
  port: number,
  head: Data,
  body?: BodyChunks,
): Promise<RawResponse> {
  const socket = net.connect(port, "127.0.0.1");
  const incoming = new Incoming(socket);
  const text = typeof head === "string" ? head : decoder.decode(head);
  const chunked = /^transfer-encoding:.*chunked/im.test(
    text.split("\r\n\r\n")[0]!,
  );
  const uplink = new Uplink(socket, chunked);
  try {
    // Not awaited: a server may answer before it reads, and a connection that
    // is lost shows where the response is read.
    uplink.raw(
      typeof head !== "string" || head.includes("\r\n\r\n")
        ? head
        : head.replace(/(\r\n)?$/, "\r\n\r\n"),
    ).catch(() => {});
    if (body) pipe(body, uplink);
    return await response(incoming, uplink);
  } catch (error) {
    incoming.destroy();
    await incoming.closed;
    throw error;
  }
}

/** Writes a body to its end; a lost connection shows where it is read. */
async function pipe(body: BodyChunks, uplink: Uplink): Promise<void> {
  try {
    for await (const chunk of body) await uplink.write(chunk);
    await uplink.end();
  } catch {
    // The response's reader reports why the connection ended.
  }
}

async function response(
  incoming: Incoming,
  uplink: Uplink,
): Promise<RawResponse> {
  let status = 100;
  let headers = new Headers();
  while (status < 200) [status, headers] = parseHead(await incoming.head());
  const body = incoming.body(headers);
  const read = async () => (await body.next()).value ?? null;
  return {
    status,
    headers,
    read,
    async text() {
      let text = "";
      // Deno drops a U+FEFF that begins a later chunk, unless told not to.
      const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
      for (let chunk; (chunk = await read());) {
        text += decoder.decode(chunk, { stream: true });
      }
      return text + decoder.decode();
    },
    write: (chunk) => uplink.write(chunk),
    end: () => uplink.end(),
    pause: () => incoming.pause(),
    resume: () => incoming.resume(),
    destroy: () => incoming.destroy(),
    async [Symbol.asyncDispose]() {
      incoming.destroy();
      await incoming.closed;
    },
  };
}

function parseHead(head: string): [status: number, headers: Headers] {
  const [first = "", ...lines] = head.trimEnd().split("\r\n");
  const status = /^HTTP\/1\.[01] (\d{3})/.exec(first)?.[1];
  if (!status) throw new Error(`not an HTTP response: ${first}`);
  const headers = new Headers();
  for (const line of lines) {
    const colon = line.indexOf(":");
    headers.append(line.slice(0, colon), line.slice(colon + 1).trim());
  }
  return [Number(status), headers];
}

/** The request's side of a connection. */
class Uplink {
  #socket: net.Socket;
  #chunked: boolean;

  constructor(socket: net.Socket, chunked: boolean) {
    this.#socket = socket;
    this.#chunked = chunked;
  }

  raw(data: Data): Promise<void> {
    const bytes = bytesOf(data);
    return new Promise((resolve, reject) =>
      this.#socket.write(
        bytes,
        (error?: Error | null) => error ? reject(error) : resolve(),
      )
    );
  }

  write(data: Data): Promise<void> {
    const bytes = bytesOf(data);
    // An empty chunk would end the body.
    if (!this.#chunked || bytes.length === 0) return this.raw(bytes);
    return this.raw(concat([
      encoder.encode(bytes.length.toString(16) + "\r\n"),
      bytes,
      encoder.encode("\r\n"),
    ]));
  }

  async end(): Promise<void> {
    if (this.#chunked) await this.raw("0\r\n\r\n");
  }
}

/** The response's side: what has arrived, taken by line or by length. */
class Incoming {
  readonly closed: Promise<void>;
  #socket: net.Socket;
  #buffer: Uint8Array = new Uint8Array(0);
  #ended = false;
  #error: Error | undefined;
  #paused = false;
  #wake = () => {};

  constructor(socket: net.Socket) {
    this.#socket = socket;
    socket.on("data", (data: Uint8Array) => {
      this.#buffer = concat([this.#buffer, data]);
      // What nobody asks for stays in the kernel: the reader sets the pace.
      socket.pause();
      this.#wake();
    });
    socket.on("end", () => this.#end());
    socket.on("error", (error: Error) => this.#end(error));
    this.closed = new Promise((resolve) =>
      socket.on("close", () => {
        this.#end();
        resolve();
      })
    );
  }

  pause(): void {
    this.#paused = true;
    this.#socket.pause();
  }

  resume(): void {
    this.#paused = false;
    this.#socket.resume();
  }

  destroy(): void {
    this.#socket.resetAndDestroy();
  }

  /** Everything up to and including the next blank line. */
  async head(): Promise<string> {
    for (;;) {
      const text = decoder.decode(this.#buffer);
      const end = text.indexOf("\r\n\r\n");
      if (end >= 0) {
        this.#take(encoder.encode(text.slice(0, end + 4)).length);
        return text.slice(0, end);
      }
      if (!await this.#more()) {
        throw this.#error ?? new Error("the connection ended before a head");
      }
    }
  }

  /** The body, freed of its framing. Throws if the connection breaks it off. */
  async *body(headers: Headers): AsyncGenerator<Uint8Array, undefined> {
    if (headers.get("transfer-encoding")?.includes("chunked")) {
      return yield* this.#chunks();
    }
    const length = headers.get("content-length");
    let left = length === null ? Infinity : Number(length);
    while (left > 0) {
      if (this.#buffer.length === 0 && !await this.#more()) {
        if (left < Infinity || this.#error) throw this.#broken();
        return;
      }
      const piece = this.#take(Math.min(left, this.#buffer.length));
      left -= piece.length;
      yield piece;
    }
  }

  async *#chunks(): AsyncGenerator<Uint8Array, undefined> {
    for (;;) {
      const size = parseInt(await this.#line(), 16);
      for (let left = size; left > 0;) {
        if (this.#buffer.length === 0 && !await this.#more()) {
          throw this.#broken();
        }
        const piece = this.#take(Math.min(left, this.#buffer.length));
        left -= piece.length;
        yield piece;
      }
      await this.#line();
      if (size === 0) return;
    }
  }

  async #line(): Promise<string> {
    for (;;) {
      const end = this.#buffer.indexOf(10);
      if (end >= 0) return decoder.decode(this.#take(end + 1)).trimEnd();
      if (!await this.#more()) throw this.#broken();
    }
  }

  #take(length: number): Uint8Array {
    const taken = this.#buffer.subarray(0, length);
    this.#buffer = this.#buffer.subarray(length);
    return taken;
  }

  /** Waits for more bytes; false at the end of the connection. */
  async #more(): Promise<boolean> {
    if (this.#ended) return false;
    const woken = new Promise<void>((resolve) => this.#wake = resolve);
    if (!this.#paused) this.#socket.resume();
    const before = this.#buffer.length;
    await woken;
    return this.#buffer.length > before;
  }

  #end(error?: Error): void {
    this.#ended = true;
    this.#error ??= error;
    this.#wake();
  }

  #broken(): Error {
    return this.#error ?? new Error("the connection broke the body off");
  }
}
