"""Several machines in one table, in the forms of KOALA's (models x hardware) and LCM-LoRA's (hardware x steps)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diffship.benchmarks.measure.record import Results
from diffship.benchmarks.report import published
from diffship.benchmarks.report.table import DASH, Table
from diffship.benchmarks.report.tables import cases, digits, labelled
from diffship.core.errors import ConfigError
from diffship.core.registry import RUNNERS

OUT_OF_MEMORY = "OOM"
MEASURED = "measured"
LCM_STEPS = (4, 25)
REDUCED = ("bk-", "hybrid", "koala", "ssd-1b", "vega", "emoji")


@dataclass(frozen=True)
class Cell:
    """A whole image on one machine: seconds and GB, or the status that it has instead."""

    origin: str
    model: str
    hardware: str
    size: int | None
    steps: int | None
    seconds: float | None
    memory_gb: float | None
    status: str = "ok"

    def text(self, memory: bool) -> str:
        """`9.65 s / 10.4 GB`."""
        if self.seconds is None:
            return OUT_OF_MEMORY if self.status in ("ok", OUT_OF_MEMORY) else self.status
        as_printed = "{:g}".format if self.origin != MEASURED else digits
        room = "" if self.memory_gb is None or not memory else f" / {as_printed(self.memory_gb)} GB"
        return f"{as_printed(self.seconds)} s{room}"


RowOf = Callable[[Cell], tuple[str, ...]]
ColumnOf = Callable[[Cell], str]


def cells_of(results: Sequence[Results]) -> list[Cell]:
    """The images of one at a time in every file, drawn by our engines; the runner belongs to the hardware, as the GPU's
    software does.

    Raises:
        ConfigError: two files say different things of the same model, runner, steps and machine.
    """
    found: dict[tuple[object, ...], Cell] = {}
    for file in results:
        for metrics in cases(file.rows).values():
            median = metrics.get("image_seconds_p50")
            if median is None or median.conditions.get("batch") != 1:
                continue
            conditions = median.conditions
            if conditions["runner"] not in RUNNERS:
                continue  # other toolchains have tables of their own: these compare models and machines
            memory = metrics.get("peak_device_bytes") or metrics.get("peak_host_bytes")
            gigabytes = None if memory is None or memory.value is None else memory.value / 1e9
            place = f"{file.hardware}, {conditions['runner']}, {conditions['precision']}"
            size, steps = int(conditions["size"]), int(conditions["steps"])
            cell = Cell(MEASURED, labelled(conditions), place, size, steps, median.value, gigabytes, median.status)
            key = (cell.model, place, size, steps)
            if found.setdefault(key, cell) != cell:
                raise ConfigError(f"two files measure {cell.model}, {steps} steps, on {place}; merge one of them")
    return list(found.values())


def koala_form(results: Sequence[Results]) -> Table:
    """Rows: model with size and steps. Columns: hardware. Cells: seconds and memory, OOM included."""
    theirs = [_cell(entry) for entry in published.koala()]
    return _grid(cells_of(results) + theirs, ("model", "where from"), _model_row, lambda cell: cell.hardware, True)


def lcm_form(results: Sequence[Results]) -> Table:
    """Rows: hardware. Columns: model at 4 and at 25 steps; whole models, not their reductions."""
    ours = [cell for cell in cells_of(results) if cell.steps in LCM_STEPS and not _reduced(cell.model)]
    theirs = [_cell(entry) for entry in published.lcm_lora()]

    def column(cell: Cell) -> str:
        return f"{cell.model}, {_size(cell)}, {_steps(cell)}"

    return _grid(ours + theirs, ("hardware", "where from"), _hardware_row, column, False)


def _reduced(model: str) -> bool:
    return any(word in model.lower() for word in REDUCED)


def merged(results: Sequence[Results]) -> dict[str, Table]:
    """Both forms, by name. Raises ConfigError if no file holds a whole image."""
    if not cells_of(results):
        raise ConfigError("none of these files holds a whole image; measure with --parts image")
    return {"KOALA's form": koala_form(results), "LCM-LoRA's form": lcm_form(results)}


def _grid(cells: list[Cell], head: tuple[str, ...], row_of: RowOf, column_of: ColumnOf, memory: bool) -> Table:
    columns = list(dict.fromkeys(column_of(cell) for cell in cells))
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for cell in cells:
        rows.setdefault(row_of(cell), {})[column_of(cell)] = cell.text(memory)
    lines = [(*key, *(found.get(column, DASH) for column in columns)) for key, found in rows.items()]
    origins = sorted({cell.origin for cell in cells if cell.origin != MEASURED})
    return Table((*head, *columns), tuple(lines), tuple(f"Published rows: {origin}." for origin in origins))


def _model_row(cell: Cell) -> tuple[str, ...]:
    return (f"{cell.model}, {_size(cell)}, {_steps(cell)}", _where(cell))


def _hardware_row(cell: Cell) -> tuple[str, ...]:
    return (cell.hardware, _where(cell))


def _where(cell: Cell) -> str:
    return MEASURED if cell.origin == MEASURED else "published"


def _size(cell: Cell) -> str:
    return f"{cell.size} px"


def _steps(cell: Cell) -> str:
    return "steps not stated" if cell.steps is None else f"{cell.steps} steps"


def _cell(entry: published.Published) -> Cell:
    place = (entry.model, entry.hardware, entry.size, entry.steps, entry.seconds, entry.memory_gb)
    return Cell(entry.source, *place, "ok" if entry.seconds is not None else OUT_OF_MEMORY)
