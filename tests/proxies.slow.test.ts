/** "A message of any size that moves at any speed is no silence", by each transport. */
import { assertEquals, assertGreater, test } from "./harness.ts";
import { holder } from "./holder.ts";
import { connect, listen } from "./pair.ts";
import type { Peer } from "../server.ts";

for (const transport of ["duplex", "stream", "post", "poll"] as const) {
  test(`1 MiB at 150 kB/s by ${transport}, and an idleTimeout of 2 s: no drop`, async (t) => {
    const calls: string[] = [];
    let peer!: Peer;
    const { port } = await listen(t, {
      idleTimeout: 2,
      resumeTimeout: 1_000,
      heartbeatInterval: 1_000,
      hooks: {
        open: (opened) => void (calls.push("open"), peer = opened),
        close: (_, { code }) => void calls.push(`close ${code}`),
      },
    });
    const front = t.use(await holder(port, { bytes: 0, rate: 150_000 }));
    const { socket, messages, events, opened } = connect(t, front.url, { transport });
    await opened;
    const began = performance.now();
    const sent = "x".repeat(1024 * 1024);
    peer.send(sent);
    assertEquals(await messages.next({ timeout: 40_000 }), sent);
    assertGreater(performance.now() - began, 4_000);
    peer.send("after");
    assertEquals(await messages.next({ timeout: 20_000 }), "after");
    assertEquals([socket.transport, socket.stats.resumes, events], [transport, 0, ["open"]]);
    assertEquals(calls, ["open"]);
  }, { timeout: 60_000 });
}
