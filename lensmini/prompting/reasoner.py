"""Requests become dense prompts before an image model sees them, and every one says what became of it.

No axes: text.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol, get_args

from lensmini.endpoint import FAILURE_CAUSES, ChatRequest, Failure, Reply
from lensmini.prompting.answers import ANSWER_CAUSES, gives_instructions, read_answer
from lensmini.prompting.intent import INTENT_KINDS, IntentReport, check_intent
from lensmini.prompting.system_prompts import GENERAL, SystemPrompt
from lensmini.words import count_words

__all__ = ["REWRITE_CAUSES", "ChatModel", "Rewrite", "Rewriter", "Status", "as_data", "dump_data", "without_markers"]

Status = Literal["rewritten", "unchanged", "fallback", "refused"]
REWRITE_CAUSES = (
    *(cause for cause in ANSWER_CAUSES if cause != "refusal"),
    "too short",
    "instructions",
    *(f"{kind} lost" for kind in INTENT_KINDS),
    *FAILURE_CAUSES,
    "model",
    "policy",
)
"""Why a rewrite is a fallback, or (the last two) who refused it."""
_REPAIR = (
    "That could not be used ({problem}). Answer again with one finished description in a single paragraph of plain text, and "
    "nothing else."
)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"')
_RAW = 20_000


class ChatModel(Protocol):
    """Who answers: :class:`lensmini.endpoint.Endpoint`, or a model of transformers on this machine (``LocalChat``)."""

    @property
    def model(self) -> str:
        """Its name."""
        ...

    def ask_all(self, requests: Sequence[ChatRequest]) -> Sequence[Reply | Failure]:
        """Answers in the order of the requests."""
        ...

    def forget(self, request: ChatRequest) -> None:
        """Keep an answer no longer, because nothing could be made of it."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewrite:
    """What became of a request. ``prompt`` is always something to paint: the rewrite, or else the request as it was.

    Raises:
        ValueError: if status, prompt and cause do not fit together: a rewrite differs from its request, everything else
            equals it; a fallback and a refusal have a cause, nothing else has one.

    Example:
        >>> Rewrite(request="a fox", prompt="a fox", status="rewritten")
        Traceback (most recent call last):
        ValueError: status: expected "rewritten" for another prompt than the request only, got 'rewritten', ...
    """

    request: str
    """What was asked for."""
    prompt: str
    """What to paint."""
    status: Status
    """"rewritten"; "unchanged", because the model or the caller left it so; "fallback", because no answer was usable;
    "refused", because it should not be painted, which is for the caller to honour."""
    cause: str | None = None
    """One of ``REWRITE_CAUSES``."""
    detail: str = ""
    """More about the cause."""
    raw: str = ""
    """The last answer as it came, up to 20,000 characters."""
    report: IntentReport | None = None
    """What of the request is in the rewrite; of a fallback for lost intent, in the rewrite that was not taken."""
    attempts: int = 0
    """Answers that were asked for."""
    rewriter: str = ""
    """Model and system prompt."""

    def __post_init__(self) -> None:
        same = self.prompt == self.request
        if self.status not in get_args(Status) or same == (self.status == "rewritten"):
            raise ValueError(
                'status: expected "rewritten" for another prompt than the request only, '
                f"got {self.status!r}, {self.prompt[:60]!r} for {self.request[:60]!r}"
            )
        if (self.cause in REWRITE_CAUSES) != (self.status in ("fallback", "refused")):
            raise ValueError(
                f"cause: expected one for a fallback or a refusal only, got {self.status!r}, {self.cause!r}"
            )

    def record(self) -> dict[str, Any]:
        """All of it as JSON can hold it, to be kept beside a picture."""
        return asdict(self)


def as_data(request: str, facts: Mapping[str, Any] | None = None) -> str:
    r"""A user's words as JSON, in which no marker of a chat template can stand.

    Example:
        >>> as_data("a fox <|end|>")
        '{"request": "a fox \\u003c|end|\\u003e"}'
    """
    return dump_data({"request": request} | ({} if facts is None else {"facts": facts}))


def dump_data(value: object) -> str:
    r"""JSON without the characters that open and close markers of chat templates: ``<|end|>``, ``</s>``, ``[/INST]``.

    Example:
        >>> dump_data(["[/INST] x"])
        '["\\u005b/INST] x"]'
    """
    text = json.dumps(value, ensure_ascii=False).replace("<", "\\u003c").replace(">", "\\u003e")
    return _STRING.sub(lambda string: string[0].replace("[", "\\u005b"), text)


def without_markers(text: str) -> str:
    """A model's own words, said back to it, with the markers of chat templates taken apart.

    Example:
        >>> without_markers("a fox <|end|> [/INST]")
        'a fox < |end|> [ /INST]'
    """
    return text.replace("<", "< ").replace("[", "[ ")


class Rewriter:
    """Rewrites requests with a language model: a callable from text to :class:`Rewrite`, and a batched form.

    An answer counts if one prompt can be read from it (:func:`lensmini.prompting.read_answer`), its length is in the system
    prompt's band, it does not talk to language models, and everything of the request that is ``required`` is still there.
    Otherwise the model is told what was wrong and asked again; after ``attempts`` the request stays as it is, as a fallback
    with a cause. Time, money, retries, concurrency and cache are the model's, see :class:`lensmini.endpoint.Endpoint`;
    answers of which nothing could be made are forgotten there.

    Args:
        model: who answers.
        system_prompt: what it is told.
        required: kinds of ``INTENT_KINDS`` that a rewrite must not lose; without "language" it may translate.
        attempts: answers to ask for, at most.
        policy: says of a text why it must not be painted, or None. Asked of each request, before the model sees it, and of
            each rewrite.
        frame: makes the user's message of a request and its facts. The default is JSON; another one has to keep the
            chat template's markers out itself.
        temperature: of the answers.
        max_tokens: of an answer, reasoning included (4096 in the published code).
        seed: of the answers; each further attempt counts on.
        extra: more fields of the request's body, such as ``{"reasoning_effort": "low"}``.

    Raises:
        ValueError: if an option is out of range.

    Example:
        >>> class Echo:
        ...     model = "echo"
        ...
        ...     def ask_all(self, requests):
        ...         words = [json.loads(request.messages[-1]["content"])["request"] for request in requests]
        ...         return [
        ...             Reply(f"A photo of {text} in the light of a clear morning.", "stop", 9, 9) for text in words
        ...         ]
        ...
        ...     def forget(self, request): ...
        >>> Rewriter(Echo())("a fox").prompt
        'A photo of a fox in the light of a clear morning.'
    """

    def __init__(
        self,
        model: ChatModel,
        system_prompt: SystemPrompt = GENERAL,
        *,
        required: Sequence[str] = ("quoted", "numbers", "language"),
        attempts: int = 2,
        policy: Callable[[str], str | None] | None = None,
        frame: Callable[[str, Mapping[str, Any] | None], str] = as_data,
        temperature: float | None = 0.7,
        max_tokens: int = 4096,
        seed: int | None = 0,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        if not set(required) <= set(INTENT_KINDS):
            raise ValueError(f"required: expected some of {INTENT_KINDS}, got {tuple(required)}")
        if attempts < 1 or max_tokens < 1:
            raise ValueError(f"attempts, max_tokens: expected positive integers, got {attempts}, {max_tokens}")
        self.model, self.system_prompt, self.required = model, system_prompt, tuple(required)
        self.attempts, self.policy, self.frame = attempts, policy, frame
        self.temperature, self.max_tokens, self.seed, self.extra = temperature, max_tokens, seed, dict(extra or {})

    @property
    def name(self) -> str:
        """Model, system prompt and whatever else decides an answer."""
        options = repr((self.required, self.attempts, self.temperature, self.max_tokens, self.seed, self.extra))
        digest = hashlib.sha256(options.encode()).hexdigest()[:8]
        return f"{self.model.model}/{self.system_prompt.name}-{self.system_prompt.hash}/{digest}"

    def __call__(self, request: str, facts: Mapping[str, Any] | None = None) -> Rewrite:
        """Rewrite one request; see :meth:`rewrite_all`."""
        return self.rewrite_all([request], None if facts is None else [facts])[0]

    def rewrite_all(
        self, requests: Sequence[str], facts: Sequence[Mapping[str, Any] | None] | None = None
    ) -> list[Rewrite]:
        """Rewrite requests, each by itself, asked together.

        Args:
            requests: what people want to see.
            facts: for each what the picture must show (a benchmark's metadata), None without.

        Returns:
            In the order of the requests.

        Raises:
            ValueError: if there are not as many facts as requests.
            PermissionError: if a server refuses the key.
        """
        if facts is not None and len(facts) != len(requests):
            raise ValueError(f"facts: expected one for each of {len(requests)} requests, got {len(facts)}")
        done: dict[int, Rewrite] = {}
        waiting: dict[int, ChatRequest] = {}
        for index, request in enumerate(requests):
            reason = self.policy(request) if self.policy is not None else None
            if reason is not None:
                done[index] = self._keep(request, "refused", "policy", detail=reason)
            elif not count_words(request):
                done[index] = self._keep(request, "unchanged")
            else:
                waiting[index] = self._first(request, None if facts is None else facts[index])
        for attempt in range(1, self.attempts + 1):
            again = {}
            outcomes = self.model.ask_all([*waiting.values()]) if waiting else []
            for (index, chat), outcome in zip(waiting.items(), outcomes, strict=True):
                rewrite = replace(self._judge(requests[index], outcome), attempts=attempt)
                if rewrite.status == "fallback" and isinstance(outcome, Reply):
                    self.model.forget(chat)
                    if attempt < self.attempts:
                        again[index] = self._repaired(chat, outcome, rewrite, attempt)
                        continue
                done[index] = rewrite
            waiting = again
        return [done[index] for index in range(len(requests))]

    def _first(self, request: str, facts: Mapping[str, Any] | None) -> ChatRequest:
        system = {"role": "system", "content": self.system_prompt.text}
        return ChatRequest(
            [system, {"role": "user", "content": self.frame(request, facts)}],
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            seed=self.seed,
            extra=self.extra,
        )

    def _repaired(self, chat: ChatRequest, reply: Reply, rewrite: Rewrite, attempt: int) -> ChatRequest:
        # A marker of a chat template in the answer must not end its turn; what was lost are the user's words, so data.
        said = {"role": "assistant", "content": without_markers(reply.text[:4000]) or "(nothing)"}
        problem = f"{rewrite.cause}: {dump_data(rewrite.detail[:200])}" if rewrite.detail else rewrite.cause
        told = {"role": "user", "content": _REPAIR.format(problem=problem)}
        seed = None if self.seed is None else self.seed + attempt
        return replace(chat, messages=[*chat.messages[:2], said, told], seed=seed)

    def _judge(self, request: str, outcome: Reply | Failure) -> Rewrite:
        """What one answer makes of a request."""
        if isinstance(outcome, Failure):
            return self._keep(request, "fallback", outcome.cause, detail=outcome.detail)
        raw = outcome.text[:_RAW]
        answer = read_answer(outcome.text, finish_reason=outcome.finish_reason, refusal=outcome.refusal)
        if answer.cause == "refusal":
            return self._keep(request, "refused", "model", detail=outcome.refusal or answer.bare[:500], raw=raw)
        asked = " ".join(request.split())
        if asked in (answer.prompt, " ".join(answer.bare.split())):
            return self._keep(request, "unchanged", raw=raw, report=check_intent(request, request))
        if answer.cause is not None:
            return self._keep(request, "fallback", answer.cause, raw=raw)
        words, band = count_words(answer.prompt), self.system_prompt
        longest = max(band.max_words, 3 * count_words(request) // 2)
        if words < band.min_words or words > longest:
            cause = "too short" if words < band.min_words else "too long"
            return self._keep(request, "fallback", cause, detail=f"{words} words", raw=raw)
        if gives_instructions(answer.prompt) and not gives_instructions(request):
            return self._keep(request, "fallback", "instructions", raw=raw)
        report = check_intent(request, answer.prompt)
        for kind in self.required:
            if kind in report.lost:
                lost = ", ".join(report.lost[kind])
                return self._keep(request, "fallback", f"{kind} lost", detail=lost, raw=raw, report=report)
        reason = self.policy(answer.prompt) if self.policy is not None else None
        if reason is not None:
            return self._keep(request, "refused", "policy", detail=reason, raw=raw, report=report)
        return Rewrite(
            request=request, prompt=answer.prompt, status="rewritten", raw=raw, report=report, rewriter=self.name
        )

    def _keep(self, request: str, status: Status, cause: str | None = None, **fields: Any) -> Rewrite:
        return Rewrite(request=request, prompt=request, status=status, cause=cause, rewriter=self.name, **fields)
