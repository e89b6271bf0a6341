// The browser's part of browser_test.py: node browser_test.mjs URL CHROMIUM OUTPUT PACK SLOWDOWN all|look [WORKFLOW ...]
// Prints a line for each check; the exit status is the number of those that failed.
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import path from 'node:path';

import { lookAtAll } from './browser_look.mjs';
import { lastingProblems, layout, queueOpenGraph, settled } from './browser_states.mjs';

const [url, executablePath, output, pack, slowdown, only, ...wanted] = process.argv.slice(2);
// Installed outside the pack, where an import would not find it.
const { chromium } = createRequire(path.join(process.env.STEP1X_PLAYWRIGHT, 'package.json'))('playwright-core');

const BLUEPRINT = 'Step1X-Edit Image';
// What makes a run short enough for a CPU, by widget.
const SHORT = { size_level: 256, steps: 3, rounds: 1, validation: 1, accumulation: 1, 'mode.few_steps': 2, 'mode.teacher_steps': 4 };
// Of a loop, by the loader's widget: the preview asks for a verdict alone, where v1.2 asks for scores as well. tests/host has both.
const LOOP_VERSION = 'v1.2-preview';
const SMALL_LATENT = { width: 256, height: 256 };
// So long nothing may be heard of a run, and so long a state is waited for: only what never comes takes it.
const SILENCE = 300;
const PATIENCE = 300000;

const profile = mkdtempSync(path.join(tmpdir(), 'step1x-chromium-'));
const context = await chromium.launchPersistentContext(profile, {
  executablePath, headless: true, viewport: { width: 1600, height: 900 },
  args: ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
    '--disable-component-update', '--disable-sync'],
});
const page = context.pages()[0];
page.setDefaultTimeout(PATIENCE);
page.setDefaultNavigationTimeout(PATIENCE);
if (Number(slowdown) > 1) await (await context.newCDPSession(page)).send('Emulation.setCPUThrottlingRate', { rate: Number(slowdown) });
let pageErrors = [];
page.on('pageerror', error => pageErrors.push(`the page failed: ${error.message}`));
// Nothing leaves this machine.
await page.route('**/*', route => {
  const target = new URL(route.request().url());
  return target.protocol.startsWith('http') && target.origin !== new URL(url).origin ? route.abort() : route.continue();
});

let failed = 0;
async function check(name, body) {
  const started = Date.now();
  pageErrors = [];
  let problems;
  try {
    problems = [...await body(), ...pageErrors];
  } catch (error) {
    problems = [error.message];
  }
  await page.screenshot({ path: path.join(output, `${name}.png`) });
  failed += problems.length > 0;
  console.log(`${problems.length ? 'FAILED' : 'ok'.padEnd(6)} ${name} (${((Date.now() - started) / 1000).toFixed(1)} s)`);
  problems.forEach(problem => console.log(`       ${problem}`));
}

async function openEditor() {
  await page.goto(url, { waitUntil: 'domcontentloaded' });
  await page.waitForFunction(() => window.app?.graph && window.app.extensionManager && window.LiteGraph?.registered_node_types?.SaveImage);
}

const templates = () => page.evaluate(async pack => (await (await fetch('/workflow_templates')).json())[pack].sort(), pack);

// Opens a template as the template browser does.
async function openTemplate(name) {
  await page.evaluate(async ([pack, name]) => {
    const workflow = await (await fetch(`/api/workflow_templates/${pack}/${name}.json`)).json();
    await app.loadGraphData(workflow, true, true, name);
  }, [pack, name]);
}

// Requests that the page waits for: the search for missing models is one of them.
const requests = new Set();
page.on('request', request => requests.add(request));
for (const end of ['requestfinished', 'requestfailed']) page.on(end, request => requests.delete(request));

// Nothing moves, grows or is asked for any more: over so many drawn frames, however long each takes.
const atRest = () => settled(async () => ({ requests: [...requests].map(request => request.url()), ...await page.evaluate(layout) }));

async function fitView() {
  await page.evaluate(() => app.extensionManager.command.execute('Comfy.Canvas.FitView'));
  await atRest();
}

// What a person would see wrong in the open graph.
const graphProblems = () => page.evaluate(() => {
  const problems = [];
  const text = document.body.innerText;
  for (const words of ['Missing node', 'can be replaced', 'errors found', 'error found']) {
    if (text.includes(words)) problems.push(`the editor says: ${text.slice(Math.max(text.indexOf(words) - 40, 0), text.indexOf(words) + 160).replace(/\s+/g, ' ')}`);
  }
  for (const dialog of document.querySelectorAll('[role=dialog], .p-dialog')) {
    if (dialog.innerText.trim()) problems.push(`a dialog is open: ${dialog.innerText.slice(0, 200)}`);
  }
  const nodes = app.graph.nodes;
  for (const node of nodes) {
    if (node.has_errors) problems.push(`node ${node.id} (${node.type}) has errors`);
  }
  const boxes = nodes.map(node => [`${node.id} (${node.type})`, node.pos[0], node.pos[1] - LiteGraph.NODE_TITLE_HEIGHT, node.size[0], node.size[1] + LiteGraph.NODE_TITLE_HEIGHT]);
  boxes.forEach(([name, x, y, width, height], i) => boxes.slice(i + 1).forEach(([other, x2, y2, width2, height2]) => {
    if (x < x2 + width2 && x2 < x + width && y < y2 + height2 && y2 < y + height) problems.push(`node ${name} lies over node ${other}`);
  }));
  for (const note of document.querySelectorAll('.comfy-markdown .tiptap')) {
    const last = note.lastElementChild;
    if (last && last.offsetTop + last.offsetHeight > note.clientHeight) problems.push('the note is cut off');
  }
  return problems;
});

// What the editor offers to download, or only names, once it knows of so many files: [{name, url, directory}].
const missingModels = async count => {
  const read = () => document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s.get('missingModel').missingModelCandidates ?? [];
  const deadline = Date.now() + 60000;
  let missing;
  do {
    await page.waitForTimeout(100);
    missing = await page.evaluate(read);
  } while (missing.length !== count && Date.now() < deadline);
  return missing;
};

const shorten = () => page.evaluate(([short, small, loopVersion]) => {
  const nodes = [app.graph, ...(app.graph.subgraphs?.values() ?? [])].flatMap(graph => graph.nodes);
  const loops = nodes.some(node => node.type === 'Step1XEditReflectionLoop');
  for (const node of nodes) {
    for (const widget of node.widgets ?? []) {
      const value = node.type === 'EmptySD3LatentImage' && widget.name in small ? small[widget.name] : short[widget.name];
      if (value !== undefined) widget.value = value;
      if (loops && node.type === 'Step1XEditLoader' && widget.name === 'version') widget.value = loopVersion;
    }
  }
}, [SHORT, SMALL_LATENT, LOOP_VERSION]);

// Every node that saves or previews must have something to show.
const resultProblems = () => page.evaluate(() => app.graph.nodes.filter(node => ['SaveImage', 'PreviewImage'].includes(node.type))
  .filter(node => !node.images?.length && !app.nodeOutputs?.[node.id]?.images?.length).map(node => `node ${node.id} (${node.type}) shows no picture`));

async function runOpenGraph() {
  await shorten();
  const problems = await page.evaluate(queueOpenGraph, SILENCE);
  const shown = problems.length ? [] : await lastingProblems(resultProblems);
  await atRest();
  return [...problems, ...await lastingProblems(graphProblems), ...shown];
}

await openEditor();
const names = (await templates()).filter(name => !wanted.length || wanted.includes(name));
if (names.length === 0) throw new Error(`${pack} offers no workflows`);

await check('template_browser', async () => {
  await page.evaluate(() => app.extensionManager.command.execute('Comfy.BrowseTemplates'));
  await page.getByText(pack, { exact: true }).first().click();
  // Only the cards in sight load their picture.
  await page.waitForFunction(count => [...document.images].filter(image => image.naturalWidth > 0 && image.naturalWidth === image.naturalHeight).length >= count,
    Math.min(names.length, 4));
  const broken = await page.evaluate(([pack, names]) => Promise.all(names.map(async name => {
    try {
      await createImageBitmap(await (await fetch(`/api/workflow_templates/${pack}/${name}.jpg`)).blob());
    } catch {
      return `${name} has no thumbnail`;
    }
  })), [pack, names]);
  return broken.filter(Boolean);
});
await page.keyboard.press('Escape');

await check('search', async () => {
  const found = await page.evaluate(words => {
    const { nodeSearchService } = document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s.get('nodeDef');
    return words.map(word => nodeSearchService.searchNode(word).map(node => node.display_name));
  }, ['step1x', 'edit image', 'edit picture']);
  const plain = ['Load Step1X-Edit Model', 'Load Step1X-Edit MLLM', 'Step1X-Edit Encode', 'Step1X-Edit Sampler', 'Step1X-Edit Decode'];
  const [all, image, picture] = found;
  // 'Step1X-Edit Speed' is as long as the blueprint's name.
  return [...[...plain, BLUEPRINT].filter(name => !all.slice(0, 7).includes(name)).map(name => `'step1x' does not find ${name} first, but ${all.slice(0, 8)}`),
    ...(image[0] === BLUEPRINT ? [] : [`'edit image' finds ${image.slice(0, 3)} before the blueprint`]),
    ...plain.filter(name => !picture.includes(name)).map(name => `'edit picture' does not find ${name}`)];
});

writeFileSync(path.join(output, 'sizes.json'), JSON.stringify(await lookAtAll(page, names, { check, open: openTemplate, atRest })));
if (only === 'look') {
  await context.close();
  process.exit(failed);
}
// Text stays readable in a screenshot of the whole graph.
await page.setViewportSize({ width: 1920, height: 1080 });
await page.evaluate(() => app.extensionManager.setting.set('LiteGraph.Canvas.MinFontSizeForLOD', 0));

for (const name of names) {
  await check(name, async () => {
    await openTemplate(name);
    await fitView();
    const problems = await lastingProblems(graphProblems);
    return problems.length ? problems : runOpenGraph();
  });
}

await check('blueprint', async () => {
  await page.evaluate(() => app.extensionManager.command.execute('Comfy.NewBlankWorkflow'));
  await page.waitForFunction(() => app.graph.nodes.length === 0);
  await atRest();
  // As a person does: a double click on the canvas, the name, Enter; the node hangs on the pointer until a click puts it down.
  await page.mouse.dblclick(900, 600);
  // The search box has the keyboard, then lists what it found.
  await page.waitForFunction(() => document.activeElement?.matches('input'));
  await page.keyboard.type(BLUEPRINT, { delay: 20 });
  await page.waitForFunction(name => document.activeElement?.value === name
    && [...document.querySelectorAll('[role=dialog], [role=listbox], .p-dialog, .p-autocomplete-overlay')].some(list => list.innerText.includes(name)), BLUEPRINT);
  await atRest();
  await page.keyboard.press('Enter');
  await page.waitForFunction(() => app.graph.nodes.length === 1);
  await atRest();
  await page.mouse.move(1000, 500, { steps: 5 });
  await page.mouse.click(1000, 500);
  await page.waitForFunction(() => app.canvas.state.ghostNodeId == null);
  await page.evaluate(() => {
    const [edit] = app.graph.nodes;
    edit.widgets.find(widget => widget.name === 'prompt').value = 'turn the coffee into tea';
    const add = (type, x) => {
      const node = LiteGraph.createNode(type);
      node.pos = [edit.pos[0] + x, edit.pos[1]];
      app.graph.add(node);
      return node;
    };
    app.canvas.deselectAll();
    add('LoadImage', -450).connect(0, edit, edit.inputs.findIndex(input => input.name === 'image'));
    edit.connect(0, add('SaveImage', edit.size[0] + 80), 0);
  });
  await fitView();
  const problems = await lastingProblems(graphProblems);
  return problems.length ? problems : runOpenGraph();
});

// The same editor on a ComfyUI without any model: what is missing must be named, with a link where there is one.
await page.route('**/object_info', async route => {
  const response = await route.fetch();
  const info = await response.json();
  const without = options => options.filter(option => !/\.safetensors$/.test(option));
  for (const node of Object.values(info)) {
    for (const inputs of [node.input.required ?? {}, node.input.optional ?? {}]) {
      for (const definition of Object.values(inputs)) {
        if (Array.isArray(definition[0])) definition[0] = without(definition[0]);
        else if (Array.isArray(definition[1]?.options)) definition[1].options = without(definition[1].options);
      }
    }
  }
  return route.fulfill({ response, json: info });
});
await openEditor();
await check('without_models', async () => {
  const problems = [];
  for (const name of names) {
    await openTemplate(name);
    const files = await page.evaluate(() => app.graph.nodes.flatMap(node => node.widgets ?? []).map(widget => widget.value).filter(value => /\.safetensors$/.test(value)));
    const missing = await missingModels(files.length);
    for (const file of files) {
      const found = missing.find(model => model.name === file);
      if (!found) problems.push(`${name}: ${file} is not reported as missing`);
      else if (!(found.url && found.directory)) problems.push(`${name}: ${file} has no link`);
    }
  }
  return problems;
});

await context.close();
rmSync(profile, { recursive: true, force: true });
process.exit(failed);
