"""A language model of transformers on this machine, asked like a server.

Axes: b requests, l tokens, v vocabulary.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lensmini.endpoint import ChatRequest, Failure, Reply, ReplyCache

__all__ = ["LocalChat", "attach_head", "gumbel_choice"]


class LocalChat:
    """Chat with a causal language model that is loaded already, for example the one that a text encoder holds.

    Every answer is a function of its request alone (up to rounding between batches): it is sampled from a generator that the
    whole request, its seed among the rest, has seeded, and greedy at temperature 0 or None. The sampling state of torch is
    neither used nor changed.

    Args:
        model: with a language-model head, such as ``GptOssForCausalLM``.
        tokenizer: its tokenizer, with a chat template.
        name: for records and the cache.
        batch_size: answers at a time.
        max_new_tokens: of an answer whose request names no limit.
        timeout_s: of a batch; what is not finished then ends as if cut by its length. None for none.
        template: more arguments of the chat template, such as ``{"reasoning_effort": "low"}`` for GPT-OSS.
        cache: answers that are known; None for none.

    Raises:
        ValueError: if a number is not positive or the model cannot generate.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
        >>> LocalChat(LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)), None, name="tiny").model
        'tiny'
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        batch_size: int = 16,
        max_new_tokens: int = 1024,
        timeout_s: float | None = None,
        template: Mapping[str, Any] | None = None,
        cache: ReplyCache | None = None,
    ) -> None:
        if batch_size < 1 or max_new_tokens < 1 or (timeout_s is not None and not timeout_s > 0):
            raise ValueError(
                "batch_size, max_new_tokens, timeout_s: expected positive numbers, "
                f"got {batch_size}, {max_new_tokens} and {timeout_s}"
            )
        if not getattr(model, "can_generate", lambda: False)():
            raise ValueError(f"model: expected one with a language-model head, got {type(model).__name__}")
        self.language_model, self.tokenizer, self._name = model, tokenizer, name
        self.batch_size, self.max_new_tokens, self.timeout_s = batch_size, max_new_tokens, timeout_s
        self.template, self.cache = dict(template or {}), cache

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        revision: str | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> "LocalChat":
        """Load a model from a folder or the Hub; safetensors only, and no code of the checkpoint runs.

        Args:
            path_or_repo: folder or repository.
            device: where to run.
            dtype: of the weights.
            revision: branch, tag or commit.
            local_files_only: never ask the network.
            **options: as of the class.

        Returns:
            The model, frozen.

        Raises:
            OSError: if there is no such model, or none in safetensors.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        hub: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only, "trust_remote_code": False}
        name = os.fspath(path_or_repo)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True, **hub)
        tokenizer = AutoTokenizer.from_pretrained(name, **hub)
        options = {"name": name if revision is None else f"{name}@{revision}", **options}
        return cls(model.to(device).eval().requires_grad_(False), tokenizer, **options)

    @property
    def model(self) -> str:
        """Its name."""
        return self._name

    def ask_all(self, requests: Sequence[ChatRequest]) -> list[Reply | Failure]:
        """Answers in the order of the requests; equal requests are answered once.

        Returns:
            Replies, with special tokens as text where a model writes channels; a failure for a request that the chat
            template or the model's context does not take.
        """
        found: dict[str, Reply | Failure] = {}
        keys = [self._key(request) for request in requests]
        waiting: dict[str, tuple[ChatRequest, list[int]]] = {}
        for key, request in zip(keys, requests, strict=True):
            known = self.cache.get(key) if self.cache is not None else None
            if known is not None:
                found[key] = known
            elif key not in waiting and key not in found:
                tokens = self._tokens(request)
                if isinstance(tokens, Failure):
                    found[key] = tokens
                else:
                    waiting[key] = (request, tokens)
        # Similar lengths together, so that little is spent on padding.
        order = sorted(waiting, key=lambda key: len(waiting[key][1]))
        for first in range(0, len(order), self.batch_size):
            batch = order[first : first + self.batch_size]
            for key, reply in zip(batch, self._generate([waiting[key] for key in batch]), strict=True):
                found[key] = reply
                limit = waiting[key][0].max_tokens or self.max_new_tokens
                # What ran out of time may be whole another time.
                if self.cache is not None and (reply.finish_reason == "stop" or reply.completion_tokens == limit):
                    self.cache.put(key, reply)
        seen: set[str] = set()
        outcomes: list[Reply | Failure] = []
        for key in keys:
            outcome = found[key]
            repeated = key in seen and isinstance(outcome, Reply)
            outcomes.append(replace(outcome, cached=True) if repeated else outcome)  # pyright: ignore[reportCallIssue]
            seen.add(key)
        return outcomes

    def forget(self, request: ChatRequest) -> None:
        """Take an answer out of the cache, if there is one."""
        if self.cache is not None:
            self.cache.remove(self._key(request))

    def _key(self, request: ChatRequest) -> str:
        """Of all that decides the answer: the request, and what stands in for what it leaves open."""
        options = {**self.template} if request.max_tokens else {**self.template, "max_new_tokens": self.max_new_tokens}
        return request.key(
            f"{self.model} {json.dumps(options, sort_keys=True, default=str)}" if options else self.model
        )

    def _tokens(self, request: ChatRequest) -> list[int] | Failure:
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False, **self.template}
        try:
            tokens = list(
                self.tokenizer.apply_chat_template([dict(message) for message in request.messages], **options)
            )
        except Exception as error:  # a template is a program of its own and may refuse in any way
            return Failure("bad request", f"{type(error).__name__}: {error}"[:300])
        room = getattr(self.language_model.config, "max_position_embeddings", None)
        length = len(tokens) + (request.max_tokens or self.max_new_tokens)
        if room is not None and length > room:
            return Failure("bad request", f"{len(tokens)} tokens and an answer do not fit in {room}")
        return tokens

    @torch.inference_mode()
    def _generate(self, batch: Sequence[tuple[ChatRequest, list[int]]]) -> list[Reply]:
        from transformers import LogitsProcessorList

        longest, pad = max(len(tokens) for _, tokens in batch), self._pad
        ids = torch.tensor([[pad] * (longest - len(tokens)) + tokens for _, tokens in batch])
        mask = torch.tensor([[0] * (longest - len(tokens)) + [1] * len(tokens) for _, tokens in batch])
        device = self.language_model.device
        limits = [request.max_tokens or self.max_new_tokens for request, _ in batch]
        output = self.language_model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            do_sample=False,
            max_new_tokens=max(limits),
            max_time=self.timeout_s,
            pad_token_id=pad,
            eos_token_id=self._ends,
            logits_processor=LogitsProcessorList([_Sampler(self.model, [request for request, _ in batch])]),
        )
        return [
            self._reply(row[longest:].tolist()[:limit], len(tokens))
            for row, limit, (_, tokens) in zip(output, limits, batch, strict=True)
        ]

    @property
    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    @property
    def _ends(self) -> list[int]:
        own = self.language_model.generation_config.eos_token_id
        found = {*(own if isinstance(own, list) else [own]), self.tokenizer.eos_token_id}
        return sorted(token for token in found if token is not None)

    def _reply(self, tokens: list[int], prompt_tokens: int) -> Reply:
        ends = self._ends
        ended = next((index for index, token in enumerate(tokens) if token in ends), None)
        tokens = tokens if ended is None else tokens[:ended]
        # Special tokens stay: they are what tells reasoning from the answer.
        text = self.tokenizer.decode(tokens, skip_special_tokens=False)
        return Reply(text, "length" if ended is None else "stop", prompt_tokens, len(tokens))


def attach_head(decoder: Any, head: Tensor) -> Any:
    """A language model that can chat out of a decoder that is loaded already, such as a text encoder's; nothing is copied.

    Args:
        decoder: of transformers, without a language-model head (``GptOssModel``): ``TextEncoder.model`` as
            :func:`lensmini.checkpoints.load_text_encoder` makes it.
        head: ``[v, e]``, the checkpoint's ``lm_head.weight``.

    Returns:
        The model, for :class:`LocalChat`.

    Raises:
        ValueError: if the head does not fit, or the decoder lost layers that an encoder does not need.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
        >>> whole = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> chat = attach_head(whole.model, whole.lm_head.weight)
        >>> torch.equal(chat(torch.tensor([[1, 2]])).logits, whole(torch.tensor([[1, 2]])).logits)
        True
    """
    from transformers import AutoModelForCausalLM

    config = decoder.config
    wanted = (config.vocab_size, config.hidden_size)
    if tuple(head.shape) != wanted:
        raise ValueError(f"head: expected {list(wanted)}, got {list(head.shape)}")
    if len(decoder.layers) != config.num_hidden_layers:
        raise ValueError(f"decoder: expected all {config.num_hidden_layers} layers, got {len(decoder.layers)}")
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    setattr(model, model.base_model_prefix, decoder)
    model.set_output_embeddings(_linear(head))
    return model.eval()


def _linear(weight: Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight.detach(), requires_grad=False)
    return layer


def gumbel_choice(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Perturb logits so that their argmax is a sample at a temperature: ``logits / T - log(-log(u))`` (Gumbel, 1954).

    Args:
        logits: ``[v]``.
        temperature: T, positive.
        generator: of the uniform numbers u, on the CPU.

    Returns:
        ``[v]`` float32 on the logits' device.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> draws = [int(gumbel_choice(torch.tensor([0.0, 1.0]), 1.0, generator).argmax()) for _ in range(2000)]
        >>> abs(sum(draws) / 2000 - torch.tensor(1.0).sigmoid().item()) < 0.03
        True
    """
    uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64).clamp_min(1e-300)
    noise = -(-uniform.log()).log()
    return logits.float() / temperature + noise.to(logits.device, torch.float32)


class _Sampler:
    """Turns greedy choice into sampling, row by row, so that a row does not depend on its batch."""

    def __init__(self, model: str, requests: Sequence[ChatRequest]) -> None:
        self.temperatures = [request.temperature or 0.0 for request in requests]
        # Of the whole request, so that two requests with one seed do not share their noise.
        seeds = [int(request.key(model)[:15], 16) for request in requests]
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = [
            gumbel_choice(row, temperature, generator) if temperature > 0 else row.float()
            for row, temperature, generator in zip(scores, self.temperatures, self.generators, strict=True)
        ]
        return torch.stack(rows)
