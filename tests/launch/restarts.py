"""The run that ``restarted.py`` starts again, and the tests run without interruption."""

from datasets import Dataset

from pantheraml import FastLanguageModel, PantheraMLDistributedTrainer, PantheraMLTrainingArguments

ROWS = Dataset.from_dict({"text": [f"The capital number {i} is {i * 7}." for i in range(64)]})


def build(model_folder, output, config=None):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(model_folder), max_seq_length=64, load_in_4bit=False, device_map="cpu", kernels="off"
    )
    args = PantheraMLTrainingArguments(
        output_dir=str(output), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=6,
        logging_steps=1, learning_rate=1e-3, report_to="none", disable_tqdm=True, save_strategy="steps", save_steps=2,
    )  # fmt: skip
    return PantheraMLDistributedTrainer(
        model, args, train_dataset=ROWS, tokenizer=tokenizer, multi_gpu_config=config
    )


def train(model_folder, output):
    trainer = build(model_folder, output)
    trainer.train()
    return [log for log in trainer.state.log_history if "grad_norm" in log]
