"""A parity report as one JSON document: sealed, signed, and held against an engine anywhere.

Needs the SDK alone: a clinic checks a certificate where there is no PyTorch. The canonical form is
JSON with sorted keys, no spaces and no NaN, in UTF-8. `sha256` is over the document without itself
and the signature; `signature` is Ed25519 over the document without the signature.
docs/parity-certificate.schema.json describes every field.
"""

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mdf_sdk.errors import CertificateError, StorageError
from mdf_sdk.extras import import_extra
from mdf_sdk.integrity import check_files
from mdf_sdk.manifest import TrustedKey, parse_manifest, read_manifest

FORMAT_NAME = "mdf-parity-certificate"
FORMAT_VERSION = 1
_MAX_BYTES = 100_000_000  # one of 100,000 cases that all flip has 20 MB
_AGAIN = "Measure again: mdf parity ENGINE --reference CHECKPOINT --data DATA --out CERT.json"


@dataclass(frozen=True)
class CertificateReport:
    """What a certificate says of an engine.

    Attributes:
        speaks: whether the engine is, bit for bit, the one that was measured.
        verdict: "pass" or "fail", of the engine that was measured.
        reason: why it does not speak of this one; empty where it does.
        first_fault: of a failing verdict.
        signed_by: fingerprint of the key whose signature was checked; None if none was.
    """

    speaks: bool
    verdict: str
    reason: str
    first_fault: str
    date: str
    signed_by: str | None

    @property
    def ok(self) -> bool:
        """Whether this very engine has passed."""
        return self.speaks and self.verdict == "pass"

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {**asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        lines = [
            "the certificate speaks of this engine"
            if self.speaks
            else f"the certificate does NOT speak of this engine: {self.reason}"
        ]
        fault = f" ({self.first_fault})" if self.first_fault else ""
        lines.append(f"its verdict of {self.date}: {self.verdict.upper()}{fault}")
        if self.signed_by is not None:
            lines.append(f"signed by the key with SHA-256 {self.signed_by}")
        return "\n".join(lines)


def seal(
    document: Mapping[str, Any], private_key: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Add the digest of the content and, with an Ed25519 private key (PEM), a signature.

    Raises:
        InputError: the key is none.
        MissingExtraError: signatures need the extra `sign`.
    """
    sealed = {**document, "sha256": hashlib.sha256(canonical(document)).hexdigest()}
    if private_key is not None:
        sign_bytes = import_extra("mdf_sdk.signature", "sign").sign_bytes
        value, signer = sign_bytes(canonical(sealed), private_key)
        sealed["signature"] = {
            "algorithm": "ed25519",
            "key_sha256": signer,
            "value": base64.b64encode(value).decode("ascii"),
        }
    return sealed


def canonical(document: Mapping[str, Any]) -> bytes:
    """Return the bytes that are hashed and signed."""
    text = json.dumps(
        document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode("utf-8")


def save_certificate(document: Mapping[str, Any], path: Path) -> None:
    """Write a sealed document for people and machines; an earlier file is replaced.

    Raises:
        StorageError: it cannot be written.
    """
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"{path}: {error.strerror}; expected a file that can be written. Name another: --out"
        ) from error


def check_certificate(
    path: Path, engine_dir: Path, trusted_key: TrustedKey | None = None
) -> CertificateReport:
    """Check a certificate's own seal, then say whether it speaks of an engine.

    Args:
        trusted_key: whose signature the certificate must have; None asks for none.

    Raises:
        CertificateError: it is no certificate, was altered, or is not signed by the trusted key.
        EngineError: the engine's files are not what its manifest says.
        InputError: the trusted key is none.
    """
    document = _read(path)
    signed_by = None if trusted_key is None else _check_signature(path, document, trusted_key)
    data = read_manifest(engine_dir)
    check_files(engine_dir, parse_manifest(data))
    found, certified = hashlib.sha256(data).hexdigest(), document["engine"]["manifest_sha256"]
    reason = ""
    if found != certified:
        reason = (
            f"its manifest has SHA-256 {found[:12]}, the one that was measured {certified[:12]}. "
            "It was exported or compiled again, or altered"
        )
    fault = document["first_fault"]
    return CertificateReport(
        speaks=not reason,
        verdict=document["verdict"],
        reason=reason,
        first_fault="" if fault is None else f"{fault['check']}: {fault['where']}",
        date=document["date"],
        signed_by=signed_by,
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise CertificateError(
            f"{path}: could not be read ({error.strerror}), expected a certificate. {_AGAIN}"
        ) from error
    try:
        if len(data) > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES} bytes")
        document: dict[str, Any] = json.loads(
            data.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique
        )
        _check_form(document)
        content = {k: v for k, v in document.items() if k not in ("sha256", "signature")}
        digest = hashlib.sha256(canonical(content)).hexdigest()
    except (ValueError, RecursionError) as error:
        raise CertificateError(
            f"{path}: found {str(error)[:200]}, expected a parity certificate of version "
            f"{FORMAT_VERSION}. {_AGAIN}"
        ) from error
    if digest != document["sha256"]:
        raise CertificateError(
            f"{path}: found content with SHA-256 {digest[:12]}, expected "
            f"{document['sha256'][:12]}: it was altered. Get it again from who issued it. {_AGAIN}"
        )
    return document


def _check_form(document: Any) -> None:
    """Raise ValueError where a field that is read here is not there or of another type."""
    if not isinstance(document, dict) or document.get("format") != FORMAT_NAME:
        raise ValueError("another document")
    if document.get("version") != FORMAT_VERSION:
        raise ValueError(f"version {document.get('version')!r}")
    engine, fault = document.get("engine"), document.get("first_fault")
    fields = {
        "sha256": document.get("sha256"),
        "date": document.get("date"),
        "engine.manifest_sha256": engine.get("manifest_sha256") if isinstance(engine, dict) else 0,
    }
    if fault is not None:
        for name in ("check", "where"):
            fields[f"first_fault.{name}"] = fault.get(name) if isinstance(fault, dict) else 0
    for name, value in fields.items():
        if not isinstance(value, str):
            raise ValueError(f"no text in {name}")
    if document.get("verdict") not in ("pass", "fail"):
        raise ValueError(f"the verdict {document.get('verdict')!r}")


def _check_signature(path: Path, document: Mapping[str, Any], trusted_key: TrustedKey) -> str:
    """Return the trusted key's fingerprint where the signature is its own."""
    signature = import_extra("mdf_sdk.signature", "sign")
    signer: str = signature.fingerprint(trusted_key)
    content = {k: v for k, v in document.items() if k != "signature"}
    try:
        value = base64.b64decode(document["signature"]["value"], validate=True)
    except (KeyError, TypeError, binascii.Error):
        found = "no signature"
    else:
        if signature.is_signed(canonical(content), value, trusted_key):
            return signer
        found = "a signature of another key, or over other content"
    raise CertificateError(
        f"{path}: found {found}, expected one by the key {signer}. Do not rely on it. Get it from "
        "who issued it; who measures signs with: mdf parity ... --key PRIVATE.pem"
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key twice in one object")
    return document


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
