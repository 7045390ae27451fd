"""`lorasmith chat`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.console import say, say_piece

if TYPE_CHECKING:
    from rich.console import Console

    from lorasmith.followup.chat import Chat
    from lorasmith.options import ChatOptions, ModelInput

_HELP = "Type a message. /reset forgets the conversation, /exit or Ctrl-D ends it."


def chat(
    inputs: ModelInput,
    merged: Annotated[
        Path | None, typer.Option(help="With --side-by-side: the merged model.", metavar="DIR")
    ] = None,
    draft: Annotated[
        Path | None, typer.Option(help="Folder of a draft model, for speed.", metavar="DIR")
    ] = None,
    side_by_side: Annotated[
        bool, typer.Option("--side-by-side", help="Adapter, base and merged answer each prompt.")
    ] = False,
    prompt: Annotated[
        str | None, typer.Option(help="Answer this and end; - or a pipe reads standard input.")
    ] = None,
    *,
    options: ChatOptions,
) -> None:
    """Talk to a model in the terminal, or answer one prompt; side by side with differing tokens marked.

    Example: `lorasmith chat --model merged --prompt "Explain binary search"`
    """
    from lorasmith.cli.console import console
    from lorasmith.errors import UsageError
    from lorasmith.followup.chat import open_chat

    if merged is not None and not side_by_side:
        raise UsageError("--merged needs --side-by-side", remedy="give --model the merged folder instead")
    model, adapter = inputs.model, inputs.adapter
    if side_by_side:
        chats = _side_by_side(model, adapter, merged, draft, options)
    else:
        chats = [open_chat(model, adapter=adapter, draft=draft, options=options)]
    screen = console()
    if prompt is not None or not sys.stdin.isatty():
        text = sys.stdin.read() if prompt in (None, "-") else prompt
        if not (text or "").strip():
            raise UsageError("there is no prompt", expected="--prompt TEXT, or text on standard input")
        _answer(chats, str(text), screen)
    else:
        _talk(chats, screen)


def _side_by_side(
    model: Path, adapter: Path | None, merged: Path | None, draft: Path | None, options: ChatOptions
) -> list[Chat]:
    from lorasmith.errors import UsageError
    from lorasmith.followup.chat import open_side_by_side

    if adapter is None:
        raise UsageError(
            "--side-by-side needs an adapter", expected="--model BASE --adapter DIR [--merged DIR]"
        )
    if draft is not None:
        raise UsageError("--side-by-side compares models, a draft has no part in it", remedy="leave it out")
    return open_side_by_side(model, adapter, merged, options=options)


def _talk(chats: list[Chat], screen: Console) -> None:
    from lorasmith.errors import DataError

    screen.print(_HELP)
    while True:
        try:
            text = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            screen.print("")
            return
        if text == "/exit":
            return
        if text == "/reset":
            for one in chats:
                one.reset()
        elif text:
            try:
                _answer(chats, text, screen)
            except KeyboardInterrupt:
                screen.print(" …")
            except DataError as error:
                screen.print(error.message(), markup=False)


def _answer(chats: list[Chat], text: str, screen: Console) -> None:
    if len(chats) == 1:
        for piece in chats[0].answer(text):
            say_piece(piece)
        say("")
        return
    from rich.markup import escape

    from lorasmith.followup.chat import mark_differences

    for one in chats:
        for _ in one.answer(text):
            pass
        pieces = mark_differences(chats[0], one)
        same = "" if one is chats[0] else ": the adapter's tokens" * (not any(p.differs for p in pieces))
        screen.print(f"\n[bold]{one.name}[/]{same}")
        # Colour alone would be lost in a file: differing stretches stand in ⟦ ⟧ as well.
        marked = (f"[red]⟦{escape(p.text)}⟧[/]" if p.differs else escape(p.text) for p in pieces)
        screen.print("".join(marked), soft_wrap=True)
