"""`python -m compresskit`."""

from compresskit.cli.main import main

if __name__ == "__main__":
    main()
