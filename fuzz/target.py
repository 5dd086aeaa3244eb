"""
Fuzz one parser of ``tests/parsers/table.py``, or run it once on the files that are named.

    python fuzz/target.py NAME [FILE | DIRECTORY | -libfuzzer_option ...]
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["OTEL_CORRELATION_STRICT"] = "1"  # What the never-raise boundary would hide is a finding.

with atheris.instrument_imports(include=["otel_correlation"]):
    from tests.parsers.table import TABLE


def main() -> None:
    """
    Hand over to libFuzzer, which never returns.
    """
    name = sys.argv[1]
    parser = next(entry for entry in TABLE if entry.name == name)
    call = parser.check or parser.call
    # Warnings go nowhere: they are counted and bounded elsewhere, and would slow down every input.
    logging.getLogger().addHandler(logging.NullHandler())
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - some entries print what a person would read

    def test_one_input(data: bytes) -> None:
        call(data.decode("utf-8", "surrogateescape") if parser.wide else data.decode("latin-1"))
        if parser.prepare is not None:
            parser.prepare()

    atheris.Setup([sys.argv[0], *sys.argv[2:]], test_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
