"""Runs `python -m moe NAME ...` as `permoe NAME ...`."""

from moe.commands import main

if __name__ == "__main__":
    main()
