import base64
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdf_sdk import (
    IntegrityError,
    ManifestError,
    SignatureError,
    check_files,
    load_manifest,
)
from mdf_sdk.errors import InputError, MissingExtraError, StorageError

pytest.importorskip("cryptography")

from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from mdf_sdk.signature import fingerprint, sign_engine

OPENSSL = shutil.which("openssl")
needs_openssl = pytest.mark.skipif(OPENSSL is None, reason="openssl is not installed")


def private_pem(key: "ed25519.Ed25519PrivateKey", password: bytes = b"") -> bytes:
    how: KeySerializationEncryption = NoEncryption()
    if password:
        how = BestAvailableEncryption(password)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how)


def public_pem(key: "ed25519.Ed25519PrivateKey") -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def wrap(data: bytes) -> bytes:
    """Make bytes look like a key in PEM."""
    body = base64.b64encode(data)
    return b"-----BEGIN PUBLIC KEY-----\n" + body + b"\n-----END PUBLIC KEY-----\n"


KEY = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32))
PUBLIC = public_pem(KEY)


@pytest.fixture
def private_key(tmp_path: Path) -> Path:
    path = tmp_path / "private.pem"
    path.write_bytes(private_pem(KEY))
    return path


@pytest.fixture
def signed(toy_copy: Path, private_key: Path) -> Path:
    """A copy of the engine, signed with KEY."""
    sign_engine(toy_copy, private_key)
    return toy_copy


def test_what_is_signed_loads_with_the_public_key(signed: Path, tmp_path: Path) -> None:
    path = tmp_path / "public.pem"
    path.write_bytes(PUBLIC)
    assert load_manifest(signed, path) == load_manifest(signed, PUBLIC) == load_manifest(signed)


def test_signing_returns_the_fingerprint_of_the_public_key(
    toy_copy: Path, private_key: Path
) -> None:
    assert sign_engine(toy_copy, private_key) == fingerprint(PUBLIC)


def test_a_signature_is_64_bytes_and_leaves_nothing_else(signed: Path, toy_engine: Path) -> None:
    assert (signed / "manifest.sig").stat().st_size == 64
    added = {path.name for path in signed.iterdir()} - {path.name for path in toy_engine.iterdir()}
    assert added == {"manifest.sig"}


def test_signing_again_replaces_the_signature(signed: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.pem"
    path.write_bytes(private_pem(OTHER))
    sign_engine(signed, path)
    load_manifest(signed, public_pem(OTHER))
    with pytest.raises(SignatureError, match="another key"):
        load_manifest(signed, PUBLIC)


def test_an_unsigned_engine_is_refused_with_its_cure(toy_engine: Path) -> None:
    with pytest.raises(SignatureError, match=r"found no signature.*mdf sign ENGINE --key"):
        load_manifest(toy_engine, PUBLIC)


@pytest.mark.parametrize("content", [b"", b"x" * 63, b"x" * 64, b"x" * 65])
def test_a_false_signature_is_refused(toy_copy: Path, content: bytes) -> None:
    (toy_copy / "manifest.sig").write_bytes(content)
    with pytest.raises(SignatureError, match="mdf sign ENGINE --key"):
        load_manifest(toy_copy, PUBLIC)


def test_a_linked_signature_is_refused(signed: Path, tmp_path: Path) -> None:
    (signed / "manifest.sig").rename(tmp_path / "elsewhere")
    (signed / "manifest.sig").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SignatureError, match="link or special file"):
        load_manifest(signed, PUBLIC)


def test_an_unsigned_manifest_is_never_parsed(signed: Path) -> None:
    (signed / "manifest.json").write_bytes(b"no JSON at all")
    with pytest.raises(ManifestError, match="invalid JSON"):
        load_manifest(signed)
    with pytest.raises(SignatureError):
        load_manifest(signed, PUBLIC)


@given(data=st.data())
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300
)
def test_every_flip_of_a_bit_of_a_signed_manifest_is_refused(
    signed: Path, data: st.DataObject
) -> None:
    path = signed / data.draw(st.sampled_from(["manifest.json", "manifest.sig"]))
    whole = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    changed = bytearray(whole)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    try:
        with pytest.raises(SignatureError):
            load_manifest(signed, PUBLIC)
    finally:
        path.write_bytes(whole)


def test_a_damaged_engine_is_not_signed(toy_copy: Path, private_key: Path) -> None:
    (toy_copy / "vision.onnx").write_bytes(b"damaged")
    with pytest.raises(IntegrityError, match=r"vision\.onnx"):
        sign_engine(toy_copy, private_key)
    assert not (toy_copy / "manifest.sig").exists()


def test_a_signature_that_cannot_be_written_leaves_the_one_before(
    signed: Path, tmp_path: Path
) -> None:
    path = tmp_path / "other.pem"
    path.write_bytes(private_pem(OTHER))
    (signed / "manifest.part").mkdir()
    with pytest.raises(StorageError, match="mdf sign"):
        sign_engine(signed, path)
    load_manifest(signed, PUBLIC)


def test_a_full_disk_leaves_nothing_that_would_make_the_engine_unusable(
    signed: Path, private_key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def fill(path: Path, data: bytes) -> int:
        write(path, data[:9])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fill)
        with pytest.raises(StorageError, match="No space left"):
            sign_engine(signed, private_key)
    check_files(signed, load_manifest(signed, PUBLIC))


def pem(name: str) -> bytes:
    """Keys and other texts that are not what is asked for."""
    if name == "RSA":
        rsa_key = rsa.generate_private_key(65537, 2048).public_key()
        return rsa_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    if name == "elliptic":
        ec_key = ec.generate_private_key(ec.SECP256R1()).public_key()
        return ec_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    if name == "Ed448":
        ed_key = ed448.Ed448PrivateKey.generate().public_key()
        return ed_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    if name == "OpenSSH":
        return KEY.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return {
        "private": private_pem(KEY),
        "encrypted": private_pem(KEY, b"secret"),
        "empty": b"",
        "noise": bytes(range(256)),
        "cut": PUBLIC[:60],
    }[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RSA", "found an RSAPublicKey, expected an Ed25519 public key"),
        ("elliptic", "found an EllipticCurvePublicKey|ECPublicKey"),
        ("Ed448", "found an Ed448PublicKey"),
        ("OpenSSH", "found no public key"),
        ("private", "a private key, which belongs to who signs.*openssl pkey -in"),
        ("encrypted", "a private key, which belongs to who signs"),
        ("empty", "found no public key"),
        ("noise", "found no public key"),
        ("cut", "found no public key"),
    ],
)
def test_a_trusted_key_that_is_none_is_refused(signed: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_manifest(signed, pem(name))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RSA", "found a public key, expected an Ed25519 private key"),
        ("encrypted", "needs no passphrase.*openssl pkeyutl -sign"),
        ("empty", "found no private key.*openssl genpkey -algorithm ed25519"),
        ("noise", "found no private key"),
    ],
)
def test_a_signing_key_that_is_none_is_refused(
    toy_copy: Path, tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "key.pem").write_bytes(pem(name))
    with pytest.raises(InputError, match=message):
        sign_engine(toy_copy, tmp_path / "key.pem")
    assert not (toy_copy / "manifest.sig").exists()


def test_a_signing_key_of_another_kind_is_refused(toy_copy: Path, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    text = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "key.pem").write_bytes(text)
    with pytest.raises(InputError, match="PrivateKey, expected an Ed25519 private key"):
        sign_engine(toy_copy, tmp_path / "key.pem")


@pytest.mark.parametrize("name", ["nowhere.pem", ".", "a\x00b"])
def test_a_key_that_cannot_be_read_is_named(signed: Path, tmp_path: Path, name: str) -> None:
    path = os.path.join(tmp_path, name)  # noqa: PTH118 -- keeps the null character
    with pytest.raises(InputError, match="could not be read"):
        load_manifest(signed, path)
    with pytest.raises(InputError, match="could not be read"):
        sign_engine(signed, path)


def test_a_key_passed_as_text_is_not_repeated(signed: Path) -> None:
    with pytest.raises(InputError, match=r"encode\(\)") as caught:
        load_manifest(signed, private_pem(KEY).decode())
    assert "BEGIN" not in str(caught.value)


@given(data=st.binary() | st.binary(max_size=60).map(wrap))
@settings(deadline=None)
def test_arbitrary_bytes_are_no_key(data: bytes) -> None:
    with pytest.raises(InputError):
        fingerprint(data)


@needs_openssl
def test_openssl_alone_makes_keys_checks_signs_and_names_them(
    toy_copy: Path, tmp_path: Path
) -> None:
    """The lines that the module's docstring shows."""
    import mdf_sdk.signature

    lines = [line for line in (mdf_sdk.signature.__doc__ or "").splitlines() if "openssl" in line]
    make, publish, check, sign, name = (line.strip() for line in lines)

    def run(line: str) -> str:
        done = subprocess.run(line, cwd=tmp_path, shell=True, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    shutil.copy(toy_copy / "manifest.json", tmp_path)
    run(make)
    run(publish)
    sign_engine(toy_copy, tmp_path / "private.pem")
    shutil.copy(toy_copy / "manifest.sig", tmp_path)
    assert "Success" in run(check)
    (tmp_path / "manifest.sig").unlink()
    run(sign)
    assert (tmp_path / "manifest.sig").read_bytes() == (toy_copy / "manifest.sig").read_bytes()
    load_manifest(toy_copy, tmp_path / "public.pem")
    assert fingerprint(tmp_path / "public.pem") in run(name)


def test_without_cryptography_the_extra_is_named(
    signed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_manifest(signed)
    monkeypatch.delitem(sys.modules, "mdf_sdk.signature")
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mdf-mllm\[sign\]'"):
        load_manifest(signed, PUBLIC)
