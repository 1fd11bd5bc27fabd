"""`python -m densedino` is the `densedino` command."""

from densedino.cli.main import main

if __name__ == "__main__":
    main()
