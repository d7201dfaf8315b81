from .evaluation import TaskEvaluation as TaskEvaluation
from .evaluation import run as run
