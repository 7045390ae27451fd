"""The far end: a process of the cluster that makes the work from its `WorkSpec` and runs chunks of it."""

from __future__ import annotations

import os
import pickle
from contextlib import ExitStack
from typing import Any, NamedTuple

from lorasmith import __version__, errors
from lorasmith.errors import LorasmithError, MachineError, RemoteError
from lorasmith.executors.base import WorkSpec, import_function
from lorasmith.files.journal import Rows
from lorasmith.machine.meter import Gpus, Meter, Packages, Usage, this_machine
from lorasmith.machine.resources import peak_memory, reset_peak_memory, return_memory


class WorkerReply(NamedTuple):
    """`done` and what was asked for, `too large` and why, or `failed` and the error; and what it took."""

    status: str
    packed: bytes
    cpu_seconds: float = 0.0
    """Processor time of this process since its last answer."""
    peak_rss_bytes: int | None = None
    """Largest memory since the present work was opened; None where the system does not tell."""
    devices: frozenset[str] = frozenset()
    """Devices of this machine that tell their energy or how busy they are."""


class Worker:
    """Holds one piece of work at a time."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._work: Any = None
        self._can_reset = False
        self._told_seconds = 0.0
        self._metered: tuple[ExitStack, Usage] | None = None

    def open(self, packed: bytes) -> WorkerReply:
        """Put the present work away and make another; answers with the conditions that it computes under."""
        self._work = None
        self._stack.close()
        self._stack = ExitStack()
        return_memory()
        self._can_reset = reset_peak_memory()
        version, place, arguments = pickle.loads(packed)
        try:
            _require_version(version)
            self._work = self._stack.enter_context(import_function(*place)(**pickle.loads(arguments)))
        except LorasmithError as error:
            return self._answer("failed", pack_error(error))
        answer = self._answer("done", self._work.conditions().model_dump_json().encode())
        return answer._replace(devices=this_machine().devices)

    def meter(self, without: frozenset[str]) -> None:
        """Count what the machine's devices take from now on, all but those named."""
        self.read_meter()
        stack = ExitStack()
        usage = stack.enter_context(Meter(Gpus(without=without), Packages(without=without)).running())
        self._metered = stack, usage

    def read_meter(self) -> Usage | None:
        """What they have taken, and the end of counting."""
        if self._metered is None:
            return None
        stack, usage = self._metered
        self._metered = None
        stack.close()
        return usage

    def run(self, rows: Rows, parcel: Any = None) -> WorkerReply:
        """The packed result of one chunk."""
        message = None
        try:
            if parcel is not None:
                self._work.take(parcel)
            return self._answer("done", self._work.pack(self._work.run(tuple(rows))))
        except LorasmithError as error:
            return self._answer("failed", pack_error(error))
        except Exception as error:
            if not self._work.out_of_memory(error):
                raise
            message = (str(error).strip() or type(error).__name__).splitlines()[0]
        self._work.release()
        return self._answer("too large", message.encode())

    def _answer(self, status: str, packed: bytes) -> WorkerReply:
        used = os.times()
        seconds = used.user + used.system + used.children_user + used.children_system
        took, self._told_seconds = seconds - self._told_seconds, seconds
        return WorkerReply(status, packed, took, peak_memory() if self._can_reset else None)


def pack_spec(spec: WorkSpec) -> bytes:
    """What `Worker.open` takes.

    Function and arguments are unpacked only after the version is compared: another version may lack them.
    """
    return pickle.dumps((__version__, spec.place, pickle.dumps(dict(spec.arguments))))


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
