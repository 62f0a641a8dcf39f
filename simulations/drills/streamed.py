"""Devices of this process at a body that is served: over TLS, with tickets, halves and folders of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fedsplit import experiment
from fedsplit.config import Config, resolve
from fedsplit.deploy.certificates import certify
from fedsplit.runtime import device, half
from fedsplit.runtime.journal import Journal
from fedsplit.runtime.reception import Reception, served
from fedsplit.runtime.site import Site
from fedsplit.types import Failure, Job, Scalar, Update

Work = Callable[[Config, Job, device.Pass, Site], Update]


@dataclass
class Devices:
    """A runner: one device after another, as Flower's messages would have them work.

    `works` stand in for the honest `device.work` of a (client, round). With `own_data` each reads its pictures
    from a folder of its own, and else takes its shard of the run's source.
    """

    config: Config
    reception: Reception
    folder: Path
    works: dict[tuple[int, int], Work] = field(default_factory=dict)
    own_data: bool = False

    def site(self, client: int) -> Site:
        """The device that a client is."""
        count = self.config.devices.count
        roots, part = self.folder / "keys" / "ca.crt", self.folder / "half.safetensors"
        data = self.folder / f"data-{client}" if self.own_data else None
        return Site(client, count, self.folder / f"device-{client}", part, data, roots, "", False)

    def run(self, jobs: Sequence[Job]) -> Iterator[Update | Failure]:
        """One result per job, in order."""
        for job in jobs:
            site = self.site(job.client)
            public = site.introduction()["public-key"]
            sent, given = self.reception.invite(job, job.client, public, 60.0)
            result: Update | Failure
            try:
                work = self.works.get((job.client, job.round), device.work)
                result = work(self.config, sent, given, site)
            except Exception as error:
                result = Failure(job.client, f"{type(error).__name__}: {error}")
            yield self.reception.settle(job.client, result)


@contextmanager
def devices(
    values: dict[str, Scalar], folder: Path, journal: Journal | None = None, **link: Scalar
) -> Iterator[Devices]:
    """The fleet of a config, with certificates and halves in `folder`; the run folder is `folder/run`.

    `journal` is told of the sessions.
    """
    keys = folder / "keys"
    if not keys.exists():
        certify(keys, ["localhost", "127.0.0.1"], 0)
    local: dict[str, Scalar] = {"link.listen": "127.0.0.1:0", "link.certificate": str(keys / "server.pem")}
    local |= {"link.key": str(keys / "server.key"), "out": str(folder / "run"), "link.patience-s": 5.0}
    local |= {f"link.{name.replace('_', '-')}": value for name, value in link.items()}
    config = resolve({**values, **local})
    half.save(config, folder / "half.safetensors")
    journal = journal or Journal()
    with served(config, journal.session) as (server, address):
        journal.follow(server.sessions)
        yield Devices(config, Reception(config, server, address), folder)


def streamed(values: dict[str, Scalar], folder: Path) -> Path:
    """A run of such devices; its folder."""
    with devices(values, folder) as fleet:
        return experiment.run(fleet.config, fleet)
