"""Laws of a pipeline's folder: every broken or hostile autoencoder is one clear error before diffusers are called."""

import json
import os
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from lensmini.checkpoints.autoencoder import load_checked_autoencoder
from lensmini.checkpoints.files import CheckpointError
from lensmini.nn import load_autoencoder
from lensmini.pipeline.folder import find_pipeline, guess_variant

diffusers = pytest.importorskip("diffusers")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def vae(tmp_path):
    blocks = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    blocks |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    torch.manual_seed(0)
    diffusers.AutoencoderKLFlux2(latent_channels=4, **blocks).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


class Ran:
    def __reduce__(self):
        return (os.mkdir, (os.environ["RAN"],))


def test_a_checked_autoencoder_is_the_one_that_diffusers_load(vae):
    checked, plain = load_checked_autoencoder(vae.parent), load_autoencoder(vae)
    expected = plain.state_dict()
    assert checked.state_dict().keys() == expected.keys()
    assert all(value.equal(expected[name]) for name, value in checked.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_channels": 8}, "mis-shaped"),
        ({"block_out_channels": [2**19, 2**19]}, "mis-shaped"),
        ({"block_out_channels": [10**9, 10**9]}, "numbers of at most 1048576"),
        ({"block_out_channels": [8] * 10**5}, "tensors stored"),
        ({"layers_per_block": 10**6}, "tensors stored"),
        ({"layers_per_block": 40}, "numbers that config.json asks for"),
        ({"norm_num_groups": 3}, "configuration of AutoencoderKLFlux2"),
        ({"down_block_types": ["os.system", "UpDecoderBlock2D"]}, "configuration of AutoencoderKLFlux2"),
        ({"act_fn": "eval"}, "configuration of AutoencoderKLFlux2"),
        ({"_class_name": "ConsistencyDecoderVAE"}, "AutoencoderKL or AutoencoderKLFlux2"),
        ({"_class_name": ["AutoencoderKL"]}, "AutoencoderKL or AutoencoderKLFlux2"),
    ],
)
def test_a_configuration_that_does_not_fit_is_one_error(vae, changes, message):
    edit(vae, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_checked_autoencoder(vae)


def truncated(vae):
    (vae / WEIGHTS).write_bytes((vae / WEIGHTS).read_bytes()[:-8])


def pickled_as_safetensors(vae):
    (vae / WEIGHTS).write_bytes(pickle.dumps(Ran()))


def archive_as_safetensors(vae):
    with zipfile.ZipFile(vae / WEIGHTS, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(Ran()))


def only_pickled(vae):
    (vae / WEIGHTS).unlink()
    (vae / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Ran()))


def linked_weights(vae):
    (vae / WEIGHTS).rename(vae.parent / "elsewhere")
    (vae / WEIGHTS).symlink_to(vae.parent / "elsewhere")


def linked_config(vae):
    (vae / "config.json").rename(vae.parent / "elsewhere")
    (vae / "config.json").symlink_to(vae.parent / "elsewhere")


def sharded(vae):
    model = diffusers.AutoencoderKLFlux2.from_pretrained(vae)
    (vae / WEIGHTS).unlink()
    model.save_pretrained(vae, max_shard_size="20KB")
    return vae / f"{WEIGHTS}.index.json"


def missing_shard(vae):
    sharded(vae)
    sorted(vae.glob("*.safetensors"))[0].unlink()


def index_that_leaves(vae):
    index = sharded(vae)
    values = json.loads(index.read_text())
    values["weight_map"][next(iter(values["weight_map"]))] = "../../evil.safetensors"
    index.write_text(json.dumps(values))


def missing_tensor(vae):
    tensors = load_file(vae / WEIGHTS)
    tensors["extra"] = torch.zeros(tensors.pop("decoder.conv_in.weight").shape)
    save_file(tensors, vae / WEIGHTS, {"format": "pt"})


def doubled_key(vae):
    text = (vae / "config.json").read_text()
    (vae / "config.json").write_text(text.replace("{", '{"latent_channels": 4, ', 1))


def deep_json(vae):
    (vae / "config.json").write_text("[" * 10**5)


def no_config(vae):
    (vae / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "safetensors: .*truncated|covers|cover|bytes"),
        (pickled_as_safetensors, "pickle"),
        (archive_as_safetensors, "archive|pickle"),
        (only_pickled, "could run code"),
        (linked_weights, "inside its folder"),
        (linked_config, "inside its folder"),
        (missing_shard, "expected a file, found none"),
        (index_that_leaves, "plain names"),
        (missing_tensor, "missing_keys|numbers that config.json"),
        (doubled_key, "config.json"),
        (deep_json, "config.json"),
        (no_config, "config.json"),
    ],
)
def test_each_damage_is_one_error_and_runs_nothing(vae, damage, message, monkeypatch, tmp_path):
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    damage(vae)
    with pytest.raises(CheckpointError, match=message):
        load_checked_autoencoder(vae)
    assert not (tmp_path / "ran").exists()


def test_shards_load_as_the_single_file_did(vae):
    before = load_checked_autoencoder(vae).state_dict()
    sharded(vae)
    after = load_checked_autoencoder(vae).state_dict()
    assert all(value.equal(before[name]) for name, value in after.items())


@pytest.mark.slow
def test_a_hostile_configuration_takes_no_memory(vae):
    edit(vae, block_out_channels=[2**19, 2**19])
    program = (
        "import resource, sys, diffusers, torch\n"
        "from lensmini.checkpoints.autoencoder import load_checked_autoencoder\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "try: load_checked_autoencoder(sys.argv[1])\n"
        "except ValueError: print(peak() - before)\n"
    )
    run = subprocess.run([sys.executable, "-c", program, str(vae)], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 500_000, "kilobytes"


def test_the_variant_of_a_cached_repository_is_its_name():
    snapshot = "hub/models--microsoft--Lens-Turbo/snapshots/0123456789abcdef"
    assert guess_variant(snapshot) == "Lens-Turbo" and guess_variant(snapshot + "/") == "Lens-Turbo"
    assert guess_variant("hub/models--lens--other/snapshots/0123") is None
    assert guess_variant("Lens/snapshots/0123") is None


def test_finding_a_pipeline_reads_no_weights(tmp_path):
    for name in ("transformer", "vae", "text_encoder"):
        (tmp_path / name).mkdir()
    listed = ["diffusers", "LensTransformer2DModel"]
    (tmp_path / "model_index.json").write_text(json.dumps({"transformer": listed, "lens_variant": "Lens-Base"}))
    assert find_pipeline(tmp_path) == (tmp_path, "Lens-Base")
