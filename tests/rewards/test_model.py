"""Laws of the learned reward: gradients, independence, what is missing, calibration, files; expectations by closed form."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from lensmini.rewards import Criterion, Rubric, Verdict
from lensmini.rewards.judges import JudgeRequest, judge_pictures
from lensmini.rewards.model import (
    FrozenFeatures,
    Judged,
    Platt,
    RewardModelConfig,
    RewardModelJudge,
    RubricRewardModel,
    accuracy,
    answer_loss,
    brier_decomposition,
    brier_score,
    clip_features,
    expected_calibration_error,
    fit_platt,
    fit_reward_model,
    fit_temperature,
    load_reward_model,
    save_reward_model,
    spread_levels,
)
from lensmini.rewards.model.baselines import base_rates, fit_logistic, principal_axes
from lensmini.rewards.model.features import resize_and_normalise
from tests.strategies import seeds, tensor

DOUBLE = torch.float64
DIM, WORD = 5, 6
VOCABULARY = tensor((64, WORD), 99, DOUBLE)


def read_text(texts, *, pad=0, fill=0.0):
    """A row by letter, by a table: exact, and without influence between texts."""
    rows = [VOCABULARY[torch.tensor([ord(letter) % 64 for letter in text])] for text in texts]
    length = max(map(len, rows)) + pad
    features = torch.full((len(rows), length, WORD), fill, dtype=DOUBLE)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for index, row in enumerate(rows):
        features[index, : len(row)], mask[index, : len(row)] = row, True
    return features, mask


def read_image(images):
    """A frozen convolution, four pixels a side of each position."""
    weight = tensor((DIM, 3, 4, 4), 98, DOUBLE).to(images.dtype) / 4
    return torch.tanh(nn.functional.conv2d(images, weight, stride=4))


FEATURES = FrozenFeatures(image=read_image, text=read_text, identity="toy 1")
CONFIG = RewardModelConfig(
    image_dim=DIM, text_dim=WORD, width=16, num_heads=2, num_layers=2, context_blocks=1, num_levels=9
)


def new_model(seed=0, features=FEATURES, config=CONFIG):
    """A model with a last layer that says something."""
    model = RubricRewardModel(features, replace(config, seed=seed)).double()
    with torch.no_grad():
        model.head.out.weight.copy_(tensor(model.head.out.weight.shape, seed + 7, DOUBLE) / 4)
    model.calibrate(Platt(torch.tensor(1.5), torch.tensor(-0.25)), 0.75)
    return model


def criterion(name, text=None, **options):
    return Criterion(id=name, text=text or f"It is {name}.", **options)


GRADED = criterion("graded", scale="levels", levels=9)
RUBRIC = Rubric(
    prompt_id="a",
    prompt="A red wall.",
    criteria=(
        criterion("red"),
        criterion("ugly", polarity="pitfall", weight=2.0),
        GRADED,
        criterion("whole", needs="image", weight=0.5),
    ),
)
SHORT = Rubric(prompt_id="b", prompt="Sea.", criteria=(criterion("blue", required=True), criterion("wide")))


def pictures(num=2, height=8, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num, 3, height, width, generator=generator, dtype=DOUBLE)


class TestGradient:
    @pytest.mark.parametrize("part", ["reward", "logits", "variance"])
    def test_it_equals_finite_differences_in_the_pixels(self, part):
        model, images = new_model(), pictures(2, 4, 8)
        rubrics = [RUBRIC, SHORT]

        def value(pixels):
            if part == "reward":
                return model.reward(pixels, rubrics)
            said = model(pixels, rubrics)
            return getattr(said, part)[said.valid]

        assert torch.autograd.gradcheck(value, images.requires_grad_(True), eps=1e-6, atol=1e-7)
        (grad,) = torch.autograd.grad(value(images).sum(), images)
        assert grad.abs().max() > 1e-4

    def test_the_logit_is_the_log_odds_of_the_score(self):
        said = new_model()(pictures(3), [RUBRIC] * 3)
        torch.testing.assert_close(said.logits, torch.logit(said.scores), rtol=1e-9, atol=1e-9)


class TestIndependence:
    def test_the_order_and_number_of_criteria_change_no_answer(self):
        model, images = new_model(), pictures(2)
        whole = model(images, [RUBRIC, RUBRIC]).scores
        turned = replace(RUBRIC, criteria=RUBRIC.criteria[::-1])
        assert torch.equal(model(images, [turned, turned]).scores.flip(1), whole)
        for column, one in enumerate(RUBRIC.criteria):
            alone = model(images, [replace(RUBRIC, criteria=(replace(one, weight=1.0),))] * 2).scores
            torch.testing.assert_close(alone[:, 0], whole[:, column], rtol=1e-12, atol=1e-12)

    @given(seeds())
    def test_batch_mates_of_any_size_change_no_answer(self, seed):
        model, one = new_model(), pictures(1, seed=seed)[0]
        alone = model([one], [SHORT])
        mates = model([pictures(1, 16, 4, seed)[0], one, pictures(1, 12, 16, seed + 1)[0]], [RUBRIC, SHORT, RUBRIC])
        torch.testing.assert_close(mates.scores[1, :2], alone.scores[0], rtol=1e-12, atol=1e-12)
        assert mates.valid.tolist() == [[True] * 4, [True, True, False, False], [True] * 4]
        reward = model.reward([pictures(1, 16, 4, seed)[0], one], [RUBRIC, SHORT])
        torch.testing.assert_close(reward[1], model.reward([one], [SHORT])[0], rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("fill", [0.0, 1e6, math.nan])
    def test_padding_of_texts_does_not_count(self, fill):
        padded = replace(FEATURES, text=lambda texts: read_text(texts, pad=5, fill=fill))
        images, rubrics = pictures(2), [RUBRIC, SHORT]
        expected, got = new_model()(images, rubrics), new_model(features=padded)(images, rubrics)
        assert torch.equal(got.scores[got.valid], expected.scores[expected.valid])

    @pytest.mark.parametrize("fill", [0.0, 1e6, math.nan])
    def test_what_the_mask_hides_does_not_count_in_the_head_either(self, fill):
        head = new_model().head
        words, mask = read_text(["abc"])
        longer = torch.cat([words, torch.full((1, 3, WORD), fill, dtype=DOUBLE)], 1)
        hidden = torch.cat([mask, torch.zeros(1, 3, dtype=torch.bool)], 1)
        torch.testing.assert_close(head.read_criteria(longer, hidden), head.read_criteria(words, mask))

    def test_only_a_criterion_that_needs_the_prompt_sees_it(self):
        model, images = new_model(), pictures(1)
        said = model(images, [RUBRIC]).scores[0]
        other = model(images, [replace(RUBRIC, prompt="A green door.")]).scores[0]
        assert (said[:3] != other[:3]).all() and said[3] == other[3]
        longer = model(images, [replace(RUBRIC, prompt="A green door that is open.")]).scores[0]
        torch.testing.assert_close(longer[3], said[3], rtol=1e-12, atol=1e-12)

    def test_a_head_without_prompts_sees_none(self):
        model, images = new_model(config=replace(CONFIG, use_prompt=False)), pictures(1)
        other = model(images, [replace(RUBRIC, prompt="A green door.")])
        assert torch.equal(model(images, [RUBRIC]).scores, other.scores)

    def test_where_something_stands_is_seen(self):
        model, image = new_model(config=replace(CONFIG, context_blocks=0)), pictures(1, 8, 8)
        turned = image.clone()
        turned[..., :4, :4], turned[..., 4:, 4:] = image[..., 4:, 4:], image[..., :4, :4]
        assert (model(image, [RUBRIC]).scores - model(turned, [RUBRIC]).scores).abs().min() > 1e-6

    def test_uint8_is_read_as_shares_of_255(self):
        model, image = new_model(), (pictures(1) * 255).to(torch.uint8)
        assert torch.equal(model(image, [SHORT]).scores, model(image.double() / 255, [SHORT]).scores)


class TestReward:
    def test_it_is_the_weighted_mean_with_pitfalls_turned(self):
        model, images = new_model(), pictures(3)
        p = model(images, [RUBRIC] * 3).scores
        expected = (p[:, 0] + 2 * (1 - p[:, 1]) + p[:, 2] + 0.5 * p[:, 3]) / 4.5
        torch.testing.assert_close(model.reward(images, [RUBRIC] * 3), expected)

    def test_a_required_criterion_multiplies(self):
        model, images = new_model(), pictures(3)
        p = model(images, [SHORT] * 3).scores
        torch.testing.assert_close(model.reward(images, [SHORT] * 3), p[:, 0] * p.mean(1))
        torch.testing.assert_close(model.reward(images, [SHORT] * 3, use_gates=False), p.mean(1))

    def test_a_new_model_knows_nothing(self):
        said = RubricRewardModel(FEATURES, CONFIG)(pictures(2).float(), [RUBRIC] * 2)
        assert torch.allclose(said.scores, torch.tensor(0.5), atol=1e-6)
        assert torch.allclose(said.variance[:, :2], torch.tensor(0.25))
        levels = torch.linspace(0, 1, 9)
        assert torch.allclose(said.variance[:, 2], levels.var(correction=0))

    def test_mean_and_variance_of_levels_are_those_of_the_distribution(self):
        model, images = new_model(), pictures(2)
        maps = model.read_images(images)
        raw, _ = model.raw(maps, [RUBRIC.all_criteria] * 2, [RUBRIC.prompt] * 2)
        said = model.predict(maps, [RUBRIC.all_criteria] * 2, [RUBRIC.prompt] * 2)
        for picture in range(2):
            weights = [math.exp(0.75 * value) for value in raw[picture, 2, 1:].tolist()]
            shares = [value / sum(weights) for value in weights]
            mean = sum(share * level / 8 for level, share in enumerate(shares))
            spread = sum(share * (level / 8 - mean) ** 2 for level, share in enumerate(shares))
            assert said.scores[picture, 2].item() == pytest.approx(mean, abs=1e-12)
            assert said.variance[picture, 2].item() == pytest.approx(spread, abs=1e-12)
            yes = 1 / (1 + math.exp(-(1.5 * raw[picture, 0, 0].item() - 0.25)))
            assert said.scores[picture, 0].item() == pytest.approx(yes, abs=1e-12)
            assert said.variance[picture, 0].item() == pytest.approx(yes * (1 - yes), abs=1e-12)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_pixels_and_features_that_are_not_finite_are_refused(self, value):
        images = pictures(2)
        images[1, 0, 0, 0] = value
        with pytest.raises(ValueError, match="finite"):
            new_model().reward(images, [RUBRIC, RUBRIC])
        broken = replace(FEATURES, image=lambda images: read_image(images) * value)
        with pytest.raises(ValueError, match="image features: expected finite"):
            new_model(features=broken).reward(pictures(2), [RUBRIC, RUBRIC])
        mute = replace(FEATURES, text=lambda texts: (*read_text(texts)[:1], torch.zeros(len(texts), 99).bool()))
        with pytest.raises(ValueError, match="text"):
            new_model(features=mute).reward(pictures(2), [RUBRIC, RUBRIC])
        loud = replace(FEATURES, text=lambda texts: (read_text(texts)[0] * value, read_text(texts)[1]))
        with pytest.raises(ValueError, match="finite"):
            new_model(features=loud).reward(pictures(2), [RUBRIC, RUBRIC])

    def test_what_does_not_fit_is_refused(self):
        with pytest.raises(ValueError, match="one for each of 2 images, got 1"):
            new_model()(pictures(2), [RUBRIC])
        with pytest.raises(ValueError, match="images"):
            new_model()([torch.zeros(1, 8, 8)], [RUBRIC])
        with pytest.raises(ValueError, match="d=6"):
            RubricRewardModel(FEATURES, replace(CONFIG, image_dim=6)).double()(pictures(1), [RUBRIC])
        with pytest.raises(ValueError, match="positive scales"):
            new_model().calibrate(Platt(torch.tensor(-1.0), torch.tensor(0.0)))
        for changes in ({"width": 0}, {"num_heads": 3}, {"num_levels": 1}, {"context_blocks": -1}):
            with pytest.raises(ValueError, match=next(iter(changes))):
                replace(CONFIG, **changes)


class TestLoss:
    def parts(self, seed=0, num=3, width=4):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.rand(*shape, generator=generator, dtype=DOUBLE)  # noqa: E731
        raw = (4 * draw(num, width, 10) - 2).requires_grad_(True)
        return raw, draw(num, width), draw(num, width) < 0.6, draw(num, width), draw(num, width) < 0.4

    @given(seeds(), st.sampled_from([math.nan, 1e30, -5.0, 0.3]))
    def test_what_is_not_valid_reaches_neither_value_nor_gradient(self, seed, rubbish):
        raw, scores, valid, weights, graded = self.parts(seed)
        results = []
        for hidden in (0.0, rubbish):
            spoilt = torch.where(valid[..., None], raw.detach(), hidden).requires_grad_(True)
            loss = answer_loss(spoilt, torch.where(valid, scores, hidden), valid, weights, graded)
            results.append((loss.detach(), torch.autograd.grad(loss, spoilt)[0]))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
        assert not results[0][1][~valid].any()

    def test_it_is_the_weighted_mean_cross_entropy(self):
        raw, scores, valid, weights, graded = self.parts()
        total = mass = 0.0
        for index in torch.cartesian_prod(torch.arange(3), torch.arange(4)).tolist():
            i, j = index
            if not valid[i, j]:
                continue
            y, w, row = scores[i, j].item(), weights[i, j].item(), raw[i, j].tolist()
            if graded[i, j]:
                normaliser = math.log(sum(math.exp(value) for value in row[1:]))
                low = min(int(y * 8), 7)
                share = y * 8 - low
                value = -((1 - share) * (row[1 + low] - normaliser) + share * (row[2 + low] - normaliser))
            else:
                p = 1 / (1 + math.exp(-row[0]))
                value = -(y * math.log(p) + (1 - y) * math.log(1 - p))
            total, mass = total + w * value, mass + w
        assert answer_loss(raw, scores, valid, weights, graded).item() == pytest.approx(total / mass, rel=1e-12)

    def test_nothing_known_costs_nothing(self):
        raw, scores, valid, weights, graded = self.parts()
        assert answer_loss(raw, scores, valid & False, weights, graded).item() == 0

    @given(st.floats(0, 1), st.integers(2, 12))
    def test_levels_keep_the_score_as_their_mean(self, score, num_levels):
        levels = spread_levels(torch.tensor(score, dtype=DOUBLE), num_levels)
        assert levels.sum().item() == pytest.approx(1) and (levels > 1e-12).sum() <= 2
        assert (levels @ torch.linspace(0, 1, num_levels, dtype=DOUBLE)).item() == pytest.approx(score, abs=1e-12)


def said(rubric, *scores):
    rows = []
    for one, score in zip(rubric.all_criteria, scores, strict=True):
        if isinstance(score, str):
            state = "not_applicable" if score == "not_applicable" else "missing"
            rows.append(Verdict(criterion_id=one.id, state=state, cause=score if state == "missing" else None))
        else:
            rows.append(Verdict(criterion_id=one.id, state="scored", score=score))
    return rows


def bright_and_dark(num=24, seed=0):
    """Pictures that are bright above or below: two questions with an answer, one graded by brightness."""
    images = 0.3 * pictures(num, 8, 8, seed)
    rubric = Rubric(
        prompt_id="w",
        prompt="A wall.",
        criteria=(criterion("above"), criterion("below"), GRADED),
    )
    verdicts = []
    for index in range(num):
        above, below = bool(index & 1), bool(index & 2)
        images[index, :, :4] += 0.6 * above
        images[index, :, 4:] += 0.6 * below
        verdicts.append(said(rubric, float(above), float(below), (above + below) / 2))
    return Judged(images.float(), [rubric] * num, verdicts)


class TestFit:
    def fit(self, train, seed=0, steps=60, **options):
        model = RubricRewardModel(FEATURES, CONFIG)
        fresh, other = bright_and_dark(16, 5), bright_and_dark(16, 6)
        return model, fit_reward_model(
            model, train, fresh, other, steps=steps, batch_size=8, learning_rate=1e-2, warmup=5, seed=seed, **options
        )

    def test_it_learns_what_it_is_told_and_where(self):
        model, fit = self.fit(bright_and_dark())
        card = fit.held_out[0]["model"].scorecard()
        assert card.accuracy == 1 and card.brier < 0.02 and card.num == 48
        assert fit.losses[-1] < 0.2 * fit.losses[0]
        scores = model(bright_and_dark(4, 9).images, bright_and_dark(4, 9).rubrics).scores
        assert (scores[:, 2] - torch.tensor([0.0, 0.5, 0.5, 1.0])).abs().max() < 0.15
        assert fit.held_out[0]["majority"].scorecard().accuracy <= 0.5

    def test_the_seed_decides_everything(self):
        first, again, other = (self.fit(bright_and_dark(), seed, 8, noise=0.1)[0] for seed in (0, 0, 1))
        assert first.revision == again.revision != other.revision
        state = torch.random.get_rng_state()
        self.fit(bright_and_dark(), 0, 2)
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_missing_verdicts_and_pictures_without_any_have_no_influence(self):
        whole = bright_and_dark()
        lost = [list(row) for row in whole.verdicts]
        for index in range(0, 24, 3):
            lost[index][1] = Verdict(criterion_id="below", state="missing", cause="timeout")
        absent = [list(row) for row in lost]
        for index in range(0, 24, 3):
            absent[index][1] = Verdict(criterion_id="below", state="not_applicable")
        one, other = (self.fit(whole._replace(verdicts=rows), steps=8) for rows in (lost, absent))
        assert one[0].revision == other[0].revision and one[1].losses == other[1].losses
        extra = Judged(
            torch.cat([whole.images, torch.rand(3, 3, 8, 8)]),
            [*whole.rubrics, *whole.rubrics[:3]],
            [*lost, *[said(whole.rubrics[0], "refusal", "http", "budget")] * 3],
        )
        assert self.fit(extra, steps=8)[0].revision == one[0].revision
        assert one[0].revision != self.fit(whole, steps=8)[0].revision

    def test_weights_count(self):
        whole = bright_and_dark()
        halves = [1.0] * 12 + [0.0] * 12
        front = Judged(whole.images[:12], whole.rubrics[:12], whole.verdicts[:12])
        weighted = self.fit(whole._replace(weights=halves), steps=8)[0]
        assert weighted.revision == self.fit(front, steps=8)[0].revision
        uneven = self.fit(front._replace(weights=[2.0, 1.0] * 6), steps=8)[0]
        assert uneven.revision != weighted.revision

    def test_what_makes_no_sense_is_refused(self):
        whole = bright_and_dark()
        nothing = [said(whole.rubrics[0], "http", "http", "not_applicable")] * 24
        with pytest.raises(ValueError, match="train: expected at least one known verdict"):
            self.fit(whole._replace(verdicts=nothing))
        with pytest.raises(ValueError, match="train: expected equally many"):
            self.fit(whole._replace(rubrics=whole.rubrics[:3]))
        with pytest.raises(ValueError, match=r"weights\[0\]"):
            self.fit(whole._replace(weights=[math.nan] * 24))
        with pytest.raises(ValueError, match="finite"):
            self.fit(whole._replace(images=whole.images * math.nan))
        with pytest.raises(ValueError, match="steps"):
            self.fit(whole, steps=0)


class TestMetrics:
    def test_a_calibrated_predictor_has_no_calibration_error(self):
        said, happened = [], []
        for yes in range(21):
            said += [yes / 20] * 20
            happened += [1.0] * yes + [0.0] * (20 - yes)
        p, y = torch.tensor(said, dtype=DOUBLE), torch.tensor(happened, dtype=DOUBLE)
        assert expected_calibration_error(p, y, num_bins=20).item() == pytest.approx(0, abs=1e-12)
        parts = brier_decomposition(p, y)
        assert parts.reliability.item() == pytest.approx(0, abs=1e-15)
        assert brier_score(p, y).item() == pytest.approx(sum(q * (1 - q) for q in (i / 20 for i in range(21))) / 21)

    def test_it_shrinks_with_the_number_of_answers(self):
        errors = []
        for num in (1_000, 100_000):
            p = torch.rand(num, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
            y = (torch.rand(num, generator=torch.Generator().manual_seed(2), dtype=DOUBLE) < p).double()
            errors.append([expected_calibration_error(p, y, binning=b).item() for b in ("equal_width", "equal_mass")])
        assert max(errors[1]) < 0.006 < min(errors[0]) and max(errors[0]) < 0.06

    @pytest.mark.parametrize("binning", ["equal_width", "equal_mass"])
    def test_constant_overconfidence_is_the_error(self, binning):
        p = torch.full((10,), 0.95, dtype=DOUBLE)
        y = torch.tensor([1.0] * 7 + [0.0] * 3, dtype=DOUBLE)
        error = expected_calibration_error(p, y, binning=binning, num_bins=1)
        assert error.item() == pytest.approx(0.25)
        assert expected_calibration_error(p, y).item() == pytest.approx(0.25)

    @given(seeds(), st.integers(1, 40))
    def test_murphys_parts_add_up_to_the_score(self, seed, num):
        generator = torch.Generator().manual_seed(seed)
        p = torch.randint(0, 6, (num,), generator=generator).double() / 5
        y = torch.randint(0, 2, (num,), generator=generator).double()
        w = torch.rand(num, generator=generator, dtype=DOUBLE) + 0.1
        parts = brier_decomposition(p, y, w)
        whole = parts.reliability - parts.resolution + parts.uncertainty
        assert whole.item() == pytest.approx(((w * (p - y) ** 2).sum() / w.sum()).item(), abs=1e-12)
        assert min(parts) >= -1e-15

    def test_weights_are_repeats(self):
        p, y = torch.tensor([0.9, 0.2, 0.6], dtype=DOUBLE), torch.tensor([1.0, 1.0, 0.0], dtype=DOUBLE)
        many = torch.tensor([0, 0, 0, 1, 2, 2])
        for measure in (accuracy, brier_score, expected_calibration_error):
            got = measure(p, y, torch.tensor([3.0, 1.0, 2.0], dtype=DOUBLE))
            assert got.item() == pytest.approx(measure(p[many], y[many]).item(), abs=1e-12)

    def test_accuracy_by_hand(self):
        p, y = torch.tensor([0.9, 0.8, 0.5, 0.6]), torch.tensor([1.0, 1.0, 0.0, 0.5])
        assert accuracy(p, y).item() == pytest.approx(2.5 / 3)

    def test_opposite_errors_of_two_bins_do_not_cancel(self):
        p = torch.tensor([0.9] * 10 + [0.1] * 10, dtype=DOUBLE)
        y = torch.tensor([1.0] * 7 + [0.0] * 3 + [1.0] * 3 + [0.0] * 7, dtype=DOUBLE)
        assert expected_calibration_error(p, y).item() == pytest.approx(0.2)

    @pytest.mark.parametrize("measure", [accuracy, brier_score, expected_calibration_error, brier_decomposition])
    @pytest.mark.parametrize("wrong", [(math.nan, 1.0), (1.5, 1.0), (0.5, -1.0), (0.5, math.nan)])
    def test_what_is_no_probability_is_refused(self, measure, wrong):
        with pytest.raises(ValueError, match="expected"):
            measure(torch.tensor([wrong[0]]), torch.tensor([wrong[1]]))
        with pytest.raises(ValueError, match="weights"):
            measure(torch.tensor([0.5]), torch.tensor([1.0]), torch.tensor([-1.0]))


class TestCalibration:
    def test_two_values_have_a_closed_form(self):
        logits = torch.tensor([3.0] * 10 + [-1.0] * 10, dtype=DOUBLE)
        y = torch.tensor([1.0] * 8 + [0.0] * 2 + [1.0] * 3 + [0.0] * 7, dtype=DOUBLE)
        high, low = math.log(8 / 2), math.log(3 / 7)
        platt = fit_platt(logits, y)
        assert platt.scale.item() == pytest.approx((high - low) / 4, rel=1e-3)
        assert platt.bias.item() == pytest.approx(high - 3 * (high - low) / 4, rel=1e-3)

    def test_a_temperature_is_found_again(self):
        true = 3 * torch.randn(40_000, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
        y = (
            torch.rand(40_000, generator=torch.Generator().manual_seed(1), dtype=DOUBLE) < torch.sigmoid(true)
        ).double()
        platt = fit_platt(2.5 * true, y, bias=False)
        assert platt.scale.item() == pytest.approx(0.4, rel=0.03) and platt.bias.item() == 0
        levels = torch.stack([torch.zeros_like(true), 2.5 * true], 1)
        scale = fit_temperature(levels, torch.stack([1 - y, y], 1))
        assert scale.item() == pytest.approx(platt.scale.item(), rel=1e-3)

    def test_it_keeps_the_ranking_and_helps(self):
        logits = 4 * torch.randn(500, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)
        y = (
            torch.rand(500, generator=torch.Generator().manual_seed(4), dtype=DOUBLE) < torch.sigmoid(logits / 4)
        ).double()
        scale, bias = fit_platt(logits, y)
        assert scale > 0
        after = torch.sigmoid(scale * logits + bias)
        assert torch.equal(after.argsort(stable=True), logits.argsort(stable=True))
        assert expected_calibration_error(after, y) < 0.5 * expected_calibration_error(torch.sigmoid(logits), y)

    def test_even_a_perfect_or_a_wrong_predictor_gets_finite_numbers(self):
        for turn in (1.0, -1.0):
            scale, bias = fit_platt(torch.tensor([-1.0, 1.0]) * turn, torch.tensor([0.0, 1.0]))
            assert scale > 0 and scale.isfinite() and bias.isfinite()

    def test_what_is_not_finite_or_empty_is_refused(self):
        for logits, y in (([math.nan], [1.0]), ([1.0], [math.nan]), ([], [])):
            with pytest.raises(ValueError, match="expected"):
                fit_platt(torch.tensor(logits), torch.tensor(y))


class TestBaselines:
    def test_logistic_regression_on_groups_is_their_log_odds(self):
        group = torch.tensor([0] * 5 + [1] * 4)
        y = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0, 1])
        features = nn.functional.one_hot(group).double()
        weight = fit_logistic(features, torch.ones(9, 1), y, penalty=0.0)
        assert weight[:, 0].tolist() == pytest.approx([math.log(4), math.log(1 / 3)], rel=1e-5)

    def test_products_answer_what_sums_cannot(self):
        left = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0], [1.0, -1.0]])
        right = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, -1.0], [1.0, -1.0]])
        y = torch.tensor([1.0, 0.0, 0.0, 1.0])
        weight = fit_logistic(left, right, y)
        assert (((left @ weight) * right).sum(1) > 0).tolist() == [True, False, False, True]
        additive = fit_logistic(torch.cat([left, right[:, 1:]], 1), torch.ones(4, 1), y)
        assert additive.abs().max() < 1e-6

    def test_base_rates_by_hand(self):
        rates = base_rates("aab", torch.tensor([1.0, 0.0, 1.0]), "abz", torch.tensor([3.0, 1.0, 1.0]))
        assert rates.tolist() == pytest.approx([0.75, 1.0, 0.8])

    def test_axes_are_white(self):
        values = tensor((50, 4), 0, DOUBLE) @ tensor((4, 4), 1, DOUBLE)
        mean, axes = principal_axes(values, 3)
        projected = (values - mean) @ axes
        torch.testing.assert_close(projected.T @ projected / 50, torch.eye(3, dtype=DOUBLE))


class TestFiles:
    def test_what_is_saved_comes_back_bit_by_bit(self, tmp_path):
        model = new_model(seed=3)
        save_reward_model(model, tmp_path / "a")
        again = load_reward_model(tmp_path / "a", FEATURES)
        assert again.revision == model.revision and again.config == model.config
        images = pictures(2)
        assert torch.equal(again.reward(images, [RUBRIC, SHORT]), model.reward(images, [RUBRIC, SHORT]))
        names = set(load_file(tmp_path / "a" / "reward_model.safetensors"))
        assert names == set(model.state_dict()) and all(name.startswith(("head.", "calibration")) for name in names)

    def test_other_features_are_refused(self, tmp_path):
        save_reward_model(new_model(), tmp_path)
        with pytest.raises(ValueError, match="features: expected those that the reward was trained on, 'toy 1'"):
            load_reward_model(tmp_path, replace(FEATURES, identity="toy 2"))

    def test_files_that_are_not_whole_are_refused(self, tmp_path):
        model, path = new_model(), tmp_path / "reward_model.safetensors"
        save_reward_model(model, tmp_path)
        tensors = load_file(path)
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ValueError, match="expected the weights that the description names"):
            load_reward_model(tmp_path, FEATURES)
        description = json.loads((tmp_path / "reward_model.json").read_text())
        for spoilt in (
            {**tensors, "more": torch.zeros(1)},
            {name: value for name, value in tensors.items() if name != "calibration"},
            {**tensors, "calibration": torch.full((3,), math.nan, dtype=DOUBLE)},
            {**tensors, "calibration": torch.ones(2, dtype=DOUBLE)},
        ):
            self.rewrite(tmp_path, spoilt, description)
            with pytest.raises(ValueError, match="expected finite weights"):
                load_reward_model(tmp_path, FEATURES)
        for change in (
            {"format": 2},
            {"config": {}},
            {"features": 3},
            {"config": {**description["config"], "width": "x"}},
        ):
            (tmp_path / "reward_model.json").write_text(json.dumps({**description, **change}))
            with pytest.raises(ValueError, match="expected the description"):
                load_reward_model(tmp_path, FEATURES)
        (tmp_path / "reward_model.json").write_text("[" * 2000)
        with pytest.raises(ValueError, match="expected the description"):
            load_reward_model(tmp_path, FEATURES)

    def rewrite(self, folder, tensors, description):
        import hashlib

        path = folder / "reward_model.safetensors"
        save_file(tensors, path)
        new = {**description, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        (folder / "reward_model.json").write_text(json.dumps(new))


class TestJudge:
    def asked(self, num=3):
        images = [(255 * pictures(1, 8, 4 * (index % 2 + 1), index)[0]).to(torch.uint8) for index in range(num)]
        return [
            JudgeRequest(image=image, prompt=rubric.prompt, criterion=one)
            for index, image in enumerate(images)
            for rubric in [(RUBRIC, SHORT)[index % 2]]
            for one in rubric.all_criteria
        ]

    def test_verdicts_are_the_models_in_any_order_and_batch(self):
        model, requests = new_model(), self.asked()
        order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(0)).tolist()
        verdicts = RewardModelJudge(model, batch_size=2).score([requests[index] for index in order])
        for index, verdict in zip(order, verdicts, strict=True):
            request = requests[index]
            rubric = Rubric(prompt_id="x", prompt=request.prompt, criteria=(replace(request.criterion, weight=1.0),))
            expected = model([request.image], [rubric])
            assert verdict.criterion_id == request.criterion.id and verdict.state == "scored"
            assert verdict.score == pytest.approx(expected.scores.item(), rel=1e-9)
            assert verdict.variance == pytest.approx(expected.variance.item(), rel=1e-9)

    def test_one_picture_that_fails_takes_no_other_with_it(self):
        def fragile(images):
            if (images[:, 0, 0, 0] == 1).any():
                raise RuntimeError("out of memory")
            return read_image(images)

        requests = self.asked(5)
        bad = requests[0].image.clone()
        bad[0, 0, 0] = 255
        requests[6:6] = [replace(requests[0], image=bad), replace(requests[1], image=bad)]
        whole = RewardModelJudge(new_model()).score([r for r in requests if r.image is not bad])
        verdicts = RewardModelJudge(new_model(features=replace(FEATURES, image=fragile))).score(requests)
        assert [v.cause for v in verdicts[6:8]] == ["error", "error"] and "out of memory" in verdicts[6].reason
        got = [v.score for v in verdicts[:6] + verdicts[8:]]
        assert got == pytest.approx([v.score for v in whole], rel=1e-9)

    def test_its_name_is_the_models_revision(self):
        one, other = new_model(0), new_model(1)
        assert RewardModelJudge(one).judge_id == RewardModelJudge(new_model(0)).judge_id
        assert RewardModelJudge(one).judge_id != RewardModelJudge(other).judge_id
        renamed = new_model(features=replace(FEATURES, identity="toy 2"))
        assert RewardModelJudge(one).judge_id != RewardModelJudge(renamed).judge_id
        before = one.revision
        one.calibrate(Platt(torch.tensor(2.0), torch.tensor(0.0)))
        assert one.revision != before

    def test_it_works_where_judges_work(self):
        images = [(255 * image).to(torch.uint8) for image in pictures(2)]
        rows = judge_pictures(RewardModelJudge(new_model()), images, [RUBRIC, SHORT])
        assert [len(row) for row in rows] == [4, 2]


def tiny_towers(kind):
    import transformers

    from experiments.miniature.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 24}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 0}
    vision = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 4}
    config = {"clip": transformers.CLIPConfig, "siglip": transformers.SiglipConfig}[kind]
    towers = {"clip": transformers.CLIPModel, "siglip": transformers.SiglipModel}[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return towers(config(text_config=text, vision_config=vision)), tokenizer


class TestTransformersTowers:
    @pytest.mark.parametrize("kind", ["clip", "siglip"])
    def test_pixels_of_any_size_get_a_gradient_that_is_right(self, kind):
        model, tokenizer = tiny_towers(kind)
        features = clip_features(model.double(), tokenizer)
        config = RewardModelConfig(image_dim=12, text_dim=16, width=16, num_heads=2, num_layers=1)
        reward = RubricRewardModel(features, config).double()
        with torch.no_grad():
            reward.head.out.weight.normal_(generator=torch.Generator().manual_seed(0))
        sizes = [(16, 16), (10, 24)]
        images = [pictures(1, *size)[0].requires_grad_(True) for size in sizes]
        value = lambda images: reward.reward(images, [RUBRIC, SHORT])  # noqa: E731
        grads = torch.autograd.grad(value(images).sum(), images)
        for index, grad in enumerate(grads):
            direction = tensor(grad.shape, index, DOUBLE)
            step = 1e-5
            moved = []
            for sign in (1, -1):
                others = [image.detach().clone() for image in images]
                others[index] += sign * step * direction
                moved.append(value(others).sum())
            along = ((moved[0] - moved[1]) / (2 * step)).item()
            assert (grad * direction).sum().item() == pytest.approx(along, rel=1e-5) and abs(along) > 1e-9
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())

    def test_maps_are_the_patch_tokens_in_reading_order(self):
        model, tokenizer = tiny_towers("clip")
        features = clip_features(model, tokenizer)
        images = pictures(2, 16, 16).float()
        pixels = resize_and_normalise(
            images, 16, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        )
        expected = model.vision_model(pixel_values=pixels).last_hidden_state[:, 1:]
        got = features.image(images)
        assert got.shape == (2, 12, 4, 4)
        for row in range(4):
            for column in range(4):
                torch.testing.assert_close(got[:, :, row, column], expected[:, 4 * row + column])

    def test_the_preparation_is_that_of_transformers(self):
        from transformers import CLIPImageProcessor

        processor = CLIPImageProcessor(size={"height": 16, "width": 16}, do_center_crop=False)
        image = (255 * pictures(1, 20, 36)[0]).to(torch.uint8)
        expected = processor(image, return_tensors="pt")["pixel_values"]
        mean, std = processor.image_mean, processor.image_std
        got = resize_and_normalise(image[None].float() / 255, 16, mean, std)
        # Theirs is rounded to 8 bits behind the resize.
        torch.testing.assert_close(got, expected, rtol=0, atol=1.01 / 255 / min(std))

    def test_texts_have_masks_and_the_weights_a_name(self):
        model, tokenizer = tiny_towers("clip")
        features = clip_features(model, tokenizer)
        hidden, mask = features.text(["a red circle", "blue"])
        assert hidden.shape[:2] == mask.shape and mask.sum(1).tolist() == [3, 1]
        long = features.text(["red " * 100])[1]
        assert long.shape == (1, 24)
        same = clip_features(tiny_towers("clip")[0], tokenizer)
        assert same.identity == features.identity
        with torch.no_grad():
            model.vision_model.embeddings.class_embedding.add_(1e-3)
        assert clip_features(model, tokenizer).identity != features.identity
        assert (
            clip_features(model, tokenizer, mean=(0.0, 0.0, 0.0)).identity != clip_features(model, tokenizer).identity
        )


def test_the_code_of_the_page_runs():
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    section = page.split("\n## The learned reward model\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    exec(compile(block, "rewards.md", "exec"), {"torch": torch})
