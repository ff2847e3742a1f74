// Every widget in JupyterLab and in Voila, moved by keyboard and mouse; the run that the monitor follows goes on meanwhile.
import assert from "node:assert/strict"
import {spawn} from "node:child_process"
import {createServer} from "node:net"
import {join} from "node:path"
import {after, before, test} from "node:test"
import {SHOTS, launch, serious} from "./common.mjs"

const FOLDER = process.env.NOTEBOOKS, BIN = process.env.BIN ?? ".venv/bin", SLOW = {timeout: 400_000}
let browser, context
before(async () => { browser = await launch({viewport: {width: 1400, height: 1000}}); context = browser.context })
after(async () => { await browser?.close() })

const freePort = () => new Promise(done => { const s = createServer().listen(0, "127.0.0.1", () => { const {port} = s.address(); s.close(() => done(port)) }) })

/** Starts a server and waits until it answers. */
async function start(command, args, address) {
  const server = spawn(join(BIN, command), args, {cwd: FOLDER, stdio: ["ignore", "pipe", "pipe"], detached: true})
  let said = ""
  for (const stream of [server.stdout, server.stderr]) stream.on("data", text => { said += text })
  for (let i = 0; i < 800; i++) {
    if (server.exitCode !== null) throw new Error(`${command} ended: ${said}`)
    if (await fetch(address).then(r => r.ok || r.status == 405, () => false)) return {stop: () => { try { process.kill(-server.pid, "SIGTERM") } catch {} }}
    await new Promise(r => setTimeout(r, 500))
  }
  throw new Error(`${command} does not answer: ${said}`)
}

async function jupyterlab() {
  const port = await freePort(), url = `http://127.0.0.1:${port}`
  const server = await start("jupyter-lab", ["--no-browser", "--allow-root", "--ip=127.0.0.1", `--port=${port}`, "--IdentityProvider.token=", "--ServerApp.password=", `--ServerApp.root_dir=${FOLDER}`,
    "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url=None"], `${url}/api`)
  const page = await context.newPage()
  await page.goto(`${url}/lab/tree/widgets.ipynb?reset`)
  await page.locator(".jp-Notebook .jp-CodeCell").first().waitFor(SLOW)
  await page.locator(".jp-NotebookPanel-toolbar").waitFor(SLOW)
  await page.waitForFunction(() => /Idle/i.test(document.querySelector(".jp-Notebook-ExecutionIndicator")?.dataset.status ?? "") , null, SLOW)
  const prompt = pattern => page.locator(".jp-Notebook .jp-CodeCell .jp-InputPrompt").first().filter({hasText: pattern})
  for (let i = 0; i < 10 && !await prompt(/\d/).count(); i++) {  // JupyterLab may drop cells that are sent just as the kernel connects
    await page.locator(".jp-Notebook .jp-CodeCell .cm-content").first().click()
    await page.getByRole("menuitem", {name: "Run", exact: true}).click()
    await page.getByRole("menuitem", {name: "Run All Cells", exact: true}).click()
    await prompt(/[*\d]/).waitFor({timeout: 10_000}).catch(() => {})
    await prompt("*").waitFor({...SLOW, state: "detached"})
  }
  return {page, server}
}

async function voila() {
  const port = await freePort(), url = `http://127.0.0.1:${port}`
  const server = await start("voila", ["widgets.ipynb", "--no-browser", `--port=${port}`, "--Voila.ip=127.0.0.1", "--VoilaConfiguration.show_tracebacks=True"], `${url}/voila/static/voila.js`)
  const page = await context.newPage()
  await page.goto(url, SLOW)
  return {page, server}
}

/** Waits until `locator` is there. A cell that raises an error ends the wait at once, with its traceback. */
async function arrive(page, locator) {
  const failed = page.locator("[data-mime-type='application/vnd.jupyter.error'], [data-mime-type='application/vnd.jupyter.stderr']").filter({hasText: /Traceback \(most recent call last\)|SyntaxError/})
  await locator.or(failed).first().waitFor({...SLOW, state: "attached"})
  if (await failed.count()) throw new Error(`a cell of the notebook failed:\n${(await failed.allInnerTexts()).join("\n")}`)
  await locator.first().waitFor(SLOW)
}

for (const [name, open] of [["JupyterLab", jupyterlab], ["Voila", voila]]) test(name, {timeout: 3_000_000}, async t => {
  const {page, server} = await open()
  const area = page.locator(".widget-vbox")
  const panel = text => page.locator(".widget-vbox, .jupyter-widgets.widget-container").filter({hasText: text}).last()
  const shot = step => page.screenshot({path: join(SHOTS, `${name}_${step}.png`)})
  const see = (locator, pattern) => locator.filter({hasText: pattern}).first().waitFor(SLOW)
  try {
    await arrive(page, area.getByRole("button", {name: "look now"}))  // the last cell has run

    await t.test("corpus explorer", async () => {
      const all = panel("recordings,"), list = area.locator("select[size]").first(), box = area.getByLabel("search", {exact: true}).first()
      await box.scrollIntoViewIfNeeded()
      assert.equal(await list.locator("option").count(), 12)
      const before = await all.locator("tr", {hasText: "id"}).first().innerText()
      const changed = before => page.waitForFunction(before => [...document.querySelectorAll("tr")].find(r => /^id/.test(r.innerText))?.innerText != before, before, SLOW)
      await area.getByRole("button", {name: "next recording"}).first().focus()
      await page.keyboard.press("Enter")
      await changed(before)
      const second = await all.locator("tr", {hasText: "id"}).first().innerText()
      await list.selectOption({index: 4})
      await changed(second)
      const sound = all.locator("audio").first()
      await sound.evaluate(a => a.play())
      await page.waitForFunction(a => a.currentTime > 0.2, await sound.elementHandle(), SLOW)
      const word = (await list.locator("option").nth(3).textContent()).split(/:\s/)[1].split(/\W/)[0]  // its spaces are no-break spaces
      await box.click()
      await page.keyboard.type(word)
      await page.waitForFunction(() => document.querySelector("select[size]").options.length < 12, null, SLOW)
      await shot("corpus")
      for (const text of ["Do", "th", "e", ""]) {  // what is typed letter by letter leaves list and panel at the same recording
        await box.fill("")
        await box.pressSequentially(text, {delay: 60})
        await page.waitForTimeout(3000)
        const [chosen, shown] = await page.evaluate(() => {
          const list = document.querySelector("select[size]"), row = [...document.querySelectorAll("tr")].find(r => /^id/.test(r.innerText))
          return [list.options[list.selectedIndex]?.text.split(/:\s/)[0], row?.innerText.replace(/^id\s*/, "")]
        })
        assert.equal(shown, chosen, `after the search for "${text}"`)
      }
    })

    await t.test("label explorer", async () => {
      const grid = page.getByRole("region", {name: "delay grid"}), number = area.getByLabel("position", {exact: true}).first()
      await number.scrollIntoViewIfNeeded()
      await number.focus()
      for (let i = 0; i < 3; i++) await page.keyboard.press("ArrowUp")
      await see(page.locator("p"), /^position 3:/)
      await area.getByRole("button", {name: "next position"}).first().click()
      await see(page.locator("p"), /^position 4:/)
      await number.fill("100")
      await number.press("Enter")
      await see(page.locator("table"), "codebook 7")
      const codes = (await grid.locator("rect title").allTextContents()).filter(title => title.includes("codebook"))  // the last position is text
      assert.match(codes.at(-1), /position \d+, codebook 7, code \d+: /)
      await shot("labels")
    })

    await t.test("codes explorer", async () => {
      const button = n => area.getByRole("button", {name: String(n), exact: true}).first()
      await button(2).scrollIntoViewIfNeeded()
      await button(2).click()
      await see(page.locator("p"), "the first 2 codebooks")
      await button(4).focus()
      await page.keyboard.press("Enter")
      await see(page.locator("p"), "the first 4 codebooks")
      await shot("codes")
    })

    await t.test("A/B listener", async () => {
      const button = text => area.getByRole("button", {name: text, exact: true}).first()
      await button("first is better").scrollIntoViewIfNeeded()
      await see(page.locator("p"), "pair 1 of 3")
      await button("first is better").click()
      await see(page.locator("p"), "pair 2 of 3")
      await button("no difference").focus()
      await page.keyboard.press("Space")
      await see(page.locator("p"), "pair 3 of 3")
      await button("back").click()
      await see(page.locator("p"), "pair 2 of 3")
      for (const turn of [3, 0]) { await button("second is better").focus(); await page.keyboard.press("Enter"); if (turn) await see(page.locator("p"), `pair ${turn} of 3`) }
      await see(page.locator("p"), /of 3 decided pairs, 0 ties/)
      assert.ok(await button("first is better").isDisabled())
      await shot("listener")
    })

    await t.test("run monitor follows a run that goes on", async () => {
      const step = async () => Number((await page.locator("p", {hasText: /^step \d+/}).first().innerText({timeout: 240_000})).match(/^step (\d+)/)[1])
      const follow = area.getByRole("button", {name: "follow"}).first()
      await follow.scrollIntoViewIfNeeded()
      const first = await step()
      await page.waitForFunction(first => [...document.querySelectorAll("p")].some(p => Number(p.innerText.match(/^step (\d+)/)?.[1]) >= first + 2), first, SLOW)
      await area.getByRole("button", {name: "probe"}).first().click()
      await page.locator("img[alt^='The probe of run']").waitFor(SLOW)
      await shot("monitor")
      await follow.focus()
      await page.keyboard.press("Space")
      await page.waitForTimeout(2500)
      const halted = await step()
      await page.waitForTimeout(4000)
      assert.equal(await step(), halted, "it was told not to follow")
      const again = area.getByRole("button", {name: "look now"}).first()
      for (let i = 0; i < 60 && await step() == halted; i++) { await again.focus(); await page.keyboard.press("Enter"); await page.waitForTimeout(1000) }
      assert.ok(await step() > halted, "it was told to look")
    })

    await t.test("axe-core finds nothing serious in the widgets", async () => assert.deepEqual(await serious(page, null, ".widget-vbox"), []))
  } catch (error) { await shot("failed"); throw error } finally { await page.close(); server.stop() }
})
