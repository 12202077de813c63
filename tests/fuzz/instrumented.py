"""A target with its code instrumented for coverage: `python -m tests.fuzz.instrumented TARGET [libFuzzer's options]`.

`python -m tests.fuzz` runs it in a process of its own, since libFuzzer ends the process that it runs in.
"""

import sys

import atheris

with atheris.instrument_imports(include=["gateway", "tomllib"], enable_loader_override=False):
    from tests.fuzz.targets import TARGETS

if __name__ == "__main__":
    _, name, *options = sys.argv
    # When it merges, libFuzzer starts itself anew by its first argument.
    atheris.Setup([f"{sys.executable} -m tests.fuzz.instrumented {name}", *options], TARGETS[name])
    atheris.Fuzz()
