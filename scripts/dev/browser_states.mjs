// What browser_test.mjs waits for: states of the editor, and silence only where there is none to see. A slow machine takes longer; it does not fail.

// Waits until `read` has given the same result `steady` times in a row -> that result. Throws where it still changes after `patience` milliseconds.
export async function settled(read, { steady = 12, patience = 300000, what = 'the editor' } = {}) {
  const deadline = Date.now() + patience;
  let last, same = 0;
  while (same < steady) {
    if (Date.now() > deadline) throw new Error(`${what} did not come to rest within ${patience / 1000} s: ${last.slice(0, 300)}`);
    const now = JSON.stringify(await read());
    same = now === last ? same + 1 : 1;
    last = now;
  }
  return JSON.parse(last);
}

// Reads until there are no problems left -> []; what is still wrong after `patience` milliseconds is wrong.
export async function lastingProblems(read, { patience = 30000, pause = 250 } = {}) {
  const deadline = Date.now() + patience;
  for (;;) {
    const problems = await read();
    if (!problems.length || Date.now() > deadline) return problems;
    await new Promise(resolve => setTimeout(resolve, pause));
  }
}

// In the page: one frame has been drawn; where the nodes are and how large, what is in view, and how many dialogs are open.
export async function layout() {
  await new Promise(requestAnimationFrame);
  return { nodes: app.graph.nodes.map(node => [node.id, ...node.pos, ...node.size]), view: [app.canvas.ds.scale, ...app.canvas.ds.offset],
    notes: [...document.querySelectorAll('.comfy-markdown')].map(note => note.clientHeight), dialogs: document.querySelectorAll('[role=dialog], .p-dialog').length };
}

// In the page: queues the open graph and waits for its end -> problems. However long it takes, it goes on while the server tells of progress;
// `silence` seconds without a word are a problem.
export function queueOpenGraph(silence) {
  return new Promise(resolve => {
    const ends = { execution_success: () => [], execution_interrupted: () => ['the run was interrupted'],
      execution_error: detail => [`${detail.node_type} (node ${detail.node_id}): ${detail.exception_message}`] };
    const signs = ['execution_start', 'execution_cached', 'executing', 'executed', 'progress', 'progress_state', 'progress_text', 'b_preview'];
    let timer;
    const stop = problems => {
      Object.entries(listeners).forEach(([name, listener]) => app.api.removeEventListener(name, listener));
      clearTimeout(timer);
      resolve(problems);
    };
    const heard = () => {
      clearTimeout(timer);
      timer = setTimeout(() => stop([`not finished, and no word of progress for ${silence} s`]), silence * 1000);
    };
    const listeners = { ...Object.fromEntries(signs.map(name => [name, heard])),
      ...Object.fromEntries(Object.entries(ends).map(([name, problems]) => [name, event => stop(problems(event.detail))])) };
    Object.entries(listeners).forEach(([name, listener]) => app.api.addEventListener(name, listener));
    heard();
    app.queuePrompt(0, 1).then(queued => {
      if (!queued) stop([`not queued: ${JSON.stringify(app.lastNodeErrors ?? app.lastExecutionError).slice(0, 600)}`]);
    }, error => stop([`not queued: ${error.message}`]));
  });
}
