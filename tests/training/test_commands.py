"""mdf_training.commands: what the command line names reaches the training."""

from pathlib import Path

import pytest

from mdf_sdk.cli import main
from mdf_training.checkpoint import load_checkpoint


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--labels", "healthy, healthy", "labels: found ('healthy', 'healthy')"),
        ("--mask-kinds", "disc,disc", "mask_kinds: found ('disc', 'disc')"),
        ("--frozen", "unet,lens", "frozen: found ('unet', 'lens')"),
        ("--policy", "hasty", "policy: found 'hasty'"),
        ("--query", "unet", "fusion, query: found 'unet', expected one of vision, skip"),
        ("--augment", "2", "augment: found 2.0, expected 0 to 1"),
        ("--unet-weights", "none.pth", "none.pth: No such file or directory; expected a file"),
    ],
)
def test_a_value_that_no_run_can_use_is_refused_before_anything_is_written(
    option: str, value: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "train",
        "--preset",
        "nano",
        "--data",
        "synthetic:40:1",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*words, option, value]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("words", "query"), [([], "vision"), (["--query", "skip"], "skip")])
def test_the_side_that_asks_stays_with_the_checkpoint(
    words: list[str], query: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    data = ["--preset", "nano", "--data", "synthetic:16:1", "--epochs", "1"]
    assert main(["train", *data, "--out", str(out), *words]) == 0
    assert load_checkpoint(out).config.fusion.query == query
