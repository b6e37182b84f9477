"""Array functions of the cache and of attention, one folder per operation.

    <op>/__init__.py   the public function and the table of its implementations
    <op>/reference.py  float64 numpy, obvious, the oracle of every test
    <op>/xla.py        what runs on CPU, and wherever no kernel of our own takes the case

This package imports jax and numpy only.
"""
