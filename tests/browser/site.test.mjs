// The built site, served from a subfolder: every page, in a window of a phone and of a desktop, light and dark.
import assert from "node:assert/strict"
import {readdirSync, statSync} from "node:fs"
import {join, relative} from "node:path"
import {pathToFileURL} from "node:url"
import {after, before, test} from "node:test"
import {SHOTS, launch, serious, serve, watch} from "./common.mjs"

const SITE = process.env.SITE ?? "_docs"
const walk = folder => readdirSync(folder).flatMap(name => statSync(join(folder, name)).isDirectory() ? walk(join(folder, name)) : [join(folder, name)])
const PAGES = walk(SITE).filter(f => f.endsWith(".html")).map(f => relative(SITE, f)).filter(f => !process.env.ONLY_PAGES || process.env.ONLY_PAGES.split(",").includes(f)).sort()
const SHOT = ["index.html", "view/04_label_explorer.html", "data/22_audit.html", "explanations/labels.html", "tutorials/read_a_run.html"]
let browser, context, site
assert.ok(PAGES.length > (process.env.ONLY_PAGES ? 0 : 30), `only ${PAGES.length} pages in ${SITE}: is this the site?`)

before(async () => { site = await serve(SITE); browser = await launch(); context = browser.context })
after(async () => { await browser?.close(); site?.close() })

async function open(path, width = 1440, dark = false) {
  const page = await context.newPage()
  await page.setViewportSize({width, height: 900})
  await page.emulateMedia({colorScheme: dark ? "dark" : "light", reducedMotion: "reduce"})
  const wrong = watch(page, site.url)
  await page.goto(site.url + path, {waitUntil: "load"})
  return {page, wrong}
}

test("every page, on a desktop and a phone, light and dark", {timeout: 900_000}, async t => {
  const links = [], anchors = {}, faults = {errors: [], images: [], wide: [], axe: [], links: []}
  const page = await context.newPage()
  const wrong = watch(page, site.url)
  for (const path of PAGES) {
    const address = site.url + path.replaceAll("\\", "/")
    await page.emulateMedia({colorScheme: "light", reducedMotion: "reduce"})
    await page.setViewportSize({width: 1440, height: 900})
    await page.goto(address)
    const found = await page.evaluate(() => ({ids: [...document.querySelectorAll("[id],a[name]")].map(e => e.id || e.name), links: [...document.querySelectorAll("a[href]")].map(a => a.href),
      bare: [...document.images].filter(i => !i.alt?.trim()).length, broken: [...document.images].filter(i => i.complete && !i.naturalWidth).length}))
    anchors[path] = new Set(found.ids)
    links.push(...found.links.filter(l => l.startsWith(site.url)).map(l => [path, l.slice(site.url.length)]))
    if (found.bare || found.broken) faults.images.push(`${path}: ${found.bare} without alt, ${found.broken} not shown`)
    faults.axe.push(...(await serious(page)).map(v => `${path}: ${v}`))
    for (const width of [1440, 390]) {
      await page.setViewportSize({width, height: 900})
      const over = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth)
      if (over > 0) faults.wide.push(`${path} at ${width}: ${over} pixels too wide`)
      if (!SHOT.includes(path)) continue
      await page.waitForTimeout(500)  // the sidebar slides
      await page.screenshot({path: join(SHOTS, `${path.replace(/\W/g, "_")}_${width}.png`), fullPage: path == "index.html"})
    }
    await page.setViewportSize({width: 1440, height: 900})
    await page.emulateMedia({colorScheme: "dark", reducedMotion: "reduce"})
    await page.reload()
    faults.axe.push(...(await serious(page, ["color-contrast"])).map(v => `${path}, dark: ${v}`))
    if (SHOT.includes(path)) await page.screenshot({path: join(SHOTS, `${path.replace(/\W/g, "_")}_dark.png`)})
    faults.errors.push(...wrong.splice(0).map(w => `${path}: ${w}`))
  }
  await page.close()
  const files = new Set(walk(SITE).map(f => relative(SITE, f)))
  for (const [from, link] of links) {  // to pages that were not opened, because ONLY_PAGES names some, anchors are not looked for
    const file = decodeURIComponent(link.split(/[#?]/)[0]) || "index.html", anchor = decodeURIComponent(link.split("#")[1] ?? "")
    if (!files.has(file)) faults.links.push(`${from}: no file ${file}`)
    else if (anchor && file in anchors && !anchors[file].has(anchor)) faults.links.push(`${from}: no anchor ${link}`)
  }
  await t.test("no error in the console, nothing from another host", () => assert.deepEqual(faults.errors, []))
  await t.test("every image is shown and has a text", () => assert.deepEqual(faults.images, []))
  await t.test("nothing scrolls sideways at 390 and 1440 pixels", () => assert.deepEqual(faults.wide, []))
  await t.test("axe-core finds nothing serious, contrast in light and dark among it", () => assert.deepEqual(faults.axe, []))
  await t.test("every link and anchor leads somewhere", () => { assert.deepEqual([...new Set(faults.links)], []); assert.ok(process.env.ONLY_PAGES || links.length > 500, `only ${links.length} links`) })
})

test("dark is dark and light is light", async () => {
  const shade = async dark => {
    const {page} = await open("index.html", 1440, dark)
    const rgb = (await page.evaluate(() => getComputedStyle(document.body).backgroundColor)).match(/\d+/g).map(Number)
    await page.close()
    return (rgb[0] + rgb[1] + rgb[2]) / 3
  }
  assert.ok(await shade(false) > 200 && await shade(true) < 80)
})

test("the search finds offset_probe, by keyboard, and its page opens", async () => {
  const {page, wrong} = await open("index.html")
  const box = page.getByRole("searchbox").or(page.getByRole("combobox")).or(page.locator("input[type=search],input[placeholder*=earch]")).first()
  await box.focus()
  await box.pressSequentially("offset_probe", {delay: 20})
  const hit = page.locator("a[href*='01_probe']", {hasText: /probe/i}).filter({visible: true}).first()
  await hit.waitFor({timeout: 10_000})
  await page.screenshot({path: join(SHOTS, "search.png")})
  await hit.focus()
  await page.keyboard.press("Enter")
  await page.waitForURL(/01_probe/)
  assert.match(await page.locator("main, body").first().innerText(), /offset_probe/)
  assert.deepEqual(wrong, [])
})

test("a player of the home page plays", async () => {
  const {page} = await open("index.html")
  const audio = page.locator("audio").first()
  await audio.evaluate(a => a.play())
  await page.waitForFunction(() => document.querySelector("audio").currentTime > 0.3, null, {timeout: 20_000})
})

test("the keyboard goes from the top of the home page into its text, and what has the focus is seen", async () => {
  const {page} = await open("index.html")
  const tab = async () => {
    await page.keyboard.press("Tab")
    return page.evaluate(() => {
      const e = document.activeElement, style = getComputedStyle(e), box = e.getBoundingClientRect()
      const place = e.closest("main") ? "main" : e.closest("nav,aside,header,.sidebar,#sidebar") ? "navigation" : e.tagName
      const shown = box.width > 0 && box.top >= 0 && box.left >= 0 && box.bottom <= innerHeight && box.right <= innerWidth
      return {place, name: e.innerText?.trim() || e.ariaLabel || e.placeholder || e.tagName, seen: shown && style.outlineStyle + style.boxShadow != "nonenone"}
    })
  }
  const stops = [await tab()]
  assert.equal(stops[0].name, "Skip to main content")
  await page.screenshot({path: join(SHOTS, "skip_link.png")})
  await page.keyboard.press("Enter")
  stops.push(await tab())
  assert.equal(stops[1].place, "main", "one Tab after the link that skips the navigation")

  await page.goto(site.url + "index.html")  // and without that link: no link of the navigation holds the focus
  const most = await page.evaluate(() => document.querySelectorAll("a[href],button,input,[tabindex]").length)
  while (stops.at(-1).place != "main" || stops.length == 2) {
    assert.ok(stops.length < most + 2, `${most} presses of Tab reach only ${[...new Set(stops.map(s => s.place))].join()}`)
    stops.push(await tab())
  }
  assert.ok(stops.some(s => s.place == "navigation"))
  assert.deepEqual(stops.filter(s => !s.seen), [])
})

test("a copy on disk can be read: pages, pictures and links without a server", async () => {
  const page = await context.newPage()
  const wrong = watch(page, "file:")
  await page.goto(pathToFileURL(join(SITE, "index.html")).href)
  await page.locator("main a[href*='labels']").first().click()
  await page.waitForURL(/labels\.html/)
  assert.equal(await page.evaluate(() => [...document.images].every(i => i.naturalWidth > 0)), true)
  assert.ok(await page.evaluate(() => document.styleSheets.length > 0 && getComputedStyle(document.body).fontFamily != "Times New Roman"))
  assert.deepEqual(wrong.filter(w => w.startsWith("request")), [])
})
