"""Numbers that are not finite in a run: steps left out are noted, and where the run stops, its sound weights are saved.

The optimizer leaves a step out, on all ranks, rather than write such numbers into the weights
(:mod:`megatron_hyperp.optim.soundness`). So the fp32 weights that it holds are sound at any time, and can be saved when
the run gives up, whether or not ``--save-interval`` is set.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hyperp.errors import UsageError
from megatron_hyperp.optim.soundness import STATE, WEIGHT, Fault, find_fault

if TYPE_CHECKING:
    from megatron_hyperp.training.loop import Trainer

SKIPS_IN_A_ROW = 20


def check_loaded(trainer: Trainer, folder: Path) -> None:
    """See that what was loaded is finite; a collective call.

    Raises:
        UsageError: it is not; the tensor is named.
    """
    if fault := find_fault(trainer.optimizer):
        raise UsageError(
            f"the checkpoint {folder}: {fault.text}; name an older one with --load, or --load nothing",
            same_on_all_ranks=True,
        )


class Divergence:
    """Watches the steps of a run. All calls are collective.

    Args:
        trainer: the run.
        last_checkpoint: that it resumed from; None: there is none to go back to.
    """

    def __init__(self, trainer: Trainer, last_checkpoint: Path | None) -> None:
        self._trainer = trainer
        self._last_checkpoint = last_checkpoint
        # The last one that was saved after a step that moved the weights, or loaded.
        self._last_moved = last_checkpoint
        self._in_a_row = 0
        # Whether this process has moved the weights.
        self._moved = False

    def saved(self, folder: Path) -> None:
        """Note a checkpoint to go back to."""
        self._last_checkpoint = folder
        if not self._in_a_row:
            self._last_moved = folder

    def check(self) -> None:
        """See that the last step met sound weights; call before the iteration is counted.

        Raises:
            UsageError: the optimizer's state, or the model's weights, are not finite; the tensor is named.
        """
        fault = self._trainer.optimizer.fault
        if fault is None or fault.kind not in (STATE, WEIGHT):
            return
        iteration = self._trainer.progress.iteration
        line = f"{fault.text}, found in iteration {iteration + 1}"
        self._trainer.writer.event(iteration, "corrupt", line)
        raise UsageError(f"{line}; {self._way_back(fault)}", same_on_all_ranks=True)

    def _way_back(self, fault: Fault) -> str:
        """Return how a run with damaged weights can continue.

        Where only the model's copy of the weights is damaged, the optimizer's are those before this iteration.
        """
        again = "and without that node if this happens twice"
        if self._last_checkpoint is not None:
            return f"nothing of it was saved: start again from {self._last_checkpoint}, {again}"
        if fault.kind == WEIGHT and self._trainer.saver is not None:
            self._trainer.optimizer.rewrite_weights()
            done = self._rescue()
            return f"{done or f'the weights without it are saved in {self._last_checkpoint}'}: start again, {again}"
        return "nothing was saved before: start again, with --save and --save-interval"

    def count(self) -> None:
        """Note it if the last step was left out; call when the iteration is counted.

        Raises:
            UsageError: it was the last of ``SKIPS_IN_A_ROW``; with ``--save``, the weights before them are saved.
        """
        trainer, fault = self._trainer, self._trainer.optimizer.fault
        if fault is None:
            self._in_a_row, self._moved = 0, True
            return
        self._in_a_row += 1
        iteration = trainer.progress.iteration
        trainer.console.print(f"iteration {iteration} moved no weights: {fault.text}", important=True)
        trainer.writer.event(iteration, "skipped", fault.text)
        if self._in_a_row < SKIPS_IN_A_ROW:
            return
        raise UsageError(
            f"{SKIPS_IN_A_ROW} steps in a row had a non-finite gradient or update, up to iteration {iteration} (the"
            f" last: {fault.text}); {self._way_on()}",
            same_on_all_ranks=True,
        )

    def _way_on(self) -> str:
        """Save what the last step that was taken left, and return how to continue."""
        before, other = self._last_moved, "with a lower --lr or other data"
        # Where nothing has moved since the start, there is nothing new to save.
        if not self._moved or self._trainer.saver is None:
            return f"resume from an earlier checkpoint, {other}"
        if (failure := self._rescue()) is not None:
            return failure
        further = f"--load {before} and another --save" if before else "a new run"
        return (
            f"the weights before them are saved in {self._last_checkpoint}: the same command continues from there, with"
            f" the data that follow; if it stops again, go back further: {further}, {other}"
        )

    def _rescue(self) -> str | None:
        """Save where the run stands; return why this failed, if it did."""
        trainer = self._trainer
        try:
            with trainer.phases.phase("checkpoint"):
                trainer.rescue()
        except UsageError as error:
            return f"the weights before that cannot be saved ({error})"
        return None
