/**
 * What strangers can make a server hold, measured: the memory of a process of its own, before and
 * after. Each limit is several times what was measured, and a fraction of what it is without the
 * bound.
 */
import { readdirSync } from "node:fs";
import { connect } from "node:net";
import { sseAdapter, type SSEOptions } from "../server.ts";
import {
  assertEquals,
  assertLess,
  assertLessOrEqual,
  rawRequest,
  runtime,
  serve,
  sleep,
  test,
  until,
} from "./harness.ts";
import { MB, measured, type MeasuredState, RawStream, soak } from "./measured.ts";

const OPENINGS = soak ? 20_000 : 5000;

/** Keeps its peers, and nothing else. */
function keeping(s: MeasuredState): SSEOptions {
  return {
    bidir: true,
    resumeTimeout: 500,
    maxPeers: 100,
    hooks: {
      open: (peer) => void s.peers.push(peer),
      close: (peer) => void s.peers.splice(s.peers.indexOf(peer), 1),
    },
  };
}

test(
  "of 500 plain bodies that never end 16 are held, and none when their session ends",
  async (t) => {
    const server = t.use(await measured(runtime, keeping));
    const [before, most, after] = await server.run(async (s) => {
      const plain = { accept: "text/event-stream" };
      const opened = await s.ws.fetch(new Request("http://x/", { headers: plain }));
      const headers = {
        "x-crossws-id": opened.headers.get("x-crossws-id")!,
        "content-length": `${1024 * 1024}`,
        "content-type": "text/plain",
      };
      /** 1 MiB that lacks a byte, in chunks as they come from a socket. */
      const send = () => {
        let left = 1024 * 1024 - 1;
        const body = new ReadableStream<Uint8Array>({
          pull(controller) {
            if (!left) return new Promise(() => {});
            const chunk = new Uint8Array(Math.min(left, 65536)).fill(120);
            left -= chunk.length;
            controller.enqueue(chunk);
          },
        }, { highWaterMark: 0 });
        const init = { method: "POST", headers, body, duplex: "half" };
        s.ws.fetch(new Request("http://x/", init as RequestInit)).catch(() => {});
      };
      const heaps = [(await s.memory()).heap];
      for (let i = 0; i < 500; i++) {
        send();
        if (i % 10 === 9) await s.later(1);
      }
      await s.later(100);
      heaps.push((await s.memory()).heap);
      s.peers[0]!.terminate();
      await s.later(50);
      heaps.push((await s.memory()).heap);
      return heaps;
    });
    assertLess(most! - before!, 80 * MB, "500 would be 500 MiB");
    assertLess(after! - before!, 8 * MB);
  },
  { timeout: 30_000 },
);

for (const level of ["full", "plain"] as const) {
  test(
    `of 100 bodies that lack a byte those are not held that were ended (${level})`,
    async (t) => {
      const server = t.use(await measured(runtime, keeping));
      const stream = t.use(await RawStream.open(server.port, { full: level === "full" }));
      const begin = level === "full" ? "SEQ 1\r\n1\r\nTEXT f4240\r\n" : "";
      const text = begin + "x".repeat(1_000_000); // of the frame, the line break lacks
      const type = level === "full" ? "x-duplex-version: 1" : "content-type: text/plain";
      const head = `POST / HTTP/1.1\r\nhost: x\r\nx-crossws-id: ${stream.token}\r\n${type}\r\n` +
        `content-length: ${text.length + 2}\r\n`;
      const held = async () => (await server.run((s) => s.memory())).heap;
      const before = await held();
      const open = level === "full" ? 2 : 16;
      const answers: Promise<unknown>[] = [];
      for (let i = 0; i < 100; i++) {
        const answer = rawRequest(server.port, head, [text]);
        answers.push(answer.then((response) => t.use(response), () => {})); // in the end, the server's
        await sleep(10); // it is read
      }
      await Promise.all(answers.slice(0, -open));
      assertLess((await held() - before) / MB, 50, "all would be 100");
      await server.child[Symbol.asyncDispose](); // which ends those that are open
      await Promise.allSettled(answers);
    },
    { timeout: 30_000 },
  );
}

test(
  `${OPENINGS} openings whose connections are reset are maxPeers sessions at most, and then none`,
  async (t) => {
    const server = t.use(await measured(runtime, keeping));
    const [before, most, after, peers] = await server.run(async (s, count) => {
      const full = { accept: "text/event-stream", "x-duplex-version": "1" };
      const open = async () => {
        const response = await s.ws.fetch(new Request("http://x/", { headers: full }));
        await response.body?.cancel();
        return response.status;
      };
      for (let i = 0; i < 200; i++) await open(); // warm
      const before = (await s.memory()).heap;
      for (let i = 0; i < count; i++) await open();
      const most = (await s.memory()).heap;
      const peers = s.ws.peers.get("/")!.size;
      await s.later(1000);
      return [before, most, (await s.memory()).heap, peers];
    }, OPENINGS);
    assertLessOrEqual(peers!, 100);
    assertLess(most! - before!, 5 * MB, "5,000 sessions would be more than 15 MB");
    assertLess(after! - before!, 2 * MB);
  },
  { timeout: 30_000 },
);

for (const level of ["full", "plain"] as const) {
  test(
    `a message that comes byte by byte costs little more than its bytes (${level})`,
    async (t) => {
      const server = t.use(await measured(runtime, keeping));
      const grown = await server.run(async (s, level) => {
        const plain = { accept: "text/event-stream" };
        const full = { ...plain, "x-duplex-version": "1" };
        const opened = await s.ws.fetch(
          new Request("http://x/", { headers: level === "full" ? full : plain }),
        );
        const size = 200_000;
        const headers: Record<string, string> = {
          "x-crossws-id": opened.headers.get("x-crossws-id")!,
          ...level === "full"
            ? { "content-type": "application/websocket-events", "x-duplex-version": "1" }
            : { "content-type": "text/plain", "content-length": `${size + 1}` },
        };
        const head = level === "full" ? `SEQ 1\r\n1\r\nTEXT ${(size + 1).toString(16)}\r\n` : "";
        let left = size;
        let isRead = () => {};
        const read = new Promise<void>((resolve) => isRead = resolve);
        const body = new ReadableStream<Uint8Array>({
          start: (controller) =>
            head ? controller.enqueue(new TextEncoder().encode(head)) : undefined,
          pull(controller) {
            if (left--) return controller.enqueue(new Uint8Array([120]));
            isRead();
            return new Promise(() => {});
          },
        }, { highWaterMark: 0 });
        const before = (await s.memory()).heap;
        const init = { method: "POST", headers, body, duplex: "half" };
        s.ws.fetch(new Request("http://x/", init as RequestInit)).catch(() => {});
        await read;
        const { heap } = await s.memory();
        s.peers[0]!.terminate();
        return heap - before;
      }, level);
      assertLess(grown, 8 * MB, "a copy of each byte would be more than 14 MB");
    },
    { timeout: 30_000 },
  );
}

test("1,000 sessions of long paths that have ended are maxPeers short tombstones", async (t) => {
  const server = t.use(await measured(runtime, () => ({ bidir: true, maxPeers: 100 })));
  const grown = await server.run(async (s) => {
    const full = { accept: "text/event-stream", "x-duplex-version": "1" };
    const round = async (count: number) => {
      for (let i = 0; i < count; i++) {
        const url = `http://x/${i}/${"p".repeat(20_000)}`;
        const opened = await s.ws.fetch(new Request(url, { headers: full }));
        const token = opened.headers.get("x-crossws-id")!;
        const headers = { "x-crossws-id": token, "x-duplex-version": "1" };
        const body = "SEQ 1\r\n1\r\nCLOSE\r\n";
        const closed = await s.ws.fetch(new Request(url, { method: "POST", headers, body }));
        if (closed.status !== 204) throw new Error(`${closed.status}`);
        await opened.body!.cancel();
      }
    };
    await round(100);
    const before = (await s.memory()).heap;
    await round(1000);
    return (await s.memory()).heap - before;
  });
  assertLess(grown, 4 * MB, "the paths alone are 20 MB");
}, { timeout: 30_000 });

test("a megabyte of PINGs to a hook that waits is 16 calls, and no queue", async (t) => {
  const server = t.use(
    await measured(runtime, (s) => ({
      bidir: true,
      hooks: {
        open: (peer) => void s.peers.push(peer),
        ping: () => {
          s.sent++;
          return new Promise<void>(() => {});
        },
      } as SSEOptions["hooks"],
    })),
  );
  const [grown, calls] = await server.run(async (s) => {
    const full = { accept: "text/event-stream", "x-duplex-version": "1" };
    const opened = await s.ws.fetch(new Request("http://x/", { headers: full }));
    const token = opened.headers.get("x-crossws-id")!;
    const headers = { "x-crossws-id": token, "x-duplex-version": "1" };
    const before = (await s.memory()).heap;
    const body = "PING\r\n".repeat(170_000);
    await s.ws.fetch(new Request("http://x/", { method: "POST", headers, body }));
    return [(await s.memory()).heap - before, s.sent];
  });
  assertEquals(calls, 16);
  assertLess(grown!, 12 * MB, "170,000 calls that wait are more than 30 MB");
}, { timeout: 30_000 });

test("of duplex clients that are lost no more than a few file descriptors stay", async (t) => {
  const ws = sseAdapter({ bidir: true, resumeTimeout: 0, heartbeatInterval: 100 });
  t.defer(() => ws.close());
  t.expect(/This host keeps the connection/); // as Deno's does, which would end by it
  const { port } = t.use(await serve(ws.fetch));
  const count = () => readdirSync("/proc/self/fd").length;
  const before = count();
  const head =
    "POST / HTTP/1.1\r\nhost: x\r\naccept: text/event-stream\r\nx-duplex-version: 1\r\n" +
    "content-type: application/websocket-events\r\ntransfer-encoding: chunked\r\n\r\n";
  const lose = async () => {
    const socket = connect(port, "127.0.0.1");
    await new Promise((resolve) => {
      socket.once("data", resolve);
      socket.write(`${head}a\r\nPING 0\r\n\r\n\r\n`);
    });
    await sleep(250); // until the server has spoken last
    socket.destroy();
  };
  for (let wave = 0; wave < 4; wave++) {
    await Promise.all(Array.from({ length: 20 }, lose));
    await until(() => !ws.stats().sessions.connected);
    await sleep(1_100);
  }
  await until(() => count() < before + 40);
}, { timeout: 30_000 });
