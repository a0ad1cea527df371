"""Adapters that cannot be attached."""

from __future__ import annotations

from pantheraml import FastLanguageModel
from tests import tiny
from tests.errors.workshop import CannotHappenHere, Workshop, case


@case
def misspelt_target(shop: Workshop) -> None:
    shop.adapted(target_modules=["q_porj", "v_proj"])


@case
def unknown_target(shop: Workshop) -> None:
    shop.adapted(target_modules=["c_attn"])


@case
def target_of_another_family(shop: Workshop) -> None:
    model = shop.load(tiny.save_checkpoint(shop.folder("model"), "phi3"))
    FastLanguageModel.get_peft_model(model, target_modules=["query_proj"])


@case
def no_targets(shop: Workshop) -> None:
    shop.adapted(target_modules=[])


@case
def targets_that_match_nothing(shop: Workshop) -> None:
    shop.adapted(target_modules="q_proj|v_proj")


@case
def targets_that_are_no_expression(shop: Workshop) -> None:
    shop.adapted(target_modules="*.q_proj")


@case
def layer_out_of_range(shop: Workshop) -> None:
    shop.adapted(layers_to_transform=[0, 7])


@case
def no_rank(shop: Workshop) -> None:
    shop.adapted(r=0)


@case
def dropout_of_everything(shop: Workshop) -> None:
    shop.adapted(lora_dropout=2)


@case
def dropout_as_text(shop: Workshop) -> None:
    shop.adapted(lora_dropout="0.1")


@case
def misspelt_bias(shop: Workshop) -> None:
    shop.adapted(bias="lora-only")


@case
def unknown_setting(shop: Workshop) -> None:
    shop.adapted(use_rs_lora=True)


@case
def unknown_start(shop: Workshop) -> None:
    shop.adapted(init_lora_weights="pisa")


@case
def loftq_settings_without_loftq(shop: Workshop) -> None:
    shop.adapted(loftq_config={"loftq_bits": 4})


@case
def loftq_of_a_quantised_model(shop: Workshop) -> None:
    FastLanguageModel.get_peft_model(shop.load(load_in_4bit=True), init_lora_weights="loftq")


@case
def loftq_without_a_gpu(shop: Workshop) -> None:
    import torch

    if torch.cuda.is_available():
        raise CannotHappenHere("a GPU is there")
    shop.adapted(init_lora_weights="loftq")


@case
def dropout_on_experts(shop: Workshop) -> None:
    model = shop.load(tiny.save_checkpoint(shop.folder("model"), "mixtral"))
    FastLanguageModel.get_peft_model(model, lora_dropout=0.1)


@case
def dora_on_experts(shop: Workshop) -> None:
    model = shop.load(tiny.save_checkpoint(shop.folder("model"), "mixtral"))
    FastLanguageModel.get_peft_model(model, use_dora=True)


@case
def second_adapter(shop: Workshop) -> None:
    FastLanguageModel.get_peft_model(shop.adapted())


@case
def adapter_on_full_finetuning(shop: Workshop) -> None:
    FastLanguageModel.get_peft_model(shop.load(full_finetuning=True))
