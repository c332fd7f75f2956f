"""Modules of commands that may be called from Python."""

import importlib
import sys
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A command's module that may be called: `minigrpo.train(...)` is `minigrpo.api.train(...)`."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call the function of the module's name in minigrpo.api."""
        own = self.__name__.rpartition(".")[2]
        return getattr(importlib.import_module("minigrpo.api"), own)(*arguments, **named)


def make_callable(name: str) -> None:
    """Let the module `name`, which is being imported, be called."""
    if name != "__main__":
        sys.modules[name].__class__ = CallableModule
