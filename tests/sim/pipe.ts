/**
 * One direction of a request: bytes from one end to the other, that take their time, come in
 * other pieces than they were sent, and wait when the other end does not read.
 *
 * @module
 */
import type { Clock, Owner } from "./clock.ts";
import type { Dice } from "./dice.ts";

export type Bytes = Uint8Array<ArrayBuffer>;

export interface PipeOptions {
  from: Owner;
  to: Owner;
  /** How long a piece is under way, in ms. */
  latency: () => number;
  /** Bytes that are under way, or wait to be read, before the sender has to wait. */
  capacity: number;
  /** Bytes in a second. */
  rate: number;
  /** Makes a byte stream, as the runtimes' own bodies are. */
  byob: boolean;
  /** Nothing comes before there is so much, or the end. */
  hold?: number | undefined;
  dice: Dice;
  /** The reader at the far end wants no more. */
  onCancel: () => void;
  /** The last byte has been taken, in order. */
  onEnd: () => void;
  /** The last byte has been sent. */
  onSent?: () => void;
  /** So much has been held that it is let through. */
  onRelease?: () => void;
}

/** What a pipe reads from. */
interface Source {
  read(): Promise<{ done: boolean; value?: Uint8Array | undefined }>;
  cancel(reason?: unknown): Promise<unknown>;
}

export class Pipe {
  /** What the far end reads. */
  readonly stream: ReadableStream<Bytes>;
  /** Bytes that came out at the far end. */
  passed = 0;
  /** The most bytes that were under way, or waited to be read. */
  most = 0;
  /** The source has nothing more, or is let go of. */
  sourceDone = false;
  /** The far end has seen the end, or has gone. */
  sinkDone = false;
  readonly #clock: Clock;
  readonly #options: PipeOptions;
  #controller!: ReadableStreamDefaultController<Bytes> | ReadableByteStreamController;
  #source: Source | undefined;
  #asked = false;
  /** Pieces that have come and are not read. */
  #arrived: Bytes[] = [];
  #ended = false;
  /** Bytes that left the source and were not read at the far end. */
  #underWay = 0;
  #waiting = false;
  #due = 0;
  /** What is to be done at the far end: neither a pause nor a frozen end changes its order. */
  readonly #line: (() => void)[] = [];
  /** Nothing comes before this moment. */
  #pausedUntil = 0;
  #dead = false;
  #held: Bytes[] = [];
  #heldSize = 0;
  #cut: { left: number; run: () => void } | undefined;

  constructor(clock: Clock, options: PipeOptions) {
    this.#clock = clock;
    this.#options = options;
    const source = {
      start: (controller: unknown) => {
        this.#controller = controller as ReadableStreamDefaultController<Bytes>;
      },
      pull: () => {
        this.#asked = true;
        this.#flush();
      },
      cancel: () => {
        this.sinkDone = true;
        options.onCancel();
      },
    };
    this.stream = options.byob
      ? new ReadableStream({ type: "bytes", ...source }) as ReadableStream<Bytes>
      : new ReadableStream<Bytes>(source, { highWaterMark: 0 });
  }

  /** Whether somebody at the far end waits for bytes. */
  get awaited(): boolean {
    return this.#asked && !this.sinkDone;
  }

  /** Takes all bytes of this, in their time. */
  feed(source: ReadableStream<Uint8Array> | Bytes | null): void {
    if (this.sourceDone && source instanceof ReadableStream) {
      source.cancel(new TypeError("The connection has gone")).catch(() => {});
      return;
    }
    if (!source || source instanceof Uint8Array) {
      const whole = source;
      this.sourceDone = true;
      if (whole?.length) this.#send(whole);
      return this.#finish();
    }
    const reader = source.getReader();
    this.#source = reader as Source;
    // Where nothing moves any more, the end of what is sent does not wait for what is not read.
    const end = () => this.sourceDone ||= this.#dead;
    reader.closed.then(end, end);
    this.#pump();
  }

  /** The sender's end fails, or is let go of. */
  drop(reason: unknown = new TypeError("The connection has gone")): void {
    if (this.sourceDone) return;
    this.sourceDone = true;
    this.#source?.cancel(reason).catch(() => {});
  }

  /** The far end sees a failure, or what looks like the end. */
  break(error: unknown): void {
    if (this.sinkDone) return;
    this.sinkDone = true;
    if (error) this.#controller.error(error);
    else this.#close();
  }

  pause(until: number): void {
    this.#pausedUntil = Math.max(this.#pausedUntil, until);
  }

  /** Whatever is sent from now on goes nowhere. */
  die(): void {
    this.#dead = true;
  }

  /** The kernel gives up what died, so that an end that waits behind unread bytes is seen. */
  giveUp(): void {
    if (!this.#dead || !this.#waiting || this.sourceDone) return;
    this.#underWay = 0;
    this.#waiting = false;
    this.#pump();
  }

  /** Lets so many bytes more through, then calls this. */
  cutAfter(bytes: number, run: () => void): void {
    if (this.#cut && this.#cut.left <= bytes) return;
    this.#cut = { left: bytes, run };
  }

  // --- From the source ---

  async #pump(): Promise<void> {
    try {
      while (!this.sourceDone) {
        if (this.#underWay - this.#heldSize >= this.#options.capacity) {
          this.#waiting = true;
          return;
        }
        const { done, value } = await this.#source!.read();
        if (this.sourceDone) return;
        if (done) {
          this.sourceDone = true;
          return this.#finish();
        }
        this.#send(value as Bytes);
      }
    } catch { // the sender's body failed: the connection is cut
      this.sourceDone = true;
      this.#deliver(() => this.break(new TypeError("The body was cut")));
    }
  }

  #send(chunk: Bytes): void {
    const { dice, hold, rate } = this.#options;
    this.#underWay += chunk.length;
    this.most = Math.max(this.most, this.#underWay);
    if (hold) {
      this.#held.push(chunk);
      this.#heldSize += chunk.length;
      if (this.#heldSize < hold) return;
      this.#options.onRelease?.();
      return this.#release();
    }
    let at = 0;
    while (at < chunk.length) {
      const left = chunk.length - at;
      const size = Math.min(dice.chance(0.15) ? dice.size(left) : left, Math.ceil(rate / 20));
      const piece = chunk.subarray(at, at += size);
      this.#deliver(() => this.#arrive(piece), piece.length);
    }
  }

  #release(): void {
    for (const piece of this.#held.splice(0)) {
      this.#deliver(() => this.#arrive(piece), piece.length);
    }
    this.#heldSize = 0;
  }

  #finish(): void {
    this.#options.onSent?.();
    this.#release();
    this.#deliver(() => {
      this.#ended = true;
      this.#flush();
    });
  }

  /** Does something at the far end, after all that was sent before. */
  #deliver(action: () => void, bytes = 0): void {
    const { latency, rate, to } = this.#options;
    const { now } = this.#clock;
    this.#due = Math.max(this.#due, now) + 1000 * bytes / rate;
    this.#due = Math.max(this.#due, now + latency());
    this.#line.push(action);
    const come = () => {
      if (this.sinkDone || this.#dead) return;
      if (this.#pausedUntil > this.#clock.now) this.#clock.at(this.#pausedUntil, come, to);
      else this.#line.shift()!();
    };
    this.#clock.at(this.#due, come, to);
  }

  // --- At the far end ---

  #arrive(piece: Bytes): void {
    const cut = this.#cut;
    if (cut) {
      piece = piece.subarray(0, cut.left);
      cut.left -= piece.length;
    }
    this.passed += piece.length;
    if (piece.length) this.#arrived.push(piece);
    this.#flush();
    if (cut && cut.left <= 0) {
      this.#cut = undefined;
      this.#dead = true;
      cut.run();
    }
  }

  #flush(): void {
    if (!this.#asked || this.sinkDone) return;
    if (!this.#arrived.length) {
      if (!this.#ended) return;
      this.sinkDone = true;
      this.#close();
      return this.#options.onEnd();
    }
    this.#asked = false;
    const together = this.#options.dice.chance(0.5) ? this.#arrived.length : 1;
    const chunk = join(this.#arrived.splice(0, together));
    this.#underWay -= chunk.length;
    this.#controller.enqueue(chunk);
    if (!this.#waiting) return;
    this.#waiting = false;
    this.#clock.after(this.#options.latency(), () => this.#pump(), this.#options.from);
  }

  #close(): void {
    this.#controller.close();
    (this.#controller as ReadableByteStreamController).byobRequest?.respond(0);
  }
}

/** A copy: a byte stream takes the buffer away from whoever has it. */
function join(parts: Bytes[]): Bytes {
  if (parts.length === 1) return parts[0]!.slice();
  const whole = new Uint8Array(parts.reduce((size, part) => size + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}
