"""Painting: the published run, no text as the published blank prompt, one forward at guidance 1, no batch mates."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments import painting
from experiments.bank import FeatureBank
from experiments.miniature.world import Miniature, prepare_miniature
from experiments.painting import paint
from experiments.pretrain import EvalConfig
from experiments.scoring import paint_prompts, score_suite
from lensmini.data import build_scene_prompts
from lensmini.nn import LensConfig, LensTransformer
from lensmini.packed import Layout
from tests.experiments import tiny_run
from tests.golden_cases import golden

GRIDS = [(2, 3), (4, 1), (2, 3), (3, 3)]
LENGTHS = [3, 5, 3, 0]


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def make_model(config: LensConfig = tiny_run.MODEL) -> LensTransformer:
    """A model all of whose weights matter."""
    model, generator = LensTransformer(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


def make_texts(lengths: Sequence[int] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, 2, tiny_run.MODEL.enc_hidden_dim, generator=generator) for length in lengths]


class Constant:
    """A model whose velocity is one vector with text and another without, and which remembers what it was asked."""

    def __init__(self, channels: int = 4) -> None:
        self.config = SimpleNamespace(in_channels=channels, num_text_layers=1, enc_hidden_dim=2)
        self.img_in = SimpleNamespace(weight=torch.zeros(1))
        generator = torch.Generator().manual_seed(2)
        self.cond, self.uncond = torch.randn(2, channels, generator=generator)
        self.calls: list[tuple[int, int, list[float]]] = []

    def forward_packed(self, tokens: Tensor, t: Tensor, text_tokens: Tensor, layout: Layout) -> Tensor:
        self.calls.append((layout.batch_size, len(tokens), t.tolist()))
        assert len(tokens) == layout.num_image_tokens and len(text_tokens) == layout.num_text_tokens
        pieces = [
            (self.cond if text else self.uncond).expand(image, -1)
            for image, text in zip(layout.image_lengths, layout.text_lengths, strict=True)
        ]
        return torch.cat(pieces)


def load_published() -> tuple[dict[str, Tensor], dict[str, Any], LensTransformer, Tensor]:
    """The published sampling run: its tensors and settings, its model and its valid text tokens."""
    tensors, meta = golden("denoise_loop_a")
    model = LensTransformer(LensConfig.from_dict(meta["model_config"]))
    model.load_state_dict({k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")})
    mask = tensors["inputs.prompt_mask"][0].bool()
    text = torch.stack([tensors[f"inputs.prompt_embeds.{layer}"][0][mask] for layer in range(4)], dim=1)
    return tensors, meta, model, text


def test_the_published_run(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, meta, model, text = load_published()
    grid = (meta["height"] // 16, meta["width"] // 16)
    noise = tensors["inputs.latents"][0].T.reshape(-1, *grid)
    monkeypatch.setattr(painting, "draw_noise", lambda *_, **__: [noise])
    (latent,) = paint(
        model, [text], [grid], [0], num_steps=meta["steps"], guidance_scale=meta["guidance_scale"], mu=None
    )
    assert latent.shape[1:] == grid
    assert error(latent.flatten(1).T, tensors["outputs.final_latents"][0]) < 1e-4


def test_a_sample_whose_text_was_dropped_is_the_published_blank_prompt() -> None:
    tensors, meta, model, text = load_published()
    grid = torch.tensor([[meta["height"] // 16, meta["width"] // 16]])
    starts = torch.tensor([0, len(text)]), torch.tensor([0, int(grid.prod())])
    for step in range(meta["steps"]):
        latents = tensors["inputs.latents" if step == 0 else f"outputs.latents.{step}"][0]
        bank = FeatureBank(text, starts[0], latents, starts[1], grid, torch.tensor([0]))
        times = tensors["inputs_seen.timestep"][step][:1]
        for half, dropout in enumerate((0.0, 1.0)):
            batch = bank.collate([0], seed=0, step=step, text_dropout=dropout)
            with torch.no_grad():
                velocity = model.forward_packed(batch.image_tokens, times, batch.text_tokens, batch.layout)
            assert error(velocity, tensors[f"outputs.model_output.{step}"][half]) < 3e-5  # pyright: ignore


def test_blank_text_paints_the_same_whatever_the_guidance() -> None:
    model, blank = make_model(), make_texts([0, 0])
    one, four = (paint(model, blank, GRIDS[:2], [3, 4], num_steps=3, guidance_scale=s) for s in (1.0, 4.0))
    for plain, guided in zip(one, four, strict=True):
        assert error(guided, plain) < 1e-5


@pytest.mark.parametrize(("guidance_scale", "samples"), [(1.0, 4), (2.5, 8)])
def test_guidance_one_costs_one_forward_of_the_samples_alone(guidance_scale: float, samples: int) -> None:
    model = Constant()
    texts = [torch.ones(length, 1, 2) for length in LENGTHS]
    paint(model, texts, GRIDS, range(4), num_steps=5, guidance_scale=guidance_scale)  # pyright: ignore
    tokens = sum(h * w for h, w in GRIDS)
    assert [call[:2] for call in model.calls] == [(samples, tokens * samples // 4)] * 5


@pytest.mark.parametrize("rescale", [True, False])
def test_guidance_walks_along_the_combined_velocity(rescale: bool) -> None:
    model, noise = Constant(), torch.Generator().manual_seed(9)
    (latent,) = paint(
        model,  # pyright: ignore[reportArgumentType]
        [torch.ones(2, 1, 2)],
        [(2, 3)],
        [9],
        num_steps=3,
        guidance_scale=3.0,
        mu=0.7,
        rescale=rescale,
    )
    start = torch.randn(6, 4, generator=noise)
    velocity = model.uncond + 3 * (model.cond - model.uncond)
    if rescale:
        velocity = velocity / velocity.norm() * model.cond.norm()
    # The times go from 1 to 0, so that a constant velocity is taken off once, whatever the grid.
    torch.testing.assert_close(latent, (start - velocity).T.reshape(4, 2, 3), rtol=1e-5, atol=1e-5)
    shift = torch.tensor(0.7).exp()
    expected = [(shift / (shift + 3 / left - 1)).item() for left in (3, 2, 1)]
    assert [call[2][0] for call in model.calls] == pytest.approx(expected, rel=1e-5)


def test_rescaling_means_nothing_at_guidance_one_and_something_above() -> None:
    model, texts = make_model(), make_texts()

    def run(scale: float, rescale: bool) -> Tensor:
        latents = paint(model, texts, GRIDS, range(4), num_steps=3, guidance_scale=scale, rescale=rescale)
        return torch.cat([latent.flatten() for latent in latents])

    assert torch.equal(run(1.0, True), run(1.0, False))
    assert error(run(4.0, True), run(4.0, False)) > 0.01


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_a_picture_does_not_depend_on_its_batch_mates(guidance_scale: float) -> None:
    model, texts = make_model(), make_texts()

    def run(chosen: list[int], other: Tensor | None = None) -> list[Tensor]:
        words = [texts[index] for index in chosen]
        return paint(
            model,
            [words[0], *([other] if other is not None else words[1:])],
            [GRIDS[index] for index in chosen],
            [10 + index for index in chosen],
            num_steps=4,
            guidance_scale=guidance_scale,
        )

    together = run([0, 1, 2, 3])
    for index in range(4):
        (alone,) = run([index])
        assert alone.shape == (tiny_run.MODEL.in_channels, *GRIDS[index]) and alone.dtype == torch.float32
        assert error(alone, together[index]) < 1e-5
    # Mates of the same shapes with other content change no bit.
    assert torch.equal(run([0, 2])[0], run([0, 2], -texts[2])[0])
    assert error(run([1, 2])[1], run([2])[0]) < 1e-5


def test_pictures_differ_by_seed_and_by_text() -> None:
    model, texts = make_model(), make_texts([3, 3])
    first, second = paint(model, [texts[0]] * 2, [(2, 2)] * 2, [0, 1], num_steps=2, guidance_scale=2.0)
    assert error(first, second) > 0.1
    first, second = paint(model, texts, [(2, 2)] * 2, [0, 0], num_steps=2, guidance_scale=2.0)
    assert error(first, second) > 0.01


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Miniature:
    path = tmp_path_factory.getbasetemp() / "tiny"
    tiny_run.prepare(path)
    return prepare_miniature(tiny_run.MINIATURE, path, quiet=True)


CANVASES = ((16, 16), (16, 24), (24, 16))
SETTINGS = EvalConfig(num_steps=2, guidance_scale=3.0)


def test_chunks_do_not_change_pictures(world: Miniature) -> None:
    prompts = [prompt.text for prompt in build_scene_prompts(1, seed=4)]
    whole = paint_prompts(make_model(), world, prompts, CANVASES, SETTINGS)
    assert [tuple(picture.shape) for picture in whole] == [(3, *CANVASES[index % 3]) for index in range(len(prompts))]
    assert all(picture.dtype == torch.uint8 for picture in whole)
    for chunk in (1, 3):
        parts = paint_prompts(make_model(), world, prompts, CANVASES, SETTINGS, chunk=chunk)
        for one, other in zip(whole, parts, strict=True):
            # One step of 255, where rounding falls the other way.
            assert (one.int() - other.int()).abs().max() <= 1
            assert (one != other).float().mean() < 0.05


def test_pictures_are_painted_with_the_settings_asked_for(world: Miniature) -> None:
    prompts = [prompt.text for prompt in build_scene_prompts(1, seed=7)][:2]

    def run(scale: float, *, rescale: bool = True, num_steps: int = 2, mu: float | None = 0.0) -> Tensor:
        settings = EvalConfig(num_steps=num_steps, guidance_scale=scale, mu=mu)
        return torch.stack(paint_prompts(make_model(), world, prompts, CANVASES[:1], settings, rescale=rescale)).int()

    plain = run(4.0)
    assert torch.equal(plain, run(4.0))
    for other in (run(2.0), run(4.0, rescale=False), run(4.0, num_steps=3), run(4.0, mu=2.0)):
        assert (plain - other).abs().max() > 1
    assert torch.equal(run(1.0), run(1.0, rescale=False))


def test_prompts_are_painted_in_their_own_order_with_their_own_seeds(world: Miniature) -> None:
    prompts = [prompt.text for prompt in build_scene_prompts(1, seed=5)]
    pictures = paint_prompts(make_model(), world, prompts, CANVASES[:1], SETTINGS, seeds=range(20, 20 + len(prompts)))
    assert (pictures[0] != pictures[-1]).float().mean() > 0.5
    for index in (0, len(prompts) - 1):
        (alone,) = paint_prompts(make_model(), world, [prompts[index]], CANVASES[:1], SETTINGS, seeds=[20 + index])
        assert (alone.int() - pictures[index].int()).abs().max() <= 1


class Part:
    """One of two processes; the other's values are handed in."""

    def __init__(self, rank: int, others: list[Any]) -> None:
        self.rank, self.world_size, self.others = rank, 2, others
        self.seen: Any = None

    def gather(self, value: Any) -> list[Any]:
        self.seen = value
        return [value, *self.others] if self.rank == 0 else [*self.others, value]


def test_a_suite_shared_out_over_processes_is_the_suite(world: Miniature) -> None:
    prompts = build_scene_prompts(1, seed=6)[:5]
    model = make_model()
    whole, pictures = score_suite(model, world, prompts, CANVASES, SETTINGS)
    second = Part(1, [{index: pictures[index] for index in range(0, 5, 2)}])
    score_suite(model, world, prompts, CANVASES, SETTINGS, second)  # pyright: ignore[reportArgumentType]
    assert sorted(second.seen) == [1, 3]
    first = Part(0, [second.seen])
    shared, again = score_suite(model, world, prompts, CANVASES, SETTINGS, first)  # pyright: ignore[reportArgumentType]
    assert len(again) == 5
    for one, other in zip(pictures, again, strict=True):
        assert one.shape == other.shape and (one.int() - other.int()).abs().max() <= 1
    assert (shared.strict, shared.loose) == (whole.strict, whole.loose)
