/** Programs of others run on it, unmodified: through a network that is cut, in order, to a clean end. */
import { chaos } from "./chaos.ts";
import { assert, assertEquals, assertNotEquals, once, test } from "./harness.ts";
import { listen, Queue } from "./pair.ts";
import { programs, sockets } from "./thirdparty.ts";

const COUNT = 30;

for (const [name, program] of Object.entries(programs)) {
  test(`${name}: both ways, through a cut, in order, to a clean close`, async (t) => {
    const [up, down] = [new Queue<number>(), new Queue<number>()];
    const { server, tell, dial } = program(up, down);
    const closes = new Queue<number | undefined>();
    let opened = 0;
    const { port } = await listen(t, {
      ...server,
      hooks: {
        ...server.hooks,
        open(peer) {
          opened++;
          server.hooks!.open!(peer);
        },
        close(peer, details) {
          server.hooks!.close?.(peer, details);
          closes.push(details.code);
        },
      },
    });
    const network = t.use(await chaos(port));
    const { say, close } = await dial(network.url);
    const numbers = Array.from({ length: COUNT }, (_, index) => index + 1);
    const already = [up, down].map((queue) => queue.all.length);
    for (const n of numbers) {
      say(n);
      tell(n);
      if (n === COUNT / 3) network.cutAll("rst"); // with some of it on its way
      if (n === 2 * COUNT / 3) {
        await Promise.all([up, down].map((queue) => queue.take(n, { timeout: 15_000 })));
        network.cutAll("rst"); // while nothing is
      }
    }
    await Promise.all([up, down].map((queue) => queue.take(COUNT / 3, { timeout: 15_000 })));
    assertEquals([up, down].map((queue, index) => queue.all.slice(already[index])), [
      numbers,
      numbers,
    ]);
    const [socket, ...others] = sockets.splice(0);
    assertEquals(others, []);
    const closed = once<CloseEvent>(socket!, "close", { timeout: 10_000 });
    await close();
    const { code, wasClean } = await closed;
    assert(wasClean);
    assertNotEquals(code, 1006);
    assertEquals(await closes.next({ timeout: 10_000 }), code);
    assertEquals(opened, 1, "no cut was seen by it");
    assert(network.stats.cuts > 0);
  }, { timeout: 60_000 });
}
