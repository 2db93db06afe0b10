"""What the commands for training and evaluation have in common."""

from __future__ import annotations

import argparse


def documented_parser(command: str, documentation: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the documentation of a module: the first paragraph before the options, the rest after."""
    description, _, epilog = (documentation or "").partition("\n\n")
    return argparse.ArgumentParser(
        command, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
