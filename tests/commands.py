"""The commands of the package, as the tests find them: a new one is tested as soon as it is there."""

import importlib

from processes import ROOT

COMMANDS = sorted(".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "natsjax").rglob("__main__.py"))


def module_of(command):
    """What ``python -m`` runs."""
    return importlib.import_module(f"{command}.__main__" if command in COMMANDS else command)
