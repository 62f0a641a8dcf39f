"""Invariant 7 with real processes: SuperLink, two SuperNodes with keys, and the body, all over TLS."""

from __future__ import annotations

from pathlib import Path

import pytest
from alike import BODY, ROOT, VALUES, assert_alike, in_process

from fedsplit.config import resolve
from fedsplit.runtime import half
from fedsplit.runtime.deployed import check
from fedsplit.runtime.localnet import local_net
from fedsplit.types import FedsplitError, Scalar

VALUE: dict[str, Scalar] = {
    **VALUES,
    **BODY,
    "eval.per-client": False,
    "data.limit": 60,
    "devices.count": 3,
    "rounds": 2,
}


@pytest.mark.slow
def test_a_deployment_is_as_one_process(tmp_path: Path) -> None:
    """Devices with their halves alone remember scores and personal layers; one SuperNode has two of them."""
    config = resolve(VALUE)
    in_process(config, tmp_path / "here")
    half.save(config, tmp_path / "half.safetensors")
    with local_net(ROOT, 2, node_config={"half": str(tmp_path / "half.safetensors")}, home=tmp_path / "net") as net:
        net.run({**VALUE, "out": str(tmp_path / "run"), "track": "tensorboard"})
        assert (tmp_path / "run" / "tensorboard").is_dir()
        assert_alike([tmp_path / "here", tmp_path / "run"])
        kept = sorted(path.parent.name for path in (tmp_path / "net").glob("device-*/clients/*/*.safetensors"))
        assert set(kept) == {"000000", "000001", "000002"}


@pytest.mark.parametrize(
    "values, message",
    [
        ({}, "set link.certificate and link.key"),
        ({"link.plaintext": True, "link.certificate": "x.pem"}, "set link.certificate and link.key"),
        ({"link.plaintext": True, "body.cosine": True}, "body.cosine"),
        ({"link.plaintext": True, "eval.per-client": True, "data.local-test": 0.2}, "eval.per-client"),
    ],
)
def test_what_devices_cannot_have_is_said_at_the_start(values: dict[str, Scalar], message: str) -> None:
    with pytest.raises(FedsplitError, match=message):
        check(resolve(values))
