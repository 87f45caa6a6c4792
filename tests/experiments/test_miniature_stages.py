"""Laws of the miniature's own parts: tokenizer, language model and autoencoder, their gates and their files."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from experiments.miniature import language_model as lm
from experiments.miniature.autoencoder import (
    AutoencoderConfig,
    build_autoencoder,
    check_autoencoder,
    load_autoencoder_miniature,
    smallest_autoencoder,
    token_labels,
    train_autoencoder,
)
from experiments.miniature.captions import HELD_OUT
from experiments.miniature.gates import GateError, GateReport, require
from experiments.miniature.language_gates import binding_accuracy, colour_shares, held_out_loss, relation_accuracy
from experiments.miniature.language_model import (
    LanguageModelConfig,
    build_language_model,
    load_language_model,
    smallest_language_model,
    train_language_model,
)
from experiments.miniature.schedule import warmup_flat_decay
from experiments.miniature.tokenizer import SPECIAL_TOKENS, build_tokenizer
from experiments.runs import read_jsonl
from lensmini.data import COLOURS, MINIATURE_CANVASES, SCENE_VOCABULARY, SHAPES, describe_scene, sample_scene
from lensmini.data.scene_captions import SYNONYMS
from lensmini.data.scenes import render_scene
from lensmini.nn.autoencoder import from_uint8
from lensmini.nn.text_encoder import TextEncoder

SMALL = smallest_language_model()
CANONICAL = {way: word for word, ways in SYNONYMS.items() for way in ways}


class Silent:
    """A progress bar that draws nothing."""

    def __init__(self, total, initial, description):
        self.total, self.n = total, initial

    def __enter__(self):
        return self

    def __exit__(self, *_):
        assert self.n == self.total

    def update(self, n=1):
        self.n += n

    def set_postfix(self, **_):
        pass


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """What the same weights from the same seed rest on; small tensors gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("language_model")
    return train_language_model(SMALL, directory, progress=Silent), directory


@pytest.fixture(scope="module", params=["plain", "semantic"])
def autoencoder(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("autoencoder")
    config = smallest_autoencoder(request.param)
    return train_autoencoder(config, directory, progress=Silent), directory, config


def test_every_word_is_one_known_token():
    tokenizer = build_tokenizer()
    for word in SCENE_VOCABULARY:
        (token,) = tokenizer(word, add_special_tokens=False)["input_ids"]
        assert token != tokenizer.unk_token_id and tokenizer.decode([token]) == word
    assert len(tokenizer) == len({*SCENE_VOCABULARY, *SPECIAL_TOKENS, "user", "assistant"})


@given(st.integers(0, 2**40), st.sampled_from([2, 3]), st.sampled_from(["dense", "brief"]))
def test_a_caption_is_its_words(seed, grid, density):
    tokenizer = build_tokenizer()
    caption = describe_scene(sample_scene(generator=seed, grid=grid), density=density, generator=seed)
    tokens = tokenizer(caption, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(tokens) == caption.split()
    assert tokenizer(caption.upper().replace(" .", "."), add_special_tokens=False)["input_ids"] == tokens


def test_an_unknown_word_is_one_unknown_token():
    tokenizer = build_tokenizer()
    tokens = tokenizer("a hexagon , 7 red", add_special_tokens=False)["input_ids"]
    assert [token == tokenizer.unk_token_id for token in tokens] == [False, True, False, True, False]


def test_the_template_ends_only_the_last_answer():
    tokenizer = build_tokenizer()
    turns = [{"role": "system", "content": "s"}, *({"role": role, "content": "red"} for role in ("user", "assistant"))]
    once = "<|start|>user<|message|>red<|end|><|start|>assistant<|message|>red"
    assert tokenizer.apply_chat_template(turns, tokenize=False) == once + "<|return|>"
    assert tokenizer.apply_chat_template(turns * 2, tokenize=False) == f"{once}<|end|>{once}<|return|>"
    asked = tokenizer.apply_chat_template(turns[:2], tokenize=False, add_generation_prompt=True)
    assert asked == "<|start|>user<|message|>red<|end|><|start|>assistant<|message|>"


def test_the_text_encoder_cuts_three_tokens_and_keeps_four_behind_the_prompt(language_model):
    encoder = TextEncoder(*load_language_model(language_model[1]), layers=(0, 1))
    assert encoder.num_prefix_tokens == 3
    features, mask = encoder(["a red circle", ""])
    assert mask.sum(1).tolist() == [3 + 4, 4] and features[1].shape == (2, 7, SMALL.hidden_size)


@pytest.mark.parametrize(("steps", "warmup", "share"), [(10, 3, 0.5), (7, 0, 0.0), (5, 0, 1.0)])
def test_the_schedule_warms_up_stays_and_decays(steps, warmup, share):
    factors = [warmup_flat_decay(step, steps, warmup, share) for step in range(1, steps + 1)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    decay = round(steps * share)
    if decay:
        assert factors[-decay:] == pytest.approx([(decay - step) / decay for step in range(decay)])
    assert set(factors[warmup : steps - decay]) <= {1.0}
    with pytest.raises(ValueError, match="step"):
        warmup_flat_decay(steps + 1, steps, warmup, share)


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"steps": 15, "group": 10}, {"dense_share": 1.5}, {"decay_share": -0.1}]
)
def test_a_language_model_without_sense_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LanguageModelConfig(**wrong)


def test_embeddings_start_wide_and_matrices_narrow():
    model = build_language_model(LanguageModelConfig(), 84)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert bool((parameter == 1).all()), name
        elif parameter.ndim == 1 or name.endswith("_bias"):
            assert bool((parameter == 0).all()), name
        else:
            expected = 1.0 if "embed_tokens" in name else 0.08
            # Four standard errors of a sample deviation.
            assert float(parameter.detach().std()) == pytest.approx(
                expected, rel=4 / math.sqrt(2 * parameter.numel())
            ), name


def test_a_seed_decides_every_weight(language_model, tmp_path):
    train_language_model(SMALL, tmp_path / "again", progress=Silent)
    train_language_model(replace(SMALL, seed=1), tmp_path / "other", progress=Silent)
    first, again, other = (
        (path / "model.safetensors").read_bytes()
        for path in (language_model[1], tmp_path / "again", tmp_path / "other")
    )
    assert first == again and first != other


def test_training_leaves_no_trace_in_the_global_generator(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train_language_model(SMALL, tmp_path / "a", progress=Silent)
    train_autoencoder(smallest_autoencoder(), tmp_path / "b", progress=Silent)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_language_model_comes_back_frozen_with_its_numbers(language_model):
    report, directory = language_model
    model, tokenizer = load_language_model(directory)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    again = lm.check_language_model(model, tokenizer, SMALL).numbers
    assert again == pytest.approx(report.numbers, rel=1e-5)
    told = json.loads((directory / "language_model.json").read_text())
    assert told["gates"]["numbers"] == pytest.approx(report.numbers) and told["config"]["seed"] == 0
    rows = read_jsonl(directory / "metrics.jsonl")
    assert rows[-1]["step"] == SMALL.steps and all(math.isfinite(row["loss"]) for row in rows)


def test_training_lowers_the_held_out_loss(tmp_path):
    config = replace(SMALL, steps=40, group=10, batch_size=16)
    model = build_language_model(config, len(build_tokenizer()))
    before = held_out_loss(model, build_tokenizer(), seed=0, grid=2, dense_share=0.75, num=32)
    train_language_model(config, tmp_path, progress=Silent)
    after = held_out_loss(*load_language_model(tmp_path), seed=0, grid=2, dense_share=0.75, num=32)
    # Untrained, every word is about as likely as any other.
    assert before > math.log(84) - 0.5 and after < before - 0.5


def test_a_failed_gate_raises_after_writing_unless_told_otherwise(tmp_path):
    config = replace(SMALL, min_colour_share=1.0)
    with pytest.raises(GateError, match="colour_share is .*, expected at least 1"):
        train_language_model(config, tmp_path / "a", progress=Silent)
    assert (tmp_path / "a" / "model.safetensors").exists() and (tmp_path / "a" / "language_model.json").exists()
    report = train_language_model(config, tmp_path / "b", progress=Silent, strict=False)
    assert not report.passed and len(report.failures) == 1
    hard = replace(smallest_autoencoder(), min_strict=1.0)
    with pytest.raises(GateError, match="strict_16x16"):
        train_autoencoder(hard, tmp_path / "c", progress=Silent)
    assert not train_autoencoder(hard, tmp_path / "d", progress=Silent, strict=False).passed


def test_a_gate_is_passed_at_the_threshold_and_never_by_nan():
    assert require(GateReport.judge("a", {"x": 0.5}, {"x": 0.5})).passed
    for value in (0.4999, float("nan")):
        with pytest.raises(GateError, match="a: gate failed: x is"):
            require(GateReport.judge("a", {"x": value}, {"x": 0.5}))


def test_a_weak_reader_of_relations_is_told_and_stops_only_if_that_is_asked_for(tmp_path, capsys):
    config = replace(SMALL, min_relation_accuracy=1.0)
    report = train_language_model(config, tmp_path / "a", progress=Silent)
    assert report.passed and "warning: relation_accuracy is" in capsys.readouterr().out
    assert json.loads((tmp_path / "a" / "language_model.json").read_text())["gates"]["warnings"] == [*report.warnings]
    with pytest.raises(GateError, match="relation_accuracy"):
        train_language_model(replace(config, relation_required=True), tmp_path / "b", progress=Silent)


def test_every_token_of_a_group_of_batches_weighs_the_same():
    config = replace(SMALL, steps=6, group=3, batch_size=5)
    model, tokenizer = build_language_model(config, 84), build_tokenizer()
    batches = list(lm._batches(config, model, tokenizer))
    assert len(batches) == 6 and all(len(ids) == 5 for ids, _, _ in batches)
    for start in (0, 3):
        group = batches[start : start + 3]
        (scale,) = {scale for _, _, scale in group}
        assert scale * sum(int(mask[:, 1:].sum()) for _, mask, _ in group) == pytest.approx(3)
        lengths = sorted(int(mask.sum(1).max()) for _, mask, _ in group)
        assert lengths[0] < lengths[-1]
    for ids, mask, _ in batches:
        ends = ids[torch.arange(5), mask.sum(1) - 1]
        assert ends.tolist() == [tokenizer.eos_token_id] * 5 and bool((ids[~mask] == tokenizer.pad_token_id).all())


class Reader(nn.Module):
    """A language model that parses the caption and tells the true direction, or with ``opposite`` the wrong one."""

    def __init__(self, tokenizer, opposite):
        super().__init__()
        self.embed_tokens, self.layers = nn.Embedding(84, 4), nn.ModuleList([nn.Identity()])
        self.tokenizer, self.opposite = tokenizer, opposite

    def forward(self, input_ids, **_):
        logits = torch.zeros(*input_ids.shape, 84)
        for row, ids in enumerate(input_ids.tolist()):
            words = self.tokenizer.convert_ids_to_tokens(ids)
            words = words[3 : words.index("<|end|>")]
            *sentences, last = " ".join(words).split(" .")
            places = {}
            for sentence in sentences:
                said = [CANONICAL.get(word, word) for word in sentence.split()]
                shapes = [word for word in said if word in SHAPES]
                if shapes:
                    colour = next(word for word in said if word in COLOURS)
                    down, right = ("bottom" in said), ("right" in said)
                    places[colour, shapes[0]] = (down, right)
            _, colour, shape, _ = last.split()
            subject = places.pop((colour, CANONICAL[shape]))
            (other,) = places.values()
            aside = subject[1] != other[1]
            answer = ("left", "right")[subject[1]] if aside else ("above", "under")[subject[0]]
            if self.opposite:
                answer = {"left": "right", "right": "left", "above": "below", "under": "over"}[answer]
            logits[row, 3 + len(words) - 1, self.tokenizer.convert_tokens_to_ids(answer)] = 50.0
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize(("opposite", "expected"), [(False, 1.0), (True, 0.0)])
def test_relation_accuracy_tells_who_reads_from_who_does_not(opposite, expected):
    tokenizer = build_tokenizer()
    assert relation_accuracy(Reader(tokenizer, opposite), tokenizer, num=96) == expected


class Table(nn.Module):
    """A language model whose features are its word embedding."""

    def __init__(self, weight):
        super().__init__()
        self.embed_tokens, self.layers = nn.Embedding.from_pretrained(weight), nn.ModuleList([nn.Identity()])
        self.config = SimpleNamespace(num_hidden_layers=1)

    def forward(self, input_ids, **_):
        return self.layers[0](self.embed_tokens(input_ids))


def test_the_colour_share_is_that_of_the_word_embedding_where_nothing_else_is():
    tokenizer = build_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(list(COLOURS))
    weight = torch.randn(84, 256, generator=torch.Generator().manual_seed(0))
    weight[ids] = weight[ids[0]].clone()
    (share,) = colour_shares(Table(weight), tokenizer)
    assert share == pytest.approx(0, abs=1e-9)
    # Orthogonal words of one length r: six colours vary by 5/6 r^2 about their mean, all tokens by (1 - sum p^2) r^2.
    (share,) = colour_shares(Table(torch.eye(84)), tokenizer)
    texts = []
    for number in range(32):
        key = HELD_OUT + number
        scene = sample_scene(generator=key, num_objects=(1, 1), pairs="all")
        words = describe_scene(scene, generator=key).split()
        texts += [[colour if word == scene.objects[0].colour else word for word in words] for colour in COLOURS]
    tokens = [word for text in texts for word in [*text, "<|end|>", "<|start|>", "assistant", "<|message|>"]]
    squares = sum((tokens.count(word) / len(tokens)) ** 2 for word in set(tokens))
    assert share == pytest.approx(5 / 6 / (1 - squares), rel=1e-3)


class Sums(Table):
    """Features are the sums of the word vectors since the last full stop: a bag of the sentence's words."""

    def __init__(self, weight, stop):
        super().__init__(weight)
        self.stop = stop

    def forward(self, input_ids, **_):
        vectors, out = self.embed_tokens(input_ids), []
        for row, ids in enumerate(input_ids.tolist()):
            begins = [max((j + 1 for j in range(i) if ids[j] == self.stop), default=0) for i in range(len(ids))]
            out.append(torch.stack([vectors[row, begin : i + 1].sum(0) for i, begin in enumerate(begins)]))
        return self.layers[0](torch.stack(out))


def test_binding_is_read_where_the_sentence_is_kept_and_not_where_it_is_forgotten():
    tokenizer = build_tokenizer()
    stop = tokenizer.convert_tokens_to_ids(".")
    assert binding_accuracy(Sums(torch.eye(84), stop), tokenizer, num=192) > 0.95
    # The embedding of a full stop is the same everywhere: at best the commonest colour, one of six.
    assert binding_accuracy(Table(torch.eye(84)), tokenizer, num=192) < 0.35


def test_latents_have_unit_variance_in_training_whatever_the_weights():
    net, _ = build_autoencoder(smallest_autoencoder())
    with torch.no_grad():
        net.encoder[-2].weight.mul_(100)
        latents = net.train().encoder(torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    values = latents.transpose(0, 1).flatten(1)
    torch.testing.assert_close(values.mean(1), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(values.var(1, unbiased=False), torch.ones(4), atol=1e-3, rtol=0)


def test_an_autoencoder_comes_back_equal_with_its_numbers(autoencoder):
    report, directory, config = autoencoder
    loaded = load_autoencoder_miniature(directory)
    again = check_autoencoder(loaded, config).numbers
    assert again == pytest.approx(report.numbers, rel=1e-5)
    assert (loaded.channels, loaded.downsample, loaded.patch_size) == (16, 4, 2)
    assert not any(parameter.requires_grad for parameter in loaded.parameters()) and not loaded.training
    assert {f"{kind}_{h}x{w}" for h, w in config.canvases for kind in ("strict", "psnr")} <= set(report.numbers)


@pytest.mark.parametrize(("height", "width"), [*MINIATURE_CANVASES, (40, 40)])
def test_latents_are_a_quarter_of_the_picture_a_side(autoencoder, height, width):
    net = load_autoencoder_miniature(autoencoder[1])
    images = from_uint8(render_scene(sample_scene(generator=1), height, width))[None]
    latents = net.encode(images)
    assert latents.shape == (1, 16, height // 4, width // 4) and net.decode(latents).shape == images.shape


def test_latents_of_fresh_scenes_are_normalised(autoencoder):
    _, directory, config = autoencoder
    net = load_autoencoder_miniature(directory)
    tokens = []
    for height, width in config.canvases:
        scenes = [sample_scene(generator=5000 + number) for number in range(300)]
        images = torch.stack([from_uint8(render_scene(scene, height, width)) for scene in scenes])
        tokens.append(net.encode(images).transpose(0, 1).flatten(1))
    values = torch.cat(tokens, 1)
    assert bool((values.mean(1).abs() < 0.2).all()) and bool(((values.var(1) - 1).abs() < 0.25).all())


def test_a_sample_of_the_posterior_has_the_noise_of_training(autoencoder):
    _, directory, config = autoencoder
    net = load_autoencoder_miniature(directory)
    images = from_uint8(render_scene(sample_scene(generator=1), 32, 32))[None].repeat(64, 1, 1, 1)
    noise = net.encode(images, generator=torch.Generator().manual_seed(0)) - net.encode(images)
    scale = (net.normalizer.var + net.normalizer.eps).sqrt().view(1, -1, 1, 1)
    assert float((noise * scale).std()) == pytest.approx(config.noise, rel=0.05)


def test_an_autoencoder_is_decided_by_its_seed(autoencoder, tmp_path):
    _, directory, config = autoencoder
    train_autoencoder(config, tmp_path / "again", progress=Silent)
    train_autoencoder(replace(config, seed=1), tmp_path / "other", progress=Silent)
    first, again, other = (
        (path / "autoencoder.safetensors").read_bytes() for path in (directory, tmp_path / "again", tmp_path / "other")
    )
    assert first == again and first != other


def test_the_semantic_loss_changes_the_net(tmp_path):
    plain, semantic = smallest_autoencoder(), smallest_autoencoder("semantic")
    for one, other in zip(
        build_autoencoder(plain)[0].parameters(), build_autoencoder(semantic)[0].parameters(), strict=True
    ):
        assert torch.equal(one, other)
    weights = []
    for config in (plain, semantic):
        train_autoencoder(config, tmp_path / config.variant, progress=Silent)
        weights.append(load_autoencoder_miniature(tmp_path / config.variant).state_dict())
    assert set(weights[0]) == set(weights[1])
    assert not torch.equal(weights[0]["vae.encoder.1.weight"], weights[1]["vae.encoder.1.weight"])


@pytest.mark.parametrize("wrong", [{"variant": "other"}, {"canvases": ((30, 32),)}, {"canvases": ()}, {"width": 0}])
def test_an_autoencoder_without_sense_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AutoencoderConfig(**wrong)


@given(st.integers(0, 2**40), st.sampled_from(MINIATURE_CANVASES))
def test_a_token_that_one_colour_fills_has_its_label(seed, canvas):
    scene = sample_scene(generator=seed)
    image = render_scene(scene, *canvas)
    colours, shapes = token_labels([scene], *canvas)
    assert colours.shape == shapes.shape == (1, canvas[0] // 4, canvas[1] // 4)
    names, pairs = [*COLOURS, None], {thing.pair for thing in scene.objects}
    for row in range(canvas[0] // 4):
        for col in range(canvas[1] // 4):
            colour, shape = names[colours[0, row, col]], [*SHAPES, None][shapes[0, row, col]]
            assert (colour, shape) in pairs or (colour, shape) == (None, None)
            patch = image[:, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4].flatten(1).T.tolist()
            if all(tuple(pixel) == tuple(patch[0]) for pixel in patch):
                assert COLOURS.get(colour) == (tuple(patch[0]) if tuple(patch[0]) in COLOURS.values() else None)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["plain", "semantic"])
def test_the_default_autoencoder_passes_its_gate(tmp_path, variant):
    assert train_autoencoder(AutoencoderConfig(variant=variant), tmp_path, progress=Silent).passed


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_default_language_model_passes_its_gate(tmp_path, seed):
    report = train_language_model(LanguageModelConfig(seed=seed), tmp_path, progress=Silent)
    # Far below the untrained model's loss, log 84 = 4.4 nats, as measured 0.73.
    assert report.passed and report.numbers["held_out_loss"] < 0.8
