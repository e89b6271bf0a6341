"""Whole numbers rounded up."""


def divided_up(a: int, b: int) -> int:
    """Divide a by b, rounding up."""
    return -(-a // b)


def multiple_up(a: int, step: int) -> int:
    """Round a up to a multiple of step."""
    return divided_up(a, step) * step


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
