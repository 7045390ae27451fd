"""`lorasmith unpack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def unpack(
    archives: Annotated[
        list[Path],
        typer.Argument(help="Archives or parts, manifest.json beside them; or their folder.", metavar="FILE"),
    ],
    output: Annotated[Path, typer.Option(help="Folder to unpack to.", metavar="DIR")],
) -> None:
    """Unpack a package that was fetched: everything is checked before anything is used.

    Links, devices, climbing, doubled and foreign names are refused, and nothing is left behind on failure.
    Exit code 1 when the package is damaged.

    Example: `lorasmith unpack download/merged_model.tar.gz --output model`
    """
    from lorasmith.cli.console import bar, console
    from lorasmith.packaging.unpack import unpack as unpack_archives

    unpack_archives(archives, output, progress=bar)
    names = ", ".join(sorted(path.name for path in output.iterdir() if path.is_dir()))
    console().print(f"Unpacked and checked: {names} in {output}", markup=False, soft_wrap=True)
