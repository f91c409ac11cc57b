"""What watches over a training: seeds, a finite loss, freed memory, signals."""

import ctypes
import math
import os
import signal
import sys
import threading
from collections.abc import Callable

import keras
import numpy as np

from edgebench.cli import PROGRAM, Diverged, Interrupted
from edgebench.datasets import ShuffledBatches
from edgebench.device import seed_generators

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DIVERGED_ADVICE = "lower --learning-rate, or take another --dtype-policy"


class EpochSeeds(keras.callbacks.Callback):
    """Gives every epoch an order of the images and a seed of its own, the same after a measurement and in a resumed run.

    The seeds of Keras' layers are variables of the model.
    """

    def __init__(self, seed: int, batches: ShuffledBatches):
        super().__init__()
        self.seed, self.batches = seed, batches

    def on_epoch_begin(self, epoch, logs=None):
        self.batches.shuffle(self.seed, epoch)
        seed_generators((self.seed + 1_000_003 * (epoch + 1)) % 2**32)


def require_finite(epoch: int, logs: dict, predict: Callable[[], np.ndarray] | None = None) -> None:
    """Raise Diverged if the loss of this epoch, counted from 0, is NaN or infinite: its weights are then no record.

    The loss of an epoch is a running mean, in which a NaN stays. (keras.callbacks.TerminateOnNaN reads the loss of every
    step, for which JAX and torch wait, and ends `fit` without an error.) Without validation, the answers of `predict` show
    whether the last step has spoiled the weights, after its loss was computed.
    """
    for name, meaning in (("loss", "the loss"), ("val_loss", "the validation loss")):
        if not math.isfinite(logs.get(name, 0.0)):
            raise Diverged(f"{meaning} is not a finite number in epoch {epoch + 1}; {DIVERGED_ADVICE}")
    if predict and "val_loss" not in logs and not np.isfinite(predict()).all():
        raise Diverged(f"the model's answers are not finite numbers after epoch {epoch + 1}; {DIVERGED_ADVICE}")


class ReturnFreedMemory(keras.callbacks.Callback):
    """Returns the freed memory that glibc keeps (see process.py) to the kernel, once, after the first epoch.

    Allocations that outlive the first epoch fragment the heap otherwise.
    """

    _is_done = False

    def on_epoch_end(self, epoch, logs=None):
        if not self._is_done and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        self._is_done = True


class StopSignals(keras.callbacks.Callback):
    """Lets SIGINT, SIGTERM and SIGHUP end the training after the current step, and everything else at once.

    As a context manager it handles the signals; as a callback it knows when a step is under way. A second signal ends the
    process at once. A signal that whoever started the process lets it ignore, as nohup does with SIGHUP, stays ignored.
    """

    _received: int | None = None
    _is_in_step = _is_finishing = False

    def set_model(self, model):
        super().set_model(model)
        # Not self.model, as that makes Keras on JAX collect the variables, which a step under way has just taken over.
        self._fitted = model

    def __enter__(self):
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():  # no other thread may handle signals
            heeded = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
            self._handlers = {number: signal.signal(number, self._receive) for number in heeded}
        return self

    def __exit__(self, *exception):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def finish(self) -> None:
        """From now on the first signal changes nothing, because the results are being written."""
        self._is_finishing = True

    def _receive(self, number, frame):
        if self._received is not None:
            os._exit(128 + number)
        self._received = number
        print(f"\n{PROGRAM}: {signal.Signals(number).name}: stopping; once more ends it at once", file=sys.stderr)
        if self._is_in_step:
            self._fitted.stop_training = True
        elif not self._is_finishing:
            raise Interrupted(number)

    def raise_if_received(self) -> None:
        """Raise Interrupted if a signal has come: the handler's own exception is lost if it is raised in a callback of XLA."""
        if self._received is not None:
            raise Interrupted(self._received)

    def on_epoch_begin(self, epoch, logs=None):
        self._is_in_step = True

    def on_test_begin(self, logs=None):  # the validation is not worth waiting for
        self.raise_if_received()
        self._is_in_step = False

    def on_test_end(self, logs=None):
        self._is_in_step = True

    def on_epoch_end(self, epoch, logs=None):
        self.raise_if_received()

    def on_train_end(self, logs=None):
        self._is_in_step = False
        self.raise_if_received()
