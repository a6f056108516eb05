"""What runs in processes of its own: each framework's training.

This file imports the standard library only: the interpreter of a peer may lack JAX.
"""

import importlib
import json
import sys


def serve() -> None:
    """Calls a function for `benchmarks.launch.ask`; the last line on stdout is its answer in JSON.

    The command line holds `module:function` and its keyword arguments in JSON.
    """
    name, arguments = sys.argv[1:]
    module, _, function = name.partition(":")
    answer = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    print(json.dumps(answer), flush=True)
