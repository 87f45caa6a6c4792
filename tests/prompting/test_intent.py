"""What a request states and what a rewrite keeps: tables by hand, and laws."""

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lensmini.prompting import INTENT_KINDS, check_intent, read_answer
from lensmini.prompting.intent import find_numbers, find_quoted
from lensmini.prompting.language import guess_language

HAN = "\u4e00\u53ea\u7ea2\u8272\u7684\u72d0\u72f8\u7ad9\u5728\u96ea\u5730\u91cc"
SENTENCES = {
    "en": "a red fox stands in the snow and looks at the moon",
    "de": "ein roter Fuchs steht im Schnee und schaut auf den Mond",
    "fr": "un renard roux est dans la neige et regarde la lune",
    "es": "un zorro rojo en la nieve y la luna con una estrella",
    "it": "una volpe rossa nella neve e la luna con gli alberi",
    "pt": "uma raposa vermelha na neve e a lua com os pinheiros",
    "nl": "een rode vos staat in de sneeuw en kijkt naar het bos",
    "han": HAN,
    "japanese": "\u96ea\u306e\u4e2d\u306e\u8d64\u3044\u72d0",
    "korean": "\ub208 \uc18d\uc758 \uc5ec\uc6b0",
    "cyrillic": "\u043b\u0438\u0441\u0430 \u0432 \u0441\u043d\u0435\u0433\u0443",
    "arabic": "\u062b\u0639\u0644\u0628",
}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('a sign "OPEN" and "24 h"', ["OPEN", "24 h"]),
        ("the cat's bowl and the dogs' toys", []),
        ("a shirt with 'don't panic' on it", ["don't panic"]),
        ("\u201cOPEN\u201d, \u00abOUVERT\u00bb, \u300c\u958b\u300d, \u300e\u5e97\u300f, \u2018SALE\u2019", None),
        ('twice "a" and "a", "  a   b "', ["a", "a b"]),
        ('an open "quote', []),
        ('a 24" screen and a 6" phone', []),
        ('a 24" screen that says "HELLO", 6" high', ["HELLO"]),
        ("a '90s poster of the girls' band", []),
        ("\u201eOFFEN\u201c und \u201eNEU\u201c, \u201eTAK\u201d", ["OFFEN", "NEU", "TAK"]),
        ("\u00bbOFFEN\u00ab und \u00bbNEU\u00ab", ["OFFEN", "NEU"]),
        ("\u201d\u00d6PPET\u201d och \u201dNYTT\u201d", ["\u00d6PPET", "NYTT"]),
        ("\u201cHe said \u201chi\u201d to me\u201d", ["hi"]),
        ('""', []),
    ],
)
def test_quoted_strings_of_every_usual_kind_are_found(text, found):
    expected = ["OPEN", "OUVERT", "\u958b", "\u5e97", "SALE"] if found is None else found
    assert sorted(find_quoted(text)) == sorted(expected)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("two cats and 3 dogs", ["2", "3"]),
        ("twenty-one candles, thirty 2", ["21", "30", "2"]),
        ("twenty one", ["21"]),
        ("1,000 stars at 7:30 in 16:9", ["1000", "7:30", "16:9"]),
        ("\uff13 boats and \u0664 birds", ["3", "4"]),
        ("a pair of shoes, both", []),
        ("someone often weighs tenfold", []),
        ("a dozen eggs", ["12"]),
        ("two dozen eggs, half a dozen hens", ["24", "6"]),
        ("two hundred and five sheep", ["205"]),
        ("twenty-five thousand three hundred and one", ["25301"]),
        ("5 million stars, two, hundred", ["5000000", "2", "100"]),
        ("a hundred and a fox, twenty and three", ["100", "20", "3"]),
        ("1" * 5000, ["1" * 5000]),
    ],
)
def test_numbers_are_found_in_digits_and_words(text, found):
    assert sorted(find_numbers(text)) == sorted(found)


@pytest.mark.parametrize(("number", "said"), [("two", "a pair of"), ("2", "both"), ("one", "a single"), ("1", "a")])
def test_a_number_may_be_said_in_other_words(number, said):
    assert "numbers" not in check_intent(f"{number} shoes", f"{said} shoes").lost


@pytest.mark.parametrize(
    ("request_text", "rewrite", "lost"),
    [
        ("grey cats", "A gray cat.", {}),
        ("children with knives", "A child holds a knife.", {}),
        ("a fox and two ladies", "Two foxes and 2 lady figures.", {}),
        ("a blue-eyed cat", "A cat with blue eyes.", {"objects": ("blue-eyed", "eyed")}),
        ("the Eiffel Tower in Paris", "The tower in paris.", {"names": ("eiffel",)}),
        ('a sign "OPEN"', 'A sign "Open".', {"quoted": ("OPEN",)}),
        ('a sign "OPEN"', "A sign OPENING soon.", {"quoted": ("OPEN",)}),
        ('a sign "OPEN"', "A sign that reads OPEN.", {}),
        ("three red and blue boats", "Red boats.", {"numbers": ("3",), "colours": ("blue",)}),
        ("two hundred red boats", "200 red boats.", {}),
        ("305 boats", "Three hundred and five boats.", {}),
        ("two hundred boats", "Two of 100 boats.", {"numbers": ("200",)}),
        ('a sign "Cafe\u0301"', 'A sign "Caf\u00e9".', {}),
        ('a 24" screen with "HELLO"', 'A screen 24" wide with "HALLO".', {"quoted": ("HELLO",)}),
        ("ein Schild mit \u201eOFFEN\u201c", "Ein Schild mit der Aufschrift \u201eZU\u201c.", {"quoted": ("OFFEN",)}),
        (HAN, SENTENCES["en"], {"objects": None, "language": ("han",)}),
        (SENTENCES["de"], SENTENCES["en"], {"objects": None, "language": ("de",)}),
    ],
)
def test_losses_are_named(request_text, rewrite, lost):
    found = dict(check_intent(request_text, rewrite).lost)
    assert found.keys() == lost.keys()
    assert all(items is None or found[kind] == items for kind, items in lost.items())


def test_invented_texts_are_told_and_are_no_loss():
    report = check_intent('a poster "SALE"', 'A poster "SALE" with "50% off" below.')
    assert report.invented == ("50% off",) and report.bits_lost == 0


@given(st.text(max_size=120))
@example(":A\U00020000")
def test_nothing_is_lost_of_a_text_that_is_left_as_it_is(text):
    report = check_intent(text, text)
    assert report.bits_lost == 0 and report.invented == () and set(report.stated) <= set(INTENT_KINDS)


@given(st.text(max_size=80), st.text(max_size=80))
def test_bits_lost_are_among_the_bits_stated(request_text, rewrite):
    report = check_intent(request_text, rewrite)
    assert 0 <= report.bits_lost <= report.bits
    assert all(set(items) <= set(report.stated[kind]) for kind, items in report.lost.items())


@given(st.sampled_from([*SENTENCES]), st.sampled_from([*SENTENCES]))
def test_a_language_is_lost_exactly_where_it_is_another(before, after):
    assert ("language" in check_intent(SENTENCES[before], SENTENCES[after]).lost) == (before != after)


@pytest.mark.parametrize("language", SENTENCES)
def test_languages_are_told_apart(language):
    assert guess_language(SENTENCES[language]) == language


def test_words_that_do_not_tell_a_language_are_no_loss_of_it():
    assert "language" not in check_intent("fox", SENTENCES["en"]).lost
    assert "language" not in check_intent("fox", SENTENCES["de"]).lost
    assert "language" in check_intent("fox", HAN).lost


def numeral(number):
    """English words, written down independently: "three hundred and five"."""
    units = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    units = [*units.split(), "seventeen", "eighteen", "nineteen"]
    if number < 20:
        return units[number]
    if number < 100:
        tens = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"][number // 10 - 2]
        return tens if number % 10 == 0 else f"{tens}-{units[number % 10]}"
    scale, name = next((s, n) for s, n in ((10**6, "million"), (1000, "thousand"), (100, "hundred")) if number >= s)
    rest = number % scale
    joint = " and " if rest and rest < 100 else " "
    return f"{numeral(number // scale)} {name}" + (joint + numeral(rest) if rest else "")


@given(st.integers(2, 999_999_999))
@example(100_100)
@example(1_000_001)
@example(203_000)
def test_a_number_in_words_is_the_same_number_in_digits(number):
    words = numeral(number)
    assert find_numbers(f"in all {words} stars") == [str(number)]
    assert "numbers" not in check_intent(f"{words} stars", f"A sky of {number:,} stars.").lost
    assert "numbers" not in check_intent(f"{number} stars", f"A sky of {words} stars.").lost
    assert check_intent(f"{words} stars", f"Sky with {number + 1} stars.").lost["numbers"] == (str(number),)


@pytest.mark.parametrize("text", [" 'a", " \u201ca", " \u300ca", ' "q{}"', " thing{}x"])
def test_time_grows_with_the_length_of_a_text_and_not_with_its_square(text):
    def seconds(num):
        long = "".join(text.replace("{}", str(index)) for index in range(num))
        other = " ".join(f"other{index}" for index in range(num // 4))
        started = time.process_time()
        check_intent(long, long)
        check_intent(long, other)
        return time.process_time() - started

    # A square law has 16; this leaves room for noise.
    assert seconds(4000) < 8 * max(seconds(1000), 0.02)


@pytest.mark.parametrize(
    "prompt",
    [
        "Great Wall of China: a wide shot at dawn, the towers in mist.",
        "Certainly Cola, an old enamel sign on a brick wall.",
        "Sure-footed goats climb a cliff above the sea.",
        "Okay Corral, a dusty street in the west.",
        "Here be dragons, an old map with a sea monster.",
        "An analysis room in a police station, papers on a desk.",
        "2001: A space station turns above the earth.",
        'A sign says "1. Wait 2. Go" in white letters.',
        "A cat < a dog > a mouse, drawn as a chart.",
        "A speech bubble says \"I'm sorry, I can't\".",
        "A sorry old car stands in the rain.",
        '"Sorry we missed you" is printed on a cream card on a door.',
        "\u201cI'm sorry\u201d, says the banner over the door of the shop.",
        "I can see the sea from my window, a view in oil colours.",
        "Desolate hills under a heavy sky, a road in between.",
        "Prompt service at a hotel desk, a clerk smiles.",
        "Notes of music fly out of a piano.",
    ],
)
def test_a_prompt_that_looks_a_little_like_something_else_stays_as_it_is(prompt):
    assert read_answer(prompt).prompt == prompt
