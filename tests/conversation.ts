/**
 * What must work wherever the server runs: one conversation, held with the room
 * of tests/room.ts in another runtime or framework.
 *
 * @module
 */
import { chaos } from "./chaos.ts";
import { assertEquals, type TestContext, until } from "./harness.ts";
import { connect } from "./pair.ts";

export interface Place {
  port: number;
  /** Default: `/room`. */
  path?: string;
}

/** Both directions, text and binary, subprotocols, resumption, closing, departures that say nothing. */
export async function converse(t: TestContext, place: Place): Promise<void> {
  const { port, path = "/room" } = place;
  const proxy = t.use(await chaos(port, { seed: 1 }));
  const observer = connect(t, `http://127.0.0.1:${port}${path}`, { transport: "post" });
  await observer.opened;
  assertEquals(await observer.messages.next(), "welcome");

  // Both directions, in order, whatever the size.
  const ada = connect(t, `${proxy.url}${path}`, { protocols: ["other", "chat"] });
  await ada.opened;
  assertEquals(ada.socket.protocol, "chat");
  assertEquals(await ada.messages.next(), "welcome");
  const bytes = Uint8Array.from({ length: 100_000 }, (_, i) => i * 7);
  ada.socket.send("one\r\ntwo\n");
  ada.socket.send(bytes);
  ada.socket.send("");
  assertEquals(await ada.messages.next(), "one\r\ntwo\n");
  assertEquals(new Uint8Array(await ada.messages.next() as ArrayBuffer), bytes);
  assertEquals(await ada.messages.next(), "");
  // Both runtimes of the tests stream both ways in one request, and so does every server here.
  assertEquals(ada.socket.transport, "duplex");
  ada.socket.send("tell hello");
  assertEquals(await observer.messages.next(), "hello");

  // Cut: what both say meanwhile arrives, once and in order.
  const resumed = once(ada, "resume");
  proxy.refuse(300);
  proxy.cutAll("rst");
  for (let n = 1; n <= 5; n++) {
    observer.socket.send(`tell observer ${n}`);
    ada.socket.send(`tell ada ${n}`);
  }
  await until(resumed, { timeout: 10_000 });
  const said = (name: string) => [1, 2, 3, 4, 5].map((n) => `${name} ${n}`);
  assertEquals(await ada.messages.take(5), said("observer"));
  assertEquals(await observer.messages.take(5), said("ada"));
  assertEquals([ada.messages.left, observer.messages.left], [0, 0]);

  // A close with its code and reason, both ways.
  ada.socket.close(4001, "enough");
  const { code, reason, wasClean } = await ada.closed;
  assertEquals([code, reason, wasClean], [4001, "enough", true]);
  assertEquals(await observer.messages.next(), "left 4001 enough");

  // A network that dies, and one that only falls silent: the server notices either.
  const silent = t.use(await chaos(port, { seed: 2 }));
  const people = [proxy, silent].map(({ url }) => connect(t, `${url}${path}`));
  for (const { opened, messages } of people) {
    await opened;
    assertEquals(await messages.next(), "welcome");
  }
  proxy.refuse(60_000);
  proxy.cutAll("rst");
  silent.stallAll();
  assertEquals(await observer.messages.take(2, { timeout: 15_000 }), ["left 1006 ", "left 1006 "]);
  for (const network of [proxy, silent]) network.calm();
  for (const { closed } of people) await closed; // 404: their sessions are over
  observer.socket.close();
  await observer.closed;
}

function once({ events }: { events: string[] }, type: string): () => boolean {
  return () => events.includes(type);
}
