/** A parking store for tests that need no real one. */
import type { ParkingStore } from "../parking.ts";

/** What is done in place of a step of the store. */
type Fault = (step: "put" | "take", key: string, go: () => unknown) => unknown;

/** A store in memory, with its history. */
export class MemoryStore implements ParkingStore {
  readonly values: Map<string, Uint8Array> = new Map();
  /** All that was ever put. */
  readonly history: [key: string, bytes: Uint8Array, ttl: number][] = [];
  fault: Fault = (_step, _key, go) => go();

  async put(key: string, bytes: Uint8Array<ArrayBuffer>, ttl: number): Promise<void> {
    this.history.push([key, bytes, ttl]);
    await this.fault("put", key, () => void this.values.set(key, bytes));
  }

  async take(key: string): Promise<Uint8Array | undefined> {
    return await this.fault("take", key, () => {
      const bytes = this.values.get(key);
      this.values.delete(key);
      return bytes;
    }) as Uint8Array | undefined;
  }
}
