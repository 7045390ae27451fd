"""`lorasmith package`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.console import say
from lorasmith.cli.options import AsJson, PublicKey

if TYPE_CHECKING:
    from lorasmith.options import PackageOptions
    from lorasmith.packaging.publish import Changes


def package(
    run: Annotated[Path, typer.Argument(help="The run folder.", metavar="RUN")],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the package (RUN/package).", metavar="DIR")
    ] = None,
    part_size: Annotated[
        str | None, typer.Option(help="Cut archives into parts of this size, such as 2GB.", metavar="SIZE")
    ] = None,
    sign: Annotated[
        str | None,
        typer.Option(
            help="Private key (PEM) to sign with, or `sigstore`.", metavar="KEY", envvar="LORASMITH_SIGN"
        ),
    ] = None,
    *,
    options: PackageOptions,
    as_json: AsJson = False,
) -> None:
    """Pack a run again: evidence and merged model as archives, a manifest, and SHA256SUMS.

    The same run gives the same archives on any machine and date. Times stay out of them.

    Example: `lorasmith package demo-output --output release`
    """
    from functools import partial

    from lorasmith.cli.console import bar, console, show_record
    from lorasmith.cli.views import records
    from lorasmith.files.digests import SUMS, reseal
    from lorasmith.packaging.archive import parse_size
    from lorasmith.packaging.pack import pack
    from lorasmith.packaging.signing import Signer, sign_folder
    from lorasmith.reporting.page import write_report

    folder = output or run / "package"
    signer = None if sign is None else Signer(None if sign == "sigstore" else Path(sign))
    manifest = pack(
        run,
        folder,
        compression=options.compression,
        part_size=parse_size(part_size) if part_size else None,
        report=partial(write_report, timings=False),
        signer=signer,
        progress=bar,
    )
    was_signed = reseal(run, folder)
    if signer is not None and (run / SUMS).is_file():
        sign_folder(run, signer)  # so that `verify RUN --public-key` covers what is not packed as well
    elif was_signed:
        say_signature_is_gone()
    if as_json:
        show_record(manifest)
    else:
        records.show_package(manifest, console())
        console().print(f"Package: {folder}", markup=False, soft_wrap=True)


def say_signature_is_gone() -> None:
    """After a change to a run that was signed."""
    say(
        "The run's signature was removed, for what it signed has changed: "
        "sign it again with `lorasmith package RUN --sign KEY`.",
        stderr=True,
    )


# `lorasmith publish`.


def publish(
    run: Annotated[Path, typer.Argument(help="The run folder.", metavar="RUN")],
    repository: Annotated[
        str, typer.Option("--repo", help="The model's name on the hub: org/name.", metavar="ORG/NAME")
    ],
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public; without it, private.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Replace what is there without asking.")] = False,
    allow_failed: Annotated[
        bool, typer.Option("--allow-failed", help="Publish a run that is unproven or failed a gate.")
    ] = False,
) -> None:
    """Upload the merged model with its card to the Hugging Face hub, once the run has proved it.

    Every file is checked first. An upload that broke off goes on when the same command is given again.
    The token is the one of `hf auth login`, or HF_TOKEN.

    Example: `lorasmith publish demo-output/run --repo my-org/my-model`
    """
    from lorasmith.cli.console import bar, console
    from lorasmith.packaging.publish import publish as upload

    def agree(changes: Changes) -> bool:
        return yes or _asked(repository, changes)

    done = upload(run, repository, private=not public, allow_failed=allow_failed, agree=agree, progress=bar)
    state = "private" if done.private else "public"
    console().print(f"Published: {done.url} ({state}, {done.files} files)", markup=False, soft_wrap=True)


def _asked(repository: str, changes: Changes) -> bool:
    """Ask where somebody can answer; elsewhere the answer is no."""
    if not sys.stdin.isatty():
        return False
    for label, names in (("replaces", changes.replaced), ("removes", changes.removed)):
        for name in names:
            say(f"  {label} {name}", stderr=True)
    return typer.confirm(f"Change these files of {repository}?", err=True)


# `lorasmith unpack`.


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
    from lorasmith.cli.views import records
    from lorasmith.packaging.signing import Verifier
    from lorasmith.packaging.unpack import unpack as unpack_archives

    verifier = Verifier(key=public_key) if public_key else None
    unpacked = unpack_archives(archives, output, verifier=verifier, progress=bar)
    records.show_findings(unpacked.findings, console())
    names = ", ".join(sorted(path.name for path in output.iterdir() if path.is_dir()))
    console().print(f"Unpacked and checked: {names} in {output}", markup=False, soft_wrap=True)


# `lorasmith verify`.


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

    from lorasmith.cli.console import bar, console, plain, show_json
    from lorasmith.cli.views import records
    from lorasmith.packaging.signing import Verifier
    from lorasmith.packaging.verify import verify as check
    from lorasmith.packaging.verify import worst

    verifier = Verifier(key=public_key) if public_key else None
    findings = check(folder, verifier=verifier, progress=bar)
    if as_json:
        body = [finding.model_dump(mode="json") for finding in findings]
        show_json(json.dumps(body, indent=2, ensure_ascii=False))
    else:
        records.show_findings(findings, console())
    if worst(findings):
        raise typer.Exit(1)
    if rows is not None:
        _check_rows(folder, rows, rejoined)
    if not as_json:
        console().print(f"[green]✓[/] {plain(str(folder))}: everything is as it was written", soft_wrap=True)


def _check_rows(folder: Path, rows: Path, rejoined: Path | None) -> None:
    from lorasmith.data.rows import read_examples
    from lorasmith.files.jsonl import write_examples
    from lorasmith.packaging.unpack import rejoin

    whole = rejoin(folder, read_examples(rows))
    if rejoined is not None:
        write_examples(rejoined, whole)
