/**
 * The handlers of the web platform's tests, written anew on our adapter: what each path does.
 *
 * @module
 */
import crossws from "crossws/adapters/deno";
import {
  type Hooks,
  type Message,
  type Peer,
  type SSEAdapter,
  sseAdapter,
  type UpgradeRequest,
} from "../server.ts";

/** Between the runtime and the adapter. */
type Next = (request: Request) => Promise<Response>;

interface Endpoint {
  upgrade?(request: UpgradeRequest): Response | HeadersInit | undefined | Promise<undefined>;
  open?(peer: Peer): void;
  message?(peer: Peer, message: Message): unknown;
  around?(request: Request, next: Next): Promise<Response>;
}

const sleep = (milliseconds: number) =>
  new Promise<undefined>((resolve) => setTimeout(() => resolve(undefined), milliseconds));
const queryOf = (request: { url: string }) => new URL(request.url).search.slice(1);

/** A message is text as it is, or bytes. */
function echo(peer: Peer, message: Message): void {
  const data = message.rawData; // crossws's own has bytes in place of any text as `data`
  peer.send(data);
  if (data === "Goodbye") peer.close();
}

function cookie(attributes: string): Endpoint {
  return {
    upgrade: (request) => ({ "set-cookie": `ws_test_${queryOf(request)}=test; ${attributes}` }),
  };
}

const garbage: Endpoint = {
  around: () => Promise.resolve(new Response("FOO BAR BAZ\r\n\r\n")),
};

const endpoints: Record<string, Endpoint> = {
  "/echo": { message: echo },
  // Theirs writes a message and a frame that no WebSocket knows: the connection fails.
  "/echo_raw": {
    message(peer) {
      peer.send("test");
      setTimeout(() => peer.terminate(), 100); // it takes along what is not on its way
    },
  },
  "/echo_exit": { message: (peer, message) => message.data === "Goodbye" && peer.close() },
  "/echo_close_data": { message: (peer, message) => message.data === "Goodbye" && peer.close() },
  "/echo-query": { open: (peer) => void peer.send(queryOf(peer.request)) },
  "/echo-query_v13": { open: (peer) => void peer.send(queryOf(peer.request)) },
  "/echo-cookie": {
    open: (peer) => void peer.send(peer.request.headers.get("cookie") ?? "(none)"),
  },
  "/origin": { open: (peer) => void peer.send(peer.request.headers.get("origin") ?? "") },
  "/referrer": {
    open: (peer) => void peer.send(peer.request.headers.get("referer") ?? "MISSING AS PER FETCH"),
  },
  "/empty-message": {
    message: (peer, message) => void peer.send(message.data === "" ? "pass" : "fail"),
  },
  "/protocol": { open: (peer) => void peer.send(protocolOf(peer)) },
  "/protocol_array": { open: (peer) => void peer.send(protocolOf(peer)) },
  "/handshake_protocol": { upgrade: () => ({ "sec-websocket-protocol": "foobar" }) },
  "/handshake_no_protocol": {},
  "/handshake_no_extensions": {},
  "/handshake_sleep_2": { upgrade: () => sleep(2_000) },
  "/sleep_10_v13": { upgrade: () => sleep(10_000), message: echo },
  "/basic_auth": {
    upgrade: (request) =>
      request.headers.get("authorization") === "Basic Zm9vOmJhcg=="
        ? undefined
        : new Response(null, {
          status: 401,
          headers: { "www-authenticate": 'Basic realm="camelot"' },
        }),
  },
  "/set-cookie": cookie("Path=/"),
  "/set-cookie-secure": cookie("Secure; Path=/"),
  "/set-cookie_http": cookie("Path=/; HttpOnly"),
  "/set-cookies-samesite": { upgrade: sameSiteCookies },
  "/simple_handshake": {
    upgrade: () => ({ "set-cookie": "ws_test=test" }),
    open: (peer) => peer.close(1001, "PASS"),
  },
  "/delayed-passive-close": { around: delayClose },
  "/receive-many-with-backpressure": { message: oneAfterTheOther() },
  "/send-backpressure": { open: (peer) => void sendSlowly(peer) },
  "/receive-backpressure": { around: (request, next) => next(readLate(request)) },
  "/remote-close": { open: closeAsAsked },
  "/passive-close-abort": { around: breakAtClose() },
  "/invalid": garbage,
  "/wrong_accept_key": garbage,
};

/** crossws's own knows only what was offered, of which the first is chosen. */
function protocolOf(peer: Peer): string | undefined {
  return peer.websocket.protocol?.split(",")[0];
}

function sameSiteCookies(request: UpgradeRequest): Headers {
  const query = new URL(request.url).searchParams;
  const value = query.get("value") ?? "1";
  const age = query.has("clear") ? "; Max-Age=0" : "";
  const headers = new Headers();
  for (
    const [name, attributes] of Object.entries({
      unspecified: "",
      lax: "; SameSite=Lax",
      strict: "; SameSite=Strict",
      none: "; SameSite=None; Secure",
    })
  ) headers.append("set-cookie", `samesite-${name}=${value}; Path=/${age}${attributes}`);
  return headers;
}

/** Takes a tenth of a second for each message, and answers its length. */
function oneAfterTheOther() {
  const turns = new WeakMap<Peer, Promise<void>>();
  return (peer: Peer, message: Message): Promise<void> => {
    const turn = (turns.get(peer) ?? Promise.resolve()).then(async () => {
      await sleep(100);
      peer.send(`${message.uint8Array().length}`);
    });
    turns.set(peer, turn);
    return turn;
  };
}

/** Answers a close a second late, as a slow network might. */
async function delayClose(request: Request, next: Next): Promise<Response> {
  const response = await next(request);
  if (response.headers.has("x-duplex-close")) await sleep(1_000);
  if (!response.body) return response;
  const decoder = new TextDecoder();
  const late = new TransformStream<Uint8Array, Uint8Array>({
    async transform(chunk, controller) {
      if (decoder.decode(chunk, { stream: true }).includes("duplex-close")) await sleep(1_000);
      controller.enqueue(chunk);
    },
  });
  return new Response(response.body.pipeThrough(late), response);
}

/** Tells how many seconds the client took for 16 MiB. */
async function sendSlowly(peer: Peer): Promise<void> {
  peer.send(new Uint8Array());
  const began = performance.now();
  for (let count = 0; count < 16; count++) {
    peer.send(new Uint8Array(2 ** 20));
    await peer.waitForDrain();
  }
  peer.send(`${(performance.now() - began) / 1_000}`);
}

/** Reads nothing of what is sent for two seconds. */
function readLate(request: Request): Request {
  const late = new TransformStream({ start: () => sleep(2_000) }, undefined, { highWaterMark: 0 });
  return withBody(request, request.body?.pipeThrough(late));
}

/** Not a copy: that would make Deno watch over the request's signal. */
function withBody(
  { url, method, headers }: Pick<Request, "url" | "method" | "headers">,
  body: ReadableStream<Uint8Array<ArrayBuffer>> | undefined,
): Request {
  const init: RequestInit & { duplex: "half" } = { method, headers, duplex: "half" };
  return new Request(url, body ? { ...init, body } : init);
}

function closeAsAsked(peer: Peer): void {
  const query = new URL(peer.request.url).searchParams;
  if (query.has("abrupt")) setTimeout(() => peer.terminate(), 100); // it takes along what is not on its way
  else if (query.has("code")) peer.close(Number(query.get("code")), query.get("reason") ?? "");
  else peer.close();
}

/** A server that ends with the close that it gets: all connections break, and it knows nothing any more. */
function breakAtClose() {
  const gone = new Set<string | null>();
  return async (request: Request, next: Next): Promise<Response> => {
    const headers = new Headers(request.headers);
    let token = headers.get("x-crossws-id");
    if (gone.has(token)) headers.set("x-crossws-id", "unknown");
    const decoder = new TextDecoder();
    const streams: TransformStreamDefaultController[] = [];
    const breakable = () =>
      new TransformStream<Uint8Array<ArrayBuffer>, Uint8Array<ArrayBuffer>>({
        start: (controller) => void streams.push(controller),
        transform(chunk, controller) {
          if (!decoder.decode(chunk).includes("CLOSE")) return controller.enqueue(chunk);
          gone.add(token);
          for (const stream of streams) stream.error(new Error("broken"));
        },
      });
    const body = request.body?.pipeThrough(breakable());
    const response = await next(
      withBody({ url: request.url, method: request.method, headers }, body),
    );
    token ??= response.headers.get("x-crossws-id");
    return new Response(response.body?.pipeThrough(breakable()), response);
  };
}

export interface Site {
  ws: SSEAdapter;
  /** The answer, if the path is one of a handler. */
  fetch(request: Request, info?: Info): Promise<Response> | undefined;
}

/** What `fetch` of the runtime's server is told besides. */
// deno-lint-ignore no-explicit-any -- they differ
type Info = any;

/** All of them, behind one adapter of ours; or behind crossws's of native WebSockets, on Deno. */
export function handlers(native = false): Site {
  const endpointOf = (request: { url: string }) => endpoints[new URL(request.url).pathname];
  const hooks: Partial<Hooks> = {
    async upgrade(request) {
      const result = await endpointOf(request)?.upgrade?.(request);
      return result instanceof Response || !result ? result : { headers: result };
    },
    open: (peer) => endpointOf(peer.request)?.open?.(peer),
    message: (peer, message) => endpointOf(peer.request)?.message?.(peer, message) as void,
  };
  const ws = sseAdapter({
    bidir: true,
    cors: () => true,
    maxMessageSize: 32 * 2 ** 20,
    hooks,
    handleProtocols(offered, request) {
      const { pathname } = new URL(request.url);
      if (pathname === "/echo") return offered.has("echo") ? "echo" : "";
      return pathname.startsWith("/protocol") ? [...offered][0] : "";
    },
  });
  // Deno's WebSocket cannot be cut, and crossws does not know that; nor does it choose subprotocols.
  const uncut: Partial<Hooks> = {
    ...hooks,
    async upgrade(request) {
      const [offered] = request.headers.get("sec-websocket-protocol")?.split(",") ?? [];
      const chosen = offered && new URL(request.url).pathname.startsWith("/protocol");
      return await hooks.upgrade!(request) ??
        (chosen ? { headers: { "sec-websocket-protocol": offered } } : undefined);
    },
    open(peer) {
      peer.terminate = () => peer.close(1011);
      return hooks.open!(peer);
    },
  };
  const theirs = native ? crossws({ hooks: uncut as never }) : undefined;
  return {
    ws,
    fetch(request, info) {
      const endpoint = endpointOf(request);
      if (!endpoint) return;
      const upgrades = request.headers.get("upgrade") === "websocket";
      const next: Next = async (request) =>
        upgrades && theirs
          ? await theirs.handleUpgrade(request, info)
          : await ws.fetch(request, info);
      return endpoint.around ? endpoint.around(request, next) : next(request);
    },
  };
}
