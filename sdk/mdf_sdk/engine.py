"""An engine directory in, its blocks ready to run on named tensors out."""

import hashlib
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from mdf_sdk.errors import (
    BackendUnavailableError,
    DeviceMemoryError,
    EngineError,
    ManifestError,
)
from mdf_sdk.integrity import FileCheck
from mdf_sdk.manifest import (
    EMBEDDINGS_NAME,
    TOKENIZER_NAME,
    Manifest,
    TrustedKey,
    parse_manifest,
    read_manifest,
)
from mdf_sdk.memory import check_memory
from mdf_sdk.prompt import EncodedText, PromptEncoder
from mdf_sdk.sessions import (
    DEVICES,
    Array,
    Backend,
    DeviceArray,
    Session,
    Tensor,
    open_backend,
)

_log = logging.getLogger("mdf_sdk")
_NO_EMBEDDINGS: Array = np.empty((0, 0), np.float16)


class Engine:
    """The checked directory: prompt encoder, embeddings, and blocks, each loaded on first use.

    Tensor names are global: a block takes its inputs by name from all tensors known so far. How
    many threads may run blocks at a time is the backend's to say (`slots`).

    Attributes:
        passed_over: for device="auto", why each faster device that works is not taken: it has too
            little free memory.
    """

    def __init__(
        self,
        engine_dir: str | os.PathLike[str],
        *,
        device: str = "auto",
        threads: int | None = None,
        reproducible: bool = False,
        trusted_key: TrustedKey | None = None,
        blocks: Sequence[str] = (),
    ) -> None:
        """Check the directory and load blocks.

        Args:
            device, threads, reproducible, trusted_key: as MDFClassifier takes them.
            blocks: to load now, each as soon as its files are proved.

        Raises:
            EngineError: the directory cannot be used; every file is proved when this returns.
            BackendError: the device does not work, or has too little memory.
        """
        self._directory = Path(engine_dir)
        self._sessions: dict[str, Session] = {}
        self._opening = threading.Lock()
        self._embeddings = _NO_EMBEDDINGS
        data = read_manifest(engine_dir, trusted_key)
        self.manifest = parse_manifest(data)
        self.manifest_sha256 = hashlib.sha256(data).hexdigest()
        with FileCheck(engine_dir, self.manifest) as check:
            self._check = check
            self.backend, self.passed_over = _choose_backend(
                device, self._directory, self.manifest, threads, reproducible
            )
            try:
                check.wait(TOKENIZER_NAME)
                self.prompt = self._load_prompt()
                for block in blocks:
                    self.open(block)
                check.wait_all()
                self._embeddings = self._load_embeddings()
            except BaseException:
                self.close()
                raise

    def open(self, block: str) -> Session:
        """Load a block, if it is not loaded yet."""
        with self._opening:
            if block not in self._sessions:
                for name in self.backend.files(block):
                    self._check.wait(name)
                rows = self._decoder_rows() if block == "decoder" else ()
                self._sessions[block] = self.backend.open(block, rows)
            return self._sessions[block]

    def run(self, block: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run a block on its inputs among `tensors`.

        Arrays on the host are cast to the dtypes that the block's spec declares.
        """
        session, inputs = self.open(block), dict[str, Tensor]()
        for spec in self.manifest.blocks[block].inputs:
            if spec.name not in tensors:
                raise ManifestError(
                    f"block {block}: found no tensor {spec.name!r} to feed it, expected an earlier "
                    "block to give it. Export it again: mdf export CHECKPOINT ENGINE"
                )
            tensor, dtype = tensors[spec.name], np.dtype(spec.dtype)
            if isinstance(tensor, DeviceArray):
                if tensor.dtype != dtype:
                    raise ManifestError(
                        f"block {block}: found {spec.name} as {tensor.dtype} on the card, expected "
                        f"{dtype}. Export it again: mdf export CHECKPOINT ENGINE"
                    )
                inputs[spec.name] = tensor
            else:
                inputs[spec.name] = np.ascontiguousarray(tensor, dtype)
        return session.run(inputs)

    def text_rows(self, text_tokens: int) -> int:
        """Rows of a prefill whose longest text has so many tokens: with padding, without prefix."""
        prefix = len(self.prompt.prefix_ids)
        most = self.prompt.count_rows(self.manifest.prompt.max_text_tokens)
        padded = self.backend.text_rows(prefix + self.prompt.count_rows(text_tokens))
        return min(padded - prefix, most)

    def _decoder_rows(self) -> set[int]:
        """Rows of its products: of all padded prompts; behind the last attention, of labels."""
        lengths = range(1, self.manifest.prompt.max_text_tokens + 1)
        return {self.text_rows(n) for n in lengths} | {1 + self.prompt.label_rows}

    def text_tensors(self, texts: Sequence[EncodedText]) -> dict[str, Tensor]:
        """Pack texts, look up embeddings and cut the constant prefix off: the decoder's inputs."""
        packed = self.prompt.pack(texts, self.text_rows(max(len(text.ids) for text in texts)))
        prefix = packed.prefix_length
        ids = packed.input_ids[:, prefix:]
        if ids.max() >= len(self._embeddings):
            found = f"{len(self._embeddings)} rows"
            raise _unusable(EMBEDDINGS_NAME, found, "one for each token of tokenizer.json")
        return {
            "inputs_embeds": self._embeddings[ids],  # (B, T', D)
            "position_ids": packed.position_ids[:, prefix:],  # (B, T')
            "attention_mask": packed.attention_mask[:, None, prefix:],  # (B, 1, T', P + T')
            "body_mask": packed.body_mask[:, prefix:],  # (B, T')
        }

    def close(self) -> None:
        """Free the blocks; a second call does nothing."""
        for session in self._sessions.values():
            session.close()
        self._sessions = {}
        self._embeddings = _NO_EMBEDDINGS  # on Windows a mapped file cannot be replaced

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load_prompt(self) -> PromptEncoder:
        try:
            text = (self._directory / TOKENIZER_NAME).read_text(encoding="utf-8")
            return PromptEncoder(text, self.manifest.prompt, self.manifest.labels)
        except Exception as error:  # tokenizers raises plain Exception
            raise _unusable(
                TOKENIZER_NAME, error, "a tokenizer that knows the prompt's tokens"
            ) from error

    def _load_embeddings(self) -> Array:
        try:
            rows: Array = np.load(
                self._directory / EMBEDDINGS_NAME, mmap_mode="r", allow_pickle=False
            )
        except Exception as error:  # numpy raises what its parser meets
            raise _unusable(EMBEDDINGS_NAME, error, "an array") from error
        if rows.ndim != 2 or rows.dtype not in (np.float16, np.float32):
            raise _unusable(
                EMBEDDINGS_NAME, f"{rows.dtype} {rows.shape}", "float16 or float32 (rows, D)"
            )
        return rows


def _choose_backend(
    device: str, directory: Path, manifest: Manifest, threads: int | None, reproducible: bool
) -> tuple[Backend, tuple[str, ...]]:
    """Open the backend of a device, or for "auto" of the fastest that works and has the memory.

    Returns:
        It, and why faster ones that work are passed over.

    Raises:
        BackendError: the device does not work, or has too little memory; for "auto", all of them.
    """
    passed_over: list[DeviceMemoryError] = []
    for name in DEVICES[1:] if device == "auto" else (device,):
        last = name in (device, DEVICES[-1])
        try:
            backend = open_backend(
                name, directory, manifest, threads=threads, reproducible=reproducible
            )
            check_memory(manifest, backend)
        except BackendUnavailableError as error:
            if last:
                raise
            _log.info("%s", error)
        except DeviceMemoryError as error:
            if last:
                raise DeviceMemoryError("\n".join(map(str, (*passed_over, error)))) from error
            _log.warning("device='auto' passes over: %s", error)
            passed_over.append(error)
        else:
            break
    return backend, tuple(map(str, passed_over))


def _unusable(name: str, found: Any, expected: str) -> EngineError:
    return EngineError(
        f"{name}: found {str(found)[:200]}, expected {expected}. "
        "Export it again: mdf export CHECKPOINT ENGINE"
    )
