"""Quality against compute: every attribution method at several budgets, on one bank of retrained models.

problem = Problem(model=model, train_set=train_set, targets=targets, task="image_classification", checkpoints=files)
contenders = choose_contenders(built_in_contenders(problem), ["trak*", "gradient-*", "random"])
frontier = run_frontier(problem, bank, contenders, training=measure_training(train_one, folder="out"), folder="out")
write_csv(frontier, "frontier.csv")
draw_frontier(frontier, "frontier.png")
"""

from trak.frontier.clock import Training, machine_facts, measure_training
from trak.frontier.contenders import built_in_contenders, choose_contenders
from trak.frontier.figure import draw_frontier
from trak.frontier.run import run_frontier
from trak.frontier.table import markdown_table, write_csv
from trak.frontier.values import Contender, Frontier, FrontierPoint, Problem, Seconds, Trial

__all__ = [
    "Contender",
    "Frontier",
    "FrontierPoint",
    "Problem",
    "Seconds",
    "Training",
    "Trial",
    "built_in_contenders",
    "choose_contenders",
    "draw_frontier",
    "machine_facts",
    "markdown_table",
    "measure_training",
    "run_frontier",
    "write_csv",
]
