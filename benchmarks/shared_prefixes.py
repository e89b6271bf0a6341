#!/usr/bin/env python3
"""How many tokens the prompts of one batch of questions have in common: `python benchmarks/shared_prefixes.py`. Runs on a CPU.

Only the first tokens that are the same could be read once for all: the system text, and images where they come next.
"""

import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parent.parent / "scripts" / "support"))
import environment

INSTRUCTION = "replace the cup of coffee with a glass of orange juice"
DESCRIPTION = "The cup is now a glass of orange juice. Everything else looks as it did before. " * 6


def main() -> int:
    environment.use_host_in_process()
    import torch

    from step1x_core.host.prompts.text_encoder import TEXT_ENCODER_NAME, Step1XTokenizer
    from step1x_core.images import picture_grid
    from step1x_core.pairs import propose
    from step1x_core.prompts.chat import chat
    from step1x_core.reasoning.conversation import LAYOUTS
    from step1x_core.reasoning.judge import judge_size
    from step1x_core.reasoning.templates import fill, load_templates

    tokenizer, images = Step1XTokenizer(), [torch.rand(1024, 1024, 3) for _ in range(2)]
    small = [torch.rand(*judge_size(1024, 1024), 3) for _ in range(2)]
    texts = load_templates("english")

    def content(name: str, source, edited) -> list:
        values = defaultdict(lambda: DESCRIPTION, instruction=INSTRUCTION)
        parts = {"source": source, "edited": edited, "text": fill(texts[f"{name}.user"], values)}
        return [parts[part] for part in LAYOUTS[name]]

    kept = []  # so that no two images have the same address

    def tokens(system: str, parts: list) -> list:
        """Ids; the tokens of an image are its address."""
        pictures = [part for part in parts if torch.is_tensor(part)]
        kept.extend(pictures)
        sequence, addresses = [], iter(f"image at {picture.data_ptr()}" for picture in pictures)
        for token, *_ in tokenizer.tokenize_chat(*chat(system, parts))[TEXT_ENCODER_NAME][0]:
            if isinstance(token, dict):
                rows, columns = picture_grid(token["data"])
                sequence += [next(addresses)] * (rows * columns)
            else:
                sequence.append(token)
        return sequence

    def show(title: str, prompts: list[list]) -> None:
        shared = next((at for at, row in enumerate(zip(*prompts)) if len(set(row)) > 1), min(map(len, prompts)))
        read = sum(map(len, prompts))
        saved = shared * (len(prompts) - 1)
        print(f"{title}: {len(prompts)} prompts of {', '.join(str(count) for count in sorted({*map(len, prompts)}))} tokens, "
              f"{shared} in common, {saved} of {read} ({saved / read:.1%}) would be read less")

    def call(name: str, source=images[0], edited=images[1]) -> list:
        return tokens(texts[f"{name}.system"], content(name, source, edited))

    show("a round of v1.2: description and both scores", [call(name) for name in ("description", "edit_score", "quality_score")])
    show("the whole round", [call(name) for name in LAYOUTS if name != "rewrite"])
    for name in ("edit_score", "quality_score"):
        show(f"GEdit judging, 16 edits, {name}", [call(name, small[0] + 0.01 * at, small[1] - 0.01 * at) for at in range(16)])
    show("GEdit judging, both questions about one edit", [call(name, *small) for name in ("edit_score", "quality_score")])
    show("proposing, 16 images", [tokens(propose.SYSTEM, [images[0] + 0.01 * at, propose.USER]) for at in range(16)])
    show("a question and its retry", [call("consistency")] * 2)
    return 0


if __name__ == "__main__":
    environment.reexecute_in_host(__file__)
    sys.exit(main())
