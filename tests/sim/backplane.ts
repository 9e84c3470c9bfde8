/**
 * A backplane between instances that loses, repeats and reorders, for a while.
 *
 * @module
 */
import type { ClusterAdapter } from "../../cluster.ts";
import type { SyncMessage } from "../../server.ts";
import type { Clock, Owner } from "./clock.ts";
import type { Dice } from "./dice.ts";
import type { Backplane } from "./scenario.ts";

export class LossyBus {
  readonly counts = { messages: 0, lost: 0, repeated: 0 };
  readonly #clock: Clock;
  readonly #dice: Dice;
  readonly #backplane: Backplane;
  readonly #until: number;
  readonly #deliver: Map<Owner, (message: SyncMessage) => void> = new Map();

  constructor(clock: Clock, dice: Dice, backplane: Backplane) {
    this.#clock = clock;
    this.#dice = dice;
    this.#backplane = backplane;
    this.#until = clock.now + backplane.until;
  }

  /** The driver of one instance. */
  adapterOf(owner: Owner): ClusterAdapter {
    return () => ({
      subscribe: (deliver) => void this.#deliver.set(owner, deliver),
      publish: (message) => this.#publish(owner, message),
      close: () => void this.#deliver.delete(owner),
    });
  }

  /** The instance was killed. */
  leave(owner: Owner): void {
    this.#deliver.delete(owner);
  }

  #publish(from: Owner, { namespace, topic, data }: SyncMessage): void {
    const { loss, repeat } = this.#clock.now < this.#until
      ? this.#backplane
      : { loss: 0, repeat: 0 };
    for (const to of this.#deliver.keys()) {
      if (to === from) continue;
      this.counts.messages++;
      const copies = this.#dice.chance(loss) ? 0 : this.#dice.chance(repeat) ? 2 : 1;
      if (copies === 0) this.counts.lost++;
      if (copies === 2) this.counts.repeated++;
      for (let i = 0; i < copies; i++) {
        const copy = typeof data === "string" ? data : data.slice();
        this.#clock.after(
          this.#dice.between(0, this.#backplane.delay),
          () => this.#deliver.get(to)?.({ namespace, topic, data: copy }),
          to,
        );
      }
    }
  }
}
