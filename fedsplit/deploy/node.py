"""What runs on a device: the script that installs a bundle, and the systemd unit of its SuperNode."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from fedsplit.deploy.wheels import Target
from fedsplit.types import FedsplitError

PREFIX = "/opt/fedsplit"
STATE = "/var/lib/fedsplit"
CACHE = "/var/cache/fedsplit"
UNIT = "fedsplit-node.service"
NodeConfig = Mapping[str, int | str]


def node_config(node: int, nodes: int, data: str = "") -> dict[str, int | str]:
    """The keys that a SuperNode gives its ClientApp, for an installation under `PREFIX`.

    `data` is the device's own folder of train.parquet; without it the device takes its part of the config's data.

    Raises:
        FedsplitError: `data` is no absolute path, or has characters that neither Flower nor systemd quotes.
    """
    if data and (not data.startswith("/") or not data.isprintable() or set("'\"\\%$") & set(data)):
        raise FedsplitError(f"--data '{data}' must be an absolute path on the device, without quotes, %, $ and \\.")
    keys: dict[str, int | str] = {
        "partition-id": node,
        "num-partitions": nodes,
        "state": f"{STATE}/state",
        "half": f"{PREFIX}/half.safetensors",
        "root-certificates": f"{PREFIX}/ca.crt",
        "cache": CACHE,
    }
    return {**keys, "data": data} if data else keys


def unit(superlink: str, keys: NodeConfig) -> str:
    """The systemd unit that keeps the SuperNode of a device running."""
    quoted = " ".join(f"{key}={value}" if isinstance(value, int) else f"{key}='{value}'" for key, value in keys.items())
    data = f"ReadOnlyPaths=-{keys['data']}\n" if keys.get("data") else ""
    number = keys["partition-id"]
    return _UNIT.format(superlink=superlink, keys=quoted, data=data, prefix=PREFIX, state=STATE, number=number)


def install_script(target: Target, requirement: str, superlink: str) -> str:
    """The shell script that installs `requirement` from the wheels beside it and checks the device."""
    major, minor = target.python.split(".")
    return (
        _INSTALL.replace("@MINOR@", minor)
        .replace("@MAJOR@", major)
        .replace("@MACHINE@", target.machine)
        .replace("@GLIBC@", str(target.glibc))
        .replace("@REQUIREMENT@", shlex.quote(requirement))
        .replace("@SUPERLINK@", shlex.quote(superlink))
        .replace("@PREFIX@", PREFIX)
        .replace("@STATE@", STATE)
        .replace("@UNIT@", UNIT)
    )


_UNIT = """\
# A device of a fedsplit federation. After a change: systemctl daemon-reload; systemctl restart fedsplit-node
[Unit]
Description=fedsplit device {number}
Wants=network-online.target time-sync.target
After=network-online.target time-sync.target
# A SuperNode that comes back soon after a kill is refused for up to a minute: try again for ever.
StartLimitIntervalSec=0

[Service]
User=fedsplit
ExecStart={prefix}/venv/bin/flower-supernode --superlink {superlink} --root-certificates {prefix}/ca.crt \\
    --auth-supernode-private-key {prefix}/node.key --node-config "{keys}"
Restart=always
RestartSec=10
WorkingDirectory={state}
StateDirectory=fedsplit
StateDirectoryMode=0700
CacheDirectory=fedsplit
UMask=0077

# The SuperNode starts programs of its own environment, one for each message.
Environment=PATH={prefix}/venv/bin:/usr/bin:/bin
Environment=HOME={state} FLWR_HOME={state}/flwr PYTHONUNBUFFERED=1
Environment=FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 HF_HUB_OFFLINE=1

# Little memory: one thread team, few heaps, and free memory goes back early.
Environment=OMP_NUM_THREADS=1 MALLOC_ARENA_MAX=2 MALLOC_TRIM_THRESHOLD_=131072
# The first that the kernel ends when memory is short; what the device keeps is on its disk.
OOMScoreAdjust=500
#MemoryMax=1500M

NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
# A Jetson that trains on its GPU needs /dev: set this to no there.
PrivateDevices=yes
ProtectClock=yes
ProtectHostname=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
{data}
[Install]
WantedBy=multi-user.target
"""

_INSTALL = """\
#!/bin/sh
# Installs this bundle; needs no network.
#   sudo ./install.sh [--python PROGRAM]                         under @PREFIX@, with a systemd unit
#   ./install.sh --no-service --prefix DIR [--python PROGRAM]    into DIR alone, without root
set -eu
umask 022  # another user runs what root installs
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
prefix=@PREFIX@
python=python@MAJOR@.@MINOR@
service=yes
fail() { echo "install.sh: $*" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case $1 in
    --no-service) service=no; shift ;;
    --prefix) [ $# -gt 1 ] || fail "--prefix needs a folder."; prefix=$2; shift 2 ;;
    --python) [ $# -gt 1 ] || fail "--python needs a program."; python=$2; shift 2 ;;
    *) fail "unknown option $1; there are --prefix DIR, --python PROGRAM and --no-service." ;;
  esac
done
case $prefix in /*) ;; *) prefix=$(pwd)/$prefix ;; esac
case $prefix in *[!A-Za-z0-9/._-]*) fail "--prefix must be of letters, digits and / . _ - alone." ;; esac
[ "$service" = no ] || [ "$(id -u)" = 0 ] || fail "run it with sudo, or with --no-service --prefix DIR."
command -v "$python" >/dev/null ||
  fail "no $python here; the wheels are for Python @MAJOR@.@MINOR@: install it, or name it with --python."

echo "[1/4] checking the bundle"
"$python" - "$here" <<'CHECK' || exit 2
import hashlib, json, os, platform, sys
def fail(why):
    sys.exit(f"install.sh: {why}")
if sys.version_info[:2] != (@MAJOR@, @MINOR@):
    fail(f"the wheels are for Python @MAJOR@.@MINOR@, and {sys.executable} is {platform.python_version()}.")
if platform.machine() != "@MACHINE@":
    fail(f"the wheels are for @MACHINE@, and this machine is {platform.machine()}.")
name, version = platform.libc_ver()
if name != "glibc" or [int(part) for part in version.split(".")[:2]] < [2, @GLIBC@]:
    fail(f"the wheels need glibc 2.@GLIBC@, and this system has {name or 'another C library'} {version}.")
with open(os.path.join(sys.argv[1], "bundle.json"), encoding="utf-8") as file:
    files = json.load(file)["files"]
for name, entry in files.items():
    digest = hashlib.sha256()
    try:
        with open(os.path.join(sys.argv[1], name), "rb") as file:
            for piece in iter(lambda: file.read(1 << 20), b""):
                digest.update(piece)
    except OSError as error:
        fail(f"{name} cannot be read ({error.strerror}); copy the bundle again.")
    if digest.hexdigest() != entry["sha256"]:
        fail(f"{name} is not as it was sent; copy the bundle again.")
CHECK

echo "[2/4] installing under $prefix (minutes on a small device)"
mkdir -p "$prefix"
"$python" -m venv --clear --without-pip "$prefix/venv"
set -- "$here"/wheels/pip-*.whl
# Neither variables nor files of this system may name other places for wheels.
PIP_CONFIG_FILE=/dev/null "$prefix/venv/bin/python" "$1/pip" --isolated install --quiet --no-cache-dir --no-index \\
  --disable-pip-version-check --root-user-action=ignore --find-links "$here/wheels" pip @REQUIREMENT@

echo "[3/4] config, weights and keys"
state=$prefix/state
if [ "$service" = yes ]; then
  state=@STATE@
  id fedsplit >/dev/null 2>&1 || useradd --system --home-dir "$state" --shell /usr/sbin/nologin fedsplit
fi
for file in bundle.json config.toml half.safetensors ca.crt; do
  [ ! -f "$here/$file" ] || install -m 0644 "$here/$file" "$prefix/$file"
done
[ ! -f "$here/node.key" ] || install -m 0600 "$here/node.key" "$prefix/node.key"
if [ "$service" = yes ]; then
  [ ! -f "$prefix/node.key" ] || chown fedsplit "$prefix/node.key"
  install -d -o fedsplit -m 0700 "$state"
  if [ -f "$here/@UNIT@" ]; then
    sed "s|@PREFIX@|$prefix|g" "$here/@UNIT@" > "/etc/systemd/system/@UNIT@"
    systemctl daemon-reload || echo "install.sh: systemd does not run here; the unit is in /etc/systemd/system."
  fi
fi

echo "[4/4] checking the device"
set -- --config "$prefix/config.toml" --state "$state" --superlink @SUPERLINK@
[ ! -f "$prefix/ca.crt" ] || set -- "$@" --root-certificates "$prefix/ca.crt"
if ! OMP_NUM_THREADS=1 "$prefix/venv/bin/fedsplit" doctor --device "$@"; then
  echo "install.sh: installed; mend what the table above names first." >&2
  exit 1
fi
if [ "$service" = yes ] && [ -f "$here/@UNIT@" ]; then
  echo "start it with: sudo systemctl enable --now @UNIT@"
fi
"""
