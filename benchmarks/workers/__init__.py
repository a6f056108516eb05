"""What runs in processes of its own: each framework's training.

This file imports the standard library only: the interpreter of a peer may lack JAX.
"""

import importlib
import json
import sys
from collections.abc import Callable
from typing import Any


def load(name: str) -> Callable[..., Any]:
    """The function `module:function`."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def serve() -> None:
    """Calls the function on the command line with keyword arguments in JSON; prints its answer."""
    name, arguments = sys.argv[1:]
    print(json.dumps(load(name)(**json.loads(arguments))), flush=True)
