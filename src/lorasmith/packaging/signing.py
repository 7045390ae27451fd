"""A signature over `SHA256SUMS`, and through it over every file of a package (OpenSSF model signing).

The signature is a Sigstore bundle that `model_signing verify` reads as well. It lies beside the package's
files and in no list of checksums; it differs each time, while all that it signs does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.errors import DamageError, InputError, MachineError, UsageError, os_errors
from lorasmith.files.digests import SIGNATURE, SUMS

SIGNED = "signed"
"""Folder of an unpacked package that keeps the list that was signed, and its signature."""


@dataclass(frozen=True)
class Signer:
    """Who signs: the holder of a private key (PEM, elliptic curve), or a person known to Sigstore."""

    key: Path | None
    """The private key; None for Sigstore, which asks in a browser or takes the credentials of a CI system."""
    password: str | None = None


@dataclass(frozen=True)
class Verifier:
    """Whose signature is accepted: that of a public key (PEM), or of a Sigstore identity."""

    key: Path | None = None
    identity: str | None = None
    """Mail address or workflow of the signer, with `issuer`."""
    issuer: str | None = None


def sign_folder(folder: Path, signer: Signer) -> None:
    """Sign the `SHA256SUMS` of a package or a run folder.

    Raises `InputError` for a key that cannot be used, `MachineError` where signing fails or is not installed.
    """
    signing = _library("signing").Config()
    if signer.key is not None:
        _require(signer.key, "the private key")
        try:
            signing.use_elliptic_key_signer(private_key=signer.key, password=signer.password)
        except (ValueError, TypeError) as error:
            raise InputError(
                f"this key cannot sign: {error}",
                where=signer.key,
                expected="a private key of an elliptic curve in PEM, and its password if it has one",
            ) from error
    else:
        signing.use_sigstore_signer(use_ambient_credentials=True)
    try:
        signing.sign(folder / SUMS, folder / SIGNATURE)
    except (
        Exception
    ) as error:  # The library and Sigstore raise many kinds; none of them is ours to tell apart.
        raise MachineError(f"signing failed: {error}", where=folder) from error


def check_signature(folder: Path, verifier: Verifier) -> None:
    """Raise `DamageError` unless the `SHA256SUMS` of `folder` bears the signature that is asked for.

    Raises `InputError` for a folder without a signature or an unusable key.
    """
    config = _library("verifying").Config()
    if not (folder / SIGNATURE).is_file():
        raise InputError(
            "this is not signed",
            where=folder,
            expected=f"{SIGNATURE}, made with the key that was asked for",
            remedy="fetch the signature as well; a run is signed by `lorasmith package RUN --sign KEY`",
        )
    if verifier.key is not None:
        _require(verifier.key, "the public key")
        try:
            config.use_elliptic_key_verifier(public_key=verifier.key)
        except (ValueError, TypeError) as error:
            raise InputError(
                f"this key cannot verify: {error}",
                where=verifier.key,
                expected="a public key of an elliptic curve in PEM",
            ) from error
    elif verifier.identity and verifier.issuer:
        config.use_sigstore_verifier(identity=verifier.identity, oidc_issuer=verifier.issuer)
    else:
        raise UsageError("nobody was named to have signed", expected="a public key, or identity and issuer")
    try:
        config.verify(folder / SUMS, folder / SIGNATURE)
    except Exception as error:  # Whatever goes wrong with a signature, the package is not to be trusted.
        raise DamageError(
            "the signature does not hold",
            where=folder / SIGNATURE,
            expected=f"a signature of {SUMS} by {verifier.key or verifier.identity} ({error})",
            remedy="do not use the package; ask its maker",
        ) from error


def _library(module: str) -> Any:
    try:
        import model_signing
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:
        raise MachineError(
            f"signatures need a package that is not installed: {error.name}",
            remedy="pip install 'lorasmith[sign]'",
        ) from error
    return getattr(model_signing, module)


def _require(path: Path, what: str) -> None:
    with os_errors(path, f"read {what}"), path.open("rb"):
        pass
