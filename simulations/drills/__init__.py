"""What breaks, in simulations, at a served body, and among live processes: `faults.py` runs it."""
