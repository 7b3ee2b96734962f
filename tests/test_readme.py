"""What the README shows runs as it is written."""

import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from PIL import Image

from mdf_training.data.synthetic import SyntheticData

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    line.split("#")[0].strip()
    for language, code in BLOCKS
    if language == "bash"
    for line in code.splitlines()
    if line.startswith("mdf ")
]
# These take minutes; test_road.py, test_latency.py and test_soak.py run them.
LONG = tuple(
    f"mdf {name}"
    for name in ("train", "evaluate", "benchmark", "soak", "ablate", "baseline", "scaling")
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """A folder with what the README's reader has by then: examples, a photograph, a checkpoint."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "examples", folder / "examples")
    shutil.copytree(tiny_checkpoint, folder / "build" / "demo_checkpoint")
    (folder / ".demo").mkdir()
    Image.fromarray(SyntheticData(1, 9)[0].image).save(folder / ".demo" / "retina.jpg")
    save_keys(folder)
    save_cases(folder)
    return folder


def save_cases(folder: Path) -> None:
    """A clinic's own table of case reports, and its photographs."""
    data = SyntheticData(24, 3)
    (folder / "photos").mkdir()
    lines = ["photo,history,disease,case"]
    for i in range(len(data)):
        Image.fromarray(data[i].image).save(folder / "photos" / f"{i}.png")
        disease = ("Stargardt disease", "glaucoma")[data.rows[i].label == "Acquired"]
        lines.append(f'photos/{i}.png,"{data.rows[i].text}",{disease},{i}')
    (folder / "cases.csv").write_text("\n".join(lines), encoding="utf-8")


def save_keys(folder: Path) -> None:
    """The two files that openssl would write."""
    key, pem = Ed25519PrivateKey.generate(), Encoding.PEM
    private = key.private_bytes(pem, PrivateFormat.PKCS8, NoEncryption())
    public = key.public_key().public_bytes(pem, PublicFormat.SubjectPublicKeyInfo)
    (folder / "private.pem").write_bytes(private)
    (folder / "public.pem").write_bytes(public)


def run(command: list[str], workplace: Path) -> str:
    done = subprocess.run(command, cwd=workplace, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_first_block_is_six_lines_and_prints_a_prediction(workplace: Path) -> None:
    lines = [line for line in PYTHON[0].splitlines() if line.strip()]
    assert len(lines) <= 6
    assert "Not for clinical use." in run([sys.executable, "-c", PYTHON[0]], workplace)


def test_the_printed_prediction_is_the_shipped_engines(workplace: Path) -> None:
    """The photograph is another here: its form must agree, and the digest of the manifest."""
    shown = next(text for language, text in BLOCKS if language == "text").splitlines()
    printed = run([sys.executable, "-c", PYTHON[0]], workplace).splitlines()
    assert re.fullmatch(
        r"(Acquired|Inherited) \d\.\d{3}   \((Acquired|Inherited) \d\.\d{3}\)", shown[0]
    )
    assert [re.sub(r"[\d.]+", "0", line) for line in shown[1:3]] == [
        re.sub(r"[\d.]+", "0", line) for line in printed[1:3]
    ]
    assert [line.split()[-2:] for line in shown[3:]] == [line.split()[-2:] for line in printed[3:]]


def test_every_make_target_that_is_named_exists() -> None:
    named = set(re.findall(r"^make (\w+)", README, re.MULTILINE))
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named == {"demo", "test"}
    assert named <= targets


@pytest.mark.parametrize("code", PYTHON[1:])
def test_a_python_block_runs(code: str, workplace: Path) -> None:
    assert run([sys.executable, "-c", code], workplace)


def test_every_command_exists_and_every_other_one_is_shown() -> None:
    shown = {shlex.split(line)[1] for line in COMMANDS}
    assert shown == {entry.name for entry in entry_points(group="mdf.commands")}


@pytest.mark.slow
def test_the_commands_run_in_their_order(workplace: Path) -> None:
    mdf = shutil.which("mdf", path=str(Path(sys.executable).parent))
    assert mdf is not None
    quick = [line for line in COMMANDS if not line.startswith(LONG)]
    assert len(quick) >= 4
    for line in quick:
        assert run([mdf, *shlex.split(line)[1:]], workplace)
    assert (workplace / "result.png").exists()


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith(LONG)])
def test_a_long_command_has_the_arguments_it_takes(line: str) -> None:
    from mdf_sdk.cli import _build_parser

    parser, *_ = _build_parser()
    arguments = parser.parse_args(shlex.split(line)[1:])
    assert callable(arguments.run)


def test_every_path_that_is_named_exists() -> None:
    named = re.findall(r"\b((?:examples|docs|sdk|export|training|tests)/[\w./-]*\w)", README)
    assert "examples/demo_engine" in named
    for path in named:
        assert (ROOT / path).exists(), path
