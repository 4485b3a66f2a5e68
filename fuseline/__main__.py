"""`python -m fuseline` is the command `fuseline`."""

from fuseline.cli import main

if __name__ == "__main__":
    main()
