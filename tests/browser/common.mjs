// What both test files need: a browser without network habits, a server for a folder, and axe-core.
import {readFileSync, mkdirSync} from "node:fs"
import {createServer} from "node:http"
import {createRequire} from "node:module"
import {extname, join, normalize} from "node:path"
import {chromium} from "playwright-core"

const TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".json": "application/json", ".svg": "image/svg+xml", ".png": "image/png", ".woff2": "font/woff2", ".xml": "text/xml", ".txt": "text/plain"}
export const SHOTS = process.env.SHOTS ?? "build/screenshots"
mkdirSync(SHOTS, {recursive: true})

/** A browser with an empty profile, and a window in it; `close` ends both. */
export async function launch(options = {}) {
  const browser = await chromium.launch({executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", chromiumSandbox: false,
    args: ["--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--autoplay-policy=no-user-gesture-required"]})
  const context = await browser.newContext(options)
  return {context, close: () => browser.close()}
}

/** Serves `folder` under `prefix`, on a port of its own; returns the address of the folder and what was asked for and is not there. */
export async function serve(folder, prefix = "/higgs_nb/") {
  const missing = []
  const server = createServer((request, response) => {
    const path = decodeURIComponent(new URL(request.url, "http://x").pathname)
    if (!path.startsWith(prefix)) { if (path != "/favicon.ico") missing.push(path); response.writeHead(404); return response.end() }
    let file = normalize(join(folder, path.slice(prefix.length) || "index.html"))
    try {
      const body = readFileSync(file)
      response.writeHead(200, {"content-type": TYPES[extname(file)] ?? "application/octet-stream"})
      response.end(body)
    } catch { missing.push(path); response.writeHead(404); response.end() }
  })
  await new Promise(ready => server.listen(0, "127.0.0.1", ready))
  return {url: `http://127.0.0.1:${server.address().port}${prefix}`, missing, close: () => server.close()}
}

/** Collects what goes wrong in a page: errors in the console, exceptions, and requests to anywhere but `allowed`. */
export function watch(page, allowed) {
  const wrong = []
  page.on("console", m => m.type() == "error" && wrong.push(`console: ${m.text()}`))
  page.on("pageerror", e => wrong.push(`exception: ${e.message}`))
  page.on("request", r => /^(https?|wss?):/.test(r.url()) && !r.url().startsWith(allowed) && !r.url().endsWith("/favicon.ico") && wrong.push(`request: ${r.url()}`))
  return wrong
}

const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8")

const RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]

/** What axe-core calls a serious or critical violation, one line each; `rules` names some, else it is all of WCAG 2.1 A and AA. */
export async function serious(page, rules = null, within = "html") {
  await page.evaluate(AXE)
  const found = await page.evaluate(([within, runOnly]) => axe.run(within, {runOnly, resultTypes: ["violations"]}), [within, rules ? {type: "rule", values: rules} : {type: "tag", values: RULES}])
  return found.violations.filter(v => ["serious", "critical"].includes(v.impact)).map(v => `${v.id} (${v.nodes.length}): ${v.nodes.slice(0, 3).map(n => n.html.slice(0, 160) + " " + (n.any[0]?.message ?? "").slice(0, 140)).join(" | ")}`)
}
