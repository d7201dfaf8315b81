from .loop import Interrupted as Interrupted
from .loop import run as run
