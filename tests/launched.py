"""`bake` in several processes, and one in which the second of them fails, as $DIES says."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import bake.fit.run
import bake.stream
from bake.commands import main
from bake.errors import FitError

collect = bake.fit.run.collect
edit = bake.stream._edit


def launch(
    processes: int, *arguments: str, dies: str = "", **environment: str
) -> tuple[int, str, str]:
    """`accelerate launch` on the processor, or one process: its status, and what was printed."""
    options = {
        "num_processes": processes,
        "num_machines": 1,
        "mixed_precision": "no",
        "dynamo_backend": "no",
        "main_process_port": 0,
    }
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "accelerate.commands.launch", "--multi_gpu"]
        command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command += ["-m", "tests.launched" if dies else "bake", *arguments]
    path = {"PYTHONPATH": str(Path(__file__).parent.parent), "DIES": dies}
    done = subprocess.run(
        command, env=os.environ | path | environment, capture_output=True, text=True, timeout=280
    )
    return done.returncode, done.stdout, done.stderr


def measuring(*arguments: object, **options: object) -> object:
    """The pass over a role's conversations, or the end of the process."""
    if os.environ["DIES"] == "raise":
        raise FitError("this process has bad luck")
    if os.environ["DIES"] == "exit":
        os._exit(5)
    os.kill(os.getpid(), signal.SIGKILL)
    return collect(*arguments, **options)  # type: ignore[arg-type]


def writing(*arguments: object) -> None:
    """The writing of a tensor, and the end of the process behind it."""
    edit(*arguments)  # type: ignore[arg-type]
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        if os.environ["DIES"] == "write":
            bake.stream._edit = writing  # type: ignore[assignment]
        else:
            bake.fit.run.collect = measuring  # type: ignore[assignment]
    main()
