"""The miniature's tokenizer: one token per word of the scene captions, with a chat template like GPT-OSS's."""

from collections.abc import Sequence
from typing import Any

from lensmini.data import SCENE_VOCABULARY

__all__ = ["CHAT_TEMPLATE", "SPECIAL_TOKENS", "build_tokenizer"]

SPECIAL_TOKENS = ("<|endoftext|>", "<|return|>", "<unk>", "<|start|>", "<|message|>", "<|end|>")
"""Padding, end of the last turn, unknown word, and the marks around a turn's role and content."""

_ROLES = ("user", "assistant")

# The marks and the turns are harmony's. The system turn and the thinking say the same for every prompt, so they are
# left out: 3 tokens stay in front of the user's text and 4 behind it, where GPT-OSS has 97 and 22.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'user' -%}<|start|>user<|message|>{{ message.content }}<|end|>"
    "{%- elif message.role == 'assistant' -%}<|start|>assistant<|message|>{{ message.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|start|>assistant<|message|>{%- endif -%}"
)
"""Renders a conversation in few tokens; system and developer turns are dropped."""


def build_tokenizer(vocabulary: Sequence[str] = SCENE_VOCABULARY) -> Any:
    """Build a fast tokenizer of transformers: lower case, split at spaces and around punctuation, one token per word.

    Args:
        vocabulary: the known words, in the order of their ids behind the special tokens.

    Returns:
        A ``PreTrainedTokenizerFast`` with a chat template; a word that it does not know becomes ``<unk>``.

    Example:
        >>> tokenizer = build_tokenizer()
        >>> tokenizer.decode(tokenizer("A RED circle, not a hexagon.")["input_ids"])
        'a red circle , <unk> a <unk> .'
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = dict.fromkeys([*SPECIAL_TOKENS, *_ROLES, *vocabulary])
    model = models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|return|>",
        unk_token="<unk>",
        additional_special_tokens=["<|start|>", "<|message|>", "<|end|>"],
        padding_side="right",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )
