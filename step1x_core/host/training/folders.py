"""Where datasets may lie and trainings are kept: names that come with a workflow reach nothing else."""

import os
import re
from pathlib import Path

import folder_paths

from ...errors import Step1XError
from ...files import name_fault

OUTPUT_FOLDER = "step1x_training"
NAME = re.compile(r"\w[\w .-]*")
LONGEST_NAME = 60


def dataset_path(dataset: str) -> tuple[Path, Path]:
    """A folder or file, and which of the host's folders it lies in: the input folder, or the output folder for `NAME
    [output]`, the host's own mark, and for the whole path that 'Step1X-Edit Save Pairs' gives. Raises Step1XError
    for any other.
    """
    roots = [
        Path(os.path.abspath(folder))
        for folder in (folder_paths.get_input_directory(), folder_paths.get_output_directory())
    ]
    name, marked = folder_paths.annotated_filepath(dataset.strip())
    base = roots[0] if marked is None else Path(os.path.abspath(marked))
    path = Path(os.path.abspath(base / name))
    root = next((root for root in roots if (root == base or os.path.isabs(name)) and path.is_relative_to(root)), None)
    if not name or root is None:
        raise Step1XError(
            f"{dataset[:80]!r} names no dataset. Put its folder into {roots[0]} and enter the folder's name "
            f"as 'dataset'. For a folder in {roots[1]}, append ' [output]' to its name."
        )
    if not os.path.exists(path):  # unlike Path.is_file, it takes a name that no file can have, too
        raise Step1XError(f"There is no dataset {name[:80]!r} in {root}. Put its folder there, or correct the name.")
    return path, root


def run_folder(name: str) -> Path:
    """The folder of the training of this name. Raises Step1XError for what is no plain name."""
    if not NAME.fullmatch(name) or len(name) > LONGEST_NAME or name_fault(name):
        raise Step1XError(
            f"{name[:80]!r} cannot be the name of a training. Use at most {LONGEST_NAME} letters, digits, "
            "spaces, dots, dashes and underscores, and no device name of Windows, such as CON."
        )
    return Path(folder_paths.get_output_directory(), OUTPUT_FOLDER, name)
