"""Laws of checkpoints: every format loads exactly, every saved one is diffusers', every damage is one clear error."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lensmini.checkpoints import (
    CheckpointError,
    export_diffusers,
    load_transformer,
    save_single_file,
    save_transformer,
)
from lensmini.nn import LensConfig, LensTransformer
from tests.golden_cases import golden
from tests.strategies import tensor

TINY = LensConfig(
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=6,
    axes_dims_rope=(2, 2, 2),
    in_channels=4,
    out_channels=1,
    enc_hidden_dim=4,
    selected_layer_index=(1, 3),
)
# Every released key at a small width; its RoPE and layers are the released ones, so that shapes tell the rest.
NARROW = LensConfig(num_attention_heads=1, in_channels=8, out_channels=2, enc_hidden_dim=8)
PREFIXES = ["model.diffusion_model.", "diffusion_model.", "transformer.", "net.", ""]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WEIGHTS = "diffusion_pytorch_model"
CLASS = {"_class_name": "LensTransformer2DModel"}
RELEASED = golden("released_state_dict")[1]


def published_config(config: LensConfig) -> dict:
    """A config.json as published, spelled out from the golden one."""
    names = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "enc_hidden_dim")
    values = {name: getattr(config, name) for name in names}
    values |= {"axes_dims_rope": list(config.axes_dims_rope), "selected_layer_index": list(config.selected_layer_index)}
    values["inner_dim"] = config.num_attention_heads * config.attention_head_dim
    return {**CLASS, "_diffusers_version": "0.36.0", **RELEASED["model_config"], **values}


def weights(config: LensConfig, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LensTransformer(config).state_dict().items()}
    return {name: tensor(shape, seed, dtype) for seed, (name, shape) in enumerate(shapes.items())}


def write_folder(folder: Path, state: dict[str, torch.Tensor], config: LensConfig, shards: int = 1) -> Path:
    """A transformer folder as published, written without the library."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(published_config(config)))
    if shards == 1:
        save_file(state, folder / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {name: f"{WEIGHTS}-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(state)}
    for file in set(weight_map.values()):
        save_file({name: state[name] for name in state if weight_map[name] == file}, folder / file)
    total = sum(value.nbytes for value in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps(index))
    return folder


def same(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> bool:
    """Bit equality, names and dtypes included."""
    found = model.state_dict()
    return found.keys() == state.keys() and all(
        found[name].dtype == value.dtype and found[name].equal(value) for name, value in state.items()
    )


def tree(folder: Path) -> dict[str, bytes | None]:
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


@pytest.fixture(scope="module")
def narrow() -> dict[str, torch.Tensor]:
    return weights(NARROW)


@pytest.fixture(scope="module")
def tiny() -> dict[str, torch.Tensor]:
    return weights(TINY)


def test_the_narrow_model_has_every_released_key(narrow):
    assert narrow.keys() == RELEASED["tensors"].keys() and len(narrow) == RELEASED["tensor_count"] == 1264


@pytest.mark.parametrize("form", ["single", "shards", "pipeline", "subfolder", "renamed"])
def test_folders_load_exactly(tmp_path, narrow, form):
    folder = write_folder(tmp_path / "transformer", narrow, NARROW, shards=3 if form == "shards" else 1)
    if form == "pipeline":
        (tmp_path / "model_index.json").write_text(
            json.dumps({"_class_name": "LensPipeline", "transformer": ["diffusers", "LensTransformer2DModel"]})
        )
        # What lies beside the transformer is another component's business.
        save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    if form == "renamed":
        (folder / f"{WEIGHTS}.safetensors").rename(folder / "model.safetensors")
    where = {"subfolder": "transformer"} if form == "subfolder" else {}
    model = load_transformer(folder if form in ("single", "shards", "renamed") else str(tmp_path), **where)
    assert same(model, narrow) and model.config == NARROW
    assert not model.training and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("prefix", PREFIXES)
def test_single_files_load_exactly_whatever_their_prefix(tmp_path, narrow, prefix):
    file = tmp_path / "lens.safetensors"
    others = {"vae.decoder.conv.weight": torch.zeros(3), "text_encoders.x": torch.zeros(2, dtype=torch.uint8)}
    save_file({prefix + name: value for name, value in narrow.items()} | (others if prefix else {}), file)
    model = load_transformer(file)
    assert same(model, narrow) and model.config == NARROW


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", [None, *DTYPES])
def test_values_are_the_stored_ones_in_the_asked_dtype(tmp_path, stored, wanted):
    state = weights(TINY, stored)
    write_folder(tmp_path, state, TINY)
    model = load_transformer(tmp_path, dtype=wanted)
    assert same(model, {name: value.to(wanted or stored) for name, value in state.items()})


def test_a_golden_checkpoint_gives_the_published_velocity(tmp_path):
    tensors, meta = golden("dit_b_blocks_odd")
    state = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    save_file({f"net.{name}": value for name, value in state.items()}, tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CLASS | meta["model_config"]))
    model = load_transformer(tmp_path / "a.safetensors")
    tokens, (_, height, width) = tensors["inputs.hidden_states"], _first_grid(meta["img_shapes"])
    latents = tokens.transpose(1, 2).unflatten(2, (height, width))
    features = [tensors[f"inputs.encoder_hidden_states.{i}"] for i in range(len(model.config.selected_layer_index))]
    with torch.no_grad():
        output = model(
            latents, tensors["inputs.timestep"], features, tensors["inputs.encoder_hidden_states_mask"].bool()
        )
    expected = tensors["outputs.sample"]
    assert (output.flatten(2).transpose(1, 2) - expected).abs().max() < 3e-5 * expected.abs().max()


def _first_grid(shapes: list) -> list[int]:
    while isinstance(shapes[0], list):
        shapes = shapes[0]
    return shapes


@pytest.mark.parametrize("shards", [1, 4])
def test_the_released_size_loads_strictly_on_meta(tmp_path, shards):
    tensors = list(RELEASED["tensors"].items())
    weight_map = {}
    for number in range(shards):
        file = tmp_path / (
            f"{WEIGHTS}-{number + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else f"{WEIGHTS}.safetensors"
        )
        header, position = {}, 0
        for name, shape in tensors[number::shards]:
            end = position + 4 * torch.Size(shape).numel()
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, end]}
            position, weight_map[name] = end, file.name
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(file, 8 + len(text) + position)  # a sparse file: gigabytes that take no room
    if shards > 1:
        index = {"metadata": {"total_size": 4 * RELEASED["parameter_count"]}, "weight_map": weight_map}
        (tmp_path / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(CLASS | RELEASED["model_config"]))
    model = load_transformer(tmp_path, device="meta", dtype=torch.bfloat16)
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == RELEASED["tensors"]
    assert sum(parameter.numel() for parameter in model.parameters()) == RELEASED["parameter_count"]
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def test_the_model_does_not_depend_on_the_file_afterwards(tmp_path, tiny):
    write_folder(tmp_path, tiny, TINY)
    model = load_transformer(tmp_path)
    file = tmp_path / f"{WEIGHTS}.safetensors"
    with file.open("r+b") as handle:
        handle.write(b"\xff" * file.stat().st_size)
    assert same(model, tiny)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts memory as Linux does")
@pytest.mark.parametrize("dtypes", [("float32", "None"), ("bfloat16", "torch.float32")], ids=str)
def test_at_most_one_tensor_is_in_memory_besides_the_model(tmp_path, dtypes):
    config = LensConfig(num_layers=5, num_attention_heads=8, enc_hidden_dim=16)
    state = {name: value.to(getattr(torch, dtypes[0])) for name, value in LensTransformer(config).state_dict().items()}
    largest = 4 * max(value.numel() for value in state.values())
    assert sum(4 * value.numel() for value in state.values()) > 180e6
    write_folder(tmp_path, state, config)
    source = f"""
        import re, sys, torch
        from pathlib import Path
        torch.set_num_threads(1)
        from lensmini.checkpoints import transformer as checkpoints
        def anonymous():
            return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
        checkpoints.load_transformer(sys.argv[1], dtype={dtypes[1]})  # whatever is imported or kept, once
        import gc; gc.collect()
        assign, held, excess = checkpoints._assign, 0, []
        def counted(model, name, tensor):
            global held
            held += tensor.nbytes
            excess.append(anonymous() - start - held)
            assign(model, name, tensor)
        checkpoints._assign = counted
        start = anonymous()
        checkpoints.load_transformer(sys.argv[1], dtype={dtypes[1]})
        print(max(excess))
    """
    command = [sys.executable, "-c", textwrap.dedent(source), str(tmp_path)]
    excess = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert excess < largest + 16 * 2**20


class TestConfiguration:
    def test_metadata_then_the_file_beside_then_shapes(self, tmp_path, narrow):
        file = tmp_path / "a.safetensors"
        layers = {"selected_layer_index": [1, 2, 3, 4]}
        beside = {"selected_layer_index": [2, 3, 4, 5]}
        save_file(narrow, file, metadata={"config": json.dumps(published_config(NARROW) | layers)})
        (tmp_path / "config.json").write_text(json.dumps(published_config(NARROW) | beside))
        assert load_transformer(file).config.selected_layer_index == (1, 2, 3, 4)
        assert load_transformer(file, config=NARROW).config == NARROW
        save_file(narrow, file)
        assert load_transformer(file).config.selected_layer_index == (2, 3, 4, 5)
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel", "guidance": True}))
        assert load_transformer(file).config == NARROW

    def test_what_shapes_do_not_tell_is_asked_for(self, tmp_path, tiny):
        file = tmp_path / "a.safetensors"
        save_file(tiny, file)
        with pytest.raises(CheckpointError, match=r"a\.safetensors: .*config=.*axes_dims_rope.*selected_layer_index"):
            load_transformer(file)
        assert same(load_transformer(file, config=TINY), tiny)

    def test_a_configuration_of_another_model_is_named(self, tmp_path, tiny):
        write_folder(tmp_path, tiny, TINY)
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
        with pytest.raises(CheckpointError, match=r"config\.json: expected LensTransformer2DModel, found 'Flux"):
            load_transformer(tmp_path)

    @pytest.mark.parametrize(
        "change",
        [
            {"num_layers": 10**9},
            {"num_layers": 10**400},
            {"num_attention_heads": 10**12, "inner_dim": 6 * 10**12},
            {"in_channels": 10**15},
            {"patch_size": 10**9},
            {"selected_layer_index": list(range(10**5))},
            {"selected_layer_index": None},
            {"axes_dims_rope": {"a": 1}},
            {"axes_dims_rope": "222"},
            {"num_layers": 2.0},
            {"num_layers": True},
            {"num_layers": -1},
            {"gate_mlp": False},
            {"inner_dim": 13},
            {"auto_map": {"AutoModel": "evil.py"}},
            {"_class_name": ["x"]},
        ],
        ids=lambda change: ",".join(change),
    )
    def test_a_hostile_configuration_is_refused_before_anything_is_built(self, tmp_path, tiny, change):
        write_folder(tmp_path, tiny, TINY)
        (tmp_path / "config.json").write_text(json.dumps(published_config(TINY) | change))
        with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
            load_transformer(tmp_path)


def shard(folder: Path, number: int = 1) -> Path:
    return folder / f"{WEIGHTS}-{number:05d}-of-00002.safetensors"


def index(folder: Path) -> Path:
    return folder / f"{WEIGHTS}.safetensors.index.json"


def edit_index(folder: Path, change) -> None:
    content = json.loads(index(folder).read_text())
    change(content)
    index(folder).write_text(json.dumps(content))


def edit_shard(folder: Path, change) -> None:
    state = load_file(shard(folder))
    change(state)
    save_file(state, shard(folder))
    weight_map = {name: shard(folder, n).name for n in (1, 2) for name in load_file(shard(folder, n))}
    index(folder).write_text(json.dumps({"weight_map": weight_map}))


def raw_header(path: Path, header: str, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header.encode())) + header.encode() + data)


def first_map(folder: Path, value: object) -> None:
    edit_index(folder, lambda content: content["weight_map"].__setitem__(next(iter(content["weight_map"])), value))


def link_out(folder: Path) -> None:
    shutil.move(shard(folder), folder.parent / "outside.safetensors")
    shard(folder).symlink_to(folder.parent / "outside.safetensors")


NAME = "img_in.bias"
CORRUPTIONS = {
    "missing shard": (lambda f: shard(f, 2).unlink(), r"00002-of-00002\.safetensors: expected a file, found none"),
    "missing config": (lambda f: (f / "config.json").unlink(), "expected config="),
    "missing tensor": (
        lambda f: edit_shard(f, lambda state: state.pop(next(iter(state)))),
        "expected the 66 tensors .* found missing 1 ",
    ),
    "unexpected tensor": (
        lambda f: edit_shard(f, lambda state: state.update({"extra.weight": torch.zeros(1)})),
        r"unexpected 1 \(extra\.weight\)",
    ),
    "wrong shape": (
        lambda f: edit_shard(
            f, lambda state: state.update({next(n for n in state if n.endswith("norm_q.weight")): torch.zeros(5)})
        ),
        r"mis-shaped 1 \(.*norm_q\.weight: expected \[6\], found \[5\]\)",
    ),
    "integers": (
        lambda f: edit_shard(f, lambda state: state.update({n: v.int() for n, v in list(state.items())[:1]})),
        "expected dtypes F64, F32, F16, BF16, found 1 .*: I32",
    ),
    "fp8": (
        lambda f: edit_shard(f, lambda state: state.update({n: v.to(torch.float8_e4m3fn) for n, v in state.items()})),
        "expected dtypes .*: F8_E4M3",
    ),
    "wrong prefix": (
        lambda f: edit_shard(f, lambda state: [state.update({f"model.{n}": state.pop(n)}) for n in list(state)]),
        r"missing 33 .*unexpected 33 \(model\.",
    ),
    "two prefixes": (
        lambda f: edit_shard(f, lambda state: [state.update({f"net.{n}": state.pop(n)}) for n in list(state)]),
        r"found 33 under 'net\.', 33 under ''",
    ),
    "truncated": (lambda f: os.truncate(shard(f), shard(f).stat().st_size - 5), "truncated"),
    "truncated header": (lambda f: os.truncate(shard(f), 100), "truncated"),
    "empty": (lambda f: shard(f).write_bytes(b""), "expected a safetensors file, found 0 bytes"),
    "trailing bytes": (lambda f: shard(f).write_bytes(shard(f).read_bytes() + b"x"), "expected .* bytes of tensors"),
    "zip pickle": (lambda f: torch.save({"x": torch.zeros(2)}, shard(f)), "zip archive.*pickle"),
    "bare pickle": (
        lambda f: torch.save({"x": torch.zeros(2)}, shard(f), _use_new_zipfile_serialization=False),
        "found a pickle",
    ),
    "LFS pointer": (lambda f: shard(f).write_text("version https://git-lfs.github.com/spec/v1\noid x"), "LFS pointer"),
    "web page": (lambda f: shard(f).write_text("<!DOCTYPE html><html></html>"), "a web page"),
    "folder as shard": (lambda f: (shard(f).unlink(), shard(f).mkdir()), "something else of that name"),
    "pipe": (lambda f: (shard(f).unlink(), os.mkfifo(shard(f))), "something else of that name"),
    "pipe as config": (
        lambda f: ((f / "config.json").unlink(), os.mkfifo(f / "config.json")),
        "something else of that name",
    ),
    "huge header length": (lambda f: shard(f).write_bytes(b"\xff" * 8 + b"{}"), "truncated or damaged"),
    "overlap": (
        lambda f: raw_header(
            shard(f),
            json.dumps({n: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for n in "ab"}),
            b"1234",
        ),
        "without holes or overlaps",
    ),
    "hole": (
        lambda f: raw_header(
            shard(f), json.dumps({"a": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]}}), b"123456"
        ),
        "without holes or overlaps",
    ),
    "size overflow": (
        lambda f: raw_header(shard(f), json.dumps({"a": {"dtype": "U8", "shape": [2**61, 8], "data_offsets": [0, 0]}})),
        "expected the bytes of a",
    ),
    "negative sizes": (
        lambda f: raw_header(shard(f), '{"a": {"dtype": "U8", "shape": [-1, -1], "data_offsets": [0, 1]}}', b"x"),
        "whole numbers",
    ),
    "unknown dtype": (
        lambda f: raw_header(shard(f), '{"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 1]}}', b"x"),
        "known dtype of a, found 'Q9'",
    ),
    "header twice": (
        lambda f: raw_header(shard(f), '{"__metadata__": {}, "__metadata__": {}}'),
        "the key '__metadata__' twice",
    ),
    "path traversal": (
        lambda f: (shutil.move(shard(f), f.parent / "x.safetensors"), first_map(f, "../x.safetensors")),
        r"plain names .*, found '\.\./x\.safetensors'",
    ),
    "absolute path": (lambda f: first_map(f, str(shard(f).resolve())), "plain names"),
    "number as path": (lambda f: first_map(f, 3), "plain names"),
    "pickle as shard": (lambda f: first_map(f, "pytorch_model.bin"), "plain names"),
    "link out": (link_out, "expected a file inside its folder, found a link to .*outside"),
    "dead link": (lambda f: (shard(f).unlink(), shard(f).symlink_to("gone")), "found none"),
    "index of others": (
        lambda f: first_map(f, shard(f, 2).name),
        "expected the tensors of .*index.json, found missing 1",
    ),
    "total size": (lambda f: edit_index(f, lambda c: c["metadata"].update(total_size=7)), "total_size .*, found 7"),
    "no weight map": (lambda f: index(f).write_text("{}"), "expected a weight_map"),
    "list as index": (lambda f: index(f).write_text("[]"), "expected a JSON object, found a list"),
    "deep json": (lambda f: index(f).write_text("[" * 10**5), "deep, found deeper"),
    "rather deep json": (lambda f: index(f).write_text('{"a":' * 40 + "1" + "}" * 40), "deep, found deeper"),
    "huge json": (lambda f: index(f).write_text(" " * (16 * 2**20 + 1)), "at most 16777216 bytes"),
    "key twice": (lambda f: (f / "config.json").write_text('{"a": 1, "a": 2}'), "the key 'a' twice"),
    "NaN": (lambda f: (f / "config.json").write_text('{"num_layers": NaN}'), "the number NaN"),
    "infinite": (lambda f: (f / "config.json").write_text('{"num_layers": 1e999}'), "the number 1e999"),
    "huge number": (lambda f: (f / "config.json").write_text('{"num_layers": ' + "9" * 5000 + "}"), "valid JSON"),
    "not UTF-8": (lambda f: (f / "config.json").write_bytes(b'{"\xff": 1}'), "valid JSON"),
    "only pickles": (
        lambda f: ([path.unlink() for path in f.iterdir()], (f / "pytorch_model.bin").write_bytes(b"")),
        r"only files that could run code when read: 1 \(pytorch_model\.bin\)",
    ),
    "nothing": (lambda f: [path.unlink() for path in f.iterdir()], "expected diffusion_pytorch_model"),
}


@pytest.mark.parametrize("damage", CORRUPTIONS)
def test_damage_is_one_clear_error_and_writes_nothing(tmp_path, tiny, damage):
    folder = write_folder(tmp_path / "model", tiny, TINY, shards=2)
    assert same(load_transformer(folder), tiny)
    corrupt, message = CORRUPTIONS[damage]
    corrupt(folder)
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_transformer(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 2100
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["foreign", "a prefix nobody uses"])
def test_another_models_file_is_named(tmp_path, tiny, kind):
    state = {"conv.weight": torch.zeros(1)} if kind == "foreign" else {f"unet.{name}": v for name, v in tiny.items()}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.safetensors: expected a Lens transformer's tensors under one of"):
        load_transformer(tmp_path / "a.safetensors")


def test_long_lists_and_control_characters_stay_readable(tmp_path, narrow):
    state = {name: value for name, value in narrow.items() if "img_mlp" not in name}
    state["proj_out.\x1b[2J\n"] = torch.zeros(1)
    write_folder(tmp_path, state, NARROW)
    with pytest.raises(CheckpointError, match=r"missing 144 \((\S+, ){8}\.\.\.\); unexpected 1") as caught:
        load_transformer(tmp_path)
    assert str(caught.value).isprintable()


def test_a_configuration_of_more_blocks_than_the_file_can_hold_is_refused_before_building(tmp_path, tiny):
    folder = write_folder(tmp_path / "many", tiny, TINY)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "num_layers": len(tiny)}))
    with pytest.raises(CheckpointError, match="expected sizes that fit the"):
        load_transformer(folder)


def check_random_damage(tmp_path, tiny, data):
    """Whatever bytes are changed or cut off: the tensors that the files hold, or a CheckpointError."""
    folder = write_folder(tmp_path / "model", tiny, TINY, shards=2)
    path = data.draw(st.sampled_from([shard(folder), index(folder), folder / "config.json"]))
    content = bytearray(path.read_bytes())
    # Values cannot be told from damaged ones; everything before them can.
    header = 8 + int.from_bytes(content[:8], "little") if path == shard(folder) else len(content)
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for place, value in data.draw(
            st.dictionaries(st.integers(0, header - 1), st.integers(0, 255), max_size=3)
        ).items():
            content[place] = value
    path.write_bytes(content)
    try:
        model = load_transformer(folder)
    except CheckpointError:
        return
    assert same(model, tiny)


FOLDER_IS_REWRITTEN = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(suppress_health_check=FOLDER_IS_REWRITTEN)
@given(data=st.data())
def test_random_damage_never_passes_unseen(tmp_path, tiny, data):
    check_random_damage(tmp_path, tiny, data)


@pytest.mark.slow
@settings(max_examples=3000, suppress_health_check=FOLDER_IS_REWRITTEN)
@given(data=st.data())
def test_much_random_damage_never_passes_unseen(tmp_path, tiny, data):
    check_random_damage(tmp_path, tiny, data)


class TestSaving:
    @pytest.mark.parametrize("limit", [10**9, 3000, 1])
    @pytest.mark.parametrize("dtype", [None, torch.bfloat16])
    def test_save_then_load_is_the_identity(self, tmp_path, tiny, limit, dtype):
        model = LensTransformer(TINY)
        model.load_state_dict(tiny)
        save_transformer(model, tmp_path / "a" / "b", max_shard_bytes=limit, dtype=dtype)
        loaded = load_transformer(tmp_path / "a" / "b")
        assert same(loaded, {name: value.to(dtype or value.dtype) for name, value in tiny.items()})
        assert loaded.config == TINY
        files = list((tmp_path / "a" / "b").glob("*.safetensors"))
        largest = max(value.nbytes for value in tiny.values())
        assert all(sum(v.nbytes for v in load_file(file).values()) <= max(limit, largest) for file in files)
        assert len(files) == {10**9: 1, 1: len(tiny)}.get(limit, len(files)) and os.listdir(tmp_path / "a") == ["b"]

    @pytest.mark.parametrize("prefix", PREFIXES)
    def test_a_single_file_has_prefix_and_configuration(self, tmp_path, tiny, prefix):
        model = LensTransformer(TINY)
        model.load_state_dict(tiny)
        path = tmp_path / "lens.safetensors"
        for _ in range(2):
            save_single_file(model, path, prefix=prefix)
        assert load_file(path).keys() == {prefix + name for name in tiny}
        loaded = load_transformer(path)
        assert same(loaded, tiny) and loaded.config == TINY and os.listdir(tmp_path) == ["lens.safetensors"]

    def test_an_earlier_save_is_replaced_and_nothing_else(self, tmp_path):
        model = LensTransformer(TINY)
        save_transformer(model, tmp_path / "a", max_shard_bytes=3000)
        save_transformer(model, tmp_path / "a")
        assert sorted(os.listdir(tmp_path / "a")) == ["config.json", f"{WEIGHTS}.safetensors"]
        (tmp_path / "a" / "thesis.tex").write_text("")
        before = tree(tmp_path)
        for write in (
            lambda: save_transformer(model, tmp_path / "a"),
            lambda: export_diffusers(tmp_path / "a", transformer=model),
            lambda: save_transformer(model, tmp_path / "a" / "thesis.tex"),
        ):
            with pytest.raises(CheckpointError, match="expected .*folder"):
                write()
        assert tree(tmp_path) == before

    @pytest.mark.parametrize("theirs", ["notes", "component", "download"])
    def test_an_export_removes_nothing_of_anybody_elses(self, tmp_path, theirs):
        model, folder = LensTransformer(TINY), tmp_path / "pipe"
        export_diffusers(folder, transformer=model)
        export_diffusers(folder, transformer=model, variant="Lens-Turbo")
        if theirs == "notes":
            (folder / "transformer" / "my_notes.md").write_text("mine")
        elif theirs == "component":
            (folder / "vae").mkdir()
            (folder / "vae" / "config.json").write_text("{}")
        else:
            values = json.loads((folder / "model_index.json").read_text())
            del values["lens_variant"]
            (folder / "model_index.json").write_text(json.dumps(values))
        before = tree(tmp_path)
        with pytest.raises(CheckpointError, match="expected .*folder"):
            export_diffusers(folder, transformer=model)
        assert tree(tmp_path) == before

    def test_a_failure_leaves_the_earlier_save(self, tmp_path, monkeypatch):
        model = LensTransformer(TINY)
        save_transformer(model, tmp_path / "a")
        save_single_file(model, tmp_path / "b.safetensors")
        before = tree(tmp_path)

        def full(*args, **kwargs):
            Path(args[1]).write_bytes(b"half")
            raise OSError("no space left")

        monkeypatch.setattr("lensmini.checkpoints.export.save_file", full)
        with pytest.raises(OSError, match="no space"):
            save_transformer(model, tmp_path / "a")
        with pytest.raises(OSError, match="no space"):
            save_single_file(model, tmp_path / "b.safetensors")
        assert tree(tmp_path) == before

    @pytest.mark.parametrize(
        ("save", "name"),
        [
            (lambda model, path: save_transformer(torch.nn.Linear(1, 1), path), "model"),
            (lambda model, path: save_transformer(model.to("meta"), path), "model"),
            (lambda model, path: save_transformer(model.append_nothing(), path), "model"),
            (lambda model, path: save_transformer(model, path, dtype=torch.int8), "dtype"),
            (lambda model, path: save_transformer(model, path, max_shard_bytes=0), "max_shard_bytes"),
            (lambda model, path: save_single_file(model, path), "path"),
            (lambda model, path: save_single_file(model, f"{path}.safetensors", prefix="x."), "prefix"),
            (lambda model, path: export_diffusers(path, transformer=model, variant="Lens-9"), "variant"),
            (lambda model, path: export_diffusers(path, transformer=model, vae=3), "vae"),
            (
                lambda model, path: export_diffusers(path, transformer=model, scheduler_config={"shift": float("nan")}),
                "scheduler_config",
            ),
        ],
    )
    def test_wrong_arguments_are_named_and_nothing_is_written(self, tmp_path, save, name):
        class Adapted(LensTransformer):
            def append_nothing(self):
                self.adapter = torch.nn.Linear(1, 1)
                return self

        with pytest.raises(ValueError, match=f"^{name}: expected .* got"):
            save(Adapted(TINY), tmp_path / "a")
        assert not os.listdir(tmp_path)


class TestDiffusers:
    @pytest.mark.parametrize("limit", [10**9, 3000])
    def test_its_own_loader_reads_what_we_save(self, tmp_path, tiny, limit):
        modeling = pytest.importorskip("diffusers.models.modeling_utils")
        configuration = pytest.importorskip("diffusers.configuration_utils")

        class LensTransformer2DModel(modeling.ModelMixin, configuration.ConfigMixin):
            @configuration.register_to_config
            def __init__(
                self, num_layers, num_attention_heads, attention_head_dim, axes_dims_rope, in_channels, out_channels,
                patch_size, enc_hidden_dim, selected_layer_index, inner_dim, gate_mlp, rms_norm,
                multi_layer_encoder_feature,
            ):  # fmt: skip
                super().__init__()
                assert gate_mlp and rms_norm and multi_layer_encoder_feature and inner_dim == 12
                for name, module in LensTransformer(TINY).named_children():
                    setattr(self, name, module)

        model = LensTransformer(TINY)
        model.load_state_dict(tiny)
        save_transformer(model, tmp_path, max_shard_bytes=limit)
        theirs, report = LensTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values()) and same(theirs, tiny)
        for name, value in published_config(TINY).items():
            assert name.startswith("_") or theirs.config[name] == value or theirs.config[name] == tuple(value)
        theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB" if limit == 3000 else "10GB")
        again = load_transformer(tmp_path / "theirs")
        assert same(again, tiny) and again.config == TINY

    def test_a_whole_pipeline_is_read_by_diffusers_and_transformers(self, tmp_path):
        diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        blocks |= {"block_out_channels": (4, 4), "layers_per_block": 1, "norm_num_groups": 2}
        vae = diffusers.AutoencoderKLFlux2(latent_channels=2, **blocks)
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        language = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=8, num_key_value_heads=1, **sizes))
        model = LensTransformer(TINY)
        folder = tmp_path / "pipeline"
        for variant in ("Lens", "Lens-Turbo"):
            export_diffusers(folder, transformer=model, vae=vae, text_encoder=language, variant=variant)
        assert same(load_transformer(folder), dict(model.state_dict()))
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
        expected = {"num_train_timesteps": 1000, "use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5}
        expected |= {"max_shift": 1.15, "time_shift_type": "exponential"}
        assert {name: scheduler.config[name] for name in expected} == expected
        theirs, report = diffusers.AutoencoderKLFlux2.from_pretrained(folder, subfolder="vae", output_loading_info=True)
        assert not any(report.values()) and same(theirs, dict(vae.state_dict()))
        encoder = transformers.LlamaForCausalLM.from_pretrained(folder / "text_encoder")
        assert same(encoder, dict(language.state_dict()))
        assert json.loads((folder / "model_index.json").read_text()) == {
            "_class_name": "LensPipeline",
            "_diffusers_version": diffusers.__version__,
            "lens_variant": "Lens-Turbo",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "transformer": ["diffusers", "LensTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKLFlux2"],
            "text_encoder": ["transformers", "LlamaForCausalLM"],
        }
        assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".py")]

    def test_an_interrupted_export_leaves_nothing(self, tmp_path):
        class Broken:
            def save_pretrained(self, folder, **options):
                raise RuntimeError("cannot")

        with pytest.raises(RuntimeError, match="cannot"):
            export_diffusers(tmp_path / "a", transformer=LensTransformer(TINY), vae=Broken())
        assert not os.listdir(tmp_path)


class TestHub:
    @pytest.fixture
    def cache(self, tmp_path, tiny) -> Path:
        """A Hub cache as the client lays it out: blobs, and a snapshot of links to them."""
        repository = tmp_path / "hub" / "models--microsoft--Lens"
        commit = "0123456789abcdef0123456789abcdef01234567"
        snapshot = repository / "snapshots" / commit
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        write_folder(snapshot / "transformer", tiny, TINY, shards=2)
        (snapshot / "model_index.json").write_text('{"_class_name": "LensPipeline"}')
        (repository / "blobs").mkdir()
        for number, path in enumerate(path for path in sorted(snapshot.rglob("*")) if path.is_file()):
            blob = repository / "blobs" / f"{number:040x}"
            path.rename(blob)
            path.symlink_to(os.path.relpath(blob, path.parent))
        return tmp_path / "hub"

    @pytest.mark.parametrize("subfolder", [None, "transformer"])
    def test_a_cached_repository_loads_offline(self, cache, tiny, subfolder):
        model = load_transformer("microsoft/Lens", cache_dir=cache, local_files_only=True, subfolder=subfolder)
        assert same(model, tiny)
        (snapshot,) = cache.glob("*/snapshots/*")
        assert same(load_transformer(snapshot), tiny)

    def test_the_clients_offline_switch_is_respected(self, cache, tiny, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert same(load_transformer("microsoft/Lens", cache_dir=cache), tiny)

    def test_what_is_not_cached_names_the_repository(self, cache):
        for missing in ({"path_or_repo": "microsoft/Other"}, {"path_or_repo": "microsoft/Lens", "revision": "v9"}):
            with pytest.raises(CheckpointError, match=f"^{missing['path_or_repo']}: .* offline"):
                load_transformer(**missing, cache_dir=cache, local_files_only=True)

    def test_a_link_out_of_the_cache_is_refused(self, cache, tmp_path):
        (snapshot,) = cache.glob("*/snapshots/*/transformer")
        target = tmp_path / "elsewhere.safetensors"
        (snapshot / shard(snapshot).name).resolve().rename(target)
        shard(snapshot).unlink()
        shard(snapshot).symlink_to(target)
        with pytest.raises(CheckpointError, match="found a link to"):
            load_transformer("microsoft/Lens", cache_dir=cache, local_files_only=True)

    @pytest.mark.parametrize("subfolder", [None, "transformer"])
    def test_only_data_is_asked_for(self, cache, tiny, monkeypatch, subfolder):
        from huggingface_hub.utils import filter_repo_objects

        asked = {}
        (snapshot,) = cache.glob("*/snapshots/*")

        def download(repo_id, **options):
            asked.update(options, repo_id=repo_id)
            return str(snapshot)

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        assert same(load_transformer("microsoft/Lens", revision="abc", subfolder=subfolder), tiny)
        assert asked["repo_id"] == "microsoft/Lens" and asked["revision"] == "abc" and not asked["local_files_only"]
        wanted = [
            "transformer/config.json",
            f"transformer/{WEIGHTS}.safetensors",
            *([] if subfolder else ["model_index.json"]),
        ]
        wanted += [f"transformer/{WEIGHTS}-00001-of-00004.safetensors", f"transformer/{WEIGHTS}.safetensors.index.json"]
        refused = [
            "transformer/model.py",
            "pipeline.py",
            "transformer/pytorch_model.bin",
            "a.pt",
            "x.ckpt",
            "README.md",
        ]
        refused += ["text_encoder/model-00001-of-00003.safetensors", f"vae/{WEIGHTS}.safetensors"]
        patterns = asked["allow_patterns"]
        assert sorted(filter_repo_objects([*wanted, *refused], allow_patterns=patterns)) == sorted(wanted)

    @pytest.mark.parametrize(
        "name", ["./gone", "/gone/x", "~/gone-x/y", "a/b.safetensors", "a/b/c", "../x", Path("a/b"), ""]
    )
    def test_what_looks_like_a_path_is_never_asked_of_the_hub(self, monkeypatch, name, tmp_path):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: pytest.fail("asked"))
        with pytest.raises(CheckpointError, match=r"found no such file|expected diffusion_pytorch_model"):
            load_transformer(name)

    def test_a_local_folder_wins(self, monkeypatch, tmp_path, tiny):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: pytest.fail("asked"))
        write_folder(tmp_path / "microsoft" / "Lens", tiny, TINY)
        assert same(load_transformer("microsoft/Lens"), tiny)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"dtype": torch.int8}, "dtype"),
        ({"dtype": torch.float8_e4m3fn}, "dtype"),
        ({"config": {"num_layers": 1}}, "config"),
        ({"subfolder": "../model"}, "subfolder"),
        ({"subfolder": "/"}, "subfolder"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, tiny, options, name):
    write_folder(tmp_path / "model", tiny, TINY)
    with pytest.raises(ValueError, match=f"^{name}: expected .* got"):
        load_transformer(tmp_path / "model", **options)
