from pathlib import Path

import numpy as np
import pytest

from mdf_sdk import IntegrityError, MDFClassifier, SignatureError
from mdf_sdk.engine import Engine
from mdf_sdk.sessions import Session
from mdf_sdk.sessions.onnxruntime_cpu import OnnxRuntimeCpu


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
        assert engine.text_rows(1) == 32 * -(-engine.prompt.count_rows(1) // 32)
        assert engine.text_rows(engine.manifest.prompt.max_text_tokens) == longest
        short = engine.prompt.encode("ab")
        assert engine.text_tensors([short])["position_ids"].shape == (1, engine.text_rows(2))


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

    def spy(self: OnnxRuntimeCpu, block: str) -> Session:
        opened.append(block)
        return original(self, block)

    monkeypatch.setattr(OnnxRuntimeCpu, "open", spy)
    with pytest.raises(IntegrityError, match=r"decoder\.onnx"):
        MDFClassifier(toy_copy, device="cpu")
    assert "decoder" not in opened
