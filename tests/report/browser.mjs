// Opens a page in headless Chromium and prints what it found as JSON.
// node browser.mjs FOLDER_WITH_NODE_MODULES PAGE.html SCREENSHOT_PREFIX
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [modules, page, shots] = process.argv.slice(2);
const require = createRequire(modules + "/");
const puppeteer = require("puppeteer-core");
const chromium = (await import(pathToFileURL(require.resolve("@sparticuz/chromium")))).default;
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const browser = await puppeteer.launch({
  executablePath: process.env.CHROMIUM || (await chromium.executablePath()), args: chromium.args, headless: "shell",
});
const found = { console: [], requests: [], views: [] };
for (const scheme of ["light", "dark"]) {
  for (const width of [390, 1280]) {
    const tab = await browser.newPage();
    tab.on("console", (message) => found.console.push(message.text()));
    tab.on("pageerror", (error) => found.console.push(String(error)));
    tab.on("request", (request) => { if (!/^(file|data):/.test(request.url())) found.requests.push(request.url()); });
    await tab.setViewport({ width, height: 900 });
    await tab.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
    await tab.goto(pathToFileURL(page).href);
    await tab.evaluate(() => document.querySelectorAll("details").forEach((each) => { each.open = true; }));
    const layout = await tab.evaluate(() => ({
      overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
      charts: [...document.querySelectorAll("figure svg")].map((svg) => {
        const marks = [...svg.querySelectorAll(".marks rect, .marks circle, .marks path")];
        return marks.filter((mark) => { const box = mark.getBoundingClientRect(); return box.width > 0 || box.height > 0; }).length;
      }),
    }));
    if (shots) await tab.screenshot({ path: `${shots}-${scheme}-${width}.png`, fullPage: true });
    await tab.evaluate(axe);
    const result = await tab.evaluate(() => window.axe.run());
    const violations = result.violations.map((each) => `${each.id}: ${each.nodes.map((node) => node.target).join(" ")}`);
    found.views.push({ scheme, width, ...layout, violations });
    await tab.close();
  }
}
await browser.close();
console.log(JSON.stringify(found));
