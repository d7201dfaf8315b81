from .evaluation import Evaluation as Evaluation
from .evaluation import check as check
from .evaluation import run as run
from .slices import SliceSettings as SliceSettings

DEFAULT_CHUNK: int
DEFAULT_RARE: int
