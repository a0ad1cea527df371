"""PantheraMLTrainingArguments on the machine at hand."""

from __future__ import annotations

import torch

from pantheraml import PantheraMLTrainingArguments, is_bfloat16_supported


def test_the_known_lines_about_precision_are_accepted_with_and_without_a_gpu(tmp_path):
    args = PantheraMLTrainingArguments(
        output_dir=str(tmp_path),
        bf16=is_bfloat16_supported(),
        fp16=not is_bfloat16_supported(),
    )
    assert args.bf16 is not args.fp16
    assert args.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
