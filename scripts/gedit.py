#!/usr/bin/env python3
"""GEdit-Bench for any workflow of this pack: `python scripts/gedit.py COMMAND --help`.

    miniature FOLDER    write 22 drawn items, to try the rest out
    unpack DATA FOLDER  make a folder of pictures of the hub's parquet files, which can then be read without pyarrow
    edit                run a workflow over the dataset, in a ComfyUI of its own or a running one
    judge               score what was edited, with a local Qwen2.5-VL or a web interface as OpenAI's
    report              official tables, means, plots and contact sheet

Every command may be cancelled or killed; the same command goes on where it was. docs/evaluation.md explains the files and numbers.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parent / "support"))  # missing in an embedded Python
import environment

say = environment.say
WORKFLOW = environment.PACK / "workflows" / "step1x_edit.json"
PROMPT_INPUTS = ("prompt", "prompts", "value", "text")
# Errors one after the other after which something else than the picture must be wrong.
ERRORS_IN_A_ROW = 5
OUTPUT = "gedit_output"


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, text):
        return commands.add_parser(name, help=text, description=text)

    def choice(entry):
        entry.add_argument(
            "--data",
            type=Path,
            required=True,
            help="the dataset: a folder with the hub's parquet files, or with metadata.jsonl",
        )
        entry.add_argument(
            "--results",
            type=Path,
            default=Path("results"),
            help="folder for the results, in the official layout (default: results)",
        )
        entry.add_argument("--languages", nargs="+", choices=("en", "cn"), default=["en", "cn"])
        entry.add_argument("--tasks", nargs="+", default=[], help="only these task types")
        entry.add_argument(
            "--limit", type=int, default=0, help="at most so many items of each task type in each language"
        )

    command("miniature", "Write 22 drawn items as a dataset.").add_argument("folder", type=Path)
    unpack = command("unpack", "Write a dataset as a folder of pictures.")
    unpack.add_argument("data", type=Path)
    unpack.add_argument("folder", type=Path)

    edit = command("edit", "Run a workflow over the dataset.")
    choice(edit)
    edit.add_argument("--method", required=True, help="name of what is measured; the results' folder is called so")
    edit.add_argument(
        "--workflow",
        type=Path,
        default=WORKFLOW,
        help="a workflow, as the editor saves or exports it (default: the pack's step1x_edit.json)",
    )
    edit.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE",
                      help="change a widget; NODE is a node's type or number, e.g. Step1XEditSampler.steps=20")
    edit.add_argument("--seed", type=int, default=42, help="the seed of every edit")
    edit.add_argument(
        "--batch", type=int, default=1, help="items in one run, for a workflow with Step1X-Edit Batch Images"
    )
    edit.add_argument("--image-node", help="number of the node that loads the picture, where there are several")
    edit.add_argument("--prompt-node", help="number of the node with the instruction, where there are several")
    edit.add_argument("--output-node", help="number of the node that saves the result, where there are several")
    edit.add_argument(
        "--server",
        help="address of a running ComfyUI with this pack, e.g. http://127.0.0.1:8188 (default: one is started)",
    )
    edit.add_argument(
        "--models", type=Path, help="a models folder for the ComfyUI that is started (default: that of the ComfyUI)"
    )

    judge = command("judge", "Score the edited pictures.")
    choice(judge)
    judge.add_argument("--method", required=True)
    judge.add_argument("--judge", help="name under which the judgements are kept (default: made of the model's name)")
    judge.add_argument("--mllm", type=Path, help="a local judge: Qwen2.5-VL as one file or a Hugging Face folder")
    judge.add_argument(
        "--endpoint",
        help="a judge on the web: the beginning of its address, e.g. http://localhost:8000/v1; the pictures are sent "
             "there",
    )
    judge.add_argument("--model", help="the model's name at the endpoint")
    judge.add_argument(
        "--key-variable",
        default="OPENAI_API_KEY",
        help="environment variable with the endpoint's key (default: OPENAI_API_KEY)",
    )
    judge.add_argument("--parallel", type=int, default=1, help="requests to the endpoint at the same time")
    judge.add_argument("--timeout", type=float, default=120, help="seconds for one answer of the endpoint")
    judge.add_argument("--tries", type=int, default=4, help="how often one request is made until it is answered")
    judge.add_argument(
        "--pause", type=float, default=2, help="seconds before the second try; doubled for each further one"
    )
    judge.add_argument("--seed", type=int, default=42)
    judge.add_argument("--again", action="store_true", help="ask anew about edits whose answers could not be read")

    report = command("report", "Write tables, means, plots and contact sheet.")
    choice(report)
    report.add_argument("--method", required=True, nargs="+", help="several are compared, too")
    report.add_argument("--judge", required=True)
    report.add_argument("--shown", type=int, default=6, help="best, and worst, edits on the contact sheet")
    return parser.parse_args(argv)


def chosen_items(options) -> list:
    from step1x_core.errors import Step1XError
    from step1x_core.gedit.dataset import read_dataset, select

    items = select(read_dataset(options.data), options.languages, options.tasks, options.limit)
    if not items:
        raise Step1XError(f"No item of {options.data} is of these languages and task types.")
    return items


class Workflow:
    """A workflow in API form in which picture and instruction can be exchanged. Only what leads to the result is kept.

    Raises Step1XError where it is not clear which node loads, instructs or saves.
    """

    def __init__(self, prompt: dict, options):
        self.prompt = prompt
        output = self.single(
            "saves the result",
            options.output_node,
            lambda node: node["class_type"] in ("SaveImage", "PreviewImage"),
            "SaveImage",
        )
        self.keep_what_leads_to(output)
        # A preview: it leaves nothing in the output folder of the person's ComfyUI, and its pixels are the same.
        prompt[output] = {
            "class_type": "PreviewImage",
            "inputs": {"images": prompt[output]["inputs"]["images"]},
            "_meta": {"title": OUTPUT},
        }
        self.batch_node = next((name for name in prompt if prompt[name]["class_type"] == "Step1XEditBatchImages"), None)
        if self.batch_node:
            # It gets a list of our own.
            prompt[self.batch_node]["inputs"] |= {"images": "", "combine": "pairs"}
            self.keep_what_leads_to(output)
        else:
            self.image_node = self.single(
                "loads the picture", options.image_node, lambda node: node["class_type"] == "LoadImage"
            )
        self.prompt_node = self.single("has the instruction", options.prompt_node,
                                       lambda node: node["class_type"].startswith("Step1X") and self.prompt_input(node))
        self.set_widgets(options)

    def single(self, task: str, chosen: str | None, fits, prefer: str = "") -> str:
        from step1x_core.errors import Step1XError

        found = [name for name, node in self.prompt.items() if (name == chosen if chosen else fits(node))]
        preferred = [name for name in found if self.prompt[name]["class_type"] == prefer] or found
        if len(preferred) != 1:
            listed = ", ".join(f"{name} ({self.prompt[name]['class_type']})" for name in preferred) or "none"
            option = {
                "saves the result": "--output-node",
                "loads the picture": "--image-node",
                "has the instruction": "--prompt-node",
            }[task]
            raise Step1XError(
                f"It is not clear which node of the workflow {task}; found: {listed}. Name its number with {option}."
            )
        return preferred[0]

    @staticmethod
    def prompt_input(node: dict) -> str | None:
        return next((name for name in PROMPT_INPUTS if isinstance(node["inputs"].get(name), str)), None)

    def keep_what_leads_to(self, output: str) -> None:
        wanted, waiting = set(), [output]
        while waiting:
            name = waiting.pop()
            wanted.add(name)
            waiting += [
                value[0]
                for value in self.prompt[name]["inputs"].values()
                if isinstance(value, list) and value[0] not in wanted
            ]
        for name in set(self.prompt) - wanted:
            del self.prompt[name]

    def set_widgets(self, options) -> None:
        from step1x_core.errors import Step1XError

        for node in self.prompt.values():
            for name in ("seed", "noise_seed"):
                if isinstance(node["inputs"].get(name), int):
                    node["inputs"][name] = options.seed
        for change in options.set:
            target, equals, text = change.partition("=")
            node_name, dot, name = target.rpartition(".")
            nodes = [node for number, node in self.prompt.items() if node_name in (number, node["class_type"])]
            if not equals or not dot or not nodes or any(name not in node["inputs"] for node in nodes):
                raise Step1XError(
                    f"--set {change}: the workflow has no such node or input. Write it like Step1XEditSampler.steps=20."
                )
            try:
                value = json.loads(text)
            except ValueError:
                value = text
            for node in nodes:
                node["inputs"][name] = value

    def fingerprint(self) -> str:
        """Stands for all settings: everything but picture and instruction."""
        blank = self.filled([""], [""])
        return hashlib.sha256(json.dumps(blank, sort_keys=True).encode()).hexdigest()

    def filled(self, images: list[str], instructions: list[str]) -> dict:
        """The workflow with these pictures (names in the input folder) and instructions; several need Step1X-Edit Batch Images."""
        prompt = json.loads(json.dumps(self.prompt))
        target = prompt[self.prompt_node]
        name = self.prompt_input(target)
        if not self.batch_node:
            prompt[self.image_node]["inputs"]["image"] = images[0]
            target["inputs"][name] = instructions[0]
            return prompt
        # Each line is an instruction of its own.
        target["inputs"][name] = "\n".join(" ".join(text.split()) for text in instructions)
        loads = {
            f"gedit_{i}": {"class_type": "LoadImage", "inputs": {"image": image}, "_meta": {"title": "LoadImage"}}
            for i, image in enumerate(images)
        }
        slots = {f"inputs.input{i}": [name, 0] for i, name in enumerate(loads)}
        together = {"class_type": "CreateList", "inputs": slots, "_meta": {"title": "CreateList"}}
        prompt[self.batch_node]["inputs"]["images"] = ["gedit_list", 0]
        return {**prompt, **loads, "gedit_list": together}


def load_workflow(path: Path, client, options) -> Workflow:
    from comfy_server import to_api

    from step1x_core.errors import Step1XError

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise Step1XError(f"The workflow {path} cannot be read ({problem}).") from problem
    return Workflow(to_api(content, client.get("/object_info")) if "nodes" in content else content, options)


@contextmanager
def comfyui(options):
    """A client of the running ComfyUI that was named, or of one that is started for this run."""
    from comfy_server import Client, ComfyServer, install_pack
    from demo import has_accelerator

    if options.server:
        yield Client(options.server.rstrip("/"))
        return
    tree = Path(os.environ["STEP1X_COMFYUI"])
    with tempfile.TemporaryDirectory(prefix="step1x-gedit-", ignore_cleanup_errors=True) as folder:
        install_pack(Path(folder))
        say("starting ComfyUI")
        with ComfyServer(
            tree, Path(folder), options.models or tree / "models", () if has_accelerator() else ("--cpu",)
        ) as server:
            yield Client(server.url, server.log)


def check_settings(options, workflow: Workflow) -> None:
    """Results of one method must come from one workflow. Raises Step1XError for other settings than those of the results that are there."""
    from step1x_core.errors import Step1XError
    from step1x_core.files import write_file

    path = options.results / options.method / "settings.json"
    settings = {
        "workflow": options.workflow.name,
        "changes": options.set,
        "seed": options.seed,
        "fingerprint": workflow.fingerprint(),
    }
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("fingerprint") != settings["fingerprint"]:
        raise Step1XError(
            f"{path.parent} holds results of the method '{options.method}' with another workflow or other settings. "
            "Name another method, or remove the folder."
        )
    write_file(path, (json.dumps(settings, ensure_ascii=False, indent=2) + "\n").encode())


def run_items(client, workflow: Workflow, items: list, folder: Path) -> list[bytes]:
    """The edited pictures of these items as PNG. Raises what the client raises; fewer pictures than items come out if some failed in a batch."""
    from step1x_core.files import png

    names = []
    for i, item in enumerate(items):
        path = folder / f"gedit_source_{i}.png"
        path.write_bytes(png(item.load()))
        client.upload_image(path, path.name)
        names.append(path.name)
    return client.run(workflow.filled(names, [item.instruction for item in items]), timeout=7200).images


def edit(options) -> int:
    from comfy_server import ExecutionError

    from step1x_core.errors import Step1XError
    from step1x_core.files import check_name, save_picture
    from step1x_core.gedit.dataset import result_path, unedited

    check_name(options.method, "name of a method")
    items = chosen_items(options)
    waiting = unedited(items, options.results, options.method)
    say(f"{len(items) - len(waiting)} of {len(items)} items have a result")
    if not waiting:
        return 0
    failed, in_a_row = 0, 0
    with comfyui(options) as client, tempfile.TemporaryDirectory(prefix="step1x-gedit-") as folder:
        workflow = load_workflow(options.workflow, client, options)
        if options.batch > 1 and workflow.batch_node is None:
            raise Step1XError("--batch needs a workflow with Step1X-Edit Batch Images, like step1x_edit_batch.json.")
        check_settings(options, workflow)
        # A group that fails is tried again item by item.
        groups = [waiting[start:start + options.batch] for start in range(0, len(waiting), options.batch)]
        done = len(items) - len(waiting)
        while groups:
            group = groups.pop(0)
            try:
                pictures = run_items(client, workflow, group, Path(folder))
                problem = (
                    "" if len(pictures) == len(group) else f"{len(pictures)} pictures came out for {len(group)} items"
                )
            except (ExecutionError, Step1XError) as error:
                if isinstance(error, ExecutionError) and "node_errors" in error.details:
                    raise Step1XError(f"ComfyUI refuses the workflow: {str(error)[:800]}") from error
                problem = str(error).splitlines()[0]
            if not problem:
                for item, picture in zip(group, pictures):
                    save_picture(result_path(options.results, options.method, item), picture)
                done, in_a_row = done + len(group), 0
                say(f"{done}/{len(items)} {group[-1].name}")
            elif len(group) > 1:
                groups[:0] = [[item] for item in group]
            else:
                failed, in_a_row = failed + 1, in_a_row + 1
                say(f"{group[0].name} FAILED: {problem}")
                if in_a_row == ERRORS_IN_A_ROW:
                    raise Step1XError(f"{in_a_row} items failed one after the other, the last one with: {problem}")
    say(f"{done} of {len(items)} items have a result, {failed} failed")
    return int(failed > 0)


def local_verdicts(options, waiting):
    """Entries with their verdicts, in groups as they come, by a Qwen2.5-VL in this process."""
    sys.path.insert(0, os.environ["STEP1X_COMFYUI"])
    import comfy.cli_args
    from demo import has_accelerator

    comfy.cli_args.args.cpu = not has_accelerator()
    from step1x_core.host.checkpoints.loading import load_text_encoder
    from step1x_core.host.gedit.benchmark import judge_entries
    from step1x_core.host.reasoning.generation import check_can_generate

    say(f"loading {options.mllm.name}")
    clip = load_text_encoder(options.mllm)
    check_can_generate(clip)
    for judged in judge_entries(clip, waiting, options.seed):
        yield [judged]


def web_verdicts(options, waiting):
    """Entries with their verdicts or why there are none, in groups as they come, by a web interface."""
    from endpoint import Endpoint, Unavailable

    from step1x_core.files import open_picture
    from step1x_core.reasoning.judge import judge_edit

    endpoint = Endpoint(
        options.endpoint,
        options.model,
        os.environ.get(options.key_variable, ""),
        options.timeout,
        options.tries,
        options.pause,
    )
    parallel = max(1, options.parallel)

    def verdict(entry):
        try:
            return judge_edit(
                endpoint.judge(options.seed),
                entry.item.load(),
                open_picture(entry.picture, str(entry.picture)),
                entry.item.instruction,
            )
        except Unavailable as problem:
            return problem

    with ThreadPoolExecutor(parallel) as pool:
        for start in range(0, len(waiting), parallel):
            group = waiting[start:start + parallel]
            yield zip(group, pool.map(verdict, group))


def judge_name(options) -> str:
    from step1x_core.files import check_name

    found = options.mllm.stem if options.mllm else options.model.replace("/", "_").replace(":", "_")
    return check_name(options.judge or found, "name of a judge; choose one with --judge")


def judge(options) -> int:
    from endpoint import Unavailable

    from step1x_core.errors import Step1XError
    from step1x_core.files import check_name
    from step1x_core.gedit.scores import (
        UNJUDGED,
        UNPARSABLE,
        append_record,
        describe_states,
        digest,
        find_entries,
        records_path,
    )

    if bool(options.mllm) == bool(options.endpoint) or options.endpoint and not options.model:
        raise Step1XError("Name one judge: --mllm with a file or folder, or --endpoint with --model.")
    check_name(options.method, "name of a method")
    name = judge_name(options)
    items = chosen_items(options)
    entries = find_entries(items, options.results, options.method, name)
    waiting = [entry for entry in entries if entry.state == UNJUDGED or options.again and entry.state == UNPARSABLE]
    say(f"{describe_states(entries)} Asking about {len(waiting)}.")
    if not waiting:
        return 0
    in_a_row = 0
    for group in (local_verdicts if options.mllm else web_verdicts)(options, waiting):
        for entry, result in group:
            if isinstance(result, Unavailable):
                in_a_row += 1
                say(f"{entry.item.name} not judged: {result}")
                continue
            in_a_row = 0
            append_record(
                records_path(options.results, options.method, name),
                entry.item,
                digest(entry.item, entry.picture),
                result,
            )
            say(f"{entry.item.name} {result.problem or f'SC {min(result.semantics):g} PQ {min(result.quality):g}'}")
        if in_a_row >= ERRORS_IN_A_ROW:
            raise Step1XError(
                f"The judge could not be reached for {in_a_row} items in a row. What was judged is kept; the same command goes on."
            )
    entries = find_entries(items, options.results, options.method, name)
    say(describe_states(entries))
    return int(any(entry.state == UNJUDGED for entry in entries))


def report(options) -> int:
    from step1x_core.files import check_name, png, write_file
    from step1x_core.gedit.plots import bar_chart, radar_chart
    from step1x_core.gedit.report import chart_series, write_report

    check_name(options.judge, "name of a judge")
    items = chosen_items(options)
    series = {}
    for method in options.method:
        result = write_report(
            items, options.results, check_name(method, "name of a method"), options.judge, options.shown
        )
        series |= {
            name: scores for name, scores in chart_series(result.summaries, f"{method}, ").items() if "strict" in name
        }
        print(result.text)
        say(f"written to {result.folder}")
    if len(options.method) > 1:
        title = f"GEdit-Bench, O, strict, judged by {options.judge}"
        for name, chart in (("bars", bar_chart), ("radar", radar_chart)):
            write_file(options.results / f"comparison_{options.judge}_{name}.png", png(chart(series, title)))
    return 0


def unpack(options) -> int:
    from step1x_core.gedit.dataset import read_dataset, write_folder

    items = read_dataset(options.data)
    write_folder(items, options.folder)
    say(f"{len(items)} items in {options.folder}")
    return 0


def write_miniature(options) -> int:
    from step1x_core.gedit.dataset import write_folder
    from step1x_core.gedit.miniature import miniature

    write_folder(miniature(), options.folder)
    say(f"22 items in {options.folder}")
    return 0


COMMANDS = {"miniature": write_miniature, "unpack": unpack, "edit": edit, "judge": judge, "report": report}


def main(argv=None) -> int:
    options = arguments(argv)
    sys.path.append(str(environment.PACK))
    from comfy_server import ExecutionError, ServerStopped

    from step1x_core.errors import Step1XError

    try:
        return COMMANDS[options.command](options)
    except (Step1XError, ExecutionError, ServerStopped, TimeoutError, OSError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    # Looks at --help and mistakes first: they need no environment.
    arguments()
    with environment.cancellable():
        environment.reexecute_in_host(__file__)
        sys.exit(main())
