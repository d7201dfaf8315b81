from .loop import Interrupted as Interrupted
from .loop import fit as fit
from .loop import run as run
