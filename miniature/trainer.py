"""What both training stages share: optimiser, averaged weights, learning rate over a time budget, log, checkpoints."""

import copy
import csv
import json
import math
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .data import PairStream
from .sampling import draw_curve

EMBEDDING = "mllm.model.embed_tokens.weight"
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.01
EMA_DECAY = 0.999
CLIP_NORM = 1.0
WARM_UP = 200
LAST_RATE = 0.02  # share of the peak learning rate at the end of the budget
RECORD_EVERY = 10  # steps averaged into one row of the log


def rate_factor(step: int, progress: float, warm_up: int = WARM_UP) -> float:
    """Learning rate relative to its peak: linear warm-up over steps, then a cosine over the share of the budget that is spent."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0))
    return min(1.0, (step + 1) / warm_up) * (LAST_RATE + (1 - LAST_RATE) * cosine)


def parameter_groups(modules: nn.ModuleDict, rates: dict[str, float]) -> list[dict]:
    """Matrices with weight decay and the rest without, each with its network's learning rate. Decay would wear away the embeddings of rare tokens."""
    groups = []
    for name, module in modules.items():
        for decayed in (True, False):
            chosen = [
                p
                for key, p in module.named_parameters()
                if p.requires_grad and (p.ndim > 1 and "embed_tokens" not in key) == decayed
            ]
            groups.append(
                {
                    "params": chosen,
                    "lr": rates[name],
                    "peak": rates[name],
                    "weight_decay": WEIGHT_DECAY if decayed else 0.0,
                }
            )
    return groups


class Log:
    """loss.csv and loss.png of one stage in the run's folder."""

    def __init__(self, folder: Path, stage: str, resume: bool):
        self.path = folder / f"{stage}_loss.csv"
        self.title = f"{stage}: training loss"
        self.points: list[tuple[float, float]] = []
        if resume and self.path.exists():
            with self.path.open(newline="") as file:
                self.points = [(float(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
        else:
            self.path.write_text("step,minutes,loss,rate\n")

    def add(self, step: int, elapsed: float, loss: float, rate: float) -> None:
        self.points.append((step, loss))
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow((step, f"{elapsed / 60:.3f}", f"{loss:.6f}", f"{rate:.3e}"))

    def draw(self) -> None:
        draw_curve(self.points, self.title).save(self.path.with_suffix(".png"))


class Trainer:
    """Trains `modules` on the losses that a stage computes, within `minutes` of wall time (or a number of steps) over any number of runs.

    metadata: kept in the checkpoint, with the stream's position.
    """

    def __init__(
        self,
        stage: str,
        folder: Path,
        modules: nn.ModuleDict,
        rates: dict[str, float],
        minutes: float,
        steps: int | None,
        seed: int,
        device: torch.device,
        metadata: dict,
        stream: PairStream,
        warm_up: int = WARM_UP,
        resume: bool = False,
    ):
        self.stage, self.folder, self.modules, self.device, self.metadata, self.stream = (
            stage,
            folder,
            modules,
            device,
            metadata,
            stream,
        )
        self.budget, self.max_steps, self.warm_up = minutes * 60, steps, warm_up
        self.ema = copy.deepcopy(modules).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(parameter_groups(modules, rates), betas=BETAS, fused=device.type == "cuda")
        self.parameters = dict(modules.named_parameters())
        self.averages = dict(self.ema.named_parameters())
        self.trained = [name for name, parameter in self.parameters.items() if parameter.requires_grad]
        self.generator = torch.Generator(device).manual_seed(seed)
        self.step, self.elapsed, self.finished = 0, 0.0, False
        resume = resume and self.path.exists()
        if resume:
            self.load()
        self.log = Log(folder, stage, resume)

    @property
    def path(self) -> Path:
        return self.folder / f"{self.stage}.safetensors"

    @property
    def progress(self) -> float:
        return self.step / self.max_steps if self.max_steps else self.elapsed / self.budget

    def update(self, loss: Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_([self.parameters[name] for name in self.trained], CLIP_NORM)
        factor = rate_factor(self.step, self.progress, self.warm_up)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(EMA_DECAY, self.step / (self.step + 10))
        torch._foreach_lerp_(
            [self.averages[name] for name in self.trained],
            [self.parameters[name].detach() for name in self.trained],
            1 - decay,
        )

    def run(
        self,
        compute_loss,
        batch: int,
        deadline: float,
        evaluate=None,
        log_seconds: float = 60,
        evaluate_seconds: float = 180,
    ) -> bool:
        """Trains until the budget is spent (returns True) or the deadline (of time.monotonic) has come; saves a checkpoint in any case.

        compute_loss: generator -> loss. evaluate: called with the averaged modules. The first step, which may compile, is not counted.
        """
        start = None
        before = self.elapsed
        total = torch.zeros((), device=self.device)
        last_log = last_evaluation = time.monotonic()
        logged_step = self.step
        while self.progress < 1 and time.monotonic() < deadline:
            loss = compute_loss(self.generator)
            self.update(loss)
            total += loss.detach()
            if start is None:
                total.item()
                start = last_log = time.monotonic()
                logged_step = self.step
            now = time.monotonic()
            self.elapsed = before + now - start
            if self.step % RECORD_EVERY == 0:
                value = total.item() / RECORD_EVERY
                total.zero_()
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"The loss is {value} at step {self.step}. Resume from the last checkpoint with a lower --rate."
                    )
                self.log.add(self.step, self.elapsed, value, self.optimizer.param_groups[0]["lr"])
            if now - last_log >= log_seconds:
                speed = (self.step - logged_step) * batch / (now - last_log)
                self.say(
                    f"loss {self.recent():.4f}  {speed:.0f} samples/s  rate {self.optimizer.param_groups[0]['lr']:.2e}"
                )
                last_log, logged_step = now, self.step
            if evaluate is not None and now - last_evaluation >= evaluate_seconds:
                evaluate(self.ema)
                self.save()
                last_evaluation = time.monotonic()
        self.finished = self.progress >= 1
        self.save()
        self.say(
            f"loss {self.recent():.4f}  {'finished' if self.finished else 'stopped: run the same command with --resume to go on'}"
        )
        return self.finished

    def recent(self, count: int = 20) -> float:
        losses = [loss for _, loss in self.log.points[-count:]]
        return sum(losses) / max(len(losses), 1)

    def say(self, text: str) -> None:
        print(f"[{self.stage}] {self.progress:4.0%}  step {self.step}  {self.elapsed / 60:.1f} min  {text}", flush=True)

    def moment(self, name: str, which: str) -> Tensor:
        state = self.optimizer.state.get(self.parameters[name], {})
        return state[which] if which in state else torch.zeros_like(self.parameters[name])

    def save(self) -> None:
        """Weights, averaged weights, optimiser (its moments in bf16) and random state. Embeddings only of tokens that have occurred."""
        tensors = {"rng": self.generator.get_state()}
        rows = self.moment(EMBEDDING, "exp_avg_sq").any(dim=1).nonzero()[:, 0] if EMBEDDING in self.parameters else None
        for name in self.parameters:
            parts = {"weights": self.parameters[name].detach(), "ema": self.averages[name]}
            if name in self.trained:
                parts |= {which: self.moment(name, which).bfloat16() for which in ("exp_avg", "exp_avg_sq")}
            for part, tensor in parts.items():
                tensors[f"{part}/{name}"] = (tensor[rows] if name == EMBEDDING else tensor).cpu().contiguous()
        if rows is not None:
            tensors["rows"] = rows.cpu()
        state = {
            "step": self.step,
            "elapsed": self.elapsed,
            "position": self.stream.position,
            "finished": self.finished,
            **self.metadata,
        }
        partial = self.path.with_suffix(".part")
        save_file(tensors, partial, metadata={"state": json.dumps(state)})
        partial.replace(self.path)
        self.log.draw()

    def load(self) -> None:
        tensors, state = read_checkpoint(self.path)
        rows = tensors.get("rows")
        self.step, self.elapsed, self.finished = (state[name] for name in ("step", "elapsed", "finished"))
        self.generator.set_state(tensors["rng"])
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                fill_rows(parameter, tensors[f"weights/{name}"], rows if name == EMBEDDING else None)
                fill_rows(self.averages[name], tensors[f"ema/{name}"], rows if name == EMBEDDING else None)
                if name in self.trained:
                    moments = {which: torch.zeros_like(parameter) for which in ("exp_avg", "exp_avg_sq")}
                    for which, moment in moments.items():
                        fill_rows(moment, tensors[f"{which}/{name}"], rows if name == EMBEDDING else None)
                    step = torch.tensor(float(self.step), device=self.device if self.device.type == "cuda" else "cpu")
                    self.optimizer.state[parameter] = {"step": step, **moments}


def fill_rows(target: Tensor, values: Tensor, rows: Tensor | None) -> None:
    """Copies values into the target, or into these rows of it."""
    values = values.to(target)
    if rows is None:
        target.copy_(values)
    else:
        target[rows.to(target.device)] = values


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and state of a checkpoint."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["state"])


def averaged_weights(path: Path, network: str, vocabulary: int | None = None) -> dict[str, Tensor]:
    """The averaged weights of one network of a checkpoint. Embeddings of tokens that never occurred become zero: the network ignores those best."""
    tensors, _ = read_checkpoint(path)
    prefix = f"ema/{network}."
    weights = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    if "rows" in tensors and f"ema/{EMBEDDING}" in tensors and EMBEDDING.startswith(network):
        known = tensors[f"ema/{EMBEDDING}"]
        table = known.new_zeros(vocabulary, known.shape[1])
        table[tensors["rows"]] = known
        weights[EMBEDDING.removeprefix(f"{network}.")] = table
    return weights
