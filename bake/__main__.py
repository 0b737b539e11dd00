"""`python -m bake`."""

from bake.commands import main

if __name__ == "__main__":
    main()
