#!/usr/bin/env python3
"""Makes training pairs from images without any model: `python scripts/make_pairs.py IMAGES DATASET --count 1000`.

PICTURES is a folder; DATASET becomes one with the official JSON files, as `scripts/train_lora.py` and the official training code read them. Tone, weather,
restoration, style, colour and text are computed; instructions are in English and Chinese. If interrupted, rerun the command to resume.
contact_sheet.png and report.md in DATASET show what it holds. See docs/data.md.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parent / "support"))  # missing in an embedded Python
import environment


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", metavar="images", type=Path, help="a folder; subfolders are included")
    parser.add_argument("dataset", type=Path, help="a folder; created, or extended if it exists")
    parser.add_argument("--count", type=int, default=1000, help="number of pairs the dataset has in the end")
    parser.add_argument(
        "--kinds",
        default="",
        help="comma-separated; default: all of tone_transfer, style_change, color_alter, text_change",
    )
    parser.add_argument(
        "--size",
        type=int,
        default=1024,
        help="scale larger images down to this many pixels on the longer side; 0 keeps their size",
    )
    parser.add_argument("--seed", type=int, default=42, help="another seed gives other pairs of the same images")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="number of processes")
    options = parser.parse_args(argv)
    if options.count < 1 or options.workers < 1 or options.size < 0:
        parser.error("--count and --workers must be at least 1, --size at least 0")
    return options


def main(argv=None) -> int:
    options = arguments(argv)
    sys.path.append(str(environment.PACK))
    from step1x_core.errors import Step1XError
    from step1x_core.files import png, write_file
    from step1x_core.pairs.bulk import fill_dataset, find_pictures
    from step1x_core.pairs.orders import MAKERS
    from step1x_core.pairs.propose import parse_kinds
    from step1x_core.pairs.review import contact_sheet, statistics, stored_card
    from step1x_core.pairs.store import PairStore

    def tell(number: int) -> None:
        print(f"\r{number}/{options.count} pairs ", end="", file=sys.stderr, flush=True)

    started = time.monotonic()
    try:
        pictures = find_pictures(options.pictures)
        kinds = tuple(parse_kinds(options.kinds, tuple(MAKERS)))
        with PairStore(options.dataset) as store:
            tally = fill_dataset(
                store, pictures, kinds, options.count, options.seed, options.size, options.workers, tell
            )
        cards = [stored_card(options.dataset, row) for row in store.rows]
        report = f"{tally}\n\n{statistics(cards)}"
        write_file(options.dataset / "contact_sheet.png", png(contact_sheet(cards)))
        write_file(options.dataset / "report.md", (report + "\n").encode())
    except (Step1XError, OSError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    print(f"\n{report}")
    environment.say(f"{len(store.rows)} pairs in {options.dataset} after {time.monotonic() - started:.0f} s")
    if len(store.rows) < options.count:
        print(
            f"These images give no more than {len(store.rows)} different pairs of these kinds. Add images or kinds, or use another --seed.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    # Looks at --help and mistakes first: they need no environment.
    arguments()
    with environment.cancellable():
        environment.reexecute_in_host(__file__)
        sys.exit(main())
