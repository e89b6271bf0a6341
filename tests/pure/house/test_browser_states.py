"""What the browser test waits for, in Node.js without a browser: a slow machine must not fail it, a run that hangs must."""

import json
import shutil
import subprocess

import pytest
from conftest import PACK

pytestmark = pytest.mark.skipif(not shutil.which("node"), reason="Node.js is not installed")

# An editor whose run tells of progress every 100 ms, so often, and then ends as it is told to.
EDITOR = """
globalThis.requestAnimationFrame = call => setTimeout(call, 1);
const api = new EventTarget();
const tell = (name, detail) => api.dispatchEvent(Object.assign(new Event(name), { detail }));
const run = async (signs, end, name = 'progress') => {
  for (let i = 0; i < signs; i++) { await new Promise(resolve => setTimeout(resolve, 100)); tell(name, {}); }
  if (end) tell(...end);
};
"""


def in_node(code: str):
    """What the code logs last, as JSON."""
    script = f"import {{ lastingProblems, layout, queueOpenGraph, settled }} from {json.dumps((PACK / 'scripts' / 'dev' / 'browser_states.mjs').as_uri())};{EDITOR}{code}"
    done = subprocess.run(["node", "--input-type=module", "-e", script], capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("sign", ["progress", "progress_state", "executing", "b_preview"])
def test_a_run_of_any_length_is_waited_for_while_it_tells_of_progress(sign):
    code = f"""globalThis.app = {{ api, queuePrompt: async () => (run(20, ['execution_success', {{}}], '{sign}'), true) }};
               const started = Date.now();
               const problems = await queueOpenGraph(1);
               console.log(JSON.stringify([problems, Date.now() - started]));"""
    problems, milliseconds = in_node(code)
    assert problems == [] and milliseconds > 1900


@pytest.mark.parametrize(
    "signs, end, problem",
    [
        (3, None, "not finished, and no word of progress for 0.5 s"),
        (
            3,
            ["execution_error", {"node_type": "Step1XEditSampler", "node_id": "7", "exception_message": "no"}],
            "Step1XEditSampler (node 7): no",
        ),
        (0, ["execution_interrupted", {}], "the run was interrupted"),
    ],
)
def test_a_run_that_hangs_or_fails_is_a_problem(signs, end, problem):
    code = f"""globalThis.app = {{ api, queuePrompt: async () => (run({signs}, {json.dumps(end)}), true) }};
               console.log(JSON.stringify(await queueOpenGraph(0.5)));"""
    assert in_node(code) == [problem]


def test_a_graph_that_is_not_queued_is_a_problem():
    code = "globalThis.app = { api, lastNodeErrors: { 3: 'bad' }, queuePrompt: async () => false }; console.log(JSON.stringify(await queueOpenGraph(1)));"
    assert in_node(code) == ['not queued: {"3":"bad"}']


def test_sizes_are_judged_once_they_no_longer_change():
    code = """let reads = 0;
              const size = () => ({ width: Math.min(++reads, 50) });
              const rest = await settled(size, { steady: 10 });
              console.log(JSON.stringify([rest, reads]));"""
    assert in_node(code) == [{"width": 50}, 59]


def test_an_editor_that_never_rests_is_told():
    code = """let reads = 0;
              const later = () => new Promise(resolve => setTimeout(() => resolve(++reads), 5));
              console.log(JSON.stringify(await settled(later, { patience: 200 }).catch(error => error.message)));"""
    assert in_node(code).startswith("the editor did not come to rest within 0.2 s")


def test_a_problem_that_passes_is_none_and_one_that_lasts_is_told():
    code = """let reads = 0;
              const passing = async () => ++reads < 4 ? ['over another'] : [];
              const lasting = async () => ['over another'];
              console.log(JSON.stringify([await lastingProblems(passing, { pause: 1 }), await lastingProblems(lasting, { pause: 1, patience: 50 })]));"""
    assert in_node(code) == [[], ["over another"]]


def test_the_layout_is_read_after_a_frame():
    code = """globalThis.document = { querySelectorAll: selector => selector === '.comfy-markdown' ? [{ clientHeight: 9 }] : [] };
              globalThis.app = { graph: { nodes: [{ id: 1, pos: [2, 3], size: [4, 5] }] }, canvas: { ds: { scale: 1, offset: [6, 7] } } };
              console.log(JSON.stringify(await layout()));"""
    assert in_node(code) == {"nodes": [[1, 2, 3, 4, 5]], "view": [1, 6, 7], "notes": [9], "dialogs": 0}
