/**
 * The same client as tests/raw.ts over HTTP/2: a head is what it says, as a stream of a connection
 * of its own. What only a version of HTTP has, is not there: a host, chunks, `connection`.
 *
 * @module
 */
import http2 from "node:http2";
import type { BodyChunks, Data, RawResponse } from "./raw.ts";

type Fields = Record<string, string | string[]>;

/** Of HTTP/1.1 alone. */
const NOT_HERE = ["host", "transfer-encoding", "connection"];

const encoder = new TextEncoder();
const bytesOf = (data: Data) => typeof data === "string" ? encoder.encode(data) : data;

/** A connection to a server of ours, whose certificate is not looked at. */
export async function connectHttp2(
  port: number,
  options: http2.SecureClientSessionOptions = {},
): Promise<http2.ClientHttp2Session> {
  const session = http2.connect(`https://127.0.0.1:${port}`, {
    rejectUnauthorized: false,
    ...options,
  });
  session.on("error", () => {}); // shows where its streams are read
  await new Promise<void>((resolve, reject) => {
    session.once("connect", () => resolve());
    session.once("close", () => reject(new Error("the connection ended before it began")));
  });
  return session;
}

/** The status of a stream's answer, or "ended" where none comes. */
export function statusOf(stream: http2.ClientHttp2Stream): Promise<string> {
  return new Promise((resolve) => {
    stream.on("error", () => {}); // it closes, too
    stream.once("response", (headers) => resolve(`${headers[":status"]}`));
    stream.once("close", () => resolve("ended"));
  });
}

/** As {@link rawRequest} of tests/raw.ts. */
export async function rawHttp2(port: number, head: Data, body?: BodyChunks): Promise<RawResponse> {
  const text = typeof head === "string" ? head : new TextDecoder().decode(head);
  const [lines = "", rest = ""] = text.split("\r\n\r\n");
  const fields = fieldsOf(lines);
  const session = await connectHttp2(port);
  const ends = !body && !rest && !/^(content-length: [1-9]|transfer-encoding)/im.test(lines);
  const stream = session.request(fields, { endStream: ends });
  const closed = new Promise<void>((resolve) => session.once("close", () => resolve()));
  const chunks = stream[Symbol.asyncIterator]();
  if (rest) stream.write(rest);
  if (body) pipe(body, stream);
  const destroy = () => session.destroy();
  try {
    const headers = await new Promise<http2.IncomingHttpHeaders>((resolve, reject) => {
      stream.once("response", resolve);
      stream.once("error", reject);
      stream.once("close", () => reject(new Error("the stream ended before a head")));
    });
    return {
      status: Number(headers[":status"]),
      headers: new Headers(
        Object.entries(headers).filter(([name]) => !name.startsWith(":")) as [string, string][],
      ),
      read: async () => {
        const { done, value } = await chunks.next();
        return done ? null : new Uint8Array(value);
      },
      async text() {
        let text = "";
        for (let next; !(next = await chunks.next()).done;) text += next.value;
        return text;
      },
      write: (chunk) => new Promise((resolve) => stream.write(bytesOf(chunk), () => resolve())),
      end: () => new Promise((resolve) => stream.end(() => resolve())),
      pause: () => void stream.pause(),
      resume: () => void stream.resume(),
      destroy,
      async [Symbol.asyncDispose]() {
        destroy();
        await closed;
      },
    };
  } catch (error) {
    destroy();
    await closed;
    throw error;
  }
}

function fieldsOf(lines: string): Fields {
  const [first = "", ...rest] = lines.trimEnd().split("\r\n");
  const [method = "", path = ""] = first.split(" ");
  const fields: Fields = { ":method": method, ":path": path };
  for (const line of rest) {
    const colon = line.indexOf(":");
    const [name, value] = [line.slice(0, colon).toLowerCase(), line.slice(colon + 1).trim()];
    if (NOT_HERE.includes(name)) continue;
    // Each a line of its own, as it was.
    if (name in fields) fields[name] = [fields[name]!, value].flat();
    else fields[name] = value;
  }
  return fields;
}

async function pipe(body: BodyChunks, stream: http2.ClientHttp2Stream): Promise<void> {
  try {
    for await (const chunk of body) {
      await new Promise<void>((resolve) => stream.write(bytesOf(chunk), () => resolve()));
    }
    stream.end();
  } catch {
    // As over HTTP/1.1: the body goes no further, and the stream stays.
  }
}
