"""GEdit-Bench in the graph. `scripts/gedit.py` does the same as a command, for any workflow and any judge."""

from comfy_api.latest import io

from ..step1x_core.checks import check_kind
from ..step1x_core.errors import Step1XError
from ..step1x_core.gedit.dataset import LANGUAGES, unedited
from ..step1x_core.gedit.scores import ALL
from ..step1x_core.host.gedit.benchmark import (
    Bench,
    bench_fingerprint,
    judge_bench,
    open_bench,
    report_images,
    save_edit,
    source_image,
)
from .categories import EVALUATION
from .widgets import NOT_CONNECTED, check_widgets

BENCH = io.Custom("STEP1X_BENCH")
ITEM = io.Custom("STEP1X_BENCH_ITEM")
JUDGE = "qwen2.5-vl-7b"


def check_bench(bench) -> None:
    check_kind(bench, Bench, "bench", "'Step1X-Edit GEdit-Bench Items'")


class Step1XEditGEditItems(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditGEditItems",
            display_name="Step1X-Edit GEdit-Bench Items",
            category=EVALUATION,
            description="Opens GEdit-Bench, a benchmark for instruction-based editing, and outputs the next items "
                        "without a result, "
            "as lists of images and instructions. Queue repeatedly until all items are done.",
            search_aliases=["gedit", "benchmark", "evaluation", "dataset", "next items"],
            inputs=[
                io.String.Input(
                    "dataset",
                    default="",
                    tooltip="Name of a folder in ComfyUI's input folder that holds the dataset stepfun-ai/GEdit-Bench. "
                    "Empty: 22 drawn images to try it out.",
                ),
                io.String.Input(
                    "method",
                    default="step1x-edit",
                    tooltip="Name of what is measured, for example model and settings. Results are kept under it in "
                            "output/gedit_bench.",
                ),
                io.Combo.Input(
                    "language", options=[*LANGUAGES, ALL], default="en", tooltip="Language of the instructions."
                ),
                io.String.Input(
                    "task_types", default="", tooltip="Comma-separated kinds of edits to include. Empty includes all."
                ),
                io.Int.Input(
                    "limit",
                    default=0,
                    min=0,
                    max=100000,
                    tooltip="Maximum number of items of each kind in each language. 0 includes all.",
                ),
                io.Int.Input(
                    "count",
                    default=1,
                    min=0,
                    max=1000,
                    tooltip="Items to edit in one run. They are saved at its end, so an error loses all of them. "
                    "0 edits nothing, for a graph that only judges and reports.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images", is_output_list=True, tooltip="Source images as a list, each at its own size."
                ),
                io.String.Output(display_name="prompts", is_output_list=True, tooltip="Instructions as a list."),
                ITEM.Output(display_name="items", is_output_list=True, tooltip="For 'Step1X-Edit GEdit-Bench Save'."),
                io.Int.Output(display_name="remaining", tooltip="Number of items without a result, including these."),
                BENCH.Output(
                    display_name="bench",
                    tooltip="For 'Step1X-Edit GEdit-Bench Report', to judge results that are stored already.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, dataset, method, **inputs):
        return bench_fingerprint(dataset, method)

    @classmethod
    def execute(cls, dataset, method, language, task_types, limit, count) -> io.NodeOutput:
        check_widgets(
            cls, dataset=dataset, method=method, language=language, task_types=task_types, limit=limit, count=count
        )
        bench = open_bench(dataset, method, language, task_types, limit)
        waiting = unedited(bench.items, bench.results, bench.method)
        if count and not waiting:
            raise Step1XError(
                f"All {len(bench.items)} items have a result of the method '{bench.method}'. Judge them with "
                "'Step1X-Edit GEdit-Bench Report', or name another method."
            )
        chosen = waiting[:count]
        images, prompts = [source_image(item) for item in chosen], [item.instruction for item in chosen]
        return io.NodeOutput(images, prompts, [(bench, item) for item in chosen], len(waiting), bench)


class Step1XEditGEditSave(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditGEditSave",
            display_name="Step1X-Edit GEdit-Bench Save",
            category=EVALUATION,
            description="Stores edited images where the official code of the benchmark expects them.",
            search_aliases=["gedit", "benchmark", "save results"],
            # As many images as items: the host itself would repeat the last one.
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="Edited images, one for each item, in the same order."),
                ITEM.Input("items", tooltip="From 'Step1X-Edit GEdit-Bench Items'."),
            ],
            outputs=[
                BENCH.Output(display_name="bench", tooltip="For 'Step1X-Edit GEdit-Bench Report' in the same graph."),
                io.String.Output(display_name="report", tooltip="What was saved where."),
            ],
        )

    @classmethod
    def execute(cls, images, items) -> io.NodeOutput:
        for item in items:
            check_kind(item, tuple, "items", "'Step1X-Edit GEdit-Bench Items'")
        if len(images) != len(items):
            raise Step1XError(
                f"Inputs 'images' and 'items' have {len(images)} and {len(items)} entries; expected one image for each item. Some edits failed. "
                "Set 'count' to 1 and queue again."
            )
        paths = [save_edit(bench, item, image) for image, (bench, item) in zip(images, items)]
        bench = items[0][0]
        return io.NodeOutput(
            bench,
            "\n".join(
                f"{item.name}: {path.relative_to(bench.results).as_posix()}" for (_, item), path in zip(items, paths)
            ),
        )


class Step1XEditGEditReport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditGEditReport",
            display_name="Step1X-Edit GEdit-Bench Report",
            category=EVALUATION,
            description="Scores every stored edit that has no score yet with a language model, then writes the "
                        "official tables, means and plots. "
            "Can be cancelled and resumed.",
            search_aliases=["gedit", "benchmark", "viescore", "score edits", "scores", "radar chart", "contact sheet"],
            is_output_node=True,
            inputs=[
                BENCH.Input(
                    "bench",
                    tooltip="From 'Step1X-Edit GEdit-Bench Items', or from 'Step1X-Edit GEdit-Bench Save' to judge "
                            "what was just edited.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The judge: the text encoder from 'Load Step1X-Edit MLLM'. Its file needs a language-model "
                            "head (lm_head). "
                    "Not connected: only existing scores are reported.",
                ),
                io.String.Input(
                    "judge",
                    default=JUDGE,
                    tooltip="Name that the scores are kept under. Use another one for another judge.",
                ),
                io.Int.Input(
                    "seed",
                    default=42,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    advanced=True,
                    tooltip="Random seed for repeated questions. First answers are the most probable ones.",
                ),
                io.Boolean.Input(
                    "again",
                    default=False,
                    advanced=True,
                    tooltip="Ask again about edits whose answers could not be parsed.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="All means as tables, and every item without scores."),
                io.Image.Output(display_name="bars", tooltip="Overall score (O) for each kind of edit, as bars."),
                io.Image.Output(display_name="radar", tooltip="The same as a radar chart."),
                io.Image.Output(
                    display_name="contact_sheet",
                    tooltip="The best and the worst edits, source and result side by side.",
                ),
            ],
        )

    @classmethod
    def execute(cls, bench, judge, seed, again, clip=NOT_CONNECTED) -> io.NodeOutput:
        check_widgets(cls, judge=judge, seed=seed, again=again)
        check_bench(bench)
        if clip is not NOT_CONNECTED:
            judge_bench(bench, clip, judge, seed, again)
        report, images = report_images(bench, judge)
        return io.NodeOutput(report.text, *images)


GEDIT_NODES = [Step1XEditGEditItems, Step1XEditGEditSave, Step1XEditGEditReport]
