"""`python -m fastmrcnn`."""

from fastmrcnn.cli import main

main()
