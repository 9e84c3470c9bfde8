/** LEAVE: a page that goes on in the next one is waited for, but not for long. */
import { assert, assertEquals, assertLess, sleep, test, type TestContext } from "./harness.ts";
import { listen, Queue } from "./pair.ts";
import { frame, seq, text, wireClient } from "./wire.ts";

async function server(t: TestContext) {
  const closes = new Queue<{ code?: number | undefined }>();
  const received: string[] = [];
  const { url, ws } = await listen(t, {
    hooks: {
      message: (_, message) => void received.push(message.text()),
      close: (_, details) => closes.push(details),
    },
  });
  return { url, ws, closes, received };
}

const leave = (attempt: number | string) => new TextDecoder().decode(frame("LEAVE", `${attempt}`));

test("a page that was left is waited for 4.5 s, and then was closed by 1001", async (t) => {
  const { url, closes } = await server(t);
  const client = await wireClient(t, url);
  const began = performance.now();
  assertEquals(await client.frames(leave(0)), [204, 0]);
  assertEquals(await client.next(), undefined, "its stream has ended");
  assertEquals((await closes.next({ timeout: 10_000 })).code, 1001);
  const took = performance.now() - began;
  assert(took > 4_400, `${took}`);
  assertLess(took, 9_000); // 4.5 s where the machine is not busy
  assertEquals((await client.frames(leave(0)))[0], 404);
});

test("the next page goes on, with what the last one sent, and is not hurried afterwards", async (t) => {
  const { url, closes, received } = await server(t);
  const client = await wireClient(t, url);
  await client.frames(seq(1) + text("before") + leave(0));
  const next = t.use(await client.resume(1, 0));
  assertEquals(next.terms.received, 1);
  await next.frames(seq(2) + text("after"));
  await sleep(5_000);
  assertEquals([received, closes.all], [["before", "after"], []]);
});

test("a LEAVE of a connection that was replaced says nothing; one of a connection that never came counts", async (t) => {
  const { url, ws, closes } = await server(t);
  const client = await wireClient(t, url);
  const next = t.use(await client.resume(2, 0));
  await next.frames(leave(1)); // it was late
  const [peer] = [...ws.peers.values()].flatMap((peers) => [...peers]);
  peer!.send("still here");
  assertEquals(await next.message(), "still here");
  assertEquals(await next.frames(leave(3)), [204, 0]);
  assertEquals(await next.next(), undefined);
  assertEquals((await closes.next({ timeout: 10_000 })).code, 1001);
});

test("a LEAVE that is no number is malformed", async (t) => {
  const { url, closes } = await server(t);
  const client = await wireClient(t, url);
  for (const attempt of ["", "-1", "one"]) {
    assertEquals((await client.frames(leave(attempt)))[0], 400);
  }
  assertEquals(closes.all, []);
});
