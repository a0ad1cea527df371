"""Checkpoints of well-known shapes with random weights, made on the machine that runs the benchmark."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

LLAMA_8B = dict(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
# For trying the commands themselves, on a CPU too.
TINY = LLAMA_8B | dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=2048,
)
LLAMA_70B = LLAMA_8B | dict(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
)
LLAMA_1B = LLAMA_8B | dict(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64, tie_word_embeddings=True
)
LLAMA_32B = LLAMA_8B | dict(
    hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40
)
SHAPES: dict[str, dict[str, Any]] = {
    "llama1b": LLAMA_1B,
    "llama8b": LLAMA_8B,
    "llama32b": LLAMA_32B,
    "llama70b": LLAMA_70B,
    "tiny": TINY,
}


def checkpoint(shape: str, layers: int | None = None) -> Path:
    """The folder of a random checkpoint of ``shape``, made in the temporary folder if it is not there yet."""
    count = layers or SHAPES[shape]["num_hidden_layers"]
    folder = Path(tempfile.gettempdir()) / f"pantheraml-{shape}-{count}"
    if not (folder / "tokenizer.json").exists():  # written last
        make_llama(folder, shape=shape, layers=count)
    return folder


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """``--model``, or the ``--shape`` and ``--layers`` of a random one; ``model_of`` reads them."""
    parser.add_argument("--model", help="model folder or hub id")
    parser.add_argument("--shape", choices=SHAPES, default="llama8b")
    parser.add_argument("--layers", type=int, help="layers of the checkpoint that is made")


def model_of(options: argparse.Namespace) -> str:
    """The model that a benchmark was told, or one that is made."""
    return str(Path(options.model).resolve() if options.model else checkpoint(options.shape, options.layers))


def make_llama(
    folder: Path, *, shape: str = "llama8b", layers: int | None = None, device: str | None = None
) -> None:
    """Write a bfloat16 checkpoint of ``shape`` (``layers`` of its layers) and a small byte-level tokenizer."""
    from transformers import LlamaConfig

    sizes = SHAPES[shape]
    config = LlamaConfig(**{**sizes, "num_hidden_layers": layers or sizes["num_hidden_layers"]})
    save_random(config, folder, device=device)


def save_random(config: Any, folder: Path, *, device: str | None = None) -> None:
    """Write a bfloat16 checkpoint of ``config`` with random weights, and a small byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    save_random_weights(config, folder, device)
    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([Path(__file__).read_text()], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="right",
        model_max_length=config.max_position_embeddings,
    )
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    tokenizer.save_pretrained(folder)


def save_random_weights(config: Any, folder: Path, device: str | None) -> None:
    """Write what ``config`` describes, a decoder layer after the other: no more than one of them is in memory."""
    import torch
    from safetensors.torch import save_file
    from torch import nn
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures, config.dtype = [type(model).__name__], torch.bfloat16
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    layers = next(name for name, part in model.named_modules() if isinstance(part, nn.ModuleList))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    groups = [(f"{layers}.{index}", layer) for index, layer in enumerate(model.get_submodule(layers))]
    for parent, prefix in ((model.model, "model."), (model, "")):
        for name, child in parent.named_children():
            beside = list(child.parameters()) and child is not model.model and f"{prefix}{name}" != layers
            if beside and not (tied and child is model.get_output_embeddings()):
                groups.append((f"{prefix}{name}", child))
    places: dict[str, str] = {}
    for number, (path, part) in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        part.to_empty(device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
        part.apply(model._init_weights)
        tensors = {f"{path}.{name}": tensor for name, tensor in part.state_dict().items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        part.to("meta")
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
