"""mdf_benchmarks.parity.certificate: it says what was measured, and of which engine."""

import copy
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from mdf_benchmarks.parity.certificate import (
    canonical,
    check_certificate,
    save_certificate,
    seal,
)
from mdf_benchmarks.parity.compare import compare_engine
from mdf_benchmarks.parity.reference import Reference
from mdf_sdk.cli import main
from mdf_sdk.errors import CertificateError, EngineError, InputError, IntegrityError

from .conftest import WIDE, Planter, make_keys

SCHEMA = Path(__file__).parents[3] / "docs" / "parity-certificate.schema.json"
VALIDATOR = Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def content(reference: Reference, tiny_engine: Path) -> dict[str, Any]:
    """The certificate of the tiny engine, not sealed."""
    return compare_engine(reference, tiny_engine, WIDE).to_dict()


@pytest.fixture
def saved(content: dict[str, Any], keys: tuple[Path, Path], tmp_path: Path) -> Path:
    """The signed certificate as a file."""
    path = tmp_path / "cert.json"
    save_certificate(seal(content, keys[0]), path)
    return path


def change(path: Path, edit: Any, *, reseal: bool = False) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    edit(document)
    if reseal:
        signature = document.pop("signature")
        document.pop("sha256")
        document = {**seal(document), "signature": signature}
    path.write_text(json.dumps(document), encoding="utf-8")


def test_the_schema_is_one_and_takes_what_is_written(
    content: dict[str, Any], keys: tuple[Path, Path]
) -> None:
    Draft202012Validator.check_schema(VALIDATOR.schema)
    for document in (seal(content), seal(content, keys[0])):
        assert [error.message for error in VALIDATOR.iter_errors(document)] == []


def test_the_schema_takes_a_certificate_without_scores(
    reference: Reference, tiny_engine: Path, planter: Planter
) -> None:
    faulty = planter.change_constants(
        tiny_engine,
        "decoder",
        lambda name: name == "/decoder/layers.0/mlp/down_proj/weight",
        lambda w: np.full_like(w, np.nan),
    )
    document = seal(compare_engine(reference, faulty, WIDE).to_dict())
    assert document["verdict"] == "fail"
    assert document["agreement"] is None
    assert [error.message for error in VALIDATOR.iter_errors(document)] == []


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d.pop("verdict"),
        lambda d: d.update(verdict="maybe"),
        lambda d: d["engine"].update(manifest_sha256="abc"),
        lambda d: d["checks"].pop(),
        lambda d: d["checks"].reverse(),
        lambda d: d["checks"][4]["results"].pop("layers"),
        lambda d: d["checks"][9]["results"]["noninferiority"].pop("p"),
        lambda d: d.update(more=1),
    ],
)
def test_the_schema_refuses_another_form(content: dict[str, Any], edit: Any) -> None:
    document = copy.deepcopy(seal(content))
    edit(document)
    assert list(VALIDATOR.iter_errors(document))


def test_it_names_reference_engine_and_data(
    content: dict[str, Any], tiny_engine: Path, tiny_checkpoint: Path
) -> None:
    manifest = (tiny_engine / "manifest.json").read_bytes()
    assert content["engine"]["manifest_sha256"] == hashlib.sha256(manifest).hexdigest()
    files = content["reference"]["files"]
    assert set(files) == {"config.json", "model.safetensors", "tokenizer.json"}
    for name, digest in files.items():
        assert digest == hashlib.sha256((tiny_checkpoint / name).read_bytes()).hexdigest()
    assert content["reference"]["made_the_engine"] is True
    assert (content["data"]["cases"], content["data"]["patients"]) == (16, 16)
    assert content["agreement"]["correct"] + len(content["flips"]) == 16


def test_the_certificate_of_this_engine_speaks_of_it(
    saved: Path, tiny_engine: Path, keys: tuple[Path, Path]
) -> None:
    report = check_certificate(saved, tiny_engine, keys[1])
    assert report.ok
    assert report.speaks
    assert report.verdict == "pass"
    assert report.signed_by == json.loads(saved.read_text())["signature"]["key_sha256"]
    assert "speaks of this engine" in str(report)


def test_another_engine_is_not_spoken_of(saved: Path, int4_engine: Path) -> None:
    report = check_certificate(saved, int4_engine)
    assert not report.ok
    assert not report.speaks
    assert "does NOT speak of this engine: its manifest has SHA-256" in str(report)


def test_an_engine_with_an_altered_file_is_an_error(
    saved: Path, tiny_engine: Path, planter: Planter
) -> None:
    altered = planter.copy(tiny_engine)
    data = bytearray((altered / "fusion.onnx.data").read_bytes())
    data[100] ^= 1
    (altered / "fusion.onnx.data").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"fusion\.onnx\.data"):
        check_certificate(saved, altered)


def test_no_engine_is_an_error(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no such directory"):
        check_certificate(saved, tmp_path / "none")


def test_an_altered_certificate_is_an_error(saved: Path, tiny_engine: Path) -> None:
    change(saved, lambda d: d["data"].update(cases=1000))
    with pytest.raises(CertificateError, match="it was altered"):
        check_certificate(saved, tiny_engine)


def test_a_forged_digest_is_found_by_the_signature(
    saved: Path, tiny_engine: Path, keys: tuple[Path, Path]
) -> None:
    change(saved, lambda d: d["data"].update(cases=1000), reseal=True)
    assert check_certificate(saved, tiny_engine).speaks  # without a key nobody can tell
    with pytest.raises(CertificateError, match="a signature of another key, or over other content"):
        check_certificate(saved, tiny_engine, keys[1])


def test_another_key_is_an_error(saved: Path, tiny_engine: Path, tmp_path: Path) -> None:
    _, other = make_keys(tmp_path)
    with pytest.raises(CertificateError, match="a signature of another key"):
        check_certificate(saved, tiny_engine, other)


@pytest.mark.parametrize("signature", [None, {}, {"value": 3}, {"value": "###"}, {"value": "AAAA"}])
def test_no_usable_signature_is_an_error_where_a_key_is_given(
    signature: Any,
    content: dict[str, Any],
    tiny_engine: Path,
    tmp_path: Path,
    keys: tuple[Path, Path],
) -> None:
    document = seal(content)
    if signature is not None:
        document["signature"] = signature
    save_certificate(document, tmp_path / "cert.json")
    assert check_certificate(tmp_path / "cert.json", tiny_engine).signed_by is None
    with pytest.raises(CertificateError, match="expected one by the key"):
        check_certificate(tmp_path / "cert.json", tiny_engine, keys[1])


def test_a_private_key_cannot_check_nor_a_public_one_sign(
    content: dict[str, Any], saved: Path, tiny_engine: Path, keys: tuple[Path, Path]
) -> None:
    private, public = keys
    with pytest.raises(InputError, match="found a private key"):
        check_certificate(saved, tiny_engine, private)
    with pytest.raises(InputError, match="found a public key"):
        seal(content, public)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "Expecting value"),
        ("[]", "another document"),
        ('{"format": "mdf-engine"}', "another document"),
        ('{"format": "mdf-parity-certificate", "version": 2}', "version 2"),
        ('{"format": "mdf-parity-certificate", "version": 1}', "no text in sha256"),
        ('{"format": "mdf-parity-certificate", "version": 1, "date": NaN}', "NaN is not JSON"),
        ("[" * 100_000, "recursion"),
        ('{"format": "mdf-parity-certificate", "format": 1}', "a key twice"),
    ],
)
def test_what_is_no_certificate_is_an_error(
    text: str, found: str, tiny_engine: Path, tmp_path: Path
) -> None:
    path = tmp_path / "cert.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CertificateError, match=found):
        check_certificate(path, tiny_engine)


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d.update(engine=[]),
        lambda d: d["engine"].pop("manifest_sha256"),
        lambda d: d.update(verdict=1),
        lambda d: d.update(first_fault={"check": "fusion"}),
        lambda d: d.update(date=None),
    ],
)
def test_a_malformed_field_is_an_error(edit: Any, saved: Path, tiny_engine: Path) -> None:
    change(saved, edit, reseal=True)
    with pytest.raises(CertificateError, match=r"found (no text in|the verdict)"):
        check_certificate(saved, tiny_engine)


@pytest.mark.parametrize("value", ["1e400", '"\\ud800"'])
def test_a_value_that_has_no_canonical_form_is_an_error(
    value: str, saved: Path, tiny_engine: Path
) -> None:
    text = saved.read_text(encoding="utf-8")
    saved.write_text(text.replace('"version": 1,', f'"version": 1, "x": {value},'))
    with pytest.raises(CertificateError, match="expected a parity certificate"):
        check_certificate(saved, tiny_engine)


@given(place=st.integers(0, 10**9), byte=st.integers(0, 255))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_damaged_byte_is_found_or_means_nothing(
    saved: Path, keys: tuple[Path, Path], tiny_engine: Path, place: int, byte: int
) -> None:
    whole = saved.read_bytes()
    damaged = bytearray(whole)
    damaged[place % len(whole)] = byte
    path = saved.with_name("damaged.json")
    path.write_bytes(damaged)
    try:
        report = check_certificate(path, tiny_engine, keys[1])
    except CertificateError as error:
        assert len(str(error)) < 1000  # noqa: PT017
        return
    assert report.ok
    found = json.loads(damaged)
    found["signature"].pop("algorithm"), found["signature"].pop("key_sha256")
    due = json.loads(whole)
    due["signature"].pop("algorithm"), due["signature"].pop("key_sha256")
    assert found == due  # white space alone differs, or what says nothing


def test_the_canonical_form_does_not_depend_on_the_order_of_keys() -> None:
    assert canonical({"b": 1.5, "a": "ä"}) == '{"a":"ä","b":1.5}'.encode()
    assert canonical({"a": "ä", "b": 1.5}) == canonical({"b": 1.5, "a": "ä"})
    with pytest.raises(ValueError, match="JSON"):
        canonical({"a": float("nan")})


def test_checking_needs_no_more_than_the_sdk(
    saved: Path, tiny_engine: Path, keys: tuple[Path, Path]
) -> None:
    program = (
        "import sys; from mdf_sdk.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'scipy', 'onnx', 'onnxruntime'} & set(sys.modules);"
        "print(sorted(heavy)); raise SystemExit(code)"
    )
    words = ["parity", "--check", str(saved), str(tiny_engine), "--public-key", str(keys[1])]
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_command_answers_with_its_exit_code(
    saved: Path, tiny_engine: Path, int4_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["parity", "--check", str(saved), str(tiny_engine), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ok"] is True
    assert main(["parity", "--check", str(saved), str(int4_engine), "--json"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["speaks"] is False
    change(saved, lambda d: d.update(verdict="fail"))
    assert main(["parity", "--check", str(saved), str(tiny_engine), "--json"]) == 2
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["error"]["type"] == "CertificateError"


def test_a_failing_verdict_is_a_negative_answer(
    content: dict[str, Any], tiny_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = {"check": "fusion", "where": "x", "found": "y", "expected": "z"}
    path = tmp_path / "cert.json"
    save_certificate(seal({**content, "verdict": "fail", "first_fault": fault}), path)
    assert main(["parity", "--check", str(path), str(tiny_engine)]) == 1
    assert "FAIL (fusion: x)" in capsys.readouterr().out
