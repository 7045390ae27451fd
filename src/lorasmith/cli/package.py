"""`lorasmith package`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorasmith.cli.options import AsJson


def package(
    run: Annotated[Path, typer.Argument(help="The run folder.", metavar="RUN")],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the package (RUN/package).", metavar="DIR")
    ] = None,
    compression: Annotated[str, typer.Option(help="gzip, zstd or none.")] = "gzip",
    part_size: Annotated[
        str | None, typer.Option(help="Cut archives into parts of this size, such as 2GB.", metavar="SIZE")
    ] = None,
    sign: Annotated[
        str | None,
        typer.Option(
            help="Private key (PEM) to sign with, or `sigstore`.", metavar="KEY", envvar="LORASMITH_SIGN"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Pack a run again: evidence and merged model as archives, a manifest, and SHA256SUMS.

    The same run gives the same archives on any machine and date. Times stay out of them.

    Example: `lorasmith package demo-output --output release`
    """
    from functools import partial

    from lorasmith.cli import views
    from lorasmith.cli.console import bar, console, show_record
    from lorasmith.files.seal import reseal
    from lorasmith.packaging.pack import pack
    from lorasmith.packaging.parts import parse_size
    from lorasmith.packaging.signing import Signer
    from lorasmith.reporting.page import write_report

    folder = output or run / "package"
    signer = None if sign is None else Signer(None if sign == "sigstore" else Path(sign))
    manifest = pack(
        run,
        folder,
        compression=compression,
        part_size=parse_size(part_size) if part_size else None,
        report=partial(write_report, timings=False),
        signer=signer,
        progress=bar,
    )
    reseal(run, folder)
    if as_json:
        show_record(manifest)
    else:
        views.show_package(manifest, console())
        console().print(f"Package: {folder}", markup=False, soft_wrap=True)
