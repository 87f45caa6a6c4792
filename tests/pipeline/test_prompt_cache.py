"""Cached features are the encoder's own, each prompt is encoded once, and damage is a miss that is told and repaired."""

import copy
import hashlib
import json
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from lensmini.nn.text_encoder import TextEncoder
from lensmini.pipeline.prompt_cache import PromptCache, encoder_fingerprint
from tests.nn.test_text_encoder import TAIL_TOKENS, TEMPLATE, make_model, make_tokenizer, prompt_encoder
from tests.strategies import seeds, tensor

KEY = "5e" * 32
PROMPTS = ["a red cube", "blue", "two big circle left of a red cube", "blue", ""]


class Counting(TextEncoder):
    """Remembers what it was asked."""

    def forward(self, prompts):
        self.asked.append(list(prompts))
        return super().forward(prompts)


def counting(model=None, **kwargs):
    encoder = Counting(model or make_model(), make_tokenizer(), layers=kwargs.pop("layers", (1, 3)), **kwargs)
    encoder.asked = []
    return encoder


def alone(encoder, prompt):
    layers, mask = TextEncoder.forward(encoder, [prompt])
    assert mask.all()
    return torch.stack([layer[0] for layer in layers], dim=1)


@settings(max_examples=20)
@given(
    prompt=st.text(max_size=20),
    shape=st.tuples(st.integers(0, 5), st.integers(1, 3), st.integers(1, 9)),
    seed=seeds(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_what_is_put_is_got_bit_for_bit(prompt, shape, seed, dtype, tmp_path_factory):
    cache, features = PromptCache(tmp_path_factory.mktemp("cache"), fingerprint=KEY), tensor(shape, seed, dtype)
    assert cache.get(prompt) is None
    cache.put(prompt, features)
    found = PromptCache(cache.folder, fingerprint=KEY).get(prompt)
    assert found.dtype == dtype and torch.equal(found, features)
    assert cache.get(prompt + " ") is None and PromptCache(cache.folder, fingerprint="0" * 64).get(prompt) is None


def test_only_the_features_are_written_even_of_a_view(tmp_path):
    cache, large = PromptCache(tmp_path, fingerprint=KEY), tensor((100, 2, 300), 0)
    cache.put("a", large[3:5].transpose(1, 2).transpose(1, 2))
    assert cache.path("a").stat().st_size < 8_000
    assert torch.equal(cache.get("a"), large[3:5])
    assert cache.path("a").name == hashlib.sha256(f"{KEY}\na".encode()).hexdigest() + ".safetensors"
    assert list(load_file(cache.path("a"))) == ["features"]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_the_encoders_and_each_prompt_is_encoded_once(tmp_path, batch_size, dtype):
    encoder, cache = counting(make_model().to(dtype)), PromptCache(tmp_path)
    features = cache.encode(encoder, PROMPTS, batch_size=batch_size)
    asked = [prompt for batch in encoder.asked for prompt in batch]
    assert asked == [*dict.fromkeys(PROMPTS)] and max(map(len, encoder.asked)) <= batch_size
    limit = {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    for prompt, found in zip(PROMPTS, features, strict=True):
        expected = alone(encoder, prompt)
        assert found.shape == (len(prompt.split()) + TAIL_TOKENS, 2, 16) == expected.shape and found.dtype == dtype
        assert (found - expected).abs().max() <= limit * expected.abs().max()
    encoder.asked.clear()
    more = cache.encode(encoder, [*PROMPTS, "of"])
    assert encoder.asked == [["of"]]
    assert all(torch.equal(a, b) for a, b in zip(features, more, strict=False))


def test_a_second_run_needs_no_encoder(tmp_path):
    first = PromptCache(tmp_path).encode(counting(), PROMPTS)
    again = PromptCache(tmp_path).encode(None, PROMPTS)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(PromptCache(tmp_path).get("blue"), first[1])
    with pytest.raises(ValueError, match=r"not cached, \['of', 'a'\], got None"):
        PromptCache(tmp_path).encode(None, ["blue", "of", "a", "of"])
    with pytest.raises(ValueError, match=r"not cached, \['blue'\], got None"):
        PromptCache(tmp_path / "empty").encode(None, ["blue"])


def test_encoders_share_a_folder_and_never_features(tmp_path):
    short, long = counting(max_length=300), counting()
    one, two = PromptCache(tmp_path), PromptCache(tmp_path)
    one.encode(short, PROMPTS)
    two.encode(long, PROMPTS)
    assert len(long.asked) == 1, "nothing of the other encoder was found"
    with pytest.raises(ValueError, match="another PromptCache"):
        one.encode(long, PROMPTS)
    with pytest.raises(ValueError, match="2 encoders"):
        PromptCache(tmp_path).encode(None, PROMPTS)
    assert PromptCache(tmp_path, fingerprint=encoder_fingerprint(short)).encode(None, PROMPTS)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "pickle", "other prompt"])
def test_damage_is_a_miss_that_is_told_and_repaired(tmp_path, damage):
    encoder, cache = counting(), PromptCache(tmp_path)
    expected = cache.encode(encoder, PROMPTS)
    path = cache.path("blue")
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[:-3])
    elif damage == "flip":
        data[-100] ^= 1
        path.write_bytes(data)
    elif damage == "other prompt":
        data[len(data) // 2] ^= 64
        path.write_bytes(data)
    else:
        path.write_bytes(b"" if damage == "empty" else b"\x80\x04K\x01.")
    with pytest.warns(UserWarning, match=f"{path.name}: expected cached features, found a damaged file"):
        assert cache.get("blue") is None
    encoder.asked.clear()
    with pytest.warns(UserWarning, match="damaged"):
        repaired = cache.encode(encoder, PROMPTS)
    assert encoder.asked == [["blue"]]
    assert (repaired[1] - expected[1]).abs().max() <= 1e-5 * expected[1].abs().max()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(cache.get("blue"), repaired[1])


def test_a_write_that_fails_leaves_the_old_features_and_no_rest(tmp_path, monkeypatch):
    cache, old = PromptCache(tmp_path, fingerprint=KEY), tensor((3, 2, 4), 0)
    cache.put("a", old)
    before = sorted(tmp_path.iterdir())

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        cache.put("a", tensor((3, 2, 4), 1))
    assert sorted(tmp_path.iterdir()) == before and torch.equal(cache.get("a"), old)


def test_readers_beside_writers_see_whole_features(tmp_path):
    cache, values = PromptCache(tmp_path, fingerprint=KEY), [tensor((40, 4, 64), seed) for seed in range(2)]
    cache.put("a", values[0])
    stop = threading.Event()

    def write(value):
        while not stop.is_set():
            PromptCache(tmp_path, fingerprint=KEY).put("a", value)

    threads = [threading.Thread(target=write, args=(value,)) for value in values]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for thread in threads:
            thread.start()
        try:
            found = [cache.get("a") for _ in range(100)]
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert all(any(torch.equal(value, one) for one in values) for value in found)


def swapped_tokenizer():
    """Two words have each other's ids."""
    tokenizer = make_tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    words = content["model"]["vocab"]
    words["red"], words["cube"] = words["cube"], words["red"]
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), pad_token="<|endoftext|>")
    other.chat_template = TEMPLATE
    return other


def variants():
    tokenizer, changed = make_tokenizer(), make_model()
    changed.model.layers[2].mlp.up_proj.weight.data.mul_(1.01)
    return {
        "layers": prompt_encoder(layers=(3, 1)),
        "fewer layers": prompt_encoder(layers=(1,)),
        "max_length": prompt_encoder(max_length=500),
        "date": prompt_encoder(date="1999-12-01"),
        "instruction": prompt_encoder(instruction="Describe."),
        "thinking": prompt_encoder(assistant_thinking="Hm."),
        "template": prompt_encoder(tokenizer=make_tokenizer(template=TEMPLATE.replace("You are", "You were"))),
        "weights": prompt_encoder(changed),
        "dtype": prompt_encoder(make_model().bfloat16()),
        "config": prompt_encoder(make_model(rope_parameters={"rope_type": "default", "rope_theta": 500.0})),
        "no tokenizer": TextEncoder(make_model(), layers=(1, 3)),
        "tokens": prompt_encoder(tokenizer=swapped_tokenizer()),
        "same": prompt_encoder(tokenizer=tokenizer),
    }


def test_the_fingerprint_differs_with_whatever_the_features_depend_on():
    found = {name: encoder_fingerprint(encoder) for name, encoder in variants().items()}
    assert found["same"] == encoder_fingerprint(prompt_encoder())
    assert len(set(found.values())) == len(found)


def test_the_fingerprint_does_not_depend_on_what_the_features_do_not():
    whole, trimmed = make_model(), make_model()
    expected = encoder_fingerprint(prompt_encoder(whole, layers=(0, 1)))
    trimmed.config.num_hidden_layers, trimmed.config.name_or_path = 2, "elsewhere"
    if getattr(trimmed.config, "layer_types", None):
        trimmed.config.layer_types = trimmed.config.layer_types[:2]
    trimmed.model.layers = trimmed.model.layers[:2]
    trimmed.model.norm.weight.data.zero_()
    assert encoder_fingerprint(prompt_encoder(trimmed.model, layers=(0, 1))) == expected
    again = prompt_encoder(copy.deepcopy(whole), layers=(0, 1))
    again(["a red cube"])
    assert encoder_fingerprint(again) == expected


@pytest.mark.slow
def test_the_fingerprint_is_the_same_in_another_process():
    script = (
        "import torch; torch.set_num_threads(1)\nfrom tests.nn.test_text_encoder import make_model, prompt_encoder\n"
        "from lensmini.pipeline.prompt_cache import encoder_fingerprint\n"
        "print(encoder_fingerprint(prompt_encoder(make_model('GptOss'))))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert run.stdout.split()[-1:] == [encoder_fingerprint(prompt_encoder(make_model("GptOss")))], run.stderr[-1000:]


def test_what_is_not_features_or_prompts_is_refused(tmp_path):
    cache = PromptCache(tmp_path / "cache", fingerprint=KEY)
    for bad in (tensor((3, 4), 0), tensor((3, 2, 4), 0).long()):
        with pytest.raises(ValueError, match="features"):
            cache.put("a", bad)
    for prompts in ("a red cube", [], [None]):
        with pytest.raises(ValueError, match="prompts"):
            cache.encode(None, prompts)
    with pytest.raises(ValueError, match="batch_size"):
        cache.encode(None, ["a"], batch_size=0)
    with pytest.raises(ValueError, match="fingerprint"):
        PromptCache(tmp_path, fingerprint="../../x")
    with pytest.raises(ValueError, match="0 encoders"):
        PromptCache(tmp_path).put("a", tensor((3, 2, 4), 0))
    assert not [*tmp_path.iterdir()]
