"""A client that sends back what it got."""

import time

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedsplit.runtime import faults
from fedsplit.runtime.flower_ray import ACTION, plain_fields, write_update
from fedsplit.types import Job, Report, Update

app = ClientApp()


@app.train(ACTION)
def train(message: Message, context: Context) -> Message:
    """Wait a little, then echo."""
    job = Job(**plain_fields(Job, message.content["job"]))
    injected = faults.parse(str(context.run_config["engine.faults"]))
    faults.before(injected, job, disposable=True)
    time.sleep(float(context.run_config["seconds"]))
    update = Update(job.client, 10, job.down, job.server, Report(steps=1, bytes={"parameters-up": len(job.down)}))
    return Message(write_update(faults.after(injected, job, update)), reply_to=message)
