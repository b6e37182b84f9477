"""Inference with jaxkv: load a model, generate, stream, hold sessions and evaluate under a cache budget.

import infer
lm = infer.load("smollm2")
print(lm.generate(["Once upon a time"], cache="scissorhands", budget="20%")[0].text)
"""

from infer.model import Completion, LanguageModel, load
from infer.sampling import Sampling
from infer.session import Answer, Session

__all__ = ["Answer", "Completion", "LanguageModel", "Sampling", "Session", "load"]
