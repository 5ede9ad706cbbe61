"""What is in a checkpoint are the values of the moment it was asked for; what is not whole does not become one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hyperp.convert.storage import CheckpointReader
from megatron_hyperp.errors import UsageError
from megatron_hyperp.training import checkpointing, saving
from megatron_hyperp.training.checkpoint_folders import TRACKER, find_checkpoint
from megatron_hyperp.training.checkpointing import common_state
from tests.run_distributed import run_distributed
from tests.toy import EXPERTS, toy_config, write_corpus

TOY: dict[str, Any] = {"num_layers": 2, "train_iters": 4, "global_batch_size": 8, "micro_batch_size": 4}


def start(prefix: str, folder: Path, **settings: Any) -> Any:
    """Return a trainer that saves into a folder, on a rank whose process group is joined here."""
    from megatron_hyperp import device
    from megatron_hyperp.data.tokenizer import load_tokenizer
    from megatron_hyperp.training.loop import Trainer

    device.adapt_megatron()
    device.init_process_group(1)
    config = toy_config(prefix, folder, **TOY, save=str(folder / "ckpt"), **settings)
    config = config.resolve(world_size=torch.distributed.get_world_size())
    return Trainer(config, load_tokenizer(config.data.tokenizer_model or ""), None)


def tensors_of(trainer: Any) -> list[torch.Tensor]:
    """Return every tensor of this rank that a save reads: weights, masters and momenta."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    parts = trainer.chunks, trainer.optimizer
    state = checkpointing.sharded_state(*parts, with_random_state=False, with_fp8_state=False)
    held = (getattr(entry, "data", None) for entry in nested_values(state))
    return [data.detach() for data in held if isinstance(data, torch.Tensor)]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    return {str(slab): reader.read(slab) for slab in reader.slabs()}


def save_then_change(prefix: str, folder: Path, settings: dict[str, Any]) -> None:
    """Save while training waits; then save beside the training, and change everything when the call has returned."""
    trainer = start(prefix, folder, async_save=True, **settings)
    trainer.train()
    checkpoint = find_checkpoint(folder / "ckpt")
    assert checkpoint is not None
    expected = stored(checkpoint)
    trainer.progress.iteration += 1
    trainer.saver.save(trainer.progress)
    for tensor in tensors_of(trainer):
        tensor.fill_(7)
    trainer.saver.finish()
    checkpoint = find_checkpoint(folder / "ckpt")
    assert checkpoint is not None
    assert checkpoint.name == "iter_0000005"
    found = stored(checkpoint)
    assert found.keys() == expected.keys()
    wrong = [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])]
    assert not wrong, f"{len(wrong)} of {len(found)} were written later than asked for"


@pytest.mark.parametrize("experts", [{}, EXPERTS], ids=["dense", "experts"])
def test_a_save_beside_the_training_has_the_values_it_was_asked_for(tmp_path: Path, experts: dict[str, int]) -> None:
    settings = {**experts, "tensor_model_parallel_size": 2, "sequence_parallel": True}
    run_distributed(save_then_change, 2, write_corpus(tmp_path), tmp_path, settings)


def resume_from_an_object(prefix: str, folder: Path) -> None:
    """Save with the common state in both forms, take the file away, and load."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.utils import extract_sharded_base

    trainer = start(prefix, folder)
    begin = saving.begin_save

    def with_object(state: dict[str, Any], partial: Path) -> Any:
        common = extract_sharded_base(state)[1]
        return begin(state | {"common_state": ShardedObject("common_state", common, (1,), (0,))}, partial)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "begin_save", with_object)
        trainer.train()
    checkpoint = find_checkpoint(folder / "ckpt")
    assert checkpoint is not None
    common = common_state(checkpoint)
    expected = [tensor.clone() for tensor in tensors_of(trainer)]
    (checkpoint / "common.pt").unlink()
    assert common_state(checkpoint) == common
    for tensor in tensors_of(trainer):
        tensor.zero_()
    progress = checkpointing.load_checkpoint(trainer.config, checkpoint, trainer.chunks, trainer.optimizer)
    assert progress == trainer.progress
    assert all(map(torch.equal, tensors_of(trainer), expected))


def test_a_checkpoint_with_its_common_state_among_the_tensors_is_resumed(tmp_path: Path) -> None:
    """As Megatron-Core 0.19 writes it by itself."""
    run_distributed(resume_from_an_object, 1, write_corpus(tmp_path), tmp_path)


def save_with_a_loss(prefix: str, folder: Path, lost: str) -> None:
    """Lose a file while a checkpoint is written: it must not be announced, and not replace the one before."""
    trainer = start(prefix, folder)
    trainer.train()
    kept = find_checkpoint(folder / "ckpt")
    assert kept is not None
    begin, said = saving.begin_save, []

    def losing(state: dict[str, Any], partial: Path) -> Any:
        request = begin(state, partial)
        request.add_finalize_fn(lambda: (partial / lost).unlink(missing_ok=True))
        return request

    trainer.progress.iteration += 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "begin_save", losing)
        patch.setattr(trainer.saver, "_said", said.append)
        with pytest.raises(UsageError, match=f"is not complete \\({lost} is missing\\), and is not used; those saved"):
            trainer.saver.save(trainer.progress)
    assert not said
    assert find_checkpoint(folder / "ckpt") == kept
    assert (folder / "ckpt" / TRACKER).read_text() == "4\n"
    shutil.rmtree(folder / "ckpt")


@pytest.mark.parametrize("lost", ["common.pt", "__0_0.distcp"])
def test_a_save_that_is_not_whole_is_not_announced(tmp_path: Path, lost: str) -> None:
    run_distributed(save_with_a_loss, 1, write_corpus(tmp_path), tmp_path, lost)
