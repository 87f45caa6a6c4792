"""The assembled call: published runs and roundings, batches, sizes, seeds, callbacks, loading, errors."""

import json
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from lensmini.nn import Autoencoder, LatentNormalizer, LensConfig, LensTransformer, TextEncoder, load_autoencoder
from lensmini.pipeline import LensPipeline
from lensmini.pipeline.canvas import bucket_size
from lensmini.pipeline.folder import guess_variant
from lensmini.pipeline.picture import read_metadata, save_png
from lensmini.pipeline.prompt_cache import PromptCache
from lensmini.sampling import empirical_mu, guide, time_grid
from tests.golden_cases import golden
from tests.nn.test_golden import error, load_model, to_latents, to_tokens
from tests.nn.test_text_encoder import make_model, make_tokenizer
from tests.strategies import tensor

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SIZES = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": (4, 6, 6),
    "in_channels": 16,
    "out_channels": 4,
    "enc_hidden_dim": 16,
    "selected_layer_index": (1, 3),
}


def tiny_transformer(dtype=torch.float32):
    model = LensTransformer(LensConfig(**SIZES))
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(0.2 * tensor(parameter.shape, index) + (parameter.ndim == 1))
    return model.to(dtype).eval()


def tiny_encoder(max_length=512):
    return TextEncoder(make_model(), make_tokenizer(), layers=(1, 3), max_length=max_length)


class Upscale(torch.nn.Module):
    """A decoder that anyone can check: its first three channels, every value repeated 4 x 4."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen = []

    def decode(self, z):
        self.seen.append(z)
        return type("Decoded", (), {"sample": self.weight * z[:, :3].repeat_interleave(4, 2).repeat_interleave(4, 3)})


def tiny_autoencoder():
    return Autoencoder(Upscale(), LatentNormalizer(tensor([16], 0), tensor([16], 1).square() + 0.1), downsample=8)


def tiny_pipeline(*, encoder=True, autoencoder=True, dtype=torch.float32, **options):
    parts = tiny_transformer(dtype), tiny_autoencoder() if autoencoder else None, tiny_encoder() if encoder else None
    return LensPipeline(*parts, check_sizes=False, **options)


def features(length, seed=0):
    return tensor((length, 2, 16), seed)


QUICK = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent"}


def slow_run(model, noise, text, negative, steps, scale):
    """One picture, conditional and unconditional apart, by tensors [1, c, h, w] and lists of layers."""

    def ask(x, t, feature):
        if feature is None:
            return model(x, t)
        return model(x, t, [layer[None] for layer in feature.unbind(1)], torch.ones(1, len(feature), dtype=torch.bool))

    grid = time_grid(steps, empirical_mu(noise.shape[1] * noise.shape[2], steps))
    x = noise[None]
    with torch.no_grad():
        for t, t_next in pairwise(grid):
            both = guide(ask(x, t[None], text), ask(x, t[None], negative), scale, channel_dim=1)
            x = x + (t_next - t) * both
    return x[0]


def test_the_published_run_from_latents_to_decoded_latents():
    tensors, meta = golden("denoise_loop_a")
    normalizer = LatentNormalizer(tensors["bn.running_mean"], tensors["bn.running_var"], eps=meta["batch_norm_eps"])
    vae = Upscale()
    autoencoder = Autoencoder(vae, normalizer, downsample=16)
    pipe = LensPipeline(load_model(tensors, meta), autoencoder, None)
    embeds = torch.stack([tensors[f"inputs.prompt_embeds.{i}"][0] for i in range(4)], dim=1)
    embeds = embeds[tensors["inputs.prompt_mask"][0].bool()]
    states, times = [], []

    def callback(pipe, step, timestep, given):
        assert step == len(states)
        states.append(given["latents"].clone())
        times.append(timestep)
        return given

    arguments = {
        "height": meta["height"],
        "width": meta["width"],
        "num_inference_steps": meta["steps"],
        "guidance_scale": meta["guidance_scale"],
        "latents": to_latents(tensors["inputs.latents"], meta["height"] // 16),
        "prompt_embeds": [embeds],
        "callback_on_step_end": callback,
    }
    final = pipe(output_type="latent", **arguments).images
    assert error(to_tokens(final), tensors["outputs.final_latents"]) < 1e-4
    for step, state in enumerate(states):
        assert error(to_tokens(state), tensors[f"outputs.latents.{step + 1}"]) < 1e-4
        assert abs(times[step] / 1000 - tensors["inputs_seen.timestep"][step, 0]) < 1e-6
    assert len(states) == meta["steps"]
    pipe(output_type="pt", **{**arguments, "callback_on_step_end": None})
    assert error(vae.seen[-1], tensors["outputs.vae_latent"]) < 1e-4


@pytest.mark.parametrize("negatives", [["", " "], ["a red cube", ""]])
def test_negatives_follow_the_published_rule_and_packing_changes_nothing(negatives):
    pipe = tiny_pipeline()
    prompts, sizes = ["a blue circle", "two big"], [(32, 40), (24, 56)]
    result = pipe(prompts, negatives, height=[32, 24], width=[40, 56], seeds=[3, 4], **QUICK).images
    for index, (prompt, (height, width)) in enumerate(zip(prompts, sizes, strict=True)):
        noise = torch.randn(height * width // 64, 16, generator=torch.Generator().manual_seed(3 + index))
        noise = noise.T.reshape(16, height // 8, width // 8)
        layers, mask = pipe.text_encoder([prompt])
        text = torch.stack([layer[0][mask[0]] for layer in layers], 1)
        negative = None
        if any(negative.strip() for negative in negatives):
            layers, mask = pipe.text_encoder([negatives[index]])
            negative = torch.stack([layer[0][mask[0]] for layer in layers], 1)
        assert error(result[index], slow_run(pipe.transformer, noise, text, negative, 3, 4.0)) < 1e-4


def test_a_picture_alone_and_in_a_batch_is_the_same():
    pipe = tiny_pipeline(encoder=False)
    embeds = [features(5, 0), features(2, 1), features(7, 2)]
    heights, widths = [32, 48, 24], [40, 24, 56]
    together = pipe(prompt_embeds=embeds, height=heights, width=widths, seeds=[1, 2, 3], **QUICK).images
    split = pipe(prompt_embeds=embeds, height=heights, width=widths, seeds=[1, 2, 3], batch_size=2, **QUICK).images
    for i in range(3):
        alone = pipe(prompt_embeds=embeds[i : i + 1], height=heights[i], width=widths[i], seeds=[i + 1], **QUICK).images
        assert error(together[i], alone[0]) < 1e-5
        assert error(split[i], alone[0]) < 1e-5


def test_noise_is_bit_equal_alone_and_in_any_batch_and_counts_up_from_one_seed():
    seen = []
    pipe = tiny_pipeline(encoder=False, autoencoder=False)
    pipe.transformer.forward_packed = lambda tokens, t, text, layout: (seen.append(tokens), torch.zeros_like(tokens))[1]
    quick = {**QUICK, "guidance_scale": 1.0}
    batch = pipe(prompt_embeds=[features(2)] * 3, height=32, width=48, seeds=np.int64(7), **quick).images
    for i in range(3):
        alone = pipe(prompt_embeds=[features(2)], height=32, width=48, seeds=[7 + i], **quick).images[0]
        expected = torch.randn(6, 16, generator=torch.Generator().manual_seed(7 + i)).T.reshape(16, 2, 3)
        assert batch[i].equal(alone) and alone.equal(expected)
    assert all(tokens.dtype == torch.float32 for tokens in seen)


def test_generators_draw_as_diffusers_pipelines_do():
    pipe = tiny_pipeline(encoder=False, autoencoder=False)
    pipe.transformer.forward_packed = lambda tokens, t, text, layout: torch.zeros_like(tokens)
    common = {**QUICK, "guidance_scale": 1.0, "prompt_embeds": [features(2)], "num_images_per_prompt": 2}
    at_once = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(5))
    one = pipe(height=32, width=48, generator=torch.Generator().manual_seed(5), **common).images
    assert to_tokens(one).equal(at_once)
    several = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    listed = pipe(height=32, width=48, generator=several, **common).images
    for seed, latents in zip((5, 6), listed, strict=True):
        assert to_tokens(latents[None])[0].equal(torch.randn(6, 16, generator=torch.Generator().manual_seed(seed)))


def test_pictures_of_one_prompt_stand_together_and_fresh_seeds_are_named():
    pipe = tiny_pipeline()
    arguments = {"height": 16, "width": 24, "num_images_per_prompt": 2}
    result = pipe(["a", "two"], **arguments, **QUICK)
    assert [notes["prompt"] for notes in result.metadata] == ["a", "a", "two", "two"]
    seeds = [notes["seed"] for notes in result.metadata]
    assert len(set(seeds)) == 4
    again = pipe(["a", "two"], seeds=seeds, **arguments, **QUICK)
    assert again.images.equal(result.images)
    assert not result.images[0].equal(result.images[1])


def test_threads_change_the_picture_by_rounding_at_most():
    pipe, before = tiny_pipeline(encoder=False), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            arguments = {"height": 128, "width": 96, "seeds": [0], "prompt_embeds": [features(30)]}
            results.append(pipe(**arguments, **QUICK).images)
    finally:
        torch.set_num_threads(before)
    assert error(*results) < 1e-5


def test_the_encoder_may_be_freed_and_the_picture_stays(tmp_path):
    call = {"prompt": "a red cube", "negative_prompt": "blue", "height": 32, "width": 24, "seeds": [1], **QUICK}
    kept = tiny_pipeline()(**call).images
    pipe = tiny_pipeline(prompt_cache=PromptCache(tmp_path), free_after_encoding=True)
    assert pipe(**call).images.equal(kept)
    assert pipe.text_encoder is None and len([*tmp_path.glob("*.safetensors")]) == 2
    assert pipe(**call).images.equal(kept)
    later = tiny_pipeline(encoder=False, prompt_cache=PromptCache(tmp_path))
    assert later(**call).images.equal(kept)
    with pytest.raises(ValueError, match=r"prompt\[0\].*'a blue cube'.*freed"):
        pipe(**{**call, "prompt": "a blue cube"})
    pipe = tiny_pipeline()
    embeds, negative = pipe.encode_prompt("a red cube"), pipe.encode_prompt(["blue"])
    pipe.free_text_encoder()
    with pytest.raises(ValueError, match="text encoder"):
        pipe(**call)
    given = {**call, "prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
    assert pipe(**given).images.equal(kept)


def test_guidance_one_asks_for_no_unconditional_half_and_no_negative():
    pipe, sizes = tiny_pipeline(encoder=False), []
    original = pipe.transformer.forward_packed

    def count(tokens, t, text, layout):
        sizes.append(layout.batch_size)
        return original(tokens, t, text, layout)

    pipe.transformer.forward_packed = count
    arguments = {"prompt_embeds": [features(3)], "negative_prompt": "needs an encoder", "height": 16, "width": 16}
    pipe(**arguments, **{**QUICK, "guidance_scale": 1.0})
    assert sizes == [1, 1, 1]
    pipe(**{**arguments, "negative_prompt": ""}, **QUICK)
    assert sizes == [1, 1, 1, 2, 2, 2]


def test_published_bf16_is_the_published_loop_operation_by_operation():
    pipe = tiny_pipeline(encoder=False, dtype=torch.bfloat16)
    embeds, steps, scale = features(6).bfloat16(), 4, 5.0
    arguments = {"prompt_embeds": [embeds], "height": 32, "width": 40, "num_inference_steps": steps}
    arguments |= {"guidance_scale": scale, "output_type": "latent"}
    result = pipe(seeds=[9], published_bf16=True, **arguments).images
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(9), dtype=torch.bfloat16)
    x = x.T.reshape(1, 16, 4, 5)
    exact = pipe(latents=x.float(), **arguments).images
    sigmas = time_grid(steps, empirical_mu(20, steps))
    text, mask = [layer[None] for layer in embeds.unbind(1)], torch.ones(1, 6, dtype=torch.bool)
    with torch.no_grad():
        for sigma, sigma_next in pairwise(sigmas):
            t = ((sigma * 1000).bfloat16() / 1000)[None]
            blank = [torch.cat([layer, torch.zeros_like(layer)]) for layer in text]
            both = torch.cat([mask, ~mask])
            cond, uncond = pipe.transformer(torch.cat([x, x]), torch.cat([t, t]), blank, both).chunk(2)
            mixed = uncond + scale * (cond - uncond)
            v = mixed * (cond.norm(dim=1, keepdim=True) / mixed.norm(dim=1, keepdim=True))
            x = (x.float() + (sigma_next - sigma) * v).bfloat16()
    assert result.dtype == torch.bfloat16 and result.equal(x)
    pipe(seeds=[9], published_bf16=True, **{**arguments, "output_type": "pt"})
    statistics = pipe.autoencoder.normalizer
    std = (statistics.var.bfloat16() + 1e-4).sqrt().view(-1, 1, 1)
    raw = x * std + statistics.mean.bfloat16().view(-1, 1, 1)
    assert pipe.autoencoder.vae.seen[-1].equal(torch.nn.functional.pixel_shuffle(raw, 2).float())
    assert exact.dtype == torch.float32
    assert ((exact - x.float()).norm() / exact.norm()).item() > 1e-3, "the default must not round as published"


def test_published_bf16_needs_bf16_weights_and_keeps_the_roundings_of_guidance_one():
    with pytest.raises(ValueError, match=r"published_bf16.*bfloat16.*float32"):
        tiny_pipeline(encoder=False)(prompt_embeds=[features(3)], height=16, width=16, published_bf16=True, **QUICK)
    pipe, sizes = tiny_pipeline(encoder=False, dtype=torch.bfloat16), []
    original = pipe.transformer.forward_packed
    pipe.transformer.forward_packed = lambda *given: (sizes.append(given[3].batch_size), original(*given))[1]
    pipe(
        prompt_embeds=[features(3)],
        height=16,
        width=16,
        published_bf16=True,
        seeds=0,
        **{**QUICK, "guidance_scale": 1.0},
    )
    assert sizes == [2, 2, 2]


@pytest.mark.parametrize(
    ("variant", "steps", "scale"), [("Lens-Base", 50, 5.0), ("Lens", 20, 5.0), ("Lens-Turbo", 4, 1.0), (None, 50, 4.0)]
)
def test_every_variant_has_its_published_defaults(variant, steps, scale):
    pipe = tiny_pipeline(encoder=False, variant=variant)
    pipe.transformer.forward_packed = lambda tokens, t, text, layout: torch.zeros_like(tokens)
    notes = pipe(prompt_embeds=[features(2)], height=8, width=8, output_type="latent").metadata[0]
    assert (notes["num_inference_steps"], notes["guidance_scale"], notes["variant"]) == (steps, scale, variant)


def test_a_callback_may_change_the_latents_and_nothing_else():
    pipe, seen = tiny_pipeline(encoder=False), []

    def blank_at_one(pipe, step, timestep, given):
        seen.append((step, float(timestep)))
        return {"latents": torch.zeros_like(given["latents"])} if step == 1 else {}

    arguments = {"prompt_embeds": [features(4)], "height": 24, "width": 16, "seeds": [2], **QUICK}
    untouched = pipe(**arguments).images
    changed = pipe(callback_on_step_end=blank_at_one, **arguments).images
    assert [step for step, _ in seen] == [0, 1, 2] and seen[0][1] == 1000
    assert error(changed, untouched) > 1e-2
    last = time_grid(3, empirical_mu(6, 3))[2:]
    ask = pipe.transformer
    zeros, text = torch.zeros(1, 16, 3, 2), [layer[None] for layer in features(4).unbind(1)]
    with torch.no_grad():
        cond = ask(zeros, last[:1], text, torch.ones(1, 4, dtype=torch.bool))
        expected = -last[0] * guide(cond, ask(zeros, last[:1]), 4.0, channel_dim=1)
    assert error(changed, expected) < 1e-4
    mixed = {**arguments, "prompt_embeds": [features(4)] * 2, "height": [24, 8], "width": [16, 16], "seeds": [2, 3]}
    kinds = []
    pipe(callback_on_step_end=lambda p, s, t, given: kinds.append((type(given["latents"]), t.shape)), **mixed)
    assert kinds[0] == (list, torch.Size([])) and kinds[1] == (list, torch.Size([2]))
    with pytest.raises(ValueError, match="latents of the callback"):
        pipe(callback_on_step_end=lambda p, s, t, given: {"latents": given["latents"][..., :1]}, **arguments)


def test_pictures_are_the_decoded_latents_in_every_output_type():
    pipe = tiny_pipeline(encoder=False)
    common = {"prompt_embeds": [features(4)], "height": 24, "width": 16, "seeds": [2], "num_inference_steps": 2}
    latents = pipe(output_type="latent", **common).images
    decoded = pipe.autoencoder.decode(latents)[0]
    unit = (decoded / 2 + 0.5).clamp(0, 1)
    assert error(pipe(output_type="pt", **common).images[0], unit) < 1e-6
    array = pipe(output_type="np", **common).images
    assert array.shape == (1, 24, 16, 3) and np.abs(array[0] - unit.permute(1, 2, 0).numpy()).max() < 1e-6
    (image,) = pipe(return_dict=False, **common)[0]
    assert image.size == (16, 24)
    expected = np.floor(((decoded.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy())
    assert np.abs(np.asarray(image).astype(float) - expected).max() == 0
    mixed = pipe(
        prompt_embeds=[features(4)] * 2, height=[24, 8], width=16, seeds=1, num_inference_steps=1, output_type="np"
    ).images
    assert [array.shape for array in mixed] == [(24, 16, 3), (8, 16, 3)]


def test_a_saved_picture_says_how_it_was_made(tmp_path):
    pipe = tiny_pipeline(variant="Lens-Turbo")
    prompt = "a red cube \u56db\u3064 \0\x1b[31m\n left"
    result = pipe(prompt, "", height=16, width=24, seeds=[11], guidance_scale=2.0)
    save_png(result.images[0], tmp_path / "x.png")
    notes = read_metadata(tmp_path / "x.png")
    assert notes == result.metadata[0]
    expected = {"prompt": prompt, "negative_prompt": "", "seed": 11, "height": 16, "width": 24}
    expected |= {"num_inference_steps": 4, "guidance_scale": 2.0, "variant": "Lens-Turbo"}
    assert {name: notes[name] for name in expected} == expected
    with Image.open(tmp_path / "x.png") as image:
        assert np.array_equal(np.asarray(image), np.asarray(result.images[0]))
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_a_prompt_too_long_says_which_words_were_cut():
    # Room for three words and nothing of the template behind them.
    words = ["red", "blue", "cube", "circle", "left", "two", "big", "paper"]
    fits = len(tiny_encoder().tokenize(["a " * 3]).input_ids[0])
    pipe = LensPipeline(tiny_transformer(), None, tiny_encoder(max_length=fits - 22), check_sizes=False)
    prompt = "a " * 3 + " ".join(words)
    with pytest.warns(UserWarning, match=r"prompt\[1\].*cut off: 'red blue cube circle left two big paper'") as caught:
        pipe(["a", prompt], height=16, width=16, seeds=0, **QUICK)
    first, second = (str(warning.message) for warning in caught)
    assert first.startswith("prompt[0]") and "'" not in first, "the short prompt loses the template's end only"
    assert second.startswith("prompt[1]") and caught[1].filename == __file__
    with pytest.raises(ValueError, match=r"negative_prompt\[0\].*cut off"):
        pipe(None, prompt, prompt_embeds=[features(1)], height=16, width=16, too_long="error", **QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_pipeline()(["a", prompt], height=16, width=16, seeds=0, **QUICK)


def test_a_blank_prompt_is_encoded_through_the_template():
    pipe = tiny_pipeline()
    blank = pipe.encode_prompt([""])[0]
    assert blank.shape == (22, 2, 16)
    image = pipe("", height=16, width=16, seeds=0, **QUICK).images
    assert image.equal(pipe(prompt_embeds=[blank], height=16, width=16, seeds=0, **QUICK).images)


def test_features_of_a_prompt_do_not_depend_on_the_other_prompts_of_the_call():
    pipe = tiny_pipeline()
    together = pipe.encode_prompt(["a", "two big red paper left of a blue cube", "a"])
    assert together[0].equal(pipe.encode_prompt("a")[0]) and together[0] is together[2]


@pytest.mark.parametrize("base", ["1024", "1440"])
def test_every_released_bucket_is_painted_by_aspect_and_by_size(base):
    _, meta = golden("resolution_buckets")
    pipe = LensPipeline(tiny_transformer(), None, None)
    pipe.transformer.forward_packed = lambda tokens, t, text, layout: torch.zeros_like(tokens)
    quick = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent", "seeds": 0}
    for aspect, (height, width) in meta["buckets"][base].items():
        assert bucket_size(aspect, int(base)) == (height, width)
        by_aspect = pipe(prompt_embeds=[features(1)], aspect_ratio=aspect, base=int(base), **quick).images
        by_size = pipe(prompt_embeds=[features(1)], height=height, width=width, **quick).images
        assert by_aspect.shape == (1, 16, height // 16, width // 16) and by_aspect.equal(by_size)


def test_a_real_odd_grid_runs_through_the_model():
    pipe = LensPipeline(tiny_transformer(), None, None)
    arguments = {"prompt_embeds": [features(3)] * 2, "height": [208, 112], "width": [112, 208]}
    images = pipe(**arguments, seeds=0, **QUICK).images
    assert [x.shape for x in images] == [(16, 13, 7), (16, 7, 13)] and all(x.isfinite().all() for x in images)


SERIAL = {"batch_size": 1, "height": 16, "width": 16}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 1000, "width": 1000}, r"multiples of 16.*nearest legal size is 1008 x 1008"),
        ({"height": 512, "width": 2048}, r"aspect.*nearest"),
        ({"height": 2048, "width": 2048}, r"at most .*nearest"),
        ({"height": 0, "width": 16}, "positive"),
        ({"height": 512.0, "width": 512}, "whole pixels"),
        ({"height": 512}, "both or neither"),
        ({"height": 512, "width": 512, "aspect_ratio": "1:1"}, "aspect_ratio"),
        ({"aspect_ratio": "5:4"}, "one of 1:2, 9:16"),
        ({"base": 1000}, "base"),
        ({"height": [512, 512], "width": 512}, "height"),
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a", "\ud83c"]}, r"prompt\[1\].*surrogate"),
        ({"prompt": [3]}, r"prompt\[0\]"),
        ({"prompt": None, "prompt_embeds": []}, "prompt_embeds"),
        ({"prompt": None, "prompt_embeds": [torch.zeros(3, 5, 16)]}, r"prompt_embeds\[0\]: expected \[l, 2, 16\]"),
        ({"prompt_embeds": [torch.zeros(3, 2, 16), torch.zeros(3, 2, 8)], "prompt": None, **SERIAL}, r"embeds\[1\]"),
        ({"prompt_embeds": [torch.zeros(3, 2, 16).int()], "prompt": None}, r"embeds\[0\]: expected floating point"),
        (
            {"prompt_embeds": [torch.zeros(0, 2, 16)], "prompt": None},
            r"prompt_embeds\[0\]: expected at least one token",
        ),
        ({"negative_prompt_embeds": [torch.zeros(3, 16)]}, r"negative_prompt_embeds\[0\]"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt"),
        ({"negative_prompt": 3}, "negative_prompt"),
        ({"negative_prompt": [3]}, "negative_prompt"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"batch_size": 0}, "batch_size"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"seeds": [1, 2]}, "seeds"),
        ({"seeds": 2**64}, "seeds: expected integers from 0 to"),
        ({"seeds": [-1]}, "seeds: expected integers from 0 to"),
        ({"seeds": 1, "generator": torch.Generator()}, "seeds and generator"),
        ({"generator": [torch.Generator()] * 2}, "generator"),
        ({"latents": torch.zeros(1, 16, 2, 3), "height": 32, "width": 32}, "latents"),
        ({"latents": torch.zeros(2, 16, 2, 3)}, "latents"),
        ({"latents": torch.zeros(16, 2, 3)}, r"latents\[0\]"),
        ({"output_type": "pil"}, "output_type"),
        ({"output_type": "jpeg"}, "output_type"),
        ({"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["x"]}, "tensor_inputs"),
        ({"too_long": "cut"}, "too_long"),
    ],
)
def test_a_wrong_argument_is_named_before_the_model_runs(arguments, message):
    pipe = LensPipeline(tiny_transformer(), None, tiny_encoder())
    pipe.transformer.img_in.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    call = {"prompt": "a", "num_inference_steps": 1, "guidance_scale": 2.0, "output_type": "latent"}
    with pytest.raises(ValueError, match=message):
        pipe(**{**call, "height": None, **arguments})


def test_parts_that_do_not_fit_are_named():
    wrong = Autoencoder(Upscale(), LatentNormalizer(torch.zeros(8), torch.ones(8)), downsample=8)
    with pytest.raises(ValueError, match="autoencoder: expected 16"):
        LensPipeline(tiny_transformer(), wrong, None)
    with pytest.raises(ValueError, match="text_encoder: expected 2 layers"):
        LensPipeline(tiny_transformer(), None, TextEncoder(make_model(), layers=(1, 2, 3)))
    with pytest.raises(ValueError, match="variant"):
        tiny_pipeline(encoder=False, variant="Lens-Mini")
    with pytest.raises(ValueError, match="multiples of 8"):
        tiny_pipeline(encoder=False)(prompt_embeds=[features(1)], height=12, width=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    diffusers = pytest.importorskip("diffusers")
    from lensmini.checkpoints import export_diffusers

    tensors, meta = golden("vae_a")
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in meta["model_config"].items()}
    vae = diffusers.AutoencoderKLFlux2(**config)
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    weights["bn.running_mean"], weights["bn.running_var"] = tensor([16], 0), tensor([16], 1).square() + 0.1
    vae.load_state_dict(weights)
    encoder = TextEncoder(make_model("GptOss"), make_tokenizer(), layers=(1, 3))
    where = tmp_path_factory.mktemp("pipelines") / "anything"
    export_diffusers(where, transformer=tiny_transformer(), vae=vae, text_encoder=encoder, variant="Lens-Turbo")
    return where


def test_a_pipeline_of_transformers_and_diffusers_parts_loads_and_paints_the_same(folder):
    pipe = LensPipeline.from_pretrained(folder, dtype=torch.float32, check_sizes=False)
    encoder = TextEncoder(make_model("GptOss"), make_tokenizer(), layers=(1, 3))
    own = LensPipeline(tiny_transformer(), load_autoencoder(folder / "vae"), encoder, check_sizes=False)
    call = {"prompt": "a red cube", "height": 32, "width": 24, "seeds": [4], "guidance_scale": 3.0, "output_type": "np"}
    assert pipe.variant == "Lens-Turbo" and pipe.num_inference_steps == 4
    expected = own(num_inference_steps=4, **call).images
    assert expected.std() > 0.01 and np.abs(pipe(**call).images - expected).max() < 1e-5


def test_parts_may_be_left_out_given_or_overridden(folder):
    pipe = LensPipeline.from_pretrained(folder, text_encoder=False, autoencoder=False, variant="Lens")
    assert pipe.text_encoder is None and pipe.autoencoder is None and pipe.variant == "Lens"
    assert pipe.transformer.img_in.weight.dtype == torch.bfloat16
    given = tiny_autoencoder()
    pipe = LensPipeline.from_pretrained(folder, text_encoder=folder / "text_encoder", autoencoder=given)
    assert pipe.autoencoder is given and pipe.text_encoder.layers == (1, 3)
    pipe = LensPipeline.from_pretrained(folder, text_encoder=False, autoencoder=folder / "vae")
    assert pipe.autoencoder.channels == 16 and pipe.to("cpu") is pipe


def test_a_repository_is_found_in_the_hubs_cache(folder, tmp_path):
    cache = tmp_path / "models--lab--Lens-Base"
    commit = "0" * 40
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            blob = cache / "blobs" / path.relative_to(folder).as_posix().replace("/", "_")
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(path.read_bytes())
            link = cache / "snapshots" / commit / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    index = cache / "snapshots" / commit / "model_index.json"
    values = json.loads(index.read_text())
    del values["lens_variant"]
    index.unlink()
    index.write_text(json.dumps(values))
    pipe = LensPipeline.from_pretrained("lab/Lens-Base", cache_dir=tmp_path, local_files_only=True, dtype=torch.float32)
    assert pipe.variant == "Lens-Base"
    assert pipe.text_encoder is not None and pipe.autoencoder is not None
    expected = tiny_transformer().state_dict()
    assert all(value.equal(expected[key]) for key, value in pipe.transformer.state_dict().items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "model_index.json"),
        ("[]", "object"),
        ("{", "model_index.json"),
        ('{"transformer": "x"}', r"library, class"),
        ('{"transformer": ["diffusers", "LensTransformer2DModel"], "vae": 3}', r'"vae"'),
        ('{"transformer": ["diffusers", "LensTransformer2DModel"], "lens_variant": "Lens-9"}', "lens_variant"),
        ('{"transformer": ["os", "system"]}', "system"),
    ],
)
def test_a_hostile_index_is_one_clear_error(folder, tmp_path, content, message):
    from lensmini.checkpoints import CheckpointError

    for name in ("transformer", "vae", "text_encoder", "tokenizer"):
        (tmp_path / name).mkdir()
        for path in (folder / name).iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    if content is not None:
        (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        LensPipeline.from_pretrained(tmp_path)


def test_a_missing_component_says_how_to_go_on_without(tmp_path):
    from lensmini.checkpoints import CheckpointError, export_diffusers

    export_diffusers(tmp_path / "Lens", transformer=tiny_transformer())
    with pytest.raises(CheckpointError, match="vae.*autoencoder= a path or False"):
        LensPipeline.from_pretrained(tmp_path / "Lens")
    with pytest.raises(CheckpointError, match="text_encoder= a path or False"):
        LensPipeline.from_pretrained(tmp_path / "Lens", autoencoder=False)
    assert LensPipeline.from_pretrained(tmp_path / "Lens", autoencoder=False, text_encoder=False).variant == "Lens"


def test_names_say_which_variant_it_is():
    names = {"org/Lens": "Lens", "org/Lens-Base": "Lens-Base", "LENS_TURBO-bf16/": "Lens-Turbo", "org/lensmini": None}
    assert {name: guess_variant(name) for name in names} == names
