"""Text features from a frozen causal language model: the residual stream after chosen decoder layers.

Axes: b prompts, l tokens of the longest prompt, e width of the language model.
"""

import warnings
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lensmini.packed import as_bool_mask
from lensmini.shapes import check_shape

__all__ = ["TextEncoder", "TokenizedPrompts", "pad_text"]

INSTRUCTION = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background."
)
ASSISTANT_THINKING = "Need to generate one image according to the description."
STOP = "<|return|>"
# Two renderings are enough where tokens do not merge; the empty prompt is the one that no unknown token can imitate.
PROBES = ("", "a red cube", "7")
RELEASED_STOP_ID, RELEASED_PREFIX = 200002, 97


class TokenizedPrompts(NamedTuple):
    """Rendered and tokenised prompts, padded on the right."""

    input_ids: Tensor
    """``[b, l]`` int64."""
    attention_mask: Tensor
    """``[b, l]`` bool, true for a real token."""
    truncated: list[int]
    """Indices of the prompts that did not fit in ``max_length`` and lost their right end."""


class TextEncoder(nn.Module):
    """Multi-layer features of a frozen causal language model (arXiv 2605.21573; GPT-OSS-20B in Lens).

    The features are the residual stream after each chosen decoder layer, before any final norm, the last layer's
    too. Nothing behind the last chosen layer runs. Attention stays the model's own (causal, sliding windows, sinks);
    padding is on the right and masked as keys only, positions count from 0 over the whole rendered text.

    A prompt is rendered by the tokenizer's chat template as system ``instruction``, user prompt and an assistant
    turn with ``assistant_thinking`` and empty content, without a generation prompt; cut at the first ``<|return|>``;
    and truncated on the right to ``max_length`` tokens. A prompt that contains ``<|return|>`` itself is therefore
    cut there, as in the published pipeline. The first ``num_prefix_tokens`` tokens, which no prompt changes, are run
    but not returned.

    Parameters do not require gradients and ``train()`` leaves evaluation mode on. Hooks live only during a call.

    Args:
        model: a causal language model of transformers, already loaded (GPT-OSS, Llama, Qwen, ...): any module that
            contains one decoder with ``embed_tokens`` and ``layers``.
        tokenizer: its tokenizer, with a chat template. Without it only :meth:`encode_tokens` works.
        layers: decoder layers counted from zero, in the order in which the features are returned.
        max_length: tokens of the whole rendered text, template included.
        instruction: the system turn.
        assistant_thinking: the assistant's thinking.
        date: what a template that asks for today's date is told, ``YYYY-MM-DD``; later tokens attend to it, so
            features depend on it slightly.

    Attributes:
        num_prefix_tokens: length of the common token prefix of renderings of different prompts, 0 without a
            tokenizer; 97 for GPT-OSS with the default instruction.

    Raises:
        ValueError: if the model has no such decoder, a layer does not exist or occurs twice, ``max_length`` is not
            positive, ``date`` is not a date, or the released tokenizer does not give the released prefix.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_attention_heads=2)
        >>> config.num_hidden_layers = 3
        >>> encoder = TextEncoder(LlamaForCausalLM(config), layers=(0, 2))
        >>> features, mask = encoder.encode_tokens(
        ...     torch.tensor([[1, 2, 3, 4]]), torch.ones(1, 4).bool(), num_prefix_tokens=1
        ... )
        >>> [layer.shape for layer in features], mask.shape
        ([torch.Size([1, 3, 16]), torch.Size([1, 3, 16])], torch.Size([1, 3]))
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        layers: Sequence[int] = (5, 11, 17, 23),
        max_length: int = 512,
        instruction: str = INSTRUCTION,
        assistant_thinking: str = ASSISTANT_THINKING,
        date: str = "2026-05-23",
    ) -> None:
        super().__init__()
        num_layers = len(_find_decoder(model).layers)
        if not layers or len(set(layers)) != len(layers) or any(not 0 <= layer < num_layers for layer in layers):
            raise ValueError(f"layers: expected distinct layers in 0..{num_layers - 1}, got {tuple(layers)}")
        if max_length < 1:
            raise ValueError(f"max_length: expected at least 1, got {max_length}")
        self.model: Any = model.requires_grad_(False)
        self.tokenizer = tokenizer
        self.layers = tuple(layers)
        self.max_length = max_length
        self.instruction = instruction
        self.assistant_thinking = assistant_thinking
        self.date = date
        self._clock = _pinned_clock(date)
        self.num_prefix_tokens = 0 if tokenizer is None else self._derive_prefix()
        self.eval()

    def train(self, mode: bool = True) -> "TextEncoder":
        """Does nothing: a frozen encoder has no training mode."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Where the token ids are looked up; ids are moved there."""
        return _find_decoder(self.model).embed_tokens.weight.device

    def render(self, prompt: str) -> str:
        """The text that is tokenised for ``prompt``: the rendered chat up to the first ``<|return|>``."""
        if self.tokenizer is None:
            raise ValueError("tokenizer: expected one to encode prompts, got None; encode_tokens works without")
        messages = [
            {"role": "system", "content": self.instruction},
            {"role": "user", "content": prompt},
            {"role": "assistant", "thinking": self.assistant_thinking, "content": ""},
        ]
        # A macro in front of the template hides the built-in clock. Template arguments cannot: transformers 5.23
        # replaces functions among them by their names.
        template = self._clock + self.tokenizer.get_chat_template()
        options = {"chat_template": template, "tokenize": False, "add_generation_prompt": False}
        return self.tokenizer.apply_chat_template(messages, **options).split(STOP)[0]

    def tokenize(self, prompts: Sequence[str]) -> TokenizedPrompts:
        """Render, tokenise, truncate on the right and pad on the right, whatever the tokenizer's own defaults.

        Args:
            prompts: b texts, at least one; l is the length of the longest.

        Returns:
            Token ids with the prefix, mask, and which prompts were cut.

        Raises:
            ValueError: if ``prompts`` is empty or a single string, or there is no tokenizer.
        """
        _check_prompts(prompts)
        rows = self._token_ids([self.render(prompt) for prompt in prompts])
        truncated = [index for index, row in enumerate(rows) if len(row) > self.max_length]
        rows = [torch.tensor(row[: self.max_length], dtype=torch.int64) for row in rows]
        pad = self.tokenizer.pad_token_id
        lengths = torch.tensor([len(row) for row in rows])
        input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0 if pad is None else pad)
        mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
        return TokenizedPrompts(input_ids.to(self.device), mask.to(self.device), truncated)

    def forward(self, prompts: Sequence[str]) -> tuple[list[Tensor], Tensor]:
        """Encode prompts; a blank one goes through the template like any other.

        Args:
            prompts: b texts, at least one. A prompt too long for ``max_length`` is cut with a warning.

        Returns:
            One tensor ``[b, l, e]`` per chosen layer and the mask ``[b, l]`` bool, true for a real token; l is the
            longest conditioning sequence of the batch, without the prefix (0 if ``max_length`` leaves none).

        Raises:
            ValueError: as :meth:`tokenize`.
        """
        input_ids, mask, truncated = self.tokenize(prompts)
        if truncated:
            warnings.warn(
                f"prompts {truncated} are longer than max_length={self.max_length} and were cut", stacklevel=4
            )
        return self.encode_tokens(input_ids, mask, num_prefix_tokens=self.num_prefix_tokens)

    def encode_negative(self, prompts: Sequence[str], *, num_tokens: int = 0) -> tuple[list[Tensor], Tensor]:
        """Encode negative prompts by the published rule: if every one is blank, there is no text at all.

        If all are blank, the result is zero features with an all-false mask, and the language model does not run.
        If any one is not, all of them go through the template, blank ones too.

        Args:
            prompts: b texts, at least one; blank means empty or white space.
            num_tokens: pad to at least this many tokens, the positive prompts' l where the two are stacked.

        Returns:
            As :meth:`forward`, with l at least ``num_tokens``.

        Raises:
            ValueError: as :meth:`tokenize`, or if ``num_tokens`` is negative.
        """
        if num_tokens < 0:
            raise ValueError(f"num_tokens: expected at least 0, got {num_tokens}")
        _check_prompts(prompts)
        if any(prompt.strip() for prompt in prompts):
            features, mask = self(prompts)
            return pad_text(features, mask, max(num_tokens, mask.shape[1]))
        weight = _find_decoder(self.model).embed_tokens.weight
        features = [weight.new_zeros(len(prompts), num_tokens, weight.shape[1]) for _ in self.layers]
        return features, torch.zeros(len(prompts), num_tokens, dtype=torch.bool, device=weight.device)

    @torch.no_grad()
    def encode_tokens(
        self, input_ids: Tensor, attention_mask: Tensor, *, num_prefix_tokens: int = 0
    ) -> tuple[list[Tensor], Tensor]:
        """Encode token ids.

        Args:
            input_ids: ``[b, l]`` integer.
            attention_mask: ``[b, l]``, true or 1 for a real token; right padding only.
            num_prefix_tokens: leading tokens that are run but left out of the result.

        Returns:
            One tensor ``[b, max(l - num_prefix_tokens, 0), e]`` per chosen layer, in the model's dtype, and the mask
            of the same length. Padded positions hold numbers without meaning.

        Raises:
            ValueError: if shapes or dtypes are wrong, padding is not on the right, or the prefix is negative.
        """
        sizes = check_shape("input_ids", input_ids, "b l")
        check_shape("attention_mask", attention_mask, "b l", **sizes)
        if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            raise ValueError(f"input_ids: expected integers, got {input_ids.dtype}")
        if num_prefix_tokens < 0:
            raise ValueError(f"num_prefix_tokens: expected at least 0, got {num_prefix_tokens}")
        decoder = _find_decoder(self.model)
        device = decoder.embed_tokens.weight.device
        mask = as_bool_mask("attention_mask", attention_mask).to(device)
        if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise ValueError("attention_mask: expected right padding (true, then false), got another pattern")
        if sizes["l"] <= num_prefix_tokens:
            weight = decoder.embed_tokens.weight
            features = [weight.new_zeros(sizes["b"], 0, weight.shape[1]) for _ in self.layers]
            return features, mask[:, :0]
        hidden_states = _run_until(
            decoder,
            self.layers,
            input_ids=input_ids.to(device),
            attention_mask=mask.long(),
            position_ids=torch.arange(sizes["l"], device=device)[None],
            use_cache=False,
        )
        return [state[:, num_prefix_tokens:].to(device) for state in hidden_states], mask[:, num_prefix_tokens:]

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        # The template writes every special token itself, so the tokenizer must not add a BOS of its own.
        return self.tokenizer(texts, add_special_tokens=False, padding=False, truncation=False)["input_ids"]

    def _derive_prefix(self) -> int:
        rows = self._token_ids([self.render(prompt) for prompt in PROBES])
        columns = enumerate(zip(*rows, strict=False))
        prefix = next((index for index, tokens in columns if len(set(tokens)) > 1), min(map(len, rows)))
        released = self.tokenizer.convert_tokens_to_ids(STOP) == RELEASED_STOP_ID
        if released and self.instruction == INSTRUCTION and prefix != RELEASED_PREFIX:
            raise ValueError(
                f"tokenizer: expected the released one to give a prefix of {RELEASED_PREFIX} tokens, got {prefix}; "
                "is its chat template another version, or the date longer?"
            )
        return prefix


def pad_text(text_features: Sequence[Tensor], text_mask: Tensor, num_tokens: int) -> tuple[list[Tensor], Tensor]:
    """Pad features with zeros, and their mask with false, on the right to a common number of tokens.

    Args:
        text_features: tensors ``[b, l, e]``, one per layer.
        text_mask: ``[b, l]`` bool.
        num_tokens: length to reach, at least l.

    Returns:
        Tensors ``[b, num_tokens, e]`` and the mask ``[b, num_tokens]``.

    Raises:
        ValueError: if shapes disagree or ``num_tokens`` is less than l.

    Example:
        >>> features, mask = pad_text([torch.ones(1, 2, 8)], torch.ones(1, 2, dtype=torch.bool), 3)
        >>> features[0].shape, mask.tolist()
        (torch.Size([1, 3, 8]), [[True, True, False]])
    """
    mask = as_bool_mask("text_mask", text_mask)
    sizes = check_shape("text_mask", mask, "b l")
    for index, layer in enumerate(text_features):
        sizes = check_shape(f"text_features[{index}]", layer, "b l e", **sizes)
    missing = num_tokens - sizes["l"]
    if missing < 0:
        raise ValueError(f"num_tokens: expected at least l={sizes['l']}, got {num_tokens}")
    padded = [nn.functional.pad(layer, (0, 0, 0, missing)) for layer in text_features]
    return padded, nn.functional.pad(mask, (0, missing))


def _check_prompts(prompts: Sequence[str]) -> None:
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts: expected a non-empty sequence of strings, got {prompts!r}")


class _LastLayerDone(Exception):
    """Leaves the language model's forward once the last wanted layer has spoken."""


def _run_until(decoder: Any, layers: Sequence[int], **inputs: Any) -> list[Tensor]:
    outputs: dict[int, Tensor] = {}
    last = max(layers)

    def capture(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs[layer] = output[0] if isinstance(output, tuple) else output
            if layer == last:
                raise _LastLayerDone

        return hook

    handles = [decoder.layers[layer].register_forward_hook(capture(layer)) for layer in layers]
    try:
        decoder(**inputs)
    except _LastLayerDone:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [outputs[layer] for layer in layers]


def _find_decoder(model: nn.Module) -> Any:
    """The module that owns the token embedding and the decoder layers, at any depth."""
    wanted = {"embed_tokens": nn.Module, "layers": nn.ModuleList}
    found = [m for m in model.modules() if all(isinstance(getattr(m, k, None), kind) for k, kind in wanted.items())]
    if len(found) != 1:
        raise ValueError(
            "model: expected one decoder with embed_tokens and a ModuleList of layers (GPT-OSS, Llama, Qwen, ...), "
            f"got {len(found)} in {type(model).__name__}"
        )
    return found[0]


def _pinned_clock(date: str) -> str:
    """A jinja macro ``strftime_now`` that formats ``date`` at midnight."""
    try:
        moment = datetime.strptime(date, "%Y-%m-%d")
    except ValueError as error:
        raise ValueError(f"date: expected YYYY-MM-DD, got {date!r}") from error
    filters = [f'replace("%-{code}", "{int(moment.strftime("%" + code))}")' for code in "dmHIMSj"]
    filters += [f'replace("%{code}", "{moment.strftime("%" + code)}")' for code in "aAbBcdHIjmMpSUwWxXyYZ"]
    # trim_blocks, which transformers always sets, removes the line break behind the macro and nothing of the template.
    return "{%- macro strftime_now(format) -%}{{ format | " + " | ".join(filters) + " }}{%- endmacro %}\n"
