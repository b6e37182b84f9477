"""One recipe per file; the docstring says the exact command, the hardware, the time and the loss to expect."""
