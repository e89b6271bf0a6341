"""Makes Step1X-Edit known to a process that imports ComfyUI without its node packs, such as raylight's workers (docs/multi_gpu.md).

With this folder in PYTHONPATH: `import step1x_edit_register`. ComfyUI's own folder has to be importable.
"""

import sys
from pathlib import Path

# At the end: the pack's `nodes` is not ComfyUI's.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from step1x_core.host.network.model import register

register()
