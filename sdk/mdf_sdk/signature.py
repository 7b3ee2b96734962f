"""An Ed25519 signature over manifest.json: who vouches for an engine, and through it every file.

manifest.sig holds the 64 raw bytes of the signature over the exact bytes of manifest.json, so that
OpenSSL alone (3.0 or later) makes keys, checks a signature and signs:

    openssl genpkey -algorithm ed25519 -out private.pem
    openssl pkey -in private.pem -pubout -out public.pem
    openssl pkeyutl -verify -pubin -inkey public.pem -rawin -in manifest.json -sigfile manifest.sig
    openssl pkeyutl -sign -inkey private.pem -rawin -in manifest.json -out manifest.sig

and the fingerprint that `mdf verify --key` prints is that of

    openssl pkey -pubin -in public.pem -outform DER | openssl dgst -sha256
"""

import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from mdf_sdk.errors import InputError, SignatureError, StorageError
from mdf_sdk.integrity import check_files
from mdf_sdk.manifest import (
    MANIFEST_NAME,
    SIGNATURE_NAME,
    TrustedKey,
    parse_manifest,
    read_manifest,
)

_SIGNATURE_BYTES = 64
_MAX_KEY_BYTES = 100_000


def sign_engine(
    engine_dir: str | os.PathLike[str], private_key_path: str | os.PathLike[str]
) -> str:
    """Check every file of an engine, then sign its manifest; an earlier signature is replaced.

    Args:
        private_key_path: Ed25519, PEM, PKCS #8, not encrypted.

    Returns:
        The fingerprint of the key's public half.

    Raises:
        EngineError: the engine is not whole.
        InputError: the key is none.
        StorageError: the signature cannot be written.
    """
    data = read_manifest(engine_dir)
    signature, signer = sign_bytes(data, private_key_path)
    check_files(engine_dir, parse_manifest(data))
    path = Path(engine_dir) / SIGNATURE_NAME
    unfinished = path.with_suffix(".part")
    try:
        unfinished.write_bytes(signature)
        unfinished.replace(path)
    except OSError as error:
        with suppress(OSError):  # a surplus file would make the engine unusable
            unfinished.unlink()
        raise StorageError(
            f"{path}: could not be written ({error.strerror}), expected room for 64 bytes and "
            "permission to write. Cure that, then sign again: mdf sign ENGINE --key PRIVATE.pem"
        ) from error
    return signer


def check_signature(data: bytes, engine_dir: Path, trusted_key: TrustedKey) -> None:
    """Check that manifest.sig is the trusted key's signature over `data`.

    Args:
        data: the content of manifest.json.

    Raises:
        SignatureError: there is no signature, or it is not the key's over these bytes.
        InputError: the trusted key is none.
    """
    if not is_signed(data, _read_signature(engine_dir / SIGNATURE_NAME), trusted_key):
        raise SignatureError(
            f"{engine_dir}: found a signature of another key or over another {MANIFEST_NAME}, "
            f"expected one by the key {fingerprint(trusted_key)}. Do not use this engine. Get it "
            "again from who made it, or, if you trust it, sign it: mdf sign ENGINE --key "
            "PRIVATE.pem"
        )


def sign_bytes(data: bytes, private_key_path: str | os.PathLike[str]) -> tuple[bytes, str]:
    """Return the 64 bytes of a signature, and the fingerprint of the key's public half.

    Raises:
        InputError: the key is none.
    """
    key = _load_private_key(private_key_path)
    return key.sign(data), _fingerprint(key.public_key())


def is_signed(data: bytes, signature: bytes, trusted_key: TrustedKey) -> bool:
    """Say whether a signature is the trusted key's over these bytes.

    Raises:
        InputError: the trusted key is none.
    """
    try:
        _load_public_key(trusted_key).verify(signature, data)
    except InvalidSignature:
        return False
    return True


def fingerprint(trusted_key: TrustedKey) -> str:
    """Return the SHA-256 of a public key's SubjectPublicKeyInfo in DER, 64 hex digits.

    Raises:
        InputError: the key is none.
    """
    return _fingerprint(_load_public_key(trusted_key))


def _fingerprint(key: Ed25519PublicKey) -> str:
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def _load_private_key(path: str | os.PathLike[str]) -> Ed25519PrivateKey:
    expected = "an Ed25519 private key as PEM (PKCS #8)"
    cure = "Make one: openssl genpkey -algorithm ed25519 -out private.pem"
    name, pem = f"key {os.fspath(path)!r}", _read_key(Path(path))
    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError as error:  # it wants a password
        raise _unusable(
            name,
            "an encrypted private key",
            "one that needs no passphrase",
            "Sign with OpenSSL, which asks for it (in the engine's directory): openssl pkeyutl "
            f"-sign -inkey {path} -rawin -in {MANIFEST_NAME} -out {SIGNATURE_NAME}",
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        found = "a public key" if b"PUBLIC KEY" in pem else "no private key"
        raise _unusable(name, found, expected, cure) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _unusable(name, f"an {type(key).__name__.lstrip('_')}", expected, cure)
    return key


def _load_public_key(trusted_key: TrustedKey) -> Ed25519PublicKey:
    expected = "an Ed25519 public key as PEM (SubjectPublicKeyInfo)"
    if isinstance(trusted_key, bytes):
        name, pem = "trusted key", trusted_key
    elif isinstance(trusted_key, str) and "-----BEGIN" in trusted_key:  # may be a secret: not shown
        raise _unusable("trusted key", "PEM text", "a path, or PEM as bytes", "Pass text.encode()")
    else:
        name, pem = f"key {os.fspath(trusted_key)!r}", _read_key(Path(trusted_key))
    if b"PRIVATE KEY" in pem:
        raise _unusable(
            name,
            "a private key, which belongs to who signs and to no one else",
            expected,
            "Pass its public half: openssl pkey -in private.pem -pubout -out public.pem",
        )
    cure = "Get it from who signs the engine: openssl pkey -in private.pem -pubout -out public.pem"
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _unusable(name, "no public key", expected, cure) from error
    if not isinstance(key, Ed25519PublicKey):
        raise _unusable(name, f"an {type(key).__name__.lstrip('_')}", expected, cure)
    return key


def _read_key(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_KEY_BYTES)
    except (OSError, ValueError) as error:  # ValueError: no path at all
        reason = getattr(error, "strerror", error)
        raise InputError(
            f"key {str(path)!r}: could not be read ({reason}), expected a PEM file. "
            "Check the path and its permissions"
        ) from error


def _read_signature(path: Path) -> bytes:
    try:
        regular = stat.S_ISREG(path.lstat().st_mode)
        if regular:
            with path.open("rb") as file:
                signature = file.read(_SIGNATURE_BYTES + 1)
    except FileNotFoundError as error:
        raise _unsigned(path, "no signature") from error
    except OSError as error:
        raise _unsigned(path, f"a signature that cannot be read ({error.strerror})") from error
    if not regular:
        raise _unsigned(path, "a link or special file")
    if len(signature) != _SIGNATURE_BYTES:
        raise _unsigned(path, "another number of bytes")
    return signature


def _unsigned(path: Path, found: str) -> SignatureError:
    return SignatureError(
        f"{path}: found {found}, expected the {_SIGNATURE_BYTES} bytes that mdf sign writes. "
        "`mdf compile` removes the signature. If you trust the engine, sign it: "
        "mdf sign ENGINE --key PRIVATE.pem"
    )


def _unusable(name: str, found: str, expected: str, cure: str) -> InputError:
    return InputError(f"{name}: found {found}, expected {expected}. {cure}")
