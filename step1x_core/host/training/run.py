"""A training between two steps, and its folder: the state to go on from, the LoRA for use, and that nothing finished is
overwritten by less."""

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...checkpoints.lora_export import DIFFUSERS, PEFT, export_lora
from ...errors import Step1XError
from ...training.cache import write_tensors
from ...training.objective import (
    MAX_GRADIENT_NORM,
    WEIGHT_DECAY,
    Origin,
    Settings,
    check_origin,
    check_resumed,
    learning_rate,
    lora_layers,
    parameters,
    to_kohya,
)

log = logging.getLogger(__name__)

STATE_FILE, LORA_FILE, PROGRESS_FILE = "state.safetensors", "lora.safetensors", "progress.png"
# Under which other names the LoRA can be saved beside LORA_FILE, and where: a file, or for PEFT a folder.
EXPORTS = {DIFFUSERS: "lora_diffusers.safetensors", PEFT: "lora_peft"}
# Entries of the files' metadata.
RUN_KEY, STEPS_KEY, BASE_KEY = "step1x_training", "ss_steps", "ss_base_model_version"
BASE = "step1x-edit-"
UNKNOWN = Origin()
MOMENTS = ("exp_avg", "exp_avg_sq")


def damaged(path: Path, problem: object) -> Step1XError:
    return Step1XError(f"{path} is damaged or not a training state ({problem}). Delete it, or choose another name.")


class Run:
    """The LoRA, the optimiser and the losses so far. All that decides the next step is in the state file.

    origin: what it is trained on. metadata: what else the LoRA's file says of itself. also: names in EXPORTS under
    which the LoRA is saved, too. owns_folder: whether what lies in its folder is its own; saved: steps of its files
    there.
    """

    def __init__(
        self,
        settings: Settings,
        shapes: dict[str, tuple[int, int]],
        device: torch.device,
        origin: Origin = UNKNOWN,
        metadata: dict[str, str] | None = None,
        also: tuple[str, ...] = (),
    ):
        self.settings, self.origin, self.metadata = settings, origin, metadata or {}
        self.also = also
        self.layers = {name: layer.to(device) for name, layer in lora_layers(shapes, settings).items()}
        self.weights = parameters(self.layers)
        # One weight after the other, as on the CPU: all at once take a copy of the moments.
        self.optimiser = torch.optim.AdamW(
            self.weights.values(), lr=settings.learning_rate, weight_decay=WEIGHT_DECAY, foreach=False
        )
        self.average = {name: weight.detach().clone() for name, weight in self.weights.items()} if settings.ema else {}
        self.losses: list[float] = []
        self.owns_folder = False
        self.saved = 0

    @property
    def step(self) -> int:
        return len(self.losses)

    @property
    def trained(self) -> int:
        return sum(weight.numel() for weight in self.weights.values())

    def lora(self) -> dict[str, Tensor]:
        """The LoRA so far, in the official layout, averaged where that is on."""
        return to_kohya(self.average or self.weights, self.settings.alpha)

    def update(self, loss: float) -> None:
        """One step of the optimiser with the gradients at hand."""
        torch.nn.utils.clip_grad_norm_(self.weights.values(), MAX_GRADIENT_NORM)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.settings, self.step)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, average in self.average.items():
                average.lerp_(self.weights[name], 1 - self.settings.ema)
        self.losses.append(loss)

    def claim(self, folder: Path) -> None:
        """Make the folder this run's own: what an earlier training left in it is moved aside. Call it once there is
        something to save.

        Raises Step1XError where that cannot be moved.
        """
        if not self.owns_folder:
            move_aside(folder)
            self.owns_folder = True

    def save(self, folder: Path) -> None:
        """Two files: the state, and the LoRA so far for use, also under other names. Where the run is not ahead of them,
        only names that are missing are written.

        Raises Step1XError where they cannot be written.
        """
        if self.step <= self.saved:
            if self.owns_folder:
                self.export(folder, [layout for layout in self.also if not (folder / EXPORTS[layout]).exists()])
            return
        self.claim(folder)
        tensors = {name: weight.detach() for name, weight in self.weights.items()} | {
            "losses": torch.tensor(self.losses, dtype=torch.float64)
        }
        tensors |= {f"average.{name}": average for name, average in self.average.items()}
        for name, weight in self.weights.items():
            tensors |= {
                f"{moment}.{name}": self.optimiser.state[weight][moment]
                for moment in MOMENTS
                if weight in self.optimiser.state
            }
        write_tensors(folder / STATE_FILE, tensors, {RUN_KEY: json.dumps(asdict(self.settings) | asdict(self.origin))})
        write_tensors(folder / LORA_FILE, self.lora(), self.described())
        self.export(folder, self.also)
        self.saved = self.step

    def described(self) -> dict[str, str]:
        """What the LoRA's files say of it, by kohya's names."""
        metadata = {"ss_network_dim": self.settings.rank, "ss_network_alpha": self.settings.alpha, STEPS_KEY: self.step,
                    BASE_KEY: f"{BASE}{self.origin.version}", **self.metadata}
        return {name: str(value) for name, value in metadata.items()}

    def export(self, folder: Path, layouts: Iterable[str]) -> None:
        """Write the LoRA under other names, as in EXPORTS. Raises Step1XError where that cannot be written."""
        for layout in layouts:
            export_lora(self.lora(), folder / EXPORTS[layout], layout, self.described())

    def resume(self, folder: Path) -> None:
        """Go on where the state file ends, if there is one.

        Raises Step1XError for a damaged one, and for one of other settings, of another dataset, version or model.
        """
        path = folder / STATE_FILE
        if not path.is_file():
            return
        stored, tensors = read_state(path)
        check_resumed(stored, self.settings, str(folder))
        base = lora_metadata(folder / LORA_FILE).get(BASE_KEY, "")
        # The state of an earlier release names neither, but its LoRA has always named the version.
        check_origin({"version": base.removeprefix(BASE) or None} | stored, self.origin, str(folder))
        if any(name not in tensors or tensors[name].shape != weight.shape for name, weight in self.weights.items()):
            raise Step1XError(f"The run in {folder} is for another model. Choose another name.")
        losses = tensors.get("losses")
        if losses is None or losses.ndim != 1 or not losses.is_floating_point():
            raise damaged(path, "it holds no losses")
        copies = {f"average.{name}": average.shape for name, average in self.average.items()}
        if len(losses):
            copies |= {f"{moment}.{name}": weight.shape for name, weight in self.weights.items() for moment in MOMENTS}
        wrong = next(
            (name for name, shape in copies.items() if name not in tensors or tensors[name].shape != shape), None
        )
        if wrong:
            raise damaged(path, f"{wrong} is missing or of another shape")
        self.take(losses.tolist(), tensors)
        self.settle(folder)

    def take(self, losses: list[float], tensors: dict[str, Tensor]) -> None:
        """Losses and checked tensors of a state as this run's own."""
        self.losses = losses
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(tensors[name])
                if self.step:
                    moments = {moment: tensors[f"{moment}.{name}"].to(weight.device) for moment in MOMENTS}
                    self.optimiser.state[weight] = {"step": torch.tensor(float(self.step)), **moments}
            for name, average in self.average.items():
                average.copy_(tensors[f"average.{name}"])

    def settle(self, folder: Path) -> None:
        """What of the folder is this run's. A LoRA ahead of the state is of another run, one behind it is what a kill
        between two files left."""
        steps = lora_metadata(folder / LORA_FILE).get(STEPS_KEY, "0")
        behind = not steps.isdecimal() or int(steps) < self.step
        self.owns_folder = behind or int(steps) == self.step
        self.saved = 0 if behind else self.step


def read_state(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """What a state file says of its training, and its tensors. Raises Step1XError for a file that is damaged or none of
    ours."""
    try:
        with safe_open(path, "pt") as file:
            stored = json.loads((file.metadata() or {})[RUN_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except KeyError as problem:
        raise damaged(path, f"it has no entry {problem}") from problem
    except (OSError, SafetensorError, ValueError, TypeError, RecursionError) as problem:
        raise damaged(path, problem) from problem
    if not isinstance(stored, dict):
        raise damaged(path, f"its entry {RUN_KEY} is of another form")
    return stored, tensors


def lora_metadata(path: Path) -> dict[str, str]:
    """What a LoRA file says of itself; nothing where there is none that can be read."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def move_aside(folder: Path) -> Path | None:
    """Move an earlier training's files to FOLDER.1, or the next number that is free -> where they are; None where there
    were none.

    The files and not the folder: it may hold more than ours. The LoRA goes first, so that a kill in between loses
    nothing.
    """
    files = [folder / name for name in (LORA_FILE, *EXPORTS.values(), STATE_FILE, PROGRESS_FILE) if os.path.lexists(folder / name)]
    if not files:
        return None
    whole, number = Path(os.path.abspath(folder)), 1
    try:
        while True:
            aside = whole.with_name(f"{whole.name}.{number}")
            try:
                aside.mkdir()
                break
            except FileExistsError:
                number += 1
        for file in files:
            os.rename(file, aside / file.name)
    except (OSError, ValueError) as problem:
        raise Step1XError(
            f"The earlier run in {folder} could not be moved aside ({problem}). Move it yourself, or choose another name."
        ) from problem
    log.warning("The earlier run in %s was moved to %s.", folder, aside)
    return aside
