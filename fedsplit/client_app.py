"""The Flower ClientApp: one client's round, out of a message and into its reply."""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsplit.client import client_round
from fedsplit.runtime import faults
from fedsplit.runtime.flower_ray import ACTION, LEAST_TIMEOUT_S, read_job, write_update
from fedsplit.world import world

app = ClientApp()


@app.train(ACTION)
def train(message: Message, context: Context) -> Message:
    """Do the job that the message holds: with a body in this process, or, on a real device, with the server's."""
    config, job = read_job(message.content)
    injected = faults.parse(config.engine.faults)
    if "stream" in message.content:
        from fedsplit.runtime import device, lines, site

        lines.show()
        device.end_after(max(config.engine.timeout_s, LEAST_TIMEOUT_S))
        faults.before(injected, job, disposable=True)
        given = device.Pass(**dict(message.content["stream"]))  # type: ignore[arg-type]
        update = device.work(config, job, given, site.Site.read(context.node_config))
    else:
        faults.before(injected, job, disposable=True)
        update = client_round(world(config), job)
    return Message(write_update(faults.after(injected, job, update)), reply_to=message)


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Say which device this is."""
    from fedsplit.runtime.site import Site

    said = Site.read(context.node_config).introduction()
    return Message(RecordDict({"device": ConfigRecord(said)}), reply_to=message)
