"""What full fine-tuning takes under DDP: by the plan, by the prediction, and by the allocator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoConfig

from pantheraml import FastLanguageModel, MultiGPUConfig, PantheraMLTrainingArguments
from pantheraml.devices import estimate as planner
from pantheraml.devices.estimate import Work, estimate
from pantheraml.devices.layout import Layout
from pantheraml.distributed.data_parallel import average_buckets, wrap_module
from pantheraml.distributed.strategies.held_reduction import count_launches, reduction_of
from pantheraml.models.precision import Precision
from pantheraml.models.state import get_state
from pantheraml.models.weight_sizes import measure_parts
from pantheraml.training.banner import predict_memory
from pantheraml.training.head import bind_head
from tests import tiny
from tests.distributed.ranks import run_ranks

TOKENS = 2
# Embedding and head so large that nothing takes more than their gradients.
SHAPE = dict(num_hidden_layers=3, hidden_size=64, intermediate_size=128, vocab_size=4000)
# Buckets of up to so many MiB: they are reduced one after the other, or all at once.
CAPS = {"launched": 1, "held": 8}
CASES = [(tied, way, passes) for tied in (True, False) for way in CAPS for passes in (1, 3)]


def measure(folders):
    """Of each case what was measured in the second step, which lays buckets out anew, and in the third; and what was
    predicted.
    """
    return {case: measure_one(folders[case[0]], *case[1:]) for case in CASES}


def measure_one(folder, way, passes):
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, full_finetuning=True, device_map="cpu"
    )
    args = PantheraMLTrainingArguments(
        output_dir=str(folder / "run"), report_to="none", bf16=False, ddp_bucket_cap_mb=CAPS[way],
        gradient_accumulation_steps=passes,
    )  # fmt: skip
    (predicted,) = predict_memory(model, args, TOKENS, 0).values()
    bind_head(model, get_state(model).patches)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        wrapped = DistributedDataParallel(
            model.train(), gradient_as_bucket_view=True, bucket_cap_mb=args.ddp_bucket_cap_mb
        )
        (count_launches if way == "launched" else average_buckets)(wrapped, None)
        reduction = reduction_of(wrapped)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        for _ in range(3):
            with record_function("step"):
                train_step(wrapped, reduction, optimizer, passes)
    buckets = sum(p.nbytes for p in model.parameters())
    return [buckets + peak for peak in peaks_of(profiled.profiler.kineto_results.events())[1:]], predicted


def peaks_of(events):
    """The most bytes that the allocator had given out in each step, beside those that were there before the first; not
    what gloo's threads let go of, which is not told.
    """
    steps = sorted((e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == "step")
    held, before, peaks = 0, 0, [0] * len(steps)
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        if event.start_ns() < steps[0][0]:
            before = held
        for number, (start, stop) in enumerate(steps):
            if start <= event.start_ns() <= stop:
                peaks[number] = max(peaks[number], held)
    return [peak - before for peak in peaks]


def train_step(model, reduction, optimizer, passes):
    ids = torch.arange(5, 5 + TOKENS)[None]
    for number in range(passes):
        with reduction.around(is_last=number == passes - 1):
            model(input_ids=ids, labels=ids, fused_lm_head=True).loss.backward()
    reduction.finish()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        tied: tiny.save_checkpoint(
            tmp_path_factory.mktemp("model"), "llama", tie_word_embeddings=tied, **SHAPE
        )
        for tied in (True, False)
    }


@pytest.fixture(scope="module")
def measured(folders):
    return run_ranks(2, measure, folders)[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_full_fine_tuning_takes_what_is_predicted(measured, case):
    peaks, predicted = measured[case]
    took = predicted.total - predicted.weights - predicted.trainable
    assert peaks == pytest.approx([took] * 2, rel=0.02)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_plan_is_the_prediction(folders, measured, monkeypatch, case):
    tied, way, passes = case
    predicted, config = measured[case][1], AutoConfig.from_pretrained(folders[tied])
    monkeypatch.setattr(planner, "ONE_BUCKET_BYTES", CAPS[way] * 2**20)
    parts = measure_parts(config, Precision("plain", torch.float32), full_finetuning=True, fused=False)
    parts = replace(parts, activations=replace(parts.activations, compute=0))  # float32, as on this CPU
    planned = estimate(parts, Layout("ddp", data=2), Work(TOKENS, passes))[0]
    bare = dict(weights=0, workspace=0, driver=0)  # of a GPU; and rotary angles
    assert replace(planned, **bare) == replace(predicted, **bare)


def wait_for_buckets():
    """Of the reductions of each of two steps, whether somebody had waited for all of them when the next one began."""
    waited, begun = [], []

    class Watched:
        def __init__(self, work):
            self.work, self.number = work, len(waited)
            waited.append(False)

        def get_future(self):
            return self.work.get_future()

        def wait(self):
            waited[self.number] = True
            return self.work.wait()

    reduce = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: Watched(reduce(*args, **kwargs))
    layers = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(3)))
    model = wrap_module(layers, MultiGPUConfig())
    for _ in range(3):
        model.register_forward_pre_hook(lambda *_: begun.append(list(waited)))
        model(torch.ones(1, 512)).sum().backward()
    return begun


def test_nobody_keeps_a_bucket_when_ddp_lays_them_out_anew():
    """NCCL does until somebody has waited for its work, and the next forward would have buckets twice."""
    for begun in run_ranks(2, wait_for_buckets):
        assert len(begun[-1]) > 2 and all(begun[-1])
