"""Read weights from the checkpoint's shards to the device, and prefetch the next ones during computation.

For the CPU the system prefetches the pages into its own cache, without a copy. For a GPU a background thread copies the
tensors to pinned memory: at most one layer's weights in host memory, beside the one on the device.
"""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from a3cli.models.checkpoint import Checkpoint, check_finite
from a3cli.work.machine import Machine


class Weights:
    """A checkpoint's tensors, checked, in their stored dtype on the CPU: mapped, or pinned if prefetched for a GPU."""

    def __init__(self, source: Checkpoint, machine: Machine) -> None:
        self._source, self._copies = source, machine.copies
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="a3-weights")
        self._coming: dict[str, Future[torch.Tensor]] = {}

    def prefetch(self, tensors: Iterable[str]) -> None:
        """Start reading the next tensors. Missing tensors are reported by `read`."""
        for tensor in tensors:
            if tensor in self._source.tensors and tensor not in self._coming:
                if self._copies:
                    self._coming[tensor] = self._thread.submit(self._fetch_pinned, tensor)
                else:
                    self._thread.submit(self._source.read_ahead, tensor)

    def read(self, tensor: str) -> torch.Tensor:
        """Return one tensor. Raises A3Error if it is missing, unreadable or not finite."""
        coming = self._coming.pop(tensor, None)
        return self._fetch(tensor) if coming is None else coming.result()

    def _fetch(self, tensor: str) -> torch.Tensor:
        value = self._source.read(tensor)
        check_finite(value, tensor, self._source.name)
        return value

    def _fetch_pinned(self, tensor: str) -> torch.Tensor:
        value = self._fetch(tensor)
        return value.pin_memory() if torch.cuda.is_available() else value
