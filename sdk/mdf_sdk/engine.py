"""An engine directory in, its blocks ready to run on named tensors out."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from mdf_sdk.errors import EngineError, ManifestError, MDFError
from mdf_sdk.manifest import (
    EMBEDDINGS_NAME,
    MANIFEST_NAME,
    TOKENIZER_NAME,
    check_files,
    digest,
    load_manifest,
)
from mdf_sdk.prompt import PackedPrompt, PromptEncoder
from mdf_sdk.sessions import Array, Session, open_backend


class Engine:
    """The checked directory: prompt encoder, embeddings, and blocks, each loaded on first use.

    Tensor names are global: a block takes its inputs by name from all tensors known so far.
    """

    def __init__(
        self,
        engine_dir: str | os.PathLike[str],
        *,
        device: str = "auto",
        threads: int | None = None,
    ) -> None:
        self._directory = Path(engine_dir)
        self._sessions: dict[str, Session] = {}
        self._closed = False
        self.manifest = load_manifest(engine_dir)
        check_files(engine_dir, self.manifest)
        self.manifest_sha256 = digest(self._directory / MANIFEST_NAME).sha256
        self.backend = open_backend(device, threads=threads)
        self.prompt = self._load_prompt()
        self._embeddings = self._load_embeddings()

    def open(self, block: str) -> Session:
        """Load a block, if it is not loaded yet."""
        if self._closed:
            raise MDFError(
                "the classifier is closed, expected an open one. Make another: "
                "MDFClassifier(engine_dir)"
            )
        if block not in self._sessions:
            spec = self.manifest.blocks[block]
            self._sessions[block] = self.backend.open(block, self._directory / spec.file, spec)
        return self._sessions[block]

    def run(self, block: str, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """Run a block on its inputs among `tensors`, cast to the dtypes that its spec declares."""
        session, inputs = self.open(block), {}
        for spec in self.manifest.blocks[block].inputs:
            if spec.name not in tensors:
                raise ManifestError(
                    f"block {block}: found no tensor {spec.name!r} to feed it, expected an earlier "
                    "block to give it. Export it again: mdf export CHECKPOINT ENGINE"
                )
            inputs[spec.name] = np.ascontiguousarray(tensors[spec.name], np.dtype(spec.dtype))
        return session.run(inputs)

    def text_tensors(self, packed: PackedPrompt) -> dict[str, Array]:
        """Look up embeddings and cut the constant prefix off: the decoder's text inputs."""
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
        self._closed = True

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


def _unusable(name: str, found: Any, expected: str) -> EngineError:
    return EngineError(
        f"{name}: found {str(found)[:200]}, expected {expected}. "
        "Export it again: mdf export CHECKPOINT ENGINE"
    )
