"""
Puts ``otel_correlation.pth`` beside the package, in wheels and in editable installations (ADR 006).
"""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class PthHook(BuildHookInterface[Any]):
    """
    Adds one file to the root of site-packages.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """
        Include the file.
        """
        key = "force_include_editable" if version == "editable" else "force_include"
        build_data[key]["otel_correlation.pth"] = "otel_correlation.pth"
