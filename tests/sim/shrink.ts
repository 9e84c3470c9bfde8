/**
 * Makes a failing scenario shorter, by leaving out what it fails without.
 *
 * @module
 */
import type { Scenario } from "./scenario.ts";
import type { Outcome } from "./world.ts";

type Fails = (scenario: Scenario) => boolean;

/** The shortest scenario found that fails by the same check. */
export function shrink(
  { scenario, violations }: Outcome,
  play: (scenario: Scenario) => Outcome,
  most = 400,
): Scenario {
  const { check } = violations[0]!;
  let left = most;
  const fails: Fails = (candidate) =>
    left-- > 0 && play(candidate).violations.some((violation) => violation.check === check);
  let shortest = scenario;
  for (let before = ""; before !== JSON.stringify(shortest) && left > 0;) {
    before = JSON.stringify(shortest);
    for (const simpler of SIMPLER) {
      const candidate = simpler(shortest);
      if (JSON.stringify(candidate) !== JSON.stringify(shortest) && fails(candidate)) {
        shortest = candidate;
      }
    }
    shortest = shorten(shortest, "faults", fails);
    shortest = shorten(shortest, "script", fails);
  }
  return shortest;
}

/** Takes parts out of a list: halves first, single entries last. */
function shorten(scenario: Scenario, list: "faults" | "script", fails: Fails): Scenario {
  for (let size = Math.ceil(scenario[list].length / 2); size >= 1; size = size >> 1) {
    for (let at = 0; at < scenario[list].length;) {
      const kept = [...scenario[list]];
      kept.splice(at, size);
      const candidate = { ...scenario, [list]: kept };
      if (fails(candidate)) scenario = candidate;
      else at += size;
    }
  }
  return scenario;
}

/** What makes a scenario easier to read. */
const SIMPLER: ((scenario: Scenario) => Scenario)[] = [
  (scenario) => ({ ...scenario, backplane: { loss: 0, repeat: 0, delay: 0, until: 0 } }),
  (scenario) => ({ ...scenario, rests: 0 }),
  (scenario) => ({ ...scenario, instances: 1 }),
  (scenario) => ({ ...scenario, clients: Math.max(1, scenario.clients - 1) }),
  (scenario) => ({
    ...scenario,
    hooks: { echoes: 0, slow: 0, slowest: 1, publishes: 0, closes: 0, greets: false },
  }),
  ({ traits, ...scenario }) => ({ ...scenario, traits: { ...traits, latency: [10, 10] } }),
  ({ traits, ...scenario }) => ({
    ...scenario,
    traits: { ...traits, rate: Infinity, capacity: 65536, byob: false },
  }),
  ({ traits, ...scenario }) => ({
    ...scenario,
    traits: { ...traits, streamsUp: "pass", fullDuplex: true, balance: "sticky" },
  }),
  (scenario) => ({ ...scenario, transport: "post" }),
  ({ server, ...scenario }) => ({
    ...scenario,
    server: { ...server, heartbeatInterval: 15000, idleTimeout: 60, resumeTimeout: 30000 },
  }),
  ({ server, ...scenario }) => ({ ...scenario, server: { ...server, window: 256 * 1024 } }),
  ({ script, ...scenario }) => ({
    ...scenario,
    script: script.map((step) => ({ ...step, count: Math.ceil(step.count / 2) })),
  }),
];
