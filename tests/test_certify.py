"""`fedsplit certify`: what it makes is what TLS and Flower's SuperNode keys need."""

from __future__ import annotations

import ipaddress
import os
import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedsplit.cli.main import main
from fedsplit.deploy import certificates, files
from fedsplit.types import FedsplitError

SECRET = ("ca.key", "server.key", "node-0", "node-1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("deployment") / "certificates"
    certificates.certify(made, ["Lab.example.org", "localhost", "127.0.0.1", "::1", "localhost"], nodes=2)
    return made


def shake_hands(folder: Path, host: str, trusted: Path | None = None) -> str | None:
    """The version of TLS that a client which trusts `trusted` and asks for `host` agrees on."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server.pem", folder / "server.key")
    client = ssl.create_default_context(cafile=str(trusted or folder / "ca.crt"))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            server.wrap_socket(theirs, server_side=True).close()
        except OSError:  # the client refused
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=host) as secure:
            return secure.version()
    finally:
        ours.close()
        thread.join(timeout=10)


@pytest.mark.parametrize("host", ["lab.example.org", "localhost", "127.0.0.1", "::1"])
def test_a_client_that_trusts_the_authority_trusts_the_server_by_every_host(folder: Path, host: str) -> None:
    assert shake_hands(folder, host) == "TLSv1.3"


def test_a_client_refuses_another_host_and_another_authority(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="not valid for 'example.org'"):
        shake_hands(folder, "example.org")
    other = tmp_path / "other"
    certificates.certify(other, ["localhost"], nodes=0)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(folder, "localhost", other / "ca.crt")


def test_certificates_say_what_they_are_for(folder: Path) -> None:
    ca, server = (x509.load_pem_x509_certificate((folder / name).read_bytes()) for name in ("ca.crt", "server.pem"))
    server.verify_directly_issued_by(ca)
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(True, 0)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["lab.example.org", "localhost"]
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address(one) for one in ("127.0.0.1", "::1")]
    days = (server.not_valid_after_utc - server.not_valid_before_utc).days
    assert days == 365 + certificates.BACKDATED.days
    assert server.not_valid_after_utc <= ca.not_valid_after_utc


def test_node_keys_are_what_flower_takes(folder: Path) -> None:
    """Flower's own loading: OpenSSH's format, an elliptic key of its allowed curves."""
    seen = set()
    for number in range(2):
        private = load_ssh_private_key((folder / f"node-{number}").read_bytes(), None)
        public = load_ssh_public_key((folder / f"node-{number}.pub").read_bytes())
        assert isinstance(private, ec.EllipticCurvePrivateKey) and isinstance(public, ec.EllipticCurvePublicKey)
        assert isinstance(private.curve, ec.SECP384R1) and private.public_key() == public
        seen.add(public.public_numbers())
    assert len(seen) == 2


def test_keys_are_for_their_owner_alone(folder: Path) -> None:
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
    assert {name for name, mode in modes.items() if mode == 0o600} == set(SECRET)
    assert {mode for name, mode in modes.items() if name not in SECRET} == {0o644}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_more_nodes_come_from_the_same_authority_and_nothing_is_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "certs"
    assert main(["certify", "--out", str(out), "--host", "localhost,10.0.0.5", "--nodes", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(out / name) for name in ("ca.crt", "ca.key", "server.pem", "server.key", "node-0", "node-0.pub")
    ]
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert main(["certify", "--out", str(out), "--host", "localhost", "--nodes", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert {name: (out / name).read_bytes() for name in before} == before
    (out / "node-2.pub").unlink()  # as if it had stopped between the two
    assert main(["certify", "--out", str(out), "--nodes", "3"]) == 0
    assert capsys.readouterr().out == f"{out / 'node-2.pub'}\n"
    private = load_ssh_private_key((out / "node-2").read_bytes(), None)
    assert private.public_key() == load_ssh_public_key((out / "node-2.pub").read_bytes())
    assert main(["certify", "--out", str(out), "--nodes", "3"]) == 0
    assert "already" in capsys.readouterr().out
    (out / "server.pem").unlink(), (out / "server.key").unlink()
    assert main(["certify", "--out", str(out), "--host", "lab", "--nodes", "0", "--days", "7"]) == 0
    assert shake_hands(out, "lab") == "TLSv1.3" and (out / "ca.key").read_bytes() == before["ca.key"]
    assert not list(out.glob(".*"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--nodes", "1"], "give --host"),
        (["--nodes", "-1", "--host", "a"], "--nodes must be between"),
        (["--nodes", "1", "--host", "a", "--days", "0"], "--days must be between"),
        (["--nodes", "1", "--host", "a b"], "no host name or address"),
        (["--nodes", "1", "--host", "10.0.0.256"], "no host name or address"),
        (["--nodes", "1", "--host=-a.org"], "no host name or address"),
    ],
)
def test_what_cannot_be_certified_is_one_sentence_and_leaves_nothing(
    options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["certify", "--out", str(tmp_path / "certs"), *options]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_belong_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FedsplitError, match=r"no ca\.crt"):
        certificates.certify(tmp_path, ["localhost"], nodes=1)
    with pytest.raises(FedsplitError, match="not valid for elsewhere"):
        certificates.certify(folder, ["elsewhere"], nodes=2)
    other = tmp_path / "other"
    certificates.certify(other, ["localhost"], nodes=0)
    (other / "ca.key").write_bytes((folder / "ca.key").read_bytes())
    with pytest.raises(FedsplitError, match="no elliptic pair"):
        certificates.certify(other, [], nodes=1)
    for name in ("ca.crt", "ca.key"):
        (other / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(FedsplitError, match="not of this authority"):
        certificates.certify(other, [], nodes=1)
    (other / "ca.crt").write_text("torn")
    with pytest.raises(FedsplitError, match="damaged"):
        certificates.certify(other, [], nodes=1)
    blocker = tmp_path / "file"
    blocker.touch()
    with pytest.raises(FedsplitError, match="Cannot write"):
        certificates.certify(blocker / "certs", ["localhost"], nodes=1)


def test_a_failure_on_the_way_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, content: bytes, mode: int = 0o644) -> None:
        if file.name == "node-0":
            raise OSError(28, "No space left on device", str(file))
        files.create(file, content, mode)

    monkeypatch.setattr(certificates, "create", full)
    with pytest.raises(FedsplitError, match="No space left"):
        certificates.certify(tmp_path / "certs", ["localhost"], nodes=1)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_never_seen_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (seen.append(os.listdir(tmp_path)), real(handle))[1])
    files.create(tmp_path / "key", b"secret", 0o600)
    assert "key" not in seen[0] and os.listdir(tmp_path) == ["key"]
    with pytest.raises(FedsplitError, match="there already"):
        files.create(tmp_path / "key", b"other")
    assert (tmp_path / "key").read_bytes() == b"secret" and os.listdir(tmp_path) == ["key"]


def test_the_host_of_a_superlink_must_be_one_of_the_certificate(folder: Path, tmp_path: Path) -> None:
    certificates.check_host(folder, "127.0.0.1")
    with pytest.raises(FedsplitError, match="not valid for 10.0.0.5 but for lab.example.org, localhost"):
        certificates.check_host(folder, "10.0.0.5")
    wild = tmp_path / "wild"
    certificates.certify(wild, ["*.lab.org"], nodes=0)
    certificates.check_host(wild, "one.lab.org")
    with pytest.raises(FedsplitError, match="not valid for"):
        certificates.check_host(wild, "lab.org")
