"""Signatures: whoever holds the public key notices every change, even one with fitting checksums."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lorasmith.errors import DamageError, InputError, UsageError
from lorasmith.files.digests import read_sums, write_sums
from lorasmith.packaging.pack import pack
from lorasmith.packaging.signing import Signer, Verifier
from lorasmith.packaging.unpack import unpack
from lorasmith.packaging.verify import verify
from tests.samples import sample_run

pytest.importorskip("model_signing.signing", reason="the extra `sign` is not installed")

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec


def _keys(folder: Path, name: str) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed package, the maker's keys and a stranger's."""
    folder = tmp_path_factory.mktemp("signed")
    private, _ = _keys(folder, "maker")
    _keys(folder, "stranger")
    pack(sample_run(folder / "run", count=10), folder / "package", signer=Signer(private))
    return folder


def test_the_maker_s_key_opens_it(signed: Path, tmp_path: Path) -> None:
    verifier = Verifier(key=signed / "maker.pub")
    assert verify(signed / "package", verifier=verifier) == []
    unpack([signed / "package"], tmp_path / "out", verifier=verifier)
    assert verify(tmp_path / "out") == []


def test_the_library_s_own_command_accepts_it(signed: Path) -> None:
    command = [sys.executable, "-m", "model_signing", "verify", "key", "SHA256SUMS"]
    command += ["--signature", "SHA256SUMS.sig", "--public_key", str(signed / "maker.pub")]
    subprocess.run(command, cwd=signed / "package", check=True)


def test_a_stranger_s_key_does_not(signed: Path, tmp_path: Path) -> None:
    verifier = Verifier(key=signed / "stranger.pub")
    with pytest.raises(DamageError, match="signature does not hold"):
        unpack([signed / "package"], tmp_path / "out", verifier=verifier)
    assert not (tmp_path / "out").exists()
    assert [finding.severity for finding in verify(signed / "package", verifier=verifier)] == ["error"]


def test_a_change_with_fitting_checksums_is_noticed(signed: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    shutil.copytree(signed / "package", package)
    bom = json.loads((package / "bom.cdx.json").read_text())
    bom["metadata"]["component"]["name"] = "something better"
    content = json.dumps(bom).encode()
    (package / "bom.cdx.json").write_bytes(content)
    write_sums(package, {**read_sums(package), "bom.cdx.json": hashlib.sha256(content).hexdigest()})
    assert [finding.code for finding in verify(package)] == ["signature-not-checked"]
    with pytest.raises(DamageError, match="signature does not hold"):
        unpack([package], tmp_path / "out", verifier=Verifier(key=signed / "maker.pub"))


def test_a_damaged_or_missing_signature_is_told(signed: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    shutil.copytree(signed / "package", package)
    signature = package / "SHA256SUMS.sig"
    signature.write_bytes(signature.read_bytes()[:-20])
    verifier = Verifier(key=signed / "maker.pub")
    with pytest.raises(DamageError):
        unpack([package], tmp_path / "out", verifier=verifier)
    signature.unlink()
    with pytest.raises(InputError, match="not signed"):
        unpack([package], tmp_path / "out", verifier=verifier)


def test_keys_that_are_none_are_named(signed: Path, tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text("no key")
    with pytest.raises(InputError, match="cannot sign"):
        pack(signed / "run", tmp_path / "package", signer=Signer(tmp_path / "key.pem"))
    with pytest.raises(InputError, match="does not exist"):
        pack(signed / "run", tmp_path / "package", signer=Signer(tmp_path / "gone.pem"))
    assert not (tmp_path / "package").exists()
    with pytest.raises(UsageError, match="nobody was named"):
        unpack([signed / "package"], tmp_path / "out", verifier=Verifier())
