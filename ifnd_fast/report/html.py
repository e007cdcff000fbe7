"""Pages: a template filled in, with its pictures inside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ifnd_fast.report.plots import Picture
from ifnd_fast.runtime.checkpoint import write_atomically


def write_page(path: Path, page: str) -> Path:
    """Raises CommandError: it can't be written."""
    write_atomically(path, lambda file: file.write(page.encode(errors="backslashreplace")))  # a path that isn't text
    return path


def render_template(name: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ifnd_fast.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return environment.get_template(name).render(**values)


def inline(pictures: Sequence[Picture | None]) -> list[tuple[Picture, Markup]]:
    """Those that there are, each with its SVG as markup."""
    return [(picture, Markup(picture.svg)) for picture in pictures if picture]
