"""`bake` in which the second process fails while batches are measured, as $DIES says."""

import os
import signal

import bake.fit.run
from bake.commands import main
from bake.errors import FitError

collect = bake.fit.run.collect


def failing(*arguments: object, **options: object) -> object:
    """The pass over a role's conversations, or the end of the process."""
    if os.environ["RANK"] == "1":
        if os.environ["DIES"] == "raise":
            raise FitError("this process has bad luck")
        if os.environ["DIES"] == "exit":
            os._exit(5)
        os.kill(os.getpid(), signal.SIGKILL)
    return collect(*arguments, **options)  # type: ignore[arg-type]


if __name__ == "__main__":
    bake.fit.run.collect = failing  # type: ignore[assignment]
    main()
