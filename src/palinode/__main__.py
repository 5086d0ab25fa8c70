"""`python -m palinode` is the same as `palinode`."""

from palinode.cli import main

main()
