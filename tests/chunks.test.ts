/** Event streams in chunks of our choosing: where they break lines, and where a line never ends. */
import { WebSocketSSE } from "../client.ts";
import { assert, assertEquals, assertLess, once, runtime, test } from "./harness.ts";
import { connect } from "./pair.ts";

test("an event that never ends fails the socket, and its stream is cancelled", async () => {
  const MiB = 1024 * 1024;
  const chunk = new Uint8Array(MiB).fill(120);
  let given = 0;
  let cancelled = false;
  const body = new ReadableStream<Uint8Array>({
    pull(controller) {
      const first = new TextEncoder().encode("event: crossws-id\ndata: token\n\ndata: ");
      controller.enqueue(given++ ? chunk : first);
      if (given > 300) controller.close(); // the test fails, the machine does not
    },
    cancel() {
      cancelled = true;
    },
  }, { highWaterMark: 0 });
  const socket = new WebSocketSSE("http://localhost/", {
    transport: "post",
    fetch: () =>
      Promise.resolve(new Response(body, { headers: { "content-type": "text/event-stream" } })),
  });
  let told = "";
  socket.addEventListener("error", ({ message }) => told = message);
  const { code, wasClean } = await once<CloseEvent>(socket, "close", { timeout: 20_000 });
  assertEquals([code, wasClean, told], [1006, false, "Lost: an event has no end"]);
  assert(cancelled);
  assertLess(given, 140);
}, { timeout: 30_000 });

test("an event of 10 million lines costs their characters, and is one message", async (t) => {
  const lines = new TextEncoder().encode("data\n".repeat(10_000));
  let given = 0;
  let most = 0;
  const body = new ReadableStream<Uint8Array>({
    pull(controller) {
      if (given % 100 === 0) most = Math.max(most, process.memoryUsage().heapUsed);
      controller.enqueue(given++ < 1000 ? lines : new TextEncoder().encode("\n"));
      if (given > 1000) controller.close();
    },
  }, { highWaterMark: 0 });
  const headers = { "content-type": "text/event-stream" };
  const before = process.memoryUsage().heapUsed;
  const { messages } = connect(t, "http://localhost/", {
    bidir: false,
    transport: "post",
    fetch: () => Promise.resolve(new Response(body, { headers })),
  });
  const message = await messages.next() as string;
  assertEquals(message.length, 10_000_000 - 1);
  const limit = runtime === "bun" ? 70 : 150;
  assertLess((most - before) / 1024 / 1024, limit, "by a string for each line, 100 and 300");
}, { timeout: 30_000 });

test("a line that breaks before what looks like another is still one", async (t) => {
  const chunks = [
    "data: of ",
    "data: and\n\n",
    "data: one\ndata",
    ": two\n\n",
    "data: end\n",
    "\n",
  ];
  const body = new ReadableStream<Uint8Array>({
    pull(controller) {
      const chunk = chunks.shift();
      if (chunk) controller.enqueue(new TextEncoder().encode(chunk));
    },
  }, { highWaterMark: 0 });
  const headers = { "content-type": "text/event-stream" };
  const { messages } = connect(t, "http://localhost/", {
    bidir: false,
    transport: "post",
    fetch: () => Promise.resolve(new Response(body, { headers })),
  });
  assertEquals(await messages.take(3), ["of data: and", "one\ntwo", "end"]);
});
