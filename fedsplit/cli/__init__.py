"""The `fedsplit` command."""
