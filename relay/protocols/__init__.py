"""The protocols that relay speaks, one folder each, and how the folders are found.

A protocol is a package in this folder whose `routes` module has a `DOOR`
(`relay.doorkit.contract.FrontDoor`). Nothing outside the folder names it.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from relay.doorkit.contract import Replacing

if TYPE_CHECKING:
    from relay.config.imported import Foreign
    from relay.config.settings import Section
    from relay.doorkit.contract import FrontDoor


def find_doors() -> dict[str, FrontDoor]:
    """Every door by name."""
    doors: dict[str, FrontDoor] = {}
    for module in pkgutil.iter_modules(__path__):
        door = importlib.import_module(f"relay.protocols.{module.name}.routes").DOOR
        doors[door.name] = door
    return doors


def door_settings() -> dict[str, type[Section]]:
    """Every door's section of the configuration: `protocol:<name>`."""
    return {f"protocol:{name}": door.settings for name, door in find_doors().items()}


def find_foreign() -> list[Foreign]:
    """How doors read other servers' configurations, in the order of the doors' names."""
    doors = sorted(find_doors().items())
    return [door.foreign for _, door in doors if isinstance(door, Replacing)]
