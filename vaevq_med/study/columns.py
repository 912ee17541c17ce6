"""The columns that tables can have."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        name: of the figure in the records and in the CSV.
        title: what readers see.
        digits: after the point.
        scale: what the recorded value is multiplied by, for readers.
        varies: whether seeds can differ in it.
    """

    name: str
    title: str
    digits: int
    scale: float = 1.0
    varies: bool = True

    def show(self, value: float) -> str:
        """A value for a reader."""
        return f"{value * self.scale:,.{self.digits}f}"


COLUMNS = (
    Column("psnr", "PSNR (dB)", 2),
    Column("ssim", "SSIM", 4),
    Column("rfid", "rFID", 2),
    Column("lpips", "LPIPS", 4),
    Column("utilization", "Utilization (%)", 1, 100),
    Column("perplexity", "Perplexity", 0),
    Column("bits_per_position", "Bits per position", 2, varies=False),
    Column("bits_per_pixel", "Bits per pixel", 3, varies=False),
    Column("parameters", "Parameters (M)", 2, 1e-6, varies=False),
    Column("images_per_second", "Training images/s", 1),
    Column("peak_memory_bytes", "Peak memory (GB)", 2, 1e-9),
)
GENERATION_COLUMNS = (
    Column("gfid", "gFID", 2),
    Column("precision", "Precision", 3),
    Column("recall", "Recall", 3),
    Column("inception_score", "Inception score", 2),
    Column("memorized_feature", "Memorized, features (%)", 1, 100),
    Column("memorized_pixel", "Memorized, pixels (%)", 1, 100),
    Column("parameters", "Parameters (M)", 2, 1e-6, varies=False),
    Column("images_per_second", "Training images/s", 1),
    Column("n", "N", 0, varies=False),
)
BY_NAME = {column.name: column for column in (*COLUMNS, *GENERATION_COLUMNS)}
