"""Client of the model hubs Hugging Face and ModelScope: file lists of repositories, and GET requests with retries.

HF_ENDPOINT names another Hugging Face server such as a mirror, MODELSCOPE_DOMAIN another ModelScope server; both are
the hubs' own variables.
"""

import email.utils
import hashlib
import os
import threading
import time
from dataclasses import dataclass
from urllib.parse import quote

import requests

ATTEMPTS = 6
# Seconds before the second attempt (doubled for each further one), and the longest wait that a server may request.
FIRST_WAIT = 1.0
LONGEST_WAIT = 300.0
# Timeouts in seconds: to connect, and between two bytes.
TIMEOUT = (10, 30)
RETRIED = {408, 429, 500, 502, 503, 504}
MISSING = {401, 403, 404}  # Hugging Face answers 401 for a repository that does not exist


class HubError(RuntimeError):
    """An error whose text is written for the user at the terminal."""


class NotOnHub(HubError):
    pass


class Cancelled(Exception):
    pass


@dataclass(frozen=True)
class HubFile:
    """A file of a repository.

    path: within it, with slashes. size: bytes. checksum: of the content, in hex: SHA-256, or git's SHA-1 of a blob if
    it has 40 digits.
    """

    path: str
    size: int
    checksum: str
    url: str

    def digest(self):
        """Return a hash object whose digest of the content must equal `checksum`. Raises HubError if the hub provides
        none."""
        if len(self.checksum) == 64:
            return hashlib.sha256()
        if len(self.checksum) == 40:
            return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        raise HubError(
            f"The hub provides no checksum for {self.path}, so it is not downloaded. Try the other --source."
        )


def retry_after(response: requests.Response) -> float | None:
    """Return the seconds that a server asks to wait, given as a number or a date."""
    value = response.headers.get("Retry-After", "")
    if value.isdigit():
        return float(value)
    date = email.utils.parsedate_tz(value)
    return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else None


def get(url: str, cancelled: threading.Event, start: int = 0) -> requests.Response:
    """Return the streamed response to a GET request from byte `start` on: status 200, 206, or 416 if `start` is past
    the end.

    Connection failures, 408, 429 and 5xx are retried, ATTEMPTS times in all.
    Raises NotOnHub for what does not exist or is not public, HubError for every other failure, Cancelled.
    """
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
    for attempt in range(ATTEMPTS):
        delay = FIRST_WAIT * 2**attempt
        try:
            response = requests.get(url, headers=headers, stream=True, timeout=TIMEOUT)
        except (requests.ConnectionError, requests.Timeout) as error:
            failure = str(error).rpartition("Caused by ")[2]  # requests names the address again in front of it
        except requests.RequestException as error:
            raise HubError(
                f"{url} cannot be read ({error}). Check the hub's address and your proxy settings."
            ) from error
        else:
            if response.status_code < 400 or response.status_code == 416:
                return response
            response.close()
            if response.status_code in MISSING:
                raise NotOnHub(f"{url} does not exist or is not public (HTTP {response.status_code}).")
            failure = f"HTTP {response.status_code}"
            if response.status_code not in RETRIED:
                break
            delay = retry_after(response) or delay
        if attempt < ATTEMPTS - 1 and cancelled.wait(min(delay, LONGEST_WAIT)):
            raise Cancelled
    raise HubError(f"{url} cannot be read ({failure}). Rerun the command later to resume, or try the other --source.")


def get_json(url: str) -> dict:
    with get(url, threading.Event()) as response:
        try:
            return response.json()
        except ValueError as error:
            raise HubError(
                f"{url} did not return a list of files. Check the hub's address and your proxy settings."
            ) from error


def huggingface(repository: str) -> list[HubFile]:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    listing = get_json(f"{endpoint}/api/models/{repository}/revision/main?blobs=true")
    # One commit for all files, even if the repository changes in the meantime.
    base = f"{endpoint}/{repository}/resolve/{listing['sha']}"
    return [
        HubFile(
            entry["rfilename"],
            entry["size"],
            entry["lfs"]["sha256"] if entry.get("lfs") else entry["blobId"],
            f"{base}/{quote(entry['rfilename'])}",
        )
        for entry in listing["siblings"]
    ]


def modelscope(repository: str) -> list[HubFile]:
    domain = os.environ.get("MODELSCOPE_DOMAIN", "www.modelscope.cn").rstrip("/")
    base = f"{domain if '://' in domain else 'https://' + domain}/api/v1/models/{repository}/repo"
    listing = get_json(f"{base}/files?Revision=master&Recursive=true")
    return [
        HubFile(
            entry["Path"],
            entry["Size"],
            entry.get("Sha256") or "",
            f"{base}?Revision=master&FilePath={quote(entry['Path'], safe='')}",
        )
        for entry in listing["Data"]["Files"]
        if entry["Type"] != "tree"
    ]


SOURCES = {"huggingface": huggingface, "modelscope": modelscope}


def list_files(source: str, repository: str) -> list[HubFile]:
    """List all files of a repository on one of SOURCES.

    Raises NotOnHub for a repository that does not exist, HubError for one whose list cannot be read or names files
    outside it.
    """
    try:
        files = SOURCES[source](repository)
    except NotOnHub as error:
        raise NotOnHub(
            f"{source} has no public repository {repository}. Name another one with --repo, or the other hub with "
            "--source."
        ) from error
    except (KeyError, TypeError) as error:
        raise HubError(
            f"{source} lists the files of {repository} in an unknown format ({error!r}). Try the other hub with "
            "--source."
        ) from error
    for file in files:
        if any(part in ("", ".", "..") or "\\" in part or ":" in part for part in file.path.split("/")):
            raise HubError(
                f"{repository} on {source} lists '{file.path}', a path outside its folder. Do not use this repository."
            )
    return files
