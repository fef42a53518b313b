"""`python -m corrsteer.cli`."""

from corrsteer.cli import main

main()
