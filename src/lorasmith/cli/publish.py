"""`lorasmith publish`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lorasmith.packaging.publish import Changes


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
            typer.echo(f"  {label} {name}", err=True)
    return typer.confirm(f"Change these files of {repository}?", err=True)
