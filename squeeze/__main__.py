"""`python -m squeeze` and the `squeeze` command."""

from squeeze.cli import main

if __name__ == "__main__":
    main()
