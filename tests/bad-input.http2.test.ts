/** The suite of bad input over HTTP/2 by Deno's own server; Node's has it in tests/hosts.test.ts. */
import { certificate, needs, runtime, speakHttp2 } from "./harness.ts";

/**
 * Deno's fetch resets no stream of HTTP/2 whose body it still waits for, so the server cannot know
 * that it was left. By a client that does, tests/http2.test.ts has the same.
 */
const NOT_RESET = [
  "a duplex request with a truncated header goes on",
  "a duplex request with a truncated message goes on",
];

// Bun's own fetch, which the suite asks by, speaks HTTP/1.1.
if (runtime === "deno" && !needs("openssl")) {
  speakHttp2(...NOT_RESET);
  await certificate(); // takes longer than a test of a few ms should
  await import("./bad-input.test.ts");
}
