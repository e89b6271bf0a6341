"""Loads every kind of model and runs the nodes, and writes down what files that opens, and every attempt to reach the network, which fails.

`python guarded_run.py BASE REPORT`, with models in BASE/models and pairs of pictures in BASE/input; a script of its own, as a process cannot get rid of an audit hook.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

NETWORK = (
    "socket.connect",
    "socket.bind",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "socket.sendto",
    "urllib.Request",
    "http.client.connect",
    "ftplib.connect",
    "smtplib.connect",
    "webbrowser.open",
)
PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.startfile", "pty.spawn")
CHANGES = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "shutil.rmtree",
    "shutil.move",
    "shutil.copyfile",
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

seen = {name: [] for name in ("network", "processes", "unpickled", "written", "read")}


def hook(event: str, args: tuple) -> None:
    if event in NETWORK:
        seen["network"].append(f"{event} {args[1:]}")
        raise PermissionError(f"no network: {event} {args[1:]}")
    if event in PROCESSES:
        seen["processes"].append(f"{event} {args[0]}")
    elif event == "pickle.find_class":
        seen["unpickled"].append(f"{args[0]}.{args[1]}")
    elif event in CHANGES:
        seen["written"].append(os.path.abspath(os.fsdecode(args[0])))
    elif event == "open" and isinstance(args[0], (str, bytes)):
        seen["written" if args[2] & WRITING else "read"].append(os.path.abspath(os.fsdecode(args[0])))


def take() -> dict[str, list[str]]:
    """What was seen since the last call, and forget it."""
    found = {name: sorted(set(entries)) for name, entries in seen.items()}
    for entries in seen.values():
        entries.clear()
    return found


def main(base: Path, report: Path) -> None:
    sys.path[:0] = [
        str(Path(__file__).absolute().parent),
        str(Path(__file__).absolute().parents[1]),
        str(Path(__file__).absolute().parents[2] / "scripts" / "support"),
    ]
    import environment

    environment.use_host_in_process()
    import folder_paths
    import tiny_models
    import torch
    from loop_host import load_pack, node_classes

    for name in ("diffusion_models", "text_encoders", "vae", "loras", "diffusers"):
        folder_paths.folder_names_and_paths[name] = ([str(base / "models" / name)], {".safetensors"})
    folder_paths.models_dir, folder_paths.input_directory, folder_paths.output_directory, folder_paths.temp_directory = (
        str(base / name) for name in ("models", "input", "output", "temp"))
    classes = node_classes(load_pack())
    from step1x_core.host.checkpoints.loading import load_vae
    from step1x_core.host.gate.gate import gate

    def run(node: str, **inputs) -> tuple:
        classes[node].hidden = SimpleNamespace(unique_id="1")  # which the host fills in
        return classes[node].execute(**inputs).result

    # From here on it is not the host that starts but this pack that works.
    starting = take()
    image = torch.rand(1, 72, 96, 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        vae = load_vae(base / "models" / "vae" / tiny_models.VAE_FILE)
        for file, version, layout in (
            (tiny_models.V11_FILE, "auto", "v1.1"),
            ("shards-v1p1/", "auto", "v1.1"),
            (tiny_models.V12_FILE, "v1.2", "v1.2"),
        ):
            model, _ = run("Step1XEditLoader", unet_name=file, version=version, weight_dtype="default")
            if version == "auto":
                model, = run("Step1XEditLoadLora", model=model, lora_name=tiny_models.LORA_FILE, strength=1.0)
            clip, = run("Step1XEditMLLM", clip_name=tiny_models.MLLM_FILE, device="default", version=layout)
            prompt, _ = run("Step1XEditThinkPrompt", clip=clip, image=image, prompt="make it red", seed=1, temperature=0.7)
            positive, negative, latent = run(
                "Step1XEditEncode", clip=clip, vae=vae, image=image, prompt=prompt, negative_prompt="", size_level=64
            )
            (latent,) = run(
                "Step1XEditSampler",
                model=model,
                positive=positive,
                negative=negative,
                latent_image=latent,
                seed=1,
                steps=1,
                cfg=4.0,
                sampler_name="euler",
                denoise=1.0,
            )
            picture = run("Step1XEditDecode", samples=latent, vae=vae, source=image)[0]
            assert picture.shape == image.shape and picture.isfinite().all()
        # Of the nodes that only compute.
        run("Step1XEditSpeedPreset", model=model, mode={"mode": "fast"})
        guided = {"start_percent": 0.0, "end_percent": 0.5}
        run("Step1XEditSpeedPreset", model=model, mode={"mode": "custom: region", "similarity": 0.9, "warmup": 0.2,
                                                  "refreshes": 1, "reuse": 0.0, **guided})
        mode = {"mode": "custom: nothing skipped", "attention": "exact", **guided}
        patched, = run("Step1XEditSpeedPreset", model=model, mode=mode)
        crop, _, stitch = run("Step1XEditCropToMask", image=image, mask=(image[..., 0] > 0.5).float(), context=0.5, min_size=16)
        run("Step1XEditStitchCrop", image=crop, stitch=stitch, feather=2)
        one = {
            "model": patched,
            "clip": clip,
            "vae": vae,
            "prompts": "red",
            "images": image,
            "combine": "pairs",
            "negative_prompt": "",
            "size_level": 64,
            "seed": 1,
            "steps": 1,
            "cfg": 2.0,
            "sampler_name": "euler",
        }
        run("Step1XEditBatchImages", **{name: [value] for name, value in one.items()})
        _, found, _ = gate(image, "block", "classifier", "LABEL_0, LABEL_1", 0.0, "", prompt="red", question="Is it bad?", clip=clip)
        assert found == 1
    editing = take()

    # And of those that keep what they made.
    with torch.inference_mode():
        dataset, _ = run("Step1XEditTrainDataset", clip=clip, vae=vae, dataset="pairs", size_level=64, validation=0)
        run(
            "Step1XEditTrainLora",
            model=model,
            dataset=dataset,
            name="lora",
            steps=1,
            learning_rate=0.01,
            rank=2,
            alpha=1.0,
            batch_size=1,
            accumulation=1,
            seed=1,
            resume=True,
            save_every=1,
            validate_every=0,
            schedule="constant",
            warmup=0,
            ema=0.0,
            gradient_checkpointing=True,
        )
        pairs, _ = run("Step1XEditPairCompute", images=[image], kinds=[""], count=[4], seed=[1], max_side=[0])
        pairs, _ = run(
            "Step1XEditPairRecord",
            source=[image],
            target=[1 - image],
            kind=["color_alter"],
            english=["invert it"],
            chinese=[""],
            direction=["forward"],
            maker=["x"],
            pairs=[pairs],
        )
        run(
            "Step1XEditPairJudge",
            clip=clip,
            pairs=pairs[:1],
            seed=1,
            min_semantics=0.0,
            min_quality=0.0,
            min_change=0.0,
            max_change=1.0,
            unjudged=True,
        )
        run("Step1XEditPairSave", pairs=pairs, name="pairs", limit=4)
        pictures, _, items, _, bench = run("Step1XEditGEditItems", dataset="", method="x", language="en", task_types="", limit=1, count=1)
        run("Step1XEditGEditSave", images=pictures, items=items)
        run("Step1XEditGEditReport", bench=bench, clip=clip, judge="x", seed=1, again=False)
    report.write_text(json.dumps({"starting": starting, "editing": editing, "keeping": take()}), encoding="utf-8")


if __name__ == "__main__":
    sys.addaudithook(hook)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
