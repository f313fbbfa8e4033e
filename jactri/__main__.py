"""``python -m jactri``: see ``cli``."""

from jactri.cli.commands import main

if __name__ == "__main__":
    raise SystemExit(main())
