"""A rolling cache: the samples of the plan's next steps are encoded, trained on and thrown away.

Nobody stores the text features of 800 million samples (3 PB); the plan knows which come next.
"""

import os
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from lensmini.data.collate import Sample
from lensmini.data.features import Encode, FeatureStore, Precision, write_features

__all__ = ["RollingFeatures"]

_WINDOW = re.compile(r"window-(\d{8})")


class RollingFeatures:
    """Features of the steps ahead, a window of steps at a time.

    Window w holds the samples of steps ``w * steps`` to ``(w + 1) * steps - 1``, each once. Of windows behind the step
    that was prepared last nothing is left; at most two are on disk, three with ``ahead``.

    Args:
        numbers_of: the sample numbers of a step, on this process; a pure function.
        encode: gives the samples of numbers, of any shapes; in which batches it is asked must not matter.
        folder: where windows are kept; of this process alone.
        steps: of a window.
        precision: as of :func:`lensmini.data.features.write_features`.
        batch_size: samples that ``encode`` gets at once.
        ahead: encode the next window in a thread meanwhile; its errors come up at the next call of :meth:`prepare`.

    Raises:
        ValueError: if ``steps`` is not positive.

    Example:
        >>> import tempfile, torch
        >>> encode = lambda numbers: [Sample(n, torch.full((1, 2, 2), float(n)), torch.zeros(3, 2, 4)) for n in numbers]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rolling = RollingFeatures(lambda step: [step % 3, 7], encode, folder, steps=2)
        ...     rolling.prepare(0)
        ...     [sample.number for sample in rolling.read([7, 1])], rolling.windows()
        ([7, 1], [0])
    """

    def __init__(
        self,
        numbers_of: Callable[[int], Sequence[int]],
        encode: Encode,
        folder: str | os.PathLike[str],
        *,
        steps: int = 100,
        precision: Precision = "bf16",
        batch_size: int = 64,
        ahead: bool = False,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps: expected a positive integer, got {steps}")
        self.numbers_of, self.encode, self.folder = numbers_of, encode, Path(folder)
        self.steps, self.batch_size, self.ahead = steps, batch_size, ahead
        self.precision: Precision = precision
        self._current: FeatureStore | None = None
        self._window = -1
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def prepare(self, step: int) -> None:
        """Make the samples of a step readable, and forget windows behind it.

        Args:
            step: from 0; going back encodes again.
        """
        window = step // self.steps
        if window == self._window:
            return
        self._join()
        self._current = self._make(window)
        self._window = window
        for old in self.windows():
            if old not in (window, window + 1):
                shutil.rmtree(self._path(old))
        if self.ahead:
            self._thread = threading.Thread(target=self._make_ahead, args=(window + 1,), daemon=True)
            self._thread.start()

    def read(self, numbers: Sequence[int]) -> list[Sample]:
        """The samples of numbers of the window that was prepared.

        Raises:
            ValueError: if nothing was prepared, or a number is of no step of the window.
        """
        if self._current is None:
            raise ValueError("numbers: expected prepare(step) first")
        return self._current.read(numbers)

    def windows(self) -> list[int]:
        """Numbers of the windows on disk."""
        if not self.folder.is_dir():
            return []
        found = (_WINDOW.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match.group(1)) for match in found if match)

    def close(self) -> None:
        """Wait for the thread."""
        self._join()

    def _path(self, window: int) -> Path:
        return self.folder / f"window-{window:08d}"

    def _make(self, window: int) -> FeatureStore:
        steps = range(window * self.steps, (window + 1) * self.steps)
        numbers = sorted({int(number) for step in steps for number in self.numbers_of(step)})
        # Shapes are not known before encoding: every sample is a group of its own shape, found on the way.
        shapes: dict[tuple[int, ...], list[int]] = {}
        samples: dict[int, Sample] = {}
        path = self._path(window)
        if (path / "features.json").exists():
            store = FeatureStore(path)
            # A run that went on with other processes has other samples in a window of that name.
            if store.numbers == numbers:
                return store
        for first in range(0, len(numbers), self.batch_size):
            for sample in self.encode(numbers[first : first + self.batch_size]):
                samples[sample.number] = sample
                shapes.setdefault(tuple(sample.latents.shape), []).append(sample.number)
        shutil.rmtree(path, ignore_errors=True)
        write_features(
            [shapes[shape] for shape in sorted(shapes)],
            lambda chosen: [samples[number] for number in chosen],
            path,
            precision=self.precision,
            num_per_shard=2**31,
        )
        return FeatureStore(path)

    def _make_ahead(self, window: int) -> None:
        try:
            self._make(window)
        except BaseException as error:  # handed to the trainer
            self._error = error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
