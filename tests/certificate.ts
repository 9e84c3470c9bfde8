/** A certificate for whoever serves https: none is kept in the repository. */
import { execFile } from "node:child_process";
import { mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import { onPath } from "./spawn.ts";

let made: Promise<{ key: string; cert: string }> | undefined;

/** A key and its certificate, made once a run. */
export function certificate(): Promise<{ key: string; cert: string }> {
  return made ??= makeCertificate();
}

async function makeCertificate(): Promise<{ key: string; cert: string }> {
  const folder = await mkdtemp(join(tmpdir(), "duplex-cert-"));
  const key = join(folder, "key.pem");
  const cert = join(folder, "cert.pem");
  try {
    await promisify(execFile)(onPath("openssl") ?? "openssl", [
      ..."req -x509 -nodes -days 2 -subj /CN=localhost".split(" "),
      ..."-newkey ec -pkeyopt ec_paramgen_curve:P-256".split(" "),
      // Deno refuses a certificate authority's own certificate on a server.
      ...["-addext", "basicConstraints=critical,CA:FALSE"],
      ...["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
      ...["-keyout", key, "-out", cert],
    ]);
    return {
      key: await readFile(key, "utf8"),
      cert: await readFile(cert, "utf8"),
    };
  } finally {
    await rm(folder, { recursive: true });
  }
}
