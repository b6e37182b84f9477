"""Cases of `tpu_compile` that fail, in both ways."""

import os
import sys


def raises(case):
    raise RuntimeError(f"case {case}")


def dies(case):
    sys.stderr.write("dying")
    sys.stderr.flush()
    os._exit(3)
