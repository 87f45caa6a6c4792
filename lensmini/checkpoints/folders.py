"""Where a checkpoint's files are: a folder with shards or a single file, or the local copy of a Hub repository."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from lensmini.checkpoints.files import CheckpointError, StoredFile, list_names, read_header, read_json

__all__ = ["INDEX_SUFFIX", "WEIGHTS_NAME", "find_local", "find_source", "inside", "read_weights_folder"]

INDEX_SUFFIX = ".safetensors.index.json"
WEIGHTS_NAME = "diffusion_pytorch_model"
_PICKLED = (".bin", ".pt", ".ckpt", ".pth", ".pkl", ".pickle")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)


def find_source(
    path_or_repo: str | os.PathLike[str],
    *,
    allow_patterns: Sequence[str],
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """A local path as it is, or the local copy of a Hub repository; a path that exists wins.

    Args:
        path_or_repo: path or ``owner/name``. What looks like a path (a ``Path``, a leading ``/``, ``.`` or ``~``, the
            name of a safetensors file) is never asked of the Hub.
        allow_patterns: what to download, relative to the repository.
        revision: branch, tag or commit.
        cache_dir: the Hub's cache folder.
        local_files_only: use only what is in the cache; the Hub's own ``HF_HUB_OFFLINE`` does the same.

    Returns:
        A path that exists.

    Raises:
        CheckpointError: if there is neither.

    Example:
        >>> find_source(".", allow_patterns=[])
        PosixPath('.')
    """
    text = os.fspath(path_or_repo)
    path = find_local(text)
    if path is not None:
        return path
    if isinstance(path_or_repo, os.PathLike) or text.endswith(".safetensors") or not _REPOSITORY.fullmatch(text):
        raise CheckpointError(
            f"{text[:500]}: expected a folder, a safetensors file or a Hub repository, found no such file"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError("loading from the Hub needs huggingface_hub: pip install lensmini") from error
    where = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
    try:
        return Path(snapshot_download(text, allow_patterns=list(allow_patterns), **where))
    except Exception as error:  # the Hub's client raises its own, its HTTP library's and the system's errors
        cause = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{text}: expected a local path, or a Hub repository that is cached or can be reached, found "
            f"{type(error).__name__}: {cause}. To work offline, download the repository beforehand and give its folder"
        ) from error


def find_local(text: str | os.PathLike[str]) -> Path | None:
    """The file or folder of that name, ``~`` expanded; None if there is none or there cannot be one.

    Example:
        >>> find_local("."), find_local("no/such/file"), find_local("~no_such_user/a"), find_local("a" * 300)
        (PosixPath('.'), None, None, None)
    """
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # a name too long, an unknown user, a NUL
        return None


def read_weights_folder(folder: Path) -> dict[Path, StoredFile]:
    """Find and check the weights of one component: a single file, or shards with an index.

    An index is preferred, as diffusers does; without diffusers' names the folder must hold exactly one index or one
    safetensors file. Files may not lie outside the folder, by name or by symbolic link; only a snapshot in a Hub cache
    may link to that cache's own blobs.

    Args:
        folder: a folder that exists.

    Returns:
        The header of every file, in the index's order.

    Raises:
        CheckpointError: if there are no safetensors, a shard is missing or is not the one the index describes.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"x": torch.zeros(2)}, Path(folder, "diffusion_pytorch_model.safetensors"))
        ...     [list(stored.values) for stored in read_weights_folder(Path(folder)).values()]
        [['x']]
    """
    names = sorted(os.listdir(folder))
    indices = [name for name in names if name.endswith(INDEX_SUFFIX)]
    singles = [name for name in names if name.endswith(".safetensors")]
    by_name = [name for name in (WEIGHTS_NAME + INDEX_SUFFIX, f"{WEIGHTS_NAME}.safetensors") if name in names]
    chosen = (by_name or indices or singles)[:1]
    if chosen and (by_name or len(indices or singles) == 1):
        path = inside(folder, chosen[0])
        return _read_index(folder, path) if chosen[0].endswith(INDEX_SUFFIX) else {path: read_header(path)}
    pickled = [name for name in names if name.endswith(_PICKLED)]
    if indices or singles:
        found = f"several and none of that name: {list_names(indices or singles)}"
    elif pickled:
        found = f"only files that could run code when read: {list_names(pickled)}; convert them to safetensors"
    else:
        found = f"none among {list_names(names)}"
    raise CheckpointError(
        f"{folder}: expected {WEIGHTS_NAME}.safetensors or {WEIGHTS_NAME}{INDEX_SUFFIX}, found {found}"
    )


def inside(folder: Path, name: str) -> Path:
    """The path of the file ``name`` of ``folder``, if it does not lead out of the folder or its Hub cache.

    Raises:
        CheckpointError: if there is none, or it is a symbolic link to anywhere else.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "config.json").write_text("{}")
        ...     inside(Path(folder), "config.json").name
        'config.json'
    """
    path = folder / name
    if not path.exists():
        raise CheckpointError(f"{path}: expected a file, found none")
    real, roots = path.resolve(), [folder.resolve()]
    for parent in (folder.absolute(), *folder.absolute().parents):
        if parent.parent.name == "snapshots" and parent.parent.parent.name.startswith("models--"):
            roots.append(parent.parent.parent.resolve() / "blobs")
    if not any(real.is_relative_to(root) for root in roots):
        raise CheckpointError(f"{path}: expected a file inside its folder, found a link to {real}")
    return path


def _read_index(folder: Path, path: Path) -> dict[Path, StoredFile]:
    index = read_json(path)
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: expected a weight_map from tensors to files and a metadata object")
    shards: dict[str, set[str]] = {}
    for key, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard, re.ASCII):
            raise CheckpointError(f"{path}: expected plain names of safetensors files, found {str(shard)[:200]!r}")
        shards.setdefault(shard, set()).add(key)
    files: dict[Path, StoredFile] = {}
    for shard, keys in shards.items():
        shard_path = inside(folder, shard)
        stored = files[shard_path] = read_header(shard_path)
        if stored.values.keys() != keys:
            missing, extra = sorted(keys - stored.values.keys()), sorted(stored.values.keys() - keys)
            raise CheckpointError(
                f"{shard_path}: expected the tensors of {path.name}, found missing {list_names(missing)}, "
                f"unexpected {list_names(extra)}"
            )
    total = sum(value.num_bytes for stored in files.values() for value in stored.values.values())
    if metadata.get("total_size", total) != total:
        raise CheckpointError(f"{path}: expected total_size {total}, found {metadata['total_size']!r}")
    return files
