"""A command on another machine, from the first look at it to verified results; every step may be repeated."""

from __future__ import annotations

import codecs
import os
import re
import shutil
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lorasmith.errors import (
    BusyError,
    ConnectionLostError,
    DamageError,
    DiskError,
    RemoteError,
    UsageError,
    os_errors,
)
from lorasmith.files.atomic import publish_folder
from lorasmith.files.digests import walk
from lorasmith.files.names import safe_members, unsafe_name
from lorasmith.machine.resources import human_bytes, require_disk
from lorasmith.progress import Progress, silent
from lorasmith.records.base import FileDigest
from lorasmith.records.remote import RemoteJob, RemoteMachine, RemoteStatus, Transfer
from lorasmith.remote.job import (
    Parcel,
    delete,
    differing,
    input_bytes,
    pack_parcel,
    plan_job,
    require_free_outputs,
    staging,
)
from lorasmith.remote.ssh import Patience, Transport, ask, checked
from lorasmith.remote.state import only_one, save_job

# What the other machine says is parsed before it is used: it may be rented, and need not be honest.


P = TypeVar("P", bound=BaseModel)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def read_answer(answer: dict[str, Any], kind: type[P], where: str) -> P:
    """The fields of a record in an answer; raises `RemoteError` where they are not what they should be."""
    known = {name: answer[name] for name in kind.model_fields if name in answer}
    try:
        return kind.model_validate(known, strict=True)
    except ValidationError as error:
        field_name = ".".join(map(str, error.errors()[0]["loc"]))
        raise _unusable(f"its {field_name} is none", where) from error


def read_manifest(answer: dict[str, Any], outputs: Sequence[Transfer], where: str) -> list[FileDigest]:
    """The list of results, each name judged as a member of an archive is, and each within an output.

    Raises `DamageError` for a name that leads elsewhere, `RemoteError` for what is no list of files.
    """
    rows = answer.get("files")
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == 3 for row in rows):
        raise _unusable("it lists no files", where)
    names = safe_members((row[0] for row in rows), where=where)
    for name, size, sha256 in rows:
        if not any(_belongs(name, item.remote) for item in outputs):
            raise _unusable(f"it lists {name!a}, which is no result", where)
        if type(size) is not int or size < 0 or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise _unusable(f"it lists {name!a} without a size and a SHA-256", where)
    return [
        FileDigest(path=name, bytes=size, sha256=sha256)
        for name, (_, size, sha256) in zip(names, rows, strict=True)
    ]


def read_names(answer: dict[str, Any], key: str, parcel: Parcel, where: str) -> list[str]:
    """Those of the files here that an answer names: any other could ask for a file that is nobody's business.

    Raises `RemoteError` for a name that is not among them.
    """
    named = answer.get(key)
    known = {file.path for file in parcel.files}
    if not isinstance(named, list) or not all(isinstance(name, str) and name in known for name in named):
        raise _unusable("it asks for files that are none of this job's", where)
    return named


def _unusable(problem: str, where: str) -> RemoteError:
    return RemoteError(
        f"the other machine's answer cannot be used: {problem}",
        where=where,
        remedy="check that this is the machine you mean; a rented one: take another offer",
    )


class _Log:
    """A job's log as it comes, in pieces that end within a line or a character, said line by line."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""

    def take(self, piece: object) -> None:
        """The next bytes, as the agent packs them into a text."""
        content = str(piece).encode("latin-1", "replace")
        *lines, self._rest = (self._rest + self._decoder.decode(content)).split("\n")
        if lines:
            self._say("\n".join(lines))

    def end(self) -> None:
        """Say what came without the end of its line."""
        if self._rest:
            self._say(self._rest)
        self._rest = ""


# Files there and back: however often the line breaks, and not done before every SHA-256 is right.


_ROUNDS = 3
"""How often files that arrive damaged are sent again."""


@dataclass(frozen=True)
class Exchange:
    """One other machine and the folder of a job on it."""

    transport: Transport
    folder: str
    patience: Patience
    progress: Progress
    alive: Callable[[], None]
    """Called often; raises to end it."""

    def send(self, parcel: Parcel, missing: list[str], verify: Callable[[list[Any]], list[str]]) -> None:
        """Send what is missing of the parcel.

        `verify` has SHA-256 compared there, of all of it, and tells which files are wrong.
        """
        for _ in range(_ROUNDS):
            if missing:
                send = partial(self.transport.send, parcel.folder, missing, self.folder)
                self._move("Upload", parcel.bytes_of(missing), send, partial(self._arrived, missing))
            missing = verify(parcel.listed)
            if not missing:
                return
        raise _damaged(missing, self.transport.where, "the SHA-256 of the files here")

    def fetch(self, item: Transfer, listed: list[FileDigest]) -> str:
        """Fetch one output, compare every SHA-256, and only then put it in its place; what was done.

        `listed`: as `read_manifest` gives it. Raises `DamageError` for names that lead out of the folder.
        """
        files = [file for file in listed if _belongs(file.path, item.remote)]
        if not files:
            raise RemoteError(f"the command left nothing at {item.remote}", where=self.transport.where)
        total = sum(file.bytes for file in files)
        place, local = staging(item), Path(item.local)
        inner = [file.model_copy(update={"path": _inner(file.path, item.remote)}) for file in files]
        # Judged once more where they are joined to a folder of this machine, whoever made the list.
        safe_members((file.path for file in inner), where=self.transport.where)
        single = [file.path for file in files] == [item.remote]
        done = f"{len(files)} files, {human_bytes(total)}: every SHA-256 is the other machine's → {local}"
        if not differing(local.parent if single else local, inner):
            return done
        require_disk(place.parent, total, "fetch the results")
        with os_errors(place, "make a folder for the results"):
            place.mkdir(parents=True, exist_ok=True)
        source = f"{self.folder}/{Path(item.remote).parent if single else item.remote}"
        missing = [file.path for file in inner]
        wanted = set(missing)
        _only_files(place, wanted)
        for _ in range(_ROUNDS):
            receive = partial(self.transport.receive, source, missing, place)
            self._move("Download", total, receive, partial(_sizes, place, missing))
            _only_files(place, wanted)
            missing = differing(place, inner)
            if not missing:
                break
            delete(place, missing)
        else:
            raise _damaged(missing, place, "the SHA-256 that the other machine tells")
        if single:
            with os_errors(local, "write"):
                local.parent.mkdir(parents=True, exist_ok=True)
                (place / inner[0].path).replace(local)
                shutil.rmtree(place, ignore_errors=True)
        else:
            publish_folder(place, local)
        return done

    def _arrived(self, files: list[str]) -> int:
        """Bytes of these files that are there."""
        request = {"do": "arrived", "job": self.folder, "files": files}
        count = ask(self.transport, self.patience, request).get("bytes")
        return count if isinstance(count, int) else 0

    def _move(
        self,
        label: str,
        total: int,
        copy: Callable[[Callable[[int], None]], None],
        arrived: Callable[[], int],
    ) -> None:
        """Copy until it is through, with one bar for all attempts.

        What has `arrived` tells whether a broken attempt got further: a line that is cut again and again is
        borne with as long as it carries something each time, even less than rsync tells of.
        """
        with self.progress(label, total=max(total, 1), unit="B") as advance:
            before = shown = 0
            most = arrived()

            def on_bytes(count: int) -> None:
                nonlocal shown
                self.alive()
                step = min(before + count, total) - shown
                if step > 0:
                    advance(step)
                    shown += step

            def attempt(moved: Callable[[], None]) -> None:
                nonlocal before, most
                before = shown
                try:
                    copy(on_bytes)
                except ConnectionLostError:
                    if (now := arrived()) > most:
                        most = now
                        moved()
                    raise

            self.patience.over(attempt)


def _only_files(place: Path, wanted: set[str]) -> None:
    """Remove what is none of the wanted files; raise `DamageError` for a link, device or pipe.

    The program that copies is not ours, and had its own ways out of a folder: CVE-2022-29154,
    CVE-2024-12087. A link that stood here would be followed by whatever reads and deletes after it.
    """
    for name, status in walk(place).items():
        if not stat.S_ISREG(status.st_mode):
            shutil.rmtree(place, ignore_errors=True)  # does not follow links
            raise DamageError(
                f"{name!a} has arrived, which is no file",
                where=place,
                expected="the files that the other machine lists, and no links or devices",
                remedy="do not use this machine before you know why; nothing of it was taken",
            )
    # Of an earlier attempt with other results, or a part that rsync has not finished, or unasked for.
    delete(place, [name for name in walk(place) if name not in wanted])


def _sizes(folder: Path, files: list[str]) -> int:
    """Bytes of these files that are here."""
    places = [folder / name for name in files]
    return sum(place.stat().st_size for place in places if place.is_file())


def _damaged(missing: list[str], where: str | Path, expected: str) -> DamageError:
    return DamageError(
        f"{len(missing)} files arrive damaged again and again, the first of them {missing[0]}",
        where=where,
        expected=expected,
        remedy="check that nothing changes them meanwhile; else take another machine",
    )


def _belongs(path: str, remote: str) -> bool:
    return path == remote or path.startswith(remote + "/")


def _inner(path: str, remote: str) -> str:
    return Path(path).name if path == remote else path.removeprefix(remote + "/")


_ENVIRONMENT_BYTES = 9_000_000_000
"""torch with its CUDA libraries and the rest, unpacked: an estimate with room to spare, not a measurement."""
_OUTPUT_SHARE = 2
"""A run writes a merged model and its archive: at most twice what its inputs take."""
_ANSWERS = (0, 1)
"""Exit codes with complete results: all well, and an answer that is no."""


@dataclass
class Session:
    """One job on one machine."""

    transport: Transport
    job: RemoteJob
    patience: Patience = field(default_factory=Patience)
    progress: Progress = silent
    say: Callable[[str], None] = lambda line: None
    """Shows a line to a person; it may be the other machine's own, which a terminal must not obey."""
    follow_seconds: float = 600.0
    """How long one connection follows the log before a new one is opened."""
    poll_seconds: float = 0.5

    alive: Callable[[], None] = lambda: None
    """Called often while work is under way; raises to end it."""
    machine: RemoteMachine | None = None
    """The machine as `look` saw it."""

    @property
    def folder(self) -> str:
        """The job's folder there, as an absolute path."""
        return f"{self.look().folder}/jobs/{self.job.id}"

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        """A request about this job."""
        return ask(self.transport, self.patience, {"do": do, "job": self.folder, **more})

    def check(self, *, needs_gpu: bool = False) -> RemoteMachine:
        """Look at the machine; raises `RemoteError` where it lacks rsync, or a GPU that is needed."""
        machine = self.look()
        if not machine.rsync:
            raise RemoteError(
                "rsync is not installed on the other machine",
                where=self.transport.where,
                remedy="install it there: apt-get install rsync",
            )
        if needs_gpu and not machine.gpus:
            raise RemoteError(
                "the other machine has no NVIDIA GPU that nvidia-smi shows",
                where=self.transport.where,
                expected="a GPU, because the command asks for one with --device",
                remedy="leave --device out, or choose another machine",
            )
        return machine

    def look(self) -> RemoteMachine:
        """What the machine has; asked once."""
        if self.machine is None:
            answer = ask(self.transport, self.patience, {"do": "check", "folder": self.job.folder})
            machine = read_answer(answer, RemoteMachine, self.transport.where)
            # It stands behind `host:` for rsync, where a colon would name a service of that host.
            if not machine.folder.startswith("/") or unsafe_name(machine.folder[1:]):
                raise _unusable(f"its folder is {machine.folder!a}", self.transport.where)
            self.machine = machine
        return self.machine

    def run(self, *, needs_gpu: bool = False) -> RemoteStatus:
        """Upload, start, follow, fetch and verify; goes on with what an earlier call left."""
        machine = self.check(needs_gpu=needs_gpu)
        gpus = ", ".join(machine.gpus) or "no GPU: this will run on the CPU"
        self.say(
            f"{self.transport.where}: {gpus}; {machine.cores} cores, {human_bytes(machine.memory)} memory,"
            f" {human_bytes(machine.disk_free)} free, Python {machine.python}"
        )
        with only_one(self.job.id, self.say), pack_parcel(self.job) as parcel:
            plan = plan_job(self.job, parcel, self.folder)
            if self._begin(plan, parcel, machine):
                self.say(f"job {self.job.id} runs there by itself; closing this computer changes nothing")
        return self.finish(self.attach())

    def _begin(self, plan: dict[str, Any], parcel: Parcel, machine: RemoteMachine) -> bool:
        """Start the job unless it runs or is done already; whether it was started."""
        before = self.status()
        same = before.plan == plan["sha256"]
        if before.phase in ("installing", "fetching models", "running"):
            if same:
                return False
            raise BusyError(
                "another command, or this one with other inputs, runs in this job's folder",
                where=f"{self.transport.where}:{self.folder}",
                remedy=f"wait, or stop it first: lorasmith remote stop {self.job.id}",
            )
        if before.phase == "ended" and before.code in _ANSWERS and same:
            return False
        if not self.job.fetched:
            require_free_outputs(self.job.outputs)
        self.job = self.job.model_copy(update={"fetched": False})
        save_job(self.job)
        self.upload(parcel, machine)
        environment = {name: value_of(name) for name in self.job.environment}
        answer = self.ask("start", plan=plan, environment=environment)
        if not answer.get("started") and answer.get("plan") != plan["sha256"]:
            raise BusyError(
                "another command was started in this job's folder at the same time",
                where=f"{self.transport.where}:{self.folder}",
                remedy="give the command again when that one has ended",
            )
        return True

    def upload(self, parcel: Parcel, machine: RemoteMachine) -> None:
        """Send what is not there yet of the parcel, and have every file's SHA-256 compared there."""
        folders = [str(Path(item.remote).parent) for item in self.job.outputs]
        answer = self.ask("prepare_folders", files=parcel.listed, folders=folders)
        missing = read_names(answer, "missing", parcel, self.transport.where)
        to_send = parcel.bytes_of(missing)
        if known := parcel.bytes - to_send:
            self.say(f"{human_bytes(known)} of the inputs are there already; {human_bytes(to_send)} to send")
        wanted = to_send + parcel.bytes * _OUTPUT_SHARE + (0 if self.job.python else _ENVIRONMENT_BYTES)
        if machine.disk_free < wanted:
            raise DiskError(
                f"too little disk space on the other machine: {human_bytes(machine.disk_free)} are free",
                where=f"{self.transport.where}:{machine.folder}",
                expected=f"{human_bytes(wanted)} for inputs, environment and results",
                remedy="free some space there, or take --folder on a larger disk",
            )
        self._warn_of_memory(machine)

        def verify(files: list[Any]) -> list[str]:
            return read_names(self.ask("verify", files=files), "wrong", parcel, self.transport.where)

        self._exchange().send(parcel, missing, verify)

    def _warn_of_memory(self, machine: RemoteMachine) -> None:
        """A model larger than memory can still be merged, but not scored: said before hours have passed."""
        largest = max((input_bytes(item) for item in self.job.inputs), default=0)
        if not machine.gpus and largest > machine.memory:
            self.say(
                f"note: an input of {human_bytes(largest)} does not fit into the machine's"
                f" {human_bytes(machine.memory)} of memory"
            )

    def _exchange(self) -> Exchange:
        return Exchange(self.transport, self.folder, self.patience, self.progress, self.alive)

    def status(self) -> RemoteStatus:
        """Where the job stands."""
        return self._status(self.ask("status"))

    def attach(self, offset: int = 0) -> RemoteStatus:
        """Follow the log from `offset` until the job has ended; broken connections are opened again."""
        place = offset
        last: dict[str, Any] = {}
        log = _Log(self.say)

        def attempt(moved: Callable[[], None]) -> dict[str, Any]:
            nonlocal place
            request = {"do": "follow", "job": self.folder, "offset": place}
            request |= {"seconds": self.follow_seconds, "pause": self.poll_seconds}
            answer: dict[str, Any] = {}
            for answer in self.transport.stream(request):
                self.alive()
                moved()
                if "log" in answer:
                    log.take(answer["log"])
                place = answer.get("offset", place)
            return checked(answer, self.transport.where)

        while last.get("phase") not in ("absent", "ended", "lost"):
            last = self.patience.over(attempt)
        log.end()
        return self._status(last)

    def finish(self, status: RemoteStatus) -> RemoteStatus:
        """Fetch the results of a job that came to its end; raises `RemoteError` for one that did not."""
        if status.phase == "lost":
            raise RemoteError(
                "the job is gone without a word: the machine was restarted, or ran out of memory",
                where=f"{self.transport.where}:{self.folder}",
                remedy="give the same command again; it goes on with what is finished there",
            )
        if status.phase != "ended":
            raise RemoteError(f"there is no finished job: it is {status.phase}", where=self.transport.where)
        if status.code in _ANSWERS:
            self.fetch()
        elif status.reason:
            self.say(status.reason)
        return status

    def fetch(self) -> None:
        """Copy the outputs here, compare every SHA-256, and only then put them in their place."""
        answer = self.ask("manifest", outputs=[item.remote for item in self.job.outputs])
        files = read_manifest(answer, self.job.outputs, self.transport.where)
        exchange = self._exchange()
        with only_one(self.job.id, self.say):
            for item in self.job.outputs:
                self.say(exchange.fetch(item, files))
            self.job = self.job.model_copy(update={"fetched": True})
            save_job(self.job)

    def stop(self) -> RemoteStatus:
        """Stop the command as Ctrl-C would; what is finished is kept there."""
        return self._status(self.ask("stop"))

    def _status(self, answer: dict[str, Any]) -> RemoteStatus:
        return read_answer(answer, RemoteStatus, self.transport.where)


def value_of(name: str) -> str:
    """The value of a variable that is to be passed on; raises `UsageError` where it has none."""
    value = os.environ.get(name)
    if value is None:
        raise UsageError(f"the variable {name} is not set", remedy=f"export it, or leave --env {name} out")
    return value
