"""Scoreboards of the papers: means and spreads, ratios, verdicts, and runs that are already there."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from fedsplit.config import load, to_toml
from fedsplit.plan import account
from fedsplit.runs import RunFolder
from fedsplit.types import FedsplitError

sys.path.append(str(Path(__file__).resolve().parents[1] / "simulations"))

import paper
from papers import PAPERS, figures, scoreboard, show, work

BOARD = PAPERS["sfprompt"]


def summary(accuracy: float, flops: int = 100, sent: int = 1000) -> dict[str, Any]:
    figures = {"client_flops": flops, "bytes_up": sent - 1, "bytes_down": 1, "kept_samples": 10, "failures": 0}
    return {"accuracy": accuracy, **figures}


def results(**arms: Sequence[dict[str, Any] | None]) -> figures.Results:
    """Summaries on IID shards, a seed each; None is a failed run."""
    done = {("iid", arm, seed): s for arm, each in arms.items() for seed, s in enumerate(each) if s is not None}
    return figures.Results(done, range(max(map(len, arms.values()))))


def request(out: Path, **changes: Any) -> scoreboard.Request:
    return replace(scoreboard.Request(out, seeds=1, quick=True), **changes)


def leave(run: scoreboard.Run, found: dict[str, Any] | None) -> None:
    """A run folder as a finished run leaves it, or an unfinished one."""
    path = Path(run.config.out)
    path.mkdir(parents=True)
    (path / "config.toml").write_text(to_toml(run.config.values))
    if found is not None:
        (path / "summary.json").write_text(json.dumps(found))


class Ended:
    """A process that has ended."""

    exitcode = -9

    def __init__(self) -> None:
        self.sentinel, other = Pipe(duplex=False)
        other.close()

    def is_alive(self) -> bool:
        return False

    def join(self) -> None:
        return None


def test_accuracy_is_a_mean_with_the_sample_deviation() -> None:
    found = results(fedavg=[summary(0.5)] * 3, sfprompt=[summary(0.2), summary(0.4), summary(0.6)])
    row = figures.row(BOARD, found, "iid", "sfprompt")
    assert row["accuracy_mean"] == pytest.approx(0.4) and row["accuracy_std"] == pytest.approx(0.2)
    assert (row["seeds"], row["failed"]) == (3, 0)
    assert show.with_spread(row["accuracy_mean"], row["accuracy_std"], 100, "{:.1f}") == "40.0 ± 20.0"


def test_one_seed_has_no_spread() -> None:
    row = figures.row(BOARD, results(fedavg=[summary(0.5)], sfprompt=[summary(0.4)]), "iid", "sfprompt")
    assert row["accuracy_std"] is None
    assert show.with_spread(row["accuracy_mean"], None, 100, "{:.1f}") == "40.0"


def test_ratios_are_taken_seed_by_seed() -> None:
    base = [summary(0.5, flops=100, sent=1000), summary(0.5, flops=400, sent=4000)]
    found = results(fedavg=base, sfprompt=[summary(0.4, flops=50, sent=100), summary(0.4, flops=100, sent=2000)])
    row = figures.row(BOARD, found, "iid", "sfprompt")
    assert row["client_flops_ratio"] == pytest.approx((0.5 + 0.25) / 2)
    assert row["bytes_ratio"] == pytest.approx((0.1 + 0.5) / 2)
    assert (row["client_flops"], row["bytes"]) == (75, 1050)
    assert figures.row(BOARD, found, "iid", "fedavg")["bytes_ratio"] == 1.0


def test_a_failed_run_leaves_its_seed_out_and_is_counted() -> None:
    found = results(fedavg=[summary(0.5), None], sfprompt=[summary(0.4, sent=500), summary(0.6, sent=1)])
    row = figures.row(BOARD, found, "iid", "sfprompt")
    assert row["accuracy_mean"] == pytest.approx(0.5) and row["bytes_ratio"] == 0.5
    assert figures.row(BOARD, found, "iid", "fedavg")["failed"] == 1
    nothing = figures.row(BOARD, found, "iid", "splitfed")
    assert nothing["accuracy_mean"] is None and nothing["failed"] == 2
    assert show.table_of(BOARD, "t", [nothing]).rows[0][2:] == ("-", "-", "-", "-", "0, 2 failed")


def test_time_to_a_target_is_that_of_the_first_round_that_has_it() -> None:
    def run(*rounds: tuple[float | None, float]) -> dict[str, Any]:
        curve = [{"accuracy": accuracy, "virtual_s": seconds} for accuracy, seconds in rounds]
        return {**summary(rounds[-1][0] or 0.0), "curve": curve}

    base = run((0.3, 10.0), (None, 10.0), (0.49, 10.0), (0.48, 10.0), (0.5, 10.0))
    speed = figures.FIGURES["virtual_speedup"]
    assert speed(base, base, 0.95) == 1.0
    assert speed(run((0.2, 4.0), (0.475, 8.0), (0.1, 4.0)), base, 0.95) == pytest.approx(30 / 12)
    assert speed(run((0.4, 1.0), (0.474, 1.0)), base, 0.95) == 0.0  # never
    assert figures.until(base, "virtual_s", 0.5) == 50.0 and figures.until(base, "virtual_s", 0.51) is None


def test_what_the_tables_of_a_run_add(tmp_path: Path) -> None:
    tables = {
        "rounds": "round,accuracy,bytes_up,bytes_down,virtual_s,server_flops,workload_variance,gradient_cosine,"
        "personal_accuracy\n1,,30,4,2.0,100,0.25,,\n2,0.5,20,3,3.0,50,0.75,,0.6\n",
        "clients": "round,failure,late,wall_s,server_peak_bytes\n"
        "1,,,0.5,100\n1,lost,,,\n1,,0.8,9.9,900\n1,,,1.5,300\n2,,,4.0,200\n",
        "units": "round,block,unit,full,forward,skip\n1,0,0,8,0,0\n1,1,0,2,4,2\n1,2,0,0,0,8\n1,3,0,8,0,0\n",
    }
    for name, text in tables.items():
        (tmp_path / f"{name}.csv").write_text(text)
    config = load([], ["cut.front=1", "cut.tail=1"])
    found = figures.of_tables(RunFolder(tmp_path), config)
    assert found["curve"] == [
        {"accuracy": None, "bytes": 34.0, "virtual_s": 2.0, "clients_s": 2.0, "server_flops": 100.0},
        {"accuracy": 0.5, "bytes": 23.0, "virtual_s": 3.0, "clients_s": 4.0, "server_flops": 50.0},
    ]
    assert found["traffic"] == (2 * 2 + 4) / (2 * 16)  # of the body's blocks, 1 and 2
    assert (found["round_peak_bytes"], found["workload_variance"]) == (200.0, 0.5)
    assert (found["gradient_cosine"], found["personal_accuracy"]) == (None, 0.6)


def test_an_arm_may_have_a_reference_of_its_own() -> None:
    arm = replace(BOARD.arm("sfprompt"), reference="splitfed")
    board = replace(BOARD, arms=(*BOARD.arms[:-1], arm), columns=("accuracy_points",))
    found = results(fedavg=[summary(0.9)], splitfed=[summary(0.3, sent=200)], sfprompt=[summary(0.5, sent=100)])
    row = figures.row(board, found, "iid", "sfprompt")
    assert (row["against"], row["bytes_ratio"], row["accuracy_points"]) == ("splitfed", 0.5, pytest.approx(20.0))
    assert "+20.0" in show.table_of(board, "t", [row]).markdown()


def test_a_claim_is_judged_where_both_of_its_arms_run() -> None:
    claim = scoreboard.Claim("text", "source", "bytes_ratio", "a", "b", high=1.0)
    cells = [("iid", "a"), ("iid", "b"), ("shard", "a"), ("dirichlet", "b"), ("dirichlet", "a")]
    assert figures.claimed_on(claim, cells) == ["iid", "dirichlet"]
    assert figures.claimed_on(replace(claim, partitions=("dirichlet",)), cells) == ["dirichlet"]


@pytest.mark.parametrize(
    ("bounds", "figure", "ours", "said"),
    [
        ({"high": 0.5}, "bytes_ratio", 0.5, "holds"),
        ({"high": 0.5}, "bytes_ratio", 0.8, "missed: 1.6 times the claim"),
        ({"low": -1.0}, "accuracy_points", -0.9, "holds"),
        ({"low": -1.0}, "accuracy_points", -3.5, "missed by 2.50 points"),
        ({"above": 0.0}, "accuracy_points", 0.0, "missed by 0.00 points"),
        ({"above": 0.0}, "accuracy_points", 0.1, "holds"),
    ],
)
def test_a_missed_claim_is_said_to_be_missed(bounds: dict[str, Any], figure: str, ours: float, said: str) -> None:
    claim = scoreboard.Claim("text", "source", figure, "sfprompt", "fedavg", **bounds)
    own = summary(0.5 + ours / 100) if figure == "accuracy_points" else summary(0.5, sent=int(1000 * ours))
    judged = figures.judge(BOARD, claim, results(fedavg=[summary(0.5)], sfprompt=[own]), "iid", "fedsplit_micro")
    assert judged["verdict"] == said and judged["holds"] == (said == "holds")
    assert said in show.table_of_claims(BOARD, [judged]).markdown()


def test_a_claim_without_runs_is_not_measured() -> None:
    judged = figures.judge(BOARD, BOARD.claims[0], results(fedavg=[summary(0.5)]), "iid", "fedsplit_micro")
    assert judged["holds"] is None and judged["verdict"].startswith("not measured")


def test_a_number_published_for_another_backbone_is_named_so() -> None:
    found = results(fedavg=[summary(0.5)], sfprompt=[summary(0.5)])
    notes = [figures.judge(BOARD, BOARD.claims[0], found, "iid", model)["note"] for model in ("m", "vit_base_x")]
    assert notes == ["published for ViT-Base; no published figure for m", "published for ViT-Base"]


def test_a_finished_run_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = scoreboard.runs(BOARD, request(tmp_path))
    for number, run in enumerate(runs):
        leave(run, summary(number / 100))
    monkeypatch.setattr(work, "start", lambda run: pytest.fail(f"{run.name} is run again"))
    work.validate(runs, lambda line: None)
    summaries, failed = work.carry_out(runs, 2, lambda line: None)
    assert [summaries[run.name]["accuracy"] for run in runs] == [number / 100 for number in range(len(runs))]
    assert not failed


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = scoreboard.runs(BOARD, request(tmp_path, only="main"))
    leave(runs[1], None)

    def start(run: scoreboard.Run) -> work.Child:
        reply, send = Pipe(duplex=False)
        if run is runs[0]:
            send.send("round 1: below quorum")
        elif run is not runs[2]:  # the third is killed
            if run is not runs[1]:
                leave(run, None)
            (Path(run.config.out) / "summary.json").write_text(json.dumps(summary(0.5)))
            send.send("")
        send.close()
        return work.Child(run, Ended(), reply, 0.0)  # type: ignore[arg-type]

    monkeypatch.setattr(work, "start", start)
    lines: list[str] = []
    summaries, failed = work.carry_out(runs, 2, lines.append)
    assert failed == {runs[0].name: "round 1: below quorum", runs[2].name: "its process ended with code -9"}
    assert len(summaries) == len(runs) - 2 and len(lines) == len(runs)
    assert lines[-1].startswith(f"[ {len(runs)} of {len(runs)}]") and "about 0.0 min left" in lines[-1]


def test_a_folder_of_another_config_is_refused(tmp_path: Path) -> None:
    run = scoreboard.runs(BOARD, request(tmp_path))[0]
    leave(run, summary(0.5))
    other = scoreboard.runs(BOARD, request(tmp_path, pairs=("rounds=3",)))[0]
    with pytest.raises(FedsplitError, match="holds a run with rounds=2, not 3"):
        work.finished(other)
    workers = scoreboard.runs(BOARD, request(tmp_path, pairs=("engine.workers=2",)))[0]
    found = work.finished(workers)
    assert found and {name: found[name] for name in summary(0.5)} == summary(0.5)


def test_every_scoreboard_names_what_there_is(tmp_path: Path) -> None:
    named: dict[str, Any] = {}
    for name, board in PAPERS.items():
        assert board.name == name
        arms, partitions = {arm.name for arm in board.arms}, {part.name for part in board.partitions}
        assert {board.reference, *board.ablated} <= arms
        assert {*board.ablated_on, *board.quick_partitions} <= partitions
        assert set(board.quick_ablations) <= {arm.name for arm in board.ablations}
        assert {*board.quick_arms, *(board.against(arm.name) for arm in (*board.arms, *board.ablations))} <= arms
        assert set(board.columns) <= set(show.COLUMNS)
        for claim in board.claims:
            assert claim.figure in figures.FIGURES and {claim.arm, claim.against} <= arms
            assert set(claim.partitions) <= partitions
            assert sum(limit is not None for limit in (claim.low, claim.above, claim.high)) == 1
        for run in scoreboard.runs(board, request(tmp_path, quick=False, seeds=2)):
            values = {key: value for key, value in run.config.values.items() if key != "name"}
            assert named.setdefault(run.name, values) == values, f"two papers differ in {run.name}"
            assert run.config.eval.every == (1 if board.every_round else run.config.rounds)


def test_sizes_tuned_values_and_the_users_pairs_in_order(tmp_path: Path) -> None:
    arm = replace(BOARD.arm("fedavg"), tuned=("optimizer.lr=0.25",))
    board = replace(BOARD, arms=(arm, *BOARD.arms[1:]))
    asked = request(tmp_path, quick=False, data="/images", pairs=("rounds=4",))
    config = scoreboard.configure(board, asked, "fedavg", "iid", 2)
    assert (config.optimizer.lr, config.rounds, config.seed, config.devices.count) == (0.25, 4, 2, 50)
    assert (config.data.source, config.data.partition, config.cut.front) == ("/images", "iid", 0)
    asked = replace(asked, pairs=("optimizer.lr=0.5",))
    assert scoreboard.configure(board, asked, "fedavg", "iid", 0).optimizer.lr == 0.5


def test_ablations_alone_bring_their_reference(tmp_path: Path) -> None:
    names = [run.name for run in scoreboard.runs(BOARD, request(tmp_path, only="ablations"))]
    assert names[:2] == ["dirichlet-0.1-fedavg-s0", "dirichlet-0.1-sfprompt-s0"]
    assert all(name.startswith("dirichlet-0.1-") for name in names) and len(names) == 4


def test_some_arms_bring_their_reference_and_no_ablations(tmp_path: Path) -> None:
    asked = request(tmp_path, arms=("sfprompt",))
    assert {run.arm for run in scoreboard.runs(BOARD, asked)} == {"fedavg", "sfprompt"}
    assert scoreboard.ablation_cells(BOARD, asked) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sfprompt", "--arms", "sfpromt"], "has no arm 'sfpromt'; known: "),
        (["sfprompt", "--arms", "sfprompt", "--only", "ablations"], "leave out one of the two"),
        (["sfpromt"], "did you mean 'sfprompt'?"),
        (["sfprompt", "--data", "nowhere"], "--data nowhere: there is no train.parquet"),
        (["sfprompt", "--set", "roundz=3"], "did you mean 'rounds'?"),
        (["sfprompt", "--set", "seed=3"], "use --seeds"),
        (["sfprompt", "--set", "data.el2n.keep=0.3"], "it is what sets the arms apart"),
        (["sfprompt", "--set", "data.alpha=1.0"], "the partitions are the scoreboard's"),
        (["all", "--seeds", "0"], "--seeds must be at least 1"),
    ],
)
def test_what_is_wrong_is_one_sentence(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert paper.main(arguments) == 2
    shown = capsys.readouterr()
    assert said in shown.err and shown.err.count("\n") == 1 and not shown.out


def test_a_folder_with_a_split_is_ranked_and_says_so(tmp_path: Path) -> None:
    board = PAPERS["patrol"]
    data = tmp_path / "cars"
    data.mkdir()
    wanted = request(tmp_path, data=str(data), arms=("patrol-full",))
    assert not any(run.retrieval for run in scoreboard.runs(board, wanted))
    (data / scoreboard.SPLIT).write_text('{"query": [], "gallery": []}')
    runs = scoreboard.runs(board, wanted)
    assert [run.retrieval for run in runs] == [str(data)] * 2
    assert not any(run.retrieval for run in scoreboard.runs(BOARD, replace(wanted, arms=())))
    found = summary(0.5) | {"worst_ssim": 0.5, "worst_psnr": 12.0}
    plain = figures.row(board, figures.Results.of(board, runs, {run.name: found for run in runs}), "iid", "patrol-full")
    assert {"points", "worst SSIM", "worst PSNR"} < set(show.table_of(board, "t", [plain]).columns)
    assert not {"rank-1 %", "mAP %", "labels %"} & set(show.table_of(board, "t", [plain]).columns)
    ranked = found | {"rank1": 0.25, "map": 0.125}
    row = figures.row(board, figures.Results.of(board, runs, {run.name: ranked for run in runs}), "iid", "patrol-full")
    sheet = show.table_of(board, "t", [row])
    assert dict(zip(sheet.columns, sheet.rows[0], strict=True))["mAP %"] == "12.5"


def test_an_interrupted_run_is_resumed(tmp_path: Path) -> None:
    pairs = ["data.limit=60", "data.test-limit=20", "devices.count=2", "data.partition=iid", "local.max-steps=1"]
    config = load([], [*pairs, "rounds=2", "cut.shape=none", "train=head", f"out={tmp_path / 'run'}"])
    (tmp_path / "run/checkpoint").mkdir(parents=True)  # it died before it wrote its config
    work.train(config.values, "run")
    run = scoreboard.Run("a", "iid", 0, config)
    whole = work.finished(run)
    assert whole is not None and not (tmp_path / "run/checkpoint").exists()
    (tmp_path / "run/summary.json").unlink()
    assert work.finished(run) is None
    work.train(config.values, "run")
    again = work.finished(run)
    assert again is not None and again["weights_sha256"] == whole["weights_sha256"]


@pytest.mark.slow
def test_a_run_in_a_process_of_its_own_is_the_same_and_may_be_killed(tmp_path: Path) -> None:
    pairs = ["data.limit=60", "data.test-limit=20", "devices.count=2", "data.partition=iid", "local.max-steps=1"]
    names = ("here", "there", "killed", "refused")
    config = load([], [*pairs, "rounds=1", "cut.shape=none", "device=cpu"])
    runs = {name: scoreboard.Run(name, "iid", 0, config.replace(out=str(tmp_path / name))) for name in names}
    work.train(runs["here"].config.values, "here")
    (tmp_path / "refused").mkdir()
    (tmp_path / "refused/config.toml").write_text("roundz = 1\n")
    children = {name: work.start(runs[name]) for name in names[1:]}
    children["killed"].process.kill()
    ends = {name: child.ended() for name, child in children.items()}
    assert ends["there"] == "" and ends["killed"] == "its process ended with code -9"
    assert "did you mean 'rounds'?" in ends["refused"]
    digests = [(work.finished(runs[name]) or {})["weights_sha256"] for name in names[:2]]
    assert digests[0] == digests[1]


def test_bytes_to_a_goal_that_is_the_same_for_all_arms() -> None:
    board = replace(BOARD, reference="fedavg", target=0.5)
    curves = {
        "fedavg": [(0.2, 100), (0.4, 100), (0.8, 100)],  # the goal is 0.4, met after 200 bytes
        "thin": [(0.1, 30), (0.4, 30), (0.3, 30)],
        "never": [(0.1, 10), (0.2, 10), (0.3, 10)],
    }
    summaries, asked = {}, []
    for arm, curve in curves.items():
        rows = [{"accuracy": accuracy, "bytes": float(sent)} for accuracy, sent in curve]
        summaries[f"iid-{arm}-s0"] = {**summary(curve[-1][0], sent=sum(sent for _, sent in curve)), "curve": rows}
        asked.append(scoreboard.Run(arm, "iid", 0, load()))
    found = figures.Results.of(board, asked, summaries)

    def fewer(arm: str, against: str) -> list[float]:
        return found.beside("bytes_speedup", "iid", arm, against)

    assert fewer("fedavg", "fedavg") == [1.0] and fewer("thin", "fedavg") == [200 / 60]
    assert fewer("never", "fedavg") == [0.0]
    assert fewer("thin", "never") == [0.5], "all 30 bytes of a run that never gets there"


def test_what_sets_the_arms_of_caesar_apart_is_what_they_send(tmp_path: Path) -> None:
    board = PAPERS["caesar"]
    small = ("model.pretrained=false", "rounds=2", "data.limit=400", "devices.count=4", "devices.per-round=3")
    asked = request(tmp_path, quick=False, seeds=1, model="fedsplit_nano", pairs=small)
    configs = {arm.name: scoreboard.configure(board, asked, arm.name, "dirichlet-0.1", 0) for arm in board.arms}
    configs |= {arm.name: scoreboard.configure(board, asked, arm.name, "dirichlet-0.1", 0) for arm in board.ablations}
    planned = {name: account(configs[f"caesar{name}"]) for name in ("-fedavg", "", "-down", "-up")}
    whole, own = planned["-fedavg"], planned[""]
    assert not any(each.estimated for each in planned.values()) and all(each.virtual_s > 0 for each in planned.values())
    assert own.total_bytes < 0.95 * whole.total_bytes and own.client_flops < whole.client_flops
    for name, stream, other in (
        ("-down", "parameters-down", "parameters-up"),
        ("-up", "parameters-up", "parameters-down"),
    ):
        assert planned[name].bytes[stream] == own.bytes[stream] < whole.bytes[stream]
        assert planned[name].bytes[other] == whole.bytes[other] and planned[name].client_flops == whole.client_flops
