"""What compiles takes most of the suite's time, so a test run keeps compiled programs, and its processes share them."""

import gc
import logging
import os
import shutil
import tempfile

import pytest
from hypothesis import HealthCheck, settings

# On busy cores generating the first input alone can take half a minute, which says nothing of the code.
settings.register_profile("natsjax", suppress_health_check=[HealthCheck.too_slow], deadline=None)
settings.load_profile("natsjax")

_FOLDER = "JAX_COMPILATION_CACHE_DIR"


def pytest_configure(config):
    """Before jax is imported, here and in the workers, which inherit the environment."""
    # What is compiled for chips that are not here cannot be read back.
    if _FOLDER not in os.environ and config.option.markexpr != "aot":
        config.compiled = os.environ[_FOLDER] = tempfile.mkdtemp(prefix="natsjax-tests-compiled-")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"


def pytest_unconfigure(config):
    if hasattr(config, "compiled"):
        shutil.rmtree(config.compiled, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def programs_are_given_up():
    """Behind each file of tests: a process may map no more than 65530 pieces of memory, and each program takes many."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()


@pytest.fixture
def nothing_compiled_before(monkeypatch):
    """For tests of the cache itself and of compiling: no folder of compiled programs is in use."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    known = jax.config.jax_compilation_cache_dir
    monkeypatch.delenv(_FOLDER, raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", known)
    compilation_cache.reset_cache()


@pytest.fixture
def caplog(caplog):
    """pytest's, which listens to the root logger; that of the package hands nothing to it."""
    logger = logging.getLogger("natsjax")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
