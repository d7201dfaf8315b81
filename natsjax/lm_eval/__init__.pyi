from .adapter import NatsjaxLM as NatsjaxLM
from .offline_tasks import write_tasks as write_tasks
