"""``python -m jactri``: see ``jactri.cli``."""

from jactri.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
