"""A command on another machine, from the first look at it to verified results; every step may be repeated."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lorasmith.errors import BusyError, DamageError, DiskError, RemoteError, UsageError, os_errors
from lorasmith.files.atomic import publish_folder
from lorasmith.files.machine import human_bytes, require_disk
from lorasmith.progress import Progress, silent
from lorasmith.records.base import FileDigest
from lorasmith.records.remote import RemoteJob, RemoteMachine, RemoteStatus, Transfer
from lorasmith.remote.job import (
    Parcel,
    make_plan,
    pack_parcel,
    require_free_outputs,
    staging,
    wrong_files,
)
from lorasmith.remote.state import save_job
from lorasmith.remote.transport import Patience, Transport, ask, checked

_ENVIRONMENT_BYTES = 9_000_000_000
"""torch with its CUDA libraries, and the rest: 8.1 GB unpacked in 2026."""
_OUTPUT_SHARE = 2
"""A run writes a merged model and its archive: at most twice what its inputs take."""
_ROUNDS = 3
"""How often files that arrive damaged are sent again."""
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
    follow_seconds: float = 600.0
    """How long one connection follows the log before a new one is opened."""
    poll_seconds: float = 0.5

    alive: Callable[[], None] = lambda: None
    """Called often while work is under way; raises to end it."""
    machine: RemoteMachine | None = None
    """What `check` found."""

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
            found = ask(self.transport, self.patience, {"do": "check", "folder": self.job.folder})
            known = {name: found[name] for name in RemoteMachine.model_fields}
            self.machine = RemoteMachine.model_validate(known)
        return self.machine

    def run(self, *, needs_gpu: bool = False) -> RemoteStatus:
        """Upload, start, follow, fetch and verify; goes on with what an earlier call left."""
        machine = self.check(needs_gpu=needs_gpu)
        gpus = ", ".join(machine.gpus) or "no GPU: this will run on the CPU"
        self.say(
            f"{self.transport.where}: {gpus}; {machine.cores} cores, {human_bytes(machine.memory)} memory,"
            f" {human_bytes(machine.disk_free)} free, Python {machine.python}"
        )
        with pack_parcel(self.job) as parcel:
            plan = make_plan(self.job, parcel, self.folder)
            if self._begin(plan, parcel, machine):
                self.say(f"job {self.job.id} runs there by itself; closing this computer changes nothing")
        found = self.attach()
        return self.finish(found)

    def _begin(self, plan: dict[str, Any], parcel: Parcel, machine: RemoteMachine) -> bool:
        """Start the job unless it runs or is done already; whether it was started."""
        found = self.status()
        same = found.plan == plan["sha256"]
        if found.phase in ("installing", "fetching models", "running"):
            if same:
                return False
            raise BusyError(
                "another command, or this one with other inputs, runs in this job's folder",
                where=f"{self.transport.where}:{self.folder}",
                remedy=f"wait, or stop it first: lorasmith remote stop {self.job.id}",
            )
        if found.phase == "ended" and found.code in _ANSWERS and same:
            return False
        if not self.job.fetched:
            require_free_outputs(self.job)
        self.job = self.job.model_copy(update={"fetched": False})
        save_job(self.job)
        self.upload(parcel, machine)
        environment = {name: _value_of(name) for name in self.job.environment}
        answer = self.ask("start", plan=plan, environment=environment)
        if not answer["started"] and answer.get("plan") != plan["sha256"]:
            raise BusyError(
                "another command was started in this job's folder at the same time",
                where=f"{self.transport.where}:{self.folder}",
                remedy="give the command again when that one has ended",
            )
        return True

    def upload(self, parcel: Parcel, machine: RemoteMachine) -> None:
        """Send the parcel and have every file's SHA-256 compared there."""
        wanted = parcel.bytes * (1 + _OUTPUT_SHARE) + (0 if self.job.python else _ENVIRONMENT_BYTES)
        if machine.disk_free < wanted:
            raise DiskError(
                f"too little disk space on the other machine: {human_bytes(machine.disk_free)} are free",
                where=f"{self.transport.where}:{machine.folder}",
                expected=f"{human_bytes(wanted)} for inputs, environment and results",
                remedy="free some space there, or take --folder on a larger disk",
            )
        outputs = [str(Path(item.remote).parent) for item in self.job.outputs]
        self.ask("prepare", files=parcel.names, folders=outputs)
        files = [(file.path, file.bytes, file.sha256) for file in parcel.files]
        missing = parcel.names
        for _ in range(_ROUNDS):
            self._move(
                "Upload",
                parcel.bytes,
                partial(self.transport.send, parcel.folder, missing, self.folder),
            )
            missing = self.ask("verify", files=files)["wrong"]
            if not missing:
                return
        raise DamageError(
            f"{len(missing)} files arrive damaged again and again, the first of them {missing[0]}",
            where=self.transport.where,
            expected="the SHA-256 of the files here",
            remedy="check that nothing changes them meanwhile; else take another machine",
        )

    def _move(self, label: str, total: int, copy: Callable[[Callable[[int], None]], None]) -> None:
        """Copy until it is through, however often the connection breaks, with one bar for all attempts."""
        with self.progress(label, total=max(total, 1), unit="B") as advance:
            shown = 0

            def attempt(moved: Callable[[], None]) -> None:
                before = shown

                def on_bytes(count: int) -> None:
                    nonlocal shown
                    self.alive()
                    if count > 0:
                        moved()
                    step = min(before + count, total) - shown
                    if step > 0:
                        advance(step)
                        shown += step

                copy(on_bytes)

            self.patience.over(attempt)

    def status(self) -> RemoteStatus:
        """Where the job stands."""
        return _status(self.ask("status"))

    def attach(self, offset: int = 0) -> RemoteStatus:
        """Follow the log from `offset` until the job has ended; broken connections are opened again."""
        place = offset
        last: dict[str, Any] = {}

        def attempt(moved: Callable[[], None]) -> dict[str, Any]:
            nonlocal place
            request = {"do": "follow", "job": self.folder, "offset": place}
            request |= {"seconds": self.follow_seconds, "pause": self.poll_seconds}
            answer: dict[str, Any] = {}
            for answer in self.transport.stream(request):
                self.alive()
                moved()
                if "log" in answer:
                    self.say(answer["log"].encode("latin-1").decode(errors="replace").rstrip("\n"))
                place = answer.get("offset", place)
            return checked(answer, self.transport.where)

        while last.get("phase") not in ("absent", "ended", "lost"):
            last = self.patience.over(attempt)
        return _status(last)

    def finish(self, found: RemoteStatus) -> RemoteStatus:
        """Fetch the results of a job that came to its end; raises `RemoteError` for one that did not."""
        if found.phase == "lost":
            raise RemoteError(
                "the job is gone without a word: the machine was restarted, or ran out of memory",
                where=f"{self.transport.where}:{self.folder}",
                remedy="give the same command again; it goes on with what is finished there",
            )
        if found.phase != "ended":
            raise RemoteError(f"there is no finished job: it is {found.phase}", where=self.transport.where)
        if found.code in _ANSWERS:
            self.fetch()
        elif found.reason:
            self.say(found.reason)
        return found

    def fetch(self) -> None:
        """Copy the outputs here, compare every SHA-256, and only then put them in their place."""
        answer = self.ask("manifest", outputs=[item.remote for item in self.job.outputs])
        files = [FileDigest(path=path, bytes=size, sha256=sha) for path, size, sha in answer["files"]]
        for item in self.job.outputs:
            self._fetch_one(item, [file for file in files if _belongs(file.path, item.remote)])
        self.job = self.job.model_copy(update={"fetched": True})
        save_job(self.job)

    def _fetch_one(self, item: Transfer, files: list[FileDigest]) -> None:
        if not files:
            raise RemoteError(f"the command left nothing at {item.remote}", where=self.transport.where)
        total = sum(file.bytes for file in files)
        place = staging(item)
        inner = [file.model_copy(update={"path": _inner(file.path, item.remote)}) for file in files]
        require_disk(place.parent, total, "fetch the results")
        with os_errors(place, "make a folder for the results"):
            place.mkdir(parents=True, exist_ok=True)
        single = [file.path for file in files] == [item.remote]
        source = f"{self.folder}/{Path(item.remote).parent if single else item.remote}"
        missing = [file.path for file in inner]
        for _ in range(_ROUNDS):
            self._move("Download", total, partial(self.transport.receive, source, missing, place))
            missing = wrong_files(item, inner)
            if not missing:
                break
        else:
            raise DamageError(
                f"{len(missing)} files arrive damaged again and again, the first of them {missing[0]}",
                where=place,
                expected="the SHA-256 that the other machine tells",
            )
        local = Path(item.local)
        if single:
            with os_errors(local, "write"):
                local.parent.mkdir(parents=True, exist_ok=True)
                (place / inner[0].path).replace(local)
                shutil.rmtree(place, ignore_errors=True)
        else:
            publish_folder(place, local)
        self.say(f"{len(files)} files, {human_bytes(total)}: every SHA-256 is the other machine's → {local}")

    def stop(self) -> RemoteStatus:
        """Stop the command as Ctrl-C would; what is finished is kept there."""
        return _status(self.ask("stop"))


def _status(answer: dict[str, Any]) -> RemoteStatus:
    return RemoteStatus.model_validate(
        {name: answer[name] for name in RemoteStatus.model_fields if name in answer}
    )


def _belongs(path: str, remote: str) -> bool:
    return path == remote or path.startswith(remote + "/")


def _inner(path: str, remote: str) -> str:
    return Path(path).name if path == remote else path.removeprefix(remote + "/")


def _value_of(name: str) -> str:
    value = os.environ.get(name)
    if value is None:
        raise UsageError(f"the variable {name} is not set", remedy=f"export it, or leave --env {name} out")
    return value
