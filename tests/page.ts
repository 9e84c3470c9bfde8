/**
 * A page with our client in it, and the server that it talks to, for tests in browsers.
 *
 * @module
 */
import type { WebSocketSSE, WebSocketSSEOptions } from "../client.ts";
import type { Message, Peer, SSEOptions } from "../server.ts";
import { clientScript } from "./chromium.ts";
import type { TestContext } from "./harness.ts";
import { listen, Queue } from "./pair.ts";

/** What the page has, next to its client. */
export interface TestPage {
  socket: WebSocketSSE;
  sockets: WebSocketSSE[];
  /** Names of events, data of messages, `{ code, reason, wasClean }` of close. */
  log: unknown[];
  /** What console.warn was told. */
  warnings: string[];
  /** Errors that nothing handled, and what the console was told of errors and warnings. */
  complaints: string[];
  connect(url: string, options?: WebSocketSSEOptions): WebSocketSSE;
  /** Whether it was shown from the back/forward cache. */
  persisted?: boolean;
}

const html = `<!DOCTYPE html><title>client</title><link rel="icon" href="data:,">
<script>
globalThis.warnings = [];
globalThis.complaints = [];
const complain = (text) => void globalThis.complaints.push(text);
addEventListener("error", ({ error, message }) => complain(message + "\\n" + error?.stack));
addEventListener("unhandledrejection", ({ reason }) => complain(reason + "\\n" + reason?.stack));
for (const name of ["warn", "error"]) {
  const print = console[name];
  console[name] = (text) => {
    if (name === "warn") globalThis.warnings.push(String(text));
    complain(\`console.\${name}: \${text}\`);
    print.call(console, text);
  };
}
</script>
<script type="module">
import { WebSocketSSE } from "/client.js";
globalThis.sockets = [];
globalThis.connect = (url, options) => {
  const log = globalThis.log = [];
  const socket = globalThis.socket = new WebSocketSSE(url, options);
  globalThis.sockets.push(socket);
  socket.binaryType = "arraybuffer";
  for (const type of ["open", "drop", "resume", "error"]) {
    socket.addEventListener(type, () => log.push(type));
  }
  socket.addEventListener("message", ({ data }) => log.push(data));
  socket.addEventListener("close", ({ code, reason, wasClean }) => log.push({ code, reason, wasClean }));
  return socket;
};
addEventListener("pageshow", (event) => globalThis.persisted = event.persisted);
</script>`;

/** A page whose module is a function that is given our client. */
const ownPage = (program: () => void) =>
  `${html.slice(0, html.indexOf('<script type="module">'))}<script type="module">
import { WebSocketSSE } from "/client.js";
globalThis.WebSocketSSE = WebSocketSSE;
(${program})();
</script>`;

export interface Site {
  readonly url: string;
  readonly port: number;
  readonly peers: Queue<Peer>;
  readonly closes: Queue<{ code?: number | undefined; reason?: string | undefined }>;
  /** The requests for the socket, by their methods and whether their body is streamed. */
  readonly requests: string[];
}

/** A server with a page, our client and a socket at /ws that answers by `message`, or echoes. */
export async function site(
  t: TestContext,
  { tls = false, http2 = false, message, program, watch, ...options }: SSEOptions & {
    tls?: boolean;
    http2?: boolean;
    /** Sees each answer for the socket, and may put another in its place. */
    watch?: (request: Request, response: Response) => Response;
    /** Runs as the page's module, in the place of ours, at /program. */
    program?: () => void;
    message?: (peer: Peer, message: Message) => void;
  } = {},
): Promise<Site> {
  const script = await clientScript();
  const peers = new Queue<Peer>();
  const closes: Site["closes"] = new Queue();
  const requests: string[] = [];
  const { url, port } = await listen(t, {
    ...options,
    hooks: {
      open: (peer) => peers.push(peer),
      message: message ?? ((peer, message) => void peer.send(message.data as string)),
      close: (_, details) => closes.push(details),
      ...options.hooks,
    },
  }, (request, next) => {
    const { pathname } = new URL(request.url);
    if (pathname === "/ws") {
      requests.push(`${request.method}${request.headers.has("content-length") ? "" : " streamed"}`);
      return watch ? next(request).then((response) => watch(request, response)) : next(request);
    }
    const type = pathname === "/client.js" ? "text/javascript" : "text/html";
    const page = pathname === "/program" ? ownPage(program!) : html;
    return new Response(pathname === "/client.js" ? script : page, {
      headers: { "content-type": `${type}; charset=utf-8`, "set-cookie": "user=ada; Path=/" },
    });
  }, { tls, http2 });
  return { url, port, peers, closes, requests };
}
