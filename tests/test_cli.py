"""The command: what it prints, what wins, and that every subcommand and config answers."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedsplit import __version__
from fedsplit.cli.main import main
from fedsplit.config import keys, load
from fedsplit.places import PLACES

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(
    file for file in CONFIGS.glob("**/*.toml") if file.relative_to(CONFIGS).parts[0] not in ("pretrain", "studies")
)
COMMANDS = (
    "run",
    "resume",
    "sweep",
    "map",
    "plan",
    "audit",
    "keys",
    "doctor",
    "certify",
    "bundle",
    "watch",
    "verify",
    "pretrain",
    "harden",
)
TINY = """
rounds = 1
[data]
limit = 60
test-limit = 20
partition = "iid"
[devices]
count = 3
[model]
image-size = 16
[local]
batch-size = 8
max-steps = 1
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config file of a tiny run."""
    file = tmp_path / "tiny.toml"
    file.write_text(TINY)
    return file


def said(capsys: pytest.CaptureFixture[str], *command: str) -> tuple[str, str]:
    """Run a command that succeeds; its output and errors."""
    capsys.readouterr()
    assert main(command) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_run_prints_the_folder_last(config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    out, err = said(capsys, "run", "--config", str(config), "--out", str(folder))
    assert out.splitlines()[-1] == str(folder) and (folder / "summary.json").is_file()
    assert f"run folder {folder}" in err and "3 devices hold 60 images" in err
    assert re.search(r"round +1  accuracy +[\d.]+ %", err)
    assert "global model on the central test set" in err
    assert "\x1b" not in err, "no control codes where there is no terminal"


def test_quiet_prints_only_the_folder(config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, err = said(capsys, "run", "--config", str(config), "--out", str(tmp_path / "run"), "--quiet")
    assert out == f"{tmp_path / 'run'}\n" and err == ""


def test_resume_prints_the_folder_last(config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    said(capsys, "run", "--config", str(config), "--out", str(folder), "--quiet")
    out, err = said(capsys, "resume", str(folder), "--rounds", "2")
    assert out.splitlines()[-1] == str(folder) and "goes on after round 1" in err
    out, err = said(capsys, "run", "--quiet", "--set", f"resume={folder}")
    assert json.loads((folder / "summary.json").read_text())["rounds"] == 2, "the default rounds were not asked for"
    out, err = said(capsys, "run", "--quiet", "--set", f"resume={folder}", "--set", "rounds=3")
    assert (out, err) == (f"{folder}\n", "")
    assert json.loads((folder / "summary.json").read_text())["rounds"] == 3


def test_a_relative_folder_is_printed_in_full(
    config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out, _ = said(capsys, "run", "--config", "tiny.toml", "--set", "out=here", "--quiet")
    assert out == f"{tmp_path / 'here'}\n"
    out, _ = said(capsys, "run", "--config", "tiny.toml", "--set", "name=named", "--quiet")
    assert re.fullmatch(rf"{tmp_path}/runs/\d{{8}}-\d{{6}}-named\n", out)


def test_what_wins(config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Defaults, then files in order, then pairs in order; a table and a dotted key are the same."""
    later = tmp_path / "later.toml"
    later.write_text("seed = 5\noptimizer.lr = 0.5\n[data]\nlimit = 66\n[devices]\ncount = 2\n")
    folder = tmp_path / "run"
    files = ["--config", str(config), "--config", str(later)]
    pairs = ["--set", "devices.count=4", "--set", "optimizer.lr=0.25", "--set", "optimizer.lr=0.125"]
    said(capsys, "run", *pairs, *files, "--out", str(folder), "--quiet")
    ran = load([folder / "config.toml"])
    assert (ran.seed, ran.data.limit, ran.devices.count) == (5, 66, 4)
    assert ran.optimizer.lr == 0.125 and ran.data.test_limit == 20
    assert ran.optimizer.momentum == keys()["optimizer.momentum"].default
    with (folder / "clients.csv").open(newline="") as file:
        assert sum(int(row["samples"]) for row in csv.DictReader(file)) == 66
    assert json.loads((folder / "summary.json").read_text())["seed"] == 5


def test_out_and_workers_are_shorthand(config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    said(capsys, "run", "--config", str(config), "--set", f"out={one}", "--out", str(two), "--workers", "1", "--quiet")
    assert two.is_dir() and not one.exists()


def test_quotes_around_a_value_are_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = said(capsys, "map", "--set", 'train="head,norms"', "--set", " data.alpha = 0.5 ")
    assert "trains: head,norms" in out


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIGS).with_suffix("")))
def test_map(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = said(capsys, "map", str(file))
    settings = load([file])
    lines = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ") and "." in line}
    for place in PLACES:
        assert place.key in lines, place.key
        active = settings.names(place.key)
        assert (", ".join(active) or "(off)") in lines[place.key]
        for name in active:
            assert name in lines[place.key]
            for key in (key for key in keys() if key.startswith(f"{place.prefix}.{name}.")):
                assert f"{key}={settings.values[key]}" in lines[place.key]
    assert f"trains: {settings.train}" in out and settings.data.partition in out
    if settings.cut.shape == "none":
        assert "whole model" in out
    else:
        assert f"front ({settings.cut.front} blocks)" in out and settings.server.schedule in out
    assert ("labels ──►" in out) == (settings.cut.shape == "vanilla")


def test_map_shows_pieces(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = ("body.edits=lora", "wire.activations-up=half", "share.merge=uniform", "body.lora.rank=3")
    out, _ = said(capsys, "map", *(word for pair in pairs for word in ("--set", pair)))
    assert re.search(r"body\.edits +lora +body\.lora\.rank=3", out)
    assert re.search(r"wire\.activations-up +half", out) and "[wire: half]" in out
    assert "share: uniform" in out
    default, _ = said(capsys, "map")
    assert re.search(r"body\.edits +\(off\) +known: lora", default) and "[wire:" not in default


def test_keys(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = said(capsys, "keys")
    for name, key in keys().items():
        assert f"\n{name} = {key.default!r}" in f"\n{out}"
        assert key.help in out
    out, _ = said(capsys, "keys", "optimizer")
    assert "optimizer.lr = 0.001  (float, >= 0)" in out and "devices" not in out


def test_keys_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(said(capsys, "keys", "--json")[0])
    assert [row["name"] for row in rows] == list(keys())
    assert all({"name", "type", "default", "help", "low", "above", "high", "choices"} == set(row) for row in rows)
    assert all(row["type"] in ("int", "float", "bool", "str") and row["help"] for row in rows)
    some = json.loads(said(capsys, "keys", "cut", "--json")[0])
    assert {row["name"] for row in some} == {"cut.front", "cut.tail", "cut.shape", "cut.pool"}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"fedsplit {__version__}\n"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"] if command else ["--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and out.startswith(f"usage: fedsplit {command}".rstrip())
    if not command:
        assert all(re.search(rf"^    {name} +\w", out, re.MULTILINE) for name in COMMANDS), "each with its line"
    else:
        bare = re.findall(r"^  (-\S+(?: [A-Z.=a-z]+)?)\n(?!    )", out, re.MULTILINE)
        assert "-h, --help" in out and bare == [], "every option says what it does"


def test_a_run_interrupted_by_the_keyboard_says_how_to_go_on(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fedsplit import experiment

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "run", interrupted)
    assert main(["run", "--config", str(config), "--out", str(tmp_path / "run")]) == 130
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.splitlines()[-1].endswith("fedsplit resume RUN")


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    codes = main(["doctor"]), main(["doctor", "--json"])
    out = capsys.readouterr().out
    table, document = out[: out.index("\n{\n")], json.loads(out[out.index("\n{\n") :])
    assert codes[0] == codes[1] == (0 if document["ok"] else 1)
    assert {"name", "level", "found"} <= set(document["checks"][0])
    assert all(check["name"] in table for check in document["checks"])


@pytest.mark.parametrize("module", ["fedsplit", "fedsplit.cli.main"])
def test_the_module_is_the_command(module: str, tmp_path: Path, repository: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    command = [sys.executable, "-m", module, "--version"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"fedsplit {__version__}\n", "")
