"""Loading and training on a GPU: every precision, every family with kernels on and off, host memory while loading."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from pantheraml import FastLanguageModel, PantheraMLTrainer, PantheraMLTrainingArguments
from pantheraml.models.fused import FusedRMSNorm
from tests import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

ROWS = Dataset.from_dict({"text": [tiny.TEXTS[i % 3] * (1 + i % 2) for i in range(16)]})
PRECISIONS = {
    "bf16": dict(load_in_16bit=True),
    "fp16": dict(load_in_16bit=True, dtype="float16"),
    "float32": dict(load_in_4bit=False, dtype="float32"),
    "4bit": dict(load_in_4bit=True),
    "8bit": dict(load_in_8bit=True),
    "full": dict(full_finetuning=True),
}


def arguments(folder, **kwargs):
    return PantheraMLTrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, **kwargs,
    )  # fmt: skip


@pytest.mark.promise("A2")
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_trains_saves_and_merges(tmp_path, precision, packing):
    # bitsandbytes' fast 4-bit product wants widths that are multiples of 64.
    llama = tiny.save_checkpoint(tmp_path / "base", intermediate_size=128)
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(llama), max_seq_length=128, **PRECISIONS[precision]
    )
    assert model.device.type == "cuda"
    if precision != "full":
        model = FastLanguageModel.get_peft_model(model, r=4)
    fp16 = precision == "fp16"
    args = arguments(tmp_path / "run", packing=packing, fp16=fp16, bf16=None if not fp16 else False)
    trainer = PantheraMLTrainer(model, args, train_dataset=ROWS, eval_dataset=ROWS, tokenizer=tokenizer)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(math.isfinite(entry["loss"]) for entry in logs)
    assert all(entry["grad_norm"] > 0 for entry in logs if math.isfinite(entry["grad_norm"]))
    assert math.isfinite(trainer.evaluate()["eval_perplexity"])
    assert trainer.get_model_memory_usage()["gpu_0"]["peak_allocated"] > 0

    model.save_pretrained_merged(tmp_path / "merged", tokenizer, save_method="merged_16bit")
    again, _ = FastLanguageModel.from_pretrained(
        str(tmp_path / "merged"), max_seq_length=128, load_in_16bit=True
    )
    FastLanguageModel.for_inference(again)
    ids = tokenizer("What is the capital", return_tensors="pt").input_ids.cuda()
    assert again.generate(ids, max_new_tokens=5, do_sample=False).shape[1] > ids.shape[1]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_kernels_on_and_off_agree(checkpoints, family):
    """float32, TF32 off: loss and every adapter gradient within 1e-5 of the largest, padded and dense batches."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 400, (2, 40), generator=generator).cuda()
    mask = torch.ones_like(ids)
    mask[1, 29:] = 0
    results = []
    for kernels in ("auto", "off"):
        eager = dict(attn_implementation="eager") if kernels == "off" else {}
        model, _ = FastLanguageModel.from_pretrained(
            str(checkpoints(family)),
            max_seq_length=64,
            load_in_4bit=False,
            dtype="float32",
            kernels=kernels,
            **eager,
        )
        assert any(isinstance(module, FusedRMSNorm) for module in model.modules()) == (kernels == "auto")
        model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                noise = torch.Generator().manual_seed(index)
                parameter.data.copy_(torch.randn(parameter.shape, generator=noise) * 0.1)
        for attention_mask in (None, mask):
            labels = ids if attention_mask is None else ids.masked_fill(mask == 0, -100)
            model.zero_grad()
            loss = model(input_ids=ids, attention_mask=attention_mask, labels=labels).loss
            loss.backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            results.append([loss.detach(), *[g.clone() for g in gradients]])
    for ours, theirs in zip(results[:2], results[2:], strict=True):
        largest = max(float(t.abs().max()) for t in theirs[1:])
        assert abs(float(ours[0] - theirs[0])) <= 1e-5 * float(theirs[0])
        assert (
            max(float((a - b).abs().max()) for a, b in zip(ours[1:], theirs[1:], strict=True))
            <= 1e-5 * largest
        )


LOAD = """
import json, sys, threading, time
import torch
from pantheraml import FastLanguageModel
import transformers, peft, bitsandbytes
torch.zeros(1, device="cuda"); torch.cuda.synchronize()
def read(name):
    for line in open("/proc/self/status"):
        if line.startswith(name): return int(line.split()[1]) / 2**20
before, peak, done = (read("VmRSS"), read("RssAnon")), [0.0, 0.0], False
def watch():
    while not done:
        peak[0] = max(peak[0], read("VmRSS")); peak[1] = max(peak[1], read("RssAnon")); time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
start = time.perf_counter()
model, _ = FastLanguageModel.from_pretrained(sys.argv[1], **json.loads(sys.argv[2]))
torch.cuda.synchronize(); seconds = time.perf_counter() - start
done = True; thread.join()
print("RESULT", json.dumps(dict(rss=peak[0] - before[0], anonymous=peak[1] - before[1], seconds=seconds,
                                gpu=torch.cuda.memory_allocated() / 2**30)))
"""


class Watch(TrainerCallback):
    """Makes every wait for the GPU an error, from the end of step 2 to that of step 5."""

    def on_step_end(self, args, state, control, **kwargs):
        torch.cuda.set_sync_debug_mode("error" if 2 <= state.global_step < 5 else "default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("ragged", [False, True])
def test_the_host_waits_for_the_gpu_where_it_logs_alone(tmp_path, family, accumulation, ragged):
    folder = tiny.save_checkpoint(tmp_path / "base", family)
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, load_in_16bit=True, use_gradient_checkpointing=False
    )
    model = FastLanguageModel.get_peft_model(model, r=4)
    ids = [list(range(5, 45 - (index % 7 if ragged else 0))) for index in range(80)]
    labels = [[-100] * (index % 3) + row[index % 3 :] for index, row in enumerate(ids)]
    args = PantheraMLTrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=6, per_device_train_batch_size=4, logging_steps=6,
        gradient_accumulation_steps=accumulation, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": ids, "labels": labels})
    trainer = PantheraMLTrainer(model, args, train_dataset=rows, tokenizer=tokenizer, callbacks=[Watch()])
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.state.global_step == 6


def test_one_gpus_backward_runs_on_the_callers_thread(tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(tiny.save_checkpoint(tmp_path / "base")), max_seq_length=64, load_in_16bit=True
    )
    model = FastLanguageModel.get_peft_model(model, r=4)
    threads = set()
    factor = next(p for name, p in model.named_parameters() if "lora_B" in name)
    factor.register_hook(lambda _: threads.add(threading.get_ident()))
    args = PantheraMLTrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, save_strategy="no", report_to="none", disable_tqdm=True
    )
    rows = Dataset.from_dict({"input_ids": [list(range(5, 45))] * 16})
    PantheraMLTrainer(model, args, train_dataset=rows, tokenizer=tokenizer).train()
    assert threads == {threading.get_ident()}


@pytest.fixture(scope="module")
def two_gigabytes(tmp_path_factory):
    """A Llama checkpoint of 1.9 GB in shards of at most 500 MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("big")
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=20, num_attention_heads=16,
        num_key_value_heads=4,
    )  # fmt: skip
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="500MB")
    del model
    torch.cuda.empty_cache()
    tiny.build_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("precision", ["bf16", "4bit", "8bit", "float32"])
def test_loading_holds_no_second_copy_on_the_host(two_gigabytes, precision, record_property):
    shards = [file.stat().st_size / 2**30 for file in Path(two_gigabytes).glob("*.safetensors")]
    assert len(shards) > 2 and sum(shards) > 1.5
    output = subprocess.run(
        [sys.executable, "-c", LOAD, str(two_gigabytes), json.dumps(PRECISIONS[precision])],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    figures = json.loads(output.split("RESULT", 1)[1])
    for name, value in figures.items():
        record_property(name, value)
    print(precision, figures)
    # Private memory: what a second copy would take. The resident set also counts the mapped pages of the files, which
    # are the system's cache of them: shared between processes, and given back under pressure.
    assert figures["anonymous"] <= 1.2 * max(shards) + 1
    assert figures["rss"] <= sum(shards) + 1
