"""A vision-language model of transformers on this machine, as a captioner."""

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch

from lensmini.data.captions import CaptionJob, shrink
from lensmini.data.pictures import read_picture
from lensmini.endpoint import Failure, Reply

__all__ = ["LocalCaptioner"]


class LocalCaptioner:
    """Any image-text-to-text model with a chat template; safetensors only, and no code of the checkpoint runs.

    The first attempt is greedy, so a picture's caption depends on the others of its batch by rounding at most; later
    attempts are drawn at temperature 0.7 from a seed that is the attempt's number.

    Args:
        path_or_repo: folder or Hub repository.
        device: where to run.
        dtype: of the weights.
        batch_size: pictures at a time.
        max_new_tokens: of an answer.
        max_side: pictures are shrunk to this longer side.
        revision: branch, tag or commit.
        local_files_only: never ask the network.

    Raises:
        ValueError: if a number is not positive.
        OSError: if there is no such model, or none in safetensors.

    Example:
        >>> LocalCaptioner("somewhere", batch_size=0)
        Traceback (most recent call last):
        ValueError: batch_size, max_new_tokens: expected positive integers, got 0 and 512
    """

    def __init__(
        self,
        path_or_repo: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        batch_size: int = 8,
        max_new_tokens: int = 512,
        max_side: int = 1024,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        if batch_size < 1 or max_new_tokens < 1:
            raise ValueError(
                f"batch_size, max_new_tokens: expected positive integers, got {batch_size} and {max_new_tokens}"
            )
        from transformers import AutoModelForImageTextToText, AutoProcessor

        hub: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only, "trust_remote_code": False}
        name = os.fspath(path_or_repo)
        self.processor: Any = AutoProcessor.from_pretrained(name, **hub)
        self.processor.tokenizer.padding_side = "left"
        if self.processor.tokenizer.pad_token is None:
            self.processor.tokenizer.pad_token = self.processor.tokenizer.eos_token
        model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, use_safetensors=True, **hub)
        self.model: Any = model.to(device).eval().requires_grad_(False)
        self.batch_size, self.max_new_tokens, self.max_side = batch_size, max_new_tokens, max_side

    def answer(self, jobs: Iterable[CaptionJob]) -> Iterator[tuple[int, Reply | Failure]]:
        """As :class:`lensmini.data.captions.Captioner`; one batch is read ahead."""
        numbered = enumerate(jobs)
        while batch := list(islice(numbered, self.batch_size)):
            for attempt in sorted({job.attempt for _, job in batch}):
                chosen = [(index, job) for index, job in batch if job.attempt == attempt]
                replies = self._generate([job for _, job in chosen], attempt)
                yield from ((index, reply) for (index, _), reply in zip(chosen, replies, strict=True))

    @torch.inference_mode()
    def _generate(self, jobs: list[CaptionJob], attempt: int) -> list[Reply]:
        from PIL import Image

        talks = []
        for job in jobs:
            pixels = shrink(read_picture(job.picture).image, self.max_side)
            picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
            content = [{"type": "image", "image": picture}, {"type": "text", "text": job.instruction}]
            talks.append([{"role": "user", "content": content}])
        inputs = self.processor.apply_chat_template(
            talks, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
        ).to(self.model.device)
        inputs = {
            name: value.to(self.model.dtype) if value.is_floating_point() else value for name, value in inputs.items()
        }
        sampling: dict[str, Any] = {"do_sample": True, "temperature": 0.7} if attempt else {"do_sample": False}
        with torch.random.fork_rng(devices=[self.model.device] if self.model.device.type == "cuda" else []):
            torch.random.manual_seed(attempt)
            output = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, **sampling)
        length = inputs["input_ids"].shape[1]
        return [
            self._reply(row[length:].tolist(), int(mask.sum()))
            for row, mask in zip(output, inputs["attention_mask"], strict=True)
        ]

    def _reply(self, tokens: list[int], prompt_tokens: int) -> Reply:
        ends = self.model.generation_config.eos_token_id
        ends = set(ends) if isinstance(ends, list) else {ends, self.processor.tokenizer.eos_token_id}
        ended = next((index for index, token in enumerate(tokens) if token in ends), None)
        tokens = tokens if ended is None else tokens[:ended]
        text = self.processor.tokenizer.decode(tokens, skip_special_tokens=True)
        return Reply(text, "length" if ended is None else "stop", prompt_tokens, len(tokens))
