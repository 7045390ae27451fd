"""A job's files here: what is sent with which digests, where results land, and the plan that is run there."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tempfile
import zipfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import distribution, distributions
from pathlib import Path
from typing import Any

import lorasmith
from lorasmith.errors import InputError, UsageError, os_errors
from lorasmith.files.digests import describe, folder_files, hash_file
from lorasmith.hub.cache import spelled_model
from lorasmith.records.base import FileDigest
from lorasmith.records.remote import HubInput, RemoteJob, Transfer
from lorasmith.remote.state import own_name

# The lorasmith that runs here, as a wheel for another machine, and the versions it runs with.


_EPOCH = (1980, 1, 1, 0, 0, 0)


def build_wheel() -> tuple[str, bytes]:
    """Name and bytes of a wheel of this very source, whether installed or checked out; always the same bytes.

    The layout is that of the binary distribution format (PEP 427).
    """
    source = Path(lorasmith.__file__).parent
    name = f"lorasmith-{lorasmith.__version__}"
    about = f"{name}.dist-info"
    members: dict[str, bytes] = {}
    for path in sorted(source.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            members[f"lorasmith/{path.relative_to(source).as_posix()}"] = path.read_bytes()
    installed = distribution("lorasmith")
    members[f"{about}/METADATA"] = (installed.read_text("METADATA") or "").encode()
    members[f"{about}/entry_points.txt"] = (installed.read_text("entry_points.txt") or "").encode()
    members[f"{about}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: lorasmith\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    members[f"{about}/RECORD"] = _record(members, about)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            entry = zipfile.ZipInfo(member, _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content)
    return f"{name}-py3-none-any.whl", packed.getvalue()


def _record(members: dict[str, bytes], about: str) -> bytes:
    lines = []
    for member, content in members.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{member},sha256={digest},{len(content)}\n")
    return "".join([*lines, f"{about}/RECORD,,\n"]).encode()


def constraints() -> str:
    """Every version installed here, one a line, for pip's `-c`.

    Local labels (`+cpu`) are left out: the other machine takes the build that fits its GPU.
    """
    versions = {
        (dist.metadata["Name"] or "").lower(): dist.version.split("+")[0]
        for dist in distributions()
        if dist.metadata["Name"]
    }
    versions.pop("lorasmith", None)
    # What belongs to an environment rather than to the work in it.
    for name in ("pip", "setuptools", "wheel"):
        versions.pop(name, None)
    return "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()))


_TOOL = "in/tool"
"""Where wheel and constraints lie in a job's folder."""


@dataclass(frozen=True)
class Parcel:
    """All files of a job, staged as links below one folder, and what they must be on arrival."""

    folder: Path
    files: list[FileDigest]
    """Paths relative to the job's folder."""
    wheel: str
    """Its path relative to the job's folder."""

    @property
    def listed(self) -> list[tuple[str, int, str]]:
        """Path, size and SHA-256 of each file."""
        return [(file.path, file.bytes, file.sha256) for file in self.files]

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.files)

    def bytes_of(self, names: Collection[str]) -> int:
        """Bytes of these files."""
        wanted = set(names)
        return sum(file.bytes for file in self.files if file.path in wanted)


def make_job(
    host: str,
    port: int | None,
    command: Sequence[str],
    inputs: Sequence[Transfer],
    outputs: Sequence[Transfer],
    **more: Any,
) -> RemoteJob:
    """A job whose id depends on both machines, the command and the local paths, and on nothing else.

    Two computers that give the same command thus work in two folders there.
    """
    key = [own_name(), host, port, more.get("folder"), list(command)]
    key.append([item.local for item in (*inputs, *outputs)])
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    return RemoteJob(
        id=name,
        host=host,
        port=port,
        command=list(command),
        inputs=list(inputs),
        outputs=list(outputs),
        **more,
    )


def hub_model(text: str, remote: str) -> HubInput:
    """Read `hub:organisation/name[@revision]`."""
    spelled = text.removeprefix("hub:")
    if (model := spelled_model(spelled)) is None:
        raise UsageError(f"{text!r} names no model of the hub", expected="hub:organisation/name[@revision]")
    return HubInput(
        repository=model.repository, revision=model.revision if "@" in spelled else None, remote=remote
    )


@contextmanager
def pack_parcel(job: RemoteJob) -> Iterator[Parcel]:
    """Stage the inputs, the wheel and the versions; digests come from the cache where files are unchanged.

    Raises `InputError` for an input that is not there.
    """
    with tempfile.TemporaryDirectory(prefix="lorasmith-parcel-") as name:
        folder = Path(name)
        files: list[FileDigest] = []
        require_inputs(job.inputs)
        for item in job.inputs:
            local, link = Path(item.local), folder / item.remote
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(local.resolve())
            inner = folder_files(local) if local.is_dir() else [local]
            for file in describe(inner, local if local.is_dir() else local.parent):
                place = f"{item.remote}/{file.path}" if local.is_dir() else item.remote
                files.append(file.model_copy(update={"path": place}))
        wheel, packed = build_wheel()
        tool = folder / _TOOL
        tool.mkdir(parents=True)
        for file_name, content in ((wheel, packed), ("constraints.txt", constraints().encode())):
            (tool / file_name).write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
            files.append(FileDigest(path=f"{_TOOL}/{file_name}", bytes=len(content), sha256=digest))
        yield Parcel(folder, files, f"{_TOOL}/{wheel}")


def plan_job(job: RemoteJob, parcel: Parcel, job_folder: str) -> dict[str, Any]:
    """What the supervisor is told; `sha256` changes with whatever may change the results."""
    sent = sorted((file.path, file.sha256) for file in parcel.files)
    hub = [model.model_dump() for model in job.hub]
    content = {"command": job.command, "files": sent, "hub": hub, "extras": job.extras, "python": job.python}
    tool = [item for item in sent if item[0].startswith(_TOOL)]
    folder = Path(job_folder).parent.parent
    environment = hashlib.sha256(json.dumps([tool, job.extras, job.python]).encode()).hexdigest()[:16]
    return {
        "sha256": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        "command": job.command,
        "hub": hub,
        "extras": job.extras,
        "python": job.python,
        "env": f"{folder}/envs/{environment}",
        "cache": f"{folder}/hub",
        "wheel": f"{job_folder}/{parcel.wheel}",
        "constraints": f"{job_folder}/{_TOOL}/constraints.txt",
        "pip": [],
    }


def input_bytes(item: Transfer) -> int:
    """What an input takes here; what does not exist counts nothing, and is complained about later."""
    path = Path(item.local)
    files = folder_files(path) if path.is_dir() else [path] if path.exists() else []
    return sum(file.stat().st_size for file in files)


def require_inputs(inputs: Sequence[Transfer]) -> None:
    """Raise `InputError` for an input that is not there."""
    for item in inputs:
        if not Path(item.local).exists():
            raise InputError(
                "it does not exist",
                where=item.local,
                remedy="check the path; a model that the other machine is to fetch is hub:organisation/name",
            )


def require_free_outputs(outputs: Sequence[Transfer]) -> None:
    """Refuse to let results land on something that this job did not put there."""
    for item in outputs:
        place = Path(item.local)
        taken = any(place.iterdir()) if place.is_dir() else place.exists()
        if taken:
            raise UsageError(
                "the place for the results is taken",
                where=place,
                expected="a folder or file that does not exist yet",
                remedy="choose another --output, or move this one away",
            )


def staging(item: Transfer) -> Path:
    """Where results gather until all of them are verified: beside their place."""
    local = Path(item.local)
    return local.with_name(f".{local.name}.fetching")


def differing(folder: Path, files: Sequence[FileDigest]) -> list[str]:
    """The names of those files that are not in the folder as they should be."""
    wrong = []
    for file in files:
        path = folder / file.path
        with os_errors(path, "read"):
            if not path.is_file() or path.stat().st_size != file.bytes or hash_file(path) != file.sha256:
                wrong.append(file.path)
    return wrong


def delete(folder: Path, names: Sequence[str]) -> None:
    """Remove files of a folder, so that they are fetched from their beginning."""
    for name in names:
        with os_errors(folder / name, "remove"):
            (folder / name).unlink(missing_ok=True)
