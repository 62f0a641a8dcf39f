"""Whether every device can hold its part: refused before a run begins, on shapes alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fedsplit.book import Book
from fedsplit.devices.profiles import Profile
from fedsplit.hollow import HollowCache
from fedsplit.types import FedsplitError
from fedsplit.world import World, ghost


def check(world: World) -> None:
    """Whether memory and storage suffice, for the devices of a fleet; the uniform ones have no limit.

    Raises:
        FedsplitError: a device cannot hold its part.
    """
    limits = [profile.memory_bytes or profile.storage_bytes for profile in world.fleet]
    if not world.config.devices.fleet or not any(limits):
        return
    hollow = world if world.device.type == "meta" else ghost(world.config)
    if hollow.cache is not None:
        cache = HollowCache(hollow.cache.front, hollow.cache.start, hollow.config, hollow.data.train, hollow.look)
        hollow = replace(hollow, cache=cache)
    book = Book(hollow)
    for client, profile in enumerate(world.fleet):
        for key, name, needed, mend in _needs(book, client):
            had = int(getattr(profile, key))
            if had and needed > had:
                raise FedsplitError(_sentence(client, profile, name, needed, had, mend))


def _needs(book: Book, client: int) -> Iterator[tuple[str, str, int, str]]:
    """Key, name and bytes of what a device must have, and what lowers them."""
    kept = book.kept_bytes(client)
    in_memory = min(kept, book.world.config.front.cache_memory_bytes)
    mend = "set a smaller local.batch-size, cut.front or model"
    yield "memory_bytes", "memory", book.client_peak(client) + in_memory, mend
    yield "storage_bytes", "storage", kept - in_memory, "set a smaller front.cache-disk-bytes"


def _sentence(client: int, profile: Profile, name: str, needed: int, had: int, mend: str) -> str:
    return (
        f"devices.fleet: device {client} ({profile.name}) needs {needed:,} bytes of {name} for its part and has "
        f"{had:,}; {mend}, or give it another profile."
    )
