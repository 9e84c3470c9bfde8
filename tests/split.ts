/**
 * Finds where the requests on a connection begin and end, without changing a
 * byte: what the chaos proxy needs to record one request of many.
 *
 * @module
 */

export interface RequestEvents {
  /** A head is complete; its bytes follow by `data`. */
  head(text: string): void;
  /** Bytes of the current request: head, framing and body as they are. */
  data(bytes: Uint8Array): void;
  end(): void;
}

/** What comes next on the connection. */
type State =
  | { at: "head" }
  | { at: "body"; left: number; chunked: boolean }
  | { at: "size" }
  | { at: "trailer" };

const decoder = new TextDecoder("latin1");

export class RequestSplitter {
  #events: RequestEvents;
  #state: State = { at: "head" };
  /** The beginning of a line or head that is not complete. */
  #partial: Uint8Array = new Uint8Array(0);

  constructor(events: RequestEvents) {
    this.#events = events;
  }

  push(data: Uint8Array): void {
    let rest = data;
    while (rest.length > 0) {
      rest = this.#state.at === "body" ? this.#body(rest) : this.#line(rest);
    }
  }

  /** Takes body bytes, and returns what is beyond them. */
  #body(data: Uint8Array): Uint8Array {
    const state = this.#state as Extract<State, { at: "body" }>;
    const piece = data.subarray(0, state.left);
    this.#events.data(piece);
    state.left -= piece.length;
    if (state.left === 0) {
      if (state.chunked) this.#state = { at: "size" };
      else this.#end();
    }
    return data.subarray(piece.length);
  }

  /** Takes bytes up to the end of a head, or of a line between chunks. */
  #line(data: Uint8Array): Uint8Array {
    const whole = concat([this.#partial, data]);
    const text = decoder.decode(whole);
    const mark = this.#state.at === "head" ? "\r\n\r\n" : "\r\n";
    const found = text.indexOf(mark);
    if (found < 0) {
      this.#partial = whole;
      return whole.subarray(whole.length);
    }
    const end = found + mark.length;
    this.#partial = new Uint8Array(0);
    this.#complete(text.slice(0, found), whole.subarray(0, end));
    return whole.subarray(end);
  }

  #complete(text: string, bytes: Uint8Array): void {
    const { at } = this.#state;
    if (at === "head") this.#events.head(text);
    this.#events.data(bytes);
    if (at === "head") this.#begin(text);
    else if (at === "trailer" && text === "") this.#end();
    else if (at === "size") {
      const size = parseInt(text, 16);
      // A chunk's data is followed by a line break of its own.
      this.#state = size > 0 ? { at: "body", left: size + 2, chunked: true } : { at: "trailer" };
    }
  }

  #begin(head: string): void {
    const length = Number(/^content-length: *(\d+)/im.exec(head)?.[1] ?? 0);
    if (/^transfer-encoding:.*chunked/im.test(head)) {
      this.#state = { at: "size" };
    } else if (length > 0) {
      this.#state = { at: "body", left: length, chunked: false };
    } else this.#end();
  }

  #end(): void {
    this.#state = { at: "head" };
    this.#events.end();
  }
}

export function concat(parts: Uint8Array[]): Uint8Array {
  const whole = new Uint8Array(
    parts.reduce((length, part) => length + part.length, 0),
  );
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}
