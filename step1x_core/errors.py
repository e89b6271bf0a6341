"""The one exception of this pack."""


class Step1XError(ValueError):
    """An error whose text is meant for the person at the graph."""
