"""Where datasets may lie and trainings are kept: names that come with a workflow reach nothing else."""

import os
import re
from pathlib import Path

import folder_paths

from ..config import Step1XError

OUTPUT_FOLDER = "step1x_training"
NAME = re.compile(r"\w[\w .-]*")


def input_root() -> Path:
    return Path(os.path.abspath(folder_paths.get_input_directory()))


def dataset_path(dataset: str) -> Path:
    """A folder or file in the input folder. Raises Step1XError for any other."""
    root = input_root()
    path = Path(os.path.abspath(root / dataset))
    if not dataset.strip() or not path.is_relative_to(root):
        raise Step1XError(f"'{dataset}' names no dataset. Put its folder into {root} and write the folder's name into dataset.")
    return path


def run_folder(name: str) -> Path:
    """The folder of the training of this name. Raises Step1XError for what is no plain name."""
    if not NAME.fullmatch(name) or name != name.strip(" ."):
        raise Step1XError(f"'{name}' cannot be the name of a training. Use letters, digits, spaces, dots, dashes and underscores.")
    return Path(folder_paths.get_output_directory(), OUTPUT_FOLDER, name)
