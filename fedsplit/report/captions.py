"""What the page says of its figures: title, what one sees, and where the data is; and of its sections."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Caption:
    """Of one figure; `source` are files of the run folder, two with `half` stand side by side."""

    title: str
    text: str
    source: str
    half: bool = False


BAND = (
    "Of several seeds the line is the mean over them, at the mean of their costs, and the band goes from the lowest "
    "to the highest. Only rounds count that all of them have tested."
)
SECTIONS = {
    "accuracy": "Accuracy, and what it costs",
    "trade": "What is paid for it",
    "wire": "What crossed the wire",
    "time": "Who trained when",
    "body": "What of the model ran",
    "control": "What controllers chose",
    "data": "Who holds what",
    "fairness": "Whom it serves",
    "privacy": "What an attacker makes of it",
}
CAPTIONS = {
    "accuracy-round": Caption(
        "Against rounds", "Test accuracy of the global model after each round.", "rounds.csv", half=True
    ),
    "accuracy-bytes": Caption(
        "Against bytes", "The same against what crossed the wire: all clients, both ways, after codecs.", "rounds.csv",
        half=True,
    ),
    "accuracy-virtual": Caption(
        "Against virtual seconds", "The same against the virtual clock, which sums what rounds took.", "rounds.csv",
        half=True,
    ),
    "accuracy-energy": Caption(
        "Against joules", "The same against the energy that all devices needed so far.", "rounds.csv", half=True
    ),
    "trade-flops": Caption(
        "Accuracy against client compute", "A point a group; bars are one standard deviation over its runs.",
        "summary.json", half=True,
    ),
    "trade-memory": Caption(
        "Accuracy against client memory", "A point a group: the peak of any client and round.", "summary.json",
        half=True,
    ),
    "trade-ssim": Caption(
        "Accuracy against privacy", "A point a group, of audited runs alone; left is safer.",
        "summary.json, audit/audit.json", half=True,
    ),
    "ledger": Caption(
        "Ledger by stream",
        "Bytes of all clients by stream; up is client to server. Wide grey bars, where there are codecs, are what the "
        "same tensors would take without them.", "ledger.csv",
    ),
    "gantt": Caption(
        "Clients on the virtual clock",
        "A line a client, a bar a round, dashed lines where rounds end. Phases are drawn one after another, though "
        "they alternate step by step.", "clients.csv, rounds.csv",
    ),
    "phases": Caption(
        "A round by kind of device", "Mean over clients and rounds; in brackets the number of clients.", "clients.csv"
    ),
    "plans": Caption(
        "Plan heat map",
        "Left over all rounds, right by round. In the rest of the steps a unit was skipped or, where there is a second "
        "line of maps, ran forward only.", "units.csv",
    ),
    "choices": Caption(
        "Choices",
        "What was chosen in every round, and what it brought. Groups of devices have a line each; a hollow marker was "
        "tried to learn, not because it was the best known.", "choices.csv",
    ),
    "partition": Caption(
        "Partition", "Training samples by device and class; white is none. Right: all samples of a device.",
        "partition.csv",
    ),
    "classes": Caption("Accuracy by class", "On the central test set, by the global model.", "classes.csv"),
    "personal": Caption(
        "Accuracy by client", "On samples that each client held out for itself.", "personal.csv, clients.csv"
    ),
    "audit": Caption(
        "SSIM by attack",
        "Attackers see what the server saw. The mean image is what one may guess without seeing anything.",
        "audit/audit.json",
    ),
    "reconstructions": Caption(
        "Reconstructions", "Originals above, then what each attack made of them, with its SSIM.", "audit/audit.png"
    ),
}  # fmt: skip
# Columns of the audit's table: name in audit.json, heading.
AUDITED = {
    "attack": "attack",
    "seeds": "seeds",
    "ssim": "SSIM ↓",
    "ssim_p90": "p90 ↓",
    "psnr": "PSNR (dB) ↓",
    "mse": "MSE ↑",
    "lpips": "LPIPS ↑",
    "identified": "identified ↓",
    "labels_right": "labels ↓",
    "seconds": "took (s)",
}
AUDITED_CAPTION = "Means over seeds; arrows point to what is safer for the devices. Data: audit/audit.json."
