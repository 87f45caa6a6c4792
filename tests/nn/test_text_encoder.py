"""Features against the published ones and stock models; the chat path with a small harmony-like tokenizer."""

import warnings
from datetime import datetime

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedTokenizerFast

from lensmini.nn.text_encoder import TextEncoder, pad_text
from tests.golden_cases import golden
from tests.strategies import seeds, tensor

VOCABULARY = 160
SPECIAL = ["<|endoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"]
WORDS = ["a", "red", "blue", "cube", "circle", "left", "of", "two", "big", "paper"]

# In the manner of harmony: the date inside a macro, system text under a heading, thinking on its own channel and only
# where the assistant's turn is not a prompt for the next.
TEMPLATE = """
{%- macro preamble() -%}
    {{- "You are a model.\\nCurrent date: " + strftime_now("%Y-%m-%d") + "\\n" }}
{%- endmacro -%}
{{- "<|start|>system<|message|>" + preamble() + "<|end|>" }}
{%- for message in messages -%}
    {%- if message.role == "system" -%}
        {{- "<|start|>developer<|message|># Instructions\\n" + message.content + "<|end|>" }}
    {%- elif message.role == "user" -%}
        {{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- else -%}
        {%- if add_generation_prompt -%}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
        {%- else -%}
            {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|return|>" }}
        {%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{- "<|start|>assistant" }}{%- endif -%}
"""

PREFIX_TEXT = (
    "<|start|>system<|message|>You are a model.\nCurrent date: 2026-05-23\n<|end|>"
    "<|start|>developer<|message|># Instructions\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background.<|end|><|start|>user<|message|>"
)
TAIL_TEXT = (
    "<|end|><|start|>assistant<|channel|>analysis<|message|>Need to generate one image according to the "
    "description.<|end|><|start|>assistant<|channel|>final<|message|>"
)
TAIL_TOKENS = 22


def make_tokenizer(*, template=TEMPLATE, return_id=None, **kwargs):
    """Words, digits and marks are tokens; a word outside the vocabulary is unknown."""
    split = Regex(r"<\|\w+\|>|\w+|[^\w\s]")
    pattern = pre_tokenizers.Split(split, behavior="removed", invert=True)
    known = [text for text, _ in pattern.pre_tokenize_str(PREFIX_TEXT + TAIL_TEXT)]
    ids = {token: index for index, token in enumerate(dict.fromkeys([*SPECIAL, "<unk>", *WORDS, *known]))}
    assert len(ids) < VOCABULARY
    if return_id is not None:
        ids["<|return|>"] = return_id
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pattern
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token=SPECIAL[0],
        additional_special_tokens=SPECIAL[1:],
        **kwargs,
    )
    tokenizer.chat_template = template
    return tokenizer


def make_model(family="Llama", **kwargs):
    numbers = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "pad_token_id": 0,
    }
    if family == "GptOss":
        numbers |= {
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "sliding_window": 5,
            "attn_implementation": "eager",
        }
    if family == "Mistral":
        numbers |= {"sliding_window": 5}
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**numbers | kwargs))
    # Weights large enough that every layer, norm and mask matters.
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.float().eval()


def prompt_encoder(model=None, **kwargs):
    arguments = {"layers": (1, 3), **kwargs}
    tokenizer = arguments.pop("tokenizer", None) or make_tokenizer()
    return TextEncoder(model or make_model(), tokenizer, **arguments)


class Poison(nn.Module):
    def forward(self, *args, **kwargs):
        raise AssertionError("this module must not run")


def error(actual, expected):
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def published():
    tensors, meta = golden("text_features_a")
    model = GptOssForCausalLM(GptOssConfig(**meta["model_config"], attn_implementation="eager")).float()
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    return tensors, meta, TextEncoder(model, layers=meta["selected_layers"])


def test_published_features(published):
    tensors, _, encoder = published
    features, mask = encoder.encode_tokens(tensors["inputs.input_ids"], tensors["inputs.attention_mask"])
    assert torch.equal(mask, tensors["inputs.attention_mask"].bool()) and len(features) == 3
    for index, layer in enumerate(features):
        expected = tensors[f"outputs.features.{index}"]
        assert error(layer[mask], expected[mask]) <= 5e-5
        assert error(layer, expected) <= 5e-5
    assert error(features[-1][mask], tensors["outputs.final_norm_of_last"][mask]) > 1


def test_published_conditioning(published):
    tensors, meta, encoder = published
    features, mask = encoder.encode_tokens(
        tensors["inputs.input_ids"], tensors["inputs.attention_mask"], num_prefix_tokens=meta["txt_offset"]
    )
    assert torch.equal(mask, tensors["outputs.conditioning_mask"].bool())
    for index, layer in enumerate(features):
        expected = tensors[f"outputs.conditioning.{index}"]
        assert layer.shape == expected.shape and error(layer[mask], expected[mask]) <= 5e-5


def test_published_position_scaling_is_on(published):
    tensors, _, encoder = published
    rotary = encoder.model.model.rotary_emb
    torch.testing.assert_close(rotary.inv_freq, tensors["rope.inv_freq"], rtol=1e-6, atol=0)
    assert rotary.attention_scaling == pytest.approx(tensors["rope.attention_scaling"].item(), rel=1e-6)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral", "GptOss"])
def test_features_are_a_stock_models_hidden_states(family):
    model = make_model(family)
    ids = torch.randint(1, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(11) < torch.tensor([[11], [7]])
    with torch.no_grad():
        stock = model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
        features, out_mask = TextEncoder(model, layers=(2, 0, 3)).encode_tokens(ids, mask)
        assert torch.equal(out_mask, mask)
        assert error(features[0][mask], stock[3][mask]) <= 1e-6
        assert error(features[1][mask], stock[1][mask]) <= 1e-6
        assert error(model.model.norm(features[2])[mask], stock[4][mask]) <= 1e-6
        assert error(features[2][mask], stock[4][mask]) > 1e-2


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "GptOss"])
def test_nothing_behind_the_last_chosen_layer_runs(family):
    model = make_model(family)
    ids, mask = torch.arange(1, 9)[None], torch.ones(1, 8, dtype=torch.bool)
    clean = TextEncoder(model, layers=(0, 1)).encode_tokens(ids, mask)[0]
    last = TextEncoder(model, layers=(3,)).encode_tokens(ids, mask)[0]
    model.lm_head = model.model.norm = Poison()
    assert torch.equal(TextEncoder(model, layers=(3,)).encode_tokens(ids, mask)[0][0], last[0])
    model.model.layers[2] = model.model.layers[3] = Poison()
    poisoned = TextEncoder(model, layers=(0, 1)).encode_tokens(ids, mask)[0]
    assert all(torch.equal(a, b) for a, b in zip(poisoned, clean, strict=True))


def test_the_model_is_left_as_it_was_even_after_an_error():
    model = make_model()
    ids, mask = torch.arange(1, 9)[None], torch.ones(1, 8, dtype=torch.bool)
    before = model(ids).logits
    encoder = TextEncoder(model, layers=(0, 2))
    encoder.encode_tokens(ids, mask)
    assert not any(module._forward_hooks for module in model.modules())
    model.model.layers[1].register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encoder.encode_tokens(ids, mask)
    assert not any(module._forward_hooks for module in model.modules())
    model.model.layers[1]._forward_pre_hooks.clear()
    assert torch.equal(model(ids).logits, before)


@settings(max_examples=10)
@given(
    seed=seeds(),
    lengths=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    family=st.sampled_from(["Llama", "GptOss"]),
)
def test_features_do_not_depend_on_batch_mates_or_on_what_stands_in_the_padding(seed, lengths, family):
    encoder = TextEncoder(make_model(family), layers=(1, 3))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    features, _ = encoder.encode_tokens(ids, mask)
    other, _ = encoder.encode_tokens(torch.where(mask, ids, (ids + 1) % VOCABULARY), mask)
    for index, length in enumerate(lengths):
        alone, _ = encoder.encode_tokens(ids[index : index + 1, :length], mask[index : index + 1, :length])
        for together, repadded, single in zip(features, other, alone, strict=True):
            assert error(together[index, :length], single[0]) <= 1e-5
            assert error(repadded[index, :length], single[0]) <= 1e-5


def test_the_encoder_never_learns():
    model = make_model(attention_dropout=0.5)
    encoder = prompt_encoder(model.train()).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    features, _ = encoder(["a red cube"])
    assert not any(layer.requires_grad or layer.is_inference() for layer in features)
    assert all(torch.equal(a, b) for a, b in zip(features, encoder(["a red cube"])[0], strict=True))


def test_the_rendered_chat_ends_where_the_final_answer_would_begin():
    encoder = prompt_encoder()
    assert encoder.render("a red cube") == PREFIX_TEXT + "a red cube" + TAIL_TEXT
    assert encoder.render("") == PREFIX_TEXT + TAIL_TEXT
    assert encoder.render("a red<|return|> cube") == PREFIX_TEXT + "a red"


@pytest.mark.parametrize("date", ["2026-05-23", "1999-12-01"])
@pytest.mark.parametrize("format", ["%Y-%m-%d", "%d %b %Y", "%A, %B %d, %Y", "%-d.%-m.%y %H:%M:%S", "today is %j"])
def test_the_date_is_pinned_in_any_format(date, format):
    template = "  {{ strftime_now('" + format + "') }} {{ messages[1].content }}\n"
    tokenizer = make_tokenizer(template=template)
    rendered = prompt_encoder(tokenizer=tokenizer, date=date).render("a cube")
    assert rendered == "  " + datetime.fromisoformat(date).strftime(format) + " a cube"
    # The stock rendering has another date and the same white space.
    stock = tokenizer.apply_chat_template([{}, {"role": "user", "content": "a cube"}], tokenize=False)
    assert stock.startswith("  ") and stock[2:].strip() == stock[2:] and stock.endswith(" a cube")


@pytest.mark.parametrize("prompt", ["a red cube", "", "wholly unseen utterance", "7"])
def test_the_prefix_is_what_no_prompt_changes(prompt):
    encoder = prompt_encoder()
    input_ids, mask, truncated = encoder.tokenize([prompt])
    prefix = make_tokenizer()(PREFIX_TEXT, add_special_tokens=False)["input_ids"]
    assert input_ids[0, : encoder.num_prefix_tokens].tolist() == prefix
    assert mask.all() and truncated == []
    features, mask = encoder([prompt])
    num_words = len(prompt.split())
    assert [layer.shape for layer in features] == [(1, num_words + TAIL_TOKENS, 16)] * 2
    assert mask.shape == (1, num_words + TAIL_TOKENS) and mask.all()


def test_features_of_prompts_are_those_of_their_tokens():
    model, encoder = make_model(), prompt_encoder()
    prompts = ["a red cube left of two big circle", "blue"]
    features, mask = encoder(prompts)
    assert mask.sum(1).tolist() == [8 + TAIL_TOKENS, 1 + TAIL_TOKENS]
    for index, prompt in enumerate(prompts):
        ids = make_tokenizer()(
            PREFIX_TEXT + prompt + TAIL_TEXT, return_tensors="pt", add_special_tokens=False
        ).input_ids
        with torch.no_grad():
            stock = model(ids, output_hidden_states=True).hidden_states[2][:, encoder.num_prefix_tokens :]
        assert error(features[0][index : index + 1, : stock.shape[1]], stock) <= 1e-5


def test_padding_and_truncation_are_on_the_right_whatever_the_tokenizer_prefers():
    prompts = ["a red cube left of two big circle", "blue"]
    expected, expected_mask = prompt_encoder()(prompts)
    tokenizer = make_tokenizer(padding_side="left", truncation_side="left", model_max_length=4)
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(direction="left", length=200)
    features, mask = prompt_encoder(tokenizer=tokenizer)(prompts)
    assert torch.equal(mask, expected_mask) and torch.equal(mask, mask.sort(dim=1, descending=True).values)
    assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))


def test_a_tokenizer_without_padding_or_with_a_leading_token_of_its_own_gives_the_same():
    expected, _ = prompt_encoder()(["blue", "a red cube"])
    tokenizer = make_tokenizer(bos_token="<|start|>")
    start = tokenizer.convert_tokens_to_ids("<|start|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "<|start|> $A", special_tokens=[("<|start|>", start)]
    )
    tokenizer.pad_token = None
    features, _ = prompt_encoder(tokenizer=tokenizer)(["blue", "a red cube"])
    assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))


def test_long_prompts_lose_their_right_end_and_are_reported():
    full = prompt_encoder()
    length = full.num_prefix_tokens + TAIL_TOKENS + 2
    encoder = prompt_encoder(max_length=length)
    prompts = ["a cube", "a red cube left of two big circle", "two blue circle"]
    input_ids, mask, truncated = encoder.tokenize(prompts)
    assert truncated == [1, 2] and input_ids.shape == (3, length) and mask.all()
    assert torch.equal(input_ids, full.tokenize(prompts).input_ids[:, :length])
    with pytest.warns(UserWarning, match=rf"prompts \[1, 2\] are longer than max_length={length}"):
        features, mask = encoder(prompts)
    assert mask.shape == (3, TAIL_TOKENS + 2)
    for short, long in zip(features, full(prompts)[0], strict=True):
        assert error(short, long[:, : TAIL_TOKENS + 2]) <= 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(["a cube"])


@pytest.mark.parametrize("missing", [0, 3])
def test_no_room_behind_the_prefix_gives_no_tokens(missing):
    encoder = prompt_encoder(max_length=prompt_encoder().num_prefix_tokens - missing)
    with pytest.warns(UserWarning, match="longer"):
        features, mask = encoder(["a cube", "blue"])
    assert [layer.shape for layer in features] == [(2, 0, 16)] * 2 and mask.shape == (2, 0)


@pytest.mark.parametrize("num_tokens", [0, 9])
def test_all_blank_negatives_are_no_text_at_all(num_tokens):
    model = make_model()
    encoder = prompt_encoder(model)
    model.model.layers[0] = Poison()
    features, mask = encoder.encode_negative(["", " \n\t"], num_tokens=num_tokens)
    assert [layer.shape for layer in features] == [(2, num_tokens, 16)] * 2
    assert mask.shape == (2, num_tokens) and mask.dtype == torch.bool and not mask.any()
    assert all(layer.dtype == torch.float32 and not layer.any() for layer in features)


@pytest.mark.parametrize("num_tokens", [0, 40])
def test_one_negative_that_is_not_blank_sends_all_through_the_template(num_tokens):
    encoder = prompt_encoder()
    features, mask = encoder.encode_negative(["", "blue paper"], num_tokens=num_tokens)
    assert mask.sum(1).tolist() == [TAIL_TOKENS, TAIL_TOKENS + 2]
    assert mask.shape[1] == max(num_tokens, TAIL_TOKENS + 2)
    for layer, expected in zip(features, encoder(["", "blue paper"])[0], strict=True):
        assert torch.equal(layer[:, : TAIL_TOKENS + 2], expected) and not layer[:, TAIL_TOKENS + 2 :].any()


def test_a_blank_positive_is_encoded():
    features, mask = prompt_encoder()([""])
    assert mask.all() and mask.shape == (1, TAIL_TOKENS) and all(layer.abs().max() > 0 for layer in features)


def test_the_released_tokenizer_must_give_the_released_prefix():
    length = prompt_encoder().num_prefix_tokens
    with pytest.raises(ValueError, match=rf"expected the released one to give a prefix of 97 tokens, got {length}"):
        prompt_encoder(tokenizer=make_tokenizer(return_id=200002))
    padded = TEMPLATE.replace("You are", "You are" + " a" * (97 - length))
    assert prompt_encoder(tokenizer=make_tokenizer(template=padded, return_id=200002)).num_prefix_tokens == 97
    tokenizer = make_tokenizer(return_id=200002)
    assert prompt_encoder(tokenizer=tokenizer, instruction="Describe the image").num_prefix_tokens < length


def test_padding_is_zeros_and_false():
    features, mask = [tensor([2, 3, 4], seed) for seed in range(2)], torch.ones(2, 3, dtype=torch.bool)
    padded, padded_mask = pad_text(features, mask, 5)
    assert padded_mask.tolist() == [[True] * 3 + [False] * 2] * 2
    for layer, original in zip(padded, features, strict=True):
        assert torch.equal(layer[:, :3], original) and layer.shape == (2, 5, 4) and not layer[:, 3:].any()
    with pytest.raises(ValueError, match=r"num_tokens: expected at least l=3, got 2"):
        pad_text(features, mask, 2)
    with pytest.raises(ValueError, match=r"text_features\[1\]: .*got \[2, 1, 4\]"):
        pad_text([features[0], features[1][:, :1]], mask, 5)


def test_wrong_models_and_settings_are_named():
    model = make_model()
    for layers in [(), (4,), (-1,), (1, 1)]:
        with pytest.raises(ValueError, match=r"layers: expected distinct layers in 0..3"):
            TextEncoder(model, layers=layers)
    with pytest.raises(ValueError, match=r"max_length: expected at least 1, got 0"):
        TextEncoder(model, layers=(0,), max_length=0)
    for date in ["23 May 2026", "2026-13-01"]:
        with pytest.raises(ValueError, match=rf"date: expected YYYY-MM-DD, got '{date}'"):
            TextEncoder(model, layers=(0,), date=date)
    with pytest.raises(ValueError, match=r"model: expected one decoder .* got 0 in Linear"):
        TextEncoder(nn.Linear(2, 2), layers=(0,))
    with pytest.raises(ValueError, match=r"model: expected one decoder .* got 2 in ModuleList"):
        TextEncoder(nn.ModuleList([model, make_model()]), layers=(0,))


def test_wrong_inputs_are_named():
    encoder = TextEncoder(make_model(), layers=(0,))
    ids, mask = torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"input_ids: expected shape \[b l\], got \[3\]"):
        encoder.encode_tokens(ids[0], mask)
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \[b l\] with b=2, l=3, got \[2, 2\]"):
        encoder.encode_tokens(ids, mask[:, :2])
    with pytest.raises(ValueError, match=r"input_ids: expected integers, got torch.float32"):
        encoder.encode_tokens(ids.float(), mask)
    with pytest.raises(ValueError, match=r"attention_mask: expected booleans"):
        encoder.encode_tokens(ids, mask.float())
    with pytest.raises(ValueError, match=r"attention_mask: expected right padding"):
        encoder.encode_tokens(ids, torch.tensor([[True, True, True], [False, True, True]]))
    with pytest.raises(ValueError, match=r"num_prefix_tokens: expected at least 0, got -1"):
        encoder.encode_tokens(ids, mask, num_prefix_tokens=-1)
    with pytest.raises(ValueError, match=r"tokenizer: expected one to encode prompts, got None"):
        encoder(["a cube"])
    for prompts in ["a cube", "", [], [None]]:
        with pytest.raises(ValueError, match=r"prompts: expected a non-empty sequence of strings"):
            prompt_encoder()(prompts)
        with pytest.raises(ValueError, match=r"prompts: expected a non-empty sequence of strings"):
            prompt_encoder().encode_negative(prompts)
    with pytest.raises(ValueError, match=r"num_tokens: expected at least 0, got -1"):
        prompt_encoder().encode_negative([""], num_tokens=-1)
