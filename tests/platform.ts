/**
 * A front that does to instances what function platforms do: it sends each request to any of them,
 * cuts streams after a time, freezes who has no request open, and knows nothing of sessions.
 *
 * @module
 */
import process from "node:process";
import { sleep, type TestContext, type TestServer } from "./harness.ts";

export interface PlatformOptions {
  /** How long an answer may take in all, in ms. Default: any time. */
  limit?: number;
  /** Stops a process (SIGSTOP) as soon as no request of it is open. */
  freezes?: boolean;
  /** How long an instance goes on when its last request has ended, in ms. Default: no time. */
  lingers?: number;
  /** One request an instance at a time, as Lambda has it. */
  exclusive?: boolean;
  /** How long a request waits for an instance that is free, in ms. Default: 1000. */
  patience?: number;
}

/** What is behind it: a process that listens. */
export interface Backend {
  readonly pid: number;
  readonly port: number;
}

export interface Platform extends TestServer {
  readonly backends: readonly Place[];
  /** How many answers of each status have been given. */
  readonly statuses: Record<number, number>;
  /** How often an instance was frozen, and a stream cut. */
  readonly counts: { frozen: number; cut: number };
  /** Sends nothing more there; who has no request open is thawed. */
  retire(backend: Backend): void;
}

export interface Place extends Backend {
  /** Requests that are open there, and all that it has had. */
  open: number;
  had: number;
  isFrozen: boolean;
}

/** Starts the front of some instances. */
export async function platform(
  t: TestContext,
  backends: Backend[],
  { limit, freezes = false, lingers = 0, exclusive = false, patience = 1_000 }: PlatformOptions =
    {},
): Promise<Platform> {
  const places: Place[] = backends.map((one) => ({ ...one, open: 0, had: 0, isFrozen: false }));
  const statuses: Record<number, number> = {};
  const counts = { frozen: 0, cut: 0 };
  let turn = 0;
  const signal = (place: Place, name: "SIGSTOP" | "SIGCONT") => {
    place.isFrozen = name === "SIGSTOP";
    try {
      process.kill(place.pid, name);
    } catch {
      // it has ended
    }
  };
  const timers = new Set<ReturnType<typeof setTimeout>>();
  t.defer(() => timers.forEach(clearTimeout));
  const freeze = (place: Place) => {
    if (place.open > 0 || place.isFrozen || !places.includes(place)) return;
    counts.frozen++;
    signal(place, "SIGSTOP");
  };
  const leave = (place: Place) => {
    if (--place.open > 0 || !freezes) return;
    if (!lingers) return freeze(place);
    if (!t.signal.aborted) timers.add(setTimeout(() => freeze(place), lingers));
  };
  const take = async (): Promise<Place | undefined> => {
    const late = performance.now() + patience;
    for (;;) {
      const free = places.filter(({ open }) => !exclusive || !open);
      if (free.length) {
        const place = free[turn++ % free.length]!;
        place.open++;
        place.had++;
        if (place.isFrozen) signal(place, "SIGCONT");
        return place;
      }
      if (performance.now() > late) return;
      await sleep(10, t.signal);
    }
  };
  const count = (status: number) => statuses[status] = (statuses[status] ?? 0) + 1;
  const server = await t.serve(async (request, info) => {
    info?.timeout?.(request, 0); // Bun
    const place = await take();
    if (!place) return new Response("Too many requests", { status: count(429) && 429 });
    let isLeft = false;
    const end = () => {
      if (!isLeft) leave(place);
      isLeft = true;
    };
    try {
      const response = await forward(request, place.port, t.signal);
      count(response.status);
      const cut = () => {
        counts.cut++;
        end();
      };
      const { status, headers } = response;
      if (!response.body) end();
      return new Response(response.body && bounded(response.body, limit, cut, end), {
        status,
        headers,
      });
    } catch {
      end();
      count(502);
      return new Response("Bad gateway", { status: 502 });
    }
  });
  t.defer(() => places.filter(({ isFrozen }) => isFrozen).forEach((one) => signal(one, "SIGCONT")));
  return Object.assign(server, {
    backends: places,
    statuses,
    counts,
    retire(backend: Backend) {
      const at = places.findIndex(({ pid }) => pid === backend.pid);
      const [place] = places.splice(at, 1);
      if (place?.isFrozen) signal(place, "SIGCONT");
    },
  });
}

async function forward(request: Request, port: number, signal: AbortSignal): Promise<Response> {
  const { pathname, search } = new URL(request.url);
  const headers = new Headers(request.headers);
  for (const name of ["host", "connection", "accept-encoding"]) headers.delete(name);
  return await fetch(`http://127.0.0.1:${port}${pathname}${search}`, {
    method: request.method,
    headers,
    redirect: "manual",
    signal,
    ...request.body && { body: request.body, duplex: "half" },
  } as RequestInit);
}

/** A body that is cut after a time, as by a platform: it ends. */
function bounded(
  body: ReadableStream<Uint8Array>,
  limit: number | undefined,
  onCut: () => void,
  onEnd: () => void,
): ReadableStream<Uint8Array> {
  const reader = body.getReader();
  let timer: ReturnType<typeof setTimeout> | undefined;
  const end = (tell: () => void) => {
    clearTimeout(timer);
    tell();
  };
  return new ReadableStream({
    start(controller) {
      timer = limit === undefined ? undefined : setTimeout(() => {
        reader.cancel().catch(() => {});
        end(onCut);
        try {
          controller.close();
        } catch {
          // it has ended meanwhile
        }
      }, limit);
    },
    async pull(controller) {
      const { done, value } = await reader.read().catch(() => ({ done: true, value: undefined }));
      if (!done) return controller.enqueue(value!);
      end(onEnd);
      try {
        controller.close();
      } catch {
        // it was cut
      }
    },
    cancel(reason) {
      end(onEnd);
      return reader.cancel(reason);
    },
  }, { highWaterMark: 0 });
}
