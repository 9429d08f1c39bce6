"""``python -m bs_comm``."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
