"""What a run reports, where, and what the devices are said to do."""

import dataclasses
import json
import struct
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqxldm.devices import device_memory, memory_bytes, peak_flops
from eqxldm.telemetry import rates, total_peak
from experiments.train import telemetry
from experiments.train.options import check
from experiments.train.run import RunFolder
from experiments.train.telemetry import LogOptions, Telemetry
from experiments.train.terminal import UserError


@dataclasses.dataclass
class Device:
    device_kind: str


class FakeWandb(types.ModuleType):
    """Records what it is asked; `refuses` is what its init raises."""

    class Error(Exception):
        pass

    def __init__(self, refuses=None):
        super().__init__("wandb")
        self.refuses, self.inits, self.rows, self.axes, self.exits = refuses, [], [], [], []
        self.offline, self.url = False, "https://wandb.example/run"

    def init(self, **options):
        if self.refuses:
            raise self.Error(self.refuses)
        self.inits.append(options)
        return self

    def Settings(self, **settings):
        return settings

    def Image(self, array):
        return ("image", array.shape)

    def define_metric(self, name, step_metric=None):
        self.axes.append((name, step_metric))

    def log(self, row):
        self.rows.append(row)

    def finish(self, exit_code):
        self.exits.append(exit_code)


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path / "night")
    folder.path.mkdir()
    folder.open({"seed": 1}, overwrite=False)
    return folder


def events(folder):
    """The events of all files of a folder, oldest first: TFRecords of length, crc, data, crc."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.iterdir(), key=lambda p: int(p.name.split(".")[-1])):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def points(folder):
    """`{tag: {step: value}}` as TensorBoard shows it: a START hides its step and later ones."""
    shown = {}
    for event in events(folder):
        if event.HasField("session_log"):
            for values in shown.values():
                for step in [s for s in values if s >= event.step]:
                    del values[step]
        for value in event.summary.value:
            found = value.image if value.HasField("image") else value.simple_value
            shown.setdefault(value.tag, {})[event.step] = found
    return shown


# Rates


def test_rates_are_quotients():
    found = rates(20, 4.0, 1.0, batch_size=256, flops_per_step=3e13, peak=1e15)
    assert found == {
        "images_per_second": 1280.0,
        "step_seconds": 0.2,
        "data_wait": 0.25,
        "tflops": 150.0,
        "mfu": 0.15,
    }


def test_rates_leave_out_what_is_not_known():
    assert "tflops" not in rates(1, 1.0, 0.0, batch_size=1, peak=1e12)
    found = rates(1, 1.0, 0.0, batch_size=1, flops_per_step=1e12)
    assert found["tflops"] == 1.0 and "mfu" not in found
    assert rates(0, 1.0, 0.0, batch_size=1) == {} == rates(1, 0.0, 0.0, batch_size=1)


def test_waiting_is_at_most_all_the_time():
    assert rates(1, 1.0, 1.0 + 1e-9, batch_size=1)["data_wait"] == 1.0


# Devices


@pytest.mark.parametrize(
    ("kind", "flops", "gib"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 80),
        ("NVIDIA H100 PCIe", 756e12, 80),
        ("NVIDIA H200", 989e12, 141),
        ("NVIDIA A100-SXM4-40GB", 312e12, 40),
        ("NVIDIA L40S", 362e12, 48),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 24),
        ("NVIDIA B200", 2250e12, 180),
        ("TPU v2", 23e12, 8),
        ("TPU v3", 61.5e12, 16),
        ("TPU v4", 275e12, 32),
        ("TPU v5 lite", 197e12, 16),
        ("TPU v5e", 197e12, 16),
        ("TPU v5", 459e12, 95),
        ("TPU v5p", 459e12, 95),
        ("TPU v6 lite", 918e12, 32),
        ("TPU7x", 1153.5e12, 96),
        ("cpu", None, None),
        # A part of a GPU has a part of its peak.
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
    ],
)
def test_peaks_are_a_devices_own(kind, flops, gib):
    assert peak_flops(kind) == flops
    assert memory_bytes(kind) == (gib and gib * 2**30)


def test_peaks_follow_the_operands():
    assert peak_flops("NVIDIA H200", jnp.float32) == 989e12 / 2  # TF32
    assert peak_flops("NVIDIA H200", jnp.float16) == 989e12
    assert peak_flops("TPU v4", jnp.float32) == 275e12  # one bfloat16 pass
    assert peak_flops("TPU v4", "float16") is peak_flops("NVIDIA H200", "int8") is None


@pytest.mark.parametrize(
    ("kind", "version", "cores"),
    # Of v4 and v5p a device is both cores of a chip, of TPU7x it is one of them.
    [
        ("TPU v4", "v4", 2),
        ("TPU v5 lite", "v5e", 1),
        ("TPU v5", "v5p", 2),
        ("TPU v6 lite", "v6e", 1),
        ("TPU7x", "7x", 1),
    ],
)
def test_peaks_and_memory_agree_with_what_jax_knows(kind, version, cores):
    tpu = pytest.importorskip("jax.experimental.pallas.tpu")
    if not hasattr(tpu, "get_tpu_info_for_chip"):
        pytest.skip("this jax has no table of TPUs")
    core = tpu.get_tpu_info_for_chip(tpu.ChipVersion(version), cores)
    assert peak_flops(kind) == pytest.approx(cores * core.bf16_ops_per_second, rel=0.005)
    assert memory_bytes(kind) == pytest.approx(cores * core.hbm_capacity_bytes, rel=0.02)


def test_peak_of_many_devices_is_their_sum():
    assert total_peak([Device("NVIDIA H200")] * 8) == 8 * 989e12
    assert total_peak([Device("NVIDIA H200"), Device("cpu")]) is None
    assert total_peak([]) is None
    assert total_peak([Device("cpu")] * 2, peak_tflops=0.2) == 0.4e12


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    assert device_memory() is None  # a CPU does not count

    def device(peak):
        stats = dict(bytes_in_use=1, peak_bytes_in_use=peak, bytes_limit=100, num_allocs=3)
        return types.SimpleNamespace(memory_stats=lambda: stats)

    monkeypatch.setattr(jax, "local_devices", lambda: [device(5), device(7)])
    assert device_memory() == {"in_use": 1, "peak": 7, "limit": 100}


# Telemetry


def test_scalars_are_json_lines(run):
    with Telemetry(run) as log:
        log.scalars("dit", 20, {"loss": np.float32(0.5), "skipped": 1, "norm": np.array(2.0)})
        log.scalars("dit", 40, {"loss": float("nan")})
        log.images("dit", 40, "samples", np.zeros((4, 4, 1), np.uint8))
    lines = (run.path / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == dict(stage="dit", step=20, loss=0.5, skipped=1, norm=2.0)
    assert lines[1] == '{"stage": "dit", "step": 40, "loss": null}'
    assert not (run.path / "tensorboard").exists() and not (run.path / "wandb").exists()


@pytest.mark.parametrize("value", [jnp.array(1.0), np.ones(2), "1", None])
def test_a_value_that_is_no_fetched_number_is_refused(run, value):
    with pytest.raises(TypeError, match="loss must be a number that was fetched"):
        Telemetry(run).scalars("dit", 1, {"loss": value})


@pytest.mark.parametrize("grid", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)])
def test_a_grid_that_is_no_picture_is_refused(run, grid):
    with pytest.raises(ValueError, match="samples must be uint8 of shape"):
        Telemetry(run).images("dit", 1, "samples", grid)


def test_speed_reports_what_is_known_of_the_stage(run, monkeypatch):
    devices = [Device("TPU v5 lite")] * 4
    log = Telemetry(run, flops_per_step={"dit": 1e14}, devices=devices)
    monkeypatch.setattr(telemetry, "device_memory", lambda: {"in_use": 2**30, "peak": 2**31})
    speed = log.speed("dit", 10, 5.0, 0.5, batch_size=256)
    assert speed["images_per_second"] == 512 and speed["data_wait"] == 0.1
    assert speed["tflops"] == 200 and speed["mfu"] == pytest.approx(2e14 / (4 * 197e12))
    assert (speed["memory_in_use_gib"], speed["memory_peak_gib"]) == (1, 2)
    assert "tflops" not in log.speed("autoencoder", 10, 5.0, 0.5, batch_size=256)


def test_a_cpu_has_no_mfu_unless_its_peak_is_given(run):
    def speed(options):
        log = Telemetry(run, options, flops_per_step={"dit": 1e12})
        return log.speed("dit", 1, 1.0, 0.0, batch_size=1)

    assert set(speed(LogOptions())) == {"images_per_second", "step_seconds", "data_wait", "tflops"}
    share = 1 / (jax.device_count() * 0.25)
    assert speed(LogOptions(peak_tflops=0.25))["mfu"] == pytest.approx(share)


@pytest.mark.parametrize("peak", [0.0, -1.0, float("nan"), float("inf")])
def test_a_peak_that_is_none_is_refused(peak):
    with pytest.raises(UserError, match=r"--log\.peak-tflops must lie in"):
        check(LogOptions(peak_tflops=peak), "log.")


def test_tensorboard_shows_the_same_scalars_and_pictures(run):
    grid = np.random.default_rng(0).integers(0, 256, (6, 4, 1), np.uint8)
    with Telemetry(run, LogOptions(tensorboard=True)) as log:
        log.scalars("autoencoder", 20, {"loss": 2.0})
        log.scalars("dit", 20, {"loss": 0.5, "mfu": 0.25})
        log.images("dit", 20, "samples", grid)
    shown = points(run.path / "tensorboard" / "dit")
    assert shown["loss"] == {20: 0.5} and shown["mfu"] == {20: 0.25}
    from io import BytesIO

    from PIL import Image

    decoded = np.asarray(Image.open(BytesIO(shown["samples"][20].encoded_image_string)))
    np.testing.assert_array_equal(decoded, np.repeat(grid, 3, -1))
    assert points(run.path / "tensorboard" / "autoencoder") == {"loss": {20: 2.0}}


def test_tensorboard_hides_what_a_resumed_run_logs_again(run):
    for steps, loss in (((20, 40, 60, 80, 100), 1.0), ((70, 90), 2.0)):
        with Telemetry(run, LogOptions(tensorboard=True)) as log:
            for step in steps:
                log.scalars("dit", step, {"loss": loss})
    folder = run.path / "tensorboard" / "dit"
    assert len(list(folder.iterdir())) == 2  # within one second, too
    assert points(folder)["loss"] == {20: 1, 40: 1, 60: 1, 70: 2, 90: 2}


def test_wandb_gets_the_same_scalars_and_pictures(run, wandb):
    with Telemetry(run, LogOptions(wandb="ldm")) as log:
        log.scalars("dit", 20, {"loss": 0.5})
        log.images("dit", 20, "samples", np.zeros((6, 4, 1), np.uint8))
    assert wandb.rows == [
        {"dit/step": 20, "dit/loss": 0.5},
        {"dit/step": 20, "dit/samples": ("image", (6, 4, 3))},
    ]
    assert wandb.axes == [("dit/step", None), ("dit/*", "dit/step")]
    (options,) = wandb.inits
    assert options["project"] == "ldm" and options["name"] == "night"
    assert options["config"] == {"seed": 1} and options["dir"] == str(run.path)
    assert wandb.exits == [0]


def test_wandb_resumes_the_run_of_the_folder(run, wandb, tmp_path):
    for _ in range(2):
        Telemetry(run, LogOptions(wandb="ldm")).close()
    first, second = wandb.inits
    assert first["id"] == second["id"] and len(first["id"]) == 8
    assert second["resume"] == "allow"
    other = RunFolder(tmp_path / "other")
    other.path.mkdir()
    other.open({}, overwrite=False)
    Telemetry(other, LogOptions(wandb="ldm")).close()
    assert wandb.inits[-1]["id"] != first["id"]


def test_wandb_is_told_of_a_failure_once(run, wandb):
    log = Telemetry(run, LogOptions(wandb="ldm"))
    with pytest.raises(KeyError), log:
        raise KeyError
    log.close()
    assert wandb.exits == [1]


def test_wandb_that_refuses_is_one_message(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb("No API key configured."))
    with pytest.raises(UserError, match=r"--log\.wandb ldm: No API key configured\.") as caught:
        Telemetry(run, LogOptions(wandb="ldm"))
    assert "WANDB_MODE=offline" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "package"),
    [(LogOptions(tensorboard=True), "tensorboardX"), (LogOptions(wandb="ldm"), "wandb")],
)
@pytest.mark.parametrize("process", [0, 1])
def test_a_missing_package_is_named_on_every_process(run, monkeypatch, options, package, process):
    monkeypatch.setitem(sys.modules, package, None)  # import raises ImportError
    monkeypatch.setattr(jax, "process_index", lambda: process)
    with pytest.raises(
        UserError, match=f"the package {package} is needed:\n.* -m pip install {package}"
    ):
        Telemetry(run, options)


def test_other_processes_write_nothing(run, wandb, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    before = sorted(run.path.rglob("*"))
    with Telemetry(run, LogOptions(tensorboard=True, wandb="ldm")) as log:
        log.scalars("dit", 20, {"loss": 0.5} | log.speed("dit", 1, 1.0, 0.0, batch_size=1))
        log.images("dit", 20, "samples", np.zeros((4, 4, 3), np.uint8))
    assert sorted(run.path.rglob("*")) == before and not wandb.inits


def test_options_are_flags():
    import tyro

    @dataclasses.dataclass
    class Config:
        log: LogOptions = dataclasses.field(default_factory=LogOptions)

    given = "--log.tensorboard --log.wandb ldm --log.peak-tflops 1.5".split()
    assert tyro.cli(Config, args=given).log == LogOptions(True, "ldm", 1.5)
    assert tyro.cli(Config, args=[]).log == LogOptions(False, None, None)
