"""The far end: a process of the cluster that makes the work from its recipe and runs chunks of it."""

from __future__ import annotations

import importlib
import pickle
from contextlib import ExitStack
from typing import Any

from lorasmith import __version__, errors
from lorasmith.errors import LorasmithError, MachineError, RemoteError
from lorasmith.files.journal import Rows

Answer = tuple[str, bytes]
"""`done` and what was asked for, `too large` and why, or `failed` and the error."""


class Worker:
    """Holds one piece of work at a time."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._work: Any = None

    def open(self, packed: bytes) -> Answer:
        """Put the present work away and make another; answers with the conditions that it computes under."""
        self._work = None
        self._stack.close()
        self._stack = ExitStack()
        recipe = pickle.loads(packed)
        try:
            _require_version(recipe["version"])
            module, _, name = recipe["function"].partition(":")
            make = getattr(importlib.import_module(module), name)
            self._work = self._stack.enter_context(make(**recipe["arguments"]))
        except LorasmithError as error:
            return "failed", pack_error(error)
        return "done", self._work.conditions().model_dump_json().encode()

    def run(self, rows: Rows, parcel: Any = None) -> Answer:
        """The packed result of one chunk."""
        message = None
        try:
            if parcel is not None:
                self._work.take(parcel)
            return "done", self._work.pack(self._work.run(tuple(rows)))
        except LorasmithError as error:
            return "failed", pack_error(error)
        except Exception as error:
            if not self._work.out_of_memory(error):
                raise
            message = (str(error).strip() or type(error).__name__).splitlines()[0]
        self._work.release()
        return "too large", message.encode()


def _require_version(wanted: str) -> None:
    if wanted != __version__:
        raise MachineError(
            f"a worker of the cluster has lorasmith {__version__}",
            expected=f"{wanted}, as where the command was given",
            remedy="use one image, or one installation, on all machines",
        )


def pack_error(error: LorasmithError) -> bytes:
    """An error with all that it says."""
    fields = {name: getattr(error, name) for name in ("where", "expected", "remedy")}
    return pickle.dumps((type(error).__name__, error.found, fields))


def unpack_error(packed: bytes) -> LorasmithError:
    """The error that a worker met, as its own class."""
    name, found, fields = pickle.loads(packed)
    kind = getattr(errors, name, RemoteError)
    made: LorasmithError = kind(found, **fields)
    return made
