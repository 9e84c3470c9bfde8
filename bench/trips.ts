/**
 * Round trips over a socket, in a process or in a page.
 *
 * @module
 */

/** What all clients of the bench have in common. */
export interface Socket {
  onopen: (() => void) | null;
  onmessage: ((event: { data: string }) => void) | null;
  onerror: (() => void) | null;
  send(text: string): void;
  close(): void;
}

/** In ms. */
export interface Percentiles {
  p50: number;
  p99: number;
}

export function percentiles(times: number[]): Percentiles {
  times.sort((a, b) => a - b);
  return { p50: times[times.length >> 1]!, p99: times[Math.floor(times.length * 0.99)]! };
}

/** Echoes, one after the other, on a socket that is open; closes it. */
export async function roundTrips(socket: Socket, trips: number): Promise<Percentiles> {
  const times: number[] = [];
  await new Promise<void>((resolve) => {
    let started = 0;
    const send = () => {
      started = performance.now();
      socket.send(`echo ${times.length}`);
    };
    socket.onmessage = () => {
      times.push(performance.now() - started);
      if (times.length < trips) send();
      else resolve();
    };
    send();
  });
  socket.close();
  return percentiles(times.slice(trips >> 3)); // warming up
}
