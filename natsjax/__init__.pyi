from .errors import UserError as UserError
from .runs.load import LoadedRun as LoadedRun
from .runs.load import load as load
