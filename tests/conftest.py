"""Compiling takes most of the suite's time: a test run compiles quickly, and its processes share compiled programs."""

import gc
import importlib.metadata
import logging
import os
import re
import shutil
import tempfile

import pytest
from hypothesis import HealthCheck, settings

# On busy cores generating the first input alone can take half a minute, which says nothing of the code.
settings.register_profile("natsjax", suppress_health_check=[HealthCheck.too_slow], deadline=None)
settings.load_profile("natsjax")

_FOLDER = "JAX_COMPILATION_CACHE_DIR"
# Files of tests that compute nothing with JAX, or nothing that depends on its version beyond what other files check.
_ONE_PYTHON = re.compile(
    r"""test_(attention_(lse|tilings)|benchmark_.*|budgets|command_flags|compare|config|cpu_devices|data_.*|display
    |docs|evaluate_(decoded|masked)|export(_hf)?|full_disk|fuzz_.*|generate|head_windows|held_out|hf_config|import_gguf
    |import_model|initial_parameters|kill|launch|layer_patterns|layout|log|monitor|nonfinite|outputs|paths
    |policy_registry|processes|report.*|rivals|role_statistics|selective|serve.*|signals|slices|standard_streams
    |step_breakdown|stored_runs|study|sweep|tasks|text_stream|tour|trained_rivals|trackers|warnings|watchdog)[.]py""",
    re.VERBOSE,
)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too, and compile as users do")


def pytest_configure(config):
    """Sets the environment before jax is imported; workers and processes that tests start inherit it."""
    os.environ["NATSJAX_SLOW_TESTS"] = "1" if config.option.slow else ""
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")  # a command that a test calls would make one for each core
    if config.option.markexpr == "aot":
        return  # a program that was compiled for a chip that is not here cannot be loaded from a cache
    if _FOLDER not in os.environ:
        config.compiled = os.environ[_FOLDER] = tempfile.mkdtemp(prefix="natsjax-tests-compiled-")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    if not config.option.slow:
        # Compiling takes a third of the time; tiny programs run no slower.
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        flag = "--xla_cpu_use_fusion_emitters=false"  # later versions have no such flag, and abort
        if importlib.metadata.version("jaxlib").startswith("0.10.") and flag not in os.environ.get("XLA_FLAGS", ""):
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def pytest_unconfigure(config):
    if hasattr(config, "compiled"):
        shutil.rmtree(config.compiled, ignore_errors=True)


def pytest_make_parametrize_id(val, argname):
    """Names bytes after their argument: those of gzip hold the time, and workers must collect the same names."""
    return argname if isinstance(val, bytes) else None


def pytest_collection_modifyitems(config, items):
    for item in items:
        if _ONE_PYTHON.fullmatch(item.path.name):
            item.add_marker("one_python")
        if item.get_closest_marker("slow") and not config.option.slow:
            item.add_marker(pytest.mark.skip(reason="slow: pytest --slow runs it"))


@pytest.fixture(scope="module", autouse=True)
def programs_are_given_up():
    """Frees compiled programs behind each file: each maps many pieces of memory, of which a process may have 65530."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()


@pytest.fixture
def nothing_compiled_before(monkeypatch):
    """Switches the cache of compiled programs off, for tests of the cache itself and of compiling."""
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
