"""GEdit-Bench in the graph. `scripts/gedit.py` does the same as a command, for any workflow and any judge."""

from comfy_api.latest import io

from ..step1x_core.checks import check_kind
from ..step1x_core.errors import Step1XError
from ..step1x_core.gedit.dataset import LANGUAGES, unedited
from ..step1x_core.gedit.scores import ALL
from ..step1x_core.host.gedit.benchmark import Bench, bench_fingerprint, judge_bench, open_bench, report_images, save_edit, source_image
from .categories import EVALUATION
from .widgets import check_widgets

BENCH = io.Custom("STEP1X_BENCH")
ITEM = io.Custom("STEP1X_BENCH_ITEM")
JUDGE = "qwen2.5-vl-7b"


def judge_input():
    return io.String.Input("judge", default=JUDGE, tooltip="The name under which the judgements are kept. Take another one for another judge.")


def check_bench(bench) -> None:
    check_kind(bench, Bench, "bench", "'Step1X-Edit GEdit-Bench'")


class Step1XEditGEditBench(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditGEditBench",
            display_name="Step1X-Edit GEdit-Bench",
            category=EVALUATION,
            description="Opens the benchmark for edits by instruction, and says whose results are measured.",
            search_aliases=["gedit", "benchmark", "evaluation", "dataset"],
            inputs=[
                io.String.Input("dataset", default="", tooltip="The name of a folder in ComfyUI's input folder with the dataset stepfun-ai/GEdit-Bench. "
                                                               "Empty: 22 drawn pictures to try it out."),
                io.String.Input("method", default="step1x-edit",
                                tooltip="The name of what is measured, say model and settings. Results are kept under it, in output/gedit_bench."),
                io.Combo.Input("language", options=[*LANGUAGES, ALL], default="en", tooltip="The language of the instructions: en, cn, or all."),
                io.String.Input("task_types", default="", tooltip="Only these kinds of edits, with commas between them. Empty takes all."),
                io.Int.Input("limit", default=0, min=0, max=100000, tooltip="At most so many items of each kind in each language. 0 takes all."),
            ],
            outputs=[BENCH.Output(display_name="bench", tooltip="For the other GEdit-Bench nodes.")],
        )

    @classmethod
    def fingerprint_inputs(cls, dataset, method, **inputs):
        return bench_fingerprint(dataset, method)

    @classmethod
    def execute(cls, dataset, method, language, task_types, limit) -> io.NodeOutput:
        check_widgets(cls, dataset=dataset, method=method, language=language, task_types=task_types, limit=limit)
        return io.NodeOutput(open_bench(dataset, method, language, task_types, limit))


class Step1XEditGEditItems(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditGEditItems",
            display_name="Step1X-Edit GEdit-Bench Items",
            category=EVALUATION,
            description="Hands out the next items that have no result yet, as lists of pictures and instructions. Queue it again and again for all.",
            search_aliases=["gedit", "benchmark", "next items"],
            inputs=[
                BENCH.Input("bench", tooltip="From 'Step1X-Edit GEdit-Bench'."),
                io.Int.Input("count", default=1, min=1, max=1000,
                             tooltip="How many items are edited in one run. They are saved at its end, so an error costs them all."),
            ],
            outputs=[
                io.Image.Output(display_name="images", is_output_list=True, tooltip="The source pictures as a list, each of its own size."),
                io.String.Output(display_name="prompts", is_output_list=True, tooltip="The instructions as a list."),
                ITEM.Output(display_name="items", is_output_list=True, tooltip="For 'Step1X-Edit GEdit-Bench Save'."),
                io.Int.Output(display_name="remaining", tooltip="How many items have no result yet, these ones included."),
            ],
        )

    @classmethod
    def execute(cls, bench, count) -> io.NodeOutput:
        check_widgets(cls, count=count)
        check_bench(bench)
        waiting = unedited(bench.items, bench.results, bench.method)
        if not waiting:
            raise Step1XError(f"All {len(bench.items)} items have a result of the method '{bench.method}'. Go on with 'Step1X-Edit GEdit-Bench Judge', "
                              "or name another method.")
        chosen = waiting[:count]
        pictures, prompts = [source_image(item) for item in chosen], [item.instruction for item in chosen]
        return io.NodeOutput(pictures, prompts, [(bench, item) for item in chosen], len(waiting))


class Step1XEditGEditSave(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditGEditSave",
            display_name="Step1X-Edit GEdit-Bench Save",
            category=EVALUATION,
            description="Stores edited pictures where the official code of the benchmark looks for them.",
            search_aliases=["gedit", "benchmark", "save results"],
            # As many pictures as items: the host itself would repeat the last one.
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The edited pictures, one for each item, in their order."),
                ITEM.Input("items", tooltip="From 'Step1X-Edit GEdit-Bench Items'."),
            ],
            outputs=[
                BENCH.Output(display_name="bench", tooltip="The same benchmark, for judging in the same graph."),
                io.String.Output(display_name="report", tooltip="What was saved where."),
            ],
        )

    @classmethod
    def execute(cls, images, items) -> io.NodeOutput:
        for item in items:
            check_kind(item, tuple, "items", "'Step1X-Edit GEdit-Bench Items'")
        if len(images) != len(items):
            raise Step1XError(f"There are {len(images)} edited pictures for {len(items)} items, so they cannot be told apart: some edits failed. "
                              "Set 'count' to 1 and queue again.")
        paths = [save_edit(bench, item, image) for image, (bench, item) in zip(images, items)]
        bench = items[0][0]
        return io.NodeOutput(bench, "\n".join(f"{item.name}: {path.relative_to(bench.results).as_posix()}" for (_, item), path in zip(items, paths)))


class Step1XEditGEditJudge(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditGEditJudge",
            display_name="Step1X-Edit GEdit-Bench Judge",
            category=EVALUATION,
            description="Has the language model score every stored edit that it has not scored yet. May be cancelled at any time; the next run goes on.",
            search_aliases=["gedit", "benchmark", "viescore", "score edits"],
            is_output_node=True,
            inputs=[
                BENCH.Input("bench", tooltip="From 'Step1X-Edit GEdit-Bench', or from 'Step1X-Edit GEdit-Bench Save' to judge what was just edited."),
                io.Clip.Input("clip", tooltip="The text encoder from 'Load Step1X-Edit MLLM'. Its file needs a language-model head (lm_head)."),
                judge_input(),
                io.Int.Input("seed", default=42, min=0, max=0xffffffffffffffff,
                             tooltip="The random seed of answers that are asked for anew. First answers are the most probable ones."),
                io.Boolean.Input("again", default=False, tooltip="Ask anew about edits whose answers could not be read."),
            ],
            outputs=[
                BENCH.Output(display_name="bench", tooltip="The same benchmark, for 'Step1X-Edit GEdit-Bench Report'."),
                io.String.Output(display_name="report", tooltip="How many items are judged, missing, unparsable, and not judged yet."),
            ],
        )

    @classmethod
    def execute(cls, bench, clip, judge, seed, again) -> io.NodeOutput:
        check_widgets(cls, judge=judge, seed=seed, again=again)
        check_bench(bench)
        return io.NodeOutput(bench, judge_bench(bench, clip, judge, seed, again))


class Step1XEditGEditReport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditGEditReport",
            display_name="Step1X-Edit GEdit-Bench Report",
            category=EVALUATION,
            description="Writes the official tables, the means and the plots of what has been judged, and shows them.",
            search_aliases=["gedit", "benchmark", "scores", "radar chart", "contact sheet"],
            is_output_node=True,
            inputs=[
                BENCH.Input("bench", tooltip="From 'Step1X-Edit GEdit-Bench Judge', or from 'Step1X-Edit GEdit-Bench' for what was judged before."),
                judge_input(),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="All means as tables, and every item without scores."),
                io.Image.Output(display_name="bars", tooltip="O for each kind of edit, as bars."),
                io.Image.Output(display_name="radar", tooltip="The same as a radar chart."),
                io.Image.Output(display_name="contact_sheet", tooltip="The best and the worst edits, source and result side by side."),
            ],
        )

    @classmethod
    def execute(cls, bench, judge) -> io.NodeOutput:
        check_widgets(cls, judge=judge)
        check_bench(bench)
        report, pictures = report_images(bench, judge)
        return io.NodeOutput(report.text, *pictures)


GEDIT_NODES = [Step1XEditGEditBench, Step1XEditGEditItems, Step1XEditGEditSave, Step1XEditGEditJudge, Step1XEditGEditReport]
