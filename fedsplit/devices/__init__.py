"""The fleet: what a device's round costs, and the virtual clock."""
