"""Names of SSDD models, for the registry."""


def register() -> None:
    """Entry point of the group `tokbench.plugins`."""
