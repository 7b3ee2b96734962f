import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest

from mdf_sdk import (
    BackendUnavailableError,
    DeviceMemoryError,
    IntegrityError,
    MDFClassifier,
    SignatureError,
)
from mdf_sdk.engine import Engine
from mdf_sdk.sessions import Session
from mdf_sdk.sessions.onnxruntime_cpu import OnnxRuntimeCpu

from .host_memory import HostMemory


def test_the_decoder_is_fed_the_rows_behind_the_prefix(toy_engine: Path) -> None:
    with Engine(toy_engine) as engine:
        texts = [engine.prompt.encode(text) for text in ("ab", "abcdef")]
        packed = engine.prompt.pack(texts)
        tensors = engine.text_tensors(texts)
    prefix, total = packed.prefix_length, packed.input_ids.shape[1]
    fed = total - prefix
    assert prefix > 0
    rows = np.load(toy_engine / "embeddings.npy")
    np.testing.assert_array_equal(tensors["inputs_embeds"], rows[packed.input_ids[:, -fed:]])
    np.testing.assert_array_equal(tensors["position_ids"], packed.position_ids[:, -fed:])
    np.testing.assert_array_equal(tensors["body_mask"], packed.body_mask[:, -fed:])
    assert tensors["attention_mask"].shape == (2, 1, fed, total)
    np.testing.assert_array_equal(tensors["attention_mask"][:, 0], packed.attention_mask[:, -fed:])


def test_a_block_is_loaded_once(toy_engine: Path) -> None:
    with Engine(toy_engine) as engine:
        assert engine.open("vision") is engine.open("vision")


def test_prompts_are_padded_to_the_rows_of_the_backend_and_never_beyond_the_longest(
    toy_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(toy_engine, device="cpu") as engine:
        monkeypatch.setattr(engine.backend, "text_rows", lambda rows: -(-rows // 32) * 32)
        longest = engine.prompt.count_rows(engine.manifest.prompt.max_text_tokens)
        prefix = len(engine.prompt.prefix_ids)
        assert engine.text_rows(1) == 64 - prefix >= engine.prompt.count_rows(1)
        assert engine.text_rows(engine.manifest.prompt.max_text_tokens) == longest
        short = engine.prompt.encode("ab")
        tensors = engine.text_tensors([short])
        assert tensors["position_ids"].shape == (1, engine.text_rows(2))
        assert tensors["attention_mask"].shape[-1] == 64


def test_padding_changes_no_score(toy_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = []
    for step in (1, 32):
        with MDFClassifier(toy_engine, device="cpu", threads=1) as classifier:
            backend = classifier._engine.backend
            monkeypatch.setattr(backend, "text_rows", lambda rows, s=step: -(-rows // s) * s)
            picture = np.full((64, 64, 3), 90, np.uint8)
            picture[16:48, 16:48] = 200
            scores.append(list(classifier.predict(picture, "ab").scores.values()))
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-6)


def test_a_signed_engine_is_opened_with_its_key_alone(toy_copy: Path, tmp_path: Path) -> None:
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    from cryptography.hazmat.primitives import serialization

    from mdf_sdk.signature import sign_engine

    own, other = ed25519.Ed25519PrivateKey.generate(), ed25519.Ed25519PrivateKey.generate()
    path = tmp_path / "private.pem"
    path.write_bytes(
        own.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )

    def public(key: ed25519.Ed25519PrivateKey) -> bytes:
        encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        pem: bytes = key.public_key().public_bytes(encoding, form)
        return pem

    with pytest.raises(SignatureError):
        MDFClassifier(toy_copy, trusted_key=public(own))
    sign_engine(toy_copy, path)
    MDFClassifier(toy_copy, trusted_key=public(own)).close()
    with pytest.raises(SignatureError):
        MDFClassifier(toy_copy, trusted_key=public(other))


def test_no_block_is_opened_before_its_files_are_proved(
    toy_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = toy_copy / "decoder.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    opened, original = [], OnnxRuntimeCpu.open

    def spy(self: OnnxRuntimeCpu, block: str, rows: Iterable[int]) -> Session:
        opened.append(block)
        return original(self, block, rows)

    monkeypatch.setattr(OnnxRuntimeCpu, "open", spy)
    with pytest.raises(IntegrityError, match=r"decoder\.onnx"):
        MDFClassifier(toy_copy, device="cpu")
    assert "decoder" not in opened


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> HostMemory:
    """What every backend on a card finds."""
    memory = HostMemory()
    monkeypatch.setattr("mdf_sdk.sessions.cuda_memory.CudaMemory", lambda: memory)
    return memory


def test_auto_falls_to_the_cpu_where_there_is_no_card_and_logs_why(
    toy_engine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> None:
        raise BackendUnavailableError("found no card")

    monkeypatch.setattr("mdf_sdk.sessions.cuda_memory.CudaMemory", refuse)
    with caplog.at_level("INFO", "mdf_sdk"), MDFClassifier(toy_engine) as classifier:
        assert (classifier.identity.device, classifier.identity.passed_over) == ("cpu", ())
    assert "found no card" in caplog.text


def test_auto_falls_to_the_cpu_where_the_card_takes_no_work(
    toy_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(name=b"a card in exclusive mode", major=9, minor=0)
    status = SimpleNamespace(name="cudaErrorDevicesUnavailable")
    runtime = SimpleNamespace(
        cudaError_t=SimpleNamespace(cudaErrorMemoryAllocation=2),
        cudaGetDeviceCount=lambda: (0, 1),
        cudaGetDeviceProperties=lambda _: (0, card),
        cudaStreamCreateWithFlags=lambda _: (status, None),
    )
    bindings = ModuleType("cuda.bindings")
    monkeypatch.setattr(bindings, "driver", SimpleNamespace(), raising=False)
    monkeypatch.setattr(bindings, "runtime", runtime, raising=False)
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    with MDFClassifier(toy_engine) as classifier:
        assert classifier.identity.device == "cpu"
    with pytest.raises(BackendUnavailableError, match=r"exclusive.*DevicesUnavailable"):
        MDFClassifier(toy_engine, device="cuda")


def test_auto_passes_over_a_card_with_too_little_memory_and_every_answer_says_so(
    toy_engine: Path,
    card: HostMemory,
    photograph: npt.NDArray[np.uint8],
    caplog: pytest.LogCaptureFixture,
) -> None:
    card.free_bytes = 1000
    with MDFClassifier(toy_engine) as classifier:
        prediction = classifier.predict(photograph, "a")
    assert prediction.engine.device == "cpu"
    (reason,) = prediction.engine.passed_over
    assert "device 'cuda': found" in reason
    assert "free of 8.00 GB" in reason
    assert f"PASSED OVER  {reason}" in str(prediction)
    assert prediction.to_dict()["engine"]["passed_over"] == (reason,)
    assert "passes over: device 'cuda'" in caplog.text


def test_auto_takes_a_card_whose_memory_suffices(toy_engine: Path, card: HostMemory) -> None:
    with MDFClassifier(toy_engine) as classifier:
        assert (classifier.identity.device, classifier.identity.passed_over) == ("cuda", ())


def test_a_card_that_was_asked_for_is_never_passed_over(toy_engine: Path, card: HostMemory) -> None:
    card.free_bytes = 1000
    with pytest.raises(DeviceMemoryError, match="device 'cuda'"):
        MDFClassifier(toy_engine, device="cuda")


def test_where_no_device_has_the_memory_the_refusal_names_each(
    toy_engine: Path, card: HostMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    card.free_bytes = 1000
    monkeypatch.setattr(OnnxRuntimeCpu, "free_and_total_bytes", lambda self: (2000, 10**9))
    with pytest.raises(DeviceMemoryError, match=r"(?s)device 'cuda': found.*device 'cpu': found"):
        MDFClassifier(toy_engine)
