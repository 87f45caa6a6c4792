"""Laws of experiments.evaluate: prompt files, layouts as official scorers read them, their results, and whole runs."""

import glob
import json
import os
import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from experiments import evaluate as script
from experiments.evaluate import EvaluateConfig, evaluate, price
from experiments.evaluate_config import cvtg, geneval, longtext, oneig, scenes
from experiments.evaluation.layouts import load_picture, split_grid, write_layout
from experiments.evaluation.official import read_official
from experiments.evaluation.paper import paper_rows, paper_table
from experiments.evaluation.prompt_files import read_prompts
from tests.experiments.benchmark_files import COUNT, DOG, SIGN, TWO, put_cvtg, put_lines, put_oneig, put_picture
from tests.experiments.test_generate import run  # noqa: F401


class TestPromptFiles:
    @pytest.mark.parametrize(
        ("row", "cause"),
        [
            ("not json", "no JSON object"),
            ([1], "no JSON object"),
            ({**DOG, "prompt": " "}, "prompt is missing or empty"),
            ({**DOG, "tag": "dogs"}, "tag is none of"),
            ({**DOG, "include": []}, "include is no list"),
            ({**DOG, "include": [{"class": "dog"}]}, "no class or no count"),
            ({**DOG, "include": [{"class": "dog", "count": True}]}, "no class or no count"),
            ({**DOG, "exclude": [{"class": "", "count": 1}]}, "no class or no count"),
            ({**DOG, "include": [{"class": "dog", "count": 1, "color": "teal"}]}, "colour that GenEval does not know"),
            ({**DOG, "include": [{"class": "dog", "count": 1, "position": ["above", 0]}]}, "earlier object"),
            ({**TWO, "include": [TWO["include"][0], {**DOG["include"][0], "position": ["near", 0]}]}, "earlier object"),
        ],
    )
    def test_bad_rows_of_geneval_are_counted_and_do_not_move_the_others(self, tmp_path, row, cause):
        found = read_prompts("geneval", put_lines(tmp_path / "m.jsonl", [DOG, row, TWO]))
        assert [prompt.key for prompt in found.prompts] == ["00000", "00002"]
        assert found.bad.total() == 1 and cause in next(iter(found.bad)) and "line 2" in found.examples[0]

    def test_oneig_has_a_folder_for_each_category_and_ids_of_three_digits(self, tmp_path):
        row = {"category": "Portrait", "id": "004", "prompt_en": 'A "big", wide\nroom', "type": "T"}
        bad = [{**row, "id": "4"}, {**row, "category": "Cats"}, {**row, "prompt_en": ""}, row]
        found = read_prompts("oneig", put_oneig(tmp_path / "OneIG-Bench.csv", [row, *bad]))
        assert [(prompt.key, prompt.prompt) for prompt in found.prompts] == [("human/004", row["prompt_en"])]
        assert sorted(found.bad.values()) == [1, 1, 1, 1]
        (tmp_path / "o.json").write_text(json.dumps([{**row, "prompt_cn": "\u623f"}]))
        assert read_prompts("oneig", tmp_path / "o.json", "zh").prompts[0].prompt == "\u623f"

    def test_longtext_and_cvtg(self, tmp_path):
        rows = [SIGN, {**SIGN, "prompt_id": "8"}, {**SIGN, "prompt_id": 8, "text": []}, SIGN]
        found = read_prompts("longtext", put_lines(tmp_path / "text_prompts.jsonl", rows))
        assert [prompt.key for prompt in found.prompts] == ["0007"] and found.bad.total() == 3
        found = read_prompts("cvtg", put_cvtg(tmp_path / "CVTG-2K", ["A 'Sign'", "no text"]))
        assert [prompt.key for prompt in found.prompts] == [
            f"{name}/{area}/0" for name in ("CVTG", "CVTG-Style") for area in (2, 3, 4, 5)
        ]
        assert found.bad == {"prompt has no text in single quotation marks": 8}

    def test_files_that_are_not_there_or_empty_are_refused(self, tmp_path):
        (tmp_path / "empty").touch()
        (tmp_path / "CVTG").mkdir()
        for benchmark, name in (("geneval", "empty"), ("geneval", "none"), ("oneig", "empty"), ("cvtg", ".")):
            with pytest.raises(ValueError, match="^prompts: expected"):
                read_prompts(benchmark, tmp_path / name)


class TestLayouts:
    """Read back as the official scripts do, in their own words of os and glob."""

    def lay_out(self, tmp_path, benchmark, prompts, number):
        painted = {
            prompt.key: [put_picture(tmp_path / "p" / f"{i:02d}{n}.png", (10 * i, 60 * n, 9)) for n in range(number)]
            for i, prompt in enumerate(prompts)
        }
        assert write_layout(benchmark, prompts, painted, tmp_path / "images", "lens")
        return painted

    def test_geneval(self, tmp_path):
        prompts = read_prompts("geneval", put_lines(tmp_path / "m.jsonl", [DOG, TWO])).prompts
        self.lay_out(tmp_path, "geneval", prompts, 4)
        root, seen = str(tmp_path / "images"), {}
        for folder in os.listdir(root):
            if folder.isdigit():
                with open(os.path.join(root, folder, "metadata.jsonl")) as file:
                    metadata = json.load(file)
                names = [n for n in os.listdir(os.path.join(root, folder, "samples")) if re.match(r"\d+\.png", n)]
                seen[int(folder)] = metadata, len(names)
        assert seen == {0: (DOG, 4), 1: (TWO, 4)}

    def test_oneig_grids_run_row_by_row(self, tmp_path):
        rows = [{"category": "General_Object", "id": f"{i:03d}", "prompt_en": "a", "type": "T"} for i in range(2)]
        prompts = read_prompts("oneig", put_oneig(tmp_path / "o.csv", rows)).prompts
        self.lay_out(tmp_path, "oneig", prompts, 4)
        (file,) = glob.glob(f"{tmp_path}/images/object/lens/001*")
        sheet = Image.open(file).convert("RGB")
        assert file.endswith("001.webp") and sheet.size == (16, 12)
        for i, part in enumerate(split_grid(load_picture(tmp_path / "images/object/lens/001.webp"), 2)):
            left, top = i % 2 * 8, i // 2 * 6
            assert sheet.crop((left, top, left + 8, top + 6)).size == (8, 6)
            assert (part.float().mean((1, 2)) - torch.tensor([10.0, 60.0 * i, 9.0])).abs().max() < 12

    def test_longtext_and_cvtg(self, tmp_path):
        prompts = read_prompts("longtext", put_lines(tmp_path / "t.jsonl", [SIGN])).prompts
        self.lay_out(tmp_path, "longtext", prompts, 4)
        names = [file.split("/")[-1] for file in sorted(glob.glob(f"{tmp_path}/images/*.png"))]
        assert [(int(name.split("_")[0]), name) for name in names] == [(7, f"0007_{n}.png") for n in (1, 2, 3, 4)]
        prompts = read_prompts("cvtg", put_cvtg(tmp_path / "CVTG-2K")).prompts
        self.lay_out(tmp_path / "c", "cvtg", prompts, 1)
        assert all(
            (tmp_path / f"c/images/{s}/{a}/0.png").is_file() for s in ("CVTG", "CVTG-Style") for a in (2, 3, 4, 5)
        )

    def test_what_is_right_is_left_alone_and_what_was_painted_anew_is_not(self, tmp_path):
        prompts = read_prompts("longtext", put_lines(tmp_path / "t.jsonl", [SIGN])).prompts
        painted = self.lay_out(tmp_path, "longtext", prompts, 2)
        target = tmp_path / "images" / "0007_2.png"
        before = target.stat().st_mtime_ns
        assert write_layout("longtext", prompts, painted, tmp_path / "images", "lens") == 0
        assert target.stat().st_mtime_ns == before
        put_picture(painted["0007"][1], (1, 2, 3), (4, 4))
        assert write_layout("longtext", prompts, painted, tmp_path / "images", "lens") == 1
        assert Image.open(target).size == (4, 4)
        target.unlink()
        assert write_layout("longtext", prompts, painted, tmp_path / "images", "lens") == 1


class TestOfficial:
    def test_longtext_and_cvtg_count_words_not_pictures(self, tmp_path):
        rows = [{"match_word_count": 1, "gt_word_count": 2}, {"match_word_count": 8, "gt_word_count": 8}]
        assert read_official("longtext", put_lines(tmp_path / "results.jsonl", rows)) == {"text": 0.9}
        areas = [
            {"benchmark_type": "CVTG", "area": 2, "correct_words": 1, "total_words": 2},
            {"benchmark_type": "CVTG-Style", "area": 2, "correct_words": 8, "total_words": 8},
            {"benchmark_type": "CVTG", "area": 3, "correct_words": 0, "total_words": 4},
        ]
        overall = {"word_accuracy": 0.64, "ned": 0.9, "clipscore": 0.8, "vqascore": 0.7, "total_images": 3}
        (tmp_path / "r.json").write_text(json.dumps({"overall_results": overall, "area_results": areas}))
        found = read_official("cvtg", tmp_path / "r.json")
        assert found == {"2": 0.9, "3": 0.0, "average": 0.64, "ned": 0.9, "clip": 0.8, "vqa": 0.7}

    def test_oneig_takes_the_newest_table_of_each_dimension(self, tmp_path):
        tables = {
            "alignment_score_EN_2026-01-01_00-00-00": ("alignment", 0.1),
            "alignment_score_EN_2026-02-01_00-00-00": ("alignment", 0.8),
            "alignment_score_ZH_2026-03-01_00-00-00": ("alignment", 0.2),
            "alignment_prompt_score_EN_2026-03-01_00-00-00": ("alignment", 0.3),
            "text_score_EN_2026-02-01_00-00-00": ("ED,CR,WAC,text score", 0.9),
            "reasoning_score_EN_2026-02-01_00-00-00": ("reasoning", 0.3),
            "style_score_EN_2026-02-01_00-00-00": ("style", 0.4),
            "style_style_score_EN_2026-02-01_00-00-00": ("style", 0.7),
        }
        for name, (columns, value) in tables.items():
            cells = ",".join(["5"] * columns.count(",") + [str(value)])
            (tmp_path / f"{name}.csv").write_text(f",{columns}\nother,{cells.replace(str(value), '0')}\nlens,{cells}\n")
        row = {"align": 0.8, "text": 0.9, "reasoning": 0.3, "style": 0.4}
        assert read_official("oneig", tmp_path) == row
        (tmp_path / "diversity_score_EN_2026.csv").write_text(",anime,total average\nlens,0.5,0.1\n")
        assert read_official("oneig", tmp_path) == {**row, "diversity": 0.1, "overall": pytest.approx(0.5)}
        with pytest.raises(ValueError, match="no row 'mine'"):
            read_official("oneig", tmp_path, model="mine")

    @pytest.mark.parametrize("benchmark", ["geneval", "oneig", "longtext", "cvtg"])
    @pytest.mark.parametrize("text", ["", "{}", "[1]", '{"tag": "dogs", "correct": true}', '{"gt_word_count": 0}'])
    def test_other_files_are_refused(self, tmp_path, benchmark, text):
        (tmp_path / "file").write_text(text)
        with pytest.raises(ValueError, match=f"results: expected what the official scorer of {benchmark} writes"):
            read_official(benchmark, tmp_path / "file")

    def test_the_papers_overall_numbers_are_the_means_of_its_own(self):
        # Numbers of competitors are rounded to hundredths in places.
        for benchmark, count in (("geneval", 6), ("oneig", 5)):
            for name, row in paper_rows(benchmark).items():
                parts = [value for column, value in row.items() if column != "overall"]
                if name != "Lens, no rewriter":
                    close = 0.0011 if name in ("Lens", "Lens-Turbo", "Qwen-Image") else 0.009
                    assert len(parts) == count and row["overall"] == pytest.approx(sum(parts) / count, abs=close), name
        for name, row in paper_rows("cvtg").items():
            regions = [row[area] for area in "2345" if area in row]
            assert name == "Lens, no rewriter" or min(regions) < row["average"] < max(regions)

    def test_every_table_stands_in_the_documentation_beside_its_command(self):
        page = (Path(script.__file__).parents[1] / "docs/evaluate.md").read_text()
        sections = {part.split("\n")[0]: part.split("\n## ")[0] for part in page.split("\n### ")[1:]}
        for name, make in (
            ("GenEval", geneval),
            ("OneIG-EN", oneig),
            ("OneIG-ZH", oneig),
            ("LongText-EN", longtext),
            ("CVTG", cvtg),
        ):
            language = "zh" if name == "OneIG-ZH" else "en"
            assert paper_table(make().benchmark, language) in sections[name]
            (command,) = re.findall(r"python -m experiments\.evaluate (.+)", sections[name])
            with monkeypatched_evaluate() as seen:
                script.cli(command.split())
            assert seen[0].benchmark == make().benchmark and seen[0].language == language


@contextmanager
def monkeypatched_evaluate():
    """Commands are read, and nothing is done."""
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        patch.setattr(script, "evaluate", seen.append)
        yield seen


class TestRuns:
    def test_geneval_is_painted_laid_out_and_goes_on(self, run, tmp_path, capsys):  # noqa: F811
        config = replace(
            geneval(), prompts=put_lines(tmp_path / "m.jsonl", [DOG, TWO]), checkpoint=run, out=tmp_path / "out",
            num_images_per_prompt=2, height=16, width=16, mu="own", num_steps=1, guidance_scale=1.0,
        )  # fmt: skip
        put_lines(tmp_path / "r.jsonl", [{"tag": "counting", "correct": True}])
        result = evaluate(replace(config, results=tmp_path / "r.jsonl"))
        pictures = {file: file.read_bytes() for file in (tmp_path / "out/images").glob("*/samples/*.png")}
        assert len(pictures) == 4 and len(set(pictures.values())) == 4
        assert result["rows"] == {"official": {"count": 1.0, "overall": 1.0}} and not result["whole"]
        assert re.fullmatch("[0-9a-f]{12}", result["weights_sha256"]) and result["refused"] == 0
        assert len(result["config_hash"]) == 12 and "versions" in result["provenance"]
        assert json.loads((tmp_path / "out/result.json").read_text())["paper"]["Lens"]["overall"] == 0.93
        capsys.readouterr()
        evaluate(config)
        assert "4 of 4 pictures are there already" in capsys.readouterr().out
        assert {file: file.read_bytes() for file in pictures} == pictures

    def test_canvases_are_taken_in_turn_and_scored_apart(self, run, tmp_path, monkeypatch):  # noqa: F811
        monkeypatch.setattr(script, "open_detector", lambda *_, **__: lambda picture: [])
        config = replace(
            geneval(), prompts=put_lines(tmp_path / "m.jsonl", [DOG, TWO, COUNT]), checkpoint=run, out=tmp_path / "out",
            num_images_per_prompt=2, canvases=((16, 16), (16, 24)), mu="own", num_steps=1, guidance_scale=1.0,
            detector=tmp_path,
        )  # fmt: skip
        result = evaluate(config)
        sizes = [Image.open(tmp_path / f"out/images/{key:05d}/samples/0001.png").size for key in range(3)]
        assert sizes == [(16, 16), (24, 16), (16, 16)]
        assert {size: row["pictures"] for size, row in result["parts"]["size"].items()} == {"16x16": 4, "16x24": 2}
        assert 0 < result["diversity"]["all"] < 1 and result["missing_files"] == 0
        (tmp_path / "out/images/00001/samples/0001.png").unlink()
        assert evaluate(replace(config, painted=True))["missing_files"] == 1

    def test_the_scene_suite_of_a_run(self, run, tmp_path):  # noqa: F811
        config = EvaluateConfig(
            checkpoint=run, out=tmp_path / "out", num_prompts=12, variety=2, num_steps=1, guidance_scale=1.0
        )
        scores = evaluate(config)["scores"]
        assert {name: scores[name]["num"] for name in ("trained", "unseen", "withheld", "short")} == dict.fromkeys(
            ("trained", "unseen", "withheld", "short"), 12
        )
        trained = scores["trained"]
        assert (
            sum(one["num"] for one in trained["by_canvas"].values())
            == 12
            == sum(one["num"] for one in trained["by_kind"].values())
        )
        for measure in ("strict", "loose"):
            low, high = trained[f"{measure}_interval"]
            assert low <= trained[measure] <= high and low < high
        assert 0 < scores["diversity"] < 1

    def test_bad_rows_stop_it_unless_they_may_be_left_out(self, tmp_path):
        config = replace(
            geneval(), prompts=put_lines(tmp_path / "m.jsonl", [DOG, {}]), painted=True, out=tmp_path / "o"
        )
        with pytest.raises(ValueError, match="prompts: 1 bad rows in .*, first line 2: prompt is missing or empty"):
            evaluate(config)
        assert evaluate(replace(config, skip_bad=True))["bad"] == {"prompt is missing or empty": 1}
        with pytest.raises(ValueError, match="evaluation_metadata.jsonl of github.com/djghosh13/geneval"):
            evaluate(geneval())

    def test_the_dry_run_counts_pictures_and_flops(self):
        text = price(replace(cvtg(), text_tokens=256, num_steps=4, guidance_scale=1.0, gpu="a100_80gb", mfu=0.5))
        # 17.4 TFLOP a forward with 4,096 image and 256 text tokens; 6.06 GFLOP a text token, template included; 10.47 decoding.
        total = 2000 * (4 * 17.4 + 0.00606 * (256 + 97) + 10.47) * 1e12
        assert "pictures            2,000, 4 steps, guidance 1" in text
        assert float(re.search(r"FLOPs in all +(\S+),", text)[1]) == pytest.approx(total, rel=2e-3)
        assert float(re.search(r"GPU-hours +(\S+) on", text)[1]) == pytest.approx(total / 156e12 / 3600, rel=5e-3)
        assert "4,480" in price(oneig()) and "640" in price(longtext())

    def test_what_does_not_suit_is_refused(self, tmp_path):
        for change, message in [
            ({"detector": tmp_path}, "detector: expected none for scenes"),
            ({"num_images_per_prompt": 2}, "expected none for the scene suite"),
            ({"texts": ("a",)}, "prompts are the benchmark's"),
            ({"model_name": "../a"}, "model_name: expected letters"),
        ]:
            with pytest.raises(ValueError, match=message):
                replace(scenes(), **change)
        with pytest.raises(ValueError, match="since CVTG's layout has one picture"):
            replace(cvtg(), num_images_per_prompt=4)
        with pytest.raises(ValueError, match="square grid, got 3"):
            replace(oneig(), num_images_per_prompt=3)
        with pytest.raises(SystemExit, match="^evaluate: prompts: expected the benchmark's own, got none"):
            script.cli(["longtext"])
