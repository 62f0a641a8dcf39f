"""The Flower ServerApp: the whole run, with Flower's messages as its runner."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsplit import experiment
from fedsplit.cli.progress import Lines
from fedsplit.config import Config, resolve
from fedsplit.progress import Progress
from fedsplit.runs import RunFolder
from fedsplit.runtime import deployed
from fedsplit.runtime.flower_ray import FlowerRunner, device_count, wait_for_nodes
from fedsplit.runtime.journal import Journal
from fedsplit.runtime.ray_pool import is_simulation, mend_actor_pool

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the configured experiment; an exception fails the Flower run."""
    _show_log()
    config = _under_home(resolve(context.run_config))
    if config.resume:
        # The folder says what the run is; of the rest of the run config only where devices are met counts.
        stored = RunFolder.open(config.resume)[1]
        link = {name: value for name, value in config.values.items() if name.startswith("link.")}
        config = resolve({**stored.values, **link, "resume": config.resume})
    if is_simulation(grid):
        actors, nodes = mend_actor_pool(), wait_for_nodes(grid)
        config = _counted(config, device_count(config.devices.count, len(nodes)))
        _run(config, FlowerRunner(grid, config, nodes, actors=actors), Lines())
        return
    with Journal() as journal, deployed.serve(grid, config, journal) as (devices, runner):
        config = _counted(config, config.devices.count or devices)
        _run(config, runner(config), journal.around(Lines()))


def _run(config: Config, runner: FlowerRunner, progress: Progress) -> None:
    experiment.run(config, runner, root=Path.home() / "runs", progress=progress)


def _counted(config: Config, devices: int) -> Config:
    return config if config.resume else config.replace(devices__count=devices)


def _under_home(config: Config) -> Config:
    """Relative run folders below the user's home: the working directory is that of whoever started the SuperLink."""
    named = {name: path for name, path in (("out", config.out), ("resume", config.resume)) if path}
    return config.replace(**{name: str(Path.home() / Path(path).expanduser()) for name, path in named.items()})


def _show_log() -> None:
    """The lines of a run on standard output, which Flower collects."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("fedsplit")
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)
