"""`python -m a3cli`, for `accelerate launch -m a3cli` and for environments without the console script."""

from a3cli.cli import main

main()
