#!/usr/bin/env python3
"""Speed of the text encoder: encoding, replies, and the text of a reflection loop: `python benchmarks/gpu_text.py`.

The weights are random and full-size, the replies of fixed length. transformers' generate runs on the same weights in the same process.
Also checks that captured and uncaptured replies are equal, that a reply is the same alone and in a batch, and how long a cancel takes.
`--tiny` runs the same code with a miniature model, on a CPU too: it shows that the script works, not how fast anything is.
"""

import argparse
import statistics
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).absolute().parent.parent / "scripts" / "support"))
import environment
import gpu_edit

PARTS = ("encode", "write", "rates", "check", "cancel", "profile", "transformers", "loop")
# Tokens of the replies to the calls of the loop.
SCRIPT = {
    "rewrite": 120,
    "description": 200,
    "consistency": 250,
    "reflection": 150,
    "edit_score": 80,
    "quality_score": 80,
}
REPLIES = {
    "rewrite": "Make the cup red.",
    "description": "A red cup.",
    "consistency": '{"meets_instruction": "yes", "raw_score": 9, "reason": ""}',
    "reflection": "<#Think>Well done.<#Success>",
    "edit_score": '{"score": [8, 8], "reasoning": ""}',
    "quality_score": '{"score": [8, 8], "reasoning": ""}',
}
WORDS = "Describe what has changed between both images and say whether it is what the instruction asks for. "


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", choices=("bf16", "fp8"), default=["bf16", "fp8"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tokens", type=int, default=256, help="length of the timed replies")
    parser.add_argument("--prompt", type=int, default=420, help="tokens of the prompt")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further part after so many seconds")
    parser.add_argument(
        "--dynamic-vram",
        action="store_true",
        help="with the memory manager that ComfyUI switches on at its start on NVIDIA cards",
    )
    parser.add_argument("--tiny", action="store_true", help="a miniature model")
    parser.add_argument(
        "--models", type=Path, help="keep the checkpoints in this folder, or take those that an earlier run kept there"
    )
    return parser.parse_args()


def seconds(call, repeats: int = 3) -> float:
    times = {}
    for number in range(-1, repeats):
        with gpu_edit.Clock(times, number):
            call()
    return statistics.median(times[number] for number in range(repeats))


def bandwidth() -> float:
    """Bytes a second that a copy reads and writes; 0 without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), 10)


def weight_bytes(clip) -> int:
    """Bytes of the weights that a token reads."""
    model = clip.cond_stage_model.qwen25_7b.transformer.model
    return sum(weight.numel() * getattr(weight, "_qdata", weight).element_size()
               for name, weight in model.named_parameters() if "embed_tokens" not in name)


class Bench:
    """One text encoder and what is asked of it."""

    def __init__(self, clip, options):
        import torch

        self.clip, self.options = clip, options
        random = torch.Generator().manual_seed(0)
        side = 112 if options.tiny else 1024
        self.picture = torch.rand(side, side, 3, generator=random)
        words = WORDS
        while len(clip.tokenizer.token_ids(words)) < options.prompt - 30:
            words += WORDS
        self.words = words

    def questions(self, count: int, temperature: float = 0.7, content=None):
        from step1x_core.host.reasoning.generation import Question

        return [Question("You judge images.", content or [self.words], seed, temperature) for seed in range(count)]

    def write(self, count: int, tokens: int, temperature: float = 0.7, content=None) -> list[str]:
        from step1x_core.host.reasoning.generation import generate_texts

        return generate_texts(self.clip, self.questions(count, temperature, content), tokens)

    def ids(self, count: int, tokens: int, temperature: float = 0.7, first: int = 0) -> list[list[int]]:
        """Replies to prompts of unequal length, as ids."""
        from step1x_core.prompts.chat import chat

        sequences = [
            self.clip.tokenizer.tokenize_chat(*chat("You judge images.", [self.words[: 40 + 150 * row]]))["qwen25_7b"][
                0
            ]
            for row in range(first, first + count)
        ]
        return self.clip.generate(
            {"qwen25_7b": sequences},
            max_length=tokens,
            temperature=[temperature] * count,
            seed=list(range(first, first + count)),
            repetition_penalty=1.05,
            top_k=50,
            top_p=0.9,
        )


@contextmanager
def uncaptured():
    import comfy.cli_args

    with mock.patch.object(comfy.cli_args.args, "disable_cuda_graphs", True, create=True):
        yield


@contextmanager
def through_modules():
    """The host's linear layers in place of the pack's kernels."""
    from step1x_core.host.prompts.decoding import KernelSteps

    with mock.patch.object(KernelSteps, "fits", lambda self: False):
        yield


def encode(bench: Bench, say) -> None:
    clip, picture = bench.clip, bench.picture[None]

    def run():
        return clip.encode_from_tokens(clip.tokenize(gpu_edit.PROMPT, images=[picture]))

    say(f"encode one prompt with a picture {seconds(run):.3f} s")


def rates(bench: Bench, count: int, tokens: int, repeats: int) -> tuple[float, float, float]:
    """Seconds to the first token, tokens a second of the whole reply and after its first tokens, of all replies
    together."""
    first, part, whole = (
        seconds(lambda length=length: bench.write(count, length), repeats) for length in (1, tokens // 4, tokens)
    )
    return first, count * tokens / whole, count * (tokens - tokens // 4) / (whole - part)


def speeds(bench: Bench, say) -> None:
    """The limit, and one reply and eight of them as the pack writes them."""
    import torch

    from step1x_core.host.prompts.decoding import hosts_attention_agrees

    limit = bandwidth() / weight_bytes(bench.clip)
    say(
        f"weights of a token {weight_bytes(bench.clip) / 1e9:.2f} GB, copy {bandwidth() / 1e12:.2f} TB/s: limit {limit:.0f} tokens/s"
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    say(f"the host has attention for one token: {hosts_attention_agrees(device, 28, 4, 128)}")
    started = time.perf_counter()
    bench.write(1, 40)
    say(f"first call of all, kernels compiled: {time.perf_counter() - started:.1f} s")
    for count in (1, 8):
        first, whole, later = rates(bench, count, bench.options.tokens, 3)
        say(
            f"{count} at a time: first token {first:.3f} s, {whole:.1f} tokens/s whole, {later:.1f} after the first quarter"
        )
    say(
        f"first token of a question with a picture: {seconds(lambda: bench.write(1, 1, content=[bench.picture, 'What?'])):.3f} s, "
        f"of 8: {seconds(lambda: bench.write(8, 1, content=[bench.picture, 'What?'])):.3f} s"
    )


def write(bench: Bench, say) -> None:
    """`speeds`, and the same without a graph and without the pack's kernels."""
    import torch

    speeds(bench, say)
    for name, way in (("uncaptured", uncaptured), ("through modules, captured", through_modules)):
        with way():
            for count in (1, 8):
                say(f"{name}, {count} at a time: {rates(bench, count, bench.options.tokens // 2, 1)[2]:.1f} tokens/s")
    if torch.cuda.is_available():
        say(
            f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB allocated, {torch.cuda.max_memory_reserved() / 2**30:.2f} reserved, "
            f"now {torch.cuda.memory_allocated() / 2**30:.2f}"
        )


def same(one: list[list[int]], other: list[list[int]]) -> str:
    """How many replies are equal, and from which token on the others are not."""
    apart = [
        next((at for at, pair in enumerate(zip(a, b)) if pair[0] != pair[1]), min(len(a), len(b)))
        for a, b in zip(one, other)
        if a != b
    ]
    return f"{len(one) - len(apart)} of {len(one)} equal" + (f", the others up to token {apart}" if apart else "")


def check(bench: Bench, say) -> None:
    tokens = 100
    for temperature in (0.0, 0.7):
        together = bench.ids(6, tokens, temperature)
        with uncaptured():
            say(
                f"temperature {temperature}: captured and uncaptured: {same(together, bench.ids(6, tokens, temperature))}"
            )
        say(
            f"temperature {temperature}: together and alone: {same(together, [bench.ids(1, tokens, temperature, row)[0] for row in range(6)])}"
        )
        say(f"temperature {temperature}: twice: {same(together, bench.ids(6, tokens, temperature))}")
        with through_modules():
            say(f"temperature {temperature}: kernels and modules: {same(together, bench.ids(6, tokens, temperature))}")


def cancel(bench: Bench, say) -> None:
    import comfy.model_management

    for count in (1, 8):
        timer = threading.Timer(
            0.1 if bench.options.tiny else 1.0,
            lambda: (times.append(time.perf_counter()), comfy.model_management.interrupt_current_processing(True)),
        )
        times: list[float] = []
        timer.start()
        try:
            bench.write(count, 2000)
            say(f"cancel of {count}: the reply ended before")
        except comfy.model_management.InterruptProcessingException:
            say(f"cancel of {count}: raised {time.perf_counter() - times[0]:.3f} s later")
        timer.join()
        comfy.model_management.interrupt_current_processing(False)
        started = time.perf_counter()
        bench.write(1, 8)
        say(f"   the next reply of 8 tokens takes {time.perf_counter() - started:.3f} s")


def profile(bench: Bench, say) -> None:
    import torch

    if not torch.cuda.is_available():
        return
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    for count in (1, 8):
        with record(activities=[ProfilerActivity.CUDA]) as events:
            bench.write(count, 64)
            torch.cuda.synchronize()
        kernels = [event for event in events.key_averages() if event.device_time_total]
        say(
            f"{count} at a time, 64 tokens: {sum(event.device_time_total for event in kernels) / 1000:.1f} ms in {sum(event.count for event in kernels)} kernels"
        )
        for event in sorted(kernels, key=lambda event: -event.device_time_total)[:22]:
            say(
                f"   {event.device_time_total / 1000:8.2f} ms {event.count:6d} x {event.device_time_total / event.count:8.1f} us  {event.key[:90]}"
            )


def by_transformers(bench: Bench, say) -> None:
    """The same sizes with weights of its own."""
    import torch
    import transformers

    config = gpu_edit.FULL_MLLM
    if bench.options.tiny:
        import tiny_models

        config = tiny_models.TINY_MLLM
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = {key: value for key, value in config.items() if key != "vision_config"}
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        try:
            whole = transformers.Qwen2_5_VLConfig(
                text_config=text, vision_config=config["vision_config"], tie_word_embeddings=False
            )
            with mock.patch.object(transformers.PreTrainedModel, "init_weights", lambda self: None):
                model = transformers.Qwen2_5_VLForConditionalGeneration(whole).eval()
        finally:
            torch.set_default_dtype(torch.float32)
    for name, weight in model.named_parameters():
        weight.data.fill_(1.0) if "norm" in name else weight.data.normal_(0, 0.02)
    tokens = bench.options.tokens // 2
    for count in (1, 8):
        ids = torch.randint(1000, 100000, (count, bench.options.prompt), device=device)

        def run(length, ids=ids):
            return model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=length,
                min_new_tokens=length,
                pad_token_id=151643,
            )

        first, whole = (seconds(lambda length=length: run(length), 1) for length in (1, tokens))
        say(f"transformers, {count} at a time: first token {first:.3f} s, {count * tokens / whole:.1f} tokens/s")


def loop(bench: Bench, say) -> None:
    """The text of a v1.2 loop of two rounds. Replies have the scripted lengths; what is read of them is scripted, too."""
    from step1x_core.host.reasoning import thinking
    from step1x_core.reasoning.conversation import LAYOUTS, RULES
    from step1x_core.reasoning.templates import LANGUAGES, load_templates

    systems = {load_templates(language)[f"{name}.system"]: name for language in LANGUAGES for name in LAYOUTS}
    times: dict[str, float] = {}
    one, several = thinking.generate_text, getattr(thinking, "generate_texts", None)

    def ask(clip, system, content, max_tokens, seed, temperature, *args, **kwargs):
        name = systems[system]
        started = time.perf_counter()
        one(clip, system, content, SCRIPT[name], seed, temperature, *args, **kwargs)
        times[name] = times.get(name, 0.0) + time.perf_counter() - started
        return REPLIES[name]

    def ask_together(clip, questions, max_tokens, *args, **kwargs):
        names = [systems[question.system] for question in questions]
        started = time.perf_counter()
        several(clip, questions, max(SCRIPT[name] for name in names), *args, **kwargs)
        times["+".join(names)] = times.get("+".join(names), 0.0) + time.perf_counter() - started
        return [REPLIES[name] for name in names]

    picture = bench.picture[None]
    with (
        mock.patch.object(thinking, "generate_text", ask),
        mock.patch.object(thinking, "generate_texts", ask_together, create=True),
    ):
        for _ in range(2):
            times.clear()
            started = time.perf_counter()
            thinking.rewrite(bench.clip, picture, "make the cup red", 0, 0.7)
            for number in range(2):
                bench.clip.encode_from_tokens(bench.clip.tokenize(gpu_edit.PROMPT, images=[picture]))
                thinking.judge(bench.clip, picture, picture.flip(2), "make the cup red", number, RULES["v1.2"])
            whole = time.perf_counter() - started
    say(f"text of two rounds {whole:.2f} s: " + ", ".join(f"{name} {value:.2f}" for name, value in times.items()))


def main() -> int:
    import torch

    options = arguments()
    if options.dynamic_vram:  # Modules of the host bind its library when they are imported.
        import comfy_aimdo.control

        comfy_aimdo.control.init()
    environment.use_host_in_process(cpu=not torch.cuda.is_available())
    import comfy.model_management
    import comfy.utils
    from comfyui_version import __version__ as host_version

    from step1x_core.host.checkpoints.loading import load_text_encoder

    comfy.utils.set_progress_bar_enabled(False)
    if options.dynamic_vram:
        gpu_edit.use_dynamic_vram()
    device = comfy.model_management.get_torch_device()
    print(
        f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}, ComfyUI {host_version}"
        f"{', dynamic VRAM' if options.dynamic_vram else ''}{' (miniature)' if options.tiny else ''}, prompt of {options.prompt} tokens, replies of {options.tokens}",
        flush=True,
    )
    begun = time.perf_counter()
    steps = {
        "encode": encode,
        "write": write,
        "rates": speeds,
        "check": check,
        "cancel": cancel,
        "profile": profile,
        "transformers": by_transformers,
        "loop": loop,
    }
    with (
        gpu_edit.models_folder(options.models) as folder,
        torch.inference_mode(),
    ):
        paths = gpu_edit.write_language_models(folder, options.tiny, device, options.formats, fp8_head=True)
        for number, name in enumerate(options.formats):
            clip = load_text_encoder(paths[name], "v1.2")
            bench = Bench(clip, options)

            def say(text, name=name):
                print(f"{time.perf_counter() - begun:6.1f} {name}: {text}", flush=True)

            say("loaded")
            for part in options.parts:
                if part == "transformers" and number:
                    continue
                if time.perf_counter() - begun > options.seconds:
                    say(f"no time left for {part}")
                    continue
                try:
                    steps[part](bench, say)
                except Exception as error:
                    import traceback

                    traceback.print_exc()
                    say(f"{part} failed: {type(error).__name__}: {error}")
            del clip, bench
            comfy.model_management.unload_all_models()
            comfy.model_management.soft_empty_cache()
    return 0


if __name__ == "__main__":
    environment.reexecute_in_host(__file__)
    sys.exit(main())
