"""What ``mkdocs.yml`` needs beside mkdocs: links out of ``docs/`` become paths of the repository, and no dates are kept."""

import re
from pathlib import Path, PurePosixPath
from typing import Any

__all__ = ["on_page_markdown", "on_post_build", "show_outside_links"]

_LINK = re.compile(r"\[([^\]]*)\]\((\.\./[^)\s]+)\)")


def show_outside_links(markdown: str) -> str:
    """Name files outside the site, which it does not hold.

    Args:
        markdown: of a page in ``docs/``.

    Returns:
        The same with ``[text](../path)`` as text and path.

    Example:
        >>> show_outside_links("see [results](../experiments/results/rl.json), [FAQ](faq.md)")
        'see results (`experiments/results/rl.json`), [FAQ](faq.md)'
    """
    return _LINK.sub(lambda match: f"{match[1]} (`{PurePosixPath(match[2].removeprefix('../'))}`)", markdown)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return show_outside_links(markdown)


def on_post_build(config: Any, **_: Any) -> None:
    """Called by mkdocs at the end: files that hold the time of the build would make every build another one."""
    for name in ("sitemap.xml", "sitemap.xml.gz"):
        Path(config["site_dir"], name).unlink(missing_ok=True)
    for page in Path(config["site_dir"]).rglob("index.html"):
        page.write_text(re.sub(r"\n<!--\nMkDocs version : .*?-->\n?", "\n", page.read_text(), flags=re.DOTALL))
