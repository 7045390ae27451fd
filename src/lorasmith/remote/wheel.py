"""The lorasmith that runs here, as a wheel for another machine, and the versions it runs with."""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile
from importlib.metadata import distribution, distributions
from pathlib import Path

import lorasmith

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
    found = {
        (dist.metadata["Name"] or "").lower(): dist.version.split("+")[0]
        for dist in distributions()
        if dist.metadata["Name"]
    }
    found.pop("lorasmith", None)
    # What belongs to an environment rather than to the work in it.
    for name in ("pip", "setuptools", "wheel"):
        found.pop(name, None)
    return "".join(f"{name}=={version}\n" for name, version in sorted(found.items()))
