"""`python -m train RECIPE` is `jaxkv train RECIPE`."""

import sys

from train.cli import main

if __name__ == "__main__":
    sys.exit(main())
