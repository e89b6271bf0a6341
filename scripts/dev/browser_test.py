#!/usr/bin/env python3
"""Opens and runs every shipped workflow and the blueprint in Chromium, in the real ComfyUI with tiny models: `python scripts/dev/browser_test.py`.

Fails when a workflow shows a missing node, a missing model, an error or an overlap, does not finish, or has no thumbnail. It waits for states of
the editor and for word of progress, never for a time. A screenshot of each is left in output/browser. Needs Node.js and Chromium or Chrome;
--install gets what is missing: Chromium and Node.js with apt (Debian and Ubuntu, as root), and in any case the driver playwright-core with npm.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parent.parent / "support"))  # missing in an embedded Python
import environment

DRIVER = "playwright-core@1.65.1"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SCREENSHOTS = environment.PACK / "output" / "browser"
# Nothing of ComfyUI's first start.
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False}


class CannotRun(RuntimeError):
    """The browser or its driver is missing; the message says what to do."""


def find_browser() -> str | None:
    return next((path for path in map(shutil.which, BROWSERS) if path), None)


def run_installer(command: list[str], what: str) -> None:
    environment.say(" ".join(command))
    if subprocess.run(command, stdout=sys.stderr).returncode != 0:
        raise CannotRun(f"{what} could not be installed: this command failed: {' '.join(command)}")


def install_packages() -> None:
    """Chromium and Node.js where they are missing, with apt."""
    packages = (
        ([] if find_browser() else ["chromium"])
        + ([] if shutil.which("node") else ["nodejs"])
        + ([] if shutil.which("npm") else ["npm"])
    )
    if not packages:
        return
    if not shutil.which("apt-get") or os.geteuid() != 0:
        raise CannotRun(
            f"{', '.join(packages)} could not be installed: that needs Debian or Ubuntu, and root. Install it yourself and run this again."
        )
    os.environ["DEBIAN_FRONTEND"] = "noninteractive"
    run_installer(["apt-get", "update", "-qq"], ", ".join(packages))
    run_installer(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages], ", ".join(packages))


def prepare_browser(install: bool) -> tuple[str, Path]:
    """Chromium's path and the folder of its driver. Raises CannotRun."""
    if install:
        install_packages()
    browser = find_browser()
    if browser is None or not shutil.which("node"):
        raise CannotRun(
            "The browser test needs Chromium (or Chrome) and Node.js on the PATH. Install them, or run this again with "
            "--install."
        )
    folder = environment.home() / "browser" / DRIVER.replace("@", "-")
    if not (folder / "node_modules" / "playwright-core").is_dir():
        if not install:
            raise CannotRun(f"The browser test needs {DRIVER}. Run this again with --install, which gets it with npm.")
        folder.mkdir(parents=True, exist_ok=True)
        run_installer(
            [shutil.which("npm") or "npm", "install", "--prefix", str(folder), "--no-fund", "--no-audit", DRIVER],
            DRIVER,
        )
    return browser, folder


def prepare_base(base: Path) -> None:
    """The pack, tiny models, a picture with a painted mask under the name that the workflows ask for, and the editor's settings."""
    import tiny_models
    from comfy_server import install_pack
    from PIL import Image, ImageDraw

    install_pack(base)
    tiny_models.write_all(base / "models", terse=True)
    (base / "input").mkdir()
    with Image.open(environment.PACK / "assets" / "coffee.jpg") as photo:
        # As the mask editor saves it: what is painted is transparent.
        alpha = Image.new("L", photo.size, 255)
        ImageDraw.Draw(alpha).ellipse((200, 80, 400, 240), fill=0)
        photo.putalpha(alpha)
        photo.save(base / "input" / "example.png")
        for side in ("source", "target"):  # the pairs of the training workflow
            (base / "input" / "my_pairs" / side).mkdir(parents=True)
            for index in range(4):
                photo.crop((0, 0, 256, 256)).save(base / "input" / "my_pairs" / side / f"{index}.png")
                (base / "input" / "my_pairs" / side / f"{index}.txt").write_text("make it red", encoding="utf-8")
        shutil.copytree(base / "input" / "my_pairs" / "source", base / "input" / "my_sources" / "source")
    (base / "user" / "default").mkdir(parents=True)
    (base / "user" / "default" / "comfy.settings.json").write_text(json.dumps(SETTINGS), encoding="utf-8")


def test(
    browser: str, driver: Path, slowdown: float, frontend: Path | None, only_look: bool, workflows: list[str]
) -> int:
    from comfy_server import PACK_NAME, ComfyServer

    shutil.rmtree(SCREENSHOTS, ignore_errors=True)
    SCREENSHOTS.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="step1x-browser-", ignore_cleanup_errors=True) as folder:
        base = Path(folder)
        prepare_base(base)
        environment.say("starting ComfyUI")
        arguments = ("--cpu", "--front-end-root", str(frontend)) if frontend else ("--cpu",)
        with ComfyServer(Path(os.environ["STEP1X_COMFYUI"]), base, arguments=arguments) as server:
            command = [
                "node",
                str(Path(__file__).with_name("browser_test.mjs")),
                server.url,
                browser,
                str(SCREENSHOTS),
                PACK_NAME,
                str(slowdown),
                "look" if only_look else "all",
                *workflows,
            ]
            status = environment.call(command, env={**os.environ, "STEP1X_PLAYWRIGHT": str(driver)})
            shutil.copy(server.log, SCREENSHOTS)
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--install", action="store_true", help="install what is missing")
    parser.add_argument(
        "--slowdown",
        type=float,
        default=1,
        metavar="FACTOR",
        help="run the page as on a processor that is so many times slower",
    )
    parser.add_argument(
        "--look",
        action="store_true",
        help="only open every workflow in both node styles, and measure its nodes (layout.py reads that)",
    )
    parser.add_argument(
        "--frontend",
        type=Path,
        metavar="FOLDER",
        help="another version of the editor: the folder `static` of the package comfyui-frontend-package",
    )
    parser.add_argument("workflow", nargs="*", help="without .json; default: all")
    options = parser.parse_args()
    started = time.monotonic()
    try:
        browser, driver = prepare_browser(options.install)
    except CannotRun as error:
        print(f"BROWSER TEST NOT RUN: {error}", file=sys.stderr)
        return 2
    failed = test(browser, driver, options.slowdown, options.frontend, options.look, options.workflow)
    environment.say(
        f"browser test {'FAILED' if failed else 'passed'} in {time.monotonic() - started:.0f} s; screenshots and the server's log are in {SCREENSHOTS}"
    )
    return int(failed != 0)


if __name__ == "__main__":
    with environment.cancellable():
        environment.reexecute_in_host(__file__)
        sys.exit(main())
