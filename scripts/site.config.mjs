/** How VitePress makes the site of scripts/site.mjs. */
import process from "node:process";

const { DOCS_BASE: base = "/" } = process.env;

/** Code has 100 columns here, and tables are wide. */
const CSS = `
  @media (min-width: 1440px) {
    .VPDoc.has-aside .content-container { max-width: 924px !important; }
    .VPDoc .container { max-width: 1240px !important; }
  }
  .VPDoc:not(.has-aside) .content, .VPDoc:not(.has-aside) .container { max-width: 924px !important; }
  .vp-doc [class*="language-"] code { font-size: 13px; }
`;

export default {
  base,
  title: "duplex-sse",
  description: "Everything a WebSocket does, over plain HTTP: SSE down, POST up, resumed",
  head: [
    ["link", { rel: "icon", href: "data:," }], // else browsers ask for one
    ["style", {}, CSS],
  ],
  // The reference is made by another tool, once the pages are there.
  ignoreDeadLinks: [/^\/api\//],
  markdown: {
    linkify: false,
    anchor: { slugify },
    languageAlias: { modsecurity: "apache", haproxy: "nginx", caddy: "nginx", sse: "http" },
    theme: { light: "github-light-high-contrast", dark: "github-dark-high-contrast" },
  },
  themeConfig: {
    search: { provider: "local" },
    outline: [2, 3],
    nav: [
      { text: "Guide", link: "/" },
      { text: "Protocol", link: "/PROTOCOL" },
      { text: "Reference", link: "/reference" },
      { text: "Changes", link: "/CHANGELOG" },
    ],
    sidebar: [
      {
        text: "Use",
        items: [
          { text: "duplex-sse", link: "/" },
          { text: "Hosts and frameworks", link: "/docs/frameworks" },
          { text: "Recipes for clients", link: "/docs/recipes" },
          { text: "The life of a page", link: "/docs/pages" },
          { text: "AI chats", link: "/docs/ai" },
          { text: "Examples", link: "/examples/" },
        ],
      },
      {
        text: "Operate",
        items: [
          { text: "Platforms", link: "/docs/platforms" },
          { text: "Behind a proxy", link: "/docs/proxies" },
          { text: "Counters", link: "/docs/operate" },
          { text: "Messages and what to do", link: "/docs/errors" },
        ],
      },
      {
        text: "Look up",
        items: [
          { text: "Reference", link: "/reference" },
          { text: "Protocol", link: "/PROTOCOL" },
          { text: "More than one machine", link: "/docs/cluster-protocol" },
          { text: "Conformance", link: "/docs/conformance" },
          { text: "How close to the standard", link: "/docs/standard" },
          { text: "Changes", link: "/CHANGELOG" },
          { text: "Contributing", link: "/CONTRIBUTING" },
        ],
      },
    ],
  },
};

/** The anchor of a heading as GitHub makes it, so that links work there and here. */
function slugify(heading) {
  return heading.trim().toLowerCase().replace(/[^\p{L}\p{M}\p{N}\p{Pc}\- ]/gu, "")
    .replaceAll(" ", "-");
}
