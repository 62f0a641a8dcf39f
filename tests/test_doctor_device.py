"""`fedsplit doctor --device`, against servers and certificates of this process."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedsplit import doctor
from fedsplit.cli.main import main
from fedsplit.config import load
from fedsplit.deploy import certificates
from fedsplit.doctor import device, machine, packages
from fedsplit.doctor.check import Check

GROUPS = ("python", "installed", "torchvision", "_processor", "client", "state", "clock", "superlink")
TINY = ["data.limit=60", "data.test-limit=20", "devices.count=3", "local.batch-size=4"]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deployment") / "certificates"
    certificates.certify(folder, ["localhost"], nodes=0)
    return folder


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client's process that takes 64 MiB and no time."""
    monkeypatch.setattr(device, "CLIENT", "print('noise'); print(64 * 2**20)")


def asked(tmp_path: Path, **changes: object) -> device.Asked:
    given = {"config": None, "folder": None, "superlinks": (), "authority": None, "state": tmp_path, **changes}
    return device.Asked(**given)  # type: ignore[arg-type]


@contextmanager
def serving(keys: Path | None) -> Iterator[str]:
    """A server that answers one caller, with the certificate in `keys` or without TLS; its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            try:
                link, _ = server.accept()
                if keys is None:
                    link.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                else:
                    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                    context.load_cert_chain(keys / "server.pem", keys / "server.key")
                    context.wrap_socket(link, server_side=True).close()
                link.close()
            except OSError:  # the caller refused, or nobody called
                return

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"localhost:{server.getsockname()[1]}"
        server.close()
        thread.join(timeout=1)


def test_the_report_of_a_device_and_what_is_not_in_it(
    light: None, keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(keys) as address:
        options = [
            "--superlink",
            address,
            "--root-certificates",
            str(keys / "ca.crt"),
            "--state",
            str(tmp_path),
            "--json",
        ]
        code = main(["doctor", "--device", *options])
    document = json.loads(capsys.readouterr().out)
    found = {check["name"]: check for check in document["checks"]}
    assert code == 0 and document["ok"], [check for check in document["checks"] if not check["ok"]]
    assert {"Python", "fedsplit", "torch", "flwr", "grpcio", "processor", "client", "memory", "state", "clock"} <= set(
        found
    )
    assert not {"ray", "flwr-datasets", "datasets", "matplotlib", "scikit-learn", "Ray", "shared memory"} & set(found)
    assert "TLSv1.3" in found[address]["found"] and "64 MiB" in found["client"]["found"]


def test_the_order_of_the_checks(tmp_path: Path) -> None:
    assert tuple(group.__name__ for group in device.groups(asked(tmp_path))) == GROUPS


def test_what_a_needed_extra_lacks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = packages._requirements
    wanted = {("fedsplit", "device"): [packages_requirement("fedsplit-surely-absent>=1")]}
    monkeypatch.setattr(packages, "_requirements", lambda name, extra: wanted.get((name, extra)) or real(name, extra))
    levels = {check.name: check.level for check in packages.packages(["device"])}
    assert levels["fedsplit-surely-absent"] == "error" and "flwr-datasets" not in levels
    assert {check.name: check.level for check in packages.packages()}["fedsplit-surely-absent"] == "warning"


def packages_requirement(text: str) -> packages.Requirement:
    from packaging.requirements import Requirement

    return Requirement(text)


def test_a_server_is_reached_trusted_or_told_why_not(keys: Path, tmp_path: Path) -> None:
    ca = keys / "ca.crt"
    with serving(keys) as address:
        known = device._superlink(address, None)
        assert known.ok and "--root-certificates" in known.found
    with serving(keys) as address:
        other = device._superlink(address.replace("localhost", "127.0.0.1"), ca)
        assert other.level == "error" and "not trusted" in other.found and "127.0.0.1" in other.found
    certificates.certify(tmp_path / "other", ["localhost"], nodes=0)
    with serving(keys) as address:
        assert "not trusted" in device._superlink(address, tmp_path / "other" / "ca.crt").found
    with serving(None) as address:
        plain = device._superlink(address, ca)
        assert plain.level == "error" and "no TLS" in plain.found and "--ssl-certfile" in plain.mend
    nobody = device._superlink(address, ca)
    assert nobody.level == "error" and "refused" in nobody.found and "firewall" in nobody.mend
    assert "cannot be reached" in device._superlink("localhost:x", ca).found
    assert "no known name" in device._superlink("fedsplit.invalid:9092", ca).found


def test_a_processor_that_lacks_an_instruction_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "CLIENT", f"import os; os.kill(os.getpid(), {int(signal.SIGILL)})")
    (found,) = device._client(asked(tmp_path))
    assert found.level == "error" and "illegal instruction" in found.found and "release of torch" in found.mend
    monkeypatch.setattr(device, "CLIENT", "import surely_absent")
    (found,) = device._client(asked(tmp_path))
    assert found.level == "error" and "surely_absent" in found.found and "fedsplit[device]" in found.mend


@pytest.mark.parametrize(
    ("total", "free", "level"),
    [(100, 90, "ok"), (100, 60, "warning"), (70, 60, "error")],
    ids=["fits", "busy", "never"],
)
def test_memory_is_held_against_the_part_of_the_config(
    light: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, total: int, free: int, level: str
) -> None:
    monkeypatch.setattr(machine, "memory_bytes", lambda: (total * 2**20, free * 2**20))
    monkeypatch.setattr(device, "client_memory_bytes", lambda config: 16 * 2**20)
    client, memory = device._client(asked(tmp_path, config=load()))
    assert client.ok and memory.level == level and "64 + 16 MiB" in memory.found
    assert level == "ok" or memory.mend


def test_the_part_of_a_config_is_that_of_its_plan(tmp_path: Path) -> None:
    from fedsplit.plan import account

    small, large = (load(pairs=[*TINY, f"local.batch-size={size}"]) for size in (2, 8))
    assert device.client_memory_bytes(small) < device.client_memory_bytes(large)
    assert device.client_memory_bytes(large) == account(large).client_peak_bytes


def test_a_manifest_says_what_a_device_cannot_work_out(
    light: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The data of a config are on the server; a device has the figure that was computed there."""
    config = tmp_path / "config.toml"
    config.write_text(f'data.source = "{tmp_path}/not-here"\n')
    main(["doctor", "--device", "--config", str(config), "--state", str(tmp_path), "--json"])
    memory = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}["memory"]
    assert memory["level"] == "warning" and "not known" in memory["found"] and "bundle" in memory["mend"]
    (tmp_path / "bundle.json").write_text(json.dumps({"format": 1, "client_memory_bytes": 8 * 2**20, "files": {}}))
    main(["doctor", "--device", "--config", str(config), "--state", str(tmp_path), "--json"])
    memory = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}["memory"]
    assert "64 + 8 MiB" in memory["found"]


def test_the_state_folder_is_tried_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = device._state(tmp_path / "not" / "yet")
    assert found.level != "error" and list(tmp_path.iterdir()) == []
    blocker = tmp_path / "file"
    blocker.touch()
    (found,) = device._state(blocker)
    assert found.level == "error" and "cannot be written" in found.found

    def fails(handle: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    (found,) = device._state(tmp_path)
    assert found.level == "error" and "Input/output error" in found.found


@pytest.mark.parametrize(("shift", "level"), [(0, "ok"), (-86_400 * 30, "error"), (86_400 * 5000, "error")])
def test_the_clock_is_held_against_the_certificate(
    keys: Path, monkeypatch: pytest.MonkeyPatch, shift: int, level: str
) -> None:
    now = device.time.time()
    monkeypatch.setattr(device.time, "time", lambda: now + shift)
    (found,) = device._clock(keys / "ca.crt")
    assert found.level == level
    assert ("certificates" if shift > 0 else "timedatectl") in found.mend or level == "ok"


def test_a_clock_before_the_installation_is_wrong(monkeypatch: pytest.MonkeyPatch, keys: Path) -> None:
    monkeypatch.setattr(device.time, "time", lambda: 0.0)
    (found,) = device._clock(None)
    assert found.level == "error" and found.found.startswith("1970-01-01")
    (found,) = device._clock(keys / "ca.key")
    assert found.level == "error" and "no certificate" in found.found


def test_options_of_a_device_need_it(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("--set=seed=1", "--superlink=localhost:1", "--root-certificates=ca.crt"):
        assert main(["doctor", wrong]) == 2
        assert "--device" in capsys.readouterr().err


def test_checks_of_other_groups_still_count() -> None:
    def one() -> Iterator[Check]:
        yield Check("one", "ok", "")

    assert [check.name for check in doctor.checks([one])] == ["one"]
