"""The batch of replies as a GPU writes it, with the capture of its step replaced by a call of it, and whose weights may be
read by address."""

import os
import subprocess
import sys
from contextlib import contextmanager

import comfy.model_management
import comfy.ops
import comfy.utils
import pytest
import tiny_models
import torch
from comfy.quant_ops import QuantizedTensor
from conftest import PACK

from step1x_core.host.checkpoints.loading import load_text_encoder
from step1x_core.host.prompts import writing
from step1x_core.host.prompts.decoding import causal_attention, masked_attention
from step1x_core.host.prompts.resident import lend
from step1x_core.host.prompts.writing import BLOCK, Writer
from step1x_core.prompts.chat import chat
from step1x_core.reasoning.token_sampling import Sampling

NAME = "qwen25_7b"
TEXTS = ["Hello! Rewrite: make it red", "A longer text, " * 30, "!", "What else?"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("mllm") / "mllm.safetensors"
    tiny_models.write_mllm(path, seed=5, dtype=torch.float32)
    return load_text_encoder(path)


def write(clip, texts, tokens=60, temperature=0.0, **settings):
    sequences = [clip.tokenizer.tokenize_chat(*chat(None, [text]))[NAME][0] for text in texts]
    return clip.generate(
        {NAME: sequences},
        max_length=tokens,
        temperature=[temperature] * len(texts),
        seed=list(range(len(texts))),
        repetition_penalty=1.05,
        **settings,
    )


class Replayed:
    """Stands for a CUDA graph, which the CPU has not: calls the step, all of whose tensors must lie where they lay."""

    made: list["Replayed"] = []

    def __init__(self, step):
        self.writer, self.replays, self.was_reset = step.__self__, 0, False
        self.places = self.addresses()
        self.made.append(self)

    def addresses(self):
        writer = self.writer
        static = [
            writer.tokens,
            writer.cache.lengths,
            writer.cache.positions,
            writer.sampler.count,
            writer.sampler.replies,
            writer.sampler.seen,
            writer.sampler.replied,
            writer.sampler.draws,
            *(part for layer in writer.cache.layers for part in layer),
        ]
        return [tensor.data_ptr() for tensor in static]

    def replay(self):
        assert not self.was_reset and self.addresses() == self.places
        self.writer.step()
        self.replays += 1

    def reset(self):
        self.was_reset = True


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that were made, on a CPU that is taken for a GPU with all weights in place."""
    choose = Writer.choose_steps

    def chosen(self):
        choose(self)
        self.may_capture = True

    monkeypatch.setattr(Writer, "choose_steps", chosen)
    monkeypatch.setattr(writing, "captured", Replayed)
    monkeypatch.setattr(Replayed, "made", [])
    return Replayed.made


@pytest.mark.once
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_replayed_steps_write_what_called_ones_do(clip, monkeypatch, graphs, temperature):
    found = write(clip, TEXTS, temperature=temperature)
    assert len(graphs) == 1 and graphs[0].replays == 58 and graphs[0].was_reset
    assert [write(clip, [TEXTS[0]], temperature=temperature)] == [found[:1]]
    monkeypatch.undo()
    assert write(clip, TEXTS, temperature=temperature) == found
    assert all(len(reply) == 60 and len(set(reply)) > 20 for reply in found)


def test_a_cache_that_is_full_grows_between_graphs(clip, monkeypatch, graphs):
    expected = write(clip, TEXTS)
    graphs.clear()
    monkeypatch.setattr(writing, "REPLY_TOKENS", 20)
    assert write(clip, TEXTS) == expected
    # At 21 and at 41 tokens.
    assert len(graphs) == 3 and all(graph.was_reset for graph in graphs)


def test_a_short_reply_is_not_worth_a_graph(clip, graphs):
    write(clip, TEXTS[:1], BLOCK)
    assert not graphs


def ending(monkeypatch, places):
    """Have a row's reply end with the token at its place; rows by number."""
    choose = writing.TokenSampler.choose

    def chosen(self, scores):
        tokens = choose(self, scores)
        written = int(self.count)
        for row, sampling in enumerate(self.samplings):
            if places.get(sampling.seed) == written - 1:
                tokens[row] = self.replies[row, written - 1] = writing.STOP_IDS[1]
        return tokens

    monkeypatch.setattr(writing.TokenSampler, "choose", chosen)


def test_rows_that_end_within_a_block_are_cut_there_and_leave_the_batch(clip, monkeypatch, graphs):
    free = write(clip, TEXTS)
    graphs.clear()
    ending(monkeypatch, {0: 3, 2: 20, 3: 21})
    found = write(clip, TEXTS)
    stop = [writing.STOP_IDS[1]]
    assert found == [free[0][:3] + stop, free[1], free[2][:20] + stop, free[3][:21] + stop]
    # Four rows until two or fewer go on, looked at every block; then one.
    assert len(graphs) == 2 and graphs[1].writer.tokens.shape == (1,)


def test_a_first_token_may_end_all_replies(clip, monkeypatch, graphs):
    ending(monkeypatch, dict.fromkeys(range(4), 0))
    assert write(clip, TEXTS) == [[writing.STOP_IDS[1]]] * 4 and not graphs


def test_a_cancel_stops_within_a_token_and_drops_the_graph(clip, monkeypatch, graphs):
    monkeypatch.setattr(
        comfy.utils.ProgressBar,
        "update",
        lambda self, value: comfy.model_management.interrupt_current_processing(
            bool(graphs and graphs[-1].replays == 5)
        ),
    )
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        write(clip, TEXTS)
    assert graphs[0].replays == 5 and graphs[0].was_reset
    monkeypatch.undo()
    assert len(write(clip, TEXTS[:1], 20)[0]) == 20


def test_attention_of_one_token_is_that_of_the_last_of_many():
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 16, generator=random) for heads in (6, 2, 2))
    whole = causal_attention(q, k, v, 6).unflatten(2, (6, 16))
    lengths = torch.tensor([8, 4])
    last = masked_attention(torch.stack([q[0, :, 8], q[1, :, 4]]), k, v, lengths)
    assert torch.allclose(last, torch.stack([whole[0, 8], whole[1, 4]]).flatten(1), atol=1e-6)


CPU = torch.device("cpu")


def linear(**settings):
    made = comfy.ops.manual_cast.Linear(64, 32, **{"bias": True, "dtype": torch.bfloat16, "device": "cpu"} | settings)
    if made.weight.device.type == "cpu":
        for tensor in made.state_dict().values():
            tensor.normal_()
    return made


def test_weights_in_place_are_lent_as_they_are():
    layer = linear()
    loan = lend([layer], CPU)
    part = loan.projection(layer, torch.bfloat16)
    assert part.weight.data_ptr() == layer.weight.data_ptr() and part.scale is None and torch.equal(part.bias, layer.bias)
    assert loan.projection(layer, torch.float32) is None
    loan.give_back()
    assert not loan.weights


def test_weights_elsewhere_or_patched_in_passing_are_not_lent():
    patched = linear()
    patched.weight_function = [lambda weight: weight + 1]
    lowered = linear()
    lowered.bias_lowvram_function = lambda bias: bias
    for other in (linear(device="meta"), patched, lowered):
        assert lend([linear(), other], CPU) is None


def test_a_layer_that_somebody_changed_has_no_kernel():
    hooked, smoothed, replaced = linear(), linear(), linear()
    hooked.register_forward_hook(lambda *args: None)
    smoothed.pre_quant_scale = torch.ones(64)
    replaced.forward = lambda x: x
    for layer in (hooked, smoothed, replaced, linear(dtype=torch.float16)):
        assert lend([layer], CPU).projection(layer, torch.bfloat16) is None


@pytest.mark.parametrize("layout", ["scaled", "plain"])
def test_fp8_weights_are_lent_with_their_scale(layout):
    layer = linear()
    exact = layer.weight.float()
    if layout == "scaled":
        name = "TensorCoreFP8E4M3Layout" if "TensorCoreFP8E4M3Layout" in dir(comfy.quant_ops) else "TensorCoreFP8Layout"
        layer.weight = torch.nn.Parameter(QuantizedTensor.from_float(layer.weight.data, name), requires_grad=False)
    else:
        layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    part = lend([layer], CPU).projection(layer, torch.bfloat16)
    assert part.weight.dtype == torch.float8_e4m3fn and part.scale.shape == ()
    assert ((part.weight.float() * part.scale - exact).norm() / exact.norm()) < 0.04


@pytest.mark.once
@pytest.mark.parametrize("layout", ["scaled", "plain"])
def test_fp8_weights_are_converted_once_for_several_prompts_that_read_as_each_alone(tmp_path, monkeypatch, layout):
    path = tmp_path / "mllm.safetensors"
    tiny_models.write_mllm(path, tiny_models.TINY_MLLM, scaled=layout == "scaled")
    clip = load_text_encoder(path)
    language = clip.cond_stage_model.qwen25_7b.transformer
    linears = [part for part in language.model.layers.modules() if hasattr(part, "weight_function")]
    if layout == "plain":
        for part in linears:
            part.weight = torch.nn.Parameter(part.weight.to(torch.float8_e4m3fn), requires_grad=False)
    before = [part.weight for part in linears]
    texts = ["one", "A longer prompt, " * 9, "three words here"]
    sequences = [[token for token, _ in clip.tokenizer.tokenize_chat(*chat(None, [text]))[NAME][0]] for text in texts]
    changed, convert = [], writing.converted

    @contextmanager
    def converting(modules, dtype):
        with convert(modules, dtype):
            changed.append(sum(part.weight.dtype == dtype and not isinstance(part.weight, QuantizedTensor) for part in modules))
            yield

    def read(some):
        prompts = [language.embed(sequence, CPU, torch.float32) for sequence in some]
        with writing.Writer(language, prompts, [Sampling()] * len(some), 4, torch.float32) as writer:
            return writer.read_prompts(), [part[row] for layer in writer.cache.layers for part in layer for row in range(len(some))]

    alone = torch.cat([read([sequence])[0] for sequence in sequences])
    monkeypatch.setattr(writing, "converted", converting)
    assert torch.equal(read(sequences)[0], alone)
    assert changed == [7] * len(language.model.layers)
    assert all(part.weight is weight for part, weight in zip(linears, before, strict=True))


def test_what_the_host_pinned_is_given_back_once(monkeypatch):
    """With dynamic VRAM the host brings a weight in for each use; it names the device only where it keeps the memory."""
    layer, weight = linear(device="meta"), torch.ones(32, 64, dtype=torch.bfloat16)
    layer._v = object()
    given = []
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", lambda *args: given.append(args))
    for kept in (CPU, None):
        monkeypatch.setattr(comfy.ops, "cast_bias_weight", lambda module, kept=kept, **kwargs: (weight, None, (None, kept, None)))
        loan = lend([layer], CPU)
        assert (loan is not None) == (kept is not None)
        if loan is not None:
            assert loan.weights[layer][0] is weight and not given
            loan.give_back()
            loan.give_back()
        assert [entry[0] for entry in given] == [layer] and given[0][3] == (None, kept, None)
        given.clear()


PROGRAM = """
import sys, tempfile
from pathlib import Path

sys.path[:0] = ["scripts/support"]
import environment

environment.use_host_in_process()
import tiny_models
import torch

from step1x_core.host.checkpoints.loading import load_text_encoder
from step1x_core.host.prompts.decoding import KernelSteps, ModuleSteps
from step1x_core.host.prompts.resident import lend
from step1x_core.reasoning.decode_kernels import Projection
from step1x_core.reasoning.kv_cache import Cache

config = tiny_models.TINY_MLLM | {"intermediate_size": 128}
for scaled in (False, True):
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = Path(folder) / "mllm.safetensors"
        tiny_models.write_mllm(path, config, dtype=torch.float16, scaled=scaled)
        language = load_text_encoder(path, model_options={"dtype": torch.float16}).cond_stage_model.qwen25_7b.transformer
        model = language.model.half() if not scaled else language.model
        linears = [part for part in model.layers.modules() if hasattr(part, "weight_function")]
        cpu = torch.device("cpu")
        loan = lend([model.embed_tokens, model.lm_head, *linears], cpu)
        steps = KernelSteps(model, loan, model.lm_head, torch.float16)
        # The interpreter takes minutes for the whole vocabulary.
        steps.head = Projection(steps.head.weight[:48])
        print("fits", steps.fits(), [str(part.weight.dtype) for part in steps.layers[0][1] if part])
        modules = ModuleSteps(model, language.scores, torch.float16)
        for layer in linears:
            layer._full_precision_mm = True
        caches = []
        for way in (modules, steps):
            cache = Cache(2, 1, 32, torch.tensor([3, 70]), torch.tensor([2, 64]), 100, torch.float16)
            random = torch.Generator().manual_seed(0)
            for layer in cache.layers:
                for part in layer:
                    part[:] = torch.randn(part.shape, generator=random).half()
            states = [way(tokens, cache) for tokens in (torch.tensor([5, 900]), torch.tensor([77, 3])) if cache.advance() is None]
            caches.append((torch.stack(states).float(), way.scores(states[-1])[:, :48].float()))
        for found, expected in zip(caches[1], caches[0]):
            error = ((found - expected).norm() / expected.norm()).item()
            assert error < 5e-3, error
print("fine")
"""


@pytest.mark.once
def test_a_step_on_kernels_is_the_step_through_modules():
    """In Triton's interpreter, in float16, because it multiplies no bf16."""
    pytest.importorskip("triton", reason="Triton, which is published for Linux only, is not installed")
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=PACK,
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert run.stdout.endswith("fine\n") and run.stdout.count("fits True") == 2, run.stdout + run.stderr[-3000:]
