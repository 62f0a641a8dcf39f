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
from fedsplit.runs import RunFolder
from fedsplit.runtime.flower_ray import FlowerRunner, device_count, wait_for_nodes
from fedsplit.runtime.ray_pool import is_simulation, mend_actor_pool

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the configured experiment; an exception fails the Flower run."""
    _show_log()
    actors = mend_actor_pool() if is_simulation(grid) else None
    config = _under_home(resolve(context.run_config))
    nodes = wait_for_nodes(grid)
    if config.resume:
        # The folder says what the run is; the rest of the run config does not count.
        config = RunFolder.open(config.resume)[1].replace(resume=config.resume)
    else:
        config = config.replace(devices__count=device_count(config.devices.count, len(nodes)))
    runner = FlowerRunner(grid, config, nodes, actors=actors, poll_s=0.01 if actors else 0.1)
    experiment.run(config, runner, root=Path.home() / "runs", progress=Lines())


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
