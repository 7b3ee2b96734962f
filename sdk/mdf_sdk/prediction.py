"""What a prediction holds, and how it is printed and written as JSON."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mdf_sdk.preprocessing import Square


@dataclass(frozen=True)
class EngineIdentity:
    """Which engine answered, and on what.

    Attributes:
        card: the graphics card, or on the CPU the processor.
        manifest_sha256: names the engine bit for bit: the manifest holds a digest of every other
            file.
        passed_over: for device="auto", faster devices that work, and why each is not taken: it had
            too little free memory when the engine was loaded.
    """

    model: str
    precision: str
    backend: str
    device: str
    card: str
    manifest_sha256: str
    passed_over: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Prediction:
    """The answer about one photograph and one clinical text.

    Attributes:
        label: the most probable one.
        probability: its probability, after the temperature fitted in training.
        probabilities: by label, in the engine's label order; their sum is 1.
        scores: by label: log-probability of the label's token sequence among the label set's
            tokens (`PromptEncoder.score_pairs`), before the temperature.
        mask: by kind: float32 (U, U), probability in [0, 1] for each pixel of the squared
            photograph. None if it was not asked for.
        evidence: float32 (G, G), row 0 at the top of the squared photograph: by how much the
            label's log-odds, log(p / (1 - p)), drop when the cell is covered; positive cells spoke
            for the label. None if it was not asked for.
        square: the part of the photograph that mask and evidence map show.
        text_tokens: tokens of the clinical text that were read.
        dropped_tokens: tokens cut off its end because the engine takes no more; 0 when all of it
            was read.
        latency_ms: by stage, and "total". A stage whose result was kept from the last photograph
            took 0.0. On a card, vision, unet_encoder and of a new photograph the text run at the
            same time, and each counts in full.
        engine: which engine answered.
        notice: what the engine's maker wants read beside every result; may be empty.
    """

    label: str
    probability: float
    probabilities: dict[str, float]
    scores: dict[str, float]
    mask: dict[str, npt.NDArray[np.float32]] | None
    evidence: npt.NDArray[np.float32] | None
    square: Square
    text_tokens: int
    dropped_tokens: int
    latency_ms: dict[str, float]
    engine: EngineIdentity
    notice: str

    @property
    def mask_shares(self) -> dict[str, float]:
        """By kind: the share of the squared photograph where the mask is above 0.5."""
        return {kind: float((values > 0.5).mean()) for kind, values in (self.mask or {}).items()}

    def to_dict(self) -> dict[str, Any]:
        """Make a dict for JSON; a mask is summed up as its share of the squared photograph."""
        return {
            "label": self.label,
            "probability": self.probability,
            "probabilities": self.probabilities,
            "scores": self.scores,
            "mask_shares": None if self.mask is None else self.mask_shares,
            "evidence": None if self.evidence is None else _rounded(self.evidence),
            "square": asdict(self.square),
            "text_tokens": self.text_tokens,
            "dropped_tokens": self.dropped_tokens,
            "latency_ms": {stage: round(ms, 3) for stage, ms in self.latency_ms.items()},
            "engine": asdict(self.engine),
            "notice": self.notice,
        }

    def __str__(self) -> str:
        others = [
            f"{label} {p:.3f}" for label, p in self.probabilities.items() if label != self.label
        ]
        stages = [f"{stage} {ms:.1f}" for stage, ms in self.latency_ms.items() if stage != "total"]
        text = f"{self.text_tokens} tokens read"
        if self.dropped_tokens:
            text += f", the last {self.dropped_tokens} CUT OFF: the engine takes no more"
        engine = self.engine
        lines = [
            f"{self.label} {self.probability:.3f}   ({', '.join(others)})",
            f"  text    {text}",
            f"  time    {self.latency_ms['total']:.1f} ms: {', '.join(stages)}",
            f"  engine  {engine.model} {engine.precision} on {engine.device} ({engine.card}), "
            f"{engine.backend}, manifest {engine.manifest_sha256[:12]}",
        ]
        lines += [f"  PASSED OVER  {reason}" for reason in engine.passed_over]
        if self.mask is not None:
            shares = ", ".join(f"{kind} {share:.1%}" for kind, share in self.mask_shares.items())
            lines.insert(2, f"  mask    {shares} of the squared photograph")
        if self.notice:
            lines.append(f"  notice  {self.notice}")
        return "\n".join(lines)


def _rounded(values: npt.NDArray[np.float32]) -> list[list[float]]:
    return [[round(float(value), 4) + 0.0 for value in row] for row in values]  # + 0.0: no -0.0
