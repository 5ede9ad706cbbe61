"""Two trainings of one model side by side for hours: one is let be, the other is killed or stopped every few minutes.

The first tells whether memory, threads or open files grow; the second must write the first one's losses, bit for bit.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

# The benchmarks are no installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.corpus import write_corpus
from benchmarks.soak.judging import RESTARTED, UNDISTURBED, Sample, judge
from megatron_hyperp.errors import UsageError, run_command

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 512
RANKS = 2
# So many that neither reaches the end: both follow the first part of one schedule.
ITERATIONS = 200_000
# A mixture of experts on two expert-parallel ranks; all that is written, measured and evaluated beside the training.
RECIPE = f"""\
model: {{num_layers: 2, hidden_size: 64, num_attention_heads: 2, seq_length: 64}}
moe: {{num_experts: 4, moe_router_topk: 2, moe_ffn_hidden_size: 64}}
parallel: {{expert_model_parallel_size: 2}}
training: {{micro_batch_size: 8, global_batch_size: 16, train_iters: {ITERATIONS}, eval_interval: 500, eval_iters: 4}}
checkpoint: {{save_interval: 250, keep: 2, async_save: true}}
logging: {{log_interval: 1, stability_interval: 50, quiet: true}}
"""
# How the second run is disturbed, in turns.
FAULTS = ("kill a rank", "stop", "kill all")
SECONDS_TO_STOP = 300


@dataclass
class Training:
    """A run under the launch script, which torchrun restarts after a rank was killed.

    Attributes:
        folder: of the run.
        recipe: its config file.
        data: prefix of its corpus.
        process: the launcher.
    """

    folder: Path
    recipe: Path
    data: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the launcher; it goes on from the last checkpoint."""
        words = ["bash", "examples/torchrun/single_node.sh", str(self.recipe)]
        words += ["--data-path", str(self.data), "--tokenizer-model", f"null:{VOCABULARY}"]
        settings = {"NPROC_PER_NODE": RANKS, "LAYOUT": "none", "RUN_DIR": self.folder, "MAX_RESTARTS": 10_000}
        settings["SHUTDOWN_TIMEOUT"] = SECONDS_TO_STOP - 20
        temporary = self.folder.with_name(f"tmp-{self.folder.name}")
        temporary.mkdir(parents=True, exist_ok=True)
        environ = {**os.environ, "PYTHON": sys.executable, "TMPDIR": str(temporary), "CUDA_VISIBLE_DEVICES": ""}
        environ |= {name: str(value) for name, value in settings.items()}
        with self.folder.with_suffix(".log").open("ab") as log:
            self.process = subprocess.Popen(words, cwd=ROOT, env=environ, stdout=log, stderr=log)

    def ranks(self) -> list[psutil.Process]:
        """Return the processes of the ranks, by rank; those that torchrun is just starting are left out."""
        found: dict[int, psutil.Process] = {}
        with suppress(psutil.Error):
            for child in psutil.Process(self.process.pid if self.process else -1).children():
                with suppress(psutil.Error):
                    if "RANK" in child.environ() and "examples/pretrain_gpt.py" in child.cmdline():
                        found[int(child.environ()["RANK"])] = child
        return [found[rank] for rank in sorted(found)]

    def stop(self) -> None:
        """Ask for a checkpoint and the end, as a scheduler does.

        Raises:
            UsageError: the launcher is not done in time.
        """
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            raise UsageError(f"{self.folder} did not stop within {SECONDS_TO_STOP} s; see {self.folder}.log") from None

    def disturb(self, fault: str) -> None:
        """Do one of ``FAULTS``; the run goes on."""
        assert self.process is not None
        ranks = self.ranks()
        if fault == "kill a rank" and ranks:
            random.choice(ranks).kill()  # nosec B311
        elif fault == "kill all":
            self.end()
            self.start()
        else:
            self.stop()
            self.start()

    def end(self) -> None:
        """Kill the launcher and its ranks."""
        assert self.process is not None
        for process in [self.process, *self.ranks()]:
            with suppress(psutil.Error):
                process.kill()
        self.process.wait()

    def samples(self, minutes: float) -> Iterator[Sample]:
        """Yield what each rank holds now."""
        for rank, process in enumerate(self.ranks()):
            with suppress(psutil.Error), process.oneshot():
                memory = process.memory_info()
                held = round(memory.rss / 2**20, 2), round(memory.shared / 2**20, 2)
                counts = process.num_threads(), process.num_fds(), len(process.children())
                yield Sample(minutes, self.folder.name, rank, process.pid, *held, *counts)


def main(argv: list[str]) -> int:
    """Run the soak, or judge an earlier one again; return 0 if nothing grew and nothing differed."""
    options = _parse(argv)
    output = Path(options.output)
    if not options.judge_only:
        soak(output, minutes=options.minutes, between=options.restart_minutes)
    return judge(output)


def soak(output: Path, *, minutes: float, between: float) -> None:
    """Train both ways, sampling what the ranks hold every few seconds into ``samples.csv``.

    Args:
        output: a new folder.
        minutes: how long.
        between: minutes from one fault to the next, on average.

    Raises:
        UsageError: the folder is there, or a launcher ended by itself.
    """
    if output.exists():
        raise UsageError(f"--output {output} is there already; name a new folder, or give --judge-only")
    output.mkdir(parents=True)
    recipe, data = output / "soak.yaml", write_corpus(output, VOCABULARY)
    recipe.write_text(RECIPE, encoding="utf-8")
    trainings = [
        Training((output / name).resolve(), recipe.resolve(), Path(data).resolve()) for name in (UNDISTURBED, RESTARTED)
    ]
    picked, faults = random.Random(0), itertools.cycle(FAULTS)  # nosec B311
    started = time.monotonic()

    def passed() -> float:
        return (time.monotonic() - started) / 60

    with ExitStack() as stack, (output / "samples.csv").open("w", newline="") as table:
        writer = csv.DictWriter(table, list(Sample.__dataclass_fields__))
        writer.writeheader()
        for training in trainings:
            training.start()
            stack.callback(training.end)
        due = between
        while passed() < minutes:
            for training in trainings:
                if training.process is None or training.process.poll() is not None:
                    raise UsageError(f"{training.folder} ended by itself; see {training.folder}.log")
                writer.writerows(asdict(sample) for sample in training.samples(round(passed(), 3)))
            table.flush()
            if passed() >= due:
                fault = next(faults)
                print(f"minute {passed():.1f}: {fault}", flush=True)
                trainings[1].disturb(fault)
                due += picked.uniform(0.5, 1.5) * between
            time.sleep(5)
        for training in trainings:
            training.stop()


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog="--debug shows the traceback of an error.")
    parser.add_argument("--minutes", type=float, default=120, help="how long [120]")
    parser.add_argument("--restart-minutes", type=float, default=4, help="from fault to fault, on average [4]")
    parser.add_argument("--output", default="runs/soak", help="a new folder [runs/soak]")
    parser.add_argument("--judge-only", action="store_true", help="judge what an earlier soak has left there")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
