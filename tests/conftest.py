"""Settings of the test session; they must be made before jax is imported."""

import contextlib
import fcntl
import os
import shutil
from importlib.metadata import version
from pathlib import Path

# Tests compile much and compute little; set it to 0 to test what the optimiser makes of the code.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
flags = ["--xla_force_host_platform_device_count=2"]
# XLA ends the process at a flag that it does not know, as that of jaxlib 0.12 would.
knows = version("jaxlib").startswith("0.10.")
if knows and os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0":
    # Halves the time to compile a small function; in one part it takes a tenth less.
    flags += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
given = os.environ.get("XLA_FLAGS", "")
new = (flag for flag in flags if flag.split("=")[0] not in given)
os.environ["XLA_FLAGS"] = " ".join([*new, given]).strip()
# A folder a worker: jax writes its entries in place, and a half-written one makes a warning. To
# write one takes 0.005 s, so small ones are made again.
worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
cache = Path(__file__).parents[1] / ".pytest_cache" / "jax" / worker
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import gc  # noqa: E402
import signal  # noqa: E402

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

# Traces and compiled programs stay: collecting them again and again took a tenth of the time.
gc.freeze()
gc.set_threshold(200_000, 50, 100)

hypothesis.settings.register_profile(
    "eqxldm",
    deadline=None,
    max_examples=25,
    derandomize="CI" in os.environ,
    # The x64 fixture holds no state between examples.
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("eqxldm")


# Below `nohup` hangups are ignored, in the background of a script Ctrl-C, and programs that tests
# start inherit it.
for signum in (signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(signum) == signal.SIG_IGN:
        usual = {signal.SIGINT: signal.default_int_handler}
        signal.signal(signum, usual.get(signum, signal.SIG_DFL))


# The files that take longest, longest first: with them at the end, one worker would be left alone.
LONG = (
    "test_train_job", "test_train_resume", "test_processes", "test_examples", "test_eight_devices",
    "test_solvers", "test_unet", "test_network_conditions", "test_training", "test_sampling",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


# Need torch and diffusers, which the tests do not: they made the reference files.
collect_ignore_glob = ["reference/make_*.py"]


MAPPINGS = Path("/proc/self/maps")


class FreedPrograms:
    """Drops compiled programs before the process runs out of memory mappings.

    A program of XLA:CPU has some of its own, and Linux allows a process 65,530 of them
    (`vm.max_map_count`): beyond it the compiler ends the process. Between files it drops them
    early, so that a file seldom loses what it has compiled.
    """

    def __init__(self):
        self.tests = 0

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, item, nextitem):
        self.tests += 1
        between = nextitem is None or nextitem.path != item.path
        if not (between or self.tests % 25 == 0) or not MAPPINGS.exists():
            return
        if MAPPINGS.read_bytes().count(b"\n") > (20_000 if between else 45_000):
            jax.clear_caches()
            gc.collect()


def pytest_configure(config):
    config.pluginmanager.register(FreedPrograms())


@pytest.fixture
def strict_dtypes():
    """No implicit promotion. Not for what trains: Adam takes a float to the power of its count."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def key():
    return jax.random.key(0)


@contextlib.contextmanager
def locked(path):
    """One worker at a time."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A finished run on images that it made itself, the same for all workers; never written to."""
    from job_runs import train

    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    run = base / "finished" / "run"
    with locked(base / "finished.lock"):
        if not (run / "metrics.json").exists():
            assert train(run, "--log.tensorboard") == 0
    return run


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copied"))
