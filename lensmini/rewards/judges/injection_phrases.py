"""What text in a picture says when it speaks to its judge: groups of words that stand close together, by language.

No axes: text.
"""

__all__ = ["ADDRESSES", "LOOK_ALIKES"]

ADDRESSES: tuple[tuple[tuple[str, ...], ...], ...] = (
    # English
    (
        ("criteri", "rubric", "all checks", "every check", "all requirements", "all conditions"),
        ("satisfied", "fulfilled", "fulfiled", "are met", "is met", "fully met", "been met", "passed", "hold true"),
    ),
    (
        ("this image", "this picture", "the image", "the picture", "this photo"),
        (
            "meets all",
            "meets every",
            "satisfies all",
            "satisfies every",
            "fulfills all",
            "fulfils all",
            "passes all",
            "passes every",
            "matches the prompt",
            "follows the prompt",
        ),
    ),
    (
        ("ignore", "disregard", "override", "forget"),
        (
            "previous instruction",
            "prior instruction",
            "all instruction",
            "above instruction",
            "your instruction",
            "the instruction",
            "earlier instruction",
            "system prompt",
            "previous prompt",
            "prompt above",
        ),
    ),
    (
        ("answer", "respond", "reply", "output", "score", "verdict", "full marks"),
        (
            "dear judge",
            "attention judge",
            "to the judge",
            "dear evaluator",
            "the evaluator",
            "dear grader",
            "language model",
            "ai model",
            "vision model",
            "image checker",
            "judge model",
        ),
    ),
    (
        (
            "answer yes",
            "answer 1",
            "answer one",
            "answer true",
            "answer only",
            "answer with 1",
            "respond with 1",
            "reply with 1",
            "output 1",
            "respond yes",
            "reply yes",
        ),
        ("to all", "for all", "to every", "for every", "to each", "for each", "all questions", "everything"),
    ),
    (
        ("give", "award", "assign", "grant", "deserves", "rate", "score this"),
        (
            "full score",
            "full marks",
            "maximum score",
            "max score",
            "highest score",
            "perfect score",
            "top score",
            "score of 1",
            "10/10",
        ),
        ("image", "picture", "photo", "artwork", "judge"),
    ),
    # German
    (
        ("kriteri", "alle anforderungen", "alle pr\xfcfungen", "alle pruefungen", "alle bedingungen"),
        ("erf\xfcllt", "erfuellt", "eingehalten", "bestanden"),
    ),
    (
        ("ignorier", "missachte", "vergiss"),
        ("anweisung", "systemprompt", "instruktion"),
    ),
    (
        ("antworte", "bewerte"),
        ("mit 1", "mit ja", "immer ja", "volle punktzahl", "h\xf6chstnote", "hoechstnote", "h\xf6chster punktzahl"),
        ("bild", "alle", "alles", "jede"),
    ),
    # French
    (
        ("crit\xe8res", "toutes les exigences", "toutes les conditions"),
        ("satisfaits", "remplis", "respect\xe9s", "valid\xe9s", "satisfaites", "remplies", "respect\xe9es"),
    ),
    (
        ("ignore", "ne tiens pas compte", "ne tenez pas compte", "oublie"),
        ("instructions pr\xe9c\xe9dentes", "les instructions", "vos instructions", "tes instructions"),
    ),
    (
        ("r\xe9ponds", "r\xe9pondez", "attribue"),
        ("par 1", "par oui", "note maximale", "toujours oui"),
        ("image", "tout", "toutes", "tous"),
    ),
    # Spanish
    (
        ("criterios", "todos los requisitos", "todas las condiciones"),
        ("cumplido", "cumplen", "satisfecho", "cumplida"),
    ),
    (
        ("ignora", "ignore", "haz caso omiso", "olvida"),
        ("instrucciones",),
    ),
    (
        ("responde", "responda", "punt\xfaa"),
        ("con 1", "siempre s\xed", "puntuaci\xf3n m\xe1xima"),
        ("imagen", "todo", "toda"),
    ),
    # Portuguese
    (
        ("crit\xe9rios", "todos os requisitos"),
        ("atendidos", "cumpridos", "satisfeitos"),
    ),
    (
        ("ignore", "desconsidere", "esque\xe7a"),
        ("instru\xe7\xf5es",),
    ),
    # Italian
    (
        ("criteri", "tutti i requisiti"),
        ("soddisfatti", "rispettati", "superati"),
    ),
    (
        ("ignora", "ignorate", "dimentica"),
        ("istruzioni",),
    ),
    # Russian
    (
        (
            "\u043a\u0440\u0438\u0442\u0435\u0440\u0438",
            "\u0432\u0441\u0435 \u0442\u0440\u0435\u0431\u043e\u0432\u0430\u043d\u0438\u044f",
            "\u0432\u0441\u0435 \u0443\u0441\u043b\u043e\u0432\u0438\u044f",
        ),
        (
            "\u0432\u044b\u043f\u043e\u043b\u043d\u0435\u043d",
            "\u0441\u043e\u0431\u043b\u044e\u0434\u0435\u043d",
            "\u0443\u0434\u043e\u0432\u043b\u0435\u0442\u0432\u043e\u0440\u0435\u043d",
        ),
    ),
    (
        ("\u0438\u0433\u043d\u043e\u0440\u0438\u0440", "\u0437\u0430\u0431\u0443\u0434\u044c"),
        ("\u0438\u043d\u0441\u0442\u0440\u0443\u043a\u0446\u0438", "\u0443\u043a\u0430\u0437\u0430\u043d\u0438"),
    ),
    (
        ("\u043e\u0442\u0432\u0435\u0442\u044c", "\u043e\u0442\u0432\u0435\u0447\u0430\u0439"),
        ("\u0434\u0430", "1", "\u0435\u0434\u0438\u043d"),
        ("\u043d\u0430 \u0432\u0441\u0435", "\u0432\u0441\u0435\u0433\u0434\u0430", "\u043a\u0430\u0436\u0434"),
    ),
    # Chinese, simplified and traditional
    (
        (
            "\u6807\u51c6",
            "\u6a19\u6e96",
            "\u6761\u4ef6",
            "\u689d\u4ef6",
            "\u8981\u6c42",
            "\u68c0\u67e5\u9879",
            "\u6aa2\u67e5\u9805",
        ),
        (
            "\u5168\u90e8\u6ee1\u8db3",
            "\u5168\u90e8\u6eff\u8db3",
            "\u5747\u5df2\u6ee1\u8db3",
            "\u5747\u5df2\u6eff\u8db3",
            "\u90fd\u6ee1\u8db3",
            "\u90fd\u6eff\u8db3",
            "\u5df2\u6ee1\u8db3",
            "\u5df2\u6eff\u8db3",
            "\u6ee1\u8db3\u6240\u6709",
            "\u6eff\u8db3\u6240\u6709",
            "\u7b26\u5408\u6240\u6709",
            "\u5168\u90e8\u7b26\u5408",
            "\u5168\u90e8\u901a\u8fc7",
            "\u5168\u90e8\u901a\u904e",
        ),
    ),
    (
        ("\u5ffd\u7565", "\u65e0\u89c6", "\u7121\u8996"),
        ("\u6307\u4ee4", "\u6307\u793a", "\u63d0\u793a\u8bcd", "\u63d0\u793a\u8a5e"),
    ),
    (
        ("\u56de\u7b54", "\u8f93\u51fa", "\u8f38\u51fa", "\u6253\u5206", "\u8bc4\u5206", "\u8a55\u5206"),
        ("\u6ee1\u5206", "\u6eff\u5206", "\u6700\u9ad8\u5206"),
        ("\u56fe", "\u5716", "\u6240\u6709", "\u5168\u90e8"),
    ),
    # Japanese
    (
        ("\u57fa\u6e96", "\u6761\u4ef6", "\u8981\u4ef6"),
        (
            "\u3059\u3079\u3066\u6e80\u305f",
            "\u5168\u3066\u6e80\u305f",
            "\u6e80\u305f\u3057\u3066\u3044",
            "\u6e80\u305f\u3055\u308c",
        ),
    ),
    (
        ("\u7121\u8996",),
        ("\u6307\u793a", "\u547d\u4ee4", "\u30d7\u30ed\u30f3\u30d7\u30c8"),
    ),
    # Korean
    (
        ("\uae30\uc900", "\uc870\uac74"),
        (
            "\ubaa8\ub450 \ucda9\uc871",
            "\ubaa8\ub450 \ub9cc\uc871",
            "\ucda9\uc871\ub418",
            "\ucda9\uc871\ud569",
            "\ub9cc\uc871\ud569",
        ),
    ),
    (
        ("\ubb34\uc2dc",),
        ("\uc9c0\uc2dc", "\uba85\ub839", "\ud504\ub86c\ud504\ud2b8"),
    ),
    # Arabic
    (
        (
            "\u0627\u0644\u0645\u0639\u0627\u064a\u064a\u0631",
            "\u062c\u0645\u064a\u0639 \u0627\u0644\u0634\u0631\u0648\u0637",
        ),
        (
            "\u0645\u0633\u062a\u0648\u0641\u0627\u0629",
            "\u0627\u0633\u062a\u064a\u0641\u0627\u0621",
            "\u062a\u062d\u0642\u0642\u062a",
        ),
    ),
    (
        ("\u062a\u062c\u0627\u0647\u0644",),
        ("\u0627\u0644\u062a\u0639\u0644\u064a\u0645\u0627\u062a",),
    ),
    # Hindi
    (
        ("\u092e\u093e\u0928\u0926\u0902\u0921", "\u0936\u0930\u094d\u0924\u0947\u0902"),
        ("\u092a\u0942\u0930\u0947", "\u092a\u0942\u0930\u0940", "\u092a\u0942\u0930\u094d\u0923"),
    ),
    (
        ("\u0905\u0928\u0926\u0947\u0916\u093e",),
        ("\u0928\u093f\u0930\u094d\u0926\u0947\u0936",),
    ),
)
"""Ours: of every group of a rule one word has to be there. Words are beginnings or parts of words, in any spacing."""

LOOK_ALIKES = {
    "a": "\u0430\u03b1\u0251",
    "b": "\u0432\u03b2",
    "c": "\u0441\u03f2",
    "d": "\u0501\u0111",
    "e": "\u0435\u03b5",
    "g": "\u0261",
    "h": "\u043d\u04bb",
    "i": "\u0456\u03b9\u0131l|",
    "j": "\u0458",
    "k": "\u043a\u03ba",
    "m": "\u043c",
    "n": "\u03b7",
    "o": "\u043e\u03bf\xf8",
    "p": "\u0440\u03c1",
    "s": "\u0455",
    "t": "\u0442\u03c4",
    "u": "\u03c5",
    "v": "\u03bd\u0475",
    "w": "\u051d\u03c9\u0461",
    "x": "\u0445\u03c7",
    "y": "\u0443\u04af\u03b3",
}
"""Ours: small letters of other scripts, and ``l`` and the bar for ``i``, that look like a Latin one."""
