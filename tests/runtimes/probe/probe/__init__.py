"""A Flower app that echoes what it gets."""
