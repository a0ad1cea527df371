"""The supervised trainer: TRL's SFTTrainer, with the data understood and the figures exact."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from trl import SFTConfig

from pantheraml.config.multi_gpu import MultiGPUConfig, Recompute
from pantheraml.data.masking import check_labels
from pantheraml.data.preview import describe_sample
from pantheraml.devices.memory import forget_peak, format_memory_stats, get_memory_stats, gpu_memory
from pantheraml.devices.segments import grow_segments
from pantheraml.distributed.data_ranks import config_for, data_ranks
from pantheraml.distributed.process_group import gather_objects, group_size, rank_device, settings_of_run
from pantheraml.distributed.strategies.choose import strategy_of
from pantheraml.errors import DataError
from pantheraml.log import say
from pantheraml.models.packed_rows import keep_documents_apart
from pantheraml.models.patching import PatchSet
from pantheraml.models.recompute import is_recompute_forced, plan_ahead
from pantheraml.models.sample_dropout import follow_samples
from pantheraml.models.sharding import let_go
from pantheraml.models.split import is_split
from pantheraml.models.state import get_state
from pantheraml.training.adapter_precision import kept_trained_weights
from pantheraml.training.arguments import (
    PantheraMLTrainingArguments,
    copy_batches_beside,
    join_ranks,
    pin_device,
    resolve_max_length,
    set_recompute_argument,
    to_sft_config,
    with_strategy,
    written_recompute,
)
from pantheraml.training.banner import (
    Predicted,
    batch_tokens,
    describe_memory,
    describe_run,
    joined_tokens,
    predict_memory,
)
from pantheraml.training.batch_split import shares_of_ranks
from pantheraml.training.default_adapter import ensure_adapter
from pantheraml.training.evaluation import TokenSums
from pantheraml.training.given import one_tokenizer, refuse_name
from pantheraml.training.global_batch import resolve_global_batch
from pantheraml.training.head import bind_cpu_head, bind_head, needs_cpu_head, why_not_fused
from pantheraml.training.module_walks import listed_once
from pantheraml.training.optimizer import embedding_parameters, split_embedding_group
from pantheraml.training.repeated_steps import RepeatedSteps
from pantheraml.training.restarting import RestartedRuns
from pantheraml.training.rows import (
    Rows,
    format_all,
    format_rows,
    given_rows,
    prepared_once,
    report_cut_rows,
)
from pantheraml.training.trackers import TrackerGuard
from pantheraml.training.watching import WatchedRuns


class PantheraMLTrainer(WatchedRuns, RestartedRuns, RepeatedSteps):
    """SFTTrainer for models of ``FastLanguageModel`` (and any other causal language model).

    What it adds to TRL's trainer:

    - rows in any known format are recognised, and one is shown with what is trained on marked;
    - a model without an adapter gets a LoRA adapter, unless it was loaded for full fine-tuning;
    - the micro-batches of a step go through the model in one pass where memory allows, without padding;
    - a step that runs out of memory on any rank is repeated in smaller passes, with the same gradient;
    - ranks that hang end with a report;
    - recompute follows the model's policy, row length the model's ``max_seq_length``;
    - adapters are trained in float32, also on quantised models;
    - evaluation loss, perplexity and accuracy are means over all label tokens;
    - ``embedding_learning_rate`` has optimizer groups of its own.

    Args:
        model: the model, or a name that ``FastLanguageModel`` would take is not accepted here: load it first.
        args: SFTConfig, PantheraMLTrainingArguments or TrainingArguments; never changed.
        train_dataset: rows; see ``docs/data-formats.md``.
        eval_dataset: rows, or a mapping of name to rows.
        processing_class: the tokenizer.
        tokenizer: the tokenizer, under its older name.
        formatting_func: turns a row into text; switches recognition off.
        max_seq_length: longest row in tokens; None: from the arguments or the model.
        dataset_text_field: the column of plain text, as older scripts pass it here.
        packing: join short rows into full ones, as older scripts pass it here.
        dataset_num_proc: processes that tokenise, as older scripts pass it here.
        kwargs: everything else SFTTrainer takes.

    Raises:
        ConfigError: arguments that contradict each other.
        DataError: rows that cannot be recognised, are empty, or leave nothing to train on.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        *,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
        max_seq_length: int | None = None,
        dataset_text_field: str | None = None,
        packing: bool | None = None,
        dataset_num_proc: int | None = None,
        **kwargs: Any,
    ) -> None:
        processing_class = one_tokenizer(processing_class, tokenizer)
        refuse_name(model)
        train_dataset = given_rows(train_dataset)
        config = to_sft_config(
            args, dataset_text_field=dataset_text_field, packing=packing, dataset_num_proc=dataset_num_proc
        )
        if formatting_func is None:
            train_dataset, eval_dataset = self._recognised(
                train_dataset, eval_dataset, processing_class, config.dataset_text_field
            )

        self._join_run(config, model)
        state = get_state(model)
        written = self._wanted_recompute(args)
        if state is not None:
            state.recompute = state.recompute if written is None else written
            set_recompute_argument(config, is_recompute_forced(state.recompute))
            if kwargs.get("peft_config") is None and not state.full_finetuning:
                model = ensure_adapter(model, state)
            pin_device(config, model.device)
        copy_batches_beside(config)
        config.max_length = max_seq_length or resolve_max_length(
            config, state.max_seq_length if state else None
        )
        self._row_length = config.max_length
        if config.padding_free and not config.packing:
            config.max_length = None  # TRL refuses it, since it would not cut the rows; _prepare_dataset does

        self._eval_sums: TokenSums | None = None
        if config.padding_free or (config.packing and config.packing_strategy != "wrapped"):
            keep_documents_apart(model)
        with kept_trained_weights(model):
            super().__init__(
                model,
                config,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                formatting_func=formatting_func,
                **kwargs,
            )
        # TRL divides by it the tokens that it counts on all ranks.
        self._tp_size = max(1, self.args.world_size // self._data_ranks.size)
        self._strategy.configure(self.accelerator, config, cast(nn.Module, self.model))
        self._place_head(fused=state is not None and state.kernels == "auto")
        ledger = PatchSet() if state is None else state.patches
        self._dropout = follow_samples(
            cast(nn.Module, self.model), ledger, compiled=bool(config.torch_compile)
        )
        self._check_rows()
        self._trackers = TrackerGuard()
        self._trackers.cover(self.callback_handler)

    def _wanted_recompute(self, args: TrainingArguments | None) -> bool | Recompute | None:
        """The model's way to recompute, where something else than ``from_pretrained`` says one."""
        return written_recompute(args)

    def _plan_memory(self) -> Predicted | None:
        """Plan recompute and merging for the longest batch, and predict what a step takes."""
        model, most = cast(torch.nn.Module, self.model), self._global_batch.most(self._data_ranks.index)
        batch = batch_tokens(self.train_dataset, most)
        longest = None if batch is None else batch.most
        state = get_state(model)
        self.plan_pipeline()
        if state is not None and longest is not None:
            longest = -(-longest // max(1, self._pieces))
            plan_ahead(model, state, longest)
        self.plan_merging()
        passes = self.args.gradient_accumulation_steps
        if longest is not None and self._most_tokens:
            passes = min(passes, -(-longest * passes // self._most_tokens))
        merged = joined_tokens(batch, self._most_tokens)
        predicted = predict_memory(model, self.args, longest, merged, self._strategy.zero(model))
        return self.plan_reduction(predicted, passes)

    def _join_run(self, config: SFTConfig, model: nn.Module) -> None:
        """Be one of the ranks that train ``model``, as the run's settings say; ``config`` is changed in place."""
        join_ranks(config, group_size())
        self._data_ranks = data_ranks(model)
        settings = with_strategy(config_for(model, self._multi_gpu or settings_of_run()), config)
        self._strategy = strategy_of(settings, group_size(), model, config)
        shares = shares_of_ranks(settings.batch_split, self._data_ranks.size, rank_device())
        self._global_batch = resolve_global_batch(config, self._data_ranks.size, shares)
        self._strategy.prepare(config)

    def _wrap_model(self, model: nn.Module, training: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        """As the run's strategy wraps it, or else accelerate."""
        model = self._strategy.wrap(self.accelerator, model) if training else model
        return super()._wrap_model(model, training, *args, **kwargs)

    def _place_head(self, *, fused: bool) -> None:
        """Put our head where it covers the model, and one where TRL's cannot run."""
        # TRL puts its head on the model for good, and a later trainer does so again; so does this one.
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        base = cast(PreTrainedModel, base)
        if needs_cpu_head(self.args.device):
            bind_cpu_head(base, PatchSet())
        self._has_own_head = fused and why_not_fused(base) is None
        if self._has_own_head:
            bind_head(base, PatchSet())

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as SFTTrainer does, after some lines about the run and one row with what is trained on marked.

        Args:
            resume_from_checkpoint: the folder of a checkpoint, or True for the last one of ``output_dir``: the run goes
                on with the next row and the same number of rows a step, also on another number of ranks. "auto" is
                True where something was saved, and starts anew where nothing was.
            args: as for SFTTrainer.
            kwargs: likewise.

        Raises:
            RunStopped: SIGTERM, SIGUSR1 or a file STOP asked the run to stop, and it is saved; see
                ``docs/reliability.md``.
            KeyboardInterrupt: Ctrl-C did.
        """
        self._check_rows()  # rows may have been masked since
        self._trackers.cover(self.callback_handler)  # some may have come since
        with self.watched(self._watching()), self.begun(resume_from_checkpoint) as checkpoint:
            return self._train(checkpoint, *args, **kwargs)

    def _watching(self) -> MultiGPUConfig | None:
        """How a run is watched for hangs; one process alone waits for nobody."""
        return settings_of_run() if group_size() > 1 else None

    def _train(self, *args: Any, **kwargs: Any) -> Any:
        grow_segments(self.args.device)  # a model that was not loaded by us is on it already
        let_go(cast(nn.Module, self.model))
        self._predicted = self._plan_memory()
        self._say_plan()
        for device in self._predicted or {self.args.device}:
            forget_peak(device)
        model = cast(nn.Module, self.model)
        # With one device autograd's own thread has nothing to do beside this one but to take turns with it.
        beside = self.args.world_size > 1 or is_split(model)
        with listed_once(model), torch.autograd.set_multithreading_enabled(beside):
            try:
                result = super().train(*args, **kwargs)
            finally:
                self._strategy.finished(self)
        self._say_memory()
        return result

    # --- data -----------------------------------------------------------------------------------------------

    def _recognised(self, train: Rows, evaluation: Any, tokenizer: Any, text_field: str) -> tuple[Rows, Any]:
        """Rows in any known format, in one that TRL reads."""
        return format_rows(train, tokenizer, text_field, "training"), format_all(
            evaluation, tokenizer, text_field
        )

    def _prepare_dataset(
        self,
        dataset: Rows,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Rows:
        """Prepare as TRL does, in two steps, so that what is cut or left out can be counted in between."""
        uncut, cut = copy.copy(args), copy.copy(args)
        uncut.max_length, uncut.shuffle_dataset = None, False
        cut.max_length = self._row_length
        with prepared_once():
            whole = super()._prepare_dataset(
                dataset, processing_class, uncut, False, formatting_func, dataset_name
            )
            prepared = super()._prepare_dataset(whole, processing_class, cut, packing, None, dataset_name)
        if isinstance(whole, Dataset) and isinstance(prepared, Dataset) and self._row_length is not None:
            report_cut_rows(dataset_name, whole, self._row_length)
            if not packing and len(prepared) < len(whole):
                say(
                    f"{len(whole) - len(prepared)} of {len(whole)} {dataset_name} rows have no token left to train on."
                )
        return prepared

    def _check_rows(self) -> None:
        """Refuse rows that leave nothing to train on."""
        rows = self.train_dataset
        if not isinstance(rows, Dataset):
            return
        if len(rows) == 0:
            raise DataError(
                got="No training row has a label left: every token of every row is masked.",
                need="At least one token must be trained on; long prompts can push all answers past max_length.",
                fix="Raise max_seq_length, or check the completion or assistant part of the rows.",
            )
        check_labels(rows)

    def _say_plan(self) -> None:
        """Show one row with what is trained on marked, and what the run will do."""
        rows: Any = self.train_dataset
        sample = next(iter(rows))
        if "input_ids" in sample:
            say(describe_sample(sample, cast(Any, self.processing_class)))
        say(describe_run(cast(torch.nn.Module, self.model), self.args, rows, self._global_batch))
        if self._predicted is not None:
            gpus = [device for device in self._predicted if device.type == "cuda"]
            totals = {device: gpu_memory(device.index or 0)["total"] for device in gpus}
            say(describe_memory(self._predicted, totals))

    def _say_memory(self) -> None:
        """Compare the memory that was predicted with the peaks of all ranks' GPUs."""
        if self._predicted is None or self.args.device.type != "cuda":
            return
        mine = [
            gpu_memory(d.index or 0)["peak_allocated"] for d in self._predicted
        ]  # pragma: no cover - needs a GPU
        self.tell_peaks(self._predicted, gather_objects(mine))  # pragma: no cover - needs a GPU

    # --- optimizer ------------------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The optimizer of the arguments, embeddings and heads in groups of their own when a rate is given."""
        existed = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = getattr(self.args, "embedding_learning_rate", None)
        if rate is not None and not existed:
            split_embedding_group(optimizer, embedding_parameters(cast(torch.nn.Module, self.model)), rate)
        return optimizer

    # --- evaluation -----------------------------------------------------------------------------------------

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """One batch of evaluation; its label tokens are counted."""
        result = super().prediction_step(model, inputs, *args, **kwargs)
        if self._eval_sums is not None and inputs.get("labels") is not None:
            metrics = self._metrics["eval"]
            loss = float(result[0])
            if self.aux_loss_enabled and metrics["aux_loss"]:
                loss -= self.router_aux_loss_coef * metrics["aux_loss"][-1]
            tokens = int((inputs["labels"][:, 1:] != -100).sum())
            if tokens:
                self._eval_sums.add(loss, metrics["mean_token_accuracy"][-1], tokens)
        return result

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluation whose loss is the sum over all label tokens divided by their number."""
        self._eval_sums = TokenSums()
        try:
            with self._strategy.evaluating(self):
                output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            sums = self._eval_sums.of_all_ranks()
        finally:
            self._eval_sums = None
        if output.metrics is not None and sums.tokens:
            output.metrics.update(sums.metrics(metric_key_prefix))
            self._metrics["eval"]["mean_token_accuracy"] = [sums.correct / sums.tokens]
        return output

    # --- memory ---------------------------------------------------------------------------------------------

    def get_model_memory_usage(self) -> dict[str, dict[str, float]]:
        """Memory of the devices of this run in GiB: ``{"gpu_0": {...}}``, or ``{"cpu": {...}}`` without a GPU."""
        return get_memory_stats()

    def print_memory_stats(self) -> None:
        """Show ``get_model_memory_usage()`` as a table."""
        say("memory\n" + format_memory_stats(self.get_model_memory_usage()))


UnslothTrainer = PantheraMLTrainer


__all__ = ["PantheraMLTrainer", "PantheraMLTrainingArguments", "UnslothTrainer"]
