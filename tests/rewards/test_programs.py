"""Laws of programs as judges: distances are Levenshtein's, what is drawn is read, a picture is read once."""

import sys
import types
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lensmini.data import read_scene, render_scene, sample_scene
from lensmini.data.text_ink import default_fonts, ink
from lensmini.data.text_pictures import draw_text_picture
from lensmini.rewards import Criterion
from lensmini.rewards.judges import (
    FoundText,
    JudgeRequest,
    edit_distance,
    find_lettering,
    ocr_judge,
    once_per_picture,
    question_judge,
    quoted_strings,
    rapid_reader,
    similarity,
)

TEXTS = st.text("ab\u00e9\u5b57 ", max_size=9)


def slow_distance(one, other):
    """By the definition: the last characters are kept, replaced, deleted or inserted."""

    @cache
    def distance(i, j):
        if not i or not j:
            return i + j
        kept = distance(i - 1, j - 1) + (one[i - 1] != other[j - 1])
        return min(kept, distance(i - 1, j) + 1, distance(i, j - 1) + 1)

    return distance(len(one), len(other))


class TestDistance:
    @given(TEXTS, TEXTS)
    @example("", "")
    @example("kitten", "sitting")
    def test_it_is_the_definition(self, one, other):
        assert edit_distance(one, other) == slow_distance(one, other)

    @given(TEXTS, TEXTS, TEXTS)
    def test_it_is_a_metric(self, one, other, third):
        assert edit_distance(one, other) == edit_distance(other, one) >= (one != other)
        assert edit_distance(one, one) == 0
        assert edit_distance(one, third) <= edit_distance(one, other) + edit_distance(other, third)
        assert abs(len(one) - len(other)) <= edit_distance(one, other) <= max(len(one), len(other))

    def test_longer_than_any_machine_word(self):
        one = "lorem ipsum dolor sit amet " * 20
        other = one.replace("dolor", "color") + "?"
        assert edit_distance(one, other) == 21 and similarity(one, other) == 1 - 21 / len(other)

    @pytest.mark.parametrize(
        ("one", "other", "value"),
        [("", "", 1.0), ("", "a", 0.0), ("abcd", "abce", 0.75), ("ab", "cd", 0.0), ("a", "abcd", 0.25)],
    )
    def test_similarity_is_one_minus_the_share_of_edits(self, one, other, value):
        assert similarity(one, other) == value


class TestLettering:
    @pytest.mark.parametrize(
        ("text", "found"),
        [
            ('It says "Open 24" and "Closed".', ["Open 24", "Closed"]),
            ("It's Bob's: 'Bob's Diner', isn't it?", ["Bob's Diner"]),
            (
                "\u201cCaf\u00e9\u201d, \u201eM\u00fcller\u201c, \u00ab Tabac \u00bb",
                ["Caf\u00e9", "M\u00fcller", "Tabac"],
            ),
            (
                "\u300c\u51fa\u53e3\u300d\u300e\u5165\u53e3\u300f \u2018Pull\u2019",
                ["\u51fa\u53e3", "\u5165\u53e3", "Pull"],
            ),
            ("The dogs' bowls don't say anything", []),
            ('Nothing "" here " "', []),
        ],
    )
    def test_quoted_texts_are_found_in_any_marks(self, text, found):
        assert quoted_strings(text) == found

    @pytest.mark.parametrize(
        ("wanted", "read", "score"),
        [
            ("Open", ["OPEN"], 1.0),
            ("open 24 hours", ["Open", "24", "hours!"], 1.0),
            ("Open!", ["we", "are open!"], 1.0),
            ("art", ["start here"], 3 / 5),
            ("hello world", ["helloworld"], 10 / 11),
            ("\u51fa\u53e3", ["\u897f\u51fa", "\u53e3\u3078"], 1.0),
            ("\u51fa\u53e3", ["\u5165\u53e3"], 0.5),
            ("caf\u00e9", ["CAFE\u0301"], 1.0),
            ("OPEN", ["\uff2f\uff30\uff25\uff2e"], 1.0),
            ("\u041c\u0418\u0420", ["\u043c\u0438\u0440"], 1.0),
            ("don\u2019t", ["don't"], 1.0),
            ("anything", [], 0.0),
            ("xyz", ["abc"], 0.0),
        ],
    )
    def test_the_best_run_of_words_counts(self, wanted, read, score):
        assert find_lettering(wanted, read) == pytest.approx(score, abs=1e-9)

    def test_case_counts_if_so_asked(self):
        assert find_lettering("Open", ["OPEN"], case=True) == 0.25
        assert find_lettering("CAF\u00c9", ["CAFE\u0301"], case=True) == 1.0
        with pytest.raises(ValueError, match="wanted: expected some text"):
            find_lettering("  ", ["a"])

    @given(st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=5), st.data())
    def test_any_run_of_words_that_was_read_is_found_and_more_text_around_it_costs_nothing(self, words, data):
        first = data.draw(st.integers(0, len(words) - 1))
        wanted = " ".join(words[first : data.draw(st.integers(first + 1, len(words)))])
        assert find_lettering(wanted, words) == find_lettering(wanted, [" ".join(words)]) == 1.0
        assert find_lettering(wanted, ["x", *words, "y"]) == 1.0

    @given(st.text("ab c", max_size=6).filter(str.strip), st.lists(st.text("ab c", max_size=6), max_size=3))
    def test_it_is_the_best_of_all_runs_written_out(self, wanted, read):
        words = " ".join(read).split()
        goal = " ".join(wanted.split())
        runs = [" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)]
        best = max((1 - slow_distance(goal, run) / max(len(goal), len(run)) for run in runs), default=0.0)
        assert find_lettering(wanted, read) == pytest.approx(best, abs=1e-9)


MONO = next(font for font in default_fonts() if font.endswith("DejaVuSansMono.ttf"))
LETTERS = "ABCDEHIKLMNORSTUX \u0411\u0416\u0428\u03a9\u0394"


def read_template(image):
    """A reader by analysis and synthesis: the size from the height of the ink, then letter by letter what explains it best."""
    gap = (255 - image.float()).amax(0).numpy()  # on white
    ys, xs = np.nonzero(gap > 0.05 * gap.max())
    crop = gap[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1] / gap.max()
    best = (np.inf, "")
    for size in range(8, 80):
        if abs(ink("H", MONO, size, 0.0)[0].shape[0] - crop.shape[0]) > 1:
            continue
        text, width = "", 0
        while width < crop.shape[1] - 1 and len(text) < 12:
            options = []
            for letter in LETTERS if text else LETTERS.replace(" ", ""):
                tried = text + letter + ("" if letter != " " else "H")
                drawn = ink(tried, MONO, size, 0.0)[0]
                if letter == " ":
                    drawn = drawn[:, : max(1, drawn.shape[1] - ink("H", MONO, size, 0.0)[0].shape[1])]
                options.append((_difference(drawn, crop) / drawn.shape[1], letter, drawn.shape[1]))
            _, letter, width = min(options)
            text += letter
        best = min(best, (_difference(ink(text, MONO, size, 0.0)[0], crop, whole=True), text))
    return [best[1]]


def _difference(drawn, crop, whole=False):
    height, width = min(drawn.shape[0], crop.shape[0]), min(drawn.shape[1], crop.shape[1])
    error = np.square(drawn[:height, :width] - crop[:height, :width]).sum()
    rest = drawn[:, width:].sum() + drawn[height:].sum() + crop[height:, :width].sum()
    return error + rest + (crop[:, width:].sum() if whole else 0.0)


def draw(text, seed=0):
    white = torch.full((3, 64, 256), 255, dtype=torch.uint8)
    options = {"fonts": [MONO], "background": white, "max_angle": 0.0, "max_blur": 0.0}
    return draw_text_picture(f"{text}", [text], height=64, width=256, seed=seed, **options).image


def asked(image, scale="binary", text='It reads "HELLO MARS".', **options):
    criterion = Criterion(id="text", text=text, category="text", scale=scale, **options)
    return JudgeRequest(image=image, prompt='A sign "OTHER".', criterion=criterion)


class TestOcrJudge:
    @pytest.mark.parametrize("text", ["HELLO MARS", "\u0416\u0411\u0428 \u03a9\u0394"])
    def test_text_that_the_library_draws_is_read_and_judged(self, text):
        judge = ocr_judge(read_template, judge_id="templates")
        for seed in range(2):
            request = asked(draw(text, seed), text=f'It reads "{text}".')
            assert judge.score([request])[0].score == 1.0
        wrong = [asked(draw(text), text=f'It reads "{text}X".'), asked(draw(text), "real", f'It reads "{text}X".')]
        binary, real = judge.score(wrong)
        assert binary.score == 0.0 and real.score == pytest.approx(len(text) / (len(text) + 1))

    @pytest.mark.parametrize(
        ("read", "binary", "level", "real"),
        [
            (["HELLO MARS"], 1.0, 1.0, 1.0),
            (["HELLO", "MARS"], 1.0, 1.0, 1.0),
            (["HELLO MARX"], 0.0, 0.75, 0.9),
            (["HELXX MXRS"], 0.0, 0.5, 0.7),
            ([], 0.0, 0.0, 0.0),
        ],
    )
    def test_each_scale_has_its_answer_and_the_best_is_for_exact_text(self, read, binary, level, real):
        judge = ocr_judge(lambda image: [FoundText(text, ()) for text in read], judge_id="script")
        image = torch.zeros(3, 2, 2, dtype=torch.uint8)
        requests = [asked(image), asked(image, "levels", levels=5), asked(image, "real", low=-1.0, high=3.0)]
        assert [v.score for v in judge.score(requests)] == pytest.approx([binary, level, real])

    @given(st.floats(-5, 5), st.floats(0.01, 5))
    @example(0.1, 0.2)
    def test_exact_text_never_leaves_a_real_scale(self, low, width):
        judge = ocr_judge(lambda image: ["HELLO MARS"], judge_id="script")
        request = asked(torch.zeros(3, 2, 2, dtype=torch.uint8), "real", low=low, high=low + width)
        assert judge.score([request])[0].score == 1.0

    def test_the_prompts_quotes_stand_in_for_missing_ones_and_without_any_nothing_applies(self):
        judge = ocr_judge(lambda image: ["other"], judge_id="script")
        image = torch.zeros(3, 2, 2, dtype=torch.uint8)
        assert judge.score([asked(image, text="The lettering is right.")])[0].score == 1.0
        plain = JudgeRequest(image=image, prompt="A wall.", criterion=Criterion(id="a", text="It is white."))
        assert judge.score([plain])[0].state == "not_applicable"
        own = ocr_judge(lambda image: ["other"], judge_id="script", wanted=lambda r: ["Other"], case=True)
        assert own.score([plain])[0].score == 0.0 and own.judge_id != judge.judge_id

    def test_several_texts_all_have_to_be_there(self):
        judge = ocr_judge(lambda image: ["one", "two"], judge_id="script")
        image = torch.zeros(3, 2, 2, dtype=torch.uint8)
        both = [asked(image, text='Reads "one" and "two"'), asked(image, text='Reads "one" and "xyz"')]
        assert [v.score for v in judge.score(both)] == [1.0, 0.0]

    def test_a_reader_that_fails_is_a_missing_verdict(self):
        assert ocr_judge(lambda image: 1 / 0, judge_id="x").score([asked(draw("X"))])[0].cause == "error"


class TestRapidReader:
    def test_without_the_package_it_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
        with pytest.raises(ImportError, match="pip install rapidocr-onnxruntime"):
            rapid_reader()

    def test_its_interface_is_spoken(self, monkeypatch):
        """The package's documented one: blue, green, red as [h, w, 3]; quads, texts, confidences and times, or None."""
        seen = []

        class RapidOCR:
            def __init__(self, **options):
                self.options = options

            def __call__(self, picture):
                seen.append((picture, self.options))
                if picture.max() == 0:
                    return None, None
                return [[[[1.0, 2.0], [3.0, 2.0], [3.0, 4.0], [1.0, 4.0]], "EXIT", 0.98]], [0.1, 0.0, 0.2]

        monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", types.SimpleNamespace(RapidOCR=RapidOCR))
        read = rapid_reader(text_score=0.3)
        image = torch.zeros(3, 5, 7, dtype=torch.uint8)
        image[0] = 200  # red
        assert list(read(image)) == [FoundText("EXIT", ((1.0, 2.0), (3.0, 2.0), (3.0, 4.0), (1.0, 4.0)))]
        picture, options = seen[0]
        assert picture.shape == (5, 7, 3) and picture.dtype == np.uint8 and picture[0, 0].tolist() == [0, 0, 200]
        assert options == {"text_score": 0.3} and list(read(torch.zeros_like(image))) == []

    def test_the_package_reads_large_letters_where_it_is_installed(self):
        pytest.importorskip("rapidocr_onnxruntime", reason="needs the extra ocr")
        judge = ocr_judge(rapid_reader(), judge_id="rapidocr")
        options = {"height": 256, "width": 384, "fonts": [MONO], "max_angle": 0.0, "max_blur": 0.0}
        image = draw_text_picture("mars1", ["HELLO", "MARS"], **options).image
        texts = ('It reads "HELLO" and "MARS".', 'It reads "HELLO" and "VENUS".')
        assert [one.score for one in judge.score([asked(image, text=text) for text in texts])] == [1.0, 0.0]


class TestQuestions:
    def test_the_verifier_of_scenes_is_a_judge_that_reads_each_picture_once(self):
        scenes = [sample_scene(generator=n) for n in range(6)]
        seen = []

        def read(image):
            seen.append(image)
            return read_scene(image)

        judge = question_judge(
            read,
            lambda reading, background: reading.background == background,
            lambda c: c.text.removesuffix(" background") if c.text.endswith("background") else None,
            judge_id="scenes",
        )
        names = sorted({scene.background for scene in scenes})
        criteria = [Criterion(id=f"c{n}", text=f"{name} background") for n, name in enumerate(names)]
        criteria.append(Criterion(id="other", text="Something else."))
        requests = [
            JudgeRequest(image=render_scene(scene, 32, 32), prompt="p", criterion=criterion)
            for criterion in criteria
            for scene in scenes
        ]
        verdicts = judge.score(requests) + judge.score(requests)
        expected = [float(scene.background == name) for name in names for scene in scenes]
        assert [v.score for v in verdicts] == (expected + [None] * 6) * 2 and len(set(expected)) == 2
        assert {v.state for v in verdicts[-6:]} == {"not_applicable"} and len(seen) == 6

    def test_the_pictures_used_last_are_remembered(self):
        seen = []
        look = once_per_picture(lambda image: seen.append(int(image.max())) or int(image.max()), memory=2)

        def ask(level):
            image = torch.full((3, 2, 2), level, dtype=torch.uint8)
            return look(JudgeRequest(image=image, prompt="p", criterion=Criterion(id="a", text="b")))

        assert [ask(n) for n in (1, 2, 1, 3, 1, 2)] == [1, 2, 1, 3, 1, 2]
        assert seen == [1, 2, 3, 2]
        with pytest.raises(ValueError, match="memory: expected a positive integer"):
            once_per_picture(read_scene, memory=0)

    def test_a_fault_is_not_remembered(self):
        tries = []

        def read(image):
            tries.append(1)
            if len(tries) == 1:
                raise OSError("busy")
            return 1.0

        judge = question_judge(read, lambda reading, q: reading, lambda c: c, judge_id="x")
        request = asked(torch.zeros(3, 2, 2, dtype=torch.uint8))
        assert judge.score([request])[0].cause == "error" and judge.score([request])[0].score == 1.0
