"""`python -m corrsteer`: the command line, as `torchrun -m` takes it."""

from corrsteer.cli import main

if __name__ == "__main__":
    main()
