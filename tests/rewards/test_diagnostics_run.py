"""Alarms over a run, the rule that stops it, and the page: what sets them off, what does not, and hostile text."""

import html.parser
import json
import re
import threading
from xml.etree import ElementTree

import pytest
import torch

from lensmini.rewards import alarms, describe_step, should_stop, write_page
from lensmini.rewards.diagnostics import read_series

HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(1)>&amp;'$\\frac{x}$]]>--><svg onload=alert(1)>"


def noise(num, seed):
    return (torch.randn(num, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.01).tolist()


def run(train, heldout, every=1, start=0):
    """Records of two judges, the second asked at every so many steps."""
    return [
        {
            "step": start + step,
            "reward": {"mean": a},
            "heldout": {"mean": b, "train_mean": a} if step % every == 0 else None,
        }
        for step, (a, b) in enumerate(zip(train, heldout, strict=True))
    ]


def ramp(num, slope, seed, start=0.4):
    return [start + slope * i + e for i, e in enumerate(noise(num, seed))]


def names(history, **bounds):
    return [alarm["name"] for alarm in alarms(history, **bounds)]


class TestHeldOut:
    def test_a_reward_that_only_its_own_judge_sees_is_severe(self):
        history = run(ramp(30, 0.004, 1), ramp(30, -0.004, 2))
        (alarm,) = [a for a in alarms(history) if a["name"] == "heldout_falls"]
        assert alarm["severe"] and alarm["bound"] == 0
        assert alarm["value"] == pytest.approx(-0.004, abs=0.001)
        assert set(alarm) == {"name", "since_step", "value", "bound", "message", "severe"}

    def test_progress_that_both_see_is_none(self):
        assert names(run(ramp(30, 0.004, 1), ramp(30, 0.003, 2))) == []

    def test_both_falling_is_no_exploitation(self):
        assert "heldout_falls" not in names(run(ramp(30, -0.004, 1), ramp(30, -0.004, 2)))

    def test_a_gap_that_widens_over_a_standing_judge_is_mild(self):
        (alarm,) = alarms(run(ramp(30, 0.004, 1), ramp(30, 0.0, 2)))
        assert alarm["name"] == "gap_widens" and not alarm["severe"]
        assert alarm["value"] == pytest.approx(0.004, abs=0.0017)  # three standard errors

    def test_exploitation_after_honest_progress_is_seen(self):
        turn = run(ramp(60, 0.004, 1), [*ramp(45, 0.004, 2), *ramp(15, -0.004, 3, start=0.58)], every=1)
        assert names(turn[:45]) == [] and "heldout_falls" in names(turn)

    def test_a_judge_that_is_asked_now_and_then_counts_by_step(self):
        history = run(ramp(100, 0.004, 1), ramp(100, -0.004, 2), every=10)
        (alarm,) = [a for a in alarms(history) if a["name"] == "heldout_falls"]
        assert alarm["value"] == pytest.approx(-0.004, abs=0.001)

    def test_steps_between_records_are_counted(self):
        history = run(ramp(100, 0.004, 1), ramp(100, -0.004, 2))[::10]
        (alarm,) = [a for a in alarms(history) if a["name"] == "heldout_falls"]
        assert alarm["value"] == pytest.approx(-0.004, abs=0.001)

    def test_fewer_than_six_records_say_nothing(self):
        history = run(ramp(5, 0.1, 1), ramp(5, -0.1, 2))
        assert names(history) == []
        with pytest.raises(ValueError, match="window"):
            alarms(history, window=5)

    def test_a_standing_run_hardly_ever_sets_it_off(self):
        wrong = 0
        for seed in range(200):
            history = run(ramp(20, 0.0, 2 * seed), ramp(20, 0.0, 2 * seed + 1))
            wrong += "heldout_falls" in names(history)
        assert wrong == 0

    def test_a_rise_of_one_judge_alone_seldom_sets_the_severe_one_off(self):
        wrong = 0
        for seed in range(150):
            history = run(ramp(20, 0.004, 2 * seed), ramp(20, 0.0, 2 * seed + 1))
            wrong += "heldout_falls" in names(history)
        assert wrong <= 4  # half of one per cent at either window


def constant(part, key, value, num=12):
    return [{"step": step, part: {key: value}} for step in range(num)]


def controls(kind, values):
    return [{"step": step, "controls": {kind: {"mean": value}}} for step, value in enumerate(values)]


class TestOtherAlarms:
    @pytest.mark.parametrize(
        ("good", "bad", "name", "severe"),
        [
            (constant("coverage", "fraction", 0.91), constant("coverage", "fraction", 0.89), "coverage", False),
            (constant("coverage", "fraction", 0.95), constant("coverage", "fraction", 0.45), "coverage", True),
            (
                constant("coverage", "shares", {"injection": 0.01}),
                constant("coverage", "shares", {"injection": 0.03}),
                "injection",
                False,
            ),
            (
                constant("velocity_norm", "ratio", 1.04),
                constant("velocity_norm", "ratio", 1.06),
                "velocity_norm",
                False,
            ),
            (constant("velocity_norm", "ratio", 0.9), constant("velocity_norm", "ratio", 1.16), "velocity_norm", True),
            (constant("groups", "constant_share", 0.5), constant("groups", "constant_share", 0.6), "saturation", False),
            (constant("reliability", "within", 0.6), constant("reliability", "within", 0.4), "judge_noise", False),
            (controls("blank", [0.4] * 12), controls("blank", [0.6] * 12), "control_high:blank", False),
            (
                controls("noise", [0.1] * 6 + [0.2] * 6),
                controls("noise", [0.1, 0.12] * 3 + [0.4, 0.42] * 3),
                "control_moves:noise",
                False,
            ),
            (
                [{"step": s, "diversity": {"mean": 2.0 - 0.05 * s}} for s in range(20)],
                [{"step": s, "diversity": {"mean": 2.0 - 0.08 * s}} for s in range(20)],
                "diversity",
                False,
            ),
            (
                [{"step": s, "coverage": {"fraction": 1 - 0.001 * s}} for s in range(20)],
                [{"step": s, "coverage": {"fraction": 1 - 0.003 * s}} for s in range(20)],
                "missing_grows",
                False,
            ),
        ],
    )
    def test_each_is_silent_below_its_bound_and_speaks_above(self, good, bad, name, severe):
        assert names(good) == []
        (alarm,) = alarms(bad)
        assert alarm["name"] == name and alarm["severe"] == severe and alarm["message"]

    def test_bounds_are_arguments(self):
        history = constant("coverage", "fraction", 0.85)
        assert names(history, min_coverage=0.8) == []
        assert names(constant("velocity_norm", "ratio", 1.1), max_norm_ratio=1.2) == []
        (alarm,) = alarms(constant("velocity_norm", "ratio", 1.1), severe_norm_ratio=1.08)
        assert alarm["severe"]

    def test_the_base_model_may_be_good_and_must_not_move(self):
        assert names(controls("base_model", [0.8, 0.82] * 6)) == []
        fallen = controls("base_model", [0.8, 0.82] * 3 + [0.5, 0.52] * 3)
        assert names(fallen) == ["control_moves:base_model"]
        assert names(controls("blank", [0.45, 0.43] * 3 + [0.1, 0.12] * 3)) == []  # a control that falls is fine

    def test_injection_is_a_mean_over_records_with_and_without(self):
        history = [{"step": s, "coverage": {"shares": {"injection": 0.05} if s == 4 else {}}} for s in range(5)]
        assert names(history) == []  # 0.05 once in five is one per cent

    def test_since_when_is_the_start_of_the_unbroken_run(self):
        values = [0.5, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.6, 0.6, 0.6]
        history = [{"step": 10 * i, "coverage": {"fraction": value}} for i, value in enumerate(values)]
        # Means of the last five: 0.92 at the ninth record, 0.84 at the tenth.
        (alarm,) = [a for a in alarms(history) if a["name"] == "coverage"]
        assert alarm["since_step"] == 90 and alarm["value"] == pytest.approx(0.76)

    def test_a_record_without_step_counts_by_position(self):
        (alarm,) = alarms([{"coverage": {"fraction": 0.5}}, {"coverage": {"fraction": 0.6}}])
        assert alarm["since_step"] == 0

    @pytest.mark.parametrize(
        "part", [None, {}, {"mean": None}, {"mean": float("nan")}, {"mean": "high"}, {"mean": True}, 3]
    )
    def test_what_is_not_there_sets_nothing_off(self, part):
        keys = ("reward", "heldout", "diversity", "velocity_norm", "groups", "reliability")
        assert names([dict.fromkeys(keys, part) | {"step": step} for step in range(30)]) == []
        assert names([]) == []

    def test_a_history_from_a_file_is_the_same(self):
        history = run(ramp(30, 0.004, 1), ramp(30, -0.004, 2))
        assert alarms([json.loads(json.dumps(record)) for record in history]) == alarms(history)


class TestStopping:
    def test_a_severe_alarm_stops_after_its_patience(self):
        history = constant("velocity_norm", "ratio", 1.3, num=8)
        assert should_stop(history[:4], patience=5) is None
        assert should_stop(history[:5], patience=5)["name"] == "velocity_norm"
        assert should_stop(history, patience=9) is None
        assert should_stop(history[:1], patience=1)["severe"]

    def test_a_mild_one_never_does(self):
        assert should_stop(constant("velocity_norm", "ratio", 1.1, num=30)) is None
        assert should_stop(constant("velocity_norm", "ratio", 1.1, num=30), severe_norm_ratio=1.05) is not None

    def test_an_interruption_starts_the_count_again(self):
        values = [0.1] * 6 + [1.0] * 5 + [0.1] * 5
        history = [{"step": i, "coverage": {"fraction": value}} for i, value in enumerate(values)]
        # Means of the last five are below one half from the third of the low records on.
        assert [end for end in range(1, 17) if should_stop(history[:end], patience=3)] == [3, 4, 5, 6, 7, 8, 16]

    def test_a_hacked_run_is_stopped_and_an_honest_one_is_not(self):
        hacked, honest = (run(ramp(40, 0.004, 1), ramp(40, slope, 2)) for slope in (-0.004, 0.003))
        assert should_stop(hacked)["name"] == "heldout_falls"
        assert all(should_stop(honest[:end]) is None for end in range(41))

    def test_what_is_unknown_is_refused(self):
        with pytest.raises(ValueError, match="patience"):
            should_stop([], patience=0)
        with pytest.raises(TypeError, match="max_ratio"):
            should_stop([], max_ratio=2.0)


class Reader(html.parser.HTMLParser):
    """Elements, attributes and text of a page; every element that opens must close."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


def records(num, ids=("count", "text"), causes=("timeout", "injection"), kinds=("blank", "appeal")):
    """A short run with every part."""
    history = []
    for step in range(num):
        g = torch.Generator().manual_seed(step)
        scores = (torch.rand(12, len(ids), generator=g) < 0.6).float()
        valid = torch.rand(12, len(ids), generator=g) < 0.9
        history.append(
            describe_step(
                scores,
                valid,
                torch.arange(12) // 4,
                step=step,
                criterion_ids=list(ids),
                categories=list(ids),
                causes=[[None if known else causes[i % len(causes)] for known in row] for i, row in enumerate(valid)],
                heldout_rewards=torch.rand(12, generator=g) if step % 3 == 0 else None,
                repeat_scores=scores,
                image_sizes=torch.randint(1, 4, (12, 2), generator=g) * 256,
                prompt_lengths=torch.arange(12) // 4 + 10,
                velocity_norms=torch.rand(12, generator=g) + 1,
                reference_norms=torch.ones(12),
                features=torch.rand(12, 3, generator=g),
                controls={kind: [0.1, None] for kind in kinds},
                latencies_s=[0.1],
                cost=0.1,
            )
        )
    return history


class TestPage:
    def test_it_shows_every_part_and_loads_nothing(self, tmp_path):
        picture = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))
        path = tmp_path / "run.html"
        write_page(
            path, records(12), pictures=[(picture, "a red cube"), ((picture * 255).byte(), "another")], notes="mini"
        )
        page, text = read(path), path.read_text()
        words = " ".join(page.words)
        for wanted in (
            "training judge",
            "held-out judge",
            "Pass rate by criterion",
            "Missing verdicts by cause",
            "timeout",
            "Spread of the reward",
            "Reliability",
            "Diversity",
            "Velocity norm",
            "Reward of control pictures",
            "Correlation of criteria",
            "a red cube",
            "mini",
        ):
            assert wanted in words, wanted
        assert page.tags.count("img") == 2 and "script" not in page.tags and "link" not in page.tags
        sources = [value for key, value in page.attributes if key in ("src", "href", "action", "data")]
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        assert "http://" not in text and "https://" not in text
        assert ("name", "viewport") in page.attributes and "default-src 'none'" in text

    def test_plots_are_well_formed_and_inside_their_canvas(self, tmp_path):
        path = tmp_path / "run.html"
        write_page(path, records(12))
        plots = re.findall(r'<svg class="plot".*?</svg>', path.read_text(), re.DOTALL)
        assert len(plots) >= 13
        for plot in plots:
            root = ElementTree.fromstring(plot)
            points = " ".join(e.attrib["points"] for e in root if "points" in e.attrib).replace(",", " ").split()
            numbers = [float(number) for number in points]
            assert all(0 <= x <= 400 for x in numbers[::2]) and all(0 <= y <= 220 for y in numbers[1::2])
            assert "nan" not in plot and "inf" not in plot

    def test_what_a_line_shows_is_the_series(self, tmp_path):
        path = tmp_path / "run.html"
        values = [0.0, 1.0, 0.5]
        write_page(path, [{"step": i, "reward": {"mean": value}} for i, value in enumerate(values)])
        (line,) = re.findall(r'<polyline points="([^"]*)"', path.read_text())
        points = [tuple(map(float, point.split(","))) for point in line.split()]
        assert points[0][0] < points[1][0] < points[2][0]
        assert points[1][1] < points[2][1] < points[0][1]  # up on the page is small
        assert points[2][1] == pytest.approx((points[0][1] + points[1][1]) / 2, abs=0.1)
        assert points[1][0] == pytest.approx((points[0][0] + points[2][0]) / 2, abs=0.1)

    def test_hostile_text_stays_text(self, tmp_path):
        path = tmp_path / "run.html"
        history = records(10, ids=(HOSTILE, "_a$b$"), causes=(HOSTILE, "http"), kinds=(HOSTILE,))
        # A control that scores makes an alarm with that name in it.
        for record in history:
            record["controls"][HOSTILE]["mean"] = 0.9
        picture = torch.zeros(3, 4, 4, dtype=torch.uint8)
        write_page(path, history, title=HOSTILE, notes=HOSTILE, pictures=[(picture, HOSTILE)])
        page = read(path)
        assert "script" not in page.tags and page.tags.count("img") == 1
        assert not [key for key, _ in page.attributes if key.startswith("on")]
        assert HOSTILE in "".join(page.words)
        for plot in re.findall(r'<svg class="plot".*?</svg>', path.read_text(), re.DOTALL):
            ElementTree.fromstring(plot)

    def test_alarms_are_shown_severe_first(self, tmp_path):
        path = tmp_path / "run.html"
        history = run(ramp(30, 0.004, 1), ramp(30, -0.004, 2))
        for record in history:
            record["coverage"] = {"fraction": 0.8, "shares": {}}
        write_page(path, history)
        listed = re.findall(r'<li class="(\w+)"><b>(\w+)</b>', path.read_text())
        assert listed == [("severe", "heldout_falls"), ("mild", "coverage")]
        write_page(path, history[:3])
        assert "heldout_falls" not in path.read_text()

    def test_nothing_yet_is_a_page_too(self, tmp_path):
        write_page(tmp_path / "run.html", [])
        assert "No records yet" in " ".join(read(tmp_path / "run.html").words)
        write_page(tmp_path / "run.html", [{"step": None, "reward": None, "controls": None}, {}])
        read(tmp_path / "run.html")

    def test_it_refreshes_if_asked(self, tmp_path):
        write_page(tmp_path / "run.html", [], refresh_s=30)
        assert '<meta http-equiv="refresh" content="30">' in (tmp_path / "run.html").read_text()
        write_page(tmp_path / "run.html", [])
        assert "refresh" not in (tmp_path / "run.html").read_text()
        with pytest.raises(ValueError, match="refresh_s"):
            write_page(tmp_path / "run.html", [], refresh_s=0)

    def test_a_failure_leaves_the_last_page_and_no_rubbish(self, tmp_path):
        path = tmp_path / "run.html"
        write_page(path, records(2))
        before = path.read_bytes()
        with pytest.raises(ValueError, match="pictures"):
            write_page(path, records(3), pictures=[(torch.zeros(1, 4, 4), "grey")])
        assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["run.html"]

    def test_a_reader_never_sees_half_a_page(self, tmp_path):
        path, history, done, broken = tmp_path / "run.html", records(4), threading.Event(), []
        write_page(path, history)

        def watch():
            while not done.is_set():
                text = path.read_text()
                if not text.startswith("<!doctype html>") or not text.endswith("</html>\n"):
                    broken.append(len(text))

        reader = threading.Thread(target=watch)
        reader.start()
        for _ in range(20):
            write_page(path, history)
        done.set()
        reader.join()
        assert broken == []

    def test_a_long_run_stays_a_small_page(self, tmp_path):
        path = tmp_path / "run.html"
        history = [{"step": i, "reward": {"mean": i % 7 / 7}} for i in range(5000)]
        write_page(path, history)
        assert path.stat().st_size < 20_000
        line = re.findall(r'<polyline points="([^"]*)"', path.read_text())[0].split()
        assert len(line) <= 302 and line[-1].startswith("390")  # the last record is there

    def test_series_leave_out_what_is_not_known(self):
        history = [{"a": {"b": 1.0}}, {"step": 7, "a": {"b": float("nan")}}, {"step": 9, "a": {"b": 2}}, {"a": 3}]
        assert read_series(history, "a", "b") == ([0.0, 9.0], [1.0, 2.0])
