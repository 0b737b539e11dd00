"""`bake` on the device of `tests.other_device`: python -m tests.on_other WORD ..

BAKE_DEVICE=other has it compute there.
"""

from bake.commands import main
from tests.other_device import register

if __name__ == "__main__":
    device = register()
    main()
