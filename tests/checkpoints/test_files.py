"""Laws of the checked files beneath every format."""

import os
import stat

import pytest

from lensmini.checkpoints.files import CheckpointError, replace_file
from lensmini.checkpoints.folders import find_source


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_a_replaced_file_has_the_permissions_of_the_umask(mask, tmp_path):
    before = os.umask(mask)
    try:
        replace_file(tmp_path / "a", lambda part: part.write_bytes(b"new"))
        (tmp_path / "plain").write_bytes(b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / ("n" * 255)
    replace_file(path, lambda part: part.write_bytes(b"old"))

    def fail(part):
        part.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(path, fail)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("name", ["~no_such_user_of_this_machine/x", "a" * 300, "a\0b", "a/" * 3000, "./" + "a" * 300])
def test_a_name_that_no_file_can_have_is_one_clear_error(name, tmp_path):
    with pytest.raises(CheckpointError, match="expected"):
        find_source(name, allow_patterns=[], local_files_only=True, cache_dir=tmp_path)
