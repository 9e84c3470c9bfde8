/**
 * A binary message to its event and back, against a text of the same length.
 *
 * @module
 */
import { answer } from "./rpc.ts";

interface Base64 {
  toBase64?(): string;
}
const { fromBase64 } = Uint8Array as { fromBase64?: (text: string) => Uint8Array };
const encoder = new TextEncoder();
const decoder = new TextDecoder();

function toBase64(bytes: Uint8Array): string {
  return (bytes as Base64).toBase64?.() ?? btoa(String.fromCharCode(...bytes));
}

const encodeBinary = (bytes: Uint8Array) =>
  encoder.encode(`event: duplex-binary\ndata: ${toBase64(bytes)}\n\n`);
const encodeText = (text: string) => encoder.encode(`data: ${text}\n\n`);
const decodeBinary = (event: Uint8Array) => {
  const text = decoder.decode(event).slice(27, -2);
  return fromBase64?.(text) ?? Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
};
const decodeText = (event: Uint8Array) => decoder.decode(event).slice(6, -2);

/** µs of one call. */
function time(action: () => unknown): number {
  const started = performance.now();
  let times = 0;
  while (performance.now() - started < 30) {
    for (let i = 0; i < 10; i++) action();
    times += 10;
  }
  return (performance.now() - started) / times * 1000;
}

answer({
  run({ size, rounds }) {
    const bytes = crypto.getRandomValues(new Uint8Array(size));
    const text = decoder.decode(new Uint8Array(size).fill(97));
    const events = { binary: encodeBinary(bytes), text: encodeText(text) };
    const encode = { text: [] as number[], binary: [] as number[] };
    const decode = { text: [] as number[], binary: [] as number[] };
    for (let round = 0; round < rounds; round++) {
      encode.text.push(time(() => encodeText(text)));
      encode.binary.push(time(() => encodeBinary(bytes)));
      decode.text.push(time(() => decodeText(events.text)));
      decode.binary.push(time(() => decodeBinary(events.binary)));
    }
    const growth = events.binary.length / size;
    return { encode, decode, growth, native: !!fromBase64 };
  },
});
