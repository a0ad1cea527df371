"""Trainers that cannot be built, and runs that would train nothing."""

from __future__ import annotations

import textwrap

from tests.errors.workshop import Workshop, case

ROWS = [{"text": "one two three"}, {"text": "four five six"}]


@case
def trainer_without_tokenizer(shop: Workshop) -> None:
    shop.trainer(ROWS, tokenizer=None)


@case
def trainer_with_two_tokenizers(shop: Workshop) -> None:
    from tests import tiny

    shop.trainer(ROWS, processing_class=tiny.build_tokenizer())


@case
def trainer_with_the_name_of_a_model(shop: Workshop) -> None:
    shop.trainer(ROWS, model="org/name")


@case
def trainer_without_rows(shop: Workshop) -> None:
    shop.trainer(ROWS, train_dataset=None)


@case
def trainer_with_the_path_of_rows(shop: Workshop) -> None:
    shop.trainer(ROWS, train_dataset="rows.jsonl")


@case
def trainer_with_a_list_of_rows(shop: Workshop) -> None:
    shop.trainer(ROWS, train_dataset=ROWS)


@case
def trainer_with_all_splits(shop: Workshop) -> None:
    from datasets import Dataset, DatasetDict

    shop.trainer(ROWS, train_dataset=DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS)))


@case
def going_on_where_nothing_was_saved(shop: Workshop) -> None:
    shop.folder("run")
    shop.trainer(ROWS).train(resume_from_checkpoint=True)


@case
def going_on_with_a_folder_that_is_not_there(shop: Workshop) -> None:
    shop.trainer(ROWS).train(resume_from_checkpoint="outputs/checkpoint-7")


@case
def arguments_of_the_wrong_kind(shop: Workshop) -> None:
    shop.trainer(ROWS, args={"max_steps": 1})


@case
def no_rate_for_embeddings(shop: Workshop) -> None:
    shop.trainer(ROWS, arguments={"embedding_learning_rate": 0.0})


@case
def rate_of_embeddings_that_are_not_trained(shop: Workshop) -> None:
    shop.trainer(ROWS, arguments={"embedding_learning_rate": 1e-5}).train()


@case
def policy_for_losses_that_is_none(shop: Workshop) -> None:
    shop.trainer(ROWS, arguments={"on_non_finite": "ignore"})


@case
def misspelt_strategy(shop: Workshop) -> None:
    shop.trainer(ROWS, arguments={"multi_gpu_strategy": "deepsped"})


@case
def offloading_in_one_process(shop: Workshop) -> None:
    from torch import nn

    from pantheraml import MultiGPUConfig
    from pantheraml.distributed.strategies.choose import strategy_of

    strategy_of(MultiGPUConfig(strategy="deepspeed", cpu_offload=True), 1, nn.Module())


@case
def two_strategies(shop: Workshop) -> None:
    from pantheraml import MultiGPUConfig, PantheraMLTrainingArguments
    from pantheraml.training.arguments import with_strategy

    with_strategy(MultiGPUConfig(strategy="ddp"), PantheraMLTrainingArguments(multi_gpu_strategy="deepspeed"))


@case
def nothing_to_go_back_to(shop: Workshop) -> None:
    shop.trainer(ROWS, arguments={"on_non_finite": "restore", "save_strategy": "no"})


@case
def step_that_is_not_finite(shop: Workshop) -> None:
    import math

    trainer = shop.trainer(ROWS, arguments={"on_non_finite": "stop", "seed": 1, "max_steps": 1})
    head = trainer.model.get_base_model().model.norm
    head.register_forward_hook(lambda module, inputs, output: output * math.nan)
    trainer.train()


@case
def run_file_with_three_problems(shop: Workshop) -> None:
    from pantheraml.config.load import load_config

    text = """
        model:
          model_name: org/name
          load_in_4bit: true
          load_in_8bit: true
        data:
          path: rows.jsonl
        trainer:
          learning_rte: 2e-4
          max_steps: many
    """
    load_config(shop.file("run.yaml", textwrap.dedent(text)))


@case
def run_file_with_scattered_gpus(shop: Workshop) -> None:
    from pantheraml.config.load import load_config

    text = """
        model:
          model_name: org/name
          device_map: cuda:1
        data:
          path: rows.jsonl
        devices: [0, 2]
        multi_gpu:
          strategy: fsdp
          timeout_minutes: 0
          num_gpus: 4
    """
    load_config(shop.file("run.yaml", textwrap.dedent(text)))


@case
def run_file_that_is_not_there(shop: Workshop) -> None:
    from pantheraml.config.load import load_config

    load_config(shop.root / "nothing.yaml")


@case
def row_that_does_not_fit(shop: Workshop) -> None:
    from tests.training.starving import Starved

    trainer = shop.trainer(ROWS, arguments={"max_steps": 1})
    Starved(trainer.model, 3, backward=True)
    trainer.train()


@case
def optimizer_that_does_not_fit(shop: Workshop) -> None:
    import torch

    trainer = shop.trainer(ROWS, arguments={"max_steps": 1})

    def step(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    trainer.create_optimizer().register_step_pre_hook(step)
    trainer.train()


@case
def deterministic_without_the_variable(shop: Workshop) -> None:
    import torch

    from pantheraml.training.repeatable import check_cublas

    check_cublas(torch.device("cuda"), {})
