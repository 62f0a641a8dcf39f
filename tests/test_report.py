"""Reports: reading run folders of any state, groups of seeds, every figure, and the page."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text
from report_folders import audited, real, table, written

from fedsplit import report
from fedsplit.cli.main import main
from fedsplit.report import figures, style
from fedsplit.report.page import build, number, spread
from fedsplit.report.table import read_table
from fedsplit.runs import RunFolder
from fedsplit.types import FedsplitError

SINGLE = sorted(set(figures.__all__) - {"accuracy", "compare", "tradeoff"})
IMAGES = ("reconstructions", "partition", "crossing")


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of everything, with an audit written by hand."""
    folder = real(tmp_path_factory.mktemp("rich") / "run")
    audited(folder, (folder / "accuracy.png").read_bytes())
    return folder


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A run that has not finished a round."""
    folder = written(tmp_path / "bare", [0.5], finished=False)
    (folder / "rounds.csv").unlink()
    return folder


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of few pixels: most of a page's time is their rendering."""
    monkeypatch.setattr(style, "FILE_DPI", 40)


def drawn(name: str, run: report.Run) -> style.Picture:
    made: style.Picture = getattr(figures, name)(run)
    return made


def test_a_table_has_numbers_where_cells_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('round,x,name\n1,0.5,"a\u2028b"\n2,,c\n3,7')  # a kill cut the last row short
    found = read_table(file)
    assert found.count == 2 and list(found) == ["round", "x", "name"]
    assert found["round"].dtype == np.int64 and found["round"].tolist() == [1, 2]
    assert found["x"][0] == 0.5 and np.isnan(found["x"][1])
    assert found.text("name") == ("a\u2028b", "c") and found.of("name", "c").rows()[0]["round"] == 2
    assert np.isnan(found.numbers("name")).all() and np.isnan(found.numbers("absent")).all()
    assert not read_table(tmp_path / "absent.csv")


@pytest.mark.parametrize("name", SINGLE)
def test_every_figure_of_a_real_run(name: str, rich: Path) -> None:
    made = drawn(name, report.load(rich))
    assert len(made.alt) > 20 and not re.search(r"\bnan\b", made.alt)
    small = [text for text in made.findobj(Text) if text.get_text() and text.get_fontsize() < 9]
    assert not small, f"letters under 9 pt: {small}"
    if name not in IMAGES:
        assert any("(" in axes.get_xlabel() + axes.get_ylabel() for axes in made.axes), "no unit at any axis"


@pytest.mark.parametrize("name", SINGLE)
def test_a_figure_that_does_not_apply_says_why(name: str, bare: Path) -> None:
    with pytest.raises(report.Absent, match=r"^[A-Z].*\.$|fedsplit audit"):
        drawn(name, report.load(bare))


@pytest.mark.parametrize("against", ["round", "bytes", "virtual_s", "energy_j"])
def test_accuracy_without_a_tested_round_is_absent(against: str, bare: Path) -> None:
    with pytest.raises(report.Absent):
        figures.accuracy(report.load(bare), against)


def test_runs_that_differ_in_their_seed_alone_are_one_group(tmp_path: Path) -> None:
    places: dict[str, Any] = {"a": {"seed": 0}, "b": {"seed": 1, "name": "other", "engine__workers": 2}}
    places |= {"c": {"cut__front": 1}, "d": {"cut__front": 1, "seed": 5, "optimizer__lr": 0.5}}
    runs = [report.load(written(tmp_path / name, [0.1, 0.2], **keys)) for name, keys in places.items()]
    found = report.groups(runs)
    assert [group.label for group in found] == [
        "cut.front=2, optimizer.lr=0.001", "cut.front=1, optimizer.lr=0.001", "cut.front=1, optimizer.lr=0.5",
    ]  # fmt: skip
    assert [len(group.runs) for group in found] == [2, 1, 1]
    by = report.groups(runs, ["cut.front"])
    assert [group.name for group in by] == ["cut.front=2 (n=2)", "cut.front=1 (n=2)"]
    with pytest.raises(FedsplitError, match="no run has a config key 'cut.frnt'"):
        report.groups(runs, ["cut.frnt"])


def test_a_key_that_an_earlier_version_lacked_counts_as_its_default(tmp_path: Path) -> None:
    new, old = written(tmp_path / "new", [0.1]), written(tmp_path / "old", [0.3], seed=1)
    lines = (old / "config.toml").read_text().splitlines(keepends=True)
    (old / "config.toml").write_text("".join(line for line in lines if not line.startswith("sigma")))
    found = report.groups(report.load_all([new, old]))
    assert len(found) == 1 and "front.noise.sigma" not in found[0].runs[1].config
    (old / "config.toml").write_text("".join(lines).replace("front = 2", "front = 3"))
    assert len(report.groups(report.load_all([new, old]))) == 2


def test_mean_and_band_are_those_of_the_rounds_that_all_tested(tmp_path: Path) -> None:
    first = written(tmp_path / "first", [0.1, "", 0.5, 0.9], seed=0)
    second = written(tmp_path / "second", [0.3, 0.4, 0.7], finished=False, seed=1, rounds=4)
    group = report.groups(report.load_all([first, second]))
    (axes,) = figures.accuracy(group, "bytes").axes
    (line,) = axes.lines
    assert line.get_xdata() == pytest.approx([4.0, 12.0]) and line.get_ydata() == pytest.approx([20.0, 60.0])
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((10.0, 70.0))
    for against, costs in (("round", [1, 3]), ("virtual_s", [2, 6]), ("energy_j", [5, 15])):
        assert figures.accuracy(group, against).axes[0].lines[0].get_xdata() == pytest.approx(costs)
    mean, deviation, count = group[0].figure("accuracy") or (0, 0, 0)
    assert (mean, deviation, count) == (pytest.approx(0.8), pytest.approx(np.std([0.9, 0.7], ddof=1)), 2)


def test_figures_of_the_table(tmp_path: Path) -> None:
    runs = [report.load(written(tmp_path / str(seed), [0.5, 0.25 * seed], seed=seed)) for seed in (1, 2)]
    audited(runs[1].path)
    (row,) = report.overview(report.groups(runs))
    assert (row["accuracy"], row["bytes"], row["worst_ssim"]) == (0.375, 8e6, 0.4)
    assert row["bytes_std"] == 0 and row["worst_ssim_std"] is None and "client_flops" not in row
    assert spread(12.345, 0.5) == "12.3 ± 0.5" and spread(0.98765, None) == "0.988" and number(12345.6) == "12,346"


def test_a_folder_of_runs_stands_for_them(tmp_path: Path) -> None:
    for name in ("b", "a"):
        written(tmp_path / "study" / "runs" / name, [0.5], name=name)
    assert [run.name for run in report.load_all([tmp_path / "study", tmp_path / "study" / "runs" / "a"])] == ["a", "b"]


def test_clients_begin_where_the_clock_says(rich: Path, tmp_path: Path) -> None:
    run = report.load(rich)
    lasts = run.rounds["virtual_s"]
    expected = [0.0] * 3 + [lasts[0]] * 3
    assert run.clients["begins_s"] == pytest.approx(expected) and lasts[0] > 0
    old = shutil.copytree(rich, tmp_path / "old")
    rows = [{k: v for k, v in row.items() if k != "begins_s"} for row in RunFolder(old).rows("clients")]
    table(old / "clients.csv", rows)
    new, before = (drawn("gantt", report.load(folder)) for folder in (rich, old))
    assert new.png() == before.png(), "where all begin together, earlier versions are drawn the same"
    config = (old / "config.toml").read_text()
    (old / "config.toml").write_text(config.replace('"splitfed-v1"', '"splitfed-v2"'))
    with pytest.raises(report.Absent, match="take turns"):
        drawn("gantt", report.load(old))


def test_in_turn_clients_begin_when_another_ends(tmp_path: Path) -> None:
    quick = {"body__plans": "", "control__tune": "", "eval__per_client": False}
    run = report.load(real(tmp_path / "run", server__schedule="splitfed-v2", **quick))
    begins, lasts = run.clients["begins_s"], run.clients["virtual_s"]
    order = np.argsort(begins)
    ends = np.concatenate([[0.0], (begins + lasts)[order][:-1]])
    assert begins[order] == pytest.approx(ends) and sorted(run.clients["client"][order[:3]]) == [0, 1, 2]


def test_partition_counts_what_clients_train_on(rich: Path) -> None:
    run = report.load(rich)
    held = {device: 0 for device in run.clients["client"].tolist()}
    for row in run.partition.rows():
        held[row["device"]] += row["samples"]
    cells = zip(run.clients["client"].tolist(), run.clients["samples"].tolist(), strict=True)
    assert all(held[client] == samples for client, samples in cells)


def test_of_many_clients_the_first_are_drawn(tmp_path: Path) -> None:
    folder = written(tmp_path / "many", [0.1, 0.2, 0.3, 0.4])
    spent = {"compute_s": 1.5, "upload_s": 0.5, "virtual_s": 2.0, "profile": "pi", "failure": ""}
    rows = [{"round": r, "client": c, "begins_s": 2.0 * (r - 1), **spent} for r in range(1, 5) for c in range(1000)]
    table(folder / "clients.csv", rows)
    made = drawn("gantt", report.load(folder))
    assert made.note == "Shown are the first 40 of the 1000 clients that took part and rounds up to 3 of 4."
    assert len(made.axes[0].get_yticks()) == 40 and made.get_size_inches()[1] < 12


def test_an_older_folder_keeps_its_columns_when_it_goes_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append("clients", [{"round": 1, "client": 0}])
    folder.append("clients", [{"round": 2, "begins_s": 0.5, "client": 1}])
    assert folder.rows("clients") == [{"round": "1", "client": "0"}, {"round": "2", "client": "1"}]


def test_the_page_of_one_run(rich: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(rich), "--out", str(tmp_path / "one")]) == 0
    page = Path(capsys.readouterr().out.splitlines()[-1])
    assert page == (tmp_path / "one" / "report.html").resolve()
    text = page.read_text()
    pictures = {file.stem for file in page.parent.glob("*.png")}
    drawn_from_tables = set(SINGLE) - {"crossing"}
    assert pictures >= drawn_from_tables | {"accuracy-round", "accuracy-bytes", "accuracy-virtual", "accuracy-energy"}
    assert text.count("<img ") == len(pictures) and text.count('alt="') == len(pictures)
    assert "left out" not in text and "linear" in text and "not finished" not in text


def test_the_page_of_groups(tmp_path: Path) -> None:
    for seed in (0, 1):
        for front in (1, 2):
            written(tmp_path / f"{front}-{seed}", [0.1, 0.1 * front + 0.2 * seed], seed=seed, cut__front=front)
    (tmp_path / "2-1" / "summary.json").unlink()
    runs = report.load_all(sorted(tmp_path.iterdir()))
    text = build(runs, tmp_path / "out").read_text()
    assert "20.0 ± 14.1" in text and "30.0 ± 14.1" in text and "the band goes from the lowest to the highest" in text
    assert "<b>2-1:</b> not finished, 2 of 2 rounds" in text and 'href="#cut-front-1"' in text
    assert (tmp_path / "out" / "accuracy-round.png").is_file()
    assert build(runs, tmp_path / "again").read_text() == text, "the same tables give the same bytes"


def test_an_unfinished_run_without_a_round_has_a_page(bare: Path, tmp_path: Path) -> None:
    text = build([report.load(bare)], tmp_path / "out").read_text()
    assert "not finished" in text and "0 of 1 rounds" in text and "No round was tested yet." in text


def test_a_folder_of_an_older_version(tmp_path: Path, rich: Path) -> None:
    old = written(tmp_path / "old", [0.2, 0.4])
    config = (old / "config.toml").read_text()
    (old / "config.toml").write_text(config.replace("[body]", '[body]\nold-name = "<b>x</b>"', 1))
    shutil.copyfile(rich / "partition.png", old / "partition.png")
    rows = [{"round": 1, "client": 0, "virtual_s": 2.0}]  # of a time when nothing more was written
    table(old / "clients.csv", rows)
    table(old / "ledger.csv", [{"round": 1, "activations_up": 7, "parameters_up": 3}])
    text = build([report.load(old)], tmp_path / "out").read_text()
    assert "does not know: body.old-name" in text and "<b>x</b>" not in text
    assert (tmp_path / "out" / "partition.png").read_bytes() == (rich / "partition.png").read_bytes()
    assert (tmp_path / "out" / "ledger.png").is_file()
    assert "of an earlier version, does not say what clients spent their time on" in text


def test_what_is_no_run_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written(tmp_path / "run", [0.5])
    (tmp_path / "file").write_text("x")
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "is not a run folder: it is no folder"),
        ([str(tmp_path / "file")], "is not a run folder"),
        ([str(folder), "--group", "cut.frnt"], "no run has a config key"),
        ([str(folder), "--out", str(tmp_path / "file")], "give --out DIR"),
    ):
        assert main(["report", *arguments]) == 2
        told = capsys.readouterr()
        assert message in told.err and told.err.count("\n") == 1 and not told.out
    (folder / "rounds.csv").write_text("a,b\n1,2\n")
    with pytest.raises(FedsplitError, match="has no column 'round'"):
        build([report.load(folder)], tmp_path / "out")
    (folder / "config.toml").write_text("a = [")
    with pytest.raises(FedsplitError, match="not valid TOML"):
        report.load(folder)
    (folder / "config.toml").write_text("rounds = 1\n")
    (folder / "summary.json").write_text(json.dumps([1]))
    assert not report.load(folder).finished
