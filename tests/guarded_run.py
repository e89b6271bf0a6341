"""Loads every kind of model, thinks, encodes, samples and decodes, and writes down what files that opens, and every attempt to reach the network, which fails.

`python guarded_run.py MODELS REPORT`; a script of its own, as a process cannot get rid of an audit hook.
"""

import json
import os
import sys
from pathlib import Path

NETWORK = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request", "http.client.connect", "ftplib.connect",
           "smtplib.connect", "webbrowser.open")
PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.startfile", "pty.spawn")
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree", "shutil.move", "shutil.copyfile")
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


def main(models: Path, report: Path) -> None:
    sys.path[:0] = [str(Path(__file__).absolute().parent), str(Path(__file__).absolute().parent.parent / "scripts")]
    import environment

    environment.use_host_in_process()
    import folder_paths
    import tiny_models
    import torch
    from loop_host import load_pack, node_classes

    for name in ("diffusion_models", "text_encoders", "vae", "loras", "diffusers"):
        folder_paths.folder_names_and_paths[name] = ([str(models / name)], {".safetensors"})
    classes = node_classes(load_pack())

    def run(name: str, *args, **kwargs) -> tuple:
        return classes[name].execute(*args, **kwargs).result

    # From here on it is not the host that starts but this pack that works.
    for name in ("processes", "unpickled", "written", "read"):
        seen[name].clear()
    image = torch.rand(1, 72, 96, 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        vae, = run("Step1XVAELoader", vae=tiny_models.VAE_FILE)
        for file, version, layout in ((tiny_models.V11_FILE, "auto", "v1.1"), ("shards-v1p1/", "auto", "v1.1"), (tiny_models.V12_FILE, "v1.2", "v1.2")):
            model, = run("Step1XModelLoader", model=file, version=version, weight_dtype="default")
            if version == "auto":
                model, = run("Step1XLoraLoader", model=model, lora_name=tiny_models.LORA_FILE, strength=1.0)
            clip, = run("Step1XMLLMLoader", mllm=tiny_models.MLLM_FILE, device="default", version=layout)
            prompt, _ = run("Step1XThink", clip=clip, image=image, prompt="make it red", seed=1, temperature=0.7)
            positive, negative, latent = run("Step1XEditEncode", clip=clip, vae=vae, image=image, prompt=prompt, negative_prompt="", size_level=64)
            latent, = run("Step1XSampler", model=model, positive=positive, negative=negative, latent=latent, seed=1, steps=1, cfg=4.0, sampler_name="euler", denoise=1.0)
            picture, = run("Step1XDecode", samples=latent, vae=vae, source=image)
            assert picture.shape == image.shape and picture.isfinite().all()
    report.write_text(json.dumps({name: sorted(set(entries)) for name, entries in seen.items()}), encoding="utf-8")


if __name__ == "__main__":
    sys.addaudithook(hook)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
