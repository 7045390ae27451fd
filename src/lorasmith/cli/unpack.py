"""`lorasmith unpack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorasmith.cli.options import PublicKey


def unpack(
    archives: Annotated[
        list[Path],
        typer.Argument(help="Archives or parts, manifest.json beside them; or their folder.", metavar="FILE"),
    ],
    output: Annotated[Path, typer.Option(help="Folder to unpack to.", metavar="DIR")],
    public_key: PublicKey = None,
) -> None:
    """Unpack a package that was fetched: everything is checked before anything is used.

    Links, devices, climbing, doubled and foreign names are refused, and nothing is left behind on failure.
    Exit code 1 when the package is damaged.

    Example: `lorasmith unpack download/merged_model.tar.gz --output model`
    """
    from lorasmith.cli.console import bar, console
    from lorasmith.packaging.signing import Verifier
    from lorasmith.packaging.unpack import unpack as unpack_archives

    verifier = Verifier(key=public_key) if public_key else None
    unpack_archives(archives, output, verifier=verifier, progress=bar)
    names = ", ".join(sorted(path.name for path in output.iterdir() if path.is_dir()))
    console().print(f"Unpacked and checked: {names} in {output}", markup=False, soft_wrap=True)
