"""lm-evaluation-harness on a loaded artifact: its HFLM takes the model as it is. A task of its own, nothing downloaded.

The answers here are what the unquantized model itself likes best, so the accuracy is the share of questions that the
int8 model answers alike.
"""

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

import tempfile

import lm_eval
import torch
from datasets import Dataset
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import fuseline
from fuseline.models import load

words = [f"w{n}" for n in range(200)]
vocabulary = {word: n for n, word in enumerate(["<pad>", "<eos>", *words])}
raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>")

model = load("demo:tiny-llama").model
questions = []
for n in range(24):
    context, choices = " ".join(words[n : n + 6]), [words[(7 * n + k) % 200] for k in (3, 50, 90, 140)]
    ids = torch.tensor([tokenizer(context, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
    best = max(range(4), key=lambda k: logits[vocabulary[choices[k]]].item())
    questions.append({"context": context, "choices": choices, "answer": best})

with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    optimized = fuseline.optimize(model, "raise,quantize{weights=int8},fuse")
    optimized(torch.arange(8)[None])
    fuseline.save(optimized, folder)
    loaded = fuseline.load(folder)

task = {
    "task": "local",
    "custom_dataset": lambda **_: {"test": Dataset.from_list(questions)},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}],
}
evaluated = HFLM(pretrained=loaded, tokenizer=tokenizer, backend="causal", batch_size=8, device="cpu")
results = lm_eval.simple_evaluate(evaluated, tasks=[task], task_manager=TaskManager(), bootstrap_iters=0)
print(f"acc {results['results']['local']['acc,none']:.3f}")
