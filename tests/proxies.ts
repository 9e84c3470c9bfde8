/**
 * The proxies that people sit behind, the real ones: each runs in a temporary
 * folder on free ports, in front of a port of the test.
 *
 * @module
 */
import { spawn } from "node:child_process";
import { chmod, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import net from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { certificate, command, freePort, root, type TestContext, until } from "./harness.ts";

/** "modsecurity" is Apache with ModSecurity and the OWASP Core Rule Set. */
export type ProxyName = "nginx" | "haproxy" | "caddy" | "apache" | "modsecurity";

/**
 * "shipped": what Debian installs, and no more. "documented": what docs/proxies.md says.
 * "holding": a setting that people do have, which holds event streams.
 */
export type Configuration = "shipped" | "documented" | "holding";

export interface ProxyOptions {
  configuration?: Configuration;
  /** Cuts a quiet connection after so many seconds, in place of nginx's 60 and haproxy's 50. */
  idle?: number;
  /** Which block of docs/proxies.md ModSecurity is given besides what Debian ships. */
  rules?: "modsecurity type" | "modsecurity path";
  /** The port of another instance, which nginx has as documented. */
  other?: number;
}

export interface Proxy {
  /** Without a slash at its end. */
  readonly url: string;
  readonly port: number;
  /** Over TLS, with HTTP/2. */
  readonly secure: string;
  readonly securePort: number;
}

/** Where things stand in the configurations. */
interface Places {
  target: number;
  port: number;
  securePort: number;
  folder: string;
}

/** Starts a proxy that ends with the test. */
export async function proxy(
  t: TestContext,
  name: ProxyName,
  target: number,
  { configuration = "shipped", ...options }: ProxyOptions = {},
): Promise<Proxy> {
  const folder = await mkdtemp(join(tmpdir(), `duplex-${name}-`));
  t.defer(() => rm(folder, { recursive: true, force: true }));
  await chmod(folder, 0o777); // Apache's workers are someone else, who keep things here
  const { key, cert } = await certificate();
  await writeFile(join(folder, "key.pem"), key);
  await writeFile(join(folder, "cert.pem"), cert);
  await writeFile(join(folder, "both.pem"), cert + key);
  for (let tries = 1;; tries++) {
    const [port, securePort] = [await freePort(), await freePort()];
    const places = { target, port, securePort, folder };
    const text = await configurations[name](places, configuration, options);
    const file = join(folder, name === "caddy" ? "Caddyfile" : `${name}.conf`);
    await writeFile(file, text);
    const problem = await run(t, name, file, [port, securePort], folder);
    if (!problem) {
      return {
        url: `http://127.0.0.1:${port}`,
        port,
        secure: `https://127.0.0.1:${securePort}`,
        securePort,
      };
    }
    // Someone may have taken a port meanwhile.
    if (tries === 3) throw new Error(`${name} does not start: ${problem}\n${text}`);
  }
}

const args: Record<ProxyName, (file: string, folder: string) => string[]> = {
  nginx: (file, folder) => ["-c", file, "-p", folder, "-e", "stderr"],
  haproxy: (file) => ["-db", "-f", file],
  caddy: (file) => ["run", "--config", file, "--adapter", "caddyfile"],
  apache,
  modsecurity: apache,
};

function apache(file: string, folder: string): string[] {
  return ["-X", "-d", folder, "-f", file];
}

/** Starts the daemon in the foreground; tells what it said, if it does not listen. */
async function run(
  t: TestContext,
  name: ProxyName,
  file: string,
  ports: number[],
  folder: string,
): Promise<string | undefined> {
  const child = spawn(
    command(name === "modsecurity" ? "apache" : name)!,
    args[name](file, folder),
    {
      stdio: ["ignore", "ignore", "pipe"],
      env: { ...process.env, HOME: folder, XDG_DATA_HOME: folder, XDG_CONFIG_HOME: folder },
    },
  );
  let said = "";
  let ended = false;
  child.stderr.setEncoding("utf8").on("data", (text: string) => said += text);
  const closed = new Promise<void>((resolve) => {
    child.on("error", (error) => said += error);
    child.on("close", () => {
      ended = true;
      resolve();
    });
  });
  t.defer(async () => {
    // By SIGTERM nginx's master ends its workers; Apache, one process here, would wait for clients.
    child.kill(name === "apache" || name === "modsecurity" ? "SIGKILL" : "SIGTERM");
    const late = setTimeout(() => child.kill("SIGKILL"), 3_000);
    await closed;
    clearTimeout(late);
  });
  await until(
    async () => ended || (await Promise.all(ports.map(listens))).every(Boolean),
    { timeout: 15_000, interval: 20 },
  );
  return ended ? said || "it ended" : undefined;
}

function listens(port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = net.connect(port, "127.0.0.1");
    socket.on("connect", () => {
      socket.destroy();
      resolve(true);
    });
    socket.on("error", () => resolve(false));
  });
}

/** A block of docs/proxies.md. */
async function documented(language: string): Promise<string> {
  const text = await readFile(join(root, "docs", "proxies.md"), "utf8");
  const block = new RegExp(`^\`\`\`${language}\n([\\s\\S]*?)^\`\`\`$`, "m").exec(text);
  if (!block) throw new Error(`docs/proxies.md has no ${language}`);
  return block[1]!;
}

/** The text with all these replaced; each must be there, so that nothing of it goes untested. */
function adapt(text: string, changes: Record<string, string>): string {
  for (const [from, to] of Object.entries(changes)) {
    if (!text.includes(from)) throw new Error(`no "${from}" in\n${text}`);
    text = text.replaceAll(from, to);
  }
  return text;
}

const configurations: Record<
  ProxyName,
  (
    places: Places,
    configuration: Configuration,
    options: Omit<ProxyOptions, "configuration">,
  ) => Promise<string>
> = {
  async nginx({ target, port, securePort, folder }, configuration, { idle, other }) {
    const upstream = other && adapt(await documented("nginx upstream"), {
      "10.0.0.1:8000": `127.0.0.1:${target}`,
      "10.0.0.2:8000": `127.0.0.1:${other}`,
    });
    const server = configuration === "documented"
      ? adapt(await documented("nginx"), {
        "listen 80;": `listen 127.0.0.1:${port};`,
        "listen 443 ": `listen 127.0.0.1:${securePort} `,
        "127.0.0.1:8000": upstream ? "app" : `127.0.0.1:${target}`,
        "/etc/ssl/example.com.crt": `${folder}/cert.pem`,
        "/etc/ssl/example.com.key": `${folder}/key.pem`,
      })
      : `server {
  listen 127.0.0.1:${port};
  listen 127.0.0.1:${securePort} ssl http2;
  ssl_certificate ${folder}/cert.pem;
  ssl_certificate_key ${folder}/key.pem;
  location / {
    proxy_pass http://127.0.0.1:${target};
${configuration === "holding" ? "    proxy_ignore_headers X-Accel-Buffering;\n" : ""}  }
}
`;
    const temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
      .map((name) => `  ${name}_temp_path ${folder}/${name};\n`).join("");
    // What is not about where it runs is Debian's nginx.conf.
    // Its workers would be someone else, who may not write into our folder.
    const user = process.getuid?.() === 0 ? "user root;\n" : "";
    return `daemon off;
${user}worker_processes 1;
pid ${folder}/nginx.pid;
events {
  worker_connections 768;
}
http {
  access_log off;
${temporary}  sendfile on;
  tcp_nopush on;
  types_hash_max_size 2048;
  include /etc/nginx/mime.types;
  default_type application/octet-stream;
  gzip on;
${idle ? `  proxy_read_timeout ${idle}s;\n  client_body_timeout ${idle}s;\n` : ""}${
      upstream ?? ""
    }${server}}
`;
  },

  async haproxy({ target, port, securePort, folder }, configuration, { idle }) {
    const text = configuration === "documented"
      ? adapt(await documented("haproxy"), {
        "bind :80": `bind 127.0.0.1:${port}`,
        "bind :443": `bind 127.0.0.1:${securePort}`,
        "127.0.0.1:8000": `127.0.0.1:${target}`,
        "/etc/ssl/example.com.pem": `${folder}/both.pem`,
      })
      : `defaults
  mode http
  option dontlognull
  timeout connect 5s
  timeout client 50s
  timeout server 50s
${configuration === "holding" ? "  option http-buffer-request\n" : ""}frontend web
  bind 127.0.0.1:${port}
  bind 127.0.0.1:${securePort} ssl crt ${folder}/both.pem alpn h2,http/1.1
  default_backend app
backend app
  server app 127.0.0.1:${target}
`;
    return idle ? adapt(text, { " 50s": ` ${idle}s` }) : text;
  },

  async caddy({ target, port, securePort, folder }) {
    const site = await documented("caddy");
    // One site with and one without TLS: Caddy makes a certificate only for a real name.
    const sites = [
      `http://127.0.0.1:${port} {`,
      `https://127.0.0.1:${securePort} {\n  tls ${folder}/cert.pem ${folder}/key.pem`,
    ].map((head) =>
      adapt(site, { "example.com {": head, "127.0.0.1:8000": `127.0.0.1:${target}` })
    );
    return `{\n  admin off\n  auto_https off\n}\n${sites.join("")}`;
  },

  apache(places, _, { idle }) {
    return Promise.resolve(apacheConfiguration(places, "", idle));
  },

  async modsecurity(places, configuration, { idle, rules }) {
    // Debian's, switched on: it comes as "DetectionOnly", which lets all pass.
    return apacheConfiguration(
      places,
      `Include /etc/modsecurity/modsecurity.conf-recommended
SecRuleEngine On
SecAuditEngine Off
SecDataDir ${places.folder}
${rules ? await documented(rules) : ""}${
        // As virus scanners do: the answer is read to its end before any of it goes on.
        configuration === "holding" ? "SecResponseBodyMimeType text/event-stream\n" : ""}
IncludeOptional /usr/share/modsecurity-crs/*.load
`,
      idle,
    );
  },
};

/** Debian's modules and settings, as far as they bear on a proxy. */
function apacheConfiguration(
  { target, port, securePort, folder }: Places,
  rules: string,
  idle = 300,
): string {
  const modules = ["mpm_event", "authz_core", "reqtimeout", "filter", "mime", "deflate", "ssl"]
    .concat("http2", "proxy", "proxy_http", ...rules ? ["unique_id", "security2"] : []);
  const load = modules
    .map((name) => `LoadModule ${name}_module /usr/lib/apache2/modules/mod_${name}.so\n`).join("");
  return `ServerName localhost
DefaultRuntimeDir ${folder}
PidFile ${folder}/apache.pid
ErrorLog ${folder}/error.log
Listen 127.0.0.1:${port}
Listen 127.0.0.1:${securePort}
${rules && "LoadFile libxml2.so.2\n"}${load}${
    // It refuses to be root.
    process.getuid?.() === 0 ? "User www-data\nGroup www-data\n" : ""}StartServers 1
Timeout ${idle}
Include /etc/apache2/mods-available/reqtimeout.conf
TypesConfig /etc/mime.types
Include /etc/apache2/mods-available/deflate.conf
Protocols h2 http/1.1
<VirtualHost 127.0.0.1:${securePort}>
  SSLEngine on
  SSLCertificateFile ${folder}/cert.pem
  SSLCertificateKeyFile ${folder}/key.pem
</VirtualHost>
${rules}ProxyPass / http://127.0.0.1:${target}/
`;
}
