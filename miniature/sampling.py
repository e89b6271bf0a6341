"""Editing with the plain-torch networks, measuring the results on held-out pairs, and pictures for people."""

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from step1x_core.sampling.guidance import norm_divisor, patch_norm
from step1x_core.sampling.schedule import latent_tokens, sigma_schedule
from step1x_core.versions import GUIDANCE_TRUNCATE

from .autoencoder import Autoencoder, round_trip
from .data import TEXT_LENGTH, Tokenizer
from .edits import EditPair
from .grounds import SCENES, judge
from .mllm import DemoMLLM
from .model import DemoTransformer


def guided_velocity(cond: Tensor, uncond: Tensor, t: float, cfg: float) -> Tensor:
    """Norm-limited guidance of velocities [B, 16, h, w], as the product's sampler does it."""
    difference = cond - uncond
    if t > GUIDANCE_TRUNCATE:
        difference = difference / norm_divisor(patch_norm(difference))
    return uncond + cfg * difference


@torch.no_grad()
def edit(
    transformer: DemoTransformer,
    mllm: DemoMLLM,
    vae: Autoencoder,
    pictures: Tensor,
    instructions: list[str],
    tokenizer: Tokenizer,
    steps: int = 20,
    cfg: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """uint8 pictures [B, S, S, 3] and an instruction for each -> edited pictures, uint8 [B, S, S, 3].

    As in the product, the norm limiter needs the unconditional prediction in the first few steps even at cfg 1.
    """
    device = pictures.device
    ref = vae.encode_pictures(pictures).float()

    def condition(texts):
        ids, lengths = zip(*[tokenizer(text) for text in texts], strict=True)
        return mllm(
            pictures, torch.from_numpy(np.stack(ids)).to(device), torch.tensor(lengths, device=device), TEXT_LENGTH
        )

    cond, uncond = condition(instructions), condition([""] * len(instructions))
    x = torch.randn(ref.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    sigmas = sigma_schedule(steps, latent_tokens(*ref.shape[-2:])).tolist()
    for t, t_next in zip(sigmas, sigmas[1:]):
        times = torch.full((len(x),), t, device=device)
        velocity = transformer(x, times, *cond, ref).float()
        if cfg != 1 or t > GUIDANCE_TRUNCATE:
            velocity = guided_velocity(velocity, transformer(x, times, *uncond, ref).float(), t, cfg)
        x = x + (t_next - t) * velocity
    return vae.decode_pictures(x)


def heldout_pairs(count: int, side: int, seed: int = 0, ground=SCENES) -> list[EditPair]:
    """Held-out pairs, all kinds and languages in turn."""
    return [
        ground.pair_at(
            seed,
            i,
            "heldout",
            (side, side),
            kind=ground.kinds[i % len(ground.kinds)],
            language=("en", "zh")[i // len(ground.kinds) % 2],
        )
        for i in range(count)
    ]


def stack(pairs: list[EditPair], name: str, device) -> Tensor:
    return torch.from_numpy(np.stack([getattr(pair, name) for pair in pairs])).to(device)


def success(pairs: list[EditPair], results: Tensor) -> dict[str, float]:
    """Share of successes by kind, by language, and overall."""
    verdicts = [judge(pair, result).success for pair, result in zip(pairs, results.cpu().numpy(), strict=True)]
    groups: dict[str, list[bool]] = {"all": verdicts}
    for pair, verdict in zip(pairs, verdicts, strict=True):
        for name in (pair.kind, pair.language):
            groups.setdefault(name, []).append(verdict)
    return {name: sum(group) / len(group) for name, group in groups.items()}


def ceiling(vae: Autoencoder, pairs: list[EditPair], device) -> tuple[dict[str, float], float]:
    """What a perfect transformer would reach: success of the targets after the autoencoder's round trip, and their mean absolute error (0..1)."""
    targets = stack(pairs, "target", device)
    restored = round_trip(vae, targets)
    return success(pairs, restored), (restored.float() - targets.float()).abs().mean().item() / 255


def format_success(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.0%}" for name, value in values.items())


def contact_sheet(pairs: list[EditPair], results: Tensor, columns: int = 4) -> Image.Image:
    """Source, result and true target of each pair side by side; a frame tells success (green) from failure (red)."""
    side = pairs[0].source.shape[0]
    width, height = 3 * side + 16, side + 16
    sheet = Image.new("RGB", (columns * width, -(-len(pairs) // columns) * height), "#505860")
    draw = ImageDraw.Draw(sheet)
    for index, (pair, result) in enumerate(zip(pairs, results.cpu().numpy(), strict=True)):
        x, y = index % columns * width, index // columns * height
        draw.rectangle(
            (x + 2, y + 2, x + width - 3, y + height - 3),
            outline="#40d060" if judge(pair, result).success else "#ff4040",
            width=3,
        )
        for place, pixels in enumerate((pair.source, result, pair.target)):
            sheet.paste(Image.fromarray(pixels), (x + 6 + place * (side + 2), y + 8))
    return sheet


def draw_curve(values: list[tuple[float, float]], title: str, size: tuple[int, int] = (720, 360)) -> Image.Image:
    """A line through (step, loss) points, the loss on a logarithmic axis."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = 60, 30, size[0] - 20, size[1] - 30
    draw.text((left, 8), title, fill="black")
    draw.rectangle((left, top, right, bottom), outline="#888888")
    if len(values) < 2:
        return image
    steps, losses = np.array(values, dtype=np.float64).T
    logs = np.log10(np.maximum(losses, 1e-9))
    low, high = logs.min(), max(logs.max(), logs.min() + 1e-3)
    xs = left + (steps - steps[0]) / max(steps[-1] - steps[0], 1) * (right - left)
    ys = bottom - (logs - low) / (high - low) * (bottom - top)
    draw.line(list(zip(xs.tolist(), ys.tolist())), fill="#2060c0", width=2)
    draw.text((4, top - 6), f"{10**high:.3g}", fill="black")
    draw.text((4, bottom - 6), f"{10**low:.3g}", fill="black")
    draw.text((right - 60, bottom + 8), f"step {int(steps[-1])}", fill="black")
    return image
