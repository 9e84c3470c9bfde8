/**
 * What is sent: text and bytes of any size, with all that an encoding could trip over.
 *
 * @module
 */
import type { Dice } from "./dice.ts";

export type Data = string | Uint8Array<ArrayBuffer>;

const PIECES = [
  "\r",
  "\r\n",
  "\n",
  "\n\n",
  "\uFEFF",
  "é",
  "😀",
  "data: x",
  "event: y\n",
  ":",
  " ",
  "\0",
];

/** A message, of at most so many bytes. On crossws's wire only what it can carry. */
export function drawMessage(dice: Dice, most: number, plain: boolean): Data {
  if (dice.chance(0.03)) return "";
  const size = dice.size(most);
  const letter = String.fromCharCode(97 + dice.int(0, 25));
  if (plain) return letter.repeat(size);
  if (dice.chance(0.3)) return drawBytes(dice, size);
  if (dice.chance(0.6)) return letter.repeat(size);
  let text = "";
  while (text.length * 4 < size) {
    text += dice.chance(0.5) ? dice.pick(PIECES) : letter.repeat(dice.size(1 + size / 8));
  }
  return text;
}

function drawBytes(dice: Dice, size: number): Data {
  if (dice.chance(0.05)) return new Uint8Array();
  const bytes = new Uint8Array(size);
  bytes.fill(dice.int(0, 255));
  for (let i = 0; i < Math.min(size, 16); i++) bytes[dice.int(0, size - 1)] = dice.int(0, 255);
  return bytes;
}

export function sizeOf(data: Data): number {
  return typeof data === "string" ? new TextEncoder().encode(data).length : data.length;
}

/** The most that a message takes as an event. */
export function eventSizeOf(data: Data): number {
  const around = 48;
  if (typeof data !== "string") return around + 4 * Math.ceil(data.length / 3);
  if (data.includes("\r")) return around + sizeOf(JSON.stringify(data));
  return around + sizeOf(data) + "data: ".length * (data.split("\n").length - 1);
}

export function same(a: unknown, b: unknown): boolean {
  if (typeof a === "string" || typeof b === "string") return a === b;
  const [left, right] = [a, b].map((data) =>
    data instanceof ArrayBuffer ? new Uint8Array(data) : data as Uint8Array
  ) as [Uint8Array, Uint8Array];
  return left.length === right.length && left.every((byte, i) => byte === right[i]);
}

/** For traces. */
export function show(data: unknown): string {
  if (typeof data === "string") {
    return data.length > 24
      ? `${JSON.stringify(data.slice(0, 16))}… (${data.length})`
      : JSON.stringify(data);
  }
  const bytes = data instanceof ArrayBuffer ? new Uint8Array(data) : data as Uint8Array;
  return `${bytes.length} bytes`;
}
