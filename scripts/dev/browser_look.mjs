// The first sight of every workflow, in both node styles: what a person sees who opens it from the template browser, before any zooming.

// In the page: boxes of nodes and groups as they are drawn, and how large the view is.
async function seen() {
  await new Promise(requestAnimationFrame);
  const title = LiteGraph.NODE_TITLE_HEIGHT;
  const box = node => {
    const drawn = document.querySelector(`[data-node-id="${node.id}"]`);
    const [width, height] = [Math.max(node.size[0], drawn?.offsetWidth ?? 0), Math.max(node.size[1], (drawn?.offsetHeight ?? title) - title)];
    return { id: node.id, type: node.type, x: node.pos[0], y: node.pos[1], width, height };
  };
  const notes = [...document.querySelectorAll('.comfy-markdown .tiptap')].map(note => [note.clientHeight, (note.lastElementChild?.offsetTop ?? 0) + (note.lastElementChild?.offsetHeight ?? 0)]);
  return { nodes: app.graph.nodes.map(box), notes, groups: app.graph.groups.map(({ title: name, pos, size }) => ({ name, x: pos[0], y: pos[1], width: size[0], height: size[1] })),
    scale: app.canvas.ds.scale, offset: [...app.canvas.ds.offset], title, width: app.canvas.canvas.clientWidth,
    smallestText: app.extensionManager.setting.get('LiteGraph.Canvas.MinFontSizeForLOD') / LiteGraph.NODE_TEXT_SIZE };
}

function problemsOf({ nodes, notes, groups, scale, offset, title, width, smallestText }) {
  const problems = [];
  if (scale < smallestText) problems.push(`opens at a zoom of ${scale.toFixed(2)}, and no text is drawn below ${smallestText.toFixed(2)}`);
  for (const [height, needed] of notes) if (needed > height) problems.push(`the note is cut off: ${height} of ${needed}`);
  const full = nodes.map(node => ({ ...node, top: node.y - title, right: node.x + node.width, bottom: node.y + node.height }));
  const shown = full.map(node => [node.x, node.right].map(x => (x + offset[0]) * scale));
  if (shown.some(([left, right]) => left < 0 || right > width)) problems.push('is wider than the screen when it opens');
  full.forEach((node, index) => {
    for (const other of full.slice(index + 1)) {
      if (node.x < other.right && other.x < node.right && node.top < other.bottom && other.top < node.bottom) {
        problems.push(`node ${node.id} (${node.type}) lies over node ${other.id} (${other.type})`);
      }
    }
    for (const group of groups) {
      const [right, bottom] = [group.x + group.width, group.y + group.height];
      const within = node.x >= group.x && node.x < right && node.y >= group.y && node.y < bottom;
      if (within && (node.right > right || node.bottom > bottom)) problems.push(`node ${node.id} (${node.type}) sticks out of the group ${group.name}`);
    }
  });
  return problems;
}

// Opens every workflow in both styles -> the sizes that its nodes need, {workflow: {id: [width, height]}}.
// check: runs and reports one look; open: opens a workflow; atRest: waits until nothing moves.
export async function lookAtAll(page, names, { check, open, atRest }) {
  const sizes = {};
  for (const style of ['classic', 'new']) {
    await page.evaluate(async modern => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', modern), style === 'new');
    await atRest();
    for (const name of names) {
      await check(`look_${name}_${style}`, async () => {
        await open(name);
        await atRest();
        const look = await page.evaluate(seen);
        sizes[name] ??= {};
        for (const { id, width, height } of look.nodes) {
          sizes[name][id] = [width, height].map((side, axis) => Math.max(Math.ceil(side), sizes[name][id]?.[axis] ?? 0));
        }
        return problemsOf(look);
      });
    }
  }
  await page.evaluate(async () => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false));
  await atRest();
  return sizes;
}
