"""The nodes: schemas and wiring."""

from comfy_api.latest import ComfyExtension, io

from ..step1x_core.host.network.model import register
from .attention import Step1XFp8Attention
from .batch import Step1XBatch
from .caching import Step1XTeaCache
from .edit import Step1XDecode, Step1XEditEncode, Step1XReferences
from .gate import Step1XGate
from .gedit import GEDIT_NODES
from .loaders import Step1XLoraLoader, Step1XMLLMLoader, Step1XModelLoader, Step1XVAELoader
from .local import Step1XCrop, Step1XStitch
from .loop import LOOP_NODES
from .pairs import PAIR_NODES
from .region import Step1XRegion
from .replacements import register_replacements
from .sampling import Step1XGuidance, Step1XGuidanceInterval, Step1XSampler, Step1XScheduler
from .thinking import Step1XReflect, Step1XThink
from .training import Step1XEditDataset, Step1XTrainLora


class Step1XExtension(ComfyExtension):
    async def on_load(self) -> None:
        register()
        await register_replacements()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            Step1XModelLoader,
            Step1XMLLMLoader,
            Step1XVAELoader,
            Step1XLoraLoader,
            Step1XEditEncode,
            Step1XSampler,
            Step1XDecode,
            Step1XScheduler,
            Step1XGuidance,
            Step1XGuidanceInterval,
            Step1XTeaCache,
            Step1XFp8Attention,
            Step1XRegion,
            Step1XThink,
            Step1XReflect,
            *LOOP_NODES,
            Step1XCrop,
            Step1XStitch,
            Step1XReferences,
            Step1XBatch,
            Step1XEditDataset,
            Step1XTrainLora,
            Step1XGate,
            *GEDIT_NODES,
            *PAIR_NODES,
        ]
