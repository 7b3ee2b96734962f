import json
import subprocess
import sys
from pathlib import Path

import pytest

from mdf_sdk import commands
from mdf_sdk.cli import main


def test_help_lists_the_commands(
    entry_points_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    assert out.index("predict") < out.index("info") < out.index("verify")


def test_a_broken_package_takes_no_other_command_away(
    entry_points_file: Path, toy_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with entry_points_file.open("a") as file:
        file.write("absent = no_such_module:add\nwrong = mdf_sdk.cli:no_such_function\n")
    assert main(["info", str(toy_engine)]) == 0
    for name in ("absent", "wrong"):
        assert main([name, "--any", "words"]) == 2
        assert f"mdf {name}: cannot be loaded" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["no-such-command"],
        ["info"],
        ["info", "engine", "--no-such"],
        ["verify", "engine", "--dev", "cpu"],
    ],
)
def test_words_that_cannot_be_read_are_an_error_like_any_other(
    entry_points_file: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "usage: mdf" in said.err
    assert "--help" in said.err.splitlines()[-1]
    assert main([*words, "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == "InputError"
    assert error["message"] in said.err


def test_an_interrupt_ends_with_130(
    entry_points_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "_info", interrupt)
    assert main(["info", "engine"]) == 130


def test_a_reader_that_goes_away_is_no_error(entry_points_file: Path, toy_engine: Path) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(entry_points_file.parents[1])!r});"
        "from mdf_sdk.cli import main;"
        f"sys.exit(main(['info', {str(toy_engine)!r}]))"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert run.stdout is not None
    run.stdout.close()
    assert run.stderr is not None
    errors = run.stderr.read()
    run.stderr.close()
    assert run.wait() == 1
    assert errors == b""
