"""Find the files of a language model: a folder, a pipeline's sub-folder, or a Hub repository fetched into one.

transformers are then given a folder, because some of their calls ask the network about a repository regardless.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lensmini.checkpoints.files import CheckpointError, list_names, read_header, read_json
from lensmini.checkpoints.folders import find_local, inside

__all__ = ["TEXT_FILES", "fetch_files", "find_model_folder"]

TEXT_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
"""What a tokenizer may consist of."""
MODEL_FILES = ("*.json", "*.safetensors")
INDEX = "model.safetensors.index.json"


def find_model_folder(path_or_repo: str | Path, subfolder: str | None, hub: Mapping[str, Any]) -> Path:
    """The folder with a language model's ``config.json`` and safetensors, whose headers are checked.

    Args:
        path_or_repo: folder or Hub repository; an existing folder wins.
        subfolder: folder inside; by default ``text_encoder`` in a pipeline, else none.
        hub: ``revision``, ``cache_dir`` and ``local_files_only`` of :func:`huggingface_hub.snapshot_download`.

    Returns:
        The folder. A repository's tokenizer files are fetched too, its own and those in ``tokenizer``.

    Raises:
        CheckpointError: naming what is not there or not as expected.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "config.json").write_text("{}")
        ...     save_file({"x": torch.zeros(1)}, Path(folder, "model.safetensors"))
        ...     find_model_folder(folder, None, {}) == Path(folder)
        True
    """
    path = find_local(path_or_repo)
    fetched = path is None or not path.is_dir()
    if path is None or fetched:
        path = fetch_files(path_or_repo, ["config.json", "model_index.json", "*/config.json"], hub)
    if subfolder is None and not (path / "config.json").exists() and (path / "model_index.json").exists():
        subfolder = "text_encoder"
    folder = path / (subfolder or "")
    if not folder.resolve().is_relative_to(path.resolve()):
        raise CheckpointError(f"{path_or_repo}: expected a subfolder inside it, got {subfolder}")
    if fetched:
        start = f"{subfolder}/" if subfolder else ""
        fetch_files(path_or_repo, [f"{start}{pattern}" for pattern in MODEL_FILES], hub, ignore=[f"{start}*/*"])
        fetch_files(
            path_or_repo, [f"{inner}{pattern}" for pattern in TEXT_FILES for inner in (start, "tokenizer/")], hub
        )
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder}: expected a whole model, found an adapter (adapter_config.json)")
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder / 'config.json'}: expected a file, found none")
    read_json(inside(folder, "config.json"))
    weights = {file.name: file for file in sorted(folder.glob("*.safetensors"))}
    if not weights:
        others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern))
        found = f"only {list_names(others)}, which could run code" if others else "none"
        raise CheckpointError(f"{folder}: expected weights in .safetensors files, found {found}")
    for name in weights:
        read_header(inside(folder, name))
    if (folder / INDEX).exists():
        shards = read_json(inside(folder, INDEX)).get("weight_map")
        shards = shards.values() if isinstance(shards, dict) and shards else [shards]
        wrong = sorted({str(shard) for shard in shards if not isinstance(shard, str) or shard not in weights})
        if wrong:
            raise CheckpointError(
                f"{folder / INDEX}: expected names of safetensors beside it, found {list_names(wrong)}"
            )
    return folder


def fetch_files(
    repo: str | Path, patterns: Sequence[str], hub: Mapping[str, Any], *, ignore: Sequence[str] = ()
) -> Path:
    """Fetch the files of a Hub repository that match ``patterns``, or find them in the cache.

    Args:
        repo: its id; what can only be meant as a path is an error and never asked for.
        patterns: of names, ``*`` crosses folders.
        hub: as :func:`find_model_folder`.
        ignore: patterns of names to leave out.

    Returns:
        The local folder of the repository's revision.

    Raises:
        CheckpointError: naming the repository and how to work offline.

    Example:
        >>> try:
        ...     fetch_files("./no/such/folder", ["*.json"], {})
        ... except CheckpointError as error:
        ...     print(error)
        ./no/such/folder: expected a folder, found nothing there
    """
    from huggingface_hub import snapshot_download

    text = str(repo)
    local = find_local(text)
    if local is not None and local.is_file():
        raise CheckpointError(f"{text}: expected a folder or a Hub repository, found a file")
    if isinstance(repo, Path) or text.startswith(("/", ".", "~")) or text.count("/") > 1 or "\\" in text:
        raise CheckpointError(f"{text}: expected a folder, found nothing there")
    try:
        return Path(snapshot_download(text, allow_patterns=[*patterns], ignore_patterns=[*ignore] or None, **hub))
    except Exception as error:
        raise CheckpointError(
            f"{text}: expected a folder, or a Hub repository that can be reached or was fetched before, but "
            f"{' '.join(str(error).split())[:400]}"
        ) from error
