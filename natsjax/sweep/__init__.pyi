from .sweep import Sweep as Sweep
from .sweep import run as run
