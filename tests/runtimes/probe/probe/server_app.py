"""A server that prints every result as a line `RESULT round client ok|reason`."""

import os
from types import SimpleNamespace
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from safetensors.torch import save

from fedsplit.runtime.flower_ray import FlowerRunner, wait_for_nodes
from fedsplit.runtime.ray_pool import mend_actor_pool
from fedsplit.types import FedsplitError, Job, Update

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    values = context.run_config
    nodes = wait_for_nodes(grid)
    print("NODES", len(nodes), "CWD", os.getcwd(), flush=True)
    config: Any = SimpleNamespace(values=dict(values), engine=SimpleNamespace(timeout_s=0.0))
    runner = FlowerRunner(grid, config, nodes, actors=mend_actor_pool(), timeout_s=float(values["timeout-s"]))
    down = save({"a": torch.zeros(4), "b": torch.ones(1000)})
    for number in range(1, int(values["rounds"]) + 1):
        jobs = [Job(client, number, 1, down, b"state") for client in range(int(values["clients"]))]
        for result in runner.run(jobs):
            ok = isinstance(result, Update) and result.up == down and result.server == b"state"
            print("RESULT", number, result.client, "ok" if ok else getattr(result, "reason", "changed"), flush=True)
    if values["fail"]:
        raise FedsplitError("the probe was told to fail")
