"""
``otel-correlation log-config``: what a server's ``--log-config`` needs so that each of its lines shows its ids.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from otel_correlation.cli import OK, CommandError
from otel_correlation.formats import log_config
from otel_correlation.guard import ConfigError

if TYPE_CHECKING:
    import argparse


def run(arguments: argparse.Namespace) -> int:
    """
    Print the configuration as JSON.
    """
    try:
        print(json.dumps(log_config(arguments.lines, arguments.level.upper()), indent=2))
    except ConfigError as error:
        raise CommandError(str(error)) from None
    return OK
