"""The command line: thin commands over the package, and the one boundary for errors.

A module has the commands of one subject; importing them here hangs them on `cli`.
"""

import atexit
import errno
import gc
import os
import sys
from typing import Final

import click

from bake.commands import (  # noqa: F401
    bakes,
    evaluations,
    fits,
    folders,
    ggufs,
    searches,
    talks,
)
from bake.commands.root import cli
from bake.errors import BakeError, RecipeError

__all__ = ["cli", "main"]

# What a system says of a path, wherever one is touched first.
_SYSTEM: Final = (errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG, errno.EPERM, errno.EROFS)


def main() -> None:
    """Run the command line; every expected error becomes one message and its exit code."""
    # Threads that spin while they wait starve each other on shared cores; this must be
    # set before torch or llama.cpp start theirs.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # The end of the process is the end of all that is left; looking through it for cycles would
    # take a third as long as importing torch did.
    atexit.register(gc.freeze)
    try:
        status = cli.main(standalone_mode=False)
    except BakeError as error:
        # A recipe's mistakes are lines of `file:line:column: ...`, as editors read them.
        prefix = "" if isinstance(error, RecipeError) else "bake: "
        click.echo(f"{prefix}{error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is None or error.errno not in _SYSTEM:
            raise
        click.echo(f"bake: {error.filename}: {error.strerror}; give another path", err=True)
        sys.exit(BakeError.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("bake: interrupted", err=True)
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)
