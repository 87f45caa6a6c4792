import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lensmini.data.pictures import BadPicture, read_picture
from lensmini.data.sources import Dropped, FolderSource, ListSource, TarSource, Unit, open_source
from tests.data.hostile import Expected, encode, write_hostile_folder, write_hostile_tar


def everything(source):
    """Read by way of JSON, as another machine would."""
    units = [Unit.from_dict(json.loads(json.dumps(unit.to_dict()))) for unit in source.units()]
    return [sample for unit in units for sample in source.read(unit)]


def attempt(data):
    try:
        return read_picture(data)
    except BadPicture as error:
        return error


def check_folder(folder: Path, expected: Expected) -> None:
    samples = everything(FolderSource(folder))
    assert Counter(sample.key for sample in samples) == Counter(list(expected.fates))
    for sample in samples:
        fate = expected.fates[sample.key]
        if isinstance(sample, Dropped):
            assert sample.cause == fate, sample
            continue
        if sample.key in expected.captions:
            assert sample.caption_problem == expected.captions[sample.key]
            assert (sample.caption in ("a red circle", "a line")) == (not sample.caption_problem)
        picture = attempt(sample.picture)
        if isinstance(picture, BadPicture):
            assert fate in (picture.cause, "either"), (sample.key, fate, picture)
            continue
        assert fate in ("kept", "either"), (sample.key, fate)
        if sample.key in expected.pixels:
            pixels, tolerance = expected.pixels[sample.key]
            got = picture.image.permute(1, 2, 0).numpy().astype(int)
            assert got.shape == pixels.shape, sample.key
            assert np.abs(got - pixels).max() <= tolerance, sample.key


def test_every_file_of_a_hostile_folder_is_kept_or_dropped_once_by_its_cause(tmp_path):
    check_folder(tmp_path, write_hostile_folder(tmp_path, seed=0, num=500))


@pytest.mark.slow
def test_ten_thousand_hostile_files_in_bounded_memory(tmp_path):
    code = (
        "import sys, resource; from pathlib import Path\n"
        "from tests.data.hostile import write_hostile_folder; from tests.data.test_sources import check_folder\n"
        "folder = Path(sys.argv[1]); check_folder(folder, write_hostile_folder(folder, seed=1, num=10_000))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    kilobytes = int(done.stdout.split()[-1])
    assert kilobytes < 2_000_000, kilobytes


@pytest.mark.parametrize("cut", [False, True])
def test_every_sample_of_a_hostile_tar_is_kept_or_dropped_once_by_its_cause(tmp_path, cut):
    expected = write_hostile_tar(tmp_path / "x.tar", seed=2, cut=cut)
    samples = everything(TarSource(tmp_path / "x.tar", max_bytes=2_000_000))
    fates = [(s.key, s.cause if isinstance(s, Dropped) else "kept") for s in samples]
    again = [] if cut else [("x.tar/a/0", "duplicate key")]
    assert sorted(fates) == sorted([*expected.fates.items(), *again])
    for sample in samples:
        if sample.key in expected.pixels and not isinstance(sample, Dropped):
            pixels = expected.pixels[sample.key][0]
            assert np.array_equal(read_picture(sample.picture).image.permute(1, 2, 0).numpy(), pixels)
            assert sample.caption == f"number {sample.key[-1]}"


def test_a_compressed_tar_gives_the_same_samples(tmp_path):
    write_hostile_tar(tmp_path / "x.tar", seed=3)
    import gzip

    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "x.tar").write_bytes(gzip.compress((tmp_path / "x.tar").read_bytes()))
    assert everything(TarSource(tmp_path / "x.tar")) == everything(TarSource(tmp_path / "z" / "x.tar"))


def test_nonsense_inside_a_tar_is_named_and_costs_nothing_before_it(tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("0.png", "1.png"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    data = bytearray(out.getvalue())
    data[1024:1536] = b"\x55" * 512
    (tmp_path / "x.tar").write_bytes(data)
    assert [getattr(s, "cause", "kept") for s in everything(TarSource(tmp_path / "x.tar"))] == ["kept", "damaged tar"]


@pytest.mark.parametrize("file", ["a.txt", "a.json", "metadata.jsonl", "a.png"])
def test_a_fingerprint_changes_with_every_file_that_matters(tmp_path, file):
    for name in ("a.png", "a.txt", "a.json", "metadata.jsonl"):
        (tmp_path / name).write_text("{}")
    before = FolderSource(tmp_path).fingerprint()
    assert FolderSource(tmp_path).fingerprint() == before
    (tmp_path / file).write_text("{ }")
    assert FolderSource(tmp_path).fingerprint() != before


def test_a_file_that_changes_after_the_listing_is_a_cause(tmp_path):
    (tmp_path / "a.png").write_bytes(b"one")
    source = FolderSource(tmp_path)
    before, units = source.fingerprint(), source.units()
    (tmp_path / "a.png").write_bytes(b"other")
    assert [sample.cause for sample in source.read(units[0])] == ["changed since listing"]
    assert source.fingerprint() != before
    (tmp_path / "a.png").unlink()
    assert [sample.cause for sample in source.read(units[0])] == ["missing file"]


def test_a_unit_cannot_lead_out_of_the_folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    state = (tmp_path / "secret").stat()
    unit = Unit(0, "", (("../secret", "picture", state.st_size, state.st_mtime_ns, "", ""),))
    assert [s.cause for s in FolderSource(tmp_path / "in").read(unit)] == ["link out of the folder"]


def test_a_list_gives_its_lines_and_their_troubles(tmp_path):
    picture = encode(np.zeros((4, 4, 3), np.uint8), "PNG")
    for name in ("a.png", "b c.png"):
        (tmp_path / name).write_bytes(picture)
    lines = ["a.png", "", '{"path": "b c.png", "caption": "two", "n": 1}', "gone.png", "{oops", "a.png", '{"x": 1}']
    (tmp_path / "list").write_text("\n".join(lines))
    for size in (1, 2, 256):
        samples = everything(ListSource(tmp_path / "list", unit_size=size))
        got = [(s.key, s.cause if isinstance(s, Dropped) else s.caption) for s in samples]
        assert got == [
            ("a.png", None),
            ("b c.png", "two"),
            ("gone.png", "missing file"),
            ("list:5", "bad list entry"),
            ("list:6", "duplicate key"),
            ("list:7", "bad list entry"),
        ]
        assert samples[1].metadata == {"n": 1}


def test_units_cover_the_folder_once_whatever_their_size(tmp_path):
    for number in range(7):
        (tmp_path / f"{number}.png").write_bytes(b"x")
    keys = [[s.key for s in everything(FolderSource(tmp_path, unit_size=size))] for size in (1, 3, 100)]
    assert keys == [[f"{number}.png" for number in range(7)]] * 3


def test_a_source_is_told_by_what_it_is(tmp_path):
    (tmp_path / "tars").mkdir()
    write_hostile_tar(tmp_path / "tars" / "x.tar", seed=4)
    (tmp_path / "list").write_text("a\n")
    assert isinstance(open_source(tmp_path), FolderSource)
    assert isinstance(open_source(tmp_path / "tars"), TarSource)
    assert isinstance(open_source(tmp_path / "list"), ListSource)
    with pytest.raises(FileNotFoundError, match="nothing"):
        open_source(tmp_path / "nothing")
