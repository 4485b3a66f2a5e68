"""The command line of a table of families: which rows to measure."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import transformers

Row = TypeVar("Row")


def chosen(
    rows: Mapping[str, Row], known: Callable[[], Mapping[str, object]], description: str | None
) -> Iterator[tuple[str, Row]]:
    """The rows that the command line names, all of them where it names none; libraries' warnings are silenced.

    known: the rows that have a record by now.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="parts of the names of the rows to measure")
    parser.add_argument("--missing", action="store_true", help="only rows without a record")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    for name, row in rows.items():
        if options.rows and not any(part.lower() in name.lower() for part in options.rows):
            continue
        if not (options.missing and name in known()):
            yield name, row
