/**
 * Programs of others, as npm has them, with our class for their WebSocket and our adapter under
 * their server half; where a package has none, as much of its protocol as it takes to talk.
 *
 * @module
 */
import { Hocuspocus } from "@hocuspocus/server";
import { HocuspocusProvider, HocuspocusProviderWebsocket } from "@hocuspocus/provider";
import { adapters, createConsumer } from "@rails/actioncable";
import { Client as StompClient } from "@stomp/stompjs";
import { createTRPCClient, createWSClient, wsLink } from "@trpc/client";
import { initTRPC } from "@trpc/server";
import { getWSConnectionHandler } from "@trpc/server/adapters/ws";
import { Aedes } from "aedes";
import { newWebSocketRpcSession, type RpcStub, RpcTarget } from "capnweb";
import mqtt from "mqtt";
import { Buffer } from "node:buffer";
import { EventEmitter, on } from "node:events";
import { Duplex } from "node:stream";
import { Socket as PhoenixSocket } from "phoenix";
import { webSocket } from "rxjs/webSocket";
import { createDecoder, readVarUint } from "lib0/decoding";
import { createEncoder, length, toUint8Array, writeVarUint } from "lib0/encoding";
import { readSyncMessage, writeSyncStep1, writeUpdate } from "y-protocols/sync";
import { WebsocketProvider } from "y-websocket";
import { type Array as YArray, type Doc, Doc as YDoc } from "yjs";
import { WebSocketSSE } from "../client.ts";
import type { Hooks, Peer, SSEOptions } from "../server.ts";
import { sleep } from "./harness.ts";
import type { Queue } from "./pair.ts";

/** The sockets that were made by whatever program. */
export const sockets: WebSocketSSE[] = [];

/** Our class, of which each instance is known. */
class OurSocket extends WebSocketSSE {
  constructor(...args: ConstructorParameters<typeof WebSocketSSE>) {
    super(...args);
    sockets.push(this);
  }
}

const Socket = OurSocket as unknown as typeof WebSocket;

/** A program that runs: numbers go both ways by its own means. */
export interface Running {
  readonly server: SSEOptions;
  /** Has the server's half send one. */
  tell(n: number): unknown;
  /** Starts the client's half, which is ready when this resolves. */
  dial(url: string): Promise<Talk>;
}

export interface Talk {
  say(n: number): unknown;
  /** Ends the conversation in the program's own way. */
  close(): unknown;
}

/** What is heard at the server goes to `up`, at the client to `down`. */
export type Program = (up: Queue<number>, down: Queue<number>) => Running;

export const programs: Record<string, Program> = {
  "rxjs": rxjs,
  "STOMP.js": stomp,
  "MQTT.js, Aedes": mqttAedes,
  "tRPC": trpc,
  "Cap'n Web": capnweb,
  "Yjs, y-websocket": yjs,
  "Hocuspocus": hocuspocus,
  "Phoenix": phoenix,
  "ActionCable": actionCable,
};

// ---------------------------------------------------------------- what server halves expect

/** A peer as they expect a WebSocket: by `ws`'s events, and by the standard's. */
class Facade extends EventEmitter {
  readonly peer: Peer;
  readyState = 1;

  constructor(peer: Peer) {
    super();
    this.peer = peer;
  }

  send(data: string | Uint8Array): void {
    if (this.readyState === 1) this.peer.send(data);
  }

  close(code?: number, reason?: string): void {
    this.readyState = 2;
    this.peer.close(code, reason);
  }

  terminate(): void {
    this.peer.terminate();
  }

  addEventListener(type: string, listener: (event: unknown) => void): void {
    this.on(`standard ${type}`, listener);
  }

  receive(data: string | Uint8Array): void {
    this.emit("message", Buffer.from(data as string), typeof data !== "string");
    this.emit("standard message", { data });
  }

  end(code: number, reason: string): void {
    this.readyState = 3;
    this.emit("close", code, reason);
    this.emit("standard close", { code, reason });
  }
}

/** Hooks that hand each peer to somebody who takes a WebSocket. */
function accept(take: (socket: Facade) => void): Partial<Hooks> {
  const facades = new Map<string, Facade>();
  return {
    open(peer) {
      const facade = new Facade(peer);
      facades.set(peer.id, facade);
      take(facade);
    },
    message: (peer, message) => facades.get(peer.id)?.receive(message.data as string | Uint8Array),
    close(peer, { code = 1005, reason = "" }) {
      facades.get(peer.id)?.end(code, reason);
      facades.delete(peer.id);
    },
  };
}

/** Hooks of a server half that is a few lines: text comes and goes by the last peer. */
function texts(onText: (text: string, reply: (text: string) => void) => void) {
  let last: Peer | undefined;
  const hooks: Partial<Hooks> = {
    open: (peer) => void (last = peer),
    message: (peer, message) => onText(message.text(), (text) => peer.send(text)),
  };
  return { hooks, send: (text: string) => void last!.send(text) };
}

const toWS = (url: string) => url.replace("http", "ws");

// ---------------------------------------------------------------- programs

function rxjs(up: Queue<number>, down: Queue<number>): Running {
  const { hooks, send } = texts((text) => up.push(JSON.parse(text)));
  return {
    server: { hooks },
    tell: (n) => send(JSON.stringify(n)),
    async dial(url) {
      const opened = Promise.withResolvers<void>();
      const subject = webSocket<number>({
        url,
        WebSocketCtor: Socket,
        openObserver: { next: () => opened.resolve() },
      });
      subject.subscribe((n) => down.push(n));
      await opened.promise;
      return { say: (n) => subject.next(n), close: () => subject.complete() };
    },
  };
}

/** "COMMAND\nheader:value\n\nbody\0". */
function stomp(up: Queue<number>, down: Queue<number>): Running {
  let subscription = "";
  const { hooks, send } = texts((text, reply) => {
    const [head = "", body = ""] = text.replace(/\0$/, "").split("\n\n");
    const [command, ...lines] = head.trim().split("\n");
    const headers = Object.fromEntries(lines.map((line) => line.split(":")));
    if (command === "CONNECT") reply("CONNECTED\nversion:1.2\n\n\0");
    if (command === "SUBSCRIBE") subscription = headers.id;
    if (command === "SEND") up.push(Number(body));
    if (headers.receipt) reply(`RECEIPT\nreceipt-id:${headers.receipt}\n\n\0`);
  });
  return {
    server: { hooks, handleProtocols: (offered) => offered.has("v12.stomp") && "v12.stomp" },
    tell: (n) =>
      send(`MESSAGE\nsubscription:${subscription}\nmessage-id:${n}\ndestination:/down\n\n${n}\0`),
    async dial(url) {
      const ready = Promise.withResolvers<void>();
      const client = new StompClient({
        webSocketFactory: () => new Socket(url, client.stompVersions.protocolVersions()),
        reconnectDelay: 0,
        onConnect: () => {
          client.subscribe("/down", ({ body }) => down.push(Number(body)));
          client.watchForReceipt("subscribed", () => ready.resolve());
          client.publish({ destination: "/up", body: "0", headers: { receipt: "subscribed" } });
        },
      });
      client.activate();
      await ready.promise;
      await up.next();
      return {
        say: (n) => client.publish({ destination: "/up", body: `${n}` }),
        close: () => client.deactivate(),
      };
    },
  };
}

function mqttAedes(up: Queue<number>, down: Queue<number>): Running {
  const broker = Aedes.createBroker();
  const brokers = broker.then((broker) => {
    broker.on("publish", ({ topic, payload }) => topic === "up" && up.push(Number(`${payload}`)));
    return broker;
  });
  return {
    server: {
      handleProtocols: (offered) => offered.has("mqtt") && "mqtt",
      hooks: accept((socket) => {
        const stream = new Duplex({
          read() {},
          write(chunk, _encoding, done) {
            socket.send(new Uint8Array(chunk));
            done();
          },
        });
        socket.on("message", (data) => stream.push(data));
        socket.on("close", () => stream.destroy());
        stream.on("close", () => socket.readyState === 1 && socket.close());
        brokers.then((broker) => broker.handle(stream));
      }),
    },
    async tell(n) {
      const packet = { cmd: "publish", topic: "down", payload: `${n}`, qos: 1 } as const;
      (await brokers).publish({ ...packet, dup: false, retain: false }, () => {});
    },
    async dial(url) {
      const client = await mqtt.connectAsync(toWS(url), {
        createWebsocket: (url: string, protocols: string[]) => new Socket(url, protocols),
        forceNativeWebSocket: true, // as in a browser: without `ws`
        reconnectPeriod: 0,
        timerVariant: "native",
      });
      await client.subscribeAsync("down", { qos: 1 });
      client.on(
        "message",
        (_topic: string, payload: Uint8Array) => down.push(Number(`${payload}`)),
      );
      return {
        say: (n) => client.publish("up", `${n}`, { qos: 1 }),
        async close() {
          await client.endAsync();
          (await brokers).close();
        },
      };
    },
  };
}

function trpc(up: Queue<number>, down: Queue<number>): Running {
  const outbox = new EventEmitter();
  const { procedure, router } = initTRPC.create();
  const app = router({
    say: procedure.input(Number).mutation(({ input }) => up.push(input)),
    listen: procedure.subscription(async function* ({ signal }) {
      const told = on(outbox, "number", { signal: signal! });
      yield 0;
      for await (const [n] of told) yield n as number;
    }),
  });
  const handle = getWSConnectionHandler({ router: app, wss: undefined as never });
  return {
    server: {
      hooks: accept((socket) => {
        const { url, headers } = socket.peer.request;
        handle(
          socket as unknown as Parameters<typeof handle>[0],
          { url: new URL(url).pathname, headers: Object.fromEntries(headers) } as Parameters<
            typeof handle
          >[1],
        );
      }),
    },
    tell: (n) => outbox.emit("number", n),
    async dial(url) {
      const client = createWSClient({
        url: toWS(url),
        WebSocket: Socket,
        retryDelayMs: () => 60_000,
      });
      const api = createTRPCClient<typeof app>({ links: [wsLink({ client })] });
      const ready = Promise.withResolvers<void>();
      const { unsubscribe } = api.listen.subscribe(undefined, {
        onData: (n) => n ? down.push(n) : ready.resolve(),
      });
      await ready.promise;
      return {
        say: (n) => api.say.mutate(n),
        async close() {
          unsubscribe();
          await client.close();
        },
      };
    },
  };
}

interface Ear extends RpcTarget {
  hear(n: number): void;
}

function capnweb(up: Queue<number>, down: Queue<number>): Running {
  const earOf = (queue: Queue<number>) =>
    new class extends RpcTarget implements Ear {
      hear(n: number): void {
        queue.push(n);
      }
    }();
  let client: RpcStub<Ear>;
  return {
    server: {
      hooks: accept((socket) =>
        client = newWebSocketRpcSession<Ear>(socket as unknown as WebSocket, earOf(up))
      ),
    },
    tell: (n) => client.hear(n).catch(() => {}),
    async dial(url) {
      const socket = new Socket(url);
      const server = newWebSocketRpcSession<Ear>(socket, earOf(down));
      await server.hear(0);
      await up.next();
      return { say: (n) => server.hear(n).catch(() => {}), close: () => server[Symbol.dispose]() };
    },
  };
}

/** Each side writes one list of a document and reads the other. */
function lists(doc: Doc, written: string, read: string, heard: Queue<number>) {
  doc.getArray<number>(read).observe((event) => {
    for (const { insert } of event.changes.delta) {
      (insert as number[] | undefined)?.forEach((n) => heard.push(n));
    }
  });
  const list: YArray<number> = doc.getArray(written);
  return (n: number) => list.push([n]);
}

/** The server's half is what the documentation of y-websocket shows, in short. */
function yjs(up: Queue<number>, down: Queue<number>): Running {
  const doc = new YDoc();
  const tell = lists(doc, "down", "up", up);
  const frame = (write: (encoder: ReturnType<typeof createEncoder>) => void): Uint8Array => {
    const encoder = createEncoder();
    writeVarUint(encoder, 0);
    write(encoder);
    return length(encoder) > 1 ? toUint8Array(encoder) : new Uint8Array();
  };
  return {
    server: {
      hooks: accept((socket) => {
        const send = (data: Uint8Array) => data.length > 0 && socket.send(data);
        const update = (update: Uint8Array, origin: unknown) =>
          origin !== socket && send(frame((encoder) => writeUpdate(encoder, update)));
        doc.on("update", update);
        socket.on("close", () => doc.off("update", update));
        socket.on("message", (data: Uint8Array) => {
          const decoder = createDecoder(new Uint8Array(data));
          if (readVarUint(decoder) !== 0) return; // awareness
          send(frame((encoder) => readSyncMessage(decoder, encoder, doc, socket)));
        });
        send(frame((encoder) => writeSyncStep1(encoder, doc)));
      }),
    },
    tell,
    async dial(url) {
      const doc = new YDoc();
      const say = lists(doc, "up", "down", down);
      const provider = new WebsocketProvider(toWS(url), "room", doc, {
        WebSocketPolyfill: Socket,
        disableBc: true,
      });
      await new Promise((resolve) => provider.once("sync", resolve));
      return {
        say,
        async close() {
          provider.destroy();
          provider.awareness.destroy();
          await sleep(200); // the pause before it would connect again goes on
        },
      };
    },
  };
}

function hocuspocus(up: Queue<number>, down: Queue<number>): Running {
  const ready = Promise.withResolvers<(n: number) => void>();
  const server = new Hocuspocus({
    quiet: true,
    afterLoadDocument: ({ document }) => {
      ready.resolve(lists(document, "down", "up", up));
      return Promise.resolve();
    },
  });
  return {
    server: {
      hooks: accept((socket) => {
        const connection = server.handleConnection(
          socket as unknown as WebSocket,
          socket.peer.request,
        );
        socket.on("message", (data: Uint8Array) => connection.handleMessage(data));
        socket.on(
          "close",
          (code: number, reason: string) => connection.handleClose({ code, reason } as CloseEvent),
        );
      }),
    },
    tell: async (n) => (await ready.promise)(n),
    async dial(url) {
      const document = new YDoc();
      const say = lists(document, "up", "down", down);
      const websocketProvider = new HocuspocusProviderWebsocket({
        url: toWS(url),
        WebSocketPolyfill: Socket,
      });
      const synced = Promise.withResolvers<void>();
      const provider = new HocuspocusProvider({
        websocketProvider,
        document,
        name: "room",
        onSynced: () => synced.resolve(),
      });
      provider.attach();
      await synced.promise;
      return {
        say,
        close() {
          provider.destroy();
          websocketProvider.destroy();
        },
      };
    },
  };
}

/** A message is [join_ref, ref, topic, event, payload]. */
function phoenix(up: Queue<number>, down: Queue<number>): Running {
  const { hooks, send } = texts((text, reply) => {
    const [join, ref, topic, event, payload] = JSON.parse(text);
    if (event === "up") up.push(payload.n);
    reply(JSON.stringify([join, ref, topic, "phx_reply", { status: "ok", response: {} }]));
  });
  return {
    server: { hooks },
    tell: (n) => send(JSON.stringify([null, null, "room:lobby", "down", { n }])),
    async dial(url) {
      const socket = new PhoenixSocket(toWS(url), {
        transport: Socket,
        reconnectAfterMs: () => 60_000,
      });
      // Without types it seems to want an argument, against which it warns.
      (socket.connect as () => void)();
      const channel = socket.channel("room:lobby");
      channel.on("down", ({ n }: { n: number }) => down.push(n));
      await new Promise((resolve) => channel.join().receive("ok", resolve));
      return {
        say: (n) => channel.push("up", { n }),
        close: () => new Promise<void>((resolve) => socket.disconnect(resolve, 1000, "bye")),
      };
    },
  };
}

function actionCable(up: Queue<number>, down: Queue<number>): Running {
  const identifier = JSON.stringify({ channel: "Room" });
  const { hooks, send } = texts((text, reply) => {
    const { command, data } = JSON.parse(text);
    if (command === "subscribe") {
      reply(JSON.stringify({ type: "confirm_subscription", identifier }));
    }
    if (command === "message") up.push(JSON.parse(data).n);
  });
  return {
    server: {
      handleProtocols: (offered) => offered.has("actioncable-v1-json") && "actioncable-v1-json",
      hooks: {
        ...hooks,
        open(peer) {
          hooks.open!(peer);
          peer.send(JSON.stringify({ type: "welcome" }));
        },
      },
    },
    tell: (n) => send(JSON.stringify({ identifier, message: { n } })),
    async dial(url) {
      adapters.WebSocket = Socket;
      const cable = createConsumer(toWS(url));
      const ready = Promise.withResolvers<void>();
      const room = cable.subscriptions.create("Room", {
        connected: () => ready.resolve(),
        received: ({ n }: { n: number }) => down.push(n),
      });
      await ready.promise;
      await sleep(600); // for so long it goes on to doubt that it has subscribed
      return { say: (n) => room.send({ n }), close: () => cable.disconnect() };
    },
  };
}
