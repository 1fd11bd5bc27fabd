"""`python -m densedino` is the `densedino` command."""

from densedino.cli.main import entry

if __name__ == "__main__":
    entry()
