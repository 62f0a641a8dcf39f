"""The certificates and keys of a deployment: an authority, the server's certificate, a key pair a SuperNode.

The same server certificate serves Flower's SuperLink and the stream of activations. Keys are elliptic
(P-256 for TLS, P-384 for SuperNodes, which is what Flower takes), since a handshake with them is cheap on
a small device.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedsplit.deploy.files import PRIVATE, PUBLIC, create, sync
from fedsplit.types import FedsplitError

CA_DAYS = 3650
MOST_DAYS = 3650
MOST_NODES = 100_000
# A device without a clock of its own may be a little behind when it first connects.
BACKDATED = datetime.timedelta(days=1)
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*")

Key = ec.EllipticCurvePrivateKey
Made = dict[str, tuple[bytes, int]]  # a file's content and mode, by its name


def certify(folder: Path, hosts: Sequence[str], nodes: int, days: int = 365) -> list[Path]:
    """Make what `folder` lacks of: ca.crt, ca.key, server.pem, server.key, node-0 to node-(nodes - 1) and their .pub.

    Nothing is overwritten. Files appear complete, a new folder with all of them at once. The server's certificate
    is valid for `hosts` (names or addresses) and `days`; where it is there already, `hosts` may be empty.

    Returns:
        The files that were made, in the order of their names above.

    Raises:
        FedsplitError: a host that is neither name nor address, files that do not belong together, or a folder
            that cannot be written.
    """
    if not 0 <= nodes <= MOST_NODES:
        raise FedsplitError(f"--nodes must be between 0 and {MOST_NODES}, got {nodes}.")
    if not 1 <= days <= MOST_DAYS:
        raise FedsplitError(f"--days must be between 1 and {MOST_DAYS}, got {days}.")
    names = list(dict.fromkeys(_general_name(host) for host in hosts))
    try:
        if folder.is_dir() and any(folder.iterdir()):
            return _complete(folder, names, nodes, days)
        return _begin(folder, names, nodes, days)
    except OSError as error:
        raise FedsplitError(f"Cannot write {error.filename or folder}: {error.strerror}.") from None


def check_host(folder: Path, host: str) -> None:
    """Refuse a `host` that the server's certificate in `folder` is not valid for; without a certificate do nothing.

    Raises:
        FedsplitError: a host that it does not name, or a damaged certificate.
    """
    asked, file = _general_name(host), folder / "server.pem"
    if not file.is_file():
        return
    held = _names_of(file)
    whole = [name.value for name in held if isinstance(name, x509.DNSName) and name.value.startswith("*.")]
    if asked not in held and f"*.{host.partition('.')[2]}" not in whole:
        valid = ", ".join(str(name.value) for name in held)
        raise FedsplitError(f"{file} is not valid for {host} but for {valid}: a device would refuse the server.")


def _begin(folder: Path, names: Sequence[x509.GeneralName], nodes: int, days: int) -> list[Path]:
    made = _authority()
    ca, key = _read_authority(made["ca.crt"][0], made["ca.key"][0], folder)
    made |= _server(ca, key, names, days)
    for number in range(nodes):
        made |= _node(number)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))  # mode 0700
    try:
        _write(scratch, made)
        os.rename(scratch, folder)  # onto nothing, or onto an empty folder
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return [folder / name for name in made]


def _complete(folder: Path, names: Sequence[x509.GeneralName], nodes: int, days: int) -> list[Path]:
    missing = [name for name in ("ca.crt", "ca.key") if not (folder / name).is_file()]
    if missing:
        raise FedsplitError(f"{folder} holds files but no {missing[0]}; give a new folder, or the one of an authority.")
    ca, key = _read_authority((folder / "ca.crt").read_bytes(), (folder / "ca.key").read_bytes(), folder)
    made: Made = {}
    there = [(folder / name).is_file() for name in ("server.pem", "server.key")]
    if all(there):
        _check_server(folder, ca, names)
    elif any(there):
        raise FedsplitError(f"{folder} holds only one of server.pem and server.key; remove it to have both made anew.")
    else:
        made |= _server(ca, key, names, days)
    for number in range(nodes):
        private, public = folder / f"node-{number}", folder / f"node-{number}.pub"
        if not private.exists() and public.exists():
            raise FedsplitError(
                f"{public} is there, but its private key {private.name} is not; remove it for a new pair."
            )
        if not private.exists():
            made |= _node(number)
        elif not public.exists():  # stopped between the two
            made[public.name] = (_public(_load_node(private)), PUBLIC)
    _write(folder, made)
    return [folder / name for name in made]


def _write(folder: Path, made: Mapping[str, tuple[bytes, int]]) -> None:
    for name, (content, mode) in made.items():
        create(folder / name, content, mode)


def _authority() -> Made:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedsplit-ca")])
    built = (
        _dated(CA_DAYS)
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return {"ca.crt": (_pem(built.sign(key, hashes.SHA256())), PUBLIC), "ca.key": (_private(key), PRIVATE)}


def _server(ca: x509.Certificate, ca_key: Key, names: Sequence[x509.GeneralName], days: int) -> Made:
    if not names:
        raise FedsplitError("The server's certificate needs at least one name or address: give --host NAME[,NAME|IP].")
    key = ec.generate_private_key(ec.SECP256R1())
    first = str(names[0].value)[:64]  # the longest common name that X.509 allows
    built = (
        _dated(days, ca.not_valid_after_utc)
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, first)]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
    )
    return {"server.pem": (_pem(built.sign(ca_key, hashes.SHA256())), PUBLIC), "server.key": (_private(key), PRIVATE)}


def _node(number: int) -> Made:
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    return {f"node-{number}": (private, PRIVATE), f"node-{number}.pub": (_public(key), PUBLIC)}


def _public(key: Key) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH) + b"\n"


def _load_node(file: Path) -> Key:
    try:
        key = serialization.load_ssh_private_key(file.read_bytes(), password=None)
    except ValueError:
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise FedsplitError(f"{file} is no elliptic key in OpenSSH's format; remove it for a new pair.")
    return key


def _read_authority(certificate: bytes, private: bytes, folder: Path) -> tuple[x509.Certificate, Key]:
    try:
        ca = x509.load_pem_x509_certificate(certificate)
        key = serialization.load_pem_private_key(private, password=None)
    except (ValueError, TypeError):
        raise FedsplitError(f"ca.crt or ca.key in {folder} is damaged; bring it back, or give a new folder.") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != ca.public_key():
        raise FedsplitError(f"ca.crt and ca.key in {folder} are no elliptic pair; bring back the ones made together.")
    return ca, key


def _check_server(folder: Path, ca: x509.Certificate, names: Sequence[x509.GeneralName]) -> None:
    """Refuse a certificate of another authority, of the past, or of fewer hosts than asked for."""
    again = "remove server.pem and server.key to have them made anew"
    try:
        server = x509.load_pem_x509_certificate((folder / "server.pem").read_bytes())
        server.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        raise FedsplitError(f"{folder / 'server.pem'} is not of this authority; {again}.") from None
    held = _names_of(folder / "server.pem")
    if server.not_valid_after_utc < datetime.datetime.now(datetime.UTC):
        raise FedsplitError(f"{folder / 'server.pem'} ended {server.not_valid_after_utc:%Y-%m-%d}; {again}.")
    lacking = [str(name.value) for name in names if name not in held]
    if lacking:
        raise FedsplitError(f"{folder / 'server.pem'} is not valid for {lacking[0]}; {again}.")


def _names_of(file: Path) -> list[x509.GeneralName]:
    """The hosts that a certificate is valid for."""
    try:
        server = x509.load_pem_x509_certificate(file.read_bytes())
        return list(server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except (ValueError, x509.ExtensionNotFound):
        raise FedsplitError(f"{file} is damaged, or names no host; remove it and server.key for new ones.") from None


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    # What looks like an address and is none would be a name that no resolver knows.
    if len(host) > 253 or not _HOST.fullmatch(host) or re.fullmatch(r"[0-9.]+", host):
        raise FedsplitError(f"--host '{host}' is no host name or address; write e.g. lab.example.org,10.0.0.5.")
    return x509.DNSName(host.lower())


def _usage(sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _dated(days: int, latest: datetime.datetime | None = None) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    end = now + datetime.timedelta(days=days)
    end = min(end, latest) if latest else end
    builder = x509.CertificateBuilder().serial_number(x509.random_serial_number())
    return builder.not_valid_before(now - BACKDATED).not_valid_after(end)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _private(key: Key) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
