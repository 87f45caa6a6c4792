"""The parity page: every recorded difference is there, does what its kind says, and leaves our code as it was."""

import doctest
import json
import math
import re

import pytest
import torch

from experiments import parity, parity_plants
from experiments.parity import (
    BEGIN,
    END,
    ROOT,
    TRAPS,
    ParityConfig,
    cli,
    differences,
    make_report,
    page_numbers,
    render,
)
from experiments.parity_cases import Outcome, errors, load_transformer_case, sampling_run, text_features, velocity
from experiments.parity_measures import GROUPS
from lensmini.nn import blocks
from lensmini.nn.rope import apply_rotary
from lensmini.packed import Layout
from tests.golden_cases import golden

PORT_NOTES = {
    "T0": {"T0-layers"},
    "T1": {"T1-batch-norm"},
    "T2": {"T2-pairs", "T2-centre"},
    "T3": {"T3-order", "T3-one", "T3-gate"},
    "T4": {"T4-patch-order"},
    "T5": {"T5-template", "T5-cut"},
    "T6": {"T6-flux-shift"},
    "T7": {"T7-mxfp4-config"},
    "T8": {"T8-causal", "T8-windows"},
    "norm-rescaled guidance": {"guidance"},
    "timestep/1000 and x1000 compose": {"L-compose"},
    "the block returns (text, image)": {"L-block-result"},
    "YaRN must be on": {"L-yarn"},
}
TABLE = {
    "QK-norm eps": {"qk-eps"},
    "mu": {"mu-constant", "mu-exponent"},
    "guidance": {"guidance"},
    "blank negative": {"blank-negative-zero-length", "blank-negative-template"},
    "blank positive": {"blank-positive"},
    "odd-size centring": {"odd-centre"},
    "text positions": {"text-step"},
    "date in the system message": {"date"},
    "last text feature": {"last-layer-norm"},
    "YaRN correction range": {"yarn-range"},
    "mask fill": {"mask-fill"},
    "float to uint8": {"uint8"},
    "token budget": {"token-budget"},
    "timestep in training": {"training-timestep"},
    "training shift": {"training-shift"},
    "fp16": {"fp16-clip"},
    "unused code": {"unused-sinusoid"},
    "dead weights": {"dead-weights"},
}
TOGETHER = {"all-sdcpp", "all-comfyui"}
EQUIVALENT = {"blank-negative-zero-length", "mask-fill", "fp16-clip", "dead-weights"}
UNMEASURED = {"T7-mxfp4-config", "date", "unused-sinusoid"}
SIZES = [(64, 32, 170), (1536, 64, 4096)]
"""Width, head width and feed-forward width of dit_b_blocks_odd and of the released model."""
PAGE = ROOT / "docs" / "parity.md"
RESULTS = ROOT / "experiments" / "results" / "parity.json"


@pytest.fixture(scope="module")
def report():
    return make_report()


@pytest.fixture(scope="module")
def rows(report):
    return {row["name"]: row for row in report["rows"]}


@pytest.fixture
def fast(report, monkeypatch):
    """The script with the measurements already made."""
    monkeypatch.setattr(parity, "make_report", lambda: report)


def test_every_recorded_trap_and_disagreement_has_its_rows(rows):
    names = set().union(*PORT_NOTES.values(), *TABLE.values(), TOGETHER)
    assert rows.keys() == names and len(TRAPS) == len(names)
    assert {row["group"] for row in rows.values()} == set(GROUPS)


def test_ours_is_the_published_answer_in_every_row(rows):
    for name, row in rows.items():
        for where, error in row["errors"].items():
            assert error["ours"] < 1e-5 and error["ours_rms"] < 1e-5, (name, where)


def test_harmful_rows_harm_and_equivalent_rows_do_not(rows):
    assert {name for name, row in rows.items() if row["kind"] == "equivalent"} == EQUIVALENT
    assert {name for name, row in rows.items() if row["kind"] == "unmeasured"} == UNMEASURED
    for name, row in rows.items():
        planted = {where: error["planted"] for where, error in row["errors"].items()}
        if name in UNMEASURED:
            assert not planted and len(row["note"]) > 40, name
        elif name in EQUIVALENT:
            assert planted and max(planted.values()) < 1e-5, name
        elif name == "qk-eps":
            # What the page says of it: large where activations are tiny, invisible where they are not.
            assert planted["velocity"] > 0.01 and planted["velocity, usual size"] < 1e-4
        else:
            assert planted and min(planted.values()) > 1e-3, name


@pytest.mark.parametrize(
    ("name", "mu"), [("mu-constant", 1.83), ("mu-exponent", math.log(1.83)), ("T6-flux-shift", 1.15)]
)
def test_the_error_of_the_times_is_the_one_that_two_shifts_give(rows, name, mu):
    published = golden("scheduler_a")[0]["s20_h1024_w1024.sigmas"][1:-1].double()
    linear = torch.arange(19, 0, -1).double() / 20
    planted = 1 / (1 + math.exp(-mu) * (1 - linear) / linear)
    expected = (planted - published).abs().max() / published.max()
    assert rows[name]["errors"]["times"]["planted"] == pytest.approx(float(expected), rel=1e-4)


def test_the_size_of_the_differences_that_have_a_closed_form(rows):
    # One grey level of 255; the norm of the last feature by the published tensors; the medians of two logit-normals.
    assert rows["uint8"]["errors"]["pixels"]["planted"] == pytest.approx(1 / 255, rel=1e-6)
    tensors, _ = golden("text_features_a")
    mask = tensors["inputs.attention_mask"].bool()
    mask[:, :5] = False
    right, normed = tensors["outputs.features.2"][mask], tensors["outputs.final_norm_of_last"][mask]
    wrong = (normed - right).abs().max() / right.abs().max()
    assert rows["last-layer-norm"]["errors"]["features"]["planted"] == pytest.approx(float(wrong), rel=1e-4)
    # sigmoid(x + a) - sigmoid(x) is largest at x = -a / 2.
    gap = math.tanh((1.06 - 0.5) / 4)
    assert rows["training-shift"]["errors"]["training times"]["planted"] == pytest.approx(gap, rel=0.01)
    tokens = golden("latents_a")[0]
    statistics = [tokens[f"bn.running_{name}"].double() for name in ("mean", "var")]
    change = tokens["decode.tokens"] * ((statistics[1] + 1e-4).sqrt() - 1) + statistics[0]
    skipped = change.abs().max() / tokens["decode.vae_latent"].abs().max()
    assert rows["T1-batch-norm"]["errors"]["autoencoder latent"]["planted"] == pytest.approx(float(skipped), rel=1e-4)


@pytest.mark.parametrize("key", ["h4_w4_t5", "h5_w8_t9", "h3_w7_t6", "h1_w1_t1"])
def test_planted_positions_differ_from_the_published_tables_as_they_say(key):
    tensors, meta = golden("rope_a")
    grid = next(grid for grid in meta["grids"] if grid["key"] == key)
    height, width = grid["height"], grid["width"]
    layout = Layout.build([(height, width)], text_lengths=[grid["text_len"]])

    def tables(**rule):
        return parity_plants.Positions(meta["axes_dims_rope"], **rule)(layout)

    def positions(table, band):
        # Position 1 turns the first frequency of each band by one radian.
        return (torch.atan2(table.sin[:, band], table.cos[:, band]) / 1.0).double()

    def angle(numbers):
        return torch.remainder(numbers.double() + math.pi, 2 * math.pi) - math.pi

    image, text = tables()
    assert (image.cos - tensors[f"{key}.img_cos"]).abs().max() < 5e-5
    assert (text.sin - tensors[f"{key}.txt_sin"]).abs().max() < 5e-5
    rows, columns = (
        numbers.flatten() for numbers in torch.meshgrid(*map(torch.arange, (height, width)), indexing="ij")
    )
    for start, shifts in (("-floor(n/2)", (height // 2, width // 2)), ("0", (0, 0))):
        image, _ = tables(start=start)
        assert (positions(image, 4) - angle(rows - shifts[0])).abs().max() < 1e-4
        assert (positions(image, 18) - angle(columns - shifts[1])).abs().max() < 1e-4
    assert positions(tables(start="0")[1], 0)[0].item() == pytest.approx(angle(torch.tensor(max(height, width))).item())
    num = grid["text_len"]
    even = grid["text_start"] + torch.linspace(0, num, num) if num > 1 else torch.tensor([grid["text_start"]])
    assert (positions(tables(stretch_text=True)[1], 0) - angle(even)).abs().max() < 1e-4


def test_exchanged_rows_are_the_half_split_rotation():
    model = load_transformer_case("dit_b_blocks_odd")
    attention = model.transformer_blocks[0].attn
    with torch.no_grad():
        attention.norm_q.weight.copy_(torch.arange(32.0))
    before = attention.img_qkv.bias.detach().unflatten(0, (3, 2, 32)).clone()
    parity_plants.half_split_rotation(model)
    order = attention.norm_q.weight.long()
    after = attention.img_qkv.bias.detach().unflatten(0, (3, 2, 32))
    assert after[:2].equal(before[:2, :, order]) and after[2].equal(before[2]) and not after[0].equal(before[0])
    table, _ = model.rotary(Layout.build([(3, 2)]))
    heads = torch.randn(6, 2, 32, generator=torch.Generator().manual_seed(0))
    whole = torch.complex(heads[..., :16], heads[..., 16:]) * torch.complex(table.cos, table.sin)[:, None]
    rotated = torch.cat([whole.real, whole.imag], -1)
    assert (apply_rotary(heads[..., order], table) - rotated[..., order]).abs().max() < 1e-5


def test_equivalent_plants_are_really_there():
    """A plant that did nothing would look equivalent too."""
    tensors, _ = golden("dit_a_square")
    mask = tensors["inputs.encoder_hidden_states_mask"].bool()
    during = parity_plants.mask_with(0.0, mask)
    unmasked = velocity("dit_a_square", text=parity_plants.keep_all_text, during=during)
    assert (unmasked - tensors["outputs.sample"]).abs().max() > 0.1

    plain, clipped = (load_transformer_case("dit_b_blocks_odd") for _ in range(2))
    parity_plants.clip_streams(clipped)
    image, features = torch.full((1, 32, 4, 4), 1e8), [torch.full((1, 3, 24), 1.0)] * 4
    with torch.no_grad():
        states = [
            model(image, torch.ones(1), features, torch.ones(1, 3).bool(), capture_blocks=range(2)).hidden_states
            for model in (plain, clipped)
        ]
    # The second block starts from what the first one's clip left.
    assert states[0][0][0].abs().max() > 65504 and states[0][1][0].abs().max() > 10 * states[1][1][0].abs().max()

    model, spoilt = (load_transformer_case("dit_b_blocks_odd") for _ in range(2))
    parity_plants.noise_in_dead_weights(spoilt)
    changed = {name for name, value in model.named_parameters() if not value.equal(spoilt.get_parameter(name))}
    dead = golden("dit_a_square_grads")[1]["zero_gradient_parameters"]
    wholly = {name.replace("blocks.1.", "blocks.2.") for name in dead}
    partly = {f"transformer_blocks.2.{name}" for name in ("attn.txt_qkv.weight", "attn.txt_qkv.bias")}
    partly |= {f"transformer_blocks.2.txt_mod.1.{name}" for name in ("weight", "bias")}
    assert changed == wholly | partly
    pairs = [(value, spoilt.get_parameter(name)) for name, value in model.named_parameters()]
    # Head norm, output, norm, feed-forward, queries' rows, four of six vectors; the released sizes give 33,040,960.
    counts = [d + (e * e + e) + e + 3 * e * m + (e * e + e) + 4 * (e * e + e) for e, d, m in SIZES]
    assert counts[1] == 33_040_960 and sum(int((a != b).sum()) for a, b in pairs) == counts[0]


def test_nothing_stays_planted(report):
    assert blocks.packed_attention.__module__ == "lensmini.nn.attention"
    assert blocks.gated_residual.__module__ == "lensmini.nn.modulation"
    for name in ("dit_a_square", "dit_b_blocks_odd", "dit_c_eps_holes"):
        expected = golden(name)[0]["outputs.sample"]
        assert (velocity(name) - expected).abs().max() < 3e-5 * expected.abs().max()
    expected = golden("denoise_loop_a")[0]["outputs.final_latents"]
    assert (sampling_run() - expected).abs().max() < 1e-4 * expected.abs().max()
    with pytest.raises(ZeroDivisionError):
        velocity("dit_a_square", during=parity_plants.gate_the_sum(), text=lambda features, mask: 1 / 0)
    assert blocks.gated_residual.__module__ == "lensmini.nn.modulation"


def test_measuring_does_not_touch_the_global_random_state():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    velocity("dit_a_square", change=parity_plants.noise_in_dead_weights)
    text_features()
    assert torch.get_rng_state().equal(before)


def test_errors_are_relative_to_the_published_answer():
    outcome = Outcome(torch.tensor([3.0, 4.0]), torch.zeros(2), torch.tensor([3.0, 5.0]))
    found = errors(outcome)
    assert found["ours"] == pytest.approx(0.2) and found["ours_rms"] == pytest.approx(34**-0.5)
    assert found["planted"] == found["planted_rms"] == pytest.approx(1)
    with pytest.raises(ValueError, match=r"planted: expected the published shape \[2\]"):
        errors(outcome._replace(planted=torch.zeros(3)))


def test_the_page_is_in_step_with_the_numbers_and_with_what_is_measured_now(report):
    text, stored = PAGE.read_text(), json.loads(RESULTS.read_text())
    generated = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()
    assert generated == render(stored).strip()
    assert differences(text, report) == []
    words = [[{**row, "errors": None} for row in source["rows"]] for source in (stored, report)]
    assert words[0] == words[1], "run python -m experiments.parity again"
    assert stored["config_hash"] == report["config_hash"] and stored["cases"] == report["cases"]
    assert stored["command"] == "python -m experiments.parity" and re.fullmatch(r"[0-9a-f]{7,40}", stored["commit"])
    assert stored["versions"]["torch"] and stored["verdict"].startswith("reproduced")
    assert text.isascii() and "/work" not in text


def test_the_page_has_the_worst_row_first_in_every_group(report, rows):
    for part in render(report).split("### ")[1:]:
        numbers = [max(row.values(), default=0.0) for row in page_numbers(part).values()]
        assert numbers == sorted(numbers, reverse=True)
    assert page_numbers(render(report)).keys() == rows.keys()


@pytest.mark.parametrize("change", [1.6, 1 / 1.6])
def test_check_refuses_numbers_off_by_more_than_a_factor_of_one_and_a_half(report, change):
    page = render(report)
    moved = json.loads(json.dumps(report))
    error = next(row for row in moved["rows"] if row["name"] == "guidance")["errors"]["final latents"]
    error["planted"] *= change
    assert len(found := differences(page, moved)) == 1 and found[0].startswith("guidance, final latents: 0.076 on the")
    error["planted"] *= 1.2 / 1.6 if change > 1 else 1.6 / 1.2
    assert differences(page, moved) == []
    error["ours"] = 1e-3
    assert "ours is 1.0e-03 from" in differences(page, moved)[0]


def test_check_refuses_missing_and_extra_rows_and_equivalence_lost(report):
    lines = render(report).splitlines()
    without = "\n".join(line for line in lines if "`T3-gate`" not in line)
    assert [problem.split(":")[0] for problem in differences(without, report)] == ["T3-gate"]
    extra = "\n".join([*lines, "| new<br>`new-row` | a | b | c | 1e-06 | velocity **0.1** (rms 0.1) | |"])
    assert differences(extra, report) == ["new-row: on the page only"]
    moved = json.loads(json.dumps(report))
    next(row for row in moved["rows"] if row["name"] == "fp16-clip")["errors"]["velocity"]["planted"] = 1e-4
    assert len(differences("\n".join(lines), moved)) == 1


def test_the_script_writes_page_and_numbers_and_then_its_check_passes(fast, tmp_path, capsys):
    page, results = tmp_path / "page.md", tmp_path / "numbers.json"
    page.write_text(f"# Before\n\n{BEGIN}\nwhat was here\n{END}\n\nAfter\n")
    words = ["--page", str(page), "--results", str(results)]
    cli(words)
    text = page.read_text()
    assert text.startswith(f"# Before\n\n{BEGIN}\n") and text.endswith(f"{END}\n\nAfter\n") and "what was" not in text
    stored = json.loads(results.read_text())
    cli([*words, "--check"])
    page.write_text(text.replace("**0.076**", "**0.76**"))
    with pytest.raises(SystemExit, match=r"parity: .*guidance, final latents: 0\.76 on the page, 0\.076 now"):
        cli([*words, "--check"])
    assert "**0.76**" in page.read_text() and json.loads(results.read_text()) == stored
    cli(words)
    assert page.read_text() == text
    assert capsys.readouterr().out.count("rows; ours at most") == 3


@pytest.mark.parametrize("text", ["nothing", f"{END}\n{BEGIN}", f"{BEGIN}\n{END}\n{BEGIN}\n{END}"])
def test_a_page_without_its_marker_lines_is_refused_before_anything_is_written(text, fast, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="once each, in this order"):
        parity.main(ParityConfig(page=page, results=tmp_path / "numbers.json"))
    assert page.read_text() == text and list(tmp_path.iterdir()) == [page]


def test_the_table_by_implementation_names_all_that_differ(report):
    part = render(report).split("### By implementation")[1]
    assert "| stable-diffusion.cpp |" in part and "mu *(secondary)*" in part.split("| ComfyUI |")[1].split("\n")[0]
    assert "secondary" not in part.split("| stable-diffusion.cpp |")[1].split("\n")[0]
    assert "clipping in fp16 (equivalent)" in part.split("| diffusers' port |")[1].split("\n")[0]


def test_examples_run():
    found = doctest.testmod(parity, optionflags=doctest.ELLIPSIS)
    assert found.attempted and not found.failed
