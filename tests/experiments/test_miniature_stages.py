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
from experiments.miniature.captions import HELD_OUT, Turn, conversations, scene_turn
from experiments.miniature.gates import GateError, GateReport, require
from experiments.miniature.language_gates import answer_accuracy, colour_shares, held_out_losses, relation_accuracy
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
    before = held_out_losses(model, build_tokenizer(), seed=0, grid=2, dense_share=0.75, num=32)
    train_language_model(config, tmp_path, progress=Silent)
    after = held_out_losses(*load_language_model(tmp_path), seed=0, grid=2, dense_share=0.75, num=32)
    # Untrained, every word is about as likely as any other.
    assert before.keys() == after.keys() == {"caption_loss", "answer_loss"}
    assert all(before[part] > math.log(84) - 0.5 and after[part] < before[part] - 0.5 for part in before)


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


@given(st.integers(0, 2**40), st.sampled_from([2, 3]), st.sampled_from(["varied", "synonyms", "plain"]))
def test_an_answer_lists_the_scene_in_reading_order(seed, grid, wording):
    turn = scene_turn(seed, seed=0, grid=grid, dense_share=1.0, wording=wording)
    scene = sample_scene(generator=seed, grid=grid)
    assert turn.caption == describe_scene(scene, wording=wording, generator=seed)
    background, *sentences = turn.answer.removesuffix(" .").split(" . ")
    assert background == scene.background and set(turn.answer.split()) <= set(SCENE_VOCABULARY)
    rows, columns = (("top", "bottom"), ("left", "right")) if grid == 2 else ((), ())
    things = {thing.cell: thing for thing in scene.objects}
    for sentence, cell in zip(sentences, sorted(things), strict=True):
        *place, size, colour, shape = sentence.split()
        assert (size, colour, shape) == (things[cell].size, things[cell].colour, things[cell].shape)
        assert grid == 3 or place == [rows[cell[0]], columns[cell[1]]]


def test_kinds_of_turns_come_in_their_shares_and_independently():
    options = {"seed": 0, "grid": 2, "wording": "plain"}
    turns = [scene_turn(n, dense_share=0.75, unlike_share=0.6, **options) for n in range(2000)]
    dense = torch.tensor([bool(turn.answer) for turn in turns])
    several = torch.tensor([turn.answer.count(" .") > 2 for turn in turns])
    assert dense.float().mean() == pytest.approx(0.75, abs=0.01)
    # Of the 40 % that may be anything a quarter are single objects.
    assert several[dense].float().mean() == pytest.approx(0.9, abs=0.03)
    assert all(
        turn.answer == "" and "at" not in turn.caption.split() for turn, d in zip(turns, dense, strict=True) if not d
    )
    single = [scene_turn(n, dense_share=1.0, unlike_share=0.0, **options).answer.count(" .") == 2 for n in range(2000)]
    assert sum(single) / 2000 == pytest.approx(0.25, abs=0.03)


def test_a_conversation_is_the_prompt_its_answer_and_an_end(language_model):
    model, tokenizer = load_language_model(language_model[1])
    encoder = TextEncoder(model, tokenizer, layers=(0,))
    turns = [Turn("a red circle", ""), Turn("one object on a black background .", "black . top left small red cross .")]
    ids, mask, lengths = conversations(encoder, turns)
    for row, keep, length, turn in zip(ids, mask, lengths.tolist(), turns, strict=True):
        words = tokenizer.convert_ids_to_tokens(row[keep].tolist())
        assert "".join(words[:length]) == encoder.render(turn.caption).replace(" ", "")
        assert words[length:] == [*turn.answer.split(), "<|return|>"]
    assert bool((ids[~mask] == tokenizer.pad_token_id).all())


def test_every_token_of_a_group_of_batches_weighs_the_same_and_an_answers_more():
    config = replace(SMALL, steps=6, group=3, batch_size=5, answer_weight=4.0, dense_share=0.5)
    model, tokenizer = build_language_model(config, 84), build_tokenizer()
    batches = list(lm._batches(config, model, tokenizer))
    assert len(batches) == 6 and all(len(ids) == 5 for ids, _, _ in batches)
    assistant, answered = tokenizer.convert_tokens_to_ids("assistant"), 0
    for start in (0, 3):
        group = batches[start : start + 3]
        assert sum(float(weight.sum()) for _, _, weight in group) == pytest.approx(3)
        (low,) = {round(float(weight[weight > 0].min()), 9) for _, _, weight in group}
        for ids, mask, weight in group:
            for row in range(5):
                begin = int((ids[row] == assistant).nonzero()[0]) + 2  # behind the mark of the message
                end = int(mask[row].sum())
                expected = torch.zeros(ids.shape[1] - 1)
                expected[: begin - 1], expected[begin - 1 : end - 1] = low, 4 * low
                torch.testing.assert_close(weight[row], expected, rtol=1e-4, atol=1e-9)
                answered += end - begin > 1
        lengths = sorted(int(mask.sum(1).max()) for _, mask, _ in group)
        assert lengths[0] < lengths[-1]
    assert answered == 15  # the dense half
    for ids, mask, _ in batches:
        ends = ids[torch.arange(5), mask.sum(1) - 1]
        assert ends.tolist() == [tokenizer.eos_token_id] * 5 and bool((ids[~mask] == tokenizer.pad_token_id).all())


def test_muon_moves_the_matrices_of_attention_and_experts_and_adamw_all_else():
    model = build_language_model(SMALL, 84)
    (adam, _), (muon, _) = lm.build_optimisers(model, SMALL.learning_rate, SMALL.muon_rate)
    names = {parameter: name for name, parameter in model.named_parameters()}
    moved = [{names[p] for p in optimiser.param_groups[0]["params"]} for optimiser in (adam, muon)]
    assert not moved[0] & moved[1] and moved[0] | moved[1] == set(names.values())
    parts = {name.split(".", 3)[3].removesuffix(".weight") for name in moved[1]}
    attention = {f"self_attn.{letter}_proj" for letter in "qkvo"}
    assert parts == attention | {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}


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
        words = describe_scene(scene, wording="synonyms", generator=key).split()
        texts += [[colour if word == scene.objects[0].colour else word for word in words] for colour in COLOURS]
    tokens = [word for text in texts for word in [*text, "<|end|>", "<|start|>", "assistant", "<|message|>"]]
    squares = sum((tokens.count(word) / len(tokens)) ** 2 for word in set(tokens))
    assert share == pytest.approx(5 / 6 / (1 - squares), rel=1e-3)


class Prophet(nn.Module):
    """A language model that knows every next word, but takes the shape of what is at the bottom right for another."""

    def __init__(self, tokenizer, knows):
        super().__init__()
        self.embed_tokens, self.layers = nn.Embedding(84, 4), nn.ModuleList([nn.Identity()])
        self.tokenizer, self.knows = tokenizer, knows

    def forward(self, input_ids, **_):
        following = input_ids.roll(-1, 1)
        shapes = self.tokenizer.convert_tokens_to_ids(list(SHAPES))
        place = self.tokenizer.convert_tokens_to_ids(["bottom", "right"])
        answer = (input_ids == self.tokenizer.convert_tokens_to_ids("assistant")).cumsum(1) > 0
        for row, column in (answer & torch.isin(following, torch.tensor(shapes))).nonzero().tolist():
            if not self.knows and input_ids[row, column - 3 : column - 1].tolist() == place:
                following[row, column] = shapes[(shapes.index(int(following[row, column])) + 1) % 4]
        return SimpleNamespace(logits=nn.functional.one_hot(following, 84).float())


def test_answer_accuracy_is_the_share_of_objects_told_right():
    tokenizer = build_tokenizer()
    assert answer_accuracy(Prophet(tokenizer, knows=True), tokenizer, num=100) == 1.0
    first = HELD_OUT + 2**30
    scenes = [sample_scene(generator=first + n, num_objects=(2, 4), group_probability=0.0) for n in range(100)]
    cells = [thing.cell for scene in scenes for thing in scene.objects]
    expected = 1 - cells.count((1, 1)) / len(cells)
    assert answer_accuracy(Prophet(tokenizer, knows=False), tokenizer, num=100) == pytest.approx(expected)


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
    # Far below the untrained model's loss, log 84 = 4.4 nats, as measured 0.65.
    assert report.passed and report.numbers["caption_loss"] < 0.75
