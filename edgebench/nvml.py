"""The NVIDIA GPU that the backend uses, as NVML knows it."""

import ctypes
from collections.abc import Callable
from functools import cache

THROTTLE_REASONS = {  # NVML's clock event reasons that slow a GPU down, without "idle" and clocks that the user has set
    0x4: "SwPowerCap",
    0x8: "HwSlowdown",
    0x10: "SyncBoost",
    0x20: "SwThermalSlowdown",
    0x40: "HwThermalSlowdown",
    0x80: "HwPowerBrakeSlowdown",
    0x100: "DisplayClockSetting",
}


@cache
def pci_address(ordinal: int, library: str = "libcuda.so.1") -> str | None:
    """The PCI address of the GPU that CUDA calls `ordinal` in this process, or None where CUDA does not say.

    CUDA itself has applied CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER, in every form that they may have. NVML ignores both, so
    its indices mean other GPUs.
    """
    device, address = ctypes.c_int(), ctypes.create_string_buffer(32)
    try:
        cuda = ctypes.CDLL(library)
        failed = (
            cuda.cuInit(0)  # does nothing in a process whose backend has done it
            or cuda.cuDeviceGet(ctypes.byref(device), ordinal)
            or cuda.cuDeviceGetPCIBusId(address, len(address), device)
        )
    except (OSError, AttributeError):  # no such library, or none of CUDA's
        return None
    # NVML writes the domain with eight digits, CUDA with four.
    return None if failed else address.value.decode().lower().rjust(len("00000000:01:00.0"), "0")


class Gpu:
    """A GPU at a PCI address, whose readings are None where the board or the driver lacks them.

    Raises the reason where NVML cannot speak for this GPU: there is no NVML, no address, or the backend has a MIG slice.
    """

    def __init__(self, address: str | None):
        import pynvml

        if address is None:
            raise LookupError("CUDA does not report which GPU the backend uses")
        self._nvml = pynvml
        pynvml.nvmlInit()
        self._handle = pynvml.nvmlDeviceGetHandleByPciBusId(address)
        if (self._read("nvmlDeviceGetMigMode") or [0])[0] == 1:  # then CUDA computes on a slice, never on the whole
            raise LookupError("the backend uses a MIG slice, and NVML measures the whole board")

    def _read(self, function: str, *arguments):
        try:
            return getattr(self._nvml, function)(self._handle, *arguments)
        except (self._nvml.NVMLError, AttributeError):  # the driver or this nvidia-ml-py does not have it
            return None

    def name(self) -> str | None:
        """The name of the board."""
        name = self._read("nvmlDeviceGetName")
        return name.decode() if isinstance(name, bytes) else name  # bytes from an nvidia-ml-py before version 12

    def power(self) -> Callable[[], tuple[float | None, float | None]]:
        """Return a function that reads watts and the counter of joules, each only if it worked the first time.

        That function raises where one has stopped working, because the energy since then is unknown.
        """
        names = ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetTotalEnergyConsumption")
        watts, joules = [getattr(self._nvml, name) if self._read(name) is not None else None for name in names]
        if watts is None and joules is None:
            raise LookupError("NVML reads neither the power nor the energy of this GPU")
        handle = self._handle
        return lambda: (watts(handle) / 1e3 if watts else None, joules(handle) / 1e3 if joules else None)

    def utilization_percent(self) -> float | None:
        """Share of the time in which a kernel was running."""
        rates = self._read("nvmlDeviceGetUtilizationRates")
        return None if rates is None else rates.gpu

    def temperature_c(self) -> float | None:
        """Temperature of the chip."""
        return self._read("nvmlDeviceGetTemperature", getattr(self._nvml, "NVML_TEMPERATURE_GPU", 0))

    def mhz(self) -> float | None:
        """Clock of the streaming multiprocessors."""
        return self._read("nvmlDeviceGetClockInfo", getattr(self._nvml, "NVML_CLOCK_SM", 1))

    def throttle_reasons(self) -> list[str] | None:
        """Those of THROTTLE_REASONS that slow the GPU right now."""
        bits = self._read("nvmlDeviceGetCurrentClocksEventReasons")
        if bits is None:  # the name in drivers before 535
            bits = self._read("nvmlDeviceGetCurrentClocksThrottleReasons")
        return None if bits is None else [name for bit, name in THROTTLE_REASONS.items() if bits & bit]

    def other_processes(self) -> int | None:
        """Number of processes that compute on the GPU, without this one.

        In a container NVML may give the host's process numbers, among which this process cannot find itself. One of the
        listed processes is this one all the same. An empty list hides it, and says nothing about others.
        """
        processes = self._read("nvmlDeviceGetComputeRunningProcesses")
        return len({process.pid for process in processes}) - 1 if processes else None
