from .evaluation import Evaluation as Evaluation
from .evaluation import check as check
from .evaluation import run as run

DEFAULT_CHUNK: int
