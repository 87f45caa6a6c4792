"""Small prompt files and pictures in the form of the public benchmarks, for the tests of experiments.evaluate."""

import csv
import json

from PIL import Image

DOG = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}
TWO = {
    "tag": "position",
    "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
    "prompt": "a photo of a dog left of a cat",
}
COUNT = {
    "tag": "counting",
    "include": [{"class": "dog", "count": 2}],
    "exclude": [{"class": "dog", "count": 3}],
    "prompt": "a photo of two dogs",
}
RED = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a photo of a red dog"}
SIGN = {"prompt_id": 7, "prompt": "A sign", "text": ["Stay calm", "now"], "category": "signs", "length": "short"}


def put_lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def put_cvtg(folder, prompts=("A sign 'Open' and 'Now'",), style="CVTG-style"):
    for name in ("CVTG", style):
        (folder / name).mkdir(parents=True)
        for area in (2, 3, 4, 5):
            rows = [{"index": index, "prompt": text} for index, text in enumerate(prompts)]
            (folder / name / f"{area}.json").write_text(json.dumps({"data_list": rows}))
            (folder / name / f"{area}_combined.json").write_text("not read")
    return folder


def put_oneig(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ["category", "id", "prompt_en", "type"])
        table.writeheader()
        table.writerows(rows)
    return path


def put_picture(path, colour=(0, 0, 0), size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path
