"""Bytes of activations, by the widths of a model: what a decoder layer keeps for its backward, and what comes and goes.

Counted tensor by tensor from what the fused layer saves (``models/fused/layer_function.py``) and, for transformers'
own layers, from what autograd was seen to save. The idea of counting by tensor and choosing what is computed again is
that of Korthikanti et al. 2022 ("Reducing activation recomputation in large transformer models").

In the formulas H is the width of the hidden states, I that of an MLP, q, k (and v) those of all queries and keys of a
token, m that of LoRA's x A^T; c and r are bytes of a number that is computed with and of the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

# Tokens computed at a time in a layer that does not keep everything: wide enough for full speed.
TILE = 16384
# Numbers of logits that are there at a time (kernels/linear_cross_entropy.py).
LOGITS = 2048 * 128256
# Columns in which a stack's margin for LoRA grows: of 16-bit weights, and of FP8, which needs three times as many.
_STEP, _FP8_STEP, _FP8_PARTS = 64, 16, 3
# What mixtures keep beside gate, up and what surrounds the attention.
_EXPERTS_FACTOR = 3.2


class Kept(NamedTuple):
    """Bytes that one layer keeps for one token, by what it keeps."""

    all: int
    projected: int
    attended: int
    input: int


class StackSizes(NamedTuple):
    """Weights that share their input (models/fused/stack.py): rows, columns, and how many adapters lie beside them."""

    rows: int
    cols: int
    adapters: int


@dataclass(frozen=True)
class ActivationSizes:
    """What the estimates of one model follow from.

    Attributes:
        hidden: H.
        inner: I.
        experts: MLPs that a token goes through in a mixture; 0 without experts.
        heads: of queries.
        queries: q.
        keys: k.
        vocabulary: logits of a token.
        size: r.
        is_fused: whether layers are ``FusedDecoderLayer``; what they compute themselves: ``computes_fused``.
        has_head_norms: whether queries and keys are normalised.
        has_post_norms: whether the outputs of attention and MLP are.
        compute: c; 0 for r.
        rank: of the adapters of all linears of a layer; 0 without.
        is_trained: whether the base weights are trained.
    """

    hidden: int
    inner: int
    experts: int
    heads: int
    queries: int
    keys: int
    vocabulary: int
    size: int
    is_fused: bool
    has_head_norms: bool
    has_post_norms: bool = False
    compute: int = 0
    rank: int = 16
    is_trained: bool = False

    def cut(self, ranks: int) -> ActivationSizes:
        """Those of one of ``ranks`` that compute each layer together."""
        names = ("inner", "heads", "queries", "keys")
        return replace(self, **{name: getattr(self, name) // ranks for name in names})

    @property
    def computed(self) -> int:
        """c."""
        return self.compute or self.size

    @property
    def computes_fused(self) -> bool:
        """Whether fused layers compute as such: trained weights of another dtype than the residual stream (masters in
        float32 under autocast) are left to transformers' own forward.
        """
        return self.is_fused and (not self.is_trained or self.computed == self.size)

    @property
    def projections(self) -> int:
        """Width of q, k and v side by side."""
        return self.queries + 2 * self.keys

    @property
    def stacks(self) -> tuple[StackSizes, ...]:
        """The stacks of a layer; those of experts have no margins."""
        hidden, inner = self.hidden, self.inner
        attention = StackSizes(self.projections, hidden, 3), StackSizes(hidden, self.queries, 1)
        return (
            attention
            if self.experts
            else (*attention, StackSizes(2 * inner, hidden, 2), StackSizes(hidden, inner, 1))
        )

    def margins(self, step: int = _STEP) -> list[int]:
        """Columns that each stack has beside its weights, for LoRA."""
        return [-(-one.adapters * self.rank // step) * step for one in self.stacks]

    @property
    def kept(self) -> Kept:
        """What a layer keeps for a token."""
        if self.experts:
            return self._kept_of_experts()
        return self._kept_fused() if self.computes_fused else self._kept_stock()

    def _kept_fused(self) -> Kept:
        """x, attended and its log-sum-exp, q k v, the sum s after it, gate, up, and m of each stack; before a norm of
        the heads or of an output, what went into it, too. Where weights are trained, their inputs are computed again.
        """
        hidden, c = self.hidden, self.computed
        raw = hidden if self.has_post_norms else 0
        alone = (hidden + raw) * c
        attended = alone + self.queries * c + 4 * self.heads
        norms = 2 if self.has_head_norms else 1
        margins = self.margins()
        s = 0 if self.has_post_norms else hidden
        projected = attended + (self.projections * norms + margins[0] + s) * c
        mlp = hidden - s + raw + 2 * self.inner + sum(margins[1:])
        return Kept(projected + mlp * c, projected, attended, alone)

    def _kept_stock(self) -> Kept:
        """What autograd saves of transformers' layer with fused norms: inputs of norms in r, q, k, v, what was
        attended, gate, its activation and up; the inputs of linears that are trained, or adapted: PEFT copies what goes
        into each of seven, unless it is in float32, and autocast what goes into five.
        """
        hidden, c, r = self.hidden, self.computed, self.size
        adapters = 0 if self.is_trained else 7 * self.rank * c
        if not self.is_trained and self.rank and c < 4:
            inputs = (5 * hidden + self.queries + self.inner) * c
        else:
            inputs = (5 * hidden * c if c < r else 2 * hidden * r) + self.inner * c
        heads = (2 * self.queries + 2 * self.keys) * c + 4 * self.heads
        norms = 2 * hidden * r
        norms += (self.queries + self.keys) * c if self.has_head_norms else 0
        norms += 2 * hidden * c if self.has_post_norms else 0
        alone = hidden * r
        return Kept(norms + inputs + heads + 3 * self.inner * c + adapters, alone, alone, alone)

    def _kept_of_experts(self) -> Kept:
        """An upper estimate: mixtures are computed in parts around their experts."""
        hidden, c = self.hidden, self.size
        numbers = 2 * hidden + 2 * self.queries + 2 * self.keys + 2 * self.inner * self.experts
        return Kept(int(numbers * c * _EXPERTS_FACTOR), hidden * c, hidden * c, hidden * c)

    def layer_passing(self, tokens: int, *, recomputes: bool = False, attends: bool = False) -> int:
        """Bytes that come and go around one layer, beside what is kept: in its backward, or, where it recomputes, in
        its forward, if that has more.

        Args:
            tokens: of a micro-batch.
            recomputes: whether the layer does.
            attends: whether it computes its attention again, too.
        """
        hidden, inner, c, r = self.hidden, self.inner, self.computed, self.size
        if self.experts:
            mlp = min(tokens, TILE) * 6 * inner * c
            return mlp + tokens * (2 * (hidden + self.queries) + 8 * hidden) * c
        if not self.computes_fused:
            # Gradients of gate, its activation, up and their product; of all weights, where they are trained. Masters'
            # are let go of one by one, in c and as they are added up, and two of the four come for what goes.
            is_master = self.is_trained and c < r
            passing = tokens * ((2 if is_master else 4) * inner * c + 2 * hidden * (c + r))
            if self.is_trained:
                numbers = sum(one.rows * one.cols for one in self.stacks)
                passing += hidden * inner * (c + r) if is_master else numbers * c
            return passing + (tokens * (self.kept.all - self.kept.input) if recomputes else 0)
        before_qkv, before_o, whole = self._weight_gradients(tokens, recomputes=recomputes)
        if recomputes:
            around_mlp, around_attention = self._backward_again(tokens, attends)
            forward = self._forward_passing(tokens, attends)
            return max(forward * c, around_mlp * c + before_qkv, around_attention * c + whole)
        raw = hidden if self.has_post_norms else 0
        # dy, the value that takes the place of its gradient, and gradients of gate and up; or these two beside dh, h,
        # dx and what goes to the attention; or the attention.
        mlp, around_o = 3 * inner + hidden + raw, 2 * inner + 4 * hidden + raw + self.queries
        attention = tokens * c * self._attention_passing
        return max(tokens * c * mlp + before_o, tokens * c * around_o + before_qkv, attention + whole)

    @property
    def _attention_passing(self) -> int:
        """Numbers of a token in the backward of the attention, whose kernels sum dq in float32 and repeat dk and dv for
        all heads.
        """
        return 2 * self.hidden + 6 * self.queries + 2 * self.keys

    def _forward_passing(self, tokens: int, attends: bool) -> int:
        """Numbers in the forward of a layer that keeps little: its output; of a tile h, the sum s, gate, up, the value,
        down's product, those before norms of outputs, m of three stacks and the margins that it is written to.
        """
        _, *margins = self.margins()
        raw = self.hidden if self.has_post_norms else 0
        of_tile = 3 * (self.inner + self.hidden) + raw + sum(margins) + sum(margins[1:])
        return min(tokens, TILE) * of_tile + tokens * (self.hidden + self.queries * attends)

    def _backward_again(self, tokens: int, attends: bool) -> tuple[int, int]:
        """Numbers in the backward of a layer that computes again what it did not keep, before its attention, and there.

        First dy and, tile after tile, s, gate, up, and either the value, or dh, h, dx and what goes to the attention;
        then dx and that are joined; then the attention has q, k and v again.
        """
        hidden, inner, queries = self.hidden, self.inner, self.queries
        tile, raw = min(tokens, TILE), hidden if self.has_post_norms else 0
        heads = self.projections * (2 if self.has_head_norms else 1)
        given = hidden + queries
        of_tile = max(3 * inner + hidden + 2 * raw, 2 * inner + 3 * hidden + 2 * raw + given)
        tiled = tile * of_tile + (tokens - tile) * given + tokens * hidden
        joined = tokens * (hidden + 2 * given) if tokens > tile else 0
        again = tokens * (queries + heads) if attends else 0
        around = tokens * (self._attention_passing + heads + queries * attends)
        return max(tiled, joined) + again, around

    def _weight_gradients(self, tokens: int, *, recomputes: bool) -> tuple[int, int, int]:
        """Bytes of the gradients of a layer's own weights that there are before those of q, k and v are made; before
        that of o; and at the end. They are handed on together; of several tiles, they are added up in float32.
        """
        if not self.is_trained:
            return 0, 0, 0
        qkv, o, gate_up, down = (one.rows * one.cols for one in self.stacks)
        size = self.computed + (max(4, self.computed) if recomputes and tokens > TILE else 0)
        return (o + gate_up + down) * size, (gate_up + down) * size, (qkv + o + gate_up + down) * size

    def head_passing(self, tokens: int) -> int:
        """Bytes that come and go in the head and the loss: a chunk of logits, which their gradient replaces; the last
        hidden states, normed, and their gradient in float32. Of a trained head also its copy in c, where it is held in
        more, and its gradient in float32, which, where it is held in less, is rounded once there are no logits.
        """
        rows = min(tokens, max(1, LOGITS // self.vocabulary))
        logits = rows * self.vocabulary * self.computed
        states = tokens * self.hidden * (2 * self.size + self.computed + 4)
        if not self.is_trained:
            return logits + states
        head = self.vocabulary * self.hidden
        if self.computed < self.size:
            return logits + states + head * (4 + self.computed)
        return max(logits, head * self.computed if self.computed < 4 else 0) + states + head * 4

    def head_forward(self, tokens: int) -> int:
        """Of ``head_passing``, what the forward of a trained head takes: no gradients."""
        if not self.is_trained:
            return 0
        copy = self.vocabulary * self.hidden * self.computed if self.computed < self.size else 0
        rows = min(tokens, max(1, LOGITS // self.vocabulary))
        logits = rows * self.vocabulary * self.computed
        return logits + tokens * self.hidden * (2 * self.size + self.computed) + copy

    def margin_bytes(self, storage: str) -> int:
        """Bytes that fused layers add to the weights of one layer: the margins of stacks; of FP8, factors in parts.
        Turned FP8 weights have margins of their own: ``turned_bytes``.
        """
        if not self.is_fused or self.is_trained or storage in ("4bit", "8bit"):
            return 0
        if storage == "plain":
            pairs = zip(self.stacks, self.margins(), strict=True)
            return sum(m * (one.rows + one.cols + m) * self.computed for one, m in pairs if self.rank)
        pairs = zip(self.stacks, self.margins(_FP8_STEP), strict=True)
        # F in e4m3, both factors as they are multiplied, and the scales side by side.
        return sum(
            m * (one.rows * _FP8_PARTS + (one.rows + one.cols) * self.computed) + 4 * one.rows
            for one, m in pairs
        )

    def turned_bytes(self) -> list[int]:
        """Bytes of the turned FP8 weights of each stack, with their margins."""
        pairs = zip(self.stacks, self.margins(_FP8_STEP), strict=True)
        return [one.cols * (one.rows + _FP8_PARTS * m) for one, m in pairs]

    def unpacked_bytes(self) -> int:
        """Bytes of the buffers that all 4-bit layers share: the stacks of one layer in c."""
        margins = self.margins()
        return sum(
            (one.rows + m) * (one.cols + m) * self.computed
            for one, m in zip(self.stacks, margins, strict=True)
        )

    def split(self, degree: int) -> ActivationSizes:
        """Those of one of ``degree`` ranks that share every layer (tensor parallel): heads and MLP are cut, the
        residual stream is not.
        """
        return replace(
            self,
            inner=self.inner // degree,
            heads=self.heads // degree,
            queries=self.queries // degree,
            keys=self.keys // degree,
        )
