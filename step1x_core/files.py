"""Atomic file writes, file names that are valid on every system, and paths that cannot leave their folder."""

import hashlib
import io
import os
import threading
from collections.abc import Callable
from pathlib import Path, PureWindowsPath

from PIL import Image, ImageOps

from .errors import Step1XError

# EXIF: the tag, and its values for an image that is stored lying on its side.
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

# Characters that some file system does not allow in names.
FORBIDDEN = frozenset('<>:"/\\|?*')
# Names that Windows reserves for devices, with any suffix; their digits may be superscripts.
DEVICES = frozenset(
    (
        "con",
        "prn",
        "aux",
        "nul",
        "conin$",
        "conout$",
        *(f"{port}{digit}" for port in ("com", "lpt") for digit in "0123456789¹²³"),
    )
)
# File systems allow 255 bytes; a suffix and the mark of a partial file are appended to the name.
LONGEST_NAME = 200


def name_fault(name: str) -> str | None:
    """Return why a name is not valid for a file or folder on every system, or None if it is valid."""
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
    """Return the name if it is valid for a file or folder. Raises Step1XError if it is not, so it cannot point
    elsewhere.

    what: what the name is for, in the error.
    """
    fault = name_fault(name)
    if fault:
        raise Step1XError(f"{str(name)[:80]!r} cannot be a {what}: {fault}. Choose another name.")
    return name


def _inside(path: str, root: str) -> bool:
    return Path(path).is_relative_to(root)


def safe_path(base: Path, name: str | Path, root: Path | None, place: str) -> Path:
    """Resolve a file that a dataset names to an absolute path inside its folder.

    base: folder that a relative name starts at. root: folder the file must lie in, or None for anywhere. place: who
    names it, for the error.

    The name itself is checked before the disk is touched, because looking at a network path already contacts another
    machine. A link may point to wherever the owner keeps all of `base`, and nowhere else outside `root`.

    Raises Step1XError for names that leave `root`: absolute paths, `..`, Windows drives and network paths on every
    system, and links.
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
    """Write a file to a temporary path beside its target, then move it there. A failed write leaves nothing behind.

    write: called with the path to write to.

    Raises whatever `write` raises, and OSError if the disk is full or write-protected.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = f".{os.getpid()}-{threading.get_ident()}.part"
    # The name must still fit with the mark appended.
    partial = path.with_name(path.name.encode()[:LONGEST_NAME].decode(errors="ignore") + mark)
    try:
        write(partial)
        os.replace(partial, path)
    except BaseException:
        try:
            partial.unlink(missing_ok=True)
        except OSError:
            pass  # report the first error, not this one
        raise


def unwritable(what: Path | str, problem: Exception) -> Step1XError:
    """Return the error for a file that cannot be written."""
    return Step1XError(
        f"{what} cannot be written ({problem}). Free disk space, or check the permissions of that folder."
    )


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically. Raises Step1XError if the disk is full or write-protected."""
    try:
        write_whole(path, lambda partial: _write(partial, content))
    except OSError as problem:
        raise unwritable(path, problem) from problem


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def unreadable(name: str, problem: Exception) -> Step1XError:
    """Return the error for a file that is not an intact image."""
    return Step1XError(f"{name} cannot be read as an image ({problem}). Replace the file.")


def open_picture(content: bytes | Path, name: str) -> Image.Image:
    """Read an image from a file or its bytes, as RGB with its EXIF orientation applied. Raises Step1XError if it cannot
    be decoded."""
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    # Decoders raise many kinds of errors on damaged files: SyntaxError, struct.error, ...
    except Exception as problem:
        raise unreadable(name, problem) from problem


def picture_size(content: bytes, name: str) -> tuple[int, int]:
    """Return width and height of the image that `open_picture` would return, without decoding its pixels. Raises as
    `open_picture`."""
    try:
        with Image.open(io.BytesIO(content)) as picture:
            size = picture.size
            return size[::-1] if picture.getexif().get(ORIENTATION) in SIDEWAYS else size
    except Exception as problem:  # see open_picture
        raise unreadable(name, problem) from problem


def is_picture(path: Path) -> bool:
    """Return whether the file exists and is an intact image."""
    try:
        with Image.open(path) as picture:
            picture.verify()
    except Exception:  # see open_picture
        return False
    return True


def png(picture: Image.Image) -> bytes:
    """Encode an image as PNG."""
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


def save_picture(path: Path, content: bytes) -> None:
    """Write an image file. Raises Step1XError if the content cannot be decoded as an image."""
    open_picture(content, f"The image for {path}")
    write_file(path, content)


def content_key(*parts: str | bytes | int) -> str:
    """Return a 40-digit hash of the parts; it changes with any of them."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:40]
