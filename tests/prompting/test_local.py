"""Laws of a language model on this machine: greedy is transformers' greedy, samples are exact, batches do not matter."""

from copy import deepcopy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.miniature.tokenizer import build_tokenizer
from lensmini.endpoint import ChatRequest, Failure, Reply, ReplyCache
from lensmini.nn import TextEncoder
from lensmini.prompting import LocalChat, Rewriter, SystemPrompt
from lensmini.prompting.local import attach_head, gumbel_choice


@pytest.fixture(scope="module")
def parts():
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    with torch.no_grad():  # lively enough that every token before matters, padding too if it is attended to
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(15)
        model.model.embed_tokens.weight[tokenizer.pad_token_id] = model.model.embed_tokens.weight[7:9].mean(0)
    return model, tokenizer


def ask(text, **options):
    return ChatRequest([{"role": "user", "content": text}], **{"max_tokens": 12, **options})


TEXTS = ["a red circle", "two blue boxes at the top", "white", "a cross and a plus and a wedge at the upper left"]


def test_without_temperature_it_is_the_greedy_answer_of_transformers(parts):
    model, tokenizer = parts
    replies = LocalChat(model, tokenizer, name="m").ask_all([ask(text) for text in TEXTS])
    for text, reply in zip(TEXTS, replies, strict=True):
        messages = [{"role": "user", "content": text}]
        ids = torch.tensor([tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)])
        tokens = ids[0].tolist()
        for _ in range(12):  # step by step, without a cache or a mask
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == tokenizer.eos_token_id:
                break
        answer = tokens[ids.shape[1] :]
        ended = answer[-1] == tokenizer.eos_token_id
        assert reply.text == tokenizer.decode(answer[:-1] if ended else answer)
        assert (reply.finish_reason, reply.completion_tokens) == ("stop" if ended else "length", len(answer) - ended)
        assert reply.prompt_tokens == ids.shape[1]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_an_answer_depends_on_its_request_alone(parts, temperature):
    model, tokenizer = parts
    requests = [ask(text, temperature=temperature, seed=seed) for seed, text in enumerate(TEXTS * 2)]
    together = LocalChat(model, tokenizer, name="m", batch_size=8).ask_all(requests)
    alone = [LocalChat(model, tokenizer, name="m").ask_all([request])[0] for request in requests]
    turned = LocalChat(model, tokenizer, name="m", batch_size=3).ask_all(requests[::-1])[::-1]
    texts = [[reply.text for reply in replies] for replies in (together, alone, turned)]
    assert texts[0] == texts[1] == texts[2]
    if temperature:
        assert texts[0][0] != texts[0][4], "another seed is another answer"


def test_perturbed_logits_are_samples_of_the_softmax():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    for temperature in (0.5, 2.0):
        drawn = torch.stack([gumbel_choice(logits, temperature, generator).argmax() for _ in range(20_000)])
        shares = drawn.bincount(minlength=4) / len(drawn)
        torch.testing.assert_close(shares, (logits / temperature).softmax(0), rtol=0, atol=0.015)


def test_the_global_random_state_is_neither_used_nor_changed(parts):
    model, tokenizer = parts
    chat = LocalChat(model, tokenizer, name="m")
    before = torch.random.get_rng_state()
    first = chat.ask_all([ask("white", temperature=1.0, seed=3)])[0].text
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(5)
    assert chat.ask_all([ask("white", temperature=1.0, seed=3)])[0].text == first


def test_limits_are_each_requests_own(parts):
    model, tokenizer = parts
    short, long = LocalChat(model, tokenizer, name="m").ask_all(
        [ask("white", max_tokens=2), ask("white", max_tokens=9)]
    )
    assert short.completion_tokens <= 2 and long.text.startswith(short.text)


def test_equal_requests_are_answered_once_and_the_cache_keeps_and_forgets(parts, tmp_path):
    model, tokenizer = parts
    with ReplyCache(tmp_path / "replies.sqlite") as cache:
        chat = LocalChat(model, tokenizer, name="m", cache=cache)
        first, again = chat.ask_all([ask("white"), ask("white")])
        assert first.text == again.text and (first.cached, again.cached) == (False, True) and len(cache) == 1
        assert chat.ask_all([ask("white")])[0].cached
        chat.forget(ask("white"))
        assert len(cache) == 0 and not chat.ask_all([ask("white")])[0].cached


def test_the_cache_knows_answers_apart_by_whatever_decides_them(parts, tmp_path):
    model, tokenizer = parts
    with ReplyCache(tmp_path / "replies.sqlite") as cache:
        low = LocalChat(model, tokenizer, name="m", cache=cache, template={"reasoning_effort": "low"})
        high = LocalChat(model, tokenizer, name="m", cache=cache, template={"reasoning_effort": "high"})
        assert not low.ask_all([ask("white")])[0].cached and not high.ask_all([ask("white")])[0].cached
        assert low.ask_all([ask("white")])[0].cached
        short = LocalChat(model, tokenizer, name="m", cache=cache, max_new_tokens=2)
        long = LocalChat(model, tokenizer, name="m", cache=cache, max_new_tokens=9)
        open_end = ask("white", max_tokens=None)
        assert short.ask_all([open_end])[0].completion_tokens <= 2
        assert not long.ask_all([open_end])[0].cached


def test_an_answer_that_ran_out_of_time_is_not_kept(parts, tmp_path):
    model, tokenizer = parts
    with ReplyCache(tmp_path / "replies.sqlite") as cache:
        request = ask("white", temperature=2.0, seed=1)
        hasty = LocalChat(model, tokenizer, name="m", cache=cache, timeout_s=1e-9).ask_all([request])[0]
        assert hasty.finish_reason == "length" and hasty.completion_tokens < 12
        whole = LocalChat(model, tokenizer, name="m", cache=cache).ask_all([request])[0]
        assert whole.completion_tokens > hasty.completion_tokens and not whole.cached and len(cache) == 1


def test_what_does_not_fit_or_cannot_be_rendered_is_a_failure_of_that_request_alone(parts):
    model, tokenizer = parts
    broken = ChatRequest([{"role": "user", "content": "white"}], max_tokens=12)
    template = tokenizer.chat_template
    replies = LocalChat(model, tokenizer, name="m").ask_all([ask("white " * 70), ask("white")])
    assert isinstance(replies[0], Failure) and "64" in replies[0].detail and isinstance(replies[1], Reply)
    try:
        tokenizer.chat_template = "{{ raise_exception('no') }}"
        failure = LocalChat(model, tokenizer, name="m").ask_all([broken])[0]
    finally:
        tokenizer.chat_template = template
    assert isinstance(failure, Failure) and failure.cause == "bad request"


def test_a_rewriter_runs_on_it(parts):
    model, tokenizer = parts
    rewriter = Rewriter(
        LocalChat(model, tokenizer, name="m"),
        SystemPrompt("plain", "Rewrite.", 1, 50),
        required=(),
        frame=lambda request, facts: request,
        max_tokens=12,
        temperature=1.0,
    )
    rewrites = rewriter.rewrite_all(TEXTS)
    assert [rewrite.request for rewrite in rewrites] == TEXTS
    assert all(rewrite.status in ("rewritten", "fallback") for rewrite in rewrites)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"max_new_tokens": 0}, {"timeout_s": 0.0}])
def test_options_out_of_range_are_named(parts, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        LocalChat(*parts, name="m", **options)


def test_a_model_without_a_head_is_refused(parts):
    with pytest.raises(ValueError, match="language-model head"):
        LocalChat(parts[0].model, parts[1], name="m")


def test_a_decoder_with_a_head_chats_like_the_whole_model_and_copies_nothing(parts):
    model, tokenizer = parts
    shared = attach_head(model.model, model.lm_head.weight)
    assert {p.data_ptr() for p in shared.parameters()} == {p.data_ptr() for p in model.parameters()}
    requests = [ask(text) for text in TEXTS]
    replies = [LocalChat(one, tokenizer, name="m").ask_all(requests) for one in (model, shared)]
    assert [reply.text for reply in replies[0]] == [reply.text for reply in replies[1]]
    encoder = TextEncoder(model.model, tokenizer, layers=(0, 1))
    assert attach_head(encoder.model, model.lm_head.weight).model is model.model


def test_a_head_of_another_size_or_a_cut_decoder_is_refused(parts):
    model, _ = parts
    with pytest.raises(ValueError, match="head"):
        attach_head(model.model, torch.zeros(3, 32))
    cut = deepcopy(model.model)
    cut.layers = cut.layers[:1]
    with pytest.raises(ValueError, match="all 2 layers, got 1"):
        attach_head(cut, model.lm_head.weight)
