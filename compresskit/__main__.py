"""`python -m compresskit`."""

from compresskit.cli import main

if __name__ == "__main__":
    main()
