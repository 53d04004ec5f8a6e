"""`python -m mlx_kontext` is the command `mlx-kontext`."""

from .cli import main

main()
