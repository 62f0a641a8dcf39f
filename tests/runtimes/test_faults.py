"""Fault injection: parsing, and what each kind does to a client's work."""

from __future__ import annotations

import os
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save

from fedsplit.runtime import faults
from fedsplit.runtime.faults import KINDS, Fault, after, before, parse
from fedsplit.types import FedsplitError, Job, Report, Update

JOB = Job(client=3, round=1, attempt=1, down=b"", server=b"")
FRAME = save({"a": torch.zeros(2, 3), "b": torch.ones(4), "n": torch.ones(1, dtype=torch.int64)}, {"kind": "model"})
UPDATE = Update(3, 10, FRAME, b"", Report())


def test_parse() -> None:
    assert parse("") == ()
    assert parse("kill:3@1, nan:0") == (Fault("kill", 3, 1), Fault("nan", 0, None))
    assert {parse(f"{kind}:1")[0].kind for kind in KINDS} == set(KINDS)


@pytest.mark.parametrize("text", ["kill", "kill:", "kill:x", "kill:1@", "boom:1", "kill:-1", "kill:1@2@3", "kill 1"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(FedsplitError, match="engine.faults"):
        parse(text)


@pytest.mark.parametrize("kind", ["raise", "kill", "hang"])
def test_before_raises_in_the_users_process(kind: str) -> None:
    with pytest.raises(RuntimeError, match=kind):
        before(parse(f"{kind}:3@1"), JOB, disposable=False)
    before(parse(f"{kind}:3@2,{kind}:2"), JOB, disposable=False)


def test_before_in_the_clients_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: done.append(pid))
    monkeypatch.setattr(time, "sleep", done.append)
    for kind in ("kill", "hang"):
        with pytest.raises(RuntimeError):
            before(parse(f"{kind}:3"), JOB, disposable=True)
    assert done == [os.getpid(), faults.HANG_S]


def test_after_leaves_others_alone() -> None:
    assert after(parse("nan:2,zero:3@2,raise:3"), JOB, UPDATE) is UPDATE


def test_after_samples() -> None:
    assert after(parse("negative:3"), JOB, UPDATE).samples == -10
    assert after(parse("zero:3@1"), JOB, UPDATE).samples == 0


def test_after_frame() -> None:
    assert load(after(parse("nan:3"), JOB, UPDATE).up)["a"].isnan().sum() == 1
    assert load(after(parse("shape:3"), JOB, UPDATE).up)["a"].shape == (7,)
    assert set(load(after(parse("name:3"), JOB, UPDATE).up)) == {"a.fault", "b", "n"}
    assert len(after(parse("large:3"), JOB, UPDATE).up) > faults.LARGE_BYTES


def test_after_keeps_metadata(tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "up.safetensors")
    with open(path, "wb") as file:
        file.write(after(parse("nan:3"), JOB, UPDATE).up)
    with safe_open(path, "pt") as frame:
        assert frame.metadata() == {"kind": "model"}


def test_after_needs_a_tensor() -> None:
    empty = Update(3, 10, save({}), b"", Report())
    with pytest.raises(FedsplitError, match="no tensor"):
        after(parse("nan:3"), JOB, empty)
