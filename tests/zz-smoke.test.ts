import { cluster } from "/work/main/cluster.ts";
import { MemoryBus, roundRobin } from "/work/main/tests/bus.ts";
import { connect, listen } from "/work/main/tests/pair.ts";
import { assertEquals, test, until, sleep } from "/work/main/tests/harness.ts";
for (const transport of ["post","stream","duplex"] as const) test("smoke "+transport, async (t) => {
  const bus = new MemoryBus(t);
  const got: string[] = [];
  const pairs = [];
  for (let i = 0; i < 3; i++) pairs.push(await listen(t, {
    sync: cluster(bus.adapter),
    onError: (e) => console.log("ERR", e),
    hooks: { message(peer, m) { got.push(i + m.text()); peer.send(m.text()); } },
  }));
  const rr = await roundRobin(t, pairs.map((p) => p.port));
  const a = connect(t, rr.url + "/x", { transport });
  await a.opened;
  for (let i = 0; i < 20; i++) { a.socket.send("m" + i); await a.messages.next(); }
  console.log(rr.log.join(), bus.counts, a.socket.transport);
  console.log(got.join());
  for (let k = 0; k < 3; k++) {
  (pairs[0].ws.peers.get("/x")!).size;
  a.socket["dispatchEvent"];
  // @ts-ignore
  await fetch(rr.url);
  }
});
