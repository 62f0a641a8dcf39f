"""What a bundle is made of, checked before the first wheel: pinned versions, the server's address, a device's key."""

from __future__ import annotations

import string
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from fedsplit.deploy import own_wheel
from fedsplit.deploy.manifest import Request
from fedsplit.deploy.node import node_config
from fedsplit.types import FedsplitError

_IN_HOSTS = set(string.ascii_letters + string.digits + ".-:[]")


def pins(constraints: Path | None, more: Mapping[str, str]) -> dict[str, str]:
    """Exact versions by canonical name: of a constraints file, else the checkout's, else those installed here.

    Raises:
        FedsplitError: the file cannot be read, or a line pins no version.
    """
    file = constraints or own_wheel.checkout_file("constraints.txt")
    found: dict[str, str] = {}
    if file is None:
        found = {canonicalize_name(one.name): one.version.partition("+")[0] for one in metadata.distributions()}
        found.pop("fedsplit", None)
    else:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            raise FedsplitError(
                f"Cannot read the constraints in {file}; give another file with --constraints."
            ) from None
        for text in (line.partition("#")[0].strip() for line in lines):
            if text:
                name, version = _pin(text, file)
                found[name] = version
    return {**found, **{canonicalize_name(name): version for name, version in more.items()}}


def _pin(text: str, file: Path) -> tuple[str, str]:
    try:
        requirement = Requirement(text)
        (exact,) = requirement.specifier
    except (InvalidRequirement, ValueError):
        raise FedsplitError(f"{file}: '{text}' does not pin one version; write NAME==VERSION.") from None
    if exact.operator != "==":
        raise FedsplitError(f"{file}: '{text}' does not pin one version; write NAME==VERSION.")
    return canonicalize_name(requirement.name), exact.version


def keys_of(request: Request) -> tuple[bytes, bytes] | None:
    """The authority's certificate and the private key of the device; None for a bundle without a device.

    Raises:
        FedsplitError: an address that is none, a device without a key, or one that would not trust the server.
    """
    host, _, port = request.superlink.rpartition(":")
    if not host or not set(host) <= _IN_HOSTS or not port.isdigit() or not 0 < int(port) < 65536:
        raise FedsplitError(f"--superlink '{request.superlink}' is not HOST:PORT, e.g. lab.example.org:9092.")
    if (request.node is None) != (request.certificates is None):
        raise FedsplitError("--node and --certificates go together: a device's number, and the folder of its key.")
    if request.node is None or request.certificates is None:
        return None
    if not 0 <= request.node < request.nodes:
        raise FedsplitError(f"--node must be from 0 to {request.nodes - 1} (devices.count), got {request.node}.")
    node_config(request.node, request.nodes, request.data)
    from fedsplit.deploy.certificates import check_host

    files = [request.certificates / "ca.crt", request.certificates / f"node-{request.node}"]
    for file in files:
        if not file.is_file():
            make = f"fedsplit certify --out {request.certificates} --nodes {request.node + 1}"
            raise FedsplitError(f"There is no {file}: make it with {make}.")
    check_host(request.certificates, host.strip("[]"))
    return files[0].read_bytes(), files[1].read_bytes()
