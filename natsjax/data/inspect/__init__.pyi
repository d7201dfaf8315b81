from .contexts import example_at as example_at
from .contexts import open_data as open_data
from .examples import Example as Example
