"""A GPT-2 of Hugging Face's, from its configuration, in four stages; it learns to repeat a rhyme.

pip install 'dtrp[transformers]'
python examples/hugging_face.py
"""

import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

import dtrp

torch.manual_seed(0)
text = "one two three four five, once I caught a fish alive. " * 40
characters = sorted(set(text))
tokens = torch.tensor([characters.index(character) for character in text])
windows = tokens[: len(tokens) // 17 * 17].view(-1, 17)  # (N, 17): 16 characters and the one that follows

config = GPT2Config(
    vocab_size=len(characters), n_positions=16, n_embd=32, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0,
    tie_word_embeddings=False,  # embedding and head lie in different stages, which only bp and gpipe can train as one
)  # fmt: skip
model = GPT2LMHeadModel(config)
stages = dtrp.split(model, num_stages=4, example=windows[:2, :-1])
print(f"stages begin at {', '.join(stages.points)}")

pipe = dtrp.Pipeline(
    stages,
    lambda params: torch.optim.AdamW(params, lr=3e-3),
    lambda out, y: cross_entropy(out.logits.flatten(0, 1), y.flatten()),
    method="dtrp",
    num_microbatches=4,
    loss_weight=lambda y: (y != -100).sum(),  # the labels that cross_entropy counts: all of these, not those of padding
)
for epoch in range(8):
    for batch in windows[torch.randperm(len(windows))].split(32):
        loss = pipe.step(batch[:, :-1], batch[:, 1:])
    print(f"epoch {epoch + 1}: loss {loss:.3f}")
pipe.flush()
pipe.save_model("gpt2.pt")  # loads into the model as it was
model.load_state_dict(torch.load("gpt2.pt"))
