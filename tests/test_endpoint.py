"""Laws of the chat client: every request one outcome, bounds that hold, nothing paid twice, no key anywhere."""

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lensmini.endpoint import ChatRequest, Endpoint, Failure, Reply, ReplyCache, image_message, parse_json
from tests.chat_server import ChatServer, Fault, text_of

pytest.importorskip("openai")
pytest.importorskip("tenacity")


def ask(text="hello", **options):
    return ChatRequest([{"role": "user", "content": text}], **options)


def connect(server, **options):
    return Endpoint("model", base_url=server.url, **{"backoff_s": 0.01, "timeout_s": 5.0, **options})


def echo(body):
    return text_of(body).upper()


def test_every_request_has_one_outcome_and_it_is_its_own():
    with ChatServer(echo) as server:
        endpoint = connect(server, concurrency=8)
        found = list(endpoint.ask(ask(f"word {n}") for n in range(100)))
        assert sorted(index for index, _ in found) == list(range(100))
        assert all(reply.text == f"WORD {index}" for index, reply in found)
        assert [reply.text for reply in endpoint.ask_all([ask("a"), ask("b")])] == ["A", "B"]
    assert endpoint.spent.replies == endpoint.spent.calls == 102
    assert endpoint.spent.tokens == server.tokens


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_are_in_flight_than_allowed_and_as_many_as_that(concurrency):
    with ChatServer(echo, lambda body, number: Fault(delay_s=0.05)) as server:
        list(connect(server, concurrency=concurrency).ask(ask(str(n)) for n in range(12)))
    assert server.most == concurrency


def test_requests_are_read_ahead_by_a_bounded_number():
    read = itertools.count()
    with ChatServer(echo) as server:
        outcomes = connect(server, concurrency=2).ask(ask(str(next(read))) for _ in itertools.count())
        taken = [next(outcomes) for _ in range(10)]
        outcomes.close()
    assert len({index for index, _ in taken}) == 10
    assert next(read) <= 10 + 4


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (Fault(status=429), "rate limit"),
        (Fault(status=500), "server error"),
        (Fault(status=408), "timeout"),
        (Fault(delay_s=1.0), "timeout"),
        (Fault(hang_up=True), "connection"),
        (Fault(body=b"not json"), "invalid reply"),
        (Fault(body=b'{"choices": []}'), "invalid reply"),
        (Fault(body=b"[]"), "invalid reply"),
        (Fault(body=b'{"choices": [{"message": {"content": 3}}]}'), "invalid reply"),
    ],
)
def test_passing_faults_are_repeated_and_lasting_ones_named(fault, cause):
    with ChatServer(echo, lambda body, number: fault if number < 2 else None) as server:
        [reply] = connect(server, timeout_s=0.3, max_attempts=3).ask_all([ask()])
        assert isinstance(reply, Reply) and reply.text == "HELLO" and len(server.requests) == 3
    with ChatServer(echo, lambda body, number: fault) as server:
        endpoint = connect(server, timeout_s=0.3, max_attempts=2)
        [failure] = endpoint.ask_all([ask()])
        assert isinstance(failure, Failure) and failure.cause == cause and len(server.requests) == 2
    assert endpoint.spent.failures == {cause: 1} and endpoint.spent.tokens == 0


def test_what_the_server_will_never_answer_is_asked_once():
    with ChatServer(echo, lambda body, number: Fault(status=400)) as server:
        [failure] = connect(server).ask_all([ask()])
    assert failure.cause == "bad request" and "400" in failure.detail and len(server.requests) == 1


@pytest.mark.parametrize("headers", [{"Retry-After": "0.4"}, {"retry-after-ms": "400"}])
def test_a_server_is_given_the_time_that_it_asks_for(headers):
    with ChatServer(echo, lambda body, number: Fault(status=429, headers=headers) if number == 0 else None) as server:
        connect(server, backoff_s=0.0).ask_all([ask()])
    assert server.times[1] - server.times[0] >= 0.4


def test_a_deadline_ends_everything_in_time():
    began = time.monotonic()
    with ChatServer(echo, lambda body, number: Fault(delay_s=0.2)) as server:
        outcomes = connect(server, concurrency=1, deadline_s=0.5).ask_all([ask(str(n)) for n in range(20)])
    assert time.monotonic() - began < 3
    causes = [outcome.cause for outcome in outcomes if isinstance(outcome, Failure)]
    assert causes == ["deadline"] * len(causes) and 0 < len(causes) < 20


SIZES = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 40)), min_size=1, max_size=30)


@settings(max_examples=15, deadline=None)
@given(SIZES, st.integers(40, 800), st.sampled_from([1, 4]))
def test_a_budget_is_never_exceeded_and_not_left_while_a_request_fits(sizes, budget, concurrency):
    def answer(body):
        # As much as was set aside: 32 tokens for the message and one for each byte, and the longest answer.
        return {
            "text": "w",
            "usage": {"prompt_tokens": 32 + len(text_of(body)), "completion_tokens": body["max_tokens"]},
        }

    with ChatServer(answer, lambda body, number: Fault(delay_s=0.002)) as server:
        endpoint = connect(server, concurrency=concurrency, max_tokens_total=budget)
        requests = [ask("a" * length, seed=n, max_tokens=most) for n, (length, most) in enumerate(sizes)]
        outcomes = endpoint.ask_all(requests)
        assert endpoint.spent.tokens == server.tokens <= budget
    left = budget
    for request, outcome in zip(requests, outcomes, strict=True) if concurrency == 1 else ():
        fits = request.prompt_bound(0) + request.max_tokens <= left
        assert isinstance(outcome, Reply) == fits
        left -= outcome.prompt_tokens + outcome.completion_tokens if isinstance(outcome, Reply) else 0


def test_money_is_counted_by_the_prices_and_bounded():
    with ChatServer(lambda body: {"text": "x", "usage": {"prompt_tokens": 1000, "completion_tokens": 500}}) as server:
        endpoint = connect(server, concurrency=1, prices=(2.0, 10.0), max_cost=0.02)
        outcomes = endpoint.ask_all([ask("a" * 968, seed=n, max_tokens=500) for n in range(5)])
    assert [isinstance(outcome, Reply) for outcome in outcomes] == [True, True, False, False, False]
    assert endpoint.spent.cost == pytest.approx(2 * (1000 * 2 + 500 * 10) / 1e6)


def test_a_budget_without_a_bound_on_the_answer_is_refused():
    endpoint = Endpoint("m", base_url="http://127.0.0.1:9/v1", max_tokens_total=10)
    with pytest.raises(ValueError, match=r"requests\[0\]: expected max_tokens"):
        endpoint.ask_all([ask()])


def test_a_server_that_names_no_usage_is_estimated_and_counted():
    with ChatServer(lambda body: {"text": "x" * 40, "usage": None}) as server:
        endpoint = connect(server)
        endpoint.ask_all([ask("a" * 400)])
    assert endpoint.spent.estimated == 1 and endpoint.spent.completion_tokens == 11


def test_nothing_is_asked_twice(tmp_path):
    with ChatServer(echo, lambda body, number: Fault(delay_s=0.05)) as server:
        first = connect(server, cache=tmp_path / "replies.sqlite")
        both = first.ask_all([ask("a"), ask("a"), ask("b"), ask("a", seed=1)])
        assert [reply.text for reply in both] == ["A", "A", "B", "A"] and len(server.requests) == 3
        assert first.spent.cached == 1 and first.spent.replies == 3
        again = connect(server, cache=tmp_path / "replies.sqlite")
        assert [reply.text for reply in again.ask_all([ask("a"), ask("b")])] == ["A", "B"]
        assert len(server.requests) == 3 and again.spent.tokens == 0 and again.spent.cached == 2
        other = Endpoint("another", base_url=server.url, cache=tmp_path / "replies.sqlite")
        other.ask_all([ask("a")])
        assert len(server.requests) == 4


def test_failures_are_not_kept(tmp_path):
    with ChatServer(echo, lambda body, number: Fault(status=400) if number == 0 else None) as server:
        endpoint = connect(server, cache=tmp_path / "replies.sqlite")
        outcomes = [endpoint.ask_all([ask()])[0] for _ in range(2)]
    assert isinstance(outcomes[0], Failure) and outcomes[1].text == "HELLO"


WORKER = """
import sys
from lensmini.endpoint import ChatRequest, Endpoint
endpoint = Endpoint("model", base_url=sys.argv[1], concurrency=4, cache=sys.argv[2])
requests = [ChatRequest([{"role": "user", "content": str(n)}]) for n in range(int(sys.argv[3]))]
print(sorted((index, reply.text) for index, reply in endpoint.ask(requests)))
"""


@pytest.mark.slow
def test_a_killed_client_goes_on_and_pays_for_no_answer_twice(tmp_path):
    total = 60
    with ChatServer(echo, lambda body, number: Fault(delay_s=0.05)) as server:
        command = [sys.executable, "-c", WORKER, server.url, str(tmp_path / "replies.sqlite"), str(total)]
        for kill_at in (5, 20, 41):
            process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL)
            while len(server.requests) < kill_at and process.poll() is None:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            process.wait()
            time.sleep(0.2)
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(sorted((n, str(n)) for n in range(total)))
    # What was on its way at a kill is sent again under the same key; nothing else is.
    again = {key: count for key, count in server.billed.items() if count > 1}
    assert len(server.billed) == total and len(again) <= 3 * 4


def test_processes_share_a_cache(tmp_path):
    caches = [ReplyCache(tmp_path / "replies.sqlite") for _ in range(4)]

    def fill(number):
        for n in range(50):
            caches[number].put(f"{n}", Reply(f"{n}", "stop", 1, 1))
            assert caches[number].get(f"{n}").text == f"{n}"

    threads = [threading.Thread(target=fill, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(caches[0]) == 50


DAMAGED = [b"no database at all, but long enough to be looked at" * 100, b"SQLite format 3\0" + b"x" * 4096]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_cache_is_said_and_left_alone(content, tmp_path):
    path = tmp_path / "replies.sqlite"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="expected a cache of replies"):
        ReplyCache(path).get("k")
    assert path.read_bytes() == content


def test_the_key_is_sent_and_kept_nowhere(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    with ChatServer(echo, key="sk-very-secret") as server, caplog.at_level("DEBUG"):
        endpoint = connect(server, api_key_env="MY_KEY", cache=tmp_path / "replies.sqlite")
        assert endpoint.ask_all([ask()])[0].text == "HELLO"
        monkeypatch.setenv("MY_KEY", "sk-also-secret")
        with pytest.raises(PermissionError, match="MY_KEY") as refused:
            endpoint.ask_all([ask("new")])
        endpoint.close()
        shown = repr(endpoint) + repr(vars(endpoint)) + caplog.text + str(refused.value)
    assert "secret" not in shown
    assert all(b"secret" not in file.read_bytes() for file in tmp_path.iterdir())


def test_a_hosted_server_without_a_key_is_not_asked(monkeypatch):
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(PermissionError, match="environment variable NO_KEY"):
        Endpoint("m", api_key_env="NO_KEY").ask_all([ask()])


def test_closing_cancels_what_is_in_flight_and_leaves_no_thread():
    before = threading.active_count()
    with ChatServer(echo, lambda body, number: Fault(delay_s=0.0 if number == 0 else 2.0)) as server:
        outcomes = connect(server, concurrency=4).ask(ask(str(n)) for n in range(8))
        next(outcomes)
        began = time.monotonic()
        outcomes.close()
        assert time.monotonic() - began < 1
        assert not any(thread.name == "lensmini.endpoint" for thread in threading.enumerate())
    assert threading.active_count() <= before + 8


def test_who_has_enough_waits_for_nothing_more_and_nothing_is_lost_or_named_twice():
    """Endless questions, of which every fifth hangs: after six answers all that was read has an outcome."""
    read, answered = [], []

    def endless():
        while True:
            read.append(len(read))
            yield ask(str(read[-1]))

    def faults(body, number):
        return Fault(delay_s=5.0) if int(text_of(body)) % 5 == 4 else None

    with ChatServer(echo, faults) as server:
        endpoint = connect(server, concurrency=8, timeout_s=20.0)
        started = time.monotonic()
        for index, outcome in endpoint.ask(endless(), enough=lambda: len(answered) >= 6):
            answered.append((index, outcome))
        assert time.monotonic() - started < 4.0
    assert sorted(index for index, _ in answered) == read
    kinds = {type(outcome).__name__ for _, outcome in answered}
    assert kinds == {"Reply", "Failure"} and len(answered) <= 6 + 16
    failed = [outcome for _, outcome in answered if isinstance(outcome, Failure)]
    assert {failure.cause for failure in failed} == {"deadline"}
    assert endpoint.spent.failures == {"deadline": len(failed)}
    assert all(outcome.text == str(index) for index, outcome in answered if isinstance(outcome, Reply))


def test_a_call_may_have_a_deadline_of_its_own():
    with ChatServer(echo, lambda body, number: Fault(delay_s=1.0)) as server:
        endpoint = connect(server, deadline_s=5.0, timeout_s=9.0)
        assert [o.cause for _, o in endpoint.ask([ask("a")], deadline_s=0.2)] == ["deadline"]
        assert [o.text for _, o in endpoint.ask([ask("a")], deadline_s=50.0)] == ["A"]
        assert endpoint.deadline_s == 5.0
    with pytest.raises(ValueError, match="deadline_s: expected a positive number"):
        list(endpoint.ask([ask("a")], deadline_s=0.0))


def test_an_error_in_the_questions_reaches_the_caller():
    def questions():
        yield ask("a")
        raise RuntimeError("the folder went away")

    with ChatServer(echo) as server, pytest.raises(RuntimeError, match="went away"):
        list(connect(server).ask(questions()))
    assert not any(thread.name == "lensmini.endpoint" for thread in threading.enumerate())


def test_it_works_inside_a_running_loop():
    async def main():
        return connect(server).ask_all([ask("a")])

    with ChatServer(echo) as server:
        assert asyncio.run(main())[0].text == "A"


def test_the_protocols_fields_come_and_go():
    with ChatServer(lambda body: {"text": "", "finish_reason": "content_filter", "refusal": "No."}) as server:
        request = ask(
            temperature=0.5, max_tokens=7, seed=3, response_format={"type": "json_object"}, extra={"top_k": 4}
        )
        [reply] = connect(server).ask_all([request])
    sent = server.requests[0]
    assert (sent["temperature"], sent["max_tokens"], sent["seed"], sent["top_k"]) == (0.5, 7, 3, 4)
    assert sent["response_format"] == {"type": "json_object"} and sent["model"] == "model"
    assert (reply.finish_reason, reply.refusal, reply.text) == ("content_filter", "No.", "")


def test_a_picture_travels_whole():
    import base64
    import io

    from PIL import Image

    pixels = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with ChatServer(echo) as server:
        connect(server).ask_all([ChatRequest([image_message("what?", [pixels])])])
    url = server.requests[0]["messages"][0]["content"][0]["image_url"]["url"]
    image = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    assert list(image.tobytes()) == pixels.permute(1, 2, 0).flatten().tolist()


@pytest.mark.parametrize(
    "image", [b"", b"%PDF-1.7", b"RIFFxxxxWAVE", torch.zeros(3, 4, 4), torch.zeros(4, 4).byte(), "path"]
)
def test_what_is_no_picture_is_refused(image):
    with pytest.raises(ValueError, match=r"images\[0\]"):
        image_message("what?", [image])


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-1000, 1000) | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
        max_leaves=8,
    ).filter(lambda value: isinstance(value, dict | list) and value),
    st.sampled_from(["{}", "Sure, here it is:\n```json\n{}\n```\nEnjoy!", "```\n{}```", "  {}  "]),
)
def test_json_is_found_wherever_models_put_it(value, frame):
    assert parse_json(frame.replace("{}", json.dumps(value), 1)) == value


@pytest.mark.parametrize("text", ['{"a": [1, 2,],}', "{'a': [1, 2]}", '{"a": [1, 2]', 'Here: {"a": [1, 2],} ok?'])
def test_small_mistakes_are_mended(text):
    pytest.importorskip("json_repair")
    assert parse_json(text) == {"a": [1, 2]}


@pytest.mark.parametrize("text", ["", "no", "I cannot help with that.", "{}", "[]", "3", "null", "[" * 5000])
def test_what_holds_no_json_is_an_error(text):
    with pytest.raises(ValueError, match="answer: expected a JSON object or list"):
        parse_json(text)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": float("nan")}]}, "messages"),
        ({"temperature": 3.0}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra": {"stream": True}}, "extra"),
    ],
)
def test_a_question_that_the_protocol_does_not_know_is_refused(fields, name):
    with pytest.raises(ValueError, match=name):
        ChatRequest(**{"messages": [{"role": "user", "content": "a"}], **fields})


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"concurrency": 0}, "concurrency"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"max_attempts": 0}, "max_attempts"),
        ({"deadline_s": -1}, "deadline_s"),
        ({"max_cost": 1.0}, "max_cost"),
        ({"max_tokens_total": 0}, "max_tokens_total"),
        ({"prices": (1.0, -1.0)}, "prices"),
    ],
)
def test_bounds_that_bound_nothing_are_refused(options, name):
    with pytest.raises(ValueError, match=name):
        Endpoint("m", **options)


def test_environment_of_the_test_is_clean():
    assert "sk-very-secret" not in os.environ.values()
