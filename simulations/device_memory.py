"""What a device's process holds in memory, at rest and in training, beside one that holds the whole model.

    python simulations/device_memory.py [--quick] [--model NAME ...] [--batch-size N ...] [--imports]

For each model and batch size two fresh processes do a device's round (cut.front=1, the classifier as tail, all of it
trained with AdamW, three steps on random pictures of its own, a server that echoes): one has the half alone, as a
device does, the other the whole model. `imports` is what the process holds once the packages are in and their first
use is over, `at rest` with model and pictures, `training` the most in its round: resident memory of /proc, in MB of
10^6 bytes; `private` of it is nobody else's. `added` is what the round's peak adds to the imports, `plan` what
`fedsplit plan` counts for it: weights, gradients, optimiser, activations, and no copy of a model on its way.
`--imports` shows what each package takes. The last line is JSON.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODELS = ("fedsplit_micro", "vit_small_patch16_224", "vit_base_patch16_224")
BATCHES = (1, 4, 16)
STEPS = 3
PACKAGES = (
    "numpy", "torch", "fedsplit", "torch.fx.experimental.symbolic_shapes", "torch._dynamo", "torchvision", "timm",
    "fedsplit.client", "grpc", "cryptography.x509", "flwr.clientapp", "fedsplit.runtime.device", "fedsplit.client_app",
    "pyarrow.parquet",
)  # fmt: skip
MB = 1e6


def status() -> dict[str, int]:
    """Bytes of this process: resident now, the most since `reset`, its share of what is shared, its own alone."""
    found: dict[str, int] = {}
    for file in ("status", "smaps_rollup"):
        for line in Path(f"/proc/self/{file}").read_text().splitlines():
            words = line.split()
            if len(words) == 3 and words[2] == "kB":
                found[words[0].rstrip(":")] = 1024 * int(words[1])
    private = found["Private_Clean"] + found["Private_Dirty"]
    return {"rss": found["VmRSS"], "peak": found["VmHWM"], "pss": found["Pss"], "private": private}


def reset() -> None:
    """Let the peak begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def config_of(model: str, batch: int) -> Any:
    """A device's config: all that a device trains in a U shape."""
    from fedsplit.config import resolve

    own = {} if model.startswith("fedsplit_") else {"data.resize": True}
    return resolve(
        {
            "model.name": model, "model.pretrained": False, "cut.front": 1, "cut.tail": 0, "rounds": 1,
            "optimizer.name": "adamw", "local.batch-size": batch, "local.max-steps": STEPS, "devices.count": 1,
            "data.partition": "iid", "data.limit": 10, "data.test-limit": 10, "data.allow-missing-classes": True, **own,
        }
    )  # fmt: skip


def prepare(model: str, batches: Sequence[int], folder: Path) -> None:
    """Write the half of the model, what `fedsplit plan` says, a job's parameters, and a device's pictures, decoded."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    from fedsplit.book import Book
    from fedsplit.data.sources import own_pictures
    from fedsplit.front.models import input_size
    from fedsplit.runtime import half
    from fedsplit.wire.frame import pack
    from fedsplit.world import ghost, world

    config = config_of(model, max(batches))
    half.save(config, folder / "half.safetensors")
    built = world(config)
    (folder / "down").write_bytes(pack({name: built.initial[name] for name in built.client}))
    size, draws = input_size(config.model), np.random.default_rng(0)
    rows: list[dict[str, bytes]] = []
    for _ in range(max(10, STEPS * max(batches))):
        blob = io.BytesIO()
        Image.fromarray(draws.integers(0, 256, (size, size, 3), np.uint8)).save(blob, "PNG")
        rows.append({"bytes": blob.getvalue()})
    labels = [number % 10 for number in range(len(rows))]
    for name, count in (("train", len(rows)), ("test", 10)):
        table = pa.table({"image": rows[:count], "label": labels[:count]})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=64)
    plans = {}
    for batch in batches:
        hollow = ghost(config_of(model, batch).replace(data__limit=len(rows)))
        plans[str(batch)] = Book(hollow).client_peak(0)
    (folder / "plan.json").write_text(json.dumps(plans))
    config = on_device(config, folder)
    world(config)  # deals, and decodes what the whole model's process reads
    own_pictures(config.data, folder, size, half.classes_of(folder / "half.safetensors"))


def on_device(config: Any, folder: Path) -> Any:
    """`config` with the pictures in `folder`."""
    return config.replace(
        data__source=str(folder), data__cache=str(folder / "cache"), data__limit=0, data__test_limit=0
    )


class Echo:
    """A server whose answer is what it was sent."""

    def __init__(self, codecs: Any) -> None:
        from fedsplit.wire.link import Link

        self.link = Link(codecs)

    def forward(self, activations: bytes, noise: int) -> bytes:
        """The activations, as if the body had changed nothing."""
        return self.link.encode("activations-down", {"x": self.link.decode("activations-up", activations)["x"]})

    def backward(self, gradients: bytes) -> bytes:
        """The gradient, likewise."""
        return self.link.encode("gradients-down", {"x": self.link.decode("gradients-up", gradients)["x"]})


def one(kind: str, model: str, batch: int, folder: Path) -> dict[str, Any]:
    """A device's round in this process, with "half" a model or the "whole" one."""
    import numpy as np

    import fedsplit.client_app
    import fedsplit.runtime.device  # noqa: F401
    from fedsplit.client import device_round
    from fedsplit.data.sources import own_pictures
    from fedsplit.front.models import input_size
    from fedsplit.runtime import half
    from fedsplit.types import Job
    from fedsplit.world import halved, world

    config = on_device(config_of(model, batch), folder)
    _first_use()
    imports = status()
    file = folder / "half.safetensors"
    if kind == "whole":
        built = world(config)
    else:
        pictures = own_pictures(config.data, folder, input_size(config.model), half.classes_of(file))
        built = halved(config, file, (pictures, [np.arange(len(pictures.train))]))
    rest = status()
    reset()
    job = Job(0, 1, 0, (folder / "down").read_bytes(), b"")
    update = device_round(built, job, Echo(built.codecs))
    training = status()
    plans = json.loads((folder / "plan.json").read_text())
    values = [*built.backbone.vit.parameters(), *built.backbone.vit.buffers()]
    return {
        "kind": kind, "model": model, "batch": batch, "steps": update.report.steps,
        "weight_bytes": sum(value.nbytes for value in values if not value.is_meta),
        "imports_bytes": imports["rss"], "rest_bytes": rest["rss"], "rest_private_bytes": rest["private"],
        "rest_pss_bytes": rest["pss"], "training_bytes": training["peak"], "after_bytes": training["rss"],
        "after_private_bytes": training["private"], "added_bytes": training["peak"] - imports["rss"],
        "counted_bytes": update.report.client_peak_bytes, "plan_bytes": plans[str(batch)],
    }  # fmt: skip


def _first_use() -> None:
    """What the packages allocate when they are first used is theirs, not the model's."""
    import torch

    torch.set_num_threads(1)
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, 4), torch.nn.Flatten(2), torch.nn.Linear(64, 8))
    optimizer = torch.optim.AdamW(layer.parameters())
    x = layer(torch.zeros(1, 3, 32, 32))
    torch.nn.functional.scaled_dot_product_attention(x, x, x).sum().backward()
    optimizer.step()


def imports() -> list[dict[str, Any]]:
    """What each package adds, in the order in which a device comes to load them."""
    rows = []
    for name in PACKAGES:
        before, count = status(), len(sys.modules)
        importlib.import_module(name)
        after = status()
        rows.append({
            "package": name, "modules": len(sys.modules) - count, "rss_bytes": after["rss"] - before["rss"],
            "private_bytes": after["private"] - before["private"],
        })  # fmt: skip
    return rows


def child(*words: str) -> Any:
    """What a fresh process of this script prints last."""
    done = subprocess.run([sys.executable, __file__, "--child", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def show(row: dict[str, Any]) -> None:
    """A line of the table."""
    figures = [row[f"{name}_bytes"] / MB for name in ("weight", "imports", "rest", "rest_private", "training")]
    figures += [row["added_bytes"] / MB, row["plan_bytes"] / MB]
    error = 100 * (row["plan_bytes"] / row["added_bytes"] - 1) if row["kind"] == "half" else None
    text = "".join(f"{figure:10.1f}" for figure in figures)
    print(
        f"{row['model']:<23}{row['batch']:>3} {row['kind']:<6}{text}" + (f"{error:+8.0f} %" if error else ""),
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fedsplit_micro in batches of 4")
    parser.add_argument("--model", action="append", help="a model; may be given again")
    parser.add_argument("--batch-size", action="append", type=int, help="samples a step; may be given again")
    parser.add_argument("--imports", action="store_true", help="also what each package takes")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.child:
        return _child(*asked.child)
    packages = child("imports") if asked.imports else []
    for row in packages:
        print(f"{row['package']:<40}{row['modules']:>6} modules{row['rss_bytes'] / MB:8.1f} MB, "
              f"{row['private_bytes'] / MB:6.1f} private")  # fmt: skip
    rows = []
    print(f"{'MB':<33}" + "".join(f"{word:>10}" for word in (
        "weights", "imports", "at rest", "private", "training", "added", "plan")) + "   error")  # fmt: skip
    batches = asked.batch_size or ((4,) if asked.quick else BATCHES)
    for model in asked.model or (MODELS[:1] if asked.quick else MODELS):
        with tempfile.TemporaryDirectory() as folder:
            child("prepare", folder, model, *map(str, batches))
            for batch in batches:
                for kind in ("half", "whole"):
                    rows.append(child("one", folder, model, kind, str(batch)))
                    show(rows[-1])
    print(json.dumps({"rows": rows, "packages": packages}))
    return 0


def _child(what: str, folder: str = "", model: str = "", *words: str) -> int:
    if what == "imports":
        print(json.dumps(imports()))
    elif what == "prepare":
        prepare(model, list(map(int, words)), Path(folder))
        print("{}")
    else:
        print(json.dumps(one(words[0], model, int(words[1]), Path(folder))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
