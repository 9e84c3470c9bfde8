/**
 * Node 20: the server through srvx, through Hono's node server and through
 * node.ts, the client natively.
 */
import { chaos } from "./chaos.ts";
import { converse } from "./conversation.ts";
import { assertEquals, assertMatch, rawRequest, test } from "./harness.ts";
import { connect, listen } from "./pair.ts";
import { room } from "./room.ts";

for (const server of ["srvx", "@hono/node-server", "node.ts"]) {
  test(`on Node, the server through ${server}`, async (t) => {
    const child = await t.spawn("node", "tests/fixtures/node-server.ts", { args: [server] });
    const port = Number(await child.line());
    await converse(t, { port });
    const { messages, socket, closed } = connect(t, `http://127.0.0.1:${port}/address`);
    assertEquals(await messages.take(2), ["welcome", "127.0.0.1"]);
    socket.close();
    await closed;
    assertEquals(child.stderr(), "");
  }, { timeout: 40_000 });
}

test("on Node, who is refused before its body is through is answered, and told to connect anew", async (t) => {
  const child = await t.spawn("node", "tests/fixtures/node-server.ts", { args: ["node.ts"] });
  const port = Number(await child.line());
  const head = "POST /room HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 3000000";
  const refused = t.use(await rawRequest(port, head, ["nearly nothing of it"]));
  assertEquals([refused.status, refused.headers.get("connection")], [400, "close"]);
  assertEquals(child.stderr(), "");
});

test("on Node, the client", async (t) => {
  const server = await listen(t, room);
  const proxy = t.use(await chaos(server.port, { seed: 1 }));
  const child = await t.spawn("node", "tests/fixtures/node-client.ts", {
    args: [`${proxy.url}/room`],
  });
  const [type, protocol, version] = await child.json<string[]>();
  assertEquals([type, protocol], ["open", "chat"]);
  assertMatch(version!, /^v2\d\./);
  assertEquals(await child.json(), ["message", "welcome"]);
  child.send("hello\nbinary");
  assertEquals(await child.json(), ["message", "hello"]);
  assertEquals(await child.json(), ["message", [0, 13, 10, 255]]);

  proxy.refuse(300);
  proxy.cutAll("rst");
  assertEquals(await child.json(), ["drop"]);
  child.send("sent meanwhile");
  server.ws.publish("room", "published meanwhile");
  assertEquals(await child.json(), ["resume"]);
  const last = [await child.json<string[]>(), await child.json<string[]>()];
  assertEquals(last.map(([, data]) => data).sort(), ["published meanwhile", "sent meanwhile"]);

  child.send("close");
  // Node 20 has no CloseEvent: an Event with its attributes stands in.
  const closed = await child.json<string[]>();
  assertEquals(closed.slice(0, 4), ["close", 4002, "done", true]);
  assertMatch(closed[4]!, /^(Close)?Event$/);
  // Nothing of the socket keeps the process alive, and nothing was complained about.
  assertEquals((await child.exited).code, 0);
  assertEquals(child.stderr(), "");
}, { timeout: 30_000 });
