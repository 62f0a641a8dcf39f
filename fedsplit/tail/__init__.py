"""The last part: last blocks if any, norm, classifier, and the loss.

The tail's network is a `Part` that classifies (`fedsplit.front.vit`); this place holds what is done
with its logits, and without the server. A *phase* of the client's own trains front and tail, body left
out, before the split steps: `epochs`, `rate` (of the round's learning rate) and
`loss(logits, labels) -> scalar`.
"""

from __future__ import annotations

from typing import Any

from fedsplit.tail.self_update import SelfUpdate

PHASES: dict[str, type[Any]] = {"self-update": SelfUpdate}
