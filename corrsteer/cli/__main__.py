"""`python -m corrsteer.cli`."""

from corrsteer.cli import main

if __name__ == "__main__":
    main()
