"""Quantise a checkpoint folder.

    python -m ming_core.quantize Ming-UniVision-16B-A3B Ming-UniVision-16B-A3B-int4 --format int4

The new folder loads like any other one, faster and into less memory, and has its original's fingerprint: conversations
and features of either go on with the other. Making it takes as much memory as the quantised model, and some 3 GB more.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch

from ..ming_core.checkpoint import load_univision, save_univision, tokenizer_files
from ..ming_core.files import write_whole_folder
from ..ming_core.quantization import FORMATS

log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    about, _, more = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m ming_core.quantize",
        description=about,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="folder of a Ming-UniVision checkpoint")
    parser.add_argument("target", type=Path, help="folder to make; it must not be there yet")
    parser.add_argument("--format", choices=FORMATS, default="int4", help="default: %(default)s")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.target.exists():
        log.error("%s is there already: name a new folder", options.target)
        return 1
    try:
        log.info("reading %s", options.source)
        model = load_univision(options.source, dtype=torch.bfloat16, quantization=options.format)
        log.info("writing %s", options.target)
        tokenizer = tokenizer_files(options.source)
        write_whole_folder(lambda to: save_univision(model, to, tokenizer, dtype=torch.bfloat16), options.target)
    except ValueError as error:  # CheckpointError and FileError among them
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
