"""What two processes that train together check of the watching."""

import dataclasses

import deepspeed
import pytest
import torch
import torch.distributed as dist

from declip_shards import DeclipError
from declip_train import extension
from declip_train.engine import TrainEngine
from declip_train.loader import BatchLoader
from declip_train.online_eval import OnlineEvaluation
from declip_train.samples import load_samples
from declip_train.settings import TrainSettings


def check(process, processes, folder, data, pictures):
    """Evaluate together and alone; then train on a batch that is bad on process 1 alone."""
    from pathlib import Path

    extension.use_prebuilt()
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=process, world_size=processes
    )
    deepspeed.init_distributed(verbose=False, auto_mpi_discovery=False)
    extension.release_shared_memory()
    settings = TrainSettings(
        model="test", method="clip", global_batch_size=24, warmup_steps=2, max_steps=9,
        augmentation="light", evaluate_every_steps=4, evaluate_data=pictures, num_ranks=2,
        log_every_steps=1, zero_stage=2,
    )  # fmt: skip
    samples = load_samples(data, selection="default")
    engine = TrainEngine(settings, 9, folder=Path(folder), keys_of=samples.keys_of)
    evaluation = OnlineEvaluation(
        settings, num_steps=9, device=torch.device("cpu"), num_threads=1, say=print
    )
    together = evaluation.run(engine.module)
    # What no other process takes part in: all pictures are this one's, and sums are its own.
    evaluation.rank, evaluation.world_size = 0, 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", lambda tensor: None)
        alone = evaluation.run(engine.module)
    assert together == pytest.approx(alone)
    loader = BatchLoader(samples, settings, process, processes)
    first = engine.train_step(loader.make_batch(0)).watched
    everyone = [first] * processes
    dist.all_gather_object(everyone, first)
    assert everyone == [first] * processes
    batch = loader.make_batch(1)
    keys = [samples.keys_of(BatchLoader(samples, settings, 1, 2).local_indices(1).tolist())[3]]
    if process == 1:
        images = batch.images.clone()
        images[0, 3, 0, 0, 0] = float("nan")
        batch = dataclasses.replace(batch, images=images)
    with pytest.raises(DeclipError) as caught:
        engine.train_step(batch)
    told = str(caught.value)
    assert "at step 1 on process 1: the features of its samples" in told, told
    assert f"samples {keys[0]!r} are not finite" in told, told
    dist.destroy_process_group()
