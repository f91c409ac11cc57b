"""Promises about energy, load, clocks and memory: right where the truth is known; null, not 0, where it cannot be measured."""

import itertools
import os
import shutil
import subprocess
import sys
import time
import types
from functools import partial

import msgspec
import pytest
from conftest import INSTALLED, ROOT

from edgebench import device, nvml
from edgebench.measure import meters, sensors
from edgebench.measure.epochs import Epoch, training_figures
from edgebench.measure.meters import Meter, energy_figures, load_figures

ADDRESS = "00000000:65:00.0"


def write(path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{value}\n")


def orin(sysfs, amperes: int = 2) -> None:
    """The sensors of a Jetson AGX Orin as files: 10 V * 2 A + 5 V * 1 A + 5 V * 3 A = 40 W, and a rail that must not count."""
    chip = sysfs / "bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon4"
    rails = [("VDD_GPU_SOC", 10_000, 1_000 * amperes), ("VDD_CPU_CV", 5_000, 1_000), ("VIN_SYS_5V0", 5_000, 3_000)]
    for number, (label, mv, ma) in enumerate([*rails, ("NC", 9_000, 9_000)], 1):
        write(chip / f"in{number}_label", label)
        write(chip / f"in{number}_input", mv)
        write(chip / f"curr{number}_input", ma)
    write(sysfs / "devices/platform/gpu.0/load", 873)
    write(sysfs / "class/thermal/thermal_zone0/type", "cpu-thermal")
    write(sysfs / "class/thermal/thermal_zone0/temp", 99_000)
    write(sysfs / "class/thermal/thermal_zone1/type", "gpu-thermal")
    write(sysfs / "class/thermal/thermal_zone1/temp", 51_500)
    write(sysfs / "class/devfreq/17000000.gpu/cur_freq", 1_300_500_000)
    write(sysfs / "class/devfreq/15480000.nvdec/cur_freq", 1)
    for number, count in ((1, 0), (2, 7), (3, 40)):
        write(sysfs / f"class/hwmon/hwmon3/oc{number}_event_cnt", count)
    for cpu in os.sched_getaffinity(0):
        write(sysfs / f"devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq", 2_201_600)


def nvml_module(lacks: str = "") -> types.ModuleType:
    """An nvidia-ml-py for a board at ADDRESS that draws 80 W and counts 7 J a reading; it refuses the function `lacks`."""
    nvml, counter_mj = types.ModuleType("pynvml"), itertools.count(1_000_000, 7_000)
    functions = {
        "MigMode": lambda _: [0, 0],
        "TotalEnergyConsumption": lambda _: next(counter_mj),
        "PowerUsage": lambda _: 80_000,
        "UtilizationRates": lambda _: types.SimpleNamespace(gpu=95),
        "Temperature": lambda *_: 70,
        "ClockInfo": lambda *_: 2_370,
        "CurrentClocksEventReasons": lambda _: (
            0x4 | 0x1 | 0x2
        ),  # the power cap; idle and the user's clocks do not slow it
        "CurrentClocksThrottleReasons": lambda _: 0x40,
        "ComputeRunningProcesses": lambda _: [types.SimpleNamespace(pid=pid) for pid in (os.getpid(), 4242)],
    }

    def refuse(*_):
        raise nvml.NVMLError("Not Supported")

    def find(address):
        return address if address == ADDRESS else refuse()

    nvml.NVMLError, nvml.nvmlInit, nvml.nvmlDeviceGetHandleByPciBusId = (
        type("NVMLError", (Exception,), {}),
        lambda: 0,
        find,
    )
    for name, function in functions.items():
        setattr(nvml, f"nvmlDeviceGet{name}", refuse if name == lacks else function)
    return nvml


def record_of(sensor, seconds: float = 0.0, during=lambda: None):
    """The record of a span of this length, in which `during` is called."""
    meter = Meter({"it": sensor})
    meter.begin()
    during()
    time.sleep(seconds)
    return meter.end()["it"]


def test_joules_of_a_jetson_are_watts_times_seconds_of_the_epochs_that_count(tmp_path):
    orin(tmp_path, amperes=50)
    sensor = sensors.ina3221_sensor(tmp_path)
    epochs = [Epoch({}, 1.0, 1.0, compiled=True, energy={"accelerator": record_of(sensor)})]  # at 520 W
    orin(tmp_path)
    seconds = 0.0
    for _ in range(2):  # two epochs, and a pause between them that must not count
        began = time.perf_counter()
        epochs.append(Epoch({}, 1.0, 1.0, energy={"accelerator": record_of(sensor, seconds=0.5)}))
        seconds += time.perf_counter() - began
        time.sleep(0.3)
    there = sensors.Sensors({"accelerator": sensor}, {"cpu_package": "no RAPL"}, sensors.LoadSensor())
    what = {"device": "Orin", "dtype_policy": "float32", "tf32": True, "train_flops_per_image": 1}
    figures = training_figures(epochs, 50, there, what, 1)["energy"]["accelerator"]
    assert figures["joules_per_epoch"] == pytest.approx(40 * seconds / 2, rel=0.1)  # a busy machine; the pause is 0.3
    assert figures["joules_per_image"] == pytest.approx(figures["joules_per_epoch"] * 2 / 100)
    assert figures["mean_w"] == pytest.approx(40) and figures["peak_w"] == pytest.approx(40)
    assert (figures["utilization_percent"], figures["max_temperature_c"]) == (pytest.approx(87.3), 51.5)
    assert epochs[1].energy["accelerator"].readings >= 3  # more than 1 Hz
    none = training_figures(epochs[:1], 50, there, what, 1)["energy"]["accelerator"]
    assert none.pop("source") == "unavailable: no epoch was measured but those that compile" and set(none.values()) == {
        None
    }


def test_a_sensor_that_vanishes_during_the_run_gives_no_figure(tmp_path):
    orin(tmp_path)
    file = next(tmp_path.glob("bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon4/curr1_input"))
    figures = energy_figures([record_of(sensors.ina3221_sensor(tmp_path), during=file.unlink)], 1)
    assert figures.pop("source").startswith("unavailable: lost during the run") and set(figures.values()) == {None}


def rapl(sysfs, joules: float) -> None:
    write(sysfs / "class/powercap/intel-rapl:0/max_energy_range_uj", 262_143_000_000)
    write(sysfs / "class/powercap/intel-rapl:0/energy_uj", int(joules * 1e6))


def test_a_counter_that_wraps_loses_nothing(tmp_path):
    rapl(tmp_path, 262_142)
    sensor = sensors.rapl_sensor(tmp_path)
    first = record_of(sensor, during=lambda: rapl(tmp_path, 5))
    rapl(tmp_path, 900)  # spent between the epochs
    second = record_of(sensor, during=lambda: rapl(tmp_path, 901.5))
    assert energy_figures([first, second], 1)["joules_per_epoch"] == pytest.approx((1 + 5 + 1.5) / 2)


@pytest.mark.parametrize("lacks", ["", "TotalEnergyConsumption", "PowerUsage", "UtilizationRates", "Temperature"])
def test_a_gpu_that_lacks_one_reading_still_has_all_others(lacks, monkeypatch):
    """Joules come from its counter, else from its watts."""
    monkeypatch.setitem(sys.modules, "pynvml", nvml_module(lacks))
    record = record_of(sensors.nvml_sensor(ADDRESS), seconds=0.25)
    figures = energy_figures([record], 1)
    has_counter = lacks != "TotalEnergyConsumption"
    expected = 7 * (record.readings - 1) if has_counter else 80 * record.seconds
    assert figures["joules_per_epoch"] == pytest.approx(expected)
    assert (figures["peak_w"] == 80) == (lacks != "PowerUsage")
    assert figures["utilization_percent"] == (None if lacks == "UtilizationRates" else 95)
    assert figures["max_temperature_c"] == (None if lacks == "Temperature" else 70)


def test_a_resumed_run_goes_on_with_the_joules_of_the_interrupted_one_from_the_same_sensor():
    """An epoch without a sensor, or with another one, counts for nothing."""
    sensor = sensors.PowerSensor("the board", lambda: sensors.Reading(watts=1.0))
    records = [
        None,
        sensors.Energy("another", 1.0, 5, 90.0),
        *(sensors.Energy("the board", 1.0, 5, j) for j in (6.0, 8.0)),
    ]
    epochs = [Epoch({}, 1.0, 1.0, energy={"accelerator": record} if record else {}) for record in records]
    there = sensors.Sensors({"accelerator": sensor}, {}, sensors.LoadSensor())
    what = {"device": "Orin", "dtype_policy": "float32", "tf32": True, "train_flops_per_image": 1}
    read_again = [msgspec.json.decode(msgspec.json.encode(epoch), type=Epoch) for epoch in epochs]
    figures = training_figures(read_again, 7, there, what, 1)["energy"]["accelerator"]
    assert figures["joules_per_epoch"] == 7 and figures["joules_per_image"] == 1 and figures["mean_w"] == 7


def test_a_sensor_that_is_not_there_gives_the_reason():
    """No figure of it is a number. Inference then costs no time."""
    there = sensors.Sensors(
        {}, {"accelerator": "the backend runs on the CPU", "cpu_package": "no RAPL"}, sensors.LoadSensor()
    )
    assert sensors.find_sensors(False, None).no_power["accelerator"] == "the backend runs on the CPU"
    what = {"device": "Orin", "dtype_policy": "float32", "tf32": True, "train_flops_per_image": 1}
    figures = training_figures([], 1, there, what, 1)["energy"]["accelerator"]
    assert figures.pop("source") == "unavailable: the backend runs on the CPU" and set(figures.values()) == {None}
    sections = meters.inference_energy(there, lambda: pytest.fail("the loop ran without a sensor"), images=1)
    assert sections["energy"]["inference_joules_per_image"] == {"accelerator": None, "cpu_package": None}
    assert list(sections["missing"].values()) == ["the backend runs on the CPU", "no RAPL"]


def test_inference_costs_the_joules_that_the_sensor_counts_in_a_loop_of_the_given_length(tmp_path):
    rapl(tmp_path, 0)
    no_accelerator = {"accelerator": "the backend runs on the CPU"}
    there = sensors.Sensors({"cpu_package": sensors.rapl_sensor(tmp_path)}, no_accelerator, sensors.LoadSensor())
    counter, began = itertools.count(1), time.perf_counter()

    def predict() -> None:
        path = tmp_path / "class/powercap/intel-rapl:0/energy_uj"
        write(path.with_name("next"), next(counter) * 3_000_000)
        path.with_name("next").replace(path)  # as the sensor's thread must not read an empty file
        time.sleep(0.01)

    joules = meters.inference_energy(there, predict, images=6, min_s=0.5)["energy"]["inference_joules_per_image"]
    assert joules == {"accelerator": None, "cpu_package": pytest.approx(0.5)} and time.perf_counter() - began >= 0.5


@pytest.fixture(scope="module")
def libcuda(tmp_path_factory):
    """A libcuda that has hidden all GPUs but the one at ADDRESS, as CUDA does after reading CUDA_VISIBLE_DEVICES."""
    if not shutil.which("gcc"):
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("cuda")
    write(
        folder / "cuda.c",
        """#include <string.h>
        int cuInit(unsigned flags) { return 0; }
        int cuDeviceGet(int *device, int ordinal) { *device = ordinal + 40; return ordinal ? 101 : 0; }
        int cuDeviceGetPCIBusId(char *id, int length, int device) {
            if (device != 40 || length < 13) return 1;
            strcpy(id, "0000:65:00.0");
            return 0;
        }""",
    )
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "libcuda.so", folder / "cuda.c"], check=True)
    return str(folder / "libcuda.so")


@pytest.mark.parametrize("visible", [None, "", "1", " 1, 0", "GPU-8f3c1e1c", "MIG-GPU-8f3c1e1c/1/0", "1,-1"])
def test_the_gpu_is_the_one_that_cuda_chose_in_every_form_of_its_variable(visible, libcuda, monkeypatch):
    """Nothing here reads the variable, and no index of NVML is used: the module has no function for it."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setitem(sys.modules, "pynvml", nvml_module())
    assert nvml.pci_address(0, libcuda) == ADDRESS
    assert nvml.Gpu(nvml.pci_address(0, libcuda)).temperature_c() == 70


def test_where_the_gpu_is_not_known_or_not_whole_there_is_no_figure_but_a_reason(libcuda, monkeypatch):
    """Rather than the figures of another GPU, or of the whole board for a slice of it."""
    assert nvml.pci_address(1, libcuda) is None and nvml.pci_address(0, "libno-such-cuda.so") is None
    slices = nvml_module()
    slices.nvmlDeviceGetMigMode = lambda _: [1, 1]
    reasons = [
        (nvml_module(), None, "which GPU"),
        (nvml_module(), "00000000:01:00.0", "Not Supported"),
        (slices, ADDRESS, "MIG"),
    ]
    for module, address, reason in reasons:
        monkeypatch.setitem(sys.modules, "pynvml", module)
        with pytest.raises(Exception, match=reason):
            sensors.nvml_sensor(address)
        sensor = sensors.LoadSensor(True, address)
        figures, missing = load_figures(sensor, [record_of(sensor)], 1)
        assert figures["gpu_mhz"] is None and reason in missing["load/gpu_mhz"]


def on_torch() -> list:
    """The device where torch sees a GPU but Keras' tensors are on the CPU, and the number of threads."""
    import torch

    available, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    try:
        return [device.find_device().is_gpu, device.backend_threads(), torch.get_num_threads()]
    finally:
        torch.cuda.is_available = available


@pytest.mark.skipif("torch" not in INSTALLED, reason="no torch")
def test_the_device_is_that_of_a_tensor_and_threads_are_those_of_the_backend(call_on):
    is_gpu, threads, expected = call_on("torch", on_torch).value
    assert not is_gpu and threads == expected
    found = device.find_device()  # here JAX, whose pool has a thread for each core
    assert found.is_gpu or (found.gpu_id is None and device.backend_threads() in (None, len(os.sched_getaffinity(0))))


def test_peak_memory_is_that_of_the_process_and_not_of_the_one_before_an_exec():
    """ru_maxrss survives an exec: a launcher's memory would count as the run's."""
    after = "from edgebench.measure import sensors; print(sensors.peak_rss_bytes(), sensors.peak_rss_bytes(sensors.Path('/none')))"
    before = f"import os, sys; x = b'x' * (300 << 20); os.execv(sys.executable, [sys.executable, '-c', {after!r}])"
    run = subprocess.run([sys.executable, "-c", before], cwd=ROOT, text=True, capture_output=True, check=True)
    own, inherited = map(int, run.stdout.split())
    assert 1 << 20 < own < 200 << 20 < 300 << 20 <= inherited  # without VmHWM the latter is better than nothing


BUSY = "import time\nend = time.perf_counter() + 30\nwhile time.perf_counter() < end: pass"


def test_a_busy_neighbour_counts_as_others_and_our_own_threads_do_not():
    """Real processes on the real machine, which may have other neighbours too."""
    neighbour = subprocess.Popen([sys.executable, "-c", BUSY])
    sensor = sensors.LoadSensor()
    try:
        record = record_of(sensor, seconds=1.2)
    finally:
        neighbour.kill()
        neighbour.wait()
    beside, missing = load_figures(sensor, [record], backend_threads=2)
    if beside["others_cpu_cores"] is None:
        pytest.skip(f"this machine has no /proc/stat for its cores: {missing}")
    assert beside["others_cpu_cores"] > 0.6 and beside["cpu_s_per_wall_s"] < 0.3
    cpus = len(os.sched_getaffinity(0))
    assert cpus > 5 or "the machine was busy" in beside["problems"][0]

    def work() -> None:
        began = time.process_time()
        while time.process_time() < began + 1.3:
            pass

    record = record_of(sensor, during=work)
    alone, _ = load_figures(sensor, [record], backend_threads=2)
    assert alone["cpu_s_per_wall_s"] * record.seconds == pytest.approx(1.3, abs=0.2)
    assert alone["cpu_s_per_wall_s"] + alone["others_cpu_cores"] < cpus + 0.2
    assert alone["process_threads"] >= 1 and alone["cores"] >= 1


def statistics_of(proc, busy_s: float, runnable: int) -> None:
    """/proc/stat of a machine whose cores, the ones of this process together, have been busy for so long."""
    cpus, hz = sorted(os.sched_getaffinity(0)), os.sysconf("SC_CLK_TCK")
    user = int(busy_s * hz / len(cpus) / 2)
    rows = [
        f"cpu{cpu} {user} 0 0 99999 5 0 0 {user} {user} 0" for cpu in cpus
    ]  # half of it is stolen; a guest's is in user
    write(
        proc / "stat",
        "\n".join(["cpu 1 2 3 4 5 6 7 8 9 10", *rows, "cpu9999 77 0 0 0 0 0 0 0 0 0", f"procs_running {runnable}"]),
    )


@pytest.mark.parametrize("busy, runnable, is_disturbed", [(0.0, 1, False), (0.03, 33, False), (0.9, 8, True)])
def test_only_a_machine_that_others_keep_busy_is_a_problem(busy, runnable, is_disturbed, tmp_path):
    """`busy` is the share of the cores that others take. Many runnable threads alone are torch's own."""
    cpus = len(os.sched_getaffinity(0))
    statistics_of(tmp_path, 0, runnable)
    sensor = sensors.LoadSensor(proc=tmp_path, sysfs=tmp_path)
    taken_s = busy * cpus * 1.05 + 0.05

    def pass_by() -> None:
        time.sleep(1.05)
        statistics_of(tmp_path, taken_s, runnable)

    record = record_of(sensor, during=pass_by)
    figures, missing = load_figures(sensor, [record], backend_threads=None)
    seconds, own_s = record.seconds, record.own_cpu_s
    assert figures["others_cpu_cores"] * seconds == pytest.approx(max(taken_s - own_s, 0), abs=0.05)
    assert figures["runnable_tasks"] == runnable - 1  # without the meter's own thread
    assert figures["problems"] == (
        [f"the machine was busy: {runnable - 1:.1f} runnable tasks on {cpus} core{'s' * (cpus > 1)}, and others kept "
         f"{figures['others_cpu_cores']:.1f} of {cpus} core{'s' * (cpus > 1)} busy"] if is_disturbed else []
    )  # fmt: skip
    assert missing["load/cpu_mhz"] == "not reported by this machine"
    none, missing = load_figures(sensor, [], backend_threads=2)
    assert none["cpu_s_per_wall_s"] is None and missing["load/cpu_s_per_wall_s"].startswith("no epoch was measured")


def test_a_jetson_gives_its_clocks_and_what_over_current_did(tmp_path):
    """Summed up over the epochs."""
    records = []
    for over_current in (41, 43):  # 1 event more than at the begin, then 3
        orin(tmp_path)
        sensor = sensors.LoadSensor(True, None, sysfs=tmp_path)
        counter = partial(write, tmp_path / "class/hwmon/hwmon3/oc3_event_cnt", over_current)
        records.append(record_of(sensor, seconds=0.15, during=counter))
    figures, missing = load_figures(sensor, records, backend_threads=8)
    assert (figures["gpu_mhz"], figures["cpu_mhz"]) == (1300.5, pytest.approx(2201.6))
    assert figures["over_current_events"] == 4 and "4 over-current events" in figures["problems"][-1]
    assert figures["throttle_reasons"] is None and "load/throttle_reasons" in missing


@pytest.mark.parametrize("lacks", ["", "ClockInfo", "CurrentClocksEventReasons", "ComputeRunningProcesses"])
def test_a_throttled_or_shared_gpu_is_a_problem(lacks, monkeypatch):
    """An older driver has another name for the reasons. A reading that the board lacks is null and hides no other."""
    monkeypatch.setitem(sys.modules, "pynvml", nvml_module(lacks))
    sensor = sensors.LoadSensor(True, ADDRESS)
    figures, missing = load_figures(sensor, [record_of(sensor, seconds=0.15)], backend_threads=1)
    reason = "HwThermalSlowdown" if lacks == "CurrentClocksEventReasons" else "SwPowerCap"
    assert figures["gpu_mhz"] == (None if lacks == "ClockInfo" else 2370)
    assert figures["throttle_reasons"] == [reason]
    is_problem = f"the GPU was slowed by {reason} for 100% of the time" in figures["problems"]
    assert is_problem == (reason != "SwPowerCap")  # a board at its power limit runs as it is meant to
    shared = lacks != "ComputeRunningProcesses"
    assert figures["other_gpu_processes"] == (1 if shared else None)
    assert ("the GPU was shared with 1 other process" in figures["problems"]) == shared
    assert shared or missing["load/other_gpu_processes"] == "NVML does not report it"


@pytest.mark.parametrize(
    "pids, others", [([], None), (["own"], 0), (["own", 7], 1), ([70_001], 0), ([70_001, 70_002], 1)]
)
def test_one_process_on_the_gpu_is_this_one_even_if_a_container_hides_its_number(pids, others, monkeypatch):
    module = nvml_module()
    listed = [types.SimpleNamespace(pid=os.getpid() if pid == "own" else pid) for pid in pids]
    module.nvmlDeviceGetComputeRunningProcesses = lambda _: listed
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert nvml.Gpu(ADDRESS).other_processes() == others


@pytest.mark.parametrize("quota, expected", [("max 100000", 8), ("150000 100000", 2), ("1600000 100000", 8), (None, 8)])
def test_cores_are_those_that_the_container_may_use(quota, expected, tmp_path):
    if quota:
        write(tmp_path / "fs/cgroup/cpu.max", quota)
    assert sensors.cores(range(8), tmp_path) == expected
