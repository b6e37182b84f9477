"""What a smaller cache costs: language modelling and questions, side by side on the same tokens.

rows = evaluate(lm, text=text, caches=["full", "h2o"], budgets=["100%", "25%"], tasks=["passkey"], ...)
print(report.table(rows))
"""

from infer.evaluate import metrics, report
from infer.evaluate.run import PROTOCOLS, Interrupted, evaluate
from infer.evaluate.tasks import TASKS, Context, Question, load_samples, make_samples

__all__ = [
    "PROTOCOLS",
    "TASKS",
    "Context",
    "Interrupted",
    "Question",
    "evaluate",
    "load_samples",
    "make_samples",
    "metrics",
    "report",
]
