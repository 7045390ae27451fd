"""Signatures: whoever holds the public key notices every change, even one with fitting checksums."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lorasmith.errors import DamageError, InputError, UsageError
from lorasmith.files.digests import read_sums, reseal, seal_run, write_sums
from lorasmith.packaging.pack import pack
from lorasmith.packaging.signing import Signer, Verifier, sign_folder
from lorasmith.packaging.unpack import unpack
from lorasmith.packaging.verify import verify
from tests.samples import sample_run
from tests.typed import Typed

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
    assert unpack([signed / "package"], tmp_path / "out", verifier=verifier).findings == []
    assert [finding.code for finding in verify(tmp_path / "out")] == ["signature-not-checked"]


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


# What was unpacked keeps the list that was signed: it can be checked against the key at any later time.


def _reseal(folder: Path) -> None:
    """What a forger does after a change: a fitting manifest, and checksums that fit everything."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for members in manifest["contents"].values():
        for member in members:
            content = (folder / member["path"]).read_bytes()
            member |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    names = [path for path in folder.rglob("*") if path.is_file() and path != folder / "SHA256SUMS"]
    write_sums(
        folder,
        {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in names
        },
    )


def _edit(folder: Path) -> None:
    (folder / "merged_model" / "config.json").write_text("{}")


def _add(folder: Path) -> None:
    (folder / "merged_model" / "modeling_x.py").write_text("boom")


def _swap_companion(folder: Path) -> None:
    (folder / "bom.cdx.json").write_text("{}")


def _drop_signature(folder: Path) -> None:
    shutil.rmtree(folder / "signed")


def _drop_signed_list(folder: Path) -> None:
    (folder / "signed" / "SHA256SUMS").unlink()


def _sign_as_a_stranger(folder: Path) -> None:
    shutil.copy(folder / "manifest.json", folder / "signed" / "manifest.json")
    sha = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    write_sums(folder / "signed", {"manifest.json": sha})
    sign_folder(folder / "signed", Signer(folder.parent / "stranger.pem"))


@pytest.mark.parametrize("reseal_it", [False, True], ids=["as it is", "resealed"])
@pytest.mark.parametrize(
    "forge",
    [_edit, _add, _swap_companion, _drop_signature, _drop_signed_list, _sign_as_a_stranger],
    ids=lambda forge: forge.__name__.strip("_").replace("_", " "),
)
def test_an_unpacked_package_is_held_to_the_signature_later(
    signed: Path, tmp_path: Path, forge: Callable[[Path], None], reseal_it: bool
) -> None:
    verifier = Verifier(key=signed / "maker.pub")
    for key in signed.glob("*.pem"):
        shutil.copy(key, tmp_path)
    unpack([signed / "package"], tmp_path / "out")
    assert verify(tmp_path / "out", verifier=verifier) == []
    forge(tmp_path / "out")
    if reseal_it:
        _reseal(tmp_path / "out")
    assert "error" in {finding.severity for finding in verify(tmp_path / "out", verifier=verifier)}


def test_archives_that_come_later_leave_the_signature_in_place(signed: Path, tmp_path: Path) -> None:
    verifier = Verifier(key=signed / "maker.pub")
    unpack([signed / "package" / "validation_results.tar.gz"], tmp_path / "out")
    assert verify(tmp_path / "out", verifier=verifier) == []
    shutil.copytree(signed / "package", tmp_path / "again")
    (tmp_path / "again" / "SHA256SUMS.sig").unlink()
    (tmp_path / "again" / "bom.cdx.json").unlink()
    unpack([tmp_path / "again"], tmp_path / "out")
    assert (tmp_path / "out" / "merged_model").is_dir()
    assert verify(tmp_path / "out", verifier=verifier) == []


# A run folder: with a key asked for, its own list must be signed as well as that of the package in it.


@pytest.fixture
def run(signed: Path, tmp_path: Path) -> Path:
    """A sealed and signed run with a signed package."""
    folder = Path(shutil.copytree(signed / "run", tmp_path / "run"))
    (folder / "report.html").write_text("<p>two gates failed</p>")
    shutil.copytree(signed / "package", folder / "package")
    seal_run(folder)
    sign_folder(folder, Signer(signed / "maker.pem"))
    return folder


def _alter_the_page(run: Path) -> None:
    (run / "report.html").write_text("<p>all gates passed</p>")


def _nothing(run: Path) -> None:
    """Only the seal is made anew."""


@pytest.mark.parametrize("forge", [_nothing, _alter_the_page])
def test_a_run_that_was_resealed_does_not_pass_with_a_key(
    signed: Path, run: Path, forge: Callable[[Path], None]
) -> None:
    verifier = Verifier(key=signed / "maker.pub")
    assert verify(run, verifier=verifier) == []
    signature = (run / "SHA256SUMS.sig").read_bytes()
    forge(run)
    seal_run(run)
    if forge is not _nothing:
        assert [finding.severity for finding in verify(run, verifier=verifier)] == ["error"]
    (run / "SHA256SUMS.sig").unlink()
    assert [finding.severity for finding in verify(run, verifier=verifier)] == ["error"]
    (run / "SHA256SUMS.sig").write_bytes(signature[:-9])
    assert [finding.severity for finding in verify(run, verifier=verifier)] == ["error"]


@pytest.mark.parametrize("gone", ["SHA256SUMS", "package", "package/SHA256SUMS.sig", "package/SHA256SUMS"])
def test_whatever_is_missing_nothing_unsigned_passes(signed: Path, run: Path, gone: str) -> None:
    path = run / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "error" in {finding.severity for finding in verify(run, verifier=Verifier(signed / "maker.pub"))}
    if gone != "SHA256SUMS":
        seal_run(run)
        assert "error" in {f.severity for f in verify(run, verifier=Verifier(signed / "maker.pub"))}


def test_a_change_of_our_own_takes_the_signature_away(signed: Path, run: Path) -> None:
    _alter_the_page(run)
    assert reseal(run, run / "report.html")
    assert not (run / "SHA256SUMS.sig").exists()
    assert verify(run, verifier=Verifier(signed / "maker.pub"))[0].message == "this is not signed"
    assert not reseal(run, run / "report.html")


def test_package_with_a_key_signs_the_run_as_well(signed: Path, run: Path, here: Typed) -> None:
    (run / "SHA256SUMS.sig").unlink()
    assert here("verify", run, "--public-key", signed / "maker.pub").returncode == 1
    assert here("package", run, "--sign", signed / "maker.pem").returncode == 0
    assert here("verify", run, "--public-key", signed / "maker.pub").returncode == 0
    done = here("report", run)
    assert "signature was removed" in done.stderr
    done = here("verify", run, "--public-key", signed / "maker.pub")
    assert done.returncode == 1
    assert "not signed" in done.stdout
