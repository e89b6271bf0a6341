"""Damaged, foreign and malicious model files and folders, and names that lead out of the model folders."""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile

import pytest
import tiny_models
import torch
from bad_input_files import (
    DAMAGED,
    INCOMPLETE,
    MODEL,
    NO_WEIGHTS,
    QKV,
    TYPES,
    UNREADABLE,
    WRONG,
    Bomb,
    changed,
    check,
    configured,
    load,
    load_model,
    without,
    write,
)
from bad_input_host import NOT_IN_LIST, Given, peak_memory, running_host, use_models
from diffusers_layout import diffusers_repository, to_diffusers
from node_inputs import entries
from safetensors.torch import load_file, save

from step1x_core.checkpoints.detection import CONFIG_KEY

# Nodes and their checks are the same in every host. A sample of the cases shows what a further host makes of them.
pytestmark = pytest.mark.sampled(11)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("bad_models")


@pytest.fixture(scope="module")
def host(root, models, model, clip, vae):
    with running_host(model, clip, vae, lambda patch: use_models(patch, root, models)) as host:
        yield host


@pytest.fixture(scope="module")
def memory(host):
    return peak_memory()


@pytest.fixture(scope="module")
def weights(models):
    return load_file(models / "diffusion_models" / tiny_models.V11_FILE)


class Parts:
    """A safetensors file taken apart."""

    def __init__(self, tensors):
        self.data = save(tensors)
        self.length = struct.unpack("<Q", self.data[:8])[0]
        self.header, self.body = json.loads(self.data[8:8 + self.length]), self.data[8 + self.length:]

    def file(self, header, body=None) -> bytes:
        header = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(header)) + header + (self.body if body is None else body)

    def entry(self, **changes) -> bytes:
        """With one tensor's entry in the header changed."""
        return self.file({**self.header, "img_in.weight": {**self.header["img_in.weight"], **changes}})

    def length_of(self, length: int) -> bytes:
        return struct.pack("<Q", length) + self.data[8:]

    def offsets(self, start: int) -> list[int]:
        first, last = self.header["img_in.weight"]["data_offsets"]
        return [start, start + last - first]


def torch_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"img_in.weight": torch.zeros(3)}, buffer)
    return buffer.getvalue()


def zip_file() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", "x")
    return buffer.getvalue()


RAW_FILES = {
    **{f"cut_at_{cut}": lambda p, cut=cut: p.data[:cut] for cut in (0, 1, 7, 8, 9, 100, 5000)},
    "cut_before_header_end": lambda p: p.data[: 8 + p.length - 1],
    "cut_after_header": lambda p: p.data[: 8 + p.length],
    "cut_one_byte_of_data": lambda p: p.data[: 8 + p.length + 1],
    "cut_in_half": lambda p: p.data[: len(p.data) // 2],
    "cut_last_byte": lambda p: p.data[:-1],
    "one_byte_too_many": lambda p: p.data + b"x",
    **{
        f"header_length_{length}": lambda p, length=length: p.length_of(length)
        for length in (0, 1, 99_999_999, 100_000_001, 2**31, 2**63, 2**64 - 1)
    },
    "header_length_one_less": lambda p: p.length_of(p.length - 1),
    "header_length_one_more": lambda p: p.length_of(p.length + 1),
    "header_length_twice_the_file": lambda p: p.length_of(2 * len(p.data)),
    "overlapping_offsets": lambda p: p.entry(data_offsets=p.offsets(0)),
    "offsets_beyond_the_end": lambda p: p.entry(data_offsets=p.offsets(10**12)),
    "negative_offsets": lambda p: p.entry(data_offsets=[-5, 100]),
    "reversed_offsets": lambda p: p.entry(data_offsets=p.header["img_in.weight"]["data_offsets"][::-1]),
    "offsets_of_text": lambda p: p.entry(data_offsets=["a", "b"]),
    "offsets_missing": lambda p: p.entry(data_offsets=[]),
    "shape_too_large": lambda p: p.entry(shape=[10**6, 10**6]),
    "shape_overflows": lambda p: p.entry(shape=[2**40, 2**40]),
    "shape_negative": lambda p: p.entry(shape=[-64, -64]),
    "claims_100_gigabytes": lambda p: p.file(
        {**p.header, "z": {"dtype": "F32", "shape": [25 * 10**9], "data_offsets": [len(p.body), len(p.body) + 10**11]}}
    ),
    **{f"type_{name}": lambda p, name=name: p.entry(dtype=name) for name in ("F99", "", "f32", None, 5)},
    "header_is_a_list": lambda p: p.file(b"[1, 2]"),
    "header_is_null": lambda p: p.file(b"null"),
    "header_is_no_json": lambda p: p.file(b"{nope"),
    "header_is_empty": lambda p: p.file(b"{}"),
    "header_is_nested_50000_deep": lambda p: p.file(b'{"a":' * 50000 + b"1" + b"}" * 50000),
    "header_is_no_utf8": lambda p: p.file(b'{"\xff\xfe": 1}'),
    "metadata_is_text": lambda p: p.file({"__metadata__": "x", **p.header}),
    "metadata_holds_a_number": lambda p: p.file({"__metadata__": {"a": 5}, **p.header}),
    "html_page": lambda p: b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 20,
    "lfs_pointer": lambda p: b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 24\n",
    "pickle": lambda p: pickle.dumps(Bomb()),
    "torch_checkpoint": lambda p: torch_file(),
    "zip": lambda p: zip_file(),
    "gguf": lambda p: b"GGUF\x03\0\0\0" + bytes(100),
    "zeros": lambda p: bytes(1000),
    "ones": lambda p: b"\xff" * 1000,
}


@pytest.mark.parametrize("make", RAW_FILES.values(), ids=RAW_FILES)
def test_files_that_are_no_safetensors(host, root, memory, weights, make):
    (root / "diffusion_models" / MODEL).write_bytes(make(Parts(weights)))
    check(host, memory, load_model(host), f"{MODEL} {DAMAGED}")


def test_of_names_that_stand_twice_in_a_header_the_last_one_counts(host, root, weights):
    parts = Parts(weights)
    twice = b'{"img_in.weight":' + json.dumps(parts.header["img_in.bias"]).encode() + b"," + json.dumps(parts.header).encode()[1:]
    (root / "diffusion_models" / MODEL).write_bytes(parts.file(twice))
    load_model(host).made()


def quantised(text):
    return lambda w: (w, {"_quantization_metadata": text})


SIZED = ("img_in.weight", "final_layer.linear.weight", "connector.global_proj_out.weight", "connector.S.input_embedder.weight",
         "double_blocks.0.img_attn.norm.key_norm.scale", "double_blocks.0.img_mlp.0.weight", "single_blocks.0.linear1.weight")
SHAPES = {"scalar": (), "vector": (4,), "nothing": (0, 0), "no_columns": (10**12, 0), "four_axes": (1, 1, 1, 1), "one_row": (1, 64)}
FLOATS = {"float64": torch.float64, "bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn}

MODELS = {
    **{
        f"without_{key}": (without(key), INCOMPLETE)
        for key in (
            *SIZED[:1],
            *SIZED[2:3],
            *SIZED[4:],
            "img_in.bias",
            "txt_in.weight",
            "time_in.in_layer.weight",
            "double_blocks.1.txt_mlp.2.bias",
            "single_blocks.1.linear2.weight",
            "connector.S.individual_token_refiner.blocks.1.norm2.bias",
            "final_layer.",
            "vector_in.",
            "double_blocks.0.",
        )
    },
    "without_connector_entrance": (without("connector.S.input_embedder"), "is a FLUX model"),
    **{
        f"{kind}_for_{key}": (changed(key, lambda t, shape=shape: torch.zeros(shape)), f"{MODEL} ({WRONG}|lacks)")
        for key in SIZED
        for kind, shape in SHAPES.items()
    },
    "bias_of_half_the_length": (changed("img_in.bias", lambda t: t[:32]), WRONG),
    **{
        f"{name}_matrix": (changed(QKV, lambda t, dtype=dtype: t.to(dtype)), NO_WEIGHTS)
        for name, dtype in TYPES.items()
    },
    **{
        f"{name}_bias": (changed("img_in.bias", lambda t, dtype=dtype: t.to(dtype)), NO_WEIGHTS)
        for name, dtype in TYPES.items()
    },
    **{
        f"all_{name}": (lambda w, dtype=dtype: {key: t.to(dtype) for key, t in w.items()}, NO_WEIGHTS)
        for name, dtype in TYPES.items()
    },
    **{f"{name}_matrix": (changed(QKV, lambda t, dtype=dtype: t.to(dtype)), None) for name, dtype in FLOATS.items()},
    "packed_matrix_without_its_format": (changed(QKV, lambda t: t.to(torch.uint8)), WRONG),
    **{
        f"configuration_{name}": (configured(text), "stored in the file .step1x_edit_config. is damaged")
        for name, text in {
            "no_json": "nope",
            "list": "[]",
            "number": "5",
            "null": "null",
            "nested": '{"a":' * 20000 + "1" + "}" * 20000,
        }.items()
    },
    **{
        f"configuration_with_{name}": (configured(text), "of Step1X-Edit is unknown. Choose one of")
        for name, text in {
            "unknown_version": '{"version": "v9"}',
            "number_as_version": '{"version": 5}',
            "list_as_version": '{"version": []}',
        }.items()
    },
    **{
        f"configuration_with_{name}": (configured(text), "which does not match them. Download the file")
        for name, text in {
            "text_as_axes": '{"axes_dim": "x"}',
            "two_axes": '{"axes_dim": [16, 16]}',
            "odd_axes": '{"axes_dim": [4, 13, 15]}',
            "long_axes": '{"axes_dim": [16, 56, 56]}',
            "negative_axis": '{"axes_dim": [-4, 22, 14]}',
            "no_theta": '{"theta": null}',
            "zero_theta": '{"theta": 0}',
            "text_as_theta": '{"theta": "x"}',
            "no_heads": '{"connector_heads": 0}',
            "seven_heads": '{"connector_heads": 7}',
            "negative_heads": '{"connector_heads": -1}',
        }.items()
    },
    "configuration_tensor_of_noise": (
        lambda w: {**w, CONFIG_KEY: torch.rand(3, 4)},
        "is damaged. Download the file again",
    ),
    "configuration_tensor_empty": (
        lambda w: {**w, CONFIG_KEY: torch.zeros(0, dtype=torch.uint8)},
        "is damaged. Download the file again",
    ),
    **{
        f"quantisation_{name}": (quantised(text), rf"{MODEL} could not be loaded")
        for name, text in {
            "no_json": "nope",
            "empty": "{}",
            "list": "[]",
            "number": '{"layers": 5}',
            "unknown": '{"layers": {"img_in": {"format": "zzz"}}}',
            "without_scales": '{"layers": {"double_blocks.0.img_attn.qkv": {"format": "float8_e4m3fn"}}}',
        }.items()
    },
    "quantisation_tensor_of_noise": (
        lambda w: {**w, "double_blocks.0.img_attn.qkv.comfy_quant": torch.tensor([1, 2, 3], dtype=torch.uint8)},
        "could not be loaded",
    ),
    "further_tensors": (lambda w: {**w, "notes": torch.zeros(3)}, None),
    "one_tensor_of_a_further_block": (lambda w: {**w, "double_blocks.7.x.weight": torch.zeros(3)}, INCOMPLETE),
    "block_without_a_number": (lambda w: {**w, "double_blocks.x.weight": torch.zeros(3)}, INCOMPLETE),
    "flux": (without("connector."), "is a FLUX model"),
    "qwen_image": (
        lambda w: {"transformer_blocks.0.attn.add_q_proj.weight": torch.zeros(4, 4), "txt_norm.weight": torch.zeros(4)},
        "is not a Step1X-Edit model",
    ),
    "sdxl": (
        lambda w: {
            "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3),
            "model.diffusion_model.label_emb.0.0.weight": torch.zeros(4, 4),
        },
        "is not a Step1X-Edit model",
    ),
    "sd15": (
        lambda w: {
            "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3),
            "cond_stage_model.transformer.x": torch.zeros(4),
        },
        "is not a Step1X-Edit model",
    ),
    "lora": (lambda w: {"lora_unet_x.lora_up.weight": torch.zeros(3, 3)}, "is not a Step1X-Edit model"),
    "language_model": (lambda w: {"model.embed_tokens.weight": torch.zeros(4, 4)}, "is not a Step1X-Edit model"),
    "connector_alone": (lambda w: {key: t for key, t in w.items() if key.startswith("connector.")}, INCOMPLETE),
    "no_tensors": (lambda w: {}, "is not a Step1X-Edit model"),
}


@pytest.mark.parametrize("change, expected", MODELS.values(), ids=MODELS)
def test_models(host, root, memory, weights, change, expected):
    write(root / "diffusion_models" / MODEL, change(weights))
    check(host, memory, load_model(host), expected)


DIFFUSERS = {
    "without_a_third_of_a_stack": (without("transformer_blocks.0.attn.to_k.weight"), INCOMPLETE),
    "without_a_norm": (without("single_transformer_blocks.1.attn.norm_q"), INCOMPLETE),
    "without_final_modulation": (without("norm_out."), INCOMPLETE),
    "stack_of_other_widths": (changed("transformer_blocks.0.attn.to_k.weight", lambda t: t[:, :3]), WRONG),
    "stack_of_a_scalar": (changed("transformer_blocks.0.attn.to_k.weight", lambda t: torch.tensor(1.0)), WRONG),
    "scalar_as_final_modulation": (changed("norm_out.linear.weight", lambda t: torch.tensor(1.0)), WRONG),
    "integers_as_final_modulation": (changed("norm_out.linear.weight", lambda t: t.int()), NO_WEIGHTS),
}


@pytest.mark.parametrize("change, expected", DIFFUSERS.values(), ids=DIFFUSERS)
def test_models_in_the_diffusers_layout(host, root, memory, weights, change, expected):
    write(root / "diffusion_models" / MODEL, change(to_diffusers(weights)))
    check(host, memory, load_model(host), expected)


INDEX, CONFIG, FIRST = "diffusion_pytorch_model.safetensors.index.json", "config.json", "diffusion_pytorch_model-00001-of-00003.safetensors"


def text_of(name, text):
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def shard_named(name):
    def change(folder):
        table = json.loads((folder / INDEX).read_text())
        table["weight_map"]["img_in.weight"] = name
        (folder / INDEX).write_text(json.dumps(table))

    return change


def shard_of_all(choose):
    """choose: the shards' names in the order of the tensors -> others in their place."""
    def change(folder):
        names = json.loads((folder / INDEX).read_text())["weight_map"]
        (folder / INDEX).write_text(json.dumps({"weight_map": dict(zip(names, choose([*names.values()])))}))

    return change


def replaced_by_link(name, target):
    def change(folder):
        (folder / name).unlink()
        os.symlink(target, folder / name)

    return change


def replaced_by_folder(name):
    def change(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


READ_AGAIN = "could not be read|has unexpected content"
FOLDERS = {
    "shard_missing": (lambda folder: (folder / FIRST).unlink(), f"{FIRST} is missing from .* Download that file"),
    "shard_empty": (lambda folder: (folder / FIRST).write_bytes(b""), f"{FIRST} {DAMAGED}"),
    "shard_cut": (
        lambda folder: (folder / FIRST).write_bytes((folder / FIRST).read_bytes()[:5000]),
        f"{FIRST} {DAMAGED}",
    ),
    "shard_html": (text_of(FIRST, "<html>404</html>"), f"{FIRST} {DAMAGED}"),
    "shard_is_a_folder": (replaced_by_folder(FIRST), f"{FIRST} is missing"),
    "shard_is_a_dangling_link": (replaced_by_link(FIRST, "nowhere.safetensors"), f"{FIRST} is missing"),
    "shard_is_a_link_to_itself": (replaced_by_link(FIRST, FIRST), f"{FIRST} is missing"),
    "shard_is_a_link_to_another_kind_of_file": (replaced_by_link(FIRST, __file__), f"{FIRST} {DAMAGED}"),
    **{f"index_{name}": (text_of(INDEX, text), READ_AGAIN) for name, text in UNREADABLE.items()},
    "index_utf16": (lambda folder: (folder / INDEX).write_bytes("{}".encode("utf-16")), READ_AGAIN),
    "index_is_a_folder": (replaced_by_folder(INDEX), READ_AGAIN),
    **{
        f"index_with_{name}": (text_of(INDEX, text), "lists no weights. Download that file again")
        for name, text in {
            "list_as_map": '{"weight_map": [1]}',
            "empty_map": '{"weight_map": {}}',
            "no_map": '{"metadata": {}}',
            "text_as_map": '{"weight_map": "x"}',
        }.items()
    },
    **{
        f"shard_named_{name}": (
            shard_named(value),
            "which is not a safetensors file of that folder. Download the index again",
        )
        for name, value in {
            "parent": "../../secret.safetensors",
            "absolute": "/etc/secret.safetensors",
            "subfolder": "sub/x.safetensors",
            "dots": "..",
            "dot": ".",
            "nothing": "",
            "other_suffix": "x.bin",
            "backslashes": "..\\x.safetensors",
            "drive": "C:\\x.safetensors",
            "drive_relative": "C:x.safetensors",
            "number": 5,
            "null": None,
            "list": [],
            "table": {"a": 1},
        }.items()
    },
    "shard_named_nul": (shard_named("\0.safetensors"), "is missing from"),
    "shard_named_with_300_letters": (shard_named("a" * 300 + ".safetensors"), "is missing from"),
    "shard_named_lone_surrogate": (shard_named("\ud800.safetensors"), "is missing from"),
    "index_with_shards_mixed_up": (shard_of_all(lambda names: names[::-1]), None),
    "index_without_one_shard": (shard_of_all(lambda names: names[:1] * len(names)), INCOMPLETE),
    "index_missing": (lambda folder: (folder / INDEX).unlink(), None),
    **{f"config_{name}": (text_of(CONFIG, text), READ_AGAIN) for name, text in UNREADABLE.items()},
    **{
        f"config_with_{name}": (text_of(CONFIG, text), "which does not match them. Download .* the config.json")
        for name, text in {
            "text_as_axes": '{"axes_dims_rope": "x"}',
            "two_axes": '{"axes_dims_rope": [1, 2]}',
            "no_axes": '{"axes_dims_rope": null}',
            "no_heads": '{"connector_heads_num": 0}',
            "nan_heads": '{"connector_heads_num": NaN}',
        }.items()
    },
    "other_folder_in_index_name": (
        lambda folder: (folder / f"a{INDEX}").write_text(json.dumps({"weight_map": {"a": FIRST}})),
        INCOMPLETE,
    ),
}


@pytest.fixture
def repository(root, weights):
    folder = diffusers_repository(root / "diffusers" / "repository", to_diffusers(weights))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("change, expected", FOLDERS.values(), ids=FOLDERS)
def test_model_folders(host, repository, memory, change, expected):
    change(repository / "transformer")
    check(host, memory, load_model(host, model="repository/"), expected)


CLASSES = {
    **{name: (text, READ_AGAIN) for name, text in UNREADABLE.items()},
    "flux": (
        '{"_class_name": "FluxPipeline"}',
        "belongs to the pipeline FluxPipeline, which this node pack does not support. Choose",
    ),
    **{
        name: (f'{{"_class_name": {text}}}', "could not be loaded|belongs to the pipeline")
        for name, text in {"list": '["a"]', "table": "{}", "number": "5"}.items()
    },
    "none": ("{}", "Choose the version in 'Load Step1X-Edit Model'"),
}


@pytest.mark.parametrize("text, expected", CLASSES.values(), ids=CLASSES)
def test_repositories_of_another_class(host, repository, memory, text, expected):
    (repository / "model_index.json").write_text(text)
    check(host, memory, load_model(host, model="repository/"), expected)


def test_links_of_the_users_own_are_followed(host, root, repository, tmp_path):
    """Shards of the Hugging Face cache are links to files elsewhere; a link back to the folder must not be followed for ever."""
    shard = repository / "transformer" / FIRST
    shard.rename(tmp_path / "blob")
    os.symlink(tmp_path / "blob", shard)
    load_model(host, model="repository/").made()
    os.symlink(root / "diffusion_models", root / "diffusion_models" / "loop")
    try:
        load_model(host, model=tiny_models.V11_FILE).made()
    finally:
        (root / "diffusion_models" / "loop").unlink()
    shutil.move(repository, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", repository)
    try:
        load_model(host, model="repository/").made()
        for name in ("repository/../elsewhere/", "repository/../../elsewhere/", "repository/transformer/../../elsewhere/"):
            check(host, peak_memory(), load_model(host, model=name), NOT_IN_LIST)
            assert "refresh the node list" in load_model(host, model=Given(name)).error[1]
    finally:
        repository.unlink()
        shutil.move(tmp_path / "elsewhere", repository)


NAMES = {
    "parent": "../../x.safetensors",
    "absolute": "/etc/passwd",
    "backslashes": "..\\x.safetensors",
    "dot": f"./{tiny_models.V11_FILE}",
    "nothing": "",
    "nul": "\0",
    "parent_folder": "../",
    "parent_of_a_file": f"{tiny_models.V11_FILE}/../../x.safetensors",
    "absolute_folder": "/",
    "line_break": "a\nb",
    "lone_surrogate": "\ud800",
    "5000_letters": "a" * 5000,
    "folder_of_the_file": tiny_models.V11_FILE + "/",
}
LOADERS = sorted({entry.node for entry in entries() if entry.is_file})


@pytest.mark.parametrize("node", LOADERS)
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_names_outside_the_model_folders(host, memory, name, node):
    """Typed in, and handed over by another node, which the host does not check."""
    check(host, memory, load(host, node, name), NOT_IN_LIST)
    linked = load(host, node, Given(name))
    assert linked.error[0].endswith("Step1XError") and (
        "refresh the node list" in linked.error[1] or "one of the entries of its list" in linked.error[1]
    ), linked
