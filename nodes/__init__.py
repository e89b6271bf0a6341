"""The nodes: schemas and wiring."""

from comfy_api.latest import ComfyExtension, io

from ..step1x_core.host.network.model import register
from .batch import Step1XEditBatch
from .edit import Step1XEditDecode, Step1XEditEncode
from .gate import Step1XEditContentGate
from .gedit import GEDIT_NODES
from .loaders import Step1XEditLoadLora, Step1XEditLoadMLLM, Step1XEditLoadModel
from .local import Step1XEditCrop, Step1XEditStitch
from .loop import LOOP_NODES
from .pairs import PAIR_NODES
from .replacements import register_replacements
from .sampling import Step1XEditGuidance, Step1XEditSampler, Step1XEditScheduler
from .speed import Step1XEditSpeed
from .thinking import Step1XEditReflect, Step1XEditThink
from .training import Step1XEditDataset, Step1XEditTrainLora


class Step1XEditExtension(ComfyExtension):
    async def on_load(self) -> None:
        register()
        await register_replacements()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            Step1XEditLoadModel,
            Step1XEditLoadMLLM,
            Step1XEditLoadLora,
            Step1XEditEncode,
            Step1XEditSampler,
            Step1XEditDecode,
            Step1XEditScheduler,
            Step1XEditGuidance,
            Step1XEditSpeed,
            Step1XEditThink,
            Step1XEditReflect,
            *LOOP_NODES,
            Step1XEditCrop,
            Step1XEditStitch,
            Step1XEditBatch,
            Step1XEditDataset,
            Step1XEditTrainLora,
            Step1XEditContentGate,
            *GEDIT_NODES,
            *PAIR_NODES,
        ]
