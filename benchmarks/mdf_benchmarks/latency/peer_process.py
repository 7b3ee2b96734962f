"""A peer's name in, a process that answers the engine's questions with it out.

The peer has a process of its own, so that its memory is its own, and so that what it breaks ends
with it. A JSON request a line in, a JSON answer a line out; `peer_server` is the other end.
"""

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from mdf_benchmarks.latency.timing import Sample
from mdf_sdk import CheckpointError, InputError
from mdf_sdk.manifest import Manifest

# In the order of a report. What stands behind a colon is made with PeerOptions.
PEERS = {
    "transformers": "mdf_benchmarks.latency.peers:FourTiles",
    "transformers-1tile": "mdf_benchmarks.latency.peers:OneTile",
    "transformers-compile": "mdf_benchmarks.latency.peers:Compiled",
    "bnb-nf4": "mdf_benchmarks.latency.peers:Nf4",
    "torchao-int4": "mdf_benchmarks.latency.peers:Int4",
    "pytorch-cpu": "mdf_benchmarks.latency.peers:Fused",
}
NEEDS_CHECKPOINT = "pytorch-cpu"
LIMIT_S = 600.0
_FAILURE_CHARACTERS = 400
_KILLED = -9  # by SIGKILL, which Windows' signal module does not name

Status = Literal["not_available", "out_of_memory", "failed"]


@dataclass(frozen=True)
class PeerOptions:
    """What a peer is asked, and where it runs.

    Attributes:
        engine: whose shape, prompt and labels it takes.
        checkpoint: of the fused model, where the peer reads one.
        device: "cpu" or "cuda".
        threads: of the processor; None leaves it to PyTorch.
        texts: two clinical texts.
    """

    engine: Path
    checkpoint: Path | None
    device: str
    threads: int | None
    texts: tuple[str, str]

    def to_json(self) -> str:
        """Write a line; `from_json` is the inverse."""
        paths = {"engine": str(self.engine), "checkpoint": self.checkpoint and str(self.checkpoint)}
        return json.dumps(asdict(self) | paths)

    @classmethod
    def from_json(cls, line: str) -> "PeerOptions":
        values = json.loads(line)
        checkpoint = values["checkpoint"] and Path(values["checkpoint"])
        fixed = {
            "engine": Path(values["engine"]),
            "checkpoint": checkpoint,
            "texts": tuple(values["texts"]),
        }
        return cls(**values | fixed)


class NotAvailableError(Exception):
    """A peer that cannot run here: a package or a card is missing."""


class PeerFailure(Exception):
    """What became of a peer that gives no times."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status: Status = status
        self.reason = reason


class PeerProcess:
    """The process of a peer; a context manager that ends it.

    Attributes:
        about: what runs there, for the report.
    """

    def __init__(self, name: str, options: PeerOptions) -> None:
        """Start it and load the peer.

        Raises:
            PeerFailure: it is not available, has too little memory, or failed.
        """
        self._name = name
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "mdf_benchmarks.latency.peer_server",
                PEERS[name],
                options.to_json(),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )
        self._late = False
        self._limit = threading.Timer(LIMIT_S, self._give_up)
        self._limit.daemon = True
        self._limit.start()
        try:
            self.about: dict[str, Any] = self._answer()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def ask(self, kind: str, number: int) -> Sample:
        """Ask one question; it is timed where it is answered.

        Raises:
            PeerFailure: it ran out of memory, or failed.
        """
        whole_ms, image_ms, cpu_ms = self._request(kind, number)
        return Sample(whole_ms, cpu_ms, {"image": image_ms})

    def memory(self) -> dict[str, int | None]:
        """`peak_host_bytes`, `peak_device_bytes`: since it was loaded, for the latter."""
        found: dict[str, int | None] = self._request("memory", 0)
        return found

    def close(self) -> None:
        """End the process; a second call does nothing."""
        self._limit.cancel()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._said):
            if pipe is not None:
                with suppress(OSError):  # a request that it did not live to read
                    pipe.close()

    def _request(self, kind: str, number: int) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([kind, number]) + "\n")
            self._process.stdin.flush()
        except OSError:  # a broken pipe, which Windows calls an invalid argument
            raise self._ended() from None
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise self._ended()
        answer = json.loads(line)
        if "failure" in answer:
            raise PeerFailure(**answer["failure"])
        return answer["value"]

    def _ended(self) -> PeerFailure:
        code = self._process.wait()
        if self._late:
            return PeerFailure("failed", f"found no end after {LIMIT_S:.0f} s, and ended it")
        self._said.seek(0)
        lines = self._said.read().strip()[-_FAILURE_CHARACTERS:].splitlines()
        words = lines[-1] if lines else "it said nothing"
        if code == _KILLED:
            return PeerFailure(
                "out_of_memory", "the system killed it, as it does when the host's memory is full"
            )
        return PeerFailure("failed", f"the process ended with exit code {code}: {words}")

    def _give_up(self) -> None:
        self._late = True
        self._process.kill()


def check_peers(names: Sequence[str]) -> None:
    """Raise InputError for a peer that nobody knows."""
    if set(names) - PEERS.keys() or len(set(names)) != len(names):
        raise InputError(
            f"against: found {', '.join(names)}, expected some of {', '.join(PEERS)}, each once"
        )


def check_reference(checkpoint: Path | None, manifest: Manifest) -> None:
    """Refuse what NEEDS_CHECKPOINT cannot read, before anything is measured.

    Raises:
        InputError: no checkpoint, or of another model than the engine's.
        CheckpointError: the directory is none.
    """
    if checkpoint is None:
        raise InputError(
            f"against: found {NEEDS_CHECKPOINT} and no checkpoint, expected the one that the "
            "engine was exported from: --reference CHECKPOINT"
        )
    try:
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        found = _task(config["preset"], config["labels"], config["image"]["unet_px"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint}: found no config.json of ours ({error}), expected a checkpoint "
            "directory. mdf train makes one"
        ) from error
    expected = _task(manifest.model, manifest.labels, manifest.image.unet_px)
    if found != expected:
        raise InputError(
            f"reference: found a checkpoint of {found}, expected {expected}: the one that the "
            "engine was exported from"
        )


def _task(model: str, labels: Sequence[str], unet_px: int) -> str:
    return f"{model}, {unet_px} px, {', '.join(labels)}"
