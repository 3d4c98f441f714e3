"""What the checks of a run found: a line for each thing that is right, and all problems in one error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.table import Column, Table
from rich.text import Text

from instructgpt_hf.config.settings import stage_settings
from instructgpt_hf.errors import InstructGPTError, Problems


class Finding(NamedTuple):
    """Something that a stage will use, and what is known of it."""

    stage: str
    what: str
    source: str
    found: str


class Report:
    """Findings and problems of all stages, in the order of the checks."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.problems = Problems("The run would stop at these; no model was loaded and nothing was written:")

    def found(self, stage: str, what: str, source: Any, found: str) -> None:
        """Add something that is right."""
        self.findings.append(Finding(stage, what, str(source), found))

    @contextlib.contextmanager
    def setting(self, stage: str, name: str, value: Any = None) -> Iterator[None]:
        """Turn an `InstructGPTError` inside the block into a problem of a setting, and go on behind the block.

        Args:
            stage: whose setting it is.
            name: of the setting, or of what is no setting of a recipe.
            value: of the setting, shown unless the error names it already.
        """
        try:
            yield
        except InstructGPTError as error:
            text = str(error).removeprefix(f"{stage}.yaml: ").removeprefix(f"{name}: ").replace("\n", "\n    ")
            shown = f"{name} = {value!r}" if value is not None and str(value) not in text else name
            place = f"{stage}.yaml" if name in stage_settings(stage) else stage
            problem = f"{place}: {shown}: {text}"
            if problem not in self.problems.items:
                self.problems.add(problem)

    def table(self) -> Table:
        """The findings as a table that fits a terminal of 80 columns."""
        columns = [Column("stage", no_wrap=True), Column("what", no_wrap=True), Column("source", overflow="fold")]
        table = Table(*columns, Column("found", overflow="fold"), box=None, pad_edge=False, header_style="bold")
        for finding in self.findings:
            table.add_row(*map(Text, finding))
        return table
