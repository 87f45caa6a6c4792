"""Text features of prompts, each encoded alone: from a cache or an encoder, with a word on prompts that are too long.

Axes: l text tokens, k text layers, e text feature width.
"""

import warnings
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from lensmini.nn import TextEncoder
from lensmini.nn.text_encoder import STOP

__all__ = ["FeatureCache", "cut_words", "encode_prompts", "is_blank"]


class FeatureCache(Protocol):
    """What keeps features between calls: :class:`lensmini.pipeline.prompt_cache.PromptCache`."""

    def get(self, prompt: str) -> Tensor | None:
        """Features ``[l, k, e]``, or None."""
        ...

    def encode(self, encoder: TextEncoder, prompts: Sequence[str], *, batch_size: int) -> list[Tensor]:
        """Features of each prompt, encoded and kept where they are missing."""
        ...


def is_blank(prompts: Sequence[str]) -> bool:
    """Whether every prompt is empty or white space: the published rule for "no negative text at all".

    Example:
        >>> is_blank(["", "  "]), is_blank(["", "blurry"])
        (True, False)
    """
    return not any(prompt.strip() for prompt in prompts)


def cut_words(encoder: TextEncoder, prompt: str) -> str | None:
    """The end of a prompt that does not fit in the encoder's ``max_length``.

    Args:
        encoder: with a tokenizer.
        prompt: the text.

    Returns:
        None if all fits, else the words that are cut; "" if only the template behind the prompt is.

    Example:
        >>> from types import SimpleNamespace
        >>> fits = SimpleNamespace(tokenize=lambda prompts: SimpleNamespace(truncated=[]))
        >>> cut_words(fits, "a short prompt") is None
        True
    """
    if not encoder.tokenize([prompt]).truncated:
        return None
    tokenizer = encoder.tokenizer
    texts = [encoder.render(prompt), encoder.render("")]
    tokens, empty = tokenizer(texts, add_special_tokens=False)["input_ids"]
    # A prompt that holds the stop mark ends there, and nothing of the template stands behind it.
    behind = 0 if STOP in prompt else len(empty) - encoder.num_prefix_tokens
    return tokenizer.decode(tokens[encoder.max_length : len(tokens) - behind]).strip()


@torch.no_grad()
def encode_prompts(
    encoder: TextEncoder | None,
    prompts: Sequence[str],
    *,
    cache: FeatureCache | None = None,
    too_long: Literal["warn", "error"] = "warn",
    name: str = "prompt",
) -> list[Tensor]:
    """Encode prompts one at a time, equal ones once, so that features never depend on the other prompts of a call.

    Args:
        encoder: None is enough where the cache has every prompt.
        prompts: texts; a blank one goes through the template like any other.
        cache: looked up first, and filled.
        too_long: "warn" cuts a prompt that does not fit and says what was cut, "error" refuses it.
        name: argument name for messages.

    Returns:
        For each prompt ``[l, k, e]``.

    Raises:
        ValueError: if prompts are not strings, one is too long and that is an error, or one is not in the cache and
            there is no encoder.

    Example:
        >>> [x.shape for x in encode_prompts(None, ["a cat"], cache={"a cat": torch.zeros(5, 4, 8)})]
        [torch.Size([5, 4, 8])]
    """
    if too_long not in ("warn", "error"):
        raise ValueError(f'too_long: expected "warn" or "error", got {too_long!r}')
    places = {prompt: index for index, prompt in reversed([*enumerate(prompts)])}
    for prompt, index in sorted(places.items(), key=lambda item: item[1]):
        if not isinstance(prompt, str):
            raise ValueError(f"{name}[{index}]: expected a string, got {prompt!r}")
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise ValueError(f"{name}[{index}]: expected text, got a lone surrogate in {prompt[:60]!r}")
        if encoder is not None:
            _report_cut(encoder, prompt, f"{name}[{index}]", too_long)
    unique = sorted(places, key=places.__getitem__)
    if encoder is None:
        known = {prompt: None if cache is None else cache.get(prompt) for prompt in unique}
    elif cache is None:
        known = {prompt: _encode(encoder, prompt) for prompt in unique}
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="prompts .* are longer than max_length")  # said above, with words
            known = dict(zip(unique, cache.encode(encoder, unique, batch_size=1), strict=True))
    found = {prompt: features for prompt, features in known.items() if features is not None}
    for prompt, features in known.items():
        if features is None:
            raise ValueError(
                f"{name}[{places[prompt]}]: expected a text encoder, cached features or {name}_embeds for "
                f"{prompt[:60]!r}, got none (was the encoder freed?)"
            )
    return [found[prompt] for prompt in prompts]


def _encode(encoder: TextEncoder, prompt: str) -> Tensor:
    rows = encoder.tokenize([prompt])
    prefix = encoder.num_prefix_tokens
    layers, mask = encoder.encode_tokens(rows.input_ids, rows.attention_mask, num_prefix_tokens=prefix)
    return torch.stack([layer[0][mask[0]] for layer in layers], dim=1)


def _report_cut(encoder: TextEncoder, prompt: str, name: str, too_long: str) -> None:
    cut = cut_words(encoder, prompt)
    if cut is None:
        return
    lost = repr(cut) if cut else "the end of the chat template"
    message = f"{name}: expected at most {encoder.max_length} tokens with the template; cut off: {lost}"
    if too_long == "error":
        raise ValueError(message)
    warnings.warn(message, stacklevel=7)
