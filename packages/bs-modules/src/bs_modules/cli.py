"""The `bsattn` command."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

_BEGUN = time.perf_counter()
_DELEGATED = {"show": ("bs_patterns.cli", "show"), "ring-plan": ("bs_comm.cli", "plan")}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `bsattn` and returns its exit status.

    Args:
        argv: Arguments after the program's name; `None` takes them from the process.

    Returns:
        0 when done, 1 when something failed at run time, 2 for bad usage or input, 130 or 143 when stopped by Ctrl-C or
        SIGTERM (after saving).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in _DELEGATED:
        return _delegate(arguments)
    from ._extras import MissingExtraError, require

    try:
        click = require("click")
        require("rich")
        from .lm.commands import bsattn
        from .lm.errors import InputError, Interruption, RunError
    except MissingExtraError as error:
        return _fail(error, 2)
    try:
        bsattn.main(args=arguments, prog_name="bsattn", standalone_mode=False, obj=_BEGUN)
    except (InputError, MissingExtraError) as error:
        return _fail(error, 2)
    except RunError as error:
        return _fail(error, 1)
    except Interruption as error:
        print(f"bsattn: {error}", file=sys.stderr)
        return error.status
    except click.exceptions.Exit as error:
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        print("bsattn: stopped", file=sys.stderr)
        return 130
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except BrokenPipeError:
        return 0
    except OSError as error:  # a disk that filled up, a folder that went away
        return _fail(error, 1)
    return 0


def _delegate(arguments: list[str]) -> int:
    """Hands the command over to the package that owns it."""
    import importlib

    module, command = _DELEGATED[arguments[0]]
    return importlib.import_module(module).main([command, *arguments[1:]]) or 0


def _fail(error: object, status: int) -> int:
    print(f"bsattn: error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
