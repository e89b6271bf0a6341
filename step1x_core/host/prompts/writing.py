"""Writes several replies at a time, as one batch: prefill, then step after step (docs/model.md, Text generation)."""

import functools
import logging

import comfy.cli_args
import comfy.model_management
import comfy.utils
import torch
from comfy.quant_ops import QuantizedTensor
from comfy.text_encoders import llama
from torch import Tensor

from ...reasoning.decode_kernels import FP8
from ...reasoning.kv_cache import Cache
from ...reasoning.token_sampling import Sampling, TokenSampler
from .decoding import KernelSteps, ModuleSteps, causal_attention, kernels_run
from .resident import Loan, converted, lend

log = logging.getLogger(__name__)

# The ids of end of text and end of turn.
STOP_IDS = (151643, 151645)
# Reply length for which memory is reserved; beyond it the cache grows by as much again.
REPLY_TOKENS = 1024
# Tokens that a graph writes before the CPU looks at them: a tenth of a second of a 7B model on an H100.
BLOCK = 16
# Tokens of several prompts that are read together, padding included, where reading them means to move the weights.
PREFILL_TOKENS = 2048


@functools.cache
def say_eager(reason: str) -> None:
    """Log once why text is written without a CUDA graph."""
    log.info("Step1X-Edit: text is written without a CUDA graph, more slowly: %s.", reason)


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which graphs are captured. One for good, because torch keeps a workspace for each."""
    return torch.cuda.Stream(device)


def captured(step) -> torch.cuda.CUDAGraph | None:
    """Capture a step, which is not run, or say why not and return None."""
    graph, stream = torch.cuda.CUDAGraph(), capture_stream(torch.device("cuda", torch.cuda.current_device()))
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
    except comfy.model_management.InterruptProcessingException:
        raise
    except Exception as error:  # an operation of the host's or of a quantised format that waits for the GPU
        log.debug("Step1X-Edit: CUDA graph", exc_info=True)
        say_eager(f"capturing it failed ({type(error).__name__})")
        return None
    torch.cuda.current_stream().wait_stream(stream)
    return graph


class Writer:
    """A batch of replies being written. `step` is the same whether captured, replayed or called.

    Use as a context: its end gives weights and memory back.
    """

    def __init__(self, language, prompts: list[tuple[Tensor, Tensor, Tensor]], samplings: list[Sampling],
                 max_tokens: int, dtype: torch.dtype):
        """language: a Qwen25VL. prompts: embeddings [1, L, C], rope positions [3, L] and ids [L] of each."""
        self.language, self.model, self.dtype = language, language.model, dtype
        self.prompts, self.max_tokens = prompts, max_tokens
        self.device = prompts[0][0].device
        self.lengths = [len(ids) for *_, ids in prompts]
        lengths = torch.tensor(self.lengths, device=self.device)
        positions = torch.stack([positions.amax() + 1 for _, positions, _ in prompts])
        # Tokens for which there is room after the longest prompt.
        self.room = min(max_tokens, REPLY_TOKENS)
        config = self.model.config
        self.cache = Cache(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, lengths, positions,
                           max(self.lengths) + self.room, dtype)
        self.sampler = TokenSampler([ids for *_, ids in prompts], config.vocab_size, samplings, max_tokens)
        self.tokens = torch.zeros(len(prompts), dtype=torch.long, device=self.device)
        self.written = 0
        self.loan: Loan | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.may_capture = False
        self.steps = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exception) -> None:
        self.drop_graph()
        if self.loan is not None:
            self.wait()  # Steps may still be reading the weights.
            self.steps = None
            self.loan.give_back()

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def drop_graph(self) -> None:
        if self.graph is not None:
            self.wait()
            self.graph.reset()
            self.graph = None

    @property
    def head(self) -> torch.nn.Module:
        return self.model.lm_head if self.model.config.lm_head else self.model.embed_tokens

    def borrow(self) -> Loan | None:
        """Take all weights that a step reads; None if some move."""
        linears = [part for part in self.model.layers.modules() if hasattr(part, "weight_function")]
        norms = [part.weight for part in self.model.modules() if isinstance(part, llama.RMSNorm)]
        if any(weight.device != self.device for weight in norms):
            return None
        return lend([self.model.embed_tokens, self.head, *linears], self.device)

    def read_prompts(self) -> Tensor:
        """Fill the cache with the prompts; returns the states of their last tokens [N, C].

        One by one, so that each gives the very states that it gives alone, and layer by layer if the layers convert
        their weights; together if the weights move for each use.
        """
        loan = self.borrow()
        limit = PREFILL_TOKENS if loan is None else 0
        converts = False
        if loan is not None:
            converts = any(weight.dtype == FP8 or isinstance(weight, QuantizedTensor) for weight, _ in loan.weights.values())
            # The host's layers take the weights for themselves, and after each use they are the host's to move.
            loan.give_back()
        spans, start = [], 0
        while start < len(self.prompts):
            end = start + 1
            while end < len(self.prompts) and (end + 1 - start) * max(self.lengths[start:end + 1]) <= limit:
                end += 1
            spans.append((start, end))
            start = end
        return self.read_spans(spans) if converts else torch.cat([self.read_spans([span]) for span in spans])

    def read_spans(self, spans: list[tuple[int, int]]) -> Tensor:
        """Fill rows of the cache, each span of them as one batch; returns the states of the last tokens [N, C]. The
        padding stands after a prompt, where no token of it looks and the reply will overwrite it."""
        xs, freqs = zip(*(self.padded(start, end) for start, end in spans))
        xs = list(xs)
        for layer, (keys, values) in zip(self.model.layers, self.cache.layers):
            comfy.model_management.throw_exception_if_processing_interrupted()
            linears = [part for part in layer.modules() if hasattr(part, "weight_function")] if len(spans) > 1 else []
            with converted(linears, self.dtype):
                for number, (start, end) in enumerate(spans):
                    xs[number], _ = layer(x=xs[number], attention_mask=None, freqs_cis=freqs[number],
                                          optimized_attention=causal_attention,
                                          past_key_value=(keys[start:end], values[start:end], 0))
        last = [x[torch.arange(end - start, device=self.device), self.cache.lengths[start:end] - 1]
                for x, (start, end) in zip(xs, spans)]
        return torch.cat([self.model.norm(states) for states in last])

    def padded(self, start: int, end: int) -> tuple[Tensor, tuple]:
        """The embeddings of the prompts start..end [end - start, L, C] and their rotation, for the host's layers."""
        config, longest = self.model.config, max(self.lengths[start:end])
        x = torch.zeros(end - start, longest, config.hidden_size, dtype=self.dtype, device=self.device)
        freqs = []
        for row, (embeds, positions, ids) in enumerate(self.prompts[start:end]):
            x[row, :len(ids)] = embeds[0]
            positions = torch.nn.functional.pad(positions, (0, longest - len(ids)))
            freqs.append(llama.precompute_freqs_cis(config.head_dim, positions, config.rope_theta, config.rope_scale,
                                                    config.rope_dims, device=self.device))
        return x, tuple(torch.stack(parts) for parts in zip(*freqs))

    def choose_steps(self) -> None:
        """Decide how the steps run: kernels where the weights lie on the GPU in a format that they take, else the
        host's modules; captured where nothing moves."""
        modules = ModuleSteps(self.model, self.language.scores, self.dtype)
        self.steps = modules
        if self.device.type != "cuda" or torch.version.hip:
            return
        self.loan = self.borrow()
        if self.loan is None:
            say_eager("not all weights of the text encoder lie on the GPU")
            return
        if self.dtype == torch.bfloat16 and kernels_run(self.device):
            steps = KernelSteps(self.model, self.loan, self.head, self.dtype)
            if steps.fits() and steps.runs():
                self.steps = steps
        # A module gives its weight back after use, and the host may then move it.
        settled = self.steps is not modules or not self.loan.pinned
        if getattr(comfy.cli_args.args, "disable_cuda_graphs", False):
            say_eager("ComfyUI was started with --disable-cuda-graphs")
        elif not settled:
            say_eager(
                "ComfyUI moves the weights of the text encoder as it needs memory, and their format has no kernel"
            )
        else:
            self.may_capture = True

    def start(self) -> None:
        """Read the prompts and choose the first tokens."""
        states = self.read_prompts()
        self.choose_steps()
        self.tokens.copy_(self.sampler.choose(self.steps.scores(states)))
        self.written = 1

    def step(self, used: int | None = None) -> None:
        """Process the last tokens and choose the next ones, all in place."""
        states = self.steps(self.tokens, self.cache, used)
        self.cache.advance()
        self.tokens.copy_(self.sampler.choose(self.steps.scores(states)))

    def write(self) -> None:
        """One more token in each row."""
        if self.written > self.room:
            self.drop_graph()
            self.cache.grow(REPLY_TOKENS)
            self.room += REPLY_TOKENS
        if self.graph is not None:
            self.graph.replay()
        elif self.may_capture:
            # The first step runs as it is, which prepares all that a capture must not do.
            self.step()
            self.graph = captured(self.step) if self.max_tokens - self.written > BLOCK else None
            self.may_capture = self.graph is not None or self.max_tokens - self.written <= BLOCK
        else:
            self.step(max(self.lengths) + self.written)
        self.written += 1

    @property
    def block(self) -> int:
        """Tokens until the CPU looks. Without a graph a token takes longer than a look."""
        return BLOCK if self.graph is not None else 1

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows."""
        self.drop_graph()
        self.cache.keep(rows)
        self.sampler.keep(rows)
        self.tokens = self.tokens[rows]
        self.lengths = [self.lengths[row] for row in rows]


def until_stop(ids: list[int]) -> list[int] | None:
    """Cut after the first stop token; None if there is none."""
    at = next((at for at, token in enumerate(ids) if token in STOP_IDS), None)
    return None if at is None else ids[:at + 1]


def write_replies(writer: Writer, max_tokens: int) -> list[list[int]]:
    """Write until every reply has its stop token or max_tokens ids; returns the ids, a stop token included.

    Finished rows stay until they are half of the batch: leaving costs a copy of the cache and a new graph, staying next
    to nothing. Raises the host's InterruptProcessingException if the user cancels, within a block of tokens.
    """
    replies, rows = {}, list(range(len(writer.prompts)))
    progress = comfy.utils.ProgressBar(max_tokens)
    writer.start()
    progress.update(1)
    looked = 0
    while True:
        if writer.written >= max_tokens or writer.written - looked >= writer.block:
            looked = writer.written
            found = writer.sampler.replies[:, :looked].tolist()
            writer.sampler.check()
            for row, ids in zip(rows, found):
                done = until_stop(ids) or (ids if looked >= max_tokens else None)
                if done is not None:
                    replies.setdefault(row, done)
            open_rows = [place for place, row in enumerate(rows) if row not in replies]
            if not open_rows:
                return [replies[row] for row in range(len(replies))]
            if 2 * len(open_rows) <= len(rows):
                writer.keep(open_rows)
                rows = [rows[place] for place in open_rows]
        comfy.model_management.throw_exception_if_processing_interrupted()
        writer.write()
        progress.update(1)
