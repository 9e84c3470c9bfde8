/**
 * The ways in which Node serves a fetch handler: by what others have made for that, and by ours,
 * alone and within frameworks.
 *
 * @module
 */
import { serve as serveHono } from "@hono/node-server";
import express from "express";
import fastify from "fastify";
import Koa from "koa";
import { AsyncLocalStorage } from "node:async_hooks";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import { createSecureServer } from "node:http2";
import { createRequire } from "node:module";
import type { AddressInfo, Socket } from "node:net";
import process from "node:process";
import { serve as serveSrvx } from "srvx";
import { toNodeHandler } from "../node.ts";
import { NEXT_HANDLER } from "./bundle.ts";
import type { Handler, Listening, NodeHost } from "./harness.ts";

type Where = Parameters<NodeHost["serve"]>[1];

/** Listens, and drops every connection at the end. */
async function listening(server: Server, { hostname, port }: Where): Promise<Listening> {
  await new Promise<void>((resolve) => server.listen(port, hostname, resolve));
  return {
    actual: (server.address() as AddressInfo).port,
    close: () =>
      new Promise((resolve) => {
        server.close(() => resolve());
        server.closeAllConnections();
      }),
  };
}

const LOCAL: Where = { hostname: "127.0.0.1", port: 0 };

export const hosts: Record<string, NodeHost> = {
  "node:http": {
    serve: (fetch, where) => listening(createServer(toNodeHandler({ fetch })), where),
  },

  "node:http2": {
    tls: true,
    async serve(fetch, { hostname, port, key, cert }) {
      const server = createSecureServer({ key: key!, cert: cert! }, toNodeHandler({ fetch }));
      const sockets = new Set<Socket>();
      server.on("connection", (socket: Socket) => {
        sockets.add(socket);
        socket.on("close", () => sockets.delete(socket));
      });
      await new Promise<void>((resolve) => server.listen(port, hostname, resolve));
      return {
        actual: (server.address() as AddressInfo).port,
        close: () =>
          new Promise((resolve) => {
            server.close(() => resolve());
            for (const socket of sockets) socket.destroy();
          }),
      };
    },
  },

  express: {
    serve: (fetch, where) =>
      listening(createServer(express().use(toNodeHandler({ fetch }))), where),
  },

  koa: {
    serve: (fetch, where) =>
      listening(createServer(new Koa().use(toNodeHandler({ fetch })).callback()), where),
  },

  fastify: {
    async serve(fetch, { hostname, port }) {
      const app = fastify({ forceCloseConnections: true });
      app.addHook("onRequest", toNodeHandler({ fetch }));
      await app.listen({ host: hostname, port });
      return { actual: (app.server.address() as AddressInfo).port, close: () => app.close() };
    },
  },

  srvx: {
    async serve(fetch, { hostname, port }) {
      const server = serveSrvx({
        hostname,
        port,
        silent: true,
        gracefulShutdown: false, // it listens to signals for each server
        fetch: (r) => fetch(r, r),
      });
      await server.ready();
      return {
        actual: Number(new URL(server.url!).port),
        close: () => server.close(true),
      };
    },
  },

  "@hono/node-server": {
    async serve(fetch, { hostname, port }) {
      const server = await new Promise<Server>((resolve) => {
        const server = serveHono({ hostname, port, fetch }, () => resolve(server as Server));
      });
      return {
        actual: (server.address() as AddressInfo).port,
        close: () =>
          new Promise((resolve) => {
            server.close(() => resolve());
            server.closeAllConnections();
          }),
      };
    },
  },

  /** A route handler, as Next.js has compiled it. */
  next: {
    async prepare() {
      const { actual, close } = await this.serve(() => new Response("ready"), LOCAL);
      // It loads the route at its first request.
      const response = await fetch(`http://127.0.0.1:${actual}/`);
      if (await response.text() !== "ready") {
        throw new Error(`Next.js is not ready: ${response.status}`);
      }
      await close();
    },
    async serve(fetch, where) {
      const { asked, handle } = await (next ??= startNext());
      return listening(
        createServer((incoming, outgoing) => void asked.run(fetch, handle, incoming, outgoing)),
        where,
      );
    },
  },

  /** What Next.js makes of a request and of a route handler's answer, and SvelteKit in its way. */
  "like Next.js": {
    serve: (fetch, where) =>
      listening(
        createServer((incoming, outgoing) => void inNext(fetch, incoming, outgoing)),
        where,
      ),
  },
};

/** One application for all servers of the process. */
let next: ReturnType<typeof startNext> | undefined;

/** Next's own types would change those of the environment everywhere. */
type CreateNext = (options: { dir?: string; dev: boolean }) => {
  prepare(): Promise<void>;
  getRequestHandler(): (incoming: IncomingMessage, outgoing: ServerResponse) => Promise<void>;
};

async function startNext() {
  const asked = new AsyncLocalStorage<Handler>();
  Object.assign(globalThis, { [NEXT_HANDLER]: asked });
  // It would replace the fetch of the tests' clients by one that keeps a copy of every body.
  const { fetch } = globalThis;
  Object.defineProperty(globalThis, "fetch", { get: () => fetch, set() {} });
  const createNext = createRequire(import.meta.url)("next") as CreateNext;
  const app = createNext({ dir: process.env.DUPLEX_NEXT, dev: false });
  await app.prepare();
  return { asked, handle: app.getRequestHandler() };
}

/** The body is pushed into the stream as it comes: whoever cancels it makes that throw. */
async function inNext(
  handler: Handler,
  incoming: IncomingMessage,
  outgoing: ServerResponse,
): Promise<void> {
  const { method = "GET", url = "/", headers } = incoming;
  const gone = new AbortController();
  outgoing.on("close", () => outgoing.writableFinished || gone.abort());
  const body = new ReadableStream({
    start(controller) {
      incoming.on("data", (chunk) => controller.enqueue(new Uint8Array(chunk)));
      incoming.on("end", () => controller.close());
      incoming.on("error", (error) => controller.error(error));
    },
  });
  const request = new Request(`http://${headers.host}${url}`, {
    method,
    headers: Object.entries(headers).flatMap(([name, value]) =>
      [value ?? []].flat().map((value): [string, string] => [name, value])
    ),
    signal: gone.signal,
    ...method !== "GET" && method !== "HEAD" && { body, duplex: "half" },
  } as RequestInit);
  const response = await handler(request);
  outgoing.statusCode = response.status;
  response.headers.forEach((value, name) => outgoing.appendHeader(name, value));
  outgoing.flushHeaders();
  const writer = new WritableStream<Uint8Array>({
    async write(chunk) {
      if (outgoing.write(chunk)) return;
      await new Promise<void>((resolve) => outgoing.once("drain", resolve));
    },
    abort: (reason) => void outgoing.destroy(reason),
    close: () => void outgoing.end(),
  });
  await response.body?.pipeTo(writer, { signal: gone.signal }).catch(() => {});
  outgoing.end();
}
