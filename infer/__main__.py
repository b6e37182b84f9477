"""`python -m infer` is the `jaxkv` command."""

import sys

from infer.cli import main

if __name__ == "__main__":
    sys.exit(main())
