"""Scripts: one in the form of TRL 0.11 runs on changed import lines, and the example with several values."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from ppo_setup import trainer
from tiny import tiny_causal_lm, tiny_folder

from fastalign import UserError
from fastalign.train import AutoModelForCausalLMWithValueHead

ROOT = Path(__file__).parents[2]

# As scripts of that age are written; only the imports name another package.
SENTIMENT = """
import torch
from transformers import AutoTokenizer
from datasets import Dataset
from fastalign.train.ppo import PPOConfig, PPOTrainer
from fastalign.train.ppo_rollout import LengthSampler
from fastalign.train.value_head import AutoModelForCausalLMWithValueHead, create_reference_model

config = PPOConfig(model_name=FOLDER, learning_rate=1e-3, log_with=None, batch_size=4, mini_batch_size=2,
                   gradient_accumulation_steps=2, optimize_cuda_cache=True, early_stopping=False, target_kl=0.1,
                   ppo_epochs=2, seed=0, init_kl_coef=0.2, adap_kl_ctrl=True, steps=20000)
tokenizer = AutoTokenizer.from_pretrained(config.model_name)
tokenizer.pad_token = tokenizer.eos_token

def build_dataset():
    input_size = LengthSampler(2, 5)
    ds = Dataset.from_dict({"review": ["the cat sat on the mat", "a very good dog", "hello world, tell me a story",
                                       "the house is big and red", "no thank you"] * 2, "label": [0, 1] * 5})
    def tokenize(sample):
        sample["input_ids"] = tokenizer.encode(sample["review"])[: input_size()]
        sample["query"] = tokenizer.decode(sample["input_ids"])
        return sample
    ds = ds.map(tokenize, batched=False)
    ds.set_format(type="torch")
    return ds

def collator(data):
    return dict((key, [d[key] for d in data]) for key in data[0])

model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
ref_model = create_reference_model(model)
ppo_trainer = PPOTrainer(config, model, ref_model, tokenizer, dataset=build_dataset(), data_collator=collator)
device = ppo_trainer.accelerator.device
output_length_sampler = LengthSampler(3, 6)
generation_kwargs = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True}
generation_kwargs["pad_token_id"] = tokenizer.eos_token_id

all_stats = []
for epoch, batch in enumerate(ppo_trainer.dataloader):
    query_tensors = batch["input_ids"]
    response_tensors = []
    for query in query_tensors:
        gen_len = output_length_sampler()
        generation_kwargs["max_new_tokens"] = gen_len
        response = ppo_trainer.generate(query, **generation_kwargs)
        response_tensors.append(response.squeeze()[-gen_len:])
    batch["response"] = [tokenizer.decode(r.squeeze()) for r in response_tensors]
    texts = [q + r for q, r in zip(batch["query"], batch["response"])]
    rewards = [torch.tensor(float(len(text))) for text in texts]
    stats = ppo_trainer.step(query_tensors, response_tensors, rewards)
    ppo_trainer.log_stats(stats, batch, rewards)
    all_stats.append(stats)
model.save_pretrained(OUT)
tokenizer.save_pretrained(OUT)
"""

# The form of MAP's script: lists throughout, responses with their prompts, scores of shape (1,).
SEVERAL = """
import torch
from transformers import AutoTokenizer
from datasets import Dataset
from fastalign.train.ppo import PPOConfig, PPOTrainer
from fastalign.train.value_head import AutoModelForCausalLMWithValueHead

batch_size, mini_batch_size = 4, 2
config = PPOConfig(model_name=FOLDER, learning_rate=1e-3, batch_size=batch_size, mini_batch_size=mini_batch_size,
                   gradient_accumulation_steps=int(batch_size // mini_batch_size))
tokenizer = AutoTokenizer.from_pretrained(config.model_name)
tokenizer.padding_side = "left"
ds = Dataset.from_dict({"text": ["the cat", "a dog sat", "hello", "why not", "please review"]})
ds = ds.map(lambda s: {"input_ids": tokenizer.encode(s["text"]), "query": s["text"]}, batched=False)
ds.set_format(type="torch")
model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
ref_model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
ppo_trainer = PPOTrainer(config, model, ref_model, tokenizer, dataset=ds,
                         data_collator=lambda data: dict((key, [d[key] for d in data]) for key in data[0]))
generation_config = {"max_new_tokens": 5, "temperature": 1, "top_k": 50, "do_sample": True,
                     "pad_token_id": tokenizer.eos_token_id}
lam, all_stats = torch.tensor([0.5, 2.0]), []
for batch in ppo_trainer.dataloader:
    query_tensors = batch["input_ids"]
    remove_padding = tokenizer.bos_token_id != tokenizer.eos_token_id
    response_tensors = ppo_trainer.generate(query_tensors, remove_padding=remove_padding, **generation_config)
    batch["response"] = [tokenizer.decode(r.squeeze()) for r in response_tensors]
    reward_vectors = [[float(len(t)) for t in batch["response"]], [float(t.count("a")) for t in batch["response"]]]
    reward_matrix = torch.tensor(reward_vectors, dtype=torch.float32)
    reward_final = torch.matmul(lam, reward_matrix)
    reward_final_list = [reward_final.unsqueeze(1)[i] for i in range(reward_final.shape[0])]
    stats = ppo_trainer.step(query_tensors, response_tensors, reward_final_list)
    ppo_trainer.log_stats(stats, batch, reward_vectors[0])
    all_stats.append(stats)
ppo_trainer.save_pretrained(OUT)
"""


@pytest.mark.parametrize("script", [SENTIMENT, SEVERAL], ids=["sentiment", "several values"])
def test_a_script_of_trl_0_11_runs(script, tmp_path):
    from transformers import AutoModelForCausalLM

    space = {"FOLDER": str(tiny_folder(tmp_path / "base", scale=1.0)), "OUT": str(tmp_path / "out")}
    exec(script, space)
    assert len(space["all_stats"]) == (2 if script is SENTIMENT else 1)
    for stats in space["all_stats"]:
        assert torch.isfinite(torch.tensor([stats["ppo/loss/total"], stats["objective/kl"]])).all()
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("base", "out"))
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("ppo_several_values", ROOT / "examples" / "ppo_several_values.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("chat", [False, True])
def test_the_example_with_several_values(example, tmp_path, chat):
    folder = tiny_folder(tmp_path / "base", chat=chat, scale=1.0)
    (tmp_path / "prompts.txt").write_text("the cat\na big dog\nhello\nwhy\nreview the house\n")
    history = example.main(
        f"--model_name {folder} --data_name {tmp_path / 'prompts.txt'} --value_list diversity,readability --lam_list "
        f"1,0.5 --batch_size 4 --mini_batch_size 2 --nepoch 2 --max_new_tokens 4 --save_path {tmp_path / 'out'}".split()
    )
    assert len(history) == 2 and set(history[0]) == {"diversity", "readability", "KL"}
    assert (tmp_path / "out" / "value_head" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_the_example_refuses_in_one_line(example, capsys):
    for argv, rule in (
        ("--value_list a,b --lam_list 1", "--lam_list must have 2 numbers, got 1"),
        ("--batch_size 5 --mini_batch_size 2", "--batch_size must be a multiple of --mini_batch_size"),
    ):
        with pytest.raises(SystemExit):
            example.main(argv.split())
        assert rule in capsys.readouterr().err


class Tuples(torch.utils.data.Dataset):
    """Rows that are no mappings."""

    def __init__(self, row):
        self.row = row

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return self.row(i)


def test_rows_of_tuples_take_torchs_collator():
    one = trainer(dataset=Tuples(lambda i: (torch.arange(3, 9) + i, torch.arange(5, 9))))
    (batch,) = one.dataloader
    queries, responses = batch
    assert queries.shape == (4, 6) and responses.shape == (4, 4)
    stats = one.step(list(queries), list(responses), [torch.tensor(float(i)) for i in range(4)])
    assert stats["ppo/loss/total"] == stats["ppo/loss/total"]
    ragged = trainer(dataset=Tuples(lambda i: (torch.arange(3 + i),)))
    with pytest.raises(UserError, match="dataset needs a data_collator"):
        next(iter(ragged.dataloader))
    unlike = trainer(dataset=Tuples(lambda i: {"query": "a"} | ({"input_ids": [1]} if i % 2 else {})))
    with pytest.raises(UserError, match="dataset must have the same columns in every row"):
        next(iter(unlike.dataloader))


@pytest.mark.parametrize(
    "message, given, dropout", [(None, 0.3, 0.3), (0.5, 0.3, 0.5), (0.5, None, 0.5), (None, None, 0.1)]
)
def test_the_value_heads_dropout_is_the_configurations(message, given, dropout):
    model = tiny_causal_lm()
    if message is not None:
        model.config.summary_dropout_prob = message
    options = {} if given is None else {"summary_dropout_prob": given}
    assert AutoModelForCausalLMWithValueHead.from_pretrained(model, **options).v_head.dropout.p == dropout


def test_class_attributes_that_scripts_read():
    cls = AutoModelForCausalLMWithValueHead
    assert cls.transformers_parent_class is transformers.AutoModelForCausalLM
    assert any(hasattr(cls.from_pretrained(tiny_causal_lm()).pretrained_model, name) for name in cls.lm_head_namings)
    assert set(cls.supported_args) == {"summary_dropout_prob", "v_head_initializer_range", "v_head_init_strategy"}
    assert cls.supported_modules == ("v_head",)
