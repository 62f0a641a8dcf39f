"""What clients keep is on disk: only what is complete counts, at whatever moment the process dies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsplit import checkpoints, experiment, shelf
from fedsplit.cli.main import main
from fedsplit.config import resolve
from fedsplit.round import State, run_round, sample
from fedsplit.runtime.inprocess import Loop
from fedsplit.shelf import Shelf
from fedsplit.types import FedsplitError, Scalar
from fedsplit.wire.frame import pack, unpack
from fedsplit.world import world

KEEPS: dict[str, Scalar] = {
    "data.limit": 60,
    "data.test-limit": 20,
    "data.partition": "iid",
    "devices.count": 4,
    "devices.per-round": 2,
    "cut.tail": 1,
    "share.partial": "ptls",
    "model.image-size": 16,
    "rounds": 4,
    "local.max-steps": 1,
}
CLIENTS, ROUNDS = 5, 6


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def referred(run: Path) -> set[str]:
    """What the checkpoints of `run` refer to."""
    return {
        f"{name}/client-{int(client):06d}-round-{version[0]:06d}.safetensors"
        for folder in checkpoints.names(run)
        for name in checkpoints.SHELVES
        for client, version in json.loads((folder / "round.json").read_text())[name].items()
    }


def test_an_older_view_stays_true_and_nothing_makes_no_folder(tmp_path: Path) -> None:
    empty = Shelf(tmp_path / "clients")
    assert not empty.put(1, {0: b"", 3: b""}) and not (tmp_path / "clients").exists()
    first = empty.put(1, {0: b"a", 1: b"bc"})
    second = first.put(2, {1: b"def", 2: b"g", 0: b""})
    assert dict(first) == {0: b"a", 1: b"bc"} and dict(second) == {1: b"def", 2: b"g"}
    assert second.get(0, b"") == b"" and len(files(tmp_path)) == 4
    shelf.sweep(first.folder, [first, second])
    assert len(files(tmp_path)) == 4
    shelf.sweep(first.folder, [second])
    assert len(files(tmp_path)) == 2 and dict(second) == {1: b"def", 2: b"g"}
    assert Shelf.read(second.folder, json.loads(json.dumps(second.as_dict()))) == second


@pytest.mark.parametrize(
    "harm", [Path.unlink, lambda file: file.write_bytes(b"a"), lambda file: file.write_bytes(b"ac")]
)
def test_a_file_that_is_not_what_was_written_is_refused(harm: Callable[[Path], Any], tmp_path: Path) -> None:
    kept = Shelf(tmp_path).put(1, {0: b"ab", 1: b"cd"})
    harm(next(tmp_path.glob("client-000000-*")))
    with pytest.raises(FedsplitError, match=r"client-000000-round-000001\S* is missing or damaged"):
        kept[0]
    assert kept[1] == b"cd"


def after(state: State, keeps: bool = True) -> State:
    """A round of two or three clients who remember all rounds that they took part in; no model is trained."""
    number = state.round + 1
    cohort = [client for client in range(CLIENTS) if (client + number) % 2]
    fresh = {c: state.memory.get(c, b"") + f"{number};".encode() for c in cohort}
    notes = {c: b"" if number % 3 == 0 else f"{c} in {number}".encode() for c in cohort}
    model = {"w": state.model["w"] * 3 + number}
    return State(number, model, {}, shelf.put(state.memory, number, fresh), shelf.put(state.notes, number, notes))


def go_on(run: Path) -> State:
    """From the newest checkpoint to the last round, as `experiment.run` does."""
    found = checkpoints.names(run)
    checkpoints.tidy(run)
    state = checkpoints.read(run, found[-1]) if found else checkpoints.shelved(run, State(0, {"w": torch.ones(2)}))
    while state.round < ROUNDS:
        state = after(state)
        checkpoints.save(run, state)
    return state


class Killed(BaseException):
    """kill -9, for want of a process."""


@pytest.fixture
def fuse(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Sets off `Killed` before the operation of that number, counted over all that change the disk."""
    left = [-1]

    def burn() -> bool:
        left[0] -= 1
        return left[0] == -1

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            if burn():
                raise Killed
            return real(*arguments, **options)

        return operation

    def write(file: Path, content: bytes) -> None:
        if burn():
            file.write_bytes(content[: len(content) // 2])
            raise Killed
        file.write_bytes(content)

    def rmtree(folder: Path, ignore_errors: bool = False) -> None:
        for file in sorted(folder.rglob("*")) if folder.exists() else ():
            file.unlink()
        if folder.exists():
            watched(Path.rmdir)(folder)

    for place, name in ((shelf.os, "replace"), (Path, "rename"), (Path, "unlink"), (Path, "mkdir")):
        monkeypatch.setattr(place, name, watched(getattr(place, name)))
    monkeypatch.setattr(shelf, "durable", write)
    monkeypatch.setattr(checkpoints, "durable", write)
    monkeypatch.setattr(checkpoints.shutil, "rmtree", rmtree)

    def light(operations: int) -> None:
        left[0] = operations

    yield light
    left[0] = -1


def test_killed_before_any_operation_on_the_disk(tmp_path: Path, fuse: Callable[[int], None]) -> None:
    whole = go_on(tmp_path / "whole")
    assert dict(whole.memory)[0] == b"1;3;5;" and 0 < len(whole.notes) < CLIENTS
    for operations in range(10_000):
        run = tmp_path / str(operations)
        fuse(operations)
        try:
            go_on(run)
        except Killed:
            fuse(-1)
            state = go_on(run)
            assert torch.equal(state.model["w"], whole.model["w"])
            assert dict(state.memory) == dict(whole.memory) and dict(state.notes) == dict(whole.notes)
            assert files(run / "clients") == referred(run) == files(tmp_path / "whole" / "clients")
            restored = checkpoints.read(run, checkpoints.names(run)[-1])
            assert dict(restored.memory) == dict(whole.memory) and restored.round == ROUNDS
        else:
            break
    assert operations > 100, "a round has many operations"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose clients keep blocks of their own."""
    config = resolve(KEEPS).replace(out=str(tmp_path_factory.mktemp("keeps") / "run"))
    return experiment.run(config, Loop(config))


def test_a_run_keeps_what_its_last_checkpoints_refer_to(finished: Path) -> None:
    assert files(finished / "clients") == referred(finished)
    newest = checkpoints.read(finished, checkpoints.names(finished)[-1])
    built = world(resolve(KEEPS))
    met = {client for number in range(1, 5) for client in sample(built, number, 0)}
    assert set(newest.memory) == set(newest.notes) == met
    assert len({version[0] for version in newest.memory.versions.values()}) > 1, "some are older than the checkpoint"
    state = unpack((finished / "checkpoint" / "round-000004" / "state.safetensors").read_bytes())
    assert {name.partition("|")[0] for name in state} == {"model"}


def test_a_run_without_client_memory_has_no_such_folder(tmp_path: Path) -> None:
    config = resolve(KEEPS).replace(share__partial="", rounds=1, out=str(tmp_path / "run"))
    assert not (experiment.run(config, Loop(config)) / "clients").exists()


def test_a_lost_file_and_an_older_format_get_a_sentence(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    newest = run / "checkpoint" / "round-000004"
    next((run / "clients" / "notes").glob("*-round-000004.*")).unlink()
    assert main(["resume", str(run), "--quiet"]) == 2
    assert f"{newest} is damaged; delete it to go on from the one before" in capsys.readouterr().err
    shutil.rmtree(newest)
    assert main(["resume", str(run), "--quiet"]) == 0
    assert (run / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    capsys.readouterr()
    tensors = unpack((newest / "state.safetensors").read_bytes())
    (newest / "state.safetensors").write_bytes(pack({**tensors, "client|0": torch.zeros(3, dtype=torch.uint8)}))
    assert main(["resume", str(run), "--quiet"]) == 2
    assert capsys.readouterr().err.count("as an earlier fedsplit wrote it; go on with that version") == 1


class Watched(dict[int, bytes]):
    """Says who was asked for."""

    asked: set[int]

    def get(self, client: int, default: bytes = b"") -> bytes:  # type: ignore[override]
        self.asked.add(client)
        return super().get(client, default)


def test_only_who_takes_part_is_read(finished: Path) -> None:
    config = resolve(KEEPS)
    built = world(config)
    state = checkpoints.read(finished, checkpoints.names(finished)[-1])
    seen: list[set[int]] = []
    kept: list[Mapping[int, bytes]] = []
    for frames in (state.memory, state.notes):
        watched = Watched(frames)
        watched.asked = set()
        kept.append(watched)
        seen.append(watched.asked)
    run_round(built, State(4, state.model, {}, *kept), 0, Loop(config), lambda _: None)
    assert seen == [set(sample(built, 5, 0))] * 2
