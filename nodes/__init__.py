"""The nodes: schemas and wiring."""

from comfy_api.latest import ComfyExtension, io

from ..step1x_core.host.network.model import register
from .batch import Step1XEditBatchImages
from .edit import Step1XEditDecode, Step1XEditEncode
from .gate import Step1XEditContentGate
from .gedit import GEDIT_NODES
from .loaders import Step1XEditLoader, Step1XEditLoadLora, Step1XEditMLLM
from .local import Step1XEditCropToMask, Step1XEditStitchCrop
from .loop import LOOP_NODES
from .pairs import PAIR_NODES
from .replacements import register_replacements
from .sampling import Step1XEditGuidance, Step1XEditSampler, Step1XEditScheduler
from .speed import Step1XEditSpeedPreset
from .thinking import Step1XEditReflectOnEdit, Step1XEditThinkPrompt
from .training import Step1XEditTrainDataset, Step1XEditTrainLora
from .turns import Step1XEditTurnResult


class Step1XEditExtension(ComfyExtension):
    async def on_load(self) -> None:
        register()
        await register_replacements()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            Step1XEditLoader,
            Step1XEditMLLM,
            Step1XEditLoadLora,
            Step1XEditEncode,
            Step1XEditSampler,
            Step1XEditDecode,
            Step1XEditScheduler,
            Step1XEditGuidance,
            Step1XEditSpeedPreset,
            Step1XEditThinkPrompt,
            Step1XEditReflectOnEdit,
            *LOOP_NODES,
            Step1XEditCropToMask,
            Step1XEditStitchCrop,
            Step1XEditBatchImages,
            Step1XEditTurnResult,
            Step1XEditTrainDataset,
            Step1XEditTrainLora,
            Step1XEditContentGate,
            *GEDIT_NODES,
            *PAIR_NODES,
        ]
