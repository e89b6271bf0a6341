"""The only exception class of this pack."""


class Step1XError(ValueError):
    """An error whose text is written for the user of the workflow."""
