"""`lorasmith verify`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lorasmith.cli.options import AsJson, PublicKey


def verify(
    folder: Annotated[
        Path, typer.Argument(help="A package, an unpacked package, or a run folder.", metavar="DIR")
    ],
    public_key: PublicKey = None,
    rows: Annotated[
        Path | None,
        typer.Option(help="Your own copy of rows that were published as hashes (JSONL).", metavar="FILE"),
    ] = None,
    rejoined: Annotated[
        Path | None, typer.Option(help="With --rows: write the whole test set here.", metavar="FILE")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check every byte of a package, an unpacked package or a run against its hash.

    Finds every flipped bit, missing, added, renamed or swapped file. Exit code 1 when something is wrong.
    Rows whose text must not be published, as those of GPQA, are checked against your own copy with --rows.

    Example: `lorasmith verify demo-output/package`
    """
    import json

    from lorasmith.cli import views
    from lorasmith.cli.console import bar, console
    from lorasmith.packaging.signing import Verifier
    from lorasmith.packaging.verify import verify as check
    from lorasmith.packaging.verify import worst

    verifier = Verifier(key=public_key) if public_key else None
    findings = check(folder, verifier=verifier, progress=bar)
    if as_json:
        body = [finding.model_dump(mode="json") for finding in findings]
        sys.stdout.write(json.dumps(body, indent=2, ensure_ascii=False) + "\n")
    else:
        views.show_findings(findings, console())
    if worst(findings):
        raise typer.Exit(1)
    if rows is not None:
        _check_rows(folder, rows, rejoined)
    if not as_json:
        console().print(f"[green]✓[/] {folder}: everything is as it was written", soft_wrap=True)


def _check_rows(folder: Path, rows: Path, rejoined: Path | None) -> None:
    from lorasmith.files.jsonl import read_examples, write_examples
    from lorasmith.packaging.rejoin import rejoin

    whole = rejoin(folder, read_examples(rows))
    if rejoined is not None:
        write_examples(rejoined, whole)
