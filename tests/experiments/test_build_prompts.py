"""Laws of experiments.build_prompts: the command ends with prompts, goes on, and says what is wrong in one line."""

import json

import pytest

from experiments.build_prompts import cli
from lensmini.data.prompts import load_prompts, load_taxonomy
from tests.chat_server import ChatServer
from tests.data.test_prompts import answer

pytest.importorskip("openai")


def test_the_command_builds_prompts_and_goes_on_for_free(tmp_path, capsys):
    with ChatServer(answer) as server:
        command = ["--url", server.url, "--model", "m", "--out", str(tmp_path), "--limit", "40"]
        cli(command)
        asked = len(server.requests)
        cli(command)
        assert len(server.requests) == asked
    shown = capsys.readouterr().out
    records = load_prompts(tmp_path / "prompts.jsonl")
    assert len({record.category for record in records}) > 5 and f"build_prompts: {len(records)} of 40 items" in shown
    assert "UI and Graphic Design" in shown and "interaction" in shown


def test_items_are_added_first_and_kept(tmp_path, capsys):
    def say(body):
        text = body["messages"][0]["content"]
        if "Name 20 more" in text:
            stem = text.split('sub-category "')[1].split('"')[0]
            return json.dumps([f"new {stem} thing {number}" for number in range(2)])
        return answer(body)

    target = len(load_taxonomy().items) + 50
    with ChatServer(say) as server:
        cli(["--url", server.url, "--model", "m", "--out", str(tmp_path), "--limit", "5", "--target", str(target)])
    assert len(load_taxonomy(tmp_path / "taxonomy.txt").items) == target
    assert f"taxonomy: {target} items" in capsys.readouterr().out


def test_a_dry_run_asks_nobody_and_mistakes_are_one_line(tmp_path, capsys, monkeypatch):
    cli(["--dry-run"])
    assert "Answer with a JSON list" in capsys.readouterr().out
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(SystemExit, match="build_prompts: .*NO_KEY"):
        cli(["--key-env", "NO_KEY", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="build_prompts: "):
        cli(["--taxonomy", str(tmp_path / "none.txt")])
