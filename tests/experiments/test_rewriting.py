"""Painting jobs behind a rewriter: asked once, on record with every picture, refused prompts left out and named."""

import json
from dataclasses import replace

import pytest
import torch

from experiments.generate import GenerateConfig, generate
from experiments.picture_requests import Prompts
from experiments.rewriting import RewrittenPrompts, open_rewriter
from experiments.runs import read_jsonl
from lensmini.endpoint import Failure, Reply
from lensmini.pipeline.rewriting import rewrite_prompts
from lensmini.prompting import Rewriter, SystemPrompt
from tests.chat_server import ChatServer
from tests.experiments.test_generate import run  # noqa: F401
from tests.pipeline.test_call import tiny_pipeline

BRIEF = SystemPrompt("brief", "Rewrite.", 2, 50)
DENSE = "one object on a white background . a large {} at the top left ."


class Scripted:
    """Turns "a red circle" into a caption, refuses swords, fails on storms; counts what it is asked."""

    model = "scripted"

    def __init__(self):
        self.asked = []

    def ask_all(self, requests):
        texts = [json.loads(request.messages[1]["content"])["request"] for request in requests]
        self.asked += texts
        return [self.answer(text) for text in texts]

    def answer(self, text):
        if "sword" in text:
            return Reply("REFUSED: no swords.", "stop", 1, 1)
        return Failure("timeout") if "storm" in text else Reply(DENSE.format(text[2:]), "stop", 1, 1)

    def forget(self, request): ...


def prompts_of(model, texts, path):
    return RewrittenPrompts(Prompts(texts, None), Rewriter(model, BRIEF, required=()), path)


def test_every_pass_gives_the_same_and_asks_for_nothing_twice(tmp_path, capsys):
    model, texts = Scripted(), ["a red circle", "a sword", "a storm", "a red circle"]
    prompts = prompts_of(model, texts, tmp_path / "rewrites.jsonl")
    first = list(prompts)
    assert [item["prompt"] for item in first] == [DENSE.format("red circle"), "a storm", DENSE.format("red circle")]
    assert [item["rewrite"]["status"] for item in first] == ["rewritten", "fallback", "rewritten"]
    assert first[1]["rewrite"]["cause"] == "timeout" and first[0]["request"] == "a red circle"
    assert list(prompts) == first and model.asked == ["a red circle", "a sword", "a storm"]
    assert capsys.readouterr().err.count("refused, not painted (model") == 1
    again = prompts_of(model, texts, tmp_path / "rewrites.jsonl")
    assert list(again) == first and len(model.asked) == 3
    statuses = {row["request"]: row["status"] for row in read_jsonl(tmp_path / "rewrites.jsonl")}
    assert statuses == {"a red circle": "rewritten", "a sword": "refused", "a storm": "fallback"}


def test_another_system_prompt_has_rewrites_of_its_own(tmp_path):
    path, model = tmp_path / "rewrites.jsonl", Scripted()
    list(prompts_of(model, ["a red circle"], path))
    other = Rewriter(model, SystemPrompt("brief", "Rewrite it.", 2, 50), required=())
    list(RewrittenPrompts(Prompts(["a red circle"], None), other, path))
    assert len(model.asked) == 2 and len(read_jsonl(path)) == 2


def test_pictures_carry_their_request_and_status_and_a_second_run_paints_nothing(run, tmp_path):  # noqa: F811
    with ChatServer(lambda body: DENSE.format(json.loads(body["messages"][1]["content"])["request"][2:])) as server:
        config = GenerateConfig(
            texts=("a red circle", "a blue square"),
            checkpoint=run,
            out=tmp_path / "pictures",
            num_steps=1,
            guidance_scale=1.0,
            rewriter="m",
            rewriter_url=server.url,
        )
        rows = generate(config)
        assert len(server.requests) == 2
        assert generate(config) == rows and len(server.requests) == 2
    assert [row["prompt"] for row in rows] == [DENSE.format("red circle"), DENSE.format("blue square")]
    assert [(row["request"], row["rewrite"]["status"]) for row in rows] == [
        ("a red circle", "rewritten"),
        ("a blue square", "rewritten"),
    ]
    assert read_jsonl(tmp_path / "pictures" / "pictures.jsonl")[0]["rewrite"]["rewriter"].startswith("m/general-")


def test_parts_of_a_job_cannot_rewrite(tmp_path):
    with pytest.raises(ValueError, match="rewriter"):
        replace(GenerateConfig(rewriter="m"), shard="0/2")


def test_an_unknown_system_prompt_is_refused(tmp_path):
    options = {"url": None, "key_env": "K", "device": "cpu", "cache": tmp_path / "replies.sqlite"}
    with pytest.raises(ValueError, match="general, compositional"):
        open_rewriter("m", system_prompt="nothing", **options)
    (tmp_path / "mine.txt").write_text("Be brief.")
    assert open_rewriter("m", system_prompt=str(tmp_path / "mine.txt"), **options).system_prompt.text == "Be brief."


class TestPipeline:
    def test_requests_are_asked_together_and_recorded(self):
        model = Scripted()
        prompts, records = rewrite_prompts(["a red circle", "a storm"], Rewriter(model, BRIEF, required=()))
        assert prompts == [DENSE.format("red circle"), "a storm"]
        assert [(record["status"], record["cause"]) for record in records] == [
            ("rewritten", None),
            ("fallback", "timeout"),
        ]
        json.dumps(records)

    def test_a_refused_request_stops_and_is_named(self):
        with pytest.raises(ValueError, match=r"prompt\[1\].*model: REFUSED: no swords"):
            rewrite_prompts(["a red circle", "a sword"], Rewriter(Scripted(), BRIEF, required=()))

    def test_without_a_rewriter_nothing_changes(self):
        assert rewrite_prompts(["a fox", ""], None) == (["a fox", ""], [None, None])

    def test_the_pipeline_paints_the_rewrite_and_says_so(self):
        pipe = tiny_pipeline()
        rewriter = Rewriter(Scripted(), BRIEF, required=())
        options = {"height": 64, "width": 64, "seeds": [3], "num_inference_steps": 1, "output_type": "latent"}
        out = pipe("a red circle", rewriter=rewriter, **options)
        plain = pipe(DENSE.format("red circle"), **options)
        assert out.metadata[0]["prompt"] == DENSE.format("red circle") == plain.metadata[0]["prompt"]
        assert out.metadata[0]["rewrite"]["request"] == "a red circle" and "rewrite" not in plain.metadata[0]
        torch.testing.assert_close(out.images, plain.images, rtol=0, atol=0)
        with pytest.raises(ValueError, match="refused"):
            pipe("a sword", rewriter=rewriter, **options)
        with pytest.raises(ValueError, match="rewriter: expected prompts"):
            pipe(prompt_embeds=[torch.zeros(3, 2, 32)], rewriter=rewriter, **options)
