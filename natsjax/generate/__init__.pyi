from .texts import Generated as Generated
from .texts import run as run
