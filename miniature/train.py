#!/usr/bin/env python3
"""Trains the miniature Step1X-Edit: first its autoencoder, then transformer, connector and language model together.

`python miniature/train.py --out run` trains within a time budget and can be continued with --resume; `train.py evaluate --out run` measures
edits of held-out scenes; `train.py export --run run --to models` writes the files that ComfyUI loads.
"""

import argparse
import copy
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from miniature import autoencoder, mllm, model, sampling
from miniature.autoencoder import DOWNSCALE, Autoencoder
from miniature.data import BLOCK, PICTURE, TEXT_LENGTH, PairStream, Pool, Tokenizer, find_tokenizer
from miniature.grounds import NAMES, SIDES, ground
from miniature.mllm import DemoMLLM
from miniature.model import SMOKE_SIZE, DemoSize, DemoTransformer, GroundingHeads
from miniature.trainer import Trainer, averaged_weights, read_checkpoint
from step1x_core.checkpoints.detection import CONFIG_KEY
from step1x_core.sampling.schedule import latent_tokens, shift_mu

FILES = {
    "transformer": "step1x-edit-demo.safetensors",
    "mllm": "qwen_2.5_vl_demo.safetensors",
    "vae": "ae_demo.safetensors",
}
VAE_WEIGHTS = "autoencoder.safetensors"

# Shares of the batch: "change nothing" with an empty instruction, beside the pairs of that kind; and the empty
# instruction with a real edit, at times when the noisy picture already shows it. The latter keeps guidance from
# overdoing an edit that is under way.
IDENTITY_SHARE, DROPPED_SHARE = 0.045, 0.04
DROPPED_TIME = 0.7
REGION_WEIGHT = 6.0
GROUNDING_WEIGHT = 0.1
RATES = {"transformer": 1.3e-3, "mllm": 2.6e-3, "grounding": 1.3e-3, "vae": 1e-3}


def sample_times(count: int, tokens: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """Times [count] in 0..1, as dense as the sampler's steps are: uniform, then the schedule's shift for this number of target tokens."""
    u = torch.rand(count, device=device, generator=generator)
    shift = torch.tensor(shift_mu(tokens), device=device).exp()
    return shift * u / (1 + (shift - 1) * u)


def edit_loss(
    networks: nn.ModuleDict, batch: dict[str, Tensor], empty: tuple[Tensor, int], generator: torch.Generator
) -> Tensor:
    """Flow-matching loss of a batch from the pool: x = t * noise + (1 - t) * target, velocity = noise - target.

    empty: token ids and length of the empty instruction.
    """
    ref, target = batch["source_latent"].float(), batch["target_latent"].float()
    count, device = len(ref), ref.device
    chance = torch.rand(count, device=device, generator=generator)
    identity, dropped = chance < IDENTITY_SHARE, chance > 1 - DROPPED_SHARE
    unsaid = identity | dropped
    ids = torch.where(unsaid[:, None], empty[0], batch["ids"]).long()
    lengths = torch.where(unsaid, empty[1], batch["length"])
    target = torch.where(identity[:, None, None, None], ref, target)
    region = batch["region"].float() * ~identity[:, None, None]

    t = sample_times(count, latent_tokens(*ref.shape[-2:]), device, generator)
    t = torch.where(dropped, t * DROPPED_TIME, t)
    noise = torch.randn(ref.shape, device=device, generator=generator)
    x = torch.lerp(target, noise, t[:, None, None, None])
    cond, mask = networks["mllm"](batch["source"], ids, lengths, TEXT_LENGTH)
    velocity, tokens, seen = networks["transformer"].run(x, t, cond, mask, ref)
    weight = 1 + (REGION_WEIGHT - 1) * region
    error = (velocity.float() - (noise - target)).square().mean(dim=1)
    # Only where the instruction is given and names a part of the picture.
    local = (~unsaid & (region.sum(dim=(1, 2)) > 0)).float()
    grounding = networks["grounding"](tokens[:, PICTURE], seen, region)
    return (error * weight).sum() / weight.sum() + GROUNDING_WEIGHT * (grounding * local).sum() / local.sum().clamp(
        min=1
    )


class Feed:
    """Keeps a pool supplied: one new pair for every `reuse` that training takes out."""

    def __init__(self, stream: PairStream, pool: Pool, reuse: float, least: int):
        self.stream, self.pool, self.reuse = stream, pool, reuse
        self.owed = 0.0
        while len(pool) < min(least, pool.capacity):
            pool.add(stream.get())

    def sample(self, count: int, generator: torch.Generator, names: tuple[str, ...]) -> dict[str, Tensor]:
        self.owed = min(self.owed + count / self.reuse, 32 * BLOCK)
        while self.owed >= BLOCK:
            block = self.stream.get(wait=False)
            if block is None:
                break
            self.pool.add(block)
            self.owed -= BLOCK
        return self.pool.sample(count, generator, names)


def autocast(device: torch.device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def common(args: argparse.Namespace, stream: PairStream, device: torch.device) -> dict:
    return {
        "folder": args.out,
        "stream": stream,
        "seed": args.seed,
        "device": device,
        "resume": args.resume,
        "steps": args.steps,
        "warm_up": args.warm_up,
    }


def begin_with(folder: Path | None, name: str, network: nn.Module) -> None:
    """The weights of an exported network in place of fresh ones. folder: where it lies, at any depth; None: do nothing."""
    if folder is not None:
        weights = load_file(next(folder.rglob(FILES[name])))
        network.load_state_dict({key: tensor.float() for key, tensor in weights.items()})


def train_autoencoder(args: argparse.Namespace, stream: PairStream, device: torch.device, deadline: float) -> bool:
    """Trains the autoencoder and writes it to the run's folder, also unfinished. Returns whether the budget is spent."""
    torch.manual_seed(args.seed)
    vae = Autoencoder()
    autoencoder.initialize(vae)
    begin_with(args.begin, "vae", vae)
    networks = nn.ModuleDict({"vae": vae}).to(device, memory_format=torch.channels_last)
    trainer = Trainer(
        "vae",
        modules=networks,
        rates=RATES | {"vae": args.rate_vae},
        minutes=args.minutes_vae,
        metadata={},
        **common(args, stream, device),
    )
    if trainer.finished:
        return True
    pool = Pool(args.pool // 2, args.side, device)
    feed = Feed(stream, pool, args.reuse, args.least)
    pairs = sampling.heldout_pairs(args.count, args.side, ground=args.edits)
    batch = args.batch_vae

    def compute_loss(generator):
        pictures = torch.cat(list(feed.sample(batch // 2, generator, ("source", "target")).values()))
        if args.crop:
            y, x = (
                int(torch.randint(args.side - args.crop + 1, (), generator=generator, device=device)) for _ in range(2)
            )
            pictures = pictures[:, y:y + args.crop, x:x + args.crop]
        with autocast(device):
            return autoencoder.autoencoder_loss(networks["vae"], pictures, generator)

    def usable(ema):
        folded = copy.deepcopy(ema["vae"])
        with autocast(device):
            autoencoder.fold_normalization(folded, pool.tensors["target"][:min(len(pool), args.least)])
        return folded

    def evaluate(ema):
        with autocast(device):
            found, error = sampling.ceiling(usable(ema), pairs, device)
        trainer.say(f"round trip: error {error:.4f}, success {sampling.format_success(found)}")

    finished = trainer.run(compute_loss, batch, deadline, evaluate, args.log_seconds, args.evaluate_seconds)
    vae = usable(trainer.ema)
    save_file({name: tensor.contiguous().cpu() for name, tensor in vae.state_dict().items()}, args.out / VAE_WEIGHTS)
    if not args.smoke:
        evaluate(trainer.ema)
    return finished


def load_autoencoder(folder: Path, device: torch.device) -> Autoencoder:
    vae = Autoencoder()
    vae.load_state_dict(load_file(folder / VAE_WEIGHTS))
    return vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def build_networks(size: DemoSize) -> nn.ModuleDict:
    """Transformer and language model with fresh weights."""
    networks = nn.ModuleDict(
        {"transformer": DemoTransformer(size), "mllm": DemoMLLM(size), "grounding": GroundingHeads(size)}
    )
    model.initialize(networks["transformer"])
    mllm.initialize(networks["mllm"])
    return networks


def train_edit(
    args: argparse.Namespace, stream: PairStream, tokenizer: Tokenizer, device: torch.device, deadline: float
) -> bool:
    """Trains transformer and language model on the autoencoder's latents. Returns whether the budget is spent."""
    torch.manual_seed(args.seed)
    networks = build_networks(args.size)
    for name in ("transformer", "mllm"):
        begin_with(args.begin, name, networks[name])
    networks.to(device)
    rates = {name: args.rate * RATES[name] / RATES["transformer"] for name in networks}
    trainer = Trainer(
        "edit",
        modules=networks,
        rates=rates,
        minutes=args.minutes,
        metadata={"size": dataclasses.asdict(args.size)},
        **common(args, stream, device),
    )
    if trainer.finished:
        return True
    if args.compile:
        # What cannot be compiled on this machine runs as it is.
        torch._dynamo.config.suppress_errors = True
        for name in ("transformer", "mllm"):
            for block in networks[name].blocks():
                block.compile(dynamic=False)
    vae = load_autoencoder(args.out, device)

    def encode(pictures):
        with autocast(device):
            return torch.cat([vae.encode_pictures(part) for part in pictures.split(64)])

    pool = Pool(args.pool, args.side, device, encode)
    feed = Feed(stream, pool, args.reuse, args.least)
    pairs = sampling.heldout_pairs(args.count, args.side, ground=args.edits)
    ids, length = tokenizer("")
    empty = (torch.from_numpy(ids).to(device), length)
    names = ("source", "source_latent", "target_latent", "region", "ids", "length")

    def compute_loss(generator):
        batch = feed.sample(args.batch, generator, names)
        with autocast(device):
            return edit_loss(networks, batch, empty, generator)

    def evaluate(ema):
        found, results = evaluate_edits(ema, vae, pairs, tokenizer, args, device)
        trainer.say(f"success {sampling.format_success(found)}")
        sampling.contact_sheet(pairs[:48], results[:48]).save(args.out / f"edits_{trainer.step:06d}.png")

    with autocast(device):
        found, error = sampling.ceiling(vae, pairs, device)
    trainer.say(f"autoencoder alone: error {error:.4f}, success {sampling.format_success(found)}")
    finished = trainer.run(compute_loss, args.batch, deadline, evaluate, args.log_seconds, args.evaluate_seconds)
    if not args.smoke:
        evaluate(trainer.ema)
    return finished


def evaluate_edits(
    networks: nn.ModuleDict,
    vae: Autoencoder,
    pairs: list,
    tokenizer: Tokenizer,
    args: argparse.Namespace,
    device: torch.device,
):
    """Success of the networks on held-out pairs, and the edited pictures."""
    results = []
    with autocast(device):
        for start in range(0, len(pairs), args.batch):
            part = pairs[start:start + args.batch]
            results.append(
                sampling.edit(
                    networks["transformer"],
                    networks["mllm"],
                    vae,
                    sampling.stack(part, "source", device),
                    [pair.instruction for pair in part],
                    tokenizer,
                    args.sampling_steps,
                    args.cfg,
                )
            )
    results = torch.cat(results)
    return sampling.success(pairs, results), results


def load_networks(folder: Path, device: torch.device) -> tuple[nn.ModuleDict, DemoSize]:
    """The averaged networks of a run."""
    size = checkpoint_size(folder)
    networks = nn.ModuleDict({"transformer": DemoTransformer(size), "mllm": DemoMLLM(size)})
    for name, network in networks.items():
        network.load_state_dict(averaged_weights(folder / "edit.safetensors", name, size.vocabulary))
    return networks.to(device).eval(), size


def checkpoint_size(folder: Path) -> DemoSize:
    values = read_checkpoint(folder / "edit.safetensors")[1]["size"]
    return DemoSize(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def evaluate(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    tokenizer = Tokenizer(find_tokenizer(args.tokenizer))
    networks, _ = load_networks(args.out, device)
    vae = load_autoencoder(args.out, device)
    pairs = sampling.heldout_pairs(args.count, args.side, seed=1, ground=args.edits)
    with autocast(device):
        found, error = sampling.ceiling(vae, pairs, device)
    print(f"autoencoder alone: error {error:.4f}, success {sampling.format_success(found)}")
    found, results = evaluate_edits(networks, vae, pairs, tokenizer, args, device)
    print(f"{args.sampling_steps} steps, cfg {args.cfg}: success {sampling.format_success(found)}")
    sampling.contact_sheet(pairs[:48], results[:48]).save(args.out / "evaluation.png")


def export(folder: Path, target: Path) -> dict[str, Path]:
    """Writes a run's networks in half precision under the names that workflows and tests expect. Returns the paths."""
    size = checkpoint_size(folder)
    weights = {
        name: averaged_weights(folder / "edit.safetensors", name, size.vocabulary) for name in ("transformer", "mllm")
    }
    weights["vae"] = load_file(folder / VAE_WEIGHTS)
    target.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, tensors in weights.items():
        paths[name] = target / FILES[name]
        config = {"mllm": size.mllm_config(), "transformer": {"version": model.VERSION}}.get(name)
        metadata = {CONFIG_KEY: json.dumps(config)} if config else None
        # The two numbers of the latent format stay exact.
        save_file(
            {key: tensor.half().contiguous() if tensor.ndim else tensor for key, tensor in tensors.items()},
            paths[name],
            metadata=metadata,
        )
    total = 0
    for path in paths.values():
        total += path.stat().st_size
        print(f"{path}  {path.stat().st_size / 1e6:.2f} MB")
    print(f"together {total / 1e6:.2f} MB")
    return paths


def train(args: argparse.Namespace) -> None:
    stop = time.monotonic() + (args.stop_after or 1e9) * 60
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.resume and any((args.out / f"{stage}.safetensors").exists() for stage in args.stages):
        sys.exit(f"{args.out} holds a training run already. Go on with --resume, or choose another folder.")
    tokenizer = Tokenizer(find_tokenizer(args.tokenizer))
    # Each command draws pairs that no earlier one has drawn.
    position = 0
    for stage in ("vae", "edit"):
        if args.resume and (args.out / f"{stage}.safetensors").exists():
            position = max(position, read_checkpoint(args.out / f"{stage}.safetensors")[1]["position"])
    stream = PairStream(args.seed, args.side, tokenizer, args.workers, position, args.kind, args.edits)
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    try:
        if "vae" in args.stages and not train_autoencoder(args, stream, device, stop):
            return
        if "edit" in args.stages and not train_edit(args, stream, tokenizer, device, stop):
            return
        print("The training is complete.")
    finally:
        stream.close()


def smoke(args: argparse.Namespace) -> None:
    """A few steps of both stages with a smaller model on the CPU. Fails unless both losses fall."""
    quick = {
        "stages": ("vae", "edit"),
        "workers": 0,
        "device": "cpu",
        "size": SMOKE_SIZE,
        "pool": 64,
        "least": 64,
        "reuse": 1e9,
        "count": 2,
        "crop": 32,
        "batch": 8,
        "batch_vae": 8,
        "steps": 20,
        "warm_up": 4,
        "compile": False,
        "resume": False,
        "log_seconds": 10,
        "evaluate_seconds": 1e9,
        "rate": 2e-3,
    }
    for name, value in quick.items():
        setattr(args, name, value)
    with tempfile.TemporaryDirectory() as folder:
        args.out = args.out if args.out_given else Path(folder)
        train(args)
        for stage in args.stages:
            with (args.out / f"{stage}_loss.csv").open() as file:
                losses = [float(line.split(",")[2]) for line in file.readlines()[1:]]
            print(f"smoke: {stage} loss {losses[0]:.4f} -> {losses[-1]:.4f}")
            if not losses[-1] < 0.9 * losses[0]:
                sys.exit(f"The loss of the stage {stage} did not fall.")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=("train", "evaluate", "export"), default="train")
    parser.add_argument("--out", "--run", type=Path, help="the run's folder (default: run)")
    parser.add_argument("--to", type=Path, default=Path("models"), help="export: folder for the files")
    parser.add_argument("--stage", choices=("vae", "edit", "all"), default="all")
    parser.add_argument("--minutes", type=float, default=21.5, help="time budget of the edit stage, over all commands")
    parser.add_argument(
        "--minutes-vae", type=float, default=2.5, help="time budget of the autoencoder stage, over all commands"
    )
    parser.add_argument(
        "--stop-after", type=float, metavar="MINUTES", help="save and stop this command after that time"
    )
    parser.add_argument("--steps", type=int, help="train each stage for so many steps instead of a time")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--smoke", action="store_true", help=smoke.__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the networks' blocks (needs a C compiler)")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="folder with the Qwen2 vocabulary (default: in the ComfyUI that STEP1X_COMFYUI names)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=14, help="processes that draw pairs")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--batch-vae", type=int, default=64)
    parser.add_argument(
        "--rate",
        type=float,
        default=RATES["transformer"],
        help="peak learning rate of the transformer; the language model has twice that",
    )
    parser.add_argument("--rate-vae", type=float, default=RATES["vae"])
    parser.add_argument("--warm-up", type=int, default=200, metavar="STEPS")
    parser.add_argument("--pool", type=int, default=60_000, help="pairs kept on the device")
    parser.add_argument("--least", type=int, default=4096, help="pairs to wait for before the first step")
    parser.add_argument("--reuse", type=float, default=5, help="how often a pair is trained on, on average")
    parser.add_argument("--ground", choices=NAMES, default="scenes", help="what is edited")
    parser.add_argument("--pictures", type=Path, help="folder of the photographs (default: scikit-image's own)")
    parser.add_argument("--begin", type=Path, metavar="FOLDER", help="start from exported networks instead of fresh ones")
    parser.add_argument("--side", type=int, help="size of the pictures in pixels (default: the ground's)")
    parser.add_argument("--kind", help="train on one kind of edit only")
    parser.add_argument("--crop", type=int, help="train the autoencoder on crops of this size")
    parser.add_argument("--count", type=int, default=128, help="held-out pairs to evaluate on")
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--log-seconds", type=float, default=60)
    parser.add_argument("--evaluate-seconds", type=float, default=180)
    args = parser.parse_args()
    args.out_given = args.out is not None
    args.out = args.out or Path("run")
    args.stages = ("vae", "edit") if args.stage == "all" else (args.stage,)
    args.size = DemoSize()
    args.side = args.side or SIDES[args.ground]
    args.edits = ground(args.ground, args.pictures)
    if args.kind not in (None, *args.edits.kinds):
        parser.error(f"--kind must be one of {', '.join(args.edits.kinds)}")
    if args.side % (4 * DOWNSCALE):
        parser.error("--side must be a multiple of 32")
    return args


def main() -> None:
    args = parse()
    if args.command == "export":
        export(args.out, args.to)
    elif args.command == "evaluate":
        evaluate(args)
    elif args.smoke:
        smoke(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
