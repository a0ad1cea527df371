"""GRPO in one process: which token a row draws, which step a row goes to, our head and TRL's, evaluation, a resume."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

from pantheraml.errors import ConfigError
from pantheraml.training.grpo_batch import reordered, spread
from pantheraml.training.row_sampling import RowSampler, drawn, rows_sampled, uniforms
from tests import tiny
from tests.training.grpo_runs import Kept, build, figures


def test_numbers_follow_from_seed_row_and_place_alone():
    u = uniforms(3, range(500), 40)
    assert torch.equal(uniforms(3, [7, 499], 20), u[[7, 499], :20])
    assert not torch.equal(uniforms(4, [7], 20), u[[7], :20])
    assert u.min() >= 0 and u.max() < 1 and len(u.unique()) == u.numel()
    assert u.mean().item() == pytest.approx(0.5, abs=0.01)
    assert abs(torch.corrcoef(torch.stack([u[:-1].flatten(), u[1:].flatten()]))[0, 1]) < 0.03
    assert abs(torch.corrcoef(torch.stack([u[:, :-1].flatten(), u[:, 1:].flatten()]))[0, 1]) < 0.03


def test_tokens_are_drawn_by_their_probability():
    scores = torch.tensor([[2.0, 0.0, -torch.inf, 1.0, -1.0, -torch.inf]])
    tokens = drawn(scores.expand(20_000, -1), uniforms(1, range(20_000), 1)[:, 0])
    found = torch.bincount(tokens, minlength=6) / 20_000
    assert torch.allclose(found, scores.softmax(-1)[0], atol=0.01) and found[2] == found[5] == 0
    u = uniforms(2, range(200), 1)[:, 0]
    assert torch.equal(drawn(scores.expand(200, -1), u)[70:80], drawn(scores.expand(10, -1), u[70:80]))
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert drawn(scores.expand(2, -1), ends).tolist() == [0, 4], "never one of probability 0"


def test_a_row_with_a_score_that_is_no_number_is_left_for_transformers_to_refuse():
    scores = torch.tensor([[0.0, torch.nan, 1.0], [0.0, 0.0, 1.0]])
    found = RowSampler(uniforms(1, [0, 1], 1))(torch.zeros(2, 3, dtype=torch.long), scores)
    assert found[0].isnan().any() and found[1].isinf().sum() == 2


def test_a_row_is_the_same_in_any_batch(llama_model):
    model = llama_model
    prompts = torch.arange(5, 29).view(6, 4)
    given = dict(do_sample=True, max_new_tokens=7, temperature=0.8, top_k=40, pad_token_id=0)

    def generate(rows):
        with rows_sampled(model, rows, seed=11):
            return model.generate(prompts[rows], attention_mask=torch.ones_like(prompts[rows]), **given)

    together = generate([0, 1, 2, 3, 4, 5])
    assert (
        torch.equal(generate([4, 1]), together[[4, 1]])
        and len({tuple(row) for row in together.tolist()}) == 6
    )
    assert "_get_logits_processor" not in vars(model), "nothing is left on the model"
    greedy = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=3, pad_token_id=0
    )
    with rows_sampled(model, range(6), seed=11):
        again = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=3, pad_token_id=0
        )
    assert torch.equal(greedy, again)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_rows_are_spread_over_steps_alike_on_any_ranks(parts):
    alone = spread(0, 24, parts, seed=5)
    each = 24 // parts
    of_step = [sorted(alone[step * each : (step + 1) * each]) for step in range(parts)]
    for block in range(0, 24, parts):
        assert all(sum(block <= row < block + parts for row in rows) == 1 for rows in of_step)
    for ranks in (2, 4):
        mine = 24 // ranks
        orders = [spread(rank * mine, mine, parts, seed=5) for rank in range(ranks)]
        for step, rows in enumerate(of_step):
            part = slice(step * mine // parts, (step + 1) * mine // parts)
            assert rows == sorted(rank * mine + row for rank in range(ranks) for row in orders[rank][part])
    assert parts == 1 or spread(0, 24, parts, seed=6) != alone
    batch = {"x": torch.arange(3), "all": torch.tensor(7), "none": None, "texts": ["a", "b", "c"]}
    found = reordered(batch, [2, 0, 1])
    assert found["x"].tolist() == [2, 0, 1] and found["texts"] == ["c", "a", "b"]
    assert found["all"] == 7 and found["none"] is None


def test_our_head_trains_what_trls_head_trains(llama, tmp_path):
    """With kernels="off" model and head are those of transformers and TRL."""
    ours, theirs = (
        figures(llama, tmp_path, per_device_train_batch_size=8, beta=0.04, loading={"kernels": kernels})
        for kernels in ("auto", "off")
    )
    assert ours["steps"] == theirs["steps"]
    for mine, other in zip(ours["logged"], theirs["logged"], strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_layers_that_recompute_drop_what_they_dropped(llama, tmp_path):
    kept, recomputed = (
        figures(llama, tmp_path, per_device_train_batch_size=8, beta=0.04, recompute=recompute)
        for recompute in (False, True)
    )
    assert kept["steps"] == recomputed["steps"]
    for mine, other in zip(recomputed["logged"], kept["logged"], strict=True):
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-6)


class Evaluated(TrainerCallback):
    """Evaluates again at the end of the first step."""

    def on_step_end(self, args, state, control, **_):
        control.should_evaluate = state.global_step == 1


def test_evaluation_changes_nothing_and_a_resumed_run_is_the_run(llama, tmp_path):
    settings = dict(per_device_train_batch_size=4, per_device_eval_batch_size=4)
    whole = build(llama, tmp_path / "whole", save_strategy="steps", save_steps=2, **settings)
    whole.train()
    watched = build(llama, tmp_path / "watched", callbacks=[Evaluated()], **settings)
    before = watched.evaluate()
    assert before["eval_reward"] == watched.evaluate()["eval_reward"]
    watched.train()
    resumed = build(llama, tmp_path / "whole", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    for other in (watched, resumed):
        for mine, theirs in zip(other.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    assert resumed._logs["completion"] == whole._logs["completion"]


def test_a_run_that_goes_on_within_a_generation_makes_it_anew_and_keeps_the_order_of_prompts(llama, tmp_path):
    def prompts(resume=None):
        kept = Kept()
        kept.trainer = build(
            llama, tmp_path, callbacks=[kept], per_device_train_batch_size=4, steps_per_generation=2, max_steps=8,
            save_strategy="steps", save_steps=3,
        )  # fmt: skip
        kept.trainer.train(resume_from_checkpoint=resume)
        return [step["prompt"] for step in kept.steps]

    whole = prompts()
    assert whole[2] == whole[3] != whole[4] == whole[5], "a generation serves two steps"
    assert prompts(str(tmp_path / "checkpoint-3")) == whole[3:]


def test_ranks_that_are_fewer_than_before_do_not_go_on_with_other_steps(llama, tmp_path):
    trainer = build(llama, tmp_path, per_device_train_batch_size=4)
    trainer.take_rows(4)
    with pytest.raises(
        ConfigError, match=r"4 rows are a step of 1 of them.*It had 8 before.*Pass num_processes"
    ):
        trainer.take_rows(8)


@pytest.fixture
def llama_model():
    return tiny.build_model("llama")
