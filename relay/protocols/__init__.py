"""The protocols that relay serves, one folder each, and how the folders are found.

Nothing outside a folder names it. A folder has up to three modules that are looked for by name:

- `settings` has `SETTINGS`, the class of the section [protocol:<folder>].
- `imported`, if there is one, has `IMPORT`: it reads the configuration of the server that the
  protocol replaces (`relay.config.imported.ConfigurationImport`). The command line needs it for
  its options, so it must be quick to import.
- `routes` has `DOOR` (`relay.doorkit.contract.FrontDoor`). It is imported only if the protocol is
  served.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from relay.config.imported import ConfigurationImport
    from relay.config.settings import Section
    from relay.doorkit.contract import FrontDoor


def protocol_names() -> list[str]:
    """Return the names of all protocols, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def door_settings() -> dict[str, type[Section]]:
    """Return the class of each protocol's section by the section's name, `protocol:<name>`."""
    return {
        f"protocol:{name}": importlib.import_module(f"{__name__}.{name}.settings").SETTINGS
        for name in protocol_names()
    }


def find_imports() -> list[ConfigurationImport]:
    """Return the readers of other servers' configurations, sorted by protocol."""
    modules = [f"{__name__}.{name}.imported" for name in protocol_names()]
    return [importlib.import_module(module).IMPORT for module in modules if find_spec(module)]


def load_door(name: str) -> FrontDoor:
    """Import the code that serves the protocol."""
    door: FrontDoor = importlib.import_module(f"{__name__}.{name}.routes").DOOR
    return door
