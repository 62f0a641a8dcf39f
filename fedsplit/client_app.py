"""The Flower ClientApp: one client's round, out of a message and into its reply."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedsplit.client import client_round
from fedsplit.runtime import faults
from fedsplit.runtime.flower_ray import ACTION, read_job, write_update
from fedsplit.world import world

app = ClientApp()


@app.train(ACTION)
def train(message: Message, context: Context) -> Message:
    """Do the job that the message holds; everything that the client needs is in it."""
    config, job = read_job(message.content)
    injected = faults.parse(config.engine.faults)
    faults.before(injected, job, disposable=True)
    update = client_round(world(config), job)
    return Message(write_update(faults.after(injected, job, update)), reply_to=message)
