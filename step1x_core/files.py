"""Files that are there whole or not at all, names that every system can store, and paths that stay where they belong."""

import hashlib
import io
import os
import threading
from collections.abc import Callable
from pathlib import Path, PureWindowsPath

from PIL import Image, ImageOps

from .errors import Step1XError

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

# Characters that file names cannot have on some system.
FORBIDDEN = frozenset('<>:"/\\|?*')
# What Windows takes for a device whatever its suffix is; its digits may be superscripts.
DEVICES = frozenset(("con", "prn", "aux", "nul", "conin$", "conout$", *(f"{port}{digit}" for port in ("com", "lpt") for digit in "0123456789¹²³")))
# File systems take 255 bytes; a suffix and the mark of a half-written file stand behind the name.
LONGEST_NAME = 200


def name_fault(name: str) -> str | None:
    """Why this cannot be the name of a file or folder on every system; None where it can."""
    if not isinstance(name, str) or not name.strip(". "):
        return "it is empty"
    if any(char < " " or char == "\x7f" or "\ud800" <= char <= "\udfff" for char in name) or FORBIDDEN & set(name):
        return f"it contains a control character or one of {' '.join(sorted(FORBIDDEN))}"
    if name != name.strip() or name.endswith("."):
        return "a file name must not start with a space, or end with a space or a dot"
    if name.split(".")[0].strip().lower() in DEVICES:
        return "Windows reserves that name for a device"
    if len(name.encode()) > LONGEST_NAME:
        return (
            f"it is {len(name.encode())} bytes long; the limit is {LONGEST_NAME} (a character of another alphabet "
            "takes up to four)"
        )
    return None


def check_name(name: str, what: str) -> str:
    """The name itself if it can be that of a file or folder. Raises Step1XError for any other: it must not lead anywhere else."""
    fault = name_fault(name)
    if fault:
        raise Step1XError(f"{str(name)[:80]!r} cannot be a {what}: {fault}. Choose another name.")
    return name


def _inside(path: str, root: str) -> bool:
    return Path(path).is_relative_to(root)


def safe_path(base: Path, name: str | Path, root: Path | None, place: str) -> Path:
    """The file that a dataset names, absolute. base: what a relative name starts at; root: where it must lie, None: anywhere; place: who names it.

    Nothing on the disk is touched before the name itself is found to stay inside: to look at a network path already reaches another machine.
    A link may lead wherever the owner has put all of `base`, and nowhere else outside of `root`.

    Raises Step1XError for what leads out: absolute names, `..`, drives and network paths of Windows on every system, and links.
    """
    text = str(name)
    windows = PureWindowsPath(text)
    foreign = os.name != "nt" and ("\\" in text and ".." in windows.parts or windows.drive and not text.startswith("/"))
    path = os.path.abspath(os.path.join(base, text)) if "\0" not in text else ""
    if "\0" in text or root is not None and (foreign or not _inside(path, os.path.abspath(root))):
        raise Step1XError(
            f"{place} names an image outside its folder: {text[:200]!r} is not inside {root}. Move the images into "
            "that folder."
        )
    if root is not None:
        real = os.path.realpath(path)
        if not any(_inside(real, os.path.realpath(folder)) for folder in (root, base)):
            raise Step1XError(
                f"{place} names the file {text[:200]!r}, a link that points outside {root}. Replace the link with the "
                "file itself."
            )
    return Path(path)


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Have a file written beside its place and then moved there; what is left of a failed one is removed. write: is called with the path to write to.

    Raises whatever `write` does, and OSError where the disk is full or write-protected.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = f".{os.getpid()}-{threading.get_ident()}.part"
    # With the mark behind it the name must still fit.
    partial = path.with_name(path.name.encode()[:LONGEST_NAME].decode(errors="ignore") + mark)
    try:
        write(partial)
        os.replace(partial, path)
    except BaseException:
        try:
            partial.unlink(missing_ok=True)
        except OSError:
            pass  # the first error is the one to tell
        raise


def unwritable(what: Path | str, problem: Exception) -> Step1XError:
    return Step1XError(
        f"{what} cannot be written ({problem}). Free disk space, or check the permissions of that folder."
    )


def write_file(path: Path, content: bytes) -> None:
    """Write a file that is there as a whole or not at all. Raises Step1XError where the disk is full or write-protected."""
    try:
        write_whole(path, lambda partial: _write(partial, content))
    except OSError as problem:
        raise unwritable(path, problem) from problem


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def open_picture(content: bytes | Path, name: str) -> Image.Image:
    """A picture from a file or its bytes, as RGB and the right way up. Raises Step1XError for anything that is no picture."""
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    # The decoders raise many things on damaged files: SyntaxError, struct.error, ...
    except Exception as problem:
        raise Step1XError(f"{name} cannot be read as an image ({problem}). Replace the file.") from problem


def is_picture(path: Path) -> bool:
    """Whether there is a file that holds a whole picture."""
    try:
        with Image.open(path) as picture:
            picture.verify()
    except Exception:  # see open_picture
        return False
    return True


def png(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


def save_picture(path: Path, content: bytes) -> None:
    """Write a picture file. Raises Step1XError for content that is no picture."""
    open_picture(content, f"The image for {path}")
    write_file(path, content)


def content_key(*parts: str | bytes | int) -> str:
    """A name that changes with any of the parts."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:40]
