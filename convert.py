"""`python convert.py SRC DST -q q4m`: the same as `mlx-kontext convert`."""

import sys

from mlx_kontext.cli import main

main(["convert", *sys.argv[1:]])
