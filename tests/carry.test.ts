/** `pack()` and the option `resume`: a session that one socket leaves to another, by hand. */
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { WebSocketSSE } from "../client.ts";
import type { Peer, SSEOptions } from "../server.ts";
import { chaos } from "./chaos.ts";
import {
  assert,
  assertEquals,
  assertMatch,
  assertThrows,
  once,
  type Runtime,
  sleep,
  test,
  type TestContext,
  until,
} from "./harness.ts";
import { closeAll, connect, listen, Queue } from "./pair.ts";
import { project, recipeOf } from "./project.ts";
import { ScriptedServer } from "./scripted.ts";

const numbers = (last: number) => Array.from({ length: last }, (_, n) => n + 1);

/** A server whose peers count to their clients, and write down what these count. */
async function counter(t: TestContext, options: SSEOptions = {}) {
  const peers = new Queue<Peer>();
  const closes = new Queue<number | undefined>();
  const received: number[] = [];
  const state = { sent: 0, requests: 0 };
  const server = await listen(t, {
    hooks: {
      open(peer) {
        peers.push(peer);
        const counting = setInterval(() => {
          if (peer.send(`${state.sent + 1}`)) state.sent++;
        }, 5);
        t.defer(() => clearInterval(counting));
      },
      message: (_, message) => void received.push(Number(message.text())),
      close: (_, { code }) => closes.push(code),
    },
    ...options,
  }, (request, next) => {
    state.requests++;
    return next(request);
  });
  return { ...server, peers, closes, received, state };
}

/** An application that outlives its sockets. */
class App {
  readonly seen: number[] = [];
  sent = 0;

  listen(socket: WebSocketSSE): void {
    socket.addEventListener("message", ({ data }) => this.seen.push(Number(data)));
  }

  send(socket: WebSocketSSE, count: number): void {
    for (let n = 0; n < count; n++) socket.send(`${++this.sent}`);
  }
}

for (const transport of ["duplex", "stream", "post", "poll"] as const) {
  test(`a session goes through ten sockets, exactly once both ways (${transport})`, async (t) => {
    const { url, peers, closes, received, state } = await counter(t);
    const app = new App();
    let resume: string | undefined;
    for (let n = 0; n < 10; n++) {
      const { socket, opened, events, closed } = connect(t, url, { transport, resume });
      app.listen(socket);
      await opened;
      assertEquals(socket.resumed, n > 0);
      app.send(socket, 3);
      const goal = app.seen.length + 3 + n;
      await until(() => app.seen.length >= goal);
      app.send(socket, 3); // on their way, or not yet
      if (n % 2) await Promise.resolve();
      if (n % 3) socket.pause();
      resume = socket.pack();
      assert(resume);
      assertEquals(socket.readyState, WebSocketSSE.CLOSING);
      const { code, reason, wasClean } = await closed;
      assertEquals([code, reason, wasClean], [1001, "packed", false]);
      assertEquals(socket.readyState, WebSocketSSE.CLOSED);
      assertEquals(events, ["open", "close"]);
    }
    const { socket, opened, closed } = connect(t, url, { transport, resume });
    app.listen(socket);
    await opened;
    await until(() => received.length === app.sent);
    await until(() => app.seen.length >= state.sent - 2);
    assertEquals([peers.all.length, closes.all.length], [1, 0], "one session, for its hooks");
    socket.close();
    await closed;
    assertEquals(await closes.next(), 1005);
    assertEquals(app.seen, numbers(app.seen.length));
    assertEquals(received, numbers(app.sent));
  });
}

test("a session goes from process to process, and from runtime to runtime", async (t) => {
  const { url, peers, received } = await counter(t);
  const app = new App();
  const { socket, opened } = connect(t, url);
  app.listen(socket);
  await opened;
  await until(() => app.seen.length > 5);
  app.send(socket, 5);
  let packed = socket.pack();
  for (const name of ["deno", "bun", "node"] satisfies Runtime[]) {
    const args = [url, packed!, `${app.sent}`, "10"];
    const child = await t.spawn(name, "tests/fixtures/carrier.ts", { args });
    const carried = await child.json<{
      resumed: boolean;
      seen: number[];
      sent: number;
      packed: string;
    }>();
    assert(carried.resumed);
    app.seen.push(...carried.seen);
    app.sent = carried.sent;
    packed = carried.packed;
    assertEquals((await child.exited).code, 0, "nothing holds the process that has packed");
  }
  const last = connect(t, url, { resume: packed });
  app.listen(last.socket);
  await last.opened;
  await until(() => received.length === app.sent);
  await until(() => app.seen.length > 50);
  assertEquals(app.seen, numbers(app.seen.length));
  assertEquals(received, numbers(app.sent));
  assertEquals([peers.all.length, last.socket.resumed], [1, true]);
}, { timeout: 30_000 });

test("what was sent while the connection is lost goes on, and counts as buffered", async (t) => {
  const { url, port, received } = await counter(t);
  const network = t.use(await chaos(port));
  const app = new App();
  const first = connect(t, url.replace(`${port}`, `${network.port}`));
  app.listen(first.socket);
  await first.opened;
  await until(() => app.seen.length > 5);
  network.refuse(60_000);
  network.cutAll("rst");
  await once(first.socket, "drop");
  app.send(first.socket, 9);
  const resume = first.socket.pack();
  app.send(first.socket, 1); // counted, and discarded: as after `close()`
  app.sent--;
  assertEquals(first.socket.bufferedAmount, 11); // "10" has two digits
  const second = connect(t, url, { resume });
  assertEquals(second.socket.bufferedAmount, 9);
  app.listen(second.socket);
  await second.opened;
  await until(() => second.socket.bufferedAmount === 0 && app.seen.length > 20);
  assertEquals(received, numbers(9));
  assertEquals(app.seen, numbers(app.seen.length));
});

test("a socket that has packed sends nothing more, and packs no more", async (t) => {
  const { url, closes, state } = await counter(t);
  const { socket, opened, closed, events } = connect(t, url, { transport: "post" });
  await opened;
  await once(socket, "message");
  socket.send("1");
  const drained = socket.waitForDrain();
  assert(socket.pack());
  const { requests } = state;
  await drained; // as at every end
  socket.send("2");
  socket.close(3000);
  assertEquals(socket.pack(), undefined);
  assertEquals((await closed).reason, "packed");
  assertEquals([socket.pack(), socket.bufferedAmount], [undefined, 2]);
  await sleep(300);
  assertEquals([state.requests, closes.all, events], [requests, [], ["open", "close"]]);
});

test("a message that was dispatched counts as received, the next one does not", async (t) => {
  const { url } = await counter(t);
  const first = connect(t, url);
  const seen: number[] = [];
  let resume: string | undefined;
  first.socket.addEventListener("message", ({ data }) => {
    seen.push(Number(data));
    if (seen.length === 7) resume = first.socket.pack();
  });
  await first.closed;
  assertEquals(seen, numbers(7));
  const { messages } = connect(t, url, { resume });
  assertEquals(Number(await messages.next()), 8);
});

test("a session can be packed again before it has opened here", async (t) => {
  const { url, peers } = await counter(t);
  const first = connect(t, url);
  await first.opened;
  let resume = first.socket.pack();
  for (let n = 0; n < 5; n++) {
    const { socket, closed, events } = connect(t, url, { resume });
    if (n % 2) await sleep(n);
    resume = socket.pack();
    assert(resume);
    await closed;
    assertEquals(events.at(-1), "close");
    assert(!events.includes("error"));
  }
  const last = connect(t, url, { resume });
  await last.opened;
  await last.messages.take(20);
  const seen = [...first.messages.all, ...last.messages.all].map(Number);
  assertEquals(new Set(seen).size, seen.length);
  assertEquals([peers.all.length, last.socket.resumed], [1, true]);
});

test("nothing is packed while a session begins, ends, or is not all there; the socket goes on", async (t) => {
  const { url, closes, received } = await counter(t);
  const { socket, opened, closed } = connect(t, url);
  assertEquals(socket.pack(), undefined, "connecting");
  await opened;
  socket.send(new Blob(["1"]));
  assertEquals(socket.pack(), undefined, "a Blob is being read");
  await until(() => received.length === 1);
  assert(socket.readyState === WebSocketSSE.OPEN);
  socket.close();
  assertEquals(socket.pack(), undefined, "closing");
  assertEquals((await closed).code, 1005);
  assertEquals(socket.pack(), undefined, "closed");
  assertEquals(await closes.next(), 1005);
});

test("more than 3.75 MiB are not packed", async (t) => {
  const messages = new Queue<string>();
  const { url } = await listen(t, {
    maxMessageSize: 4 * 1024 * 1024,
    hooks: { message: (_, message) => messages.push(message.text()) },
  });
  const first = connect(t, url);
  await first.opened;
  const text = "x".repeat(3.75 * 1024 * 1024 + 1);
  first.socket.send(text);
  assertEquals(first.socket.pack(), undefined);
  assertEquals((await messages.next()).length, text.length);
  await first.socket.waitForDrain();
  first.socket.send(text.slice(1));
  const resume = first.socket.pack()!;
  assert(resume.length < 5 * 1024 * 1024 + 1000);
  const second = connect(t, url, { resume });
  await second.opened;
  assertEquals((await messages.next()).length, text.length - 1);
});

test("a session that the server cannot resume is not packed", async (t) => {
  const { url } = await counter(t, { resumeTimeout: 0 });
  const { socket, opened, messages } = connect(t, url);
  await opened;
  assertEquals(socket.pack(), undefined);
  await messages.take(3);
});

test("a session that is over begins anew, without an error", async (t) => {
  const { url, peers } = await counter(t);
  const first = connect(t, url);
  await first.opened;
  const resume = first.socket.pack();
  (await peers.next()).terminate();
  const second = connect(t, url, { resume });
  assert(second.socket.resumed, "until it is known");
  await second.opened;
  assertEquals([second.socket.resumed, second.events], [false, ["open"]]);
  assertEquals(peers.all.length, 2);
});

test("what is too late by the clock begins anew, and asks for nothing else", async (t) => {
  const { url, peers, state } = await counter(t);
  const first = connect(t, url);
  await first.opened;
  const kept = JSON.parse(first.socket.pack()!);
  await first.closed;
  const { requests } = state;
  const resume = JSON.stringify({ ...kept, lostAt: kept.lostAt - 31_000 });
  const second = connect(t, url, { resume });
  await second.opened;
  assertEquals([second.socket.resumed, second.events], [false, ["open"]]);
  assertEquals([peers.all.length, state.requests], [2, requests + 1]);
});

/** Packs a session of a scripted server, and has another socket go on with it. */
async function carried(t: TestContext) {
  const server = new ScriptedServer();
  const url = "http://scripted.test/";
  const options = { transport: "post", fetch: server.fetch } as const;
  const first = connect(t, url, options);
  (await server.next()).stream();
  await first.opened;
  return { server, second: connect(t, url, { ...options, resume: first.socket.pack() }) };
}

test("a connection that is cut before a word is asked for again", async (t) => {
  const { server, second } = await carried(t);
  const asked = await server.next();
  asked.cut();
  const again = await server.next();
  const [attempt, next] = [asked, again].map(({ headers }) =>
    Number(headers.get("x-duplex-attempt"))
  );
  again.stream();
  await second.opened;
  assertEquals([next, second.socket.resumed, second.events], [attempt! + 1, true, ["open"]]);
});

test("where it is refused then, a new session begins, without an error", async (t) => {
  const { server, second } = await carried(t);
  (await server.next()).cut();
  (await server.next()).respond(404);
  const opening = await server.next();
  assertEquals(opening.headers.get("x-crossws-id"), null);
  opening.stream();
  await second.opened;
  assertEquals([second.socket.resumed, second.events], [false, ["open"]]);
});

test("the snippet of docs/pages.md leaves a session and goes on with it", async (t) => {
  const { url, peers } = await counter(t);
  const code = await recipeOf("docs/pages.md", "carry.ts");
  const from = code.replace("jsr:@duplex/sse/client", "duplex-sse/client");
  const folder = await project(t, { "carry.ts": from });
  const { leave, connect } = await import(pathToFileURL(join(folder, "carry.ts")).href) as {
    leave(socket: WebSocketSSE): string | undefined;
    connect(url: string, left?: string): WebSocketSSE;
  };
  const first = connect(url);
  assertEquals(leave(first), undefined);
  await once(first, "open");
  const second = connect(url, leave(first));
  await once(second, "message");
  assertEquals([first.resumed, second.resumed, peers.all.length], [false, true, 1]);
  await closeAll([second]);
});

for (const [what, leaps] of [["later", [0.1, 0.9]], ["earlier", [0.9, 0.1]]] as const) {
  test(`of two sockets with one text the ${what} one has the session`, async (t) => {
    const { url, peers } = await counter(t, { heartbeatInterval: 60_000 });
    const first = connect(t, url);
    await first.opened;
    const resume = first.socket.pack();
    const made = leaps.map((leap) => {
      const { random } = Math;
      Math.random = () => leap;
      try {
        return connect(t, url, { resume, transport: "post" });
      } finally {
        Math.random = random;
      }
    });
    const [winner, loser] = leaps[0] > leaps[1] ? made : [...made].reverse();
    await winner!.opened;
    await until(() => loser!.events.includes("close") || !loser!.socket.resumed);
    await until(() => winner!.messages.all.length > 20);
    const seen = [...first.messages.all, ...winner!.messages.all].map(Number);
    assertEquals([winner!.socket.resumed, winner!.events], [true, ["open"]]);
    // It had the session for a moment, or never.
    if (loser!.socket.resumed) assertEquals((await loser!.closed).code, 1006);
    else assertEquals(peers.all.length, 2);
    assertEquals(new Set(seen).size, seen.length);
  });
}

test("a text that is none is refused by name, whatever it is", async (t) => {
  const { url, peers } = await counter(t);
  const first = connect(t, url);
  await first.opened;
  first.socket.send("1");
  const packed = first.socket.pack()!;
  const bad: unknown[] = [
    "",
    "{",
    "null",
    "[]",
    "5",
    "{}",
    5,
    {},
    Symbol.iterator,
    packed.slice(1),
  ];
  type Spoilt = Record<string, unknown>;
  const spoil = (change: (kept: Spoilt & Record<"outbox" | "terms", Spoilt>) => void) => {
    const kept = JSON.parse(packed);
    change(kept);
    bad.push(JSON.stringify(kept));
  };
  const values = [null, "x", -1, 0.5, 1e300, {}, [], [[]], [["%", 1]], [["AA==", -1]], "a\r\nb"];
  for (const name of ["token", "terms", "attempt", "lostAt", "dispatched", "outbox"]) {
    for (const value of [undefined, ...values]) {
      if (name !== "token" || value !== "x") spoil((kept) => kept[name] = value);
    }
  }
  for (const name of ["firstUnacked", "nextUnsent", "begun", "handled", "messages"]) {
    for (const value of [undefined, ...values]) {
      if (name === "messages" && JSON.stringify(value) === "[]") continue; // as good as any
      spoil((kept) => kept.outbox[name] = value);
    }
  }
  spoil((kept) => kept.outbox.nextUnsent = 9);
  spoil((kept) => kept.terms.window = -1);
  for (const resume of bad) {
    const error = assertThrows(
      () => new WebSocketSSE(url, { resume: resume as string }),
      TypeError,
    );
    assertMatch((error as TypeError).message, /resume/);
  }
  for (const resume of [undefined, null]) await connect(t, url, { resume }).opened;
  assertEquals(peers.all.length, 3);
});
