/** "A message of any size that moves at any speed is no silence", by each transport. */
import { assertEquals, assertGreater, test } from "./harness.ts";
import { holder } from "./holder.ts";
import { soak } from "./measured.ts";
import { connect, listen } from "./pair.ts";
import type { Peer } from "../server.ts";

const MiB = 1024 * 1024;

/** As it was found, with the options' defaults, two minutes each; and the same in seconds. */
const { bytes, rate, about, options } = soak
  ? { bytes: 12 * MiB, rate: 100_000, about: "12 MiB at 100 kB/s", options: {} }
  : {
    bytes: MiB,
    rate: 150_000,
    about: "1 MiB at 150 kB/s and an idleTimeout of 2 s",
    options: { idleTimeout: 2, resumeTimeout: 1_000, heartbeatInterval: 1_000 },
  };
const least = 1000 * bytes / rate;

for (const transport of ["duplex", "stream", "post", "poll"] as const) {
  test(`${about}, by ${transport}: no drop`, async (t) => {
    const calls: string[] = [];
    let peer!: Peer;
    const { port } = await listen(t, {
      ...options,
      hooks: {
        open: (opened) => void (calls.push("open"), peer = opened),
        close: (_, { code }) => void calls.push(`close ${code}`),
      },
    });
    const front = t.use(await holder(port, { bytes: 0, rate }));
    const { socket, messages, events, opened } = connect(t, front.url, { transport });
    await opened;
    const began = performance.now();
    const sent = "x".repeat(bytes);
    peer.send(sent);
    assertEquals(await messages.next({ timeout: 6 * least }), sent);
    assertGreater(performance.now() - began, 0.6 * least);
    peer.send("after");
    assertEquals(await messages.next({ timeout: 20_000 }), "after");
    assertEquals([socket.transport, socket.stats.resumes, events], [transport, 0, ["open"]]);
    assertEquals(calls, ["open"]);
  }, { timeout: 8 * least });
}
